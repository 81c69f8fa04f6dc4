"""`experts`: the whole expert layer in one op. Tokens and router output in, combined hidden states out.

    route -> sort -> gather + quantise -> gate_up -> activate + quantise -> down -> combine

A launch a step, no read-back, every intermediate in one workspace. What is planned, and where it lies: `experts_plan.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arch import detect
from ..errors import expect
from ..formats import Format, ScaledTensor, get_format
from ..kernels.operands import Operands
from ..kernels.step_operands import ActivateOperands, CombineOperands, GatherOperands, RouteOperands, SortOperands
from ..prepack import PackedWeight
from ..reference.activate import OAI_ARGS
from ..runtime import env
from ..runtime.launch import run
from . import activate as activate_op
from . import common, experts_check, experts_packed, experts_warm, steps
from . import gather as gather_op
from .experts_plan import ExpertsPlan, Options, Recipe, Sizes, activations_for, make
from .gemm import gemm
from .grouped import grouped_gemm
from .quantize import quantize
from .route import combine, route, sort_by_expert

_plans = common.PlanCache()
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

    x: `[T, H]` BF16, FP16 or FP32; T = 0 is legal. The products, the activation and the result have its type.
    gate_up: `[E, 2I, H]`, down: `[E, H, I]`: ScaledTensors (FP8 in blocks, rows or whole; MXFP8; MXFP4), tensors of x's
        type, or `prepack`ed MXFP4 / MXFP8 weights, gate_up with its `pair`. E are the experts of this rank.
    Routing: `router_logits` `[T, E_all]` with `top_k`, `scoring`, `renormalize`, `router_bias`, `num_expert_group`,
        `topk_group`, `scaling_factor` as in `route`; or `topk_weights` fp32 and `topk_ids` int32 / int64 `[T, top_k]`.
    expert_map, first_expert: as in `sort_by_expert`: experts of other ranks are skipped, their choices count 0.
        num_experts: over all ranks, a hint for how many rows to expect; known from logits or an expert_map.
    activation, activation_args, interleaved: as `activate`'s activation, args, interleaved.
    activation_format: what x and the activation are quantised to. Default: 1x128 for block-scaled FP8 weights, row-wise for
        row- and tensor-wise ones, MXFP8 for MXFP8, x's own type for MXFP4 and unscaled weights.
    gate_up_bias `[E, 2I]` (columns as gate_up's rows), down_bias `[E, H]`: added once, before the activation and before the
        weight. shared: (gate_up `[2S, H]`, down `[H, S]`) of shared experts; shared_output `[T, H]`: their result instead.
    out: `[T, H]` to write. workspace: uint8, at least `experts_workspace(...)` bytes; allocated if None.
    batch_invariant: a token's result does not depend on the others in the call: kernels and configs are fixed.
    backend, max_sms, on_unsupported: as in `gemm`, for every step that has the choice.

    Deterministic; no host sync; may be captured in a graph after one warm-up call, and replayed with any routing. Not
    differentiable. Bit for bit the composition of the public steps (but for biases, which are added in FP32 on the way).
    Raises TypeError / ValueError before anything is launched; Unsupported where no kernel takes a step.

    Layer: Mixtral, Qwen3-MoE, DeepSeek-V3; GPT-OSS with 'swiglu_oai', interleaved and biases.
    """
    fmt = None if activation_format is None else get_format(activation_format)
    options = Options(backend, batch_invariant, max_sms, on_unsupported)
    routing = dict(scoring=scoring, renormalize=renormalize, num_expert_group=num_expert_group, topk_group=topk_group,
                   scaling_factor=scaling_factor)
    kind = (activation, activation_args, interleaved)
    if isinstance(gate_up, PackedWeight) or isinstance(down, PackedWeight):
        expect(not batch_invariant, "batch_invariant, with packed weights", True, "False")
        return experts_packed.layer(
            x, gate_up, down, router_logits=router_logits, top_k=top_k,  # type: ignore[arg-type]
            topk_weights=topk_weights, topk_ids=topk_ids, routing=routing, router_bias=router_bias, kind=kind, fmt=fmt,
            gate_up_bias=gate_up_bias, down_bias=down_bias, shared=shared, shared_output=shared_output,
            expert_map=expert_map, first_expert=first_expert, out=out, workspace=workspace, backend=backend,
            max_sms=max_sms, on_unsupported=on_unsupported)
    up, dn = plain(gate_up, "gate_up"), plain(down, "down")
    both = None if shared is None else (plain(shared[0], "shared[0]"), plain(shared[1], "shared[1]"))
    tensors = (x, router_logits, topk_weights, topk_ids, router_bias, gate_up_bias, down_bias, shared_output, expert_map, out)
    if torch.compiler.is_compiling():
        return compose(x, up, dn, router_logits=router_logits, top_k=top_k, topk_weights=topk_weights, topk_ids=topk_ids,
                       routing=routing, router_bias=router_bias, kind=kind, fmt=fmt, gate_up_bias=gate_up_bias,
                       down_bias=down_bias, shared=both, shared_output=shared_output, expert_map=expert_map,
                       first_expert=first_expert, out=out, backend=backend)
    key = (*map(steps.sign, tensors), *weight_signs(up, dn, *(both or ())), top_k, first_expert, num_experts,
           tuple(routing.values()), kind, fmt, options, env.choice())
    _, memo = steps.known(_plans, key, lambda: None)
    made: ExpertsPlan | None = memo.get("plan")
    if made is None:
        made = memo["plan"] = plan_of(x, up, dn, router_logits, top_k, topk_weights, topk_ids, router_bias, routing, kind,
                                      fmt, gate_up_bias, down_bias, both, shared_output, expert_map, num_experts, out,
                                      options)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.shape[0] == 0:
        return out
    if workspace is None:
        workspace = experts_warm.space(made, x.device)
    else:
        experts_check.workspace(workspace, made.bytes, x.device)
    outside = (*tensors[:-1], out, *[t for w in (up, dn, *(both or ())) for t in (w.data, w.scale)])
    if not experts_warm.launch(made, outside, workspace):
        call = Call(made, x, up, dn, out, both, shared_output, gate_up_bias, down_bias, workspace, outside)
        if router_logits is not None:
            topk_weights, topk_ids = call.route(router_logits, router_bias, routing)
        assert topk_weights is not None and topk_ids is not None
        call.layer(topk_weights, topk_ids, expert_map, first_expert)
    return out


