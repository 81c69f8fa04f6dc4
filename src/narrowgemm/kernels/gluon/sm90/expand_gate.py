"""The launches of `expand.py` behind a product that may have left everything to them, decided on the device: where it has not, they
cost next to nothing."""

from __future__ import annotations

from torch import Tensor

from ....problem import Problem, Step
from ...launching import Launch
from ...operands import Operands
from . import expand, expand_rows
from .expand import Gate

PROGRAMS = 5        # an SM, that take the pieces in turn: as many as it has registers for
REGISTERS = 88      # of a lane


def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor, start: int, gate: Gate) -> list[Launch]:
    """As `expand.launches`, of packed weights, or of rows that a program holds."""
    from ....arch import detect
    from . import expand_gate_device as device

    if expand.plain(problem):
        front = expand_rows.front(x, expand.columns(x.k), expand.regions(problem, x.m, start), workspace)
        *a, cfg = front.arguments
        kernel, arguments = device.gated_rows_kernel, [*a, front.grid[0], *gate, cfg]
    else:
        front = expand.front(problem, x, workspace, start, gate)
        a = list(front.arguments)
        # without what is for plain weights: factors of their columns, their rows, pieces of these and strides
        kernel, arguments = device.gated_expand_kernel, [*a[:8], *a[9:17], a[17], front.grid[0], a[18], *a[19:24], *a[29:]]
    programs = min(front.grid[0], PROGRAMS * detect(x.out.device).sms)
    return [Launch(kernel, (programs,), arguments, {**front.keywords, "maxnreg": REGISTERS, "launch_pdl": True}),
            expand.product_behind(step.config, problem, x, workspace, start, gate)]
