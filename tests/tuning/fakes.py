"""Kernels that compute by the reference and a timer that says what it is told: choices are tested, not arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from narrowgemm.kernels import torch_reference
from narrowgemm.kernels.registry import kernels
from narrowgemm.problem import Config
from narrowgemm.runtime import dispatch
from narrowgemm.testing.timers import Timing
from narrowgemm.testing.worker import Station

SMALL, LARGE, SPLIT = Config(16), Config(32), Config(16, split_k=2)

QUANTISE = SimpleNamespace(**{
    **{k: getattr(torch_reference, k) for k in ("NAME", "BACKEND", "configs", "workspace", "estimate", "launch")},
    "supports": lambda problem, arch: None if problem.op == "quantize" else "no"})


def kernel(name: str, predicted: Mapping[Config, float], backend: str = "fake",
           spoil: Callable[[Config, torch.Tensor], None] | None = None) -> SimpleNamespace:
    """A kernel of the configs in `predicted`, with their predicted microseconds. `spoil` is done to its output."""
    def launch(step: Any, problem: Any, operands: Any, workspace: Any) -> None:
        torch_reference.launch(step, problem, operands, workspace)
        if spoil:
            spoil(step.config, operands.out)

    return SimpleNamespace(
        NAME=name, BACKEND=backend, supports=lambda problem, arch: "no" if problem.op == "quantize" else None, configs=lambda problem, arch: list(predicted),
        workspace=lambda problem, config: 0, estimate=lambda problem, config, arch: predicted[config] * 1e-6, launch=launch)


def install(monkeypatch: Any, *fakes: SimpleNamespace) -> None:
    """Make these the only kernels for products; the reference still quantises. Undone with `monkeypatch`."""
    for name in list(kernels()):
        monkeypatch.delitem(kernels(), name)
    for fake in (*fakes, QUANTISE):
        monkeypatch.setitem(kernels(), fake.NAME, fake)
    dispatch._select.cache_clear()


class FakeTimer:
    """Times by label; what is not in `us` can't be timed. `asked`: labels and rounds of each measurement."""

    name = "fake"

    def __init__(self, us: Mapping[str, float]) -> None:
        self.us, self.asked = us, []

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}

    def measure(self, calls: Mapping[str, Callable[[], object]], rounds: int = 0) -> dict[str, Timing]:
        self.asked.append((list(calls), rounds))
        for label, fn in calls.items():
            fn()
            if label not in self.us:
                raise RuntimeError(f"{label} can't be captured")
        return {label: Timing(self.us[label], 0.01, 4) for label in calls}


def station(us: Mapping[str, float]) -> Station:
    out = Station("cpu", 1)
    out.timer = FakeTimer(us)  # type: ignore[assignment]
    return out


def candidate(name: str, us: float | None, predicted: float, config: Config = SMALL, backend: str = "fake",
              error: str | None = None) -> dict[str, Any]:
    return {"kernel": name, "backend": backend, "config": config.to_dict(), "predicted_us": predicted, "us": us,
            "spread": 0.0, "rounds": 7, "calc_diff": 1e-6, "recipe_diff": 1e-4, "error": error}


def record(case: str, *candidates: dict[str, Any], suite: str = "cpu-small", key: tuple[int, int, int] = (128, 256, 64),
           table: str = "gemm-dense-fp8_1x128-fp8_128x128.json", error: str | None = None) -> dict[str, Any]:
    n, k, rows = key
    return {"suite": suite, "case": case, "table": table, "n": n, "k": k, "rows": rows, "groups": 1, "m": rows,
            "error": error, "candidates": list(candidates)}
