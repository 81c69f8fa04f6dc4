"""Measures cases in a process of its own: `python -m narrowgemm.testing.worker`, a job on stdin, events on stdout.

A failed launch leaves a CUDA context unusable, so who asks for a measurement does not share its process: `runner.py`
starts one of these, and another where one died. Events are lines `MARK {json}`; anything else on stdout is noise of
some library. Events: `environment`, `ceilings`, `start` (of a case), `stage`, `row`, `done`, `late` (out of time).
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..arch import detect
from ..version import __version__
from . import inputs as products
from . import layer, step
from . import peers as peers_
from .case import Case
from .cases import get_case
from .inputs import Inputs, Weights
from .numerics import GateResult, decibel
from .results import make_row
from .timers import GraphTimer, StreamRead, Timing, WallTimer, ceilings, make_timer

MARK = "@narrowgemm"
STICKY = 75  # exit status: the device can't be used any more, the rest needs a new process
# What a case may raise and the next case survive. Anything else ends the process, and the runner writes the row.
FAILURES: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError,
                                         AssertionError, AttributeError, ImportError, OSError)
try:
    from triton.errors import TritonError  # compilation failed, out of shared memory

    FAILURES += (TritonError,)
except ImportError:
    pass


@dataclass
class Job:
    """What to measure.

    `cases`: (suite, id). `peers`: by suite. `skip`: peers that killed a process, by `suite/id`. `deadline`: time.time()
    after which no case starts. `warm`: compile only.
    """

    cases: list[tuple[str, str]]
    peers: dict[str, list[str]]
    backends: list[str]
    device: str
    seed: int = 0
    refcheck: bool = True
    scale_transform: bool = False
    rounds: int = 7
    deadline: float = 0.0
    warm: bool = False
    skip: dict[str, list[str]] = field(default_factory=dict)

    @property
    def scale_layout(self) -> str:
        return "row_major" if self.scale_transform else "mn_major"

    def peers_of(self, case: Case) -> list[str]:
        """Peers that owe a row on the case."""
        return [p for p in self.peers[case.suite] if peers_.computes(p, case)]


def build(case: Any, device: torch.device, seed: int, scale_layout: str, reuse: Any = None, hollow: bool = False) -> Any:
    """Inputs of a product, of a whole layer or of a training step."""
    if isinstance(case, layer.LayerCase):
        return layer.build(case, device, seed, reuse, hollow)
    if isinstance(case, step.StepCase):
        return step.build(case, device, seed, reuse, hollow)
    return products.build(case, device, seed, scale_layout, reuse, hollow)


def check_outputs(inputs: Any, outputs: Any) -> dict[str, GateResult]:
    """Gates of results of a case of any kind, as `inputs.check_outputs`."""
    made = layer if isinstance(inputs, layer.LayerInputs) else step if isinstance(inputs, step.StepInputs) else products
    return made.check_outputs(inputs, outputs)


def gate_limits(case: Any) -> dict[str, float]:
    """The limits that a result of ours has to keep, of a case of any kind."""
    if isinstance(case, step.StepCase):
        return {"recipe": step.RECIPE_GATE}
    return {"kernel": layer.GATE[case.a.element]} if isinstance(case, layer.LayerCase) else products.gate_limits(case)


def emit(event: str, **values: Any) -> None:
    # a leading newline: a library may have left an unfinished line
    sys.stdout.write(f"\n{MARK} {json.dumps({'event': event, **values})}\n")
    sys.stdout.flush()


def failure(e: BaseException) -> str:
    """One line: the kind of error and where its text begins."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"


def own(asked: str) -> str:
    """How our own call is named beside the peers'."""
    return f"ours:{asked}"


class DeviceLost(Exception):
    """The device does not answer after a failed launch."""


class Station:
    """What one process measures with: the device, its timer, and the weights of the last case."""

    def __init__(self, device: str, rounds: int) -> None:
        self.device = torch.device(device)
        self.timer: GraphTimer | WallTimer = make_timer(self.device, rounds)
        self.weights: Weights | None = None

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def attempt(self, step: Callable[[], Any]) -> tuple[Any, str]:
        """(result, '') or (None, what went wrong). DeviceLost where nothing can run any more."""
        try:
            out = step()
            self.sync()
            return out, ""
        except FAILURES as e:
            text = failure(e)
            if isinstance(e, torch.OutOfMemoryError):
                self.weights = None
                torch.cuda.empty_cache()
            try:
                self.sync()
            except RuntimeError as lost:
                raise DeviceLost(text) from lost
            return None, text


