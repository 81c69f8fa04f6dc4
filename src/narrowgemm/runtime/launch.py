"""The way from a validated call to the device: plan (cached), workspace (given or allocated), launches (bound, where known)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import expect
from ..kernels import launching
from ..kernels.launching import READY
from ..kernels.operands import Memo, Operands, without_memory
from ..kernels.registry import kernels
from ..kernels.step_operands import StepOperands
from ..problem import Plan, Problem, Step


def run(plan: Plan, operands: Operands | StepOperands, workspace: Tensor | None = None) -> None:
    """Launch every step of `plan` on the current stream of `out`'s device.

    `workspace`: uint8 on 16 bytes, at least `plan.workspace_bytes`; allocated where None. Tensors without memory (on 'meta', or
    torch's fake ones) have a shape, which is all that is wanted of them: nothing is launched.
    """
    out, memo = operands.out, operands.memo
    if not out.data_ptr() and out.numel():
        without_memory(out)
        return
    expect(workspace is None or isinstance(workspace, Tensor), "workspace", type(workspace).__name__, "a torch.Tensor or None",
           error=TypeError)
    if out.is_cuda and out.get_device() != torch.cuda.current_device():
        with torch.cuda.device(out.device):
            return run(plan, operands, workspace)
    if need := plan.workspace_bytes:
        if workspace is None:
            workspace = torch.empty(need, dtype=torch.uint8, device=out.device)
        else:
            expect(workspace.dtype == torch.uint8 and workspace.device == out.device and workspace.is_contiguous(),
                   "workspace", f"{workspace.dtype} on {workspace.device}",
                   f"contiguous uint8 on {out.device}")
            expect(workspace.numel() >= need, "workspace bytes", workspace.numel(), f"at least {need}")
            expect(workspace.data_ptr() % 16 == 0, "workspace, address modulo 16", workspace.data_ptr() % 16,
                   "0: kernels copy 16 bytes of it at a time")
    ready, addresses = None if memo is None else memo.get(READY), operands.addresses(workspace)
    if ready is not None and ready(addresses):
        return
    for step in plan.steps:
        launch(step, plan.problem, operands, workspace)
    if memo is not None and READY not in memo:
        memo[READY] = launching.collect(plan, operands, workspace)


def launch(step: Step, problem: Problem, operands: Operands | StepOperands, workspace: Tensor | None = None) -> None:
    """One step on the current stream, by its kernel's own `launch`, or by what its `launches` lists."""
    kernel: Any = kernels()[step.kernel]
    own = getattr(kernel, "launch", None)
    if own is not None:
        own(step, problem, operands, workspace)
    else:
        launching.launch(kernel.launches, step, problem, operands, workspace)


def again(memo: Memo, addresses: tuple[int, ...], out: Tensor, out_scale: int = 0) -> bool:
    """Launch what calls of this signature are known to come to, without making Operands.

    `addresses`: of a, its scales, b, its scales, and the index, 0 where there is none; how they are aligned is in the signature.
    False where nothing was done: `run` has to.
    """
    ready = memo.get(READY)
    if ready is None:
        return False
    a, a_scale, b, b_scale, index = addresses
    if not a or not b:      # without memory of their own: `run` says which can't be taken
        return False
    work = 0
    if ready.workspace_bytes:
        # held until the launch is made; from then on the stream's order keeps it
        workspace = torch.empty_strided((ready.workspace_bytes,), (1,), dtype=torch.uint8, device=out.device)
        work = workspace.data_ptr()
    at = out.data_ptr()
    return ready.aligned(work | at | out_scale) and ready.launch((work, a, a_scale, b, b_scale, at, index, out_scale))
