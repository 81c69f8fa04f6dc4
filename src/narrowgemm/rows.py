"""Moving rows by a row map, and the maps themselves. On the device, without reading an index back.

A *row map* is int32 of any shape: entry i names the source row that row i holds, and a value outside `[0, rows)` means
that it holds none. Every mover is a gather, so nothing is written twice and the result does not depend on an order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor

from .errors import expect
from .formats import ScaledTensor
from .layouts import INT

LIMIT = 2**31  # row maps are int32


def check_rows(n: int, name: str) -> int:
    """A host-known number of rows that an int32 row map can index. ValueError elsewhere."""
    expect(0 <= n < LIMIT, name, n, "a number of rows in [0, 2^31)")
    return n


def sort_ids(ids: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """`(order int32 [n], offsets int64 [groups + 1])`: positions of `ids` sorted by id, and where each id's run begins.

    The sort is stable. Ids outside [0, groups) come last, from `offsets[groups]` on, in their original order.
    """
    narrow = torch.int16 if groups < 2**15 - 1 else torch.int32  # half the passes of a radix sort
    keys = torch.where((ids >= 0) & (ids < groups), ids, groups).to(narrow)
    keys, order = torch.sort(keys, stable=True)
    offsets = torch.searchsorted(keys, torch.arange(groups + 1, dtype=narrow, device=ids.device))
    return order.to(torch.int32), offsets


def invert_row_map(row_map: Tensor, rows: int) -> Tensor:
    """int32 `[rows]`: the position in `row_map` (flattened) that holds each source row, -1 where none does.

    `row_map`: int32 or int64 of any shape, holding each row at most once; values outside [0, rows) are skipped.
    """
    expect(row_map.dtype in INT, "row_map, dtype", row_map.dtype, "int32 or int64", error=TypeError)
    check_rows(rows, "rows")
    check_rows(row_map.numel(), "row_map, length")
    flat = row_map.reshape(-1)
    at = torch.where((flat >= 0) & (flat < rows), flat, rows).long()  # one spare entry takes whatever is skipped
    out = flat.new_full((rows + 1,), -1, dtype=torch.int32)
    return out.scatter_(0, at, torch.arange(flat.numel(), dtype=torch.int32, device=flat.device))[:rows]


@overload
def gather_rows(x: Tensor, row_map: Tensor) -> Tensor: ...
@overload
def gather_rows(x: ScaledTensor, row_map: Tensor) -> ScaledTensor: ...
def gather_rows(x: Tensor | ScaledTensor, row_map: Tensor) -> Tensor | ScaledTensor:
    """Rows of `x` by `row_map`: `[*row_map.shape, K]`, zero where the map names no row of `x`.

    `x`: `[M]`, `[M, K]`, or `[G, max_m, K]` whose rows count as `G * max_m`; any dtype. A ScaledTensor moves its scales
    along: one scale a row or more (row-wise, 1x32, 1x128), or one for the whole tensor. Padding rows are zero payload
    with a zero scale (E8M0: code 0).

    Raises TypeError for a map that is not int32 or int64, ValueError for scales that span rows (128x128, one a group).
    """
    expect(row_map.dtype in INT, "row_map, dtype", row_map.dtype, "int32 or int64", error=TypeError)
    if not isinstance(x, ScaledTensor):
        return _gather(x, row_map)
    return _scaled(x, row_map, _gather)


@overload
def take_rows(x: Tensor, index: Tensor) -> Tensor: ...
@overload
def take_rows(x: ScaledTensor, index: Tensor) -> ScaledTensor: ...
def take_rows(x: Tensor | ScaledTensor, index: Tensor) -> Tensor | ScaledTensor:
    """As `gather_rows`, for an `index` `[R]` that is known to name rows only: saves the pass that zeroes the others."""
    return _scaled(x, index, _take) if isinstance(x, ScaledTensor) else _take(x, index)


def _scaled(x: ScaledTensor, index: Tensor, move: Callable[[Tensor, Tensor], Tensor]) -> ScaledTensor:
    data = move(x.data, index)
    if x.scale is None:
        return ScaledTensor(data, None, x.format)
    if x.format.group == (0, 0):
        expect(x.scale.numel() == 1, f"scales of {x.format.name} whose rows move", tuple(x.scale.shape),
               "one for the whole tensor")
        return ScaledTensor(data, x.scale.reshape(1).expand(x.format.scale_shape(data.shape)), x.format)
    expect(x.format.group[0] == 1, "format whose rows move", x.format.name, "one with scales of its own for each row")
    return ScaledTensor(data, move(x.scale, index), x.format)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return _typed(_words(x).index_select(0, index), x.dtype)


def _bytes(x: Tensor) -> Tensor:
    """FP8 has no arithmetic in torch and not every index op, so one-byte types move as bytes."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


def _words(x: Tensor) -> Tensor:
    """Rows as 8-byte words where they divide into them: torch's index kernels move one element at a time, whatever its size."""
    if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
        return _bytes(x)
    size = x.element_size()
    if x.dim() != 2 or not x.is_contiguous() or x.shape[1] == 0 or x.shape[1] * size % 8 or x.storage_offset() * size % 8:
        return _bytes(x)
    return x.view(torch.int64)


def _typed(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.view(dtype)  # a view by dtype, even the same one, has no gradient


def _gather(x: Tensor, row_map: Tensor) -> Tensor:
    expect(x.dim() >= 1, "x, shape", tuple(x.shape), "[M], [M, K] or [G, max_m, K]")
    expect(x.device == row_map.device, "row_map, device", row_map.device, f"that of x, {x.device}")
    rows = _bytes(x)
    rows = rows.flatten(0, -2) if x.dim() > 2 else rows
    m, tail = rows.shape[0], rows.shape[1:]
    check_rows(m, "x, rows")
    flat = row_map.reshape(-1)
    if m == 0:
        return _typed(rows.new_zeros((*row_map.shape, *tail)), x.dtype)
    live = (flat >= 0) & (flat < m)
    out = rows.index_select(0, torch.where(live, flat, 0))
    out = torch.where(live.view(-1, *(1 for _ in tail)), out, 0)
    return _typed(out.view(*row_map.shape, *tail), x.dtype)

