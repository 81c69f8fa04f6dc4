"""`gather_quantize`: tokens into the rows of their experts in a narrow format, quantised once a token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import expect
from ..formats import BF16, PLAIN, Format, ScaledTensor, get_format
from ..kernels.step_operands import GatherOperands
from ..problem import Config, Plan
from ..reference import quantize as reference
from ..reference.route import Routing
from ..runtime import env
from ..runtime.launch import run
from . import steps
from .plan_cache import PlanCache
from .quantize import quantize

_plans = PlanCache()


def gather_quantize(x: Tensor, routing: Routing, fmt: Format | str, *, rounding: str = "rceil", amax_clamp: float = 1e-4,
                    scale_layout: str = "", out: ScaledTensor | None = None, backend: str | None = None,
                    config: Config | None = None) -> ScaledTensor:
    """`gather(quantize(x, fmt), routing)` in one launch: token rows `x` `[T, K]` as sorted rows `[R, K]`.

    x: BF16, FP16 or FP32. fmt: a format with scales of a row or of blocks in a row (1x128, 1x32, row-wise), tensor-wise
    (the amax is that of all T tokens; two launches more), or x's own (the rows as they are). Rows of skipped slots, from
    `routing.offsets[E]` on, are not written. rounding, amax_clamp, scale_layout: as in `quantize` (default: 'row_major' for
    scales of 32 columns, else 'mn_major'). out: a ScaledTensor `[R, K]` to write. backend, config: as in `gemm`. Not
    differentiable. Bit for bit the composition.

    Raises ValueError / TypeError before anything is launched.
    """
    fmt = get_format(fmt)
    steps.check_routing(routing)
    steps.check_kind_of_out(out)
    scale_layout = scale_layout or steps.scale_layout_of(fmt)
    if torch.compiler.is_compiling():
        from .route import gather

        return gather(quantize(x, fmt, rounding=rounding, amax_clamp=amax_clamp), routing) if fmt.scaled \
            else ScaledTensor(gather(x, routing), None, fmt)
    key = (fmt, steps.sign(x), steps.sign(routing.row_map), *steps.like(routing), rounding, amax_clamp, scale_layout, backend,
           config, env.choice(), *(() if out is None else (out.format, steps.sign(out.data), steps.sign(out.scale))))
    plan, memo = _plans.get(key, lambda: _plan(x, routing, fmt, rounding, amax_clamp, scale_layout, out, backend, config))
    x = steps.rows_contiguous(x.detach() if x.requires_grad else x)
    if fmt.group == (0, 0) and fmt.scaled:
        return _tensor_wise(x, routing, fmt, amax_clamp, out, backend)
    if out is None:
        out = steps.allocate(routing.row_map.numel(), x.shape[1], fmt, x.dtype, x.device, scale_layout)
    if plan is not None:
        run(plan, GatherOperands(x, routing.row_map, routing.offsets, routing.inverse, routing.top_k, out, rounding,
                                 amax_clamp, memo))
    return out


def _plan(x: Tensor, routing: Routing, fmt: Format, rounding: str, amax_clamp: float, scale_layout: str,
          out: ScaledTensor | None, backend: str | None, config: Config | None) -> Plan | None:
    expect(scale_layout in steps.SCALE_LAYOUTS, "scale_layout", repr(scale_layout), f"one of {steps.SCALE_LAYOUTS}")
    if fmt.scaled:
        reference.check_input(x, fmt, rounding, amax_clamp)
        expect(fmt.group[0] == 1 or fmt.group == (0, 0), "format of gathered rows", fmt.name,
               "one whose scales do not span some of the rows")
    else:
        expect(isinstance(x, Tensor), "x", type(x).__name__, "a torch.Tensor", error=TypeError)
        expect(x.dtype in PLAIN, "x, dtype", x.dtype, f"one of {steps.FLOATS}", error=TypeError)
        expect(PLAIN[x.dtype] == fmt, "format", fmt.name, f"a scaled one, or x's own, {PLAIN[x.dtype].name}")
    steps.check_tensors_of(routing)
    expect(x.dim() == 2 and x.shape[0] == routing.num_tokens, "x, shape", tuple(x.shape),
           f"[{routing.num_tokens}, K], a row for each routed token")
    expect(x.device == routing.row_map.device, "x, device", x.device, f"that of the routing, {routing.row_map.device}")
    if out is not None:
        steps.check_out(out, routing.row_map.numel(), x.shape[1], fmt, x.dtype, x.device)
    if x.numel() == 0 or (fmt.group == (0, 0) and fmt.scaled):
        return None
    problem = steps.gather_problem(x.shape[0], x.shape[1], routing.top_k, routing.num_experts, PLAIN[x.dtype], fmt,
                                   scale_layout)
    return steps.select(problem, x.device, backend, config)


def _tensor_wise(x: Tensor, routing: Routing, fmt: Format, amax_clamp: float, out: ScaledTensor | None,
                 backend: str | None) -> ScaledTensor:
    """One scale for all tokens needs all of them first: quantise, then move the payload, two bytes at a time."""
    q = quantize(x, fmt, amax_clamp=amax_clamp)
    rows, k = routing.row_map.numel(), x.shape[1]
    if out is None:
        out = steps.allocate(rows, k, fmt, x.dtype, x.device, "row_major")
    assert out.scale is not None and q.scale is not None
    out.scale.copy_(q.scale)
    if k % 2 == 0 and out.data.stride(0) % 2 == 0 and out.data.data_ptr() % 2 == 0:
        moved = ScaledTensor(out.data.view(torch.bfloat16), None, BF16)
        gather_quantize(q.data.view(torch.bfloat16), routing, BF16, out=moved, backend=backend)
    else:
        from ..reference.route import store_live
        from .route import gather

        store_live(ScaledTensor(out.data, None, fmt), gather(q.data, routing), routing.offsets)
    return out
