"""A's scales of 128 of K folded into one, 64 rows at a time, where that is exact: bits, flags, and what else goes to the product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from narrowgemm.formats import MXFP8, ScaledTensor
from narrowgemm.reference.quantize import dequantize, quantize

M, K = 150, 352
BLOCKS, COLUMN = 3, 152


def run(device: str, a: ScaledTensor, index: list[int] | None = None) -> dict[str, Tensor]:
    """7 is what was there."""
    from narrowgemm.kernels.gluon.sm90.fold_mixed_prep_device import clear_kernel, fold_mixed_kernel

    a = a.to(device)
    planes, masked = (a.shape[0], True) if a.data.dim() == 3 else (1, False)
    m = a.shape[-2]
    rb = -(-m // 64)
    out = {"y": torch.full((planes, m, BLOCKS * 128), 7, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn),
           "scale": torch.full((planes, BLOCKS, 4, COLUMN), 7.0, device=device),
           "flags": torch.full((planes, rb, BLOCKS), 7, dtype=torch.int32, device=device),
           "count": torch.full((1,), 7, dtype=torch.int32, device=device)}
    count = torch.tensor(index or [0], dtype=torch.int32, device=device)
    clear_kernel[(1,)](out["count"])
    fold_mixed_kernel[(planes * rb * 2,)](
        a.data, a.scale, count, out["y"], out["scale"], out["flags"], out["count"], m, K, BLOCKS, rb, 2,
        a.data.stride(0) if masked else 0, a.data.stride(-2), a.scale.stride(0) if masked else 0, a.scale.stride(-2),
        a.scale.stride(-1), COLUMN, MASKED=masked, STAGES=3)
    return out


def values(out: dict[str, Tensor]) -> Tensor:
    """[planes, M, BLOCKS * 128] in FP64."""
    planes, m, k = out["y"].shape
    scale = out["scale"][..., :m].double().permute(0, 3, 1, 2).reshape(planes, m, k // 32).repeat_interleave(32, -1)
    return out["y"].double() * scale


def test_values_stay_and_flags_say_where_there_are_four_scales(device: str) -> None:
    a = quantize(torch.randn(M, K, generator=torch.Generator().manual_seed(0)), MXFP8)
    assert a.scale is not None
    spoiled = {(0, 1): (3, 4), (2, 2): (149, 10)}               # (64 rows, K block): (row, block of 32)
    a.data[3, 130], a.scale[3, 5] = 0.001953125, a.scale[3, 4] - 1      # 2^-9 under half of the largest scale of its 128
    a.data[3, 160] = 0.001953125
    a.scale[149, 10] -= 20
    got = run(device, a)
    want = dequantize(a, torch.float32).double()
    assert torch.equal(values(got).cpu()[0, :, :K], want) and not values(got)[0, :, K:].any()
    flags = got["flags"].cpu()[0]
    for rb, kb in ((r, k) for r in range(3) for k in range(BLOCKS)):
        scale = got["scale"].cpu()[0, kb, :, rb * 64: min(M, rb * 64 + 64)]
        assert flags[rb, kb] in (0, 1) and (flags[rb, kb] == 1 or (scale == scale[:1]).all())
        assert flags[rb, kb] or (rb, kb) not in spoiled
    assert got["count"].item() == int(flags.sum()) and flags.sum() < flags.numel()


@pytest.mark.parametrize("code, flagged, counted", [(255, True, False), (5, False, True), (250, False, True)])
def test_scales_that_are_far_out(device: str, code: int, flagged: bool, counted: bool) -> None:
    a = quantize(torch.ones(M, K), MXFP8)
    assert a.scale is not None
    a.scale[:] = 127
    if code == 255:
        a.scale[7, 0] = 255
    else:
        a.scale[7] = code
    got = run(device, a)
    assert got["flags"].cpu()[0, 0, 0] == int(flagged) and (got["count"].item() > 1 << 20) == counted
    want = a.data.double() * torch.where(a.scale == 255, torch.nan, torch.exp2(a.scale.double() - 127)).repeat_interleave(32, -1)
    assert torch.equal(values(got).cpu()[0, :, :K].nan_to_num(-1), want.nan_to_num(-1))


def test_blocks_of_zeros_fold_whatever_their_scale(device: str) -> None:
    a = quantize(torch.ones(M, K), MXFP8)
    assert a.scale is not None
    a.data.view(torch.uint8)[:, :32] = 0
    a.scale[:, 0] = 254
    got = run(device, a)
    assert not got["flags"].any() and got["count"].item() == 0 and (values(got)[0, :, 32:K] == 1).all()


def test_rows_of_a_masked_group_that_are_not_in_use_are_left_alone(device: str) -> None:
    a = quantize(torch.randn(2, M, K, generator=torch.Generator().manual_seed(1)), MXFP8)
    got = run(device, a, [70, 0])
    want = dequantize(a, torch.float32).double()
    assert torch.equal(values(got).cpu()[0, :70, :K], want[0, :70])
    assert (got["y"].view(torch.uint8)[0, 70:] == 7).all() and (got["y"].view(torch.uint8)[1] == 7).all()
    assert (got["flags"].cpu()[1] == 7).all() and (got["flags"].cpu()[0, 2] == 7).all()
