"""Runs cases in worker processes, and answers for every row: what a dead or late worker owes comes with the reason."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from .case import Case
from .cases import get_case
from .results import Row, make_row
from .worker import MARK, STICKY, Job

Event = dict[str, Any]
LATE = "not measured: the time that was given is over"


def owed(case: Case, job: Job, error: str | None = None) -> list[Row]:
    """The rows of a case, without figures."""
    peers: list[str | None] = [*job.peers_of(case)]
    return [make_row(case, asked, peer, error=error) for asked in job.backends for peer in peers or [None]]


def run(job: Job, *, timeout: float = 300.0) -> Iterator[Event]:
    """Measure `job.cases`: the worker's events as they come, and `row` / `done` events for what it owes.

    A worker that dies, or says nothing for `timeout` seconds, costs the case it was at (or only the peer that it was
    in); another one takes the rest.
    """
    left = list(job.cases)
    skip = {k: list(v) for k, v in job.skip.items()}
    while left:
        current: tuple[str, str] | None = None
        stage = ""
        have: set[tuple[str, str | None]] = set()
        worker = Worker(replace(job, cases=list(left), skip=skip), timeout)
        for event in worker.events():
            kind = event["event"]
            if kind == "late":
                yield from _answer_all(left, job, LATE)
                return
            if kind == "start":
                current, stage, have = (event["case"][0], event["case"][1]), "", set()
            elif kind == "stage":
                stage = event["stage"]
            elif kind == "row":
                have.add((event["row"]["asked"], event["row"]["peer"]))
            yield event
            if kind == "done":
                left.remove((event["case"][0], event["case"][1]))
                current = None
        if current is None:
            if left and worker.status != STICKY:
                # it died before its first case or between two: nothing says that another one would not
                yield from _answer_all(left, job, worker.reason)
                return
            continue
        where, peer = "/".join(current), stage.removeprefix("peer:")
        if stage.startswith("peer:") and peer not in skip.get(where, ()):
            skip.setdefault(where, []).append(peer)  # the same case again, without this peer
            continue
        yield from _answer(current, job, f"{worker.reason} (at {stage or 'start'})", have)
        left.remove(current)


def _answer_all(left: list[tuple[str, str]], job: Job, error: str) -> Iterator[Event]:
    for which in left:
        yield from _answer(which, job, error, set())


def _answer(which: tuple[str, str], job: Job, error: str, have: set[tuple[str, str | None]]) -> Iterator[Event]:
    for row in owed(get_case(*which), job, error):
        if (row["asked"], row["peer"]) not in have:
            yield {"event": "row", "row": row}
    yield {"event": "done", "case": list(which)}


class Worker:
    """One worker process: `module` with a job, a dataclass, as JSON on its stdin.

    `status` and `reason` say how it ended, after `events` has.
    """

    def __init__(self, job: Any, timeout: float, module: str = "narrowgemm.testing.worker") -> None:
        self.timeout, self.status, self.reason = timeout, 0, ""
        self._err = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed where `events` ends
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        self._process = subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=self._err, text=True, errors="replace", env=env)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(job)))
        self._process.stdin.close()
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def kill(self) -> None:
        self._process.kill()

    def events(self) -> Iterator[Event]:
        """Events until the process ends. It is killed where it is silent for `timeout` seconds, or left early."""
        ended = timed_out = False
        try:
            while not ended:
                try:
                    line = self._lines.get(timeout=self.timeout)
                except queue.Empty:
                    timed_out = True
                    break
                ended = line is None
                if line is not None and line.startswith(MARK):
                    yield json.loads(line[len(MARK):])
        finally:
            if not ended:
                self.kill()
            self.status = self._process.wait()
            self._err.seek(0)
            said = [x.strip() for x in self._err.read()[-4000:].splitlines() if x.strip()]
            self._err.close()
            self.reason = f"worker ended with {self.status}" + (f": {said[-1][:300]}" if said else "")
            if timed_out:
                self.reason = f"no answer for {self.timeout:.0f} s"


def warm(job: Job, processes: int, timeout: float = 600.0) -> Iterator[Event]:
    """Compile ahead in `processes` workers side by side; events as they come. Failures show when it is measured."""
    shares = [s for s in (job.cases[i::processes] for i in range(processes)) if s]
    return side_by_side([Worker(replace(job, cases=share, warm=True), timeout) for share in shares], timeout)


def side_by_side(workers: list[Worker], timeout: float) -> Iterator[Event]:
    """The events of several workers as they come. All are ended `timeout` seconds after the first was asked for."""
    events: queue.Queue[Event | None] = queue.Queue()

    def forward(worker: Worker) -> None:
        for event in worker.events():
            events.put(event)
        events.put(None)

    for worker in workers:
        threading.Thread(target=forward, args=(worker,), daemon=True).start()
    end, ended = time.time() + timeout, 0
    while ended < len(workers):
        try:
            event = events.get(timeout=max(0.0, end - time.time()))
        except queue.Empty:
            for worker in workers:
                worker.kill()
            return
        if event is None:
            ended += 1
        else:
            yield event
