"""`prepare`: compile every kernel that a weight's calls can need, so that nothing compiles in a graph capture or at a new M."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import expect
from ..formats import Format, FP8_1x128, ScaledTensor, get_format
from ..layouts import Contiguous, Layout, Masked, Offsets, Psum
from ..prepack import PackedWeight
from ..problem import Plan, bucket, buckets
from ..scales import mn_major_tma_aligned
from . import gemm as gemm_op
from . import grouped as grouped_op
from . import routed as routed_op
from .common import Options

LAYOUTS = ("dense", "contiguous", "psum", "offsets", "masked")


def prepare(b: ScaledTensor | PackedWeight, *, layout: str = "dense", max_m: int, a_format: Format | str = FP8_1x128,
            out_dtype: torch.dtype = torch.bfloat16, alignment: int = 128, expected_m: tuple[int, ...] = (),
            zero_padding: bool = True, max_sms: int = 0, backend: str | None = None,
            sizes: tuple[int, ...] = ()) -> list[Plan]:
    """Compile ahead: every distinct Plan of `gemm` / `grouped_gemm` with weight `b` and 1 to `max_m` rows is launched once.

    b: `[N, K]` (dense) or `[G, N, K]`, packed or not: the real weight, or one of its shape, strides and formats.
    max_m: the most rows of A (masked: the rows a group can hold; `expected_m` are then the hints that calls will give).
    sizes: only these numbers of rows, instead of every bucket up to `max_m` (not for masked).
    layout: 'dense', or a grouped one by its kind; alignment: of contiguous and psum groups. a_format: of the activations.
    out_dtype, zero_padding, max_sms, backend: as in the calls to come.

    Activations of zeros are used, with scales MN-major, as `quantize(..., scale_layout='mn_major')` gives them; nothing is kept.
    Returns the Plans. Raises as the calls would.
    """
    expect(isinstance(b, ScaledTensor | PackedWeight), "b", type(b).__name__, "a ScaledTensor or a PackedWeight", error=TypeError)
    expect(layout in LAYOUTS, "layout", repr(layout), f"one of {LAYOUTS}")
    expect(max_m >= 1, "max_m", max_m, "at least 1 row")
    fmt = get_format(a_format)
    expect(all(1 <= m <= max_m for m in sizes), "sizes", sizes, f"numbers of rows from 1 to max_m, {max_m}")
    sizes = sizes or buckets(max_m)
    groups = b.shape[0] if layout != "dense" else 1
    hints = tuple(sorted({bucket(e) for e in expected_m})) or (0,)
    plans: dict[tuple[Any, ...], Plan] = {}
    for m in [max_m] if layout == "masked" else sizes:
        for hint in hints if layout == "masked" else (0,):
            a = zeros((groups, m, b.shape[-1]) if layout == "masked" else (m, b.shape[-1]), fmt, b.device)
            where = empty_layout(layout, m, groups, alignment, hint, b.device)
            options = Options(backend, None, max_sms)
            shape = (*a.shape[:-1], b.shape[-2])
            out = torch.empty(shape, dtype=out_dtype, device=b.device)
            plan: Plan | None
            w = b if isinstance(b, ScaledTensor) else b.plain_for(m, backend is not None) or b
            if isinstance(w, PackedWeight):
                plan = routed_op.packed_plan(a, w, where, out, out_dtype, False, options, zero_padding)
            elif where is None:
                plan = gemm_op.plan_of(a, w, out, out_dtype, False, options)
            else:
                plan = grouped_op.plan_of(a, w, where, out, out_dtype, False, zero_padding, options)
            key = (plan.steps, plan.problem.wide) if plan else ()
            if plan is None or key in plans:
                continue
            plans[key] = plan
            if where is None:
                gemm_op.gemm(a, b, out=out, backend=backend, max_sms=max_sms)
            else:
                grouped_op.grouped_gemm(a, b, where, out=out, zero_padding=zero_padding, backend=backend, max_sms=max_sms)
    return list(plans.values())


def zeros(shape: tuple[int, ...], fmt: Format, device: torch.device, mn_major: bool = True) -> ScaledTensor:
    """An operand of zeros, scales of one. mn_major: scales of rows as activations have them; weights have them row-major."""
    packed = (*shape[:-1], shape[-1] // fmt.elem.per_byte)
    data = torch.zeros(packed, dtype=torch.uint8 if fmt.elem.bits <= 8 else fmt.elem.dtype, device=device).view(fmt.elem.dtype)
    if not fmt.scaled:
        return ScaledTensor(data, None, fmt)
    scale = torch.ones(fmt.scale_shape(shape), dtype=torch.float32, device=device) if fmt.scale == "fp32" else \
        torch.full(fmt.scale_shape(shape), 127, dtype=torch.uint8, device=device)
    return ScaledTensor(data, mn_major_tma_aligned(scale) if mn_major and fmt.group[0] == 1 else scale, fmt)


def empty_layout(kind: str, m: int, groups: int, alignment: int, expected_m: int, device: torch.device) -> Layout | None:
    """A layout of `m` rows in which every row is padding; None for dense."""
    i32 = torch.int32
    if kind == "contiguous":
        return Contiguous(torch.full((m,), -1, dtype=i32, device=device))
    if kind == "psum":
        return Psum(torch.zeros(groups, dtype=i32, device=device), alignment)
    if kind == "offsets":
        return Offsets(torch.zeros(groups + 1, dtype=torch.int64, device=device))
    return Masked(torch.zeros(groups, dtype=i32, device=device), expected_m) if kind == "masked" else None
