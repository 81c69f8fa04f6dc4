"""The one enumerator of cases: tests, benchmarks and the tuner take their problems from `SUITES`.

A suite has a fixed name, fixed case ids and a fixed count, so that a result that is missing is seen. `PEERS` says
against whom a suite is measured: every (case, peer) that the peer computes is a row of the result, or the report fails.
A suite's row is in `suite_table.py`, what makes its cases in `suites.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

from ..errors import expect
from .case import Case
from .guard import Guarded, guarded_empty
from .inputs import Inputs, build
from .suite_table import TABLE

__all__ = ["PEERS", "SUITES", "TITLES", "Case", "Guarded", "Inputs", "build", "find", "get_case", "get_suite", "guarded_empty"]

# Any: a Case, or a LayerCase with what the reports read of one
SUITES: dict[str, tuple[Any, ...]] = {name: tuple(suite.make(name)) for name, suite in TABLE.items()}
PEERS: dict[str, tuple[str, ...]] = {name: suite.peers for name, suite in TABLE.items()}
TITLES: dict[str, str] = {name: suite.title for name, suite in TABLE.items()}


def get_suite(name: str) -> tuple[Case, ...]:
    """A suite by name; ValueError names the ones there are."""
    expect(name in SUITES, "suite", repr(name), f"one of {sorted(SUITES)}")
    return SUITES[name]


def get_case(suite: str, case: str) -> Case:
    """A case of a suite by id; ValueError where there is none."""
    found = [c for c in get_suite(suite) if c.id == case]
    expect(bool(found), f"case of suite {suite}", repr(case), "an id that `narrowgemm bench --suite NAME --list` shows")
    return found[0]


def find(pattern: str, suites: Iterable[str] = ()) -> list[Case]:
    """Cases whose id, or `suite/id`, matches a shell pattern, in `suites` (default: all)."""
    names = tuple(suites) or tuple(SUITES)
    return [c for s in names for c in get_suite(s) if fnmatch(c.id, pattern) or fnmatch(f"{c.suite}/{c.id}", pattern)]
