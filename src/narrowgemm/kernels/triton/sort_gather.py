"""`sort_by_expert` and `gather_quantize` of few slots in one launch, for a layer of few tokens. Device: `sort_gather_device.py`."""

from __future__ import annotations

from torch import Tensor

from ...arch import Arch
from ...problem import Config, Problem, Step
from ..launching import Launch
from ..step_operands import SortGatherOperands
from . import steps
from .quantize import native, next_pow2
from .steps import legal, tile_configs

NAME = "triton.sort_gather"
BACKEND = "triton"
OPS = ("sort_gather",)
MAX_SLOTS = 2048           # each program looks at all of them,
BY_SLOT = 512              # one a slot up to so many, else one a token
TABLE = 8                  # offsets that a program writes

__all__ = ["BACKEND", "NAME", "OPS", "configs", "estimate", "launches", "legal", "supports", "workspace"]


def supports(problem: Problem, arch: Arch) -> str | None:
    if reason := steps.refuse(problem, arch, "sort_gather") or steps.refuse_format(problem, arch):
        return reason
    if steps.by_rows(problem.b.format):
        return "quantises blocks of a row, not whole rows"
    slots = problem.m * problem.a_div
    return None if slots <= MAX_SLOTS else f"is for {MAX_SLOTS} slots and fewer, not {slots}"


def configs(problem: Problem, arch: Arch) -> list[Config]:
    if problem.m * problem.a_div <= BY_SLOT:
        return tile_configs(problem, arch, (1024, 2048, 4096))
    return tile_configs(problem, arch, (4096,))


def workspace(problem: Problem, config: Config) -> int:
    return 0


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """A gather that reads a token for each of its slots, in L2, and looks at ids first."""
    slots = problem.m * problem.a_div
    rows = min(slots, problem.groups * problem.rows) if problem.rows else slots
    nbytes = problem.a.format.storage_bytes(problem.m, problem.k) + problem.b.format.storage_bytes(rows, problem.k)
    few = slots <= BY_SLOT
    programs = (slots if few else problem.m) * -(-problem.k // (config.block_m * config.block_k)) + -(-problem.groups // TABLE)
    return 1.0e-6 + (1.5e-9 if few else 0.8e-9) * slots + steps.seconds(nbytes, programs, config, arch)


def launches(step: Step, problem: Problem, operands: SortGatherOperands, workspace: Tensor | None) -> list[Launch]:
    from . import sort_gather_device as device

    o, c, fmt = operands, step.config, problem.b.format
    x, out, scale = o.x, o.rows.data, o.rows.scale
    slots, k = o.ids.numel(), x.shape[1]
    known = 0 if o.expert_map is None else o.expert_map.numel()
    blocks = -(-k // c.block_k)
    bg = min(c.block_m, next_pow2(blocks))
    sr, ss = (0, 0) if scale is None else scale.stride()
    by_slot = slots <= BY_SLOT
    kernel = device.sort_gather_kernel if by_slot else device.sort_gather_tokens_kernel
    return [Launch(kernel, (-(-(o.experts + 1) // TABLE) + (slots if by_slot else x.shape[0]) * -(-blocks // bg),), (
        o.ids, o.expert_map, x, o.row_map, o.inverse, o.offsets, out, scale, slots, o.first_expert, o.experts, known, k, blocks,
        o.amax_clamp, x.stride(0), out.stride(0), sr, ss),
        {"MAP": o.expert_map is not None, "SLOTS": max(16, next_pow2(slots)), "TABLE": TABLE, "TOP_K": o.top_k, "N": c.block_k,
         "BG": bg, "EVEN": k % c.block_k == 0, "KIND": "blocks" if fmt.scaled else "copy", "NATIVE": native(x),
         "LEADS": steps.leads(x), **steps.scale_constants(fmt, o.rounding, x), "num_warps": c.num_warps, "num_stages": 1})]
