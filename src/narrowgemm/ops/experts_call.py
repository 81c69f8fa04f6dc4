"""One call of `experts` on its way through the steps of its plan; and the same layer by the public steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..formats import PLAIN, ScaledTensor
from ..kernels.operands import Operands
from ..kernels.step_operands import (
    ActivateOperands,
    CombineOperands,
    GatherOperands,
    RouteOperands,
    SortGatherOperands,
    SortOperands,
)
from ..prepack import PackedWeight
from ..reference.activate import OAI_ARGS
from ..runtime.launch import run
from . import activate as activate_op
from . import experts_warm, steps
from . import gather as gather_op
from .experts_arguments import Arguments
from .experts_plan import ExpertsPlan, Weight, by_slot, default_activations
from .gemm import gemm
from .grouped import grouped_gemm
from .quantize import quantize
from .route import combine, route, sort_by_expert
from .routed import routed_gemm


class Call:
    """One call on its way through the steps of a plan."""

    def __init__(self, plan: ExpertsPlan, given: Arguments, out: Tensor, workspace: Tensor, outside: tuple[Tensor | None, ...]
                 ) -> None:
        """outside: the tensors of later calls of this signature, in their order (`experts_warm`)."""
        self.plan, self.given, self.out, self.add = plan, given, out, given.shared_output
        self.x = steps.rows_contiguous(given.x.detach() if given.x.requires_grad else given.x)
        space = workspace[:plan.bytes]
        bases = {d: space.view(d) for d in {b.dtype for b in plan.buffers.values()}}
        self.at = {name: b.view(bases) for name, b in plan.buffers.items()}
        start, length = plan.scratch
        self.scratch = space[start:start + length] if length else None
        self.notes = experts_warm.Notes(plan, outside, self.at, self.scratch)

    def run(self) -> None:
        """Every step of the plan."""
        g = self.given
        weights, ids = g.topk_weights, g.topk_ids
        if g.router_logits is not None:
            weights, ids = self.route(g.router_logits)
        assert weights is not None and ids is not None
        self.layer(weights, ids)

    def step(self, name: str, operands: Any) -> None:
        scratch = self.scratch if self.plan.steps[name].workspace_bytes else None
        run(self.plan.steps[name], operands, scratch)
        self.notes.add(name, (scratch, *operands.tensors()))

    def scaled(self, name: str) -> ScaledTensor:
        return ScaledTensor(self.at[name], self.at.get(f"{name}.scale"), self.plan.recipe.activations)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.at["topk_weights"], self.at["topk_ids"]
        routing = self.given.routing
        self.step("route", RouteOperands(logits, self.given.router_bias, weights, ids, routing["scoring"],
                                         routing["renormalize"], routing["num_expert_group"] or 0, routing["topk_group"] or 0,
                                         routing["scaling_factor"], self.plan.memos["route"]))
        return weights, ids

    def product(self, name: str, a: ScaledTensor, b: Weight, out: Tensor, offsets: Tensor | None = None, **more: Any) -> None:
        groups = 1 if offsets is None else b.shape[0]
        if isinstance(b, PackedWeight):
            more |= {"packed": b, "factor": b.factor, "top": b.top}
            b = ScaledTensor(b.data, b.scale, b.format)
            n = more["packed"].n
        else:
            n = b.shape[-2]
        self.step(name, Operands(a, b, out, a.shape[0], n, a.shape[-1], groups, offsets, memo=self.plan.memos[name], **more))

    def quantize(self, name: str, x: Tensor, result: ScaledTensor) -> ScaledTensor:
        rows = ScaledTensor(x, None, self.plan.recipe.source)
        self.step(name, Operands(rows, result, result.data, x.shape[0], 0, x.shape[1], out_scale=result.scale,
                                 memo=self.plan.memos[name]))
        return result

    def act(self, name: str, h: Tensor, result: ScaledTensor, bias: Tensor | None, offsets: Tensor | None) -> None:
        r = self.plan.recipe
        self.step(name, ActivateOperands(h, bias, offsets, result, r.activation, r.args or OAI_ARGS, r.interleaved, "rceil",
                                         1e-4, self.plan.memos[name]))

    def layer(self, weights: Tensor, ids: Tensor) -> None:
        at, memos, g = self.at, self.plan.memos, self.given
        row_map, offsets, inverse = at["row_map"], at["offsets"], at["inverse"]
        ids, experts = ids.contiguous(), g.gate_up.shape[0]
        if "sort" in self.plan.steps:
            self.step("sort", SortOperands(ids, g.expert_map, g.first_expert, experts, row_map, offsets, inverse, memos["sort"]))
        if g.shared is not None:
            self.dense(*g.shared)
        if self.plan.recipe.packed:
            self.packed(row_map, offsets, weights)
        else:
            if "sort gather" in self.plan.steps:
                self.step("sort gather", SortGatherOperands(
                    ids, g.expert_map, g.first_expert, experts, self.x, self.plan.sizes.top_k, row_map, offsets, inverse,
                    self.scaled("x"), "rceil", 1e-4, memos["sort gather"]))
            self.plain(row_map, offsets, inverse, weights)
        self.plan.whole = self.notes.result()

    def plain(self, row_map: Tensor, offsets: Tensor, inverse: Tensor, weights: Tensor) -> None:
        """Rows gathered, products, rows combined."""
        at, memos = self.at, self.plan.memos
        x, act = self.scaled("x"), self.scaled("act")
        if "gather" in self.plan.steps:
            self.step("gather", GatherOperands(self.x, row_map, offsets, inverse, self.plan.sizes.top_k, x, "rceil", 1e-4,
                                               memos["gather"]))
        if "activate" in self.plan.steps:
            self.product("gate_up", x, self.given.gate_up, at["h"], offsets)
            self.act("activate", at["h"], act, self.given.gate_up_bias, offsets)
        else:
            self.product("gate_up", x, self.given.gate_up, act.data, offsets, out_scale=act.scale)
        self.product("down", act, self.given.down, at["y"], offsets)
        self.step("combine", CombineOperands(at["y"], row_map, offsets, inverse, steps.rows_contiguous(weights),
                                             self.given.down_bias, self.add, self.out, memos["combine"]))

    def packed(self, row_map: Tensor, offsets: Tensor, weights: Tensor) -> None:
        """Products that take rows by slot."""
        s, h, g = self.plan.sizes, self.at["h"], self.given
        x, act = (ScaledTensor(t, None, self.plan.recipe.source) for t in (self.x, h))
        slots = {"slots": row_map, "num_slots": s.rows, "positions": s.rows, "top_k": s.top_k}
        if "quantize" in self.plan.steps:
            x = self.quantize("quantize", self.x, self.scaled("x"))
        self.product("gate_up", x, g.gate_up, h, offsets, bias=g.gate_up_bias, **slots)
        if "requantize" in self.plan.steps:
            act = self.quantize("requantize", h, self.scaled("act"))
        weights = weights if weights.is_contiguous() else weights.contiguous()
        self.product("down", act, g.down, self.out, offsets, bias=g.down_bias, weight=weights, add=self.add, **slots)

    def dense(self, gate_up: Weight, down: Weight) -> None:
        at, x = self.at, ScaledTensor(self.x, None, self.plan.recipe.source)
        if "shared quantize" in self.plan.steps:
            x = self.quantize("shared quantize", self.x, self.scaled("shared.x"))
        self.product("shared gate_up", x, gate_up, at["shared.h"])
        self.act("shared activate", at["shared.h"], self.scaled("shared.act"), None, None)
        self.product("shared down", self.scaled("shared.act"), down, at["shared.y"])
        self.add = at["shared.y"]


def compose(g: Arguments) -> Tensor:
    """The same layer by the public steps: what torch.compile traces, and what `experts` is held against."""
    x, gate_up, down, backend = g.x, g.gate_up, g.down, g.options.backend
    topk_weights, topk_ids, shared_output = g.topk_weights, g.topk_ids, g.shared_output
    source = PLAIN[x.dtype]
    fmt = g.activation_format or default_activations(gate_up, source)
    portable = backend if backend in ("triton", "reference") else None
    name, args, interleaved = g.kind
    gate: dict[str, Any] = dict(activation=name, args=args, interleaved=interleaved, backend=portable)
    if g.router_logits is not None:
        topk_weights, topk_ids = route(g.router_logits, g.top_k, bias=g.router_bias, backend=portable, **g.routing)
    assert topk_weights is not None and topk_ids is not None
    where = sort_by_expert(topk_ids, gate_up.shape[0], expert_map=g.expert_map, first_expert=g.first_expert, backend=portable)

    def narrow(rows: Tensor) -> ScaledTensor | Tensor:
        return quantize(rows, fmt, scale_layout=steps.scale_layout_of(fmt), backend=portable) if fmt.scaled else rows

    if g.shared is not None:
        h = gemm(narrow(x), g.shared[0], out_dtype=x.dtype, backend=backend)
        shared_output = gemm(activate_op.activate(h, fmt=fmt, **gate), g.shared[1], out_dtype=x.dtype, backend=backend)
    if by_slot(gate_up):
        alpha, limit = args or OAI_ARGS
        slots: dict[str, Any] = {"row_map": where.row_map, "top_k": where.top_k, "backend": backend, "out_dtype": x.dtype}
        h = routed_gemm(narrow(x), gate_up, where.layout, a_div=where.top_k, bias=g.gate_up_bias, activation=name, alpha=alpha,
                          limit=limit, interleaved=interleaved, **slots)
        return routed_gemm(narrow(h), down, where.layout, a_div=1, bias=g.down_bias, routing_weight=topk_weights.contiguous(),
                           combine=True, add=shared_output, out=g.out, **slots)
    rows = gather_op.gather_quantize(x, where, fmt, backend=portable)
    h = grouped_gemm(rows, gate_up, where.layout, out_dtype=x.dtype, backend=backend)
    act = activate_op.activate(h, bias=g.gate_up_bias, layout=where.layout, fmt=fmt, **gate)
    y = grouped_gemm(act, down, where.layout, out_dtype=x.dtype, backend=backend)
    return combine(y, where, topk_weights, bias=g.down_bias, add=shared_output, out=g.out, backend=portable)
