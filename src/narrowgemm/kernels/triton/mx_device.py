"""Device code of the portable GEMM with MX weights: dense, contiguous, psum, offsets, masked.

    out[m, n] (+)= sum over K blocks of dot_scaled(A[m, kb], W[g, n, kb])        scales E8M0, one for 32 of K; FP16: as two BF16 numbers
    FP8:           sum over K blocks of scale[m, kb] * dot_scaled(A[m, kb], W[g, n, kb])      one scale for 128 of K, or the same for all

`tl.dot_scaled` is the scaled matrix instruction where there is one (CDNA4, Blackwell), and a conversion in front of a BF16
product elsewhere. Tiles and their groups: `tiles_device`.
"""

import triton
import triton.language as tl

from .fp8_block_device import e8m0
from .tiles_device import CONTIGUOUS, DENSE, MASKED, PSUM, live_slots, store_tile, swizzle, tile_rows

LOW, HIGH = tl.constexpr(3), tl.constexpr(240)      # codes with which every E4M3 number is one of BF16


@triton.jit
def load_tail(ptrs, offsets, left, AXIS: tl.constexpr):
    """A tile whose `AXIS` has `left` places: what is beyond repeats the last one. Loads have no masks: see `mx.supports`."""
    at = tl.minimum(offsets, left - 1) - offsets
    if AXIS == 1:
        return tl.load(ptrs + at[None, :])
    else:
        return tl.load(ptrs + at[:, None])


@triton.jit
def zero_tail(x, offsets, left):
    """Columns of A beyond the end of K as zeros."""
    return tl.where((offsets < left)[None, :], x, tl.zeros([1, 1], x.dtype))


@triton.jit
def chunk_scale(s):
    """FP32 scales, or E8M0 codes as such: 2^(code - 127), 0 the subnormal 2^-127, 255 NaN."""
    if s.dtype == tl.float32:
        return s
    else:
        return e8m0(s)


@triton.jit
def mx_add(acc, a, sa, zero, b, sb, A_KIND: tl.constexpr, B_KIND: tl.constexpr, CHUNKED: tl.constexpr):
    """acc plus the product of one K block."""
    if A_KIND == "bf16":
        return tl.dot_scaled(a, None, "bf16", b, sb, B_KIND, acc)
    elif A_KIND == "fp16":      # two BF16 numbers hold all bits of each
        high = a.to(tl.bfloat16)
        whole = high.to(tl.float32)     # of infinity nothing is left, not NaN
        low = tl.where(tl.abs(whole) == float("inf"), 0.0, a.to(tl.float32) - whole).to(tl.bfloat16)
        return tl.dot_scaled(low, None, "bf16", b, sb, B_KIND, tl.dot_scaled(high, None, "bf16", b, sb, B_KIND, acc))
    elif CHUNKED:
        one = tl.full([a.shape[0], sb.shape[1]], 127, tl.uint8)
        part = tl.dot_scaled(a, one, A_KIND, b, sb, B_KIND, zero)
        return acc + part * chunk_scale(sa)[:, None]
    else:
        return tl.dot_scaled(a, sa, A_KIND, b, sb, B_KIND, acc)


@triton.jit
def shifts(s_ptrs, K, stride_k, R: tl.constexpr):
    """int32 [R]: what codes of rows are lowered by so that a BF16 number can be each with its E4M3 payload: the least that does.
    s_ptrs: of their first codes."""
    top = tl.zeros([R], tl.int32)
    bottom = tl.full([R], 255, tl.int32)
    count = (K + 31) // 32
    for i in range(0, count, 32):
        o = tl.minimum(i + tl.arange(0, 32), count - 1)
        code = tl.load(s_ptrs[:, None] + o[None, :] * stride_k).to(tl.int32)
        top = tl.maximum(top, tl.max(tl.where(code == 255, 0, code), 1))
        bottom = tl.minimum(bottom, tl.min(code, 1))
    return tl.where(top > HIGH, top - HIGH, tl.where(bottom < LOW, tl.maximum(bottom - LOW, top - HIGH), 0))


@triton.jit
def lowered(code, shift):
    """Codes less `shift`, a row; 255 stays."""
    c = code.to(tl.int32)
    return tl.where(c == 255, 255, tl.minimum(tl.maximum(c - shift[:, None], 0), 254)).to(tl.uint8)


