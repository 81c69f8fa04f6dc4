"""MXFP8 weights for many rows: folded into E4M3 with one power of two a row, without loss.

The weights of a row are codes times one power of two, instead of one for every 32 of K, so that an FP8 tensor core multiplies them
as they lie. Elements that this would round or that it can't hold are left out (zero), and kept beside, in BF16: for each tile of
`TILE` rows a list of the columns of K that hold any, and their values. A product adds them by columns of A picked for that tile. Of
normal weights with K = 6144 that is about 110 columns a tile; where there are more than `MOST` columns, or scales are out of what
the product takes, there is no copy.

The codes are a second copy of the weights; or each call makes them (`kernels/gluon/sm90/fold_codes.py`) from weights that are in
the order that they came in, and only the rest is kept.

`FOLDED` is the order's id and version:

    data  uint8 [G, N, K]   the codes, or None
    rest  uint8, at the offsets of `Regions`:
          top    uint8 [G, N]               the row's power of two, an E8M0 code, 6 added
          at     int32 [G, tiles + 1]       the first pick of each tile: multiples of `STEP`
          starts int32 [G, K blocks + 1]    where the entries of a block of 128 of K start
          picks  int32 [G, picks]           128 * pick + column inside the block, by block
          values BF16 [G, N, columns]       a row's elements at its tile's picks, over the row's power of two
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import expect
from .formats import E8M0_NAN

FOLDED = "folded_sm90/1"
TILE, STEP, BLOCK = 256, 64, 128
MOST = 256                  # columns of picks of a tile
LOWERED = 6                 # powers of two that a row's may lie below the one that its largest element asks for
SMALLEST = -49              # power of two of an element that is left out, over its row's
BIAS = 6                    # of `top`
NOTHING = 1000              # beyond every exponent
CHUNK = 1 << 24             # elements looked at at a time
USUAL = 128                 # columns of picks of a tile of normal weights with K = 6144
FEWEST_ROWS = 512           # of A, from which on weights that are held as they came may be folded


class Regions(NamedTuple):
    """Byte offsets in `FoldedCopy.rest`."""

    top: int
    at: int
    starts: int
    picks: int
    values: int
    size: int


def regions(groups: int, n: int, k: int, columns: int, picks: int) -> Regions:
    tiles, blocks = -(-n // TILE), -(-k // BLOCK)
    sizes = (groups * n, 4 * groups * (tiles + 1), 4 * groups * (blocks + 1), 4 * groups * picks, 2 * groups * n * columns)
    return Regions(*accumulate((-(-s // 256) * 256 for s in sizes), initial=0))


@dataclass(frozen=True, eq=False)
class FoldedCopy:
    """See the module. columns: of `values`, at least as many as any tile has picks. picks: of the group that has most."""

    data: Tensor | None
    rest: Tensor
    columns: int
    picks: int

    def to(self, device: torch.device | str) -> FoldedCopy:
        return FoldedCopy(None if self.data is None else self.data.to(device), self.rest.to(device), self.columns, self.picks)

    def check(self, groups: int, n: int, k: int) -> None:
        """Shapes and dtypes are those of weights `[groups, n, k]`. ValueError or TypeError elsewhere."""
        for name, v in (("columns", self.columns), ("picks", self.picks)):
            expect(v >= STEP and v % STEP == 0, f"folded {name}", v, f"a multiple of {STEP}")
        for name, x, shape in (("data", self.data, (groups, n, k)),
                               ("rest", self.rest, (regions(groups, n, k, self.columns, self.picks).size,))):
            if x is None:
                continue
            expect(x.dtype == torch.uint8, f"folded {name}, dtype", x.dtype, "uint8", error=TypeError)
            expect(tuple(x.shape) == shape, f"folded {name}, shape", tuple(x.shape), str(shape))
            expect(x.is_contiguous(), f"folded {name}, strides", x.stride(), "contiguous")
            expect(x.device == self.rest.device, f"folded {name}, device", x.device, f"the rest's, {self.rest.device}")

    def part(self, name: str, groups: int, n: int, k: int) -> Tensor:
        """A part of `rest` by its name, in its shape."""
        at = regions(groups, n, k, self.columns, self.picks)
        tiles, blocks = -(-n // TILE), -(-k // BLOCK)
        dtype, shape = {"top": (torch.uint8, (groups, n)), "at": (torch.int32, (groups, tiles + 1)),
                        "starts": (torch.int32, (groups, blocks + 1)), "picks": (torch.int32, (groups, self.picks)),
                        "values": (torch.bfloat16, (groups, n, self.columns))}[name]
        start, count = getattr(at, name), torch.Size(shape).numel()
        return self.rest[start: start + count * dtype.itemsize].view(dtype).view(shape)


def fold(data: Tensor, scale: Tensor, keep: bool = True) -> FoldedCopy | None:
    """The copy of E4M3 `[G, N, K]` bytes with E8M0 `[G, N, K / 32]` codes, on their device; None where there is none. keep:
    with the codes."""
    groups, n, k = data.shape
    if bool((scale == E8M0_NAN).any()):
        return None
    codes = torch.empty_like(data, memory_format=torch.contiguous_format) if keep else None
    tops, found = [], []
    for g in range(groups):
        one = _fold_group(data[g], scale[g], None if codes is None else codes[g])
        if one is None:
            return None
        tops.append(one[0])
        found.append(one[1:])
    tiles = -(-n // TILE)
    columns = max(STEP, *(int(counts.max()) for counts, _, _ in found))
    total = max(STEP, *(int(counts.sum()) for counts, _, _ in found))
    at = regions(groups, n, k, columns, total)
    out = FoldedCopy(codes, torch.zeros(at.size, dtype=torch.uint8, device=data.device), columns, total)
    out.part("top", groups, n, k)[:] = torch.stack(tops)
    for g, (counts, where, values) in enumerate(found):
        starts = torch.zeros(tiles + 1, dtype=torch.int64, device=data.device)
        starts[1:] = counts.cumsum(0)
        out.part("at", groups, n, k)[g] = starts.int()
        rank = where.int().cumsum(1, dtype=torch.int32) - 1                 # [tiles, K]: which pick of its tile a column is
        tile, column = where.nonzero(as_tuple=True)
        pick, column = starts[tile] + rank[tile, column], column
        # what is left of a tile's last step picks any column, and multiplies it by zero; blocks take turns
        taken = torch.zeros(int(counts.sum()), dtype=torch.bool, device=data.device)
        taken[pick] = True
        free = (~taken).nonzero()[:, 0]
        turns = torch.arange(len(free), device=free.device) % -(-k // BLOCK) * BLOCK
        pick, column = torch.cat([pick, free]), torch.cat([column, turns])
        order = (column // BLOCK).argsort(stable=True)
        pick, column = pick[order], column[order]
        out.part("picks", groups, n, k)[g, : len(pick)] = (pick * BLOCK + column % BLOCK).int()
        per_block = torch.bincount(column // BLOCK, minlength=-(-k // BLOCK))
        out.part("starts", groups, n, k)[g, 1:] = per_block.cumsum(0).int()
        row, column, value = values
        out.part("values", groups, n, k)[g, row, rank[row // TILE, column].long()] = value
    return out


def _fold_group(data: Tensor, scale: Tensor, codes: Tensor | None) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]] | None:
    """Of one group: (top `[N]`, picks of each tile `[tiles]`, bool `[tiles, K]`, (row, column, value) of what is left out). Writes
    `codes`, if any."""
    n, k = data.shape
    value, most, last = _tables(data.device)
    step = max(1, CHUNK // (TILE * k)) * TILE
    tops, where, left = [], [], []
    for row in range(0, n, step):
        code = data[row: row + step].int()
        shift = scale[row: row + step].to(torch.int16).repeat_interleave(32, 1)[:, :k] - 127
        high, low = most[code] + shift, last[code] + shift
        top = high.amax(1, keepdim=True)
        top = torch.where(top < -NOTHING // 2, 0, top)
        # the power of two that leaves out fewest elements; of equals the largest
        counts = torch.stack([_left_out(high, low, top - d).sum(1) for d in range(LOWERED)])
        power = top - counts.argmin(0, keepdim=True).T.to(torch.int16)
        out = _left_out(high, low, power)
        exact = value[code] * torch.exp2((shift - power).clamp(-100, 100).float())
        if codes is not None:
            codes[row: row + step] = torch.where(out, 0.0, exact).to(torch.float8_e4m3fn).view(torch.uint8)
        r, c = out.nonzero(as_tuple=True)
        v = exact[r, c]
        field = power[:, 0] + 127 + BIAS
        if bool((v.abs() < 2.0 ** SMALLEST).any() | (field < BIAS + 1).any() | (field > 254).any()):
            return None
        tops.append(field.to(torch.uint8))
        left.append((r + row, c, v.bfloat16()))
        pad = torch.nn.functional.pad(out, (0, 0, 0, -out.shape[0] % TILE))
        where.append(pad.view(-1, TILE, k).any(1))
    mask = torch.cat(where)
    counts = mask.sum(1)
    if int(counts.max()) > MOST:
        return None
    return torch.cat(tops), (counts + STEP - 1) // STEP * STEP, mask, tuple(torch.cat(x) for x in zip(*left))


def _left_out(high: Tensor, low: Tensor, power: Tensor) -> Tensor:
    """Elements that E4M3 times 2^power does not hold."""
    return (high > power) | (low < power - 9)


def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """By E4M3 code: its value FP32, the least b with |value| <= 448 * 2^b, and the exponent of the lowest set bit, int16. Zeros and
    NaN ask for nothing."""
    code = torch.arange(256, dtype=torch.uint8, device="cpu")
    value = code.view(torch.float8_e4m3fn).float()
    size = value.abs().nan_to_num(0.0)
    mantissa, power = torch.frexp(size)                                 # size = mantissa * 2^power, mantissa in [0.5, 1)
    most = power - 9 + (mantissa > 0.875).int()                         # 448 = 0.875 * 2^9
    bits = (mantissa * 16).int()
    last = power - 4 + torch.tensor([0, 0, 1, 0, 2, 0, 1, 0, 3, 0, 1, 0, 2, 0, 1, 0], device="cpu")[bits & 15]
    none = size == 0
    most, last = torch.where(none, -NOTHING, most), torch.where(none, NOTHING, last)
    return value.to(device), most.to(torch.int16).to(device), last.to(torch.int16).to(device)
