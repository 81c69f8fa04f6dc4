"""`activate`: SwiGLU between the two products of an expert layer, fused with the quantisation of its result."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from ..errors import expect
from ..formats import BF16, PLAIN, Format, ScaledTensor, get_format
from ..kernels.step_operands import ActivateOperands
from ..layouts import Offsets
from ..problem import Config, Plan
from ..reference import activate as reference
from ..reference import quantize as quantization
from ..runtime import env
from ..runtime.launch import run
from . import common, steps
from .plan_cache import PlanCache
from .quantize import quantize

_plans = PlanCache()


@overload
def activate(h: Tensor, *, activation: str = ..., args: tuple[float, ...] = ..., interleaved: bool = ...,
             bias: Tensor | None = ..., layout: Offsets | None = ..., fmt: None = ..., rounding: str = ...,
             amax_clamp: float = ..., scale_layout: str = ..., out: ScaledTensor | None = ...,
             backend: str | None = ..., config: Config | None = ...) -> Tensor: ...
@overload
def activate(h: Tensor, *, activation: str = ..., args: tuple[float, ...] = ..., interleaved: bool = ...,
             bias: Tensor | None = ..., layout: Offsets | None = ..., fmt: Format | str, rounding: str = ...,
             amax_clamp: float = ..., scale_layout: str = ..., out: ScaledTensor | None = ...,
             backend: str | None = ..., config: Config | None = ...) -> ScaledTensor: ...
def activate(h: Tensor, *, activation: str = "swiglu", args: tuple[float, ...] = (), interleaved: bool = False,
             bias: Tensor | None = None, layout: Offsets | None = None, fmt: Format | str | None = None,
             rounding: str = "rceil", amax_clamp: float = 1e-4, scale_layout: str = "",
             out: ScaledTensor | None = None, backend: str | None = None,
             config: Config | None = None) -> Tensor | ScaledTensor:
    """The gated activation of `h` `[R, 2I]` as `[R, I]`: in h's type, or in the format `fmt`, in one launch.

    activation: 'swiglu', `silu(gate) * up`; 'swiglu_oai', GPT-OSS's `gate * sigmoid(alpha * gate) * (up + 1)` with
        gate <= limit and |up| <= limit, `args` = (alpha, limit), by default (1.702, 7). FP32 inside.
    interleaved: gate and up alternate along the columns; else they are the two halves.
    bias: `[E, 2I]` (columns as h's), added in FP32 to the rows of expert e; needs `layout`.
    layout: rows behind the last group are neither computed nor written. None: every row is.
    fmt: scales of blocks in a row (1x128, 1x32) or of a row, or h's own (a ScaledTensor without scales). The
        activation is rounded to h's type first: the result is `quantize(activate(h), fmt)`.
    rounding, amax_clamp, scale_layout: as in `quantize` (default: as in `gather_quantize`).
    out: a ScaledTensor `[R, I]` to write. backend, config: as in `gemm`. Differentiable without `fmt`.

    Raises ValueError / TypeError before anything is launched.
    """
    form = None if fmt is None else get_format(fmt)
    steps.check_args(args)
    steps.check_kind_of_out(out)
    if layout is not None and not isinstance(layout, Offsets):
        expect(False, "layout", type(layout).__name__, "Offsets or None", error=TypeError)
    offsets = None if layout is None else layout.offsets
    scale_layout = scale_layout or steps.scale_layout_of(form or BF16)
    if steps.wants_definition(h, bias):
        _check(h, activation, args, bias, layout, form, rounding, amax_clamp, scale_layout, out)
        y = reference.activate(h, activation=activation, args=args, interleaved=interleaved, bias=bias, offsets=offsets)
        assert isinstance(y, Tensor)
        if form is not None and not form.scaled:
            return ScaledTensor(y, None, form)
        return y if form is None else quantize(y.detach(), form, rounding=rounding, amax_clamp=amax_clamp,
                                               scale_layout=scale_layout)
    key = (form, steps.sign(h), steps.sign(bias), steps.sign(offsets), activation, args, interleaved, rounding, amax_clamp,
           scale_layout, backend, config, env.choice(),
           *(() if out is None else (out.format, steps.sign(out.data), steps.sign(out.scale))))
    plan, memo = _plans.get(key, lambda: plan_of(h, activation, args, interleaved, bias, layout, form, rounding,
                                                 amax_clamp, scale_layout, out, backend, config))
    if out is None:
        out = steps.allocate(h.shape[0], h.shape[1] // 2, form or PLAIN[h.dtype], h.dtype, h.device, scale_layout)
    if plan is not None:
        run(plan, ActivateOperands(steps.rows_contiguous(h), None if bias is None else bias.contiguous(), offsets, out,
                                   activation, args or reference.OAI_ARGS, interleaved, rounding, amax_clamp, memo))
    return out.data if form is None else out


def _check(h: Tensor, activation: str, args: tuple[float, ...], bias: Tensor | None, layout: Offsets | None,
           fmt: Format | None, rounding: str, amax_clamp: float, scale_layout: str, out: ScaledTensor | None) -> None:
    expect(isinstance(h, Tensor), "h", type(h).__name__, "a torch.Tensor", error=TypeError)
    expect(h.dtype in steps.FLOATS, "h, dtype", h.dtype, f"one of {steps.FLOATS}", error=TypeError)
    expect(h.dim() == 2 and h.shape[1] % 2 == 0, "h, shape", tuple(h.shape), "[R, 2I], gate and up")
    expect(activation in reference.ACTIVATIONS, "activation", repr(activation), f"one of {reference.ACTIVATIONS}")
    expect(not args or (activation == "swiglu_oai" and len(args) == 2), "args", args,
           "(alpha, limit) of swiglu_oai, or none")
    expect(layout is None or layout.offsets.device == h.device, "layout, device",
           None if layout is None else layout.offsets.device, f"h's, {h.device}")
    if bias is not None:
        expect(layout is not None, "layout, with a bias", None, "the Offsets that say whose row is which")
        assert layout is not None
        want = (layout.offsets.numel() - 1, h.shape[1])
        expect(isinstance(bias, Tensor), "bias", type(bias).__name__, "a torch.Tensor", error=TypeError)
        expect(tuple(bias.shape) == want, "bias, shape", tuple(bias.shape), str(want))
        expect(bias.dtype in steps.FLOATS, "bias, dtype", bias.dtype, f"one of {steps.FLOATS}", error=TypeError)
        expect(bias.device == h.device, "bias, device", bias.device, f"h's, {h.device}")
    expect(scale_layout in steps.SCALE_LAYOUTS, "scale_layout", repr(scale_layout), f"one of {steps.SCALE_LAYOUTS}")
    if fmt is not None and not fmt.scaled:
        expect(fmt == PLAIN[h.dtype], "format of the activation", fmt.name,
               f"a scaled one, or h's own, {PLAIN[h.dtype].name}")
    elif fmt is not None:
        quantization.check_input(torch.empty(h.shape[0], h.shape[1] // 2, dtype=h.dtype, device="meta"), fmt, rounding,
                                 amax_clamp)
        expect(fmt.group[0] == 1, "format of the activation", fmt.name, "one with scales of its own for each row: a "
               "tensor-wise scale would depend on rows of no group, use fp8_row")
    if out is not None:
        steps.check_out(out, h.shape[0], h.shape[1] // 2, fmt or PLAIN[h.dtype], h.dtype, h.device)


def plan_of(h: Tensor, activation: str, args: tuple[float, ...], interleaved: bool, bias: Tensor | None,
            layout: Offsets | None, fmt: Format | None, rounding: str, amax_clamp: float, scale_layout: str,
            out: ScaledTensor | None, backend: str | None, config: Config | None) -> Plan | None:
    """Check the call and select its Plan; None where there is nothing to compute."""
    _check(h, activation, args, bias, layout, fmt, rounding, amax_clamp, scale_layout, out)
    common.check_flags(interleaved=interleaved)
    if h.numel() == 0:
        return None
    groups = 0 if layout is None else layout.offsets.numel() - 1
    rows = -(-h.shape[0] // max(groups, 1))
    problem = steps.activate_problem(h.shape[0], h.shape[1] // 2, groups, rows, PLAIN[h.dtype],
                                     fmt or PLAIN[h.dtype], scale_layout, activation, args, interleaved,
                                     bias is not None)
    return steps.select(problem, h.device, backend, config)
