"""Measures every candidate of a case in a process of its own: `python -m narrowgemm.tuning.measure`, a job on stdin.

Events as of `testing.worker`: `environment`, `start`, `stage`, `lost` (the device, with the reason), `measured` (the
record of a case), `late`. What a candidate does wrong stands in its own entry of the record, as `error`.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..arch import detect
from ..problem import Config, Problem
from ..testing.case import Case
from ..testing.cases import get_case
from ..testing.inputs import Inputs, build, check_outputs, gate_limits
from ..testing.numerics import GateResult
from ..testing.timers import Timing
from ..testing.worker import FAILURES, STICKY, DeviceLost, Station, emit, environment, failure
from . import store, vllm
from .fingerprint import fingerprint
from .space import PORTABLE, Candidate, candidates, choice, pick, problem_of, promising, versus_portable

QUICK_ROUNDS = 2
KEPT_BYTES = 8 << 30    # of results that wait for the gates
TRY, TIME = "try ", "time "
Record = dict[str, Any]


@dataclass
class Job:
    """What to measure.

    `cases`: (suite, id). `kernels`: patterns, none for all. `finalists`: candidates that are timed by all rounds.
    `deadline`: time.time() after which no case starts. `skip`: what killed a process, by `suite/id`: label -> reason.
    `careful`: cases that killed one nobody knows where: each candidate is timed alone first. `share`: (i, of) to compile
    ahead the i-th part of the candidates, nothing measured. `portable`: only what a call gets, and so many portable
    candidates, the most promising by their cost model; 0 for every candidate. `within`: only candidates predicted to take at most
    so many times what the fastest one is; 0 for every one. `also`: more configs for the portable FP8 kernel,
    as `Config.to_dict` has them.
    """

    cases: list[tuple[str, str]]
    device: str
    kernels: list[str] = field(default_factory=list)
    seed: int = 0
    rounds: int = 7
    finalists: int = 4
    deadline: float = 0.0
    skip: dict[str, dict[str, str]] = field(default_factory=dict)
    careful: list[str] = field(default_factory=list)
    share: tuple[int, int] | None = None
    portable: int = 0
    within: float = 0.0
    also: list[dict[str, Any]] = field(default_factory=list)

    def candidates(self, problem: Problem) -> list[Candidate]:
        arch = detect(torch.device(self.device))
        found = promising(candidates(problem, arch, self.kernels), self.within)
        found += vllm.candidates(problem, arch, map(Config.from_dict, self.also), found)
        return versus_portable(found, choice(problem, arch), self.portable) if self.portable and found else found


class Entry:
    """A candidate on its way."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate, self.error = candidate, ""
        self.diffs: dict[str, float] = {}
        self.timing: Timing | None = None
        self.rounds = 0

    def to_dict(self) -> dict[str, Any]:
        c, t = self.candidate, self.timing
        return {"kernel": c.kernel, "backend": c.backend, "config": c.config.to_dict(),
                "predicted_us": round(c.predicted_us, 3), "us": round(t.us, 3) if t and not self.error else None,
                "spread": round(t.spread, 4) if t else None, "rounds": self.rounds, **self.diffs,
                "error": self.error or None}


