"""What goes on while a partition does something else: TMA, cp.async and wgmma.

A box is there when its barrier says so, a copy or a sum when it is waited for, and what is read too early is wrong.
"""

from __future__ import annotations

import threading
import types
from typing import Any

import numpy as np

from .block import Block, current, local
from .shared import Barrier, Shared
from .values import DType, EmulationError, Pointer, Tensor, float32, load, raw


# ---------------------------------------------------------------- TMA
class Descriptor:
    """A tensor and the box that is moved. Outside the tensor a load brings zeros and a store does nothing."""

    def __init__(self, a: np.ndarray, box: list[int], dtype: DType) -> None:
        self.a, self.box, self.dtype = a, box, dtype
        self.layout = None

    def windows(self, at: list[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        inside, boxed = [], []
        for x, size, n in zip(at, self.box, self.a.shape):
            x = int(raw(x))
            lo, hi = min(max(x, 0), n), min(max(x + size, 0), n)
            inside.append(slice(lo, hi))
            boxed.append(slice(lo - x, hi - x) if hi > lo else slice(0, 0))
        return tuple(inside), tuple(boxed)


def tma_load(desc: Descriptor, at: list[Any], bar: Barrier, out: Shared, pred: Any = True) -> None:
    if not raw(pred):
        return
    assert list(out.a.shape) == desc.box and out.dtype is desc.dtype, (out.a.shape, desc.box)
    if int(raw(at[-1])) * desc.dtype.size % 16:
        raise EmulationError("a box that doesn't start on 16 bytes: an illegal instruction on the H200")
    floats = out.a.dtype.kind == "f"
    out.a[...] = np.nan if floats else -(1 << 30)
    inside, boxed = desc.windows(at)

    def move() -> None:
        box = np.zeros(desc.box, np.float32 if floats else desc.a.dtype)
        box[boxed] = desc.a[inside]
        out.a[...] = box
        bar.update(tx=-box.size * desc.dtype.size)

    current().submit(move)


def tma_store(desc: Descriptor, at: list[Any], src: Shared, add: bool = False) -> None:
    assert list(src.a.shape) == desc.box and src.dtype is desc.dtype
    inside, boxed = desc.windows(at)
    done = threading.Event()
    local.stores.append(done)

    def move() -> None:
        desc.a[inside] = src.a[boxed] + (desc.a[inside] if add else 0)
        done.set()

    current().submit(move)


def tma_add(desc: Descriptor, at: list[Any], src: Shared) -> None:
    tma_store(desc, at, src, add=True)


def store_wait(pending: int) -> None:
    while len(local.stores) > int(pending):
        if not local.stores.popleft().wait(Block.TIMEOUT):
            raise EmulationError("a TMA store never ended")


tma = types.SimpleNamespace(store_wait=store_wait)


def copy_to_shared(out: Shared, p: Pointer, mask: Any = None) -> None:
    """cp.async, zeros where masked. A partition may wait for what was asked for before the warps parted: they are the same."""
    assert out.dtype is p.element, (out.dtype, p.element)
    value = load(p, mask=mask)
    out.a[...] = np.nan if out.a.dtype.kind == "f" else -(1 << 30)

    def move() -> None:
        out.a[...] = value.a

    current().copies.append(move)


def _wait_copies(pending: int) -> None:
    assert int(raw(pending)) == 0, "groups of copies are not told apart"
    for move in current().copies:
        move()
    current().copies.clear()


async_copy = types.SimpleNamespace(commit_group=lambda: None, wait_group=_wait_copies)


# ---------------------------------------------------------------- wgmma
class Pending:
    """A sum in flight: nothing but a wait may take it."""

    def __init__(self, a: Shared, b: Shared, base: Any, dtype: DType) -> None:
        self.operands, self.base, self.dtype, self.value = (a, b), base, dtype, None

    def compute(self) -> None:
        a, b = (x.a.astype(np.float32) for x in self.operands)
        value = (a @ b).astype(np.float32)
        if self.base is not None:
            value = value + (self.base.value if isinstance(self.base, Pending) else self.base).a
        self.value = Tensor(value)

    @property
    def a(self) -> np.ndarray:
        raise EmulationError("a sum is taken while it is in flight")


def warpgroup_mma(a: Shared, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Pending:
    assert is_async
    use = bool(raw(use_acc))
    assert use or not isinstance(acc, Pending) or acc not in local.flight, "registers of a sum in flight are given to another"
    p = Pending(a, b, acc if use else None, float32)
    local.flight.append(p)
    return p


def warpgroup_mma_wait(pending: int = 0, deps: tuple[Any, ...] = ()) -> Any:
    while len(local.flight) > pending:
        local.flight.popleft().compute()
    out = []
    for d in deps:
        if isinstance(d, Pending):
            d = d if d.value is None else d.value       # in flight still: whoever takes it as a tensor finds out
        out.append(d)
    return out[0] if len(out) == 1 else tuple(out)
