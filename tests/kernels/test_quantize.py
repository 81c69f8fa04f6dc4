"""The quantising kernels against the definition, bit for bit: interpreted on the CPU, and on a GPU."""

from __future__ import annotations

import pytest
import torch

from narrowgemm.arch import ARCHS, get_arch
from narrowgemm.formats import (
    BF16,
    FORMATS,
    FP8_ROW,
    FP8_TENSOR,
    MXFP4,
    MXFP8,
    Format,
    FP8_1x128,
    FP8_128x128,
    ScaledTensor,
)
from narrowgemm.kernels.operands import Operands
from narrowgemm.kernels.triton import quantize as kernel
from narrowgemm.ops.quantize import quantize
from narrowgemm.problem import Config, Operand, Problem, Step, bucket
from narrowgemm.reference import quantize as reference
from narrowgemm.runtime.launch import launch

from .._compile import TRITONS, compile_jobs

SCALED = [f for f in FORMATS.values() if f.scaled]
E8M0 = [f for f in SCALED if f.scale == "e8m0"]
KINDS = [FP8_TENSOR, FP8_ROW, FP8_1x128, FP8_128x128, MXFP8, MXFP4]


def raw(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8).cpu()


def same(got: ScaledTensor, want: ScaledTensor) -> None:
    assert got.format == want.format and got.data.shape == want.data.shape and got.scale.shape == want.scale.shape
    assert torch.equal(raw(got.scale), raw(want.scale)), "scales differ"
    assert torch.equal(raw(got.data), raw(want.data)), "payloads differ"


def check(x: torch.Tensor, fmt: Format, rounding: str = "rceil", **options) -> None:
    same(quantize(x, fmt, rounding=rounding, backend="triton", **options),
         reference.quantize(x, fmt, rounding, options.get("amax_clamp", 1e-4)))


