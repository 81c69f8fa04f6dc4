"""E8M0 scales as FlyDSL's callers make them: rounded up in float32, then handed over as bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import expect
from ..deep_gemm.utils.math import ceil_to_ue8m0


def fp32_to_e8m0(scale: Tensor) -> Tensor:
    """|scale| rounded up to a power of two between 2^-126 and 2^127, float32: payload divided by it never saturates."""
    return ceil_to_ue8m0(scale)


def fp32_e8m0_to_byte(scale_e8m0_f32: Tensor) -> Tensor:
    """The E8M0 codes, uint8, of float32 powers of two as `fp32_to_e8m0` gives; a mantissa is dropped, not rounded.

    Reads nothing back. Raises TypeError for another dtype.
    """
    expect(scale_e8m0_f32.dtype == torch.float32, "scale_e8m0_f32, dtype", scale_e8m0_f32.dtype, "torch.float32",
           error=TypeError)
    return ((scale_e8m0_f32.view(torch.int32) >> 23) & 0xFF).to(torch.uint8)
