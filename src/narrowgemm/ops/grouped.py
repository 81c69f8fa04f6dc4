"""`grouped_gemm`: one product a group of rows, weights stacked."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import Unsupported, expect
from ..formats import ScaledTensor, get_format
from ..kernels.operands import Operands
from ..layouts import ROWS, Layout, layout_of_rows
from ..prepack import PackedWeight
from ..problem import Config, Plan
from ..runtime.launch import again, run
from . import common, library, validate_data
from .common import Options
from .plan_cache import Empty, PlanCache, empty_of
from .routed import packed_gemm

_plans = PlanCache()


def grouped_gemm(a: ScaledTensor | Tensor, b: ScaledTensor | PackedWeight | Tensor, layout: Layout, *, out: Tensor | None = None,
                 out_dtype: torch.dtype | None = None, accumulate: bool = False, fast_accum: bool = False,
                 zero_padding: bool = True, backend: str | None = None, config: Config | None = None, max_sms: int = 0,
                 validate: str | None = None, on_unsupported: str = "portable",
                 workspace: Tensor | None = None) -> Tensor:
    """`out[rows of g] = A[rows of g] . B[g]^T` for every group g, in one launch, group sizes on the device.

    a: `[M, K]` (Contiguous, Psum, Offsets) or `[G, max_m, K]` (Masked). b: `[G, N, K]`; it may be packed (`prepack`).
    out: as a, with N instead of K.
    fast_accum: as in `gemm`.
    zero_padding: write zeros to the padding rows of Contiguous and Psum; False leaves them as they are. Rows of Offsets and
        Masked that belong to no group are never written.
    validate: 'sync' reads the layout and the scales back and raises ValueError naming the first bad row or group (slow).
    Other arguments and errors as in `gemm`. Ids outside [0, G) are treated as -1, and sizes are clamped to the tensor.

    Layouts are DeepGEMM's (contiguous, psum, masked) and torch's / Primus-Turbo's (offsets): see `narrowgemm.layouts`.
    """
    expect(isinstance(layout, Layout), "layout", type(layout).__name__, "Contiguous, Psum, Offsets or Masked", error=TypeError)
    if isinstance(b, PackedWeight):
        return packed_gemm(a, b, layout, out, out_dtype, accumulate,
                           Options(backend, config, max_sms, validate, on_unsupported, fast_accum), workspace, zero_padding)
    if type(a) is not ScaledTensor or type(b) is not ScaledTensor:
        a, b = common.as_operand(a, "a"), common.as_operand(b, "b")
    if torch.compiler.is_compiling():
        return _traced(a, b, layout, out, out_dtype, accumulate, zero_padding, backend, config, max_sms, on_unsupported, fast_accum)
    dtype = common.out_dtype_of(out, out_dtype, torch.bfloat16)
    index = layout.index
    rest = (layout.kind, layout.alignment, layout.expected_m, zero_padding, dtype, accumulate, fast_accum, backend, config,
            max_sms, validate, on_unsupported)
    known, addresses = _plans.recall(a, b, out, index, *rest)
    if known is None:
        known, addresses = _plans.look_up(a, b, out, index, rest, validate, partial(
            _first_call, a, b, layout, out, dtype, accumulate, zero_padding, backend, config, max_sms, validate, on_unsupported,
            fast_accum))
    plan, memo, empty, sync = known
    if sync:
        validate_data.check_layout(layout, a.shape[-2], b.shape[0])
        validate_data.check_scales(a, b)
    if out is None:
        out = empty.make()
    if workspace is None and again(memo, addresses, out):
        return out
    if plan is not None:
        run(plan, Operands(a, b, out, a.shape[-2], b.shape[-2], a.shape[-1], b.shape[0], index, layout.alignment,
                           memo=memo), workspace)
    return out


def _first_call(a: ScaledTensor, b: ScaledTensor, layout: Layout, out: Tensor | None, dtype: torch.dtype, accumulate: bool,
                zero_padding: bool, *options: Any) -> tuple[Plan | None, Empty]:
    """As in `gemm`."""
    return (plan_of(a, b, layout, out, dtype, accumulate, zero_padding, Options(*options)),
            empty_of((*a.shape[:-1], b.shape[-2]), dtype, a.device))


def plan_of(a: ScaledTensor, b: ScaledTensor, layout: Layout, out: Tensor | None, dtype: torch.dtype, accumulate: bool,
            zero_padding: bool, options: Options) -> Plan | None:
    """Check the call and select its Plan; None where there is nothing to compute."""
    options.check()
    if layout.kind not in ROWS:
        raise Unsupported(f"grouped_gemm has no {layout.kind} layout", f"it takes {', '.join(ROWS)}; k_grouped is "
                          "grouped_gemm_wgrad's, routed is routed_gemm's")
    masked = layout.kind == "masked"
    common.check_pair(a, b, "[G, max_m, K]" if masked else "[M, K]", "[G, N, K]", 3 if masked else 2, 3)
    groups = layout.groups(b.shape[0])
    m = a.shape[-2]
    expect(not masked or a.shape[0] == groups, "groups of a", a.shape[0], f"b's, {groups}")
    common.check_row_scales(a)
    index = layout.index
    expect(index.device == a.device, f"{layout.kind} index, device", index.device, f"the operands', {a.device}")
    expect(layout.kind != "contiguous" or index.numel() == m, "m_indices, length", index.numel(), f"M = {m}")
    shape = (*a.shape[:-1], b.shape[-2])
    common.check_flags(accumulate=accumulate, zero_padding=zero_padding)
    common.check_out(out, shape, dtype, a.device, accumulate, a, b)
    if 0 in shape:
        return None
    expect(groups > 0, f"groups of b for {m} rows", 0, "at least one")
    rows = layout.expected_m or (m if masked else -(-m // groups))
    like = out if out is not None else torch.empty(shape, dtype=dtype, device="meta")
    return common.plan("grouped_gemm", layout.kind, a, b, like, m, groups, min(rows, m), accumulate, zero_padding, options)


def _traced(a: ScaledTensor, b: ScaledTensor, layout: Layout, out: Tensor | None, dtype: torch.dtype | None,
            accumulate: bool, zero_padding: bool, backend: str | None, config: Config | None, max_sms: int,
            on_unsupported: str, fast_accum: bool) -> Tensor:
    common.check_traced(config, out, accumulate)
    if out is None:
        out = torch.empty((*a.shape[:-1], b.shape[-2]), dtype=dtype or torch.bfloat16, device=a.device)
    torch.ops.narrowgemm.grouped_gemm(a.data, a.scale, b.data, b.scale, a.format.name, b.format.name, out, layout.index,
                                      layout.kind, layout.alignment, layout.expected_m, zero_padding, accumulate, backend or "",
                                      max_sms, on_unsupported, fast_accum)
    return out


def _impl(a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor | None, a_format: str, b_format: str, out: Tensor,
          index: Tensor, kind: str, alignment: int, expected_m: int, zero_padding: bool, accumulate: bool,
          backend: str, max_sms: int, on_unsupported: str, fast_accum: bool = False) -> None:
    grouped_gemm(ScaledTensor(a, a_scale, get_format(a_format)), ScaledTensor(b, b_scale, get_format(b_format)),
                 layout_of_rows(kind, index, alignment, expected_m), out=out, accumulate=accumulate, fast_accum=fast_accum,
                 zero_padding=zero_padding, backend=backend or None, max_sms=max_sms, on_unsupported=on_unsupported)


library.register("grouped_gemm", f"{library.OPERANDS}, Tensor(a!) out, Tensor index, str kind, int alignment, "
                 f"int expected_m, bool zero_padding, {library.OPTIONS}", _impl)
