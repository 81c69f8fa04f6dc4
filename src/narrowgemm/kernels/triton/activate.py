"""SwiGLU of the live rows, quantised in the same pass. Device code: `activate_device.py`."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ...arch import Arch, detect
from ...problem import Config, Problem, Step
from ..launching import Launch
from ..step_operands import ActivateOperands
from . import steps
from .quantize import native, next_pow2
from .steps import legal, tile_configs

NAME = "triton.activate"
BACKEND = "triton"
OPS = ("activate",)
WAVES = 4                  # programs an SM, times what is resident: they walk the live tiles
COLUMNS = 1024             # of a tile: 2880 and 3072 leave less of it empty than of a power of two that holds them
NONE_SECONDS = 1.5e-6      # what a program without rows takes from its SM
RESIDENT = 2048 * 16       # elements an SM has at work at once, 16 a thread

__all__ = ["BACKEND", "NAME", "OPS", "configs", "estimate", "launches", "legal", "supports", "workspace"]


def supports(problem: Problem, arch: Arch) -> str | None:
    if reason := steps.refuse(problem, arch, "activate") or steps.refuse_format(problem, arch):
        return reason
    if problem.epilogue.activation not in ("swiglu", "swiglu_oai"):
        return f"has no {problem.epilogue.activation}"
    return None


def configs(problem: Problem, arch: Arch) -> list[Config]:
    """`block_m` blocks a tile, `block_n` of a row. A program has one tile, or (`persistent`) walks over them: first where most rows
    are expected to be none of this rank's, for which nothing is launched then. Of few rows tiles are small: 8 elements a thread."""
    if steps.by_rows(problem.b.format):
        return tile_configs(problem, arch)
    cols, elements = steps.columns(problem.b.format), problem.m * problem.k
    most = min(COLUMNS // cols, next_pow2(-(-problem.k // cols)))
    once = [Config(1024 // cols, 1, cols, 4, 1)] if elements <= 2 * RESIDENT * arch.sms else []
    once += tile_configs(problem, arch, (2048, 4096, 1024))
    once = [replace(c, block_n=min(c.block_m, most)) for c in once]
    walk = [replace(c, block_n=min(c.block_m, most), persistent=True) for c in tile_configs(problem, arch)]
    dead = problem.groups and 2 * problem.groups * problem.rows < problem.m and 8 * elements > RESIDENT * arch.sms
    return [*walk, *once] if dead or arch.vendor != "nvidia" else [*once, *walk]


def workspace(problem: Problem, config: Config) -> int:
    return 0


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    rows = min(problem.m, problem.groups * problem.rows) if problem.groups else problem.m
    nbytes = problem.a.format.storage_bytes(rows, 2 * problem.k) + problem.b.format.storage_bytes(rows, problem.k)
    tile = config.block_m * config.block_k
    late = problem.m * problem.k / (tile * arch.sms * (2048 // (config.num_warps * arch.warp))) - 1
    for_nothing = 0 if config.persistent else max(0.0, late) * (1 - rows / max(1, problem.m)) * NONE_SECONDS
    return steps.seconds(nbytes, -(-rows * problem.k // tile), config, arch) + for_nothing


def launches(step: Step, problem: Problem, operands: ActivateOperands, workspace: Tensor | None) -> list[Launch]:
    from . import activate_device as device

    o, c, fmt = operands, step.config, problem.b.format
    h, out, scale = o.h, o.rows.data, o.rows.scale
    r, inter = h.shape[0], h.shape[1] // 2
    experts = 0 if o.offsets is None else o.offsets.numel() - 1
    alpha, limit = o.args if o.activation == "swiglu_oai" else (1.0, 0.0)
    arch = detect(h.device)
    resident = arch.sms * max(1, 2048 // (c.num_warps * arch.warp)) * WAVES
    paired = native(h) and h.dtype == torch.bfloat16 and o.bias is None and is_bf16(limit)
    clamped = 0 if o.activation != "swiglu_oai" else 2 if paired else 1
    common = {"GROUPED": o.offsets is not None, "STEPS": experts.bit_length(), "CLAMPED": clamped,
              "INTERLEAVED": o.interleaved, "BIAS": o.bias is not None, "NATIVE": native(h), "num_warps": c.num_warps,
              "num_stages": 1}
    if steps.by_rows(fmt):
        assert scale is not None
        return [Launch(device.activate_rows_kernel, (min(-(-r // c.block_m), resident),), (
            h, o.bias, o.offsets, out, scale, r, experts, inter, o.amax_clamp, alpha, limit, h.stride(0), out.stride(0),
            scale.stride(0)), {"BR": c.block_m, "BK": c.block_k, "TOP": fmt.elem.max, **common})]
    blocks = -(-inter // c.block_k)
    size = 1 if scale is None else scale.element_size()
    by_columns = scale is not None and scale.stride(0) == 1
    br, bg = steps.split_blocks(c.block_m, blocks, True, size) if by_columns else (c.block_m // c.block_n, c.block_n)
    sr, ss = (0, 0) if scale is None else scale.stride()
    sure = min(r, problem.groups * problem.rows) if problem.groups else r
    across, tiles = -(-blocks // bg), -(-r // br)
    most = max(1, min(resident // across, -(-2 * sure // br))) if c.persistent else tiles
    return [Launch(device.activate_kernel, (min(tiles, most) * across,), (
        h, o.bias, o.offsets, out, scale, r, sure, experts, inter, blocks, o.amax_clamp, alpha, limit, h.stride(0),
        out.stride(0), sr, ss), {"N": c.block_k, "BR": br, "BG": bg, "ACROSS": across, "EVEN": inter % c.block_k == 0,
                                 "KIND": "blocks" if fmt.scaled else "copy", "LEADS": steps.leads(h), **steps.follows(problem, h),
                                 "ONCE": not c.persistent, "WIDE": br * max(h.stride(0), out.stride(0)) >= 2**31,
                                 **steps.scale_constants(fmt, o.rounding, h), **common})]


def is_bf16(x: float) -> bool:
    """Whether a finite x has no more than BF16's eight significant bits."""
    return math.isfinite(x) and math.frexp(x)[0] * 256 % 1 == 0
