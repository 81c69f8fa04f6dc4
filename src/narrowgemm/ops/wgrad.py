"""`grouped_gemm_wgrad`: one product a group of K (weight gradient), the k-grouped layout."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import expect
from ..formats import ScaledTensor, get_format
from ..kernels.operands import Operands
from ..layouts import KGrouped
from ..problem import Config, Plan
from ..runtime.launch import again, run
from . import common, library, validate_data
from .common import Options
from .plan_cache import Empty, PlanCache, empty_of

_plans = PlanCache()


def grouped_gemm_wgrad(a: ScaledTensor | Tensor, b: ScaledTensor | Tensor, layout: KGrouped, *, out: Tensor | None = None,
                       out_dtype: torch.dtype | None = None, accumulate: bool = False, fast_accum: bool = False,
                       backend: str | None = None, config: Config | None = None, max_sms: int = 0, validate: str | None = None,
                       on_unsupported: str = "portable", workspace: Tensor | None = None) -> Tensor:
    """`out[g] [M, N] = A[:, ks] . B[:, ks]^T` over the columns ks of group g. An empty group gives zero.

    a: `[M, K_total]`, b: `[N, K_total]`; gradients stored `[K_total, M]` come as their transpose, a view. Scales: 1x128 along
        K, taken by absolute column (column k has scale k // 128 whatever the groups), row-wise, tensor-wise; these two also with
        scales of each group's own, `[G, M, 1]` or `[G, 1, 1]`.
    layout: where groups start at multiples of 128 and the gaps between them hold zeros (`quantize_both` writes that), say so by
        its `alignment`: Hopper's kernel needs it.
    out: `[G, M, N]`, FP32 by default. accumulate: add to `out` (a main gradient).
    Other arguments and errors as in `gemm`. Group bounds come from the device and are clamped to [0, K_total].

    The definition is Primus-Turbo's variable-K product and DeepGEMM's k-grouped one, without host-side sizes.
    """
    a, b = common.as_operand(a, "a"), common.as_operand(b, "b")
    expect(isinstance(layout, KGrouped), "layout", type(layout).__name__, "KGrouped", error=TypeError)
    if torch.compiler.is_compiling():
        return _traced(a, b, layout, out, out_dtype, accumulate, backend, config, max_sms, on_unsupported, fast_accum)
    dtype = common.out_dtype_of(out, out_dtype, torch.float32)
    index, groups = layout.offsets, layout.num_groups
    rest = (layout.alignment, dtype, accumulate, fast_accum, backend, config, max_sms, validate, on_unsupported)
    known, addresses = _plans.recall(a, b, out, index, *rest)
    if known is None:
        known, addresses = _plans.look_up(a, b, out, index, rest, validate, partial(
            _first_call, a, b, layout, out, dtype, accumulate, backend, config, max_sms, validate, on_unsupported, fast_accum))
    plan, memo, empty, sync = known
    if sync:
        validate_data.check_layout(layout, a.shape[-1], groups)
        validate_data.check_scales(a, b)
    if out is None:
        out = empty.make()
    if workspace is None and again(memo, addresses, out):
        return out
    if plan is not None:
        run(plan, Operands(a, b, out, a.shape[0], b.shape[0], a.shape[1], groups, index, memo=memo), workspace)
    return out


def _first_call(a: ScaledTensor, b: ScaledTensor, layout: KGrouped, out: Tensor | None, dtype: torch.dtype, accumulate: bool,
                *options: Any) -> tuple[Plan | None, Empty]:
    """As in `gemm`."""
    return (plan_of(a, b, layout, out, dtype, accumulate, Options(*options)),
            empty_of((layout.num_groups, a.shape[0], b.shape[0]), dtype, a.device))


def plan_of(a: ScaledTensor, b: ScaledTensor, layout: KGrouped, out: Tensor | None, dtype: torch.dtype, accumulate: bool,
            options: Options) -> Plan | None:
    """Check the call and select its Plan; None where there is nothing to compute."""
    options.check()
    common.check_pair(a, b, "[M, K_total]", "[N, K_total]", 2, 2, layout.num_groups)
    expect(layout.offsets.device == a.device, "k_grouped offsets, device", layout.offsets.device, f"the operands', {a.device}")
    shape = (layout.num_groups, a.shape[0], b.shape[0])
    common.check_flags(accumulate=accumulate)
    common.check_out(out, shape, dtype, a.device, accumulate, a, b)
    if 0 in shape:
        return None
    like = out if out is not None else torch.empty(shape, dtype=dtype, device="meta")
    return common.plan("grouped_gemm_wgrad", "k_grouped", a, b, like, a.shape[0], layout.num_groups, a.shape[0], accumulate,
                       True, options, layout.alignment)


def _traced(a: ScaledTensor, b: ScaledTensor, layout: KGrouped, out: Tensor | None, dtype: torch.dtype | None,
            accumulate: bool, backend: str | None, config: Config | None, max_sms: int,
            on_unsupported: str, fast_accum: bool) -> Tensor:
    common.check_traced(config, out, accumulate)
    if out is None:
        out = torch.empty((layout.num_groups, a.shape[0], b.shape[0]), dtype=dtype or torch.float32, device=a.device)
    torch.ops.narrowgemm.grouped_gemm_wgrad(a.data, a.scale, b.data, b.scale, a.format.name, b.format.name, out,
                                            layout.offsets, accumulate, backend or "", max_sms,
                                            on_unsupported, fast_accum, layout.alignment)
    return out


def _impl(a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor | None, a_format: str, b_format: str, out: Tensor,
          offsets: Tensor, accumulate: bool, backend: str, max_sms: int,
          on_unsupported: str, fast_accum: bool = False, alignment: int = 1) -> None:
    grouped_gemm_wgrad(ScaledTensor(a, a_scale, get_format(a_format)), ScaledTensor(b, b_scale, get_format(b_format)),
                       KGrouped(offsets, alignment), out=out, accumulate=accumulate, fast_accum=fast_accum, backend=backend or None,
                       max_sms=max_sms, on_unsupported=on_unsupported)


library.register("grouped_gemm_wgrad", f"{library.OPERANDS}, Tensor(a!) out, Tensor offsets, {library.OPTIONS}, "
                 "int alignment=1", _impl)
