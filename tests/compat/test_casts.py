"""`deep_gemm.utils.math`: values by hand, round trips, and the definition element by element."""

from __future__ import annotations

import pytest
import torch

from . import _caller as caller


def assert_rounded(payload: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, rows: int, cols: int) -> None:
    """Every value is within half a step of E4M3: 2^-4 of itself, or 2^-10 of its scale among the subnormals."""
    full = scale.repeat_interleave(rows, 0)[: payload.shape[0]].repeat_interleave(cols, 1)[:, : payload.shape[1]]
    error = (payload.float() * full - x.float()).abs()
    assert (error <= 1.0001 * torch.maximum(x.float().abs() / 16, full / 1024)).all()


@pytest.mark.parametrize(("x", "y", "div", "up"), [(0, 4, 0, 0), (1, 4, 1, 4), (8, 4, 2, 8), (9, 4, 3, 12)])
def test_sizes(deep_gemm, x, y, div, up):
    assert deep_gemm.ceil_div(x, y) == div and deep_gemm.align(x, y) == up


def test_ceil_to_ue8m0(deep_gemm):
    x = torch.tensor([0.0, 1.0, -1.0, 1.0001, 3.0, 2.0**-126, 1e-45, 2.0**127, 3e38])
    want = [2.0**-126, 1.0, 1.0, 2.0, 4.0, 2.0**-126, 2.0**-126, 2.0**127, 2.0**127]
    assert deep_gemm.ceil_to_ue8m0(x).tolist() == want


def test_pack_and_unpack(deep_gemm):
    x = torch.tensor([[1.0, 2.0, 0.5, 0.0], [2.0**-126, 2.0**127, 4.0, 8.0]])
    word = deep_gemm.pack_ue8m0_to_int(x)
    assert word.dtype == torch.int32 and word.shape == (2, 1)
    assert word[0, 0].item() == 127 | 128 << 8 | 126 << 16
    assert torch.equal(deep_gemm.utils.math.unpack_ue8m0_from_int(word), x)
    for bad, error in ((x * 3, ValueError), (-x, ValueError), (x[:, :3], ValueError), (x.half(), TypeError)):
        with pytest.raises(error, match=r"scales to pack.*: got"):
            deep_gemm.pack_ue8m0_to_int(bad)


@pytest.mark.parametrize("use_ue8m0", [False, True])
@pytest.mark.parametrize("gran_k", [32, 128])
@pytest.mark.parametrize("shape", [(3, 256), (130, 200), (1, 2), (0, 128)])
def test_fp8_casts(deep_gemm, use_ue8m0, gran_k, shape):
    x = caller.randn(*shape, device="cpu")
    payload, scale = deep_gemm.per_token_cast_to_fp8(x, use_ue8m0, gran_k)
    assert payload.dtype == torch.float8_e4m3fn and payload.shape == x.shape and payload.is_contiguous()
    assert scale.shape == (shape[0], deep_gemm.ceil_div(shape[1], gran_k)) and scale.dtype == torch.float32
    assert_rounded(payload, scale, x, 1, gran_k)
    payload, scale = deep_gemm.per_block_cast_to_fp8(x, use_ue8m0, gran_k)
    assert scale.shape == (deep_gemm.ceil_div(shape[0], gran_k), deep_gemm.ceil_div(shape[1], gran_k))
    assert_rounded(payload, scale, x, gran_k, gran_k)
    if use_ue8m0:
        assert (scale.view(torch.int32) & 0x7FFFFF == 0).all()


def test_scale_is_amax_over_448_and_at_least_the_clamp(deep_gemm):
    x = torch.zeros((2, 256))
    x[0, 5], x[1, 200] = -896.0, 448e-6
    _, scale = deep_gemm.per_token_cast_to_fp8(x, use_ue8m0=False)
    floor = torch.tensor(1e-4) / 448
    assert torch.equal(scale, torch.stack((torch.tensor(2.0), floor, floor, x[1, 200] / 448)).view(2, 2))