class Trial:
    """One case: every candidate through both gates, then timed."""

    def __init__(self, station: Station, job: Job, case: Case) -> None:
        self.station, self.job, self.case = station, job, case
        self.where = f"{case.suite}/{case.id}"
        self.entries: dict[str, Entry] = {}
        self.best_guess = ""
        self.inputs: Inputs | None = None
        self.outputs: dict[str, Tensor] = {}
        self.alike: dict[str, list[str]] = {}

    def run(self) -> Record:
        """Its record. DeviceLost where nothing can run any more, after `lost` was emitted."""
        emit("stage", stage="build")
        inputs, error = self.attempt(
            lambda: build(self.case, self.station.device, self.job.seed, reuse=self.station.weights))
        if inputs is None:
            return failed(self.case, error)
        self.inputs, self.station.weights = inputs, inputs.weights
        problem = problem_of_call(inputs)
        if problem is None:
            return failed(self.case, "nothing to compute: no rows")
        found = self.job.candidates(problem)
        if not found:
            return failed(self.case, "no kernel but the reference takes it", problem)
        self.entries = {c.label: Entry(c) for c in found}
        self.best_guess = pick(found).label
        for label, reason in self.job.skip.get(self.where, {}).items():
            if label in self.entries:
                self.entries[label].error = reason
        for label in self.able():
            self.launch(inputs, label)
        self.gate(inputs)
        self.time(inputs)
        made = {k: fingerprint(k) for k in sorted({c.kernel for c in found})}
        return {**described(self.case, problem), "error": None, "made": made,
                "candidates": [e.to_dict() for e in self.entries.values()]}

    def able(self) -> list[str]:
        return [label for label, e in self.entries.items() if not e.error]

    def attempt(self, step: Callable[[], Any]) -> tuple[Any, str]:
        try:
            return self.station.attempt(step)
        except DeviceLost as lost:
            emit("lost", reason=f"device lost: {lost}")
            raise

    def call(self, inputs: Inputs, label: str) -> object:
        c = self.entries[label].candidate
        return inputs.call(backend=c.kernel, config=c.config)

    # ---- gates -----------------------------------------------------------------------------------------------------

    def launch(self, inputs: Inputs, label: str) -> None:
        """Run a candidate once, into poison; keep its result for the gates, unless one with the same bits waits."""
        emit("stage", stage=TRY + label)
        _, error = self.attempt(partial(self._launch, inputs, label))
        self.entries[label].error = error
        if error:
            return
        y = inputs.out.tensor
        twin = next((other for other, x in self.outputs.items() if same_bits(x, y)), None)
        if twin is not None:
            self.alike[twin].append(label)
            return
        if sum(x.nbytes for x in self.outputs.values()) + y.nbytes > KEPT_BYTES:
            self.gate(inputs)
        self.outputs[label], self.alike[label] = y.clone(), [label]

    def _launch(self, inputs: Inputs, label: str) -> None:
        inputs.reset_out()
        self.call(inputs, label)
        self.station.sync()
        if bad := inputs.faults():
            raise AssertionError("; ".join(bad))

    def gate(self, inputs: Inputs) -> None:
        """Both gates for every result that waits."""
        if not self.outputs:
            return
        emit("stage", stage="check")
        limits = gate_limits(self.case)
        waiting = {label: (partial(inputs.rows, y), limits) for label, y in self.outputs.items()}
        results, error = self.attempt(lambda: check_outputs(inputs, waiting))
        for label, members in self.alike.items():
            for member in members:
                self._judge(self.entries[member], (results or {}).get(label), error)
        self.outputs.clear()
        self.alike.clear()

    @staticmethod
    def _judge(entry: Entry, result: GateResult | None, error: str) -> None:
        if result is None:
            entry.error = f"gates could not be evaluated: {error}"
            return
        column = {"kernel": "calc_diff", "recipe": "recipe_diff"}
        entry.diffs = {column[g.name]: float(f"{max(g.overall, g.worst):.4g}") for g in result.gates}
        entry.error = "" if result.ok else result.message

    # ---- time ------------------------------------------------------------------------------------------------------

    def time(self, inputs: Inputs) -> None:
        """Two interleaved measurements: a quick one of all, then the finalists by all rounds."""
        calls = {label: partial(self.call, inputs, label) for label in self.able()}
        if self.where in self.job.careful:
            self._time_alone(calls)
        self._time(calls, min(QUICK_ROUNDS, self.job.rounds))
        if len(calls) > 1 and self.job.rounds > QUICK_ROUNDS:
            self._time({label: calls[label] for label in self.finalists() if label in calls}, self.job.rounds)

    def finalists(self) -> list[str]:
        """The fastest, with the cost model's pick and the fastest portable one among them: they are what is compared."""
        timed = sorted((e.timing.us, label) for label, e in self.entries.items() if e.timing and not e.error)
        order = [label for _, label in timed]
        portable = [x for x in order if self.entries[x].candidate.backend == PORTABLE]
        mine = [self.best_guess] if self.best_guess in order else []
        return list(dict.fromkeys([*order[: max(2, self.job.finalists)], *mine, *portable[:1]]))

    def _time(self, calls: Mapping[str, Callable[[], object]], rounds: int) -> None:
        if not calls:
            return
        emit("stage", stage="timing")
        times, error = self.attempt(lambda: self.station.timer.measure(calls, rounds))
        if error:
            self._time_alone(calls)
            left = {label: fn for label, fn in calls.items() if not self.entries[label].error}
            times, error = self.attempt(lambda: self.station.timer.measure(left, rounds)) if left else ({}, "")
        for label in calls:
            entry = self.entries[label]
            if times and label in times and times[label].us > 0:
                entry.timing, entry.rounds = times[label], rounds
            else:
                entry.error = entry.error or f"timing: {error or 'no time could be measured'}"

    def _time_alone(self, calls: Mapping[str, Callable[[], object]]) -> None:
        """Find what can't be captured, or kills the process: each by itself, once."""
        for label, fn in calls.items():
            emit("stage", stage=TIME + label)
            _, error = self.attempt(partial(self.station.timer.measure, {label: fn}, 1))
            if error:
                self.entries[label].error = f"timing: {error}"


