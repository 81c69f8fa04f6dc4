"""Keys of Triton's cache of compiled kernels that don't depend on what a process compiled before.

A function's key takes in the constants of the functions that it calls: in Triton 3.6 and 3.7 only of those whose own keys were
worked out before. So a kernel that a process compiles first has another key than where another kernel that shares a function
with it came first, and is compiled again. Keys are worked out here from the innermost function outwards.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

_settled: dict[int, Any] = {}      # by id, and kept: hashing a function works its key out, and a freed one's id is another's


def settle(kernel: Any) -> None:
    """Work out the cache key of a Triton function, those of all that it calls first. Nothing in the interpreter."""
    from triton.runtime.jit import JITCallable

    if id(kernel) in _settled or not isinstance(kernel, JITCallable):
        return
    _settled[id(kernel)] = kernel       # a function that calls itself stands for itself
    for f in called(kernel):
        settle(f)
    kernel.cache_key        # noqa: B018  worked out where it is read, once


def called(function: Any) -> Iterator[Any]:
    """Triton functions that one names, by itself or in a module of its globals, in the order of its text."""
    from triton.runtime.jit import JITCallable

    names = function.__globals__
    for node in ast.walk(function.parse()):
        found = None
        if isinstance(node, ast.Name):
            found = names.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found = getattr(names.get(node.value.id), node.attr, None)
        if isinstance(found, JITCallable):
            yield found
