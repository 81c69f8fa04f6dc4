"""SwiGLU of the live rows, quantised in the same pass. Device code: `activate_device.py`."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ...arch import Arch
from ...formats import MXFP8
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
FEW = 8 * 8192             # elements an SM, up to which tiles of 1024 columns come first

__all__ = ["BACKEND", "NAME", "OPS", "configs", "estimate", "launches", "legal", "supports", "workspace"]


def supports(problem: Problem, arch: Arch) -> str | None:
    if reason := steps.refuse(problem, arch, "activate") or steps.refuse_format(problem, arch):
        return reason
    if problem.epilogue.activation not in ("swiglu", "swiglu_oai"):
        return f"has no {problem.epilogue.activation}"
    return None


def configs(problem: Problem, arch: Arch) -> list[Config]:
    """As `steps.tile_configs`; first those with 32 elements a thread, over which what is done once is spread, and of these the one
    that holds two rows, or, of few rows to MXFP8, four rows of 1024 columns (`block_n` blocks of a row). Without a format to
    quantise to they spill (8 bytes on sm90), and bytes are all there is."""
    if steps.by_rows(problem.b.format):
        return tile_configs(problem, arch)
    if not problem.b.format.scaled:
        return tile_configs(problem, arch, (2048, 4096, 1024))
    two_rows = min(max(2 * next_pow2(problem.k), 1024), 8192)
    many = tile_configs(problem, arch, tuple(dict.fromkeys((two_rows, 2048, 4096, 8192))))
    if arch.vendor == "nvidia" and problem.b.format == MXFP8 and problem.m * problem.k <= FEW * arch.sms:
        many = [Config(128, 32, 32, 8, 1), *many]
    return [*(replace(c, num_warps=max(1, c.num_warps // 2)) for c in many), *tile_configs(problem, arch, (2048, 4096, 1024))]


def workspace(problem: Problem, config: Config) -> int:
    return 0


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    rows = min(problem.m, problem.groups * problem.rows) if problem.groups else problem.m
    nbytes = problem.a.format.storage_bytes(rows, 2 * problem.k) + problem.b.format.storage_bytes(rows, problem.k)
    return steps.seconds(nbytes, -(-rows * problem.k // (config.block_m * config.block_k)), config, arch)


def launches(step: Step, problem: Problem, operands: ActivateOperands, workspace: Tensor | None) -> list[Launch]:
    from ...arch import detect
    from . import activate_device as device

    o, c, fmt = operands, step.config, problem.b.format
    h, out, scale = o.h, o.result.data, o.result.scale
    r, inter = h.shape[0], h.shape[1] // 2
    experts = 0 if o.offsets is None else o.offsets.numel() - 1
    alpha, limit = o.args if o.activation == "swiglu_oai" else (1.0, 0.0)
    arch = detect(h.device)
    resident = arch.sms * max(1, 2048 // (c.num_warps * arch.warp)) * WAVES
    common = {"GROUPED": o.offsets is not None, "STEPS": experts.bit_length(), "CLAMPED": o.activation == "swiglu_oai",
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
    whole = c.block_n == 1 or by_columns
    br, bg = steps.split_blocks(c.block_m, blocks, by_columns, size) if whole else (c.block_m // c.block_n, c.block_n)
    sr, ss = (0, 0) if scale is None else scale.stride()
    return [Launch(device.activate_kernel, (min(-(-r // br) * -(-blocks // bg), resident),), (
        h, o.bias, o.offsets, out, scale, r, experts, inter, blocks, o.amax_clamp, alpha, limit, h.stride(0),
        out.stride(0), sr, ss), {"N": c.block_k, "BR": br, "BG": bg, "EVEN": inter % c.block_k == 0,
                                 "KIND": "blocks" if fmt.scaled else "copy", "LEADS": steps.leads(h), **steps.follows(problem, h),
                                 **steps.scale_constants(fmt, o.rounding, h),
                                 **common})]
