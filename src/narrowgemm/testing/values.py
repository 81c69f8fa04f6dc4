"""Values of test operands: random ones that depend on a seed alone, and poison."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from ..formats import E8M0_NAN, Format, ScaledTensor

NAN_BYTE = {"e4m3": 0x7F, "e5m2": 0x7F, "e2m1": 0x77}  # E2M1 has no NaN: its scale has


def draw(side: str, group: int, shape: tuple[int, ...], device: torch.device, seed: int) -> Tensor:
    """Normal BF16 values that depend on (side, group, shape, seed) and the kind of device alone."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed}/{side}/{group}/{shape}".encode()))
    return torch.randn(shape, device=device, generator=generator).bfloat16()


def poisoned(shape: tuple[int, ...], fmt: Format, device: torch.device) -> ScaledTensor:
    """An operand of logical `shape` `[..., R, K]` whose payload and scales are NaN."""
    packed = (*shape[:-1], shape[-1] // fmt.elem.per_byte)
    data = torch.empty(packed, dtype=fmt.elem.dtype, device=device)
    if fmt.element in NAN_BYTE:
        data.view(torch.uint8).fill_(NAN_BYTE[fmt.element])
    else:
        data.fill_(float("nan"))
    if not fmt.scaled:
        return ScaledTensor(data, None, fmt)
    dtype, nan = (torch.float32, float("nan")) if fmt.scale == "fp32" else (torch.uint8, E8M0_NAN)
    return ScaledTensor(data, torch.full(fmt.scale_shape(shape), nan, dtype=dtype, device=device), fmt)
