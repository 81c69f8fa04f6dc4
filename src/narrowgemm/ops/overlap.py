"""Whether tensors lie in each other's memory, as far as shapes, strides and addresses say; nothing is read."""

from __future__ import annotations

from torch import Tensor


def reach(x: Tensor) -> int:
    """Bytes from its first element's first to its last element's last."""
    return 0 if x.numel() == 0 else x.element_size() * (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride())))


def stored_twice(x: Tensor) -> bool:
    """Whether two elements of a tensor whose axes nest lie in one place: some axis steps over less than the axes inside it hold."""
    span = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape) if n > 1):
        if stride < span:
            return True
        span = stride * (size - 1) + span
    return False


def share_memory(x: Tensor, y: Tensor) -> bool:
    """Whether writing one changes the other: they reach into each other, and aren't columns of one table beside each other."""
    p, q = x.data_ptr(), y.data_ptr()
    if not p or not q or p >= q + reach(y) or q >= p + reach(x):
        return False
    row = x.stride(-2) * x.element_size() if x.dim() > 1 else 0
    if not row or row != (y.stride(-2) * y.element_size() if y.dim() > 1 else 0):
        return True
    lead = [[s * t.element_size() for s, n in zip(t.stride()[:-2], t.shape) if n > 1] for t in (x, y)]
    if any(s % row for both in lead for s in both):
        return True
    # rows of both begin `row` bytes apart: where in a row does y begin, seen from x?
    at, wide, other = (q - p) % row, x.element_size() * x.shape[-1], y.element_size() * y.shape[-1]
    return at < wide or at + other > row
