"""The launch in front of the Hopper prefill kernel with folded weights: A and its scales as that kernel takes them.

`fold_scales_kernel`: scales of any strides, FP32 or E8M0, to FP32 with rows contiguous. `fold_rows_kernel`: MXFP4 to E4M3 with
one scale every 128 of K, which is exact where the scales of the four blocks of 32 lie within 15 powers of two. Where they don't,
a block that doesn't fit keeps its own scale, and a flag goes up: the product is then taken 32 of K at a time.
"""

import triton
import triton.language as tl


@triton.jit
def e8m0(code):
    """int32 codes as FP32: 0 is 2^-127, 255 is NaN."""
    bits = tl.where(code == 0, 0x00400000, code << 23)
    return tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["M", "KB", "column"])
def fold_scales_kernel(s_ptr, out_ptr, M, KB, sg, sm, sk, column, BM: tl.constexpr, BK: tl.constexpr, E8M0: tl.constexpr):
    """s [planes, M, KB] to out [planes, KB, column]; a program takes BM rows of a plane."""
    blocks = (M + BM - 1) // BM
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    m = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    for k0 in range(0, KB, BK):
        k = k0 + tl.arange(0, BK)
        inside = (m < M)[:, None] & (k < KB)[None, :]
        x = tl.load(s_ptr + plane * sg + m.to(tl.int64)[:, None] * sm + k.to(tl.int64)[None, :] * sk, mask=inside, other=0)
        y = e8m0(x.to(tl.int32)) if E8M0 else x
        to = out_ptr + plane * KB * column + k.to(tl.int64)[:, None] * column + m[None, :]
        tl.store(to, tl.trans(y), mask=(k < KB)[:, None] & (m < M)[None, :])


@triton.jit
def element(code, scale):
    """FP32 of E2M1 codes (int32, the low four bits) times `scale`: the bits are placed in FP32's exponent and mantissa, which gives
    2^-126 of the value, subnormals too."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37 * scale


@triton.jit(do_not_specialize=["M", "KB", "column", "rows"])
def fold_rows_kernel(x_ptr, s_ptr, index_ptr, y_ptr, ys_ptr, flags_ptr, M, K, KB, rows, sxg, sxm, ssg, ssm, ssk, column,
                     BM: tl.constexpr, MASKED: tl.constexpr):
    """x [planes, M, K / 2] bytes, s [planes, M, ceil(K / 32)] E8M0 to y [planes, M, KB * 128] E4M3 and ys FP32 [planes, KB, 4, column].

    Program p takes every p-th tile of BM rows and 128 of K, `rows` of them in all planes; flags[p] = 1 where some block of 32 has a
    scale of its own. MASKED: rows from index[plane] on are left out."""
    inexact = tl.program_id(0) * 0
    per_plane = (M + BM - 1) // BM
    for tile in range(tl.program_id(0), rows * KB, tl.num_programs(0)):
        kb = tile % KB
        plane = tile // KB // per_plane
        first = tile // KB % per_plane * BM
        end = M
        if MASKED:
            end = tl.minimum(tl.load(index_ptr + plane), M)
        if first < end:
            r = first + tl.arange(0, BM)
            live = r < end
            p64 = plane.to(tl.int64)
            # bytes [BM, block, 16]; the blocks of rows and columns that aren't there are zeros
            block = kb * 4 + tl.arange(0, 4)
            there = live[:, None] & (block * 32 < K)[None, :]
            at = block[:, None] * 16 + tl.arange(0, 16)[None, :]
            x = tl.load(x_ptr + p64 * sxg + r.to(tl.int64)[:, None, None] * sxm + at[None, :, :],
                        mask=there[:, :, None] & (at * 2 < K)[None, :, :], other=0).to(tl.int32)
            code = tl.load(s_ptr + p64 * ssg + r.to(tl.int64)[:, None] * ssm + block.to(tl.int64)[None, :] * ssk, mask=there,
                           other=0).to(tl.int32)
            holds = tl.max(x & 0x77, 2) > 0
            nan = code == 255
            top = tl.max(tl.where(holds & (code < 255), code, 0), 1)[:, None]
            nan = tl.max(nan.to(tl.int32), 1)[:, None] > 0
            down = top - code
            fits = (down <= 14) | (holds == 0) | nan
            inexact = tl.maximum(inexact, tl.max(1 - fits.to(tl.int32)))
            fits = fits | (down < 0)
            down = tl.where(fits, tl.minimum(tl.maximum(down, 0), 14), 0)
            own = tl.where(fits, top, code)
            scale = ((133 - down) << 23).to(tl.float32, bitcast=True)[:, :, None]
            low = element(x, scale).to(tl.float8e4nv)
            high = element(x >> 4, scale).to(tl.float8e4nv)
            y = tl.reshape(tl.join(low, high), [BM, 128])
            to = y_ptr + (p64 * M + r)[:, None] * (KB * 128) + kb * 128 + tl.arange(0, 128)[None, :]
            tl.store(to, y, mask=live[:, None])
            # 2^(code - 133), where the smallest are subnormal
            s = tl.where(nan, float("nan"), e8m0(own) * 0.015625)
            sub = tl.arange(0, 4)
            tl.store(ys_ptr + (p64 * KB + kb) * 4 * column + sub.to(tl.int64)[None, :] * column + r[:, None], s, mask=live[:, None])
    tl.store(flags_ptr + tl.program_id(0), inexact)
