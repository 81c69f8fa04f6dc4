"""Tokens to the rows of their experts, quantised on the way. Device: `gather_device.py`.

By token: read once, a part of it a program, and written to each of its rows. By row (`persistent`): each row reads its token, where
few slots are rows here.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ...arch import Arch, detect
from ...problem import Config, Problem, Step
from ..launching import Launch
from ..step_operands import GatherOperands
from . import steps
from .quantize import native, next_pow2, warps
from .steps import legal, tile_configs

NAME = "triton.gather_quantize"
BACKEND = "triton"
OPS = ("gather_quantize",)
WAVES = 4                  # programs an SM, times what is resident: they walk the live rows
EAGER_BYTES = 4 << 20      # of tokens, up to which one is read before it is known to be wanted
APART = 1.15               # of the bytes' time, where a token's rows and their scales are written apart

__all__ = ["BACKEND", "NAME", "OPS", "configs", "estimate", "launches", "legal", "supports", "workspace"]


def supports(problem: Problem, arch: Arch) -> str | None:
    return steps.refuse(problem, arch, "gather_quantize") or steps.refuse_format(problem, arch)


def configs(problem: Problem, arch: Arch) -> list[Config]:
    by_token = tile_configs(problem, arch, (1024, 2048, 4096) if problem.b.format.element == "e2m1" else (4096, 2048, 1024))
    return by_token if steps.by_rows(problem.b.format) else [*by_token, *(replace(c, persistent=True) for c in by_token)]


def workspace(problem: Problem, config: Config) -> int:
    return 0


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    source, fmt, top_k = problem.a.format, problem.b.format, problem.a_div
    slots = problem.m * top_k
    rows = min(slots, problem.groups * problem.rows) if problem.rows else slots
    if config.persistent:
        nbytes = source.storage_bytes(rows, problem.k) + fmt.storage_bytes(rows, problem.k)
        return steps.seconds(nbytes, -(-rows * problem.k // (config.block_m * config.block_k)), config, arch)
    nbytes = source.storage_bytes(problem.m, problem.k) + fmt.storage_bytes(rows, problem.k)
    return steps.seconds(APART * nbytes, -(-problem.m * problem.k // (config.block_m * config.block_k)), config, arch)


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
    sr, ss = (0, 0) if scale is None else scale.stride()
    kinds = {"N": c.block_k, "EVEN": k % c.block_k == 0, "KIND": "blocks" if fmt.scaled else "copy", "LEADS": steps.leads(x),
             **steps.scale_constants(fmt, o.rounding, x), **common}
    if c.persistent:
        arch = detect(x.device)
        size = 1 if scale is None else scale.element_size()
        br, bg = steps.split_blocks(c.block_m, blocks, scale is not None and sr == 1, size)
        most = arch.sms * max(1, 2048 // (c.num_warps * arch.warp)) * WAVES
        slots = o.row_map.numel()
        return [Launch(device.gather_by_row_kernel, (min(-(-slots // br) * -(-blocks // bg), most),), (
            x, o.row_map, o.offsets, out, scale, slots, k, blocks, experts, o.amax_clamp, x.stride(0), out.stride(0), sr, ss),
            {"BR": br, "BG": bg, **kinds})]
    bg = min(c.block_m, next_pow2(blocks))
    few = min(c.num_warps, warps(bg * c.block_k, detect(x.device)))
    sure = not problem.rows or problem.groups * problem.rows >= problem.m * problem.a_div
    return [Launch(device.gather_kernel, (t * -(-blocks // bg),), (
        x, o.inverse, o.offsets, out, scale, t, k, blocks, experts, o.amax_clamp, x.stride(0), out.stride(0), sr, ss),
        {"BG": bg, "EAGER": sure or 2 * problem.m * k <= EAGER_BYTES, **kinds, "num_warps": few})]
