"""aiter's `moe_sorting`: slots sorted by expert in blocks, in its packed order. On the device, without a read-back.

Definition: ROCm/aiter `fused_moe.py`, `moe_sorting`; the order itself is in `narrowgemm.moe_sorting`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import expect
from ...layout_convert import aligned_capacity, routed_from_offsets
from ...layouts import INT
from ...moe_sorting import moe_sorting_from_routed
from ...ops.route import sort_by_expert

BLOCK_SIZE_M = 32


def moe_sorting(topk_ids: Tensor, topk_weights: Tensor, num_experts: int, model_dim: int, moebuf_dtype: torch.dtype,
                block_size: int = BLOCK_SIZE_M, expert_mask: Tensor | None = None, num_local_tokens: Tensor | None = None,
                dispatch_policy: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf), as aiter's kernels take them.

    topk_ids int32 `[T, top_k]`, topk_weights FP32 `[T, top_k]`; block_size: entries of a block, which is of one expert.
    sorted_ids int32 `[T * top_k + E * block_size - top_k]`, `(k << 24) | token`, padding `(top_k << 24) | T`; sorted_weights FP32,
    0 on padding; sorted_expert_ids int32, one a block; num_valid_ids int32 `[2]`: entries with padding, tokens; moe_buf
    `[T, model_dim]` of zeros.

    expert_mask: int32 `[E]`, 1 where an expert is on this rank: the others' slots are left out, and the experts that stay are
    counted from 0. num_local_tokens: int32 `[1]`: tokens from there on are left out. dispatch_policy has no effect.

    Raises ValueError or TypeError for shapes and dtypes that don't fit.
    """
    expect(isinstance(topk_ids, Tensor) and topk_ids.dim() == 2, "topk_ids", getattr(topk_ids, "shape", topk_ids), "[T, top_k]")
    expect(isinstance(block_size, int) and block_size >= 1, "block_size", block_size, "at least 1")
    expect(isinstance(model_dim, int) and model_dim >= 0, "model_dim", model_dim, "a size")
    for name, given in (("topk_weights", topk_weights), ("num_local_tokens", num_local_tokens), ("expert_mask", expert_mask)):
        there = isinstance(given, Tensor) or (given is None and name != "topk_weights")
        expect(there, name, type(given).__name__, "a torch.Tensor", error=TypeError)
    if num_local_tokens is not None:
        expect(num_local_tokens.dtype in INT and num_local_tokens.numel() >= 1, "num_local_tokens",
               f"{num_local_tokens.dtype} {tuple(num_local_tokens.shape)}", "int32 [1]")
    expect(isinstance(moebuf_dtype, torch.dtype), "moebuf_dtype", repr(moebuf_dtype), "a torch.dtype", error=TypeError)
    (tokens, top_k), device = topk_ids.shape, topk_ids.device
    experts, ids, mapped = num_experts, topk_ids, None
    if num_local_tokens is not None:
        live = torch.arange(tokens, device=device) < num_local_tokens.reshape(-1)[:1]
        ids = torch.where(live[:, None], ids, -1)
    if expert_mask is not None:
        expect(isinstance(expert_mask, Tensor) and expert_mask.numel() == num_experts, "expert_mask, length",
               getattr(expert_mask, "numel", lambda: expert_mask)(), f"num_experts, {num_experts}")
        held = expert_mask.reshape(-1) != 0
        mapped = torch.where(held, held.cumsum(0) - 1, -1).to(torch.int32)
    routing = sort_by_expert(ids, experts, expert_map=mapped)
    entries = topk_ids.numel() + num_experts * block_size - top_k
    capacity = -(-max(entries, aligned_capacity(topk_ids.numel(), experts, block_size)) // block_size) * block_size
    routed = routed_from_offsets(routing.layout, routing.row_map, block_m=block_size, top_k=top_k, capacity=capacity)
    made = moe_sorting_from_routed(routed, topk_weights, experts)
    blocks = -(-entries // block_size)
    return (made.sorted_ids[:entries], made.sorted_weights[:entries], made.sorted_expert_ids[:blocks], made.num_valid_ids,
            torch.zeros((tokens, model_dim), dtype=moebuf_dtype, device=device))
