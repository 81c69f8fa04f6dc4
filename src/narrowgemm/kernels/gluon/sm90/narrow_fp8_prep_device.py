"""FP8 tokens for weights in the order `narrowgemm.prepack_bits.FP8_PREPACK`: K as `narrow_fp8_device` has it, scales beside them."""

import triton
import triton.language as tl

FP8_ORDER = tl.constexpr(5)
TWO_ORDER = tl.constexpr(6)
NIBBLE_ORDER = tl.constexpr(7)
ROW_ORDER = tl.constexpr(8)


@triton.jit
def token_scale(xs_ptr, i, count, ssk):
    """FP32 scales of K blocks i, given as FP32, or as E8M0 codes."""
    s = tl.load(xs_ptr + i * ssk, mask=i < count, other=0)
    if xs_ptr.dtype.element_ty == tl.uint8:
        bits = s.to(tl.int32) << 23
        bits = tl.where(s == 0, 0x00400000, bits)
        bits = tl.where(s == 255, 0x7FC00000, bits)
        return bits.to(tl.float32, bitcast=True)
    else:
        return s.to(tl.float32)


@triton.jit
def store_scales(scale_ptr, scale, at, i, KX, rows, cfg: tl.constexpr):
    """Of each K block i a position has the scales of those 1, 0, 9 and 8 further on: 16 bytes, the least that TMA moves, and what a thread of
    wgmma wants of 16 positions, the scale of an even column in an odd register: the other bank than its sums. They are another group's,
    or nobody's, where the group ends. BY_K: positions of a K block lie side by side, `rows` of them, else K blocks of a position."""
    for j in tl.static_range(4):
        back = at - (j // 2 * 8 + j % 2)
        if cfg.BY_K:
            to = scale_ptr + (i.to(tl.int64) * rows + back) * 4 + (j ^ 1)
        else:
            to = scale_ptr + back * (KX // 32) + (4 * i + (j ^ 1))
        tl.store(to, scale, mask=(i < KX // 128) & (back >= 0))


@triton.jit
def in_order(x, BLOCKS: tl.constexpr):
    """out[w * 16 + q * 4 + b] = in[q * 32 + w * 4 + b] of every 128."""
    return tl.permute(tl.reshape(x, [BLOCKS, 4, 8, 4]), (0, 2, 1, 3))


@triton.jit
def load_fp8(x_ptr, xs_ptr, part, K, ssk, cfg: tl.constexpr):
    """(BK bytes of a row, the scales of their K blocks), zeros from K on."""
    o = part * cfg.BK + tl.arange(0, cfg.BK)
    i = part * (cfg.BK // 128) + tl.arange(0, cfg.BK // 128)
    return tl.load(x_ptr + o, mask=o < K, other=0.0), token_scale(xs_ptr, i, (K + 127) // 128, ssk)


@triton.jit
def store_fp8(x, scale, to_ptr, scale_ptr, at, part, KX, rows, cfg: tl.constexpr):
    """Those to position `at`, out[w * 16 + q * 4 + b] = in[q * 32 + w * 4 + b] of every 128. Scales go where `store_scales` says."""
    o = part * cfg.BK + tl.arange(0, cfg.BK)
    tl.store(to_ptr + o, tl.reshape(in_order(x, cfg.BK // 128), [cfg.BK]), mask=o < KX)
    store_scales(scale_ptr, scale, at, part * (cfg.BK // 128) + tl.arange(0, cfg.BK // 128), KX, rows, cfg)


@triton.jit
def bring_fp8(x_ptr, xs_ptr, to_ptr, scale_ptr, at, part, K, KX, ssk, rows, cfg: tl.constexpr):
    x, scale = load_fp8(x_ptr, xs_ptr, part, K, ssk, cfg)
    store_fp8(x, scale, to_ptr, scale_ptr, at, part, KX, rows, cfg)


@triton.jit
def bring_row(x_ptr, xs_ptr, to_ptr, factor_ptr, part, K, KX, cfg: tl.constexpr):
    """The same of a row with one scale, which part 0 leaves at `factor_ptr`."""
    o = part * cfg.BK + tl.arange(0, cfg.BK)
    x = tl.load(x_ptr + o, mask=o < K, other=0.0)
    tl.store(to_ptr + o, tl.reshape(in_order(x, cfg.BK // 128), [cfg.BK]), mask=o < KX)
    if part == 0:
        tl.store(factor_ptr, tl.load(xs_ptr))


@triton.jit
def magnitude(x):
    """|x|, 0 of NaN."""
    size = tl.abs(x)
    return tl.where(size == size, size, 0.0)


@triton.jit
def unit_of_top(top):
    """(2^e, 2^-e): what numbers up to `top` are told in, so that the largest is 2^7 units and more; (infinity, 1) of infinity."""
    e = tl.maximum(top.to(tl.int32, bitcast=True) >> 23, 8)
    infinite = top == float("inf")
    unit = tl.where(infinite, float("inf"), ((e - 7) << 23).to(tl.float32, bitcast=True))
    return unit, tl.where(infinite, 1.0, ((261 - e) << 23).to(tl.float32, bitcast=True))


@triton.jit
def in_two(x, unit, inverse, MORE: tl.constexpr):
    """FP32 that hold BF16, as E4M3 x = first * unit + second * unit / MORE: exact from 2^-9 / MORE of the largest on, below that to
    2^-18 / MORE of it. An infinity is 1 in units of infinity, so that sums are infinite or, times 0, NaN; what is beside it is nothing."""
    signs = tl.where(x == float("inf"), 1.0, tl.where(x == float("-inf"), -1.0, tl.where(x == x, 0.0, x)))
    x = tl.where(unit == float("inf"), signs, x * inverse)
    first = x.to(tl.float8e4nv)
    return first, ((x - first.to(tl.float32)) * MORE).to(tl.float8e4nv)


@triton.jit
def store_two(first, second, to_ptr, b, inside, BLOCKS: tl.constexpr):
    """Of every 128 of K the first numbers, then the second ones, K as `in_order` has it."""
    to = to_ptr + (b[:, None] * 256 + tl.arange(0, 128)[None, :])
    tl.store(to, tl.reshape(in_order(first, BLOCKS), [BLOCKS, 128]), mask=inside)
    tl.store(to + 128, tl.reshape(in_order(second, BLOCKS), [BLOCKS, 128]), mask=inside)


@triton.jit
def bring_two(x_ptr, to_ptr, scale_ptr, at, part, K, KX, rows, cfg: tl.constexpr):
    """BK elements of a BF16 row to position `at` as two E4M3 numbers each, in units of 128 of K, which go where `store_scales` says."""
    BLOCKS: tl.constexpr = cfg.BK // 128
    b = part * BLOCKS + tl.arange(0, BLOCKS)
    o = b[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + o, mask=o < K, other=0.0).to(tl.float32)
    unit, inverse = unit_of_top(tl.max(magnitude(x), 1))
    first, second = in_two(x, unit[:, None], inverse[:, None], 1)
    store_two(first, second, to_ptr, b, b[:, None] * 128 < KX, BLOCKS)
    store_scales(scale_ptr, unit, at, b, KX, rows, cfg)


@triton.jit
def bring_two_of_row(x_ptr, to_ptr, factor_ptr, part, K, KX, cfg: tl.constexpr):
    """The same in one unit a row, which part 0 leaves at `factor_ptr`; second numbers are told in 32nds of it."""
    BLOCKS: tl.constexpr = cfg.BK // 128
    b = part * BLOCKS + tl.arange(0, BLOCKS)
    o = b[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + o, mask=o < K, other=0.0).to(tl.float32)
    top = tl.max(tl.max(magnitude(x), 1), 0)
    if K > cfg.BK:
        for i in range(0, K, cfg.BK):
            at = i + tl.arange(0, cfg.BK)
            top = tl.maximum(top, tl.max(magnitude(tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32)), 0))
    unit, inverse = unit_of_top(top)
    first, second = in_two(x, unit, inverse, 32)
    store_two(first, second, to_ptr, b, b[:, None] * 128 < KX, BLOCKS)
    if part == 0:
        tl.store(factor_ptr, unit)
