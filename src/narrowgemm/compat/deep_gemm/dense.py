"""DeepGEMM's dense names: `fp8_gemm_{nt,nn,tn,tt}`, and `fp8_fp4_gemm_*`, of which they are aliases upstream too.

Definition: deepseek-ai/DeepGEMM, `csrc/apis/gemm.hpp`. The two letters say how A and B lie: `n`t A `[M, K]`, `t`. A
`[K, M]`, n`t` B `[N, K]`, .`n` B `[K, N]`; the scales are transposed with their payload.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...ops.gemm import gemm
from . import state
from .operands import Pair, Weight, check_options, prepare, take_c, transposed

Recipe = Sequence[int] | None


def fp8_fp4_gemm_nt(a: Pair, b: Weight, d: Tensor, c: Tensor | None = None, recipe: Recipe = None,
                    recipe_a: Recipe = None, recipe_b: Recipe = None, compiled_dims: str = "nk",
                    disable_ue8m0_cast: bool = False, epilogue: None = None) -> None:
    """`d = c + a @ b.T`, written in place.

    `a`: (FP8 `[M, K]`, scales `[M, K/128]`); `b`: (FP8 `[N, K]`, scales `[N/128, K/128]`, or `[N, K/128]`); scales
    float32, E8M0 codes, or int32 of four codes along K; row-major, MN-major or transposed. Either may be FP4, see
    `fp4.py`, and `b` what `prepack_fp4` or `narrowgemm.prepack` gave. `d` `[M, N]` bf16, fp16 or fp32, `c` like `d` or
    None, `c is d` accumulates. `disable_ue8m0_cast` has no effect: FP32 scales are never rounded.
    Raises ValueError / TypeError for what doesn't fit, Unsupported for epilogues and unknown recipes.
    """
    check_options(compiled_dims, epilogue)
    x, y = prepare(a, b, d, (2, 2), recipe, recipe_a, recipe_b)
    accumulate = c is not None and take_c(c, d)
    if state.settings.compile_mode and state.skips("gemm", x, y, d):
        return
    gemm(x, y, out=d, accumulate=accumulate, max_sms=state.max_sms(d))


def fp8_fp4_gemm_nn(a: Pair, b: Weight, d: Tensor, c: Tensor | None = None, recipe: Recipe = None,
                    recipe_a: Recipe = None, recipe_b: Recipe = None, compiled_dims: str = "nk",
                    disable_ue8m0_cast: bool = False, epilogue: None = None) -> None:
    """`d = c + a @ b` with `b` (FP8 `[K, N]`, scales `[K/128, N/128]`). The rest as `fp8_fp4_gemm_nt`."""
    fp8_fp4_gemm_nt(a, transposed(b, "b"), d, c, recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast,
                    epilogue)


def fp8_fp4_gemm_tn(a: Pair, b: Weight, d: Tensor, c: Tensor | None = None, recipe: Recipe = None,
                    recipe_a: Recipe = None, recipe_b: Recipe = None, compiled_dims: str = "mn",
                    disable_ue8m0_cast: bool = False, epilogue: None = None) -> None:
    """`d = c + a.T @ b` with `a` (FP8 `[K, M]`, scales `[K/128, M]`), `b` as in `nn`. The rest as `fp8_fp4_gemm_nt`."""
    fp8_fp4_gemm_nt(transposed(a, "a"), transposed(b, "b"), d, c, recipe, recipe_a, recipe_b, compiled_dims,
                    disable_ue8m0_cast, epilogue)


def fp8_fp4_gemm_tt(a: Pair, b: Weight, d: Tensor, c: Tensor | None = None, recipe: Recipe = None,
                    recipe_a: Recipe = None, recipe_b: Recipe = None, compiled_dims: str = "mn",
                    disable_ue8m0_cast: bool = False, epilogue: None = None) -> None:
    """`d = c + a.T @ b.T` with `a` as in `tn`, `b` as in `nt`. The rest as `fp8_fp4_gemm_nt`."""
    fp8_fp4_gemm_nt(transposed(a, "a"), b, d, c, recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast,
                    epilogue)


fp8_gemm_nt, fp8_gemm_nn, fp8_gemm_tn, fp8_gemm_tt = fp8_fp4_gemm_nt, fp8_fp4_gemm_nn, fp8_fp4_gemm_tn, fp8_fp4_gemm_tt
