"""Slots sorted by expert: a stable counting sort in one launch (few slots) or two. Device code: `sort_device.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...arch import Arch
from ...problem import Config, Problem, Step
from ..step_operands import SortOperands
from . import steps
from .quantize import next_pow2

NAME = "triton.sort_by_expert"
BACKEND = "triton"
OPS = ("sort_by_expert",)
MAX_EXPERTS = 4095         # a program of the two-launch form holds a counter for each
CHUNK = 1024               # slots of a program there
RANKED = 128               # of them ranked against each other at a time


def supports(problem: Problem, arch: Arch) -> str | None:
    if problem.op != "sort_by_expert":
        return f"sorts, it has no {problem.op}"
    return "runs on a GPU" if arch.vendor == "cpu" else None


def configs(problem: Problem, arch: Arch) -> list[Config]:
    """`block_m` slots at a time; `split_k` is the number of launches."""
    few = [Config(b, 1, 1, b // (8 * arch.warp), 1) for b in (1024, 512)]
    return few if problem.groups > MAX_EXPERTS else [*few, Config(CHUNK, 1, 1, 8, 1, split_k=2)]


def bins(groups: int) -> int:
    """Counters of a histogram: a power of two, for every expert and the skipped slots."""
    return next_pow2(max(groups + 1, 128))


def workspace(problem: Problem, config: Config) -> int:
    if config.split_k == 1:
        return 0
    return 4 * bins(problem.groups) * -(-problem.m // CHUNK)


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    passes = -(-problem.m // config.block_m)
    if config.split_k == 1:
        waves = max(1.0, (problem.groups + 1) / (arch.sms * 8))
        return steps.LAUNCH_SECONDS + waves * (0.6e-6 + passes * 0.9e-6 * config.block_m / 1024)
    counters = passes * bins(problem.groups)
    return 2 * steps.LAUNCH_SECONDS + 6e-6 + max(1.0, passes / arch.sms) * (6e-6 + counters * 1e-10)


def launch(step: Step, problem: Problem, operands: SortOperands, workspace: Tensor | None) -> None:
    from . import sort_device as device

    o, c = operands, step.config
    r = o.routing
    slots, experts = o.ids.numel(), r.num_experts
    ids = o.ids.reshape(-1)
    known = 0 if o.expert_map is None else o.expert_map.numel()
    common = (slots, o.first_expert, experts, known)
    mapped = {"MAP": o.expert_map is not None, "num_stages": 1}
    if c.split_k == 1 or slots == 0:
        device.place_kernel[(experts + 1,)](ids, o.expert_map, r.row_map, r.inverse, r.offsets, *common, BLOCK=c.block_m,
                                            num_warps=c.num_warps, **mapped)
        return
    assert workspace is not None
    chunks, bp = -(-slots // CHUNK), bins(experts)
    counts = workspace.view(torch.int32)
    device.histogram_kernel[(chunks,)](ids, o.expert_map, counts, *common, CHUNK=CHUNK, EP=bp, num_warps=4, **mapped)
    device.scatter_kernel[(chunks,)](ids, o.expert_map, counts, r.row_map, r.inverse, r.offsets, *common, chunks,
                                     CHUNK=CHUNK, BLOCK=RANKED, EP=bp, AHEAD=max(1, 8192 // bp), num_warps=c.num_warps,
                                     **mapped)
