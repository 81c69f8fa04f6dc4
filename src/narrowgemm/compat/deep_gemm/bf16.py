"""DeepGEMM's BF16 names, for callers without a real DeepGEMM: `delegate` hands these out where there is none.

Definition: deepseek-ai/DeepGEMM, `csrc/apis/gemm.hpp`. Letters, layouts and settings as for the FP8 names.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import expect
from ...formats import BF16, ScaledTensor
from ...ops.gemm import gemm
from . import state
from .grouped import contiguous, masked
from .operands import check_options, check_out, take_c

NAMES = ("bf16_gemm_nn", "bf16_gemm_nt", "bf16_gemm_tn", "bf16_gemm_tt", "bf16_m_grouped_gemm_nt_masked",
         "m_grouped_bf16_gemm_nn_contiguous", "m_grouped_bf16_gemm_nt_contiguous", "m_grouped_bf16_gemm_nt_masked",
         "cublaslt_gemm_nn", "cublaslt_gemm_nt", "cublaslt_gemm_tn", "cublaslt_gemm_tt")


def bf16_gemm_nt(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None, compiled_dims: str = "nk") -> None:
    """`d = c + a @ b.T`, written in place. `a` `[M, K]`, `b` `[N, K]` BF16; `d` `[M, N]` BF16, FP16 or FP32; `c` like `d`, or None.

    Raises ValueError / TypeError for what doesn't fit.
    """
    check_options(compiled_dims, None)
    x, y = prepare(a, b, d, (2, 2))
    accumulate = c is not None and take_c(c, d)
    if state.settings.compile_mode and state.skips("gemm", x, y, d):
        return
    gemm(x, y, out=d, accumulate=accumulate, max_sms=state.max_sms(d))


def bf16_gemm_nn(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None, compiled_dims: str = "nk") -> None:
    """`d = c + a @ b` with `b` `[K, N]`. The rest as `bf16_gemm_nt`."""
    bf16_gemm_nt(a, _turned(b, "b"), d, c, compiled_dims)


def bf16_gemm_tn(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None, compiled_dims: str = "mn") -> None:
    """`d = c + a.T @ b` with `a` `[K, M]`, `b` `[K, N]`. The rest as `bf16_gemm_nt`."""
    bf16_gemm_nt(_turned(a, "a"), _turned(b, "b"), d, c, compiled_dims)


def bf16_gemm_tt(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None, compiled_dims: str = "mn") -> None:
    """`d = c + a.T @ b.T` with `a` `[K, M]`, `b` `[N, K]`. The rest as `bf16_gemm_nt`."""
    bf16_gemm_nt(_turned(a, "a"), b, d, c, compiled_dims)


def cublaslt_gemm_nt(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None) -> None:
    """`bf16_gemm_nt`, by whatever kernel is fastest there: cuBLAS's or another."""
    bf16_gemm_nt(a, b, d, c)


def cublaslt_gemm_nn(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None) -> None:
    """As `bf16_gemm_nn`."""
    bf16_gemm_nn(a, b, d, c)


def cublaslt_gemm_tn(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None) -> None:
    """As `bf16_gemm_tn`."""
    bf16_gemm_tn(a, b, d, c)


def cublaslt_gemm_tt(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None) -> None:
    """As `bf16_gemm_tt`."""
    bf16_gemm_tt(a, b, d, c)


def m_grouped_bf16_gemm_nt_contiguous(a: Tensor, b: Tensor, d: Tensor, grouped_layout: Tensor, compiled_dims: str = "nk",
                                      use_psum_layout: bool = False, ensure_zero_padding: bool = True,
                                      expected_m_for_psum_layout: int | None = None) -> None:
    """`d[rows of g] = a[rows of g] @ b[g].T`: `a` `[M, K]`, `b` `[G, N, K]` BF16; layouts and padding as of the FP8 name."""
    check_options(compiled_dims, None)
    x, y = prepare(a, b, d, (2, 3))
    contiguous(x, y, d, grouped_layout, use_psum_layout, ensure_zero_padding, expected_m_for_psum_layout)


def m_grouped_bf16_gemm_nn_contiguous(a: Tensor, b: Tensor, d: Tensor, grouped_layout: Tensor, compiled_dims: str = "nk",
                                      use_psum_layout: bool = False, ensure_zero_padding: bool = True) -> None:
    """The same with `b` `[G, K, N]`: `d[rows of g] = a[rows of g] @ b[g]`."""
    m_grouped_bf16_gemm_nt_contiguous(a, _turned(b, "b"), d, grouped_layout, compiled_dims, use_psum_layout, ensure_zero_padding)


def m_grouped_bf16_gemm_nt_masked(a: Tensor, b: Tensor, d: Tensor, masked_m: Tensor, expected_m: int,
                                  compiled_dims: str = "nk") -> None:
    """`d[g, :masked_m[g]] = a[g, :masked_m[g]] @ b[g].T`; other rows of `d` are not written. `a` `[G, max_m, K]`,
    `b` `[G, N, K]`."""
    check_options(compiled_dims, None)
    x, y = prepare(a, b, d, (3, 3))
    masked(x, y, d, masked_m, expected_m)


bf16_m_grouped_gemm_nt_masked = m_grouped_bf16_gemm_nt_masked


def operand(x: Tensor, name: str, dims: int) -> ScaledTensor:
    """A BF16 tensor of so many dimensions. TypeError or ValueError for anything else."""
    expect(isinstance(x, Tensor), name, type(x).__name__, "a torch.Tensor", error=TypeError)
    expect(x.dtype == torch.bfloat16, f"{name}, dtype", x.dtype, "torch.bfloat16", error=TypeError)
    expect(x.dim() == dims, f"{name}, shape", tuple(x.shape), f"{dims} dimensions")
    return ScaledTensor(x, None, BF16)


def _turned(x: Tensor, name: str) -> Tensor:
    what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
    expect(isinstance(x, Tensor) and x.dim() >= 2, name, what, "a torch.Tensor of two dimensions or more", error=TypeError)
    return x.mT


def prepare(a: Tensor, b: Tensor, d: Tensor, dims: tuple[int, int]) -> tuple[ScaledTensor, ScaledTensor]:
    """A and B of `dims` dimensions, checked against each other and against `d`: as `operands.prepare`."""
    x, y = operand(a, "a", dims[0]), operand(b, "b", dims[1])
    expect(x.shape[-1] == y.shape[-1], "K of a and b", f"{x.shape[-1]} and {y.shape[-1]}",
           f"the same: a is [..., M, K] and b [..., N, K], here (as nt) {tuple(x.shape)} and {tuple(y.shape)}")
    expect(dims[0] < 3 or x.shape[0] == y.shape[0], "groups of a and b", f"{x.shape[0]} and {y.shape[0]}", "the same")
    expect(x.device == y.device, "b, device", y.device, f"a's, {x.device}")
    check_out(d, (*x.shape[:-1], y.shape[-2]), x.device)
    return x, y
