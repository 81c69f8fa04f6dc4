"""The Hopper decode kernel behind a launch that may still be at it: what that brings is touched by no thread that hasn't waited for it,
and the launch behind is let start by none of these either."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from .. import _gluon as emu
from .test_gluon_sm90_decode import Case, offsets, tile


@pytest.fixture(scope="module")
def device():
    return emu.load_device_module("fp8_decode_device")


class Front:
    """The launch in front: who has waited for it, and what it brings: all but weights, and `sizes` of groups where it is two in front."""

    def __init__(self, case: Case, sizes: int) -> None:
        self.case, self.sizes, self.waited, self.early, self.let = case, sizes, threading.local(), 0, 0

    def wait(self) -> None:
        self.waited.done = True

    def let_start(self) -> None:
        if not getattr(self.waited, "done", False):
            raise emu.EmulationError("the launch behind may start before the one in front is over")
        self.let += 1

    def touch(self, memory: np.ndarray, what: str) -> None:
        front = self.case.problem.front
        if not front or getattr(self.waited, "done", False):
            return
        self.early += 1
        known = front == "tokens" and memory.dtype == np.int64 and memory.size == self.sizes + 1
        if not known and not any(np.shares_memory(memory, w) for w in (self.case.b, self.case.sb)):
            raise emu.EmulationError(f"{what} of what the launch in front brings, before it is there")


CONFIGS = {"guess": tile(16, 64, stages=5, guess=3), "widths": tile(64, 64, narrow=8, trip=2, guess=2), "cut": tile(8, 64, split=4, trip=4),
           "consumers": tile(128, 128, 8, stages=4, narrow=8, middle=32), "stream": tile(32, 64, stages=4, narrow=8, stream=1),
           "stream, rows": tile(64, 64, stages=3, stream=1, trip=2), "stream, cut": tile(8, 64, split=2, stages=9, stream=1),
           "boxes": tile(16, 64, stages=2, narrow=8, box=2, ahead=8, guess=1, trip=4),
           "stream, boxes": tile(16, 64, stages=2, narrow=8, box=2, ahead=8, trip=4, stream=1)}


@pytest.mark.parametrize("front", ["tokens", "sizes"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("sizes", "grid"), [((3, 0, 70, 20, 9), 3), ((0, 1, 0, 2), 7)])
def test_waits_for_what_is_brought(device, monkeypatch, config, front: str, sizes: tuple[int, ...], grid: int) -> None:
    case = Case("offsets", max(sum(sizes), 4), 72, 6, len(sizes), offsets(*sizes))
    case.problem = replace(case.problem, front=front)
    seen = Front(case, len(sizes))

    class Pointer(emu.Pointer):
        def __add__(self, other: Any) -> Pointer:
            return Pointer(self.memory, self.offset + np.asarray(emu.raw(other), np.int64), self.element)

        __radd__ = __add__

        def checked(self, mask: np.ndarray, what: str) -> np.ndarray:
            seen.touch(self.memory, what)
            return super().checked(mask, what)

    class Descriptor(emu.Descriptor):
        def windows(self, at: list[Any]) -> Any:
            seen.touch(self.a, "copy")
            return super().windows(at)

    monkeypatch.setattr(emu, "Pointer", Pointer)
    monkeypatch.setattr(emu, "Descriptor", Descriptor)
    monkeypatch.setitem(device.sizes_there.__globals__, "gdc_wait", seen.wait)
    monkeypatch.setitem(device.sizes_there.__globals__, "gdc_launch_dependents", seen.let_start)
    case.check(device, config, grid)
    assert seen.let > 0
    if front == "tokens" and sum(sizes):
        assert seen.early > 0, "nothing is asked for while tokens are brought"



@pytest.mark.parametrize("config", [c for name, c in CONFIGS.items() if name.startswith("stream")])
@pytest.mark.parametrize("case", [Case("masked", 40, 72, 4, 4, [40, 0, 3, 17]), Case("psum", 96, 72, 4, 3, [5, 48, 90], alignment=16)],
                         ids=lambda c: c.layout)
def test_weights_that_pass_through(device, case: Case, config) -> None:
    """Asked for by PTX, beside tokens that are not, in one ring."""
    case.check(device, config)
