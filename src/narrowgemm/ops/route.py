"""Routing: scores to experts, slots sorted by expert, rows gathered, results summed back to tokens.

    weights, ids = route(logits, top_k)
    routing = sort_by_expert(ids, num_experts)
    y = grouped_gemm(gather(x, routing), w, routing.layout)
    out = combine(y, routing, weights)

On the device with no read-back: all of it can be captured and compiled, and zero tokens are legal. Same inputs, same
bits. Every `torch.Tensor` argument must be on one device.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from ..errors import expect, expect_count
from ..formats import PLAIN, ScaledTensor
from ..kernels.step_operands import CombineOperands, RouteOperands, SortOperands
from ..layouts import INT, Routed, check_index
from ..problem import Config, Plan
from ..reference import route as reference
from ..reference.route import Routing
from ..rows import check_rows
from ..runtime import env
from ..runtime.launch import run
from . import steps
from .common import check_flags
from .plan_cache import PlanCache
from .steps import FLOATS

__all__ = ["Routing", "combine", "gather", "moe_align_block_size", "route", "sort_by_expert"]

SCORINGS = ("softmax", "sigmoid")
_plans = PlanCache()


def route(logits: Tensor, top_k: int, *, scoring: str = "softmax", renormalize: bool = True, bias: Tensor | None = None,
          num_expert_group: int | None = None, topk_group: int | None = None, scaling_factor: float = 1.0,
          out: tuple[Tensor, Tensor] | None = None, backend: str | None = None,
          config: Config | None = None) -> tuple[Tensor, Tensor]:
    """The `top_k` experts of each token: `(topk_weights fp32 [T, top_k], topk_ids int32 [T, top_k])`, best first.

    `scoring`: scores are the fp32 'softmax' or 'sigmoid' of `logits` `[T, E]`. Experts are chosen by score + `bias` (`[E]`: a
    correction that never enters the weights), the lower id first among equals. With `num_expert_group` groups of
    neighbouring experts only those of the `topk_group` best groups are eligible; a group counts as its best expert,
    with a bias as its two best together. Weights are the chosen scores, divided by their sum if `renormalize`, times
    `scaling_factor`. Ids are distinct and in range even for NaN logits.

    Definitions: Mixtral and Qwen3-MoE (softmax, renormalised), DeepSeek-V2 (groups), DeepSeek-V3 (sigmoid, bias,
    groups). GPT-OSS's softmax over the chosen logits is the renormalised softmax here.
    out: (topk_weights, topk_ids) to write. backend, config: as in `gemm`. Differentiable in the logits where they require
    it: then, and under torch.compile, the definition in torch runs.
    Raises ValueError for shapes and numbers that don't fit, TypeError for dtypes.
    """
    if steps.wants_definition(logits, bias):
        check(logits, top_k, scoring, bias, num_expert_group, topk_group, renormalize, scaling_factor)
        made = reference.route(logits, top_k, scoring=scoring, renormalize=renormalize, bias=bias,
                               num_expert_group=num_expert_group, topk_group=topk_group, scaling_factor=scaling_factor)
        return made if out is None else (out[0].copy_(made[0]), out[1].copy_(made[1]))
    key = ("route", steps.sign(logits), steps.sign(bias), top_k, scoring, renormalize, num_expert_group, topk_group,
           scaling_factor, backend, config, env.choice(), *map(steps.sign, out or ()))
    plan, memo = _plans.get(key, lambda: _plan_route(logits, top_k, scoring, bias, num_expert_group, topk_group, renormalize,
                                                     scaling_factor, out, backend, config))
    if out is None:
        shape = (logits.shape[0], top_k)
        out = (torch.empty(shape, dtype=torch.float32, device=logits.device),
               torch.empty(shape, dtype=torch.int32, device=logits.device))
    if plan is not None:
        run(plan, RouteOperands(logits, bias, out[0], out[1], scoring, renormalize, num_expert_group or 0,
                                topk_group or 0, scaling_factor, memo))
    return out


def check(logits: Tensor, top_k: int, scoring: str, bias: Tensor | None, num_expert_group: int | None, topk_group: int | None,
          renormalize: bool, scaling_factor: float) -> None:
    _float(logits, "logits", 2)
    experts = logits.shape[1]
    for name, given in (("top_k", top_k), ("num_expert_group", num_expert_group), ("topk_group", topk_group)):
        if given is not None or name == "top_k":
            expect_count(given, name)
    expect(1 <= top_k <= experts, "top_k", top_k, f"in [1, {experts}], the number of experts")
    expect(scoring in SCORINGS, "scoring", repr(scoring), f"one of {SCORINGS}")
    check_flags(renormalize=renormalize)
    number = isinstance(scaling_factor, (int, float))
    expect(number, "scaling_factor", type(scaling_factor).__name__, "a number, 1.0 for none", error=TypeError)
    if bias is not None:
        _float(bias, "bias", 1)
        expect(bias.numel() == experts, "bias, length", bias.numel(), f"the number of experts, {experts}")
        _same_device("bias", bias, logits)
    if num_expert_group is None or topk_group is None:
        expect(num_expert_group is topk_group, "num_expert_group and topk_group", (num_expert_group, topk_group),
               "both or none")
    else:
        expect(num_expert_group >= 1 and experts % num_expert_group == 0, "num_expert_group", num_expert_group,
               f"a divisor of the number of experts, {experts}")
        expect(1 <= topk_group <= num_expert_group, "topk_group", topk_group, f"in [1, {num_expert_group}]")
        eligible = topk_group * (experts // num_expert_group)
        expect(top_k <= eligible, "top_k", top_k, f"at most {eligible}, the experts in {topk_group} groups")


def _plan_route(logits: Tensor, top_k: int, scoring: str, bias: Tensor | None, num_expert_group: int | None,
                topk_group: int | None, renormalize: bool, scaling_factor: float, out: tuple[Tensor, Tensor] | None,
                backend: str | None, config: Config | None) -> Plan | None:
    check(logits, top_k, scoring, bias, num_expert_group, topk_group, renormalize, scaling_factor)
    tokens = logits.shape[0]
    if out is not None:
        for x, name, dtype in ((out[0], "out, topk_weights", torch.float32), (out[1], "out, topk_ids", torch.int32)):
            steps.check_like(x, name, (tokens, top_k), dtype, logits.device)
    if tokens == 0:
        return None
    problem = steps.route_problem(tokens, logits.shape[1], top_k, num_expert_group or 1, PLAIN[logits.dtype])
    return steps.select(problem, logits.device, backend, config)


def sort_by_expert(topk_ids: Tensor, num_experts: int, *, expert_map: Tensor | None = None, first_expert: int = 0,
                   out: Routing | None = None, workspace: Tensor | None = None, backend: str | None = None,
                   config: Config | None = None) -> Routing:
    """The slots of `topk_ids` (int32 or int64 `[T, top_k]`) sorted by expert, stably: see `Routing`.

    Slots with an id outside [0, num_experts) are skipped: they come last and belong to no expert. `expert_map`, int32
    or int64 `[E_all]`, first maps ids of all experts to ids on this rank; ids outside it, and those that it maps
    outside [0, num_experts), are skipped. `first_expert` is the id (after the map) of the first expert on this rank, for
    ranks that hold a range: it is subtracted. out: a Routing to write. workspace, backend, config: as in `gemm`.
    Raises ValueError or TypeError for shapes and dtypes that don't fit.
    """
    if steps.wants_definition(topk_ids):
        _ids(topk_ids, num_experts, expert_map, first_expert)
        return reference.sort_by_expert(topk_ids, num_experts, expert_map=expert_map, first_expert=first_expert)
    if out is not None:
        steps.check_routing(out)
    key = ("sort", steps.sign(topk_ids), num_experts, steps.sign(expert_map), first_expert,
           *(() if out is None else (steps.sign(out.row_map), *steps.like(out))), backend, config, env.choice())
    plan, memo = _plans.get(key, lambda: plan_sort(topk_ids, num_experts, expert_map, backend, config, first_expert, out))
    if out is None:
        slots, device = topk_ids.numel(), topk_ids.device
        out = Routing(torch.empty(slots, dtype=torch.int32, device=device),
                      torch.empty(num_experts + 1, dtype=torch.int64, device=device),
                      torch.empty(slots, dtype=torch.int32, device=device), topk_ids.shape[1])
    assert plan is not None
    run(plan, SortOperands(topk_ids.contiguous(), expert_map, first_expert, num_experts, out.row_map, out.offsets,
                           out.inverse, memo), workspace)
    return out


def plan_sort(topk_ids: Tensor, num_experts: int, expert_map: Tensor | None, backend: str | None,
              config: Config | None, first_expert: int = 0, out: Routing | None = None) -> Plan:
    """Check the call and select its Plan."""
    _ids(topk_ids, num_experts, expert_map, first_expert)
    if out is not None:
        steps.check_tensors_of(out)
        _same_device("out", out.row_map, topk_ids)
        given, want = (out.row_map.numel(), out.top_k, out.num_experts), (topk_ids.numel(), topk_ids.shape[1], num_experts)
        expect(given == want, "out, slots, top_k, experts", given, str(want))
    return steps.select(steps.sort_problem(topk_ids.numel(), num_experts), topk_ids.device, backend, config)


@overload
def gather(x: Tensor, routing: Routing) -> Tensor: ...
@overload
def gather(x: ScaledTensor, routing: Routing) -> ScaledTensor: ...
def gather(x: Tensor | ScaledTensor, routing: Routing) -> Tensor | ScaledTensor:
    """Token rows `x` `[T, K]` as sorted rows `[R, K]`, with their scales: row r is token `routing.row_map[r] // top_k`.

    Rows of skipped slots are there too, past `routing.offsets[E]`. Raises ValueError where `x` has not T rows, or where
    its scales span rows.
    """
    steps.check_routing(routing)
    if not isinstance(x, ScaledTensor | Tensor):
        expect(False, "x", type(x).__name__, "a torch.Tensor or a ScaledTensor", error=TypeError)
    if isinstance(x, Tensor) and (x.layout != torch.strided or x.is_quantized):
        expect(False, "x", f"{x.layout} {x.dtype}", "a dense strided tensor", error=TypeError)
    if len(x.shape) != 2 or x.shape[0] != routing.num_tokens:  # a message made in advance would fix T in a traced graph
        expect(False, "x, shape", tuple(x.shape), f"[{routing.num_tokens}, K], a row for each routed token")
    return reference.gather(x, routing)


def combine(y: Tensor, routing: Routing, topk_weights: Tensor, *, bias: Tensor | None = None, add: Tensor | None = None,
            out: Tensor | None = None, out_dtype: torch.dtype | None = None, backend: str | None = None,
            config: Config | None = None) -> Tensor:
    """`out[t] = sum over j of topk_weights[t, j] * y[row of slot (t, j)]` as `[T, N]`, in `out_dtype` (default: y's).

    `y` `[R, N]` in sorted order, bf16 / fp16 / fp32; `topk_weights` fp32 `[T, top_k]`. The sum is in fp32, in order of
    j. A skipped slot counts as 0 whatever its row holds, so rows past `routing.offsets[E]` may be uninitialised.
    bias: `[E, N]`, added to a row of expert e before its weight. add: `[T, N]`, added to the sum (shared experts).
    out: `[T, N]` to write. backend, config: as in `gemm`. Differentiable, by the definition in torch.
    Raises ValueError or TypeError for shapes and dtypes that don't fit.
    """
    steps.check_routing(routing)
    if steps.wants_definition(y, topk_weights, bias, add):
        _check_combine(y, routing, topk_weights, bias, add, out, out_dtype)
        made = reference.combine(y, routing, topk_weights, bias=bias, add=add, out_dtype=out_dtype or
                                 (out.dtype if out is not None else None))
        return made if out is None else out.copy_(made)
    key = ("combine", steps.sign(y), steps.sign(routing.row_map), *steps.like(routing),
           steps.sign(topk_weights), steps.sign(bias), steps.sign(add), steps.sign(out), out_dtype, backend, config,
           env.choice())
    plan, memo = _plans.get(key, lambda: _plan_combine(y, routing, topk_weights, bias, add, out, out_dtype, backend, config))
    if out is None:
        out = torch.empty((routing.num_tokens, y.shape[1]), dtype=out_dtype or y.dtype, device=y.device)
    if plan is not None:
        run(plan, CombineOperands(steps.rows_contiguous(y), routing.row_map, routing.offsets, routing.inverse,
                                  steps.rows_contiguous(topk_weights), bias if bias is None else bias.contiguous(),
                                  add if add is None else steps.rows_contiguous(add), out, memo))
    return out


def _check_combine(y: Tensor, routing: Routing, topk_weights: Tensor, bias: Tensor | None, add: Tensor | None,
                   out: Tensor | None, out_dtype: torch.dtype | None) -> None:
    _float(y, "y", 2)
    _float(topk_weights, "topk_weights", 2, (torch.float32,))
    want = (routing.num_tokens, routing.top_k)
    if tuple(topk_weights.shape) != want:  # no messages in advance, as above
        expect(False, "topk_weights, shape", tuple(topk_weights.shape), str(want))
    if y.shape[0] != routing.row_map.numel():
        expect(False, "y, rows", y.shape[0], f"{routing.row_map.numel()}, one a slot")
    known = out_dtype is None or out_dtype in FLOATS
    expect(known, "out_dtype", out_dtype, f"None or one of {FLOATS}", error=TypeError)
    _same_device("y", y, routing.row_map)
    _same_device("topk_weights", topk_weights, routing.row_map)
    for x, name, rows in ((bias, "bias", routing.num_experts), (add, "add", routing.num_tokens)):
        if x is not None:
            _float(x, name, 2)
            expect(tuple(x.shape) == (rows, y.shape[1]), f"{name}, shape", tuple(x.shape), str((rows, y.shape[1])))
            _same_device(name, x, y)
    if out is not None:
        steps.check_like(out, "out", (routing.num_tokens, y.shape[1]), out_dtype or out.dtype, y.device, rows_only=True)
        _float(out, "out", 2)


def _plan_combine(y: Tensor, routing: Routing, topk_weights: Tensor, bias: Tensor | None, add: Tensor | None,
                  out: Tensor | None, out_dtype: torch.dtype | None, backend: str | None,
                  config: Config | None) -> Plan | None:
    steps.check_tensors_of(routing)
    _check_combine(y, routing, topk_weights, bias, add, out, out_dtype)
    tokens, n = routing.num_tokens, y.shape[1]
    if tokens == 0 or n == 0:
        return None
    problem = steps.combine_problem(tokens, n, routing.top_k, routing.num_experts, PLAIN[y.dtype], bias is not None)
    return steps.select(problem, y.device, backend, config)


def moe_align_block_size(topk_ids: Tensor, block_m: int, num_experts: int, *, expert_map: Tensor | None = None,
                         a_div: int | None = None) -> Routed:
    """`topk_ids` `[T, top_k]` as vLLM's block-padded slot layout, see `Routed`; sized for the worst case.

    `a_div` (default top_k: activations have a row a token; 1: a row a slot) goes into the layout. Skipped slots (ids and
    `expert_map` as in `sort_by_expert`) are not in it at all; vLLM instead gives experts of other ranks blocks with expert id -1.
    Raises ValueError (shape, block_m, a_div, num_experts) or TypeError (dtype).
    """
    _ids(topk_ids, num_experts, expert_map)
    expect_count(block_m, "block_m")
    if a_div is not None:
        expect_count(a_div, "a_div")
    return reference.moe_align_block_size(topk_ids, block_m, num_experts, expert_map=expert_map, a_div=a_div)


def _ids(topk_ids: Tensor, num_experts: int, expert_map: Tensor | None, first_expert: int = 0) -> None:
    expect(isinstance(topk_ids, Tensor), "topk_ids", type(topk_ids).__name__, "a torch.Tensor", error=TypeError)
    expect(topk_ids.dtype in INT, "topk_ids, dtype", topk_ids.dtype, "int32 or int64", error=TypeError)
    expect(topk_ids.dim() == 2 and topk_ids.shape[1] >= 1, "topk_ids, shape", tuple(topk_ids.shape),
           "[T, top_k] with top_k at least 1")
    check_rows(topk_ids.numel(), "topk_ids, slots")
    expect_count(num_experts, "num_experts")
    expect_count(first_expert, "first_expert", 0)
    if expert_map is not None:
        check_index(expert_map, "expert_map", 1, INT)
        _same_device("expert_map", expert_map, topk_ids)


def _float(x: Tensor, name: str, dim: int, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    expect(isinstance(x, Tensor), name, type(x).__name__, "a torch.Tensor", error=TypeError)
    expect(x.dtype in dtypes, f"{name}, dtype", x.dtype, f"one of {dtypes}", error=TypeError)
    expect(x.dim() == dim, f"{name}, shape", tuple(x.shape), f"{dim} dimension{'s' * (dim > 1)}")


def _same_device(name: str, x: Tensor, other: Tensor) -> None:
    expect(x.device == other.device, f"{name}, device", x.device, f"that of the other tensors, {other.device}")
