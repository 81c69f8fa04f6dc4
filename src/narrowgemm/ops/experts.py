"""`experts`: the whole expert layer in one op. Tokens and router output in, combined hidden states out.

    route -> sort -> gather + quantise -> gate_up -> activate + quantise -> down -> combine
    route -> sort -> gather + quantise -> gate_up + activate + quantise -> down -> combine    (FP8 in blocks, many rows, on Hopper)
    route -> sort -> gate_up + activate -> down + combine                                       (packed with a pair)

A launch a step (one for sort and gather where there are few slots), no read-back, every intermediate in one workspace. What is
planned, and where it lies: `experts_plan.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arch import detect
from ..errors import expect, expect_count
from ..formats import PLAIN, Format, get_format
from ..kernels.operands import without_memory
from ..prepack import PackedWeight
from ..runtime import env
from . import experts_check, experts_warm, steps
from .experts_arguments import Arguments, Kind, Shared, Weights, as_weight, as_weights, check_shared, known_by
from .experts_call import Call, compose
from .experts_plan import ExpertsPlan, Options, Recipe, Sizes, by_slot, default_activations, make
from .plan_cache import PlanCache
from .recall import Calls

ROUTING = ("scoring", "renormalize", "num_expert_group", "topk_group", "scaling_factor")
_plans = PlanCache()
_calls: Calls[ExpertsPlan] = Calls()


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
    if shared is not None:
        check_shared(shared)
    options = (backend, batch_invariant, max_sms, on_unsupported)
    routing = (scoring, renormalize, num_expert_group, topk_group, scaling_factor)
    kind = (activation, activation_args, interleaved)
    tensors = (x, router_logits, topk_weights, topk_ids, router_bias, gate_up_bias, down_bias, shared_output, expert_map)
    compiling = torch.compiler.is_compiling()
    if not compiling:      # a call that was seen before: every step's launches are bound
        names, weights = known_by(gate_up, down, *(shared or ()))
        key = (getattr(x, "shape", None), *map(type, tensors), type(out), *names, type(workspace), top_k, first_expert, num_experts,
               activation_format, *routing, *kind, *options, env.choice())
        given = [t for t in (*tensors, out, *weights, workspace) if t is not None]
        made = _calls.find(key, given)
        if made is not None:
            result = torch.empty_strided(x.shape, (x.shape[1], 1), dtype=x.dtype, device=x.device) if out is None else out
            space = experts_warm.space(made, x.device) if workspace is None else workspace
            if made.whole is not None and made.whole((*tensors, result, *weights), space):
                return result
    fmt = None if activation_format is None else get_format(activation_format)
    a = Arguments(x, as_weight(gate_up, "gate_up"), as_weight(down, "down"), router_logits, top_k, topk_weights, topk_ids,
                  router_bias, dict(zip(ROUTING, routing)), kind, fmt, gate_up_bias, down_bias, as_weights(shared),
                  shared_output, expert_map, first_expert, num_experts, out, Options(*options))
    if compiling:
        return compose(a)
    made = planned(a)      # the first of its signature, or one that can't be bound: step by step
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if not x.data_ptr() and not without_memory(x):      # no tokens, or none with memory
        return result
    if workspace is None:
        space = experts_warm.space(made, x.device)
    else:
        experts_check.workspace(workspace, made.bytes, x.device)
        space = workspace
    Call(made, a, result, space, (*tensors, result, *known_by(*a.weights)[1])).run()
    if made.whole is not None:
        _calls.add(key, given, made)
    return result


def planned(a: Arguments) -> ExpertsPlan:
    """The plan of calls of this signature; the first of them is checked."""
    _, memo = _plans.get((*a.signature(), env.choice()), lambda: None)
    if "plan" not in memo:
        memo["plan"] = plan_of(a)
    return memo["plan"]


def plan_of(a: Arguments) -> ExpertsPlan:
    """Check the call and plan it."""
    expect_count(a.first_expert, "first_expert", 0)
    experts_check.layer(a.x, a.gate_up, a.down, a.kind, a.gate_up_bias, a.down_bias, a.shared, a.shared_output, a.out)
    world, top_k = experts_check.routing(a.x, a.gate_up.shape[0], a.router_logits, a.top_k, a.topk_weights, a.topk_ids,
                                         a.router_bias, a.routing, a.expert_map)
    expect_count(a.num_experts, "num_experts", 0, ": 0 for unknown, or a number of experts")
    a.options.check()
    source = PLAIN[a.x.dtype]
    fmt = experts_check.activations(a.activation_format or default_activations(a.gate_up, source), source, a.gate_up)
    recipe = Recipe(source, fmt, *a.kind, a.router_logits is not None, a.routing["num_expert_group"] or 1,
                    a.gate_up_bias is not None, a.down_bias is not None, by_slot(a.gate_up),
                    a.shared is not None or a.shared_output is not None)
    sizes = Sizes(a.x.shape[0], a.x.shape[1], a.down.shape[2], a.gate_up.shape[0], top_k, max(world, a.num_experts),
                  0 if a.shared is None else a.shared[1].shape[1])
    return make(sizes, recipe, a.gate_up, a.down, detect(a.x.device), a.options, a.shared)


def experts_workspace(tokens: int, gate_up: Weights, down: Weights, *, top_k: int, num_experts: int = 0,
                      num_expert_group: int | None = None, dtype: torch.dtype = torch.bfloat16,
                      activation: str = "swiglu", activation_args: tuple[float, ...] = (), interleaved: bool = False,
                      activation_format: Format | str | None = None, bias: bool = False, shared: Shared | None = None,
                      batch_invariant: bool = False, backend: str | None = None, max_sms: int = 0,
                      device: torch.device | str | None = None) -> int:
    """Bytes of workspace that `experts` needs for `tokens` tokens of these weights; they may be on the meta device.

    num_experts: experts over all ranks (default: those of the weights). bias: whether the layer has any. `device`, if not the
    weights': where it will run. Other arguments and errors as in `experts`. A call with router logits and one with topk_ids fit.
    """
    return plan_for(tokens, gate_up, down, top_k, num_experts, num_expert_group, dtype,
                    (activation, activation_args, interleaved), activation_format, bias, shared,
                    Options(backend, batch_invariant, max_sms), device).bytes


def plan_for(tokens: int, gate_up: Weights, down: Weights, top_k: int, num_experts: int, num_expert_group: int | None,
             dtype: torch.dtype, kind: Kind, activation_format: Format | str | None,
             bias: bool, shared: Shared | None, options: Options, device: torch.device | str | None) -> ExpertsPlan:
    """The plan of a layer given by its weights (on any device) and its sizes."""
    from ..arch import get_arch

    if shared is not None:
        check_shared(shared)
    up, dn, both = as_weight(gate_up, "gate_up"), as_weight(down, "down"), as_weights(shared)
    if isinstance(up, PackedWeight) and up.pair:
        kind = (*kind[:2], up.pair == "interleaved")     # the weights know
    for name, given, least in (("tokens", tokens, 0), ("top_k", top_k, 1), ("num_experts", num_experts, 0)):
        expect_count(given, name, least)
    tokens, top_k, num_experts = (x if isinstance(x, int) else int(x) for x in (tokens, top_k, num_experts))   # NumPy's, too
    expect(dtype in PLAIN, "dtype", dtype, f"one of {steps.FLOATS}", error=TypeError)
    experts_check.weight(up, "gate_up", "[E, 2I, H]", 3)
    x = torch.empty((0, up.shape[-1]), dtype=dtype, device=up.device)
    experts_check.layer(x, up, dn, kind, None, None, both, None, None)
    source = PLAIN[dtype]
    fmt = get_format(activation_format) if activation_format is not None else default_activations(up, source)
    recipe = Recipe(source, experts_check.activations(fmt, source, up), *kind, True, num_expert_group or 1, bias, bias,
                    by_slot(up), both is not None)
    world = num_experts or up.shape[0]
    expect(top_k <= world, "top_k", top_k, f"in [1, {world}], the number of experts")
    sizes = Sizes(tokens, up.shape[-1], dn.shape[-1], up.shape[0], top_k, world, 0 if both is None else both[1].shape[1])
    arch = get_arch(device) if isinstance(device, str) and device not in ("cuda", "meta") else \
        detect(torch.device(device) if device is not None else up.device)
    return make(sizes, recipe, up, dn, arch, options, both)
