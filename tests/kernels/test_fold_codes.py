"""The launch that folds MXFP8 weights anew: bit for bit the codes of `prepack`'s copy."""

from __future__ import annotations

import pytest
import torch

from narrowgemm.formats import MXFP8
from narrowgemm.prepack_folded import FoldedCopy, fold
from narrowgemm.reference.quantize import quantize


def signless(codes: torch.Tensor) -> torch.Tensor:
    """NaN without its sign, which a GPU doesn't keep."""
    return torch.where((codes & 0x7F) == 0x7F, 0x7F, codes)


@pytest.mark.parametrize("n, k", [(19, 256), (8, 1152)])
@pytest.mark.parametrize("mn_major", [False, True])
def test_codes_are_those_of_the_copy(device: str, n: int, k: int, mn_major: bool) -> None:
    from narrowgemm.kernels.gluon.sm90.fold_codes import COLUMNS, ROWS
    from narrowgemm.kernels.gluon.sm90.fold_codes_device import fold_codes_kernel

    w = quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(n)), MXFP8)
    data, scale = w.data.view(torch.uint8), w.scale
    assert scale is not None
    data[1, 32:64], scale[1, 1] = torch.arange(32, dtype=torch.uint8), scale[1, 0] - 5      # subnormal numbers, some of which stay
    data[2, 64:96], scale[2, 2] = 0, 254            # zeros under any scale
    scale[3, 3] -= 30                               # of which nothing stays
    data[4], scale[4] = 0x80, 7                     # minus zeros
    data[5, 70], data[6, 71] = 0x7F, 0xFF           # NaN stays
    scale[7] = torch.where(torch.arange(k // 32) % 2 == 0, 150, 120).to(torch.uint8)        # most of the row is left out
    copy = fold(data[None], scale[None]) if k == 256 else fold(data[None, :7], scale[None, :7])
    assert isinstance(copy, FoldedCopy) and copy.data is not None
    rows = copy.data.shape[1]
    top = copy.part("top", 1, rows, k)[0].to(device)
    codes = (scale[:rows].mT.contiguous().mT if mn_major else scale[:rows]).to(device)
    made = torch.full((rows + 1, k), 9, dtype=torch.uint8, device=device)
    fold_codes_kernel[(-(-rows // ROWS) * -(-k // COLUMNS),)](
        data[:rows].to(device).view(torch.float8_e4m3fn), codes, top, made.view(torch.float8_e4m3fn), rows, k, k, *codes.stride(),
        BN=ROWS, BK=COLUMNS)
    assert torch.equal(signless(made[:rows].cpu()), signless(copy.data[0])) and bool((made[rows] == 9).all())
    assert k > 256 or not (copy.data[0, 3, 96:128] & 0x7F).any()
