"""Result files: one schema for every benchmark, and what makes a set of rows complete.

    {schema, device, arch, versions, commit, date, timer, ceilings, scale_transform, suites, peers,
     rows: [{suite, case, asked, backend, config, us, tflops, gbs, calc_diff, recipe_diff, snr_db,
             recipe_snr_db, peer, peer_us, peer_calc_diff, ratio, error, note}]}

One row a (case, backend asked for, peer). `ratio = peer_us / us`, both from one interleaved measurement. `us` is kernel
time in microseconds; `tflops` is 2·M·N·K over rows that belong to a group; `gbs` counts each operand in use and the
output once. `calc_diff` is the worst of overall and every group, against the same bits; `recipe_diff` against the
sources; `snr_db` and `recipe_snr_db` are the same as signal to noise. `error` is null, or why a figure is missing: a row is
always there.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import json_rows
from .case import Case
from .cases import PEERS, SUITES
from .peers import computes

SCHEMA = "narrowgemm-bench/1"
COLUMNS = ("suite", "case", "asked", "backend", "config", "us", "tflops", "gbs", "calc_diff", "recipe_diff", "snr_db",
           "recipe_snr_db", "peer", "peer_us", "peer_calc_diff", "ratio", "error", "note")
HEADER = ("schema", "device", "arch", "versions", "commit", "date", "timer", "ceilings", "scale_transform", "suites",
          "peers")
Row = dict[str, Any]


def make_row(case: Case, asked: str, peer: str | None, **values: Any) -> Row:
    """A row with every column; `error` text for one that has no figures."""
    row: Row = dict.fromkeys(COLUMNS)
    row.update(suite=case.suite, case=case.id, asked=asked, peer=peer)
    unknown = set(values) - set(COLUMNS)
    assert not unknown, unknown
    return row | values


def key(row: Row) -> tuple[str, str, str, str | None]:
    return row["suite"], row["case"], row["asked"], row["peer"]


def own_failure(row: Row) -> bool:
    """Whether it is our side that the row has no figure of, or a wrong one; what failed in its peer begins with the peer's name."""
    return row["error"] is not None and not (row["peer"] and row["error"].startswith(f"{row['peer']}: "))


def write_json(path: Path, header: dict[str, Any], rows: Sequence[Row]) -> None:
    """Replace `path` in one step, so that an interrupted run leaves the rows so far and never half a file."""
    json_rows.write(path, {h: header.get(h) for h in HEADER}, "rows", [clean(r) for r in rows])


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """The rows as CSV, one column a field of `Row`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as f:
        out = csv.DictWriter(f, COLUMNS)
        out.writeheader()
        out.writerows(rows)


def clean(x: Any) -> Any:
    """Without NaN and infinity, which JSON has not."""
    if isinstance(x, dict):
        return {k: clean(v) for k, v in x.items()}
    return None if isinstance(x, float) and not math.isfinite(x) else x


def read(path: Path) -> dict[str, Any]:
    """A result file. ValueError where it is none of this schema."""
    data = json_rows.read(path, "a result file")
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA or not isinstance(data.get("rows"), list):
        raise ValueError(f"{path}: got schema {schema!r}, expected {SCHEMA!r} with rows")
    for row in data["rows"]:
        if missing := [c for c in ("suite", "case", "peer", "us", "ratio") if c not in row]:
            raise ValueError(f"{path}: a row of case {row.get('case')!r} has no {missing[0]!r}")
        row.setdefault("asked", "auto")
        row.setdefault("error", None)
    return data


def merge(files: Iterable[dict[str, Any]]) -> list[Row]:
    """Rows of several files; of two rows for one thing the later counts, unless only the earlier has figures."""
    rows: dict[tuple[Any, ...], Row] = {}
    for data in files:
        for row in data["rows"]:
            row = row if not data.get("scale_transform") else row | {"asked": row["asked"] + " +transform"}
            if row["error"] is None or rows.get(key(row), row)["error"] is not None:
                rows[key(row)] = row
    return list(rows.values())


@dataclass(frozen=True)
class Summary:
    """A suite against a peer: geometric mean and worst of the ratios."""

    suite: str
    asked: str
    peer: str
    cases: int
    mean: float
    worst: float
    worst_case: str


def expected(suite: str, peers: Sequence[str]) -> list[tuple[Case, str | None]]:
    """Every (case, peer) that a result of the suite must have; peer None where no peer computes the case."""
    out: list[tuple[Case, str | None]] = []
    for case in SUITES[suite]:
        mine = [p for p in peers if computes(p, case)]
        out += [(case, p) for p in mine] or [(case, None)]
    return out


def left_out(suite: str, files: Iterable[dict[str, Any]]) -> list[str]:
    """The suite's own peers (`cases.PEERS`) that none of the runs in `files` was asked for."""
    asked = {p for d in files for p in d["peers"]}
    return [p for p in PEERS.get(suite, ()) if p not in asked]


