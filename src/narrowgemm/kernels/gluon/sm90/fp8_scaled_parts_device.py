"""Parts of the Hopper FP8 kernels with row-wise, tensor-wise or 1x128 x 1x128 scales: sums of K blocks, scales, the store."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait)

from .fp8_block_parts_device import advance, output_pointers, row_masks, store_masked, store_part, vector_layout
from .fp8_block_schedule_device import CONTIGUOUS, DENSE, MASKED, OFFSETS, fresh
from .shim import tma_add, tma_load


# ---------------------------------------------------------------- producer
@gluon.jit
def load_block(descs, rings, bar, slot, at, kb, cfg: gl.constexpr):
    """Fill a slot with K block kb; it arrives on `bar`. The tails of K, and of a tensor's last rows, are zeros."""
    a_desc, b0_desc, b1_desc = descs
    a_s, b0_s, b1_s = rings
    a_plane, a_row, b_plane, b_row = at
    mbarrier.expect(bar, cfg.BLOCK_BYTES)
    tma_load(a_desc, [a_plane, a_row, kb * 128], bar, a_s.index(slot))
    tma_load(b0_desc, [b_plane, b_row, kb * 128], bar, b0_s.index(slot))
    if cfg.COLS1 > 0:
        tma_load(b1_desc, [b_plane, b_row + cfg.COLS0, kb * 128], bar, b1_s.index(slot))


# ---------------------------------------------------------------- sums
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


# ---------------------------------------------------------------- scales and the store
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
    out = cut(acc[0], cfg.COLS0)
    if cfg.COLS1 > 0:
        out = out + cut(acc[1], cfg.COLS1)
    return out


@gluon.jit
def apply_scales(x, scales, tile, row0, col0, N, cfg: gl.constexpr, mma: gl.constexpr):
    """x [64, 64] times the scales of its rows and columns. Scales of rows that aren't the tile's are not read."""
    sa_ptr, sag, sam, sb_ptr, sbg, sbn = scales
    n, g, first, end, stop = tile
    sb_ptr += g.to(gl.int64) * sbg
    if cfg.LAYOUT == MASKED:
        sa_ptr += g.to(gl.int64) * sag
    if cfg.A_ROWS:
        row = row0 + gl.arange(0, 64, gl.SliceLayout(1, mma))
        sa = gl.load(sa_ptr + row.to(gl.int64) * sam, mask=row < end, other=0)
        sa, x = gl.broadcast(gl.expand_dims(sa, 1), x)
        x = x * sa
    if cfg.B_ROWS:
        col = col0 + gl.arange(0, 64, gl.SliceLayout(0, mma))
        sb = gl.load(sb_ptr + col.to(gl.int64) * sbn, mask=col < N, other=0)
        sb, x = gl.broadcast(gl.expand_dims(sb, 0), x)
        x = x * sb
    if not cfg.A_ROWS and not cfg.B_ROWS:
        x = x * (gl.load(sa_ptr) * gl.load(sb_ptr))
    elif not cfg.A_ROWS:
        x = x * gl.load(sa_ptr)
    elif not cfg.B_ROWS:
        x = x * gl.load(sb_ptr)
    return x


@gluon.jit
def held(out, index_ptr, tile, row0, col0, M, N, G, cfg: gl.constexpr, mma: gl.constexpr):
    """What 64 x 64 of the output hold, where the row is this product's."""
    row = row0 + fresh(gl.arange(0, 64, gl.SliceLayout(1, mma)))
    col = col0 + gl.arange(0, 64, gl.SliceLayout(0, mma))
    mine, written = row_masks(index_ptr, row, M, G, tile, cfg)
    mask = gl.expand_dims(mine, 1) & gl.expand_dims(col < N, 0)
    return gl.load(output_pointers(out, tile, row, col, cfg), mask=mask, other=0)


