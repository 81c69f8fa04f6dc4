"""Timers on the CPU, and the arithmetic of the CUDA-graph one that needs no device."""

from __future__ import annotations

import time

import pytest
import torch

from narrowgemm.testing.timers import (
    BLOCK,
    GraphTimer,
    StreamRead,
    Timing,
    WallTimer,
    ceilings,
    make_timer,
    repeats_for,
)

CPU = torch.device("cpu")


def test_wall_timer_takes_callables_in_turn() -> None:
    order: list[str] = []
    times = WallTimer(rounds=3, target_us=1.0).measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")})
    assert order[-6:] == ["a", "b"] * 3
    assert set(times) == {"a", "b"} and all(t.repeats == 1 for t in times.values())


def test_wall_timer_is_in_microseconds() -> None:
    times = WallTimer(rounds=3).measure({"short": lambda: None, "long": lambda: time.sleep(0.02)})
    assert times["long"].us >= 19_000 and times["short"].us < times["long"].us / 10


def test_median_and_spread() -> None:
    t = Timing.of([10.0, 30.0, 11.0], 4)
    assert (t.us, t.repeats) == (11.0, 4) and t.spread == pytest.approx(20 / 11)
    assert Timing.of([0.0], 1).spread == 0.0


@pytest.mark.parametrize(("us", "want"), [(5.0, 32), (170.0, 32), (840.0, 8), (2000.0, 4), (1e6, 4)])
def test_launches_in_a_graph(us: float, want: int) -> None:
    assert repeats_for(us) == want


def test_streaming_read_keeps_one_buffer() -> None:
    stream = StreamRead(CPU)
    big = stream.call(1 << 20)
    small = stream.call(1 << 10)
    assert stream._data.numel() == 1 << 18
    assert int(big()) == int(stream._data.sum()) and int(small()) == int(stream._data[:256].sum())
    assert stream._data.unique().numel() > 1000


def test_ceilings_on_the_cpu() -> None:
    timer = make_timer(CPU, rounds=1)
    assert isinstance(timer, WallTimer)
    rates = ceilings(CPU, timer)
    assert set(rates) == {"read_gbs", "flops_16"} and all(v > 0 for v in rates.values())


def test_stream_kernel_reads_all_of_its_bytes(device: str) -> None:
    from narrowgemm.testing.stream_device import stream_kernel

    count = 2 * BLOCK + 100
    data = torch.randint(-1000, 1000, (count + 50,), dtype=torch.int32, device=device)
    sums = torch.zeros(3, dtype=torch.int32, device=device)
    stream_kernel[(3,)](data, sums, count, BLOCK=BLOCK)
    want = [int(data[i : min(i + BLOCK, count)].sum()) for i in range(0, count, BLOCK)]
    assert sums.tolist() == want


@pytest.mark.gpu
def test_graph_timer_orders_work_by_its_bytes() -> None:
    device = torch.device("cuda")
    timer, stream = GraphTimer(device, rounds=5), StreamRead(device)
    large = stream.call(1 << 30)
    times = timer.measure({"small": stream.call(1 << 26), "large": large})
    assert 8 < times["large"].us / times["small"].us < 20
    assert times["large"].us < (1 << 30) / 1e12 * 1e6
    # again, interleaved with itself: the same time
    twice = timer.measure({"one": large, "two": large})
    assert twice["one"].us == pytest.approx(twice["two"].us, rel=0.05)
