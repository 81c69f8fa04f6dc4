"""`expert_mlp`: gate_up, SwiGLU and down of every expert in training, one differentiable function with FP8 products.

    forward    h  [T, 2I] = x . gate_up^T       a [T, I] = SwiGLU(h)       y [T, H] = a . down^T
    backward   da = dy . down                   dh = SwiGLU'(h) da         dx = dh . gate_up
               d down = dy^T . a                d gate_up = dh^T . x       (a product a group, over its rows)

x, a, dy and dh are each quantised along both axes in one pass, a and dh in the pass that makes them; what the backward needs of x
and a is kept in FP8, transposed, and h in its own type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import expect
from ..formats import ScaledTensor, get_format
from ..layouts import KGrouped, Offsets
from ..reference.activate import ACTIVATIONS
from . import expert_mlp_bf16
from .activate import activate
from .activate_both import activate_backward, activate_both
from .grouped import grouped_gemm
from .grouped_linear import ELEMENTS, GRADIENT_CLAMP, group_offsets, recipe_formats
from .quantize import quantize
from .quantize_both import Both, quantize_both
from .steps import contiguous
from .wgrad import grouped_gemm_wgrad

RECIPES = ("bf16", "tensorwise", "rowwise", "block")


class Scaling(NamedTuple):
    """Delayed tensor-wise scaling: float32 scales `[4, ...]` of x, a, dy and dh, the first of each row, and their largest
    magnitudes, which a step raises in place. Not `ready`: there are no scales yet, they are found, and the magnitudes kept."""

    scale: Tensor
    amax: Tensor
    ready: bool = True

    def of(self, i: int) -> dict[str, Any]:
        return {"scale": self.scale[i, :1], "amax": self.amax[i, :1]} if self.ready else {}

    def keep(self, i: int, q: Both) -> None:
        if not self.ready and len(q.rows.data):     # the scale of no rows says nothing
            assert q.rows.scale is not None
            torch.maximum(self.amax[i, :1], q.rows.scale.view(1) * q.rows.format.elem.max, out=self.amax[i, :1])


@dataclass(frozen=True, slots=True)
class How:
    """What forward and backward share beside tensors."""

    x: str
    dy: str
    w: str
    activation: str
    args: tuple[float, ...]
    fast_accum: bool
    max_sms: int

    def products(self) -> dict[str, Any]:
        return {"fast_accum": self.fast_accum, "max_sms": self.max_sms}

    def swiglu(self) -> dict[str, Any]:
        return {"activation": self.activation, "args": self.args}


def expert_mlp(x: Tensor, gate_up: Tensor, down: Tensor, group_lens: Tensor | None = None, *, group_offs: Tensor | None = None,
               recipe: str = "block", element: str = "e4m3", grads: str = "", activation: str = "swiglu",
               args: tuple[float, ...] = (), quantized: tuple[Both, Both] | None = None, scaling: Scaling | None = None,
               main_grads: tuple[Tensor | None, Tensor | None] = (None, None), fast_accum: bool = False,
               max_sms: int = 0) -> Tensor:
    """`y [T, H] = SwiGLU(x . gate_up[g]^T) . down[g]^T` for the rows of each group g, in x's dtype. Differentiable in all three.

    x: `[T, H]` BF16, FP16 or FP32, rows sorted by expert. gate_up: `[G, 2I, H]`, gate's rows first; down: `[G, H, I]`; master
        weights, BF16, FP16 or FP32.
    group_lens / group_offs, recipe, element, grads, fast_accum, max_sms: as in `grouped_linear`; recipe 'bf16' quantises nothing
        and runs torch's grouped products.
    activation, args: as in `activate`; gate and up are halves.
    quantized: `quantize_weight` of gate_up and down, made once for several micro-batches; made here if None.
    scaling: tensor-wise delayed scaling, see `nn.ExpertMLP`; without it scales are found in passes of their own.
    main_grads: FP32, of gate_up's and down's shapes: their gradients are added there instead of being returned.

    Raises TypeError / ValueError before anything is launched. Not under torch.compile: main_grads and scaling.
    """
    expect(recipe in RECIPES, "recipe", repr(recipe), f"one of {RECIPES}")
    grads = grads or element
    expect(grads in ELEMENTS and element in ELEMENTS, "element and grads", (element, grads), f"of {ELEMENTS}")
    expect(activation in ACTIVATIONS, "activation", repr(activation), f"one of {ACTIVATIONS}")
    for name, t in (("x", x), ("gate_up", gate_up), ("down", down)):
        expect(isinstance(t, Tensor), name, type(t).__name__, "a tensor", error=TypeError)
    expect(x.dim() == 2, "x, shape", tuple(x.shape), "[T, H]")
    expect(gate_up.dim() == 3 and gate_up.shape[2] == x.shape[1] and gate_up.shape[1] % 2 == 0, "gate_up, shape",
           tuple(gate_up.shape), f"[G, 2I, {x.shape[1]}]")
    want = (gate_up.shape[0], x.shape[1], gate_up.shape[1] // 2)
    expect(tuple(down.shape) == want, "down, shape", tuple(down.shape), str(want))
    offsets = group_offsets(group_lens, group_offs, gate_up.shape[0])
    expect(scaling is None or recipe == "tensorwise", "scaling with recipe", recipe, "'tensorwise'")
    expect(isinstance(main_grads, (tuple, list)) and len(main_grads) == 2, "main_grads", type(main_grads).__name__,
           "a pair, of gate_up and down, each a tensor or None", error=TypeError)
    for w, main in zip((gate_up, down), main_grads):
        expect(main is None or isinstance(main, Tensor), "main_grads", type(main).__name__, "tensors or None", error=TypeError)
        expect(main is None or (main.dtype == torch.float32 and main.shape == w.shape), "main_grads",
               "none" if main is None else f"{main.dtype} {tuple(main.shape)}", f"torch.float32 {tuple(w.shape)}")
    if recipe == "bf16":
        return expert_mlp_bf16.expert_mlp(x, gate_up, down, offsets, activation, args, main_grads)
    fx, fw = recipe_formats(recipe, element)
    how = How(fx.name, fx.with_element(grads).name, fw.name, activation, args, fast_accum, max_sms)
    if quantized is None:
        quantized = quantize_both(gate_up, fw), quantize_both(down, fw)
    pair = isinstance(quantized, (tuple, list)) and len(quantized) == 2 and all(isinstance(q, Both) for q in quantized)
    expect(pair, "quantized", type(quantized).__name__, "what quantize_weight gives of gate_up and of down", error=TypeError)
    for q, w in zip(quantized, (gate_up, down)):
        expect(q.rows.format == fw and q.rows.shape == w.shape, "quantized", f"{q.rows.format.name} {tuple(q.rows.shape)}",
               f"quantize_weight of {tuple(w.shape)}, recipe {recipe!r}, element {element!r}")
    if torch.compiler.is_compiling():
        from .expert_mlp_traced import traced

        expect(main_grads == (None, None) and scaling is None, "main_grads and scaling under torch.compile", "tensors", "None")
        return traced(x, gate_up, down, quantized, offsets, how)
    return _ExpertMLP.apply(x, gate_up, down, quantized, offsets, scaling, how, main_grads)


# ---------------------------------------------------------------- the two directions
class Kept(NamedTuple):
    """What the backward needs: h; x and a along their groups' rows, where a weight's gradient is wanted; the groups' columns."""

    h: Tensor
    x: ScaledTensor | None
    a: ScaledTensor | None
    segments: Tensor | None


