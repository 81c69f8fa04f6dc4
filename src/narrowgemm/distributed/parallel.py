"""`ExpertParallel`: dispatch of routed rows to the ranks that hold their experts, and the weighted sum of what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import expect
from ..formats import Format, ScaledTensor, get_format
from ..layouts import Offsets
from ..ops.quantize import quantize
from ..ops.route import Routing, combine, gather, sort_by_expert
from ..rows import take_rows
from . import by_token
from .exchange import Exchange, Pending, exchange_counts

Compute = Callable[[Any, Offsets], Tensor]


def experts_of_rank(num_experts: int, rank: int, ranks: int) -> range:
    """Which of `num_experts` experts `rank` of `ranks` ranks holds: neighbours, and no rank has two more than another."""
    return range(num_experts * rank // ranks, num_experts * (rank + 1) // ranks)


@dataclass(eq=False)
class Dispatched:
    """What this rank computes. `rows` `[R, H]` sorted by its own experts, `layout` their offsets `[E_local + 1]`.

    `routing` and `exchange` are the way back: this rank's own slots, and who sent what; `local` the order of `rows`.
    """

    rows: Tensor | ScaledTensor
    layout: Offsets
    routing: Routing
    local: Routing
    exchange: Exchange


@dataclass(eq=False)
class _Begun:
    routing: Routing
    exchange: Exchange
    ids: Tensor
    pending: tuple[Pending, ...] | Tensor
    element: torch.dtype


class ExpertParallel:
    """Experts spread over the ranks of `group`: a process group, a 1-D DeviceMesh, or None for all ranks.

    wire: None sends rows as they are; a format with scales by row, 'fp8_1x128' say, quantises them first and sends
        payload and scales, about half the bytes, in inference. What an FP8 product then reads is the same to the bit.
    Group sizes cross once as counts, which are read on the host: torch's all-to-all takes its splits there. Everything
    else stays on the device. Raises ValueError where the group has more ranks than there are experts.
    """

    def __init__(self, num_experts: int, group: Any = None, *, wire: Format | str | None = None) -> None:
        if hasattr(group, "get_group"):  # a DeviceMesh
            expect(group.ndim == 1, "DeviceMesh of the experts, dimensions", group.ndim, "1: take a sub-mesh by name")
            group = group.get_group()
        self.group, self.num_experts = group, num_experts
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        expect(num_experts >= self.ranks, "experts", num_experts, f"at least one for each of the {self.ranks} ranks")
        self.wire = None if wire is None else get_format(wire)
        expect(self.wire is None or (self.wire.scaled and self.wire.group[0] == 1), "wire", wire,
               "None, or a format with scales by row")
        self._bounds: dict[torch.device, Tensor] = {}
        self.held = [len(experts_of_rank(num_experts, r, self.ranks)) for r in range(self.ranks)]

    @property
    def local_experts(self) -> range:
        """The experts of this rank, by their ids in the whole layer."""
        return experts_of_rank(self.num_experts, self.rank, self.ranks)

    def bounds(self, device: torch.device) -> Tensor:
        """int64 `[ranks + 1]` on `device`: rank r holds the experts `[bounds[r], bounds[r + 1])`."""
        if device not in self._bounds:
            self._bounds[device] = torch.tensor([*accumulate(self.held, initial=0)], device=device)
        return self._bounds[device]

    def by_token(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, layer: by_token.Layer, *,
                 micro_batches: int = 1) -> Tensor:
        """The same sum, but a token's row goes once to each rank that holds one of its experts: `[T, H]`, inference only.

        x, topk_ids, topk_weights, micro_batches: as in `__call__`. layer(rows `[R, H]`, topk_ids int32 `[R, top_k]` of the whole
        layer, topk_weights fp32 alike) -> `[R, H]`: the weighted sum over this rank's experts of each row, see `expert_layer`.
        Rows travel in x's type, both ways; each rank's sum is rounded to the type of `layer`'s result. Raises ValueError
        where a gradient is asked for, or with `wire`.
        """
        expect(micro_batches >= 1, "micro_batches", micro_batches, "at least 1")
        expect(self.wire is None, "wire", self.wire and self.wire.name, "None: by token, rows travel in x's type")
        expect(not self._grad(x, topk_weights), "gradient", "wanted", "none by token: call the ExpertParallel itself")
        return by_token.run(self, x, topk_ids, topk_weights, layer, micro_batches)

    def __call__(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, compute: Compute, *,
                 micro_batches: int = 1) -> Tensor:
        """`out[t] = sum over j of topk_weights[t, j] * compute(x[t])` by expert `topk_ids[t, j]`, wherever it is: `[T, H]`.

        x `[T, H]`, topk_ids int32 / int64 `[T, top_k]` of all experts (others are skipped), topk_weights fp32 alike. T may
        differ from rank to rank and be zero. compute(rows, layout): rows `[R, H]` by this rank's experts, a ScaledTensor
        with `wire`. Differentiable in x, topk_weights and in what compute is differentiable in (without `wire`).
        micro_batches: cut the tokens into so many parts in inference, and exchange one while another is computed; give
        compute's products a `max_sms` that leaves room for the exchange. Every rank must say the same.
        """
        expect(micro_batches >= 1, "micro_batches", micro_batches, "at least 1")
        if micro_batches == 1 or self._grad(x, topk_weights):
            d = self.dispatch(x, topk_ids)
            return self.combine(compute(d.rows, d.layout), d, topk_weights)
        parts = list(zip(*(t.tensor_split(micro_batches) for t in (x, topk_ids, topk_weights))))
        begun = [self._begin(px, ids) for px, ids, _ in parts]
        back = []
        for b in begun:
            d = self._finish(b)
            y = self._unsorted(compute(d.rows, d.layout), d)
            back.append((d, d.exchange.back.start(y, d.routing.row_map.numel())))
        return torch.cat([self._sum(pending.wait(), d, w) for (d, pending), (_, _, w) in zip(back, parts)])

    def dispatch(self, x: Tensor, topk_ids: Tensor) -> Dispatched:
        """Send every slot's row of x `[T, H]` to the rank of its expert. topk_ids: as in `__call__`. See `Dispatched`."""
        return self._finish(self._begin(x, topk_ids))

    def combine(self, y: Tensor, d: Dispatched, topk_weights: Tensor) -> Tensor:
        """Send the results `y` `[R, N]` of `d.rows` back, and sum each token's own by topk_weights `[T, top_k]`: `[T, N]`."""
        return self._sum(d.exchange.back.rows(self._unsorted(_joined(y, d), d)), d, topk_weights)

    def _grad(self, *inputs: Tensor) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in inputs)

    def _begin(self, x: Tensor, topk_ids: Tensor) -> _Begun:
        routing = sort_by_expert(topk_ids, self.num_experts)
        counts = routing.offsets.diff()
        mine = [self.held[self.rank]] * self.ranks
        arriving = exchange_counts(counts, self.held, mine, self.group)        # [ranks * E_local]
        per_rank = torch.stack([c.sum() for c in counts.split(self.held)] + list(arriving.view(self.ranks, -1).sum(1)))
        sizes = per_rank.tolist()                                              # the one read-back
        exchange = Exchange(sizes[:self.ranks], sizes[self.ranks:], self.group)
        experts = torch.arange(self.held[self.rank], dtype=torch.int32, device=x.device).repeat(self.ranks)
        ids = experts.repeat_interleave(arriving, output_size=sum(exchange.receive))
        sent = sum(exchange.send)                                              # slots of no expert stay here
        if self._grad(x):
            expect(self.wire is None, "wire", self.wire and self.wire.name, "None where a gradient is asked for")
            return _Begun(routing, exchange, ids, x[routing.row_map[:sent] // routing.top_k], x.dtype)
        if self.wire is None:
            return _Begun(routing, exchange, ids, (exchange.start(gather(x, routing)[:sent]),), x.dtype)
        q = take_rows(quantize(x, self.wire), routing.row_map[:sent] // routing.top_k)
        assert q.scale is not None
        return _Begun(routing, exchange, ids, (exchange.start(q.data.view(torch.uint8)), exchange.start(q.scale)),
                      q.data.dtype)

    def _finish(self, b: _Begun) -> Dispatched:
        local = sort_by_expert(b.ids[:, None], self.held[self.rank])
        rows: Tensor | ScaledTensor
        if isinstance(b.pending, Tensor):
            rows = b.exchange.rows(b.pending)[local.row_map]
        elif self.wire is None:
            rows = take_rows(b.pending[0].wait(), local.row_map)
        else:
            data, scale = (p.wait() for p in b.pending)
            rows = take_rows(ScaledTensor(data.view(b.element), scale, self.wire), local.row_map)
        return Dispatched(rows, local.layout, b.routing, local, b.exchange)

    def _unsorted(self, y: Tensor, d: Dispatched) -> Tensor:
        """Results in the order in which their rows came."""
        expect(y.shape[0] == sum(d.exchange.receive), "rows of compute's result", y.shape[0], f"{sum(d.exchange.receive)}")
        return y[d.local.inverse] if self._grad(y) else take_rows(y, d.local.inverse)

    def _sum(self, y: Tensor, d: Dispatched, topk_weights: Tensor) -> Tensor:
        routing = d.routing
        missing = routing.row_map.numel() - y.shape[0]
        y = torch.cat((y, y.new_zeros((missing, y.shape[1])))) if missing else y
        if not self._grad(y, topk_weights):
            return combine(y, routing, topk_weights)
        slots = y[routing.inverse].view(routing.num_tokens, routing.top_k, y.shape[1])      # zero where there is no expert
        return (slots.float() * topk_weights[..., None]).sum(1).to(y.dtype)


def _joined(y: Tensor, d: Dispatched) -> Tensor:
    """`y`, part of the graph on a rank without rows, too: its backward must take part in the others' exchanges."""
    if y.shape[0] or not torch.is_grad_enabled():
        return y
    if isinstance(d.rows, Tensor) and d.rows.requires_grad:
        return y + d.rows.sum() * 0
    return y if y.requires_grad else y.detach().requires_grad_()
