"""A peer's call on one case, as its adapter prepares it, and whether the peer can be imported at all."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

# A peer is not failed over the last bits of its sum, only where its product is another one.
SAME_BITS_LIMIT = 1e-4


@dataclass(frozen=True)
class Prepared:
    """A peer's call on one case. `rows(g)`: group g of its output after a `run`, to be held against a reference.

    `gate`: 'kernel' against the product of the same bits, 'recipe' against that of the sources; `limit` on calc_diff.
    """

    run: Callable[[], object]
    rows: Callable[[int], Tensor] | None = None
    gate: str = "kernel"
    limit: float = SAME_BITS_LIMIT


@lru_cache(maxsize=16)
def import_error(module: str) -> str | None:
    """Why a peer's module can't be imported, or None where it can."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, AssertionError, RuntimeError) as e:
        return f"{module} can't be imported: {e}"
    return None
