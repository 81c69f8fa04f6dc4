"""A group's few rows beyond a whole tile or a half of one, worked on with that tile instead of as a tile of their own.

Up to STUB rows lie in a box of their own in every slot of the ring. Each consumer multiplies 64 of the tile's weight rows by them: weights
are wgmma's rows, as they stand in the slot expanded, and these tokens its columns. So they cost neither weights expanded once more nor a
product of 64 rows; their sums are STUB / 2 registers a thread beside those of the tile.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .fp8_block_parts_device import (
    FP8_TILE, ROW_OF_FLOATS, advance, fence, folded_scales, multiply, promote, read_a_scale, scaled, second_piece)
from .fp8_block_schedule_device import MASKED, fresh
from .fp8_block_sums_device import before, sum_pieces
from .shim import view_as, view_rows


@gluon.jit
def has_stub(tile, cfg: gl.constexpr):
    """Whether a tile has such rows."""
    rows = tile[3] - tile[2]
    return (rows > cfg.BM) & (rows <= cfg.BM + cfg.STUB)


@gluon.jit
def left_half(p):
    COLS: gl.constexpr = p.shape[1] // 2
    lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 32])
    left, right = gl.split(gl.permute(gl.reshape(p, [64, 2, COLS]), (0, 2, 1)))
    return gl.convert_layout(left, lay, assert_trivial=True)


@gluon.jit
def quarter(p):
    """The first fourth of a tensor's columns: nothing moves."""
    return left_half(left_half(p))


@gluon.jit
def block(acc, stub, p, slot, phase, kb, views, bars, KB, cfg: gl.constexpr, WM: gl.constexpr, mma: gl.constexpr, small: gl.constexpr,
          HEAD: gl.constexpr):
    """One K block, whose slot is known to be full. HEAD: the first, whose first wgmma, into p, is on its way."""
    a_v, b_v, sa_v, unit_v, stub_v, stub_sa_v = views
    full, empty = bars
    MP: gl.constexpr = cfg.MP
    COLS: gl.constexpr = cfg.WN
    sums = ()
    if not HEAD:
        p = gl.zeros([64, COLS], gl.float32, mma)
    for i in gl.static_range(MP):
        if i > 0 or not HEAD:
            p = multiply(a_v, b_v, slot, p, cfg, WM, 0, i)
        s = read_a_scale(sa_v, slot, cfg, WM, i, gl.SliceLayout(1, mma))
        if i == 0 and not HEAD:
            mbarrier.arrive(empty.index(before(slot, cfg)), count=1)
        p = warpgroup_mma_wait(0, deps=(p, ))
        one = scaled(p, s) if HEAD else promote(acc[i], p, s)
        one, p = fence(0, one, p)
        sums = sums + (one, )
    # there are registers for one partial sum: these are taken from p's
    q = warpgroup_mma(unit_v.index(slot * cfg.UNITS + WM), stub_v.index(slot).permute((1, 0)), quarter(p), use_acc=False, is_async=True)
    s = stub_sa_v.index(slot).load(gl.SliceLayout(0, small))
    slot, phase = advance(slot, phase, cfg.STAGES)
    mbarrier.wait(full.index(slot), phase, pred=kb + 1 < KB)
    q = warpgroup_mma_wait(0, deps=(q, ))
    s, q = gl.broadcast(gl.expand_dims(s, 0), q)
    stub = q * s if HEAD else gl.fma(q, s, stub)
    return sums, stub, slot, phase


@gluon.jit
def store(x, scales, out, problem, tile, cfg: gl.constexpr, WM: gl.constexpr, small: gl.constexpr):
    """Sums [64 weight rows, STUB tokens]; few, so that they leave by 2 or 4 bytes."""
    n, g, first, end, stop = tile
    out_ptr, og, om, pitch = out
    COLS: gl.constexpr = cfg.STUB
    row = first + cfg.BM + fresh(gl.arange(0, COLS, gl.SliceLayout(0, small)))
    col = n * cfg.BN + WM * 64 + fresh(gl.arange(0, 64, gl.SliceLayout(1, small)))
    x = x * gl.expand_dims(folded_scales(scales, tile, col, cfg), 1)
    if cfg.LAYOUT == MASKED:
        out_ptr += g.to(gl.int64) * og
    ptrs = out_ptr + gl.expand_dims(row.to(gl.int64) * om, 0) + gl.expand_dims(col, 1)
    gl.store(ptrs, x.to(out_ptr.dtype.element_ty), mask=gl.expand_dims(row < end, 0) & gl.expand_dims(col < problem[2], 1))


@gluon.jit
def with_stub(acc, p, slot, phase, views, bars, problem, scales, out, tile, cfg: gl.constexpr, WM: gl.constexpr, mma: gl.constexpr,
              small: gl.constexpr):
    """The sums of a tile, and of the rows beyond, which are stored here."""
    full, empty = bars
    KB = problem[3]
    COLS: gl.constexpr = cfg.STUB
    stub = gl.zeros([64, COLS], gl.float32, small)
    acc, stub, slot, phase = block(acc, stub, p, slot, phase, KB * 0, views, bars, KB, cfg, WM, mma, small, True)
    for kb in range(1, KB):
        acc, stub, slot, phase = block(acc, stub, p, slot, phase, kb, views, bars, KB, cfg, WM, mma, small, False)
    mbarrier.arrive(empty.index(before(slot, cfg)), count=1)
    store(stub, scales, out, problem, tile, cfg, WM, small)
    return acc, slot, phase


@gluon.jit
def sum_tile(acc, p, slot, phase, rings, views, bars, problem, bases, scales, out, tile, cfg: gl.constexpr, WM: gl.constexpr,
             mma: gl.constexpr):
    """A tile's sums; the first piece's first wgmma is on its way. Its rows beyond are stored."""
    small: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.STUB, 32])
    unit_v = view_as(rings[2], gl.float8e4nv, cfg.STAGES * cfg.UNITS, 64, 128, FP8_TILE)
    stub_v = view_as(rings[3], gl.float8e4nv, cfg.STAGES, cfg.STUB, 128, FP8_TILE)
    stub_sa_v = view_rows(rings[4], gl.float32, cfg.STAGES, cfg.STUB, ROW_OF_FLOATS)
    MP: gl.constexpr = cfg.MP
    if has_stub(tile, cfg):
        more = views + (unit_v, stub_v, stub_sa_v)
        acc, slot, phase = with_stub(acc, p, slot, phase, more, bars, problem, scales, out, tile, cfg, WM, mma, small)
    elif tile[2] + second_piece(cfg, WM) < tile[3]:
        acc, last, sa, sb, slot, phase = sum_pieces(acc, p, (), (), slot, phase, views, bars, problem, bases, scales, tile, cfg, WM, 0, mma, MP)
    else:
        acc, last, sa, sb, slot, phase = sum_pieces(acc, p, (), (), slot, phase, views, bars, problem, bases, scales, tile, cfg, WM, 0, mma, 1)
    return acc, slot, phase
