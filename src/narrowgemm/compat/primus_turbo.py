"""Primus-Turbo's FP8 grouped GEMM by its own names: the differentiable op, its configuration, the two tensor-wise kernels.

Definition: AMD-AGI/Primus-Turbo, pull request 384. `num_cu` is a number of SMs, -1 or None: all. Groups are packed tightly, of any
size, on the device; empty ones give a gradient of zero. The native ops are `narrowgemm.grouped_linear`, `grouped_gemm` and
`grouped_gemm_wgrad`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor

from ..errors import Unsupported, expect
from ..formats import FP8_TENSOR, ScaledTensor
from ..layouts import KGrouped, Offsets
from ..ops.grouped import grouped_gemm
from ..ops.grouped_linear import grouped_linear, quantize_weight
from ..ops.quantize_both import Both
from ..ops.wgrad import grouped_gemm_wgrad

__all__ = ["Float8QuantConfig", "Format", "ScalingGranularity", "grouped_gemm_fp8", "grouped_gemm_fp8_tensorwise_flydsl_kernel",
           "grouped_gemm_fp8_variable_k_tensorwise_flydsl_kernel"]

ELEMENT = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


class Format(Enum):
    """E4M3 or E5M2 throughout; HYBRID: E4M3 forward, E5M2 gradients."""

    E4M3 = auto()
    E5M2 = auto()
    HYBRID = auto()


class ScalingGranularity(Enum):
    TENSORWISE = auto()
    ROWWISE = auto()
    BLOCKWISE = auto()


@dataclass(frozen=True)
class Float8QuantConfig:
    """How `grouped_gemm_fp8` quantises. `block_size`: of BLOCKWISE, 128 or None."""

    format: Format = Format.E4M3
    granularity: ScalingGranularity = ScalingGranularity.TENSORWISE
    block_size: int | None = None
    scale_dtype: torch.dtype = torch.float32


RECIPE = {ScalingGranularity.TENSORWISE: "tensorwise", ScalingGranularity.ROWWISE: "rowwise", ScalingGranularity.BLOCKWISE: "block"}
ELEMENTS = {Format.E4M3: ("e4m3", "e4m3"), Format.E5M2: ("e5m2", "e5m2"), Format.HYBRID: ("e4m3", "e5m2")}


def grouped_gemm_fp8(a: Tensor, b: Tensor, group_lens: Tensor, group_offs: Tensor | None = None, trans_b: bool = True,
                     config: Float8QuantConfig | None = None, num_cu: int | None = None) -> Tensor:
    """`out[rows of g] = a[rows of g] @ b[g]` (`b[g].T` with `trans_b`), in FP8 forward and backward, in a's dtype.

    a: `[M_total, K]`, b: `[G, N, K]` with `trans_b`, else `[G, K, N]`; BF16 or FP16. group_lens: int64 `[G]`, or group_offs
    `[G + 1]`. Raises as `narrowgemm.grouped_linear`; Unsupported for other scale blocks and dtypes.
    """
    config = config or Float8QuantConfig()
    expect(isinstance(config, Float8QuantConfig), "config", type(config).__name__, "a Float8QuantConfig", error=TypeError)
    if config.scale_dtype != torch.float32 or config.block_size not in (None, 128):
        raise Unsupported(f"scales of {config.scale_dtype}, blocks of {config.block_size}", "float32 and 128")
    for name, x, dims, shape in (("a", a, 2, "[M_total, K]"), ("b", b, 3, "[G, N, K] with trans_b, else [G, K, N]")):
        expect(isinstance(x, Tensor), name, type(x).__name__, "a torch.Tensor", error=TypeError)
        expect(x.dim() == dims, f"{name}, shape", tuple(x.shape), shape)
    k = b.shape[2 if trans_b else 1]
    expect(k == a.shape[1], f"K of b, trans_b={trans_b}", f"{k} (b is {tuple(b.shape)})", f"a's, {a.shape[1]}")
    element, grads = ELEMENTS[config.format]
    recipe = RECIPE[config.granularity]
    q = quantize_weight(b, recipe, element)
    if not trans_b:     # the stored matrix contracts its columns: both copies are there, the other way round
        b, q = b.transpose(1, 2), Both(q.columns, q.rows, None)
    lens = None if group_offs is not None else group_lens
    return grouped_linear(a, b, lens, group_offs=group_offs, recipe=recipe, element=element, grads=grads, quantized=q,
                          max_sms=_sms(num_cu))


def grouped_gemm_fp8_tensorwise_flydsl_kernel(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, group_offs: Tensor,
                                              trans_b: bool = False, out_dtype: torch.dtype = torch.bfloat16,
                                              num_cu: int = -1) -> Tensor:
    """`out [M_total, N]`, `out[rows of g] = a[rows of g] @ b[g] * a_scale * b_scale`; FP8 `b` `[G, K, N]`, `[G, N, K]` with
    `trans_b`."""
    x, w = _scaled(a, a_scale), _scaled(b if trans_b else b.transpose(1, 2), b_scale)
    return grouped_gemm(x, w, Offsets(group_offs), out_dtype=out_dtype, max_sms=_sms(num_cu))


def grouped_gemm_fp8_variable_k_tensorwise_flydsl_kernel(lhs: Tensor, rhs: Tensor, lhs_scale: Tensor, rhs_scale: Tensor,
                                                         group_offs: Tensor, out_dtype: torch.dtype = torch.bfloat16,
                                                         num_cu: int = -1) -> Tensor:
    """`out [G, OUT_M, OUT_N]`, `out[g] = lhs[rows of g].T @ rhs[rows of g] * lhs_scale * rhs_scale`; zero for an empty group.

    lhs: FP8 `[M_total, OUT_M]`, rhs `[M_total, OUT_N]`. Hopper's tensor cores take FP8 with the contracted axis contiguous:
    the kernel turns both in a workspace first. `narrowgemm.quantize_both` writes what `grouped_gemm_wgrad` takes without that.
    """
    return grouped_gemm_wgrad(_scaled(lhs.T, lhs_scale), _scaled(rhs.T, rhs_scale), KGrouped(group_offs), out_dtype=out_dtype,
                              max_sms=_sms(num_cu))


def _scaled(x: Tensor, scale: Tensor) -> ScaledTensor:
    expect(x.dtype in ELEMENT, "dtype", x.dtype, "float8_e4m3fn or float8_e5m2", error=TypeError)
    expect(scale.numel() == 1, "scale, elements", scale.numel(), "1: tensor-wise")
    return ScaledTensor.make(x, scale, FP8_TENSOR.with_element(ELEMENT[x.dtype]))


def _sms(num_cu: int | None) -> int:
    return max(num_cu or 0, 0)
