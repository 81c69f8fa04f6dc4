"""`quantize_both` on any GPU: one read, two writes; row- and tensor-wise scales take a read before, for the maxima.

Device code: `quantize_both_device.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arch import Arch
from ...problem import Config, Problem, Step
from ...reference.quantize import MANTISSA_BITS, mantissa
from ..launching import Launch, Pointer
from ..operands import Operands
from .common import LAUNCH_SECONDS

NAME = "triton.quantize_both"
BACKEND = "triton"
KINDS = {(1, 128): "blocks", (128, 128): "tiles", (1, 0): "rows", (0, 0): "tensor"}
OPS = ("quantize_both", "cast_both", "cast_both_amax")     # with the scale given; and with the largest magnitude found on the way
# of the streaming rate, measured on an H100: finding a tile's scales, many times over, takes longer than its bytes
EFFICIENCY = {"blocks": 0.36, "tiles": 0.85, "rows": 0.68, "tensor": 0.9}


def supports(problem: Problem, arch: Arch) -> str | None:
    if problem.op not in OPS:
        return f"quantises along rows and columns at once, it has no {problem.op}"
    if arch.vendor == "cpu":
        return "runs on a GPU"
    if arch.vendor == "nvidia" and arch.capability < 89:
        return f"{arch.target} converts no FP8"
    fmt = problem.b.format
    if fmt.element not in ("e4m3", "e5m2") or fmt.group not in KINDS:
        return f"has no {fmt.element} with {fmt.scale} scales of {fmt.group}"
    return None


def configs(problem: Problem, arch: Arch) -> list[Config]:
    return [Config(128, 1, 64 if KINDS[problem.b.format.group] in ("rows", "tensor") else 128, 8, 1)]


def workspace(problem: Problem, config: Config) -> int:
    """Maxima of rows and of columns, or of matrices. `groups` counts the matrices of a batch."""
    if problem.op != "quantize_both":
        return 0
    batch = 1 if problem.layout == "offsets" else problem.groups
    return {"rows": 4 * batch * (problem.m + problem.k), "tensor": 4 * batch}.get(KINDS[problem.b.format.group], 0)


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    return seconds(problem, config, arch, EFFICIENCY[KINDS[problem.b.format.group]])


def seconds(problem: Problem, config: Config, arch: Arch, efficiency: float) -> float:
    """Predicted, at a share `efficiency` of the bandwidth; Hopper's kernel has another share."""
    batch = 1 if problem.layout == "offsets" else problem.groups
    size = batch * problem.m * problem.k
    reads = 2 if workspace(problem, config) else 1
    moved = size * (2 * reads + 2)
    return LAUNCH_SECONDS * (reads + 1) + moved / (arch.bandwidth * efficiency)


def wide(o: Operands) -> bool:
    """Whether offsets inside a tile of 128 pass 2^31."""
    return 128 * max(o.a.data.stride(-2), o.b.data.stride(-2), o.out.stride(-2)) >= 2**31


def prepare(problem: Problem, o: Operands, workspace: Tensor | None) -> tuple[list[Launch], list[Launch], tuple[Any, ...]]:
    """What is launched in front: where the groups' columns start; the maxima set to zero. And the arguments of `both_kernel`."""
    from . import quantize_both_device as device

    x, rows, columns, cs = o.a.data, o.b, o.out, o.out_scale
    rs = rows.scale
    assert rs is not None and cs is not None
    grouped, how = problem.layout == "offsets", KINDS[problem.b.format.group]
    batch, t, k = (1, *x.shape) if x.dim() == 2 else x.shape
    index: Tensor | Pointer = o.index if o.index is not None else rs        # any address will do where there are no groups
    segments: Tensor | Pointer = o.segments if o.segments is not None else rs
    first, maxima = [], []
    if grouped:
        first.append(Launch(device.segments_kernel, (1,), (index, segments, t, o.groups, columns.shape[-1]),
                            {"CHUNK": 256, "num_warps": 4}))
    row_amax: Tensor | Pointer = rs
    col_amax: Tensor | Pointer = rs
    if workspace is not None and problem.op == "quantize_both" and how in ("rows", "tensor"):
        row_amax = Pointer(workspace, torch.int32)
        col_amax = Pointer(workspace, torch.int32, 4 * batch * t if how == "rows" else 0)
        count = batch * (t + k) if how == "rows" else batch
        maxima.append(Launch(device.zero_kernel, (-(-count // 1024),), (row_amax, count), {"BLOCK": 1024, "num_warps": 4}))
    lead = [s.stride(0) if s.dim() == 3 else 0 for s in (x, rows.data, columns, rs, cs)]
    tiles_t = columns.shape[-1] // 128 if grouped else -(-t // 128)
    arguments = (x, rows.data, columns, rs, cs, row_amax, col_amax, index, segments, t, k, o.groups, tiles_t, o.amax_clamp, lead[0],
                 x.stride(-2), lead[1], rows.data.stride(-2), lead[2] // 16, columns.stride(-2) // 16, lead[3], rs.stride(-2),
                 rs.stride(-1), lead[4], cs.stride(-2), cs.stride(-1))
    return first, maxima, arguments


def launches(step: Step, problem: Problem, operands: Operands, workspace: Tensor | None) -> list[Launch]:
    from . import quantize_both_device as device

    o, c, fmt = operands, step.config, problem.b.format
    x, elem, how = o.a.data, fmt.elem, KINDS[fmt.group]
    grouped, given = problem.layout == "offsets", problem.op != "quantize_both"
    batch, t, k = (1, *x.shape) if x.dim() == 2 else x.shape
    out, maxima, arguments = prepare(problem, o, workspace)
    out += maxima
    if maxima:
        out.append(Launch(
            device.amax_kernel, (batch * -(-t // 128) * -(-k // 128),),
            (x, arguments[7], *arguments[5:7], t, k, o.groups, -(-t // 128), arguments[14], x.stride(-2)),
            {"BT": 128, "BC": 128, "GROUPED": grouped, "ROWS": how == "rows", "num_warps": c.num_warps}))
    is_e8m0 = fmt.scale == "e8m0"
    upcoming = Pointer(o.amax, torch.int32) if o.amax is not None else arguments[3]
    out.append(Launch(
        device.both_kernel, (batch * arguments[12] * -(-k // c.block_k),), (*arguments[:7], upcoming, *arguments[7:]),
        dict(KIND=how, GROUPED=grouped, GIVEN=given, NEXT=o.amax is not None, EVEN=t % 128 == 0, WIDE=wide(o), CHUNK=256,
             ROUNDING=o.rounding if is_e8m0 else "", E8M0=is_e8m0, TOP=elem.max, EMAX=elem.emax, MANTISSA=mantissa(elem.max),
             MANTISSA_BITS=MANTISSA_BITS[fmt.element], SATURATE=is_e8m0 and o.rounding != "rceil", num_warps=c.num_warps,
             num_stages=1)))
    return out
