"""Device code of the portable `routed_gemm`: tiles of positions of one expert, rows of A and of the result by slot, and the epilogue.

    sum over K -> + bias of the expert -> gate and up to the activation -> * weight of the slot -> row of the slot
    combine: rows of slots lie in the workspace in FP32; a launch behind adds a token's, in the order of its slots

Products are `mx_device`'s. A slot that no tile computed is not marked, and counts 0 in a token's sum.
"""

import triton
import triton.language as tl

from .activate_device import swiglu
from .mx_device import shifted_tile_sum
from .tiles_device import OFFSETS, find_segment, segment_start


@triton.jit
def place(t, index_ptr, experts_ptr, posted_ptr, P, G, per, block_m, BM: tl.constexpr, ROUTED: tl.constexpr):
    """(expert, first position, positions) of tile t; no positions where it has nothing to do. `per`: tiles of a routed block."""
    if ROUTED:
        block = t // per
        part = t % per * BM
        row0 = (block * block_m + part).to(tl.int64)
        left = tl.minimum(tl.load(posted_ptr).to(tl.int64), P) - row0
        extent = tl.maximum(tl.minimum(left, tl.minimum(block_m - part, BM)), 0).to(tl.int32)
        e = tl.load(experts_ptr + block, mask=extent > 0, other=-1).to(tl.int32)
        extent = tl.where((e >= 0) & (e < G), extent, 0)
    else:
        e, row0 = find_segment(t, index_ptr, G, P, 1, BM, OFFSETS)
        extent = (segment_start(index_ptr, tl.maximum(e, 0) + 1, G, P, 1, OFFSETS) - row0).to(tl.int32)
        extent = tl.where(e < 0, 0, extent)
    return tl.maximum(e, 0), row0, extent


@triton.jit(do_not_specialize=["P", "G", "SLOTS", "tiles"])
def routed_kernel(a_ptr, b_ptr, out_ptr, sa_ptr, sb_ptr, index_ptr, slots_ptr, experts_ptr, posted_ptr, bias_ptr, weight_ptr,
                  marks_ptr, P, SLOTS, N, NO, K, G, tiles, per, block_m, DIV, alpha, limit, stride_am, stride_bg, stride_bn, stride_om,
                  stride_sam, stride_sak, stride_sbg, stride_sbn, stride_sbk, ROUTED: tl.constexpr, MAPPED: tl.constexpr,
                  ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr, BIAS: tl.constexpr, WEIGHT: tl.constexpr,
                  COMBINE: tl.constexpr, A_KIND: tl.constexpr, B_KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  BK: tl.constexpr, EVEN_K: tl.constexpr, CHUNKED: tl.constexpr, WIDE: tl.constexpr, FAR: tl.constexpr):
    """A grid of programs that take tiles in turn; NO columns of the result. ACTIVATION 0: none, 1: swiglu, 2: swiglu_oai."""
    across = tl.cdiv(NO, BN)
    STEP: tl.constexpr = 2 if ACTIVATION and INTERLEAVED else 1
    m = tl.arange(0, BM)
    for tile in range(tl.program_id(0), tiles * across, tl.num_programs(0)):
        e, row0, extent = place(tile // across, index_ptr, experts_ptr, posted_ptr, P, G, per, block_m, BM, ROUTED)
        if extent > 0:
            position = row0 + m
            slot = position
            if MAPPED:
                slot = tl.load(slots_ptr + position, mask=m < extent, other=-1).to(tl.int64)
            live = (m < extent) & (slot >= 0) & (slot < SLOTS)
            rows = tl.where(live, slot, 0).to(tl.int32) // DIV
            n0 = (tile % across * BN).to(tl.int64)
            n = tl.arange(0, BN)
            columns = n < NO - n0
            n_load = tl.minimum(n, (NO - n0).to(tl.int32) - 1)
            b_at = b_ptr + e.to(tl.int64) * stride_bg + n0 * STEP * stride_bn
            sb_at = sb_ptr + e.to(tl.int64) * stride_sbg + n0 * STEP * stride_sbn
            acc = shifted_tile_sum(a_ptr, b_at, sa_ptr, sb_at, rows, n_load, K, stride_am, STEP * stride_bn, stride_sam, stride_sak,
                                   STEP * stride_sbn, stride_sbk, A_KIND, B_KIND, BM, BN, BK, EVEN_K, CHUNKED, WIDE, FAR)
            if BIAS:
                bias_at = bias_ptr + e.to(tl.int64) * N + (n0 + n) * STEP
                acc += tl.load(bias_at, mask=columns, other=0.0).to(tl.float32)[None, :]
            if ACTIVATION:
                other = 1 if INTERLEAVED else NO       # the rows of up, behind those of gate
                up = shifted_tile_sum(a_ptr, b_at + other * stride_bn, sa_ptr, sb_at + other * stride_sbn, rows, n_load, K,
                                      stride_am, STEP * stride_bn, stride_sam, stride_sak, STEP * stride_sbn, stride_sbk, A_KIND,
                                      B_KIND, BM, BN, BK, EVEN_K, CHUNKED, WIDE, FAR)
                if BIAS:
                    up += tl.load(bias_at + other, mask=columns, other=0.0).to(tl.float32)[None, :]
                acc = swiglu(acc, up, alpha, limit, ACTIVATION == 2)
            if WEIGHT:
                acc *= tl.load(weight_ptr + slot, mask=live, other=0.0)[:, None]
            at = out_ptr + (slot * stride_om)[:, None] + (n0 + n)[None, :]
            tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=live[:, None] & columns[None, :])
            if COMBINE:
                tl.store(marks_ptr + slot, 1, mask=live & (tile % across == 0))


@triton.jit(do_not_specialize=["n"])
def clear_kernel(marks_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(marks_ptr + i, 0, mask=i < n)


@triton.jit
def sum_kernel(rows_ptr, marks_ptr, add_ptr, out_ptr, N, stride_add, stride_out, TOP_K: tl.constexpr, BN: tl.constexpr,
               ADD: tl.constexpr):
    """BN columns of one token: its marked slots' rows, in order."""
    across = tl.cdiv(N, BN)
    t = (tl.program_id(0) // across).to(tl.int64)
    n = tl.program_id(0) % across * BN + tl.arange(0, BN)
    total = tl.zeros((BN, ), tl.float32)
    for j in range(TOP_K):
        there = tl.load(marks_ptr + t * TOP_K + j) > 0
        total += tl.load(rows_ptr + (t * TOP_K + j) * N + n, mask=there & (n < N), other=0.0)
    if ADD:
        total += tl.load(add_ptr + t * stride_add + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * stride_out + n, total.to(out_ptr.dtype.element_ty), mask=n < N)
