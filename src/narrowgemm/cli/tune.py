"""`narrowgemm tune`: measure every kernel and config on cases, keep what beats the cost model in tables, or sweep for it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..arch import Arch, get_arch
from ..problem import Config
from ..testing.case import Case
from ..tuning import adopt, report, search, store, sweep, vllm
from ..tuning.measure import Job
from ..tuning.space import candidates, problem_of, promising
from .bench import Progress, check_writable, choose, git_commit, measuring_device, split
from .cache import target


def user_tables() -> Path:
    """The user's own tables: NARROWGEMM_TABLES, else under the data folder of the account."""
    if named := os.environ.get("NARROWGEMM_TABLES"):
        return Path(named)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "narrowgemm" / "tables"


@click.command()
@click.option("--suite", "suites", multiple=True, help="Suite by name; several times, or with commas.")
@click.option("--case", "patterns", multiple=True, help="Cases by shell pattern on id or suite/id, within --suite.")
@click.option("--kernels", multiple=True, help="Only kernels that match a pattern, beside the cost model's pick.")
@click.option("--within", type=float, default=0.0, metavar="FACTOR",
              help="Only candidates predicted to take at most FACTOR times the cost model's pick. 0: all.")
@click.option("--device", default=None,
              help="cuda, cuda:1, cpu; with --list an arch such as h200, too; default: a GPU where there is one.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path),
              help="Folder of tables.  [default: NARROWGEMM_TABLES, else ~/.local/share/narrowgemm/tables]")
@click.option("--packaged", is_flag=True, help="Write the tables that ship with the package, in this source tree.")
@click.option("--sweep", "sweep_path", type=click.Path(dir_okay=False, path_type=Path),
              help="No tables: keep every measurement in this file.")
@click.option("--from", "sources", multiple=True, type=click.Path(dir_okay=False, path_type=Path),
              help="Make tables from sweep files, without measuring.")
@click.option("--report", "report_path", type=click.Path(dir_okay=False, path_type=Path),
              help="Print what a sweep file says of the cost model, without measuring.")
@click.option("--portable", type=click.IntRange(0), default=0, metavar="N",
              help="With --sweep: only what a call gets, and the N portable candidates predicted to be the fastest.")
