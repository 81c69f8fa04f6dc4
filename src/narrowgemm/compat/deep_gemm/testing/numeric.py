"""`deep_gemm.testing.numeric`: the error measure, a byte count, and bitwise comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from ....testing.numerics import calc_diff

__all__ = ["assert_bitwise_equal", "calc_diff", "count_bytes"]


def count_bytes(*tensors: object) -> int:
    """Bytes of all tensors in (nested) tuples and lists; None counts nothing."""
    total = 0
    for t in tensors:
        if isinstance(t, (tuple, list)):
            total += count_bytes(*t)
        elif isinstance(t, Tensor):
            total += t.numel() * t.element_size()
    return total


def assert_bitwise_equal(x: Tensor, y: Tensor, label: str = "") -> None:
    """AssertionError with the first difference where shape, dtype or any byte of `x` and `y` differ."""
    where = f" ({label})" if label else ""
    if x.shape != y.shape or x.dtype != y.dtype:
        raise AssertionError(f"{tuple(x.shape)} {x.dtype} against {tuple(y.shape)} {y.dtype}{where}")
    if not x.numel():
        return
    width = x.element_size()
    p, q = (t.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).view(-1, width) for t in (x, y))
    differs = (p != q).any(1)
    if not bool(differs.any()):
        return
    first = int(differs.int().argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), x.shape))
    raise AssertionError(f"{int(differs.sum())} of {x.numel()} elements differ{where}, first at {index}: "
                         f"{x[index].item()} against {y[index].item()}")
