"""The forward of an expert layer, as transformers calls it, on `narrowgemm.experts`; step by step for other activations.

    forward(module, hidden_states [T, H], top_k_index int64 [T, K], top_k_weights [T, K]) -> [T, H]

Expert ids outside [0, E) are slots of other ranks (transformers' sentinels): they cost nothing and count as zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import Unsupported
from ...formats import Format, ScaledTensor
from ...layouts import Offsets
from ...ops.experts import experts
from ...ops.grouped import grouped_gemm
from ...ops.quantize import quantize
from ...ops.route import Routing, combine, gather, sort_by_expert
from ...prepack import PackedWeight
from . import weights
from .weights import Weights


def forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts of a model that is not an FP8 checkpoint. With gradients, wide experts run on torch's grouped product."""
    _refuse(module)
    if getattr(module, weights.FORMATS, None) is None and _needs_grad(module, hidden_states, top_k_weights):
        from transformers.integrations.moe import grouped_mm_experts_forward

        return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    return _layer(module, weights.plain(module), hidden_states, top_k_index, top_k_weights)


def fp8_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts of an FP8 (or packed FP4) checkpoint, transformers' `FP8Experts`."""
    _refuse(module)
    return _layer(module, weights.fp8(module), hidden_states, top_k_index, top_k_weights)


def _refuse(module: Any) -> None:
    if getattr(module, "has_post_expert_norm", False):
        raise ValueError(f"{type(module).__name__}: got experts with a norm behind each, expected experts without: "
                         "use experts_implementation='eager'")


def _needs_grad(module: Any, *inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *module.parameters(recurse=False)))


def _layer(module: Any, w: Weights, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    x = hidden_states.detach()
    if w.dtype is not None:
        x = x.to(w.dtype)
    elif not w.activations.scaled and x.dtype == torch.float32:
        x = x.bfloat16()  # what narrow weights are multiplied with as they come
    topk_weights = top_k_weights.detach().float()
    kind = fused(module)
    if kind is None:
        out = _steps(module, w, x, top_k_index, topk_weights)
    else:
        activation, args, interleaved = kind
        biases = [None if b is None else b.detach() for b in (w.up_bias, w.down_bias)]
        out = experts(x, w.up, w.down, topk_weights=topk_weights, topk_ids=top_k_index, activation=activation,
                      activation_args=args, interleaved=interleaved, gate_up_bias=biases[0], down_bias=biases[1],
                      activation_format=w.activations if w.activations.scaled else None)
    out = out.to(hidden_states.dtype)
    if torch.is_grad_enabled() and hidden_states.requires_grad and not torch.compiler.is_compiling():
        return _NoBackward.apply(out, hidden_states, type(module).__name__)
    return out


def fused(module: Any) -> tuple[str, tuple[float, ...], bool] | None:
    """(activation, args, interleaved) of `narrowgemm.activate` where the module's own gate is known to be that; else None."""
    from transformers.integrations.finegrained_fp8 import FP8Experts
    from transformers.integrations.moe import _default_apply_gate

    if not module.has_gate:
        return None
    gate = type(module)._apply_gate
    silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLUActivation", "SiLU")
    if gate is _default_apply_gate:
        return ("swiglu", (), False) if silu else None
    if gate is FP8Experts._apply_gate:
        # what its gate is made of; releases differ in what there is
        alpha, limit, softcap = (getattr(module, name, None) for name in ("swiglu_alpha", "limit", "gate_softcap"))
        if alpha is not None and limit is not None and softcap is None:
            return "swiglu_oai", (float(alpha), float(limit)), False
        return ("swiglu", (), False) if silu and alpha is None and limit is None and softcap is None else None
    if gate.__qualname__ == "GptOssExperts._apply_gate" and gate.__module__.startswith("transformers."):
        return "swiglu_oai", (float(module.alpha), float(module.limit)), True
    return None


def prepack(module: Any, order: str = "bf16") -> bool:
    """Prepack the module's weights, where they are MXFP4 or MXFP8; whether they are."""
    kind = fused(module)
    return weights.prepack_(module, "" if kind is None else "interleaved" if kind[2] else "halves", order)


def _steps(module: Any, w: Weights, x: Tensor, top_k_index: Tensor, topk_weights: Tensor) -> Tensor:
    """The layer step by step, around the module's own activation."""
    routing = sort_by_expert(top_k_index, module.num_experts)
    expert = None if w.up_bias is None else _expert_of_rows(top_k_index, routing, module.num_experts)
    up = _product(gather(x, routing), w.up, w.up_bias, expert, routing.layout, w.activations)
    act = module._apply_gate(up) if module.has_gate else module.act_fn(up)
    down = _product(act, w.down, w.down_bias, expert, routing.layout, w.activations)
    return combine(down, routing, topk_weights)


def _product(rows: Tensor, weight: ScaledTensor | PackedWeight | Tensor, bias: Tensor | None, expert: Tensor | None,
             layout: Offsets, activations: Format) -> Tensor:
    operand = quantize(rows, activations, scale_layout="mn_major") if activations.scaled else rows
    y = grouped_gemm(operand, weight, layout, out_dtype=rows.dtype)
    return y if bias is None or expert is None else y + bias.detach()[expert].to(y.dtype)


def _expert_of_rows(top_k_index: Tensor, routing: Routing, experts: int) -> Tensor:
    """The expert of each sorted row, in range for rows of skipped slots, too."""
    return top_k_index.reshape(-1)[routing.row_map.long()].clamp(0, experts - 1)


class _NoBackward(torch.autograd.Function):
    """The layer's result; a backward through it is an error rather than a gradient that is silently missing."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, hidden_states: Tensor, name: str) -> Tensor:
        ctx.name = name
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise Unsupported(f"{ctx.name} holds quantised experts, which have no backward in narrowgemm's transformers "
                          "integration", "train with wide experts, or run inference under torch.no_grad()")
