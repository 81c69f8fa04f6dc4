"""From measurements to rows of tuned tables: which choice a key gets, and whether it beats the cost model by enough."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .store import Row
from .sweep import Record, model_pick, name, steady, timed

MARGIN = 1.03   # a choice other than the cost model's pick has to win by this factor


def tables(records: Iterable[Record]) -> dict[str, list[Row]]:
    """Rows by table, one for every key with figures. A case whose cost model's pick has no steady time says nothing."""
    by_key: dict[tuple[str, int, int, int], list[Record]] = {}
    for r in records:
        pick = model_pick(r)
        if r["error"] is None and timed(r) and (pick is None or steady(pick)):
            by_key.setdefault((r["table"], r["n"], r["k"], r["rows"]), []).append(r)
    out: dict[str, list[Row]] = {}
    for key in sorted(by_key):
        if (row := verdict(by_key[key])) is not None:
            out.setdefault(key[0], []).append(row)
    return out


def verdict(records: list[Record]) -> Row | None:
    """The row of one key from all of its cases (other groups, sizes, dtypes); None where nothing runs all of them.

    A candidate counts by its worst case, time over the best time there. The one with the least is adopted where the cost
    model, by its picks' worst case, is slower by `MARGIN`, or where a pick of it failed; else the row holds the pick for
    the case that is named.
    """
    found = [timed(r) for r in records] if len(records) > 1 else [finalists(records[0])]
    fields = [{name(c): c for c in x} for x in found]
    best = [x[0]["us"] for x in found]
    common = [n for n in fields[0] if all(n in f for f in fields)]
    if not common:
        return None

    def ratios(names: list[str]) -> list[float]:
        return [f[n]["us"] / b for f, n, b in zip(fields, names, best)]

    worst = {n: max(ratios([n] * len(records))) for n in common}
    ranked = sorted(common, key=lambda n: (worst[n], common.index(n)))
    winner = ranked[0]
    picks = [model_pick(r) for r in records]
    names = [name(p) for p in picks if p is not None]
    sound = len(names) == len(records) and all(n in f for f, n in zip(fields, names))
    adopted = not sound or (set(names) != {winner} and max(ratios(names)) >= MARGIN * worst[winner])
    shown = ratios([winner] * len(records)) if adopted else ratios(names)
    at = shown.index(max(shown))
    field, pick = fields[at], picks[at]
    choice = winner if adopted else names[at]
    second = next((n for n in ranked if n != choice), None)
    chosen = field[choice]
    return {
        "n": records[at]["n"], "k": records[at]["k"], "rows": records[at]["rows"], "adopted": adopted,
        "kernel": chosen["kernel"], "config": chosen["config"], "us": chosen["us"], "calc_diff": chosen.get("calc_diff"),
        "runner_up": _what(field[second]) if second else None, "runner_up_us": field[second]["us"] if second else None,
        "model": _what(pick) if pick else None, "model_us": pick["us"] if pick else None,
        "worst_ratio": round(max(shown), 4), "case": f"{records[at]['suite']}/{records[at]['case']}", "cases": len(records),
        "made": _made(records)}


def finalists(record: Record) -> list[dict[str, Any]]:
    """The timed candidates that had the most rounds: a figure of the quick round was not taken beside theirs."""
    found = timed(record)
    most = max((c.get("rounds", 0) for c in found), default=0)
    return [c for c in found if c.get("rounds", 0) == most]


def _made(records: list[Record]) -> dict[str, str]:
    """Fingerprints of kernels that all records have alike: those of several commits may differ."""
    each = [r.get("made", {}) for r in records]
    return {k: v for k, v in each[0].items() if all(x.get(k) == v for x in each)}


def _what(candidate: dict[str, Any]) -> dict[str, Any]:
    return {"kernel": candidate["kernel"], "config": candidate["config"]}
