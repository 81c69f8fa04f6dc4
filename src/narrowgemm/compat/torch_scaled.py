"""`scaled_grouped_mm` with the arguments of `torch.nn.functional.scaled_grouped_mm`, on narrowgemm's kernels.

Recipes are torch's `ScalingType` members or their names: TensorWise, RowWise, BlockWise1x128, BlockWise128x128. Groups may have any
length, empty ones too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import Unsupported, expect
from ..formats import FP8_ROW, FP8_TENSOR, Format, FP8_1x128, FP8_128x128, ScaledTensor
from ..layouts import KGrouped, Offsets
from ..ops.grouped import grouped_gemm
from ..ops.wgrad import grouped_gemm_wgrad

FORMATS: dict[str, Format] = {f.scaling_type: f for f in (FP8_TENSOR, FP8_ROW, FP8_1x128, FP8_128x128)}
ELEMENT = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


def scaled_grouped_mm(mat_a: Tensor, mat_b: Tensor, scale_a: Tensor | list[Tensor], scale_recipe_a: Any,
                      scale_b: Tensor | list[Tensor], scale_recipe_b: Any, swizzle_a: Any = None, swizzle_b: Any = None,
                      bias: Tensor | None = None, offs: Tensor | None = None, output_dtype: torch.dtype = torch.bfloat16,
                      use_fast_accum: bool = False) -> Tensor:
    """`mat_a @ mat_b` by groups. offs: int32 `[G]`, the end of each.

    mat_a `[M, K]`, mat_b `[G, K, N]` (a transposed view of `[G, N, K]`): offs are rows of A; gives `[M, N]`.
    mat_a `[M, K]`, mat_b `[K, N]`: offs are along K; gives `[G, M, N]`; row-wise scales then are `[M]` and `[N]`.
    Scales: tensor-wise one (`[G]` for B); row-wise `[M]` and `[G, N]`; blocks `[M, K/128]` and `[G, N/128, K/128]`.

    Raises TypeError / ValueError as the native ops; Unsupported for biases, swizzled scales and other recipes.
    """
    if bias is not None or any(s not in (None, []) and "NO_SWIZZLE" not in str(s) for s in (swizzle_a, swizzle_b)):
        raise Unsupported("scaled_grouped_mm with a bias or swizzled scales", "neither")
    expect(offs is not None, "offs", None, "int32 ends of the groups")
    assert offs is not None
    index = torch.nn.functional.pad(offs, (1, 0))
    a = _operand(mat_a, scale_a, scale_recipe_a, "mat_a")
    b = _operand(mat_b.transpose(-2, -1), scale_b, scale_recipe_b, "mat_b")
    if mat_b.dim() == 3:
        return grouped_gemm(a, b, Offsets(index), out_dtype=output_dtype, fast_accum=use_fast_accum)
    return grouped_gemm_wgrad(a, b, KGrouped(index), out_dtype=output_dtype, fast_accum=use_fast_accum)


def _operand(x: Tensor, scale: Tensor | list[Tensor], recipe: Any, name: str) -> ScaledTensor:
    if isinstance(scale, (list, tuple)):
        expect(len(scale) == 1, f"scales of {name}", len(scale), "one tensor")
        scale = scale[0]
    if isinstance(recipe, (list, tuple)):
        expect(len(recipe) == 1, f"recipes of {name}", len(recipe), "one")
        recipe = recipe[0]
    kind = recipe if isinstance(recipe, str) else recipe.name
    if kind not in FORMATS:
        raise Unsupported(f"{kind} scales of {name}", f"one of {sorted(FORMATS)}")
    expect(x.dtype in ELEMENT, f"{name}, dtype", x.dtype, "float8_e4m3fn or float8_e5m2", error=TypeError)
    return ScaledTensor.make(x, scale, FORMATS[kind].with_element(ELEMENT[x.dtype]))
