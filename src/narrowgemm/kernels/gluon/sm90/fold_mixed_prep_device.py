"""The launch in front of the FP8 product with MXFP8 activations: each K block of 128 with one scale a row, where that is exact.

64 rows by 128 of K whose elements all stay what they are when the largest of a row's four scales is factored out leave folded, with
that scale four times. Others are cut into as few parts, each some times 32 of K, as leave every element what it is, with a scale for
each. Bit b of the flag that the product reads says that there is a cut behind 32 * (b + 1) of K.

Where the weights came as MXFP8, columns of A that meet an element which is not among the folded ones leave in BF16 beside.
"""

import triton
import triton.language as tl

from .fold_prep_device import e8m0

ROWS = tl.constexpr(64)
LOW = tl.constexpr(16)      # scale codes between which products and sums stay inside FP32, whatever the weights' scales
HIGH = tl.constexpr(200)
PICK_LOW = tl.constexpr(64)     # the same beside picks, whose weights may be 2^40 smaller than the largest of their row
PICK_HIGH = tl.constexpr(180)
SEEN = tl.constexpr(256)    # threads of a program at most
MOST = tl.constexpr(14)     # powers of two that a block's scale may lie under the largest
DENSE = tl.constexpr(0)     # `LAYOUT`, as the product's
CONTIGUOUS = tl.constexpr(1)
OFFSETS = tl.constexpr(2)


@triton.jit
def codes_of(s_ptr, r, live, kb, K, ssm, ssk):
    """(codes of a K block of rows r, which there are), [rows, 4]."""
    block = kb * 4 + tl.arange(0, 4)
    there = live[:, None] & (block * 32 < K)[None, :]
    return tl.load(s_ptr + r.to(tl.int64)[:, None] * ssm + block.to(tl.int64)[None, :] * ssk, mask=there, other=0).to(tl.int32), there


@triton.jit
def together(scale, limit):
    """1 where no row's scale is above its limit."""
    return tl.min((scale <= limit).to(tl.int32), 0)


