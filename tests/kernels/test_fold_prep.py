"""The launch in front of the Hopper prefill kernel with folded weights: scales as FP32 with rows contiguous, MXFP4 as E4M3 with
1x128 scales where that is exact, and a flag where it is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from narrowgemm.formats import MXFP4, ScaledTensor
from narrowgemm.reference.quantize import dequantize

from .. import _gluon as emu
from . import _ptx

BM = 32


def rows(x: ScaledTensor, device: str, programs: int = 3, index: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """(E4M3 as FP32 [planes, M, KB * 128], scales [planes, KB, 4, M], flags)."""
    from narrowgemm.kernels.gluon.sm90.fold_prep_device import fold_rows_kernel as kernel

    planes, m, k = x.shape
    blocks, column = -(-k // 128), -(-m // 4) * 4
    y = torch.full((planes, m, blocks * 128), 1.0, device=device).to(torch.float8_e4m3fn)
    ys = torch.full((planes, blocks, 4, column), 7.0, device=device)
    flags = torch.full((programs,), 9, dtype=torch.int32, device=device)
    data, scale = x.data.to(device), x.scale.to(device)
    kernel[(programs,)](data, scale, flags if index is None else index, y, ys, flags, m, k, blocks, planes * -(-m // BM),
                        data.stride(0), data.stride(1), scale.stride(0), scale.stride(1), scale.stride(2), column, BM=BM,
                        MASKED=index is not None)
    return y.float().cpu(), ys[..., :m].cpu(), flags.tolist()


def words(x: ScaledTensor, programs: int = 3, index: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """As `rows`, by the Gluon kernel, emulated; its PTX runs in `_ptx`."""
    device = emu.load_device_module("fold_words_device")
    names = device.fold_words_kernel.__globals__
    names["look_up"] = lambda x, low, high: emu.Tensor(np.ascontiguousarray(np.stack(_ptx.run(
        names["WORD_ASM"], x.a.view(np.uint32), low.a.view(np.uint32), high.a.view(np.uint32)), -1)).reshape(32, 32).view(np.int32))
    planes, m, k = x.shape
    blocks, column = -(-k // 128), -(-m // 4) * 4
    y = torch.full((planes, m, blocks * 128), 1.0).to(torch.float8_e4m3fn).view(torch.uint8)
    ys = torch.full((planes, blocks, 4, column), 7.0)
    flags = torch.full((programs,), 9, dtype=torch.int32)
    data = x.data.contiguous()
    emu.launch(device.fold_words_kernel, programs, emu.Pointer(data.numpy().reshape(-1).view(np.int32)),
               emu.Pointer(x.scale.contiguous().numpy().reshape(-1)), emu.Pointer((flags if index is None else index).numpy()),
               emu.Pointer(y.numpy().reshape(-1).view(np.int32)), emu.Pointer(ys.numpy().reshape(-1)), emu.Pointer(flags.numpy()), m,
               k // 32, blocks, planes * -(-m // BM), data.stride(0) // 4, data.stride(1) // 4, *x.scale.contiguous().stride(), column,
               index is not None)
    return y.view(torch.float8_e4m3fn).float(), ys[..., :m], flags.tolist()


@pytest.mark.parametrize("m, k, planes, index", [(37, 160, 2, None), (70, 128, 3, [70, 40, 0]), (33, 256, 1, None)])
def test_words_give_the_same_bits(device: str, m: int, k: int, planes: int, index: list[int] | None) -> None:
    """Scales near and far, NaN, zeros under any scale."""
    x = activations(m, k, 14, planes)
    x.scale[0, 7, 1], x.scale[-1, 3, 2], x.scale[0, 5, 0], x.scale[0, 9] = 0, 250, 255, 0
    x.data[0, 3, 16:32], x.scale[0, 3, 1] = 0x80, 254
    x.data[0, 4] = 0
    end = None if index is None else torch.tensor(index, dtype=torch.int32)
    got, want = words(x, 4, end), rows(x, device, 4, end if end is None else end.to(device))
    for g, w in zip(got[:2], want[:2]):
        torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(g.signbit() & ~g.isnan(), w.signbit() & ~w.isnan())
    assert got[2] == want[2]


def activations(m: int, k: int, spread: int, planes: int = 1, seed: int = 0) -> ScaledTensor:
    """Every code, scales up to `spread` powers of two apart within 128 of K."""
    g = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (planes, m, k // 2), generator=g, dtype=torch.uint8)
    base = torch.randint(spread, 250, (planes, m, -(-k // 128), 1), generator=g)
    codes = base - torch.randint(0, spread + 1, (planes, m, -(-k // 128), 4), generator=g)
    return ScaledTensor(data, codes.flatten(2)[..., :-(-k // 32)].to(torch.uint8), MXFP4)


def product(y: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
    return y.double() * ys.double().permute(0, 3, 1, 2).repeat_interleave(32, -1).flatten(2)


@pytest.mark.parametrize("k", [32, 160, 256])
def test_exact_where_scales_are_close(device: str, k: int) -> None:
    x = activations(37, k, 14, planes=2)
    y, ys, flags = rows(x, device)
    assert flags == [0, 0, 0]
    want = dequantize(x, torch.float64)
    assert torch.equal(product(y, ys)[..., :k], want) and not y[..., k:].any()
    assert torch.equal(ys[:, :, :1].expand_as(ys), ys), "one scale every 128"


def test_scales_of_their_own_where_they_are_not(device: str) -> None:
    x = activations(40, 256, 14)
    x.scale[0, 7, 1], x.scale[0, 33, 6] = 0, 250
    y, ys, flags = rows(x, device, programs=4)
    assert flags.count(1) >= 1
    assert torch.equal(product(y, ys), dequantize(x, torch.float64))


def test_zeros_and_nan(device: str) -> None:
    """A block of zeros counts for nothing; a NaN scale is one."""
    x = activations(33, 128, 3)
    x.data[0, 3, 16:32], x.scale[0, 3, 1] = 0x80, 254
    x.data[0, 4] = 0
    x.scale[0, 5, 2] = 255
    y, ys, flags = rows(x, device)
    assert flags == [0, 0, 0]
    want = dequantize(x, torch.float64)
    got = product(y, ys)
    assert bool(got[0, 5].isnan().all())
    keep = torch.arange(33) != 5
    assert torch.equal(got[0, keep], want[0, keep])


def test_rows_behind_a_masked_group_are_left_alone(device: str) -> None:
    x = activations(70, 128, 3, planes=3)
    x.scale[1, 40:] = 255
    index = torch.tensor([70, 40, 0], dtype=torch.int32, device=device)
    y, ys, flags = rows(x, device, index=index)
    assert flags == [0, 0, 0]
    for plane, end in enumerate([70, 40, 0]):
        assert torch.equal(product(y, ys)[plane, :end], dequantize(x, torch.float64)[plane, :end])
        assert bool((ys[plane, ..., end:] == 7).all()) and bool((y[plane, end:] == 1).all())


@pytest.mark.parametrize("e8m0", [False, True])
@pytest.mark.parametrize("major", ["k", "mn"])
def test_scales(device: str, e8m0: bool, major: str) -> None:
    from narrowgemm.kernels.gluon.sm90.fold_prep_device import fold_scales_kernel as kernel

    g = torch.Generator().manual_seed(1)
    planes, m, blocks = 2, 150, 35
    s = torch.randint(0, 256, (planes, m, blocks), generator=g, dtype=torch.uint8) if e8m0 else torch.randn(planes, m, blocks, generator=g)
    want = torch.where(s == 255, torch.nan, torch.exp2(s.double() - 127)) if e8m0 else s.double()
    s = (s.mT.contiguous().mT if major == "mn" else s).to(device)
    column = -(-m // 4) * 4
    out = torch.full((planes, blocks, column), 7.0, device=device)
    kernel[(planes * -(-m // 128),)](s, out, m, blocks, *s.stride(), column, BM=128, BK=32, E8M0=e8m0)
    torch.testing.assert_close(out[..., :m].mT.cpu().double(), want, rtol=0, atol=0, equal_nan=True)
    assert bool((out[..., m:] == 7).all())
