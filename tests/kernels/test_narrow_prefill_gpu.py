"""On a GPU: the Hopper prefill kernel for narrow weights, every tile, through both gates with poison and guards; its epilogue."""

from __future__ import annotations

import pytest
import torch

import narrowgemm as ng
from narrowgemm import BF16, FP8_ROW, MXFP4, MXFP8, FP8_1x128, Offsets
from narrowgemm.arch import detect
from narrowgemm.formats import FP16
from narrowgemm.kernels.gluon.sm90 import narrow_prefill
from narrowgemm.ops.explain import describe
from narrowgemm.prepack_bits import FP8_PREPACK
from narrowgemm.problem import Config, Problem
from narrowgemm.testing.cases import Case, build
from narrowgemm.testing.inputs import Inputs
from narrowgemm.testing.numerics import calc_diff

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]
NAME = narrow_prefill.NAME
SMALL = (64, 1)     # tile that compiles fastest: most tokens, 64-row units of a consumer
# tokens of every width of a tile and around it; an odd number of K blocks, N no multiple of a tile's rows, K none of 128
MAIN = Case("narrow-prefill", "offsets", 24, 100, 328, 672, sizes="uniform:0.0:2.2", a=BF16, b=MXFP4, packed=True, slack=40)
RUNS = [*((MAIN, shape) for shape in narrow_prefill.SHAPES),
        (Case("narrow-prefill", "offsets", 12, 40, 328, 640, sizes="uniform:0.1:1.9", a=BF16, b=MXFP8, packed=True), (64, 2)),
        (Case("narrow-prefill", "offsets", 12, 150, 328, 640, sizes="uniform:0.3:1.7", a=MXFP8, b=MXFP8, packed=True), (128, 1)),
        (Case("narrow-prefill", "offsets", 40, 7, 192, 256, sizes="empty:0.4", a=MXFP4, b=MXFP4, packed=True, out_dtype="fp32"), (128, 2)),
        (Case("narrow-prefill", "offsets", 12, 40, 328, 672, sizes="uniform:0.1:1.9", a=FP16, b=MXFP4, packed=True), SMALL),
        (Case("narrow-prefill", "dense", 1, 333, 320, 1152, a=BF16, b=MXFP4, packed=True), (128, 1)),
        (Case("narrow-prefill", "contiguous", 6, 90, 320, 672, sizes="uniform:0.1:1.7", alignment=16, order="repeated", a=MXFP8, b=MXFP4,
              packed=True), (64, 2)),
        *((Case("narrow-prefill", layout, 6, 100, 328, 672, sizes="uniform:0.1:2.0", alignment=1, a=FP8_1x128, b=b, packed=True,
                max_m=200 if layout == "masked" else 0, out_dtype="fp32" if layout == "masked" else "bf16"), shape)
          for layout, b, shape in (("contiguous", MXFP4, (128, 1)), ("offsets", MXFP8, (64, 2)), ("masked", MXFP4, (192, 1)),
                                   ("offsets", MXFP4, (32, 1)), ("offsets", MXFP4, (64, 1)))),
        *((Case("narrow-prefill", layout, 24, 60, 328, 672, sizes="uniform:0.0:2.4", alignment=1, a=a, b=MXFP4, packed="fp8", out_dtype=out,
                max_m=200 if layout == "masked" else 0, order="repeated" if layout == "contiguous" else "sorted"), t)
          for layout, a, t, out in (("offsets", FP8_1x128, (32, 1), "bf16"), ("offsets", FP8_1x128, (32, 2), "fp32"), ("masked", FP8_1x128, (64, 2), "fp32"),
                                    ("contiguous", FP8_1x128, (128, 1), "bf16"), ("psum", FP8_1x128, (64, 2), "bf16"),
                                    ("offsets", FP8_1x128.with_scale("e8m0"), (64, 1), "bf16"))),
        *((Case("narrow-prefill", layout, 12, 110, 328, 1184, sizes="uniform:0.0:2.4", alignment=1, a=a, b=MXFP4, packed="fp8", out_dtype=out,
                max_m=300 if layout == "masked" else 0), t)
          for layout, a, t, out in (("offsets", FP8_1x128, (160, 1.5), "bf16"), ("offsets", FP8_1x128, (160, 1.5), "fp32"),
                                    ("offsets", FP8_1x128, (144, 2), "bf16"), ("offsets", FP8_1x128, (144, 2), "fp32"), ("offsets", FP8_1x128, (160, 1), "bf16"), ("masked", FP8_1x128, (160, 1), "fp32"),
                                    ("offsets", FP8_1x128, (160, 1), "fp32"), ("offsets", FP8_1x128.with_scale("e8m0"), (160, 1), "bf16"), ("offsets", FP8_1x128, (96, 1.5), "fp32"),
                                    ("offsets", FP8_1x128, (80, 2), "bf16"),
                                    ("offsets", FP8_ROW, (288, 1), "bf16"), ("offsets", FP8_ROW, (288, 1), "fp32"),
                                    ("offsets", FP8_ROW, (160, 1), "bf16"), ("offsets", FP8_ROW, (96, 1), "bf16"), ("offsets", FP8_ROW, (96, 1), "fp32"),
                                    ("offsets", FP8_1x128, (96, 1.5), "bf16"), ("masked", FP8_1x128, (96, 1.5), "fp32"), ("psum", FP8_ROW, (96, 1.5), "bf16"),
                                    ("masked", FP8_ROW, (160, 1), "bf16"), ("psum", FP8_ROW, (128, 1), "fp32"), ("contiguous", FP8_ROW, (64, 2), "bf16"),
                                    ("offsets", FP8_ROW, (64, 1), "bf16"), ("offsets", FP8_ROW, (32, 2), "bf16"), ("masked", FP8_ROW, (32, 1), "bf16"))),
        (Case("narrow-prefill", "dense", 1, 333, 320, 1152, a=FP8_ROW, b=MXFP4, packed="fp8"), (160, 1)),
        (Case("narrow-prefill", "dense", 1, 333, 320, 1152, a=FP8_1x128, b=MXFP4, packed="fp8"), (160, 1)),
        (Case("narrow-prefill", "offsets", 40, 4, 192, 256, sizes="empty:0.4", a=FP8_1x128, b=MXFP4, packed="fp8"), (32, 1)),
        (Case("narrow-prefill", "dense", 1, 77, 320, 1152, a=FP8_1x128, b=MXFP4, packed="fp8"), (64, 1)),
        # few rows where there is room for many; more groups than a warp finds entries of
        (Case("narrow-prefill", "masked", 24, 3, 328, 672, max_m=4100, sizes="empty:0.4", a=FP8_1x128, b=MXFP4, packed="fp8"), (32, 1)),
        (Case("narrow-prefill", "masked", 6, 9, 192, 256, max_m=1000, sizes="uniform:0.0:2.4", a=BF16, b=MXFP4, packed=True), SMALL),
        # what DeepGEMM's masked tests have room for, 1.9 GB of A in BF16
        (Case("narrow-prefill", "masked", 32, 6, 256, 7168, max_m=4096, sizes="uniform:0.0:2.0", a=BF16, b=MXFP4, packed=True), SMALL),
        (Case("narrow-prefill", "offsets", 300, 2, 128, 256, sizes="empty:0.4", a=FP8_1x128, b=MXFP4, packed="fp8"), (32, 1)),
        (Case("narrow-prefill", "psum", 6, 90, 320, 640, sizes="empty:0.3", a=MXFP4, b=MXFP4, packed=True), (128, 1)),
        (Case("narrow-prefill", "masked", 6, 50, 320, 640, max_m=100, sizes="uniform:0.3:1.7", a=BF16, b=MXFP4, packed=True), SMALL)]


