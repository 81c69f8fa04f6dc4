"""What predicted times of Hopper's FP8 kernels add for routing that sends all rows to few groups.

How rows spread over groups, only the device knows. A choice is made for the expected spread, and pays a little for every
percent that it would lose if FEW groups had all the rows.
"""

from __future__ import annotations

from dataclasses import replace

from ....arch import Arch
from ....problem import Problem

SPREAD = (0.7, 0.85, 1.0, 1.15, 1.3)        # groups' sizes over the expected one
FEW = 8
INSURANCE = 0.35       # what such a loss weighs,
OF_A_LAYER = 0.05       # and where the router of a layer is in front: those are trained to spread tokens
START = 3.5e-6          # of what bytes and products must take: launch, schedule, first bytes, drain


def few(problem: Problem) -> Problem | None:
    """The problem with all rows in FEW groups; None where it has no more, or a masked layout's expected size, its caller's word."""
    if problem.layout in ("dense", "masked") or problem.active_groups <= FEW:
        return None
    return replace(problem, groups=FEW, rows=-(-problem.m // FEW))


def insured(seconds: float, when_few: float, problem: Problem, arch: Arch) -> float:
    """Seconds of the expected spread, with the share of what is lost where it takes `when_few`. `problem`: of `few`."""
    least = START + max(problem.bytes / arch.bandwidth, problem.flops / arch.fp8_flops)
    weight = OF_A_LAYER if problem.front else INSURANCE
    return seconds * (1 + weight * max(0.0, when_few - least) / least)
