"""Scales of packed weights: how far BF16's powers of two hold them, the shift of rows that lie beyond, and the order in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import E8M0_NAN, Format

# exponent field of the factor for scale code 0, and the codes for which the product is exact in BF16
BIAS = {"e2m1": 126, "e4m3": 120}
WINDOW = {"e2m1": (-5, 128), "e4m3": (3, 134)}


def in_window(scale: Tensor, fmt: Format) -> Tensor:
    """Whether every code, of blocks of zeros too, has a field of its own that a BF16 power of two can be."""
    return (scale.to(torch.int16) <= WINDOW[fmt.element][1]).all()


def power_of_two(exponent: Tensor) -> Tensor:
    """FP32 2^exponent for whole exponents in [-149, 127], NaN for NaN: from bits, since a device's pow may flush the small ones."""
    e = exponent.nan_to_num(0.0).to(torch.int32)
    bits = torch.where(e >= -126, (e + 127) << 23, 1 << (e + 149).clamp(0, 22))
    return torch.where(exponent.isnan(), torch.nan, bits.view(torch.float32))


def shifts(data: Tensor, scale: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """(shift FP32 `[E, N]`, fits bool `[E, N]`): what a row's codes are lowered by so that they lie in the window; NaN where the
    row holds a NaN. `data` bytes `[E, N, C]`, `scale` codes `[E, N, S]`. Blocks of zeros count for nothing."""
    low, high = WINDOW[fmt.element]
    nan = (scale == E8M0_NAN).any(-1)
    if fmt.element == "e4m3":
        nan |= (_block_bits(data, scale, fmt) == 0x7F).any(-1)
    top, bottom = row_codes(data, scale, fmt)
    inside = (bottom >= low) & (top <= high) | (top < 0)
    # the least shift: a large one would let sums overflow on the way to a result that does not
    least = torch.where(top > high, top - high, torch.maximum(bottom - low, top - high))
    shift = torch.where(inside, 0, least)
    fits = inside | (bottom - shift >= low)
    return torch.where(nan, torch.nan, shift.float()), fits


def row_codes(data: Tensor, scale: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """(largest, smallest) scale code of each row's blocks that hold anything, int16 `[E, N]`; -1 and 255 where none does."""
    codes = scale.to(torch.int16)
    live = (_block_bits(data, scale, fmt) > 0) & (codes != E8M0_NAN)
    return torch.where(live, codes, -1).amax(-1), torch.where(live, codes, 255).amin(-1)


def _block_bits(data: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """The largest magnitude bits of each block, as bytes: 0 where a block holds nothing but zeros."""
    per_block = 32 // fmt.elem.per_byte
    padded = torch.nn.functional.pad(data, (0, scale.shape[-1] * per_block - data.shape[-1]))
    bits = padded & (0x77 if fmt.element == "e2m1" else 0x7F)
    return bits.view(*data.shape[:-1], scale.shape[-1], per_block).amax(-1)


def pack_scale(fields: Tensor) -> Tensor:
    """`[E, NT * 64, 8 * KS]` fields to `[E, NT, KS, 4, 8, 4, 2, 2]`."""
    x = fields.view(fields.shape[0], -1, 4, 2, 8, fields.shape[-1] // 8, 2, 4)       # E tile warp h g kb chunk block
    return x.permute(0, 1, 5, 2, 4, 7, 6, 3)


def unpack_scale(scale: Tensor) -> Tensor:
    x = scale.permute(0, 1, 3, 7, 4, 2, 6, 5)                                       # E tile warp h g kb chunk block
    return x.reshape(scale.shape[0], -1, scale.shape[2] * 8)
