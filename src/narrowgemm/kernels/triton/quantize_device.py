"""Device code of quantisation: bit for bit what `reference/quantize.py` defines.

    load -> |x| as integers -> max of a block -> scale, 1 / scale -> |x| * (1 / scale) -> sign -> FP8 or E2M1 -> store

Magnitudes are compared as integers, in which order a NaN is above infinity, so that it reaches the scale. Signs travel as
bits, so that -0 stays -0 and a NaN block comes out as 0x7F. Base addresses are 64-bit scalars; offsets inside a program's
tile are 32-bit unless WIDE. Numbers of rows are not specialised on: a new token count never compiles anything.
"""

import triton
import triton.language as tl

INF_BITS = tl.constexpr(0x7F800000)
NAN_BITS = tl.constexpr(0x7FC00000)
ABS_BITS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def magnitude(x):
    """Bits of |x| as int32; ordered as |x|, with NaN above infinity."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & ABS_BITS


@triton.jit
def over_top(x, TOP: tl.constexpr, NATIVE: tl.constexpr):
    """x / TOP, correctly rounded. NATIVE: a product, its exact remainder, one more product (Markstein); tests try every significand."""
    if NATIVE:
        ONE: tl.constexpr = 1.0 / TOP
        q = x * ONE
        return tl.fma(tl.fma(q, 0.0 - TOP, x), ONE, q)
    else:
        return tl.div_rn(x, tl.full(x.shape, TOP, tl.float32))


@triton.jit
def inverse_of(s, NATIVE: tl.constexpr):
    """1 / s, correctly rounded. NATIVE: two steps of Newton from within a few units of the last place. They leave out one significand,
    all ones, of which the inverse is one unit above a power of two."""
    if NATIVE:
        r = 1.0 / s
        r = tl.fma(r, tl.fma(0.0 - s, r, 1.0), r)
        r = tl.fma(r, tl.fma(0.0 - s, r, 1.0), r)
        bits = s.to(tl.int32, bitcast=True)
        near = (((253 - (bits >> 23)) << 23) + 1).to(tl.float32, bitcast=True)
        return tl.where((bits & 0x7FFFFF) == 0x7FFFFF, near, r)
    else:
        return tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)


@triton.jit
def block_scale(bits, clamp, ROUNDING: tl.constexpr, E8M0: tl.constexpr, TOP: tl.constexpr, EMAX: tl.constexpr,
                MANTISSA: tl.constexpr, MANTISSA_BITS: tl.constexpr, NATIVE: tl.constexpr = False):
    """(scale as stored, 1 / scale, mask of the sign bits to keep) from the largest magnitudes of blocks. Gluon's kernels call it,
    too: nothing that makes a tensor."""
    finite = bits < INF_BITS
    amax = tl.maximum(bits.to(tl.float32, bitcast=True), clamp)
    if E8M0:
        bits = amax.to(tl.int32, bitcast=True)
        if ROUNDING == "even":
            bits += 1 << (22 - MANTISSA_BITS)
        code = (bits >> 23) - EMAX
        if ROUNDING == "rceil":
            code += ((bits & 0x7FFFFF) > MANTISSA).to(tl.int32)
        code = tl.minimum(tl.maximum(code, 0), 254)
        inverse = tl.where(code == 254, 0x400000, (254 - code) << 23)
        inverse = tl.where(finite, inverse, NAN_BITS).to(tl.float32, bitcast=True)
        scale = tl.where(finite, code, 255).to(tl.uint8)
    else:
        scale = tl.maximum(over_top(amax, TOP, NATIVE), 1.1754943508222875e-38)
        inverse = inverse_of(scale, NATIVE)
        scale = tl.where(finite, scale.to(tl.int32, bitcast=True), NAN_BITS).to(tl.float32, bitcast=True)
        inverse = tl.where(finite, inverse.to(tl.int32, bitcast=True), NAN_BITS).to(tl.float32, bitcast=True)
    return scale, inverse, tl.where(finite, 1, 0) << 31


@triton.jit
def narrow_fp8(x, bits, inverse, sign, DTYPE: tl.constexpr, TOP: tl.constexpr, SATURATE: tl.constexpr):
    """x * inverse as FP8, `bits` being the magnitude of x. `inverse` and `sign` broadcast against x."""
    y = bits.to(tl.float32, bitcast=True) * inverse
    if SATURATE:
        y = tl.minimum(y, TOP, propagate_nan=tl.PropagateNan.ALL)
    y = y.to(tl.int32, bitcast=True) | (x.to(tl.float32).to(tl.int32, bitcast=True) & sign)
    return y.to(tl.float32, bitcast=True).to(DTYPE)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_amax(x, NATIVE: tl.constexpr):
    """Bits of the largest magnitude of each row."""
    if NATIVE:
        return tl.reduce(tl.abs(x.to(tl.float32)), 1, larger).to(tl.int32, bitcast=True) & ABS_BITS
    else:
        return tl.max(magnitude(x), 1)


@triton.jit
def block_fp8(x, clamp, DTYPE: tl.constexpr, SATURATE: tl.constexpr, ROUNDING: tl.constexpr, E8M0: tl.constexpr, TOP: tl.constexpr,
              EMAX: tl.constexpr, MANTISSA: tl.constexpr, MANTISSA_BITS: tl.constexpr, NATIVE: tl.constexpr):
    """(scales, FP8) of x [ROWS, COLUMNS], a block a row. NATIVE: NVIDIA's conversion, which saturates, keeps the sign of a zero and
    has one NaN."""
    scale, inverse, sign = block_scale(row_amax(x, NATIVE), clamp, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS, NATIVE)
    if NATIVE:
        return scale, (x.to(tl.float32) * inverse[:, None]).to(DTYPE)
    else:
        return scale, narrow_fp8(x, magnitude(x), inverse[:, None], sign[:, None], DTYPE, TOP, SATURATE)


@triton.jit
def narrow_e2m1(x, inverse, SATURATE: tl.constexpr):
    """x * inverse as E2M1 in int32: magnitude in bits 0 to 2, sign in bit 9; a NaN is +6."""
    NARROW: tl.constexpr = x.dtype.primitive_bitwidth == 16
    y = tl.minimum(x.to(tl.float32) * inverse, 6.0)
    if SATURATE:
        y = tl.maximum(y, -6.0)
    if NARROW:
        # times 2^-126, E2M1's code lies in bits 22 to 24, its subnormals on float32's; 11 significant bits lose nothing
        bits = (y * 1.1754943508222875e-38).to(tl.uint32, bitcast=True)
        return (bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22
    bits = tl.abs(y).to(tl.uint32, bitcast=True)
    code = ((bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22) - 252
    halves = (tl.abs(y) + 4194304.0).to(tl.uint32, bitcast=True) & 7  # 2^22: rounds to halves
    return tl.where(tl.abs(y) < 1.0, halves, code) | ((y.to(tl.uint32, bitcast=True) >> 22) & 0x200)


@triton.jit
def pack_e2m1(code, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`narrow_e2m1`'s codes [ROWS, COLUMNS] as bytes [ROWS, COLUMNS / 2], even columns in the low nibble."""
    low, high = tl.split(tl.reshape(code, (ROWS, COLUMNS // 2, 2)))
    both = low | (high << 4)
    return ((both & 0x77) | ((both >> 6) & 0x88)).to(tl.uint8)


PAIRS = tl.constexpr(2)      # of E2M1: BF16 on NVIDIA from sm_90 on, two elements an instruction
# |low|, |high| and the larger of each pair, two BF16 a register
PAIR_AMAX = tl.constexpr("""{
and.b32 $0, $3, 0x7fff7fff;
and.b32 $1, $4, 0x7fff7fff;
max.u16x2 $2, $0, $1;
}""")
# $0: bytes of 4 low and 4 high elements; $1, $2 and $3, $4: magnitudes; $5, $6 and $7, $8: the elements, for their signs; $9, $10:
# 1 / scale; $11, $12: which sign bits there are. A sum with 64, 128 and 256 rounds to halves, ones and twos, to nearest even, and what
# lies above the sum's constant is the code, if the magnitude is below 2, 4 or any: the least of the three is the code.
PAIR_CODES = tl.constexpr("""{
.reg .b32 a, b, h, o, t, l0, h0, l1, h1, s0, s1, k1, k2, k3, c1, c2, c3;
mov.b32 k1, 0x42804280;
mov.b32 k2, 0x43004300;
mov.b32 k3, 0x43804380;
mov.b32 c1, 0xbd80bd80;
mov.b32 c2, 0xbd02bd02;
mov.b32 c3, 0xbc84bc84;
mov.b32 o, 0x00070007;
""" + "".join("""fma.rn.bf16x2 a, %s, %s, k3;
add.s16x2 a, a, c3;
min.s16x2 t, a, o;
fma.rn.bf16x2 a, %s, %s, k2;
add.s16x2 a, a, c2;
min.s16x2 t, a, t;
fma.rn.bf16x2 a, %s, %s, k1;
add.s16x2 a, a, c1;
min.s16x2 %s, a, t;
""" % (x, s, x, s, x, s, y) for x, s, y in (("$1", "$9", "l0"), ("$2", "$10", "l1"), ("$3", "$9", "h0"), ("$4", "$10", "h1"))) + """
mad.lo.u32 l0, h0, 16, l0;
mad.lo.u32 l1, h1, 16, l1;
shr.u32 s0, $5, 4;
lop3.b32 s0, $7, s0, 0x80008000, 0xe4;
shr.u32 s0, s0, 8;
lop3.b32 l0, s0, $11, l0, 0xea;
shr.u32 s1, $6, 4;
lop3.b32 s1, $8, s1, 0x80008000, 0xe4;
shr.u32 s1, s1, 8;
lop3.b32 l1, s1, $12, l1, 0xea;
prmt.b32 $0, l0, l1, 0x6420;
}""")


@triton.jit
def pairs_e2m1(x, clamp, ROUNDING: tl.constexpr, TOP: tl.constexpr, EMAX: tl.constexpr, MANTISSA: tl.constexpr,
               MANTISSA_BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(E8M0 scales, bytes [ROWS, COLUMNS / 2]) of BF16 x [ROWS, COLUMNS], the same bits as by `narrow_e2m1`."""
    low, high = tl.split(tl.reshape(x.to(tl.int16, bitcast=True), (ROWS, COLUMNS // 2, 2)))
    a, b, most = tl.inline_asm_elementwise(PAIR_AMAX, "=r,=r,=r,r,r", [low, high], dtype=(tl.int16, tl.int16, tl.int16), is_pure=True,
                                           pack=2)
    scale, inverse, sign = block_scale(tl.max(most.to(tl.int32), 1) << 16, clamp, ROUNDING, True, TOP, EMAX, MANTISSA, MANTISSA_BITS)
    inverse = (inverse.to(tl.int32, bitcast=True) >> 16).to(tl.int16)[:, None]
    keep = tl.where(sign == 0, 0, 0x88).to(tl.int16)[:, None]
    y = tl.inline_asm_elementwise(PAIR_CODES, "=r,r,r,r,r,r,r,r,r,r,r,r,r", [a, b, low, high, inverse, keep], dtype=tl.uint8,
                                  is_pure=True, pack=4)
    return scale, y


@triton.jit
def block_e2m1(x, clamp, KIND: tl.constexpr, SATURATE: tl.constexpr, ROUNDING: tl.constexpr, E8M0: tl.constexpr, TOP: tl.constexpr,
               EMAX: tl.constexpr, MANTISSA: tl.constexpr, MANTISSA_BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(scales, bytes [ROWS, COLUMNS / 2]) of x [ROWS, COLUMNS], a block a row."""
    if KIND == PAIRS:
        return pairs_e2m1(x, clamp, ROUNDING, TOP, EMAX, MANTISSA, MANTISSA_BITS, ROWS, COLUMNS)
    else:
        scale, inverse, sign = block_scale(tl.max(magnitude(x), 1), clamp, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS)
        return scale, pack_e2m1(narrow_e2m1(x, inverse[:, None], SATURATE), ROWS, COLUMNS)


@triton.jit(do_not_specialize=["R", "sb", "ss"])
def groups_kernel(x_ptr, out_ptr, scale_ptr, R, K, S, clamp, xb, xr, xk, ob, orow, sb, sr, ss,
                  N: tl.constexpr, BR: tl.constexpr, BG: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
                  E2M1: tl.constexpr, SATURATE: tl.constexpr, ROUNDING: tl.constexpr, E8M0: tl.constexpr,
                  TOP: tl.constexpr, EMAX: tl.constexpr, MANTISSA: tl.constexpr, MANTISSA_BITS: tl.constexpr,
                  NATIVE: tl.constexpr):
    """1xN blocks along K. A program does BR rows of BG blocks; FLAT: BR * BG blocks in a row of one contiguous tensor."""
    PER_BYTE: tl.constexpr = 2 if E2M1 else 1
    pid = tl.program_id(0)
    i = tl.arange(0, BR * BG)
    n = tl.arange(0, N)
    h = tl.arange(0, N // PER_BYTE)
    if FLAT:
        first = pid.to(tl.int64) * (BR * BG)
        live = first + i < tl.cast(R, tl.int64) * S
        x_ptr += first * N
        out_ptr += first * (N // PER_BYTE)
        scale_ptr += first
        x_off = (i * N)[:, None] + n[None, :]
        out_off = (i * (N // PER_BYTE))[:, None] + h[None, :]
        scale_off = i
        mask = live[:, None]
        out_mask = live[:, None]
    else:
        tiles_g = tl.cdiv(S, BG)
        tiles = tl.cdiv(R, BR) * tiles_g
        b = pid // tiles
        row = pid % tiles // tiles_g * BR
        group = pid % tiles % tiles_g * BG
        r = row + i // BG
        g = group + i % BG
        live = (r < R) & (g < S)
        k = (g * N)[:, None] + n[None, :]
        kh = (g * (N // PER_BYTE))[:, None] + h[None, :]
        if WIDE:
            r = r.to(tl.int64)
            k = k.to(tl.int64)
            g = g.to(tl.int64)
        x_ptr += b.to(tl.int64) * xb
        out_ptr += b.to(tl.int64) * ob
        scale_ptr += b.to(tl.int64) * sb
        x_off = (r * xr)[:, None] + k * xk
        out_off = (r * orow)[:, None] + kh
        scale_off = r * sr + g * ss
        mask = live[:, None] & (k < K)
        out_mask = live[:, None] & (kh < K // PER_BYTE)
    x = tl.load(x_ptr + x_off, mask=mask, other=0.0, eviction_policy="evict_first")
    if E2M1:
        scale, y = block_e2m1(x, clamp, E2M1, SATURATE, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS, BR * BG, N)
        tl.store(scale_ptr + scale_off, scale, mask=live)
        tl.store(out_ptr + out_off, y, mask=out_mask)
    else:
        scale, y = block_fp8(x, clamp, out_ptr.dtype.element_ty, SATURATE, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS, NATIVE)
        tl.store(scale_ptr + scale_off, scale, mask=live)
        tl.store(out_ptr + out_off, y, mask=out_mask)


@triton.jit(do_not_specialize=["R", "sb", "ss"])
def tiles_kernel(x_ptr, out_ptr, scale_ptr, R, K, clamp, xb, xr, xk, ob, orow, sb, sr, ss,
                 BR: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, SATURATE: tl.constexpr,
                 ROUNDING: tl.constexpr, E8M0: tl.constexpr, TOP: tl.constexpr, EMAX: tl.constexpr,
                 MANTISSA: tl.constexpr, MANTISSA_BITS: tl.constexpr):
    """BR x BK blocks with one scale each: one program a block."""
    pid = tl.program_id(0)
    tiles_k = tl.cdiv(K, BK)
    tiles = tl.cdiv(R, BR) * tiles_k
    b = (pid // tiles).to(tl.int64)
    tr = pid % tiles // tiles_k
    tk = pid % tiles % tiles_k
    r = tl.arange(0, BR)[:, None]
    k = tl.arange(0, BK)[None, :]
    mask = (tr * BR + r < R) & (tk * BK + k < K)
    if WIDE:
        r = r.to(tl.int64)
        k = k.to(tl.int64)
    row = tr.to(tl.int64) * BR
    col = tk.to(tl.int64) * BK
    x_ptr += b * xb + row * xr + col * xk
    out_ptr += b * ob + row * orow + col
    scale_ptr += b * sb + tr.to(tl.int64) * sr + tk.to(tl.int64) * ss
    x = tl.load(x_ptr + r * xr + k * xk, mask=mask, other=0.0, eviction_policy="evict_first")
    bits = magnitude(x)
    most = tl.max(tl.max(bits, 1), 0)
    scale, inverse, sign = block_scale(most, clamp, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS)
    tl.store(scale_ptr, scale)
    y = narrow_fp8(x, bits, inverse, sign, out_ptr.dtype.element_ty, TOP, SATURATE)
    tl.store(out_ptr + r * orow + k, y, mask=mask)


@triton.jit(do_not_specialize=["R", "sb"])
def rows_kernel(x_ptr, out_ptr, scale_ptr, R, K, clamp, xb, xr, xk, ob, orow, sb, sr,
                BR: tl.constexpr, BK: tl.constexpr, ONCE: tl.constexpr, TOP: tl.constexpr):
    """One FP32 scale a row: BR rows a program. ONCE: BK holds the row, which is read once; else it is read twice."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(R, BR)
    b = (pid // tiles).to(tl.int64)
    row = (pid % tiles).to(tl.int64) * BR
    r = tl.arange(0, BR)
    k = tl.arange(0, BK)
    live = row + r < R
    x_ptr += b * xb + row * xr + (r.to(tl.int64) * xr)[:, None]
    out_ptr += b * ob + row * orow + (r.to(tl.int64) * orow)[:, None]
    if ONCE:
        mask = live[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + (k.to(tl.int64) * xk)[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        bits = magnitude(x)
        most = tl.max(bits, 1)
    else:
        many = tl.zeros((BR, BK), tl.int32)
        for k0 in range(0, K, BK):
            kk = k0 + k
            x = tl.load(x_ptr + (kk.to(tl.int64) * xk)[None, :], mask=live[:, None] & (kk < K)[None, :], other=0.0)
            many = tl.maximum(many, magnitude(x))
        most = tl.max(many, 1)
    scale, inverse, sign = block_scale(most, clamp, "", False, TOP, 0, 0, 0)
    tl.store(scale_ptr + b * sb + (row + r) * sr, scale, mask=live)
    if ONCE:
        y = narrow_fp8(x, bits, inverse[:, None], sign[:, None], out_ptr.dtype.element_ty, TOP, False)
        tl.store(out_ptr + k[None, :], y, mask=mask)
    else:
        for k0 in range(0, K, BK):
            kk = k0 + k
            mask = live[:, None] & (kk < K)[None, :]
            x = tl.load(x_ptr + (kk.to(tl.int64) * xk)[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
            y = narrow_fp8(x, magnitude(x), inverse[:, None], sign[:, None], out_ptr.dtype.element_ty, TOP, False)
            tl.store(out_ptr + kk[None, :], y, mask=mask)


@triton.jit
def flat_load(x_ptr, start, size, K, xr, xk, BLOCK: tl.constexpr, FLAT: tl.constexpr):
    """BLOCK elements of a matrix in row-major order, from element `start` (int64) on; zero past its end."""
    i = tl.arange(0, BLOCK)
    if FLAT:
        return tl.load(x_ptr + start + i, mask=i < size - start, other=0.0)
    at = start + i
    return tl.load(x_ptr + at // K * xr + at % K * xk, mask=at < size, other=0.0)


@triton.jit(do_not_specialize=["R", "P"])
def tensor_amax_kernel(x_ptr, part_ptr, R, K, xb, xr, xk, P, BLOCK: tl.constexpr, FLAT: tl.constexpr):
    """First pass of tensor-wise: the largest magnitude of each of P interleaved parts of each matrix."""
    b = (tl.program_id(0) // P).to(tl.int64)
    p = tl.program_id(0) % P
    size = tl.cast(R, tl.int64) * K
    x_ptr += b * xb
    most = tl.zeros((BLOCK, ), tl.int32)
    for tile in range(p, tl.cdiv(size, BLOCK), P):
        most = tl.maximum(most, magnitude(flat_load(x_ptr, tile.to(tl.int64) * BLOCK, size, K, xr, xk, BLOCK, FLAT)))
    tl.store(part_ptr + b * P + p, tl.max(most, 0))


@triton.jit(do_not_specialize=["R", "P", "sb"])
def tensor_cast_kernel(x_ptr, part_ptr, out_ptr, scale_ptr, R, K, clamp, xb, xr, xk, ob, orow, sb, P,
                       PARTS: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr, TOP: tl.constexpr):
    """Second pass: every program reduces the parts (a maximum: the order does not matter), and casts its own."""
    b = (tl.program_id(0) // P).to(tl.int64)
    p = tl.program_id(0) % P
    size = tl.cast(R, tl.int64) * K
    j = tl.arange(0, PARTS)
    most = tl.max(tl.load(part_ptr + b * P + j, mask=j < P, other=0), 0)
    scale, inverse, sign = block_scale(most, clamp, "", False, TOP, 0, 0, 0)
    if p == 0:
        tl.store(scale_ptr + b * sb, scale)
    x_ptr += b * xb
    out_ptr += b * ob
    i = tl.arange(0, BLOCK)
    for tile in range(p, tl.cdiv(size, BLOCK), P):
        start = tile.to(tl.int64) * BLOCK
        mask = i < size - start
        x = flat_load(x_ptr, start, size, K, xr, xk, BLOCK, FLAT)
        y = narrow_fp8(x, magnitude(x), inverse, sign, out_ptr.dtype.element_ty, TOP, False)
        if FLAT:
            tl.store(out_ptr + start + i, y, mask=mask)
        else:
            tl.store(out_ptr + (start + i) // K * orow + (start + i) % K, y, mask=mask)
