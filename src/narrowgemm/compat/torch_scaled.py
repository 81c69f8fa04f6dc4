"""`scaled_grouped_mm` with the arguments of `torch.nn.functional.scaled_grouped_mm`, on narrowgemm's kernels.

Recipes are torch's `ScalingType` members or their names: TensorWise, RowWise, BlockWise1x128, BlockWise128x128,
BlockWise1x32. Groups may have any length, empty ones too; either operand's axes may lie either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import Unsupported, expect
from ..formats import FP8_ROW, FP8_TENSOR, MXFP8, Format, FP8_1x128, FP8_128x128, ScaledTensor
from ..layouts import KGrouped, Masked, Offsets
from ..ops.grouped import grouped_gemm
from ..ops.wgrad import grouped_gemm_wgrad

__all__ = ["scaled_grouped_mm"]

FORMATS: dict[str, Format] = {f.scaling_type: f for f in (FP8_TENSOR, FP8_ROW, FP8_1x128, FP8_128x128, MXFP8)}
ELEMENT = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


def scaled_grouped_mm(mat_a: Tensor, mat_b: Tensor, scale_a: Tensor | list[Tensor], scale_recipe_a: Any,
                      scale_b: Tensor | list[Tensor], scale_recipe_b: Any, swizzle_a: Any = None, swizzle_b: Any = None,
                      bias: Tensor | None = None, offs: Tensor | None = None, output_dtype: torch.dtype | None = torch.bfloat16,
                      contraction_dim: Sequence[int] = (), use_fast_accum: bool = False) -> Tensor:
    """`mat_a @ mat_b` by groups. offs: int32 `[G]`, the end of each.

    mat_a `[M, K]`, mat_b `[G, K, N]` (a transposed view of `[G, N, K]`): offs are rows of A; gives `[M, N]`.
    mat_a `[M, K]`, mat_b `[K, N]`: offs are along K; gives `[G, M, N]`; row-wise scales then are `[M]` and `[N]`, or
        `[G M]` and `[G N]`, those of each group, as torch has them.
    mat_a `[G, M, K]`, mat_b `[K, N]`: offs are columns of B; gives `[M, N]`.
    mat_a `[G, M, K]`, mat_b `[G, K, N]`: no offs; gives `[G, M, N]`.
    Scales: tensor-wise one (`[G]` for a 3-D operand); row-wise `[M]` and `[G, N]`; blocks `[M, K/128]` and `[G, N/128, K/128]`.
    contraction_dim: K's axes, which is what `@` takes: (), or (-1, -2).

    Raises TypeError / ValueError as the native ops; Unsupported for biases, swizzled scales and other recipes.
    """
    for name, x in (("mat_a", mat_a), ("mat_b", mat_b), ("offs", offs)):
        there = isinstance(x, Tensor) or (x is None and name == "offs")
        expect(there, name, type(x).__name__, "a torch.Tensor", error=TypeError)
    dims = [mat_a.dim(), mat_b.dim()]
    expect(set(dims) <= {2, 3}, "mat_a and mat_b, dimensions", dims, "2 or 3 each")
    if list(contraction_dim) and [d % n for d, n in zip(contraction_dim, dims)] != [dims[0] - 1, dims[1] - 2]:
        raise Unsupported(f"contraction_dim {tuple(contraction_dim)}", "the last of mat_a and the last but one of mat_b")
    output_dtype = output_dtype or torch.bfloat16
    if bias is not None or any(s not in (None, []) and "NO_SWIZZLE" not in str(s) for s in (swizzle_a, swizzle_b)):
        raise Unsupported("scaled_grouped_mm with a bias or swizzled scales", "neither")
    stacked = dims == [3, 3]
    expect((offs is None) == stacked, "offs", "None" if offs is None else "a tensor",
           "int32 ends of the groups, where an operand is 2-D; else None")
    groups = offs.numel() if offs is not None and dims == [2, 2] else 0
    a = _operand(mat_a, scale_a, scale_recipe_a, "mat_a", groups)
    b = _operand(mat_b.transpose(-2, -1), scale_b, scale_recipe_b, "mat_b", groups)
    options: dict[str, Any] = {"out_dtype": output_dtype, "fast_accum": use_fast_accum}
    if offs is None:
        rows = torch.full((mat_a.shape[0],), mat_a.shape[1], dtype=torch.int32, device=mat_a.device)
        return grouped_gemm(a, b, Masked(rows, mat_a.shape[1]), **options)
    index = torch.nn.functional.pad(offs, (1, 0))
    if dims == [2, 3]:
        return grouped_gemm(a, b, Offsets(index), **options)
    if dims == [3, 2]:      # the columns of B are what is grouped: the transposed product
        return grouped_gemm(b, a, Offsets(index), **options).T
    return grouped_gemm_wgrad(a, b, KGrouped(index), **options)


def _operand(x: Tensor, scale: Tensor | list[Tensor], recipe: Any, name: str, groups: int) -> ScaledTensor:
    if isinstance(scale, (list, tuple)):
        expect(len(scale) == 1, f"scales of {name}", len(scale), "one tensor")
        scale = scale[0]
    if isinstance(recipe, (list, tuple)):
        expect(len(recipe) == 1, f"recipes of {name}", len(recipe), "one")
        recipe = recipe[0]
    kind = recipe if isinstance(recipe, str) else getattr(recipe, "name", None)
    expect(isinstance(kind, str), f"recipe of {name}", repr(recipe), "a ScalingType of torch, or its name", error=TypeError)
    if kind not in FORMATS:
        raise Unsupported(f"{kind} scales of {name}", f"one of {sorted(FORMATS)}")
    expect(x.dtype in ELEMENT, f"{name}, dtype", x.dtype, "float8_e4m3fn or float8_e5m2", error=TypeError)
    fmt = FORMATS[kind].with_element(ELEMENT[x.dtype])
    if groups > 1 and fmt == FP8_ROW.with_element(fmt.element) and scale.numel() == groups * x.shape[0]:
        expect(scale.dtype == torch.float32, f"scales of {name}, dtype", scale.dtype, "torch.float32", error=TypeError)
        return ScaledTensor(x, scale.reshape(groups, x.shape[0], 1), fmt)
    return ScaledTensor.make(x, scale, fmt)
