"""The tensors of the expert layer's steps, as kernels take them: validated, real sizes beside the Problem's buckets.

T tokens, k choices a token, R = T * k slots (as many rows), E experts of this rank. Tensors are BF16, FP16 or FP32 where a comment
names no dtype. `row_map` int32 `[R]`, `offsets` int64 `[E + 1]`, `inverse` int32 `[R]` are a Routing's. `out` is where a workspace
belongs; `memo` as in `Operands`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..formats import ScaledTensor
from .operands import Memo, Tensors


class WritesRows(Tensors):
    """Operands of a step whose output is `rows`."""

    __slots__ = ()
    rows: ScaledTensor

    @property
    def out(self) -> Tensor:
        return self.rows.data


@dataclass(slots=True, eq=False)
class RouteOperands(Tensors):
    """`route`: router logits to each token's experts and their weights."""

    logits: Tensor                  # [T, E]
    bias: Tensor | None             # [E]
    weights: Tensor                 # fp32 [T, k], written
    out: Tensor                     # ids, int32 [T, k], written
    scoring: str
    renormalize: bool
    num_expert_group: int           # 0: no groups
    topk_group: int
    scaling_factor: float
    memo: Memo | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.logits, self.bias, self.weights, self.out


@dataclass(slots=True, eq=False)
class SortOperands(Tensors):
    """`sort_by_expert`: ids to a Routing."""

    ids: Tensor                     # int32 / int64 [T, k], contiguous
    expert_map: Tensor | None       # int32 / int64 [E_all]
    first_expert: int               # the id, after the map, of this rank's first
    experts: int
    out: Tensor                     # row_map, written, as offsets and inverse
    offsets: Tensor
    inverse: Tensor
    memo: Memo | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.ids, self.expert_map, self.out, self.offsets, self.inverse


@dataclass(slots=True, eq=False)
class GatherOperands(WritesRows):
    """`gather_quantize`: tokens to the rows of their experts."""

    x: Tensor                       # [T, K]
    row_map: Tensor
    offsets: Tensor
    inverse: Tensor
    top_k: int
    rows: ScaledTensor              # [R, K], written
    rounding: str
    amax_clamp: float
    memo: Memo | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.row_map, self.offsets, self.inverse, self.rows.data, self.rows.scale


@dataclass(slots=True, eq=False)
class SortGatherOperands(WritesRows):
    """`sort_by_expert` and `gather_quantize` in one."""

    ids: Tensor                     # as in SortOperands, the three behind it, too
    expert_map: Tensor | None
    first_expert: int
    experts: int
    x: Tensor                       # [T, K]
    top_k: int
    row_map: Tensor                 # written, as offsets and inverse
    offsets: Tensor
    inverse: Tensor
    rows: ScaledTensor              # [R, K], written
    rounding: str
    amax_clamp: float
    memo: Memo | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.ids, self.expert_map, self.x, self.row_map, self.offsets, self.inverse, self.rows.data, self.rows.scale


@dataclass(slots=True, eq=False)
class ActivateOperands(WritesRows):
    """`activate`: SwiGLU of rows, quantised or not."""

    h: Tensor                       # [R, 2I]
    bias: Tensor | None             # [E, 2I]
    offsets: Tensor | None          # None: every row is computed
    rows: ScaledTensor              # [R, I], written
    activation: str
    args: tuple[float, ...]
    interleaved: bool
    rounding: str
    amax_clamp: float
    memo: Memo | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.h, self.bias, self.offsets, self.rows.data, self.rows.scale


@dataclass(slots=True, eq=False)
class ActivateBothOperands(WritesRows):
    """`activate_both` and `activate_backward`: SwiGLU or its derivative, quantised along rows and columns. G groups of T rows."""

    h: Tensor                       # [T, 2I]
    dy: Tensor | None               # [T, I], where the derivative is wanted
    offsets: Tensor                 # int32 / int64 [G + 1]
    segments: Tensor                # int32 [G + 1], where each group's columns start
    fresh_segments: bool            # they are to be written
    rows: ScaledTensor              # [T, I] (derivative: 2I), written
    columns: ScaledTensor | None    # [I (2I), P], written; None where rows are not scaled
    amax: Tensor | None             # fp32 [1], raised to the largest magnitude
    activation: str
    args: tuple[float, ...]
    rounding: str
    amax_clamp: float
    memo: Memo | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        data, scale = (None, None) if self.columns is None else (self.columns.data, self.columns.scale)
        return self.h, self.dy, self.offsets, self.segments, self.rows.data, self.rows.scale, data, scale, self.amax


@dataclass(slots=True, eq=False)
class CombineOperands(Tensors):
    """`combine`: the weighted sum of each token's rows."""

    y: Tensor                       # [R, N]
    row_map: Tensor
    offsets: Tensor
    inverse: Tensor
    weights: Tensor                 # fp32 [T, k]
    bias: Tensor | None             # [E, N]
    add: Tensor | None              # [T, N]
    out: Tensor                     # [T, N], written
    memo: Memo | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.y, self.row_map, self.offsets, self.inverse, self.weights, self.bias, self.add, self.out


StepOperands = (RouteOperands | SortOperands | GatherOperands | SortGatherOperands | ActivateOperands | ActivateBothOperands
                | CombineOperands)
