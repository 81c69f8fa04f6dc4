"""Device code of the Hopper FP8 decode kernel: the sums of a tile over its K blocks, on the tensor cores.

A consumer's weight rows are PIECES of 64, one wgmma each. A step is one piece of one K block:

    start 0 | start 1, promote 0 | start 2, promote 1 | ... | promote last

A trip of K blocks ends with nothing in flight: ptxas serialises wgmma whose sums are in flight across the back edge of a
loop. Waiting for the next block while this one's slot is held costs a slot of the ring: trips are of one block where memory
is what holds the kernel.

Loads of scales may be on their way when a slot is given back: what comes into their place is stored by a warp, and such stores
don't overtake loads, as TMA does (`landed_device.py`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .fp8_decode_schedule_device import advance
from .shim import view_as


@constexpr_function
def tile_layout(NT):
    """Of one piece's sums."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, NT, 32])


@constexpr_function
def box_layout(BOX):
    """Of a piece's 64 rows and BOX K blocks, as they are in a box [8, BOX, 8, 128]: row groups, K blocks, rows, swizzled by row."""
    offsets = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [0, 32], [0, 64], [1, 16], [2, 32], [4, 64]]
    while BOX > 1:
        BOX //= 2
        offsets.insert(10, [0, 128 * BOX])
    return gl.SharedLinearLayout([*offsets, [8, 0], [16, 0], [32, 0]], [], 1024)


@constexpr_function
def trip_blocks(cfg, NT):
    return cfg.TRIP if NT == cfg.BT else cfg.TRIP_MIDDLE if NT == cfg.MIDDLE else cfg.TRIP_NARROW


