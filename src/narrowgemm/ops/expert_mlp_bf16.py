"""The expert MLP without quantisation: torch's grouped products, and SwiGLU and its derivative in a launch each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layouts import Offsets
from .activate import activate
from .activate_both import activate_backward
from .steps import contiguous

Mains = tuple[Tensor | None, Tensor | None]


def expert_mlp(x: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor, activation: str, args: tuple[float, ...], mains: Mains
               ) -> Tensor:
    """See `expert_mlp.expert_mlp`. Weights of another type than x's are rounded to it."""
    return _ExpertMLP.apply(x, gate_up, down, offsets, activation, args, mains)


def product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """`[rows of g] . b[g]`, or a product a group over rows of both, where b is a matrix. torch has it for BF16 alone."""
    bf16 = torch.bfloat16
    out = torch.nn.functional.grouped_mm(a.to(bf16), b.to(bf16), offs=ends)
    return out if a.dtype == bf16 else out.to(a.dtype)


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor, activation: str, args: tuple[float, ...],
                mains: Mains) -> Tensor:
        ends = offsets[1:].to(torch.int32)
        w1, w2 = gate_up.to(x.dtype), down.to(x.dtype)
        h = product(x, w1.mT, ends)
        a = activate(h, layout=Offsets(offsets), activation=activation, args=args)
        y = product(a, w2.mT, ends)
        ctx.save_for_backward(x, w1, w2, offsets, ends, h, a)
        ctx.how, ctx.mains, ctx.dtypes = (activation, args), mains, (gate_up.dtype, down.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, offsets, ends, h, a = ctx.saved_tensors
        need, (activation, args) = ctx.needs_input_grad, ctx.how
        dy = contiguous(dy)
        dx = dw1 = dw2 = None
        if need[2]:
            dw2 = _weight(product(dy.mT, a, ends), ctx.mains[1], ctx.dtypes[1])
        if need[0] or need[1]:
            dh = activate_backward(h, product(dy, w2, ends), Offsets(offsets), activation=activation, args=args)
            assert isinstance(dh, Tensor)
            if need[1]:
                dw1 = _weight(product(dh.mT, x, ends), ctx.mains[0], ctx.dtypes[0])
            if need[0]:
                dx = product(dh, w1, ends)
        return dx, dw1, dw2, None, None, None, None


def _weight(grad: Tensor, main: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if main is None:
        return grad.to(dtype)
    main.add_(grad)
    return None
