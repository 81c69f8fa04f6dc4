"""Device code of the portable FP8 GEMM: dense, contiguous, psum, offsets, masked.

    out[m, n] (+)= sum over K blocks of  (A[m, kb] . B[g, n, kb]) * sa[m, kb] * sb[g, n / GROUP_N, kb]

One tile is BM rows x BN columns of one group. Each K block of 128 is one tensor-core sum, promoted in FP32 registers:

    tile -> (strip order) -> slot, n block -> group, rows -> [load A, B | dot | acc += p * scale] x KB -> store

Row-wise and tensor-wise scales come in as strides of 0. 64-bit arithmetic is on scalars (tile and group bases); offsets
inside a tile are 32-bit unless WIDE.
"""

import triton
import triton.language as tl

from .tiles_device import (
    CONTIGUOUS, DENSE, MASKED, PSUM, k_block_pointers, live_slots, load_k_block, store_tile, swizzle, tile_rows)


@triton.jit
def e8m0(code):
    """uint8 E8M0 to float32; 0 is 2^-127, 255 is NaN."""
    bits = code.to(tl.int32) << 23
    bits = tl.where(code == 0, 0x00400000, bits)
    bits = tl.where(code == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_scale(ptrs, E8M0: tl.constexpr, mask=None):
    """Scales in FP32."""
    s = tl.load(ptrs, mask=mask)
    if E8M0:
        s = e8m0(s)
    return s


@triton.jit
def tile_sum(a_ptr, b_ptr, sa_ptr, sb_ptr, m_off, n_off, n_scale, kb0, kb1, K,
             stride_am, stride_ak, stride_bn, stride_bk, stride_sam, stride_sak, stride_sbn, stride_sbk,
             BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_N: tl.constexpr, EVEN_K: tl.constexpr,
             SWAP: tl.constexpr, SA_E8M0: tl.constexpr, SB_E8M0: tl.constexpr, WIDE: tl.constexpr):
    """FP32 sum over K blocks [kb0, kb1). `m_off`, `n_off`: row offsets inside the tile's bases; never out of bounds."""
    offs_k = tl.arange(0, BK)
    if WIDE:
        m_off = m_off.to(tl.int64)
        n_off = n_off.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
    a_ptr += kb0.to(tl.int64) * BK * stride_ak
    b_ptr += kb0.to(tl.int64) * BK * stride_bk
    a_ptrs, b_ptrs = k_block_pointers(a_ptr, b_ptr, m_off, n_off, offs_k, stride_am, stride_ak, stride_bn, stride_bk, SWAP)
    acc = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
    sa_ptrs = sa_ptr + m_off * stride_sam + kb0 * stride_sak
    if GROUP_N == 1:
        sb_ptrs = sb_ptr + n_off * stride_sbn + kb0 * stride_sbk
    else:
        sb_ptrs = sb_ptr + n_scale * stride_sbn + kb0 * stride_sbk
    for kb in range(kb0, kb1):
        a, b = load_k_block(a_ptrs, b_ptrs, offs_k, K - kb * BK, EVEN_K, SWAP)
        sa = load_scale(sa_ptrs, SA_E8M0)
        sb = load_scale(sb_ptrs, SB_E8M0)
        if SWAP:
            p = tl.dot(b, a)
            if GROUP_N == 1:
                acc += p * sa[None, :] * sb[:, None]
            else:
                acc += p * (sa * sb)[None, :]
        else:
            p = tl.dot(a, b)
            if GROUP_N == 1:
                acc += p * sa[:, None] * sb[None, :]
            else:
                acc += p * (sa * sb)[:, None]
        a_ptrs += BK * stride_ak
        b_ptrs += BK * stride_bk
        sa_ptrs += stride_sak
        sb_ptrs += stride_sbk
    return acc


@triton.jit
def fp8_block_tile(tile, slots, split, a_ptr, b_ptr, out_ptr, sa_ptr, sb_ptr, index_ptr, M, N, K, G, alignment,
                   stride_ag, stride_am, stride_ak, stride_bg, stride_bn, stride_bk, stride_og, stride_om,
                   stride_sag, stride_sam, stride_sak, stride_sbg, stride_sbn, stride_sbk,
                   LAYOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_N: tl.constexpr,
                   GROUP_M: tl.constexpr, SPLIT_K: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, SWAP: tl.constexpr,
                   ACCUMULATE: tl.constexpr, ZERO: tl.constexpr, SA_E8M0: tl.constexpr, SB_E8M0: tl.constexpr,
                   WIDE: tl.constexpr):
    """One tile, all layouts."""
    num_n = tl.cdiv(N, BN)
    slot, nb = swizzle(tile, slots, num_n, GROUP_M)
    m_arange = tl.arange(0, BM)
    n0 = nb * BN
    n_off = tl.arange(0, BN)
    col_live = n_off < N - n0
    # clamped only where a column can be outside: a clamp costs the wide loads of an N-major B
    n_load = n_off if EVEN_N else tl.minimum(n_off, N - 1 - n0)
    KB = tl.cdiv(K, BK)
    kb0 = tl.cdiv(KB, SPLIT_K) * split
    kb1 = tl.minimum(kb0 + tl.cdiv(KB, SPLIT_K), KB)

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
        if GROUP_N == 1:
            sb_ptr += n0.to(tl.int64) * stride_sbn
        n_scale = n0 // GROUP_N
        if SPLIT_K > 1:
            out_ptr += split.to(tl.int64) * M * N

        if LAYOUT == CONTIGUOUS:
            ids = tl.load(index_ptr + row0 + m_arange, mask=m_arange < extent, other=-1)
            real = (ids >= 0) & (ids < G)
            if ZERO:
                # rows of padding, unless there are none
                if tl.sum(tl.where(real | (m_arange >= extent), 0, 1)) > 0:
                    zeros = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
                    store_tile(out_ptr, zeros, m_arange, n_off, (m_arange < extent) & (ids == ids) & ~real, col_live,
                               stride_om, False, SWAP, WIDE)
            # one pass a group that the tile holds: one for segments aligned to BM, whatever else for any others
            gid = tl.min(tl.where(real, ids, G))
            while gid < G:
                acc = tile_sum(a_ptr, b_ptr + gid.to(tl.int64) * stride_bg, sa_ptr, sb_ptr + gid.to(tl.int64) * stride_sbg,
                               m_load, n_load, n_scale, kb0, kb1, K, stride_am, stride_ak, stride_bn, stride_bk,
                               stride_sam, stride_sak, stride_sbn, stride_sbk, BM, BN, BK, GROUP_N, EVEN_K, SWAP,
                               SA_E8M0, SB_E8M0, WIDE)
                store_tile(out_ptr, acc, m_arange, n_off, ids == gid, col_live, stride_om, ACCUMULATE, SWAP, WIDE)
                gid = tl.min(tl.where(real & (ids > gid), ids, G))
        else:
            if valid > 0:
                if LAYOUT != DENSE:
                    b_ptr += g.to(tl.int64) * stride_bg
                    sb_ptr += g.to(tl.int64) * stride_sbg
                acc = tile_sum(a_ptr, b_ptr, sa_ptr, sb_ptr, m_load, n_load, n_scale, kb0, kb1, K, stride_am, stride_ak,
                               stride_bn, stride_bk, stride_sam, stride_sak, stride_sbn, stride_sbk, BM, BN, BK, GROUP_N,
                               EVEN_K, SWAP, SA_E8M0, SB_E8M0, WIDE)
                store_tile(out_ptr, acc, m_arange, n_off, m_arange < valid, col_live, stride_om, ACCUMULATE, SWAP, WIDE)
            if LAYOUT == PSUM and ZERO:
                if extent > valid and valid < BM:
                    zeros = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
                    store_tile(out_ptr, zeros, m_arange, n_off, (m_arange >= valid) & (m_arange < extent), col_live,
                               stride_om, False, SWAP, WIDE)


@triton.jit(do_not_specialize=["M", "G", "slots", "alignment"])
def fp8_block_kernel(a_ptr, b_ptr, out_ptr, sa_ptr, sb_ptr, index_ptr, M, N, K, G, slots, alignment,
                     stride_ag, stride_am, stride_ak, stride_bg, stride_bn, stride_bk, stride_og, stride_om,
                     stride_sag, stride_sam, stride_sak, stride_sbg, stride_sbn, stride_sbk,
                     LAYOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_N: tl.constexpr,
                     GROUP_M: tl.constexpr, SPLIT_K: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, SWAP: tl.constexpr,
                     PERSISTENT: tl.constexpr, ACCUMULATE: tl.constexpr, ZERO: tl.constexpr, SA_E8M0: tl.constexpr,
                     SB_E8M0: tl.constexpr, WIDE: tl.constexpr):
    """Grid (tiles or programs, SPLIT_K). `slots`: tiles of M where the host knows them (not masked)."""
    pid = tl.program_id(0)
    split = tl.program_id(1)
    if LAYOUT == MASKED:
        slots = live_slots(index_ptr, G, M, BM, LAYOUT)
    if PERSISTENT:
        for tile in range(pid, slots * tl.cdiv(N, BN), tl.num_programs(0)):
            fp8_block_tile(tile, slots, split, a_ptr, b_ptr, out_ptr, sa_ptr, sb_ptr, index_ptr, M, N, K, G, alignment,
                           stride_ag, stride_am, stride_ak, stride_bg, stride_bn, stride_bk, stride_og, stride_om,
                           stride_sag, stride_sam, stride_sak, stride_sbg, stride_sbn, stride_sbk, LAYOUT, BM, BN, BK,
                           GROUP_N, GROUP_M, SPLIT_K, EVEN_K, EVEN_N, SWAP, ACCUMULATE, ZERO, SA_E8M0, SB_E8M0, WIDE)
    else:
        fp8_block_tile(pid, slots, split, a_ptr, b_ptr, out_ptr, sa_ptr, sb_ptr, index_ptr, M, N, K, G, alignment,
                       stride_ag, stride_am, stride_ak, stride_bg, stride_bn, stride_bk, stride_og, stride_om,
                       stride_sag, stride_sam, stride_sak, stride_sbg, stride_sbn, stride_sbk, LAYOUT, BM, BN, BK,
                       GROUP_N, GROUP_M, SPLIT_K, EVEN_K, EVEN_N, SWAP, ACCUMULATE, ZERO, SA_E8M0, SB_E8M0, WIDE)


@triton.jit(do_not_specialize=["M"])
def reduce_splits_kernel(part_ptr, out_ptr, M, N, stride_om, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr,
                         ACCUMULATE: tl.constexpr):
    """out[m, n] (+)= part[0, m, n] + part[1, m, n] + ...: always in that order."""
    row = tl.program_id(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = col < N
    part_ptr += row.to(tl.int64) * N
    out_ptr += row.to(tl.int64) * stride_om
    acc = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(SPLIT_K):
        acc += tl.load(part_ptr + tl.cast(s, tl.int64) * M * N + col, mask=live, other=0.0)
    if ACCUMULATE:
        acc += tl.load(out_ptr + col, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + col, acc.to(out_ptr.dtype.element_ty), mask=live)
