"""What `tests/_gluon.py` needs for kernels on clusters: stand-ins for the modules that are PTX.

Shared memory is one allocation of bytes, so that addresses mean something: element i of a view of b-byte elements is number i * b
of one array of floats. Blocks of a cluster run at the same time; a box that is multicast comes to each at another time.
"""

from __future__ import annotations

import threading
import time
import types
from typing import Any

import numpy as np

from . import _gluon as emu


class Memory(emu.Shared):
    """A block's shared memory, by address."""

    def view(self, dtype: emu.DType, shape: list[int]) -> emu.Shared:
        count = int(np.prod([int(emu.raw(s)) for s in shape]))
        return emu.Shared(self.at(0, count, dtype.size).reshape([int(emu.raw(s)) for s in shape]), dtype)

    def at(self, address: int, count: int, size: int = 1) -> np.ndarray:
        flat = self.a.reshape(-1)
        if not 0 <= address <= address + count * size <= flat.size:
            raise emu.EmulationError(f"shared memory [{address}, {address + count * size}) of {flat.size}")
        return flat[address:address + count * size:size]


class Cluster:
    """Blocks that run together, and where all their partitions wait for each other."""

    def __init__(self, blocks: int, partitions: int) -> None:
        self.runs: list[emu.Run] = []
        self.all = threading.Barrier(blocks * partitions, timeout=emu.TIMEOUT)


def allocate(shape: list[int]) -> Memory:
    run = emu._run()
    assert run.memory is None, "one allocation of bytes a block"
    run.memory = Memory(np.full(shape, np.nan, np.float32), emu.uint8)
    return run.memory


def _wait_all(blocks: int) -> None:
    if blocks == 1:
        return
    try:
        emu._run().cluster.all.wait()
    except threading.BrokenBarrierError:
        raise emu.EmulationError("deadlock, or another partition failed: not every partition came to a wait for the cluster") from None


def _init(bar: Any, count: Any) -> None:
    made = emu.Barrier()
    emu._init(made, count)
    run = emu._run()
    run.by_address[int(emu.raw(bar))] = made
    run.barriers.append(made)


def _own(bar: Any) -> emu.Barrier:
    return emu._run().by_address[int(emu.raw(bar))]


def _wait(bar: Any, phase: Any, pred: Any) -> None:
    if emu.raw(pred):
        _own(bar).wait(int(emu.raw(phase)))


def _ready(bar: Any, phase: Any) -> emu.Tensor:
    own = _own(bar)
    with own.changed:
        return emu.wrap(int((own.phase & 1) != int(emu.raw(phase))))


def _arrive(bar: Any, blocks: int) -> None:
    """The four warps of a warpgroup, at each block of the cluster."""
    run = emu._run()
    for other in run.cluster.runs if blocks > 1 else [run]:
        other.by_address[int(emu.raw(bar))].update(arrivals=4)


def _load(desc: emu.Descriptor, kernel: str, parameter: int, at: tuple[Any, ...], bar: Any, to: Any, blocks: int, *_: bool) -> None:
    if int(emu.raw(at[-1])) * desc.dtype.size % 16:
        raise emu.EmulationError("a box that doesn't start on 16 bytes: an illegal instruction on the H200")
    inside, boxed = desc.windows(list(at))
    count, size = int(np.prod(desc.box)), desc.dtype.size
    run = emu._run()
    for other in run.cluster.runs if blocks > 1 else [run]:
        place = other.memory.at(int(emu.raw(to)), count, size)
        barrier = other.by_address[int(emu.raw(bar))]
        place[...] = np.nan

        def move(place: np.ndarray = place, barrier: emu.Barrier = barrier) -> None:
            box = np.zeros(desc.box, np.float32)
            box[boxed] = desc.a[inside]
            place[...] = box.reshape(-1)
            barrier.update(tx=-count * size)

        other.submit(move)


def _await_count(counter: emu.Pointer, count: Any) -> None:
    end = time.monotonic() + emu.TIMEOUT
    while emu.load(counter).a < emu.raw(count):
        if time.monotonic() > end:
            raise emu.EmulationError("deadlock: a count that never comes")
        time.sleep(0.001)


