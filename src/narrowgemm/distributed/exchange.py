"""Rows between ranks: `all_to_all_single` with uneven splits, differentiable, synchronous or begun and awaited later.

Every rank of the group must make the same calls in the same order. A rank that dies or hangs ends the others' call in an
error within the group's timeout: gloo raises it, NCCL's watchdog does (leave TORCH_NCCL_ASYNC_ERROR_HANDLING on).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..formats import ScaledTensor


def exchange_counts(counts: Tensor, send: Sequence[int], receive: Sequence[int], group: Any) -> Tensor:
    """`counts` int64, `send[r]` of them for rank r, exchanged over `group`: `sum(receive)` counts, `receive[r]` of
    them from rank r."""
    out = counts.new_empty(sum(receive))
    dist.all_to_all_single(out, counts.contiguous(), list(receive), list(send), group=group)
    return out


@dataclass
class Exchange:
    """Rows to other ranks: `send[r]` of them go to rank r, `receive[r]` come from there, in order of ranks."""

    send: list[int]
    receive: list[int]
    group: Any

    @property
    def back(self) -> Exchange:
        """The way back of what was received."""
        return Exchange(self.receive, self.send, self.group)

    def rows(self, x: Tensor) -> Tensor:
        """`x` `[sum(send), N]` to `[sum(receive), N]`. Its gradient takes the way back."""
        return _AllToAll.apply(x, self)

    def scaled(self, x: ScaledTensor) -> ScaledTensor:
        """Payload and scales of the rows of `x`, which has scales by row, bit for bit; no gradient."""
        data = self.start(x.data.view(torch.uint8))
        scale = None if x.scale is None else self.start(x.scale)
        return ScaledTensor(data.wait().view(x.data.dtype), None if scale is None else scale.wait(), x.format)

    def start(self, x: Tensor, rows: int = 0) -> Pending:
        """Begin to exchange `x` `[sum(send), N]` without waiting; no gradient. NCCL moves it beside this rank's kernels.

        rows: of the result, where more are wanted than come: the rest is left as it is.
        """
        assert x.shape[0] == sum(self.send), (x.shape, self.send)
        come = sum(self.receive)
        out = x.new_empty((max(come, rows), *x.shape[1:]))
        x = x.detach().contiguous()
        work = dist.all_to_all_single(out[:come], x, self.receive, self.send, group=self.group, async_op=True)
        return Pending(out, work, x)


@dataclass
class Pending:
    """An exchange that was begun. It holds what is sent until `wait`, which gives what came."""

    out: Tensor
    work: Any
    sent: Tensor | None = field(repr=False)

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
            self.work, self.sent = None, None
        return self.out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.start(x).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.exchange.back.start(grads[0]).wait(), None
