"""`narrowgemm report`: what result files say, suite by suite, and a failure where a row is missing."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from ..testing import results


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--suite", "suites", multiple=True, help="A suite that must be complete, even if no row names it.")
@click.option("--peers", "peers", multiple=True, help="A peer for which every suite must have rows.")
@click.option("--markdown", is_flag=True, help="The table as Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Summaries and problems as JSON.")
def report(files: tuple[Path, ...], suites: tuple[str, ...], peers: tuple[str, ...], markdown: bool,
           as_json: bool) -> None:
    """Geometric mean and worst ratio of every suite and peer in FILES, which count as one result.

    Exits with 1 where a row of a suite is missing or has an error: a crashed peer or kernel never flatters a mean.
    """
    try:
        data = [results.read(f) for f in files]
    except ValueError as e:
        raise click.ClickException(str(e)) from e
    rows = results.merge(data)
    problems = results.check(rows, suites, peers)
    summaries = results.summarise(rows)
    if as_json:
        click.echo(json.dumps({"summaries": [asdict(s) for s in summaries], "problems": problems}, indent=1))
        sys.exit(1 if problems else 0)
    devices = sorted({f"{d['device']} ({d['arch']})" for d in data})
    commits = sorted({str(d["commit"])[:12] or "unknown" for d in data})
    click.echo(f"device {', '.join(devices)}; commit {', '.join(commits)}")
    if len(devices) > 1 or len(commits) > 1:
        click.echo("note: the files are of different devices or commits")
    for line in markdown_table(summaries) if markdown else text_table(summaries):
        click.echo(line)
    for p in problems[:50]:
        click.echo(f"MISSING {p}", err=True)
    if len(problems) > 50:
        click.echo(f"MISSING ... and {len(problems) - 50} more", err=True)
    if problems:
        click.echo(f"incomplete: {len(problems)} rows are missing or failed", err=True)
        sys.exit(1)


def text_table(summaries: list[results.Summary]) -> list[str]:
    lines = [f"{'suite':24s} {'backend':16s} {'peer':12s} {'cases':>5s} {'mean':>7s} {'worst':>7s}  worst case"]
    return lines + [f"{s.suite:24s} {s.asked:16s} {s.peer:12s} {s.cases:5d} {s.mean:7.3f} {s.worst:7.3f}  "
                    f"{s.worst_case}" for s in summaries]


def markdown_table(summaries: list[results.Summary]) -> list[str]:
    """Rows of a Markdown table; ratio = peer's time / ours, so more than 1 is faster."""
    lines = ["| suite | against | cases | geometric mean | worst | worst case |",
             "| --- | --- | ---: | ---: | ---: | --- |"]
    for s in summaries:
        name = f"`{s.suite}`" if s.asked == "auto" else f"`{s.suite}` ({s.asked})"
        lines.append(f"| {name} | {s.peer} | {s.cases} | {s.mean:.2f} | {s.worst:.2f} | `{s.worst_case}` |")
    return lines
