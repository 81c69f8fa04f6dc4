"""`deep_gemm.testing.bench`: its two timers. `narrowgemm bench` is the careful way: interleaved, on CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ....errors import expect

__all__ = ["bench", "bench_kineto"]

FLUSH_BYTES = 512 << 20  # more than any L2


def bench(fn: Callable[[], object], num_warmups: int = 5, num_tests: int = 10, high_precision: bool = False) -> float:
    """Mean seconds of a call of `fn`: CUDA events around `num_tests` calls in a row, or the wall clock without a GPU.

    `high_precision` puts a large product ahead, so that the calls are queued while it runs.
    """
    expect(num_tests >= 1, "num_tests", num_tests, "at least 1")
    for _ in range(num_warmups):
        fn()
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for _ in range(num_tests):
            fn()
        return (time.perf_counter() - start) / num_tests
    _flush()
    if high_precision:
        x = torch.randn((8192, 8192), device="cuda")
        x @ x
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(num_tests):
        fn()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / num_tests / 1e3


def bench_kineto(fn: Callable[[], object], kernel_names: str | tuple[str, ...], num_tests: int = 30,
                 suppress_kineto_output: bool = False, trace_path: str | None = None, flush_l2: bool = True,
                 with_multiple_kernels: bool = False,
                 barrier: Callable[[], object] | None = None) -> float | tuple[float, ...]:
    """Mean device seconds a call of `fn` in the kernels whose names hold `kernel_names`: one number, or one for each.

    DeepGEMM's kernel names are no names here: where none is found, the first gets the mean time of the whole call
    (CUDA events after an L2 flush; the wall clock without a GPU), the others 0. `trace_path`: write a Chrome trace.
    `suppress_kineto_output` and `with_multiple_kernels` have no effect: nothing is printed, kernels of one name add up.
    """
    names = (kernel_names,) if isinstance(kernel_names, str) else tuple(kernel_names)
    expect(num_tests >= 1, "num_tests", num_tests, "at least 1")
    fn()
    if torch.cuda.is_available():
        times = _profile(fn, names, num_tests, trace_path, flush_l2, barrier)
        if not any(times):
            times = [_events(fn, num_tests, flush_l2, barrier), *[0.0] * (len(names) - 1)]
    else:
        times = [bench(fn, 0, num_tests), *[0.0] * (len(names) - 1)]
    return times[0] if isinstance(kernel_names, str) else tuple(times)


def _flush() -> None:
    torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda").zero_()


def _before(flush_l2: bool, barrier: Callable[[], object] | None) -> None:
    if flush_l2:
        _flush()
    if barrier is not None:
        barrier()


def _profile(fn: Callable[[], object], names: tuple[str, ...], num_tests: int, trace_path: str | None, flush_l2: bool,
             barrier: Callable[[], object] | None) -> list[float]:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(num_tests):
            _before(flush_l2, barrier)
            fn()
        torch.cuda.synchronize()
    if trace_path is not None:
        profiler.export_chrome_trace(trace_path)
    events = profiler.key_averages()
    return [sum(e.self_device_time_total for e in events if name in e.key) / num_tests / 1e6 for name in names]


def _events(fn: Callable[[], object], num_tests: int, flush_l2: bool, barrier: Callable[[], object] | None) -> float:
    total = 0.0
    for _ in range(num_tests):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        _before(flush_l2, barrier)
        first.record()
        fn()
        last.record()
        last.synchronize()
        total += first.elapsed_time(last)
    return total / num_tests / 1e3
