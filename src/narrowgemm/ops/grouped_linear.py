"""`grouped_linear`: `y[rows of g] = x[rows of g] . w[g]^T` with FP8 products forward and backward, differentiable.

    forward   y  [T, N]    = x  . w^T      both quantised along K
    dgrad     dx [T, K]    = dy . w        both quantised along N: w's columns
    wgrad     dw [G, N, K] = dy^T . x      both quantised along a group's tokens: the columns of dy and x

Each of x, w and dy is read once and quantised along both axes (`quantize_both`); what the backward needs of x is kept in FP8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import expect
from ..formats import FP8_ROW, FP8_TENSOR, Format, FP8_1x128, FP8_128x128, ScaledTensor, dtype_name, dtype_of, get_format
from ..layouts import INT, KGrouped, Offsets, check_index
from .grouped import grouped_gemm
from .library import LIBRARY
from .quantize_both import Both, quantize_both
from .steps import contiguous
from .wgrad import grouped_gemm_wgrad

# recipe -> formats of activations and gradients, of weights
RECIPES: dict[str, tuple[Format, Format]] = {
    "tensorwise": (FP8_TENSOR, FP8_TENSOR), "rowwise": (FP8_ROW, FP8_ROW), "block": (FP8_1x128, FP8_128x128)}
ELEMENTS = ("e4m3", "e5m2")
GRADIENT_CLAMP = 1e-20      # least amax: gradients of a mean over many tokens are far below the 1e-4 that activations have


@dataclass(frozen=True, slots=True)
class How:
    """What forward and backward share beside tensors."""

    x: str
    dy: str
    fast_accum: bool
    max_sms: int

    def products(self) -> dict[str, Any]:
        return {"fast_accum": self.fast_accum, "max_sms": self.max_sms}


def quantize_weight(w: Tensor, recipe: str = "block", element: str = "e4m3") -> Both:
    """A weight `[G, N, K]` in FP8 along K and, transposed, along N: once an optimiser step, for all of its micro-batches.

    recipe, element: as in `grouped_linear`. Raises ValueError (recipe, element, shape) or TypeError (dtype).
    """
    return quantize_both(w, recipe_formats(recipe, element)[1])


def grouped_linear(x: Tensor, w: Tensor | Both, group_lens: Tensor | None = None, *, group_offs: Tensor | None = None,
                   recipe: str = "block", element: str = "e4m3", grads: str = "", quantized: Both | None = None,
                   scales: tuple[Tensor, Tensor] | None = None, main_grad: Tensor | None = None,
                   fast_accum: bool = False, max_sms: int = 0) -> Tensor:
    """`y [T, N]` with `y[rows of g] = x[rows of g] . w[g]^T`, in x's dtype. Differentiable in x and w.

    x: `[T, K]` BF16, FP16 or FP32. w: `[G, N, K]`, the master weight, of any of these dtypes; or what `quantize_weight` made of
        one that isn't there any more: w's gradient then has nowhere to go but `main_grad`, and x must require one for it.
    group_lens: int32 / int64 `[G]`, rows of each group, or group_offs `[G + 1]`, their exclusive prefix sum; on the device, any
        sizes, empty groups too; every row belongs to a group. An empty group's gradient is zero.
    recipe: 'tensorwise' (one scale), 'rowwise' (one a row, of each copy along its own axis) or 'block' (1x128 activations and
        gradients, 128x128 weights, as DeepSeek-V3 trains). element: 'e4m3' or 'e5m2'; grads: that of gradients, where another.
    quantized: `quantize_weight(w, recipe)`, made once for several micro-batches; made here if None.
    scales: tensor-wise delayed scaling: float32 scales of x and of y's gradient; without them each is found in a pass of its own.
    main_grad: FP32 `[G, N, K]`, to which w's gradient is added in place, instead of being returned. Not under torch.compile.
    fast_accum, max_sms: as in `gemm`, for all three products.

    Raises TypeError / ValueError before anything is launched.
    """
    fx, fw = recipe_formats(recipe, element)
    grads = grads or element
    expect(grads in ELEMENTS, "grads", repr(grads), f"one of {ELEMENTS}")
    expect(isinstance(x, Tensor) and isinstance(w, (Tensor, Both)), "x and w", f"{type(x).__name__} and {type(w).__name__}",
           "tensors, or a quantised weight", error=TypeError)
    expect(x.dim() == 2, "x, shape", tuple(x.shape), "[T, K]")
    master = w if isinstance(w, Tensor) else None
    if isinstance(w, Both):
        expect(quantized is None or quantized is w, "quantized with a quantised w", "another one", "None")
        quantized = w
        w = quantized.rows.data
    expect(w.dim() == 3 and w.shape[2] == x.shape[1], "w, shape", tuple(w.shape), f"[G, N, {x.shape[1]}]")
    offsets = group_offsets(group_lens, group_offs, w.shape[0])
    expect(scales is None or recipe == "tensorwise", "scales with recipe", recipe, "'tensorwise'")
    how = How(fx.name, fx.with_element(grads).name, fast_accum, max_sms)
    if quantized is None:
        quantized = quantize_both(w, fw)
    expect(isinstance(quantized, Both), "quantized", type(quantized).__name__, "what quantize_weight gives", error=TypeError)
    expect(main_grad is None or isinstance(main_grad, Tensor), "main_grad", type(main_grad).__name__, "a torch.Tensor or None",
           error=TypeError)
    quiet = master is not None or main_grad is None or x.requires_grad or not torch.is_grad_enabled()
    expect(quiet, "x with a quantised w and main_grad", "no gradient asked for", "requires_grad: main_grad is filled on its way")
    expect(quantized.rows.format == fw and quantized.rows.shape == w.shape, "quantized", f"{quantized.rows.format.name} "
           f"{tuple(quantized.rows.shape)}", f"quantize_weight(w, {recipe!r}, {element!r})")
    sx, sdy = scales or (None, None)
    r, c = quantized.rows, quantized.columns
    if torch.compiler.is_compiling():
        expect(main_grad is None, "main_grad under torch.compile", "a tensor", "None")
        keep = master is not None and master.requires_grad
        return torch.ops.narrowgemm.grouped_linear(x, master, r.data, r.scale, c.data, c.scale, offsets, sx, sdy, how.x, how.dy,
                                                   fw.name, fast_accum, max_sms, keep)[0]
    if main_grad is not None:
        expect(main_grad.dtype == torch.float32 and main_grad.shape == w.shape, "main_grad",
               f"{main_grad.dtype} {tuple(main_grad.shape)}", f"torch.float32 {tuple(w.shape)}")
    return _GroupedLinear.apply(x, master, r, c, offsets, sx, sdy, how, main_grad)


def recipe_formats(recipe: str, element: str) -> tuple[Format, Format]:
    """(of activations and gradients, of weights)."""
    expect(recipe in RECIPES, "recipe", repr(recipe), f"one of {tuple(RECIPES)}")
    expect(element in ELEMENTS, "element", repr(element), f"one of {ELEMENTS}")
    fx, fw = RECIPES[recipe]
    return fx.with_element(element), fw.with_element(element)


def group_offsets(group_lens: Tensor | None, group_offs: Tensor | None, groups: int) -> Tensor:
    """`[groups + 1]`, where each group's rows begin and end, of whichever of the two is given. Raises ValueError, TypeError."""
    expect((group_lens is None) != (group_offs is None), "group_lens and group_offs", "neither" if group_lens is None else "both",
           "one of them")
    if group_lens is not None:
        check_index(group_lens, "group_lens", 1, INT)
        expect(group_lens.numel() == groups, "group_lens, length", group_lens.numel(),
               f"the number of groups of the weights, {groups}")
        return torch.nn.functional.pad(group_lens.cumsum(0, dtype=torch.int64), (1, 0))
    assert group_offs is not None
    check_index(group_offs, "group_offs", 1, INT)
    expect(group_offs.numel() == groups + 1, "group_offs, length", group_offs.numel(),
           f"groups + 1 = {groups + 1}, with the groups of the weights")
    return group_offs


