"""SwiGLU, or its derivative, quantised along rows and columns in the pass that makes it. Device code: `activate_both_device.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...arch import Arch
from ...problem import Config, Problem, Step
from ..launching import Launch, Pointer
from ..step_operands import ActivateBothOperands
from . import steps
from .common import LAUNCH_SECONDS
from .quantize import native

NAME = "triton.activate_both"
BACKEND = "triton"
OPS = ("activate_both", "activate_both_cast", "activate_backward", "activate_backward_cast")     # _cast: with a scale that is given
KINDS = {(1, 128): "blocks", (1, 0): "rows", (0, 0): "tensor"}
EFFICIENCY = 0.8           # of bandwidth


def supports(problem: Problem, arch: Arch) -> str | None:
    if problem.op not in OPS:
        return f"has no {problem.op}"
    if arch.vendor == "cpu":
        return "runs on a GPU"
    fmt = problem.b.format
    if not fmt.scaled:
        return None
    if arch.vendor == "nvidia" and arch.capability < 89:
        return f"{arch.target} converts no FP8"
    if fmt.element not in ("e4m3", "e5m2") or fmt.group not in KINDS:
        return f"has no {fmt.element} with {fmt.scale} scales of {fmt.group}"
    if fmt.group[1] == 128 and problem.k % 128 and problem.op.startswith("activate_backward"):
        return f"needs I in blocks of 128, not {problem.k}, where blocks of gate's and of up's gradients follow each other"
    return None


def configs(problem: Problem, arch: Arch) -> list[Config]:
    """`block_k`: columns of I that a program makes at once; `group_m`: how many times one after the other."""
    kind = KINDS[problem.b.format.group] if problem.b.format.scaled else "copy"
    first = {"copy": (64, 8, 1, 1), "tensor": (64, 16, 1, 1), "rows": (64, 8, 1, 1), "blocks": (64, 16, 1, 1)}[kind]
    loops = ((1, 1),) if kind == "blocks" else ((1, 1), (8, 2), (8, 3))
    every = [first, *((64, w, n, s) for w in (8, 16) for n, s in loops)]
    if kind not in ("blocks", "copy"):
        every += [(32, 8, 1, 1), (32, 8, 8, 3)]
    return [Config(128, 1, c, w, s, n) for c, w, n, s in dict.fromkeys(every)]


def workspace(problem: Problem, config: Config) -> int:
    """Maxima of rows and of columns, or the one of all."""
    if problem.op.endswith("_cast") or not problem.b.format.scaled:
        return 0
    parts = 2 if problem.op.startswith("activate_backward") else 1
    return {"rows": 4 * (problem.m + parts * problem.k), "tensor": 4}.get(KINDS[problem.b.format.group], 0)


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    return seconds(problem, config, arch, EFFICIENCY)


def seconds(problem: Problem, config: Config, arch: Arch, efficiency: float) -> float:
    """Predicted, at a share `efficiency` of the bandwidth; Hopper's kernel has another share."""
    parts = 2 if problem.op.startswith("activate_backward") else 1
    read = (1 + parts) * problem.a.format.storage_bytes(problem.m, problem.k) * (2 if workspace(problem, config) else 1)
    written = parts * (2 if problem.b.format.scaled else 1) * problem.b.format.storage_bytes(problem.m, problem.k)
    return 2 * LAUNCH_SECONDS + (read + written) / (arch.bandwidth * efficiency)


def arguments(o: ActivateBothOperands) -> tuple[float, float]:
    """alpha and limit."""
    return (o.args[0], o.args[1]) if o.activation == "swiglu_oai" else (1.0, 0.0)


