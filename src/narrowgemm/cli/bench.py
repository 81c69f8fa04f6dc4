"""`narrowgemm bench`: suites of `testing/cases.py`, ours and peers side by side, into one result file."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..testing import results, runner
from ..testing.case import Case
from ..testing.cases import PEERS, SUITES, TITLES, find, get_case
from ..testing.worker import Job


def split(values: Sequence[str]) -> list[str]:
    """`a,b c` given as separate options or with commas, in order, once each."""
    return list(dict.fromkeys(x for v in values for x in v.replace(",", " ").split()))


def choose(suites: Sequence[str], patterns: Sequence[str]) -> list[Case]:
    """The cases, suite by suite. BadParameter for a suite or a pattern that names nothing."""
    for s in suites:
        if s not in SUITES:
            raise click.BadParameter(f"{s!r} is no suite; there are {', '.join(SUITES)}", param_hint="--suite")
    chosen: set[Case] = set()
    for p in patterns or ["*"]:
        hits = find(p, suites)
        if not hits:
            raise click.BadParameter(f"no case matches {p!r}", param_hint="--case")
        chosen |= set(hits)
    return [c for s in (suites or SUITES) for c in SUITES[s] if c in chosen]


def git_commit() -> str:
    """The commit of the working tree here, marked where files differ from it; '' where there is no git or no commit."""
    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], capture_output=True, text=True, timeout=10)
        return "" if done.returncode else done.stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        return head + ("-dirty" if head and git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.TimeoutExpired):
        return ""


def check_writable(option: str, path: Path | None) -> None:
    """BadParameter for a file that can't be written, before anything is measured for it. Makes its folder."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path if path.exists() else path.parent, os.W_OK) and not path.is_dir()
    except OSError as e:
        raise click.BadParameter(f"{path} can't be written: {e.strerror}", param_hint=option) from e
    if not writable:
        raise click.BadParameter(f"{path} can't be written: give a file in a folder of yours", param_hint=option)


class Progress:
    """A progress bar on a terminal that has rich, plain lines else."""

    def __init__(self, total: int) -> None:
        self.bar: Any = None
        try:
            from rich import progress
        except ImportError:
            return
        p = progress
        self.bar = p.Progress(p.TextColumn("{task.description}"), p.BarColumn(), p.MofNCompleteColumn(),
                              p.TimeElapsedColumn(), p.TimeRemainingColumn(), transient=True)
        self.task = self.bar.add_task("starting", total=total)

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def describe(self, text: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description=text)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.advance(self.task)

    def say(self, text: str) -> None:
        """A line above the bar; on a terminal the bar stays below it."""
        if self.bar is not None and self.bar.console.is_terminal:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            click.echo(text)


