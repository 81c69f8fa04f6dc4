"""How much of an MXFP8 tensor folds into E4M3 without loss: one power of two for a K block, or for all of K, instead of one for 32.

Elements fold where one power of two holds them all as E4M3, bit for bit: the largest at most 448, and no set bit below 2^-9.
Counted exactly, on any device. A product on FP8 tensor cores needs such operands; `gluon_sm90.fold_mixed` and `fold_both` fold
activations so, 64 rows at a time, and take what doesn't fold in parts or in BF16; `fold_both` takes weights so
(`prepack_folded`), with columns beside for the elements that don't fold.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import expect
from ..formats import MXFP8, ScaledTensor
from ..prepack_folded import TILE, fold

BLOCK = 128                 # of K
LOWEST, BINADES = -9, 14    # E4M3's last bit; what a second part adds below
TILES = (1, 8, 64, 128, 256)
NOTHING = 1000              # beyond every exponent


class FoldRates(NamedTuple):
    """Shares, from 0 to 1."""

    tiles: dict[int, float]      # by rows: K blocks of so many rows that fold, with a power of two for each row
    square: float                # K blocks of 128 rows that one power of two holds, as FP8 kernels scale weights
    two_parts: float             # K blocks of 128 rows that are the sum of two E4M3 parts, of upper and of lower bits
    whole: float                 # rows that fold with one power of two for all of their K
    rounded: float               # elements that this one would round
    columns: float | None        # as weights: columns of A that a tile of 256 rows asks for beside; None: there is no copy

    @property
    def products(self) -> float:
        """FP8 products that a K block of 128 rows takes on average, where what doesn't fold is two parts."""
        return 2.0 - self.tiles[128]


def fold_rates(q: ScaledTensor) -> FoldRates:
    """The rates of contiguous MXFP8 `q`, `[R, K]` or `[E, R, K]`, E4M3. Tiles are of rows of one expert, those at the end may have
    fewer.

    Raises TypeError or ValueError for anything else.
    """
    expect(isinstance(q, ScaledTensor), "q", type(q).__name__, "a ScaledTensor (narrowgemm.quantize)", error=TypeError)
    expect(q.format == MXFP8, "format", q.format.name, "mxfp8, E4M3")
    expect(q.data.numel() > 0, "shape", tuple(q.shape), "no empty axis")
    assert q.scale is not None
    data, scale = (x.view(-1, *x.shape[-2:]) for x in (q.data.view(torch.uint8), q.scale))
    copy = fold(data, scale)
    columns = None if copy is None else copy.part("at", *data.shape)[:, -1].float().mean().item() / -(-data.shape[1] // TILE)
    per_expert = [_blocks(q[e]) for e in range(q.shape[0])] if q.data.dim() == 3 else [_blocks(q)]
    most, last = (torch.stack(x) for x in zip(*per_expert))                 # [E, R, K blocks, BLOCK]
    room = last.amin(-1) - most.amax(-1)
    once, twice = room >= LOWEST, room >= LOWEST - BINADES
    top = most.amax((-2, -1), keepdim=True)
    lost = last - top < LOWEST
    return FoldRates({rows: _tiles(once, rows) for rows in TILES}, _square(most.amax(-1), last.amin(-1)), _tiles(twice, 128),
                     1.0 - lost.any(-1).any(-1).double().mean().item(), lost.sum().item() / q.data.numel(), columns)


def _square(most: Tensor, last: Tensor) -> float:
    """Of `[E, R, K blocks]`, what rows of a K block ask for: the share of 128x128 blocks that one power of two holds."""
    pad = (0, 0, 0, -most.shape[1] % 128)
    top = torch.nn.functional.pad(most, pad, value=-NOTHING).view(most.shape[0], -1, 128, most.shape[2]).amax(2)
    low = torch.nn.functional.pad(last, pad, value=NOTHING).view(top.shape[0], -1, 128, top.shape[2]).amin(2)
    return (low - top >= LOWEST).double().mean().item()


def _tiles(folds: Tensor, rows: int) -> float:
    """Of bool `[E, R, K blocks]`, in tiles of `rows` rows: the share of all true."""
    whole = torch.nn.functional.pad(folds, (0, 0, 0, -folds.shape[1] % rows), value=True)
    return whole.view(whole.shape[0], -1, rows, whole.shape[2]).all(2).double().mean().item()


def _blocks(q: ScaledTensor) -> tuple[Tensor, Tensor]:
    """int16 `[R, K blocks, BLOCK]`: the least b with |value| <= 448 * 2^b, and the exponent of the lowest set bit. Zeros and NaN
    ask for nothing."""
    assert q.scale is not None
    k = q.shape[-1]
    code = q.data.view(torch.uint8).to(torch.int16) & 127
    scale = q.scale.repeat_interleave(32, -1)[..., :k].to(torch.int16)
    normal = code >= 8
    m = torch.where(normal, 8 + (code & 7), code & 7)
    m = torch.where((code == 127) | (scale == 255), 0, m)
    p = torch.where(normal, (code >> 3) - 10, LOWEST) + scale - 127         # value = m * 2^p, m < 16
    width, zeros = (torch.tensor(t, dtype=torch.int16, device=m.device) for t in (
        [0, 1, 2, 2, 3, 3, 3, 3, *[4] * 8], [0, 0, 1, 0, 2, 0, 1, 0, 3, 0, 1, 0, 2, 0, 1, 0]))
    index = m.to(torch.int64)
    most = torch.where(m > 0, p + width[index] - 9 + (m == 15).to(torch.int16), -NOTHING)      # 14 * 2^5 = 448; 15 needs the next
    last = torch.where(m > 0, p + zeros[index], NOTHING)
    pad = (0, -k % BLOCK)
    return (torch.nn.functional.pad(most, pad, value=-NOTHING).view(m.shape[0], -1, BLOCK),
            torch.nn.functional.pad(last, pad, value=NOTHING).view(m.shape[0], -1, BLOCK))
