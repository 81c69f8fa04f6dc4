"""Device code: Triton takes a name for unchanged by a loop that holds, after one pass, the very value it held before.

A copy of another name, made in front of a loop and again in its body, is such a one, whatever becomes of the other name behind the
copy: the kernel then works with the first value for ever. `fresh` makes it a value of its own. The emulator can't see it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import narrowgemm.kernels

FILES = sorted(Path(narrowgemm.kernels.__file__).parent.rglob("*_device.py"))


def copies(node: ast.AST) -> set[tuple[str, str]]:
    """`(x, y)` of every `x = y` in a node."""
    return {(t.id, n.value.id) for n in ast.walk(node) if isinstance(n, ast.Assign) and isinstance(n.value, ast.Name)
            for t in n.targets if isinstance(t, ast.Name)}


def assigned(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def rolled(statement: ast.stmt) -> bool:
    """Whether it is a loop that stays one."""
    return isinstance(statement, ast.While) or (isinstance(statement, ast.For) and "static_range" not in ast.unparse(statement.iter))


def unmoved(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) of loops whose body copies a name that held the same copy when the loop began."""
    for block in ast.walk(ast.parse(source)):
        held: set[tuple[str, str]] = set()
        for statement in getattr(block, "body", []) if not isinstance(block, ast.Lambda | ast.IfExp) else []:
            if rolled(statement):
                inside = {pair for s in statement.body for pair in copies(s)}
                yield from ((statement.lineno, x) for x, y in held & inside if y in assigned(statement))
            changed = assigned(statement)
            held = {(x, y) for x, y in held if x not in changed and y not in changed} | (
                copies(statement) if isinstance(statement, ast.Assign) else set())


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_copies_move_with_the_loop(file: Path) -> None:
    assert not list(unmoved(file.read_text()))


def test_a_copy_that_stays_is_found() -> None:
    loop = "def f(slot):\n    old = {0}\n    {1}\n    for i in range(n):\n        g(old)\n        old = {0}\n        slot = h(slot)\n"
    assert [x for _, x in unmoved(loop.format("slot", "pass"))] == ["old"]
    assert not list(unmoved(loop.format("fresh(slot)", "pass"))) and not list(unmoved(loop.format("slot", "slot = h(slot)")))
