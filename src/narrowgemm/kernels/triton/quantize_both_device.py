"""Device code of `quantize_both`: one read of a tensor, two FP8 copies of it, one along its rows and one along its columns.

    x [T, C]  ->  rows [T, C], scales along C          (what the forward product and dgrad contract)
              ->  columns [C, P], scales along P       (what the weight gradient contracts, and dgrad's weight)

A tile is 128 rows of one group by 64 columns, or 128 where scales are of 128. Grouped: a group's columns start at `seg[g]`, a multiple of 128, and are
filled up with zeros to the next one, so that no tile of a product over them crosses a group. Batch: P = T, matrix by
matrix. Bit for bit what `reference/quantize_both.py` defines.
"""

import triton
import triton.language as tl

from .quantize_device import NAN_BITS, block_scale, magnitude, narrow_fp8

CHUNK = tl.constexpr(256)


@triton.jit
def group_rows(offs_ptr, g, live, T):
    """(first row, end) of group(s) g, clamped to [0, T]: a wrong offset may lose rows, never leave the tensor."""
    start = tl.minimum(tl.maximum(tl.load(offs_ptr + g, mask=live, other=0).to(tl.int64), 0), T)
    end = tl.minimum(tl.maximum(tl.load(offs_ptr + g + 1, mask=live, other=0).to(tl.int64), 0), T)
    return start, tl.maximum(start, end)


