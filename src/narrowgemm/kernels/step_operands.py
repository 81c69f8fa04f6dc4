"""The tensors of the expert layer's steps, as kernels take them: validated, real sizes beside the Problem's buckets.

T tokens, k choices a token, R = T * k slots (as many rows), E experts of this rank. `row_map`, `offsets`, `inverse` are a
Routing's. `out` is where a workspace belongs; `memo` as in `Operands`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..formats import ScaledTensor
from .operands import Tensors


@dataclass(slots=True, eq=False)
class RouteOperands(Tensors):
    logits: Tensor                  # [T, E]
    bias: Tensor | None             # [E]
    weights: Tensor                 # fp32 [T, k], written
    out: Tensor                     # ids, int32 [T, k], written
    scoring: str
    renormalize: bool
    num_expert_group: int           # 0: no groups
    topk_group: int
    scaling_factor: float
    memo: dict | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.logits, self.bias, self.weights, self.out


@dataclass(slots=True, eq=False)
class SortOperands(Tensors):
    ids: Tensor                     # int32 / int64 [T, k], contiguous
    expert_map: Tensor | None       # [E_all]
    first_expert: int               # the id, after the map, of this rank's first
    experts: int
    out: Tensor                     # row_map int32 [R], written
    offsets: Tensor                 # int64 [E + 1], written
    inverse: Tensor                 # int32 [R], written
    memo: dict | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.ids, self.expert_map, self.out, self.offsets, self.inverse


@dataclass(slots=True, eq=False)
class GatherOperands(Tensors):
    x: Tensor                       # [T, K]
    row_map: Tensor
    offsets: Tensor
    inverse: Tensor
    top_k: int
    rows: ScaledTensor              # [R, K], written
    rounding: str
    amax_clamp: float
    memo: dict | None = None

    @property
    def out(self) -> Tensor:
        return self.rows.data

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.row_map, self.offsets, self.inverse, self.rows.data, self.rows.scale


@dataclass(slots=True, eq=False)
class SortGatherOperands(Tensors):
    """Sort and gather in one: what `SortOperands` and `GatherOperands` have."""

    ids: Tensor                     # int32 / int64 [T, k], contiguous
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
    memo: dict | None = None

    @property
    def out(self) -> Tensor:
        return self.rows.data

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.ids, self.expert_map, self.x, self.row_map, self.offsets, self.inverse, self.rows.data, self.rows.scale


@dataclass(slots=True, eq=False)
class ActivateOperands(Tensors):
    h: Tensor                       # [R, 2I]
    bias: Tensor | None             # [E, 2I]
    offsets: Tensor | None          # [E + 1]; None: every row
    result: ScaledTensor            # [R, I], written
    activation: str
    args: tuple[float, ...]
    interleaved: bool
    rounding: str
    amax_clamp: float
    memo: dict | None = None

    @property
    def out(self) -> Tensor:
        return self.result.data

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.h, self.bias, self.offsets, self.result.data, self.result.scale


@dataclass(slots=True, eq=False)
class ActivateBothOperands(Tensors):
    h: Tensor                       # [T, 2I]
    dy: Tensor | None               # [T, I]: the derivative is wanted
    offsets: Tensor                 # [G + 1]
    segments: Tensor                # int32 [G + 1], where each group's columns start
    fresh_segments: bool            # they are to be written
    rows: ScaledTensor              # [T, I] (derivative: 2I), written
    columns: ScaledTensor | None    # [I (2I), P], written; None where rows are not scaled
    amax: Tensor | None             # float32 [1], raised to the largest magnitude
    activation: str
    args: tuple[float, ...]
    rounding: str
    amax_clamp: float
    memo: dict | None = None

    @property
    def out(self) -> Tensor:
        return self.rows.data

    def tensors(self) -> tuple[Tensor | None, ...]:
        data, scale = (None, None) if self.columns is None else (self.columns.data, self.columns.scale)
        return self.h, self.dy, self.offsets, self.segments, self.rows.data, self.rows.scale, data, scale, self.amax


@dataclass(slots=True, eq=False)
class CombineOperands(Tensors):
    y: Tensor                       # [R, N]
    row_map: Tensor
    offsets: Tensor
    inverse: Tensor
    weights: Tensor                 # fp32 [T, k]
    bias: Tensor | None             # [E, N]
    add: Tensor | None              # [T, N]
    out: Tensor                     # [T, N], written
    memo: dict | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.y, self.row_map, self.offsets, self.inverse, self.weights, self.bias, self.add, self.out


StepOperands = (RouteOperands | SortOperands | GatherOperands | SortGatherOperands | ActivateOperands | ActivateBothOperands
                | CombineOperands)
