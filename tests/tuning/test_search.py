"""The run: workers that die or lose the device, time that is over, resuming, and tables that grow case by case."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from narrowgemm.testing.cases import Case, get_case, get_suite
from narrowgemm.testing.worker import MARK, STICKY
from narrowgemm.tuning import measure, search, store, sweep
from narrowgemm.tuning.measure import TRY, Job

from .fakes import SMALL, candidate, install, kernel, record

DENSE = [c for c in get_suite("cpu-small") if c.layout == "dense" and c.rows]
JOB = Job([(c.suite, c.id) for c in DENSE[:2]], "cpu", rounds=1)
BAD = f"fake.one {SMALL}"


class FakeWorker:
    """Plays back what `script(job)` yields: events, then how the process ended (status, reason)."""

    script: Any = None
    jobs: list[Job]

    def __init__(self, job: Job, timeout: float, module: str) -> None:
        assert module == "narrowgemm.tuning.measure"
        self.job, self.status, self.reason = job, 0, ""
        FakeWorker.jobs.append(job)

    def events(self) -> Iterator[dict[str, Any]]:
        for item in FakeWorker.script(self.job):
            if isinstance(item, tuple):
                self.status, self.reason = item
                return
            yield item


def play(monkeypatch: pytest.MonkeyPatch, script: Any, job: Job = JOB) -> list[dict[str, Any]]:
    FakeWorker.jobs, FakeWorker.script = [], staticmethod(script)
    monkeypatch.setattr(search, "Worker", FakeWorker)
    return [e["record"] for e in search.run(job) if e["event"] == "measured"]


def measured(case: tuple[str, str]) -> dict[str, Any]:
    return {"event": "measured", "record": record(case[1], candidate("a", 1.0, 1.0), suite=case[0])}


@pytest.mark.parametrize("sticky", [True, False])
def test_a_candidate_that_kills_its_process_is_skipped_and_the_case_measured_again(
        monkeypatch: pytest.MonkeyPatch, sticky: bool) -> None:
    where = "/".join(JOB.cases[0])

    def script(job: Job) -> Iterator[Any]:
        for case in job.cases:
            yield {"event": "start", "case": list(case)}
            yield {"event": "stage", "stage": "build"}
            yield {"event": "stage", "stage": TRY + BAD}
            if tuple(case) == JOB.cases[0] and BAD not in job.skip.get(where, {}):
                if sticky:
                    yield {"event": "lost", "reason": "device lost: illegal memory access"}
                    yield STICKY, "worker ended with 75"
                yield -11, "worker ended with -11"
            yield measured(case)

    out = play(monkeypatch, script)
    assert [r["case"] for r in out] == [c[1] for c in JOB.cases] and len(FakeWorker.jobs) == 2
    reason = "device lost: illegal memory access" if sticky else "worker ended with -11"
    assert FakeWorker.jobs[1].skip == {where: {BAD: reason}} and FakeWorker.jobs[1].cases == JOB.cases


def test_a_death_nobody_knows_where_is_looked_at_carefully_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(job: Job) -> Iterator[Any]:
        for case in job.cases:
            yield {"event": "start", "case": list(case)}
            yield {"event": "stage", "stage": "timing"}
            if tuple(case) == JOB.cases[0]:
                yield -9, "worker ended with -9"
            yield measured(case)

    out = play(monkeypatch, script)
    assert FakeWorker.jobs[1].careful == ["/".join(JOB.cases[0])] and len(FakeWorker.jobs) == 3
    assert [bool(r["error"]) for r in out] == [True, False] and "worker ended with -9 (at timing)" in out[0]["error"]


def test_a_worker_that_can_not_start_answers_for_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    out = play(monkeypatch, lambda job: iter([(1, "worker ended with 1: no driver")]))
    assert [r["error"] for r in out] == ["worker ended with 1: no driver"] * 2 and len(FakeWorker.jobs) == 1


def test_time_that_is_over_leaves_cases_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert play(monkeypatch, lambda job: iter([{"event": "late"}])) == []


def test_the_workers_of_a_run_measure_on_the_cpu() -> None:
    """The real worker: start, record, and a deadline that has passed."""
    job = Job([(DENSE[1].suite, DENSE[1].id)], "cpu", rounds=1)
    events = list(search.run(job))
    assert [e["event"] for e in events if e["event"] != "stage"] == ["environment", "start", "measured"]
    out = events[-1]["record"]
    assert out["error"] is None and out["candidates"][0]["kernel"] == "reference" and out["candidates"][0]["us"] > 0
    assert [e["event"] for e in search.run(Job(job.cases, "cpu", deadline=time.time() - 1))][-1] == "late"
    done = [e for e in search.compile_ahead(job, 2) if e["event"] == "done"]
    assert len(done) == 2   # each process goes through every case


def test_the_worker_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`main` in this process, with fakes: a lost device ends it with the status that the runner knows."""
    def broken(*_: Any) -> Any:
        raise measure.DeviceLost("gone")

    install(monkeypatch, kernel("fake.one", {SMALL: 1.0}))
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({"cases": JOB.cases, "device": "cpu", "rounds": 1})))
    monkeypatch.setattr(measure.Trial, "gate", broken)
    assert measure.main() == STICKY
    events = [json.loads(x[len(MARK):]) for x in capsys.readouterr().out.splitlines() if x.startswith(MARK)]
    assert [e["event"] for e in events][:2] == ["environment", "start"] and events[-1]["stage"] == TRY + BAD


