"""Device code of the Hopper kernel for plain MXFP8 weights and few tokens: sums of blocks of 32 of K, each times its two scales."""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from . import cluster_device as cluster
from .fp8_decode_sums_device import tile_layout

ROWS = gl.constexpr(64)     # weight rows that wgmma takes and a slot has room for; a tile has BN of them
LEAST = gl.constexpr(0x00400000)    # bits of 2^-127, for code 0
LARGEST = gl.constexpr(3.4028234663852886e38)       # what a product of scales beyond FP32 counts as
HIGH = gl.constexpr(-2139062144)    # 0x80808080: the upper bit of each code
ALL = gl.constexpr(tl.PropagateNan.ALL)
X_PARAMETER = gl.constexpr(7)       # the tokens' descriptor, by PTX: those of the weights come with three sizes and three strides


@gluon.jit
def full_at(slot, cfg: gl.constexpr):
    """The address of a slot's barrier: behind both rings, in their allocation. Boxes, and powers, make it full."""
    return cluster.start_of_shared() + (cfg.STAGES * (ROWS + cfg.BT) * 128 + slot * 8)


@constexpr_function
def row_codes():
    """Of codes int32 [64, 4]: a thread holds those of its two rows of the sums."""
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [8, 0]], lanes, [[16, 0], [32, 0]], [], [64, 4])


@gluon.jit
def columns_of(codes):
    """[R, 4] as four [R]."""
    R: gl.constexpr = codes.shape[0]
    even, odd = gl.split(gl.reshape(codes, [R, 2, 2]))
    a, c = gl.split(even)
    b, d = gl.split(odd)
    return a, b, c, d


@gluon.jit
def rows_of(codes, layout: gl.constexpr):
    """`columns_of` codes in the layout `row_codes`, each as a thread has its rows of the sums."""
    a, b, c, d = columns_of(codes)
    return (gl.convert_layout(a, layout, assert_trivial=True), gl.convert_layout(b, layout, assert_trivial=True),
            gl.convert_layout(c, layout, assert_trivial=True), gl.convert_layout(d, layout, assert_trivial=True))


@gluon.jit
def has_nan(v):
    """Not zero where one of four codes is 255."""
    return (~v - 0x01010101) & v & HIGH


@gluon.jit
def power(v, j: gl.constexpr):
    """2^(c - 127) of code j of each four; infinity for 255."""
    if j == 3:
        bits = (v >> 1) & 0x7F800000
    else:
        bits = (v << (23 - 8 * j)) & 0x7F800000
    return gl.maximum(bits, LEAST).to(gl.float32, bitcast=True)


@gluon.jit
def start(views, slot, p, STEP: gl.constexpr, cfg: gl.constexpr):
    """Start the sums of GROUP blocks of a slot; p comes in only to keep its registers."""
    w_v, x_v = views
    w = w_v.index(slot)
    x = x_v.index(cfg.X_AT + slot)
    GROUP: gl.constexpr = cfg.GROUP
    out = ()
    for j in gl.static_range(GROUP):
        a = w.slice(32 * (STEP * GROUP + j), 32, 1)
        b = x.slice(32 * (STEP * GROUP + j), 32, 1).permute((1, 0))
        out = out + (warpgroup_mma(a, b, p[j], use_acc=False, is_async=True), )
    return out


@gluon.jit
def token_powers(s_s, slot, STEP: gl.constexpr, cfg: gl.constexpr, layout: gl.constexpr):
    """[BT] of each of a step's blocks: what the scaler has left in the slot."""
    GROUP: gl.constexpr = cfg.GROUP
    out = ()
    for j in gl.static_range(GROUP):
        out = out + (s_s.index(slot * 4 + (STEP * GROUP + j)).load(layout), )
    return out


@gluon.jit
def promote(acc, p, v, fx, STEP: gl.constexpr, TAME: gl.constexpr, cfg: gl.constexpr):
    """acc += sums of GROUP blocks, each by its scales."""
    GROUP: gl.constexpr = cfg.GROUP
    for j in gl.static_range(GROUP):
        w, x = gl.broadcast(gl.expand_dims(power(v, STEP * GROUP + j), 1), gl.expand_dims(fx[j], 0))
        both = w * x
        if TAME == 0:
            both = gl.minimum(both, LARGEST, propagate_nan=ALL)
        acc = gl.fma(p[j], both, acc)
    return acc


