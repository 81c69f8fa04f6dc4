"""Warm calls of `experts`: every step's launches are bound, so nothing is left but addresses, and no tensor is made for them.

A step's tensors are the caller's, or lie at fixed places in the workspace. The first call of a signature notes which is which,
and the launches of all steps are put into one list over one table of addresses; later calls fill the table in.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add, itemgetter, or_

import torch
from torch import Tensor

from ..kernels.launching import READY, Ready, joined
from .experts_plan import ExpertsPlan

Place = tuple[int, int]   # (0: no tensor, 1: the workspace, 2...: the caller's in their order; offset in bytes)


class Notes:
    """Where the tensors of each step of a plan come from, as the steps run for the first time."""

    def __init__(self, plan: ExpertsPlan, outside: Sequence[Tensor | None], inside: dict[str, Tensor],
                 scratch: Tensor | None) -> None:
        self.plan = plan
        self.places: dict[int, Place] = {id(t): (i + 2, 0) for i, t in enumerate(outside) if t is not None}
        self.places |= {id(t): (1, plan.buffers[name].at) for name, t in inside.items()}
        if scratch is not None:
            self.places[id(scratch)] = (1, plan.scratch[0])
        self.steps: list[tuple[str, tuple[Place, ...]]] | None = []
        given = [id(t) for t in outside if t is not None]
        if len(set(given)) < len(given):     # one tensor for two arguments: the next call may bring two
            self.steps = None

    def add(self, name: str, tensors: Sequence[Tensor | None]) -> None:
        """A step that has run on these tensors, its workspace first."""
        if self.steps is None:
            return
        found = [(0, 0) if t is None else self.places.get(id(t)) for t in tensors]
        if None in found:     # made on the way (a copy with contiguous rows): its address can't be told in advance
            self.steps = None
        else:
            self.steps.append((name, tuple(p for p in found if p is not None)))

    def result(self) -> Whole | None:
        """The launches of the whole layer, if every step's are bound, to tensors on 16 bytes."""
        if not self.steps:
            return None
        ready = [r for name, _ in self.steps if (r := self.plan.memos[name].get(READY)) is not None]
        if len(ready) < len(self.steps):
            return None
        places = list(dict.fromkeys(p for _, found in self.steps for p in found))
        number = {p: i for i, p in enumerate(places)}
        launches = joined([(r, [number[p] for p in found]) for r, (_, found) in zip(ready, self.steps)], len(places))
        return None if launches is None else Whole(places, launches)


class Whole:
    """Launches of all steps over one table of addresses."""

    __slots__ = ("_bases", "_launches", "_offsets")

    def __init__(self, places: Sequence[Place], launches: Ready) -> None:
        which = [i for i, _ in places]
        # a slice brings a list, as several indices bring a tuple
        self._bases = itemgetter(*which) if len(which) > 1 else itemgetter(slice(which[0], which[0] + 1))
        self._offsets, self._launches = [at for _, at in places], launches

    def __call__(self, outside: Sequence[Tensor | None], workspace: Tensor) -> bool:
        """Launch every step; False where nothing was, because it has to go Triton's way."""
        table = [0, workspace.data_ptr(), *[0 if t is None else t.data_ptr() for t in outside]]
        if reduce(or_, table) & 15:
            return False
        return self._launches.launch(tuple(map(add, self._bases(table), self._offsets)))


def space(plan: ExpertsPlan, device: torch.device) -> Tensor:
    """A workspace of torch's."""
    return torch.empty_strided((plan.bytes,), (1,), dtype=torch.uint8, device=device)