@constexpr_function
def slots_of(blocks, cfg):
    """Slots of a trip; 0: several K blocks of a slot, one by one."""
    return 0 if blocks == 1 < cfg.BOX else max(blocks // cfg.BOX, 1)


@gluon.jit
def start(views, slot, p, cfg: gl.constexpr, CID: gl.constexpr, PIECE: gl.constexpr, NT: gl.constexpr, AT: gl.constexpr):
    """Start the partial sum of one piece over one K block, the slot's AT-th; p comes in only to keep its registers."""
    w_v, x_v = views
    P: gl.constexpr = cfg.PIECES
    w = w_v.index((cfg.W_AT + slot) * (cfg.CONSUMERS * P) + (CID * P + PIECE))
    if cfg.BOX > 1:
        w = w.slice(AT * 128, 128, dim=1)
    x = x_v.index((cfg.X_AT + slot * cfg.BOX + AT) * (cfg.BT // NT))
    return warpgroup_mma(w, x.permute((1, 0)), p, use_acc=False, is_async=True)


@gluon.jit
def promote(acc, p, s):
    """acc += p * s, a scale a token: one FMA an element."""
    s, p = gl.broadcast(gl.expand_dims(s, 0), p)
    return gl.fma(p, s, acc)


@gluon.jit
def replaced(acc, one, PIECE: gl.constexpr, cfg: gl.constexpr):
    out = ()
    P: gl.constexpr = cfg.PIECES
    for i in gl.static_range(P):
        if i == PIECE:
            out = out + (one, )
        else:
            out = out + (acc[i], )
    return out


@gluon.jit
def trip(acc, p, slot, phase, views, s_s, bars, cfg: gl.constexpr, CID: gl.constexpr, NT: gl.constexpr, COUNT: gl.constexpr):
    """COUNT slots from `slot` on: (acc, p, slot, phase), with nothing in flight."""
    full, empty = bars
    P: gl.constexpr = cfg.PIECES
    BOX: gl.constexpr = cfg.BOX
    EACH: gl.constexpr = BOX * P
    STEPS: gl.constexpr = COUNT * EACH
    tokens: gl.constexpr = gl.SliceLayout(0, tile_layout(NT))
    q = gl.zeros_like(p)
    mbarrier.wait(full.index(cfg.F_AT + slot), phase)
    p = start(views, slot, p, cfg, CID, 0, NT, 0)
    s = s_s.index(slot * BOX).slice(0, NT).load(tokens)
    at = slot
    for i in gl.static_range(STEPS):
        if i + 1 < STEPS:
            if (i + 1) % EACH == 0:
                slot, phase = advance(slot, phase, cfg.STAGES)
                mbarrier.wait(full.index(cfg.F_AT + slot), phase)
            q = start(views, slot, q, cfg, CID, (i + 1) % P, NT, (i + 1) // P % BOX)
        if i > 0 and i % P == 0:
            s = s_s.index(at * BOX + i // P % BOX).slice(0, NT).load(tokens)
        p = warpgroup_mma_wait(1 if i + 1 < STEPS else 0, deps=(p, ))
        if i % EACH == EACH - 1:
            mbarrier.arrive(empty.index(at), count=1)
            at = slot
        one = promote(acc[i % P], p, s)
        if STEPS > 1:
            # keeps the promotion in front of the wgmma that reuses p's registers, else p is copied
            one, p = warpgroup_mma_wait(1 if i + 1 < STEPS else 0, deps=(one, p))
        acc = replaced(acc, one, i % P, cfg)
        p, q = q, p
    slot, phase = advance(slot, phase, cfg.STAGES)
    return acc, p, slot, phase


@gluon.jit
def one_by_one(acc, p, slot, phase, views, s_s, bars, cfg: gl.constexpr, CID: gl.constexpr, NT: gl.constexpr):
    """`trip` of one slot of several K blocks, of which each is waited for: there are no registers for two partial sums."""
    full, empty = bars
    P: gl.constexpr = cfg.PIECES
    BOX: gl.constexpr = cfg.BOX
    tokens: gl.constexpr = gl.SliceLayout(0, tile_layout(NT))
    mbarrier.wait(full.index(cfg.F_AT + slot), phase)
    for i in gl.static_range(BOX):
        s = s_s.index(slot * BOX + i).slice(0, NT).load(tokens)
        for j in gl.static_range(P):
            p = start(views, slot, p, cfg, CID, j, NT, i)
            p = warpgroup_mma_wait(0, deps=(p, ))
            if i * P + j == BOX * P - 1:
                mbarrier.arrive(empty.index(slot), count=1)
            acc = replaced(acc, promote(acc[j], p, s), j, cfg)
    slot, phase = advance(slot, phase, cfg.STAGES)
    return acc, p, slot, phase


@gluon.jit
def multiply(rings, bars, slot, phase, k0, k1, cfg: gl.constexpr, CID: gl.constexpr, NT: gl.constexpr):
    """Sums of K blocks [k0, k1) for the consumer's weight rows and the first NT tokens of the slots, piece by piece."""
    w_s, x_s, s_s = rings
    P: gl.constexpr = cfg.PIECES
    T: gl.constexpr = slots_of(trip_blocks(cfg, NT), cfg)
    if cfg.BOX > 1:
        w_v = view_as(w_s, gl.float8e4nv, cfg.STAGES * cfg.CONSUMERS * P, 64, cfg.BOX * 128, box_layout(cfg.BOX))
    else:
        w_v = view_as(w_s, gl.float8e4nv, (cfg.W_AT + cfg.STAGES) * cfg.CONSUMERS * P, 64, 128,
                      gl.NVMMASharedLayout.get_default_for([64, 128], gl.float8e4nv))
    x_v = view_as(x_s, gl.float8e4nv, (cfg.X_AT + cfg.STAGES * cfg.BOX) * (cfg.BT // NT), NT, 128,
                  gl.NVMMASharedLayout.get_default_for([NT, 128], gl.float8e4nv))
    views = (w_v, x_v)
    p = gl.zeros([64, NT], gl.float32, tile_layout(NT))
    acc = ()
    for i in gl.static_range(P):
        acc = acc + (gl.zeros([64, NT], gl.float32, tile_layout(NT)), )
    if T == 0:
        for _ in range(k0, k1):
            acc, p, slot, phase = one_by_one(acc, p, slot, phase, views, s_s, bars, cfg, CID, NT)
    elif T > 1:
        rest = (k1 - k0) % T
        for _ in range(0, rest):
            acc, p, slot, phase = trip(acc, p, slot, phase, views, s_s, bars, cfg, CID, NT, 1)
        for _ in range(k0 + rest, k1, T):
            acc, p, slot, phase = trip(acc, p, slot, phase, views, s_s, bars, cfg, CID, NT, T)
    else:
        for _ in range(k0, k1):
            acc, p, slot, phase = trip(acc, p, slot, phase, views, s_s, bars, cfg, CID, NT, 1)
    return acc, slot, phase
