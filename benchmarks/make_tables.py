"""Rewrites the tables of README.md from the committed result files: figures are never typed.

    python benchmarks/make_tables.py            writes README.md
    python benchmarks/make_tables.py --check    exits with 1 where README.md is not what the files say

Every folder of benchmarks/results is a device. A suite's rows are those of the newest commit that measured it; several
files of that commit count as one result. A suite with a row missing or failed fails the script; peers that a run was not asked
for are named below the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def committed(root: Path) -> list[Path]:
    """Result files that git has; all of them where this is no checkout."""
    folder = root / "benchmarks" / "results"
    command = ["git", "ls-files", "-z", str(folder)]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return sorted(folder.glob("*/*.json"))
    if done.returncode:
        return sorted(folder.glob("*/*.json"))
    return sorted(root / name for name in done.stdout.split("\0") if name.endswith(".json") and (root / name).exists())


def newest(files: list[dict[str, Any]]) -> dict[tuple[str, bool], list[dict[str, Any]]]:
    """(suite, transforms inside) -> the files of the newest commit that measured it, oldest first."""
    ordered = sorted(files, key=lambda d: str(d["date"]))
    last: dict[tuple[str, bool], str] = {}
    for d in ordered:
        for suite in {r["suite"] for r in d["rows"]}:
            last[suite, bool(d.get("scale_transform"))] = d["commit"]
    return {k: [d for d in ordered if d["commit"] == commit and bool(d.get("scale_transform")) == k[1]
                and any(r["suite"] == k[0] for r in d["rows"])] for k, commit in last.items()}


def in_order(chosen: dict[tuple[str, bool], list[dict[str, Any]]]) -> dict[tuple[str, bool], list[dict[str, Any]]]:
    """What `newest` gives, in the order of the suites; those with transforms last."""
    from narrowgemm.testing.cases import SUITES

    order = {name: i for i, name in enumerate(SUITES)}
    return dict(sorted(chosen.items(), key=lambda x: (x[0][1], order.get(x[0][0], len(order)), x[0][0])))


def rows_of(chosen: dict[tuple[str, bool], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows that count."""
    from narrowgemm.testing import results

    return [r for (suite, _), files in chosen.items() for r in results.merge(files) if r["suite"] == suite]


def by_device(paths: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """Results by the name of their folder. Files of another schema (test summaries) are passed over."""
    from narrowgemm.testing import results

    devices: dict[str, list[dict[str, Any]]] = {}
    for p in paths:
        if json.loads(p.read_text()).get("schema") == results.SCHEMA:
            devices.setdefault(p.parent.name, []).append(results.read(p))
    return dict(sorted(devices.items()))


def table(device_files: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """(lines of one device's section, problems)."""
    from narrowgemm.cli.report import markdown_table
    from narrowgemm.testing import results

    chosen = in_order(newest(device_files))
    rows = rows_of(chosen)
    used = {id(d): d for files in chosen.values() for d in files}.values()
    versions = {n: v for d in used for n, v in d["versions"].items() if v and n in ("torch", "triton", "deepgemm")}
    lines = [f"**{device_files[-1]['device']}** ({', '.join(f'{n} {v}' for n, v in versions.items())}; commits "
             f"{', '.join(sorted({'`' + str(d['commit'])[:10] + '`' for d in used}))}; measured "
             f"{', '.join(sorted({str(d['date'])[:10] for d in used}))})", ""]
    without = {suite: missing for (suite, _), files in chosen.items() if (missing := results.left_out(suite, files))}
    lines += [*markdown_table(results.summarise(rows)), "", *not_asked(without), *wrong(rows)]
    return lines, results.check(rows, without=without)


def not_asked(without: dict[str, list[str]]) -> list[str]:
    """What a table says of peers that were left out."""
    return named("Not measured there", [(p, f"`{suite}`") for suite, peers in without.items() for p in peers])


def wrong(rows: list[dict[str, Any]]) -> list[str]:
    """What a table says of peers whose values are wrong in some cases, which then have no ratio."""
    from narrowgemm.testing import results

    counts = Counter((r["peer"], r["suite"]) for r in rows if results.wrong_peer(r))
    return named("Cases without a ratio, where the peer fails its numeric gate",
                 [(p, f"`{suite}` {n}") for (p, suite), n in counts.items()])


def named(what: str, found: list[tuple[str, str]]) -> list[str]:
    """A line that says `what` of (peer, suite) pairs, by peer."""
    by_peer: dict[str, list[str]] = {}
    for p, suite in found:
        by_peer.setdefault(p, []).append(suite)
    text = "; ".join(f"{p} ({', '.join(suites)})" for p, suites in by_peer.items())
    return [f"{what}: {text}.", ""] if text else []


def render(paths: list[Path]) -> tuple[str, list[str]]:
    """(text between the marks, problems)."""
    devices = by_device(paths)
    lines = ["Ratio = the peer's time / ours, from the same interleaved run: above 1 ours is faster. `floor` is the",
             "larger of a streaming read of the same bytes and the FLOPs over the measured ceiling.", ""]
    problems = []
    for name, files in devices.items():
        section, bad = table(files)
        lines += section
        problems += [f"{name}: {b}" for b in bad]
    if not devices:
        lines = ["No result is committed yet.", ""]
    return "\n".join(lines).rstrip() + "\n", problems


def rewritten(text: str, block: str) -> str:
    """`text` with what is between the marks replaced. ValueError where the marks are not there once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md: got no single block from {BEGIN} to {END}, expected one")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{block}{END}{rest.split(END)[1]}"


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(root / "src"))
    readme = root / "README.md"
    before = readme.read_text()
    block, problems = render(committed(root))
    after = rewritten(before, block)
    for p in problems:
        print(f"MISSING {p}", file=sys.stderr)
    if args.check:
        if after != before:
            print("README.md differs from the committed results: run python benchmarks/make_tables.py", file=sys.stderr)
        return 1 if problems or after != before else 0
    if after != before:
        readme.write_text(after)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
