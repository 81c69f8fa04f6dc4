"""The reference ops as a kernel like any other: the CPU backend, and the last resort on a GPU (it reads sizes on the host)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arch import Arch
from ..formats import ScaledTensor
from ..prepack import unpack
from ..prepack_bits import ORDERS
from ..problem import Config, Problem, Step
from .operands import Operands

NAME = "reference"
BACKEND = "reference"
OPS = ("gemm", "grouped_gemm", "grouped_gemm_wgrad", "quantize", "quantize_both", "cast_both", "cast_both_amax", "routed_gemm",
       "gated_gemm")


def supports(problem: Problem, arch: Arch) -> str | None:
    if problem.op not in OPS or (problem.layout == "routed" and problem.op != "routed_gemm"):
        return f"has no {problem.op} for the {problem.layout} layout"
    if problem.op not in ("routed_gemm", "gated_gemm") and (not problem.epilogue.plain or problem.gather):
        return "has no fused gather and no epilogue beyond the sum"
    if problem.epilogue.quantize is not None and problem.op != "gated_gemm":
        return "has no quantised output"
    if problem.a.prepack or problem.b.prepack.partition(":")[0] not in ("", *ORDERS):
        return f"takes plain operands, and weights in the order {' or '.join(ORDERS)}, which it unpacks in every call"
    return None


def configs(problem: Problem, arch: Arch) -> list[Config]:
    return [Config(0, 0, 0, 0, 0)]


def workspace(problem: Problem, config: Config) -> int:
    return 0


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Dequantised FP32 products: on a GPU an order of magnitude behind any kernel, by the bytes and the FP32 rate."""
    if problem.op in ("quantize", "quantize_both", "cast_both", "cast_both_amax"):
        return 50e-6 + 20.0 * problem.m * problem.k * 4 / arch.bandwidth
    per_group = 20e-6 * max(problem.groups, 1)
    return 100e-6 + per_group + problem.flops / (arch.bf16_flops / 16) + 8 * problem.bytes / arch.bandwidth


@torch.no_grad()        # as on a GPU, where no kernel records anything
def launch(step: Step, problem: Problem, operands: Operands, workspace: Tensor | None) -> None:
    from ..reference import gemm, grouped, routed

    x = operands
    b = x.b if x.packed is None else unpack(x.packed)
    if problem.op == "quantize":
        from ..reference import quantize

        y = quantize.quantize(x.a.data, problem.b.format, x.rounding, x.amax_clamp)
        x.out.copy_(y.data)
        if x.out_scale is not None and y.scale is not None:
            x.out_scale.copy_(y.scale)
    elif problem.op in ("quantize_both", "cast_both", "cast_both_amax"):
        from ..reference import quantize_both

        fmt = problem.b.format
        quantize_both.quantize_both(x.a.data, fmt, x.b, ScaledTensor(x.out, x.out_scale, fmt), x.index, x.segments,
                                    problem.op != "quantize_both", x.rounding, x.amax_clamp)
        if x.amax is not None:
            quantize_both.raise_amax(x.amax, x.a.data, x.index)
    elif problem.op == "gemm":
        gemm.gemm(x.a, b, x.out, accumulate=problem.accumulate)
    elif problem.op == "grouped_gemm":
        assert x.index is not None
        grouped.grouped_gemm(x.a, b, x.out, problem.layout, x.index, alignment=x.alignment,
                             accumulate=problem.accumulate, zero_padding=problem.zero_padding)
    elif problem.op == "gated_gemm":
        gated(x, problem)
    elif problem.op == "routed_gemm":
        routed.routed_gemm(x, b, problem)
    else:
        assert x.index is not None
        grouped.grouped_gemm_wgrad(x.a, b, x.out, x.index, accumulate=problem.accumulate)


def gated(x: Operands, problem: Problem) -> None:
    """Product, activation and quantisation; rows of no group are not written."""
    from ..reference import activate, grouped

    e, h = problem.epilogue, torch.zeros((x.m, x.n), dtype=torch.bfloat16, device=x.out.device)
    assert x.index is not None and x.out_scale is not None
    grouped.grouped_gemm(x.a, x.b, h, problem.layout, x.index)
    y = activate.activate(h, activation=e.activation, args=e.activation_args, offsets=x.index, fmt=e.quantize,
                          amax_clamp=x.amax_clamp)
    assert isinstance(y, ScaledTensor) and y.scale is not None
    rows = slice(int(x.index[0]), int(x.index[-1]))
    x.out[rows] = y.data[rows]
    x.out_scale[rows] = y.scale[rows]
