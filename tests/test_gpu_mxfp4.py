"""On a GPU: the suites with packed MXFP4 weights, and partial tiles of every layout, through both gates with poison and guards."""

from __future__ import annotations

import gc

import pytest
import torch

import narrowgemm as ng
from narrowgemm.arch import detect
from narrowgemm.formats import MXFP4, MXFP8, Format, FP8_1x128, ScaledTensor
from narrowgemm.kernels.gluon.sm90 import fold, narrow_prefill
from narrowgemm.testing.cases import Case, build, get_suite
from narrowgemm.testing.numerics import calc_diff

from ._graphs import captured

pytestmark = pytest.mark.gpu

SUITES = ("mxfp4-contiguous", "mxfp4-a4w4", "mxfp4-mx8", "mxfp4-256", "mxfp4-masked")
FORMATS = (FP8_1x128, FP8_1x128.with_scale("e8m0"), MXFP8, MXFP4)
_kept: dict = {}


@pytest.fixture(scope="module", autouse=True)
def _free():
    yield
    _kept.clear()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("case", [c for s in SUITES for c in get_suite(s)], ids=lambda c: f"{c.suite}/{c.id}")
def test_suites(case: Case) -> None:
    inputs = build(case, "cuda", seed=11, reuse=_kept.pop("weights", None))
    _kept["weights"] = inputs.weights
    inputs.verify()


def partial(a: Format, packed: bool | str = True) -> list[Case]:
    """Fewer rows than a tile, one row, none, a group that can hold less than a tile; N and K that no tile divides."""
    flat = [("dense", 1, 1, "balanced", 0), ("dense", 1, 131, "balanced", 0), ("offsets", 7, 3, "uniform:0.0:2.2", 0),
            ("offsets", 5, 40, "empty:0.4", 0), ("contiguous", 4, 33, "uniform:0.1:1.9", 0), ("psum", 4, 33, "uniform:0.1:1.9", 0),
            ("masked", 4, 5, "uniform:0.0:2.0", 7), ("masked", 3, 60, "uniform:0.0:1.9", 130), ("masked", 4, 1, "balanced", 1),
            ("masked", 4, 3, "empty:0.5", 256)]
    return [Case("partial", layout, g, m, 200, 352, a=a, b=MXFP4, sizes=sizes, max_m=x, packed=packed, alignment=16,
                 out_dtype=("bf16", "fp32", "fp16")[i % 3]) for i, (layout, g, m, sizes, x) in enumerate(flat)]


ORDERS = [*((f, True) for f in FORMATS), *((f, "fp8") for f in FORMATS if f != MXFP8)]


@pytest.mark.parametrize("case", [c for f, packed in ORDERS for c in partial(f, packed)], ids=lambda c: f"{c.id}-{c.packed}")
def test_partial_tiles(case: Case) -> None:
    build(case, "cuda", seed=12).verify()


@pytest.mark.parametrize("case", [c for c in partial(FP8_1x128, "fp8") if c.layout in ("masked", "offsets")], ids=lambda c: c.id)
@pytest.mark.parametrize("kernel", [fold, narrow_prefill], ids=["fold", "narrow_prefill"])
def test_partial_tiles_of_every_tile(case: Case, kernel) -> None:
    """Whichever kernel and tile a problem of that shape would get, were it larger."""
    if detect(torch.device("cuda")).target != "sm90":
        pytest.skip("runs on Hopper")
    inputs = build(case, "cuda", seed=13)
    problem = inputs.plan(backend=kernel.NAME).problem
    for config in kernel.configs(problem, detect(torch.device("cuda"))):
        inputs.verify(backend=kernel.NAME, config=config)


def every_scale() -> ScaledTensor:
    """[235, 480]: a row for every largest scale that folds, all 16 codes at each of the 15 scales from there down."""
    payload = torch.arange(16, dtype=torch.uint8, device="cuda").repeat(30)
    payload = payload[0::2] | payload[1::2] << 4
    top = torch.arange(15, 250, device="cuda").view(-1, 1)
    scale = (top - torch.arange(15, device="cuda").view(1, -1)).to(torch.uint8)
    return ScaledTensor(payload.expand(len(top), -1).contiguous().view(MXFP4.elem.dtype), scale, MXFP4)


