"""One expert block, step by step: in FP8 by narrowgemm, in BF16 by torch, both against the same layer in FP32.

Shapes: T tokens, R = T * top_k routed rows, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..formats import FP8_1x128, ScaledTensor
from ..integrations.checkpoints import MoELayer
from ..ops import grouped
from ..ops.activate import activate as activate_op
from ..ops.experts import experts as experts_op
from ..ops.experts import plan_for
from ..ops.experts_plan import Options, arranged_apart
from ..ops.gather import gather_quantize
from ..ops.route import Routing, combine, gather, route, sort_by_expert
from ..ops.steps import select
from ..problem import Plan
from ..reference.activate import activate as reference_activate
from ..reference.float32 import full_float32
from ..runtime.dispatch import by_reason
from ..testing.numerics import GateResult, calc_diff, check_gates
from ..testing.timers import GraphTimer, WallTimer, ceilings

T = TypeVar("T")
Timer = GraphTimer | WallTimer


@dataclass(frozen=True, slots=True)
class Roof:
    """What the device does at best: FLOP/s of the FP8 and the BF16 path, bytes/s; `source` says where that is from."""

    fp8_flops: float
    bf16_flops: float
    bandwidth: float
    source: str

    def seconds(self, flops: float, nbytes: float, fp8: bool) -> float:
        return max(flops / (self.fp8_flops if fp8 else self.bf16_flops), nbytes / self.bandwidth)


@dataclass(slots=True)
class Step:
    """One step as it ran. `nbytes`: each input read once, each output written once. `error`: calc_diff of its result
    against the FP32 layer's at the same point, None where the step makes no numbers. Of the plan: `predicted_us`, `reason`,
    and `why`, which also says why every other kernel was passed over."""

    name: str
    run: Callable[[], object]
    flops: float
    nbytes: float
    roof_us: float
    us: float = 0.0
    error: float | None = None
    kernel: str = "torch"
    reason: str = ""
    why: str = ""
    predicted_us: float | None = None

    @property
    def tflops(self) -> float:
        return self.flops / self.us * 1e-6

    @property
    def gbs(self) -> float:
        return self.nbytes / self.us * 1e-3

    @property
    def of_roof(self) -> float:
        return self.roof_us / self.us

    def to_dict(self) -> dict[str, Any]:
        names = ("name", "us", "tflops", "gbs", "of_roof", "roof_us", "flops", "nbytes", "error", "kernel", "why",
                 "predicted_us")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Block:
    fp8: list[Step]
    bf16: list[Step]
    gates: dict[str, GateResult]
    active_experts: int
    same_bits: bool      # the op in one call, and its steps one by one


class Steps:
    """Runs steps in order, each once for its result, and keeps them to be timed."""

    def __init__(self, roof: Roof, fp8: bool, on_step: Callable[[str], None]) -> None:
        self.roof, self.fp8, self.on_step = roof, fp8, on_step
        self.done: list[Step] = []

    def __call__(self, name: str, fn: Callable[[], T], nbytes: float, flops: float = 0.0, **facts: Any) -> T:
        self.on_step(f"{'FP8' if self.fp8 else 'BF16'} {name}")
        self.done.append(Step(name, fn, flops, nbytes, self.roof.seconds(flops, nbytes, self.fp8) * 1e6, **facts))
        return fn()


def run_block(layer: MoELayer, x: Tensor, *, top_k: int, activation: str, timer: Timer, roof: Roof,
              on_step: Callable[[str], None] = lambda name: None) -> Block:
    """`x`: bf16 `[T, H]` on the layer's device. Routes over the loaded experts. Reads group sizes on the host."""
    assert layer.router is not None
    t, hidden, inter, experts = x.shape[0], layer.hidden, layer.inter, len(layer.experts)
    r = t * top_k
    router = layer.router[layer.experts.start:layer.experts.stop].float()
    options = dict(layer.routing)
    if experts < layer.num_experts:  # groups of experts mean nothing in a part of them
        options |= {"num_expert_group": None, "topk_group": None}
    bias = None if layer.router_bias is None else layer.router_bias[layer.experts.start:layer.experts.stop]

    plan = plan_for(t, layer.gate_up, layer.down, top_k, experts, options.get("num_expert_group"), x.dtype,
                    (activation, (), False), FP8_1x128, False, None, Options(), x.device)
    plans = arranged_apart(plan.sizes, plan.recipe.source, FP8_1x128, lambda p: select(p, x.device, None, None)) | plan.steps
    space = torch.empty(plan.bytes, dtype=torch.uint8, device=x.device)
    fp8 = Steps(roof, True, on_step)

    def logits() -> Tensor:
        return x.float() @ router.T

    def step(name: str, fn: Callable[[], T], nbytes: float, flops: float = 0.0) -> T:
        return fp8(name, fn, nbytes, flops, **_choice(plans["activate" if name == "swiglu" else name]))

    weights, ids = step("route", lambda: route(logits(), top_k, bias=bias, **options), x.nbytes + router.nbytes + 8 * r,
                        2.0 * t * hidden * experts)
    routing = step("sort", lambda: sort_by_expert(ids, experts), 4 * r * 3 + 8 * experts)
    slices = [slice(a, b) for a, b in pairwise(routing.offsets.tolist())]
    active = sum(s.stop > s.start for s in slices)

    def traffic(w: ScaledTensor) -> float:
        return active * w.format.storage_bytes(*w.shape[1:])

    def product(name: str, a: ScaledTensor, w: ScaledTensor) -> Tensor:
        _, n, k = w.shape
        return step(name, lambda: grouped.grouped_gemm(a, w, routing.layout),
                    FP8_1x128.storage_bytes(r, k) + traffic(w) + 2 * r * n, 2.0 * r * n * k)

    xq = step("gather", lambda: gather_quantize(x, routing, FP8_1x128), x.nbytes + FP8_1x128.storage_bytes(r, hidden))
    h = product("gate_up", xq, layer.gate_up)
    aq = step("swiglu", lambda: activate_op(h, activation=activation, layout=routing.layout, fmt=FP8_1x128),
              h.nbytes + FP8_1x128.storage_bytes(r, inter))
    y = product("down", aq, layer.down)
    out = step("combine", lambda: combine(y, routing, weights), 2 * r * hidden + 2 * t * hidden)
    whole = fp8("experts", lambda: experts_op(x, layer.gate_up, layer.down, router_logits=logits(), top_k=top_k,
                                              router_bias=bias, activation=activation, workspace=space, **options),
                traffic(layer.gate_up) + traffic(layer.down) + 2 * x.nbytes, 2.0 * r * 3 * hidden * inter,
                kernel="all of the above", predicted_us=plan.predicted_us)

    on_step("FP32 reference")
    rows, act = gather(x, routing), activate_op(h, activation=activation, layout=routing.layout)
    ref = _reference(layer, rows, routing, weights, slices, activation, {"gate_up": (xq, rows), "down": (aq, act)})
    made: dict[str, Tensor | ScaledTensor] = {"gather": xq, "gate_up": h, "swiglu": aq, "down": y, "combine": out,
                                              "experts": whole}
    _errors(fp8.done, made, ref.layer)
    gates = {name: check_gates(result, ref.same_bits[name], ref.unquantised[name], FP8_1x128, w.format, rows=slices,
                               k=w.shape[-1])
             for name, result, w in (("gate_up", h, layer.gate_up), ("down", y, layer.down))}
    bf16 = _bf16(layer, x, routing, weights, activation, ref.layer, Steps(roof, False, on_step), active)
    _measure(fp8.done, bf16, timer, on_step)
    return Block(fp8.done, bf16, gates, active, torch.equal(whole.view(torch.int16), out.view(torch.int16)))


