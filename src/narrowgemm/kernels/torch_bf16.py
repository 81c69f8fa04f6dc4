"""BF16 products by torch: `mm` and `nn.functional.grouped_mm`. The baseline that narrow formats are held against.

cuBLAS and torch's grouped product are what many rows of BF16 are served best by; few rows a group go to `triton.bf16`.
`grouped_mm` allocates its result and leaves rows outside the groups undefined, so the rows of the groups are copied over. Neither
is bound to a signature: every call goes through torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arch import Arch
from ..problem import Config, Problem, Step
from .operands import Operands

NAME = "torch_bf16"
BACKEND = "torch"
MOST_GROUPS = 1023         # what torch's kernel sets its problems up for
EFFICIENCY = 0.75          # of the BF16 rate, and of bandwidth
LAUNCH_SECONDS = 12e-6     # grouped_mm sets its problems up on the device first
DENSE, DENSE_SECONDS = 0.95, 2e-6      # cuBLAS


def supports(problem: Problem, arch: Arch) -> str | None:
    if problem.a.format.name != "bf16" or problem.b.format.name != "bf16" or problem.out_dtype != "bf16":
        return "takes BF16 operands and gives BF16"
    if (problem.op, problem.layout) not in (("gemm", "dense"), ("grouped_gemm", "offsets")):
        return f"has no {problem.op} for the {problem.layout} layout"
    if arch.vendor == "cpu" or (arch.vendor == "nvidia" and arch.capability < 80):
        return "runs on GPUs that have a BF16 matrix instruction"
    if not problem.epilogue.plain or problem.gather or problem.a.prepack or problem.b.prepack:
        return "has no fused gather, no epilogue beyond the sum and no prepacked operands"
    if problem.accumulate or problem.max_sms:
        return "neither accumulates nor limits its SMs"
    if problem.layout == "offsets" and problem.groups > MOST_GROUPS:
        return f"takes {MOST_GROUPS} groups at most"
    if "strided" in (problem.a.major, problem.b.major) or not (problem.a.aligned and problem.b.aligned):
        return "needs operands whose rows or columns are contiguous and on 16 bytes"
    return None


def configs(problem: Problem, arch: Arch) -> list[Config]:
    return [Config(0, 0, 0, 0, 0)]


def workspace(problem: Problem, config: Config) -> int:
    return 0


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    if problem.layout == "dense":
        return DENSE_SECONDS + max(problem.flops / arch.bf16_flops, problem.bytes / arch.bandwidth) / DENSE
    copied = 3 * 2.0 * problem.m * problem.n
    return LAUNCH_SECONDS + max(problem.flops / arch.bf16_flops, problem.bytes / arch.bandwidth) / EFFICIENCY \
        + copied / arch.bandwidth


@torch.no_grad()        # torch takes no `out` where an operand requires a gradient, as a parameter does
def launch(step: Step, problem: Problem, operands: Operands, workspace: Tensor | None) -> None:
    x = operands
    if problem.layout == "dense":
        torch.mm(x.a.data, x.b.data.mT, out=x.out)
        return
    assert x.index is not None
    bounds = x.index.clamp(0, x.m)
    # groups start where the one before ends: rows in front of the first group are computed with it, and not copied
    ends = bounds[1:].cummax(0).values.to(torch.int32)
    with torch.autocast(x.out.device.type, enabled=False):
        y = torch.nn.functional.grouped_mm(x.a.data, x.b.data.mT, offs=ends)
    rows = torch.arange(x.m, device=x.out.device)
    live = (rows >= bounds[0]) & (rows < ends[-1])
    torch.where(live[:, None], y, x.out, out=x.out)
