"""The expert layer by its definition, expert by expert in FP32. It reads ids on the host: oracle and documentation.

Rounded where the op rounds: activations to their format, products and activation to the tokens' type. The two products
are exact up to FP32, over the bits that the kernels have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Format, ScaledTensor
from .activate import activate
from .float32 import full_float32
from .quantize import quantize


def experts(x: Tensor, gate_up: ScaledTensor, down: ScaledTensor, topk_weights: Tensor, topk_ids: Tensor, *,
            activation: str = "swiglu", activation_args: tuple[float, ...] = (), interleaved: bool = False,
            activation_format: Format | None = None, gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None,
            shared: tuple[ScaledTensor, ScaledTensor] | None = None, shared_output: Tensor | None = None) -> Tensor:
    """`[T, H]` fp32: see `ops.experts.experts`. `topk_ids` are experts of these weights; others are skipped."""
    kind = dict(activation=activation, args=activation_args, interleaved=interleaved)

    def layer(rows: Tensor, w: tuple[ScaledTensor, ScaledTensor], bias: Tensor | None = None,
              last: Tensor | None = None) -> Tensor:
        h = product(narrow(rows, activation_format), w[0]).to(x.dtype)
        act = activate((h.float() + bias.float() if bias is not None else h.float()), **kind)  # type: ignore[arg-type]
        assert isinstance(act, Tensor)
        y = product(narrow(act.to(x.dtype), activation_format), w[1]).to(x.dtype).float()
        return y if last is None else y + last.float()

    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in range(gate_up.shape[0]):
        token, choice = (topk_ids == e).nonzero(as_tuple=True)
        if token.numel():
            y = layer(x[token], (gate_up[e], down[e]), None if gate_up_bias is None else gate_up_bias[e],
                      None if down_bias is None else down_bias[e])
            out.index_add_(0, token, y * topk_weights[token, choice, None])
    if shared is not None:
        out += layer(x, shared)
    return out if shared_output is None else out + shared_output.float()


def narrow(x: Tensor, fmt: Format | None) -> Tensor:
    """`x` through its format and back, fp32."""
    return quantize(x, fmt).dequantize() if fmt is not None and fmt.scaled else x.float()


def product(a: Tensor, w: ScaledTensor) -> Tensor:
    with full_float32():
        return a @ w.dequantize().mT