def sample(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """Normals over many binades, a row of zeros, and a negative zero."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * torch.exp(2 * torch.randn(shape, generator=g))
    if x.shape[-2] > 3:
        x[..., 2, :] = 0
        x[..., 3, 0] = -0.0
    return x.to(device, dtype)


@pytest.mark.parametrize("fmt", SCALED, ids=lambda f: f.name)
def test_every_format(on, fmt):
    check(sample(9, 200, device=on), fmt)


@pytest.mark.parametrize("rounding", reference.ROUNDINGS)
@pytest.mark.parametrize("fmt", [MXFP8, MXFP8.with_element("e5m2"), MXFP4, FP8_128x128.with_scale("e8m0")],
                         ids=lambda f: f.name)
def test_rounding_modes(on, fmt, rounding):
    check(sample(6, 256, dtype=torch.float32, device=on), fmt, rounding)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("fmt", KINDS, ids=lambda f: f.name)
def test_input_dtypes(on, fmt, dtype):
    check(sample(5, 256, dtype=dtype, device=on), fmt)


@pytest.mark.parametrize("fmt", KINDS, ids=lambda f: f.name)
def test_nan_infinity_and_extremes(on, fmt):
    x = torch.zeros(12, 128, dtype=torch.float32)
    x[:, ::3] = torch.randn(43)
    x[0, 5], x[1, 6], x[2, 7] = float("nan"), float("inf"), -float("inf")
    x[3] *= 1e38
    x[4] *= 1e-38
    x[5], x[6, 0], x[7] = 0, 1e-42, -0.0
    x[8, 9] = -float("nan")
    x[9, 0] = 3.4028234663852886e38
    for dtype in (torch.float32, torch.bfloat16):
        for rounding in reference.ROUNDINGS if fmt.scale == "e8m0" else ("rceil",):
            check(x.to(on, dtype), fmt, rounding)
    check(x[3:8].contiguous().to(on), fmt, amax_clamp=0.0)


@pytest.mark.parametrize("fmt", SCALED, ids=lambda f: f.name)
def test_every_bf16_value(on, fmt):
    """NaNs, infinities, subnormals and zeros too: next to their neighbours, and next to any others. Interpreted, one in 16."""
    every = torch.arange(-32768, 32768, 1 if on == "cuda" else 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    mixed = every[torch.randperm(every.numel(), generator=torch.Generator().manual_seed(1))]
    for x in (every, mixed):
        check(x.view(-1, 256).to(on), fmt)
    check(every[every.isfinite()].view(255, -1).to(on), fmt, amax_clamp=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_e2m1_ties_and_neighbours(on, dtype):
    """Every halfway point of E2M1 and the values next to it, over a scale of one."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.5, 1.0, 6.0, 0.0]).to(dtype)
    bits = ties.view(torch.int32 if dtype == torch.float32 else torch.int16)
    near = torch.cat([(bits + d).clamp_min(0).view(dtype) for d in (-2, -1, 0, 1, 2)])
    near = torch.cat([near, -near])
    x = torch.zeros(8, 32, dtype=dtype)
    x[:, 0] = 6.0
    x[:, 1:] = torch.cat([near, near.new_zeros(8 * 31 - near.numel())]).view(8, 31)
    x = x.clamp(-6.0, 6.0)
    got = quantize(x.to(on), MXFP4, backend="triton")
    assert bool((got.scale == 127).all())
    check(x.to(on), MXFP4)


@pytest.mark.parametrize("layout", ["row_major", "mn_major"])
@pytest.mark.parametrize("fmt", KINDS, ids=lambda f: f.name)
def test_strides(on, fmt, layout):
    """Transposed, row-padded and batched inputs, and both scale layouts."""
    x = sample(130, 144, device=on)
    check(x[:70], fmt, scale_layout=layout)
    check(sample(144, 40, device=on).mT, fmt, scale_layout=layout)          # K strided
    check(x[:9, 8:136], fmt, scale_layout=layout)                           # padded rows
    check(sample(2, 3, 5, 128, device=on), fmt, scale_layout=layout)        # leading axes that merge
    check(sample(3, 5, 2, 128, device=on).transpose(0, 1), fmt, scale_layout=layout)  # and that do not
    check(sample(2, 160, 6, device=on).mT, fmt, scale_layout=layout)


@pytest.mark.parametrize("fmt", KINDS, ids=lambda f: f.name)
def test_every_config(on, fmt):
    x = sample(3, 384, device=on)
    arch = get_arch("h200")
    problem = problem_of(x, fmt)
    for config in kernel.configs(problem, arch):
        assert kernel.legal(problem, config, arch) is None
        check(x, fmt, config=config)


def test_long_rows_are_read_twice(on):
    check(sample(5, 300, device=on), FP8_ROW, config=Config(2, 1, 64, 4, 1))


def test_tensor_wise_with_several_tiles_a_program(on, monkeypatch):
    monkeypatch.setattr(kernel, "PARTS", 4)
    check(sample(2, 30, 37, device=on), FP8_TENSOR, config=Config(1, 1, 128, 4, 1))


@pytest.mark.parametrize("fmt", KINDS, ids=lambda f: f.name)
def test_nothing_outside_is_written(on, fmt):
    """Launched on the inside of larger buffers: the bytes around payload and scales keep their values."""
    x = sample(7, 160, device=on)
    want = reference.quantize(x, fmt)
    step = Step(kernel.NAME, kernel.configs(problem_of(x, fmt), get_arch("h200"))[0])
    data = torch.full((11, want.data.shape[1] + 16), 0x5A, dtype=torch.uint8, device=on)
    rows, cols = want.scale.shape
    scale = torch.full((rows + 4, cols + 3), 77, dtype=want.scale.dtype, device=on)
    inner, inner_scale = data[2:9, 8:-8].view(want.data.dtype), scale[2:-2, 1:-2]
    workspace = torch.full((kernel.workspace(problem_of(x, fmt), step.config),), 0xFF, dtype=torch.uint8, device=on)
    launch(step, problem_of(x, fmt), Operands(ScaledTensor(x, None, BF16), want, inner, 7, 0, 160, out_scale=inner_scale), workspace)
    same(ScaledTensor(inner.clone(), inner_scale, fmt), want)
    data[2:9, 8:-8], scale[2:-2, 1:-2] = 0x5A, 77
    assert bool((data == 0x5A).all()) and bool((scale == 77).all())


def problem_of(x: torch.Tensor, fmt: Format) -> Problem:
    return Problem("quantize", "dense", bucket(x.shape[0]), 0, x.shape[1], 1, Operand(BF16), Operand(fmt))


# -- host part ---------------------------------------------------------------------------------------------------------


def test_supports_says_why_not():
    x, h200, cpu = torch.zeros(4, 128), ARCHS["h200"], ARCHS["cpu"]
    assert kernel.supports(problem_of(x, FP8_1x128), h200) is None
    assert kernel.supports(problem_of(x, FP8_1x128), cpu) == "runs on a GPU"
    assert "FP8" in kernel.supports(problem_of(x, FP8_1x128), ARCHS["a100"])
    assert "bf16" in kernel.supports(problem_of(x, BF16), h200)
    assert "e2m1" in kernel.supports(problem_of(x, Format("odd", "e2m1", (128, 128), "fp32")), h200)
    assert "gemm" in kernel.supports(Problem("gemm", "dense", 1, 1, 1, 1), h200)


@pytest.mark.parametrize("name", [n for n, a in ARCHS.items() if a.vendor != "cpu" and n != "a100"])
@pytest.mark.parametrize("fmt", SCALED, ids=lambda f: f.name)
def test_configs_are_legal_everywhere(name, fmt):
    arch = ARCHS[name]
    for m, k in ((1, 2), (1, 7168), (4096, 7168), (64, 100), (8, 1 << 20)):
        problem = Problem("quantize", "dense", bucket(m), 0, k, 1, Operand(BF16), Operand(fmt))
        configs = kernel.configs(problem, arch)
        assert configs and all(kernel.legal(problem, c, arch) is None for c in configs)
        assert all(kernel.estimate(problem, c, arch) > 0 for c in configs)


@pytest.mark.parametrize(("config", "words"), [
    (Config(3, 1, 128, 4, 1), "block_m=3"), (Config(32, 1, 64, 4, 1), "block_k=64"),
    (Config(32, 1, 128, 64, 1), "num_warps"), (Config(1024, 1, 128, 4, 1), "131072 elements"),
])
def test_illegal_configs_are_refused(monkeypatch, config, words):
    monkeypatch.setenv("NARROWGEMM_ARCH", "h200")
    with pytest.raises(ValueError, match=words):
        quantize(torch.zeros(4, 256), FP8_1x128, backend="triton", config=config)


TARGETS = ("sm90", "sm100", "gfx942", "gfx950")


@pytest.mark.compile
@pytest.mark.parametrize("triton", TRITONS)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_for_every_target(target, triton):
    """No spills, little shared memory; FP8 is converted by the chip where it has the instruction, loads are 16 bytes. The newest Triton
    compiles the tiles of many rows."""
    every = triton == "oldest"
    reports = compile_jobs(target, "tests.kernels.quantize_jobs:jobs", "1,4096" if every else "4096", triton=triton)
    assert len(reports) == (27 if every else 16) and {r["kernel"] for r in reports} == {
        "groups_kernel", "tiles_kernel", "rows_kernel", "tensor_amax_kernel", "tensor_cast_kernel"}
    for r in reports:
        assert r["spills"] == 0 and r["shared"] <= 16384 and r["registers"] <= 128, (target, r)
        if target.startswith("sm"):
            narrows = r["kernel"] != "tensor_amax_kernel" and "mxfp4" not in r["job"] and "e5m2" not in r["job"]
            assert not narrows or r["ops"]["e4m3"] > 0, (target, r)
        elif target == "gfx950" and r["kernel"] == "groups_kernel" and "mxfp4" not in r["job"]:
            assert any(op.startswith("v_cvt_scalef32") for op in r["ops"]), (target, r)
        if target.startswith("gfx") and "4096" in r["job"]:
            assert any(op.endswith("load_dwordx4") for op in r["ops"]), (target, r)


# -- GPU only ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fmt", SCALED, ids=lambda f: f.name)
def test_large(fmt, dtype):
    x = sample(3, 1000, 7168, dtype=dtype, device="cuda")
    x[1, 17, 33], x[2, 5, 5] = float("nan"), float("inf")
    for layout in ("row_major", "mn_major"):
        check(x, fmt, scale_layout=layout)
    for rounding in reference.ROUNDINGS if fmt in E8M0 else ():
        check(x[0], fmt, rounding)


@pytest.mark.gpu
def test_every_16_bit_input():
    """All BF16 and FP16 bit patterns, each beside a 6, so that every one meets every E2M1 and E4M3 rounding."""
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).cuda()
        for top in (6.0, 448.0, 1e-3):
            x = torch.full((65536, 32), top, dtype=dtype, device="cuda")
            x[:, 1] = torch.where(values.abs() <= top, values, 0)
            for fmt in (MXFP4, MXFP8, MXFP8.with_element("e5m2"), FP8_ROW):
                check(x, fmt)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", [FP8_1x128, MXFP4, FP8_128x128, FP8_ROW, FP8_TENSOR], ids=lambda f: f.name)
