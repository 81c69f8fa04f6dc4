"""Device code of the portable 16-bit GEMM: dense, offsets, masked; BF16 or FP16 on both sides.

    out[m, n] (+)= sum over k of A[m, k] . B[g, n, k], in FP32

Programs take tiles in turn, and only tiles that have rows: of 128 experts and one token, eight. Strides may be any, so that weights
that are stored [E, K, N] go in as they are. 64-bit arithmetic is on scalars; offsets inside a tile are 32-bit unless WIDE.

    tile -> (strip order) -> slot, n block -> group, rows -> [load A, B | acc += dot] x KB -> store
"""

import triton
import triton.language as tl

from .fp8_block_device import CHUNK, DENSE, MASKED, OFFSETS, segment_start, store_tile, swizzle


@triton.jit
def group_rows(index_ptr, g, G, M, LAYOUT: tl.constexpr):
    """(first row, rows) of group(s) g, inside [0, M] whatever the index holds; no rows from g = G on."""
    if LAYOUT == MASKED:
        rows = tl.load(index_ptr + g, mask=g < G, other=0).to(tl.int64)
        start = tl.zeros_like(rows)
        rows = tl.minimum(rows, M)
    else:
        start = segment_start(index_ptr, g, G, M, 1, OFFSETS)
        rows = segment_start(index_ptr, g + 1, G, M, 1, OFFSETS) - start
    return start, tl.maximum(rows, 0)


@triton.jit
def tiles_of(index_ptr, g, G, M, BM: tl.constexpr, LAYOUT: tl.constexpr):
    start, rows = group_rows(index_ptr, g, G, M, LAYOUT)
    return ((rows + BM - 1) // BM).to(tl.int32)


@triton.jit
def live_slots(index_ptr, G, M, BM: tl.constexpr, LAYOUT: tl.constexpr):
    """Tiles of M that have rows, over all groups."""
    total = 0
    for base in range(0, G, CHUNK):
        total += tl.sum(tiles_of(index_ptr, base + tl.arange(0, CHUNK), G, M, BM, LAYOUT))
    return total


@triton.jit
def find_slot(slot, index_ptr, G, M, BM: tl.constexpr, LAYOUT: tl.constexpr):
    """(group, row inside the group) of the slot-th tile of M that has rows."""
    count = 0
    before = 0
    carry = 0
    for base in range(0, G, CHUNK):
        tiles = tiles_of(index_ptr, base + tl.arange(0, CHUNK), G, M, BM, LAYOUT)
        done = carry + tl.cumsum(tiles, 0) <= slot
        count += tl.sum(tl.where(done, 1, 0))
        before += tl.sum(tl.where(done, tiles, 0))
        carry += tl.sum(tiles)
    return tl.minimum(count, G - 1), (slot - before) * BM


@triton.jit
def bf16_tile_sum(a_ptr, b_ptr, m_off, n_off, K, stride_am, stride_ak, stride_bn, stride_bk, BM: tl.constexpr, BN: tl.constexpr,
                  BK: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr, WIDE: tl.constexpr):
    """FP32 [BM, BN], or [BN, BM] with weights on the MMA's M side. Row offsets are inside the tile's bases, in bounds."""
    offs_k = tl.arange(0, BK)
    if WIDE:
        m_off = m_off.to(tl.int64)
        n_off = n_off.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
    if SWAP:
        a_ptrs = a_ptr + (offs_k[:, None] * stride_ak + m_off[None, :] * stride_am)
        b_ptrs = b_ptr + (n_off[:, None] * stride_bn + offs_k[None, :] * stride_bk)
        acc = tl.zeros([BN, BM], tl.float32)
    else:
        a_ptrs = a_ptr + (m_off[:, None] * stride_am + offs_k[None, :] * stride_ak)
        b_ptrs = b_ptr + (offs_k[:, None] * stride_bk + n_off[None, :] * stride_bn)
        acc = tl.zeros([BM, BN], tl.float32)
    for kb in range(0, tl.cdiv(K, BK)):
        if EVEN_K:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            inside = offs_k < K - kb * BK
            if SWAP:
                a = tl.load(a_ptrs, mask=inside[:, None], other=0.0)
                b = tl.load(b_ptrs, mask=inside[None, :], other=0.0)
            else:
                a = tl.load(a_ptrs, mask=inside[None, :], other=0.0)
                b = tl.load(b_ptrs, mask=inside[:, None], other=0.0)
        if SWAP:
            acc = tl.dot(b, a, acc)
        else:
            acc = tl.dot(a, b, acc)
        a_ptrs += BK * stride_ak
        b_ptrs += BK * stride_bk
    return acc


@triton.jit(do_not_specialize=["M", "G"])
def bf16_kernel(a_ptr, b_ptr, out_ptr, index_ptr, M, N, K, G, stride_ag, stride_am, stride_ak, stride_bg, stride_bn, stride_bk,
                stride_og, stride_om, LAYOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
                EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, SWAP: tl.constexpr, ACCUMULATE: tl.constexpr, WIDE: tl.constexpr):
    """A grid of programs that take tiles in turn."""
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
