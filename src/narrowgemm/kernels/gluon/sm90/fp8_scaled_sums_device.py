"""The sums of the Hopper FP8 kernels with row-wise, tensor-wise or 1x128 x 1x128 scales: wgmma of K blocks and their promotion to FP32,
in three arrangements."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

from .fp8_block_parts_device import advance
from .fp8_block_schedule_device import fresh


# ---------------------------------------------------------------- sums in parts of 64 columns
@gluon.jit
def halves(x, HALF: gl.constexpr):
    """[64, 2 * HALF] in two along N. They are different registers of each thread: nothing moves."""
    lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
    left, right = gl.split(gl.permute(gl.reshape(x, [64, 2, HALF]), (0, 2, 1)))
    return gl.convert_layout(left, lay, assert_trivial=True), gl.convert_layout(right, lay, assert_trivial=True)


@gluon.jit
def cut(x, COLS: gl.constexpr):
    """[64, COLS] in parts of 64 columns."""
    gl.static_assert(COLS == 64 or COLS == 128 or COLS == 256)
    if COLS == 64:
        return (x, )
    elif COLS == 128:
        return halves(x, 64)
    else:
        left, right = halves(x, 128)
        return halves(left, 64) + halves(right, 64)


@gluon.jit
def cut_all(acc, cfg: gl.constexpr):
    """Both parts of the sums as tensors of 64 columns."""
    out = cut(acc[0], cfg.COLS0)
    if cfg.COLS1 > 0:
        out = out + cut(acc[1], cfg.COLS1)
    return out


@gluon.jit
def piece_of(parts, cfg: gl.constexpr, PIECE: gl.constexpr):
    """The sums of one piece, 64 columns each."""
    EACH: gl.constexpr = cfg.WN // 64
    out = ()
    for j in gl.static_range(EACH):
        out = out + (parts[PIECE * EACH + j], )
    return out


# ---------------------------------------------------------------- one wgmma or two, promoted every PROMOTE blocks
@gluon.jit
def zeros(cfg: gl.constexpr, mma0: gl.constexpr, mma1: gl.constexpr):
    """A warpgroup's sums, one a wgmma."""
    COLS0: gl.constexpr = cfg.COLS0
    COLS1: gl.constexpr = cfg.COLS1
    out = (gl.zeros([64, COLS0], gl.float32, mma0), )
    if cfg.COLS1 > 0:
        out = out + (gl.zeros([64, COLS1], gl.float32, mma1), )
    return out


@gluon.jit
def pending(p, cfg: gl.constexpr):
    """Sums as what a wgmma in flight may hold."""
    out = (warpgroup_mma_init(p[0]), )
    if cfg.COLS1 > 0:
        out = out + (warpgroup_mma_init(p[1]), )
    return out


@gluon.jit
def settle(p, blocks: gl.constexpr, cfg: gl.constexpr):
    """Wait until no more than `blocks` K blocks are in flight."""
    if cfg.COLS1 > 0:
        return warpgroup_mma_wait(2 * blocks, deps=(p[0], p[1]))
    else:
        return (warpgroup_mma_wait(blocks, deps=(p[0], )), )


@gluon.jit
def multiply(views, place, p, use, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr):
    """Start p (+)= A . B^T over one K block; `use`: p is added to."""
    a_v, b0_v, b1_v = views
    a = a_v.index(place * cfg.WGM + WM)
    b = b0_v.index(place * cfg.WGN + WN).permute((1, 0))
    out = (warpgroup_mma(a, b, p[0], use_acc=use, is_async=True), )
    if cfg.COLS1 > 0:
        b = b1_v.index(place * cfg.WGN + WN).permute((1, 0))
        out = out + (warpgroup_mma(a, b, p[1], use_acc=use, is_async=True), )
    return out


@gluon.jit
def run(views, bars, slot, phase, p, n, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr):
    """The tensor core's sum of the next n > 0 K blocks. p comes in only to keep its registers. Leaves nothing in flight:
    (sums, slot, phase)."""
    full, empty = bars
    p = pending(p, cfg)
    old = fresh(slot)
    for j in range(n):
        mbarrier.wait(full.index(slot), phase)
        p = multiply(views, slot, p, j > 0, cfg, WM, WN)
        # the block before is done once this one is the only one in flight
        p = pending(settle(p, 1, cfg), cfg)
        mbarrier.arrive(empty.index(old), count=1, pred=j > 0)
        old = fresh(slot)
        slot, phase = advance(slot, phase, cfg.STAGES)
    p = settle(p, 0, cfg)
    mbarrier.arrive(empty.index(old), count=1)
    return p, slot, phase


@gluon.jit
def add(acc, p, cfg: gl.constexpr):
    """acc + p, in front of the wgmma that takes p's registers next."""
    if cfg.COLS1 > 0:
        x, y, u, v = warpgroup_mma_wait(0, deps=(acc[0] + p[0], acc[1] + p[1], p[0], p[1]))
        return (x, y), (u, v)
    else:
        x, u = warpgroup_mma_wait(0, deps=(acc[0] + p[0], p[0]))
        return (x, ), (u, )


@gluon.jit
def products(views, bars, slot, phase, count, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr, mma0: gl.constexpr,
             mma1: gl.constexpr):
    """FP32 sums over the next `count` K blocks, promoted every PROMOTE of them: (sums, slot, phase)."""
    acc = zeros(cfg, mma0, mma1)
    if cfg.PROMOTE == 0:
        if count > 0:
            acc, slot, phase = run(views, bars, slot, phase, acc, count, cfg, WM, WN)
    else:
        p = zeros(cfg, mma0, mma1)
        for first in range(0, count, cfg.PROMOTE):
            p, slot, phase = run(views, bars, slot, phase, p, gl.minimum(count - first, cfg.PROMOTE), cfg, WM, WN)
            acc, p = add(acc, p, cfg)
    return acc, slot, phase


