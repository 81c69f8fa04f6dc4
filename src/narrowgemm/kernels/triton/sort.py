"""Slots sorted by expert: a stable counting sort in one launch (few slots) or three. Device code: `sort_device.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...arch import Arch
from ...problem import Config, Problem, Step
from ..launching import Launch, Pointer
from ..step_operands import SortOperands
from .common import LAUNCH_SECONDS
from .quantize import next_pow2

NAME = "triton.sort_by_expert"
BACKEND = "triton"
OPS = ("sort_by_expert",)
MAX_EXPERTS = 4095         # a program of the three-launch form holds a counter for each
CHUNK = 128                # slots of a program there, ranked against each other
PREFIX = 4096              # counters that a program of its prefix holds at once,
ROWS = 1024                # of so many chunks at most


def supports(problem: Problem, arch: Arch) -> str | None:
    if problem.op != "sort_by_expert":
        return f"sorts, it has no {problem.op}"
    return "runs on a GPU" if arch.vendor == "cpu" else None


def configs(problem: Problem, arch: Arch) -> list[Config]:
    """`block_m` slots at a time; `split_k` is the number of launches."""
    few = [Config(b, 1, 1, b // (8 * arch.warp), 1) for b in (1024, 512)]
    return few if problem.groups > MAX_EXPERTS else [*few, Config(CHUNK, 1, 1, 4, 1, split_k=3)]


def bins(groups: int) -> int:
    """Counters of a histogram: a power of two, for every expert and the skipped slots."""
    return next_pow2(max(groups + 1, 128))


def workspace(problem: Problem, config: Config) -> int:
    if config.split_k == 1:
        return 0
    return 4 * bins(problem.groups) * (1 + -(-problem.m // CHUNK))


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    passes = -(-problem.m // config.block_m)
    if config.split_k == 1:
        waves = max(1.0, (problem.groups + 1) / (arch.sms * 2048 / (config.num_warps * arch.warp)))
        return LAUNCH_SECONDS + waves * (0.4e-6 + passes * 2.1e-6)
    return 3 * LAUNCH_SECONDS + 3e-6 + max(1.0, passes / (4 * arch.sms)) * 2e-6


def launches(step: Step, problem: Problem, operands: SortOperands, workspace: Tensor | None) -> list[Launch]:
    from . import sort_device as device

    o, c = operands, step.config
    slots, experts = o.ids.numel(), o.experts
    known = 0 if o.expert_map is None else o.expert_map.numel()
    sizes, options = (slots, o.first_expert, experts, known), {"MAP": o.expert_map is not None, "num_stages": 1}
    if c.split_k == 1 or slots == 0:
        return [Launch(device.place_kernel, (experts + 1,), (o.ids, o.expert_map, o.out, o.inverse, o.offsets, *sizes),
                       {"BLOCK": c.block_m, "num_warps": c.num_warps, **options})]
    assert workspace is not None
    chunks, width = -(-slots // CHUNK), bins(experts)
    totals, counts = Pointer(workspace, torch.int32), Pointer(workspace, torch.int32, 4 * width)
    options |= {"num_warps": c.num_warps}
    shape = {"CHUNK": CHUNK, "BINS": width}
    rows = min(ROWS, next_pow2(chunks))
    columns = min(PREFIX // rows, 16)       # of many chunks the fewer, so that more programs share them
    return [
        Launch(device.histogram_kernel, (chunks,), (o.ids, o.expert_map, counts, *sizes), shape | options),
        Launch(device.prefix_kernel, (width // columns,), (counts, totals, chunks),
               {"BINS": width, "ROWS": rows, "COLUMNS": columns, "num_warps": c.num_warps, "num_stages": 1}),
        Launch(device.scatter_kernel, (chunks,), (o.ids, o.expert_map, counts, totals, o.out, o.inverse, o.offsets, *sizes),
               shape | options)]
