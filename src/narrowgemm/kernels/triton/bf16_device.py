"""Device code of the portable 16-bit GEMM: dense, contiguous, psum, offsets, masked; BF16 or FP16 on both sides.

    out[m, n] (+)= sum over k of A[m, k] . B[g, n, k], in FP32

Programs take tiles in turn, and only tiles that have rows: of 128 experts and one token, eight. Strides may be any, so that weights
that are stored [E, K, N] go in as they are. 64-bit arithmetic is on scalars; offsets inside a tile are 32-bit unless WIDE.

    tile -> (strip order) -> slot, n block -> group, rows -> [load A, B | acc += dot] x KB -> store
"""

import triton
import triton.language as tl

from .tiles_device import (
    CONTIGUOUS, DENSE, MASKED, PSUM, find_slot, group_rows, k_block_pointers, live_slots, load_k_block, store_tile, swizzle, tile_rows)


@triton.jit
def bf16_tile_sum(a_ptr, b_ptr, m_off, n_off, K, stride_am, stride_ak, stride_bn, stride_bk, BM: tl.constexpr, BN: tl.constexpr,
                  BK: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr, WIDE: tl.constexpr):
    """FP32 [BM, BN], or [BN, BM] with weights on the MMA's M side. Row offsets are inside the tile's bases, in bounds."""
    offs_k = tl.arange(0, BK)
    if WIDE:
        m_off = m_off.to(tl.int64)
        n_off = n_off.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
    a_ptrs, b_ptrs = k_block_pointers(a_ptr, b_ptr, m_off, n_off, offs_k, stride_am, stride_ak, stride_bn, stride_bk, SWAP)
    acc = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
    for kb in range(0, tl.cdiv(K, BK)):
        a, b = load_k_block(a_ptrs, b_ptrs, offs_k, K - kb * BK, EVEN_K, SWAP)
        if SWAP:
            acc = tl.dot(b, a, acc)
        else:
            acc = tl.dot(a, b, acc)
        a_ptrs += BK * stride_ak
        b_ptrs += BK * stride_bk
    return acc


@triton.jit
def padded_tile(tile, slots, a_ptr, b_ptr, out_ptr, index_ptr, M, N, K, G, alignment, stride_am, stride_ak, stride_bg, stride_bn,
                stride_bk, stride_om, LAYOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, SWAP: tl.constexpr, ACCUMULATE: tl.constexpr,
                ZERO: tl.constexpr, WIDE: tl.constexpr):
    """A tile of a layout with padding rows, contiguous or psum: they are zeroed, where ZERO."""
    slot, nb = swizzle(tile, slots, tl.cdiv(N, BN), GROUP_M)
    m_arange = tl.arange(0, BM)
    n0 = nb * BN
    n_off = tl.arange(0, BN)
    col_live = n_off < N - n0
    n_load = n_off if EVEN_N else tl.minimum(n_off, N - 1 - n0)
    g, row0, extent, valid = tile_rows(slot, index_ptr, G, M, alignment, BM, LAYOUT)
    if extent > 0:
        m_load = tl.minimum(m_arange, tl.minimum(extent, (M - row0).to(tl.int32)) - 1)
        a = a_ptr + row0 * stride_am
        out = out_ptr + row0 * stride_om + n0
        b = b_ptr + n0.to(tl.int64) * stride_bn
        zeros = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
        if LAYOUT == CONTIGUOUS:
            ids = tl.load(index_ptr + row0 + m_arange, mask=m_arange < extent, other=-1)
            real = (ids >= 0) & (ids < G)
            padding = (m_arange < extent) & ~real
            if ZERO:
                if tl.sum(tl.where(padding, 1, 0)) > 0:
                    store_tile(out, zeros, m_arange, n_off, padding, col_live, stride_om, False, SWAP, WIDE)
            # one pass a group that the tile holds
            gid = tl.min(tl.where(real, ids, G))
            while gid < G:
                acc = bf16_tile_sum(a, b + gid.to(tl.int64) * stride_bg, m_load, n_load, K, stride_am, stride_ak, stride_bn, stride_bk,
                                    BM, BN, BK, EVEN_K, SWAP, WIDE)
                store_tile(out, acc, m_arange, n_off, ids == gid, col_live, stride_om, ACCUMULATE, SWAP, WIDE)
                gid = tl.min(tl.where(real & (ids > gid), ids, G))
        else:
            if valid > 0:
                acc = bf16_tile_sum(a, b + g.to(tl.int64) * stride_bg, m_load, n_load, K, stride_am, stride_ak, stride_bn, stride_bk,
                                    BM, BN, BK, EVEN_K, SWAP, WIDE)
                store_tile(out, acc, m_arange, n_off, m_arange < valid, col_live, stride_om, ACCUMULATE, SWAP, WIDE)
            if ZERO:
                if extent > valid and valid < BM:
                    store_tile(out, zeros, m_arange, n_off, (m_arange >= valid) & (m_arange < extent), col_live, stride_om, False,
                               SWAP, WIDE)


