"""Device code of `activate_both` and `activate_backward`: SwiGLU or its derivative, and what the next products contract.

    forward    h [T, 2I]             ->  y [T, I]     FP8 along its rows and, transposed, along its columns
    backward   h [T, 2I], dy [T, I]  ->  dh [T, 2I]   the same, or in the input's type

A tile is 128 rows of one group by 32 or 64 columns of I, or 128 where scales are of 128; in the backward both halves of dh are made
from it. What is rounded to FP8 was rounded to the input's type before: the result is `quantize_both` of the
activation. Row- and tensor-wise scales that are not given take a pass before, which makes the values, too, and keeps maxima only.
"""

import triton
import triton.language as tl

from .activate_device import rounded, sigmoid, swiglu
from .quantize_both_device import find_tile, group_rows
from .quantize_device import block_scale, magnitude, narrow_fp8

CHUNK = tl.constexpr(256)


@triton.jit
def swiglu_backward(gate, up, d, alpha, limit, CLAMPED: tl.constexpr, NATIVE: tl.constexpr):
    """(d gate, d up) of `activate_device.swiglu`, given d of its result."""
    if CLAMPED:
        low = gate <= limit
        inside = (up <= limit) & (up >= 0.0 - limit)
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, 0.0 - limit, propagate_nan=tl.PropagateNan.ALL) + 1.0
        s = sigmoid(gate, alpha, NATIVE)
        dgate = d * up * s * (1.0 + alpha * gate * (1.0 - s))
        return tl.where(low, dgate, 0.0), tl.where(inside, d * gate * s, 0.0)
    s = sigmoid(gate, 1.0, NATIVE)
    return d * up * s * (1.0 + gate * (1.0 - s)), d * gate * s


@triton.jit
def make(h_ptr, d_ptr, at, d_at, mask, I, alpha, limit, BACKWARD: tl.constexpr, CLAMPED: tl.constexpr,
         NATIVE: tl.constexpr):
    """A tile of the result, rounded to h's type: (y, y), or (d gate, d up). Zero where `mask` is not set."""
    gate = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + at + I, mask=mask, other=0.0).to(tl.float32)
    if BACKWARD:
        d = tl.load(d_ptr + d_at, mask=mask, other=0.0).to(tl.float32)
        a, b = swiglu_backward(gate, up, d, alpha, limit, CLAMPED, NATIVE)
        return rounded(a, h_ptr.dtype.element_ty, NATIVE), rounded(b, h_ptr.dtype.element_ty, NATIVE)
    else:
        y = rounded(swiglu(gate, up, alpha, limit, CLAMPED, NATIVE), h_ptr.dtype.element_ty, NATIVE)
        return y, y


@triton.jit
def put(x, inverse, sign, first, columns, inside, mask, live, row_inverse, row_sign, row_ptr, col_ptr, cs_ptr, clamp, rr, cr, csr,
        KIND: tl.constexpr, GIVEN: tl.constexpr, ROUNDING: tl.constexpr, E8M0: tl.constexpr, TOP: tl.constexpr, EMAX: tl.constexpr,
        MANTISSA: tl.constexpr, MANTISSA_BITS: tl.constexpr, SATURATE: tl.constexpr):
    """Both copies of a tile [128, BC] at columns `first` + `columns`; `inverse`, `sign`: of its columns, row-wise."""
    i = tl.arange(0, 128)
    row_ptr += first
    col_ptr += first.to(tl.int64) * cr * 16
    cs_ptr += first.to(tl.int64) * csr
    bits = magnitude(x)
    if KIND == "tensor":
        y = narrow_fp8(x, bits, row_inverse, row_sign, row_ptr.dtype.element_ty, TOP, SATURATE or GIVEN)
        z = y
    else:
        if KIND == "blocks":
            col_scale, inverse, sign = block_scale(tl.max(bits, 0), clamp, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS)
            tl.store(cs_ptr + columns * csr, col_scale, mask=inside)
        y = narrow_fp8(x, bits, row_inverse[:, None], row_sign[:, None], row_ptr.dtype.element_ty, TOP, SATURATE)
        z = narrow_fp8(x, bits, inverse[None, :], sign[None, :], row_ptr.dtype.element_ty, TOP, SATURATE)
    tl.store(row_ptr + (i * rr)[:, None] + columns[None, :], y, mask=mask)
    z = tl.where(live[:, None], z, tl.zeros_like(z))        # a NaN scale must not reach the fill
    tl.store(col_ptr + (columns * cr * 16)[:, None] + i[None, :], tl.trans(z), mask=inside[:, None])


