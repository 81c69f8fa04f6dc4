"""On a GPU: MXFP8 by folded MXFP8 weights on FP8 tensor cores, through both gates, on data that folds and on data that doesn't."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import narrowgemm as ng
from narrowgemm.arch import detect
from narrowgemm.formats import MXFP8, ScaledTensor
from narrowgemm.kernels.gluon.sm90 import fold_both, fold_mixed
from narrowgemm.kernels.operands import Operands
from narrowgemm.testing.cases import Case, build
from narrowgemm.testing.numerics import calc_diff

from .test_expand_gpu import GATE, activations, double, follows_the_data

pytestmark = pytest.mark.gpu
DEV, NAME = "cuda", fold_both.NAME
SPREAD = "uniform:0.3:1.7"


@pytest.fixture(autouse=True)
def _hopper():
    if detect(torch.device(DEV)).target != "sm90":
        pytest.skip("the kernel is for Hopper")
    torch.manual_seed(0)


def cases(**kw) -> list[Case]:
    kw |= {"a": MXFP8, "b": MXFP8, "packed": "folded"}
    return [Case("both", "dense", 1, 333, 1088, 1152, **kw), Case("both", "dense", 1, 1, 72, 1056, **kw),
            Case("both", "dense", 1, 700, 1000, 6144, **kw),
            Case("both", "contiguous", 6, 150, 640, 1056, sizes=SPREAD, alignment=1, **kw),
            Case("both", "contiguous", 6, 75, 648, 1152, sizes=SPREAD, order="repeated", alignment=1, slack=128, **kw),
            Case("both", "offsets", 6, 150, 640, 1152, sizes=SPREAD, slack=40, **kw),
            Case("both", "offsets", 40, 7, 640, 2048, sizes="empty:0.4", **kw)]


def of_any_width(**kw) -> list[Case]:
    """Whose weights are whole tiles as they are packed, so that products on tiles of other widths are offered."""
    kw |= {"a": MXFP8, "b": MXFP8, "packed": "folded"}
    return [Case("both", "dense", 1, 333, 768, 1152, **kw), Case("both", "dense", 1, 1500, 512, 6144, **kw),
            Case("both", "contiguous", 6, 150, 512, 1056, sizes=SPREAD, alignment=1, **kw),
            Case("both", "offsets", 6, 150, 768, 1152, sizes=SPREAD, slack=40, **kw),
            Case("both", "offsets", 40, 7, 512, 2048, sizes="empty:0.4", **kw)]


def as_they_came() -> list[Case]:
    """Dense ones, of weights that each call folds."""
    kw = {"packed": "folded_mxfp8"}
    dense = [c for c in (*cases(), *of_any_width(), *of_any_width(out_dtype="fp32"), *of_any_width(outliers=True)) if c.layout == "dense"]
    return [replace(c, **kw) for c in dense if c.k % 128 == 0]


@pytest.mark.parametrize("case", [*cases(), *cases(out_dtype="fp32"), cases(out_dtype="fp16")[0], cases(outliers=True)[0], *of_any_width(),
                                  of_any_width(out_dtype="fp32")[3], *of_any_width(outliers=True), *as_they_came()], ids=str)
def test_gates(case: Case) -> None:
    inputs = build(case, DEV, seed=3)
    assert inputs.packed.folded is not None and (inputs.packed.plain is None) == (case.packed == "folded")
    offered = fold_both.configs(inputs.plan(backend=NAME).problem, detect(torch.device(DEV)))
    assert len(offered) > 2 or case.n % 256
    for config in offered:
        inputs.verify_repeats(backend=NAME, config=config)


def weights(kind: str, n: int, k: int) -> ScaledTensor:
    w = torch.randn(n, k, device=DEV)
    if kind == "outlier column":
        w[:, 70] *= 30
    q = ng.quantize(w, MXFP8, backend="reference")
    if kind == "ends":
        q.scale[5], q.scale[6], q.scale[7, 3] = 16, 190, q.scale[7, 3] - 30
        q.data[8, 32:64], q.scale[8, 1], q.data[9, 40] = 0, 254, float("nan")
    return q


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["normal", "outlier channel", "blocks apart", "half of it", "ends"])
@pytest.mark.parametrize("of_weights", ["normal", "outlier column", "ends"])
@pytest.mark.parametrize("order", ["bf16", "mxfp8"])
def test_data_that_folds_and_other_data(order: str, of_weights: str, kind: str, dtype: torch.dtype) -> None:
    """Whatever the device decides, nothing is rounded: each row and column is held against the product in FP64."""
    k = 1056 if order == "bf16" else 1152
    w = weights(of_weights, 512, k)
    a = activations("normal" if kind == "ends" else kind, 700, k)
    if kind == "ends":
        a.scale[3, 1], a.scale[5, 2], a.scale[9, :], a.scale[200, 8] = 255, 150, 64, 90
        a.data[11, 32:64], a.scale[11, 1], a.data[13, 70] = 0, 254, float("nan")
    packed = ng.prepack(w, activations=order, folded=True)
    assert packed.folded is not None and (packed.plain is None) == (order == "bf16")
    want = double(a) @ double(w).mT
    nan, want = want.isnan(), want.nan_to_num(0)
    for config in (fold_both.configs_of()[0], fold_both.of_widths()[1], fold_both.of_widths()[-1]):      # the last one for pairs of blocks
        got = ng.gemm(a, packed, out_dtype=dtype, backend=NAME, config=config).double()
        assert torch.equal(got.isnan(), nan)
        got = got.nan_to_num(0)
        for rows in (slice(None), *((slice(r, r + 1)) for r in (0, 5, 9, 200))):
            assert calc_diff(got[rows, 10:], want[rows, 10:]) <= GATE[dtype]
        for column in (*range(5, 9), 100):
            assert calc_diff(got[:, column], want[:, column]) <= GATE[dtype], column


@pytest.mark.parametrize("code", [20, 200])
@pytest.mark.parametrize("order, k", [("bf16", 1056), ("mxfp8", 1152)])
def test_activations_far_out_take_the_other_product(order: str, k: int, code: int) -> None:
    a, w = activations("normal", 300, k), weights("normal", 520, k)
    a.scale[7] = code
    packed = ng.prepack(w, activations=order, folded=True)
    got, want = ng.gemm(a, packed, out_dtype=torch.float32, backend=NAME), double(a) @ double(w).mT
    for row in (6, 7, 8):
        assert calc_diff(got[row].double(), want[row]) <= 1e-6


def test_a_look_in_front_leaves_outliers_at_once_and_normal_data_folded() -> None:
    """In one graph, whatever came before: cuts of few blocks, or a count that no limit reaches and nothing written."""
    m, k = 1024, 6144
    inputs = build(Case("both", "dense", 1, m, 520, k, a=MXFP8, b=MXFP8, packed="folded"), DEV, seed=1)
    plan = inputs.plan(backend=NAME)
    packed = inputs.packed
    a = activations("normal", m, k)
    x = Operands(a, ScaledTensor(packed.data, packed.scale, MXFP8), inputs.out.tensor, m, 520, k, 1, None, 1, packed=packed,
                 factor=packed.factor, folded=packed.folded.data, folded_rest=packed.folded.rest)
    work = torch.zeros(plan.workspace_bytes, dtype=torch.uint8, device=DEV)
    at, blocks = fold_both.regions(plan.problem, m), m // 64 * (k // 128)
    count, flags, y = (work[at.counter: at.counter + 4].view(torch.int32), work[at.flags: at.flags + 4 * blocks].view(torch.int32),
                       work[at.x: at.x + m * k])
    front = fold_both.launches(plan.steps[0], plan.problem, x, work)[:2]
    for launch in front:
        launch.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in front:
            launch.run()
    for kind in ("normal", "blocks apart", "normal", "blocks apart", "normal"):
        new = activations(kind, m, k)
        a.data.copy_(new.data)
        a.scale.copy_(new.scale)
        work.fill_(0x7F)
        graph.replay()
        if kind == "normal":
            assert count.item() == sum(bin(f).count("1") for f in flags.tolist()) <= 0.15 * blocks
            assert 0.02 < (flags != 0).float().mean().item() < 0.12
        else:
            early = (fold_mixed.EARLY_BLOCKS + 1) * detect(torch.device(DEV)).sms // (k // 128)      # rows of blocks that start beside the look
            assert count.item() == 1 << 30 and bool((y.view(m, k)[64 * early + 64:] == 0x7F).all()) and bool((flags == 0x7F7F7F7F).all())


def test_a_graph_follows_the_data() -> None:
    follows_the_data(MXFP8, NAME, ([0, 1, 203, 300, 512], [0, 0, 0, 511, 512], [0, 128, 256, 384, 512]), folded=True)


@pytest.mark.parametrize("columns, pairs", [(80, False), (192, True)])
@pytest.mark.parametrize("m, order", [(700, "bf16"), (444, "bf16"), (444, "mxfp8")], ids=["own", "behind", "as they came"])
def test_a_graph_follows_data_of_another_kind(m: int, order: str, columns: int, pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One capture, whether a product multiplies in BF16 itself or another one does: every replay is bit for bit the call on the same data."""
    n, k = 512, 1152
    if m != 700:
        monkeypatch.setattr(fold_both, "OWN", 0)
    w = ng.quantize(torch.randn(n, k, device=DEV), MXFP8)
    packed, wide, a = ng.prepack(w, activations=order, folded=True), double(w), activations("normal", m, k)
    config = next(c for c in fold_both.of_widths() if c.block_n == columns and bool(c.extra) == pairs)
    out = torch.empty(m, n, dtype=torch.bfloat16, device=DEV)

    def call() -> torch.Tensor:
        return ng.gemm(a, packed, out=out, backend=NAME, config=config)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for kind in ("blocks apart", "normal", "outlier channel", "far out", "nan", "half of it", "normal"):
        new = activations(kind, m, k)
        a.data.copy_(new.data)
        a.scale.copy_(new.scale)
        out.fill_(7)
        graph.replay()
        replayed, want = out.clone(), double(a) @ wide.mT
        out.fill_(7)
        assert torch.equal(call().view(torch.int16), replayed.view(torch.int16)), kind
        assert torch.equal(replayed.isnan(), want.isnan()), kind
        assert calc_diff(replayed.double().nan_to_num(0), want.nan_to_num(0)) <= GATE[torch.bfloat16], kind
