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

from ..errors import expect
from ..formats import ScaledTensor
from ..layouts import INT, Routed, check_index
from ..reference import route as reference
from ..reference.route import Routing
from ..rows import check_rows

__all__ = ["Routing", "combine", "gather", "moe_align_block_size", "route", "sort_by_expert"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCORINGS = ("softmax", "sigmoid")


def route(logits: Tensor, top_k: int, *, scoring: str = "softmax", renormalize: bool = True, bias: Tensor | None = None,
          num_expert_group: int | None = None, topk_group: int | None = None,
          scaling_factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """The `top_k` experts of each token: `(topk_weights fp32 [T, top_k], topk_ids int32 [T, top_k])`, best first.

    Scores are the fp32 `softmax` or `sigmoid` of `logits` `[T, E]`. Experts are chosen by score + `bias` (`[E]`: a
    correction that never enters the weights), the lower id first among equals. With `num_expert_group` groups of
    neighbouring experts only those of the `topk_group` best groups are eligible; a group counts as its best expert,
    with a bias as its two best together. Weights are the chosen scores, divided by their sum if `renormalize`, times
    `scaling_factor`. Ids are distinct and in range even for NaN logits.

    Definitions: Mixtral and Qwen3-MoE (softmax, renormalised), DeepSeek-V2 (groups), DeepSeek-V3 (sigmoid, bias,
    groups). GPT-OSS's softmax over the chosen logits is the renormalised softmax here.
    Raises ValueError for shapes and numbers that don't fit, TypeError for dtypes.
    """
    _float(logits, "logits", 2)
    experts = logits.shape[1]
    expect(1 <= top_k <= experts, "top_k", top_k, f"in [1, {experts}], the number of experts")
    expect(scoring in SCORINGS, "scoring", repr(scoring), f"one of {SCORINGS}")
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
    return reference.route(logits, top_k, scoring=scoring, renormalize=renormalize, bias=bias,
                           num_expert_group=num_expert_group, topk_group=topk_group, scaling_factor=scaling_factor)


def sort_by_expert(topk_ids: Tensor, num_experts: int, *, expert_map: Tensor | None = None) -> Routing:
    """The slots of `topk_ids` (int32 or int64 `[T, top_k]`) sorted by expert, stably: see `Routing`.

    Slots with an id outside [0, num_experts) are skipped: they come last and belong to no expert. `expert_map`, int32
    or int64 `[E_all]`, first maps ids of all experts to ids on this rank; ids outside it, and those that it maps
    outside [0, num_experts), are skipped. Raises ValueError or TypeError for shapes and dtypes that don't fit.
    """
    _ids(topk_ids, num_experts, expert_map)
    return reference.sort_by_expert(topk_ids, num_experts, expert_map=expert_map)


@overload
def gather(x: Tensor, routing: Routing) -> Tensor: ...
@overload
def gather(x: ScaledTensor, routing: Routing) -> ScaledTensor: ...
def gather(x: Tensor | ScaledTensor, routing: Routing) -> Tensor | ScaledTensor:
    """Token rows `x` `[T, K]` as sorted rows `[R, K]`, with their scales: row r is token `routing.row_map[r] // top_k`.

    Rows of skipped slots are there too, past `routing.offsets[E]`. Raises ValueError where `x` has not T rows, or where
    its scales span rows.
    """
    if len(x.shape) != 2 or x.shape[0] != routing.num_tokens:  # a message made in advance would fix T in a traced graph
        expect(False, "x, shape", tuple(x.shape), f"[{routing.num_tokens}, K], a row for each routed token")
    return reference.gather(x, routing)


def combine(y: Tensor, routing: Routing, topk_weights: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """`out[t] = sum over j of topk_weights[t, j] * y[row of slot (t, j)]` as `[T, N]`, in `out_dtype` (default: y's).

    `y` `[R, N]` in sorted order, bf16 / fp16 / fp32; `topk_weights` fp32 `[T, top_k]`. The sum is in fp32, in order of
    j. A skipped slot counts as 0 whatever its row holds, so rows past `routing.offsets[E]` may be uninitialised.
    Raises ValueError or TypeError for shapes and dtypes that don't fit.
    """
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
    return reference.combine(y, routing, topk_weights, out_dtype=out_dtype)


def moe_align_block_size(topk_ids: Tensor, block_m: int, num_experts: int, *, expert_map: Tensor | None = None,
                         a_div: int | None = None) -> Routed:
    """`topk_ids` `[T, top_k]` as vLLM's block-padded slot layout, see `Routed`; sized for the worst case.

    `a_div` (default top_k: activations have a row a token; 1: a row a slot) goes into the layout. Skipped slots (ids as
    in `sort_by_expert`) are not in it at all; vLLM instead gives experts of other ranks blocks with expert id -1.
    """
    _ids(topk_ids, num_experts, expert_map)
    expect(block_m >= 1, "block_m", block_m, "at least 1")
    expect(a_div is None or a_div >= 1, "a_div", a_div, "None or at least 1")
    return reference.moe_align_block_size(topk_ids, block_m, num_experts, expert_map=expert_map, a_div=a_div)


def _ids(topk_ids: Tensor, num_experts: int, expert_map: Tensor | None) -> None:
    expect(isinstance(topk_ids, Tensor), "topk_ids", type(topk_ids).__name__, "a torch.Tensor", error=TypeError)
    expect(topk_ids.dtype in INT, "topk_ids, dtype", topk_ids.dtype, "int32 or int64", error=TypeError)
    expect(topk_ids.dim() == 2 and topk_ids.shape[1] >= 1, "topk_ids, shape", tuple(topk_ids.shape),
           "[T, top_k] with top_k at least 1")
    check_rows(topk_ids.numel(), "topk_ids, slots")
    expect(num_experts >= 1, "num_experts", num_experts, "at least 1")
    if expert_map is not None:
        check_index(expert_map, "expert_map", 1, INT)
        _same_device("expert_map", expert_map, topk_ids)


def _float(x: Tensor, name: str, dim: int, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    expect(isinstance(x, Tensor), name, type(x).__name__, "a torch.Tensor", error=TypeError)
    expect(x.dtype in dtypes, f"{name}, dtype", x.dtype, f"one of {dtypes}", error=TypeError)
    expect(x.dim() == dim, f"{name}, shape", tuple(x.shape), f"{dim} dimension{'s' * (dim > 1)}")


def _same_device(name: str, x: Tensor, other: Tensor) -> None:
    expect(x.device == other.device, f"{name}, device", x.device, f"that of the other tensors, {other.device}")
