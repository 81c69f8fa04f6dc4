"""On a GPU: products whose operands are brought to BF16, or folded to FP8, once a call; every layout, any data, graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import narrowgemm as ng
from narrowgemm.arch import detect
from narrowgemm.formats import MXFP4, MXFP8, Format, ScaledTensor
from narrowgemm.kernels.gluon.sm90 import expand, fold_mixed
from narrowgemm.testing.cases import Case, build
from narrowgemm.testing.numerics import calc_diff

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]
DEV = "cuda"
SPREAD = "uniform:0.3:1.7"
GATE = {torch.bfloat16: 5e-6, torch.float32: 1e-6}


def cases(a=MXFP8, b=MXFP8, **kw) -> list[Case]:
    kw |= {"a": a, "b": b, "packed": True}
    return [Case("space", "dense", 1, 333, 1088, 1152, **kw),
            Case("space", "contiguous", 6, 150, 640, 1056, sizes=SPREAD, alignment=1, **kw),
            Case("space", "contiguous", 6, 75, 648, 1152, sizes=SPREAD, order="repeated", alignment=1, **kw),
            Case("space", "offsets", 6, 150, 640, 1152, sizes=SPREAD, slack=40, **kw),
            Case("space", "offsets", 40, 7, 640, 1152, sizes="empty:0.4", **kw),
            Case("space", "masked", 6, 150, 640, 1056, max_m=300, sizes=SPREAD, **kw),
            Case("space", "psum", 6, 150, 648, 1152, sizes=SPREAD, alignment=64, **kw)]


ALL = [(expand, c) for pair in ((MXFP8, MXFP8), (MXFP8, MXFP4), (MXFP4, MXFP4)) for c in cases(*pair)] + [
    (expand, c) for c in cases(out_dtype="fp32", accumulate=True)] + [
    (expand, replace(c, packed=False)) for c in (cases()[0], cases(out_dtype="fp32")[0])] + [
    (fold_mixed, c) for kw in ({}, {"out_dtype": "fp32"}) for c in cases(MXFP8, MXFP4, **kw)]


@pytest.mark.parametrize("module, case", ALL, ids=lambda x: getattr(x, "id", getattr(x, "NAME", "")))
def test_every_layout(module, case: Case) -> None:
    """Every config through both gates, poison and guards, and to the same bits once more. Behind the launch that brings them to BF16,
    MXFP4 operands are multiplied as MXFP8's are: one config of each tile of 256 columns, and cuBLAS."""
    inputs = build(case, DEV, seed=3)
    plan = inputs.plan(backend=module.NAME)
    assert plan is not None
    tried = module.configs(plan.problem, detect(torch.device(DEV)))
    if module is expand and case.b is MXFP4:
        tried = [c for c in {(c.block_m, c.block_n, c.extra): c for c in tried}.values() if c.block_n == 256]
    for config in tried:
        inputs.verify_repeats(backend=module.NAME, config=config)


def double(q: ScaledTensor) -> Tensor:
    scale = torch.where(q.scale == 255, torch.nan, torch.exp2(q.scale.double() - 127)).repeat_interleave(32, -1)
    one = ScaledTensor(q.data, torch.full_like(q.scale, 127), q.format)
    return one.dequantize().double() * scale[..., : q.shape[-1]]


def activations(kind: str, m: int, k: int) -> ScaledTensor:
    x = torch.randn(m, k, device=DEV)
    if kind == "outlier channel":
        x[:, 5] *= 30
    elif kind in ("blocks apart", "half of it"):        # blocks of 32 whose sizes are e^2 apart
        rows = m if kind == "blocks apart" else m // 8
        x[:rows] *= torch.exp(2 * torch.randn(rows, k // 32, device=DEV)).repeat_interleave(32, 1)
    a = ng.quantize(x, MXFP8)
    if kind == "far out":
        a.scale[7], a.scale[9] = 3, 240
    elif kind == "nan":
        a.scale[7, 3] = 255
        a.data.view(torch.uint8)[9, 4] = 0x7F
    return a


@pytest.mark.parametrize("dtype", GATE, ids=str)
@pytest.mark.parametrize("kind", ["normal", "outlier channel", "half of it", "blocks apart", "far out", "nan"])
def test_activations_that_fold_and_others(kind: str, dtype: torch.dtype) -> None:
    a, w = activations(kind, 700, 1056), ng.quantize(torch.randn(520, 1056, device=DEV), MXFP4)
    want = double(a) @ double(w).mT
    got = ng.gemm(a, ng.prepack(w), out_dtype=dtype, backend=fold_mixed.NAME)
    assert torch.equal(got.isnan(), want.isnan())
    assert calc_diff(got.double().nan_to_num(0), want.nan_to_num(0)) <= GATE[dtype]


@pytest.mark.parametrize("codes, other", [((0, 4), (246, 250)), ((120, 130), (120, 130)), ((251, 255), (0, 4))])
@pytest.mark.parametrize("config", [expand.CANDIDATES[0], expand.PAIRS, expand.CUBLAS], ids=str)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_scales_at_the_ends(packed: bool, config, codes: tuple[int, int], other: tuple[int, int]) -> None:
    """Of A; weights' are at the other end. What was shifted comes back from cuBLAS, too."""
    a, w = (ScaledTensor(torch.randint(0, 0x38, (r, 384), dtype=torch.uint8, device=DEV).view(torch.float8_e4m3fn),
                         torch.randint(*c, (r, 12), dtype=torch.uint8, device=DEV), MXFP8) for r, c in ((300, codes), (136, other)))
    want = double(a) @ double(w).mT
    got = ng.gemm(a, ng.prepack(w) if packed else w, backend=expand.NAME, config=config)
    assert calc_diff(got.double(), want) <= 5e-6


def follows_the_data(fmt: Format, backend: str, replayed: tuple[list[int], ...], **packing) -> None:
    """The same capture with rows that move to these offsets, and with activations that fold, that don't, and that do."""
    e, m, n, k = 4, 512, 640, 1152
    w = ng.quantize(torch.randn(e, n, k, device=DEV), fmt)
    packed, wide = ng.prepack(w, **packing), double(w)
    a = activations("normal", m, k)
    offsets = torch.tensor([0, 100, 100, 300, 512], device=DEV)
    out = torch.empty(m, n, dtype=torch.bfloat16, device=DEV)

    def call() -> Tensor:
        return ng.grouped_gemm(a, packed, ng.Offsets(offsets), out=out, backend=backend)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for kind, ends in zip(("normal", "blocks apart", "normal"), replayed, strict=True):
        new = activations(kind, m, k)
        a.data.copy_(new.data)
        a.scale.copy_(new.scale)
        offsets.copy_(torch.tensor(ends))
        graph.replay()
        for g in range(e):
            rows = slice(ends[g], ends[g + 1])
            if ends[g] < ends[g + 1]:
                assert calc_diff(out[rows].double(), double(a)[rows] @ wide[g].mT) <= 5e-6


def test_a_graph_follows_the_data() -> None:
    follows_the_data(MXFP4, fold_mixed.NAME, ([0, 1, 200, 300, 512], [0, 0, 0, 512, 512], [0, 128, 256, 384, 512]))
