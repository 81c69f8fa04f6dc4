"""Keys of Triton's cache of compiled kernels that don't depend on what a process compiled before.

A function's key takes in the constants of the functions that it calls: in Triton 3.6 and 3.7 only of those whose own keys were
worked out before. So a kernel that a process compiles first has another key than where another kernel that shares a function
with it came first, and is compiled again. Keys are worked out here from the innermost function outwards.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any


def settle(kernel: Any) -> None:
    """Work out the cache key of a Triton function, after those of all functions that it calls. Does nothing in the interpreter."""
    from triton.runtime.jit import JITCallable

    if isinstance(kernel, JITCallable):
        _settle(kernel, set())


def _settle(function: Any, seen: set[int]) -> None:
    """`seen`: ids of the functions on the way here, since one may call itself. Not the functions: hashing one works out its key."""
    if function.hash is not None or id(function) in seen:      # Triton keeps a key there once it is worked out
        return
    seen.add(id(function))
    for f in called(function):
        _settle(f, seen)
    function.cache_key      # noqa: B018  a property: reading it works the key out


def called(function: Any) -> Iterator[Any]:
    """The Triton functions that `function` names (`f`, or `module.f`), in the order of its text."""
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
