"""On a GPU: the Hopper prefill kernel with folded weights, every tile in every layout, through both gates with poison and guards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import narrowgemm as ng
from narrowgemm import MXFP4, FP8_1x128, Masked, Offsets
from narrowgemm.kernels.gluon.sm90 import fold, fold_whole
from narrowgemm.problem import Config
from narrowgemm.testing.cases import Case, build
from narrowgemm.testing.numerics import calc_diff

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]
NAME = fold.NAME
FP8_E8M0 = FP8_1x128.with_scale("e8m0")
TILES = (Config(256, 128, 128, 13, 3, 8, persistent=True), Config(128, 256, 128, 13, 3, 8, persistent=True),
         Config(128, 128, 128, 13, 4, 8, persistent=True))
TAILS = replace(TILES[0], extra=(("tails", 1), ))
QUARTERS = replace(TILES[0], extra=(("quarters", 1),))
AHEAD, WHOLE, ALONE, SMALL, WIDE = fold_whole.CANDIDATES


def case(layout: str, m: int = 200, n: int = 336, k: int = 672, **kw) -> Case:
    groups = 1 if layout == "dense" else kw.pop("groups", 4)
    kw.setdefault("packed", True)
    kw.setdefault("sizes", "balanced" if layout == "dense" else "uniform:0.1:1.9")
    return Case("fold", layout, groups, m, n, k, b=MXFP4, max_m=2 * m if layout == "masked" else 0, **kw)


GROUPED = ("contiguous", "offsets", "psum", "masked")
RUNS = [*((case(layout, packed="fp8"), tile) for layout, tile in (("contiguous", AHEAD), ("masked", AHEAD), ("offsets", WHOLE), ("dense", ALONE),
                                                                  ("contiguous", TILES[0]), ("masked", TILES[1]), ("psum", TILES[2]))),
        (case("offsets", a=MXFP4, packed="fp8"), TILES[0]),
        *((case(layout, a=a), AHEAD) for layout in GROUPED for a in (FP8_1x128, MXFP4)),
        *((case(layout), WHOLE) for layout in GROUPED), (case("masked", a=FP8_E8M0, out_dtype="fp32"), WHOLE),
        *((case(layout), ALONE) for layout in ("dense", "contiguous", "masked")), (case("dense", a=MXFP4), ALONE),
        *((case("masked", packed="fp8", groups=groups, m=m), tile) for tile in (QUARTERS, WIDE) for groups, m in ((1, 600), (6, 300), (30, 20))),
        (case("masked", sizes="zero", packed="fp8"), QUARTERS), (case("masked", m=1, packed="fp8", out_dtype="fp32"), QUARTERS),
        (case("masked", a=MXFP4, m=300), QUARTERS), (case("masked", a=MXFP4, m=300), WIDE), (case("masked", a=FP8_E8M0, n=328), WIDE),
        (case("offsets", m=300), WIDE), (case("psum", m=300), WIDE),
        (case("masked", packed="fp8"), SMALL), (case("dense", packed="fp8"), SMALL),
        *((case(layout, packed="fp8", groups=6), TAILS) for layout in ("offsets", "masked")), (case("offsets", m=140, groups=300, k=256), TAILS),
        (case("masked", a=MXFP4, m=300), TAILS), (case("masked", m=1, packed="fp8"), TAILS), (case("masked", sizes="zero", packed="fp8"), TAILS),
        (case("offsets", a=FP8_E8M0, m=200, groups=40, sizes="empty:0.5", out_dtype="fp32"), TAILS),
        (case("contiguous", sizes="empty:0.5", order="repeated", alignment=1, slack=128, m=300, out_dtype="fp16"), AHEAD),
        (case("offsets", m=300, groups=40, sizes="empty:0.4", k=1184, out_dtype="fp32"), AHEAD),
        *((case(layout), tile) for layout in ("dense", "contiguous", "masked") for tile in TILES), (case("offsets"), TILES[0]),
        (case("psum"), TILES[0]), *((case(layout, a=MXFP4), TILES[0]) for layout in ("contiguous", "offsets", "masked")),
        (case("contiguous", a=FP8_E8M0), TILES[1]), (case("masked", a=FP8_E8M0, out_dtype="fp32"), TILES[0]),
        (case("contiguous", order="repeated", alignment=1, accumulate=True, n=328), TILES[2]),
        (case("contiguous", sizes="empty:0.5", zero_padding=False, slack=128, out_dtype="fp16"), TILES[1]),
        (case("offsets", m=7, groups=40, sizes="empty:0.4", k=32), TILES[2]), (case("dense", m=1, n=72, k=1024), TILES[2]),
        (case("masked", m=30, n=200, k=256, out_dtype="fp32", accumulate=True), TILES[2])]


def name_of(x: Case | Config) -> str:
    return x.id if isinstance(x, Case) else "-".join([f"{x.block_m}x{x.block_n}", *(f"{k}{v}" for k, v in x.extra)])


@pytest.mark.parametrize("case, tile", RUNS, ids=name_of)
def test_gates(case: Case, tile: Config) -> None:
    inputs = build(case, "cuda", seed=3)
    inputs.verify_repeats(backend=NAME, config=tile)


def test_rows_beyond_a_tile() -> None:
    """Up to 32 rows more than whole tiles: the bits of whole tiles."""
    inputs = build(case("offsets", m=272, n=392, k=1184, packed="fp8", groups=100, sizes="uniform:0.9:1.1"), "cuda", seed=7)
    inputs.verify_repeats(backend=NAME, config=TAILS)
    got = inputs.out.tensor.clone()
    inputs.reset_out()
    inputs.call(backend=NAME, config=TILES[0])
    assert torch.equal(got, inputs.out.tensor)


def test_row_major_scales() -> None:
    build(case("contiguous"), "cuda", seed=4, scale_layout="row_major").verify(backend=NAME)


@pytest.mark.parametrize("tile", [TILES[0], AHEAD], ids=name_of)
@pytest.mark.parametrize("layout", ["contiguous", "masked"])
def test_activations_outside_of_the_window(layout: str, tile: Config) -> None:
    """Scales of A too far apart for E4M3 within 128 of K: the device takes the other product. No block is rounded."""
    inputs = build(case(layout, a=MXFP4, out_dtype="fp32"), "cuda", seed=5)
    scale = inputs.a.scale if layout == "contiguous" else inputs.a.scale[1]
    scale[3, 1], scale[5, 2], scale[0, 20] = 100, 150, 60
    scale[1, 3] = 255
    inputs.reset_out()
    inputs.call(backend=NAME, config=tile)
    assert not inputs.faults()
    for g in inputs.groups:
        got, want = inputs.rows(inputs.out.tensor, g), inputs.same_bits(g)
        assert torch.equal(got.isnan(), want.isnan())
        for row in range(min(8, len(got))):
            assert calc_diff(got[row].nan_to_num(), want[row].nan_to_num()) <= 1e-6, (g, row)


@pytest.mark.parametrize("tile", [TILES[0], AHEAD], ids=name_of)
def test_weights_at_the_ends(tile: Config) -> None:
    """Rows with the smallest and largest scales, rows with factors, a NaN scale, blocks of zeros under any scale."""
    g = torch.Generator(device="cuda").manual_seed(2)
    w = ng.quantize(torch.randn(2, 200, 384, generator=g, device="cuda"), MXFP4, backend="reference")
    w.scale[0, 5] = torch.arange(2, 14, dtype=torch.uint8, device="cuda")
    w.scale[1, 7], w.scale[0, 9, 3], w.scale[1, 64] = 235, 255, 20
    w.data[1, 11, 16:32], w.scale[1, 11, 1] = 0, 250
    packed = ng.prepack(w)
    assert packed.top is not None and packed.factor is not None
    a = ng.quantize(torch.randn(150, 384, generator=g, device="cuda"), FP8_1x128, backend="reference")
    layout = Offsets(torch.tensor([0, 70, 150], device="cuda"))
    want = ng.grouped_gemm(a, w, layout, out_dtype=torch.float32, backend="reference").double()
    got = ng.grouped_gemm(a, packed, layout, out_dtype=torch.float32, backend=NAME, config=tile).double()
    assert torch.equal(got.isnan(), want.isnan()) and bool(got[:70, 9].isnan().all())
    for rows in (slice(0, 70), slice(70, 150)):
        for n in (4, 5, 7, 11, 64, 199):
            assert calc_diff(got[rows, n], want[rows, n]) <= 1e-6, n


def test_rows_that_do_not_fold_go_elsewhere() -> None:
    w = ng.quantize(torch.randn(2, 128, 256, device="cuda"), MXFP4, backend="reference")
    w.scale[1, 3, 0] -= 20
    packed = ng.prepack(w)
    assert packed.top is None
    a = ng.quantize(torch.randn(2, 64, 256, device="cuda"), MXFP4, backend="reference")
    index = torch.tensor([60, 64], dtype=torch.int32, device="cuda")
    with pytest.raises(ng.Unsupported, match="15 powers of two"):
        ng.grouped_gemm(a, packed, Masked(index), backend=NAME)
    got, want = (ng.grouped_gemm(a, b, Masked(index), backend=x) for b, x in ((packed, None), (w, "reference")))
    assert calc_diff(got[1].float(), want[1].float()) <= 5e-6


@pytest.mark.parametrize("a, tile", [(FP8_1x128, TILES[0]), (MXFP4, TILES[0]), (FP8_1x128, AHEAD), (MXFP4, AHEAD)], ids=["fp8", "mxfp4", "fp8-ahead", "mxfp4-ahead"])
def test_graph_replay_with_changed_sizes(a, tile: Config) -> None:
    inputs = build(case("offsets", a=a), "cuda", seed=6)
    index = inputs.layout.index
    out = torch.zeros_like(inputs.out.tensor)

    def call(to: torch.Tensor) -> None:
        ng.grouped_gemm(inputs.a, inputs.packed, Offsets(index), out=to, backend=NAME, config=tile)

    call(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(out)
    for sizes in ([0, 5, 5, 300, 301], [0, 0, 128, 128, 700]):
        index.copy_(torch.tensor(sizes))
        out.zero_()
        graph.replay()
        eager = torch.zeros_like(out)
        call(eager)
        assert torch.equal(out, eager) and bool(out.any())


@pytest.mark.parametrize("a", [FP8_1x128, MXFP4], ids=["fp8", "mxfp4"])
def test_no_rows(a) -> None:
    """Nothing to do: the product begins with no group, waits for none and writes nothing."""
    packed = ng.prepack(ng.quantize(torch.randn(2, 128, 256, device="cuda"), MXFP4, backend="reference"))
    out = torch.full((64, 128), 7.0, dtype=torch.bfloat16, device="cuda")
    rows = ng.quantize(torch.randn(64, 256, device="cuda"), a, backend="reference")
    ng.grouped_gemm(rows, packed, Offsets(torch.zeros(3, dtype=torch.int64, device="cuda")), out=out, backend=NAME, config=AHEAD)
    assert bool((out == 7).all())
    none = ng.quantize(torch.randn(0, 256, device="cuda"), a, backend="reference")
    ids = torch.empty(0, dtype=torch.int32, device="cuda")
    assert ng.grouped_gemm(none, packed, ng.Contiguous(ids), backend=NAME).shape == (0, 128)
