"""`quantize_both`: a tensor into FP8 along its rows and along its columns, in one pass.

A Hopper FP8 product contracts the contiguous axis of both operands. A training step contracts each tensor along both of
its axes: forward and dgrad along one, the weight gradient (and dgrad, of the weight) along the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arch import detect
from ..errors import expect
from ..formats import PLAIN, Format, ScaledTensor, get_format
from ..kernels.operands import Memo, Operands
from ..layouts import INT, KGrouped, check_index
from ..problem import Operand, Plan, Problem, bucket
from ..reference.quantize import check_input
from ..reference.quantize_both import ALIGNMENT
from ..runtime import dispatch, env
from ..runtime.launch import run
from ..scales import empty_scales
from . import common, library, steps
from .plan_cache import NOTHING, PlanCache

GROUPS = ((1, 128), (128, 128), (1, 0), (0, 0))
_plans = PlanCache()


@dataclass(frozen=True, eq=False)
class Both:
    """`rows` `[T, C]`, scales along C; `columns` `[C, P]`, scales along P; `layout`: where each group's columns are (None where
    the input had no groups, and P is T)."""

    rows: ScaledTensor
    columns: ScaledTensor
    layout: KGrouped | None


def quantize_both(x: Tensor, fmt: Format | str, offsets: Tensor | None = None, *, scale: Tensor | None = None,
                  amax: Tensor | None = None, rounding: str = "rceil", amax_clamp: float = 1e-4,
                  backend: str | None = None) -> Both:
    """`x` in FP8 twice: along its rows and, transposed, along its columns.

    x: `[T, C]` (activations, gradients) or `[B, T, C]` (stacked weights), BF16, FP16 or FP32, last stride 1.
    fmt: tensor-wise, row-wise, 1x128 (both copies 1x128 along their own axis) or 128x128, E4M3 or E5M2.
    offsets: int32 / int64 `[G + 1]`, the groups' rows in a 2-D `x`, on the device, any sizes. Each group's columns then start
        at a multiple of 128 and are filled up with zeros: `columns` is `[C, ceil128(T) + 128 G]`, `layout` says where groups
        are, and what lies behind the last one is not written. Rows outside every group are not written either.
    scale: float32, one element (`[B]`: one a matrix), for tensor-wise: use it (delayed scaling: values beyond the range
        saturate) instead of finding the largest magnitude. Row-wise, a column's scale covers every group.
    amax: float32 `[1]`, with a `scale`: raised to the largest magnitude in the same pass; not compiled.
    rounding, amax_clamp: as in `quantize`, which defines both copies bit for bit.

    Scales of more than one column are MN-major, as TMA loads them. Not differentiable. Raises TypeError / ValueError before
    anything is launched.
    """
    fmt = get_format(fmt)
    if torch.compiler.is_compiling():
        expect(amax is None, "amax under torch.compile", "a tensor", "None")
        _check(x, fmt, offsets, scale, rounding, amax_clamp)
        rows, columns, seg = allocate_both(x.detach(), fmt, offsets, scale)
        own = None if fmt.group[0] == fmt.group[1] else columns.scale
        torch.ops.narrowgemm.quantize_both(x.detach(), offsets, rows.data, rows.scale, columns.data, own, seg, fmt.name,
                                           scale is not None, rounding, amax_clamp, backend or "")
        return Both(rows, columns, None if seg is None else KGrouped(seg, ALIGNMENT))
    key = (fmt, *map(steps.sign, (x, offsets, scale, amax)), rounding, amax_clamp, backend, env.choice())
    known = _plans.find(key)
    if known is None:
        known = _plans.add(key, plan_of(x, fmt, offsets, scale, rounding, amax_clamp, backend, amax),
                           NOTHING)
    x = x.detach()
    rows, columns, seg = allocate_both(x, fmt, offsets, scale)
    _fill(known.plan, x, fmt, rows, columns, offsets, seg, scale is not None, rounding, amax_clamp, known.memo, amax)
    return Both(rows, columns, None if seg is None else KGrouped(seg, ALIGNMENT))


def _check(x: Tensor, fmt: Format, offsets: Tensor | None, scale: Tensor | None, rounding: str, amax_clamp: float) -> None:
    check_input(x, fmt, rounding, amax_clamp)
    expect(fmt.group in GROUPS and fmt.element in ("e4m3", "e5m2"), "format of quantize_both", fmt.name,
           "FP8 with scales of whole tensors, rows, 1x128 or 128x128")
    expect(x.dim() in (2, 3), "input of quantize_both, shape", tuple(x.shape), "[T, C] or [B, T, C]")
    expect(x.stride(-1) == 1 or x.shape[-1] <= 1 or not x.numel(), "input of quantize_both, strides", x.stride(), "last stride 1")
    if offsets is not None:
        check_index(offsets, "offsets", 1, INT)
        expect(x.dim() == 2, "input of quantize_both with offsets, shape", tuple(x.shape), "[T, C]")
        expect(fmt.group[0] != 128, "format of quantize_both with offsets", fmt.name,
               "one whose scales don't span rows: those of one block may belong to several groups")
        expect(offsets.numel() >= 1, "offsets, length", offsets.numel(), "G + 1")
        expect(offsets.device == x.device, "offsets, device", offsets.device, f"the input's, {x.device}")
    common.check_kinds(scale=scale)
    if scale is not None:
        count = x.shape[0] if x.dim() == 3 else 1
        expect(fmt.group == (0, 0), "scale with format", fmt.name, "None: only tensor-wise scales can be given")
        expect(scale.dtype == torch.float32, "scale, dtype", scale.dtype, "torch.float32", error=TypeError)
        expect(scale.numel() in (1, count), "scale, elements", scale.numel(), f"1 or {count}")
        expect(scale.device == x.device, "scale, device", scale.device, f"the input's, {x.device}")


def plan_of(x: Tensor, fmt: Format, offsets: Tensor | None, scale: Tensor | None, rounding: str, amax_clamp: float,
            backend: str | None, amax: Tensor | None = None) -> Plan | None:
    """Check the call and select its Plan; None where there is nothing to launch."""
    _check(x, fmt, offsets, scale, rounding, amax_clamp)
    common.check_kinds(amax=amax)
    if amax is not None:
        expect(scale is not None, "amax without a scale", "a tensor", "None: the scales that are found say it")
        expect(amax.dtype == torch.float32 and amax.numel() == 1 and amax.device == x.device, "amax",
               f"{amax.dtype} {tuple(amax.shape)} on {amax.device}", f"torch.float32, one element, on {x.device}")
    if x.numel() == 0:
        return None
    groups = offsets.numel() - 1 if offsets is not None else x.shape[0] if x.dim() == 3 else 1
    op = "quantize_both" if scale is None else "cast_both" if amax is None else "cast_both_amax"
    problem = Problem(op, "dense" if offsets is None else "offsets",
                      bucket(x.shape[-2]), 0, x.shape[-1], groups, Operand(PLAIN[x.dtype], aligned=steps.aligned(x)),
                      Operand(fmt, scale_dtype=fmt.scale))
    return dispatch.select(problem, detect(x.device), backend)


def allocate_both(x: Tensor, fmt: Format, offsets: Tensor | None, scale: Tensor | None
                  ) -> tuple[ScaledTensor, ScaledTensor, Tensor | None]:
    """Outputs: (along rows, along columns, where the segments of the columns begin and end: None without offsets)."""
    *lead, t, c = x.shape
    p = t if offsets is None else -(-t // ALIGNMENT) * ALIGNMENT + ALIGNMENT * (offsets.numel() - 1)
    rows = ScaledTensor(x.new_empty((*lead, t, c), dtype=fmt.elem.dtype), _scales((*lead, t, c), fmt, x), fmt)
    # TMA: rows on 16 bytes; zeros may be written up to there
    data = x.new_empty((*lead, c, -(-p // 16) * 16), dtype=fmt.elem.dtype)[..., :p]
    if fmt.group[0] == fmt.group[1]:        # one scale serves both orientations
        assert rows.scale is not None
        columns = ScaledTensor(data, rows.scale.mT, fmt)
    else:
        columns = ScaledTensor(data, _scales((*lead, c, p), fmt, x), fmt)
    if scale is not None:
        assert rows.scale is not None
        rows.scale.copy_(scale.detach().reshape(-1, 1, 1) if x.dim() == 3 else scale.detach().reshape(1, 1))
    return rows, columns, None if offsets is None else offsets.new_empty(offsets.shape, dtype=torch.int32)


def _scales(shape: tuple[int, ...], fmt: Format, x: Tensor) -> Tensor:
    return empty_scales(shape, fmt, x.device, fmt.group[1] != 0 and fmt.group[0] != 128)


def _fill(plan: Plan | None, x: Tensor, fmt: Format, rows: ScaledTensor, columns: ScaledTensor, offsets: Tensor | None,
          seg: Tensor | None, given: bool, rounding: str, amax_clamp: float, memo: Memo | None = None,
          amax: Tensor | None = None) -> None:
    if plan is not None:
        groups = 1 if offsets is None else offsets.numel() - 1
        source = ScaledTensor(x, None, PLAIN[x.dtype])
        run(plan, Operands(source, rows, columns.data, x.shape[-2], 0, x.shape[-1], groups, offsets, out_scale=columns.scale,
                           rounding=rounding, amax_clamp=amax_clamp, segments=seg, amax=amax, memo=memo))
        return
    if seg is not None:
        seg.zero_()
    for s in (rows.scale, columns.scale):       # a tensor without elements still has a scale
        if s is not None and not given:
            s.fill_(amax_clamp / fmt.elem.max if s.dtype == torch.float32 else 0)


def _impl(x: Tensor, offsets: Tensor | None, rows: Tensor, row_scale: Tensor, columns: Tensor, column_scale: Tensor | None,
          seg: Tensor | None, fmt: str, given: bool, rounding: str, amax_clamp: float, backend: str) -> None:
    form = get_format(fmt)
    plan = plan_of(x, form, offsets, row_scale.reshape(-1) if given else None, rounding, amax_clamp, backend or None)
    other = row_scale.mT if column_scale is None else column_scale      # one scale may serve both copies
    _fill(plan, x, form, ScaledTensor(rows, row_scale, form), ScaledTensor(columns, other, form), offsets, seg, given, rounding,
          amax_clamp)


library.register("quantize_both", "Tensor x, Tensor? offsets, Tensor(a!) rows, Tensor(b!) row_scale, Tensor(c!) columns, "
                 "Tensor(d!)? column_scale, Tensor(e!)? seg, str fmt, bool given, str rounding, float amax_clamp, str backend",
                 _impl)