# ---------------------------------------------------------------- the three products
def forward(x: Tensor, rows: ScaledTensor, offsets: Tensor, scale: Tensor | None, how: How) -> tuple[Tensor, Both]:
    """(y, x in FP8 along both axes)."""
    q = quantize_both(x, how.x, offsets, scale=scale)
    return grouped_gemm(q.rows, rows, Offsets(offsets), out_dtype=x.dtype, **how.products()), q


def input_gradient(dy: Both, columns: ScaledTensor, offsets: Tensor, dtype: torch.dtype, how: How) -> Tensor:
    return grouped_gemm(dy.rows, columns, Offsets(offsets), out_dtype=dtype, **how.products())


def weight_gradient(dy: Both, x: ScaledTensor, layout: KGrouped, out: Tensor | None, dtype: torch.dtype, how: How) -> Tensor:
    return grouped_gemm_wgrad(dy.columns, x, layout, out=out, out_dtype=None if out is not None else dtype,
                              accumulate=out is not None, **how.products())


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | None, rows: ScaledTensor, columns: ScaledTensor, offsets: Tensor,
                sx: Tensor | None, sdy: Tensor | None, how: How, main_grad: Tensor | None) -> Tensor:
        y, q = forward(x, rows, offsets, sx, how)
        assert q.layout is not None
        ctx.wants_w = ctx.needs_input_grad[1] or (w is None and main_grad is not None)
        keep = q.columns if ctx.wants_w else None
        ctx.save_for_backward(offsets, q.layout.offsets, columns.data, columns.scale, sdy, keep and keep.data, keep and keep.scale)
        ctx.formats, ctx.how, ctx.main_grad = (q.columns.format, columns.format), how, main_grad
        ctx.dtypes = x.dtype, x.dtype if w is None else w.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        offsets, seg, wt, wts, sdy, xt, xts = ctx.saved_tensors
        how = ctx.how
        q = quantize_both(contiguous(dy), how.dy, offsets, scale=sdy, amax_clamp=GRADIENT_CLAMP)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = input_gradient(q, ScaledTensor(wt, wts, ctx.formats[1]), offsets, ctx.dtypes[0], how)
        if ctx.wants_w:
            dw = weight_gradient(q, ScaledTensor(xt, xts, ctx.formats[0]), KGrouped(seg, 128), ctx.main_grad, ctx.dtypes[1], how)
            dw = None if ctx.main_grad is not None else dw
        return dx, dw, None, None, None, None, None, None, None


