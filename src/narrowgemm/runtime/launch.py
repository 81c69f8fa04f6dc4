"""The way from a validated call to the device: plan (cached), workspace (given or allocated), one launch a step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import expect
from ..kernels.operands import Operands
from ..kernels.registry import kernels
from ..problem import Plan


def run(plan: Plan, operands: Operands, workspace: Tensor | None = None) -> None:
    """Launch every step of `plan` on the current stream. `workspace`: uint8, at least `plan.workspace_bytes`."""
    if need := plan.workspace_bytes:
        if workspace is None:
            workspace = torch.empty(need, dtype=torch.uint8, device=operands.out.device)
        else:
            expect(workspace.dtype == torch.uint8 and workspace.device == operands.out.device and workspace.is_contiguous(),
                   "workspace", f"{workspace.dtype} on {workspace.device}",
                   f"contiguous uint8 on {operands.out.device}")
            expect(workspace.numel() >= need, "workspace bytes", workspace.numel(), f"at least {need}")
    table = kernels()
    for step in plan.steps:
        table[step.kernel].launch(step, plan.problem, operands, workspace)
