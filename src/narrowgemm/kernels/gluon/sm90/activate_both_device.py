"""Device code of `activate_both` and `activate_backward` on Hopper: gate and up (and the result's gradient) are read once, and what is
made of them is written along its rows and its columns.

Values take the place of what they are made from, in shared memory, and go on from there as tiles of `quantize_both`. Definition and
arithmetic: `../../triton/activate_both_device.py`. How a tile is moved: `both_parts_device.py`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ...triton.activate_both_device import swiglu_backward
from ...triton.activate_device import rounded, swiglu
from .both_parts_device import (
    FEW, block_scales, few_groups, given_inverse, larger, no_maxima, piece_layout, put_both, raise_both, raise_to, rows_at, shared_layout, stored_inverses, thread_maxima, tile_at, words)
from .shim import block_barrier, tma_load, view_as


@gluon.jit
def fetch(h_desc, d_desc, ring, bars, box, id, total, groups, table_ptr, tiles_t, tiles_c, GROUPED: gl.constexpr, BC: gl.constexpr, BAND: gl.constexpr,
          AGAIN: gl.constexpr, BACKWARD: gl.constexpr, EARLY: gl.constexpr):
    """Start to load tile `id`, if there is one. EARLY: what goes where nothing of the tile before is needed once its values are made: gate to
    `box`, backward the gradient to the third. Else the rest: up to `box`, backward gate and up to the first two."""
    if id < total:
        tile, tc = tile_at(total - 1 - id if AGAIN else id, tiles_t, tiles_c, BAND)
        first, end = rows_at(tile, groups, table_ptr, 0, GROUPED)
        BYTES: gl.constexpr = 128 * BC * (h_desc.dtype.primitive_bitwidth // 8)
        bar = bars.index(0 if EARLY else 1)
        mbarrier.expect(bar, 2 * BYTES if BACKWARD and not EARLY else BYTES)
        if BACKWARD and EARLY:
            tma_load(d_desc, [0, first, tc * BC], bar, ring.index(2))
        elif BACKWARD:
            tma_load(h_desc, [0, first, tc * BC], bar, ring.index(0))
            tma_load(h_desc, [1, first, tc * BC], bar, ring.index(1))
        else:
            tma_load(h_desc, [0 if EARLY else 1, first, tc * BC], bar, ring.index(box))


@gluon.jit
def make(views, box, alpha, limit, DTYPE: gl.constexpr, BC: gl.constexpr, BACKWARD: gl.constexpr, CLAMPED: gl.constexpr):
    """The result in place of gate, in `box`, up being in the other; its derivative in place of gate and up."""
    PIECE: gl.constexpr = 32 if BACKWARD else 64        # rows at a time: three inputs of a whole tile are more than the registers hold
    LAYOUT: gl.constexpr = piece_layout(BC, PIECE)
    for i in gl.static_range(128 // PIECE):
        first = views.index(box).slice(i * PIECE, PIECE, 0)
        second = views.index(1 - box).slice(i * PIECE, PIECE, 0)
        gate = first.load(LAYOUT).to(gl.float32)
        up = second.load(LAYOUT).to(gl.float32)
        if BACKWARD:
            d = views.index(2).slice(i * PIECE, PIECE, 0).load(LAYOUT).to(gl.float32)
            a, b = swiglu_backward(gate, up, d, alpha, limit, CLAMPED, True)
            first.store(rounded(a, DTYPE, True))
            second.store(rounded(b, DTYPE, True))
        else:
            first.store(rounded(swiglu(gate, up, alpha, limit, CLAMPED, True), DTYPE, True))
        block_barrier()


@gluon.jit(do_not_specialize=["T", "G", "capacity"])
def both_kernel(h_desc, d_desc, row_ptr, col_ptr, rs_ptr, cs_ptr, row_in_ptr, col_in_ptr, next_ptr, offs_ptr, table_ptr, seg_ptr, T, G, I,
                capacity, clamp, alpha, limit, rr, cr, rsr, rsk, csr, csk, KIND: gl.constexpr, GROUPED: gl.constexpr, FRESH: gl.constexpr, GIVEN: gl.constexpr,
                BACKWARD: gl.constexpr, CLAMPED: gl.constexpr,
                MAXIMA: gl.constexpr, NEXT: gl.constexpr, AGAIN: gl.constexpr, BC: gl.constexpr, BAND: gl.constexpr, ROUNDING: gl.constexpr, E8M0: gl.constexpr,
                TOP: gl.constexpr, EMAX: gl.constexpr, MANTISSA: gl.constexpr, MANTISSA_BITS: gl.constexpr):
    """Arguments: as of `quantize_both_device.both_kernel`; backward, gradients of up are in columns I to 2 I - 1."""
    DTYPE: gl.constexpr = h_desc.dtype
    BITS: gl.constexpr = DTYPE.primitive_bitwidth
    BOXES: gl.constexpr = 3 if BACKWARD else 2
    ring = gl.allocate_shared_memory(DTYPE, [BOXES, 1, 128, BC], h_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=1)
    mbarrier.init(bars.index(1), count=1)
    fence_async_shared()
    block_barrier()
    views = view_as(ring, DTYPE, BOXES, 128, BC, shared_layout(BITS))
    word_views = view_as(ring, gl.int32, BOXES, 128, BC * BITS // 32, shared_layout(32))
    if GROUPED == FEW:
        groups, tiles_t = few_groups(offs_ptr, seg_ptr, T, G, capacity, FRESH and gl.program_id(0) == 0, BC // 16)
    else:
        tiles_t = gl.load(seg_ptr + G) // 128
        groups = (tiles_t, tiles_t, tiles_t, tiles_t)
    tiles_c = gl.cdiv(I, BC)
    total = tiles_t * tiles_c
    step = gl.num_programs(0)
    id = gl.program_id(0)
    box = gl.to_tensor(0)       # of gate, and of the result: the two change places from tile to tile
    fetch(h_desc, d_desc, ring, bars, box, id, total, groups, table_ptr, tiles_t, tiles_c, GROUPED, BC, BAND, AGAIN, BACKWARD, True)
    fetch(h_desc, d_desc, ring, bars, 1 - box, id, total, groups, table_ptr, tiles_t, tiles_c, GROUPED, BC, BAND, AGAIN, BACKWARD, False)
    if GIVEN:       # the first loads are on their way
        one = given_inverse(rs_ptr)
    most = no_maxima(BC, BITS)
    ONE: gl.constexpr = KIND == "tensor"
    phase = gl.to_tensor(0)
    while id < total:
        tile, tc = tile_at(total - 1 - id if AGAIN else id, tiles_t, tiles_c, BAND)
        start, end = rows_at(tile, groups, table_ptr, 0, GROUPED)
        first = start.to(gl.int64)
        rows = gl.minimum(end - start, 128)
        columns = gl.minimum(I - tc * BC, BC)
        pos = tile.to(gl.int64) * 128
        mbarrier.wait(bars.index(0), phase)
        mbarrier.wait(bars.index(1), phase)
        phase = phase ^ 1
        make(views, box, alpha, limit, DTYPE, BC, BACKWARD, CLAMPED)
        id += step
        fetch(h_desc, d_desc, ring, bars, 1 - box, id, total, groups, table_ptr, tiles_t, tiles_c, GROUPED, BC, BAND, AGAIN, BACKWARD, True)
        for part in gl.static_range(2 if BACKWARD else 1):
            c0 = (tc * BC + part * I).to(gl.int64)
            view = views.index(part + box)
            word_view = word_views.index(part + box)
            rows_to = row_ptr + (first * rr + c0)
            columns_to = col_ptr + (c0 * cr * 16 + pos)
            if NEXT or (MAXIMA and ONE):
                most = larger(most, thread_maxima(words(word_view, rows, BC, BITS), BC, BITS), BITS)
            elif MAXIMA:
                raise_both(words(word_view, rows, BC, BITS), row_in_ptr + first, col_in_ptr + c0, rows, columns, DTYPE)
            if not MAXIMA:
                if ONE:
                    row_inverse = (one if GIVEN else gl.load(row_in_ptr)).to(gl.float32, bitcast=True)
                    column_inverse = row_inverse
                elif KIND == "rows":
                    row_inverse, column_inverse = stored_inverses(row_in_ptr + first, col_in_ptr + c0, rows, columns, BC)
                else:
                    k = (tc + part * (I // 128)).to(gl.int64)
                    row_inverse, column_inverse = block_scales(
                        word_view, rs_ptr + (first * rsr + k * rsk), rsr, cs_ptr + (c0 * csr + tile.to(gl.int64) * csk), csr,
                        rows, columns, clamp, DTYPE, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS)
                if (rows == 128) & (columns == BC):
                    put_both(view, row_inverse, column_inverse, rows_to, rr, columns_to, cr, rows, columns, 128, BC, ONE, False, False)
                else:
                    put_both(view, row_inverse, column_inverse, rows_to, rr, columns_to, cr, rows, columns, 128, BC, ONE, True, False)
        fence_async_shared()
        block_barrier()     # all of them have read the values, which TMA writes over
        fetch(h_desc, d_desc, ring, bars, box, id, total, groups, table_ptr, tiles_t, tiles_c, GROUPED, BC, BAND, AGAIN, BACKWARD, False)
        if not BACKWARD:
            box = 1 - box
    if NEXT:
        raise_to(next_ptr, most, DTYPE)
    elif MAXIMA and ONE:
        raise_to(row_in_ptr, most, DTYPE)