# ---------------------------------------------------------------- the same as ops of torch, for torch.compile
def _forward_op(x: Tensor, w: Tensor | None, wq: Tensor, wqs: Tensor, wt: Tensor, wts: Tensor, offsets: Tensor, sx: Tensor | None,
                sdy: Tensor | None, fx: str, fdy: str, fw: str, fast_accum: bool, max_sms: int, keep: bool) -> tuple[Tensor, ...]:
    y, q = forward(x, ScaledTensor(wq, wqs, get_format(fw)), offsets, sx, How(fx, fdy, fast_accum, max_sms))
    assert q.layout is not None and q.columns.scale is not None
    return y, q.columns.data, q.columns.scale, q.layout.offsets


def _forward_fake(x: Tensor, w: Tensor | None, wq: Tensor, wqs: Tensor, wt: Tensor, wts: Tensor, offsets: Tensor, sx: Tensor | None,
                  sdy: Tensor | None, fx: str, fdy: str, fw: str, fast_accum: bool, max_sms: int, keep: bool) -> tuple[Tensor, ...]:
    from .quantize_both import allocate_both

    _, columns, seg = allocate_both(x, get_format(fx), offsets, sx)
    assert columns.scale is not None and seg is not None
    return x.new_empty((x.shape[0], wq.shape[1])), columns.data, columns.scale, seg


def _backward_op(dy: Tensor, wt: Tensor, wts: Tensor, offsets: Tensor, sdy: Tensor | None, xt: Tensor, xts: Tensor, seg: Tensor,
                 fx: str, fdy: str, fw: str, fast_accum: bool, max_sms: int, x_dtype: str, w_dtype: str, need_w: bool
                 ) -> tuple[Tensor, Tensor]:
    how = How(fx, fdy, fast_accum, max_sms)
    q = quantize_both(contiguous(dy), fdy, offsets, scale=sdy, amax_clamp=GRADIENT_CLAMP)
    dx = input_gradient(q, ScaledTensor(wt, wts, get_format(fw)), offsets, dtype_of(x_dtype), how)
    if not need_w:
        return dx, dy.new_empty(0)
    return dx, weight_gradient(q, ScaledTensor(xt, xts, get_format(fx)), KGrouped(seg, 128), None, dtype_of(w_dtype), how)


def _backward_fake(dy: Tensor, wt: Tensor, wts: Tensor, offsets: Tensor, sdy: Tensor | None, xt: Tensor, xts: Tensor, seg: Tensor,
                   fx: str, fdy: str, fw: str, fast_accum: bool, max_sms: int, x_dtype: str, w_dtype: str, need_w: bool
                   ) -> tuple[Tensor, Tensor]:
    g, k, n = wt.shape
    dx = dy.new_empty((dy.shape[0], k), dtype=dtype_of(x_dtype))
    return dx, dy.new_empty((g, n, k), dtype=dtype_of(w_dtype)) if need_w else dy.new_empty(0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w, _, _, wt, wts, offsets, _, sdy, fx, fdy, fw, fast_accum, max_sms, keep = inputs
    _, xt, xts, seg = output
    ctx.save_for_backward(wt, wts, offsets, sdy, xt, xts, seg)
    ctx.arguments = fx, fdy, fw, fast_accum, max_sms, dtype_name(x.dtype), dtype_name((x if w is None else w).dtype), keep
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    wt, wts, offsets, sdy, xt, xts, seg = ctx.saved_tensors
    if dy is None:
        return (None, ) * 15
    dx, dw = torch.ops.narrowgemm.grouped_linear_backward(dy, wt, wts, offsets, sdy, xt, xts, seg, *ctx.arguments)
    return dx, dw if ctx.arguments[-1] else None, *(None, ) * 13


LIBRARY.define("grouped_linear(Tensor x, Tensor? w, Tensor wq, Tensor wqs, Tensor wt, Tensor wts, Tensor offsets, Tensor? sx, "
               "Tensor? sdy, str fx, str fdy, str fw, bool fast_accum, int max_sms, bool keep) -> (Tensor, Tensor, Tensor, Tensor)")
LIBRARY.impl("grouped_linear", _forward_op, "CompositeExplicitAutograd")
LIBRARY.define("grouped_linear_backward(Tensor dy, Tensor wt, Tensor wts, Tensor offsets, Tensor? sdy, Tensor xt, Tensor xts, "
               "Tensor seg, str fx, str fdy, str fw, bool fast_accum, int max_sms, str x_dtype, str w_dtype, bool need_w) "
               "-> (Tensor, Tensor)")
LIBRARY.impl("grouped_linear_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("narrowgemm::grouped_linear", _forward_fake, lib=LIBRARY)
torch.library.register_fake("narrowgemm::grouped_linear_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd("narrowgemm::grouped_linear", _backward, setup_context=_setup, lib=LIBRARY)