def test_other_fp8_casts(deep_gemm):
    x = caller.randn(256, 96, device="cpu")
    payload, scale = deep_gemm.per_channel_cast_to_fp8(x, use_ue8m0=False)
    across, across_scale = deep_gemm.per_token_cast_to_fp8(x.t().contiguous(), use_ue8m0=False)
    assert torch.equal(payload.view(torch.uint8), across.t().contiguous().view(torch.uint8))
    assert torch.equal(scale, across_scale.t())
    payload, scale = deep_gemm.per_custom_dims_cast_to_fp8(x, (0,), use_ue8m0=False)
    assert scale.shape == (256,) and torch.equal(scale, x.float().abs().amax(1) / 448)
    with pytest.raises(ValueError, match=r"rows of x: got 96, expected a multiple of gran_k, 128"):
        deep_gemm.per_channel_cast_to_fp8(x.t(), use_ue8m0=False)
    with pytest.raises(ValueError, match=r"x, shape: got \(1, 256, 96\), expected two dimensions"):
        deep_gemm.per_token_cast_to_fp8(x[None], use_ue8m0=False)


def test_packed_casts(deep_gemm):
    x = caller.randn(5, 512, device="cpu")
    payload, scale = deep_gemm.per_token_cast_to_fp8(x, use_ue8m0=True)
    again, words = deep_gemm.per_token_cast_to_fp8(x, use_ue8m0=True, use_packed_ue8m0=True)
    assert torch.equal(again.view(torch.uint8), payload.view(torch.uint8))
    assert torch.equal(deep_gemm.unpack_ue8m0_from_int(words), scale)


def test_fp4_rounding(deep_gemm):
    """Halfway values go to the smaller magnitude; zero has no sign."""
    x = torch.tensor([[6.0, 0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.01, -0.1, -0.3, -2.6, -6.0, 0.0, 1.0]])
    payload, scale = deep_gemm.per_token_cast_to_fp4(x, use_ue8m0=False, gran_k=16)
    want = [6, 0, 0.5, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -3, -6, 0, 1]
    assert scale.item() == 1.0 and payload.dtype == torch.int8
    assert deep_gemm.cast_back_from_fp4(payload, scale, gran_k=16).tolist() == [want]
    assert payload.view(torch.uint8)[0, 0].item() == 0x07, "low nibble: even column"


@pytest.mark.parametrize("packed", [False, True])
def test_fp4_round_trip_and_transpose(deep_gemm, packed):
    x = caller.randn(6, 192, device="cpu")
    payload, scale = deep_gemm.per_token_cast_to_fp4(x, True, 32, packed)
    assert payload.shape == (6, 96) and scale.shape == ((6, 2) if packed else (6, 6))
    back = deep_gemm.cast_back_from_fp4(payload, scale, 32, packed)
    assert deep_gemm.testing.calc_diff(back, x) < 2e-2
    there = deep_gemm.transpose_packed_fp4(payload)
    assert there.shape == (192, 3)
    assert torch.equal(deep_gemm.transpose_packed_fp4(there), payload)
    one = torch.ones((192, 1))
    values = deep_gemm.cast_back_from_fp4(there, one, gran_k=6)
    assert torch.equal(values, deep_gemm.cast_back_from_fp4(payload, torch.ones((6, 1)), gran_k=192).t())


@pytest.mark.parametrize(("name", "args", "error"), [
    ("per_token_cast_to_fp4", (torch.ones(2, 3), True), ValueError),
    ("per_token_cast_to_fp4", (torch.ones(2, 4), False, 128, True), ValueError),
    ("transpose_packed_fp4", (torch.ones(3, 4, dtype=torch.int8),), ValueError),
    ("transpose_packed_fp4", (torch.ones(2, 4, dtype=torch.uint8),), TypeError),
])
def test_fp4_errors(deep_gemm, name, args, error):
    with pytest.raises(error, match=r"got .*, expected"):
        getattr(deep_gemm, name)(*args)