def test_shares_cover_every_candidate_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    install(monkeypatch, *(kernel(f"fake.{i}", {SMALL: 1.0}, spoil=lambda c, out, i=i: ran.append(str(i))) for i in range(6)))
    for i in range(3):
        measure.compile_share(Job([], "cpu", share=(i, 3)), DENSE[0])
    assert sorted(ran) == list("012345")


def test_a_case_that_suites_share_is_measured_once() -> None:
    chosen = [*get_suite("fp8-offsets"), *get_suite("portable-offsets")]
    out = search.distinct(chosen)
    assert len({c.id for c in chosen}) == len(out) == 20 and out[:8] == list(get_suite("fp8-offsets"))
    assert not any(c.rows == 0 for c in search.distinct(get_suite("edge")))


# ---- records, resuming, tables ------------------------------------------------------------------------------------------

def environment(**changes: Any) -> dict[str, Any]:
    return {"event": "environment", "device": "H200", "arch": "h200", "versions": {"torch": "2"}, "timer": {"name": "fake"}} | changes


def tuning(tmp_path: Path, out: Path | None, commit: str = "abc") -> search.Tuning:
    return search.Tuning(tmp_path / "log.json", out, ["cpu-small"], commit)


def test_records_and_tables_are_saved_as_they_come(tmp_path: Path) -> None:
    run = tuning(tmp_path, tmp_path / "tables")
    run.environment(environment())
    table = tmp_path / "tables" / "h200" / "gemm-dense-fp8_1x128-fp8_128x128.json"
    run.add(record(DENSE[0].id, candidate("a", 100.0, 1.0), candidate("b", 50.0, 2.0)))
    (row,) = store.read_rows(table)
    assert row["adopted"] and row["kernel"] == "b" and row["cases"] == 1
    run.add(record(DENSE[1].id, candidate("a", 40.0, 1.0), candidate("b", 100.0, 2.0)))   # the same key
    (row,) = store.read_rows(table)
    assert row["cases"] == 2 and not row["adopted"] and row["kernel"] == "a"
    run.add(record(DENSE[2].id, error="its process died"))
    run.add(record(DENSE[2].id, candidate("a", 1.0, 1.0), key=(128, 256, 8)))             # a later record replaces it
    data = sweep.read(tmp_path / "log.json")
    assert [r["case"] for r in data["cases"]] == [c.id for c in DENSE[:3]] and data["arch"] == "h200"
    assert not any(r["error"] for r in data["cases"]) and len(store.read_rows(table)) == 2
    assert json.loads(table.read_text())["commit"] == "abc"


def test_a_sweep_writes_no_tables(tmp_path: Path) -> None:
    run = tuning(tmp_path, None)
    run.environment(environment())
    run.add(record(DENSE[0].id, candidate("a", 100.0, 1.0)))
    assert [p.name for p in tmp_path.rglob("*.json")] == ["log.json"]


def test_resume_takes_over_what_has_figures(tmp_path: Path) -> None:
    first = tuning(tmp_path, None)
    first.environment(environment())
    first.add(record(DENSE[0].id, candidate("a", 100.0, 1.0)))
    first.add(record(DENSE[1].id, error="its process died"))
    again = tuning(tmp_path, None)
    assert again.resume(DENSE[:3]) == DENSE[1:3] and [r["case"] for r in again.records] == [DENSE[0].id]
    again.environment(environment())
    with pytest.raises(ValueError, match="versions: got"):
        again.environment(environment(versions={"torch": "3"}))
    with pytest.raises(ValueError, match="commit: got 'abc', expected 'def'"):
        tuning(tmp_path, None, "def").resume(DENSE)
    assert search.Tuning(tmp_path / "none.json", None, [], "abc").resume(DENSE) == DENSE


def test_files_that_are_no_sweeps(tmp_path: Path) -> None:
    for text, message in (("{", "no JSON"), ('{"schema": "x"}', "got 'x'"), ("[]", "got None")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            sweep.read(tmp_path / "x.json")


def test_a_case_is_found_in_every_suite_that_holds_it() -> None:
    case: Case = get_case("fp8-offsets", get_suite("fp8-offsets")[0].id)
    assert search.suites_of(record(case.id), ("fp8-offsets", "portable-offsets", "fp8-dense")) == ["fp8-offsets", "portable-offsets"]
