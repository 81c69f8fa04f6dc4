"""Where `narrowgemm.prepack` puts the bits of weights: each 4 bytes' codes among themselves, then rows and blocks of K."""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import Format

PREPACK = "narrow_sm90/1"
FP8_PREPACK = "narrow_fp8_sm90/1"
ORDERS = (PREPACK, FP8_PREPACK)
TILE = 64                        # rows


def pack_data(rows: Tensor, fmt: Format, order: str) -> Tensor:
    """Bytes `[E, NT * 64, C]` in the packed order. E2M1: `[E, NT, KC, 64, 64]`; E4M3: `[E, NT, KC, 2, 64, 64]`."""
    groups, _, columns = rows.shape
    words = rows.view(torch.int32)
    if fmt.element == "e2m1":
        x = spread_e2m1(words) if order == PREPACK else spread_signs(words)
        x = x.view(torch.uint8).view(groups, -1, TILE, columns // 64, 64)
        return x.permute(0, 1, 3, 2, 4)
    x = _spread_e4m3(words).view(torch.uint8).view(groups, -1, TILE, columns // 128, 4, 2, 16)
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(groups, -1, columns // 128, 2, TILE, TILE)


def unpack_data(packed: Tensor, fmt: Format, order: str) -> Tensor:
    """Bytes `[E, NT * 64, C]` in the plain order."""
    groups, tiles, chunks = packed.shape[:3]
    if fmt.element == "e2m1":
        x = packed.permute(0, 1, 3, 2, 4).reshape(groups, tiles * TILE, chunks * 64)
        words = x.view(torch.int32)
        return (_gather_e2m1(words) if order == PREPACK else _gather_signs(words)).view(torch.uint8)
    x = packed.view(groups, tiles, chunks, 2, TILE, 4, 16).permute(0, 1, 4, 2, 5, 3, 6)
    return _gather_e4m3(x.reshape(groups, tiles * TILE, chunks * 128).view(torch.int32)).view(torch.uint8)


# E2M1: four codes share 16 bits; three of them are taken by a shift and one mask, with sign and magnitude where BF16 has its
# sign, its two lowest exponent bits and its highest mantissa bit. The fourth gets the bits that are left.
# (code, mask of its bits, left shift to its place)
_E2M1 = ((0, 8, 12), (0, 7, 6), (1, 8, 9), (1, 7, 3), (2, 8, 6), (2, 7, 0), (3, 8, 11), (3, 6, 9), (3, 1, 13))
# in `FP8_PREPACK` magnitudes stay, and this is where the signs of a word's eight codes are: those of the first four where the bytes
# of E4M3 have theirs, the others four bits lower
_SIGNS = (7, 15, 23, 31, 3, 11, 19, 27)
# E4M3: two codes share 16 bits
_E4M3 = ((0, 0x80, 8), (0, 0x7F, 4), (1, 0xF0, 7), (1, 0x0F, 0))


def spread_e2m1(words: Tensor) -> Tensor:
    out = torch.zeros_like(words)
    for half in (0, 1):
        for code, mask, left in _E2M1:
            out |= ((words >> (8 * code + 4 * half)) & mask) << (left + 16 * half)
    return out


def _gather_e2m1(words: Tensor) -> Tensor:
    out = torch.zeros_like(words)
    for half in (0, 1):
        for code, mask, left in _E2M1:
            out |= ((words >> (left + 16 * half)) & mask) << (8 * code + 4 * half)
    return out


def spread_signs(words: Tensor) -> Tensor:
    out = words & 0x77777777
    for code, bit in enumerate(_SIGNS):
        out |= ((words >> (4 * code + 3)) & 1) << bit
    return out


def _gather_signs(words: Tensor) -> Tensor:
    out = words & 0x77777777
    for code, bit in enumerate(_SIGNS):
        out |= ((words >> bit) & 1) << (4 * code + 3)
    return out


def _spread_e4m3(words: Tensor) -> Tensor:
    out = torch.zeros_like(words)
    for half in (0, 1):
        for code, mask, left in _E4M3:
            out |= ((words >> (8 * half + 16 * code)) & mask) << (left + 16 * half)
    return out


def _gather_e4m3(words: Tensor) -> Tensor:
    out = torch.zeros_like(words)
    for half in (0, 1):
        for code, mask, left in _E4M3:
            out |= ((words >> (left + 16 * half)) & mask) << (8 * half + 16 * code)
    return out