@gluon.jit
def kept(acc, p, PENDING: gl.constexpr, cfg: gl.constexpr):
    """Keeps the sums in front of the wgmma that reuses p's registers, else p is copied."""
    if cfg.GROUP == 4:
        acc, a, b, c, d = warpgroup_mma_wait(PENDING, deps=(acc, p[0], p[1], p[2], p[3]))
        return acc, (a, b, c, d)
    else:
        acc, a, b = warpgroup_mma_wait(PENDING, deps=(acc, p[0], p[1]))
        return acc, (a, b)


@gluon.jit
def next_slot(slot, phase, cfg: gl.constexpr):
    """The consumer's next slot: consumers take slots in turn, and there is a multiple of them."""
    slot += cfg.CONSUMERS
    wrap = slot >= cfg.STAGES
    return gl.where(wrap, slot - cfg.STAGES, slot), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def trip_codes(w_codes, t, layout: gl.constexpr, cfg: gl.constexpr, CID: gl.constexpr):
    """The codes of the next four K blocks that a consumer takes, a row each; with two consumers of every other one from t on."""
    v = rows_of(w_codes.index(t).load(row_codes()), layout)
    if cfg.CONSUMERS == 1:
        return v
    else:
        u = rows_of(w_codes.index(t + 1).load(row_codes()), layout)
        return v[CID], v[CID + 2], u[CID], u[CID + 2]


@gluon.jit
def sums(views, s_s, w_codes, bars, trips, TAME: gl.constexpr, cfg: gl.constexpr, CID: gl.constexpr):
    """[64, BT] over every CONSUMERS-th K block. TAME: no code of a weight is above 127, so that no product of scales is beyond
    FP32."""
    empty, ready = bars
    BT: gl.constexpr = cfg.BT
    GROUP: gl.constexpr = cfg.GROUP
    STEPS: gl.constexpr = 4 // GROUP        # of a slot
    mma: gl.constexpr = tile_layout(BT)
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    tokens: gl.constexpr = gl.SliceLayout(0, mma)
    acc = gl.zeros([64, BT], gl.float32, mma)
    p = (acc, acc)
    if GROUP == 4:
        p = (acc, acc, acc, acc)
    q = p
    w_nan = gl.zeros([64], gl.int32, rows)
    slot = gl.to_tensor(CID)
    phase = gl.to_tensor(0)
    for t in range(0, trips, cfg.CONSUMERS):
        v = trip_codes(w_codes, t, rows, cfg, CID)
        if TAME == 0:
            for i in gl.static_range(4):
                w_nan |= has_nan(v[i])
        cluster.wait(full_at(slot, cfg), phase, 1)
        p = start(views, slot, p, 0, cfg)
        at = slot
        for i in gl.static_range(4 * STEPS):
            fx = token_powers(s_s, at, i % STEPS, cfg, tokens)
            if i + 1 < 4 * STEPS:
                if (i + 1) % STEPS == 0:
                    slot, phase = next_slot(slot, phase, cfg)
                    cluster.wait(full_at(slot, cfg), phase, 1)
                q = start(views, slot, q, (i + 1) % STEPS, cfg)
            p = warpgroup_mma_wait(GROUP if i + 1 < 4 * STEPS else 0, deps=p)
            if i % STEPS == STEPS - 1:
                # loads of fx may be on their way: what comes to their place is stored by a warp, in order behind them, not brought by TMA,
                # which needs `landed`
                mbarrier.arrive(empty.index(at), count=1)
                at = slot
            acc = promote(acc, p, v[i // STEPS], fx, i % STEPS, TAME, cfg)
            acc, p = kept(acc, p, GROUP if i + 1 < 4 * STEPS else 0, cfg)
            p, q = q, p
        slot, phase = next_slot(slot, phase, cfg)
    if TAME == 0:
        bad, acc = gl.broadcast(gl.expand_dims(w_nan, 1), acc)
        acc = gl.where(bad != 0, float("nan"), acc)
    return acc
