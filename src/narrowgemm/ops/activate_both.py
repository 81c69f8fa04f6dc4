"""`activate_both` and `activate_backward`: SwiGLU and its derivative, quantised along rows and columns as they are made.

Between the two products of an expert MLP a training step needs each tensor contracted along both of its axes:

    forward    act = activate(h)           rows: the down product        columns: down's weight gradient
    backward   dh  = d activate(h) . d     rows: gate_up's dgrad         columns: gate_up's weight gradient
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import expect
from ..formats import PLAIN, Format, ScaledTensor, get_format
from ..kernels.operands import Memo
from ..kernels.step_operands import ActivateBothOperands
from ..layouts import INT, KGrouped, Offsets, check_index
from ..problem import Config, Plan
from ..reference import activate as reference
from ..reference.quantize import check_input
from ..reference.quantize_both import ALIGNMENT
from ..runtime import env
from ..runtime.launch import run
from . import common, library, steps
from .plan_cache import PlanCache
from .quantize_both import Both, allocate_both, quantize_both

GROUPS = ((1, 128), (1, 0), (0, 0))
_plans = PlanCache()


def activate_both(h: Tensor, layout: Offsets, fmt: Format | str, *, activation: str = "swiglu", args: tuple[float, ...] = (),
                  scale: Tensor | None = None, amax: Tensor | None = None, segments: KGrouped | None = None,
                  rounding: str = "rceil", amax_clamp: float = 1e-4, backend: str | None = None,
                  config: Config | None = None) -> Both:
    """The gated activation of `h` `[T, 2I]` (gate and up halves) in FP8 twice: `[T, I]` and, transposed, `[I, P]`.

    It is `quantize_both(activate(h), fmt, offsets)`, in one read of h where the scales are blocks' or given, in two else.

    layout: the groups' rows; rows of none are not written. fmt: tensor-wise, row-wise or 1x128, E4M3 or E5M2.
    activation, args: as in `activate`.
    scale: a tensor-wise scale to use (delayed scaling). amax: float32 `[1]`, raised to the largest magnitude in the same pass
        (tensor-wise alone).
    segments: the layout that an earlier `quantize_both` of the same groups returned, which is then not worked out again.
    rounding, amax_clamp, backend: as in `quantize_both`. config: as in `gemm`.

    Not differentiable. Raises TypeError / ValueError before anything is launched.
    """
    out = _run(Call(h, None, layout, get_format(fmt), activation, args, scale, amax, segments, rounding, amax_clamp, backend,
                    config))
    assert isinstance(out, Both)
    return out


def activate_backward(h: Tensor, dy: Tensor, layout: Offsets, fmt: Format | str | None = None, *, activation: str = "swiglu",
                      args: tuple[float, ...] = (), scale: Tensor | None = None, amax: Tensor | None = None,
                      segments: KGrouped | None = None, rounding: str = "rceil", amax_clamp: float = 1e-4,
                      backend: str | None = None, config: Config | None = None) -> Tensor | Both:
    """The gradient `[T, 2I]` of `h`, given `dy` `[T, I]`, that of its activation: in h's type, or in FP8 along both axes.

    Computed in FP32 and rounded to h's type first; with `fmt` it is `quantize_both` of that, h and dy being read once where the
    scales are blocks' or given, twice else. dy: of h's type, contiguous rows. Other arguments and errors as in `activate_both`.
    """
    form = None if fmt is None else get_format(fmt)
    return _run(Call(h, dy, layout, form, activation, args, scale, amax, segments, rounding, amax_clamp, backend, config))


class Call(NamedTuple):
    """The arguments of either op; `dy` is None forward."""

    h: Tensor
    dy: Tensor | None
    layout: Offsets
    fmt: Format | None
    activation: str
    args: tuple[float, ...]
    scale: Tensor | None
    amax: Tensor | None
    segments: KGrouped | None
    rounding: str
    amax_clamp: float
    backend: str | None
    config: Config | None = None

    @property
    def seg(self) -> Tensor | None:
        return None if self.segments is None else self.segments.offsets

    @property
    def in_two(self) -> bool:
        """The result is made first and quantised then: where blocks of scales would straddle gradients of gate and of up; and FP32
        tensor-wise, of which `quantize_both` alone makes two copies."""
        if self.fmt is None:
            return False
        across = self.dy is not None and self.fmt.group[1] > 0 and self.h.shape[1] // 2 % self.fmt.group[1] != 0
        return across or (self.fmt.group == (0, 0) and self.h.dtype == torch.float32)


def _run(c: Call) -> Tensor | Both:
    if torch.compiler.is_compiling():
        common.check_traced(c.config, None, False)
        _check(c)
        return _traced(c)
    steps.check_args(c.args)
    if c.segments is not None and not isinstance(c.segments, KGrouped):
        expect(False, "segments", type(c.segments).__name__, "the layout that quantize_both returned for these offsets",
               error=TypeError)
    offsets = c.layout.offsets if isinstance(c.layout, Offsets) else None
    key = (c.fmt, *(steps.sign(t) for t in (c.h, c.dy, offsets, c.seg, c.scale, c.amax)), c.activation, c.args, c.rounding,
           c.amax_clamp, c.backend, c.config, env.choice())
    plan, memo = _plans.get(key, lambda: plan_of(c))
    c = c._replace(h=c.h.detach(), dy=None if c.dy is None else c.dy.detach())
    if c.in_two:
        value = _activate(c) if c.dy is None else _run(c._replace(fmt=None, scale=None, amax=None, config=None))
        assert isinstance(value, Tensor) and c.fmt is not None
        return quantize_both(value, c.fmt, c.layout.offsets, scale=c.scale, amax=c.amax, rounding=c.rounding,
                             amax_clamp=c.amax_clamp, backend=c.backend)
    rows, columns, made = _outputs(c)
    if plan is not None:
        run(plan, _operands(c, rows, columns, made, memo))
    elif columns is not None:
        _empty(rows, columns, made, c)
    return rows.data if columns is None else Both(rows, columns, KGrouped(made, ALIGNMENT))


def _operands(c: Call, rows: ScaledTensor, columns: ScaledTensor | None, made: Tensor, memo: Memo | None = None
              ) -> ActivateBothOperands:
    return ActivateBothOperands(c.h, c.dy, c.layout.offsets, made, c.segments is None, rows, columns, c.amax, c.activation,
                                c.args or reference.OAI_ARGS, c.rounding, c.amax_clamp, memo)


def _activate(c: Call) -> Tensor:
    from .activate import activate

    with torch.no_grad():
        return activate(c.h, layout=c.layout, activation=c.activation, args=c.args, backend=c.backend)


def _outputs(c: Call) -> tuple[ScaledTensor, ScaledTensor | None, Tensor]:
    offsets = c.layout.offsets
    like = c.h if c.dy is not None else c.h[:, :c.h.shape[1] // 2]      # of the result's shape
    if c.fmt is None:
        made = offsets.new_empty(offsets.shape, dtype=torch.int32) if c.seg is None else c.seg
        return ScaledTensor(c.h.new_empty(like.shape), None, PLAIN[c.h.dtype]), None, made
    rows, columns, fresh = allocate_both(like, c.fmt, offsets, c.scale)
    assert fresh is not None
    return rows, columns, fresh if c.seg is None else c.seg


def _empty(rows: ScaledTensor, columns: ScaledTensor, seg: Tensor, c: Call) -> None:
    """No rows: scales that are one for all still have a value."""
    seg.zero_()
    for s in (rows.scale, columns.scale):
        if s is not None and c.scale is None:
            s.fill_(c.amax_clamp / rows.format.elem.max if s.dtype == torch.float32 else 0)


def _check(c: Call) -> None:
    h, dy, layout, fmt, activation, args, scale, amax, segments, rounding, amax_clamp, *_ = c
    expect(isinstance(h, Tensor), "h", type(h).__name__, "a torch.Tensor", error=TypeError)
    expect(h.dtype in steps.FLOATS, "h, dtype", h.dtype, f"one of {steps.FLOATS}", error=TypeError)
    expect(h.dim() == 2 and h.shape[1] % 2 == 0, "h, shape", tuple(h.shape), "[T, 2I], gate and up")
    expect(h.stride(1) == 1 or h.shape[1] <= 1, "h, strides", h.stride(), "contiguous rows")
    expect(activation in reference.ACTIVATIONS, "activation", repr(activation), f"one of {reference.ACTIVATIONS}")
    expect(not args or (activation == "swiglu_oai" and len(args) == 2), "args", args, "(alpha, limit) of swiglu_oai, or none")
    expect(isinstance(layout, Offsets), "layout", type(layout).__name__, "Offsets", error=TypeError)
    check_index(layout.offsets, "offsets", 1, INT)
    expect(layout.offsets.device == h.device, "offsets, device", layout.offsets.device, f"h's, {h.device}")
    if dy is not None:
        expect(isinstance(dy, Tensor) and dy.dtype == h.dtype, "dy, dtype", getattr(dy, "dtype", type(dy).__name__),
               f"h's, {h.dtype}", error=TypeError)
        expect(tuple(dy.shape) == (h.shape[0], h.shape[1] // 2), "dy, shape", tuple(dy.shape), f"({h.shape[0]}, {h.shape[1] // 2})")
        expect(dy.stride(1) == 1 or dy.shape[1] <= 1, "dy, strides", dy.stride(), "contiguous rows")
        expect(dy.device == h.device, "dy, device", dy.device, f"h's, {h.device}")
    if fmt is not None:
        check_input(torch.empty(h.shape[0], h.shape[1] // 2, dtype=h.dtype, device="meta"), fmt, rounding, amax_clamp)
        expect(fmt.group in GROUPS and fmt.element in ("e4m3", "e5m2"), "format of the activation", fmt.name,
               "FP8 with scales of the whole tensor, rows or 1x128")
    common.check_kinds(scale=scale, amax=amax)
    tensorwise = fmt is not None and fmt.group == (0, 0)
    for name, t in (("scale", scale), ("amax", amax)):
        if t is not None:
            expect(tensorwise, f"{name} with format", "none" if fmt is None else fmt.name, "a tensor-wise one")
            expect(t.dtype == torch.float32, f"{name}, dtype", t.dtype, "torch.float32", error=TypeError)
            expect(t.numel() == 1 and t.device == h.device, name, f"{t.numel()} elements on {t.device}", f"one, on {h.device}")
    if segments is not None:
        expect(isinstance(segments, KGrouped) and segments.alignment == ALIGNMENT and segments.offsets.dtype == torch.int32
               and segments.offsets.shape == layout.offsets.shape, "segments", type(segments).__name__,
               "the layout that quantize_both returned for these offsets")


def plan_of(c: Call) -> Plan | None:
    """Check the call and select its Plan; None where there is nothing to launch here."""
    _check(c)
    if c.h.numel() == 0 or c.in_two:
        return None
    op = ("activate_both" if c.dy is None else "activate_backward") + ("" if c.scale is None else "_cast")
    source = PLAIN[c.h.dtype]
    problem = steps.activate_both_problem(op, c.h.shape[0], c.h.shape[1] // 2, c.layout.offsets.numel() - 1, source,
                                          c.fmt or source, c.activation, c.args,
                                          steps.aligned(c.h) and (c.dy is None or steps.aligned(c.dy)))
    return steps.select(problem, c.h.device, c.backend, c.config)


# ---------------------------------------------------------------- under torch.compile
def _traced(c: Call) -> Tensor | Both:
    rows, columns, made = _outputs(c._replace(h=c.h.detach()))
    data, scale = (None, None) if columns is None else (columns.data, columns.scale)
    one = c.fmt is not None and c.fmt.group[0] == c.fmt.group[1]       # one scale serves both copies
    torch.ops.narrowgemm.activate_both(c.h.detach(), c.dy, c.layout.offsets, made, rows.data, rows.scale, data,
                                       None if one else scale, c.amax, c.segments is None, "" if c.fmt is None else c.fmt.name,
                                       c.activation, list(c.args), c.scale is not None, c.rounding, c.amax_clamp, c.backend or "")
    return rows.data if columns is None else Both(rows, columns, KGrouped(made, ALIGNMENT))


def _impl(h: Tensor, dy: Tensor | None, offsets: Tensor, seg: Tensor, rows: Tensor, row_scale: Tensor | None,
          columns: Tensor | None, column_scale: Tensor | None, amax: Tensor | None, fresh: bool, fmt: str, activation: str,
          args: list[float], given: bool, rounding: str, amax_clamp: float, backend: str) -> None:
    form = get_format(fmt) if fmt else None
    scale = row_scale.reshape(-1) if given and row_scale is not None else None
    segments = None if fresh else KGrouped(seg, ALIGNMENT)
    c = Call(h, dy, Offsets(offsets), form, activation, tuple(args), scale, amax, segments, rounding, amax_clamp, backend or None)
    if c.in_two:        # what it is made of allocates for itself
        made = _run(c)
        assert isinstance(made, Both) and columns is not None and row_scale is not None and column_scale is not None
        for to, source in ((rows, made.rows.data), (row_scale, made.rows.scale), (columns, made.columns.data),
                           (column_scale, made.columns.scale), (seg, made.layout and made.layout.offsets)):
            to.copy_(source)  # type: ignore[arg-type]
        return
    plan = plan_of(c)
    first = ScaledTensor(rows, row_scale, form or PLAIN[h.dtype])
    second = None
    if columns is not None and form is not None and row_scale is not None:
        second = ScaledTensor(columns, row_scale.mT if column_scale is None else column_scale, form)
    if plan is not None:
        run(plan, _operands(c, first, second, seg))
    elif second is not None:
        _empty(first, second, seg, c)


library.register("activate_both", "Tensor h, Tensor? dy, Tensor offsets, Tensor(a!) seg, Tensor(b!) rows, Tensor(c!)? row_scale, "
                 "Tensor(d!)? columns, Tensor(e!)? column_scale, Tensor(f!)? amax, bool fresh, str fmt, str activation, "
                 "float[] args, bool given, str rounding, float amax_clamp, str backend", _impl)