def same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def problem_of_call(inputs: Inputs) -> Problem | None:
    plan = inputs.plan()
    return plan.problem if plan is not None and inputs.case.rows else None


def described(case: Case, problem: Problem) -> Record:
    """What a record says of its case; `n`, `k`, `rows` are the key of a tuned table's row."""
    n, k, rows = store.key(problem)
    return {"suite": case.suite, "case": case.id, "table": store.table_name(problem), "n": n, "k": k, "rows": rows,
            "groups": case.groups, "m": problem.m}


def failed(case: Case, error: str, problem: Problem | None = None) -> Record:
    """The record of a case without figures."""
    what = described(case, problem) if problem else {"suite": case.suite, "case": case.id, "table": None}
    return {**what, "error": error, "candidates": []}


def compile_share(job: Job, case: Case) -> None:
    """Launch this process's share of the candidates on inputs without values; what fails shows when it is measured.

    A candidate of a layout belongs to the same share in every case: no two processes compile the same thing.
    """
    assert job.share is not None
    index, of = job.share
    found = job.candidates(problem_of(case)) if case.rows else []
    mine = [c for c in found if zlib.crc32(f"{case.layout} {c.label}".encode()) % of == index]
    inputs = build(case, job.device, job.seed, hollow=True) if mine else None
    for c in mine:
        assert inputs is not None
        emit("stage", stage=f"compile {c.label}")
        try:
            inputs.call(backend=c.kernel, config=c.config)
        except FAILURES as e:
            emit("stage", stage=f"compile {c.label}: {failure(e)}")


def main() -> int:
    job = Job(**json.load(sys.stdin))
    station = None if job.share else Station(job.device, job.rounds)
    if station is not None:
        emit("environment", **environment(station))
    for suite, name in job.cases:
        if job.deadline and time.time() > job.deadline:
            emit("late")
            return 0
        case = get_case(suite, name)
        emit("start", case=[suite, name])
        if station is None:
            try:
                compile_share(job, case)
            except FAILURES as e:
                emit("stage", stage=f"compile: {failure(e)}")
            if torch.device(job.device).type == "cuda":
                torch.cuda.empty_cache()  # the other processes need room, too
            emit("done", case=[suite, name])
            continue
        try:
            emit("measured", record=Trial(station, job, case).run())
        except DeviceLost:
            return STICKY
    return 0


if __name__ == "__main__":
    sys.exit(main())
