"""Checks of what only device data can show, for `validate='sync'`: they read tensors back and name the first offender."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..formats import E8M0_NAN, ScaledTensor
from ..layouts import Layout, Masked, Psum


def _first(bad: Tensor) -> int | None:
    """Flat index of the first True, or None."""
    return int(bad.flatten().nonzero()[0]) if bool(bad.any()) else None


def check_scales(*operands: ScaledTensor) -> None:
    """ValueError where a scale is NaN, infinite or negative, or no power of two in an E8M0 format."""
    for name, x in zip(("a", "b"), operands):
        s = x.scale
        if s is None:
            continue
        if s.dtype == torch.uint8:
            bad, what = s == E8M0_NAN, "NaN (code 255)"
        else:
            bad, what = ~(s.isfinite() & (s >= 0)), "NaN, infinite or negative"
            if _first(bad) is None and x.format.scale == "e8m0":
                bad, what = (s.contiguous().view(torch.int32) & 0x7FFFFF) != 0, "no power of two"
        at = _first(bad)
        if at is not None:
            where = tuple(at // math.prod(bad.shape[i + 1:]) % n for i, n in enumerate(bad.shape))
            raise ValueError(f"scale of {name} at {where}: got {what}, expected a finite scale")


def check_layout(layout: Layout, rows: int, groups: int) -> None:
    """ValueError naming the first row or group whose id or size is out of range. `rows`: what a size may reach."""
    v = layout.index.to(torch.int64)
    if layout.kind == "contiguous":
        at = _first((v < -1) | (v >= groups))
        if at is not None:
            raise ValueError(f"m_indices[{at}]: got group {int(v[at])}, expected -1 or a group in [0, {groups})")
        return
    if isinstance(layout, Masked):
        at = _first((v < 0) | (v > rows))
        if at is not None:
            raise ValueError(f"masked_m[{at}]: got {int(v[at])} rows, expected 0 to max_m = {rows}")
        return
    starts = v[:-1]
    ends = v[1:]
    if isinstance(layout, Psum):
        ends = v
        starts = torch.cat([v.new_zeros(1), (v[:-1] + layout.alignment - 1) // layout.alignment * layout.alignment])
    at = _first((starts < 0) | (ends > rows) | ((ends < starts) if not isinstance(layout, Psum) else (ends < 0)))
    if at is not None:
        raise ValueError(f"{layout.kind} group {at}: got [{int(starts[at])}, {int(ends[at])}), expected bounds that do not "
                         f"decrease, inside [0, {rows}]")