def forward(x: Tensor, gate_up: ScaledTensor, down: ScaledTensor, offsets: Tensor, scaling: Scaling | None, how: How, keep: bool
            ) -> tuple[Tensor, Kept]:
    layout = Offsets(offsets)
    sx, sa = _delayed(scaling, 0), _delayed(scaling, 1)
    fmt = get_format(how.x)
    if not keep and fmt.group[0] == 1:
        h = grouped_gemm(quantize(x, fmt, scale_layout="mn_major"), gate_up, layout, out_dtype=x.dtype, **how.products())
        with torch.no_grad():
            a = activate(h, layout=layout, fmt=fmt, **how.swiglu())
        return grouped_gemm(a, down, layout, out_dtype=x.dtype, **how.products()), Kept(h, None, None, None)
    xq = quantize_both(x, fmt, offsets, **sx)
    h = grouped_gemm(xq.rows, gate_up, layout, out_dtype=x.dtype, **how.products())
    aq = activate_both(h, layout, fmt, segments=xq.layout, **how.swiglu(), **sa)
    y = grouped_gemm(aq.rows, down, layout, out_dtype=x.dtype, **how.products())
    if scaling is not None:
        scaling.keep(0, xq)
        scaling.keep(1, aq)
    assert xq.layout is not None
    return y, Kept(h, xq.columns, aq.columns, xq.layout.offsets)