@gluon.jit
def store_tile(part, d_s, d_desc, out, scales, problem, tile, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr):
    """`part`: the warpgroup's sums, 64 columns each."""
    index_ptr, M, N, KB, G, alignment = problem
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    n, g, first, end, stop = tile
    row0 = first + WM * 64
    col0 = n * cfg.BN + WN * cfg.WN
    PARTS: gl.constexpr = cfg.WN // 64
    before = part[0]
    if cfg.ACCUMULATE and not cfg.ADD_TMA:
        before = held(out, index_ptr, tile, row0, col0, M, N, G, cfg, mma)
    for j in gl.static_range(PARTS):
        col = col0 + j * 64
        x = part[j]
        if not cfg.BLOCKS:
            x = apply_scales(x, scales, tile, row0, col, N, cfg, mma)
        if cfg.ACCUMULATE and not cfg.ADD_TMA:
            x += before.to(gl.float32)
            if j + 1 < PARTS:       # on its way while this part is stored
                before = held(out, index_ptr, tile, row0, col + 64, M, N, G, cfg, mma)
        # the buffers take turns, and what was stored from one must have been read before it is written again. Only TMA
        # stores count, so where some parts leave otherwise, nothing less than all of them can be waited for
        if cfg.LAYOUT == DENSE and cfg.STORE_TMA:
            tma.store_wait(cfg.OUT_BUFFERS - 1)
        elif j % cfg.OUT_BUFFERS == 0:
            tma.store_wait(0)
        buf = d_s.index((WM * cfg.WGN + WN) * cfg.OUT_BUFFERS + j % cfg.OUT_BUFFERS)
        if cfg.ADD_TMA:
            add_part(x, buf, d_desc, out, index_ptr, tile, row0, col, M, N, G, cfg, mma)
        else:
            store_part(x, buf, d_desc, out, index_ptr, tile, row0, col, M, N, G, cfg)


@gluon.jit
def add_part(x, buf, d_desc, out, index_ptr, tile, row0, col0, M, N, G, cfg: gl.constexpr, mma: gl.constexpr):
    """64 rows from row0 added to the FP32 output: in L2, by TMA, where all of them are the product's, so that nobody waits for what
    the output held."""
    out_ptr, og, om, pitch = out
    n, g, first, end, stop = tile
    whole = row0 + 64 <= end
    shift = row0
    if cfg.LAYOUT == DENSE:
        whole = row0 >= 0       # what lies outside of the tensor TMA leaves out
    if cfg.LAYOUT == CONTIGUOUS:
        whole = stop == 1
    if cfg.LAYOUT == OFFSETS:
        whole = whole & (row0 >= stop)
    if cfg.LAYOUT == MASKED:
        shift += g * pitch
    if whole:
        buf.store(x)
        fence_async_shared()
        tma_add(d_desc, [shift, col0], buf)
    else:
        buf.store(x + held(out, index_ptr, tile, row0, col0, M, N, G, cfg, mma))
        store_masked(buf, out, index_ptr, tile, row0, col0, M, N, G, cfg)


@gluon.jit
def store_padding(out, tile, row0, col0, N, cfg: gl.constexpr):
    """Zeros to a warpgroup's share of a tile that is padding only."""
    out_ptr, og, om, pitch = out
    n, g, first, end, stop = tile
    lay: gl.constexpr = vector_layout(cfg.OUT_COLS, cfg.OUT_BYTES)
    PARTS: gl.constexpr = cfg.WN // 64
    row = row0 + fresh(gl.arange(0, 64, gl.SliceLayout(1, lay)))
    for j in gl.static_range(PARTS):
        col = col0 + j * 64 + gl.arange(0, 64, gl.SliceLayout(0, lay))
        mask = gl.expand_dims(row < (end if cfg.LAYOUT == CONTIGUOUS else stop), 1) & gl.expand_dims(col < N, 0)
        gl.store(output_pointers(out, tile, row, col, cfg), gl.zeros([64, 64], out_ptr.dtype.element_ty, lay), mask=mask)