def test_more_than_2_to_the_31_elements(fmt):
    k = 8192
    rows = (1 << 31) // k + 128
    x = torch.zeros(rows, k, dtype=torch.bfloat16, device="cuda")
    x[:128] = sample(128, k, device="cuda")
    x[-128:] = sample(128, k, device="cuda", seed=1)
    got = quantize(x, fmt, backend="triton")
    if fmt is FP8_TENSOR:
        assert float(got.scale) == float(x.abs().amax().float() / torch.tensor(448.0, device="cuda"))
        return
    for part in (slice(0, 128), slice(rows - 128, rows)):
        blocks = slice(0, 1) if part.start == 0 else slice(-1, None)
        want = reference.quantize(x[part], fmt)
        same(ScaledTensor(got.data[part], got.scale[blocks if fmt is FP8_128x128 else part], fmt), want)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", KINDS, ids=lambda f: f.name)
def test_graph_capture_and_repeats(fmt):
    x = sample(512, 2048, device="cuda")
    first = quantize(x, fmt, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = quantize(x, fmt, backend="triton")
    for seed in range(3):
        x.copy_(sample(512, 2048, seed=seed))
        graph.replay()
        same(captured, reference.quantize(x, fmt))
    x.copy_(sample(512, 2048))
    for _ in range(10):
        same(quantize(x, fmt, backend="triton"), first)


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", reference.ROUNDINGS)
def test_e2m1_of_every_bf16(rounding: str) -> None:
    """Every mantissa and sign below every mantissa of a block's maximum, at both ends and in the middle of the exponents; NaN, infinity."""
    parts = []
    for top in (1, 2, 120, 127, 133, 253, 254):
        amax = (torch.arange(128) | (top << 7)).view(128, 1, 1)
        low = max(0, top - 10)
        values = torch.arange(low << 7, (top << 7) + 128).view(1, -1)
        values = torch.nn.functional.pad(values, (0, -values.shape[1] % 31)).view(1, -1, 31).expand(128, -1, -1)
        values = torch.where(values > amax, amax, values)
        parts += [torch.cat((amax.expand(-1, values.shape[1], -1), v), 2).reshape(-1, 32) for v in (values, values | 0x8000)]
    odd = torch.tensor([0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x8000, 0x0001, 0x8001, 0x0000]).view(-1, 1)
    parts.append(torch.cat((odd, torch.arange(8 * 31).view(8, 31) * 263 % 0x7F00), 1))
    bits = torch.cat(parts)
    bits = bits.view(-1, 32)[torch.arange(-(-len(bits) // 8) * 8) % len(bits)]
    x = bits.to(torch.int32).to(torch.int16).view(torch.bfloat16).view(-1, 256).cuda()
    for clamp in (1e-4, 0.0):
        got = quantize(x, MXFP4, rounding=rounding, amax_clamp=clamp, backend="triton")
        want = quantize(x, MXFP4, rounding=rounding, amax_clamp=clamp, backend="reference")
        assert torch.equal(got.scale, want.scale) and torch.equal(got.data, want.data)
