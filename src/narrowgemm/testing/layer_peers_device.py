"""Device code of the layer peers: what serving stacks run today around and instead of a grouped GEMM, plainly written."""

import triton
import triton.language as tl

from ..kernels.triton.activate_device import swiglu
from ..kernels.triton.quantize_device import block_scale, magnitude, narrow_fp8


@triton.jit(do_not_specialize=["E"])
def pad_kernel(offsets_ptr, row_map_ptr, padded_ptr, groups_ptr, row_of_slot_ptr, E, ALIGN: tl.constexpr,
               EP: tl.constexpr, BLOCK: tl.constexpr, BY_BLOCK: tl.constexpr):
    """Program e: the slots of expert e, from a multiple of ALIGN rows on.

    padded[row] = slot; row_of_slot[slot] = row; groups[row], or with BY_BLOCK groups[row / ALIGN], = e.
    """
    e = tl.program_id(0)
    i = tl.arange(0, EP)
    first = tl.load(offsets_ptr + i, mask=i < E, other=0)
    last = tl.load(offsets_ptr + i + 1, mask=i < E, other=0)
    taken = tl.where(i < e, (last - first + ALIGN - 1) // ALIGN * ALIGN, 0)
    start = tl.sum(taken, 0)
    begin = tl.load(offsets_ptr + e)
    count = (tl.load(offsets_ptr + e + 1) - begin).to(tl.int32)
    b = tl.arange(0, BLOCK)
    for at in range(0, count, BLOCK):
        mask = at + b < count
        slot = tl.load(row_map_ptr + begin + at + b, mask=mask, other=0)
        tl.store(padded_ptr + start + at + b, slot, mask=mask)
        tl.store(row_of_slot_ptr + slot, (start + at + b).to(tl.int32), mask=mask)
        if not BY_BLOCK:
            tl.store(groups_ptr + start + at + b, e, mask=mask)
    if BY_BLOCK:
        for at in range(0, tl.cdiv(count, ALIGN), BLOCK):
            tl.store(groups_ptr + start // ALIGN + at + b, e, mask=at + b < tl.cdiv(count, ALIGN))


@triton.jit(do_not_specialize=["slots", "ROWS"])
def fused_moe_kernel(a_ptr, as_ptr, b_ptr, bs_ptr, c_ptr, w_ptr, padded_ptr, groups_ptr, slots, ROWS, N, K, sa, sas, sb_e,
                     sb_n, sbs_e, sbs_n, DIV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
                     WEIGHT: tl.constexpr):
    """A block of BM slots of one expert x BN columns: A's rows by slot // DIV, FP8 blocks of 128, one promotion a block."""
    pid = tl.program_id(0)
    num_m, num_n = tl.cdiv(ROWS, BM), tl.cdiv(N, BN)
    strip = pid // (GROUP * num_n)
    height = min(num_m - strip * GROUP, GROUP)
    pm = strip * GROUP + pid % (GROUP * num_n) % height
    pn = pid % (GROUP * num_n) // height
    e = tl.load(groups_ptr + pm).to(tl.int64)
    if e < 0:
        return
    slot = tl.load(padded_ptr + pm * BM + tl.arange(0, BM))
    live = (slot >= 0) & (slot < slots)
    row = tl.where(live, slot, 0).to(tl.int64) // DIV
    n = pn * BN + tl.arange(0, BN)
    k = tl.arange(0, 128)
    a = a_ptr + row[:, None] * sa + k[None, :]
    b = b_ptr + e * sb_e + n[None, :] * sb_n + k[:, None]
    bs = bs_ptr + e * sbs_e + (n // 128) * sbs_n
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, tl.cdiv(K, 128)):
        x = tl.load(a, mask=live[:, None], other=0.0)
        w = tl.load(b, mask=n[None, :] < N, other=0.0)
        sx = tl.load(as_ptr + row * sas + k0, mask=live, other=0.0)
        sw = tl.load(bs + k0, mask=n < N, other=0.0)
        acc += tl.dot(x, w) * sx[:, None] * sw[None, :]
        a += 128
        b += 128
    if WEIGHT:
        acc *= tl.load(w_ptr + slot, mask=live, other=0.0)[:, None]
    tl.store(c_ptr + slot.to(tl.int64)[:, None] * N + n[None, :], acc.to(c_ptr.dtype.element_ty),
             mask=live[:, None] & (n[None, :] < N))


@triton.jit
def scale_at(row, block, S, ROOM: tl.constexpr):
    """Where a scale lies: MN-major for each group of ROOM rows."""
    return row // ROOM * (S * ROOM) + block * ROOM + row % ROOM


@triton.jit(do_not_specialize=["T"])
def scatter_kernel(q_ptr, s_ptr, row_ptr, out_ptr, outs_ptr, T, K, S, TOP_K: tl.constexpr, BK: tl.constexpr,
                   SP: tl.constexpr, ROOM: tl.constexpr):
    """BK columns of token t's quantised row to its rows of a padded layout; program 0 of a token moves its scales."""
    t = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SP)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    scale = tl.load(s_ptr + t * S + s, mask=s < S, other=0.0)
    x = tl.load(q_ptr + t * K + k, mask=k < K)
    for j in range(TOP_K):
        row = tl.load(row_ptr + t * TOP_K + j).to(tl.int64)
        tl.store(outs_ptr + scale_at(row, s, S, ROOM), scale, mask=(s < S) & (row >= 0) & (tl.program_id(1) == 0))
        tl.store(out_ptr + row * K + k, x, mask=(k < K) & (row >= 0))


@triton.jit
def activate_rows_kernel(h_ptr, row_ptr, out_ptr, scale_ptr, I, S, clamp, alpha, limit, BLOCKS: tl.constexpr,
                         ROOM: tl.constexpr, CLAMPED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """BLOCKS blocks of 128 columns of the row of one slot: activation, rounded to BF16, quantised."""
    row = tl.load(row_ptr + tl.program_id(0)).to(tl.int64)
    if row < 0:
        return
    g = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    k = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = k < I
    at = h_ptr + row * 2 * I
    step: tl.constexpr = 2 if INTERLEAVED else 1
    gate = tl.load(at + k * step, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + (k * 2 + 1 if INTERLEAVED else I + k), mask=mask, other=0.0).to(tl.float32)
    y = swiglu(gate, up, alpha, limit, CLAMPED).to(tl.bfloat16)
    bits = magnitude(y)
    scale, inverse, sign = block_scale(tl.max(bits, 1), clamp, "", False, 448.0, 8, 0, 3)
    tl.store(scale_ptr + scale_at(row, g, S, ROOM), scale, mask=g < S)
    tl.store(out_ptr + row * I + k, narrow_fp8(y, bits, inverse[:, None], sign[:, None], tl.float8e4nv, 448.0, False),
             mask=mask)


@triton.jit(do_not_specialize=["T"])
def gather_sum_kernel(y_ptr, row_ptr, w_ptr, out_ptr, T, N, TOP_K: tl.constexpr, BN: tl.constexpr, WEIGHT: tl.constexpr,
                      SLOTS: tl.constexpr):
    """out[t] = sum over j of w * y[row]; SLOTS: y lies by slot, and where row < 0 counts 0 either way."""
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BN, ), tl.float32)
    for j in tl.static_range(TOP_K):
        row = tl.load(row_ptr + t * TOP_K + j).to(tl.int64)
        at = t * TOP_K + j if SLOTS else row
        y = tl.load(y_ptr + at * N + n, mask=(row >= 0) & (n < N), other=0.0).to(tl.float32)
        acc += y * tl.load(w_ptr + t * TOP_K + j) if WEIGHT else y
    tl.store(out_ptr + t * N + n, acc.to(out_ptr.dtype.element_ty), mask=n < N)
