"""`expert_mlp` as ops of torch, for torch.compile: what eager calls run, with tensors alone in the signatures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import ScaledTensor, dtype_name, dtype_of, get_format
from .expert_mlp import How, Kept, backward, forward
from .library import LIBRARY
from .quantize_both import Both
from .steps import contiguous

STRINGS = "str fx, str fdy, str fw, str activation, float[] args, bool fast_accum, int max_sms"


def traced(x: Tensor, gate_up: Tensor, down: Tensor, quantized: tuple[Both, Both], offsets: Tensor, how: How) -> Tensor:
    flat = [t for q in quantized for part in (q.rows, q.columns) for t in (part.data, part.scale)]
    return torch.ops.narrowgemm.expert_mlp(x, gate_up, down, *flat, offsets, how.x, how.dy, how.w, how.activation, list(how.args),
                                           how.fast_accum, how.max_sms)[0]


def _how(strings: tuple[Any, ...]) -> How:
    fx, fdy, fw, activation, args, fast_accum, max_sms = strings
    return How(fx, fdy, fw, activation, tuple(args), fast_accum, max_sms)


def _forward(x: Tensor, gate_up: Tensor, down: Tensor, r1: Tensor, rs1: Tensor, c1: Tensor, cs1: Tensor, r2: Tensor, rs2: Tensor,
             c2: Tensor, cs2: Tensor, offsets: Tensor, *strings: Any) -> tuple[Tensor, ...]:
    how = _how(strings)
    fmt = get_format(how.w)
    y, kept = forward(x, ScaledTensor(r1, rs1, fmt), ScaledTensor(r2, rs2, fmt), offsets, None, how, True)
    assert kept.x is not None and kept.a is not None and kept.segments is not None
    assert kept.x.scale is not None and kept.a.scale is not None
    return y, kept.h, kept.x.data, kept.x.scale, kept.a.data, kept.a.scale, kept.segments


def _forward_fake(x: Tensor, gate_up: Tensor, down: Tensor, r1: Tensor, rs1: Tensor, c1: Tensor, cs1: Tensor, r2: Tensor,
                  rs2: Tensor, c2: Tensor, cs2: Tensor, offsets: Tensor, *strings: Any) -> tuple[Tensor, ...]:
    from .quantize_both import allocate_both

    fmt = get_format(strings[0])
    h = x.new_empty((x.shape[0], gate_up.shape[1]))
    _, xt, seg = allocate_both(x, fmt, offsets, None)
    _, at, _ = allocate_both(h[:, : h.shape[1] // 2], fmt, offsets, None)
    assert xt.scale is not None and at.scale is not None and seg is not None
    return x.new_empty((x.shape[0], down.shape[1])), h, xt.data, xt.scale, at.data, at.scale, seg


def _backward(dy: Tensor, h: Tensor, xt: Tensor, xts: Tensor, at: Tensor, ats: Tensor, seg: Tensor, c1: Tensor, cs1: Tensor,
              c2: Tensor, cs2: Tensor, offsets: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *strings, w1, w2 = rest
    how = _how(tuple(strings))
    fx, fw = get_format(how.x), get_format(how.w)
    kept = Kept(h, ScaledTensor(xt, xts, fx), ScaledTensor(at, ats, fx), seg)
    dx, dw1, dw2 = backward(contiguous(dy), kept, ScaledTensor(c1, cs1, fw), ScaledTensor(c2, cs2, fw), offsets, None, how,
                            (True, True, True), (None, None), (dtype_of(w1), dtype_of(w2)))
    assert dx is not None and dw1 is not None and dw2 is not None
    return dx, dw1, dw2


def _backward_fake(dy: Tensor, h: Tensor, xt: Tensor, xts: Tensor, at: Tensor, ats: Tensor, seg: Tensor, c1: Tensor,
                   cs1: Tensor, c2: Tensor, cs2: Tensor, offsets: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    g, hidden, two = c1.shape
    return (h.new_empty((h.shape[0], hidden)), dy.new_empty((g, two, hidden), dtype=dtype_of(rest[-2])),
            dy.new_empty((g, hidden, two // 2), dtype=dtype_of(rest[-1])))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, gate_up, down, _, _, c1, cs1, _, _, c2, cs2, offsets, *strings = inputs
    ctx.save_for_backward(*output[1:], c1, cs1, c2, cs2, offsets)
    ctx.arguments = *strings, dtype_name(gate_up.dtype), dtype_name(down.dtype)
    ctx.set_materialize_grads(False)


def _backward_rule(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 19
    grads = torch.ops.narrowgemm.expert_mlp_backward(dy, *ctx.saved_tensors, *ctx.arguments)
    return *(g if n else None for g, n in zip(grads, ctx.needs_input_grad)), *(None,) * 16


LIBRARY.define("expert_mlp(Tensor x, Tensor gate_up, Tensor down, Tensor r1, Tensor rs1, Tensor c1, Tensor cs1, Tensor r2, "
               f"Tensor rs2, Tensor c2, Tensor cs2, Tensor offsets, {STRINGS}) -> "
               "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
LIBRARY.impl("expert_mlp", _forward, "CompositeExplicitAutograd")
LIBRARY.define("expert_mlp_backward(Tensor dy, Tensor h, Tensor xt, Tensor xts, Tensor at, Tensor ats, Tensor seg, Tensor c1, "
               f"Tensor cs1, Tensor c2, Tensor cs2, Tensor offsets, {STRINGS}, str w1, str w2) -> (Tensor, Tensor, Tensor)")
LIBRARY.impl("expert_mlp_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("narrowgemm::expert_mlp", _forward_fake, lib=LIBRARY)
torch.library.register_fake("narrowgemm::expert_mlp_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd("narrowgemm::expert_mlp", _backward_rule, setup_context=_setup, lib=LIBRARY)
