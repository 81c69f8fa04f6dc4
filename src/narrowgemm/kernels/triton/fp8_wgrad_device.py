"""Device code of the portable k-grouped FP8 GEMM: out[g] (+)= A[:, ks] . B[:, ks]^T over group g's columns ks.

Scales are taken by absolute K block, so a block that two groups share is read by both, masked to each one's columns.
"""

import triton
import triton.language as tl

from .fp8_block_device import load_scale
from .tiles_device import store_tile, swizzle


@triton.jit
def group_bound(index_ptr, g, K):
    return tl.minimum(tl.maximum(tl.load(index_ptr + g).to(tl.int64), 0), K)


@triton.jit
def k_range_sum(acc, kb0, kb1, start, end, a_ptrs, b_ptrs, sa_ptrs, sb_ptrs, stride_ak, stride_bk, stride_sak, stride_sbk,
                row_live, col_live, BK: tl.constexpr, MASKED: tl.constexpr, EVEN: tl.constexpr, SA_E8M0: tl.constexpr, SB_E8M0: tl.constexpr):
    """acc plus K blocks [kb0, kb1). Only the blocks at a group's ends are masked: masks cost the wide loads."""
    skip = kb0.to(tl.int64)
    a_ptrs += skip * BK * stride_ak
    b_ptrs += skip * BK * stride_bk
    sa_ptrs += skip * stride_sak
    sb_ptrs += skip * stride_sbk
    for kb in range(kb0, kb1):
        k = kb * BK + tl.arange(0, BK)
        inside = (k >= start) & (k < end)
        if MASKED:
            a = tl.load(a_ptrs, mask=row_live[:, None] & inside[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=inside[:, None] & col_live[None, :], other=0.0)
        elif EVEN:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=row_live[:, None], other=0.0)
            b = tl.load(b_ptrs, mask=col_live[None, :], other=0.0)
        sa = load_scale(sa_ptrs, SA_E8M0, row_live)
        sb = load_scale(sb_ptrs, SB_E8M0, col_live)
        acc += tl.dot(a, b) * sa[:, None] * sb[None, :]
        a_ptrs += BK * stride_ak
        b_ptrs += BK * stride_bk
        sa_ptrs += stride_sak
        sb_ptrs += stride_sbk
    return acc


@triton.jit
def wgrad_tile(tile, a_ptr, b_ptr, out_ptr, sa_ptr, sb_ptr, index_ptr, M, N, K, stride_am, stride_ak, stride_bn, stride_bk,
               stride_og, stride_om, stride_sag, stride_sam, stride_sak, stride_sbg, stride_sbn, stride_sbk,
               BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, ACCUMULATE: tl.constexpr, EVEN: tl.constexpr,
               SA_E8M0: tl.constexpr, SB_E8M0: tl.constexpr, WIDE: tl.constexpr):
    """One tile of one group's output."""
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(N, BN)
    g = tile // (num_m * num_n)
    mb, nb = swizzle(tile % (num_m * num_n), num_m, num_n, GROUP_M)
    m0 = mb * BM
    n0 = nb * BN
    m_off = tl.arange(0, BM)
    n_off = tl.arange(0, BN)
    # masks, not clamped offsets: these keep the loads along M and N contiguous
    row_live = m_off < M - m0
    col_live = n_off < N - n0
    offs_k = tl.arange(0, BK)
    if WIDE:
        m_off = m_off.to(tl.int64)
        n_off = n_off.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
    a_ptr += m0.to(tl.int64) * stride_am
    b_ptr += n0.to(tl.int64) * stride_bn
    a_ptrs = a_ptr + (m_off[:, None] * stride_am + offs_k[None, :] * stride_ak)
    b_ptrs = b_ptr + (offs_k[:, None] * stride_bk + n_off[None, :] * stride_bn)
    sa_ptrs = sa_ptr + g.to(tl.int64) * stride_sag + (m0 + m_off) * stride_sam
    sb_ptrs = sb_ptr + g.to(tl.int64) * stride_sbg + (n0 + n_off) * stride_sbn
    # [head | whole blocks | tail]; a group inside one block is all head
    start = group_bound(index_ptr, g, K)
    end = tl.maximum(group_bound(index_ptr, g + 1, K), start)
    first = start // BK
    whole0 = (start + BK - 1) // BK
    whole1 = tl.maximum(end // BK, whole0)
    last = tl.where(end > start, (end + BK - 1) // BK, first)
    acc = tl.zeros([BM, BN], tl.float32)
    acc = k_range_sum(acc, first.to(tl.int32), tl.minimum(whole0, last).to(tl.int32), start, end, a_ptrs, b_ptrs, sa_ptrs,
                      sb_ptrs, stride_ak, stride_bk, stride_sak, stride_sbk, row_live, col_live, BK, True, EVEN, SA_E8M0, SB_E8M0)
    acc = k_range_sum(acc, whole0.to(tl.int32), whole1.to(tl.int32), start, end, a_ptrs, b_ptrs, sa_ptrs, sb_ptrs,
                      stride_ak, stride_bk, stride_sak, stride_sbk, row_live, col_live, BK, False, EVEN, SA_E8M0, SB_E8M0)
    acc = k_range_sum(acc, whole1.to(tl.int32), last.to(tl.int32), start, end, a_ptrs, b_ptrs, sa_ptrs, sb_ptrs,
                      stride_ak, stride_bk, stride_sak, stride_sbk, row_live, col_live, BK, True, EVEN, SA_E8M0, SB_E8M0)
    out_ptr += g.to(tl.int64) * stride_og + m0.to(tl.int64) * stride_om + n0
    store_tile(out_ptr, acc, m_off, n_off, row_live, col_live, stride_om, ACCUMULATE, False, WIDE)


@triton.jit
def fp8_wgrad_kernel(a_ptr, b_ptr, out_ptr, sa_ptr, sb_ptr, index_ptr, M, N, K, tiles, stride_am, stride_ak, stride_bn,
                     stride_bk, stride_og, stride_om, stride_sag, stride_sam, stride_sak, stride_sbg, stride_sbn, stride_sbk,
                     BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
                     ACCUMULATE: tl.constexpr, EVEN: tl.constexpr, SA_E8M0: tl.constexpr, SB_E8M0: tl.constexpr, WIDE: tl.constexpr):
    """Grid (programs,): tiles are dealt out round robin."""
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        wgrad_tile(tile, a_ptr, b_ptr, out_ptr, sa_ptr, sb_ptr, index_ptr, M, N, K, stride_am, stride_ak, stride_bn,
                   stride_bk, stride_og, stride_om, stride_sag, stride_sam, stride_sak, stride_sbg, stride_sbn, stride_sbk, BM, BN, BK, GROUP_M,
                   ACCUMULATE, EVEN, SA_E8M0, SB_E8M0, WIDE)
