"""The tensors of the expert layer's steps, as kernels take them: validated, real sizes beside the Problem's buckets.

T tokens, k choices a token, R = T * k slots (as many rows), E experts of this rank. `out` is where a workspace belongs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..formats import ScaledTensor
from ..reference.route import Routing


@dataclass(slots=True, eq=False)
class RouteOperands:
    logits: Tensor                  # [T, E]
    bias: Tensor | None             # [E]
    weights: Tensor                 # fp32 [T, k], written
    ids: Tensor                     # int32 [T, k], written
    scoring: str
    renormalize: bool
    num_expert_group: int           # 0: no groups
    topk_group: int
    scaling_factor: float

    @property
    def out(self) -> Tensor:
        return self.ids


@dataclass(slots=True, eq=False)
class SortOperands:
    ids: Tensor                     # int32 / int64 [T, k]
    expert_map: Tensor | None       # [E_all]
    first_expert: int               # the id, after the map, of this rank's first
    routing: Routing                # written

    @property
    def out(self) -> Tensor:
        return self.routing.row_map


@dataclass(slots=True, eq=False)
class GatherOperands:
    x: Tensor                       # [T, K]
    routing: Routing
    rows: ScaledTensor              # [R, K], written
    rounding: str
    amax_clamp: float

    @property
    def out(self) -> Tensor:
        return self.rows.data


@dataclass(slots=True, eq=False)
class ActivateOperands:
    h: Tensor                       # [R, 2I]
    bias: Tensor | None             # [E, 2I]
    offsets: Tensor | None          # [E + 1]; None: every row
    result: ScaledTensor            # [R, I], written
    activation: str
    args: tuple[float, ...]
    interleaved: bool
    rounding: str
    amax_clamp: float

    @property
    def out(self) -> Tensor:
        return self.result.data


@dataclass(slots=True, eq=False)
class CombineOperands:
    y: Tensor                       # [R, N]
    routing: Routing
    weights: Tensor                 # fp32 [T, k]
    bias: Tensor | None             # [E, N]
    add: Tensor | None              # [T, N]
    out: Tensor                     # [T, N], written


StepOperands = RouteOperands | SortOperands | GatherOperands | ActivateOperands | CombineOperands
