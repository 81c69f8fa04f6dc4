"""What a sweep says of the choices: suite by suite, the time of what is chosen over the best, and over the best portable."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..arch import Arch
from ..runtime import dispatch
from ..testing.cases import get_case
from .search import suites_of
from .space import PORTABLE, problem_of
from .sweep import Record, model_pick, name, timed

LIMIT = 1.03    # an untuned shape's choice may be so much slower than the portable kernel
Choice = Callable[[Record], str]


@dataclass(frozen=True)
class Line:
    """A suite: geometric mean and worst of choice / best, and of choice / best portable; more than 1 is slower."""

    suite: str
    cases: int
    mean: float
    worst: float
    worst_case: str
    portable_mean: float
    portable_worst: float
    portable_worst_case: str


def recorded(record: Record) -> str:
    """The cost model's pick when the sweep was made."""
    pick = model_pick(record)
    return name(pick) if pick else ""


def current(arch: Arch) -> Choice:
    """The choice of this version: its cost model and its tuned tables, on `arch`."""
    def choose(record: Record) -> str:
        plan = dispatch.select(problem_of(get_case(record["suite"], record["case"])), arch)
        return name({"kernel": plan.kernel, "config": plan.config.to_dict()})
    return choose


def summarise(suites: Iterable[str], records: Iterable[Record], choose: Choice) -> tuple[list[Line], list[str]]:
    """A line a suite, and what is wrong: cases without a figure, choices not measured, choices slower than portable."""
    records, suites = list(records), list(suites)
    problems, figures = [], {}
    for r in records:
        where = f"{r['suite']}/{r['case']}"
        field = timed(r)
        if r["error"] or not field:
            problems.append(f"{where}: {r['error'] or 'no candidate has a figure'}")
            continue
        label = choose(r)
        mine = next((c for c in field if name(c) == label), None)
        if mine is None:
            reason = next((c["error"] or "its rounds differ" for c in r["candidates"] if name(c) == label), "was not measured")
            problems.append(f"{where}: the choice, {label}, has no figure: {reason}")
            continue
        portable = next((c["us"] for c in field if c["backend"] == PORTABLE), None)
        figures[r["case"]] = (mine["us"] / field[0]["us"], mine["us"] / portable if portable else None)
        if portable and mine["us"] > LIMIT * portable:
            problems.append(f"{where}: {mine['us']:.1f} us with {label}, {mine['us'] / portable:.3f} of the portable kernel's "
                            f"{portable:.1f} us")
    lines = []
    for s in suites:
        ids = [r["case"] for r in records if r["case"] in figures and s in suites_of(r, (s,))]
        if ids:
            lines.append(_line(s, {i: figures[i] for i in ids}))
    return lines, problems


def _line(suite: str, figures: dict[str, tuple[float, float | None]]) -> Line:
    best = {i: f[0] for i, f in figures.items()}
    portable = {i: f[1] for i, f in figures.items() if f[1]}

    def of(values: dict[str, Any]) -> tuple[float, float, str]:
        if not values:
            return float("nan"), float("nan"), ""
        at = max(values, key=values.__getitem__)
        return statistics.geometric_mean(values.values()), values[at], at

    return Line(suite, len(figures), *of(best), *of(portable))


def text(lines: Iterable[Line]) -> list[str]:
    """A table. `/ best`: over the fastest candidate; `/ portable`: over the fastest portable one, less than 1 is faster."""
    out = [f"{'suite':24s} {'cases':>5s}  {'/ best':>7s} {'worst':>7s}  {'/ portable':>10s} {'worst':>7s}  worst cases"]
    for x in lines:
        portable = f"{x.portable_mean:10.3f} {x.portable_worst:7.3f}" if x.portable_worst_case else f"{'-':>10s} {'-':>7s}"
        out.append(f"{x.suite:24s} {x.cases:5d}  {x.mean:7.3f} {x.worst:7.3f}  {portable}  {x.worst_case}"
                   + (f", {x.portable_worst_case}" if x.portable_worst_case else ""))
    return out
