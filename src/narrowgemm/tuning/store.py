"""Tuned tables: JSON under `tables/<device>/`, read once, never required.

One file a (op, layout, formats): `{"schema": 1, "op", "layout", "a", "b", "rows": [{"n", "k", "rows", "kernel",
"config", "us", "runner_up", "runner_up_us", "calc_diff"}]}`. `rows` is the bucket of rows per group; groups are no key.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..problem import Config, Problem, bucket

PACKAGED = Path(__file__).parent / "tables"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Tuned:
    kernel: str
    config: Config
    us: float
    source: str


def table_name(problem: Problem) -> str:
    return f"{problem.op}-{problem.layout}-{problem.a.format.name}-{problem.b.format.name}.json".replace(":", "_")


def lookup(problem: Problem, device: str, extra: str = "") -> Tuned | None:
    """The tuned choice for the problem's (N, K, rows bucket), or None. `extra` is a folder read before the packaged one."""
    key = (problem.n, problem.k, bucket(problem.rows))
    for root in filter(None, (extra, str(PACKAGED))):
        found = _table(root, device, table_name(problem)).get(key)
        if found is not None:
            return found
    return None


@lru_cache(maxsize=256)
def _table(root: str, device: str, name: str) -> dict[tuple[int, int, int], Tuned]:
    path = Path(root) / device / name
    if not path.is_file():
        return {}
    doc = json.loads(path.read_text())
    if doc.get("schema") != SCHEMA:
        raise ValueError(f"tuned table {path}: got schema {doc.get('schema')!r}, expected {SCHEMA}; make it anew with "
                         "`narrowgemm tune`")
    return {(r["n"], r["k"], r["rows"]): Tuned(r["kernel"], Config.from_dict(r["config"]), r["us"], f"{device}/{name}")
            for r in doc["rows"]}
