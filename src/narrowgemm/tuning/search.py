"""The offline tuner: cases through worker processes, every record kept as it comes, tables made from the records.

A candidate that kills its process, or loses the device, is named in its case's record and left out when the case is
measured again in a new process: a bad config costs itself and not the run.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import expect
from ..testing.case import Case
from ..testing.cases import SUITES, get_case
from ..testing.runner import Event, Worker, side_by_side
from . import adopt, store, sweep
from .measure import TIME, TRY, Job, failed
from .sweep import Record

MODULE = "narrowgemm.tuning.measure"


def run(job: Job, timeout: float = 120.0) -> Iterator[Event]:
    """Measure `job.cases`: the workers' events, with one `measured` for every case that time is left for."""
    left = list(job.cases)
    skip = {k: dict(v) for k, v in job.skip.items()}
    careful = list(job.careful)
    while left:
        current: tuple[str, str] | None = None
        stage, lost = "", ""
        worker = Worker(replace(job, cases=list(left), skip=skip, careful=careful), timeout, MODULE)
        for event in worker.events():
            kind = event["event"]
            if kind == "start":
                current, stage, lost = (event["case"][0], event["case"][1]), "", ""
            elif kind == "stage":
                stage = event["stage"]
            elif kind == "lost":
                lost = event["reason"]
            yield event
            if kind == "late":
                return
            if kind == "measured":
                left.remove((event["record"]["suite"], event["record"]["case"]))
                current = None
        if current is None:
            for suite, name in left:  # it died before its first case or between two: another one would, too
                yield measured(failed(get_case(suite, name), worker.reason))
            return
        where, reason = "/".join(current), lost or worker.reason
        label = next((stage[len(p):] for p in (TRY, TIME) if stage.startswith(p)), "")
        if label and label not in skip.get(where, {}):
            skip.setdefault(where, {})[label] = reason
        elif not label and where not in careful:
            careful.append(where)
        else:
            yield measured(failed(get_case(*current), f"{reason} (at {stage or 'start'})"))
            left.remove(current)


def measured(record: Record) -> Event:
    return {"event": "measured", "record": record}


def compile_ahead(job: Job, processes: int, timeout: float = 120.0) -> Iterator[Event]:
    """Compile every candidate in `processes` workers side by side; a `done` for each case of each worker.

    It takes no more than half of the time that is left until `job.deadline`, or 600 s.
    """
    left = (job.deadline - time.time()) / 2 if job.deadline else 600.0
    share = replace(job, deadline=time.time() + left)
    workers = [Worker(replace(share, share=(i, processes)), timeout, MODULE) for i in range(processes)]
    return side_by_side(workers, max(0.0, left))


def distinct(cases: Iterable[Case]) -> list[Case]:
    """Cases with rows, one of those that suites share: an id says everything but the suite."""
    return list({c.id: c for c in reversed([c for c in cases if c.rows])}.values())[::-1]


class Tuning:
    """One run: the records so far, where they are kept, and the tables that they make.

    `log`: the sweep file, written after every case. `out`: root of tables, None for none.
    """

    def __init__(self, log: Path, out: Path | None, suites: Iterable[str], commit: str) -> None:
        self.log, self.out = log, out
        self.records: list[Record] = []
        self.header: dict[str, Any] = {
            "schema": sweep.SCHEMA, "device": "", "arch": "", "versions": {}, "commit": commit, "timer": {},
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "suites": list(suites)}

    def resume(self, cases: Iterable[Case]) -> list[Case]:
        """Take over what the sweep file has without an error; the cases that are left. ValueError: it is of another commit."""
        cases = list(cases)
        if not self.log.exists():
            return cases
        old = sweep.read(self.log)
        expect(old.get("commit") == self.header["commit"], f"{self.log}, commit", repr(old.get("commit")),
               f"{self.header['commit']!r}: kernels of one sweep are of one commit; start anew without --resume")
        self.header |= {k: old[k] for k in ("device", "arch", "versions", "timer") if old.get(k)}
        self.header["suites"] = list(dict.fromkeys([*(old.get("suites") or ()), *self.header["suites"]]))
        self.records = [r for r in old["cases"] if r["error"] is None]
        have = {r["case"] for r in self.records}
        return [c for c in cases if c.id not in have]

    def environment(self, event: Event) -> None:
        """Take over what a worker says of its machine. ValueError where earlier records are of another one."""
        for k in ("device", "arch", "versions"):
            expect(not self.records or not self.header[k] or self.header[k] == event[k], f"{self.log}, {k}",
                   repr(self.header[k]), f"{event[k]!r}, which is here; start anew without --resume")
        self.header |= {k: event[k] for k in ("device", "arch", "versions", "timer")}

    def add(self, record: Record) -> None:
        """Keep a record; write the sweep file, and the tables of its key."""
        self.records = [r for r in self.records if r["case"] != record["case"]] + [record]
        sweep.write(self.log, self.header, self.records)
        if self.out is not None and record["error"] is None:
            key = [record[k] for k in ("table", "n", "k", "rows")]
            write_tables(self.out, self.header, [r for r in self.records if r["error"] is None
                                                 and [r[k] for k in ("table", "n", "k", "rows")] == key])


def write_tables(out: Path, header: dict[str, Any], records: Iterable[Record]) -> list[Path]:
    """The tables that `records` make, under `out/<arch>/`; rows of other keys stay."""
    about = {k: header.get(k) for k in ("versions", "commit", "date")}
    return [store.write_table(out, header["arch"], table, about, rows) for table, rows in adopt.tables(records).items()]


def suites_of(record: Record, named: Iterable[str]) -> list[str]:
    """Suites among `named` that hold the record's case."""
    return [s for s in named if any(c.id == record["case"] for c in SUITES.get(s, ()))]
