"""Primus-Turbo's names and torch's scaled_grouped_mm: values and gradients against FP32 per group."""

from __future__ import annotations

import itertools

import pytest
import torch

import narrowgemm as ng
from narrowgemm import Unsupported
from narrowgemm.compat import torch_scaled
from narrowgemm.compat.primus_turbo import (
    Float8QuantConfig,
    Format,
    ScalingGranularity,
    grouped_gemm_fp8,
    grouped_gemm_fp8_tensorwise_flydsl_kernel,
    grouped_gemm_fp8_variable_k_tensorwise_flydsl_kernel,
)
from narrowgemm.compat.torch_scaled import scaled_grouped_mm
from narrowgemm.testing.numerics import calc_diff, snr_db

LENS = [40, 0, 90, 14]
N, K = 96, 160


def unbalanced(groups: int, total: int) -> list[int]:
    """Primus-Turbo's `balance=False`: weights of 0.2 to 1, the rounding error on the last group."""
    w = 0.2 + 0.8 * torch.rand(groups, generator=torch.Generator().manual_seed(groups))
    lens = (w / w.sum() * total).int().tolist()
    return [*lens[:-1], total - sum(lens[:-1])]


def snr_of(a, b, lens, trans_b, config) -> list[float]:
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    out = grouped_gemm_fp8(a, b, torch.tensor(lens), trans_b=trans_b, config=config)
    dy = torch.randn_like(out)
    out.backward(dy)
    x, w = a.detach().float().requires_grad_(), b.detach().float().requires_grad_()
    want = torch.cat([p @ (q.T if trans_b else q) for p, q in zip(x.split(lens), w)])
    want.backward(dy.float())
    return [snr_db(p.float(), q) for p, q in ((out.detach(), want.detach()), (a.grad, x.grad), (b.grad, w.grad))]


@pytest.mark.parametrize("format", Format)
@pytest.mark.parametrize("granularity", ScalingGranularity)
@pytest.mark.parametrize("trans_b", [True, False])
def test_every_config(format, granularity, trans_b) -> None:
    a = torch.randn(sum(LENS), K).bfloat16()
    b = torch.randn(len(LENS), *((N, K) if trans_b else (K, N))).bfloat16()
    limit = 25 if format is Format.E4M3 else 20
    assert min(snr_of(a, b, LENS, trans_b, Float8QuantConfig(format, granularity))) > limit


@pytest.mark.parametrize(("groups", "rows", "dtype"), list(itertools.product((1, 3, 8), (16, 48), (torch.bfloat16, torch.float16))))
def test_primus_list(groups, rows, dtype) -> None:
    """A covering part of its test list: groups, rows a group, dtypes, balanced and not."""
    for lens in ([rows] * groups, unbalanced(groups, rows * groups)):
        a, b = torch.randn(rows * groups, K).to(dtype), torch.randn(groups, N, K).to(dtype)
        assert min(snr_of(a, b, lens, True, None)) > 25


def test_hybrid_gradients_are_e5m2_and_groups_may_come_as_offsets() -> None:
    a, b = torch.randn(sum(LENS), K).bfloat16().requires_grad_(), torch.randn(len(LENS), N, K).bfloat16().requires_grad_()
    dy, offs = torch.randn(sum(LENS), N).bfloat16(), torch.tensor([0, *LENS]).cumsum(0)
    want = torch.autograd.grad(ng.grouped_linear(a, b, group_offs=offs, recipe="rowwise", grads="e5m2"), (a, b), dy)
    config = Float8QuantConfig(Format.HYBRID, ScalingGranularity.ROWWISE)
    got = torch.autograd.grad(grouped_gemm_fp8(a, b, None, offs, config=config), (a, b), dy)
    assert all(torch.equal(p, q) for p, q in zip(got, want))


def test_repeats_are_bit_equal() -> None:
    a, b = torch.randn(sum(LENS), K).bfloat16(), torch.randn(len(LENS), N, K).bfloat16()
    first = grouped_gemm_fp8(a, b, torch.tensor(LENS))
    assert all(torch.equal(first, grouped_gemm_fp8(a, b, torch.tensor(LENS))) for _ in range(3))


@pytest.mark.parametrize("trans_b", [True, False])
def test_kernels(trans_b) -> None:
    offs = torch.tensor([0, *LENS]).cumsum(0)
    a, dy = torch.randn(sum(LENS), K).to(torch.float8_e4m3fn), torch.randn(sum(LENS), N).to(torch.float8_e5m2)
    b = torch.randn(len(LENS), *((N, K) if trans_b else (K, N))).to(torch.float8_e4m3fn)
    s, t = torch.tensor(0.5), torch.tensor([2.0])
    out = grouped_gemm_fp8_tensorwise_flydsl_kernel(a, b, s, t, offs, trans_b=trans_b, num_cu=4)
    want = torch.cat([p @ (q.T if trans_b else q) for p, q in zip(a.float().split(LENS), b.float())])
    assert calc_diff(out.float(), want) < 5e-6
    dw = grouped_gemm_fp8_variable_k_tensorwise_flydsl_kernel(dy, a, s, t, offs, out_dtype=torch.float32)
    want = torch.stack([p.T @ q for p, q in zip(dy.float().split(LENS), a.float().split(LENS))])
    assert calc_diff(dw, want) < 1e-6 and not dw[1].any()


