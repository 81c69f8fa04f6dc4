"""The portable MX kernel: both gates, poison and guards, interpreted on the CPU and compiled on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from narrowgemm import Offsets, gemm, grouped_gemm, quantize
from narrowgemm.arch import get_arch
from narrowgemm.formats import BF16, FP8_ROW, FP8_TENSOR, FP16, MXFP4, MXFP8, FP8_1x128, ScaledTensor
from narrowgemm.kernels.triton import mx
from narrowgemm.ops.explain import describe
from narrowgemm.problem import Config
from narrowgemm.testing.cases import Case, build, get_suite
from narrowgemm.testing.numerics import calc_diff

UE8M0 = FP8_1x128.with_scale("e8m0")
PAIRS = ((BF16, MXFP4), (BF16, MXFP8), (MXFP8, MXFP8), (MXFP8, MXFP4), (MXFP4, MXFP4), (FP8_1x128, MXFP4))
FORMATS = [c for c in get_suite("cpu-formats") if (c.a, c.b) in PAIRS and c.layout == "dense"]
UNEVEN = "uniform:0.7:1.3"
MORE = [Case("mx", "dense", 1, 33, 200, 208, a=BF16, b=MXFP4), Case("mx", "dense", 1, 1, 128, 96, a=MXFP8, b=MXFP4),
        Case("mx", "contiguous", 5, 33, 96, 160, sizes=UNEVEN, alignment=1, a=BF16, b=MXFP4),
        Case("mx", "psum", 4, 40, 128, 128, sizes="empty:0.5", a=MXFP8, b=MXFP8),
        Case("mx", "offsets", 8, 8, 128, 256, sizes="few:1", a=BF16, b=MXFP8),
        Case("mx", "offsets", 4, 16, 128, 128, sizes="zero", a=BF16, b=MXFP4),
        Case("mx", "dense", 1, 70, 136, 720, a=BF16, b=MXFP4), Case("mx", "dense", 1, 19, 72, 288, a=UE8M0, b=MXFP4),
        Case("mx", "psum", 3, 21, 64, 160, sizes=UNEVEN, a=FP8_1x128, b=MXFP8),
        Case("mx", "contiguous", 3, 30, 64, 256, sizes=UNEVEN, alignment=1, a=FP8_1x128, b=MXFP4, out_dtype="fp32"),
        Case("mx", "dense", 1, 19, 72, 288, a=FP8_ROW, b=MXFP4), Case("mx", "contiguous", 3, 21, 64, 160, sizes=UNEVEN, alignment=1, a=FP8_TENSOR, b=MXFP8),
        Case("mx", "offsets", 3, 19, 72, 288, sizes=UNEVEN, a=FP16, b=MXFP4, out_dtype="fp32"), Case("mx", "dense", 1, 17, 64, 128, a=FP16, b=MXFP8, out_dtype="fp16"),
        Case("mx", "masked", 3, 20, 72, 192, max_m=32, sizes=UNEVEN, a=FP8_ROW, b=MXFP8, out_dtype="fp32"),
        Case("mx", "masked", 3, 20, 136, 192, max_m=32, sizes=UNEVEN, a=MXFP4, b=MXFP4, out_dtype="fp32", accumulate=True)]


@pytest.fixture(autouse=True)
def _as_mi350x(device, monkeypatch):
    """Interpreted kernels are chosen as on an MI350X, where they take any K."""
    if device == "cpu":
        monkeypatch.setenv("NARROWGEMM_ARCH", "mi350x")


@pytest.mark.parametrize("case", [*FORMATS, *MORE], ids=lambda c: f"{c.suite}/{c.id}")
def test_gates(case: Case, device: str) -> None:
    inputs = build(case, device, seed=7)
    plan = inputs.plan(backend="triton")
    assert plan is None or plan.kernel == mx.NAME
    inputs.verify(backend="triton")


@pytest.mark.slow
def test_every_tile_is_right(device: str) -> None:
    inputs = build(Case("mx", "offsets", 3, 45, 144, 384, sizes=UNEVEN, a=BF16, b=MXFP4), device, seed=3)
    for bm, bn, warps, stages in mx.TILES:
        inputs.verify(backend="triton", config=Config(bm, bn, 128, warps, stages, persistent=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fmt", [MXFP4, MXFP8], ids=lambda f: f.name)
def test_infinities_and_nan_come_out_as_the_references(dtype: torch.dtype, fmt, device: str) -> None:
    """FP16 is two BF16 numbers: of infinity the second one is nothing."""
    torch.manual_seed(3)
    x, w = torch.randn(5, 256).to(dtype), quantize(torch.randn(64, 256), fmt)
    x[1, 7], x[2, 200], x[3, 40] = float("inf"), float("-inf"), float("nan")
    want = gemm(x, w, out_dtype=torch.float32, backend="reference")
    got = gemm(x.to(device), w.to(device), out_dtype=torch.float32, backend="triton.mx").cpu()
    assert bool(want.isinf().any()) and torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf()) and torch.equal(got[want.isinf()], want[want.isinf()])


def test_rows_off_sixteen_bytes_take_one_stage_on_nvidia() -> None:
    aligned = describe("gemm", m=64, n=256, k=384, a="bf16", b="mxfp4")
    off = replace(aligned, b=replace(aligned.b, aligned=False))
    h100, mi350x = get_arch("h100"), get_arch("mi350x")
    assert {c.num_stages for c in mx.configs(aligned, h100)} == {2, 3}
    assert {c.num_stages for c in mx.configs(off, h100)} == {1}
    assert {c.num_stages for c in mx.configs(off, mi350x)} == {2}
    deep = Config(64, 128, 128, 8, 3, persistent=True)
    assert mx.legal(aligned, deep, h100) is None and "expected 1" in mx.legal(off, deep, h100)


def test_more_rows_take_larger_tiles_where_both_sides_are_converted() -> None:
    """As they did on an H100: what was fastest of all six."""
    for groups, m, n, k, tile in ((1, 80, 6144, 2048, (16, 128)), (8, 64, 6144, 3072, (64, 64)), (8, 512, 4096, 2048, (128, 128))):
        given = {"op": "gemm"} if groups == 1 else {"op": "grouped_gemm", "layout": "offsets", "groups": groups}
        p = describe(m=groups * m, n=n, k=k, a="mxfp8", b="mxfp8", **given)
        best = min(mx.configs(p, get_arch("h100")), key=lambda c: mx.estimate(p, c, get_arch("h100")))
        assert (best.block_m, best.block_n) == tile, (groups, m, best)


@pytest.mark.parametrize("a, b, rows, tile", [
    ("bf16", "mxfp4", 1024, (128, 128)), ("bf16", "mxfp4", 32, (32, 128)), ("bf16", "mxfp4", 8, (16, 128)), ("bf16", "mxfp8", 128, (128, 128)),
    ("fp8_1x128", "mxfp4", 1024, (128, 128)), ("fp8_1x128", "mxfp4", 8, (16, 128)), ("mxfp8", "mxfp4", 128, (128, 128)),
    ("mxfp4", "mxfp4", 32, (16, 128)), ("fp16", "mxfp4", 1024, (64, 128)), ("fp16", "mxfp4", 8, (16, 128))])
def test_more_rows_take_larger_tiles_in_every_pair_of_formats(a: str, b: str, rows: int, tile: tuple[int, int]) -> None:
    """8 groups, 4096 x 2048: what was fastest of all six on an H100, where 16 x 128 took up to 3.6 times as long."""
    p = describe("grouped_gemm", layout="offsets", groups=8, m=8 * rows, n=4096, k=2048, a=a, b=b)
    best = min(mx.configs(p, get_arch("h100")), key=lambda c: mx.estimate(p, c, get_arch("h100")))
    assert (best.block_m, best.block_n) == tile, best


@pytest.mark.parametrize("device", ["mi350x", "mi300x", "b200", "rtx5090"])
def test_a_tiles_weights_cost_something_on_every_chip(device: str) -> None:
    """Tiles of 16 rows and of 128 are no equals where there are rows for either: the weights of a tile are brought once for each."""
    arch = get_arch(device)
    p = describe("grouped_gemm", layout="offsets", groups=5, m=4096, n=5760, k=2880, a="bf16", b="mxfp4")
    costs = {(c.block_m, c.block_n): mx.estimate(p, c, arch) for c in mx.configs(p, arch)}
    assert min(costs, key=costs.__getitem__) == max(costs) and costs[min(costs)] > 1.2 * costs[max(costs)], costs


@pytest.mark.gpu
def test_weights_off_sixteen_bytes_are_right() -> None:
    """A view of a wider tensor, whose rows begin on 8 bytes."""
    x = torch.randn(33, 384, device="cuda").bfloat16()
    q = quantize(torch.randn(256, 384, device="cuda"), MXFP4)
    wide = torch.zeros(256, 192 + 8, dtype=torch.uint8, device="cuda")
    wide[:, :192] = q.data
    y = gemm(x, ScaledTensor(wide[:, :192], q.scale, MXFP4), backend="triton")
    assert calc_diff(y, x.float() @ q.dequantize().T) < 5e-6


def test_nan_scale_reaches_only_its_column(device: str) -> None:
    inputs = build(Case("mx", "dense", 1, 20, 128, 256, a=BF16, b=MXFP4), device)
    assert inputs.b.scale is not None
    inputs.b.scale[7, 1] = 255
    out = inputs.call(backend="triton")
    assert bool(out[:, 7].isnan().all()) and int(out.isnan().sum()) == 20


def test_rows_of_scales_far_apart(device: str) -> None:
    """A view's: the last row of a tile of 128 is more than 2^31 bytes behind the first."""
    torch.manual_seed(5)
    x, w = torch.randn(4, 64).bfloat16(), quantize(torch.randn(128, 64), MXFP4)
    assert w.scale is not None
    row = 2**24 + 2**18
    scale = torch.empty(127 * row + 2, dtype=torch.uint8, device=device).as_strided((128, 2), (row, 1))      # what isn't touched takes no memory
    scale.copy_(w.scale.view(torch.uint8))
    far = ScaledTensor(w.data.to(device), scale, MXFP4)
    got = gemm(x.to(device), far, out_dtype=torch.float32, backend="triton.mx", config=Config(16, 128, 128, 4, 1, persistent=True))
    assert calc_diff(got.cpu(), x.float() @ w.dequantize().mT) < 5e-6


