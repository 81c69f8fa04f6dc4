"""`narrowgemm bench`: suites of `testing/cases.py`, ours and peers side by side, into one result file."""

from __future__ import annotations

import datetime
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ..testing import results, runner
from ..testing.case import Case
from ..testing.cases import PEERS, SUITES, find
from ..testing.worker import Job


def split(values: Sequence[str]) -> list[str]:
    """`a,b c` given as separate options or with commas, in order, once each."""
    return list(dict.fromkeys(x for v in values for x in v.replace(",", " ").split()))


def choose(suites: Sequence[str], patterns: Sequence[str]) -> dict[str, list[Case]]:
    """Cases by suite. ClickException for a suite or a pattern that names nothing."""
    for s in suites:
        if s not in SUITES:
            raise click.BadParameter(f"{s!r} is no suite; there are {', '.join(SUITES)}", param_hint="--suite")
    chosen: dict[str, list[Case]] = {}
    for p in patterns or ["*"]:
        hits = find(p, suites)
        if not hits:
            raise click.BadParameter(f"no case matches {p!r}", param_hint="--case")
        for case in hits:
            if case not in chosen.setdefault(case.suite, []):
                chosen[case.suite].append(case)
    return chosen


def git_commit() -> str:
    """The commit of the working tree here, marked where files differ from it; '' where there is no git or no commit."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        dirty = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if head.returncode else head.stdout.strip() + ("-dirty" if dirty.stdout.strip() else "")


@contextmanager
def progress(total: int) -> Iterator[Any]:
    """A progress bar on the terminal, and plain lines where there is none: (advance, say)."""
    try:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        yield (lambda text: None), (lambda n=0, text="": None), click.echo
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("starting", total=total)

        def say(text: str) -> None:
            bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

        yield (lambda text: bar.update(task, description=text)), (lambda n=1: bar.advance(task, n)), say


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@click.command()
@click.option("--suite", "suites", multiple=True, help="Suite by name; several times, or with commas.")
@click.option("--case", "patterns", multiple=True, help="Cases by shell pattern on id or suite/id; within --suite where given.")
@click.option("--backends", multiple=True, default=["auto"], show_default=True,
              help="Backends of ours to measure; auto is what dispatch chooses.")
@click.option("--peers", "peers", multiple=True, help="Instead of the suites' own peers; 'none' for none.")
@click.option("--refcheck/--no-refcheck", default=True, show_default=True, help="Check every result with both numeric gates.")
@click.option("--scale-transform", is_flag=True, help="Scales come row-major: what a side does about it is timed.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Result file, saved after every case.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="The rows as CSV.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Roofline plot, PNG.")
@click.option("--resume", is_flag=True, help="Keep the rows that --json has without an error, and measure the rest.")
@click.option("--budget", type=float, default=0.0, help="Seconds after which no case starts; rows say so. 0: no limit.")
@click.option("--device", default=None, help="cuda, cuda:1, cpu; default: a GPU where there is one.")
@click.option("--warm", type=int, default=0, help="Compile ahead in so many processes side by side.")
@click.option("--rounds", type=int, default=7, show_default=True, help="Interleaved rounds; the median counts.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--commit", default=None, help="Commit to name in the result, where git can't tell.")
@click.option("--list", "list_only", is_flag=True, help="List the suites, or the cases that would run.")
def bench(suites: tuple[str, ...], patterns: tuple[str, ...], backends: tuple[str, ...], peers: tuple[str, ...], refcheck: bool,
          scale_transform: bool, json_path: Path | None, csv_path: Path | None, plot_path: Path | None, resume: bool,
          budget: float, device: str | None, warm: int, rounds: int, seed: int, commit: str | None, list_only: bool) -> None:
    """Measure cases by name, with peers side by side.

    Kernel time by CUDA graphs, L2 flushed, everything on a case interleaved; on the CPU, wall time. Each suite runs in a
    process of its own, and one that dies costs a row with the reason, not the run.
    """
    started = time.time()
    names = split(suites)
    if list_only and not names and not patterns:
        for name, members in SUITES.items():
            click.echo(f"{name:22s} {len(members):4d} cases  against {', '.join(PEERS[name]) or 'nobody'}")
        return
    if not names and not patterns:
        raise click.UsageError("say what to measure: --suite NAME or --case PATTERN; --list shows the suites")
    chosen = choose(names, patterns)
    if list_only:
        for members in chosen.values():
            for case in members:
                click.echo(f"{case.suite}/{case.id}  {case.flops / 1e9:.1f} GFLOP  {case.bytes / 1e6:.1f} MB")
        return
    check_names("--backends", split(backends), peers=False)
    check_names("--peers", [p for p in split(peers) if p != "none"], peers=True)
    jobs = [Job(s, [c.id for c in members], split(backends), peers_of(s, peers), device or default_device(), seed, refcheck,
                scale_transform, rounds, started + budget if budget else 0.0) for s, members in chosen.items()]
    run = Run(jobs, chosen, json_path, csv_path, commit if commit is not None else git_commit(), scale_transform)
    if resume:
        run.resume()
    run.go(warm)
    if plot_path:
        from .plot import roofline

        roofline(plot_path, run.header, run.rows)
    for line in summary_lines(run.rows):
        click.echo(line)
    if failed := [r for r in run.rows if r["error"]]:
        click.echo(f"{len(failed)} of {len(run.rows)} rows have no figure; the first: {failed[0]['suite']}/{failed[0]['case']}: "
                   f"{failed[0]['error']}", err=True)


def check_names(option: str, names: Sequence[str], peers: bool) -> None:
    from ..kernels.registry import backends
    from ..testing import peers as peers_

    legal = peers_.names() if peers else ("auto", *backends())
    for n in names:
        if n not in legal:
            raise click.BadParameter(f"{n!r} is none of {', '.join(legal)}", param_hint=option)


def peers_of(suite: str, given: Sequence[str]) -> list[str]:
    return [p for p in split(given) if p != "none"] if given else list(PEERS[suite])


def summary_lines(rows: Sequence[results.Row]) -> list[str]:
    return [f"{s.suite:22s} {s.asked:12s} against {s.peer:12s} {s.cases:3d} cases: geometric mean {s.mean:.3f}, "
            f"worst {s.worst:.3f} ({s.worst_case})" for s in results.summarise(rows)]


class Run:
    """One invocation: the rows so far and where they are saved."""

    def __init__(self, jobs: list[Job], cases: dict[str, list[Case]], json_path: Path | None, csv_path: Path | None,
                 commit: str, scale_transform: bool) -> None:
        self.jobs, self.json_path, self.csv_path = jobs, json_path, csv_path
        self.cases = {s: {c.id: c for c in members} for s, members in cases.items()}
        self.rows: list[results.Row] = []
        self.header: dict[str, Any] = {
            "schema": results.SCHEMA, "device": "", "arch": "", "versions": {}, "commit": commit, "timer": {},
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "ceilings": {},
            "scale_transform": scale_transform, "suites": [j.suite for j in jobs],
            "peers": list(dict.fromkeys(p for j in jobs for p in j.peers))}

    def save(self) -> None:
        if self.json_path:
            results.write_json(self.json_path, self.header, self.rows)
        if self.csv_path:
            results.write_csv(self.csv_path, self.rows)

    def resume(self) -> None:
        """Take over the rows of cases that the result file has whole; ClickException where it is of another kind of run."""
        if not self.json_path or not self.json_path.exists():
            return
        old = results.read(self.json_path)
        for name in ("commit", "scale_transform"):
            if old.get(name) != self.header[name]:
                raise click.ClickException(f"{self.json_path}: made with {name} {old.get(name)!r}, this run has "
                                           f"{self.header[name]!r}; results of one file are of one kind")
        self.header |= {k: old[k] for k in ("device", "arch", "versions", "timer", "ceilings") if old.get(k)}
        self.header["suites"] = list(dict.fromkeys([*(old.get("suites") or ()), *self.header["suites"]]))
        self.header["peers"] = list(dict.fromkeys([*(old.get("peers") or ()), *self.header["peers"]]))
        have = {results.key(r): r for r in old["rows"] if r["error"] is None}
        redo: set[tuple[str, str]] = set()
        for job in self.jobs:
            whole = [i for i in job.cases if all(
                results.key(r) in have for r in runner.owed(self.cases[job.suite][i], job, ""))]
            job.cases = [i for i in job.cases if i not in whole]
            redo |= {(job.suite, i) for i in job.cases}
        self.rows = [r for r in old["rows"] if (r["suite"], r["case"]) not in redo]

    def go(self, warm: int) -> None:
        total = sum(len(j.cases) for j in self.jobs)
        self.save()
        with progress(total) as (describe, advance, say):
            for job in self.jobs:
                if not job.cases:
                    continue
                if warm:
                    n = 0
                    for event in runner.warm(job, warm):
                        n += event["event"] == "done"
                        describe(f"{job.suite}: compiled {n} of {len(job.cases)}")
                describe(job.suite)
                for event in runner.run(job, self.cases[job.suite]):
                    self.take(job, event, describe, say)
                    if event["event"] == "done":
                        advance(1)

    def take(self, job: Job, event: dict[str, Any], describe: Any, say: Any) -> None:
        kind = event["event"]
        if kind == "environment":
            self.header |= {k: event[k] for k in ("device", "arch", "timer")}
            self.header["versions"] = self.header["versions"] | event["versions"]
            say(f"{event['device']} ({event['arch']}), torch {event['versions']['torch']}, timer {event['timer']['name']}")
        elif kind == "ceilings":
            self.header["ceilings"] = event["ceilings"]
            say("ceilings: " + ", ".join(f"{k} {v:.0f}" for k, v in event["ceilings"].items()) + " (GB/s, TFLOPS)")
        elif kind == "start":
            describe(f"{job.suite}: {event['case']}")
        elif kind == "row":
            self.rows.append(event["row"])
        elif kind == "done":
            mine = [r for r in self.rows if (r["suite"], r["case"]) == (job.suite, event["case"])]
            for asked in dict.fromkeys(r["asked"] for r in mine):
                say(results.perf_line(self.cases[job.suite][event["case"]], [r for r in mine if r["asked"] == asked]))
            self.save()
