"""Tuned tables: JSON under `tables/<device>/`, read once, never required.

One file a (op, layout, formats, prepacked or not): `{"schema": 1, "device", "op", "layout", "a", "b", "versions", "commit",
"rows": [...]}`.
A row is the verdict for one key, N, K and the bucket of rows per group:

| column | |
| --- | --- |
| `n`, `k`, `rows` | the key; `k` is a bucket for k_grouped, where it counts tokens |
| `adopted` | true: the choice beat the cost model's pick by `adopt.MARGIN`; false: it is that pick, and the model decides |
| `kernel`, `config`, `us`, `calc_diff` | the choice, measured on `case` |
| `runner_up`, `runner_up_us` | `{kernel, config}` of the next best, and its time there |
| `model`, `model_us` | `{kernel, config}` that the cost model picked for `case`, and its time there |
| `worst_ratio`, `cases` | the choice's time over the best, at its worst, and how many cases fell on the key |
| `made` | `{kernel: fingerprint}` of every kernel that was measured: `fingerprint.py` |

A row is a verdict between kernels as they were. `changed` says whether they still are so: dispatch passes a row over where its
choice, or what the cost model would take instead, has changed since, or was not there.

Not in the key, so one row serves all: groups, the total of rows, output dtype, accumulate, max_sms, scale dtype and order,
alignment. A choice that the kernel can't run for one of them (`supports`, `legal`) is passed by, and the cost model decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .. import json_rows
from ..arch import ARCHS, Arch
from ..prepack_bits import FP8_PREPACK
from ..problem import Config, Problem, bucket
from .fingerprint import fingerprint

PACKAGED = Path(__file__).parent / "tables"
SCHEMA = 1
SIBLINGS = {"h100": "h200"}     # the same SMs and clocks behind another memory; tables were measured on the second
REACH = 2.0      # a key without a row takes the row of the nearest bucket within this factor
Key = tuple[int, int, int]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tuned:
    kernel: str
    config: Config
    us: float
    source: str
    adopted: bool = True
    made: tuple[tuple[str, str], ...] = ()

    def changed(self, *kernels: str) -> str:
        """The first of these kernels that is not what the row was measured with, '' where all are."""
        made = dict(self.made)
        return next((k for k in kernels if made.get(k) != fingerprint(k)), "")


def table_name(problem: Problem) -> str:
    """Prepacked weights have tables of their own: other kernels take them."""
    order = problem.b.prepack.partition(":")[0]
    packed = "" if not order else "-packed-fp8" if order == FP8_PREPACK else "-packed"
    return f"{problem.op}-{problem.layout}-{problem.a.format.name}-{problem.b.format.name}{packed}.json".replace(":", "_")


def key(problem: Problem) -> Key:
    """What a row of the problem's table is found by."""
    k = bucket(problem.k) if problem.layout == "k_grouped" else problem.k
    return problem.n, k, bucket(problem.rows)


def choose(problem: Problem, arch: Arch, extra: str = "") -> Tuned | None:
    """`lookup` for the device; where it has no row, a row of its `SIBLINGS` device for a problem that is bound by arithmetic.

    The two have the same SMs, so what such a problem runs fastest with is the same; where bytes decide, it need not be. A slice of
    a device (MIG), or a variant with other SMs, goes by that name too: packaged tables, made on all SMs, say nothing of it.
    """
    if arch.name in ARCHS and arch.sms != ARCHS[arch.name].sms:
        found = _found(problem, arch.name, extra, packaged=False)
        return found if found is not None and found.adopted else None
    found = _found(problem, arch.name, extra)
    if found is None and (other := SIBLINGS.get(arch.name)) and arch.fp8_flops * problem.bytes < arch.bandwidth * problem.flops:
        found = _found(problem, other, extra)
    return found if found is not None and found.adopted else None


def lookup(problem: Problem, device: str, extra: str = "") -> Tuned | None:
    """The tuned choice for the problem, or None where the cost model decides. `extra`: a folder read before the packaged one.

    A row of the problem's own bucket counts, wherever it is, before one of another bucket: the nearest within a factor of
    `REACH`, the larger of two equally near (packed weights: larger ones alone). A row that is not `adopted` says that the cost
    model is right there.
    """
    found = _found(problem, device, extra)
    return found if found is not None and found.adopted else None


def _found(problem: Problem, device: str, extra: str, packaged: bool = True) -> Tuned | None:
    """The row that counts, adopted or not."""
    name = table_name(problem)
    n, k, rows = key(problem)
    tables = [_table(root, device, name).get((n, k), {}) for root in (extra, str(PACKAGED) if packaged else "") if root]
    packed = bool(problem.b.prepack)    # few tokens and many have kernels of their own: a row of fewer rows says nothing of more
    buckets = [b for t in tables for b in t if b >= rows or not packed] if rows else []
    near = min(((abs(math.log(b / rows)), -b) for b in buckets), default=None)
    if near is None or near[0] > math.log(REACH) + 1e-9:
        return None
    return next(t[-near[1]] for t in tables if -near[1] in t)


@lru_cache(maxsize=256)
def _table(root: str, device: str, name: str) -> dict[tuple[int, int], dict[int, Tuned]]:
    """(N, K) -> bucket of rows -> choice."""
    out: dict[tuple[int, int], dict[int, Tuned]] = {}
    for r in read_rows(Path(root) / device / name):
        source = f"{device}/{name} ({r['rows']} rows)"
        tuned = Tuned(r["kernel"], Config.from_dict(r["config"]), r["us"], source, r.get("adopted", True),
                      tuple(sorted(r.get("made", {}).items())))
        out.setdefault((r["n"], r["k"]), {})[r["rows"]] = tuned
    return out


def read_rows(path: Path) -> list[Row]:
    """The rows of a table, none where there is no file. ValueError where it is a table of another schema, or none."""
    if not path.is_file():
        return []
    doc = json_rows.read(path, "a tuned table: make it anew with `narrowgemm tune`")
    schema = doc.get("schema") if isinstance(doc, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"tuned table {path}: got schema {schema!r}, expected {SCHEMA}; make it anew with "
                         "`narrowgemm tune`")
    for r in doc["rows"]:
        if missing := [c for c in ("n", "k", "rows", "kernel", "config", "us") if c not in r]:
            raise ValueError(f"tuned table {path}: a row has no {missing[0]!r}: {r}; make it anew with `narrowgemm tune`")
    return doc["rows"]


def outdated(rows: Iterable[Row]) -> list[Row]:
    """Adopted rows whose choice is of a kernel that has changed since: no call gets them. Where the cost model was right, its pick
    is what calls get, whatever has changed."""
    return [r for r in rows if r.get("adopted", True) and r.get("made", {}).get(r["kernel"]) != fingerprint(r["kernel"])]


def row_key(row: Row) -> Key:
    return row["n"], row["k"], row["rows"]


def write_table(root: Path, device: str, name: str, header: dict[str, Any], rows: Iterable[Row]) -> Path:
    """Put `rows` into `root/device/name`, over rows of the same key; rows of other keys stay. Replaced in one step.

    Lookups of this process see the new table; Plans that it has made already stay as they are.
    """
    path = root / device / name
    merged = {row_key(r): r for r in (*read_rows(path), *rows)}
    json_rows.write(path, {"schema": SCHEMA, "device": device, **header}, "rows", [merged[k] for k in sorted(merged)])
    _table.cache_clear()
    return path