def test_scaled_grouped_mm() -> None:
    ends = torch.tensor(LENS).cumsum(0).to(torch.int32)
    a, b = torch.randn(sum(LENS), K).to(torch.float8_e4m3fn), torch.randn(len(LENS), N, K).to(torch.float8_e4m3fn)
    sa, sb = torch.rand(sum(LENS)) + 0.5, torch.rand(len(LENS), N) + 0.5
    recipe = getattr(getattr(torch.nn.functional, "ScalingType", None), "RowWise", "RowWise")
    out = scaled_grouped_mm(a, b.transpose(1, 2), sa, recipe, [sb], [recipe], offs=ends, output_dtype=torch.float32)
    want = torch.cat([p @ q.T for p, q in zip((a.float() * sa[:, None]).split(LENS), b.float() * sb[:, :, None])])
    assert calc_diff(out, want) < 1e-6
    x, y = torch.randn(N, sum(LENS)).to(torch.float8_e4m3fn), torch.randn(sum(LENS), K).to(torch.float8_e4m3fn)
    dw = scaled_grouped_mm(x, y, torch.ones(N), "RowWise", torch.ones(K), "RowWise", offs=ends, output_dtype=torch.float32)
    assert calc_diff(dw, torch.stack([p @ q for p, q in zip(x.float().split(LENS, 1), y.float().split(LENS))])) < 1e-6


@pytest.mark.parametrize(("change", "match"), [
    ({"mat_a": None}, "mat_a: got NoneType"), ({"offs": [16, 32]}, "offs: got list"), ({"scale_recipe_b": None}, "recipe of mat_b: got None"),
    ({"scale_recipe_a": torch.float32}, "recipe of mat_a: got torch.float32, expected a ScalingType")])
def test_scaled_grouped_mm_refuses(change, match) -> None:
    good = {"mat_a": torch.zeros(32, 64).to(torch.float8_e4m3fn), "mat_b": torch.zeros(2, 64, 48).to(torch.float8_e4m3fn), "scale_a": torch.ones(1),
            "scale_recipe_a": "TensorWise", "scale_b": torch.ones(1), "scale_recipe_b": "TensorWise", "offs": torch.tensor([16, 32], dtype=torch.int32)}
    scaled_grouped_mm(**good)
    with pytest.raises(TypeError, match=match):
        scaled_grouped_mm(**good | change)


def test_options_of_scaled_grouped_mm_reach_every_product(monkeypatch) -> None:
    found = []
    for name in ("grouped_gemm", "grouped_gemm_wgrad"):
        monkeypatch.setattr(torch_scaled, name, lambda *a, **kw: found.append((kw["out_dtype"], kw["fast_accum"])) or torch.zeros(1, 1))
    f8, ends = torch.float8_e4m3fn, torch.tensor([16, 32], dtype=torch.int32)
    for x, y, offs in (((32, 64), (2, 64, 48), ends), ((48, 32), (32, 64), ends), ((2, 48, 64), (64, 32), ends), ((2, 48, 64), (2, 64, 16), None)):
        torch_scaled.scaled_grouped_mm(torch.zeros(x).to(f8), torch.zeros(y).to(f8), torch.ones(1), "TensorWise", torch.ones(1), "TensorWise",
                                       offs=offs, output_dtype=torch.float16, use_fast_accum=True)
    assert found == [(torch.float16, True)] * 4


def test_scaled_grouped_mm_of_stacked_operands() -> None:
    """3-D x 2-D, whose columns are grouped, and 3-D x 3-D; MXFP8; the arguments in torch's order."""
    ends, g = torch.tensor(LENS).cumsum(0).to(torch.int32), len(LENS)
    a, b = torch.randn(g, N, K).to(torch.float8_e4m3fn), torch.randn(sum(LENS), K).to(torch.float8_e4m3fn)
    sa, sb = torch.rand(g, N) + 0.5, torch.rand(sum(LENS)) + 0.5
    out = scaled_grouped_mm(a, b.T, sa, "RowWise", sb, "RowWise", offs=ends, output_dtype=torch.float32)
    want = torch.cat([p * s[:, None] @ q.T for p, s, q in zip(a.float(), sa, (b.float() * sb[:, None]).split(LENS))], 1)
    assert out.shape == (N, sum(LENS)) and calc_diff(out, want) < 1e-6
    w, sw = torch.randn(g, 48, K).to(torch.float8_e4m3fn), torch.rand(g, 48) + 0.5
    out = scaled_grouped_mm(a, w.transpose(1, 2), sa, "RowWise", sw, "RowWise", None, None, None, None, torch.float32, (-1, -2), False)
    assert calc_diff(out, (a.float() * sa[..., None]) @ (w.float() * sw[..., None]).mT) < 1e-6
    x, q = (ng.quantize(torch.randn(*s, K), "mxfp8") for s in ((sum(LENS),), (g, 48)))
    out = scaled_grouped_mm(x.data, q.data.mT, x.scale.view(torch.float8_e8m0fnu), "BlockWise1x32", q.scale, "BlockWise1x32", offs=ends,
                            output_dtype=None)
    want = torch.cat([p @ v.T for p, v in zip(x.dequantize().split(LENS), q.dequantize())])
    assert out.dtype == torch.bfloat16 and calc_diff(out.float(), want) < 5e-6


