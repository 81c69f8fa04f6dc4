"""Where `narrowgemm.prepack` puts the bits of weights: each 4 bytes' codes among themselves, then rows and blocks of K."""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import Format

PREPACK = "narrow_sm90/1"
FP8_PREPACK = "narrow_fp8_sm90/1"
ROWS_PREPACK = "rows_sm90/1"
ORDERS = (PREPACK, FP8_PREPACK)         # of tiles; weights in `ROWS_PREPACK` are given to kernels as any that are not packed
TILE = 64                        # rows


def pack_data(rows: Tensor, fmt: Format, order: str) -> Tensor:
    """Bytes `[E, NT * 64, C]` in the packed order. E2M1: `[E, NT, KC, 64, 64]`; E4M3: `[E, NT, KC, 2, 64, 64]`."""
    groups, _, columns = rows.shape
    x = spread(rows.view(torch.int32), fmt, order).view(torch.uint8)
    if fmt.element == "e2m1":
        return x.view(groups, -1, TILE, columns // 64, 64).permute(0, 1, 3, 2, 4)
    x = x.view(groups, -1, TILE, columns // 128, 4, 2, 16)
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(groups, -1, columns // 128, 2, TILE, TILE)


def unpack_data(packed: Tensor, fmt: Format, order: str) -> Tensor:
    """Bytes `[E, NT * 64, C]` in the plain order."""
    groups, tiles, chunks = packed.shape[:3]
    if fmt.element == "e2m1":
        x = packed.permute(0, 1, 3, 2, 4).reshape(groups, tiles * TILE, chunks * 64)
    else:
        x = packed.view(groups, tiles, chunks, 2, TILE, 4, 16).permute(0, 1, 4, 2, 5, 3, 6)
        x = x.reshape(groups, tiles * TILE, chunks * 128)
    return gather(x.view(torch.int32), fmt, order).view(torch.uint8)


# Where bits go, as (their mask, from which bit, to which): bits of a word of 4 bytes.
# E2M1: four codes share 16 bits; three of them are taken by a shift and one mask, with sign and magnitude where BF16 has its
# sign, its two lowest exponent bits and its highest mantissa bit. The fourth gets the bits that are left.
_E2M1 = tuple((mask, 8 * code + 4 * half, left + 16 * half) for half in (0, 1) for code, mask, left in (
    (0, 8, 12), (0, 7, 6), (1, 8, 9), (1, 7, 3), (2, 8, 6), (2, 7, 0), (3, 8, 11), (3, 6, 9), (3, 1, 13)))
# in `FP8_PREPACK` magnitudes stay, and this is where the signs of a word's eight codes are: those of the first four where the bytes
# of E4M3 have theirs, the others four bits lower
_SIGNS = ((0x77777777, 0, 0), *((1, 4 * code + 3, bit) for code, bit in enumerate((7, 15, 23, 31, 3, 11, 19, 27))))
# E4M3: two codes share 16 bits
_E4M3 = tuple((mask, 8 * half + 16 * code, left + 16 * half) for half in (0, 1) for code, mask, left in (
    (0, 0x80, 8), (0, 0x7F, 4), (1, 0xF0, 7), (1, 0x0F, 0)))


def _moves(fmt: Format, order: str) -> tuple[tuple[int, int, int], ...]:
    return _E4M3 if fmt.element == "e4m3" else _E2M1 if order == PREPACK else _SIGNS


def spread(words: Tensor, fmt: Format, order: str) -> Tensor:
    """int32 words of codes, K ascending, in the packed order."""
    out = torch.zeros_like(words)
    for mask, at, to in _moves(fmt, order):
        out |= ((words >> at) & mask) << to
    return out


def gather(words: Tensor, fmt: Format, order: str) -> Tensor:
    """What `spread` was given."""
    out = torch.zeros_like(words)
    for mask, at, to in _moves(fmt, order):
        out |= ((words >> to) & mask) << at
    return out
