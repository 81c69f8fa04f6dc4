"""`gemm` in plain torch: the definition of the dense product, in FP32 over the dequantised operands."""

from __future__ import annotations

from torch import Tensor

from ..formats import ScaledTensor
from .float32 import full_float32


def product(a: ScaledTensor, b: ScaledTensor) -> Tensor:
    """FP32 `[M, N]` = A `[M, K]` . B `[N, K]`^T over the same dequantised bits."""
    with full_float32():
        return a.dequantize() @ b.dequantize().mT


def gemm(a: ScaledTensor, b: ScaledTensor, out: Tensor, *, accumulate: bool = False) -> Tensor:
    """`out [M, N] (+)= A [M, K] . B [N, K]^T`, summed in FP32 and rounded once to `out`'s dtype."""
    y = product(a, b)
    return out.copy_(y + out.float() if accumulate else y)