def test_scaled_grouped_mm_with_scales_of_each_group() -> None:
    """torch's own convention for two 2-D operands, and by the native op, tensor-wise too."""
    ends = torch.tensor(LENS).cumsum(0).to(torch.int32)
    x, y = torch.randn(N, sum(LENS)).to(torch.float8_e4m3fn), torch.randn(sum(LENS), K).to(torch.float8_e4m3fn)
    sx, sy = torch.rand(len(LENS), N) + 0.5, torch.rand(len(LENS), K) + 0.5
    parts = [p @ q for p, q in zip(x.float().split(LENS, 1), y.float().split(LENS))]
    want = torch.stack([p * s[:, None] * t for p, s, t in zip(parts, sx, sy)])
    for backend_scales in ((sx.flatten(), sy.flatten()), ([sx.flatten()], [sy.flatten()])):
        got = scaled_grouped_mm(x, y, backend_scales[0], "RowWise", backend_scales[1], ["RowWise"], offs=ends, output_dtype=torch.float32)
        assert calc_diff(got, want) < 1e-6
    layout = ng.KGrouped(torch.nn.functional.pad(ends, (1, 0)))
    a = ng.ScaledTensor(x, sx[:, :1, None].contiguous(), ng.FP8_TENSOR)
    b = ng.ScaledTensor(y.T, sy[:, :1, None].contiguous(), ng.FP8_TENSOR)
    got = ng.grouped_gemm_wgrad(a, b, layout)
    assert calc_diff(got, torch.stack([p * s[0] * t[0] for p, s, t in zip(parts, sx, sy)])) < 1e-6
    with pytest.raises(ValueError, match="scale shape"):
        ng.grouped_gemm_wgrad(ng.ScaledTensor(x, a.scale[:2], a.format), b, layout)
    with pytest.raises(TypeError, match="float32"):
        scaled_grouped_mm(x, y, sx.flatten().double(), "RowWise", sy.flatten(), "RowWise", offs=ends)


def test_refusals() -> None:
    a, b, lens = torch.randn(8, 32).bfloat16(), torch.randn(1, 16, 32).bfloat16(), torch.tensor([8])
    for config in (Float8QuantConfig(block_size=64), Float8QuantConfig(scale_dtype=torch.float16)):
        with pytest.raises(Unsupported):
            grouped_gemm_fp8(a, b, lens, config=config)
    with pytest.raises(TypeError, match="Float8QuantConfig"):
        grouped_gemm_fp8(a, b, lens, config="e4m3")
    with pytest.raises(ValueError, match=r"K of b, trans_b=False: got 16 \(b is \(1, 16, 32\)\), expected a's, 32"):
        grouped_gemm_fp8(a, b, lens, trans_b=False)
    with pytest.raises(ValueError, match="b, shape"):
        grouped_gemm_fp8(a, b[0], lens)
    f8, one = a.to(torch.float8_e4m3fn), torch.ones(1)
    with pytest.raises(TypeError, match="float8"):
        grouped_gemm_fp8_tensorwise_flydsl_kernel(a, b, one, one, torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="tensor-wise"):
        grouped_gemm_fp8_tensorwise_flydsl_kernel(f8, b.to(f8.dtype), torch.ones(2), one, torch.tensor([0, 8]))
    for change in (dict(bias=one), dict(swizzle_a="SWIZZLE_32_4_4")):
        with pytest.raises(Unsupported):
            scaled_grouped_mm(f8, f8.T, one, "RowWise", one, "RowWise", offs=lens.int(), **change)
    with pytest.raises(Unsupported, match="contraction_dim"):
        scaled_grouped_mm(f8, f8.T, one, "RowWise", one, "RowWise", offs=lens.int(), contraction_dim=(0, 1))
    with pytest.raises(ValueError, match="dimensions"):
        scaled_grouped_mm(f8[0], f8.T, one, "RowWise", one, "RowWise", offs=lens.int())
    with pytest.raises(Unsupported, match="BlockWise1x16"):
        scaled_grouped_mm(f8, f8.T, one, "BlockWise1x16", one, "RowWise", offs=lens.int())
    with pytest.raises(ValueError, match="offs"):
        scaled_grouped_mm(f8, f8.T, one, "RowWise", one, "RowWise")
