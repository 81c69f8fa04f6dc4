"""One call of `experts` on its way through the steps of its plan; and the same layer by the public steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..formats import Format, ScaledTensor
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
from .experts_plan import ExpertsPlan, Weight, by_slot, default_activations
from .gemm import gemm
from .grouped import grouped_gemm
from .quantize import quantize
from .route import combine, route, sort_by_expert
from .routed import routed_gemm


class Call:
    """One call on its way through the steps of a plan."""

    def __init__(self, plan: ExpertsPlan, x: Tensor, gate_up: Weight, down: Weight, out: Tensor,
                 shared: tuple[Weight, Weight] | None, shared_output: Tensor | None,
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

    def product(self, name: str, a: ScaledTensor, b: Weight, out: Tensor, offsets: Tensor | None = None, **more: Any) -> None:
        groups = 1 if offsets is None else b.shape[0]
        if isinstance(b, PackedWeight):
            more |= {"packed": b, "factor": b.factor, "top": b.top}
            b = ScaledTensor(b.data, b.scale, b.format)
            n = more["packed"].n
        else:
            n = b.shape[-2]
        self.run(name, Operands(a, b, out, a.shape[0], n, a.shape[-1], groups, offsets, memo=self.plan.memos[name], **more))

    def quantize(self, name: str, x: Tensor, result: ScaledTensor) -> ScaledTensor:
        rows = ScaledTensor(x, None, self.plan.recipe.source)
        self.run(name, Operands(rows, result, result.data, x.shape[0], 0, x.shape[1], out_scale=result.scale,
                                memo=self.plan.memos[name]))
        return result

    def act(self, name: str, h: Tensor, result: ScaledTensor, bias: Tensor | None, offsets: Tensor | None) -> None:
        r = self.plan.recipe
        self.run(name, ActivateOperands(h, bias, offsets, result, r.activation, r.args or OAI_ARGS, r.interleaved, "rceil",
                                        1e-4, self.plan.memos[name]))

    def layer(self, weights: Tensor, ids: Tensor, expert_map: Tensor | None, first_expert: int) -> None:
        at, memos = self.at, self.plan.memos
        row_map, offsets, inverse = at["row_map"], at["offsets"], at["inverse"]
        ids, experts = ids.contiguous(), self.gate_up.shape[0]
        if "sort" in self.plan.steps:
            self.run("sort", SortOperands(ids, expert_map, first_expert, experts, row_map, offsets, inverse, memos["sort"]))
        if self.shared is not None:
            self.dense(*self.shared)
        if self.plan.recipe.packed:
            self.packed(row_map, offsets, weights)
        else:
            if "sort gather" in self.plan.steps:
                self.run("sort gather", SortGatherOperands(
                    ids, expert_map, first_expert, experts, self.x, self.plan.sizes.top_k, row_map, offsets, inverse,
                    self.scaled("x"), "rceil", 1e-4, memos["sort gather"]))
            self.plain(row_map, offsets, inverse, weights)
        self.plan.whole = self.notes.result()

    def plain(self, row_map: Tensor, offsets: Tensor, inverse: Tensor, weights: Tensor) -> None:
        """Rows gathered, products, rows combined."""
        at, memos = self.at, self.plan.memos
        x, act = self.scaled("x"), self.scaled("act")
        if "gather" in self.plan.steps:
            self.run("gather", GatherOperands(self.x, row_map, offsets, inverse, self.plan.sizes.top_k, x, "rceil", 1e-4,
                                              memos["gather"]))
        self.product("gate_up", x, self.gate_up, at["h"], offsets)
        self.act("activate", at["h"], act, self.gate_up_bias, offsets)
        self.product("down", act, self.down, at["y"], offsets)
        self.run("combine", CombineOperands(at["y"], row_map, offsets, inverse, steps.rows_contiguous(weights),
                                            self.down_bias, self.add, self.out, memos["combine"]))

    def packed(self, row_map: Tensor, offsets: Tensor, weights: Tensor) -> None:
        """Products that take rows by slot."""
        s, h = self.plan.sizes, self.at["h"]
        x, act = (ScaledTensor(t, None, self.plan.recipe.source) for t in (self.x, h))
        slots = {"slots": row_map, "num_slots": s.rows, "positions": s.rows, "top_k": s.top_k}
        if "quantize" in self.plan.steps:
            x = self.quantize("quantize", self.x, self.scaled("x"))
        self.product("gate_up", x, self.gate_up, h, offsets, bias=self.gate_up_bias, **slots)
        if "requantize" in self.plan.steps:
            act = self.quantize("requantize", h, self.scaled("act"))
        weights = weights if weights.is_contiguous() else weights.contiguous()
        self.product("down", act, self.down, self.out, offsets, bias=self.down_bias, weight=weights, add=self.add, **slots)

    def dense(self, gate_up: Weight, down: Weight) -> None:
        at, x = self.at, ScaledTensor(self.x, None, self.plan.recipe.source)
        if "shared quantize" in self.plan.steps:
            x = self.quantize("shared quantize", self.x, self.scaled("shared.x"))
        self.product("shared gate_up", x, gate_up, at["shared.h"])
        self.act("shared activate", at["shared.h"], self.scaled("shared.act"), None, None)
        self.product("shared down", self.scaled("shared.act"), down, at["shared.y"])
        self.add = at["shared.y"]


def compose(x: Tensor, gate_up: Weight, down: Weight, *, router_logits: Tensor | None, top_k: int,
            topk_weights: Tensor | None, topk_ids: Tensor | None, routing: dict[str, Any], router_bias: Tensor | None,
            kind: tuple[str, tuple[float, ...], bool], fmt: Format | None, gate_up_bias: Tensor | None,
            down_bias: Tensor | None, shared: tuple[Weight, Weight] | None, shared_output: Tensor | None,
            expert_map: Tensor | None, first_expert: int, out: Tensor | None, backend: str | None) -> Tensor:
    """The same layer by the public steps: what torch.compile traces, and what `experts` is held against."""
    source = steps.PLAIN[x.dtype]
    fmt = fmt or default_activations(gate_up, source)
    portable = backend if backend in ("triton", "reference") else None
    name, args, interleaved = kind
    gate: dict[str, Any] = dict(activation=name, args=args, interleaved=interleaved, backend=portable)
    if router_logits is not None:
        topk_weights, topk_ids = route(router_logits, top_k, bias=router_bias, backend=portable, **routing)
    assert topk_weights is not None and topk_ids is not None
    where = sort_by_expert(topk_ids, gate_up.shape[0], expert_map=expert_map, first_expert=first_expert, backend=portable)

    def narrow(rows: Tensor) -> ScaledTensor | Tensor:
        return quantize(rows, fmt, scale_layout=steps.scale_layout_of(fmt), backend=portable) if fmt.scaled else rows

    if shared is not None:
        h = gemm(narrow(x), shared[0], out_dtype=x.dtype, backend=backend)
        shared_output = gemm(activate_op.activate(h, fmt=fmt, **gate), shared[1], out_dtype=x.dtype, backend=backend)
    if by_slot(gate_up):
        alpha, limit = args or OAI_ARGS
        slots: dict[str, Any] = {"row_map": where.row_map, "top_k": where.top_k, "backend": backend, "out_dtype": x.dtype}
        h = routed_gemm(narrow(x), gate_up, where.layout, a_div=where.top_k, bias=gate_up_bias, activation=name, alpha=alpha,
                          limit=limit, interleaved=interleaved, **slots)
        return routed_gemm(narrow(h), down, where.layout, a_div=1, bias=down_bias, routing_weight=topk_weights.contiguous(),
                           combine=True, add=shared_output, out=out, **slots)
    rows = gather_op.gather_quantize(x, where, fmt, backend=portable)
    h = grouped_gemm(rows, gate_up, where.layout, out_dtype=x.dtype, backend=backend)
    act = activate_op.activate(h, bias=gate_up_bias, layout=where.layout, fmt=fmt, **gate)
    y = grouped_gemm(act, down, where.layout, out_dtype=x.dtype, backend=backend)
    return combine(y, where, topk_weights, bias=down_bias, add=shared_output, out=out, backend=portable)