# ---------------------------------------------------------------- sums of blocks that have scales of their own
@gluon.jit
def block_scales(scale_views, slot, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr, mma: gl.constexpr):
    """Scales of a slot's K block: of this warpgroup's 64 rows, and of its columns."""
    sa_v, sb_v = scale_views
    return (sa_v.index(slot * cfg.WGM + WM).load(gl.SliceLayout(1, mma)),
            sb_v.index(slot * cfg.WGN + WN).load(gl.SliceLayout(0, mma)))


@gluon.jit
def promote_block(acc, p, scales):
    """acc += p * sa[m] * sb[n], in front of the wgmma that takes p's registers next."""
    sa, sb = scales
    sa, p = gl.broadcast(gl.expand_dims(sa, 1), p)
    sb, p = gl.broadcast(gl.expand_dims(sb, 0), p)
    return gl.fma(p, sa * sb, acc)


@gluon.jit
def scaled_products(views, scale_views, bars, slot, phase, count, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr,
                    mma: gl.constexpr):
    """FP32 sums over the next `count` K blocks, each times the scales of its rows and columns: (sums, slot, phase). There are no
    registers for a second partial sum: it is the other warpgroup that keeps the tensor cores busy during a promotion."""
    full, empty = bars
    acc, = zeros(cfg, mma, mma)
    p, = zeros(cfg, mma, mma)
    for j in range(count):
        mbarrier.wait(full.index(slot), phase)
        q, = multiply(views, slot, (p, ), False, cfg, WM, WN)
        s = block_scales(scale_views, slot, cfg, WM, WN, mma)
        p = warpgroup_mma_wait(0, deps=(q, ))
        mbarrier.arrive(empty.index(slot), count=1)
        acc, p = warpgroup_mma_wait(0, deps=(promote_block(acc, p, s), p))
        slot, phase = advance(slot, phase, cfg.STAGES)
    return (acc, ), slot, phase


@gluon.jit
def before(slot, cfg: gl.constexpr):
    return gl.where(slot == 0, cfg.STAGES - 1, slot - 1)


@gluon.jit
def start_piece(views, slot, p, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr, PIECE: gl.constexpr):
    """Start the product of 64 rows over the K block in `slot`."""
    a = views[0].index(slot * (cfg.WGM * cfg.MP) + (WM * cfg.MP + PIECE))
    b = views[1].index(slot * cfg.WGN + WN).permute((1, 0))
    return warpgroup_mma(a, b, p, use_acc=False, is_async=True)


@gluon.jit
def promote_in_place(acc, p, scales):
    """`promote_block` by way of p * sa, in p's registers: what multiplies is fewer registers' to bring, beside a wgmma that takes most
    of what their file gives."""
    sa, sb = scales
    sa, p = gl.broadcast(gl.expand_dims(sa, 1), p)
    sb, p = gl.broadcast(gl.expand_dims(sb, 0), p)
    return gl.fma(p * sa, sb, acc)


@gluon.jit
def promote_piece(acc, p, scale_views, slot, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr, PIECE: gl.constexpr):
    """A piece's sums, 64 columns each, plus p times its scales, which are read 64 columns at a time."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    PARTS: gl.constexpr = cfg.COLS0 // 64
    parts = cut(p, cfg.COLS0)
    sa_v, sb_v = scale_views
    sa = sa_v.index(slot * (cfg.WGM * cfg.MP) + (WM * cfg.MP + PIECE)).load(gl.SliceLayout(1, mma))
    sums = ()
    for j in gl.static_range(PARTS):
        sb = sb_v.index((slot * cfg.WGN + WN) * PARTS + j).load(gl.SliceLayout(0, mma))
        sums = sums + (promote_in_place(acc[PIECE * PARTS + j], parts[j], (sa, sb)), )
    return sums


@gluon.jit
def piece_products(views, scale_views, bars, slot, phase, count, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr,
                   mma: gl.constexpr):
    """`scaled_products` for MP pieces of 64 rows a warpgroup, one after another: (sums of 64 columns, slot, phase). The next slot is
    waited for while the last piece runs, and one is released once a product of the next is on its way."""
    full, empty = bars
    mma64: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    MP: gl.constexpr = cfg.MP
    COLS: gl.constexpr = cfg.COLS0
    PARTS: gl.constexpr = COLS // 64
    SUMS: gl.constexpr = MP * PARTS
    acc = ()
    for i in gl.static_range(SUMS):
        acc = acc + (gl.zeros([64, 64], gl.float32, mma64), )
    p = gl.zeros([64, COLS], gl.float32, mma)
    mbarrier.wait(full.index(slot), phase, pred=count > 0)
    for j in range(count):
        old = fresh(slot)
        slot, phase = advance(slot, phase, cfg.STAGES)
        sums = ()
        for i in gl.static_range(MP):
            q = start_piece(views, old, p, cfg, WM, WN, i)
            if i == 0:
                mbarrier.arrive(empty.index(before(old, cfg)), count=1, pred=j > 0)
            if i == MP - 1:
                mbarrier.wait(full.index(slot), phase, pred=j + 1 < count)
            p = warpgroup_mma_wait(0, deps=(q, ))
            sums = sums + promote_piece(acc, p, scale_views, old, cfg, WM, WN, i)
        acc = sums
    mbarrier.arrive(empty.index(before(slot, cfg)), count=1, pred=count > 0)
    return acc, slot, phase
