"""`quantize_both` on Hopper: one read through TMA, two writes. Scales of 1x128, of rows or of whole tensors.

Row- and tensor-wise scales that are not given take a read before, for the maxima. Device code: `quantize_both_device.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....arch import Arch, detect
from ....problem import Config, Problem, Step
from ....reference.quantize import MANTISSA_BITS, mantissa
from ...launching import Launch, Pointer
from ...operands import Operands
from ...triton import quantize_both as portable
from . import both_tile
from .both_tile import Place
from .tensor_maps import stride

NAME = "gluon_sm90.quantize_both"
BACKEND = "gluon_sm90"
OPS = portable.OPS
EFFICIENCY = 0.92       # of the streaming rate


def supports(problem: Problem, arch: Arch) -> str | None:
    if arch.target != "sm90":
        return f"runs on NVIDIA Hopper (sm90), not {arch.target}"
    if (reason := portable.supports(problem, arch)) is not None:
        return reason
    if problem.b.format.group == (128, 128):
        return "has no scales of 128x128"
    if not problem.a.aligned:
        return "TMA reads rows that begin on 16 bytes"
    return None


def configs(problem: Problem, arch: Arch) -> list[Config]:
    """`block_k`: columns of a tile; `group_m`: tiles of rows done side by side; `num_stages`: tiles in flight or at work."""
    kind, size = portable.KINDS[problem.b.format.group], both_tile.BYTES[problem.a.format.name]
    columns = (128, 64) if kind == "tensor" else (128, )
    return [c for bc in columns for band in (1, 8) for s in (2, 1)
            if both_tile.resident(c := both_tile.config(bc, s, band), both_tile.shared(bc, s, size), arch) > 0]


def workspace(problem: Problem, config: Config) -> int:
    """Where tiles of groups are; then maxima, which become 1 / scale, or one of each matrix."""
    batch = 1 if problem.layout == "offsets" else problem.groups
    tiles = both_tile.tiles(problem.m, problem.groups) if problem.layout == "offsets" else 0
    kind = portable.KINDS[problem.b.format.group]
    return 8 * tiles + 4 * {"rows": batch * (problem.m + problem.k), "tensor": batch}.get(kind, 0)


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    return portable.seconds(problem, config, arch, EFFICIENCY)


def launches(step: Step, problem: Problem, operands: Operands, workspace: Tensor | None) -> list[Launch]:
    from . import quantize_both_device as device

    o, c, fmt = operands, step.config, problem.b.format
    x, columns, rs, cs = o.a.data, o.out, o.b.scale, o.out_scale
    assert rs is not None and cs is not None
    kind, grouped, given = portable.KINDS[fmt.group], problem.layout == "offsets", problem.op != "quantize_both"
    batch, t, k = (1, *x.shape) if x.dim() == 2 else x.shape
    index: Place = o.index if o.index is not None else rs        # any address will do where there are no groups
    segments: Place = o.segments if o.segments is not None else rs
    tiles = columns.shape[-1] // 128 if grouped else 0
    counts = {"rows": (batch * t, batch * k), "tensor": (batch, 0), "blocks": (0, 0)}[kind]
    table: Place = rs
    rows_in: Place = rs
    columns_in: Place = rs
    if workspace is not None:
        table, rows_in = Pointer(workspace, torch.int32), Pointer(workspace, torch.int32, 8 * tiles)
        columns_in = Pointer(workspace, torch.int32, 8 * tiles + 4 * counts[0])
    out: list[Launch] = []
    groups, found, several = both_tile.grouping(grouped, o.groups), kind != "blocks" and not given, given and batch > 1
    if groups == 2 or found or several:
        out.append(both_tile.front(index, segments, table, rows_in, rs, t, o.groups, columns.shape[-1], tiles,
                                   sum(counts) if found else 0, kind == "rows", batch, groups == 2, True, several))
    lead = [s.stride(0) if s.dim() == 3 else 0 for s in (o.b.data, columns, rs, cs)]
    bc, size, e8m0 = c.block_k, x.element_size(), fmt.scale == "e8m0"
    work = (tiles if grouped else batch * -(-t // 128)) * -(-k // bc)
    blocks = both_tile.resident(c, both_tile.shared(bc, c.num_stages, size), detect(x.device))
    grid = min(work, detect(x.device).sms * blocks)
    upcoming = Pointer(o.amax, torch.int32) if o.amax is not None else rs
    pitch = stride(x, -2, -(-k // 16) * 16)
    planes = [batch, t, k], [stride(x, 0, pitch * t) if x.dim() == 3 else pitch * t, pitch, 1]
    arguments = (
        both_tile.descriptor(x, *planes, bc), o.b.data, columns, rs, cs, rows_in, columns_in, upcoming, index, table, segments, t,
        k, o.groups, -(-t // 128), batch, columns.shape[-1], o.amax_clamp, lead[0], o.b.data.stride(-2), lead[1] // 16,
        columns.stride(-2) // 16, lead[2], rs.stride(-2), rs.stride(-1), lead[3], cs.stride(-2), cs.stride(-1))
    options = dict(
        KIND=kind, GROUPED=groups, GIVEN=given and batch == 1, BATCH=batch > 1, MAXIMA=False, NEXT=o.amax is not None, AGAIN=found,
        WIDE=portable.wide(o), BC=bc, BAND=c.group_m, STAGES=c.num_stages, ROUNDING=o.rounding if e8m0 else "", E8M0=e8m0,
        TOP=fmt.elem.max, EMAX=fmt.elem.emax, MANTISSA=mantissa(fmt.elem.max), MANTISSA_BITS=MANTISSA_BITS[fmt.element],
        num_warps=c.num_warps,
        maxnreg=both_tile.registers(blocks))
    if found:
        out.append(Launch(device.both_kernel, (max(grid, 1),), arguments, options | {"MAXIMA": True, "AGAIN": False}))
        out.append(both_tile.scales(rows_in, columns_in, rs, cs, counts, o.amax_clamp, fmt.elem.max))
    return [*out, Launch(device.both_kernel, (max(grid, 1),), arguments, options)]
