"""Sweep files: every candidate measured on every case. What tables are made from, and what cost models are fitted to.

    {schema, device, arch, versions, commit, date, timer, suites,
     cases: [{suite, case, table, n, k, rows, groups, m, error, made,
              candidates: [{kernel, backend, config, predicted_us, us, spread, rounds, calc_diff, recipe_diff, error}]}]}

`us` is kernel time; those of one case are comparable, the more `rounds` the better. `predicted_us` is what the kernel's
`estimate` said then. A candidate with `error` failed a gate, or could not be compiled, launched or timed: `us` is null.
A case of `error` has no figures. `made`: the fingerprint of each kernel.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import json_rows
from ..errors import expect

SCHEMA = "narrowgemm-sweep/1"
HEADER = ("schema", "device", "arch", "versions", "commit", "date", "timer", "suites")
Record = dict[str, Any]


def write(path: Path, header: dict[str, Any], records: Iterable[Record]) -> None:
    json_rows.write(path, {h: header.get(h) for h in HEADER} | {"schema": SCHEMA}, "cases", list(records))


def read(path: Path) -> dict[str, Any]:
    """A sweep file. ValueError where there is none, or one of another schema."""
    expect(path.is_file(), "sweep file", str(path), "a file that `narrowgemm tune --sweep` wrote")
    data = json_rows.read(path, "a sweep file")
    schema = data.get("schema") if isinstance(data, dict) else None
    expect(schema == SCHEMA and isinstance(data.get("cases"), list), f"{path}, schema", repr(schema),
           f"{SCHEMA!r} with cases")
    return data


STEADY = 0.15   # spread of rounds, over their median: with more, another process was in the way, and the time may be anything


def timed(record: Record) -> list[dict[str, Any]]:
    """Candidates that passed both gates and have a steady time, fastest first."""
    return sorted((c for c in record["candidates"] if c["error"] is None and c["us"] and steady(c)), key=lambda c: c["us"])


def steady(candidate: dict[str, Any]) -> bool:
    """Whether its rounds agree."""
    return (candidate.get("spread") or 0.0) <= STEADY


def model_pick(record: Record) -> dict[str, Any] | None:
    """The candidate that the cost model picked when the sweep was made."""
    return min(record["candidates"], key=lambda c: c["predicted_us"], default=None)


def name(candidate: dict[str, Any]) -> str:
    """What tells a candidate from the others of its case."""
    return f"{candidate['kernel']} {json.dumps(candidate['config'], sort_keys=True)}"
