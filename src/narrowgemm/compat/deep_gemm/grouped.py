"""DeepGEMM's m-grouped names: contiguous (`m_indices` or psum) and masked. The `fp8` names are aliases upstream too.

Definition: deepseek-ai/DeepGEMM, `csrc/apis/gemm.hpp`. Segments of `m_indices` may have any length here.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...errors import Unsupported, expect
from ...formats import ScaledTensor
from ...layouts import Contiguous, Masked, Psum
from ...ops.grouped import grouped_gemm
from ...prepack import PackedWeight
from . import state
from .operands import Pair, Weight, check_options, prepare, transposed

Recipe = Sequence[int] | None


def m_grouped_fp8_fp4_gemm_nt_contiguous(
        a: Pair, b: Weight, d: Tensor, grouped_layout: Tensor, recipe: Recipe = None, recipe_a: Recipe = None,
        recipe_b: Recipe = None, compiled_dims: str = "nk", disable_ue8m0_cast: bool = False,
        use_psum_layout: bool = False, ensure_zero_padding: bool = True, expected_m_for_psum_layout: int | None = None,
        epilogue: None = None) -> None:
    """`d[rows of g] = a[rows of g] @ b[g].T` for every group, written in place.

    `a`: (FP8 `[M, K]`, scales `[M, K/128]`); `b`: (FP8 `[G, N, K]`, scales `[G, N/128, K/128]`, or `[G, N, K/128]`);
    FP4 and packed weights as in `fp8_fp4_gemm_nt`. `d` `[M, N]`. `grouped_layout` int32: `[M]`, the group of each row,
    -1 for padding; or with `use_psum_layout` `[G]`, the end row of each group, the next starting at that rounded up to
    `get_mk_alignment_for_contiguous_layout()`.
    Padding rows of `d` come back zero; with `use_psum_layout` and `ensure_zero_padding=False` they are not written.
    `expected_m_for_psum_layout` is a hint. Scales and errors as in `fp8_fp4_gemm_nt`.
    """
    check_options(compiled_dims, epilogue)
    x, y = prepare(a, b, d, (2, 3), recipe, recipe_a, recipe_b)
    contiguous(x, y, d, grouped_layout, use_psum_layout, ensure_zero_padding, expected_m_for_psum_layout)


def m_grouped_fp8_fp4_gemm_nn_contiguous(
        a: Pair, b: Weight, d: Tensor, grouped_layout: Tensor, recipe: Recipe = None, recipe_a: Recipe = None,
        recipe_b: Recipe = None, compiled_dims: str = "nk", disable_ue8m0_cast: bool = False,
        use_psum_layout: bool = False, ensure_zero_padding: bool = True, epilogue: None = None) -> None:
    """The same with `b` (FP8 `[G, K, N]`, scales `[G, K/128, N/128]`): `d[rows of g] = a[rows of g] @ b[g]`."""
    m_grouped_fp8_fp4_gemm_nt_contiguous(a, transposed(b, "b"), d, grouped_layout, recipe, recipe_a, recipe_b,
                                         compiled_dims, disable_ue8m0_cast, use_psum_layout, ensure_zero_padding, None,
                                         epilogue)


def m_grouped_fp8_fp4_gemm_nt_masked(
        a: Pair, b: Weight, d: Tensor, masked_m: Tensor, expected_m: int, recipe: Recipe = None, recipe_a: Recipe = None,
        recipe_b: Recipe = None, compiled_dims: str = "nk", disable_ue8m0_cast: bool = False, epilogue: None = None, *,
        enable_overlap: bool = False, max_block_n: int = 256, signal: Tensor | None = None) -> None:
    """`d[g, :masked_m[g]] = a[g, :masked_m[g]] @ b[g].T`, written in place; other rows of `d` are not written.

    `a`: (FP8 `[G, max_m, K]`, scales `[G, max_m, K/128]`); `b` as in the contiguous form; `d` `[G, max_m, N]`;
    `masked_m` int32 `[G]`, zero allowed; `expected_m`: a hint, the mean of `masked_m`, 0 for unknown.
    `enable_overlap` and `signal` (the SGLang build's overlap of the down projection) raise Unsupported; `max_block_n`
    is a hint.
    """
    check_options(compiled_dims, epilogue)
    if enable_overlap or signal is not None:
        raise Unsupported("enable_overlap with a signal tensor", "enable_overlap=False; set_num_sms leaves SMs free")
    x, y = prepare(a, b, d, (3, 3), recipe, recipe_a, recipe_b)
    masked(x, y, d, masked_m, expected_m)


def contiguous(x: ScaledTensor, y: ScaledTensor | PackedWeight, d: Tensor, grouped_layout: Tensor, use_psum_layout: bool,
               ensure_zero_padding: bool, expected_m: int | None) -> None:
    """What all contiguous names do once their operands are checked: `expected_m` is their `expected_m_for_psum_layout`."""
    layout: Contiguous | Psum
    if use_psum_layout:
        layout = Psum(grouped_layout, state.settings.mk_alignment, hint(expected_m or 0, "expected_m_for_psum_layout"))
        layout.groups(y.shape[0])
    else:
        expect(expected_m is None, "expected_m_for_psum_layout without use_psum_layout", expected_m, "None")
        layout = Contiguous(grouped_layout)
        expect(grouped_layout.numel() == len(d), "grouped_layout, length", grouped_layout.numel(),
               f"the rows of a, {len(d)}")
    if state.settings.compile_mode and state.skips(layout.kind, x, y, d):
        return
    grouped_gemm(x, y, layout, out=d, zero_padding=ensure_zero_padding or not use_psum_layout, max_sms=state.max_sms(d))


def masked(x: ScaledTensor, y: ScaledTensor | PackedWeight, d: Tensor, masked_m: Tensor, expected_m: int) -> None:
    """The same for the masked names."""
    layout = Masked(masked_m, hint(expected_m, "expected_m"))
    layout.groups(len(d))
    if state.settings.compile_mode and state.skips("masked", x, y, d, layout.expected_m):
        return
    grouped_gemm(x, y, layout, out=d, max_sms=state.max_sms(d))


def hint(value: object, name: str) -> int:
    """A non-negative number of rows that the host knows; a tensor would mean a synchronisation, so it is refused."""
    if type(value) is int and value >= 0:
        return value
    expect(not isinstance(value, (Tensor, bool, float)) and hasattr(value, "__index__"), name, repr(value),
           "an integer known to the host", error=TypeError)
    n = int(value)  # type: ignore[call-overload]
    expect(n >= 0, name, n, "at least 0")
    return n


m_grouped_fp8_gemm_nt_contiguous = m_grouped_fp8_fp4_gemm_nt_contiguous
m_grouped_fp8_gemm_nn_contiguous = m_grouped_fp8_fp4_gemm_nn_contiguous
m_grouped_fp8_gemm_nt_masked = m_grouped_fp8_fp4_gemm_nt_masked
fp8_m_grouped_gemm_nt_masked = m_grouped_fp8_fp4_gemm_nt_masked