def measuring_device(name: str | None) -> str:
    """The torch device to measure on: `name`, else a GPU where there is one. Raises click.BadParameter."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cuda", "cpu") or not (index.isdigit() or name == kind):
        raise click.BadParameter(f"got {name!r}, expected cuda, cuda:N or cpu: cases are measured on this machine",
                                 param_hint="--device")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise click.BadParameter(f"got {name!r}, but torch sees {torch.cuda.device_count()} GPUs here", param_hint="--device")
    return name


@click.command()
@click.option("--suite", "suites", multiple=True, help="Name of a suite; repeat it, or separate names by commas.")
@click.option("--case", "patterns", multiple=True, help="Shell pattern for cases, on id or suite/id, within --suite.")
@click.option("--backends", multiple=True, default=["auto"], show_default=True,
              help="narrowgemm's backends to measure; auto is what dispatch chooses.")
@click.option("--peers", "peers", multiple=True, help="Peers to measure instead of the suites' own; 'none' for none.")
@click.option("--refcheck/--no-refcheck", default=True, show_default=True, help="Check every result with both gates.")
@click.option("--scale-transform", is_flag=True, help="Give row-major scales, and time what each side does to convert them.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Result file, saved after every case.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="The rows as CSV.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Roofline plot, PNG.")
@click.option("--resume", is_flag=True, help="Keep the rows of --json that have no error, and measure the rest.")
@click.option("--budget", type=float, default=0.0, help="Seconds after which no further case starts; its rows say so. 0: no limit.")
@click.option("--device", default=None, help="cuda, cuda:1 or cpu.  [default: a GPU if there is one]")
@click.option("--warm", type=int, default=0, help="Compile in advance, in this many processes.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Rounds; the median is reported.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--commit", default=None, help="Commit to record in the result, if git cannot tell.")
@click.option("--list", "list_only", is_flag=True, help="List the suites, or the cases that would run.")
def bench(suites: tuple[str, ...], patterns: tuple[str, ...], backends: tuple[str, ...], peers: tuple[str, ...],
          refcheck: bool, scale_transform: bool, json_path: Path | None, csv_path: Path | None, plot_path: Path | None,
          resume: bool, budget: float, device: str | None, warm: int, rounds: int, seed: int, commit: str | None,
          list_only: bool) -> None:
    """Measure cases by name, with peers side by side.

    Kernel time by CUDA graphs with L2 flushed, everything on a case interleaved; on the CPU, wall time. Measuring is
    done in a process of its own: a case that kills it costs its rows, with the reason, and not the run.

    The exit status is 1 where a row of ours failed: it raised, missed a gate or has no time. A peer that failed, and a
    case that --budget left no time for, do not count; `narrowgemm report` counts every row.
    """
    started = time.time()
    names = split(suites)
    if not names and not patterns:
        if not list_only:
            raise click.UsageError("say what to measure: --suite NAME or --case PATTERN; --list shows the suites")
        for name, members in SUITES.items():
            click.echo(f"{name:22s} {len(members):4d} cases  against {', '.join(PEERS[name]) or 'nobody'}: {TITLES[name]}")
        return
    cases = choose(names, patterns)
    if list_only:
        for case in cases:
            click.echo(f"{case.suite}/{case.id}  {case.flops / 1e9:.1f} GFLOP  {case.bytes / 1e6:.1f} MB")
        return
    check_names("--backends", split(backends), peers=False)
    check_names("--peers", [p for p in split(peers) if p != "none"], peers=True)
    for option, path in (("--json", json_path), ("--csv", csv_path), ("--plot", plot_path)):
        check_writable(option, path)
    wanted = {c.suite: peers_of(c.suite, peers) for c in cases}
    job = Job([(c.suite, c.id) for c in cases], wanted, split(backends), measuring_device(device), seed, refcheck,
              scale_transform, rounds, started + budget if budget else 0.0)
    run = Run(job, json_path, csv_path, commit if commit is not None else git_commit())
    if resume:
        run.resume()
    run.go(warm)
    for line in summary_lines(run.rows):
        click.echo(line)
    if failed := [r for r in run.rows if r["error"]]:
        click.echo(f"{len(failed)} of {len(run.rows)} rows have no figure; the first: {failed[0]['suite']}/"
                   f"{failed[0]['case']}: {failed[0]['error']}", err=True)
    if plot_path:
        from .plot import roofline

        roofline(plot_path, run.header, run.rows)
    if failed := [r for r in run.rows if results.own_failure(r) and r["error"] != runner.LATE]:
        click.echo(f"{len(failed)} rows of ours failed", err=True)
        sys.exit(1)


def check_names(option: str, names: Sequence[str], peers: bool) -> None:
    """BadParameter for a name that is no backend (`peers`: no peer)."""
    from ..kernels.registry import backends
    from ..testing import peers as peers_

    legal = peers_.names() if peers else ("auto", *backends())
    for n in names:
        if n not in legal:
            raise click.BadParameter(f"{n!r} is none of {', '.join(legal)}", param_hint=option)


def peers_of(suite: str, given: Sequence[str]) -> list[str]:
    """A suite's peers: those that `--peers` gives ('none' for no peer), else its own."""
    return [p for p in split(given) if p != "none"] if given else list(PEERS[suite])


