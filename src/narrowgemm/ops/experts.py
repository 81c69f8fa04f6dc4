"""`experts`: the whole expert layer in one op. Tokens and router output in, combined hidden states out.

    route -> sort -> gather + quantise -> gate_up -> activate + quantise -> down -> combine
    route -> sort -> gate_up + activate -> down + combine                                       (packed with a pair)

A launch a step (one for sort and gather where there are few slots), no read-back, every intermediate in one workspace. What is
planned, and where it lies: `experts_plan.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arch import detect
from ..errors import expect, expect_count
from ..formats import Format, ScaledTensor, get_format
from ..prepack import PackedWeight
from ..runtime import env
from . import common, experts_check, experts_warm, steps
from .experts_call import Call, compose
from .experts_plan import ExpertsPlan, Options, Recipe, Sizes, Weight, by_slot, default_activations, make
from .recall import Calls

ROUTING = ("scoring", "renormalize", "num_expert_group", "topk_group", "scaling_factor")
_plans = common.PlanCache()
_calls: Calls[ExpertsPlan] = Calls()
Weights = ScaledTensor | Tensor | PackedWeight
Shared = tuple[Weights, Weights]


def experts(x: Tensor, gate_up: Weights, down: Weights, *, router_logits: Tensor | None = None, top_k: int = 0,
            topk_weights: Tensor | None = None, topk_ids: Tensor | None = None, scoring: str = "softmax",
            renormalize: bool = True, router_bias: Tensor | None = None, num_expert_group: int | None = None,
            topk_group: int | None = None, scaling_factor: float = 1.0, activation: str = "swiglu",
            activation_args: tuple[float, ...] = (), interleaved: bool = False,
            activation_format: Format | str | None = None, gate_up_bias: Tensor | None = None,
            down_bias: Tensor | None = None, shared: Shared | None = None, shared_output: Tensor | None = None,
            expert_map: Tensor | None = None, first_expert: int = 0, num_experts: int = 0, out: Tensor | None = None,
            workspace: Tensor | None = None, batch_invariant: bool = False, backend: str | None = None, max_sms: int = 0,
            on_unsupported: str = "portable") -> Tensor:
    """`out[t] = sum over j of weight[t, j] * down_e(act(gate_up_e(x[t])))`, e the expert of choice j, as `[T, H]`.

    x: `[T, H]` BF16, FP16 or FP32; T = 0 is legal. The results of products and activation, and the output, have its dtype.
    gate_up: `[E, 2I, H]`, down: `[E, H, I]`: ScaledTensors (FP8 in blocks, rows or whole; MXFP8; MXFP4), tensors of x's
        dtype, or `prepack`ed MXFP4 / MXFP8 weights. E counts the experts of this rank. If gate_up is packed with a `pair`, the
        activation is part of its product; without one it is a step of its own, faster for many tokens with FP8 activations.
    Routing: `router_logits` `[T, E_all]` with `top_k`, `scoring`, `renormalize`, `router_bias`, `num_expert_group`,
        `topk_group`, `scaling_factor` as in `route`; or `topk_weights` fp32 and `topk_ids` int32 / int64 `[T, top_k]`.
    expert_map, first_expert: as in `sort_by_expert`; experts of other ranks are skipped and contribute zero.
        num_experts: experts over all ranks, a hint for how many rows to expect; not needed with logits or an expert_map.
    activation, activation_args, interleaved: as `activate`'s activation, args, interleaved.
    activation_format: what x and the activation are quantised to. Default: 1x128 for block-scaled FP8 weights, row-wise for
        row- and tensor-wise ones, MXFP8 for MXFP8, and x's own dtype for MXFP4, unscaled and prepacked weights.
    gate_up_bias `[E, 2I]` (columns as gate_up's rows), down_bias `[E, H]`: added once, before the activation and before the
        routing weight. shared: (gate_up `[2S, H]`, down `[H, S]`) of shared experts; or shared_output `[T, H]`, their result.
    out: `[T, H]`, written in place. workspace: uint8, at least `experts_workspace(...)` bytes. Both are allocated if None.
    batch_invariant: fix kernels and configs, so that a token's result does not depend on the other tokens in the call.
    backend, max_sms, on_unsupported: as in `gemm`, for every step that has the choice.

    Deterministic, without host synchronisation; can be captured in a CUDA graph after one warm-up call and replayed with any
    routing. Not differentiable. Gives the same bits as the public steps in sequence, except that biases are added in FP32.
    Raises TypeError / ValueError before anything is launched, and Unsupported if no kernel computes a step.

    Layer: Mixtral, Qwen3-MoE, DeepSeek-V3; GPT-OSS with 'swiglu_oai', interleaved and biases.
    """
    steps.check_args(activation_args, "activation_args")
    options = (backend, batch_invariant, max_sms, on_unsupported)
    routing_options = (scoring, renormalize, num_expert_group, topk_group, scaling_factor)
    kind = (activation, activation_args, interleaved)
    tensors = (x, router_logits, topk_weights, topk_ids, router_bias, gate_up_bias, down_bias, shared_output, expert_map, out)
    tracing = torch.compiler.is_compiling()
    if not tracing:
        names, weights = known_by(gate_up, down, *(shared or ()))
        key = (getattr(x, "shape", None), *map(type, tensors), *names, type(workspace), top_k, first_expert, num_experts,
               activation_format, *routing_options, *kind, *options, env.choice())
        given = [t for t in (*tensors, *weights, workspace) if t is not None]
        made = _calls.find(key, given)
        if made is not None:
            result = torch.empty_strided(x.shape, (x.shape[1], 1), dtype=x.dtype, device=x.device) if out is None else out
            space = experts_warm.space(made, x.device) if workspace is None else workspace
            if made.whole is not None and made.whole((*tensors[:-1], result, *weights), space):
                return result
    fmt = None if activation_format is None else get_format(activation_format)
    routing = dict(zip(ROUTING, routing_options))
    up, dn = weights_of(gate_up, "gate_up"), weights_of(down, "down")
    both = None if shared is None else (weights_of(shared[0], "shared[0]"), weights_of(shared[1], "shared[1]"))
    if tracing:
        return compose(x, up, dn, router_logits=router_logits, top_k=top_k, topk_weights=topk_weights, topk_ids=topk_ids,
                       routing=routing, router_bias=router_bias, kind=kind, fmt=fmt, gate_up_bias=gate_up_bias,
                       down_bias=down_bias, shared=both, shared_output=shared_output, expert_map=expert_map,
                       first_expert=first_expert, out=out, backend=backend)
    signs = (*map(steps.sign, tensors), *weight_signs(up, dn, *(both or ())), top_k, first_expert, num_experts,
             routing_options, kind, fmt, options, env.choice())
    _, memo = steps.known(_plans, signs, lambda: None)
    made = memo.get("plan")
    if made is None:
        expect_count(first_expert, "first_expert", 0)
        made = memo["plan"] = plan_of(x, up, dn, router_logits, top_k, topk_weights, topk_ids, router_bias, routing, kind,
                                      fmt, gate_up_bias, down_bias, both, shared_output, expert_map, num_experts, out,
                                      Options(*options))
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if x.shape[0] == 0:
        return result
    if workspace is None:
        space = experts_warm.space(made, x.device)
    else:
        experts_check.workspace(workspace, made.bytes, x.device)
        space = workspace
    outside = (*tensors[:-1], result, *tensors_of(up, dn, *(both or ())))
    call = Call(made, x, up, dn, result, both, shared_output, gate_up_bias, down_bias, space, outside)
    if router_logits is not None:
        topk_weights, topk_ids = call.route(router_logits, router_bias, routing)
    assert topk_weights is not None and topk_ids is not None
    call.layer(topk_weights, topk_ids, expert_map, first_expert)
    if made.whole is not None:
        _calls.add(key, given, made)
    return result


def known_by(*weights: Weights) -> tuple[list[object], list[Tensor | None]]:
    """What is not in the tensors of weights, for a key, and the tensors. Weights of no known kind have none."""
    names: list[object] = []
    tensors: list[Tensor | None] = []
    for w in weights:
        if type(w) is ScaledTensor:
            names += (w.format, type(w.scale))
            tensors += (w.data, w.scale)
        elif type(w) is PackedWeight:
            names += (w.format, w.shape, w.pair, w.prepack, type(w.factor), type(w.top))
            tensors += (w.data, w.scale, w.factor, w.top)
        else:
            names.append(type(w))
            if isinstance(w, Tensor):
                tensors += (w, None)
    return names, tensors


def weights_of(w: Weights, name: str) -> Weight:
    """Weights as an operand, packed or not. TypeError for what is neither."""
    return w if isinstance(w, PackedWeight) else common.as_operand(w, name)


def weight_signs(*weights: Weight) -> tuple:
    return tuple((w.format, steps.sign(w.data), steps.sign(w.scale)) if isinstance(w, ScaledTensor) else
                 (w.format, w.shape, w.pair, w.prepack, *map(steps.sign, (w.data, w.scale, w.factor, w.top)))
                 for w in weights)


def tensors_of(*weights: Weight) -> list[Tensor | None]:
    return [t for w in weights for t in (w.data, w.scale, *((w.factor, w.top) if isinstance(w, PackedWeight) else ()))]


def plan_of(x: Tensor, gate_up: Weight, down: Weight, router_logits: Tensor | None, top_k: int,
            topk_weights: Tensor | None, topk_ids: Tensor | None, router_bias: Tensor | None, routing: dict[str, Any],
            kind: tuple[str, tuple[float, ...], bool], fmt: Format | None, gate_up_bias: Tensor | None,
            down_bias: Tensor | None, shared: tuple[Weight, Weight] | None, shared_output: Tensor | None,
            expert_map: Tensor | None, num_experts: int, out: Tensor | None, options: Options) -> ExpertsPlan:
    """Check the call and plan it."""
    experts_check.layer(x, gate_up, down, kind, gate_up_bias, down_bias, shared, shared_output, out)
    world, top_k = experts_check.routing(x, gate_up.shape[0], router_logits, top_k, topk_weights, topk_ids, router_bias,
                                         routing, expert_map)
    expect_count(num_experts, "num_experts", 0, ": 0 for unknown, or a number of experts")
    options.check()
    source = steps.PLAIN[x.dtype]
    recipe = Recipe(source, experts_check.activations(fmt or default_activations(gate_up, source), source, gate_up),
                    kind[0], kind[1], kind[2], router_logits is not None, routing["num_expert_group"] or 1,
                    gate_up_bias is not None, down_bias is not None, by_slot(gate_up),
                    shared is not None or shared_output is not None)
    sizes = Sizes(x.shape[0], x.shape[1], down.shape[2], gate_up.shape[0], top_k, max(world, num_experts),
                  0 if shared is None else shared[1].shape[1])
    return make(sizes, recipe, gate_up, down, detect(x.device), options, shared)


def experts_workspace(tokens: int, gate_up: Weights, down: Weights, *, top_k: int, num_experts: int = 0,
                      num_expert_group: int | None = None, dtype: torch.dtype = torch.bfloat16,
                      activation: str = "swiglu", activation_args: tuple[float, ...] = (), interleaved: bool = False,
                      activation_format: Format | str | None = None, bias: bool = False, shared: Shared | None = None,
                      batch_invariant: bool = False, backend: str | None = None, max_sms: int = 0,
                      device: torch.device | str | None = None) -> int:
    """Bytes of workspace that `experts` needs for `tokens` tokens of these weights; they may be on the meta device.

    num_experts: experts over all ranks (default: those of the weights). bias: whether the layer has any. `device`, if not
    the weights': where it will run. Other arguments as in `experts`. A call with router logits and one with topk_ids fit.
    """
    return plan_for(tokens, gate_up, down, top_k, num_experts, num_expert_group, dtype,
                    (activation, activation_args, interleaved), activation_format, bias, shared,
                    Options(backend, batch_invariant, max_sms), device).bytes


def plan_for(tokens: int, gate_up: Weights, down: Weights, top_k: int, num_experts: int, num_expert_group: int | None,
             dtype: torch.dtype, kind: tuple[str, tuple[float, ...], bool], activation_format: Format | str | None,
             bias: bool, shared: Shared | None, options: Options, device: torch.device | str | None) -> ExpertsPlan:
    """The plan of a layer given by its weights (on any device) and its sizes."""
    from ..arch import get_arch

    up, dn = weights_of(gate_up, "gate_up"), weights_of(down, "down")
    both = None if shared is None else (weights_of(shared[0], "shared[0]"), weights_of(shared[1], "shared[1]"))
    if isinstance(up, PackedWeight) and up.pair:
        kind = (*kind[:2], up.pair == "interleaved")     # the weights know
    expect(tokens >= 0, "tokens", tokens, "at least 0")
    expect(dtype in steps.PLAIN, "dtype", dtype, f"one of {steps.FLOATS}", error=TypeError)
    x = torch.empty((tokens, up.shape[-1]), dtype=dtype, device=up.device)
    experts_check.layer(x, up, dn, kind, None, None, both, None, None)
    source = steps.PLAIN[dtype]
    fmt = get_format(activation_format) if activation_format is not None else default_activations(up, source)
    recipe = Recipe(source, experts_check.activations(fmt, source, up), *kind, True, num_expert_group or 1, bias, bias,
                    by_slot(up), both is not None)
    world = num_experts or up.shape[0]
    expect(1 <= top_k <= world, "top_k", top_k, f"in [1, {world}], the number of experts")
    sizes = Sizes(tokens, up.shape[-1], dn.shape[-1], up.shape[0], top_k, world, 0 if both is None else both[1].shape[1])
    arch = get_arch(device) if isinstance(device, str) and device not in ("cuda", "meta") else \
        detect(torch.device(device) if device is not None else up.device)
    return make(sizes, recipe, up, dn, arch, options, both)
