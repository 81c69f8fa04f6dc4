"""Two kernels that share a function with a constant, for `test_cache_key_order`."""

import triton
import triton.language as tl

STEP = tl.constexpr(3)


@triton.jit
def step(x):
    return x + STEP


@triton.jit
def twice(x, TIMES: tl.constexpr):
    if TIMES == 0:
        return x
    return twice(step(x), TIMES - 1)


@triton.jit
def first_kernel(p):
    tl.store(p, twice(tl.load(p), 2))


@triton.jit
def second_kernel(p):
    tl.store(p, step(twice(tl.load(p), 1)))
