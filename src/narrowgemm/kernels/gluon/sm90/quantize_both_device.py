"""Device code of `quantize_both` on Hopper: a tile is read once and written along its rows and its columns.

Bit for bit what `reference/quantize_both.py` defines; what to do where groups end: `../../triton/quantize_both_device.py`. How a
tile is moved: `both_parts_device.py`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .both_parts_device import (
    FEW, MANY, block_scales, few_groups, given_inverse, larger, no_maxima, put_both, raise_both, raise_to, rows_at, shared_layout, stored_inverses, thread_maxima, tile_at, words)
from .shim import block_barrier, tma_load, view_as

@gluon.jit
def fetch(x_desc, ring, bars, slot, id, total, matrices, groups, table_ptr, T, tiles_t, tiles_c, GROUPED: gl.constexpr, BATCH: gl.constexpr,
          BC: gl.constexpr, BAND: gl.constexpr, AGAIN: gl.constexpr):
    """Start to load tile `id` into a slot, if there is one."""
    if id < total:
        tile, tc = tile_at(total - 1 - id if AGAIN else id, tiles_t * matrices, tiles_c, BAND)
        b = tile * 0
        if BATCH:
            b = tile // tiles_t
            tile = tile % tiles_t
        first, end = rows_at(tile, groups, table_ptr, T, GROUPED)
        bar = bars.index(slot)
        mbarrier.expect(bar, 128 * BC * (x_desc.dtype.primitive_bitwidth // 8))
        tma_load(x_desc, [b, first, tc * BC], bar, ring.index(slot))


@gluon.jit(do_not_specialize=["T", "tiles_t", "matrices", "capacity", "cr", "cb", "rsk", "csb"])
def both_kernel(x_desc, row_ptr, col_ptr, rs_ptr, cs_ptr, row_in_ptr, col_in_ptr, next_ptr, offs_ptr, table_ptr, seg_ptr, T, C, G,
                tiles_t, matrices, capacity, clamp, rb, rr, cb, cr, rsb, rsr, rsk, csb, csr, csk, KIND: gl.constexpr, GROUPED: gl.constexpr, GIVEN: gl.constexpr,
                BATCH: gl.constexpr, MAXIMA: gl.constexpr, NEXT: gl.constexpr, AGAIN: gl.constexpr, WIDE: gl.constexpr, BC: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
                ROUNDING: gl.constexpr, E8M0: gl.constexpr, TOP: gl.constexpr, EMAX: gl.constexpr, MANTISSA: gl.constexpr,
                MANTISSA_BITS: gl.constexpr):
    """KIND: 'blocks' (1x128 on both copies), 'rows' and 'tensor', of which 1 / scale is in `row_in_ptr` and `col_in_ptr`, as
    bits. MAXIMA: only raise the largest magnitudes there. AGAIN: that has just been; what L2 may still hold comes first. NEXT: the
    largest magnitude goes to `next_ptr`. cb, cr: strides of `columns` in units of 16. Grouped: tiles as `table_ptr` says, as many
    as segments have, or as is found out from `offs_ptr`. GIVEN: the scale is in `rs_ptr`, of the only matrix."""
    ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, 1, 128, BC], x_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bars.index(s), count=1)
    fence_async_shared()
    block_barrier()
    tiles_c = gl.cdiv(C, BC)
    groups = (tiles_t, tiles_t, tiles_t, tiles_t)
    if GROUPED == FEW:
        groups, tiles_t = few_groups(offs_ptr, seg_ptr, T, G, capacity, gl.program_id(0) == 0, BC // 16)
    elif GROUPED == MANY:
        tiles_t = gl.load(seg_ptr + G) // 128
    total = tiles_t * matrices * tiles_c
    step = gl.num_programs(0)
    id = gl.program_id(0)
    for s in gl.static_range(STAGES):
        fetch(x_desc, ring, bars, s, id + s * step, total, matrices, groups, table_ptr, T, tiles_t, tiles_c, GROUPED, BATCH, BC, BAND, AGAIN)
    DTYPE: gl.constexpr = x_desc.dtype
    BITS: gl.constexpr = DTYPE.primitive_bitwidth
    if GIVEN:       # the first loads are on their way
        one = given_inverse(rs_ptr)
    views = view_as(ring, DTYPE, STAGES, 128, BC, shared_layout(BITS))
    word_views = view_as(ring, gl.int32, STAGES, 128, BC * BITS // 32, shared_layout(32))
    most = no_maxima(BC, BITS)
    ONE: gl.constexpr = KIND == "tensor"
    WALKS: gl.constexpr = NEXT or (MAXIMA and ONE and not BATCH)        # the largest magnitude of all that a block sees
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    while id < total:
        at, tc = tile_at(total - 1 - id if AGAIN else id, tiles_t * matrices, tiles_c, BAND)
        b = gl.cast(0, gl.int64)
        tile = at
        if BATCH:
            b = (at // tiles_t).to(gl.int64)
            tile = at % tiles_t
        start, end = rows_at(tile, groups, table_ptr, T, GROUPED)
        first = gl.cast(start, gl.int64)
        pos = tile.to(gl.int64) * 128
        rows = gl.minimum(end - start, 128)
        columns = gl.minimum(C - tc * BC, BC)
        fill = (rows + 15) // 16 * 16       # rows of `columns` are allocated so
        if GROUPED > 0:
            fill = rows * 0 + 128
        c0 = (tc * BC).to(gl.int64)
        rows_to = row_ptr + (b * rb + first * rr + c0)
        columns_to = col_ptr + ((b * cb + c0 * cr) * 16 + pos)
        view = views.index(slot)
        mbarrier.wait(bars.index(slot), phase)
        if WALKS:
            most = larger(most, thread_maxima(words(word_views.index(slot), rows, BC, BITS), BC, BITS), BITS)
        elif MAXIMA and ONE:
            raise_to(row_in_ptr + b, thread_maxima(words(word_views.index(slot), rows, BC, BITS), BC, BITS), DTYPE)
        elif MAXIMA:
            raise_both(words(word_views.index(slot), rows, BC, BITS), row_in_ptr + (b * T + first), col_in_ptr + (b * C + c0), rows,
                       columns, DTYPE)
        if not MAXIMA:
            if ONE:
                row_inverse = (one if GIVEN else gl.load(row_in_ptr + b)).to(gl.float32, bitcast=True)
                column_inverse = row_inverse
            elif KIND == "rows":
                row_inverse, column_inverse = stored_inverses(row_in_ptr + (b * T + first), col_in_ptr + (b * C + c0), rows, columns, BC)
            else:
                row_inverse, column_inverse = block_scales(
                    word_views.index(slot), rs_ptr + (b * rsb + first * rsr + tc.to(gl.int64) * rsk), rsr,
                    cs_ptr + (b * csb + c0 * csr + tile.to(gl.int64) * csk), csr, rows, columns, clamp, DTYPE, ROUNDING, E8M0, TOP, EMAX,
                    MANTISSA, MANTISSA_BITS)
            if (rows == 128) & (columns == BC):
                put_both(view, row_inverse, column_inverse, rows_to, rr, columns_to, cr, rows, columns, fill, BC, ONE, False, WIDE)
            else:
                put_both(view, row_inverse, column_inverse, rows_to, rr, columns_to, cr, rows, columns, fill, BC, ONE, True, WIDE)
        block_barrier()     # all of them have read the slot
        fetch(x_desc, ring, bars, slot, id + STAGES * step, total, matrices, groups, table_ptr, T, tiles_t, tiles_c, GROUPED, BATCH, BC, BAND, AGAIN)
        slot += 1
        if slot == STAGES:
            slot = slot * 0
            phase = phase ^ 1
        id += step
    if NEXT:
        raise_to(next_ptr, most, DTYPE)
    elif WALKS:
        raise_to(row_in_ptr, most, DTYPE)