@pytest.mark.parametrize("layout", ["dense", "offsets"])
@pytest.mark.parametrize("codes, other", [((0, 4), (250, 255)), ((251, 255), (0, 4)), ((120, 130), (120, 130))])
def test_scales_at_the_ends(layout: str, codes: tuple[int, int], other: tuple[int, int], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a conversion to BF16 would lose is shifted; a NaN stays in its row and column."""
    monkeypatch.setattr(mx, "converts", lambda arch: True)
    gen = torch.Generator().manual_seed(2)

    def side(codes: tuple[int, int], *shape: int) -> ScaledTensor:
        data = torch.randint(0, 0x38, shape, dtype=torch.uint8, generator=gen)
        scale = torch.randint(*codes, (*shape[:-1], shape[-1] // 32), dtype=torch.uint8, generator=gen)
        return ScaledTensor(data.view(torch.float8_e4m3fn).to(device), scale.to(device), MXFP8)

    def double(q: ScaledTensor) -> torch.Tensor:
        return q.data.double() * torch.exp2(q.scale.double() - 127).repeat_interleave(32, -1)

    a, w = side(codes, 20, 160), side(other, 2, 40, 160)
    if layout == "dense":
        got, want = gemm(a, w[0], out_dtype=torch.float32, backend="triton"), double(a) @ double(w[0]).mT
    else:
        offsets = torch.tensor([0, 7, 20], device=device)
        got = grouped_gemm(a, w, Offsets(offsets), out_dtype=torch.float32, backend="triton")
        want = torch.cat([double(a)[:7] @ double(w[0]).mT, double(a)[7:] @ double(w[1]).mT])
    assert calc_diff(got.double(), want) <= 1e-6
    a.scale[3, 1] = 255
    got = gemm(a, w[0], out_dtype=torch.float32, backend="triton")
    assert got[3].isnan().all() and not got[[i for i in range(20) if i != 3]].isnan().any()
