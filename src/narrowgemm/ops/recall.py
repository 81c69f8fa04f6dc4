"""Whether a call is one that was seen before, in one comparison: torch's own guards on tensors.

`TensorGuards` are what torch.compile holds a graph's inputs against: made from some tensors, they compare others with those in
C, each one's Python type, dispatch keys, dtype, device, sizes and strides. That is all of a call's signature that is in its
tensors, for a fifth of what it takes to read it from Python. Nothing is assumed of a tensor: every call is compared whole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Check = Callable[..., bool]
Signature = tuple[Any, ...]      # of a call, as a key: see `plan_cache`
T = TypeVar("T")
LIMIT = 4096        # keys
ALIKE = 4           # calls kept that differ in nothing but strides, dtypes, devices or modes of torch


class Calls(Generic[T]):
    """What is known of calls, by a key of all that is not a tensor and guards of the tensors. Safe with several threads."""

    def __init__(self) -> None:
        self.known: dict[Signature, tuple[tuple[Check, T], ...]] = {}
        self._lock = threading.Lock()

    def find(self, key: Signature, tensors: Sequence[Tensor]) -> T | None:
        """What was added with a key that is equal, which says how many tensors there are, and tensors of the same signature."""
        for check, known in self.known.get(key, ()):
            if check(*tensors):
                return known
        return None

    def add(self, key: Signature, tensors: Sequence[Tensor], known: T) -> None:
        """Have `find` give `known` for an equal key and tensors of the signature of these."""
        check = guard(tensors)
        if check is None:
            return
        with self._lock:
            if len(self.known) > LIMIT:
                self.known.clear()
            self.known[key] = ((check, known), *self.known.get(key, ()))[:ALIKE]


def guard(tensors: Sequence[Tensor]) -> Check | None:
    """What says whether other tensors have the signature of these; None where this torch has nothing for it."""
    make = _maker()
    return None if make is None else make(tensors)


def _make(kind: Any, tensors: Sequence[Tensor]) -> Check:
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    return kind(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


@lru_cache(maxsize=1)
def _maker() -> Callable[[Sequence[Tensor]], Check] | None:
    """Torch's guards, if they do what is relied upon: the interface is not a public one."""
    kind = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)
    if kind is None:
        return None
    def like(columns: int, stride: int, device: str = "cpu") -> Tensor:
        return torch.empty_strided((4, columns), (stride, 1), dtype=torch.float32, device=device)

    x, y = like(6, 8), torch.empty((5,), dtype=torch.uint8, device="cpu")
    others = (like(6, 6), like(5, 8), x.double(), torch.nn.Parameter(x), like(6, 8, "meta"), x.unsqueeze(0))
    try:
        check = _make(kind, (x, y))
        right = check(x, y) and check(like(6, 8), y.clone())
        right = right and not any(check(other, y) for other in others)
    except (TypeError, ValueError, SystemError, RuntimeError, AttributeError):
        return None
    return (lambda tensors: _make(kind, tensors)) if right else None