@click.option("--vllm", "vllm_files", multiple=True, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Measure the tiles of a tuned file of vLLM or SGLang, too.")
@click.option("--vllm-out", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="With --from: write the portable kernel's best as vLLM's files, and no tables.")
@click.option("--top-k", type=click.IntRange(1), default=8, show_default=True, help="Experts a token, for --vllm-out.")
@click.option("--resume", is_flag=True, help="Keep what was measured before at this commit, and measure the rest.")
@click.option("--budget", type=float, default=0.0, help="Seconds after which no case starts. 0: no limit.")
@click.option("--warm", type=int, default=0, help="Compile ahead in so many processes side by side.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Rounds of the finalists.")
@click.option("--finalists", type=click.IntRange(2), default=4, show_default=True, help="Candidates for the second stage.")
@click.option("--timeout", type=float, default=120.0, show_default=True, help="Seconds after which a silent candidate is ended.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--commit", default=None, help="Commit to name in the files, where git can't tell.")
@click.option("--list", "list_only", is_flag=True, help="List cases, keys and candidates; measure nothing.")
def tune(suites: tuple[str, ...], patterns: tuple[str, ...], kernels: tuple[str, ...], within: float, device: str | None,
         out: Path | None, packaged: bool, sweep_path: Path | None, sources: tuple[Path, ...], report_path: Path | None,
         portable: int, vllm_files: tuple[Path, ...], vllm_out: Path | None, top_k: int,
         resume: bool, budget: float, warm: int, rounds: int, finalists: int, timeout: float, seed: int,
         commit: str | None, list_only: bool) -> None:
    """Measure every kernel and config on cases, and keep what beats the cost model by 3%.

    A candidate has to pass both numeric gates; then all are timed in turn by CUDA graphs, quickly, and the best again.
    Measuring is done in processes of their own: a config that kills one costs itself, and not the run.

    \b
    narrowgemm tune --suite fp8-masked-decode --warm 8              tables of your own
    narrowgemm tune --suite fp8-dense --sweep sweep.json            every figure, no table
    narrowgemm tune --suite untuned --portable 3 --sweep check.json is any choice slower than the portable kernel?
    narrowgemm tune --report sweep.json                             how good the choices are
    narrowgemm tune --from sweep.json --packaged                    tables from a sweep
    narrowgemm tune --suite fp8-skew --vllm 'E=32,N=....json'       vLLM's tiles beside our own
    narrowgemm tune --from sweep.json --vllm-out configs            the portable kernel's best, for vLLM
    """
    started = time.time()
    if report_path is not None:
        raise SystemExit(print_report(report_path))
    if packaged and out:
        raise click.UsageError("--out and --packaged name two places")
    root = store.PACKAGED if packaged else out or user_tables()
    if vllm_out and not sources:
        raise click.UsageError("--vllm-out makes files of what was measured: give --from SWEEP")
    if sources:
        vllm_from(sources, vllm_out, top_k) if vllm_out else tables_from(sources, root)
        return
    try:
        also = [c.to_dict() for path in vllm_files for c in vllm.read(path)]
    except ValueError as e:
        raise click.ClickException(str(e)) from e
    if sweep_path and (out or packaged):
        raise click.UsageError("--sweep writes no tables; make them from its file with --from")
    if portable and not sweep_path:
        raise click.UsageError("--portable leaves candidates out, so it makes no tables: give --sweep FILE")
    if not suites and not patterns:
        raise click.UsageError("say what to tune: --suite NAME or --case PATTERN; `narrowgemm bench --list` shows the suites")
    chosen = choose(split(suites), patterns)
    cases = search.distinct(chosen)
    if list_only:
        list_space(cases, target(device)[0], split(kernels), within)
        return
    device = measuring_device(device)
    if device == "cpu":
        click.echo("on the CPU the reference is the only kernel there is to choose: tune on the GPU that will serve", err=True)
    log = sweep_path or (root if not packaged else user_tables()) / f"tune-{_slug(device)}.json"
    check_writable("--sweep" if sweep_path else "--out", log)
    run = search.Tuning(log, None if sweep_path else root, dict.fromkeys(c.suite for c in chosen),
                        commit if commit is not None else git_commit())
    try:
        todo = run.resume(cases) if resume else cases
    except ValueError as e:
        raise click.ClickException(str(e)) from e
    job = Job([(c.suite, c.id) for c in todo], device, split(kernels), seed, rounds, finalists,
              started + budget if budget else 0.0, portable=portable, within=within, also=also)
    measure(run, job, warm, timeout)
    finish(run, cases)


def _slug(device: str) -> str:
    return device.replace(":", "")


def measure(run: search.Tuning, job: Job, warm: int, timeout: float) -> None:
    """Every case of `job`, with progress; records are kept as they come."""
    if not job.cases:
        return
    with Progress(len(job.cases)) as bar:
        done = 0
        for event in search.compile_ahead(job, warm, timeout) if warm else ():
            done += event["event"] == "done"
            bar.describe(f"compiled {done} of {warm * len(job.cases)}")
        for event in search.run(job, timeout):
            kind = event["event"]
            if kind == "environment":
                try:
                    run.environment(event)
                except ValueError as e:
                    raise click.ClickException(str(e)) from e
                bar.say(f"{event['device']} ({event['arch']}), torch {event['versions']['torch']}, "
                        f"timer {event['timer']['name']}")
            elif kind == "start":
                bar.describe("/".join(event["case"]))
            elif kind == "measured":
                run.add(event["record"])
                bar.say(line(event["record"]))
                bar.advance()


def line(record: sweep.Record) -> str:
    """One case: the best, the cost model's pick, and how many candidates failed."""
    where = f"{record['suite']}/{record['case']}"
    if record["error"]:
        return f" > {where}: {record['error']}"
    field, pick = sweep.timed(record), sweep.model_pick(record)
    failed = [c for c in record["candidates"] if c["error"]]
    tail = f"; {len(failed)} of {len(record['candidates'])} failed: {failed[0]['kernel']} {failed[0]['error']}" if failed else ""
    if not field or pick is None:
        return f" > {where}: no candidate has a figure{tail}"
    ratio = f"{pick['us'] / field[0]['us']:.3f} of the best" if pick["us"] else "no figure"
    return (f" > {where}: {field[0]['us']:.1f} us {field[0]['kernel']} {Config.from_dict(field[0]['config'])}; "
            f"the cost model's pick {pick['kernel']} {Config.from_dict(pick['config'])}: {ratio}{tail}")


def finish(run: search.Tuning, cases: Sequence[Case]) -> None:
    """Say what is left, what failed, and where the results are."""
    have = {r["case"]: r for r in run.records}
    errors = [r for r in run.records if r["error"]]
    if missing := [c for c in cases if c.id not in have]:
        click.echo(f"{len(missing)} of {len(cases)} cases are left, the time is over: go on with --resume", err=True)
    if errors:
        click.echo(f"{len(errors)} cases have no figure; the first: {errors[0]['suite']}/{errors[0]['case']}: "
                   f"{errors[0]['error']}", err=True)
    click.echo(f"measurements: {run.log}")
    if run.out is not None:
        say_tables(run.out)


def say_tables(root: Path) -> None:
    """Where the tables are, and what makes them count."""
    click.echo(f"tables: {root}")
    if root != store.PACKAGED and os.environ.get("NARROWGEMM_TABLES") != str(root):
        click.echo(f"they are used where NARROWGEMM_TABLES={root} is set")


def read_sweep(path: Path) -> dict[str, Any]:
    """`sweep.read`; ClickException for a file that is none of its."""
    try:
        return sweep.read(path)
    except ValueError as e:
        raise click.ClickException(str(e)) from e


def tables_from(sources: Sequence[Path], root: Path) -> None:
    """Tables of each device from all of its sweep files; of a case that two files have, the later file's counts."""
    headers: dict[str, dict[str, Any]] = {}
    records: dict[str, dict[str, sweep.Record]] = {}
    for path in sources:
        data = read_sweep(path)
        headers[data["arch"]] = data
        records.setdefault(data["arch"], {}).update({r["case"]: r for r in data["cases"]})
    for arch, mine in records.items():
        for path in search.write_tables(root, headers[arch], mine.values()):
            rows = store.read_rows(path)
            click.echo(f"{path.name}: {len(rows)} rows, {sum(r['adopted'] for r in rows)} that beat the cost model")
        if idle := [case for case, r in mine.items() if not adopt.tables([r])]:
            click.echo(f"{len(idle)} cases make no row, since the cost model's pick has no steady time, or nothing ran: "
                       + ", ".join(idle))
    say_tables(root)


def vllm_from(sources: Sequence[Path], folder: Path, top_k: int) -> None:
    """vLLM's files from sweeps, into `folder`."""
    for path in sources:
        data = read_sweep(path)
        made = vllm.write(folder, data["cases"], data["device"], top_k)
        for name in made:
            click.echo(f"{name}: {len(json.loads(name.read_text()))} numbers of tokens")
        if not made:
            raise click.ClickException(f"{path}: no two products of it are the two of a layer, [2I, H] and [H, I], by offsets")


def print_report(path: Path) -> int:
    """The exit status: 1 where a case has no figure, or a choice of this version is slower than the portable kernel."""
    data = read_sweep(path)
    click.echo(f"device {data['device']} ({data['arch']}); commit {str(data['commit'])[:12] or 'unknown'}; "
               f"{len(data['cases'])} cases")
    lines, problems = report.summarise(data["suites"], data["cases"], report.recorded)
    show("the cost model's pick when it was measured", lines, problems)
    arch = _known(data["arch"])
    if arch is not None:
        lines, problems = report.summarise(data["suites"], data["cases"], report.current(arch))
        show("the choice of this version, tables included", lines, problems)
    return 1 if problems else 0


def show(title: str, lines: Sequence[report.Line], problems: Sequence[str]) -> None:
    click.echo(f"\n{title}:")
    for text in (*report.text(lines), *(f"  {p}" for p in problems)):
        click.echo(text)


def _known(name: str) -> Arch | None:
    try:
        return get_arch(name)
    except ValueError:
        return None


def list_space(cases: Sequence[Case], arch: Arch, kernels: Sequence[str], within: float) -> None:
    """The candidates that a run would measure, counted by case."""
    keys, total = set(), 0
    for c in cases:
        problem = problem_of(c)
        found = promising(candidates(problem, arch, kernels), within)
        table, key = store.table_name(problem), store.key(problem)
        keys.add((table, key))
        total += len(found)
        click.echo(f"{c.suite}/{c.id}  {table} n={key[0]} k={key[1]} rows={key[2]}  {len(found)} candidates")
    click.echo(f"{len(cases)} cases, {len(keys)} keys, {total} candidates on {arch.name}")
