"""Portable `routed_gemm` with MXFP8 and MXFP4 weights as they are: rows by slot, bias, activation, routing weight, combine.

Routed and offsets layouts, the formats of `mx`, one Triton source for every GPU. Combine adds rows of slots from the workspace, in
order, so repeats have the same bits. Device code: `routed_device.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...arch import Arch, detect
from ...problem import Config, Problem, Step
from ..launching import Launch, Pointer
from ..operands import Operands
from . import common, mx

NAME = "triton.routed"
BACKEND = "triton"
ACT_IDS = {"": 0, "swiglu": 1, "swiglu_oai": 2}
CLEAR, SUM = 1024, 1024     # slots, columns of a program
TILES = ((16, 64, 4, 2), (32, 64, 4, 2), (64, 64, 4, 2), (64, 128, 8, 2))      # 16x128 by four warps spills here


def supports(problem: Problem, arch: Arch) -> str | None:
    if problem.op != "routed_gemm":
        return f"computes routed_gemm, not {problem.op}"
    if problem.layout not in ("routed", "offsets"):
        return f"takes the routed and offsets layouts, not {problem.layout}"
    if problem.epilogue.activation not in ACT_IDS or problem.epilogue.quantize is not None:
        return f"has no {problem.epilogue.activation or 'quantised output'}"
    return mx.refuse_operands(problem, arch)


def configs(problem: Problem, arch: Arch) -> list[Config]:
    most = 4 * problem.rows
    if mx.parts(problem) > 1:       # what doesn't spill: FP16 takes more registers
        most = min(most, 16 if arch.target == "sm90" else 32) if problem.epilogue.activation else most
    near = [t for t in TILES if t[0] <= max(16, most) and (mx.parts(problem) == 1 or t[:2] != (64, 64))]
    out = [Config(bm, bn, 128, w, 1 if mx.serial(problem, arch) else s, persistent=True) for bm, bn, w, s in near]
    return [c for c in out if legal(problem, c, arch) is None]


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    if problem.epilogue.activation and config.block_m * config.block_n > most_of_two(problem, arch):
        return f"two sums of {config.block_m}x{config.block_n} are too much for the registers"
    return mx.legal(problem, config, arch)


def most_of_two(problem: Problem, arch: Arch) -> int:
    """Elements of each of two sums that registers hold, beside what is converted in them: as compiled, nothing spills."""
    if arch.vendor == "nvidia":
        return 32 * 64 if problem.a.format.scaled else 64 * 128
    few = arch.target == "gfx942" or (problem.b.format.element == "e4m3" and not problem.a.format.scaled)
    return 64 * 64 if few else 64 * 128


def columns(problem: Problem) -> int:
    """Of the result."""
    return problem.n // 2 if problem.epilogue.activation else problem.n


def workspace(problem: Problem, config: Config) -> int:
    """FP32 rows of slots, and a mark for each that is there."""
    return 4 * problem.m * (columns(problem) + 1) if problem.epilogue.combine else 0


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    launches = 3 if problem.epilogue.combine else 1
    moved = 8.0 * problem.m * columns(problem) / arch.bandwidth if problem.epilogue.combine else 0.0
    return mx.estimate(problem, config, arch) + (launches - 1) * common.LAUNCH_SECONDS + moved


def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    from . import routed_device as device

    c, e, no = step.config, problem.epilogue, columns(problem)
    a, b, sa, sb = x.a.data, x.b.data, x.a.scale, x.b.scale
    assert sb is not None
    routed = problem.layout == "routed"
    per = -(-x.block_m // c.block_m)
    tiles = -(-x.positions // x.block_m) * per if routed else x.positions // c.block_m + x.groups
    alpha, limit = e.activation_args or (1.0, 0.0)
    out = x.out
    target: Tensor | Pointer = out
    marks: Pointer | None = None
    stride = out.stride(0)
    if e.combine:
        assert workspace is not None
        target, stride = Pointer(workspace, torch.float32), no
        marks = Pointer(workspace, torch.int32, 4 * x.num_slots * no)
    programs = tiles * -(-no // c.block_n)
    product = Launch(device.routed_kernel, (min(programs, problem.max_sms or programs),), (
        a, b, target, sb if sa is None else sa, sb, x.index, x.slots, x.experts, x.posted, x.bias, x.weight, marks, x.positions,
        x.num_slots, x.n, no, x.k, x.groups, tiles, per, x.block_m, problem.a_div, alpha, limit, a.stride(-2), b.stride(0),
        b.stride(1), stride, *mx.scale_strides(x.a), *sb.stride()), dict(
        ROUTED=routed, MAPPED=x.slots is not None, ACTIVATION=ACT_IDS[e.activation], INTERLEAVED=e.interleaved, BIAS=e.bias,
        WEIGHT=e.routing_weight, COMBINE=e.combine, A_KIND=problem.a.format.element, B_KIND=problem.b.format.element,
        BM=c.block_m, BN=c.block_n, BK=128, EVEN_K=x.k % 128 == 0, CHUNKED=mx.by_chunk(problem),
        FAR=mx.far(problem, detect(out.device)), WIDE=a.shape[0] * a.stride(0) >= 2**31, num_warps=c.num_warps,
        num_stages=c.num_stages))
    if not e.combine:
        return [product]
    add, sums = 0 if x.add is None else x.add.stride(0), x.num_slots // x.top_k * -(-no // SUM)
    return [Launch(device.clear_kernel, (-(-x.num_slots // CLEAR),), (marks, x.num_slots), {"BLOCK": CLEAR, "num_warps": 4}),
            product,
            Launch(device.sum_kernel, (sums,), (target, marks, x.add, out, no, add, out.stride(0)),
                   {"TOP_K": x.top_k, "BN": SUM, "ADD": e.add, "num_warps": 4})]
