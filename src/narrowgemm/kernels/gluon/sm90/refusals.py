"""Why the persistent kernels for many rows a group can't take a problem, whatever its formats: first and last of their refusals."""

from __future__ import annotations

from ....arch import Arch
from ....problem import Problem
from .fp8_block_tile import LAYOUTS, MAX_GROUPS

OUT_DTYPES = ("bf16", "fp16", "fp32")
FRONTS = {"": 0, "tokens": 1, "sizes": 2}     # `Problem.front`, for device code


def op(p: Problem, arch: Arch) -> str | None:
    """By chip, op and layout."""
    if arch.target != "sm90":
        return f"runs on NVIDIA Hopper (sm90), not {arch.target}"
    if p.op not in ("gemm", "grouped_gemm") or p.layout not in LAYOUTS:
        return f"computes dense, contiguous, offsets, psum and masked products, not {p.op} ({p.layout})"
    return None


def shape(p: Problem, k: int) -> str | None:
    """By sizes, epilogue and output. `k`: what K has to be a multiple of."""
    if p.k % k or not p.k:
        return f"takes K in multiples of {k}, not {p.k}"
    if p.n < 8:
        return f"takes at least 8 columns, not {p.n}"
    if not p.epilogue.plain or p.gather:
        return "has no fused gather and no epilogue beyond the sum"
    if p.out_dtype not in OUT_DTYPES:
        return f"writes {', '.join(OUT_DTYPES)}, not {p.out_dtype}"
    if 0 < p.promote < 128:
        return f"promotes every 128 of K, not every {p.promote}"
    if p.groups > MAX_GROUPS and p.counted:
        return f"counts tiles of up to {MAX_GROUPS} groups, not {p.groups}"
    if p.wide:
        return "offsets inside a tile pass 2^31 elements"
    return None