class Bench(Station):
    """A station with the streaming read, the ceilings, and what is asked for."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.device, job.rounds)
        self.job = job
        self.stream = StreamRead(self.device)
        self.rates = ceilings(self.device, self.timer)

    def run(self, case: Case) -> None:
        """Measure one case. Every row that it owes is emitted, where the device is lost too: DeviceLost comes after."""
        this = Measurement(self, case)
        try:
            this.measure()
        except DeviceLost as lost:
            this.errors.setdefault("", f"device lost: {lost}")
            this.emit_rows()
            raise
        if this.inputs is not None:
            self.weights = this.inputs.weights
        this.emit_rows()


class Measurement:
    """One case on its way: calls and outputs by name (`ours:<backend>`, a peer), and what went wrong with which."""

    def __init__(self, bench: Bench, case: Case) -> None:
        self.bench, self.job, self.case = bench, bench.job, case
        self.peers = bench.job.peers_of(case)
        self.inputs: Inputs | None = None
        self.errors: dict[str, str] = {}  # '' is an error of the whole case
        self.calls: dict[str, Callable[[], object]] = {}
        self.outputs: dict[str, Any] = {}
        self.plans: dict[str, Any] = {}
        self.gates: dict[str, GateResult] = {}
        self.times: dict[str, Timing] = {}

    def attempt(self, stage: str, step: Callable[[], Any], blame: str) -> Any:
        """A stage that may fail: its result, None where it did, which `errors[blame]` then has. Raises DeviceLost."""
        emit("stage", stage=stage)
        try:
            out, error = self.bench.attempt(step)
        except DeviceLost as lost:
            self.errors[blame] = f"device lost: {lost}"
            raise
        if error:
            self.errors[blame] = error
        return out

    def measure(self) -> None:
        """Run ours and the peers once, hold them to the gates, and time those that are right."""
        job, case, bench = self.job, self.case, self.bench
        inputs = self.inputs = self.attempt(
            "build", lambda: build(case, bench.device, job.seed, job.scale_layout, bench.weights), "")
        if inputs is None:
            return
        for asked in job.backends:
            self.attempt(own(asked), partial(self.ours, inputs, asked), own(asked))
        for peer in self.peers:
            if peer in job.skip.get(f"{case.suite}/{case.id}", ()):
                self.errors[peer] = "the process died in this peer"
            elif peer != peers_.FLOOR:
                self.attempt(f"peer:{peer}", partial(self.peer, inputs, peer), peer)
        if job.refcheck and self.outputs:
            self.gates = self.attempt("check", lambda: check_outputs(inputs, self.outputs), "") or {}
            self.errors |= {name: result.message for name, result in self.gates.items() if not result.ok}
        self.outputs.clear()
        if peers_.FLOOR in self.peers:
            self.calls[peers_.FLOOR] = bench.stream.call(case.bytes)
        self.time()

    def ours(self, inputs: Inputs, asked: str) -> None:
        """Our call, through `inputs` that are poisoned first; AssertionError where it wrote what it must not."""
        backend = None if asked == "auto" else asked
        self.plans[asked] = inputs.plan(backend=backend)
        inputs.reset_out()
        inputs.call(backend=backend)
        self.bench.sync()
        if bad := inputs.faults():
            raise AssertionError("; ".join(bad))
        y = inputs.out.tensor if len(self.job.backends) == 1 else inputs.out.tensor.clone()
        self.outputs[own(asked)] = (lambda g: inputs.rows(y, g), gate_limits(inputs.case))
        self.calls[own(asked)] = lambda: inputs.call(backend=backend)

    def peer(self, inputs: Inputs, peer: str) -> None:
        """A peer's call, as its adapter prepares it. ImportError where the peer isn't here."""
        adapter = peers_.get_peer(peer)
        if reason := adapter.available(self.bench.device):
            raise ImportError(reason)
        prepared = adapter.prepare(self.case, inputs)
        prepared.run()
        if prepared.rows is not None:
            self.outputs[peer] = (prepared.rows, {prepared.gate: prepared.limit})
        self.calls[peer] = prepared.run

    def time(self) -> None:
        """Everything in one interleaved measurement; where that fails, without those that can't be measured alone."""
        emit("stage", stage="timing")
        bench = self.bench
        times, error = bench.attempt(lambda: bench.timer.measure(self.calls))
        if error:
            for name in list(self.calls):
                _, error = bench.attempt(partial(bench.timer.measure, {name: self.calls[name]}))
                if error:
                    self.errors[name] = f"timing: {error}"
                    del self.calls[name]
            times, error = bench.attempt(lambda: bench.timer.measure(self.calls))
            self.errors |= {name: f"timing: {error}" for name in self.calls if error}
        self.times = times or {}
        self.calls.clear()

    # ---- rows ------------------------------------------------------------------------------------------------------

    def emit_rows(self) -> None:
        """A row for each of our backends and each peer, with an error where there are no figures."""
        for asked in self.job.backends:
            mine = self.own_values(asked)
            for peer in (*self.peers,) or (None,):
                emit("row", row=make_row(self.case, asked, peer, **self.peer_values(mine, peer)))

    def own_values(self, asked: str) -> dict[str, Any]:
        """The columns of a row that are ours."""
        case, name = self.case, own(asked)
        # what happened to this call itself says more than that the device was lost later
        values: dict[str, Any] = {"error": self.errors.get(name) or self.errors.get("")}
        if (plan := self.plans.get(asked)) is not None:
            values |= {"backend": plan.backend, "config": str(plan.config)}
        if name in self.gates:
            columns = {"kernel": ("calc_diff", "snr_db"), "recipe": ("recipe_diff", "recipe_snr_db")}
            for g in self.gates[name].gates:
                diff, snr = columns[g.name]
                worst = max(g.overall, g.worst)
                values |= {diff: float(f"{worst:.4g}"), snr: round(decibel(worst), 2)}
        if name in self.times and self.times[name].us > 0:
            t = self.times[name]
            values |= {"us": round(t.us, 3), "tflops": float(f"{case.flops / t.us * 1e-6:.5g}"),
                       "gbs": float(f"{case.bytes / t.us * 1e-3:.5g}"),
                       "note": f"spread {t.spread:.1%}, {t.repeats} launches a round"}
        elif not values["error"]:
            values["error"] = "no time could be measured"
        return values

    def peer_values(self, mine: dict[str, Any], peer: str | None) -> dict[str, Any]:
        """Our columns with the peer's beside; its error only where we have none."""
        out = dict(mine)
        if peer is None:
            return out
        if peer in self.times:
            us = self.times[peer].us
            if peer == peers_.FLOOR:
                us, bound = self.floor(us)
                out["note"] = f"{mine.get('note', '')}; floor by {bound}"
            out["peer_us"] = round(us, 3)
            if mine.get("us") and mine["error"] is None and peer not in self.errors:
                out["ratio"] = round(us / mine["us"], 4)
        if peer in self.gates:
            worst = max(x for g in self.gates[peer].gates for x in (g.overall, g.worst))
            out["peer_calc_diff"] = float(f"{worst:.4g}")
        if mine["error"] is None and peer in self.errors:
            out["error"] = f"{peer}: {self.errors[peer]}"
        return out

    def floor(self, stream_us: float) -> tuple[float, str]:
        """The larger of the streaming read and the FLOPs over the measured ceiling, and which one it is."""
        rates, case = self.bench.rates, self.case
        narrow = case.a.elem.bits <= 8 and case.b.elem.bits <= 8
        math_us = case.flops / ((rates.get("flops_8", 0.0) if narrow else 0.0) or rates["flops_16"]) * 1e-6
        return (stream_us, "bytes") if stream_us >= math_us else (math_us, "FLOPs")