def wrong_peer(row: Row) -> bool:
    """Whether it is the peer of this row, not ours, that failed its numeric gate."""
    return row["peer"] is not None and "gate FAILED" in str(row["error"]) and str(row["error"]).startswith(f"{row['peer']}: ")


def check(rows: Sequence[Row], suites: Iterable[str] = (), peers: Iterable[str] = (),
          without: Mapping[str, Iterable[str]] | None = None) -> list[str]:
    """What is missing or failed: an empty list where every suite of `rows` (and of `suites`) is whole.

    A suite needs a row for every one of its peers (`cases.PEERS`) and every other peer that `rows` or `peers` name; `without`: by
    suite, peers that were left out on purpose (`left_out`). A peer's wrong values (`wrong_peer`) are a finding, not a problem.
    """
    problems = []
    by_key = {key(r): r for r in rows}
    for suite in dict.fromkeys([*(r["suite"] for r in rows), *suites]):
        if suite not in SUITES:
            problems.append(f"{suite}: no such suite")
            continue
        mine = [r for r in rows if r["suite"] == suite]
        known = {c.id for c in SUITES[suite]}
        problems += [f"{suite}/{i}: no such case" for i in dict.fromkeys(r["case"] for r in mine) if i not in known]
        own = [p for p in PEERS[suite] if p not in set((without or {}).get(suite, ()))]
        wanted = list(dict.fromkeys([*own, *peers, *(r["peer"] for r in mine if r["peer"])]))
        for asked in dict.fromkeys(r["asked"] for r in mine) or ("auto",):
            for case, peer in expected(suite, wanted):
                row = by_key.get((suite, case.id, asked, peer))
                where = f"{suite}/{case.id} [{asked}] against {peer}"
                if row is None:
                    problems.append(f"{where}: missing")
                elif wrong_peer(row):
                    continue
                elif row["error"] is not None:
                    problems.append(f"{where}: {row['error']}")
                elif peer is not None and not (isinstance(row["ratio"], (int, float)) and row["ratio"] > 0):
                    problems.append(f"{where}: no ratio")
    return problems


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """One line a (suite, backend asked for, peer), in the order of the rows. `check` names what has no ratio."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for r in rows:
        if r["peer"] and r["error"] is None and r["ratio"]:
            groups.setdefault((r["suite"], r["asked"], r["peer"]), []).append(r)
    out = []
    for (suite, asked, peer), mine in groups.items():
        worst = min(mine, key=lambda r: r["ratio"])
        mean = statistics.geometric_mean(r["ratio"] for r in mine)
        out.append(Summary(suite, asked, peer, len(mine), mean, worst["ratio"], worst["case"]))
    return out


def perf_line(case: Case, rows: Sequence[Row]) -> str:
    """One case as DeepGEMM's tests print it, with the ratio to every peer."""
    r = rows[0]
    groups = f"num_groups={case.groups}, " if case.layout != "dense" else ""
    shape = f"{case.layout}, {groups}m={case.m}, n={case.n}, k={case.k}, {case.out_dtype}"
    shape += "" if case.sizes == "balanced" else f", {case.sizes}"
    ratios = "".join(f" | {x['ratio']:.2f}x {x['peer']}" for x in rows if x["ratio"])
    if r["us"] is None:
        return f" > Perf ({shape}): {r['asked']}: {r['error']}"
    failed = "".join(f" | {x['peer'] or 'error'}: {x['error']}" for x in rows if x["error"])
    diff = f" | diff {r['calc_diff']:.1e}" if r["calc_diff"] is not None else ""
    diff += f" | {r['recipe_snr_db']:.1f} dB" if r.get("recipe_snr_db") is not None else ""
    return (f" > Perf ({shape}): {r['us']:7.1f} us | {r['tflops']:.4g} TFLOPS | {r['gbs']:.4g} GB/s{ratios}{diff}"
            f"{failed} | {r['backend']} {r['config']}")
