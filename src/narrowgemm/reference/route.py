"""Routing in plain torch: which experts a token goes to, the slots sorted by expert, and the weighted sum back.

A *slot* is one (token, choice) pair, numbered `token * top_k + choice`. Everything stays on the device and nothing is
read back, so this is also what runs on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import Format, ScaledTensor
from ..layout_convert import routed_from_offsets
from ..layouts import Offsets, Routed
from ..rows import sort_ids, take_rows
from . import quantize as quantization


@dataclass(frozen=True, eq=False)
class Routing:
    """Slots sorted by expert. R = tokens * top_k rows, those of expert e at `[offsets[e], offsets[e+1])`.

    `row_map` int32 `[R]`: the slot of each sorted row (its token is `row_map // top_k`); skipped slots come last, from
    row `offsets[E]` on. `offsets` int64 `[E+1]`. `inverse` int32 `[R]`: the sorted row of each slot.
    """

    row_map: Tensor
    offsets: Tensor
    inverse: Tensor
    top_k: int

    @property
    def num_tokens(self) -> int:
        return self.row_map.numel() // self.top_k

    @property
    def num_experts(self) -> int:
        return self.offsets.numel() - 1

    @property
    def layout(self) -> Offsets:
        """The sorted rows as a layout for `grouped_gemm`."""
        return Offsets(self.offsets)


def route(logits: Tensor, top_k: int, *, scoring: str = "softmax", renormalize: bool = True, bias: Tensor | None = None,
          num_expert_group: int | None = None, topk_group: int | None = None,
          scaling_factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """See `ops.route.route`."""
    scores = logits.float()
    scores = scores.softmax(dim=-1) if scoring == "softmax" else scores.sigmoid()
    choice = scores if bias is None else scores + bias.float()
    if num_expert_group is not None and topk_group is not None and num_expert_group > 1:
        tokens, experts = scores.shape
        choice = choice.view(tokens, num_expert_group, experts // num_expert_group)
        best = 1 if bias is None else min(2, choice.shape[-1])  # DeepSeek-V2: the best expert; V3: the best two
        group_score = choice.topk(best, dim=-1).values.sum(dim=-1)
        kept = torch.zeros_like(group_score, dtype=torch.bool).scatter_(1, _top(group_score, topk_group), True)
        choice = choice.masked_fill(~kept.unsqueeze(-1), float("-inf")).view(tokens, experts)
    ids = _top(choice, top_k)
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)  # sigmoids may all underflow
    return weights * scaling_factor, ids.to(torch.int32)


def _top(scores: Tensor, k: int) -> Tensor:
    """Indices of the k highest of each row, best first, the lower index first among equals (topk leaves that open)."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def sort_by_expert(topk_ids: Tensor, num_experts: int, *, expert_map: Tensor | None = None,
                   first_expert: int = 0) -> Routing:
    """See `ops.route.sort_by_expert`."""
    ids = topk_ids.reshape(-1)
    if expert_map is not None:
        known = (ids >= 0) & (ids < expert_map.numel())
        local = expert_map[torch.where(known, ids, 0)] if expert_map.numel() else torch.zeros_like(ids)
        ids = torch.where(known, local, -1)
    row_map, offsets = sort_ids(ids - first_expert, num_experts)
    rows = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device)
    inverse = torch.empty_like(row_map).scatter_(0, row_map.long(), rows)
    return Routing(row_map, offsets, inverse, topk_ids.shape[1])


def gather(x: Tensor | ScaledTensor, routing: Routing) -> Tensor | ScaledTensor:
    """See `ops.route.gather`."""
    return take_rows(x, routing.row_map // routing.top_k)


def gather_quantize(x: Tensor, routing: Routing, fmt: Format, rounding: str = "rceil",
                    amax_clamp: float = quantization.AMAX_CLAMP) -> ScaledTensor:
    """See `ops.gather.gather_quantize`; rows of skipped slots are made like the others."""
    if fmt.scaled:
        return take_rows(quantization.quantize(x, fmt, rounding, amax_clamp), routing.row_map // routing.top_k)
    return ScaledTensor(take_rows(x, routing.row_map // routing.top_k), None, fmt)


def store_live(out: ScaledTensor, value: Tensor | ScaledTensor, offsets: Tensor | None) -> None:
    """Write rows [0, offsets[E]) of `value` (None: all) to `out` and leave the others as they are."""
    pairs = [(out.data, value if isinstance(value, Tensor) else value.data)]
    if isinstance(value, ScaledTensor) and value.scale is not None:
        assert out.scale is not None
        pairs.append((out.scale, value.scale))
    for target, source in pairs:
        if offsets is None or source.shape[0] != out.data.shape[0]:  # a scale for the whole tensor belongs to all rows
            target.copy_(source)
            continue
        live = torch.arange(source.shape[0], device=source.device) < offsets[-1]
        if target.element_size() == 1:  # torch has no `where` of FP8
            target, source = target.view(torch.uint8), source.view(torch.uint8)
        target.copy_(torch.where(live[:, None], source, target))


def combine(y: Tensor, routing: Routing, topk_weights: Tensor, *, bias: Tensor | None = None, add: Tensor | None = None,
            out_dtype: torch.dtype | None = None) -> Tensor:
    """See `ops.route.combine`."""
    tokens, top_k = topk_weights.shape
    rows = routing.inverse.view(tokens, top_k)
    live = (rows >= 0) & (rows < routing.offsets[-1].clamp(max=y.shape[0]))     # a wrong row counts 0, like a skipped slot
    rows = torch.where(live, rows, 0)
    weights = torch.where(live, topk_weights, 0)
    wide = torch.promote_types(y.dtype, torch.float32)
    out = torch.zeros((tokens, y.shape[1]), dtype=wide, device=y.device)
    for j in range(top_k):  # in order of choice: a fixed sum, and no [T, top_k, N] in fp32
        term = torch.where(live[:, j, None], y.index_select(0, rows[:, j]), 0)  # 0 * NaN would be NaN
        if bias is not None:
            expert = torch.searchsorted(routing.offsets[1:], rows[:, j].long(), right=True)
            term = term.to(wide) + bias.to(wide)[expert.clamp(max=bias.shape[0] - 1)]
        out = torch.addcmul(out, term, weights[:, j, None])
    if add is not None:
        out = out + add.to(wide)
    return out.to(out_dtype or y.dtype)


def moe_align_block_size(topk_ids: Tensor, block_m: int, num_experts: int, *, expert_map: Tensor | None = None,
                         a_div: int | None = None) -> Routed:
    """See `ops.route.moe_align_block_size`."""
    routing = sort_by_expert(topk_ids, num_experts, expert_map=expert_map)
    top_k = routing.top_k
    return routed_from_offsets(routing.layout, routing.row_map, block_m=block_m, top_k=top_k,
                               a_div=top_k if a_div is None else a_div)