def plain(w: Weights, name: str) -> ScaledTensor:
    """Weights that are not packed, as an operand. TypeError elsewhere."""
    expect(not isinstance(w, PackedWeight), name, "a PackedWeight", "a ScaledTensor or a tensor here", error=TypeError)
    return common.as_operand(w, name)  # type: ignore[arg-type]


def weight_signs(*weights: ScaledTensor) -> tuple:
    return tuple((w.format, steps.sign(w.data), steps.sign(w.scale)) for w in weights)


def plan_of(x: Tensor, gate_up: ScaledTensor, down: ScaledTensor, router_logits: Tensor | None, top_k: int,
            topk_weights: Tensor | None, topk_ids: Tensor | None, router_bias: Tensor | None, routing: dict[str, Any],
            kind: tuple[str, tuple[float, ...], bool], fmt: Format | None, gate_up_bias: Tensor | None,
            down_bias: Tensor | None, shared: tuple[ScaledTensor, ScaledTensor] | None, shared_output: Tensor | None,
            expert_map: Tensor | None, num_experts: int, out: Tensor | None, options: Options) -> ExpertsPlan:
    """Check the call and plan it."""
    experts_check.layer(x, gate_up, down, kind, gate_up_bias, down_bias, shared, shared_output, out)
    world, top_k = experts_check.routing(x, gate_up.shape[0], router_logits, top_k, topk_weights, topk_ids, router_bias,
                                         routing, expert_map)
    expect(num_experts >= 0, "num_experts", num_experts, "0 for unknown, or a number of experts")
    source = steps.PLAIN[x.dtype]
    recipe = Recipe(source, experts_check.activations(fmt or activations_for(gate_up.format, source), source, gate_up),
                    kind[0], kind[1], kind[2], router_logits is not None, routing["num_expert_group"] or 1,
                    gate_up_bias is not None, down_bias is not None)
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
    if isinstance(gate_up, PackedWeight):
        return experts_packed.pool_of(tokens, top_k, gate_up.shape[0], gate_up.shape[1] // 2, dtype).bytes
    return plan_for(tokens, gate_up, down, top_k, num_experts, num_expert_group, dtype,
                    (activation, activation_args, interleaved), activation_format, bias, shared,
                    Options(backend, batch_invariant, max_sms), device).bytes


def plan_for(tokens: int, gate_up: Weights, down: Weights, top_k: int, num_experts: int, num_expert_group: int | None,
             dtype: torch.dtype, kind: tuple[str, tuple[float, ...], bool], activation_format: Format | str | None,
             bias: bool, shared: Shared | None, options: Options, device: torch.device | str | None) -> ExpertsPlan:
    """The plan of a layer given by its weights (on any device) and its sizes."""
    from ..arch import get_arch

    up, dn = plain(gate_up, "gate_up"), plain(down, "down")
    both = None if shared is None else (plain(shared[0], "shared[0]"), plain(shared[1], "shared[1]"))
    expect(tokens >= 0, "tokens", tokens, "at least 0")
    expect(dtype in steps.PLAIN, "dtype", dtype, f"one of {steps.FLOATS}", error=TypeError)
    x = torch.empty((tokens, up.shape[-1]), dtype=dtype, device=up.device)
    experts_check.layer(x, up, dn, kind, None, None, both, None, None)
    source = steps.PLAIN[dtype]
    fmt = get_format(activation_format) if activation_format is not None else activations_for(up.format, source)
    recipe = Recipe(source, experts_check.activations(fmt, source, up), *kind, True, num_expert_group or 1, bias, bias)
    world = num_experts or up.shape[0]
    expect(1 <= top_k <= world, "top_k", top_k, f"in [1, {world}], the number of experts")
    sizes = Sizes(tokens, up.shape[2], dn.shape[2], up.shape[0], top_k, world, 0 if both is None else both[1].shape[1])
    arch = get_arch(device) if isinstance(device, str) and device not in ("cuda", "meta") else \
        detect(torch.device(device) if device is not None else up.device)
    return make(sizes, recipe, up, dn, arch, options, both)


class Call:
    """One call on its way through the steps of a plan."""

    def __init__(self, plan: ExpertsPlan, x: Tensor, gate_up: ScaledTensor, down: ScaledTensor, out: Tensor,
                 shared: tuple[ScaledTensor, ScaledTensor] | None, shared_output: Tensor | None,
                 gate_up_bias: Tensor | None, down_bias: Tensor | None, workspace: Tensor,
                 outside: tuple[Tensor | None, ...]) -> None:
        self.plan, self.gate_up, self.down, self.out = plan, gate_up, down, out
        self.x = steps.rows_contiguous(x.detach() if x.requires_grad else x)
        self.shared, self.add = shared, shared_output
        self.gate_up_bias, self.down_bias = gate_up_bias, down_bias
        space = workspace[:plan.bytes]
        bases = {d: space.view(d) for d in {b.dtype for b in plan.buffers.values()}}
        self.at = {name: b.view(bases) for name, b in plan.buffers.items()}
        start, length = plan.scratch
        self.scratch = space[start:start + length] if length else None
        self.notes = experts_warm.Notes(plan, outside, self.at, self.scratch)

    def run(self, name: str, operands: Any) -> None:
        scratch = self.scratch if self.plan.steps[name].workspace_bytes else None
        run(self.plan.steps[name], operands, scratch)
        self.notes.add(name, (scratch, *operands.tensors()))

    def scaled(self, name: str) -> ScaledTensor:
        return ScaledTensor(self.at[name], self.at.get(f"{name}.scale"), self.plan.recipe.activations)

    def route(self, logits: Tensor, bias: Tensor | None, routing: dict[str, Any]) -> tuple[Tensor, Tensor]:
        weights, ids = self.at["topk_weights"], self.at["topk_ids"]
        self.run("route", RouteOperands(logits, bias, weights, ids, routing["scoring"], routing["renormalize"],
                                        routing["num_expert_group"] or 0, routing["topk_group"] or 0,
                                        routing["scaling_factor"], self.plan.memos["route"]))
        return weights, ids

    def product(self, name: str, a: ScaledTensor, b: ScaledTensor, out: Tensor, offsets: Tensor | None = None) -> None:
        groups = 1 if offsets is None else b.shape[0]
        self.run(name, Operands(a, b, out, a.shape[0], b.shape[-2], a.shape[-1], groups, offsets,
                                memo=self.plan.memos[name]))

    def act(self, name: str, h: Tensor, result: ScaledTensor, bias: Tensor | None, offsets: Tensor | None) -> None:
        r = self.plan.recipe
        self.run(name, ActivateOperands(h, bias, offsets, result, r.activation, r.args or OAI_ARGS, r.interleaved, "rceil",
                                        1e-4, self.plan.memos[name]))

    def layer(self, weights: Tensor, ids: Tensor, expert_map: Tensor | None, first_expert: int) -> None:
        at, memos = self.at, self.plan.memos
        row_map, offsets, inverse = at["row_map"], at["offsets"], at["inverse"]
        self.run("sort", SortOperands(ids.contiguous(), expert_map, first_expert, self.gate_up.shape[0], row_map, offsets,
                                      inverse, memos["sort"]))
        if self.shared is not None:
            self.dense(*self.shared)
        x, act = self.scaled("x"), self.scaled("act")
        self.run("gather", GatherOperands(self.x, row_map, offsets, inverse, self.plan.sizes.top_k, x, "rceil", 1e-4,
                                          memos["gather"]))
        self.product("gate_up", x, self.gate_up, at["h"], offsets)
        self.act("activate", at["h"], act, self.gate_up_bias, offsets)
        self.product("down", act, self.down, at["y"], offsets)
        self.run("combine", CombineOperands(at["y"], row_map, offsets, inverse, steps.rows_contiguous(weights),
                                            self.down_bias, self.add, self.out, memos["combine"]))
        self.plan.notes = self.notes.result()

    def dense(self, gate_up: ScaledTensor, down: ScaledTensor) -> None:
        at, x = self.at, ScaledTensor(self.x, None, self.plan.recipe.source)
        if "shared quantize" in self.plan.steps:
            narrow = self.scaled("shared.x")
            self.run("shared quantize", Operands(x, narrow, narrow.data, x.shape[0], 0, x.shape[1], out_scale=narrow.scale,
                                                memo=self.plan.memos["shared quantize"]))
            x = narrow
        self.product("shared gate_up", x, gate_up, at["shared.h"])
        self.act("shared activate", at["shared.h"], self.scaled("shared.act"), None, None)
        self.product("shared down", self.scaled("shared.act"), down, at["shared.y"])
        self.add = at["shared.y"]


def compose(x: Tensor, gate_up: ScaledTensor, down: ScaledTensor, *, router_logits: Tensor | None, top_k: int,
            topk_weights: Tensor | None, topk_ids: Tensor | None, routing: dict[str, Any], router_bias: Tensor | None,
            kind: tuple[str, tuple[float, ...], bool], fmt: Format | None, gate_up_bias: Tensor | None,
            down_bias: Tensor | None, shared: tuple[ScaledTensor, ScaledTensor] | None, shared_output: Tensor | None,
            expert_map: Tensor | None, first_expert: int, out: Tensor | None, backend: str | None) -> Tensor:
    """The same layer by the public steps: what torch.compile traces, and what `experts` is held against."""
    source = steps.PLAIN[x.dtype]
    fmt = fmt or activations_for(gate_up.format, source)
    portable = backend if backend in ("triton", "reference") else None
    name, args, interleaved = kind
    gate: dict[str, Any] = dict(activation=name, args=args, interleaved=interleaved, backend=portable)
    if router_logits is not None:
        topk_weights, topk_ids = route(router_logits, top_k, bias=router_bias, backend=portable, **routing)
    assert topk_weights is not None and topk_ids is not None
    where = sort_by_expert(topk_ids, gate_up.shape[0], expert_map=expert_map, first_expert=first_expert, backend=portable)
    if shared is not None:
        narrow: ScaledTensor | Tensor = x
        if fmt.scaled:
            narrow = quantize(x, fmt, scale_layout=steps.scale_layout_of(fmt), backend=portable)
        h = gemm(narrow, shared[0], out_dtype=x.dtype, backend=backend)
        shared_output = gemm(activate_op.activate(h, fmt=fmt, **gate), shared[1], out_dtype=x.dtype, backend=backend)
    rows = gather_op.gather_quantize(x, where, fmt, backend=portable)
    h = grouped_gemm(rows, gate_up, where.layout, out_dtype=x.dtype, backend=backend)
    act = activate_op.activate(h, bias=gate_up_bias, layout=where.layout, fmt=fmt, **gate)
    y = grouped_gemm(act, down, where.layout, out_dtype=x.dtype, backend=backend)
    return combine(y, where, topk_weights, bias=down_bias, add=shared_output, out=out, backend=portable)
