"""`quantize_both` in plain torch: the definition, and the CPU backend. Reads the group sizes on the host.

Every copy is `reference.quantize` of the same values: of `x` for the rows, of a group's transpose, filled up with zeros to
a multiple of 128 columns, for the columns. Tensor-wise, both have the one scale; row-wise, a column's scale covers every
row that a group has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Format, ScaledTensor
from .quantize import cast_fp8, quantize

ALIGNMENT = 128


def bounds(offsets: Tensor, rows: int) -> list[tuple[int, int]]:
    """(first row, end) of each group, clamped to [0, rows]."""
    v = [min(max(x, 0), rows) for x in offsets.tolist()]
    return [(a, max(a, b)) for a, b in zip(v, v[1:])]


def segments(offsets: Tensor, rows: int, capacity: int) -> Tensor:
    """int32 `[G + 1]`: where each group's columns start, multiples of 128, and where the last one's end."""
    widths = [-(-(b - a) // ALIGNMENT) * ALIGNMENT for a, b in bounds(offsets, rows)]
    return torch.tensor([0, *widths], device="cpu").cumsum(0).clamp(max=capacity).to(torch.int32).to(offsets.device)


def quantize_both(x: Tensor, fmt: Format, rows: ScaledTensor, columns: ScaledTensor, offsets: Tensor | None, seg: Tensor | None,
                  given: bool, rounding: str, amax_clamp: float) -> None:
    """Fill `rows` and `columns` from `x` `[T, C]` or `[B, T, C]`, and `seg` where `offsets` name groups of rows. `given`: the
    tensor-wise scale is in `rows.scale`."""
    assert rows.scale is not None and columns.scale is not None
    if offsets is None:
        for i in range(x.shape[0]) if x.dim() == 3 else (...,):
            row, column = _pair(x[i], fmt, rows.scale[i] if given else None, rounding, amax_clamp)
            _put(rows, i, row)
            _put(columns, i, column)
        return
    assert seg is not None
    seg.copy_(segments(offsets, x.shape[0], columns.data.shape[1]))
    live = bounds(offsets, x.shape[0])
    lo, hi = (live[0][0], live[-1][1]) if live else (0, 0)
    whole, transposed = _pair(x[lo:hi], fmt, rows.scale if given else None, rounding, amax_clamp)
    assert whole.scale is not None and transposed.scale is not None
    rows.data[lo:hi] = whole.data
    if fmt.group[0] == 0:
        rows.scale.copy_(whole.scale)
    else:
        rows.scale[lo:hi] = whole.scale
    if fmt.group[1] == 0:
        columns.scale.copy_(transposed.scale)
    for (a, b), start, end in zip(live, seg.tolist(), seg.tolist()[1:]):
        padded = torch.nn.functional.pad(x[a:b].mT, (0, end - start - (b - a)))
        if fmt.group[1]:
            part = quantize(padded, fmt, rounding, amax_clamp)
            assert part.scale is not None
            columns.scale[:, start // ALIGNMENT : end // ALIGNMENT] = part.scale
            columns.data[:, start:end] = part.data
        else:
            columns.data[:, start : start + b - a] = transposed.data[:, a - lo : b - lo]
        columns.data[:, start + b - a : end] = 0    # under a NaN scale too


def raise_amax(amax: Tensor, x: Tensor, offsets: Tensor | None) -> None:
    """Raise `amax` to the largest magnitude of the rows that belong to a group."""
    if offsets is not None:
        live = bounds(offsets, x.shape[0])
        x = x[live[0][0]:live[-1][1]] if live else x[:0]
    if x.numel():
        amax.copy_(amax.maximum(x.abs().max().float()))


def _pair(x: Tensor, fmt: Format, scale: Tensor | None, rounding: str, amax_clamp: float) -> tuple[ScaledTensor, ScaledTensor]:
    if scale is None:
        return quantize(x, fmt, rounding, amax_clamp), quantize(x.mT, fmt, rounding, amax_clamp)
    inverse = torch.where(scale.isfinite(), 1.0 / scale, torch.nan)
    data = cast_fp8(x.float() * inverse, fmt)
    return ScaledTensor(data, scale, fmt), ScaledTensor(data.mT, scale, fmt)


def _put(target: ScaledTensor, at: object, value: ScaledTensor) -> None:
    assert target.scale is not None and value.scale is not None
    target.data[at] = value.data  # type: ignore[index]
    target.scale[at] = value.scale  # type: ignore[index]