def config_of(problem: Problem, shape: tuple[int, float]) -> Config:
    return next(c for c in narrow_prefill.configs(problem, detect(torch.device("cuda"))) if (c.block_m, c.block_n) == (shape[0], 128 * shape[1]))


def captured(inputs: Inputs, config: Config, max_sms: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inputs.call(backend=NAME, config=config, max_sms=max_sms)
    return graph


FP8_CONFIG = Config(64, 128, 128, 9, narrow_prefill.FP8_SHAPES[64, 1], swap_ab=True, persistent=True)
SMALL_CONFIG = Config(64, 128, 128, 9, narrow_prefill.SHAPES[SMALL][0], swap_ab=True, persistent=True)


@pytest.mark.parametrize("case, shape", RUNS, ids=lambda x: x.id if isinstance(x, Case) else f"{x[0]}x{x[1]}")
def test_gates(case: Case, shape: tuple[int, float]) -> None:
    inputs = build(case, "cuda", seed=5)
    config = config_of(inputs.plan(backend=NAME).problem, shape)
    inputs.verify_repeats(backend=NAME, config=config)


@pytest.mark.parametrize("case, shape", RUNS, ids=lambda x: x.id if isinstance(x, Case) else f"{x[0]}x{x[1]}")
def test_few_blocks_take_tiles_by_number(case: Case, shape: tuple[int, float]) -> None:
    """Blocks that have many tiles each do every one of them once, call after call: the bits of a block for every tile."""
    inputs = build(case, "cuda", seed=5)
    config = config_of(inputs.plan(backend=NAME).problem, shape)
    inputs.reset_out()
    inputs.call(backend=NAME, config=config)
    want = inputs.out.tensor.clone()
    inputs.verify_repeats(backend=NAME, config=config, max_sms=2)
    assert torch.equal(inputs.out.tensor.view(torch.uint8), want.view(torch.uint8))
    graph = captured(inputs, config, 2)
    for _ in range(2):
        inputs.reset_out()
        graph.replay()
        assert torch.equal(inputs.out.tensor.view(torch.uint8), want.view(torch.uint8))


def test_slots_are_not_refilled_under_loads() -> None:
    """Two blocks an SM, few of them: one replay in a thousand was wrong where a warp's load of scales was not waited for in front of
    giving the slot back (H200; H100: one in 10000)."""
    case = next(c for c, shape in RUNS if shape == (32, 1) and c.packed == "fp8" and c.layout == "offsets" and c.groups == 24)
    inputs = build(case, "cuda", seed=5)
    config = config_of(inputs.plan(backend=NAME).problem, (32, 1))
    assert config.option("ctas") == 2
    inputs.call(backend=NAME, config=config)
    want, wrong = inputs.out.tensor.clone(), torch.zeros((), dtype=torch.int64, device="cuda")
    graph = captured(inputs, config, 8)
    for _ in range(5000):
        inputs.reset_out()
        graph.replay()
        wrong += (inputs.out.tensor != want).any()
    assert int(wrong) == 0


def routed(seed: int, tokens: int = 300, top_k: int = 4, experts: int = 8, n: int = 320, k: int = 672) -> dict:
    g = torch.Generator(device="cuda").manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=g, device="cuda")[:top_k] for _ in range(tokens)]).int()
    ids[3, 0], ids[7, 1], ids[9:200, 0] = -1, experts, 1       # nobody's; repeated experts
    w = ng.quantize(torch.randn(experts, n, k, generator=g, device="cuda") / 8, MXFP4, backend="reference")
    x = torch.randn(tokens, k, generator=g, device="cuda").bfloat16()
    return {"x": x, "w": w, "order": ng.sort_by_expert(ids, experts), "top_k": top_k, "weight": torch.rand(tokens, top_k, generator=g, device="cuda"),
            "bias": torch.randn(experts, n, generator=g, device="cuda").bfloat16()}


