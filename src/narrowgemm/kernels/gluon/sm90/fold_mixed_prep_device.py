"""The launch in front of the FP8 product with MXFP8 activations: each K block of 128 with one scale a row, where that is exact.

64 rows by 128 of K whose elements all stay what they are when the largest of a row's four scales is factored out leave folded, with
that scale four times. Others leave as they came, with the four scales that they had, and a flag goes up for the product.
"""

import triton
import triton.language as tl

from .fold_prep_device import e8m0

ROWS = tl.constexpr(64)
LOW = tl.constexpr(16)      # scale codes between which products and sums stay inside FP32, whatever the weights' scales
HIGH = tl.constexpr(200)
MOST = tl.constexpr(14)     # powers of two that a block's scale may lie under the largest


@triton.jit
def codes_of(s_ptr, r, live, kb, K, ssm, ssk):
    """(codes of a K block of rows r, which there are), [rows, 4]."""
    block = kb * 4 + tl.arange(0, 4)
    there = live[:, None] & (block * 32 < K)[None, :]
    return tl.load(s_ptr + r.to(tl.int64)[:, None] * ssm + block.to(tl.int64)[None, :] * ssk, mask=there, other=0).to(tl.int32), there


@triton.jit(do_not_specialize=["M", "KB", "RB", "column", "steps"])
def fold_mixed_kernel(x_ptr, s_ptr, index_ptr, y_ptr, ys_ptr, flags_ptr, count_ptr, M, K, KB, RB, steps, sxg, sxm, ssg, ssm, ssk, column,
                      MASKED: tl.constexpr, STAGES: tl.constexpr):
    """x [planes, M, K] E4M3, s [planes, M, ceil(K / 32)] E8M0 to y [planes, M, KB * 128] and ys FP32 [planes, KB, 4, column];
    flags int32 [planes, RB, KB], one for 64 rows of a K block. count_ptr: += flags, and more than there are where a scale is out of
    what the product takes. A program takes 64 rows and `steps` K blocks. MASKED: rows from index[plane] on are left out."""
    parts = (KB + steps - 1) // steps
    part = tl.program_id(0) % parts
    rb = tl.program_id(0) // parts % RB
    plane = tl.program_id(0) // parts // RB
    end = M
    if MASKED:
        end = tl.minimum(tl.load(index_ptr + plane), M)
    first = rb * ROWS
    if first < end:
        p64 = plane.to(tl.int64)
        r = first + tl.arange(0, ROWS)
        live = r < end
        x_ptr += p64 * sxg
        s_ptr += p64 * ssg
        y_ptr += p64 * M * (KB * 128)
        sub = tl.arange(0, 4)
        count = 0
        last = tl.minimum((part + 1) * steps, KB)
        ahead, ahead_there = codes_of(s_ptr, r, live, part * steps, K, ssm, ssk)
        for kb in tl.range(part * steps, last, num_stages=STAGES):
            k = kb * 128 + tl.arange(0, 128)
            x = tl.load(x_ptr + r.to(tl.int64)[:, None] * sxm + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
            code = ahead
            there = ahead_there
            ahead, ahead_there = codes_of(s_ptr, r, live, tl.minimum(kb + 1, last - 1), K, ssm, ssk)
            # E4M3 times 2^-d is exact in FP16 for d up to MOST
            x = tl.reshape(x.to(tl.float16), [ROWS, 4, 32])
            holds = tl.max((x != 0.0).to(tl.int32), 2) > 0
            counts = holds & (code < 255)
            top = tl.max(tl.where(counts, code, 0), 1)[:, None]
            down = tl.where(holds, tl.minimum(tl.maximum(top - code, 0), MOST), 0)
            want = x * ((127 - down) << 23).to(tl.float32, bitcast=True).to(tl.float16)[:, :, None]
            y = want.to(tl.float8e4nv)
            lost = tl.max((y.to(tl.float16) != want).to(tl.int32), 2) > 0
            lost = lost | (holds & (top - code > MOST)) | (there & (code == 255))
            flag = tl.max(tl.max(lost.to(tl.int32), 1), 0)
            to = y_ptr + r.to(tl.int64)[:, None] * (KB * 128) + k[None, :]
            if flag == 0:
                tl.store(to, tl.reshape(y, [ROWS, 128]), mask=live[:, None])
            else:
                from_ = x_ptr + r.to(tl.int64)[:, None] * sxm + k[None, :]
                tl.store(to, tl.load(from_, mask=live[:, None] & (k < K)[None, :], other=0.0), mask=live[:, None])
            own = tl.where(flag > 0, code, top)
            at = ys_ptr + (p64 * KB + kb) * 4 * column + sub.to(tl.int64)[None, :] * column + r[:, None]
            tl.store(at, e8m0(own), mask=live[:, None])
            tl.store(flags_ptr + (plane * RB + rb) * KB + kb, flag)
            outside = tl.max(tl.max((counts & ((code < LOW) | (code > HIGH))).to(tl.int32), 1), 0)
            count += flag + (outside << 24)
        if count > 0:
            tl.atomic_add(count_ptr, count, sem="relaxed")

@triton.jit
def clear_kernel(count_ptr):
    tl.store(count_ptr, 0)
