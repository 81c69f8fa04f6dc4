"""Values of test operands: random ones that depend on a seed alone, poison, and how they come into an operand."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from ..formats import E8M0_NAN, Format, ScaledTensor
from ..scales import mn_major_tma_aligned

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


def quantized(x: Tensor, fmt: Format) -> ScaledTensor:
    """`x` in any format: cast where it has no scales."""
    if not fmt.scaled:
        return ScaledTensor(x.to(fmt.elem.dtype), None, fmt)
    from ..ops.quantize import quantize

    return quantize(x, fmt)


def put(target: ScaledTensor, index: Any, value: ScaledTensor) -> None:
    """Rows or a group of `target`, with their scales; a scale of the whole tensor is taken over."""
    target.data[index] = value.data
    if target.scale is not None and value.scale is not None:
        target.scale[index if target.format.group[0] or isinstance(index, int) else slice(None)] = value.scale


def mn_major(x: ScaledTensor) -> ScaledTensor:
    """Scales of rows MN-major, as TMA loads them; other scales as they are."""
    if x.scale is None or x.format.group[0] != 1:
        return x
    return ScaledTensor(x.data, mn_major_tma_aligned(x.scale), x.format)