@triton.jit
def limits(x_ptr, s_ptr, r, live, block, K, sxm, ssm, ssk):
    """Of 32 of K of rows r: (scale codes as they are, the least that a scale can be, the largest), [ROWS] each."""
    k = block * 32 + tl.arange(0, 32)
    there = live & (block * 32 < K)
    x = tl.load(x_ptr + r.to(tl.int64)[:, None] * sxm + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
    code = tl.load(s_ptr + r.to(tl.int64) * ssm + block.to(tl.int64) * ssk, mask=there, other=0).to(tl.int32)
    # a scale may rise to where the lowest bit of any element would be lost; NaN go with any
    bits = (tl.where(x == x, tl.abs(x), 0.0) * 512.0).to(tl.int32)
    low = (bits & -bits).to(tl.float32).to(tl.int32, bitcast=True) >> 23
    room = tl.minimum(tl.min(tl.where(bits == 0, 1000, low - 127), 1), MOST)
    counts = (tl.max((x != 0.0).to(tl.int32), 1) > 0) & (code < 255)
    return code, tl.where(counts, code, 0), tl.where(there & (code == 255), -1, tl.where(counts, code + room, 1000))


@triton.jit
def store_part(x_ptr, to_ptr, to_scale, scale, code, r, live, kb, b: tl.constexpr, K, sxm, KB, column):
    """32 of K, of scales `code`, over `scale`."""
    k = kb * 128 + b * 32 + tl.arange(0, 32)
    x = tl.load(x_ptr + r.to(tl.int64)[:, None] * sxm + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0).to(tl.float16)
    down = tl.where(tl.max((x != 0.0).to(tl.int32), 1) > 0, tl.minimum(tl.maximum(scale - code, 0), MOST), 0)
    y = (x * ((127 - down) << 23).to(tl.float32, bitcast=True).to(tl.float16)[:, None]).to(tl.float8e4nv)
    tl.store(to_ptr + r.to(tl.int64)[:, None] * (KB * 128) + k[None, :], y, mask=live[:, None])
    tl.store(to_scale + b * column + r, e8m0(scale), mask=live)


@triton.jit
def cut(x_ptr, s_ptr, to_ptr, to_scale, r, live, kb, KB, K, sxm, ssm, ssk, column):
    """Cuts of a block that doesn't fold as a whole; its parts go to to_ptr, their scales to to_scale. It is read once more, 32 of K at a
    time: what few blocks need would take registers from all."""
    raw0, c0, l0 = limits(x_ptr, s_ptr, r, live, kb * 4, K, sxm, ssm, ssk)
    raw1, c1, l1 = limits(x_ptr, s_ptr, r, live, kb * 4 + 1, K, sxm, ssm, ssk)
    raw2, c2, l2 = limits(x_ptr, s_ptr, r, live, kb * 4 + 2, K, sxm, ssm, ssk)
    raw3, c3, l3 = limits(x_ptr, s_ptr, r, live, kb * 4 + 3, K, sxm, ssm, ssk)
    c01, c12, c23 = tl.maximum(c0, c1), tl.maximum(c1, c2), tl.maximum(c2, c3)
    c012, c123 = tl.maximum(c01, c2), tl.maximum(c12, c3)
    ok01, ok12, ok23 = together(c01, tl.minimum(l0, l1)), together(c12, tl.minimum(l1, l2)), together(c23, tl.minimum(l2, l3))
    ok012, ok123 = together(c012, tl.minimum(tl.minimum(l0, l1), l2)), together(c123, tl.minimum(tl.minimum(l1, l2), l3))
    three = tl.where(ok23 > 0, 3, tl.where(ok01 > 0, 6, tl.where(ok12 > 0, 5, 7)))
    cuts = tl.where(ok123 > 0, 1, tl.where(ok01 * ok23 > 0, 2, tl.where(ok012 > 0, 4, three)))
    # alone, 32 of K keep the scale that they had
    s0 = tl.where(cuts & 1 > 0, raw0, tl.where(cuts & 2 > 0, c01, c012))
    s3 = tl.where(cuts & 4 > 0, raw3, tl.where(cuts & 2 > 0, c23, c123))
    s1 = tl.where(cuts & 1 == 0, s0, tl.where(cuts & 2 > 0, raw1, tl.where(cuts & 4 > 0, c12, c123)))
    s2 = tl.where(cuts & 4 == 0, s3, tl.where(cuts & 2 > 0, raw2, tl.where(cuts & 1 > 0, c12, c012)))
    store_part(x_ptr, to_ptr, to_scale, s0, raw0, r, live, kb, 0, K, sxm, KB, column)
    store_part(x_ptr, to_ptr, to_scale, s1, raw1, r, live, kb, 1, K, sxm, KB, column)
    store_part(x_ptr, to_ptr, to_scale, s2, raw2, r, live, kb, 2, K, sxm, KB, column)
    store_part(x_ptr, to_ptr, to_scale, s3, raw3, r, live, kb, 3, K, sxm, KB, column)
    return cuts


@triton.jit(do_not_specialize=["M", "KB", "RB", "column", "steps", "limit"])
def fold_mixed_kernel(x_ptr, s_ptr, index_ptr, y_ptr, ys_ptr, flags_ptr, count_ptr, M, K, KB, RB, steps, limit, sxg, sxm, ssg, ssm, ssk,
                      column, MASKED: tl.constexpr, STAGES: tl.constexpr, NARROW: tl.constexpr = False):
    """x [planes, M, K] E4M3, s [planes, M, ceil(K / 32)] E8M0 to y [planes, M, KB * 128] and ys FP32 [planes, KB, 4, column];
    flags int32 [planes, RB, KB], one for 64 rows of a K block. count_ptr: += cuts, and at least 2^30 where a scale is out of
    what the product takes; beyond `limit` programs may leave out what they would write. A program takes 64 rows and `steps` K blocks.
    MASKED: rows from index[plane] on are left out.

    NARROW: scales of A have to lie in the window that products with picks take."""
    parts = (KB + steps - 1) // steps
    part = tl.program_id(0) % parts
    rb = tl.program_id(0) // parts % RB
    plane = tl.program_id(0) // parts // RB
    end = M
    if MASKED:
        end = tl.minimum(tl.load(index_ptr + plane), M)
    first = rb * ROWS
    # what one program finds too much of, the others need not bring: nothing of it is read. Every thread looks, at a time of its own, and
    # the largest is what all go by
    seen = tl.max(tl.load(count_ptr + tl.zeros([SEEN], tl.int32), volatile=True), 0)
    if (first < end) & (seen <= limit):
        p64 = plane.to(tl.int64)
        r = first + tl.arange(0, ROWS)
        live = r < end
        x_ptr += p64 * sxg
        s_ptr += p64 * ssg
        y_ptr += p64 * M * (KB * 128)
        sub = tl.arange(0, 4)
        count = 0
        far = tl.zeros([ROWS, 4], tl.int32)
        last = tl.minimum((part + 1) * steps, KB)
        ahead, ahead_there = codes_of(s_ptr, r, live, part * steps, K, ssm, ssk)
        for kb in tl.range(part * steps, last, num_stages=STAGES):
            k = kb * 128 + tl.arange(0, 128)
            x = tl.load(x_ptr + r.to(tl.int64)[:, None] * sxm + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
            code = ahead
            there = ahead_there
            ahead, ahead_there = codes_of(s_ptr, r, live, tl.minimum(kb + 1, last - 1), K, ssm, ssk)
            x = tl.reshape(x.to(tl.float16), [ROWS, 4, 32])
            holds = tl.max((x != 0.0).to(tl.int32), 2) > 0
            counts = holds & (code < 255)
            top = tl.max(tl.where(counts, code, 0), 1)[:, None]
            # E4M3 times 2^-d is exact in FP16 for d up to MOST
            down = tl.where(holds, tl.minimum(tl.maximum(top - code, 0), MOST), 0)
            want = x * ((127 - down) << 23).to(tl.float32, bitcast=True).to(tl.float16)[:, :, None]
            y = want.to(tl.float8e4nv)
            # stored before it is known to be right: behind the barrier that this takes, what is wrong is overwritten
            to_scale = ys_ptr + (p64 * KB + kb) * 4 * column
            tl.store(y_ptr + r.to(tl.int64)[:, None] * (KB * 128) + k[None, :], tl.reshape(y, [ROWS, 128]), mask=live[:, None])
            at = to_scale + sub.to(tl.int64)[None, :] * column + r[:, None]
            tl.store(at, e8m0(tl.broadcast_to(top, [ROWS, 4])), mask=live[:, None])
            lost = tl.max((y.to(tl.float16) != want).to(tl.int32), 2) > 0
            lost = lost | (holds & (top - code > MOST)) | (there & (code == 255))
            flag = tl.max(tl.max(lost.to(tl.int32), 1), 0)
            if flag > 0:
                flag = cut(x_ptr, s_ptr, y_ptr, to_scale, r, live, kb, KB, K, sxm, ssm, ssk, column)
            tl.store(flags_ptr + (plane * RB + rb) * KB + kb, flag)
            count += (flag & 1) + (flag >> 1 & 1) + (flag >> 2)
            far = far | (counts & ((code < (PICK_LOW if NARROW else LOW)) | (code > (PICK_HIGH if NARROW else HIGH)))).to(tl.int32)
        if count > 0:
            tl.atomic_add(count_ptr, count, sem="relaxed")
        if tl.max(tl.max(far, 1), 0) > 0:       # not added up: however many there are, it stays above every limit
            tl.atomic_max(count_ptr, 1 << 30, sem="relaxed")


@triton.jit
def groups_of(index_ptr, r, live, M, G, LAYOUT: tl.constexpr, GROUPS: tl.constexpr):
    """The group of each of rows r, -1 where there is none."""
    if LAYOUT == DENSE:
        return tl.where(live, 0, -1)
    elif LAYOUT == CONTIGUOUS:
        group = tl.load(index_ptr + r, mask=live, other=-1).to(tl.int32)
        return tl.where((group >= 0) & (group < G), group, -1)
    else:
        g = tl.arange(0, GROUPS)
        start = tl.load(index_ptr + g, mask=g < G, other=0)
        end = tl.load(index_ptr + g + 1, mask=g < G, other=0)
        own = (g < G)[None, :] & (start[None, :] <= r[:, None]) & (r[:, None] < end[None, :]) & live[:, None]
        return tl.max(tl.where(own, g[None, :], -1), 1)


@triton.jit
def shift_of(index_ptr, g, M, LAYOUT: tl.constexpr):
    """What is added to a row of group g to find its picks: see `column_of` in `fold_mixed_device.py`."""
    if LAYOUT == OFFSETS:
        start = tl.minimum(tl.maximum(tl.load(index_ptr + g), 0), M).to(tl.int32)
        return 4 * (start // 4 % 2 + 32 * g)
    else:
        return 0


@triton.jit(do_not_specialize=["M", "KB", "limit", "G", "picks"])
def pick_kernel(x_ptr, s_ptr, index_ptr, at_ptr, pick_ptr, p_ptr, count_ptr, M, KB, limit, sxm, ssm, ssk, G, picks, pitch,
                LAYOUT: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr):
    """Columns of A, as of `fold_mixed_kernel`, to p BF16 [columns of picks, pitch], where each row's group has them. pick int32 [G, picks]:
    128 * column + k, where k is one of the K block's; at int32 [G, KB + 1]: where a K block's entries start. CHUNK of them are brought at
    a time. A program takes 64 rows and a K block; lanes read one row's elements, which lie in a line, and write one column's."""
    if tl.load(count_ptr) > limit:
        return
    kb = tl.program_id(0) % KB
    first = tl.program_id(0) // KB * ROWS
    row = tl.arange(0, ROWS)
    r = first + row
    live = r < M
    x_ptr += first.to(tl.int64) * sxm + kb * 128
    s_ptr += first.to(tl.int64) * ssm + kb.to(tl.int64) * 4 * ssk
    group = groups_of(index_ptr, r, live, M, G, LAYOUT, GROUPS)
    least = tl.min(tl.where(group < 0, 1 << 30, group), 0)
    for g in range(least, tl.max(group, 0) + 1):
        to_ptr = p_ptr + first + shift_of(index_ptr, g, M, LAYOUT)
        start = tl.load(at_ptr + g * (KB + 1) + kb)
        end = tl.load(at_ptr + g * (KB + 1) + kb + 1)
        for c in range(start, end, CHUNK):
            j = c + tl.arange(0, CHUNK)
            entry = tl.load(pick_ptr + g * picks + j, mask=j < end, other=0)
            # a hint, for lanes to read along a row: alignment, which vectors would ask for, is that of a byte
            k = tl.max_contiguous(entry & 127, [2])
            mask = live[:, None] & (j < end)[None, :]
            x = tl.load(x_ptr + (row[:, None] * sxm + k[None, :]), mask=mask, other=0.0)
            code = tl.load(s_ptr + (row[:, None] * ssm + (k >> 5)[None, :] * ssk), mask=mask, other=0)
            v = (x.to(tl.float32) * e8m0(code.to(tl.int32))).to(tl.bfloat16)
            to = to_ptr + ((entry >> 7)[None, :] * pitch + row[:, None])
            if LAYOUT == CONTIGUOUS:
                tl.store(to, v, mask=(group == g)[:, None] & (j < end)[None, :])
            else:       # by vectors, which a mask of rows would break up: others of these rows are nobody's, in the group's columns
                tl.store(to, v, mask=(j < end)[None, :])


@triton.jit
def clear_kernel(count_ptr):
    tl.store(count_ptr, 0)
