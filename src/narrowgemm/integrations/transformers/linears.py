"""Linear layers of a block FP8 checkpoint on `narrowgemm.gemm`.

transformers runs its `FP8Linear` on kernels that it downloads from the hub. Here the modules keep their parameters and
change their class, so that an FP8 checkpoint runs with what is installed. Imported on demand: it needs transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import FP8Linear

from ...formats import FP8_1x128, FP8_128x128, ScaledTensor
from ...ops.gemm import gemm
from ...ops.quantize import quantize


class NarrowFP8Linear(FP8Linear):
    """`[..., K] -> [..., N]` with E4M3 weights in 128 x 128 blocks and inputs quantised 1 x 128. Inference only."""

    def forward(self, input: Tensor) -> Tensor:
        scale = self.weight_scale_inv.detach()
        if scale.dtype == torch.float8_e8m0fnu:
            scale = scale.view(torch.uint8)
        fmt = FP8_128x128.with_scale("e8m0" if scale.dtype == torch.uint8 else "fp32")
        rows = quantize(input.detach().reshape(-1, input.shape[-1]), FP8_1x128, scale_layout="mn_major")
        y = gemm(rows, ScaledTensor(self.weight.detach(), scale, fmt), out_dtype=input.dtype)
        y = y if self.bias is None else y + self.bias.detach().to(y.dtype)
        return y.view(*input.shape[:-1], y.shape[-1])


def serve(model: nn.Module) -> int:
    """Put every `FP8Linear` in 128 x 128 blocks with dynamic activations on `gemm`, in place; how many."""
    linears: list[Any] = [m for m in model.modules() if type(m) is FP8Linear]
    found = [m for m in linears if m.activation_scheme == "dynamic" and m.block_size and tuple(m.block_size) == (128, 128)]
    for module in found:
        module.__class__ = NarrowFP8Linear
    return len(found)