def backward(dy: Tensor, kept: Kept, gate_up: ScaledTensor, down: ScaledTensor, offsets: Tensor, scaling: Scaling | None, how: How,
             needs: tuple[bool, bool, bool], mains: tuple[Tensor | None, Tensor | None], dtypes: tuple[torch.dtype, torch.dtype]
             ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, d gate_up, d down). `gate_up` and `down`: along their columns; `dtypes`: of the weights."""
    layout = Offsets(offsets)
    sdy, sdh = _delayed(scaling, 2), _delayed(scaling, 3)
    dx = dw1 = dw2 = None
    q = quantize_both(dy, how.dy, offsets, amax_clamp=GRADIENT_CLAMP, **sdy)
    assert q.layout is not None
    if scaling is not None:
        scaling.keep(2, q)
    columns = KGrouped(q.layout.offsets if kept.segments is None else kept.segments, 128)
    if needs[2]:
        assert kept.a is not None
        dw2 = _weight(q.columns, kept.a, columns, mains[1], dtypes[1], how)
    if needs[0] or needs[1]:
        da = grouped_gemm(q.rows, down, layout, out_dtype=kept.h.dtype, **how.products())
        del q
        dh = activate_backward(kept.h, da, layout, how.dy, segments=columns, amax_clamp=GRADIENT_CLAMP, **how.swiglu(), **sdh)
        assert isinstance(dh, Both)
        if scaling is not None:
            scaling.keep(3, dh)
        if needs[1]:
            assert kept.x is not None
            dw1 = _weight(dh.columns, kept.x, columns, mains[0], dtypes[0], how)
        if needs[0]:
            dx = grouped_gemm(dh.rows, gate_up, layout, out_dtype=kept.h.dtype, **how.products())
    return dx, dw1, dw2


def _weight(d: ScaledTensor, x: ScaledTensor, layout: KGrouped, main: Tensor | None, dtype: torch.dtype, how: How) -> Tensor | None:
    out = grouped_gemm_wgrad(d, x, layout, out=main, out_dtype=dtype if main is None else None, accumulate=main is not None,
                             **how.products())
    return out if main is None else None


def _delayed(scaling: Scaling | None, i: int) -> dict[str, Any]:
    return {} if scaling is None else scaling.of(i)


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, quantized: tuple[Both, Both], offsets: Tensor,
                scaling: Scaling | None, how: How, mains: tuple[Tensor | None, Tensor | None]) -> Tensor:
        need = ctx.needs_input_grad[:3]
        first, second = quantized
        y, kept = forward(x, first.rows, second.rows, offsets, scaling, how, need[1] or need[2])
        parts = (kept.x if need[1] else None, kept.a if need[2] else None, first.columns, second.columns)
        ctx.formats = [p and p.format for p in parts]
        flat = (t for p in parts for t in ((p.data, p.scale) if p else (None, None)))
        ctx.save_for_backward(offsets, kept.segments, kept.h, *flat)
        ctx.how, ctx.scaling, ctx.mains, ctx.dtypes = how, scaling, mains, (gate_up.dtype, down.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        offsets, segments, h, *rest = ctx.saved_tensors
        x, a, gate_up, down = (f and ScaledTensor(data, scale, f) for f, data, scale in zip(ctx.formats, rest[::2], rest[1::2]))
        grads = backward(contiguous(dy), Kept(h, x, a, segments), gate_up, down, offsets, ctx.scaling, ctx.how,
                         ctx.needs_input_grad[:3], ctx.mains, ctx.dtypes)
        return *grads, None, None, None, None, None
