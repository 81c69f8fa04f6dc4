"""Shared memory of the emulator, and the barriers in it."""

from __future__ import annotations

import threading
import types
from typing import Any

import numpy as np

from .block import Block, current
from .values import DType, EmulationError, Tensor, int8, raw, uint8

# layouts of shared memory that place anything: columns first, and rows by eight with their blocks of 128 columns between
COLUMNS_FIRST, BOXED = object(), object()


class Shared:
    def __init__(self, a: np.ndarray, dtype: DType) -> None:
        self.a, self.dtype = a, dtype

    @property
    def shape(self) -> list[int]:
        return list(self.a.shape)

    def index(self, i: Any) -> Shared:
        i = int(raw(i))
        if not 0 <= i < len(self.a):
            raise EmulationError(f"shared memory index {i} of {len(self.a)}")
        return Shared(self.a[i], self.dtype)

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.a.transpose(order), self.dtype)

    def slice(self, start: Any, length: Any, dim: int = 0) -> Shared:
        part = slice(int(raw(start)), int(raw(start)) + int(raw(length)))
        return Shared(self.a[(slice(None),) * dim + (part,)], self.dtype)

    def view(self, dtype: DType, shape: list[int]) -> Shared:
        """Of wider elements: each in the place of the first one that it covers."""
        assert dtype is self.dtype or (dtype.size > self.dtype.size and dtype.size % self.dtype.size == 0)
        return Shared(self.a.reshape(-1)[::dtype.size // self.dtype.size].reshape([int(raw(s)) for s in shape]), dtype)

    def load(self, layout: Any) -> Tensor:
        return Tensor(self.a.copy(), self.dtype)

    def store(self, value: Tensor) -> None:
        assert value.dtype is self.dtype, (value.dtype, self.dtype)
        self.a[...] = value.a


class Boxed(Shared):
    """[n, rows, columns] in BOXED order, which numpy has no view for: blocks of 128 columns are copies, to be read."""

    @property
    def shape(self) -> list[int]:
        *n, groups, blocks, rows, columns = self.a.shape
        return [*n, groups * rows, blocks * columns]

    def index(self, i: Any) -> Shared:
        return Boxed(super().index(i).a, self.dtype)

    def slice(self, start: Any, length: Any, dim: int = 0) -> Shared:
        assert dim == 1 and self.a.ndim == 4 and int(raw(length)) == 128 and int(raw(start)) % 128 == 0
        return Shared(self.a[:, int(raw(start)) // 128].reshape(-1, 128), self.dtype)


class Memory(Shared):
    """All of a block's shared memory as bytes, by address: element i of a view of b-byte elements is number i * b of one array of floats."""

    def view(self, dtype: DType, shape: list[int]) -> Shared:
        count = int(np.prod([int(raw(s)) for s in shape]))
        return Shared(self.at(0, count, dtype.size).reshape([int(raw(s)) for s in shape]), dtype)

    def at(self, address: int, count: int, size: int = 1) -> np.ndarray:
        flat = self.a.reshape(-1)
        if not 0 <= address <= address + count * size <= flat.size:
            raise EmulationError(f"shared memory [{address}, {address + count * size}) of {flat.size}")
        return flat[address:address + count * size:size]


class Barrier:
    def __init__(self) -> None:
        self.count = self.pending = self.tx = 0
        self.phase = -1
        self.changed = threading.Condition()

    def update(self, arrivals: int = 0, tx: int = 0) -> None:
        with self.changed:
            if self.phase < 0:
                raise EmulationError("a barrier is used before it is initialised")
            self.pending -= arrivals
            self.tx += tx
            if self.pending < 0:
                raise EmulationError("more arrivals at a barrier than it counts")
            if self.pending == 0 and self.tx == 0:
                self.phase += 1
                self.pending = self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            # passes once the phase of that parity is over; a fresh barrier counts the one before it as over
            if not self.changed.wait_for(lambda: current().failed or (self.phase & 1) != parity, Block.TIMEOUT):
                raise EmulationError(f"deadlock: waited {Block.TIMEOUT} s at a barrier")
            if current().failed:
                raise EmulationError("another partition failed")


class Barriers:
    def __init__(self, barriers: list[Barrier]) -> None:
        self.barriers = barriers

    def index(self, i: Any) -> Barrier:
        return self.barriers[int(raw(i))]


class AddressedBarriers:
    """Barriers in a view of shared memory, which PTX takes by their addresses."""

    def index(self, i: Any) -> Barrier:
        own, at = current(), 8 * int(raw(i))
        with own.wake:
            if at not in own.by_address:
                own.by_address[at] = Barrier()
                own.barriers.append(own.by_address[at])
            return own.by_address[at]


class MBarrierLayout:
    pass


def allocate_shared_memory(dtype: DType, shape: list[Any], layout: Any) -> Any:
    shape = [int(raw(s)) for s in shape]
    if isinstance(layout, MBarrierLayout):
        made = [Barrier() for _ in range(shape[0])]
        current().barriers += made
        return Barriers(made)
    if dtype is int8:
        block = current()
        assert block.memory is None, "one allocation of bytes a block"
        block.memory = Memory(np.full(shape, np.nan, np.float32), uint8)
        return block.memory
    fill = np.nan if dtype.np.kind == "f" else -(1 << 30)
    return Shared(np.full(shape, fill, dtype.np), dtype)


def init(bar: Barrier, count: int) -> None:
    bar.count = bar.pending = int(raw(count))
    bar.phase = 0


mbarrier = types.SimpleNamespace(
    MBarrierLayout=MBarrierLayout, init=init,
    wait=lambda bar, phase, pred=True, **_: bar.wait(int(raw(phase))) if raw(pred) else None,
    arrive=lambda bar, count=1, pred=True, **_: bar.update(arrivals=int(count)) if raw(pred) else None,
    expect=lambda bar, n, pred=True, **_: bar.update(arrivals=1, tx=int(n)) if raw(pred) else None)
