"""The ring of the smallest tiles of FP8 tokens, two blocks an SM: its slots, and whether weights pass through L2."""

from __future__ import annotations

from typing import Any

from ....arch import Arch
from ....problem import Problem
from .narrow_model import active_experts
from .occupancy import STREAM_CACHES

# K blocks of a slot, and slots. An H100 is 1-3% faster by 8 K blocks in four slots than by 7 in seven, as it is by only 4; an H200
# 1.5-2.7% by 6 in three, and 2% slower by 4
BOX, SLOTS = 2, 3


def options(problem: Problem, arch: Arch) -> tuple[tuple[str, Any], ...]:
    """Of a config, in order. Weights pass through L2, which gives them up first and keeps what others wrote, if they are of groups
    and not many times as large: of those, each is read once."""
    weights = active_experts(problem) * problem.b.format.storage_bytes(problem.n, problem.k)
    stream = problem.layout != "dense" and weights <= STREAM_CACHES * arch.l2
    return (("box", BOX), ("ctas", 2), *((("stream", 1), ) if stream else ()))