def _measure(fp8: list[Step], bf16: list[Step], timer: Timer, on_step: Callable[[str], None]) -> None:
    """Time the steps, FP8 and BF16 in turn where both have one."""
    twins = {step.name: step for step in bf16}
    for step in fp8:
        on_step(f"time {step.name}")
        pair = [step, twins[step.name]] if step.name in twins else [step]
        times = timer.measure({str(i): s.run for i, s in enumerate(pair)})
        for i, s in enumerate(pair):
            s.us = max(times[str(i)].us, 1e-3)  # a graph of very short launches can measure as nothing


def swiglu(h: Tensor, activation: str) -> Tensor:
    """Its definition in torch: what an unquantised layer runs."""
    y = reference_activate(h, activation=activation)
    assert isinstance(y, Tensor)
    return y


@dataclass(frozen=True, slots=True)
class _Reference:
    layer: dict[str, Tensor]         # the FP32 layer's value at each step
    same_bits: dict[str, Tensor]     # each product in FP32 over the operands that the kernel had
    unquantised: dict[str, Tensor]   # and over its activations before they were quantised


def _reference(layer: MoELayer, x: Tensor, routing: Routing, weights: Tensor, slices: list[slice], activation: str,
               same: dict[str, tuple[ScaledTensor, Tensor]]) -> _Reference:
    """Expert by expert, so that one expert's weights at a time are held in FP32. `x`: gathered rows `[R, H]`."""
    values: dict[str, Tensor] = {"gather": x.float()}
    bits: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, w, source in (("gate_up", layer.gate_up, "gather"), ("down", layer.down, "swiglu")):
        quantised, before = same[name]
        sides = (values[source], quantised.dequantize(), before.float())
        outs = [torch.zeros(s.shape[0], w.shape[1], device=x.device) for s in sides]
        for e, rows in enumerate(slices):
            if rows.stop > rows.start:
                weight = w[e].dequantize().mT
                with full_float32():
                    for side, result in zip(sides, outs):
                        torch.mm(side[rows], weight, out=result[rows])
        values[name], bits[name], plain[name] = outs
        if name == "gate_up":
            values["swiglu"] = swiglu(values[name], activation)
    values["combine"] = values["experts"] = combine(values["down"], routing, weights)
    return _Reference(values, bits, plain)


