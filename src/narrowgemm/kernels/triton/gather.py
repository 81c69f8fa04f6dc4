"""Tokens to the rows of their experts, quantised on the way: read once, written top_k times. Device: `gather_device.py`."""

from __future__ import annotations

from torch import Tensor

from ...arch import Arch
from ...problem import Config, Problem, Step
from ..launching import Launch
from ..step_operands import GatherOperands
from . import steps
from .quantize import native
from .steps import legal, tile_configs

NAME = "triton.gather_quantize"
BACKEND = "triton"
OPS = ("gather_quantize",)

__all__ = ["BACKEND", "NAME", "OPS", "configs", "estimate", "launches", "legal", "supports", "workspace"]


def supports(problem: Problem, arch: Arch) -> str | None:
    return steps.refuse(problem, arch, "gather_quantize") or steps.refuse_format(problem, arch)


def configs(problem: Problem, arch: Arch) -> list[Config]:
    return tile_configs(problem, arch)


def workspace(problem: Problem, config: Config) -> int:
    return 0


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    source, fmt, top_k = problem.a.format, problem.b.format, problem.a_div
    nbytes = source.storage_bytes(problem.m, problem.k) + top_k * fmt.storage_bytes(problem.m, problem.k)
    programs = -(-problem.m * problem.k // (config.block_m * config.block_k))
    return steps.seconds(nbytes, programs, config, arch)


def launches(step: Step, problem: Problem, operands: GatherOperands, workspace: Tensor | None) -> list[Launch]:
    from . import gather_device as device

    o, c, fmt = operands, step.config, problem.b.format
    x, out, scale = o.x, o.rows.data, o.rows.scale
    (t, k), experts = x.shape, o.offsets.numel() - 1
    common = {"TOP_K": o.top_k, "NATIVE": native(x), "num_warps": c.num_warps, "num_stages": 1}
    if steps.by_rows(fmt):
        assert scale is not None
        return [Launch(device.gather_rows_kernel, (-(-t // c.block_m),), (
            x, o.inverse, o.offsets, out, scale, t, k, experts, o.amax_clamp, x.stride(0), out.stride(0), scale.stride(0)),
            {"BT": c.block_m, "BK": c.block_k, "TOP": fmt.elem.max, **common})]
    blocks = -(-k // c.block_k)
    bt, bg = steps.split_blocks(c.block_m, blocks, False, 4)
    sr, ss = (0, 0) if scale is None else scale.stride()
    return [Launch(device.gather_kernel, (-(-t // bt) * -(-blocks // bg),), (
        x, o.inverse, o.offsets, out, scale, t, k, blocks, experts, o.amax_clamp, x.stride(0), out.stride(0), sr, ss),
        {"N": c.block_k, "BT": bt, "BG": bg, "EVEN": k % c.block_k == 0, "KIND": "blocks" if fmt.scaled else "copy",
         "LEADS": steps.leads(x), **steps.scale_constants(fmt, o.rounding, x), **common})]
