"""The tensors of one call, as kernels take them: validated, scales normalised, real sizes beside the Problem's buckets."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..formats import ScaledTensor


@dataclass(slots=True, eq=False)
class Operands:
    """`out` is written in place. `index` is the layout's device tensor; `alignment` is psum's; `m` is real, not a bucket."""

    a: ScaledTensor
    b: ScaledTensor
    out: Tensor
    m: int
    n: int
    k: int
    groups: int = 1
    index: Tensor | None = None
    alignment: int = 1
    out_scale: Tensor | None = None       # quantise: scales of `out`
    rounding: str = "rceil"               # quantise: how an E8M0 scale is rounded
    amax_clamp: float = 1e-4              # quantise: least amax of a block
    memo: dict = field(default_factory=dict)  # what a kernel keeps for calls of the same signature: see `ops.common.PlanCache`
