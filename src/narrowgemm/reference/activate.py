"""SwiGLU between the two products of an expert layer, in plain torch: FP32 inside, rounded to the input's type."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Format, ScaledTensor
from . import quantize as quantization

ACTIVATIONS = ("swiglu", "swiglu_oai")
OAI_ARGS = (1.702, 7.0)   # GPT-OSS: alpha, limit


def activate(h: Tensor, *, activation: str = "swiglu", args: tuple[float, ...] = (), interleaved: bool = False,
             bias: Tensor | None = None, offsets: Tensor | None = None, fmt: Format | None = None,
             rounding: str = "rceil", amax_clamp: float = quantization.AMAX_CLAMP) -> Tensor | ScaledTensor:
    """See `ops.activate.activate`. Rows of no group are computed like the others, with some group's bias."""
    x = h.float()
    if bias is not None:
        x = x + bias.float()[expert_of_rows(offsets, h.shape[0], bias.shape[0])]
    gate, up = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    if activation == "swiglu_oai":
        alpha, limit = args or OAI_ARGS
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1.0
        y = gate / (1.0 + torch.exp(-(alpha * gate))) * up
    else:
        y = torch.nn.functional.silu(gate) * up
    y = y.to(h.dtype)
    return y if fmt is None else quantization.quantize(y, fmt, rounding, amax_clamp)


def activate_backward(h: Tensor, dy: Tensor, *, activation: str = "swiglu", args: tuple[float, ...] = ()) -> Tensor:
    """The gradient `[T, 2I]` of h, given that of its activation `[T, I]`: FP32 inside, rounded to h's type."""
    gate, up = h.float().chunk(2, dim=-1)
    d = dy.float()
    if activation == "swiglu_oai":
        alpha, limit = args or OAI_ARGS
        low, inside = gate <= limit, up.abs() <= limit
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1.0
        s = torch.sigmoid(alpha * gate)
        dgate = torch.where(low, d * up * s * (1.0 + alpha * gate * (1.0 - s)), 0.0)
        return torch.cat([dgate, torch.where(inside, d * gate * s, 0.0)], dim=-1).to(h.dtype)
    s = torch.sigmoid(gate)
    return torch.cat([d * up * s * (1.0 + gate * (1.0 - s)), d * gate * s], dim=-1).to(h.dtype)


def expert_of_rows(offsets: Tensor | None, rows: int, experts: int) -> Tensor:
    """int64 `[rows]`: the group that each row lies in; a legal one for rows of no group. No offsets: one group."""
    if offsets is None:
        return torch.zeros(rows, dtype=torch.int64)
    row = torch.arange(rows, device=offsets.device)
    return torch.searchsorted(offsets[1:].to(torch.int64), row, right=True).clamp(max=experts - 1)