@triton.jit(do_not_specialize=["T", "G", "capacity"])
def segments_kernel(offs_ptr, seg_ptr, T, G, capacity, CHUNK: tl.constexpr):
    """seg [G + 1]: where each group's columns start and the last one's end. One program."""
    total = tl.cast(0, tl.int64)
    tl.store(seg_ptr, 0)
    for base in range(0, G, CHUNK):
        g = base + tl.arange(0, CHUNK)
        start, end = group_rows(offs_ptr, g, g < G, T)
        width = tl.where(g < G, (end - start + 127) // 128 * 128, 0)
        ends = tl.minimum(total + tl.cumsum(width, 0), capacity)
        tl.store(seg_ptr + 1 + g, ends.to(tl.int32), mask=g < G)
        total += tl.sum(width)


@triton.jit(do_not_specialize=["T", "G", "capacity", "tiles", "count", "B"])
def front_kernel(offs_ptr, seg_ptr, table_ptr, zero_ptr, scale_ptr, inverse_ptr, T, G, capacity, tiles, count, B, GROUPED: tl.constexpr,
                 FRESH: tl.constexpr, GIVEN: tl.constexpr, UNSEEN: tl.constexpr, CHUNK: tl.constexpr, TILES: tl.constexpr):
    """What Hopper's kernels want beforehand. GROUPED: (first row, end of the group's rows) of each tile of 128 columns of the grouped
    copy, in `table_ptr` [tiles, 2]; FRESH: segments, as `segments_kernel`. Zeros, `count` of them (UNSEEN: -1). GIVEN: 1 / scale of B matrices."""
    p = tl.program_id(0)
    if GROUPED:
        tile = p * TILES + tl.arange(0, TILES)
        pos = tile * 128
        first = tl.zeros((TILES, ), tl.int32)
        stop = tl.zeros((TILES, ), tl.int32)
        total = tl.cast(0, tl.int64)
        if FRESH:
            if p == 0:
                tl.store(seg_ptr, 0)
        for base in range(0, G, CHUNK):
            g = base + tl.arange(0, CHUNK)
            start, end = group_rows(offs_ptr, g, g < G, T)
            width = tl.where(g < G, (end - start + 127) // 128 * 128, 0)
            behind = total + tl.cumsum(width, 0)
            begins = tl.minimum(behind - width, capacity).to(tl.int32)
            ends = tl.minimum(behind, capacity).to(tl.int32)
            if FRESH:
                tl.store(seg_ptr + 1 + g, ends, mask=(g < G) & (p == 0))
            here = (begins[None, :] <= pos[:, None]) & (pos[:, None] < ends[None, :])
            first += tl.sum(tl.where(here, (start.to(tl.int32) - begins)[None, :] + pos[:, None], 0), 1)
            stop += tl.sum(tl.where(here, end.to(tl.int32)[None, :], 0), 1)
            total += tl.sum(width)
        tl.store(table_ptr + 2 * tile, first, mask=tile < tiles)
        tl.store(table_ptr + 2 * tile + 1, stop, mask=tile < tiles)
    for base in range(p * 1024, count, tl.num_programs(0) * 1024):
        i = base + tl.arange(0, 1024)
        tl.store(zero_ptr + i, tl.full((1024, ), -1 if UNSEEN else 0, tl.int32), mask=i < count)
    if GIVEN:
        for base in range(p * 128, B, tl.num_programs(0) * 128):
            i = base + tl.arange(0, 128)
            scale = tl.load(scale_ptr + i, mask=i < B, other=1.0)
            good = tl.abs(scale) < float("inf")
            inverse = tl.where(good, tl.div_rn(tl.full((128, ), 1.0, tl.float32), scale).to(tl.int32, bitcast=True), NAN_BITS)
            tl.store(inverse_ptr + i, inverse, mask=i < B)


@triton.jit(do_not_specialize=["R", "C"])
def scales_kernel(row_ptr, col_ptr, rs_ptr, cs_ptr, R, C, clamp, rsr, csr, BLOCK: tl.constexpr, TOP: tl.constexpr,
                  NATIVE: tl.constexpr):
    """Scales of R rows and C columns from their largest magnitudes, which become 1 / scale: divisions once each, and not by every
    thread of every tile. A row of no group may have -1: its scale is not written."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    most = tl.load(row_ptr + i, mask=i < R, other=-1)
    scale, inverse, sign = block_scale(tl.maximum(most, 0), clamp, "", False, TOP, 0, 0, 0, NATIVE)
    tl.store(rs_ptr + i * rsr, scale, mask=most >= 0)
    tl.store(row_ptr + i, inverse.to(tl.int32, bitcast=True), mask=i < R)
    scale, inverse, sign = block_scale(tl.maximum(tl.load(col_ptr + i, mask=i < C, other=0), 0), clamp, "", False, TOP, 0, 0, 0, NATIVE)
    tl.store(cs_ptr + i * csr, scale, mask=i < C)
    tl.store(col_ptr + i, inverse.to(tl.int32, bitcast=True), mask=i < C)


@triton.jit
def find_tile(tile, offs_ptr, seg_ptr, T, G, CHUNK: tl.constexpr):
    """(first row, end of the group's rows) of a tile of 128 columns of the grouped copy; (0, -1) behind the last one."""
    pos = tile * 128
    g = 0
    for base in range(0, G, CHUNK):
        i = base + tl.arange(0, CHUNK)
        g += tl.sum(tl.where((i < G) & (tl.load(seg_ptr + 1 + i, mask=i < G, other=0) <= pos), 1, 0))
    live = g < G
    start, end = group_rows(offs_ptr, g, live, T)
    first = start + (pos - tl.load(seg_ptr + g, mask=live, other=0))
    return tl.where(live, first, 0), tl.where(live, end, -1)


@triton.jit(do_not_specialize=["count"])
def zero_kernel(x_ptr, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.zeros((BLOCK, ), tl.int32), mask=i < count)


@triton.jit(do_not_specialize=["T", "G", "tiles_t"])
def amax_kernel(x_ptr, offs_ptr, row_ptr, col_ptr, T, C, G, tiles_t, xb, xr,
                BT: tl.constexpr, BC: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr):
    """Largest magnitudes, by atomic maxima, whose order does not matter: of each row and each column (ROWS), or of each matrix,
    in `row_ptr`. Grouped: rows in front of the first group and behind the last one don't count."""
    pid = tl.program_id(0)
    tiles_c = tl.cdiv(C, BC)
    b = (pid // (tiles_t * tiles_c)).to(tl.int64)
    rest = pid % (tiles_t * tiles_c)
    t = (rest // tiles_c).to(tl.int64) * BT + tl.arange(0, BT)
    c = rest % tiles_c * BC + tl.arange(0, BC)
    live = t < T
    if GROUPED:
        first, none = group_rows(offs_ptr, 0, G > 0, T)
        none, last = group_rows(offs_ptr, tl.maximum(G - 1, 0), G > 0, T)
        live = (t >= first) & (t < last)
    x = tl.load(x_ptr + b * xb + (t * xr)[:, None] + c[None, :], mask=live[:, None] & (c < C)[None, :], other=0.0)
    bits = magnitude(x)
    if ROWS:
        tl.atomic_max(row_ptr + b * T + t, tl.max(bits, 1), mask=live, sem="relaxed")
        tl.atomic_max(col_ptr + b * C + c, tl.max(bits, 0), mask=c < C, sem="relaxed")
    else:
        tl.atomic_max(row_ptr + b, tl.max(tl.max(bits, 1), 0), sem="relaxed")


@triton.jit(do_not_specialize=["T", "G", "tiles_t", "cr", "cb", "rsk", "csb"])
def both_kernel(x_ptr, row_ptr, col_ptr, rs_ptr, cs_ptr, row_amax_ptr, col_amax_ptr, next_ptr, offs_ptr, seg_ptr, T, C, G, tiles_t, clamp,
                xb, xr, rb, rr, cb, cr, rsb, rsr, rsk, csb, csr, csk, KIND: tl.constexpr, GROUPED: tl.constexpr,
                GIVEN: tl.constexpr, NEXT: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr, ROUNDING: tl.constexpr, E8M0: tl.constexpr, TOP: tl.constexpr,
                EMAX: tl.constexpr, MANTISSA: tl.constexpr, MANTISSA_BITS: tl.constexpr, SATURATE: tl.constexpr):
    """KIND: 'blocks' (1x128 on both copies), 'tiles' (128x128), 'rows', 'tensor'. GIVEN: the tensor's scale is in `rs_ptr`.
    NEXT: the largest magnitude goes to `next_ptr`, for later scales.
    cb, cr: strides of `columns` in units of 16, whatever the number of rows: their stores stay wide. EVEN: T is whole tiles."""
    BC: tl.constexpr = 64       # columns done at a time: more take too many registers for two programs an SM
    SPAN: tl.constexpr = 128 if KIND == "blocks" or KIND == "tiles" else BC
    pid = tl.program_id(0)
    tiles_c = tl.cdiv(C, SPAN)
    b = (pid // (tiles_t * tiles_c)).to(tl.int64)
    tile = pid % (tiles_t * tiles_c) // tiles_c
    tc = pid % (tiles_t * tiles_c) % tiles_c
    i = tl.arange(0, 128)
    j = tl.arange(0, BC)
    pos = tile.to(tl.int64) * 128
    if GROUPED:
        first, end = find_tile(tile, offs_ptr, seg_ptr, T, G, CHUNK)
        work = end >= 0
        fill = i < 128
    else:
        first = pos
        end = tl.cast(T, tl.int64)
        work = end >= 0
        fill = (pos + i < T) | EVEN
    x_ptr += b * xb
    row_ptr += b * rb
    rs_ptr += b * rsb
    cs_ptr += b * csb
    # scales that are one for the whole tensor, or for a whole column: written by the first tile, live or not
    if KIND == "tensor":
        if GIVEN:
            scale = tl.load(rs_ptr)
            good = tl.abs(scale) < float("inf")
            row_inverse = tl.where(good, tl.div_rn(1.0, scale).to(tl.int32, bitcast=True), 0x7FC00000).to(tl.float32, bitcast=True)
            row_sign = tl.where(good, 1, 0) << 31
        else:
            scale, row_inverse, row_sign = block_scale(tl.load(row_amax_ptr + b), clamp, "", False, TOP, 0, 0, 0)
            if tile + tc == 0:
                tl.store(rs_ptr, scale)
        col_inverse = row_inverse
        col_sign = row_sign
    if KIND == "rows":
        c = tc * BC + j
        most = tl.load(col_amax_ptr + b * C + c, mask=c < C, other=0)
        col_scale, col_inverse, col_sign = block_scale(most, clamp, "", False, TOP, 0, 0, 0)
        if tile == 0:
            tl.store(cs_ptr + c * csr, col_scale, mask=c < C)
    if work:
        live = first + i < end
        w = i
        v = j
        if WIDE:
            w = i.to(tl.int64)
            v = j.to(tl.int64)
        # the tile's base in 64 bits, offsets inside it in 32 unless WIDE
        x_ptr += first * xr + tc * SPAN
        row_ptr += first * rr + tc * SPAN
        col_ptr += (b * cb + tc.to(tl.int64) * SPAN * cr) * 16 + pos
        if KIND == "rows":
            row_most = tl.load(row_amax_ptr + (b * T + first) + i, mask=live, other=0)
            row_scale, row_inverse, row_sign = block_scale(row_most, clamp, "", False, TOP, 0, 0, 0)
            if tc == 0:
                tl.store(rs_ptr + first * rsr + i * rsr, row_scale, mask=live)
        if KIND == "blocks" or KIND == "tiles":
            # the tile is read again below: it is in L1 then
            row_most = tl.zeros((128, ), tl.int32)
            for h in tl.static_range(SPAN // BC):
                inside = tc * SPAN + h * BC + j < C
                x = tl.load(x_ptr + (w * xr)[:, None] + (h * BC + j)[None, :], mask=live[:, None] & inside[None, :], other=0.0)
                row_most = tl.maximum(row_most, tl.max(magnitude(x), 1))
        if KIND == "blocks":
            row_scale, row_inverse, row_sign = block_scale(row_most, clamp, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS)
            tl.store(rs_ptr + (first * rsr + tc.to(tl.int64) * rsk) + i * rsr, row_scale, mask=live)
        if KIND == "tiles":
            scale, row_inverse, row_sign = block_scale(tl.max(row_most, 0), clamp, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS)
            tl.store(rs_ptr + tile * rsr + tc * rsk, scale)
            col_inverse = row_inverse
            col_sign = row_sign
        for h in tl.static_range(SPAN // BC):
            inside = tc * SPAN + h * BC + j < C
            mask = live[:, None] & inside[None, :]
            x = tl.load(x_ptr + (w * xr)[:, None] + (h * BC + j)[None, :], mask=mask, other=0.0)
            bits = magnitude(x)
            if NEXT:
                most = tl.max(bits, 1)
            if KIND == "blocks":
                col_scale, col_inverse, col_sign = block_scale(tl.max(bits, 0), clamp, ROUNDING, E8M0, TOP, EMAX, MANTISSA,
                                                               MANTISSA_BITS)
                tl.store(cs_ptr + (tc * SPAN + h * BC + j).to(tl.int64) * csr + tile.to(tl.int64) * csk, col_scale, mask=inside)
            if KIND == "tensor" or KIND == "tiles":
                y = narrow_fp8(x, bits, row_inverse, row_sign, row_ptr.dtype.element_ty, TOP, SATURATE or GIVEN)
                z = y
            else:
                y = narrow_fp8(x, bits, row_inverse[:, None], row_sign[:, None], row_ptr.dtype.element_ty, TOP, SATURATE)
                z = narrow_fp8(x, bits, col_inverse[None, :], col_sign[None, :], row_ptr.dtype.element_ty, TOP, SATURATE)
            tl.store(row_ptr + (w * rr)[:, None] + (h * BC + j)[None, :], y, mask=mask)
            if (KIND == "tensor" or KIND == "tiles") and x_ptr.dtype.element_ty == tl.float32:
                # made again from another read: where one conversion feeds both copies, the ptxas of Triton 3.6 takes bytes of the
                # second from a register that nothing has written (sm_90; seen in the machine code)
                x = tl.load(x_ptr + (w * xr)[:, None] + (h * BC + j)[None, :], mask=mask, other=0.0)
                z = narrow_fp8(x, magnitude(x), row_inverse, row_sign, row_ptr.dtype.element_ty, TOP, SATURATE or GIVEN)
            if GROUPED:
                z = tl.where(live[:, None], z, tl.zeros_like(z))    # a NaN scale must not reach the fill
            tl.store(col_ptr + ((h * BC + v) * cr * 16)[:, None] + i[None, :], tl.trans(z), mask=inside[:, None] & fill[None, :])
            if NEXT:        # most tiles find it large enough
                most = tl.max(most, 0)
                tl.atomic_max(next_ptr, most, mask=most > tl.load(next_ptr, volatile=True), sem="relaxed")
