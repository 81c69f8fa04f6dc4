"""SwiGLU, or its derivative, quantised along rows and columns on Hopper: one read through TMA, two writes.

Scales of rows or of the whole tensor that are not given take a pass before, the portable kernel's. Device code:
`activate_both_device.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....arch import Arch, detect
from ....problem import Config, Problem, Step
from ...launching import Launch, Pointer
from ...step_operands import ActivateBothOperands
from ...triton import activate_both as portable
from ...triton import steps
from . import both_tile

NAME = "gluon_sm90.activate_both"
BACKEND = "gluon_sm90"
OPS = portable.OPS
EFFICIENCY = 0.88       # of bandwidth


def supports(problem: Problem, arch: Arch) -> str | None:
    if arch.target != "sm90":
        return f"runs on NVIDIA Hopper (sm90), not {arch.target}"
    if (reason := portable.supports(problem, arch)) is not None:
        return reason
    if not problem.b.format.scaled:
        return "writes FP8"
    if problem.a.format.name not in ("bf16", "fp16"):
        return f"reads BF16 and FP16, not {problem.a.format.name}"
    if not problem.a.aligned or problem.k % 8:
        return "TMA reads rows of gate and of up that begin on 16 bytes"
    return None


def boxes(problem: Problem) -> int:
    return 3 if problem.op.startswith("activate_backward") else 2


def configs(problem: Problem, arch: Arch) -> list[Config]:
    """`block_k`: columns of a tile; `group_m`: tiles of rows done side by side."""
    kind = portable.KINDS[problem.b.format.group]
    columns = (128, 64) if kind == "tensor" else (128, )
    return [both_tile.config(bc, 1, band) for bc in columns for band in (1, 8)]


def workspace(problem: Problem, config: Config) -> int:
    """Where tiles of groups are; then maxima, which become 1 / scale, or the one of all."""
    maxima = portable.workspace(problem, config)
    return 8 * both_tile.tiles(problem.m, problem.groups) + max(maxima, 4)


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    return portable.seconds(problem, config, arch, EFFICIENCY)


def launches(step: Step, problem: Problem, operands: ActivateBothOperands, workspace: Tensor | None) -> list[Launch]:
    from . import activate_both_device as device

    o, c, fmt = operands, step.config, problem.b.format
    h, rows, columns, backward, given = o.h, o.rows, o.columns, o.dy is not None, problem.op.endswith("_cast")
    assert columns is not None and rows.scale is not None and columns.scale is not None and workspace is not None
    t, inter, groups = h.shape[0], h.shape[1] // 2, o.offsets.numel() - 1
    kind, width = portable.KINDS[fmt.group], inter * (2 if backward else 1)
    tiles = both_tile.tiles(t, groups)
    counts = (0, 0) if given else {"rows": (t, width), "tensor": (1, 0), "blocks": (0, 0)}[kind]
    table, rows_in = Pointer(workspace, torch.int32), Pointer(workspace, torch.int32, 8 * tiles)
    columns_in = Pointer(workspace, torch.int32, 8 * tiles + 4 * counts[0])
    rs, cs = rows.scale, columns.scale
    mode, found = both_tile.grouping(True, groups), sum(counts) > 0
    out: list[Launch] = []
    if mode == 2 or found:
        out.append(both_tile.front(o.offsets, o.segments, table, rows_in, rs, t, groups, 128 * tiles, tiles, sum(counts),
                                   kind == "rows", 1, mode == 2, o.fresh_segments, False))
    bc = c.block_k
    blocks = both_tile.resident(c, both_tile.shared(bc, boxes(problem), h.element_size()), detect(h.device))
    grid = max(1, min(detect(h.device).sms * blocks, tiles * -(-inter // bc)))
    pitch = h.stride(0) if t > 1 else 2 * inter
    inputs = [both_tile.descriptor(h, [2, t, inter], [inter, pitch, 1], bc)]
    if o.dy is not None:
        pitch = o.dy.stride(0) if t > 1 else inter
        inputs.append(both_tile.descriptor(o.dy, [1, t, inter], [pitch * t, pitch, 1], bc))
    upcoming: Tensor | Pointer = Pointer(o.amax, torch.int32) if o.amax is not None else rs
    constants = {k: v for k, v in steps.scale_constants(fmt, o.rounding, h).items() if k not in ("E2M1", "SATURATE")}
    arguments = (
        inputs[0], inputs[-1], rows.data, columns.data, rs, cs, rows_in, columns_in, upcoming, o.offsets, table, o.segments, t,
        groups, inter, 128 * tiles, o.amax_clamp, *portable.arguments(o), rows.data.stride(0), columns.data.stride(0) // 16,
        rs.stride(0), rs.stride(1), cs.stride(0), cs.stride(1))
    options = {"KIND": kind, "GROUPED": mode, "FRESH": o.fresh_segments, "GIVEN": given, "BACKWARD": backward,
               "CLAMPED": o.activation == "swiglu_oai", "MAXIMA": False, "NEXT": o.amax is not None, "AGAIN": found, "BC": bc,
               "BAND": c.group_m, **constants, "num_warps": c.num_warps, "maxnreg": both_tile.registers(blocks)}
    if found:
        out.append(Launch(device.both_kernel, (grid,), arguments, options | {"MAXIMA": True, "NEXT": False, "AGAIN": False}))
        out.append(both_tile.scales(rows_in, columns_in, rs, cs, counts, o.amax_clamp, fmt.elem.max))
    return [*out, Launch(device.both_kernel, (grid,), arguments, options)]
