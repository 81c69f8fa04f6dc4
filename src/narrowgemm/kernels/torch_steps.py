"""The expert layer's steps by the reference in torch, as a kernel like any other: many launches, but no read-back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arch import Arch
from ..problem import Config, Problem, Step
from .step_operands import (
    ActivateBothOperands,
    ActivateOperands,
    GatherOperands,
    RouteOperands,
    SortGatherOperands,
    SortOperands,
    StepOperands,
)

NAME = "reference.steps"
BACKEND = "reference"
BOTH = ("activate_both", "activate_both_cast", "activate_backward", "activate_backward_cast")
OPS = ("route", "sort_by_expert", "gather_quantize", "sort_gather", "activate", "combine", *BOTH)
LAUNCHES = {"route": 15, "sort_by_expert": 10, "gather_quantize": 20, "sort_gather": 30, "activate": 25, "combine": 60,
            **dict.fromkeys(BOTH, 100)}


def supports(problem: Problem, arch: Arch) -> str | None:
    return None if problem.op in OPS else f"has no {problem.op}"


def configs(problem: Problem, arch: Arch) -> list[Config]:
    return [Config(0, 0, 0, 0, 0)]


def workspace(problem: Problem, config: Config) -> int:
    return 0


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    launches = LAUNCHES.get(problem.op, 1)
    return launches * 3e-6 + 8.0 * launches * problem.m * max(problem.n, problem.k, 1) / arch.bandwidth


@torch.no_grad()
def launch(step: Step, problem: Problem, operands: StepOperands, workspace: Tensor | None) -> None:
    from ..reference import activate, route

    o = operands
    if isinstance(o, RouteOperands):
        weights, ids = route.route(o.logits, o.out.shape[1], scoring=o.scoring, renormalize=o.renormalize, bias=o.bias,
                                   num_expert_group=o.num_expert_group or None, topk_group=o.topk_group or None,
                                   scaling_factor=o.scaling_factor)
        o.weights.copy_(weights)
        o.out.copy_(ids)
    elif isinstance(o, SortOperands):
        made = route.sort_by_expert(o.ids, o.experts, expert_map=o.expert_map, first_expert=o.first_expert)
        for target, source in ((o.out, made.row_map), (o.offsets, made.offsets), (o.inverse, made.inverse)):
            target.copy_(source)
    elif isinstance(o, GatherOperands):
        routing = route.Routing(o.row_map, o.offsets, o.inverse, o.top_k)
        route.store_live(o.rows, route.gather_quantize(o.x, routing, o.rows.format, o.rounding, o.amax_clamp), o.offsets)
    elif isinstance(o, SortGatherOperands):
        made = route.sort_by_expert(o.ids, o.experts, expert_map=o.expert_map, first_expert=o.first_expert)
        for target, source in ((o.row_map, made.row_map), (o.offsets, made.offsets), (o.inverse, made.inverse)):
            target.copy_(source)
        route.store_live(o.rows, route.gather_quantize(o.x, made, o.rows.format, o.rounding, o.amax_clamp), made.offsets)
    elif isinstance(o, ActivateOperands):
        fmt = o.rows.format if o.rows.format.scaled else None
        value = activate.activate(o.h, activation=o.activation, args=o.args, interleaved=o.interleaved, bias=o.bias,
                                  offsets=o.offsets, fmt=fmt, rounding=o.rounding, amax_clamp=o.amax_clamp)
        route.store_live(o.rows, value, o.offsets)
    elif isinstance(o, ActivateBothOperands):
        _both(o, problem.op.endswith("_cast"))
    else:
        routing = route.Routing(o.row_map, o.offsets, o.inverse, o.weights.shape[1])
        o.out.copy_(route.combine(o.y, routing, o.weights, bias=o.bias, add=o.add, out_dtype=o.out.dtype))


def _both(o: ActivateBothOperands, given: bool) -> None:
    from ..reference import activate, quantize_both, route

    value = activate.activate(o.h, activation=o.activation, args=o.args) if o.dy is None else \
        activate.activate_backward(o.h, o.dy, activation=o.activation, args=o.args)
    assert isinstance(value, Tensor)
    if o.columns is None:
        route.store_live(o.rows, value, o.offsets)
        return
    quantize_both.quantize_both(value, o.rows.format, o.rows, o.columns, o.offsets, o.segments, given, o.rounding, o.amax_clamp)
    if o.amax is not None:
        quantize_both.raise_amax(o.amax, value, o.offsets)