def environment(station: Station, peers: Iterable[str] = ()) -> dict[str, Any]:
    """Device and versions for a result's header. Peers are imported here, so that each has a version to name."""
    device = station.device
    versions = {"narrowgemm": __version__, "python": platform.python_version(), "torch": torch.__version__,
                "cuda": torch.version.cuda, "hip": torch.version.hip}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = None
    for p in dict.fromkeys(peers):
        if p in peers_.ADAPTERS and peers_.ADAPTERS[p].available(device) is None and peers_.version(p):
            versions[p] = peers_.version(p)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "arch": detect(device).name, "versions": versions, "timer": station.timer.describe()}


def warm(job: Job, case: Case) -> None:
    """Compile what the case needs, ours and the peers', on inputs without values. What fails shows when measured."""
    device = torch.device(job.device)
    inputs = build(case, device, job.seed, job.scale_layout, hollow=True)
    steps: dict[str, Callable[[], object]] = {
        own(x): partial(inputs.call, backend=None if x == "auto" else x) for x in job.backends}
    for p in job.peers_of(case):
        if p in peers_.ADAPTERS and peers_.ADAPTERS[p].available(device) is None:
            steps[p] = partial(_once, peers_.ADAPTERS[p], inputs)
    for name, once in steps.items():
        try:
            once()
        except FAILURES as e:
            emit("stage", stage=f"warm {name}: {failure(e)}")


def _once(peer: peers_.Peer, inputs: Inputs) -> None:
    if isinstance(peer, peers_.Compiled):
        peer.compile(inputs.case)
    else:
        peer.prepare(inputs.case, inputs).run()


def main() -> int:
    """The process: a Job on standard input, events on standard output. STICKY where the device was lost."""
    job = Job(**json.load(sys.stdin))
    bench = None if job.warm else Bench(job)
    if bench is not None:
        emit("environment", **environment(bench, (p for names in job.peers.values() for p in names)))
        emit("ceilings", ceilings={k: float(f"{v:.5g}") for k, v in bench.rates.items()})
    for suite, i in job.cases:
        if job.deadline and time.time() > job.deadline:
            emit("late")
            return 0
        case = get_case(suite, i)
        emit("start", case=[suite, i])
        try:
            if bench is None:
                warm(job, case)
            else:
                bench.run(case)
        except DeviceLost:
            emit("done", case=[suite, i])
            return STICKY
        emit("done", case=[suite, i])
    return 0


if __name__ == "__main__":
    sys.exit(main())
