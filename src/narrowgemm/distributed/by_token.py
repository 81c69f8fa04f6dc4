"""Expert parallelism by token: a token's row goes once to each rank that holds one of its experts, and one row comes back.

By slot (`ExpertParallel.__call__`) a row is sent for each of a token's top-k experts, and each result is sent back. Here a rank
sums what its own experts give for a token before it answers: of top-8 over two ranks a quarter of the bytes, over eight ranks
about two thirds. What a rank runs is a whole layer, `narrowgemm.experts` with the ids of other ranks' experts skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops.experts import experts
from ..ops.experts_arguments import Weights
from ..ops.route import Routing, combine, sort_by_expert
from ..rows import take_rows
from .exchange import Exchange, exchange_counts

if TYPE_CHECKING:
    from .parallel import ExpertParallel

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def expert_layer(ep: ExpertParallel, gate_up: Weights, down: Weights, **options: Any) -> Layer:
    """A `layer` for `ExpertParallel.by_token`: `narrowgemm.experts` on this rank's experts, with its `options`.

    ep: whose layer it is; gate_up `[E_local, 2I, H]`, down `[E_local, H, I]`. Raises what `experts` raises.
    """
    first, world = ep.local_experts.start, ep.num_experts

    def layer(rows: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        return experts(rows, gate_up, down, topk_ids=topk_ids, topk_weights=topk_weights, first_expert=first,
                       num_experts=world, **options)

    return layer


def ranks_of(topk_ids: Tensor, bounds: Tensor) -> Routing:
    """Slots (token, rank) sorted by rank, of the ranks that hold an expert of the token: a `Routing` whose experts are ranks.

    topk_ids `[T, top_k]`; bounds int64 `[ranks + 1]`: rank r holds the experts `[bounds[r], bounds[r + 1])`. Ids of no expert
    are of no rank.
    """
    ids = topk_ids[:, :, None]
    hit = ((ids >= bounds[:-1]) & (ids < bounds[1:])).any(1)                   # [T, ranks]
    ranks = torch.arange(hit.shape[1], dtype=torch.int32, device=hit.device)
    return sort_by_expert(torch.where(hit, ranks, -1), hit.shape[1])


def run(ep: ExpertParallel, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, layer: Layer, micro_batches: int) -> Tensor:
    """See `ExpertParallel.by_token`."""
    parts = list(zip(*(t.tensor_split(micro_batches) for t in (x, topk_ids, topk_weights))))
    bounds = ep.bounds(x.device)
    routings = [ranks_of(ids, bounds) for _, ids, _ in parts]
    counts = torch.stack([r.offsets.diff() for r in routings], 1)              # [ranks, parts]
    each = [len(parts)] * ep.ranks
    arriving = exchange_counts(counts.view(-1), each, each, ep.group).view(ep.ranks, -1)
    sends, receives = torch.stack((counts, arriving)).mT.tolist()              # the one read-back
    begun = []
    for (px, ids, weights), routing, send, receive in zip(parts, routings, sends, receives):
        exchange = Exchange(send, receive, ep.group)
        token = routing.row_map[:sum(send)] // ep.ranks
        packed = torch.cat((ids.to(torch.int32), weights.float().view(torch.int32)), 1)
        begun.append((exchange, exchange.start(take_rows(px, token)), exchange.start(take_rows(packed, token))))
    back = []
    for (exchange, rows, choices), routing in zip(begun, routings):
        arrived = choices.wait().chunk(2, 1)
        y = layer(rows.wait(), arrived[0].contiguous(), arrived[1].contiguous().view(torch.float32))
        back.append(exchange.back.start(y, routing.row_map.numel()))
    return torch.cat([_sum(pending.wait(), routing, ep.ranks) for pending, routing in zip(back, routings)])


def _sum(y: Tensor, routing: Routing, ranks: int) -> Tensor:
    """Each token's rows from all ranks, summed in FP32 in order of ranks: `[T, N]`."""
    ones = torch.ones((routing.num_tokens, ranks), dtype=torch.float32, device=y.device)
    return combine(y, routing, ones)