def maxima(o: ActivateBothOperands, rows: Tensor | Pointer, columns: Tensor | Pointer, by_rows: bool) -> Launch:
    """The pass that finds the largest magnitudes of rows and of columns, or the one of all."""
    from . import activate_both_device as device

    h, d = o.h, o.h if o.dy is None else o.dy
    t, inter = h.shape[0], h.shape[1] // 2
    return Launch(device.maxima_kernel, (-(-t // 128) * -(-inter // 64),),
                  (h, d, o.offsets, rows, columns, t, o.offsets.numel() - 1, inter, *arguments(o), h.stride(0), d.stride(0)),
                  {"ROWS": by_rows, "BACKWARD": o.dy is not None, "CLAMPED": o.activation == "swiglu_oai", "NATIVE": native(h),
                   "num_warps": 8})


def launches(step: Step, problem: Problem, operands: ActivateBothOperands, workspace: Tensor | None) -> list[Launch]:
    from . import activate_both_device as device
    from . import quantize_both_device as quantise

    o, c, fmt = operands, step.config, problem.b.format
    h, rows, given = o.h, o.rows, problem.op.endswith("_cast")
    t, inter, groups = h.shape[0], h.shape[1] // 2, o.offsets.numel() - 1
    kind = KINDS[fmt.group] if fmt.scaled else "copy"
    backward = o.dy is not None
    d = o.dy if o.dy is not None else h
    width = inter * (2 if backward else 1)
    common = {"BACKWARD": backward, "CLAMPED": o.activation == "swiglu_oai", "NATIVE": native(h),
              "num_warps": c.num_warps}
    out: list[Launch] = []
    capacity = -(-t // 128) * 128 + 128 * groups
    if o.fresh_segments:
        out.append(Launch(quantise.segments_kernel, (1,), (o.offsets, o.segments, t, groups, capacity),
                          {"CHUNK": 256, "num_warps": 4}))
    row_amax: Tensor | Pointer = h          # any address will do where nothing is read through it
    col_amax: Tensor | Pointer = h
    if workspace is not None and kind in ("rows", "tensor") and not given:
        row_amax = Pointer(workspace, torch.int32)
        col_amax = Pointer(workspace, torch.int32, 4 * t if kind == "rows" else 0)
        count = t + width if kind == "rows" else 1
        out.append(Launch(quantise.zero_kernel, (-(-count // 1024),), (row_amax, count), {"BLOCK": 1024, "num_warps": 4}))
        out.append(maxima(o, row_amax, col_amax, kind == "rows"))
    columns = o.columns
    rs, cs, cd = (h, h, h) if columns is None else (rows.scale, columns.scale, columns.data)
    assert rs is not None and cs is not None
    if kind == "rows":
        assert columns is not None
        out.append(Launch(quantise.scales_kernel, (-(-max(t, width) // 1024),),
                          (row_amax, col_amax, rs, cs, t, width, o.amax_clamp, rs.stride(0), cs.stride(0)),
                          {"BLOCK": 1024, "TOP": fmt.elem.max, "NATIVE": native(h), "num_warps": 4}))
    upcoming: Tensor | Pointer = Pointer(o.amax, torch.int32) if o.amax is not None else h
    strides = (0, 0, 0, 0, 0) if columns is None else (cd.stride(0) // 16, rs.stride(0), rs.stride(1), cs.stride(0), cs.stride(1))
    out.append(Launch(
        device.both_kernel, (capacity // 128 * -(-inter // (c.group_m * (128 if kind == "blocks" else c.block_k))),),
        (h, d, rows.data, cd, rs, cs, row_amax, col_amax, upcoming, o.offsets, o.segments, t, groups, inter, o.amax_clamp,
         *arguments(o), h.stride(0), d.stride(0), rows.data.stride(0), *strides),
        {"BC": c.block_k, "LOOP": c.group_m, "STAGES": c.num_stages, "KIND": kind, "GIVEN": given, "NEXT": o.amax is not None,
         "CHUNK": 256, "num_stages": 1, **common,
         **{k: v for k, v in steps.scale_constants(fmt, o.rounding, h).items() if k != "E2M1"}}))
    return out
