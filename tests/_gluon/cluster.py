"""Kernels on clusters: stand-ins for the modules that are PTX, and a launch of several blocks at once.

Shared memory is one allocation of bytes, so that addresses mean something. Blocks of a cluster run at the same time; a box that is
multicast comes to each at another time.
"""

from __future__ import annotations

import threading
import time
import types
from typing import Any

import numpy as np

from .asynchronous import Descriptor, Pending, warpgroup_mma_wait
from .block import Block, current, local, start
from .language import atomic_add
from .shared import COLUMNS_FIRST, Barrier, Shared, init
from .values import EmulationError, Pointer, Tensor, arguments, bfloat16, float8e4nv, float32, load, raw, wrap


class Cluster:
    """Blocks that run together, and where all their partitions wait for each other."""

    def __init__(self, blocks: int, partitions: int) -> None:
        self.blocks: list[Block] = []
        self.all = threading.Barrier(blocks * partitions, timeout=Block.TIMEOUT)


def _wait_all(blocks: int) -> None:
    if blocks == 1:
        return
    try:
        current().cluster.all.wait()
    except threading.BrokenBarrierError:
        raise EmulationError("deadlock, or another partition failed: not every partition came to a wait for the cluster") from None


def _init(bar: Any, count: Any) -> None:
    made = Barrier()
    init(made, count)
    own = current()
    own.by_address[int(raw(bar))] = made
    own.barriers.append(made)


def _init_many(bar: Any, count: Any, number: int) -> None:
    for i in range(number):
        _init(wrap(int(raw(bar)) + 8 * i), count)


def _own(bar: Any) -> Barrier:
    return current().by_address[int(raw(bar))]


def _wait(bar: Any, phase: Any, pred: Any) -> None:
    if raw(pred):
        _own(bar).wait(int(raw(phase)))


def _ready(bar: Any, phase: Any) -> Tensor:
    own = _own(bar)
    with own.changed:
        return wrap(int((own.phase & 1) != int(raw(phase))))


def _arrive(bar: Any, blocks: int) -> None:
    """The four warps of a warpgroup, at each block of the cluster; none where the address is negative."""
    if int(raw(bar)) < 0:
        return
    own = current()
    for other in own.cluster.blocks if blocks > 1 else [own]:
        other.by_address[int(raw(bar))].update(arrivals=4)


def _load(desc: Descriptor, kernel: str, parameter: int, at: tuple[Any, ...], bar: Any, to: Any, blocks: int, *_: bool) -> None:
    if int(raw(at[-1])) * desc.dtype.size % 16:
        raise EmulationError("a box that doesn't start on 16 bytes: an illegal instruction on the H200")
    inside, boxed = desc.windows(list(at))
    count, size = int(np.prod(desc.box)), desc.dtype.size
    own = current()
    for other in own.cluster.blocks if blocks > 1 else [own]:
        place = other.memory.at(int(raw(to)), count, size)
        barrier = other.by_address[int(raw(bar))]
        place[...] = np.nan

        def move(place: np.ndarray = place, barrier: Barrier = barrier) -> None:
            box = np.zeros(desc.box, np.float32)
            box[boxed] = desc.a[inside]
            place[...] = box.reshape(-1)
            barrier.update(tx=-count * size)

        other.submit(move)


def _await_count(counter: Pointer, count: Any) -> None:
    end = time.monotonic() + Block.TIMEOUT
    while load(counter).a < raw(count):
        if time.monotonic() > end:
            raise EmulationError("deadlock: a count that never comes")
        time.sleep(0.001)


def _of_block(address: Any, rank: Any) -> Tensor:
    return wrap(int(raw(rank)) << 24 | int(raw(address)))


