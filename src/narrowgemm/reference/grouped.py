"""`grouped_gemm` and `grouped_gemm_wgrad` in plain torch. They read the group sizes on the host: no place for graphs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..formats import ScaledTensor
from .float32 import full_float32
from .gemm import product


def rows_of_groups(kind: str, index: Tensor, m: int, groups: int, alignment: int = 1) -> Iterator[tuple[int, Tensor]]:
    """(group, its rows int64) for every group with rows. `m`: rows of A, or rows a group can hold for masked.

    Bad device data loses rows and never reaches outside: ids outside [0, G) act as -1, bounds are clamped to [0, m].
    """
    values = index.tolist()
    arange = torch.arange(m, device=index.device)
    if kind == "contiguous":
        for g in sorted({v for v in values if 0 <= v < groups}):
            yield g, arange[index == g]
        return
    previous = 0
    for g in range(groups):
        if kind == "masked":
            start, end = 0, values[g]
        elif kind == "psum":
            start, end = -(-previous // alignment) * alignment, values[g]
            previous = end
        else:
            start, end = values[g], values[g + 1]
        start, end = min(max(start, 0), m), min(max(end, 0), m)
        if end > start:
            yield g, arange[start:end]


def padding_rows(kind: str, index: Tensor, m: int, groups: int, alignment: int = 1) -> Tensor:
    """Rows of a contiguous or psum layout that belong to no group, int64."""
    live = torch.zeros(m, dtype=torch.bool, device=index.device)
    for _, rows in rows_of_groups(kind, index, m, groups, alignment):
        live[rows] = True
    return (~live).nonzero().flatten()


def take_rows(x: ScaledTensor, rows: Tensor) -> ScaledTensor:
    """Rows of a `[M, K]` operand, its scales with them."""
    assert x.format.group[0] in (0, 1), x.format
    scale = x.scale if x.scale is None or x.format.group[0] == 0 else x.scale[rows]
    return ScaledTensor(x.data[rows], scale, x.format)


def grouped_gemm(a: ScaledTensor, b: ScaledTensor, out: Tensor, kind: str, index: Tensor, *, alignment: int = 1,
                 accumulate: bool = False, zero_padding: bool = True) -> Tensor:
    """`out[rows of g] (+)= A[rows of g] . B[g]^T`. A `[M, K]` or masked `[G, max_m, K]`, B `[G, N, K]`, out like A with N.

    Padding rows of contiguous and psum come back zero (`zero_padding`), every other row outside a group is not written.
    """
    groups = b.shape[0]
    m = a.shape[-2]
    if zero_padding and kind in ("contiguous", "psum"):
        out[padding_rows(kind, index, m, groups, alignment)] = 0
    for g, rows in rows_of_groups(kind, index, m, groups, alignment):
        side, target = (a[g], out[g]) if kind == "masked" else (a, out)
        y = product(take_rows(side, rows), b[g])
        target[rows] = (y + target[rows].float() if accumulate else y).to(out.dtype)
    return out


def take_columns(x: ScaledTensor, start: int, end: int) -> Tensor:
    """FP32 values of columns `[start, end)` of `[R, K]`, scales by absolute column."""
    cols = x.format.group[1]
    if not cols or x.scale is None:
        return ScaledTensor(x.data[:, start:end], x.scale, x.format).dequantize()
    lo, packed = start // cols * cols, x.format.elem.per_byte
    part = ScaledTensor(x.data[:, lo // packed : -(-end // packed)], x.scale[:, lo // cols : -(-end // cols)], x.format)
    return part.dequantize()[:, start - lo : end - lo]


def own_scales(x: ScaledTensor, g: int) -> ScaledTensor:
    """With the scales of group g, where each group has its own."""
    return x if x.scale is None or x.scale.dim() == x.data.dim() else ScaledTensor(x.data, x.scale[g], x.format)


def grouped_gemm_wgrad(a: ScaledTensor, b: ScaledTensor, out: Tensor, offsets: Tensor, *, accumulate: bool = False) -> Tensor:
    """`out[g] (+)= A[:, ks] . B[:, ks]^T` over group g's columns. A `[M, K]`, B `[N, K]`, out `[G, M, N]`; empty groups add 0."""
    k = a.shape[1]
    bounds = [min(max(v, 0), k) for v in offsets.tolist()]
    for g, (start, end) in enumerate(zip(bounds, bounds[1:])):
        if end <= start:
            if not accumulate:
                out[g] = 0
            continue
        with full_float32():
            y = take_columns(own_scales(a, g), start, end) @ take_columns(own_scales(b, g), start, end).mT
        out[g] = (y + out[g].float() if accumulate else y).to(out.dtype)
    return out
