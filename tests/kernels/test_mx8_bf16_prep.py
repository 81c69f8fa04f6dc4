"""The launch in front of the Hopper kernel for plain MXFP8 weights by BF16 wgmma: tokens in the order of its registers."""

from __future__ import annotations

import pytest
import torch

from narrowgemm.formats import MXFP8
from narrowgemm.kernels.gluon.sm90.mx8_bf16 import PrepStatic
from narrowgemm.reference.quantize import dequantize, quantize

M, K = 3, 384


def run(device: str, x: torch.Tensor, xs: torch.Tensor, bk: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    from narrowgemm.kernels.gluon.sm90.mx8_bf16_prep_device import mx8_bf16_prep_kernel as kernel

    out, factor = torch.full((M, K), 7.0, device=device, dtype=torch.bfloat16), torch.full((M,), 7.0, device=device)
    kernel[(M, -(-K // bk))](x, xs, out, factor, K, x.stride(0), xs.stride(0), xs.stride(1), PrepStatic(bk, PDL=False))
    return out, factor


def row_order(x: torch.Tensor) -> torch.Tensor:
    """out[w * 16 + h * 8 + q * 2 + r] = in[q * 32 + w * 4 + r * 2 + h] of every 128."""
    return x.view(x.shape[0], -1, 4, 8, 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(x.shape)


@pytest.mark.parametrize("columns_first", [False, True])
def test_tokens(device: str, columns_first: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x = quantize(torch.randn(M, K, generator=g), MXFP8)
    scale = x.scale.to(device)
    scale[1] = torch.randint(246, 254, (K // 32,), generator=g).byte()
    scale[2, 3] = 255
    if columns_first:
        scale = scale.t().contiguous().t()
    got, factor = run(device, x.data.to(device), scale)
    assert factor[0] == 1.0 and factor[1] == 2.0 ** (int(scale[1].max()) - 240) and factor[2].isnan()
    want = dequantize(type(x)(x.data[:1], x.scale[:1], x.format)).to(device)
    assert torch.equal(got[:1].float(), row_order(want))
    high = x.data[1:2].double().to(device) * torch.exp2(scale[1:2].double() - 127).repeat_interleave(32, 1)
    assert torch.equal(got[1:2].double() * factor[1].double(), row_order(high))