@triton.jit
def far_tile_sum(a_ptr, b_ptr, sa_ptr, sb_ptr, m_off, n_off, shift_a, shift_b, K, stride_am, stride_bn, stride_sam, stride_sak,
                 stride_sbn, stride_sbk, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr):
    """`mx_tile_sum` of E4M3 on both sides, for scales that a conversion to BF16 would lose: with their rows' shifts, which go to the
    sum. It is not made to be fast."""
    if WIDE:
        m_off = m_off.to(tl.int64)
        n_off = n_off.to(tl.int64)
    ks = tl.arange(0, BK // 32)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, K, BK, num_stages=1):
        at = k + tl.arange(0, BK)
        inside = at < K
        block = tl.minimum(k // 32 + ks, (K + 31) // 32 - 1)
        a = tl.load(a_ptr + (m_off[:, None] * stride_am + at[None, :]), mask=inside[None, :], other=0.0)
        b = tl.load(b_ptr + (at[:, None] + n_off[None, :] * stride_bn), mask=inside[:, None], other=0.0)
        sa = lowered(tl.load(sa_ptr + (m_off[:, None] * stride_sam + block[None, :] * stride_sak)), shift_a)
        sb = lowered(tl.load(sb_ptr + (n_off[:, None] * stride_sbn + block[None, :] * stride_sbk)), shift_b)
        acc = tl.dot_scaled(a, sa, "e4m3", b, sb, "e4m3", acc)
    return acc * power_of_two(shift_a)[:, None] * power_of_two(shift_b)[None, :]


@triton.jit
def power_of_two(e):
    """FP32 2^e for e in [-149, 127]."""
    bits = tl.where(e >= -126, (e + 127) << 23, 1 << tl.minimum(tl.maximum(e + 149, 0), 22))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def any_tile_sum(a_ptr, b_ptr, sa_ptr, sb_ptr, m_off, n_off, K, stride_am, stride_bn, stride_sam, stride_sak, stride_sbn, stride_sbk,
                 A_KIND: tl.constexpr, B_KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 EVEN_K: tl.constexpr, CHUNKED: tl.constexpr, WIDE: tl.constexpr, FAR: tl.constexpr):
    """FP32 [BM, BN]. FAR: looks first at whether its scales are too far from one for a conversion to BF16."""
    if FAR:
        shift_a = shifts(sa_ptr + m_off * stride_sam, K, stride_sak, BM)
        shift_b = shifts(sb_ptr + n_off * stride_sbn, K, stride_sbk, BN)
        if tl.max(tl.abs(shift_a), 0) + tl.max(tl.abs(shift_b), 0) > 0:
            acc = far_tile_sum(a_ptr, b_ptr, sa_ptr, sb_ptr, m_off, n_off, shift_a, shift_b, K, stride_am, stride_bn, stride_sam,
                               stride_sak, stride_sbn, stride_sbk, BM, BN, BK, WIDE)
        else:
            acc = mx_tile_sum(a_ptr, b_ptr, sa_ptr, sb_ptr, m_off, n_off, K, stride_am, stride_bn, stride_sam, stride_sak, stride_sbn,
                              stride_sbk, A_KIND, B_KIND, BM, BN, BK, EVEN_K, CHUNKED, WIDE)
        return acc
    else:
        return mx_tile_sum(a_ptr, b_ptr, sa_ptr, sb_ptr, m_off, n_off, K, stride_am, stride_bn, stride_sam, stride_sak, stride_sbn,
                           stride_sbk, A_KIND, B_KIND, BM, BN, BK, EVEN_K, CHUNKED, WIDE)


@triton.jit
def mx_tile_sum(a_ptr, b_ptr, sa_ptr, sb_ptr, m_off, n_off, K, stride_am, stride_bn, stride_sam, stride_sak, stride_sbn, stride_sbk,
                A_KIND: tl.constexpr, B_KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                EVEN_K: tl.constexpr, CHUNKED: tl.constexpr, WIDE: tl.constexpr, shift_a=None, shift_b=None):
    """FP32 [BM, BN]. Row offsets are inside the tile's bases and never out of bounds; K is contiguous on both sides. `shift_a`,
    `shift_b`: of `shifts`, for scales that a conversion to BF16 may lose."""
    A4: tl.constexpr = A_KIND == "e2m1"
    B4: tl.constexpr = B_KIND == "e2m1"
    SCALED: tl.constexpr = A_KIND != "bf16" and A_KIND != "fp16"
    AK: tl.constexpr = BK // 2 if A4 else BK
    BKB: tl.constexpr = BK // 2 if B4 else BK
    SF: tl.constexpr = BK // 32
    if WIDE:
        m_off = m_off.to(tl.int64)
        n_off = n_off.to(tl.int64)
    ka = tl.arange(0, AK)
    kw = tl.arange(0, BKB)
    ks = tl.arange(0, SF)
    a_ptrs = a_ptr + (m_off[:, None] * stride_am + ka[None, :])
    b_ptrs = b_ptr + (kw[:, None] + n_off[None, :] * stride_bn)
    if CHUNKED:     # one scale a K block
        sa_ptrs = sa_ptr + m_off * stride_sam
    else:
        sa_ptrs = sa_ptr + (m_off[:, None] * stride_sam + ks[None, :] * stride_sak)
    sb_ptrs = sb_ptr + (n_off[:, None] * stride_sbn + ks[None, :] * stride_sbk)
    zero = None
    if CHUNKED:     # made of offsets: Triton 3.6 fails on a constant sum of a scaled product in a loop, on Blackwell
        zero = (tl.minimum(m_off, 0)[:, None] + tl.zeros([1, BN], tl.int32)).to(tl.float32)
    acc = tl.zeros([BM, BN], tl.float32)
    for kb in range(0, K // BK):
        sa = tl.load(sa_ptrs) if SCALED else None
        sb = tl.load(sb_ptrs)
        if shift_a is not None:
            sa = lowered(sa, shift_a)
            sb = lowered(sb, shift_b)
        acc = mx_add(acc, tl.load(a_ptrs), sa, zero, tl.load(b_ptrs), sb, A_KIND, B_KIND, CHUNKED)
        a_ptrs += AK
        b_ptrs += BKB
        sa_ptrs += stride_sak if CHUNKED else SF * stride_sak
        sb_ptrs += SF * stride_sbk
    if not EVEN_K:
        left = K % BK
        a_left = (left + 1) // 2 if A4 else left
        a = zero_tail(load_tail(a_ptrs, ka, a_left, 1), ka, a_left)
        b = load_tail(b_ptrs, kw, (left + 1) // 2 if B4 else left, 0)
        last = tl.minimum(ks, (left + 31) // 32 - 1) - ks
        sb = tl.load(sb_ptrs + (last * stride_sbk)[None, :])
        sa = None
        if CHUNKED:
            sa = tl.load(sa_ptrs)
        elif SCALED:
            sa = tl.load(sa_ptrs + (last * stride_sak)[None, :])
        if shift_a is not None:
            sa = lowered(sa, shift_a)
            sb = lowered(sb, shift_b)
        acc = mx_add(acc, a, sa, zero, b, sb, A_KIND, B_KIND, CHUNKED)
    if shift_a is not None:
        acc = acc * power_of_two(shift_a)[:, None] * power_of_two(shift_b)[None, :]
    return acc


@triton.jit
def shifted_tile_sum(a_ptr, b_ptr, sa_ptr, sb_ptr, m_off, n_off, K, stride_am, stride_bn, stride_sam, stride_sak, stride_sbn,
                     stride_sbk, A_KIND: tl.constexpr, B_KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                     EVEN_K: tl.constexpr, CHUNKED: tl.constexpr, WIDE: tl.constexpr, FAR: tl.constexpr):
    """`any_tile_sum` by one loop for all scales, which takes fewer registers."""
    shift_a = None
    shift_b = None
    if FAR:
        shift_a = shifts(sa_ptr + m_off * stride_sam, K, stride_sak, BM)
        shift_b = shifts(sb_ptr + n_off * stride_sbn, K, stride_sbk, BN)
    return mx_tile_sum(a_ptr, b_ptr, sa_ptr, sb_ptr, m_off, n_off, K, stride_am, stride_bn, stride_sam, stride_sak, stride_sbn,
                       stride_sbk, A_KIND, B_KIND, BM, BN, BK, EVEN_K, CHUNKED, WIDE, shift_a, shift_b)


@triton.jit
def mx_tile(tile, slots, a_ptr, b_ptr, out_ptr, sa_ptr, sb_ptr, index_ptr, M, N, K, G, alignment, stride_ag, stride_am, stride_bg,
            stride_bn, stride_og, stride_om, stride_sag, stride_sam, stride_sak, stride_sbg, stride_sbn, stride_sbk,
            LAYOUT: tl.constexpr, A_KIND: tl.constexpr, B_KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
            GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, CHUNKED: tl.constexpr,
            ACCUMULATE: tl.constexpr, ZERO: tl.constexpr, WIDE: tl.constexpr, FAR: tl.constexpr):
    """One tile, all layouts."""
    slot, nb = swizzle(tile, slots, tl.cdiv(N, BN), GROUP_M)
    m_arange = tl.arange(0, BM)
    n0 = nb * BN
    n_off = tl.arange(0, BN)
    col_live = n_off < N - n0
    n_load = n_off if EVEN_N else tl.minimum(n_off, N - 1 - n0)
    g, row0, extent, valid = tile_rows(slot, index_ptr, G, M, alignment, BM, LAYOUT)
    if LAYOUT == MASKED:
        a_ptr += g.to(tl.int64) * stride_ag
        sa_ptr += g.to(tl.int64) * stride_sag
        out_ptr += g.to(tl.int64) * stride_og
    if extent > 0:
        m_load = tl.minimum(m_arange, tl.minimum(extent, (M - row0).to(tl.int32)) - 1)
        a_ptr += row0 * stride_am
        sa_ptr += row0 * stride_sam
        out_ptr += row0 * stride_om + n0
        b_ptr += n0.to(tl.int64) * stride_bn
        sb_ptr += n0.to(tl.int64) * stride_sbn
        if LAYOUT == CONTIGUOUS:
            ids = tl.load(index_ptr + row0 + m_arange, mask=m_arange < extent, other=-1)
            real = (ids >= 0) & (ids < G)
            if ZERO:
                zeros = tl.zeros([BM, BN], tl.float32)
                store_tile(out_ptr, zeros, m_arange, n_off, (m_arange < extent) & ~real, col_live, stride_om, False, False, WIDE)
            gid = tl.min(tl.where(real, ids, G))
            while gid < G:
                acc = any_tile_sum(a_ptr, b_ptr + gid.to(tl.int64) * stride_bg, sa_ptr, sb_ptr + gid.to(tl.int64) * stride_sbg, m_load,
                                   n_load, K, stride_am, stride_bn, stride_sam, stride_sak, stride_sbn, stride_sbk, A_KIND, B_KIND,
                                   BM, BN, BK, EVEN_K, CHUNKED, WIDE, FAR)
                store_tile(out_ptr, acc, m_arange, n_off, ids == gid, col_live, stride_om, ACCUMULATE, False, WIDE)
                gid = tl.min(tl.where(real & (ids > gid), ids, G))
        else:
            if valid > 0:
                if LAYOUT != DENSE:
                    b_ptr += g.to(tl.int64) * stride_bg
                    sb_ptr += g.to(tl.int64) * stride_sbg
                acc = any_tile_sum(a_ptr, b_ptr, sa_ptr, sb_ptr, m_load, n_load, K, stride_am, stride_bn, stride_sam, stride_sak,
                                   stride_sbn, stride_sbk, A_KIND, B_KIND, BM, BN, BK, EVEN_K, CHUNKED, WIDE, FAR)
                store_tile(out_ptr, acc, m_arange, n_off, m_arange < valid, col_live, stride_om, ACCUMULATE, False, WIDE)
            if LAYOUT == PSUM and ZERO:
                if extent > valid and valid < BM:
                    zeros = tl.zeros([BM, BN], tl.float32)
                    store_tile(out_ptr, zeros, m_arange, n_off, (m_arange >= valid) & (m_arange < extent), col_live, stride_om, False,
                               False, WIDE)


@triton.jit(do_not_specialize=["M", "G", "slots", "alignment"])
def mx_kernel(a_ptr, b_ptr, out_ptr, sa_ptr, sb_ptr, index_ptr, M, N, K, G, slots, alignment, stride_ag, stride_am, stride_bg,
              stride_bn, stride_og, stride_om, stride_sag, stride_sam, stride_sak, stride_sbg, stride_sbn, stride_sbk,
              LAYOUT: tl.constexpr, A_KIND: tl.constexpr, B_KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
              GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, CHUNKED: tl.constexpr,
              ACCUMULATE: tl.constexpr, ZERO: tl.constexpr, WIDE: tl.constexpr, FAR: tl.constexpr):
    """A grid of programs that take tiles in turn. `slots`: tiles of M where the host knows them (not masked)."""
    if LAYOUT == MASKED:
        slots = live_slots(index_ptr, G, M, BM, LAYOUT)
    for tile in range(tl.program_id(0), slots * tl.cdiv(N, BN), tl.num_programs(0)):
        mx_tile(tile, slots, a_ptr, b_ptr, out_ptr, sa_ptr, sb_ptr, index_ptr, M, N, K, G, alignment, stride_ag, stride_am, stride_bg,
                stride_bn, stride_og, stride_om, stride_sag, stride_sam, stride_sak, stride_sbg, stride_sbn, stride_sbk, LAYOUT,
                A_KIND, B_KIND, BM, BN, BK, GROUP_M, EVEN_K, EVEN_N, CHUNKED, ACCUMULATE, ZERO, WIDE, FAR)