@triton.jit(do_not_specialize=["M", "G", "most", "alignment"])
def bf16_kernel(a_ptr, b_ptr, out_ptr, index_ptr, M, N, K, G, most, alignment, stride_ag, stride_am, stride_ak, stride_bg, stride_bn,
                stride_bk, stride_og, stride_om, LAYOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, SWAP: tl.constexpr, ACCUMULATE: tl.constexpr,
                ZERO: tl.constexpr, WIDE: tl.constexpr):
    """A grid of programs that take tiles in turn. `most`: tiles of M that contiguous and psum can have."""
    num_n = tl.cdiv(N, BN)
    if LAYOUT == CONTIGUOUS or LAYOUT == PSUM:
        for tile in range(tl.program_id(0), most * num_n, tl.num_programs(0)):
            padded_tile(tile, most, a_ptr, b_ptr, out_ptr, index_ptr, M, N, K, G, alignment, stride_am, stride_ak, stride_bg, stride_bn,
                        stride_bk, stride_om, LAYOUT, BM, BN, BK, GROUP_M, EVEN_K, EVEN_N, SWAP, ACCUMULATE, ZERO, WIDE)
    else:
        tight_tiles(a_ptr, b_ptr, out_ptr, index_ptr, M, N, K, G, stride_ag, stride_am, stride_ak, stride_bg, stride_bn, stride_bk,
                    stride_og, stride_om, LAYOUT, BM, BN, BK, GROUP_M, EVEN_K, EVEN_N, SWAP, ACCUMULATE, WIDE)


@triton.jit
def tight_tiles(a_ptr, b_ptr, out_ptr, index_ptr, M, N, K, G, stride_ag, stride_am, stride_ak, stride_bg, stride_bn, stride_bk,
                stride_og, stride_om, LAYOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
                EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, SWAP: tl.constexpr, ACCUMULATE: tl.constexpr, WIDE: tl.constexpr):
    """Dense, offsets, masked: only tiles that have rows."""
    num_n = tl.cdiv(N, BN)
    if LAYOUT == DENSE:
        slots = tl.cdiv(M, BM)
    else:
        slots = live_slots(index_ptr, G, M, BM, LAYOUT)
    m_arange = tl.arange(0, BM)
    n_off = tl.arange(0, BN)
    for tile in range(tl.program_id(0), slots * num_n, tl.num_programs(0)):
        slot, nb = swizzle(tile, slots, num_n, GROUP_M)
        n0 = nb * BN
        b = b_ptr + n0.to(tl.int64) * stride_bn
        if LAYOUT == DENSE:
            row0 = slot.to(tl.int64) * BM
            valid = (M - row0).to(tl.int32)
        else:
            g, inner = find_slot(slot, index_ptr, G, M, BM, LAYOUT)
            start, rows = group_rows(index_ptr, g, G, M, LAYOUT)
            row0 = start + inner
            valid = (rows - inner).to(tl.int32)
            b += g.to(tl.int64) * stride_bg
        a = a_ptr + row0 * stride_am
        out = out_ptr + row0 * stride_om + n0
        if LAYOUT == MASKED:
            a += g.to(tl.int64) * stride_ag
            out += g.to(tl.int64) * stride_og
        # clamped only where a column can be outside: a clamp costs the wide loads of an N-major B
        n_load = n_off if EVEN_N else tl.minimum(n_off, N - 1 - n0)
        acc = bf16_tile_sum(a, b, tl.minimum(m_arange, valid - 1), n_load, K, stride_am, stride_ak, stride_bn, stride_bk, BM, BN, BK,
                            EVEN_K, SWAP, WIDE)
        store_tile(out, acc, m_arange, n_off, m_arange < valid, n_off < N - n0, stride_om, ACCUMULATE, SWAP, WIDE)