def ones(k: int, fmt: Format) -> ScaledTensor:
    """The unit matrix, with scales of 1."""
    eye = torch.eye(k, device="cuda")
    if fmt == MXFP4:
        codes = (2 * eye).to(torch.uint8)       # of 1
        scale = torch.full((k, k // 32), 127, dtype=torch.uint8, device="cuda")
        return ScaledTensor((codes[:, 0::2] | codes[:, 1::2] << 4).view(fmt.elem.dtype), scale, fmt)
    return ScaledTensor(eye.to(torch.float8_e4m3fn), torch.ones(k, -(-k // 128), device="cuda"), fmt)


@pytest.mark.parametrize("a", [FP8_1x128, MXFP4], ids=lambda f: f.name)
@pytest.mark.parametrize("order", ["bf16", "fp8"])
@pytest.mark.parametrize("layout", ["dense", "offsets", "masked"])
def test_weights_come_out_bit_for_bit(layout: str, order: str, a: Format) -> None:
    """Tokens of one 1 each bring out what the tensor cores multiply by: every code at every scale, by every tile."""
    if detect(torch.device("cuda")).target != "sm90":
        pytest.skip("runs on Hopper")
    w = every_scale()
    k = 480
    want = w.dequantize().t()
    packed = ng.prepack(w if layout == "dense" else ScaledTensor(w.data[None], w.scale[None], MXFP4), activations=order)
    assert packed.top is not None
    tokens = ones(k, a)
    assert torch.equal(tokens.dequantize(), torch.eye(k, device="cuda"))
    index = torch.tensor([0, k] if layout == "offsets" else [k], dtype=torch.int32, device="cuda")
    shape = (1, k, w.shape[0]) if layout == "masked" else (k, w.shape[0])
    if layout == "masked":
        tokens = ScaledTensor(tokens.data[None], tokens.scale[None], a)
    seen = 0
    for kernel in (fold, narrow_prefill):
        problem = ng.explain("gemm" if layout == "dense" else "grouped_gemm", layout=layout, m=k, n=w.shape[0], k=k, a=a, b=MXFP4,
                             packed="fp8" if order == "fp8" else True, out_dtype="fp32").plan.problem
        if kernel.supports(problem, detect(torch.device("cuda"))) is not None:
            continue
        for config in kernel.configs(problem, detect(torch.device("cuda"))):
            out = torch.full(shape, torch.nan, device="cuda")
            if layout == "dense":
                ng.gemm(tokens, packed, out=out, backend=kernel.NAME, config=config)
            else:
                ng.grouped_gemm(tokens, packed, ng.Masked(index, k) if layout == "masked" else ng.Offsets(index), out=out,
                                backend=kernel.NAME, config=config)
            got = out.view(k, -1)
            assert torch.equal(got + 0.0, want + 0.0), (kernel.NAME, str(config), (got != want).nonzero()[:5])      # a sum has no -0
            seen += 1
    assert seen >= 6


def index_of(layout: str, sizes: list[int], rows: int) -> torch.Tensor:
    """Groups of such sizes in so many rows: those of contiguous and psum begin at multiples of 16."""
    if layout == "masked":
        return torch.tensor(sizes, dtype=torch.int32)
    ends, starts, at = [], [], 0
    for s in sizes:
        starts.append(at)
        ends.append(at + s)
        at = at + s if layout == "offsets" else -(-(at + s) // 16) * 16
    assert at <= rows
    if layout != "contiguous":
        return torch.tensor([0, *ends] if layout == "offsets" else ends, dtype=torch.int32)
    ids = torch.full((rows,), -1, dtype=torch.int32)
    for g, (start, end) in enumerate(zip(starts, ends)):
        ids[start:end] = g
    return ids


@pytest.mark.parametrize("layout", ["contiguous", "psum", "offsets", "masked"])
@pytest.mark.parametrize("m", [5, 150])
@pytest.mark.parametrize("a, order", ORDERS, ids=lambda x: getattr(x, "name", str(x)))
def test_graph_replay_with_changed_sizes(a: Format, order: bool | str, m: int, layout: str) -> None:
    """Captured once without a sync, replayed with other group sizes: an eager call's bits, and each group's product."""
    groups, n, k = 8, 328, 672
    w = ng.quantize(torch.randn(groups, n, k, device="cuda"), MXFP4)
    packed = ng.prepack(w, activations="fp8" if order == "fp8" else "bf16")
    rows = 2 * m if layout == "masked" else groups * (m + 16)
    shape = (groups, rows, k) if layout == "masked" else (rows, k)
    x = ng.quantize(torch.randn(shape, device="cuda"), a)
    index = index_of(layout, [m] * groups, rows).cuda()
    where = {"contiguous": ng.Contiguous, "offsets": ng.Offsets}.get(layout)
    how: ng.Layout = ng.Masked(index, m) if layout == "masked" else ng.Psum(index, 16) if where is None else where(index)
    out = torch.zeros(*shape[:-1], n, dtype=torch.bfloat16, device="cuda")

    def call() -> None:
        ng.grouped_gemm(x, packed, how, out=out)

    graph = captured(call)
    for sizes in ([m] * groups, [m // 2, 0, 1, m, 2 * m - 1, 0, m // 3, 1], [0] * groups, [0, 0, 0, 1, 0, 0, 0, 0]):
        index.copy_(index_of(layout, sizes, rows))
        out.fill_(7.0)
        graph.replay()
        got = out.clone()
        out.fill_(7.0)
        call()
        assert torch.equal(got, out)
        at = 0
        for g, s in enumerate(sizes):
            mine = got[g, :s] if layout == "masked" else got[at:at + s]
            left = x[g] if layout == "masked" else ScaledTensor(x.data[at:at + s], x.scale[at:at + s], a)
            if s:
                assert calc_diff(mine, left.dequantize()[:s] @ w[g].dequantize().mT) <= 5e-6
            at = at + s if layout == "offsets" else -(-(at + s) // 16) * 16