def _of_block(address: Any, rank: Any) -> emu.Tensor:
    return emu.wrap(int(emu.raw(rank)) << 24 | int(emu.raw(address)))


def _load_four(at: emu.Tensor) -> emu.Tensor:
    out = np.empty((at.a.size // 4, 4), np.float32)
    for four, address in zip(out, at.a.reshape(-1)[::4].tolist()):
        four[:] = emu._run().cluster.runs[address >> 24].memory.at(address & 0xFFFFFF, 4, 4)
    return emu.Tensor(out.reshape(at.a.shape))


def _multiply(a: Any, b: Any, sums: tuple[Any, ...], parts: int, columns: int, mma: Any) -> tuple[emu.Pending, ...]:
    if len(sums) != parts or any(isinstance(p, emu.Pending) and p in emu._local.flight for p in sums):
        raise emu.EmulationError("registers of sums in flight are given to others")
    memory, a, b = emu._run().memory, int(emu.raw(a)), int(emu.raw(b))
    x = emu.Shared(memory.at(a, 64 * 128).reshape(64, 128), emu.float8e4nv)
    started = []
    for i in range(parts):
        y = memory.at(b + i * columns * 128, columns * 128).reshape(columns, 128)
        started.append(emu.Pending(x, emu.Shared(y.T, emu.float8e4nv), None, emu.float32))
    emu._local.flight.extend(started)
    return tuple(started)


def _wait_sums(sums: tuple[Any, ...], parts: int, columns: int) -> tuple[Any, ...]:
    done = emu.warpgroup_mma_wait(0, deps=sums)
    return done if isinstance(done, tuple) else (done, )


def stand_ins(package: str) -> dict[str, types.ModuleType]:
    cluster = types.ModuleType(f"{package}.cluster_device")
    cluster.__dict__.update(
        rank=lambda: emu.wrap(emu._run().rank), start_of_shared=lambda: emu.wrap(0), wait_all=_wait_all, init=_init, wait=_wait, ready=_ready,
        arrive_all=lambda: None,
        join_all=lambda: _wait_all(2), STAGED=emu.COLUMNS_FIRST, staged_at=lambda row, column, columns: column * 256 + row * 4,
        of_block=_of_block, load_four=_load_four, everywhere=lambda bar, blocks: bar, arrive=_arrive, arrive_once=lambda bar: _own(bar).update(arrivals=1), expect=lambda bar, size, *_: _own(bar).update(arrivals=1, tx=int(emu.raw(size))), load=_load,
        load_rows=lambda desc, kernel, parameter, at, bar, to: _load(desc, kernel, parameter, at, bar, to, 1))
    wgmma = types.ModuleType(f"{package}.wgmma_device")
    wgmma.__dict__.update(multiply=_multiply, wait=_wait_sums, keep=lambda sums, parts, columns: sums)
    counters = types.ModuleType(f"{package}.counters_device")
    counters.__dict__.update(take=lambda p: emu.atomic_add(p, 1), finish=lambda p: emu.atomic_add(p, 1), await_count=_await_count)
    return {m.__name__: m for m in (cluster, wgmma, counters)}


def launch(kernel: Any, grid: int, blocks: int, partitions: int, *args: Any, seed: int = 0) -> None:
    """Every cluster of the grid, one after the other; its blocks at the same time. The first error is raised."""
    args = emu.arguments(args)
    for c in range(grid):
        cluster = Cluster(blocks, partitions)
        cluster.runs = [emu.Run(seed * 1000 + c * blocks + r, cluster, r) for r in range(blocks)]

        def block(run: emu.Run, number: int, cluster: Cluster = cluster) -> None:
            emu._start(run, (number, grid * blocks))
            try:
                kernel(*args)
            except BaseException as e:
                for other in cluster.runs:
                    other.fail(e)

        threads = [threading.Thread(target=block, args=(run, c * blocks + r), daemon=True) for r, run in enumerate(cluster.runs)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(3 * emu.TIMEOUT)
        for run in cluster.runs:
            run.end()
        for run in cluster.runs:
            if run.failed:
                raise run.failed