def summary_lines(rows: Sequence[results.Row]) -> list[str]:
    return [f"{s.suite:22s} {s.asked:10s} against {s.peer:12s} {s.cases:3d} cases: geometric mean {s.mean:.3f}, "
            f"worst {s.worst:.3f} ({s.worst_case})" for s in results.summarise(rows)]


class Run:
    """One invocation: the rows so far and where they are saved."""

    def __init__(self, job: Job, json_path: Path | None, csv_path: Path | None, commit: str) -> None:
        self.job, self.json_path, self.csv_path = job, json_path, csv_path
        self.rows: list[results.Row] = []
        self.header: dict[str, Any] = {
            "schema": results.SCHEMA, "device": "", "arch": "", "versions": {}, "commit": commit, "timer": {},
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "ceilings": {},
            "scale_transform": job.scale_transform, "suites": list(job.peers),
            "peers": list(dict.fromkeys(p for names in job.peers.values() for p in names))}

    def save(self) -> None:
        """Write the rows so far, where files were asked for."""
        if self.json_path:
            results.write_json(self.json_path, self.header, self.rows)
        if self.csv_path:
            results.write_csv(self.csv_path, self.rows)

    def resume(self) -> None:
        """Take over the cases that the result file has whole. ClickException where it is of another kind of run."""
        if not self.json_path or not self.json_path.exists():
            return
        old = results.read(self.json_path)
        for name in ("commit", "scale_transform"):
            if old.get(name) != self.header[name]:
                raise click.ClickException(f"{self.json_path}: made with {name} {old.get(name)!r}, this run has "
                                           f"{self.header[name]!r}; the rows of one file are of one kind")
        self.header |= {k: old[k] for k in ("device", "arch", "versions", "timer", "ceilings") if old.get(k)}
        for k in ("suites", "peers"):
            self.header[k] = list(dict.fromkeys([*(old.get(k) or ()), *self.header[k]]))
        have = {results.key(r) for r in old["rows"] if r["error"] is None}
        job = self.job
        job.cases = [c for c in job.cases
                     if not all(results.key(r) in have for r in runner.owed(get_case(*c), job))]
        redo = set(job.cases)
        self.rows = [r for r in old["rows"] if (r["suite"], r["case"]) not in redo]

    def go(self, warm: int) -> None:
        """Compile ahead in `warm` processes, then measure; rows are saved after each case."""
        self.save()
        if not self.job.cases:
            return
        with Progress(len(self.job.cases)) as bar:
            compiled = 0
            for event in runner.warm(self.job, warm) if warm else ():
                compiled += event["event"] == "done"
                bar.describe(f"compiled {compiled} of {len(self.job.cases)}")
            for event in runner.run(self.job):
                self.take(event, bar)

    def take(self, event: dict[str, Any], bar: Progress) -> None:
        """Follow one event of `runner.run`."""
        kind = event["event"]
        if kind == "environment":
            self.header |= {k: event[k] for k in ("device", "arch", "timer")}
            versions = self.header["versions"] = self.header["versions"] | event["versions"]
            bar.say(f"{event['device']} ({event['arch']}), torch {versions['torch']}, timer {event['timer']['name']}")
        elif kind == "ceilings":
            self.header["ceilings"] = event["ceilings"]
            bar.say("ceilings: " + ", ".join(f"{k} {v:.4g}" for k, v in event["ceilings"].items()) + " (GB/s, TFLOPS)")
        elif kind == "start":
            bar.describe("/".join(event["case"]))
        elif kind == "row":
            self.rows.append(event["row"])
        elif kind == "done":
            suite, name = event["case"]
            mine = [r for r in self.rows if (r["suite"], r["case"]) == (suite, name)]
            for asked in dict.fromkeys(r["asked"] for r in mine):
                bar.say(results.perf_line(get_case(suite, name), [r for r in mine if r["asked"] == asked]))
            bar.advance()
            self.save()
