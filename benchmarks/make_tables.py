"""Rewrites the two tables of README.md from the committed result files: figures are never typed.

The table of results has every suite; the headline, on the first screen, those of HEADLINE against one peer each.

    python benchmarks/make_tables.py            writes README.md
    python benchmarks/make_tables.py --check    exits with 1 where README.md is not what the files say

Every folder of benchmarks/results is a device. A suite's rows against a peer are those of the newest commit that was measured
against it in all cases (in the most, where none was in all); several files of that commit count as one result. A suite with a row
missing or failed fails the script. The whole tables, with the cases behind the worst ratios and the peers that were left out or
were wrong, are on the page that `make_performance.py` writes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from narrowgemm.testing import results

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
HEADLINE_BEGIN, HEADLINE_END = "<!-- headline:begin -->", "<!-- headline:end -->"
# suite, peer, what is compared, with what; the peers that are faster belong here as much as the others
HEADLINE = (
    ("experts-fp8", "deepgemm_layer", "a whole expert layer in FP8, 1 to 16384 tokens", "DeepGEMM, with Triton steps around it"),
    ("fp8-masked-decode", "deepgemm", "FP8 experts with 1 to 20 tokens each", "DeepGEMM"),
    ("fp8-contiguous", "deepgemm", "FP8 experts with thousands of tokens each", "DeepGEMM"),
    ("a16w4-decode", "triton_kernels", "MXFP4 experts, BF16 activations, 1 to 16 tokens", "triton_kernels"),
    ("a16w4-prefill", "triton_kernels", "MXFP4 experts, BF16 activations, 1024 and 4096 tokens", "triton_kernels"),
    ("mxfp4-contiguous", "deepgemm", "MXFP4 experts, FP8 activations, thousands of tokens each", "DeepGEMM, FP8 weights"),
    ("train-step", "torch_step", "a training step of the experts in FP8", "torch in BF16"),
)


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
    """(suite, transforms inside) -> results, oldest first, each with those of its rows alone whose peer no newer commit was
    measured against, in as many cases."""
    ordered = sorted(files, key=lambda d: str(d["date"]))
    cases: dict[tuple[str, bool, str | None], dict[str, set[str]]] = {}
    for d in ordered:
        for r in d["rows"]:
            of = (r["suite"], bool(d.get("scale_transform")), r["peer"])
            cases.setdefault(of, {}).setdefault(d["commit"], set()).add(r["case"])
    last = {of: max(enumerate(commits), key=lambda x: (len(commits[x[1]]), x[0]))[1] for of, commits in cases.items()}
    chosen: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for d in ordered:
        inside, rows = bool(d.get("scale_transform")), {}
        for r in d["rows"]:
            if last[r["suite"], inside, r["peer"]] == d["commit"]:
                rows.setdefault(r["suite"], []).append(r)
        for suite, mine in rows.items():
            chosen.setdefault((suite, inside), []).append({**d, "rows": mine})
    return chosen


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


def described(name: str, files: list[dict[str, Any]]) -> str:
    """A device, and the versions, commits and dates of what was measured there."""
    versions = {n: v for d in files for n, v in d["versions"].items() if v and n in ("torch", "triton", "deepgemm")}
    return (f"{name}: {', '.join(f'{n} {v}' for n, v in versions.items())}; commits "
            f"{', '.join(sorted({'`' + str(d['commit'])[:10] + '`' for d in files}))}; measured "
            f"{', '.join(sorted({str(d['date'])[:10] for d in files}))}.")


def summaries(rows: list[dict[str, Any]]) -> dict[str, list[results.Summary]]:
    """By suite, its own peers in their order; others, where none of its own was measured."""
    from narrowgemm.testing import results
    from narrowgemm.testing.cases import PEERS

    found: dict[str, list[results.Summary]] = {}
    for s in results.summarise(rows):
        if not s.asked.endswith("+transform"):
            found.setdefault(s.suite, []).append(s)
    return {suite: sorted((s for s in mine if s.peer in PEERS[suite]), key=lambda s: PEERS[suite].index(s.peer)) or mine
            for suite, mine in found.items()}


def ratio(s: results.Summary) -> str:
    return f"{s.mean:.2f} ({s.worst:.2f})"


def cell(mine: list[results.Summary]) -> str:
    """A suite's ratios by peer; the floor only where there is no other."""
    return "<br>".join(f"{s.peer} {ratio(s)}" for s in [s for s in mine if s.peer != "floor"] or mine)


def left_out(chosen: dict[tuple[str, bool], list[dict[str, Any]]]) -> dict[str, list[str]]:
    """Suite -> its peers that the runs were not asked for."""
    from narrowgemm.testing import results

    return {suite: missing for (suite, _), files in chosen.items() if (missing := results.left_out(suite, files))}


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


def render(paths: list[Path]) -> tuple[str, str, list[str]]:
    """(the table of results, the headline, problems)."""
    from narrowgemm.testing import results
    from narrowgemm.testing.cases import SUITES, TITLES

    columns: dict[str, dict[str, list[results.Summary]]] = {}
    sources, problems = [], []
    for name, files in by_device(paths).items():
        chosen = in_order(newest(files))
        rows = rows_of(chosen)
        device = files[-1]["device"]
        columns[device] = summaries(rows)
        sources.append(described(device, [*{id(d): d for some in chosen.values() for d in some}.values()]))
        problems += [f"{name}: {p}" for p in results.check(rows, without=left_out(chosen))]
    if not columns:
        return "No result is committed yet.\n", "No result is committed yet.\n", problems
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    lines += [f"| {TITLES[s]} (`{s}`) | {' | '.join(cell(c[s]) if s in c else '-' for c in columns.values())} |"
              for s in sorted(SUITES, key=lambda s: s.startswith("portable")) if any(s in c for c in columns.values())]
    lines += ["", *(line for text in sources for line in (text, ""))]
    return "\n".join(lines).rstrip() + "\n", headline(columns), problems


def headline(columns: dict[str, dict[str, list[results.Summary]]]) -> str:
    """A row for each of HEADLINE that was measured on one of the devices."""
    lines = [f"| | against | {' | '.join(columns)} |", f"| --- | --- |{' ---: |' * len(columns)}"]
    for suite, peer, what, against in HEADLINE:
        shown = [next((ratio(s) for s in c.get(suite, ()) if s.peer == peer), "-") for c in columns.values()]
        if set(shown) != {"-"}:
            lines.append(f"| {what} | {against} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def rewritten(text: str, block: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with what is between the marks replaced. ValueError where the marks are not there once, in order."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"README.md: got no single block from {begin} to {end}, expected one")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{block}{end}{rest.split(end)[1]}"


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(root / "src"))
    readme = root / "README.md"
    before = readme.read_text()
    block, first, problems = render(committed(root))
    after = rewritten(rewritten(before, block), first, HEADLINE_BEGIN, HEADLINE_END)
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
