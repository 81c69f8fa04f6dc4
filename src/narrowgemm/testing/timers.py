"""Kernel time on a device, wall time on the CPU, and the floor: how long the same bytes take to be read.

CUDA: `(graph of R x [L2 flush, kernel] - graph of R x [L2 flush]) / R`, the median over rounds. Several callables are
measured in turn within each round, so that a chip that clocks down does so for all of them: compare ratios from one
`measure`, not microseconds from two.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLUSH_BYTES = 256 << 20
ROUNDS = 7
BLOCK = 8192


@dataclass(frozen=True, slots=True)
class Timing:
    """`us`: median over rounds; `spread`: (largest - smallest) / median; `repeats`: launches a round."""

    us: float
    spread: float
    repeats: int

    @staticmethod
    def of(samples: list[float], repeats: int) -> Timing:
        us = statistics.median(samples)
        return Timing(us, (max(samples) - min(samples)) / us if us > 0 else 0.0, repeats)


class GraphTimer:
    """CUDA-graph timer of one device. `measure` captures: what it times must not synchronise."""

    name = "cuda-graph"

    def __init__(self, device: torch.device, flush_bytes: int = FLUSH_BYTES, rounds: int = ROUNDS) -> None:
        self.device, self.rounds = device, rounds
        self.flush_bytes = flush_bytes
        self._flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device)
        self._empty: dict[int, torch.cuda.CUDAGraph] = {}

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "flush_bytes": self.flush_bytes, "rounds": self.rounds, "statistic": "median",
                "formula": "(graph of R x [L2 flush, kernel] - graph of R x [L2 flush]) / R, callables interleaved"}

    def flush(self) -> None:
        self._flush.zero_()

    def measure(self, calls: Mapping[str, Callable[[], object]], rounds: int = 0) -> dict[str, Timing]:
        """Time every callable, in microseconds a call. All are warmed up and captured first, then replayed in turn.

        `rounds`: instead of the timer's own number.
        """
        with torch.cuda.device(self.device):
            graphs = {name: self._capture(fn) for name, fn in calls.items()}
            for graph, repeats in graphs.values():   # a first round brings clocks and caches to where they stay
                self._replay(self._empty_graph(repeats))
                self._replay(graph)
            samples: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(rounds or self.rounds):
                for name, (graph, repeats) in graphs.items():
                    idle = self._replay(self._empty_graph(repeats))
                    samples[name].append(max(0.0, self._replay(graph) - idle) / repeats)
            return {name: Timing.of(s, graphs[name][1]) for name, s in samples.items()}

    def _capture(self, fn: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, int]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            fn()
            self._stream.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(3):
                fn()
            end.record()
            self._stream.synchronize()
            repeats = repeats_for(start.elapsed_time(end) * 1e3 / 3)
        torch.cuda.current_stream().wait_stream(self._stream)
        return self._graph(fn, repeats), repeats

    def _graph(self, fn: Callable[[], object] | None, repeats: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            for _ in range(repeats):
                self.flush()
                if fn is not None:
                    fn()
        return graph

    def _empty_graph(self, repeats: int) -> torch.cuda.CUDAGraph:
        if repeats not in self._empty:
            self._empty[repeats] = self._graph(None, repeats)
        return self._empty[repeats]

    def _replay(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


def repeats_for(us: float) -> int:
    """Launches in one graph: about 8 ms of work with its flushes, between 4 and 32."""
    return max(4, min(32, int(8000 / (us + 80))))


class WallTimer:
    """Wall clock, for callables that run on the CPU."""

    name = "wall"

    def __init__(self, rounds: int = ROUNDS, target_us: float = 2000.0) -> None:
        self.rounds, self.target_us = rounds, target_us

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "rounds": self.rounds, "statistic": "median",
                "formula": "wall clock, callables interleaved"}

    def measure(self, calls: Mapping[str, Callable[[], object]], rounds: int = 0) -> dict[str, Timing]:
        """Time every callable, in microseconds a call, in turn within each round; `rounds` as in `GraphTimer`."""
        repeats = {}
        for name, fn in calls.items():
            fn()
            repeats[name] = max(1, min(100, int(self.target_us / max(self._time(fn, 1), 1.0))))
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds or self.rounds):
            for name, fn in calls.items():
                samples[name].append(self._time(fn, repeats[name]))
        return {name: Timing.of(s, repeats[name]) for name, s in samples.items()}

    def _time(self, fn: Callable[[], object], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            fn()
        return (time.perf_counter() - start) * 1e6 / repeats


def make_timer(device: torch.device, rounds: int = ROUNDS) -> GraphTimer | WallTimer:
    """The timer of a device."""
    return GraphTimer(device, rounds=rounds) if device.type == "cuda" else WallTimer(rounds)


class StreamRead:
    """Callables that read a number of bytes once, as fast as the device can: the memory floor, in the same timer.

    One buffer serves every size up to the largest asked for. It holds random bits: zeros can be read faster than data.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._data = torch.empty(0, dtype=torch.int32, device=device)
        self._sums = self._data

    def call(self, nbytes: float) -> Callable[[], object]:
        count = max(1, int(nbytes) // 4)
        if self._data.numel() < count:
            self._data = self._sums = self._data[:0].clone()  # the old one goes before the larger one comes
            self._data = torch.empty(count, dtype=torch.int32, device=self.device).random_()
            self._sums = torch.empty(-(-count // BLOCK), dtype=torch.int32, device=self.device)
        data, sums = self._data, self._sums
        if self.device.type != "cuda":
            view = data[:count]
            return lambda: view.sum()
        return lambda: _stream(data, sums, count)


def _stream(data: Tensor, sums: Tensor, count: int) -> None:
    from .stream_device import stream_kernel

    stream_kernel[(-(-count // BLOCK),)](data, sums, count, BLOCK=BLOCK, num_warps=8)


def ceilings(device: torch.device, timer: GraphTimer | WallTimer) -> dict[str, float]:
    """What the device does at best here and now: `read_gbs`, and TFLOPS of torch's own products by operand bits.

    `flops_8` is absent where torch has no FP8 product for the device.
    """
    cuda = device.type == "cuda"
    nbytes, size = (1 << 30, 8192) if cuda else (32 << 20, 512)
    calls: dict[str, Callable[[], object]] = {"read": StreamRead(device).call(nbytes)}
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty(size, size, dtype=torch.bfloat16, device=device)
    calls["flops_16"] = lambda: torch.mm(a, b.mT, out=out)
    if cuda and has_fp8(device):
        one = torch.ones((), device=device)
        x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        calls["flops_8"] = lambda: torch._scaled_mm(x, y.mT, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    times = timer.measure(calls)
    rates = {name: 2e-6 * size**3 / t.us for name, t in times.items() if name != "read"}
    return {"read_gbs": nbytes / times["read"].us * 1e-3, **rates}


def has_fp8(device: torch.device) -> bool:
    """Whether torch's own scaled FP8 product runs there: NVIDIA from compute capability 8.9, AMD from gfx942."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.startswith(("gfx94", "gfx95"))
    return torch.cuda.get_device_capability(device) >= (8, 9)
