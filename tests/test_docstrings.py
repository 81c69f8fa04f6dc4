"""Docstrings of the public API: each names its function's parameters and the errors that it raises, itself or by the function that it refers to."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import FunctionType

import pytest

import narrowgemm
from narrowgemm import distributed, layout_convert, nn

OPS = {name: f for name in narrowgemm.__all__ if inspect.isfunction(f := getattr(narrowgemm, name))}
CONVERTERS = {name: f for name, f in vars(layout_convert).items() if inspect.isfunction(f) and f.__module__ == layout_convert.__name__ and name[0] != "_"}
NAMED = OPS | CONVERTERS
REFERENCE = re.compile(r"\bas (?:in |of |for )?`(?:narrowgemm\.)?(\w+)`|`(\w+)`'s\b")
ERRORS = re.compile(r"Raises\b|\b(?:TypeError|ValueError|RuntimeError)\b|\b[Ee]rrors?\b.* as in\b")


def functions() -> Iterator[tuple[str, FunctionType]]:
    """(name, function) of all that a user may call, methods among them."""
    for module, names in ((narrowgemm, narrowgemm.__all__), (nn, nn.__all__), (distributed, distributed.__all__), (layout_convert, list(CONVERTERS))):
        for name in names:
            thing = getattr(module, name)
            if inspect.isfunction(thing):
                yield name, thing
            elif inspect.isclass(thing):
                for at, member in vars(thing).items():
                    method = getattr(member, "__func__", member)
                    if inspect.isfunction(method) and at[0] != "_" and method.__module__.startswith("narrowgemm"):
                        yield f"{name}.{at}", method


ALL = dict(functions())


def text_of(function: FunctionType, seen: frozenset[str] = frozenset()) -> str:
    """A docstring, and those of the functions that it refers to."""
    doc = inspect.getdoc(function) or ""
    others = {a or b for a, b in REFERENCE.findall(doc)} & NAMED.keys() - seen
    return "\n".join([doc, *(text_of(NAMED[o], seen | others) for o in sorted(others))])


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_is_named(name: str) -> None:
    doc = text_of(ALL[name])
    missing = [p for p in inspect.signature(ALL[name]).parameters if p not in ("self", "cls") and not re.search(rf"\b{p}\b", doc)]
    assert inspect.getdoc(ALL[name]) and not missing


@pytest.mark.parametrize("name", OPS)
def test_errors_are_named(name: str) -> None:
    assert ERRORS.search(text_of(OPS[name]))


def test_the_rules_find_what_is_missing() -> None:
    def good(x: int, backend: str) -> None:
        """x: a number. backend: as in `gemm`."""

    def bad(x: int, colour: str) -> None:
        """x: a number."""

    assert re.search(r"\bbackend\b", text_of(good)) and ERRORS.search(text_of(good))       # type: ignore[arg-type]
    assert not re.search(r"\bcolour\b", text_of(bad)) and not ERRORS.search(text_of(bad))  # type: ignore[arg-type]
