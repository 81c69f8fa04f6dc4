"""No kernel at all: what Triton's cache names every kernel by. Run by test_cache_keys.py, in a process whose kernels are compiled ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import narrowgemm


def clashes() -> list[str]:
    """Kernels that reach constants of one name and different values in several modules: Triton puts them into the key in the order of
    these modules' addresses, so that a process may miss what another one has compiled."""
    from triton.runtime.jit import JITFunction

    root, found, seen = Path(narrowgemm.__file__).parent, [], 0
    for file in sorted(root.rglob("*_device.py")):
        name = ".".join(["narrowgemm", *file.relative_to(root).with_suffix("").parts])
        module = import_module(name)
        for function in vars(module).values():
            if not isinstance(function, JITFunction) or function.fn.__module__ != name:
                continue
            seen += 1
            assert function.cache_key
            values: dict[str, set[str]] = defaultdict(set)
            for (constant, _), (value, _) in function.used_global_vals.items():
                values[constant].add(str(value))
            found += [f"{name}.{function.fn.__name__}: {c} is {sorted(v)}" for c, v in values.items() if len(v) > 1]
    assert seen > 500, f"{seen} functions only"
    return found


def jobs(target: str) -> Iterator[None]:
    assert not (found := clashes()), "\n".join(found)
    yield from ()
