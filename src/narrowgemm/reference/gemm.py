"""`gemm` in plain torch: the definition of the dense product, in FP32 over the dequantised operands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..formats import ScaledTensor


@contextmanager
def full_float32() -> Iterator[None]:
    """FP32 matrix products without TF32 and without autocast inside the block, whatever the process has set."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def product(a: ScaledTensor, b: ScaledTensor) -> Tensor:
    """FP32 `[M, N]` = A `[M, K]` . B `[N, K]`^T over the same dequantised bits."""
    with full_float32():
        return a.dequantize() @ b.dequantize().mT


def gemm(a: ScaledTensor, b: ScaledTensor, out: Tensor, *, accumulate: bool = False) -> Tensor:
    """`out [M, N] (+)= A [M, K] . B [N, K]^T`, summed in FP32 and rounded once to `out`'s dtype."""
    y = product(a, b)
    return out.copy_(y + out.float() if accumulate else y)
