"""aiter's packed routing layout, from and to the slot layout `Routed`. On the device, without a read-back.

Definition: aiter's and Composable Kernel's `moe_sorting`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import expect
from .layout_convert import routed_groups
from .layouts import Routed, check_index
from .rows import gather_rows, invert_row_map

TOKEN_BITS = 24
MAX_TOKENS, MAX_TOP_K = (1 << TOKEN_BITS) - 1, 127  # the sentinel names token T of choice top_k, in a signed int32


@dataclass(frozen=True, eq=False)
class MoeSorting:
    """`sorted_ids` int32 `[P]`: `(k << 24) | token`, padding is `(top_k << 24) | num_tokens`.

    `sorted_weights` fp32 `[P]`, 0 on padding; `sorted_expert_ids` int32 `[ceil(P / block_m)]`; `num_valid_ids` int32
    `[2]`: entries with padding, and the number of tokens. What lies past `num_valid_ids[0]` is not read.
    """

    sorted_ids: Tensor
    sorted_weights: Tensor
    sorted_expert_ids: Tensor
    num_valid_ids: Tensor
    num_tokens: int
    top_k: int
    block_m: int

    def __post_init__(self) -> None:
        check_index(self.sorted_ids, "sorted_ids", 1, (torch.int32,))
        check_index(self.sorted_weights, "sorted_weights", 1, (torch.float32,))
        check_index(self.sorted_expert_ids, "sorted_expert_ids", 1, (torch.int32,))
        check_index(self.num_valid_ids, "num_valid_ids", 1, (torch.int32,))
        entries, blocks = self.sorted_ids.numel(), self.sorted_expert_ids.numel()
        expect(self.sorted_weights.numel() == entries, "sorted_weights, length", self.sorted_weights.numel(),
               f"that of sorted_ids, {entries}")
        expect(self.block_m >= 1, "block_m", self.block_m, "at least 1")
        expect(blocks * self.block_m >= entries, "sorted_expert_ids, length", blocks,
               f"at least {-(-entries // self.block_m)}, one for each block of {self.block_m}")
        expect(self.num_valid_ids.numel() >= 1, "num_valid_ids, length", self.num_valid_ids.numel(), "1 or 2")
        expect(0 <= self.num_tokens <= MAX_TOKENS, "num_tokens", self.num_tokens, f"in [0, {MAX_TOKENS}]")
        expect(1 <= self.top_k <= MAX_TOP_K, "top_k", self.top_k, f"in [1, {MAX_TOP_K}]")


def moe_sorting_from_routed(routed: Routed, topk_weights: Tensor, num_experts: int) -> MoeSorting:
    """`routed` as aiter's kernels take it. `topk_weights` fp32 `[T, top_k]`, T * top_k = `routed.num_slots`.

    The packed layout has no way to skip a block, so one with an expert id outside [0, num_experts) becomes a block of
    padding for expert 0. Raises ValueError for more than 2^24 - 1 tokens or a top_k over 127.
    """
    top_k = routed.top_k
    tokens = routed.num_slots // top_k
    expect(tokens * top_k == routed.num_slots, "num_slots", routed.num_slots, f"a multiple of top_k = {top_k}")
    expect(tuple(topk_weights.shape) == (tokens, top_k), "topk_weights, shape", tuple(topk_weights.shape),
           f"({tokens}, {top_k})")
    expect(topk_weights.dtype == torch.float32, "topk_weights, dtype", topk_weights.dtype, "float32", error=TypeError)
    expect(tokens <= MAX_TOKENS, "tokens", tokens, f"at most {MAX_TOKENS}")
    expect(top_k <= MAX_TOP_K, "top_k", top_k, f"at most {MAX_TOP_K}")
    ids = routed.sorted_token_ids
    _, live = routed_groups(routed, num_experts)
    slots = torch.where(live, ids, -1)
    packed = torch.where(live, (ids % top_k << TOKEN_BITS) | ids // top_k, (top_k << TOKEN_BITS) | tokens)
    experts = routed.expert_ids
    experts = torch.where((experts >= 0) & (experts < num_experts), experts, 0)
    count = routed.num_tokens_post_padded
    return MoeSorting(packed, gather_rows(topk_weights.reshape(-1), slots), experts,
                      torch.cat((count[:1], torch.full_like(count[:1], tokens))), tokens, top_k, routed.block_m)


def routed_from_moe_sorting(sorting: MoeSorting, *, a_div: int = 1) -> tuple[Routed, Tensor]:
    """`(routed, topk_weights fp32 [T, top_k])`; the weight of a slot that `sorting` does not hold is 0.

    Entries that name no token below T, or no choice below top_k, are padding.
    """
    ids, tokens, top_k, block = sorting.sorted_ids, sorting.num_tokens, sorting.top_k, sorting.block_m
    num_slots = tokens * top_k
    token, choice = ids & MAX_TOKENS, ids >> TOKEN_BITS
    entry = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device)
    live = (token < tokens) & (choice >= 0) & (choice < top_k) & (entry < sorting.num_valid_ids[:1])
    slots = torch.where(live, token * top_k + choice, num_slots)
    weights = gather_rows(sorting.sorted_weights, invert_row_map(slots, num_slots))
    blocks = -(-ids.numel() // block)
    if tail := blocks * block - ids.numel():  # aiter's buffers may end inside a block
        slots = torch.cat((slots, slots.new_full((tail,), num_slots)))
    experts, count = sorting.sorted_expert_ids[:blocks], sorting.num_valid_ids[:1]
    return Routed(slots, experts, count, num_slots, top_k, block, a_div), weights.view(tokens, top_k)