@triton.jit
def inverse_of(scale):
    """(1 / scale, mask of the sign bits to keep) of scales that are stored."""
    good = tl.abs(scale) < float("inf")
    inverse = tl.where(good, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale).to(tl.int32, bitcast=True), 0x7FC00000)
    return inverse.to(tl.float32, bitcast=True), tl.where(good, 1, 0) << 31


@triton.jit
def raise_to(ptr, bits):
    """Raise a largest magnitude; most tiles find it large enough, and thousands of atomics on one address take their turns."""
    tl.atomic_max(ptr, bits, mask=bits > tl.load(ptr, volatile=True), sem="relaxed")


@triton.jit(do_not_specialize=["T", "G"])
def maxima_kernel(h_ptr, d_ptr, offs_ptr, row_ptr, col_ptr, T, G, I, alpha, limit, hr, dr, BACKWARD: tl.constexpr,
                  CLAMPED: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr):
    """Largest magnitudes of each row and each column (ROWS), or of all, in `row_ptr`, by atomic maxima: their order does not matter."""
    BC: tl.constexpr = 64
    tiles_c = tl.cdiv(I, BC)
    t = (tl.program_id(0) // tiles_c).to(tl.int64) * 128 + tl.arange(0, 128)
    c = tl.program_id(0) % tiles_c * BC + tl.arange(0, BC)
    first, none = group_rows(offs_ptr, 0, G > 0, T)
    none, last = group_rows(offs_ptr, tl.maximum(G - 1, 0), G > 0, T)
    live = (t >= first) & (t < last)
    mask = live[:, None] & (c < I)[None, :]
    a, b = make(h_ptr, d_ptr, (t * hr)[:, None] + c[None, :], (t * dr)[:, None] + c[None, :], mask, I, alpha, limit, BACKWARD, CLAMPED, NATIVE)
    bits = magnitude(a)
    most = bits
    if BACKWARD:
        other = magnitude(b)
        most = tl.maximum(bits, other)
    if ROWS:
        tl.atomic_max(row_ptr + t, tl.max(most, 1), mask=live, sem="relaxed")
        tl.atomic_max(col_ptr + c, tl.max(bits, 0), mask=c < I, sem="relaxed")
        if BACKWARD:
            tl.atomic_max(col_ptr + I + c, tl.max(other, 0), mask=c < I, sem="relaxed")
    else:
        raise_to(row_ptr, tl.max(tl.max(most, 1), 0))


@triton.jit
def stored_inverse(ptr, mask):
    """What `scales_kernel` has left: (1 / scale, mask of the sign bits to keep)."""
    bits = tl.load(ptr, mask=mask, other=0)
    return bits.to(tl.float32, bitcast=True), tl.where(bits == 0x7FC00000, 0, 1) << 31


@triton.jit(do_not_specialize=["T", "G", "cr", "rsk"])
def both_kernel(h_ptr, d_ptr, row_ptr, col_ptr, rs_ptr, cs_ptr, row_amax_ptr, col_amax_ptr, next_ptr, offs_ptr, seg_ptr, T, G, I,
                clamp, alpha, limit, hr, dr, rr, cr, rsr, rsk, csr, csk, BC: tl.constexpr, LOOP: tl.constexpr, STAGES: tl.constexpr,
                KIND: tl.constexpr, BACKWARD: tl.constexpr, CLAMPED: tl.constexpr, NATIVE: tl.constexpr, GIVEN: tl.constexpr,
                NEXT: tl.constexpr, CHUNK: tl.constexpr, ROUNDING: tl.constexpr, E8M0: tl.constexpr, TOP: tl.constexpr, EMAX: tl.constexpr,
                MANTISSA: tl.constexpr, MANTISSA_BITS: tl.constexpr, SATURATE: tl.constexpr):
    """KIND: 'copy' (the input's type, rows only), 'blocks' (1x128 on both copies), 'rows', 'tensor'. GIVEN: the scale is in `rs_ptr`.
    NEXT: the largest magnitude goes to `next_ptr` too. cr: stride of `columns` in units of 16, whatever the number of rows.
    A program goes along LOOP tiles of SPAN columns; the next one's loads are under way while one is made."""
    SPAN: tl.constexpr = 128 if KIND == "blocks" else BC
    strips = tl.cdiv(I, SPAN * LOOP)
    tile = tl.program_id(0) // strips
    strip = tl.program_id(0) % strips
    i = tl.arange(0, 128)
    j = tl.arange(0, BC)
    first, end = find_tile(tile, offs_ptr, seg_ptr, T, G, CHUNK)
    if KIND == "tensor":
        if GIVEN:
            one_inverse, one_sign = inverse_of(tl.load(rs_ptr))
        else:
            scale, one_inverse, one_sign = block_scale(tl.load(row_amax_ptr), clamp, "", False, TOP, 0, 0, 0)
            if tile + strip == 0:      # one for the whole tensor: written by the first tile, live or not
                tl.store(rs_ptr, scale)
                if NEXT:
                    raise_to(next_ptr, tl.load(row_amax_ptr))
    if end >= 0:
        live = first + i < end
        # the tile's base in 64 bits, offsets inside it in 32
        h_ptr += first * hr
        d_ptr += first * dr
        row_ptr += first * rr
        if KIND != "copy":
            col_ptr += tile.to(tl.int64) * 128
            cs_ptr += tile.to(tl.int64) * csk
        if KIND == "blocks":
            rs_ptr += first * rsr
        if KIND == "rows":
            row_inverse, row_sign = stored_inverse(row_amax_ptr + first + i, live)
        if KIND == "tensor":
            row_inverse = one_inverse
            row_sign = one_sign
        most = tl.zeros((128, ), tl.int32)
        for tc in tl.range(strip * LOOP, tl.minimum(strip * LOOP + LOOP, tl.cdiv(I, SPAN)), num_stages=STAGES):
            c = tc * SPAN + j
            inside = c < I
            mask = live[:, None] & inside[None, :]
            at = (i * hr)[:, None] + c[None, :]
            d_at = (i * dr)[:, None] + c[None, :]
            if KIND == "blocks":
                # two tiles of 64 columns share their rows' scales; gate's and up's gradients are made one after the other, the inputs
                # being in L1 by then: all four at once are more than the registers hold
                inside2 = c + BC < I
                mask2 = live[:, None] & inside2[None, :]
                for part in tl.static_range(2 if BACKWARD else 1):
                    a, b = make(h_ptr, d_ptr, at, d_at, mask, I, alpha, limit, BACKWARD, CLAMPED, NATIVE)
                    a2, b2 = make(h_ptr + BC, d_ptr + BC, at, d_at, mask2, I, alpha, limit, BACKWARD, CLAMPED, NATIVE)
                    if part == 1:
                        a = b
                        a2 = b2
                    k = tc + part * (I // 128)
                    row_scale, row_inverse, row_sign = block_scale(tl.maximum(tl.max(magnitude(a), 1), tl.max(magnitude(a2), 1)), clamp,
                                                                   ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS)
                    tl.store(rs_ptr + k.to(tl.int64) * rsk + i * rsr, row_scale, mask=live)
                    put(a, row_inverse, row_sign, k * 128, j, inside, mask, live, row_inverse, row_sign, row_ptr, col_ptr, cs_ptr, clamp, rr,
                        cr, csr, KIND, GIVEN, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS, SATURATE)
                    put(a2, row_inverse, row_sign, k * 128, BC + j, inside2, mask2, live, row_inverse, row_sign, row_ptr, col_ptr, cs_ptr,
                        clamp, rr, cr, csr, KIND, GIVEN, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS, SATURATE)
            else:
                a, b = make(h_ptr, d_ptr, at, d_at, mask, I, alpha, limit, BACKWARD, CLAMPED, NATIVE)
            if KIND == "copy":
                tl.store(row_ptr + (i * rr)[:, None] + c[None, :], a, mask=mask)
                tl.store(row_ptr + (i * rr)[:, None] + (I + c)[None, :], b, mask=mask)
            if KIND == "tensor":
                put(a, row_inverse, row_sign, tc * SPAN, j, inside, mask, live, row_inverse, row_sign, row_ptr, col_ptr, cs_ptr, clamp, rr, cr,
                    csr, KIND, GIVEN, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS, SATURATE)
                if BACKWARD:
                    put(b, row_inverse, row_sign, tc * SPAN + I, j, inside, mask, live, row_inverse, row_sign, row_ptr, col_ptr, cs_ptr, clamp, rr,
                        cr, csr, KIND, GIVEN, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS, SATURATE)
                if GIVEN and NEXT:
                    most = tl.maximum(most, tl.max(magnitude(a), 1))
                    if BACKWARD:
                        most = tl.maximum(most, tl.max(magnitude(b), 1))
            if KIND == "rows":
                inverse, sign = stored_inverse(col_amax_ptr + c, inside)
                put(a, inverse, sign, tc * SPAN, j, inside, mask, live, row_inverse, row_sign, row_ptr, col_ptr, cs_ptr, clamp, rr, cr, csr,
                    KIND, GIVEN, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS, SATURATE)
                if BACKWARD:
                    inverse, sign = stored_inverse(col_amax_ptr + I + c, inside)
                    put(b, inverse, sign, tc * SPAN + I, j, inside, mask, live, row_inverse, row_sign, row_ptr, col_ptr, cs_ptr, clamp, rr, cr,
                        csr, KIND, GIVEN, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS, SATURATE)
        if KIND == "tensor" and GIVEN and NEXT:
            raise_to(next_ptr, tl.max(most, 0))
