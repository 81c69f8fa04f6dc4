"""`quantize`: dispatch, layouts, refusals, torch.compile, and that it agrees with the definition."""

from __future__ import annotations

import pytest
import torch

import narrowgemm as ng
from narrowgemm.errors import Unsupported
from narrowgemm.formats import FORMATS, FP8_TENSOR, MXFP4, MXFP8, Format, FP8_1x128, FP8_128x128, ScaledTensor
from narrowgemm.ops.quantize import quantize
from narrowgemm.problem import Config
from narrowgemm.reference import quantize as reference
from narrowgemm.scales import mn_major_tma_aligned

SCALED = [f for f in FORMATS.values() if f.scaled]
NAMES = dict(ids=lambda f: f.name)


def same(got: ScaledTensor, want: ScaledTensor) -> None:
    assert got.format == want.format and got.scale.dtype == want.scale.dtype
    assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8)) and torch.equal(got.scale, want.scale)


@pytest.mark.parametrize("fmt", SCALED, **NAMES)
@pytest.mark.parametrize("shape", [(5, 200), (2, 3, 130, 64), (0, 64), (2, 0, 64), (4, 0)])
def test_agrees_with_the_definition(fmt: Format, shape: tuple[int, ...]):
    x = torch.randn(shape).bfloat16()
    for name in (fmt, fmt.name):
        same(quantize(x, name), reference.quantize(x, fmt))


@pytest.mark.parametrize("rounding", reference.ROUNDINGS)
def test_rounding_and_clamp_reach_the_kernel(rounding):
    x = torch.randn(8, 128) * 1e-6
    same(quantize(x, MXFP8, rounding=rounding), reference.quantize(x, MXFP8, rounding))
    same(quantize(x, MXFP8, rounding=rounding, amax_clamp=1e-20), reference.quantize(x, MXFP8, rounding, 1e-20))
    assert not torch.equal(quantize(x, MXFP8).scale, quantize(x, MXFP8, amax_clamp=0.0).scale)


@pytest.mark.parametrize("fmt", SCALED, **NAMES)
@pytest.mark.parametrize("shape", [(33, 256), (2, 130, 256), (3, 0, 256)])
def test_mn_major_scales(fmt: Format, shape: tuple[int, ...]):
    x = torch.randn(shape)
    got, want = quantize(x, fmt, scale_layout="mn_major"), quantize(x, fmt)
    same(got, want)
    assert got.scale.stride() == mn_major_tma_aligned(want.scale).stride() and got.scale.data_ptr() % 16 == 0


def test_nothing_is_tracked_or_written():
    x = torch.randn(4, 256, requires_grad=True)
    before = x.detach().clone()
    got = quantize(x, FP8_1x128)
    assert not got.data.requires_grad and not got.scale.requires_grad and torch.equal(x, before)


def test_a_quantised_tensor_feeds_a_product():
    a, b = torch.randn(6, 256), torch.randn(160, 256)
    out = ng.gemm(quantize(a, FP8_1x128), quantize(b, FP8_128x128), out_dtype=torch.float32)
    assert float((out - a @ b.T).norm() / (a @ b.T).norm()) < 0.06


@pytest.mark.parametrize(("x", "options", "error", "words"), [
    (torch.zeros(4), {}, ValueError, r"shape: got \(4,\), expected at least \[R, K\]"),
    (torch.zeros(4, 4, dtype=torch.int8), {}, TypeError, "int8.*bfloat16"),
    (torch.zeros(4, 4).to(torch.float8_e4m3fn), {}, TypeError, "float8"),
    (3.0, {}, TypeError, "float"),
    (torch.zeros(4, 33), {"fmt": MXFP4}, ValueError, "33.*even"),
    (torch.zeros(4, 32), {"fmt": "bf16"}, ValueError, "bf16.*scaled format"),
    (torch.zeros(4, 32), {"fmt": "mxfp9"}, ValueError, "mxfp9"),
    (torch.zeros(4, 32), {"rounding": "nearest"}, ValueError, "'nearest'"),
    (torch.zeros(4, 32), {"amax_clamp": -1.0}, ValueError, "amax_clamp"),
    (torch.zeros(4, 32), {"scale_layout": "packed"}, ValueError, "'packed'.*mn_major"),
    (torch.zeros(4, 32), {"backend": "cuda"}, ValueError, "'cuda'.*reference"),
    (torch.zeros(4, 32), {"config": Config(3, 3, 3)}, ValueError, "config"),
])
def test_bad_input(x, options, error, words):
    with pytest.raises(error, match=words):
        quantize(x, **{"fmt": MXFP8, **options})


def test_a_cpu_tensor_has_no_triton(monkeypatch):
    monkeypatch.delenv("NARROWGEMM_ARCH", raising=False)
    with pytest.raises(Unsupported, match=r"triton.quantize: runs on a GPU"):
        quantize(torch.zeros(4, 128), FP8_1x128, backend="triton")


def test_the_backend_variable_is_read_on_every_call(monkeypatch):
    x = torch.zeros(4, 128)
    quantize(x, FP8_1x128)
    monkeypatch.setenv("NARROWGEMM_BACKEND", "triton")
    with pytest.raises(Unsupported):
        quantize(x, FP8_1x128)


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [FP8_1x128, MXFP4, FP8_128x128, FP8_TENSOR], **NAMES)
@pytest.mark.parametrize("layout", ["row_major", "mn_major"])
def test_compiles_into_one_graph(fmt: Format, layout: str):
    def f(x):
        q = quantize(x * 2, fmt, scale_layout=layout)
        return q.data, q.scale, q.dequantize()

    x = torch.randn(6, 256)
    data, scale, values = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    want = reference.quantize(x * 2, fmt)
    same(ScaledTensor(data, scale, fmt), want)
    assert torch.equal(values, want.dequantize())


def test_a_dynamic_number_of_rows_compiles_once():
    import torch._dynamo

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def f(x):
        q = quantize(x, FP8_1x128)
        return q.data, q.scale

    f(torch.randn(3, 256))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (17, 40):
            x = torch.randn(rows, 256)
            same(ScaledTensor(*f(x), FP8_1x128), reference.quantize(x, FP8_1x128))


@pytest.mark.parametrize("fmt", [FP8_1x128, MXFP4], **NAMES)
def test_registration(fmt: Format):
    x = torch.randn(4, 256)
    q = reference.quantize(x, fmt)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.narrowgemm.quantize.default,
                          (x, torch.zeros_like(q.data), torch.zeros_like(q.scale), fmt.name, "rceil", 1e-4, ""),
                          test_utils=tests if fmt is MXFP4 else tests[1:])  # torch can't compare FP8 tensors there


def test_config_is_refused_under_compile():
    compiled = torch.compile(lambda x: quantize(x, FP8_1x128, config=Config()).data, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"config under torch\.compile"):
        compiled(torch.zeros(4, 128))
