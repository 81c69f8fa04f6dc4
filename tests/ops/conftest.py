"""Fixtures of the ops' tests: where they run, and launches that are bound to nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from narrowgemm.kernels.launching import READY
from narrowgemm.ops import experts as experts_module
from narrowgemm.ops import experts_warm, recall


@pytest.fixture(params=[pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)])
def where(request) -> str:
    """The CPU, where the reference runs, or the GPU and what is chosen there."""
    return request.param


class Ready:
    """In place of a step's bound launches: notes what it is called with, and launches nothing."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, addresses) -> bool:
        self.seen.append(addresses)
        return False


class Joined:
    """In place of all steps' launches as one: hands each step its addresses."""

    def __init__(self, parts, operands: int) -> None:
        self.parts, self.operands, self.answer = parts, operands, True

    def launch(self, addresses) -> bool:
        assert len(addresses) == self.operands
        for ready, at in self.parts:
            ready.seen.append(tuple(addresses[i] for i in at))
        return self.answer


@pytest.fixture
def warm(monkeypatch) -> Callable[[dict[str, dict]], list[Joined]]:
    """Binds the steps of a plan to nothing; what their launches are put into comes back as it is made."""
    made: list[Joined] = []

    def joined(parts, operands: int) -> Joined:
        made.append(Joined(parts, operands))
        return made[-1]

    def bind(memos: dict[str, dict]) -> list[Joined]:
        for memo in memos.values():
            memo[READY] = Ready()
        return made

    if recall._maker() is None:
        pytest.skip("this torch's guards are not what they were")
    monkeypatch.setattr(experts_warm, "joined", joined)
    monkeypatch.setattr(experts_module, "_calls", recall.Calls())
    return bind
