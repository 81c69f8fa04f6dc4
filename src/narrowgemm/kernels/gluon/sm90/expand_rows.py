"""The launch in front of `expand`'s product where both sides are MXFP8 as they are. Device code: `expand_rows_device.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...launching import Launch, Pointer
from ...operands import Operands

PIECE, MOST = 2048, 8       # columns that are moved together, and how many such pieces of a row a program holds
FLAG = 128                  # bytes behind `Places.one`, of what says that rows may be shifted


class Places(Protocol):
    """Byte offsets in the workspace: of 1.0, factors of A's rows, A, weights, factors of theirs."""

    @property
    def one(self) -> int: ...
    @property
    def factor(self) -> int: ...
    @property
    def x(self) -> int: ...
    @property
    def weights(self) -> int: ...
    @property
    def columns(self) -> int: ...


@dataclass(frozen=True)
class RowsStatic:
    """What `expand_rows_kernel` is compiled for."""

    PIECES: int
    BM: int = 2              # rows of A of a program: scales that lie column by column come by sectors of several rows
    BN: int = 1              # rows of weights


def pieces(k: int) -> int:
    """Of a row of `k` columns in BF16; 0 where a program would not hold it."""
    count = -(-k // PIECE)
    return count if count <= MOST else 0


def flag(workspace: Tensor, at: Places) -> Pointer:
    return Pointer(workspace, torch.int32, at.one + FLAG)


def front(x: Operands, k: int, at: Places, workspace: Tensor) -> Launch:
    """A `[M, K]` and weights `[N, K]` to BF16, `k` columns wide, each row with a factor."""
    from .expand_rows_device import expand_rows_kernel

    codes, scale = x.b.scale, x.a.scale
    assert codes is not None and scale is not None
    cfg = RowsStatic(pieces(k))
    programs = -(-x.m // cfg.BM)
    made = (Pointer(workspace, torch.bfloat16, at.x), Pointer(workspace, torch.float32, at.factor), flag(workspace, at),
            Pointer(workspace, torch.float32, at.one))
    of_weights = Pointer(workspace, torch.bfloat16, at.weights), Pointer(workspace, torch.float32, at.columns)
    return Launch(
        expand_rows_kernel, (programs + -(-x.n // cfg.BN),),
        (x.a.data, scale, *made, x.b.data, codes, *of_weights, x.m, x.k, k, programs, x.a.data.stride(-2), *scale.stride()[-2:],
         x.n, x.b.data.stride(-2), *codes.stride()[-2:], cfg), {"num_warps": 4})