@pytest.mark.parametrize("pair, activation, combine", [("interleaved", "swiglu_oai", False), ("halves", "swiglu", True), ("", None, True),
                                                       ("", None, False)])
def test_epilogue(pair: str, activation: str | None, combine: bool) -> None:
    r = routed(1)
    packed = ng.prepack(r["w"], pair=pair)
    common = {"row_map": r["order"].row_map, "top_k": r["top_k"], "a_div": r["top_k"], "bias": r["bias"], "activation": activation,
              "routing_weight": r["weight"], "combine": combine, "interleaved": pair == "interleaved"}
    shape = (len(r["x"]) if combine else r["weight"].numel(), r["w"].shape[1] // (2 if activation else 1))
    want = ng.routed_gemm(r["x"], r["w"], r["order"].layout, out=torch.full(shape, 7.0, device="cuda"), backend="reference", **common)
    got = torch.full(shape, 7.0, dtype=torch.bfloat16, device="cuda")
    ng.routed_gemm(r["x"], packed, r["order"].layout, out=got, config=SMALL_CONFIG, **common)
    assert calc_diff(got, want) <= 5e-6
    assert torch.equal((got == 7).all(1), (want == 7).all(1)), "rows that nobody computes are left alone"
    again = torch.full_like(got, 7.0)
    ng.routed_gemm(r["x"], packed, r["order"].layout, out=again, config=SMALL_CONFIG, **common)
    assert torch.equal(got, again)


@pytest.mark.parametrize("pair, activation, combine", [("interleaved", "swiglu_oai", False), ("halves", "swiglu", True), ("", None, True)])
def test_epilogue_of_fp8_tokens(pair: str, activation: str | None, combine: bool) -> None:
    """Weights packed for FP8: the same slots, one scale a token for 128 of K; graph replay has the same bits."""
    r = routed(2)
    packed = ng.prepack(r["w"], pair=pair, activations="fp8")
    x = ng.quantize(r["x"], FP8_1x128)
    common = {"row_map": r["order"].row_map, "top_k": r["top_k"], "a_div": r["top_k"], "bias": r["bias"], "activation": activation,
              "routing_weight": r["weight"], "combine": combine, "interleaved": pair == "interleaved"}
    shape = (len(r["x"]) if combine else r["weight"].numel(), r["w"].shape[1] // (2 if activation else 1))
    want = ng.routed_gemm(x, r["w"], r["order"].layout, out=torch.full(shape, 7.0, device="cuda"), backend="reference", **common)
    got = torch.full(shape, 7.0, dtype=torch.bfloat16, device="cuda")

    def call() -> None:
        ng.routed_gemm(x, packed, r["order"].layout, out=got, config=FP8_CONFIG, **common)

    call()
    assert calc_diff(got, want) <= 5e-6
    assert torch.equal((got == 7).all(1), (want == 7).all(1)), "rows that nobody computes are left alone"
    first = got.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    got.fill_(7.0)
    graph.replay()
    assert torch.equal(got, first)


def test_fp8_tokens_with_scales_at_the_ends_and_nan() -> None:
    """Rows of weights outside of the window have factors beside their own power of two; a NaN scale gives a NaN row and no other."""
    g = torch.Generator(device="cuda").manual_seed(2)
    w = ng.quantize(torch.randn(2, 192, 384, generator=g, device="cuda"), MXFP4, backend="reference")
    w.scale[0, 5], w.scale[1, 7], w.scale[1, 64] = 8, 200, 20
    w.scale[0, 100, 3] = 255
    packed = ng.prepack(w, activations="fp8")
    x = ng.quantize(torch.randn(200, 384, generator=g, device="cuda"), FP8_1x128)
    layout = Offsets(torch.tensor([0, 90, 200], device="cuda"))
    want = ng.grouped_gemm(x, w, layout, out_dtype=torch.float32, backend="reference")
    got = ng.grouped_gemm(x, packed, layout, out_dtype=torch.float32, config=FP8_CONFIG)
    assert packed.prepack == FP8_PREPACK and torch.equal(got.isnan(), want.isnan()) and bool(want[:90, 100].isnan().all())
    for columns in (5, 7, 64, slice(8, 60)):
        assert calc_diff(got[:, columns].double(), want[:, columns].double()) <= 1e-6, columns


@pytest.mark.parametrize("shape", [(160, 1), (96, 1.5), (80, 2), (144, 2)], ids=lambda x: f"{x[0]}x{x[1]}")
def test_scales_of_tokens_far_apart(shape: tuple[int, float]) -> None:
    """Of neighbouring K blocks, whose sums some tiles have in units of the second one's scale: each is as good as where it stands alone."""
    g = torch.Generator(device="cuda").manual_seed(2)
    w = ng.quantize(torch.randn(2, 192, 640, generator=g, device="cuda"), MXFP4, backend="reference")
    x = ng.quantize(torch.randn(200, 640, generator=g, device="cuda"), FP8_1x128)
    # row -> K block: what its scale is multiplied by
    wild = {3: {0: 2.0**60}, 4: {1: 2.0**60}, 5: {0: 2.0**-70, 1: 2.0**-70}, 6: {0: 2.0**90, 1: 2.0**-20}, 7: {0: 2.0**-50, 1: 2.0**50}, 8: {0: 2.0**70, 1: 2.0**70},
            9: {0: 0.0}, 10: {1: 0.0}, 11: {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0}, 12: {4: 0.0}, 13: {2: float("nan")}, 14: {3: float("nan")}}
    for row, blocks in wild.items():
        for k, factor in blocks.items():
            x.scale[row, k] *= factor
    x.data.view(torch.uint8)[15, 128:256] = 0       # nothing beside something, whatever the scale of nothing
    x.scale[15, 1] = 1e30
    layout = Offsets(torch.tensor([0, 90, 200], device="cuda"))
    want = ng.grouped_gemm(x, w, layout, out_dtype=torch.float32, backend="reference")
    fp32 = shape != (80, 2)     # that has no shared memory for it
    problem = describe("grouped_gemm", layout="offsets", groups=2, m=200, n=192, k=640, a=FP8_1x128, b=MXFP4, packed="fp8", out_dtype="fp32" if fp32 else "bf16")
    got = ng.grouped_gemm(x, ng.prepack(w, activations="fp8"), layout, out_dtype=torch.float32 if fp32 else torch.bfloat16, backend=NAME,
                          config=config_of(problem, shape))
    assert torch.equal(got.isnan(), want.isnan()) and bool(want[13:15].isnan().all())
    for row in (*range(13), 15, *range(16, 200)):
        limit = 1e-6 if fp32 else 5e-6
        assert calc_diff(got[row].double(), want[row].double()) <= limit if bool(want[row].any()) else float(got[row].abs().max()) < 1e-12, row


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("combine", [False, True])
def test_routed_layout(block_m: int, combine: bool) -> None:
    """Slots in padded blocks, as vLLM has them."""
    r = routed(6)
    packed = ng.prepack(r["w"])
    ids = torch.full((300, 4), -1, dtype=torch.int32, device="cuda")
    where = r["order"]
    for e in range(8):
        mine = where.row_map[int(where.offsets[e]):int(where.offsets[e + 1])].long()
        ids.view(-1)[mine] = e
    layout = ng.moe_align_block_size(ids, block_m, 8)
    shape = (300 if combine else 1200, 320)
    common = {"routing_weight": r["weight"], "combine": combine, "bias": r["bias"]}
    got, want = (torch.full(shape, 7.0, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    ng.routed_gemm(r["x"], packed, layout, out=got, config=SMALL_CONFIG, **common)
    ng.routed_gemm(r["x"], r["w"], layout, out=want, backend="reference", **common)
    assert calc_diff(got, want) <= 5e-6 and torch.equal((got == 7).all(1), (want == 7).all(1))


def test_scales_at_the_ends_and_nan() -> None:
    """Rows whose scales lie outside of BF16's window have factors; a NaN scale gives a NaN row of weights and no other."""
    g = torch.Generator(device="cuda").manual_seed(2)
    w = ng.quantize(torch.randn(2, 192, 384, generator=g, device="cuda"), MXFP4, backend="reference")
    w.scale[0, 5], w.scale[1, 7], w.scale[1, 64] = 8, 240, 20
    w.scale[0, 100, 3] = 255
    x = torch.randn(200, 384, generator=g, device="cuda").bfloat16()
    layout = Offsets(torch.tensor([0, 90, 200], device="cuda"))
    want = ng.grouped_gemm(x, w, layout, out_dtype=torch.float32, backend="reference")
    got = ng.grouped_gemm(x, ng.prepack(w), layout, out_dtype=torch.float32, config=SMALL_CONFIG)
    assert torch.equal(got.isnan(), want.isnan()) and bool(want[:90, 100].isnan().all())
    for columns in (5, 7, 64, slice(8, 60)):
        assert calc_diff(got[:, columns].double(), want[:, columns].double()) <= 1e-6, columns


def test_graph_replay_with_changed_routing() -> None:
    a, b = routed(3), routed(4)
    packed = ng.prepack(a["w"])
    row_map, index = a["order"].row_map.clone(), a["order"].layout.index.clone()
    rows = a["weight"].numel()

    def call(out: torch.Tensor) -> None:
        ng.routed_gemm(a["x"], packed, Offsets(index), row_map=row_map, top_k=4, a_div=4, out=out, config=SMALL_CONFIG)

    out = torch.zeros(rows, 320, dtype=torch.bfloat16, device="cuda")
    call(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(out)
    for r in (b, a):
        row_map.copy_(r["order"].row_map)
        index.copy_(r["order"].layout.index)
        out.zero_()
        graph.replay()
        eager = torch.zeros_like(out)
        call(eager)
        assert torch.equal(out, eager) and bool(out.any())