def _bf16(layer: MoELayer, x: Tensor, routing: Routing, weights: Tensor, activation: str, ref: dict[str, Tensor],
          steps: Steps, active: int) -> list[Step]:
    """The same layer with its weights expanded to BF16 and torch's grouped product."""
    hidden, inter = layer.hidden, layer.inter
    r = routing.row_map.numel()
    ends = routing.offsets[1:].to(torch.int32)

    def product(name: str, a: Tensor, narrow: ScaledTensor) -> Tensor:
        e, n, k = narrow.shape
        w = torch.empty(e, n, k, dtype=torch.bfloat16, device=a.device)
        for i in range(e):
            w[i] = narrow[i].dequantize()
        return steps(name, lambda: torch.nn.functional.grouped_mm(a, w.mT, offs=ends),
                     2 * (r * k + active * n * k + r * n), 2.0 * r * n * k, kernel="torch.grouped_mm")

    rows = steps("gather", lambda: gather(x, routing), 2 * (x.numel() + r * hidden))
    h = product("gate_up", rows, layer.gate_up)
    act = steps("swiglu", lambda: swiglu(h, activation), 2 * r * 3 * inter)
    y = product("down", act, layer.down)
    out = steps("combine", lambda: combine(y, routing, weights), 2 * r * hidden + 2 * x.numel())
    _errors(steps.done, {"gather": rows, "gate_up": h, "swiglu": act, "down": y, "combine": out}, ref)
    return steps.done


def _errors(steps: list[Step], made: dict[str, Any], ref: dict[str, Tensor]) -> None:
    for step in steps:
        if (value := made.get(step.name)) is not None:
            value = value.dequantize() if isinstance(value, ScaledTensor) else value.float()
            step.error = calc_diff(value, ref[step.name])


def _choice(plan: Plan | None) -> dict[str, Any]:
    """What a step says about the kernel it ran on."""
    if plan is None:
        return {"kernel": "", "reason": "nothing to compute", "why": "nothing to compute"}
    kernel = plan.kernel if plan.backend == "reference" else f"{plan.kernel} [{plan.config}]"
    why = f"{plan.reason}; not {'; '.join(by_reason(plan.passed_over))}" if plan.passed_over else plan.reason
    return {"kernel": kernel, "reason": plan.reason, "why": why, "predicted_us": plan.predicted_us}


def roof_of(device: torch.device, timer: Timer) -> Roof:
    """Ceilings of the device, measured here and now."""
    best, source = ceilings(device, timer), "measured just now with torch's own products"
    bf16, read = best["flops_16"] * 1e12, best["read_gbs"] * 1e9
    if device.type == "cuda":
        return Roof(best.get("flops_8", best["flops_16"]) * 1e12, bf16, read, source)
    a = torch.ones(512, 512)
    us = timer.measure({"fp32": lambda: a @ a})["fp32"].us
    return Roof(2e6 * 512**3 / us, bf16, read, f"{source}; FP8 runs as FP32 on a CPU")
