"""Device code of `combine`: the rows of a token times their weights, summed in FP32 in order of choice."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .activate_device import expert_of


@triton.jit(do_not_specialize=["T"])
def combine_kernel(y_ptr, inverse_ptr, offsets_ptr, weights_ptr, bias_ptr, add_ptr, out_ptr, T, N, E, yr, wr, ar, orow,
                   TOP_K: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, STEPS: tl.constexpr, BIAS: tl.constexpr,
                   ADD: tl.constexpr, FOLLOWS: tl.constexpr):
    """BN columns of one token. A skipped slot, whose row is not below offsets[E], is not read and counts 0.

    FOLLOWS: the launch in front may still be at it."""
    if FOLLOWS:
        gdc_wait()
    across = tl.cdiv(N, BN)
    t = (tl.program_id(0) // across).to(tl.int64)
    n = tl.program_id(0) % across * BN + tl.arange(0, BN)
    rows = tl.minimum(tl.load(offsets_ptr + E), T * TOP_K)
    total = tl.zeros((BN, ), tl.float32)
    for j in tl.static_range(TOP_K):
        row = tl.load(inverse_ptr + t * TOP_K + j).to(tl.int64)
        live = (row >= 0) & (row < rows)
        mask = live & (n >= 0) if EVEN else live & (n < N)
        y = tl.load(y_ptr + row * yr + n, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if BIAS:
            e = expert_of(offsets_ptr, tl.where(live, row, 0), E, STEPS).to(tl.int64)
            y += tl.load(bias_ptr + e * N + n, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weights_ptr + t * wr + j)
        total = tl.fma(y, tl.zeros((BN, ), tl.float32) + tl.where(live, weight, 0.0), total)
    if ADD:
        total += tl.load(add_ptr + t * ar + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * orow + n, total.to(out_ptr.dtype.element_ty), mask=n < N)
