"""Warm calls of `experts`: every step's launches are bound, so nothing is left but addresses, and no tensor is made for them.

A step's tensors are the caller's, or lie at fixed places in the workspace. The first call of a signature notes which is which;
later ones add the offsets to the workspace's address and hand the sums to the bound launches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.launching import READY
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

    def result(self) -> list[tuple[str, tuple[Place, ...]]] | None:
        """The places of every step, if every step is bound."""
        steps = self.steps
        return steps if steps and all(self.plan.memos[name].get(READY) for name, _ in steps) else None


def launch(plan: ExpertsPlan, outside: Sequence[Tensor | None], workspace: Tensor) -> bool:
    """Launch every step; False where it can't be done this way (some steps may have run: running them all again is safe)."""
    notes = plan.notes
    if not notes:
        return False
    table = [0, workspace.data_ptr(), *[0 if t is None else t.data_ptr() for t in outside]]
    if table[1] & 15:
        return False
    for name, places in notes:
        ready = plan.memos[name].get(READY)
        if ready is None or not ready(tuple([table[i] + at for i, at in places])):
            return False
    return True


def space(plan: ExpertsPlan, device: torch.device) -> Tensor:
    """A workspace of torch's."""
    return torch.empty_strided((plan.bytes,), (1,), dtype=torch.uint8, device=device)