def _load_four(at: Tensor) -> Tensor:
    out = np.empty((at.a.size // 4, 4), np.float32)
    for four, address in zip(out, at.a.reshape(-1)[::4].tolist()):
        four[:] = current().cluster.blocks[address >> 24].memory.at(address & 0xFFFFFF, 4, 4)
    return Tensor(out.reshape(at.a.shape))


def _put_word(at: Any, value: Any) -> None:
    current().memory.at(int(raw(at)), 1, 4)[0] = raw(value)


def _multiply(a: Any, b: Any, sums: tuple[Any, ...], parts: int, columns: int, mma: Any) -> tuple[Pending, ...]:
    if len(sums) != parts or any(isinstance(p, Pending) and p in local.flight for p in sums):
        raise EmulationError("registers of sums in flight are given to others")
    memory, a, b = current().memory, int(raw(a)), int(raw(b))
    x = Shared(memory.at(a, 64 * 128).reshape(64, 128), float8e4nv)
    started = []
    for i in range(parts):
        y = memory.at(b + i * columns * 128, columns * 128).reshape(columns, 128)
        started.append(Pending(x, Shared(y.T, float8e4nv), None, float32))
    local.flight.extend(started)
    return tuple(started)


def _multiply_step(a: Any, b: Any, sums: tuple[Any, ...], parts: int, columns: int, mma: Any, goes_on: bool = False) -> tuple[Pending, ...]:
    """32 of K of boxes whose rows are of 128."""
    if len(sums) != parts or any(isinstance(p, Pending) and p in local.flight for p in sums):
        raise EmulationError("registers of sums in flight are given to others")
    memory = current().memory

    def rows(at: Any, count: int) -> np.ndarray:
        first = int(raw(at)) // 128 * 128
        return memory.at(first, count * 128).reshape(count, 128)[:, int(raw(at)) - first:][:, :32]

    y = rows(b, parts * columns).reshape(parts, columns, 32)
    started = [Pending(Shared(rows(a, 64), float8e4nv), Shared(part.T, float8e4nv), p if goes_on else None, float32) for part, p in zip(y, sums)]
    local.flight.extend(started)
    return tuple(started)


def _multiply_bf16(a: Any, b: Any, sums: tuple[Any, ...], parts: int, columns: int, mma: Any, turned: bool = False) -> tuple[Pending, ...]:
    """64 rows of 64 columns of A in BF16; turned: columns of 64 rows each."""
    memory, a, b = current().memory, int(raw(a)), int(raw(b))
    x = memory.at(a, 64 * 64, 2).reshape(64, 64)
    x = Shared(x.T if turned else x, bfloat16)
    started = [Pending(x, Shared(memory.at(b + i * columns * 128, columns * 64, 2).reshape(columns, 64).T, bfloat16), p, float32)
               for i, p in enumerate(sums)]
    local.flight.extend(started)
    return tuple(started)


def _wait_for(sums: tuple[Any, ...], pending: int, parts: int, columns: int) -> tuple[Any, ...]:
    done = warpgroup_mma_wait(pending * parts, deps=sums)
    return done if isinstance(done, tuple) else (done, )


def _wait_sums(sums: tuple[Any, ...], parts: int, columns: int) -> tuple[Any, ...]:
    done = warpgroup_mma_wait(0, deps=sums)
    return done if isinstance(done, tuple) else (done, )


def _put_rows(at: Tensor, values: Tensor) -> None:
    for address, value in zip(at.a.tolist(), values.a):
        current().memory.at(address, 1, 4)[0] = value


def _take_rows(at: Tensor) -> Tensor:
    return wrap(np.array([current().memory.at(address, 1, 4)[0] for address in at.a.tolist()], np.float32))


def _activated(gate: Tensor, up: Tensor, alpha: float, limit: float, clamped: int) -> Tensor:
    assert not clamped
    gate, up = (x.to(bfloat16).a for x in (gate, up))
    with np.errstate(over="ignore"):
        return Tensor(gate / (1 + np.exp(-alpha * gate)) * up, float32).to(bfloat16)


def _scales_of(most: Tensor, clamp: Any) -> tuple[Tensor, Tensor]:
    """Magnitudes are numbers here, not their bits."""
    scale = (np.maximum(most.a, np.float32(raw(clamp))) / 448).astype(np.float32)
    return wrap(scale), wrap(1 / scale)


def _pairs_of_e4m3(w: Tensor) -> tuple[Tensor, Tensor]:
    x = w.a.astype(np.int64)
    second = ((x << 1) & 0x80008000) | ((x >> 3) & 0x07000700) | ((x << 4) & 0x00F000F0)
    return wrap((x & 0x87F087F0).astype(np.uint32).view(np.int32)), wrap(second.astype(np.uint32).view(np.int32))


def _least_shift(top: Tensor, bottom: Tensor) -> Tensor:
    """What brings codes between 3 and 240, the upper end first."""
    down, up = np.maximum(top.a - 240, 0), np.minimum(bottom.a - 3, 0)
    return wrap(np.where(down > 0, down, np.maximum(up, top.a - 240)))


def _scaled_pair(pair: Tensor, scale: Tensor) -> Tensor:
    halves = ((pair.a.view(np.uint32)[..., None] >> np.array([0, 16], np.uint32)) << np.uint32(16)).view(np.float32) * scale.a[..., None]
    bits = np.ascontiguousarray(halves).view(np.uint32) >> 16
    return wrap((bits[..., 0] | bits[..., 1] << 16).view(np.int32))


def stand_ins(package: str) -> dict[str, types.ModuleType]:
    cluster = types.ModuleType(f"{package}.cluster_device")
    cluster.__dict__.update(
        rank=lambda: wrap(current().rank), start_of_shared=lambda: wrap(0), wait_all=_wait_all, init=_init,
        init_many=_init_many, wait=_wait, ready=_ready,
        arrive_all=lambda: None, join_all=lambda: _wait_all(2), STAGED=COLUMNS_FIRST, staged_at=lambda row, column, columns: column * 256 + row * 4,
        of_block=_of_block, load_four=_load_four, put_word=_put_word, word=lambda at: wrap(np.int32(current().memory.at(int(raw(at)), 1, 4)[0])),
         everywhere=lambda bar, blocks: bar, arrive=_arrive,
        arrive_once=lambda bar: _own(bar).update(arrivals=1),
        expect=lambda bar, size, *_: _own(bar).update(arrivals=1, tx=int(raw(size))), load=_load,
        load_box=lambda desc, kernel, parameter, at, bar, to: _load(desc, kernel, parameter, (*at, 0, 0), bar, to, 1),
        load_rows=lambda desc, kernel, parameter, at, bar, to: _load(desc, kernel, parameter, at, bar, to, 1))
    wgmma = types.ModuleType(f"{package}.wgmma_device")
    wgmma.__dict__.update(multiply=_multiply, multiply_step=_multiply_step, multiply_bf16=_multiply_bf16,
                          multiply_turned=lambda *given: _multiply_bf16(*given, turned=True),
                          multiply_part=lambda a, b, goes_on, sums, *rest: _multiply_step(a, b, sums, *rest, goes_on=bool(raw(goes_on))), wait=_wait_sums, wait_for=_wait_for, keep=lambda sums, parts, columns: sums)
    counters = types.ModuleType(f"{package}.counters_device")
    counters.__dict__.update(take=lambda p: atomic_add(p, 1), finish=lambda p: atomic_add(p, 1), await_count=_await_count)
    prep = types.ModuleType(f"{package}.narrow_prep_device")       # Triton's, not Gluon's
    prep.__dict__.update(least_shift=_least_shift, power_of_two=lambda e: wrap(np.exp2(np.clip(e.a, -149, 127).astype(np.float32))))
    expand = types.ModuleType(f"{package}.expand_device")
    expand.__dict__.update(pairs_of_e4m3=_pairs_of_e4m3, scaled_pair=_scaled_pair)
    rows = types.ModuleType(f"{package}.expand_rows_device")
    rows.__dict__.update(SHIFTED=0x5D1F7ED1)
    gated = types.ModuleType(f"{package}.fp8_gated_values_device")
    gated.__dict__.update(
        activated=_activated, magnitudes=lambda y: wrap(np.abs(y.a).max(1)), scales_of=_scales_of, put_rows=_put_rows, take_rows=_take_rows,
        narrowed=lambda y, inverse, dtype: Tensor(y.a * inverse.a[:, None], dtype), announce=lambda bar: _own(bar).update(arrivals=4))
    return {m.__name__: m for m in (cluster, wgmma, counters, prep, expand, rows, gated)}


def launch(kernel: Any, grid: int, blocks: int, partitions: int, *args: Any, seed: int = 0) -> None:
    """Every cluster of the grid, one after the other, as in `modules.launch`; its blocks at the same time. The first error is raised."""
    args = arguments(args)
    for c in range(grid)[:: -1 if seed % 2 else 1]:
        cluster = Cluster(blocks, partitions)
        cluster.blocks = [Block(seed * 1000 + c * blocks + r, cluster, r) for r in range(blocks)]

        def partition(block: Block, number: int, cluster: Cluster = cluster) -> None:
            start(block, (number, grid * blocks))
            try:
                kernel(*args)
            except BaseException as e:
                for other in cluster.blocks:
                    other.fail(e)

        threads = [threading.Thread(target=partition, args=(block, c * blocks + r), daemon=True) for r, block in enumerate(cluster.blocks)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(3 * Block.TIMEOUT)
        for block in cluster.blocks:
            block.end()
        for block in cluster.blocks:
            if block.failed:
                raise block.failed
