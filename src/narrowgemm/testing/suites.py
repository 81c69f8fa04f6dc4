"""The lists behind the suites of `cases.py`: shapes, and functions of a suite's name that make its cases.

Shapes: FlyDSL 433 (its 30 test cases and its table), DeepGEMM's `tests/generators.py`, and `models.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..formats import BF16, FP8_ROW, FP8_TENSOR, MXFP4, MXFP8, Format, FP8_1x128, FP8_128x128
from .case import Case
from .layer import LayerCase
from .models import get_model
from .step import StepCase

# (N, K)
DENSE = ((2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
PRODUCTS = tuple(dict.fromkeys(s for m in map(get_model, ("qwen3-235b", "minimax-m2", "minimax-m3", "kimi-k3"))
                               for s in (m.gate_up(), m.down())))
GROUPED = ((6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048))
EIGHT = ((2048, 7168), (7168, 2048))
# (groups, m, N, K)
LARGE = tuple((g, m, n, k) for g, m in ((4, 8192), (8, 4096)) for n, k in GROUPED)
SMALL = tuple((8, m, n, k) for n, k in EIGHT for m in (64, 128, 256, 512))
# (K, N) of aiter 3783
M3_DENSE = ((6144, 2304), (2048, 6144), (6144, 1536), (1536, 6144), (6144, 1152), (6144, 768), (1024, 6144), (768, 6144),
            (6144, 9216), (6144, 6144), (8192, 6144), (6144, 4608), (6144, 3072), (4096, 6144), (3072, 6144))
FLYDSL_CONTIGUOUS = ((1, 128, 128, 128), (2, 128, 128, 128), (4, 128, 256, 256), (2, 100, 128, 128), (4, 200, 256, 256),
                     (8, 256, 512, 512), (8, 256, 2048, 7168), (8, 256, 7168, 2304))
# (groups, max_m, m, N, K)
FLYDSL_MASKED = ((1, 256, 100, 128, 128), (4, 256, 150, 128, 128), (8, 512, 300, 256, 256), (4, 512, 50, 128, 128),
                 (8, 1024, 800, 512, 512), (8, 512, 300, 2048, 7168), (8, 512, 300, 7168, 2304))
UNEVEN, MILD = "uniform:0.7:1.3", "uniform:0.8:1.2"


def flydsl_contiguous(suite: str, dtypes: Iterable[str], largest: int = 1 << 62) -> list[Case]:
    return [Case(suite, "contiguous", g, m, n, k, sizes=MILD, out_dtype=d)
            for g, m, n, k in FLYDSL_CONTIGUOUS if n * k <= largest for d in dtypes]


def flydsl_masked(suite: str, dtypes: Iterable[str], largest: int = 1 << 62) -> list[Case]:
    """The case that its source calls sparse (50 rows of 512) has empty groups here."""
    return [Case(suite, "masked", g, m, n, k, max_m=x, sizes="empty:0.5" if m == 50 else MILD, out_dtype=d)
            for g, x, m, n, k in FLYDSL_MASKED if n * k <= largest for d in dtypes]


def flat(suite: str, layout: str, shapes: Iterable[tuple[int, int, int, int]], sizes: str = "balanced") -> list[Case]:
    return [Case(suite, layout, g, m, n, k, sizes=sizes) for g, m, n, k in shapes]


def masked(suite: str, groups_rows: Iterable[tuple[int, int, str]]) -> list[Case]:
    """(groups, rows, sizes) over `GROUPED`; cases of the same weights are neighbours, so that weights are made once."""
    return [Case(suite, "masked", g, m, n, k, max_m=4096, sizes=s) for n, k in GROUPED for g, m, s in groups_rows]


def masked_eight(suite: str) -> list[Case]:
    """Eight experts, all rows in use. A group holds at least 128 rows, which is a tile of every peer."""
    return [Case(suite, "masked", g, m, n, k, max_m=max(128, m)) for g, m, n, k in SMALL]


def dense(suite: str, rows: Iterable[int], shapes: Iterable[tuple[int, int]] = DENSE) -> list[Case]:
    return [Case(suite, "dense", 1, m, n, k) for n, k in shapes for m in rows]


def skewed(suite: str) -> list[Case]:
    """DeepSeek-V3, top-8 of 256 experts; `m` = tokens · 8 / 256. Where all go to 8 experts, this rank holds them."""
    v3 = get_model("deepseek-v3")
    e = v3.experts
    return [Case(suite, "offsets", v3.local_experts(ep), tokens * v3.top_k // e, n, k, sizes=sizes, world=e)
            for ep in (1, 8, 32) for n, k in (v3.gate_up(), v3.down()) for tokens in (32, 256, 2048, 8192)
            for sizes in ("skew:2", "skew:30", "few:8")]


def offsets_spreads(suite: str) -> list[Case]:
    return [Case(suite, "offsets", 32, 64, 4096, 7168, sizes=s) for s in ("skew:2", "skew:30", "few:4", "empty:0.5")]


def untuned(suite: str) -> list[Case]:
    """Shapes of models that no tuned table has, and odd ones, from decode to prefill: what the cost models choose is held
    against the portable kernel on them."""
    shapes = [s for name in ("qwen3-235b", "minimax-m2", "minimax-m3", "kimi-k3", "gpt-oss-120b-padded")
              for m in (get_model(name),) for s in (m.gate_up(), m.down())]
    shapes = [s for s in dict.fromkeys(shapes) if s[0] * s[1] <= 40e6]
    odd = ((1536, 2560), (5120, 3328), (3200, 1152), (640, 5120))
    out = []
    for i, (n, k) in enumerate(shapes):
        out += [Case(suite, "offsets", 16, (24, 160, 700)[i % 3], n, k, sizes=UNEVEN),
                Case(suite, "masked", 8, (3, 48, 300)[i % 3], n, k, max_m=512, sizes=UNEVEN),
                Case(suite, "contiguous", 8, (90, 384)[i % 2], n, k, sizes=UNEVEN)]
    for n, k in odd:
        out += [Case(suite, "dense", 1, m, n, k) for m in (3, 100, 1500)] + [Case(suite, "psum", 6, 200, n, k, sizes=UNEVEN)]
    return out


def edge(suite: str) -> list[Case]:
    """What breaks kernels on a device: tails, empty and repeated groups, one expert, many experts, every output."""
    flat_ = [
        Case(suite, "offsets", 32, 37, 1088, 640, sizes=UNEVEN),
        Case(suite, "offsets", 256, 3, 512, 512, sizes="empty:0.5"),
        Case(suite, "offsets", 1024, 5, 256, 256, sizes=UNEVEN),
        Case(suite, "offsets", 64, 16, 512, 512, sizes="few:1"),
        Case(suite, "offsets", 8, 16, 512, 512, sizes="zero"),
        Case(suite, "offsets", 1, 1, 512, 7168),
        Case(suite, "offsets", 6, 100, 576, 720, sizes="skew:30", slack=77),
        Case(suite, "psum", 6, 200, 512, 1024, sizes="empty:0.5"),
        Case(suite, "psum", 8, 50, 768, 512, sizes=UNEVEN, alignment=16),
        Case(suite, "contiguous", 8, 97, 768, 512, sizes=UNEVEN, alignment=1),
        Case(suite, "contiguous", 6, 300, 512, 512, sizes="empty:0.3", order="reversed"),
        Case(suite, "contiguous", 6, 75, 512, 512, sizes=UNEVEN, order="repeated", alignment=1),
        Case(suite, "contiguous", 4, 150, 512, 512, sizes=UNEVEN, zero_padding=False, slack=128),
        Case(suite, "contiguous", 4, 150, 512, 512, sizes="zero", slack=256),
        Case(suite, "masked", 8, 40, 576, 720, max_m=100, sizes=UNEVEN),
        Case(suite, "masked", 16, 8, 512, 512, max_m=64, sizes="zero"),
        Case(suite, "masked", 4, 64, 512, 512, max_m=64),
        Case(suite, "dense", 1, 77, 1096, 840),
        Case(suite, "dense", 1, 1, 128, 64),
        Case(suite, "dense", 1, 0, 512, 512),
    ]
    outs = [Case(suite, layout, g, m, 768, 1024, max_m=x, sizes=s, out_dtype=d, accumulate=acc)
            for layout, g, m, x, s in (("dense", 1, 200, 0, "balanced"), ("contiguous", 4, 100, 0, UNEVEN),
                                       ("offsets", 5, 60, 0, UNEVEN), ("masked", 4, 60, 128, UNEVEN))
            for d, acc in (("fp32", False), ("fp16", False), ("bf16", True), ("fp32", True))]
    pairs = ((FP8_1x128.with_scale("e8m0"), FP8_128x128.with_scale("e8m0")), (FP8_ROW, FP8_ROW),
             (FP8_TENSOR, FP8_TENSOR), (FP8_1x128.with_element("e5m2"), FP8_128x128))
    return flat_ + outs + [
        Case(suite, layout, g, m, 512, 1024, max_m=x, sizes=s, a=a, b=b)
        for layout, g, m, x, s in (("dense", 1, 130, 0, "balanced"), ("offsets", 5, 60, 0, UNEVEN),
                                   ("masked", 4, 60, 128, UNEVEN)) for a, b in pairs]


def routed(suite: str, a: Format, b: Format, tokens: Iterable[int], shapes: Iterable[tuple[int, int, int, int]]) -> list[Case]:
    """Slots of `tokens` tokens with top-k experts each, sorted by expert; prepacked weights. shapes: (experts, top_k, N, K)."""
    times = tuple(tokens)
    return [Case(suite, "offsets", e, max(1, t * k // e), n, depth, sizes=f"topk:{t}:{k}", a=a, b=b, packed=True)
            for e, k, n, depth in shapes for t in times]


def a16w4(suite: str, tokens: Iterable[int], packed: bool | str = True) -> list[Case]:
    """Both stages of gpt-oss-120b, Kimi-K2 at TP 2 and DeepSeek-V3. packed: as a case's."""
    models = ((get_model("gpt-oss-120b"), 1), (get_model("kimi-k2"), 2), (get_model("deepseek-v3"), 1))
    shapes = [(m.experts, m.top_k, *nk) for m, tp in models for nk in (m.gate_up(tp), m.down(tp))]
    return [replace(c, packed=packed) for c in routed(suite, BF16, MXFP4, tokens, shapes)]


def mxfp8_routed(suite: str) -> list[Case]:
    """aiter 3783's list of MoE products, then MiniMax-M3 and DeepSeek-V3, both stages."""
    source = ((128, 4, 1536, 6144, 4), (128, 1, 6144, 768, 8), (32, 4, 1536, 6144, 4), (64, 1, 6144, 768, 8),
              (128, 4, 1536, 6144, 16), (32, 4, 768, 6144, 4))
    models = [(m.experts, m.top_k, *nk) for m in map(get_model, ("minimax-m3", "deepseek-v3")) for nk in (m.gate_up(), m.down())]
    return [*(c for e, k, n, depth, t in source for c in routed(suite, MXFP8, MXFP8, (t,), ((e, k, n, depth),))),
            *routed(suite, MXFP8, MXFP8, (1, 4, 16, 64, 256), models)]


def mxfp8_dense(suite: str, rows: Iterable[int], least: int = 0, packed: bool | str = "mxfp8") -> list[Case]:
    """Dense weights of MiniMax-M3 (qkv, o_proj, shared experts) at TP 1 to 8, of at least so many bytes. packed: as a case's."""
    return [Case(suite, "dense", 1, m, n, k, a=MXFP8, b=MXFP8, packed=packed) for k, n in M3_DENSE if n * k >= least for m in rows]


# DeepGEMM's FP4 branch: (groups, m, N, K) of its contiguous list, (groups, expected rows) and (N, K) of its masked one
FP4_CONTIGUOUS = ((4, 8192, 4096, 7168), (4, 8192, 7168, 2048), (8, 4096, 4096, 7168), (8, 4096, 7168, 2048),
                  (4, 8192, 24576, 1536), (4, 8192, 32768, 512))
FP4_MASKED, FP4_SHAPES = ((1, 1024), (2, 512), (4, 256)), ((4096, 7168), (7168, 2048))


def fp4_contiguous(suite: str, a: Format) -> list[Case]:
    """That list and DeepGEMM's own, packed MXFP4 weights."""
    packed: bool | str = "fp8" if a == FP8_1x128 else True
    return [Case(suite, "contiguous", g, m, n, k, a=a, b=MXFP4, packed=packed) for g, m, n, k in (*FP4_CONTIGUOUS, *LARGE)]


def fp4_experts(suite: str, a: Format = FP8_1x128) -> list[Case]:
    """256 experts, top-8, 32 to 8192 tokens."""
    shapes = [(256, 8, n, k) for n, k in FP4_SHAPES]
    cases = routed(suite, a, MXFP4, (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192), shapes)
    return [replace(c, packed="fp8") for c in cases]


def fp4_masked(suite: str) -> list[Case]:
    """Ten masks of each shape."""
    return [Case(suite, "masked", g, m, n, k, max_m=4096, sizes=f"{UNEVEN}:{draw}", a=FP8_1x128, b=MXFP4, packed="fp8")
            for g, m in FP4_MASKED for n, k in FP4_SHAPES for draw in range(10)]


def fp4_masked_few(suite: str) -> list[Case]:
    """Few rows a group, as in decode: time is the weights' bytes."""
    return [Case(suite, "masked", g, m, n, k, max_m=128, sizes=UNEVEN, a=FP8_1x128, b=MXFP4, packed="fp8")
            for g in (8, 32) for m in (4, 16) for n, k in FP4_SHAPES]


# groups -> rows of each; (N, K)
FP4_SPREAD = {1: (1, 32, 128, 384, 2048), 2: (16, 128, 384, 1024), 4: (1, 16, 64, 192, 512), 8: (32, 64, 128, 192, 1024),
              16: (16, 48, 96, 384), 32: (8, 64, 128, 192), 64: (4, 32, 96, 256)}
FP4_SPREAD_SHAPES = (*FP4_SHAPES, (1536, 7168), (2880, 2880), (5120, 2880))


def fp4_masked_spread(suite: str) -> list[Case]:
    """From one row to thousands, one group to 64, sizes near each other or far apart: where the choice of a kernel changes."""
    return [Case(suite, "masked", g, m, n, k, max_m=min(4096, max(128, 4 * m)), sizes="skew:8" if g >= 8 and i % 2 else UNEVEN,
                 a=FP8_1x128, b=MXFP4, packed="fp8")
            for n, k in FP4_SPREAD_SHAPES for g, rows in FP4_SPREAD.items() for i, m in enumerate(rows)]


def mxfp8_prefill(suite: str) -> list[Case]:
    """Many rows on packed weights: dense ones of MiniMax-M3 (qkv, o_proj), then eight local experts of it and of DeepSeek-V3."""
    experts = [nk for m in map(get_model, ("minimax-m3", "deepseek-v3")) for nk in (m.gate_up(), m.down())]
    return [*(Case(suite, "dense", 1, m, n, k, a=MXFP8, b=MXFP8, packed="mxfp8")
              for n, k in ((9216, 6144), (6144, 8192), (2304, 6144)) for m in (512, 2048, 8192)),
            *(Case(suite, "offsets", 8, m, n, k, sizes=UNEVEN, a=MXFP8, b=MXFP8, packed=True)
              for n, k in experts for m in (64, 256, 1024))]


def mxfp8_folded(suite: str) -> list[Case]:
    """The same with a folded copy of the weights, and two of them with activations that hardly fold."""
    cases = [replace(c, packed="folded") for c in mxfp8_prefill(suite)]
    return [*cases, *(replace(c, outliers=True) for c in cases if (c.n, c.k) in ((9216, 6144), (6144, 6144)) and c.rows > 4096)]


def mxfp8_refolded(suite: str) -> list[Case]:
    """The dense ones of those, of weights that stay as they came and that each call folds."""
    return [replace(c, packed="folded_mxfp8") for c in mxfp8_folded(suite) if c.layout == "dense"]


def large(suite: str) -> list[Case]:
    """One tensor of each over 2^31 elements: A, B, the output; the arithmetic stays small."""
    return [
        Case(suite, "masked", 72, 3, 256, 4096, max_m=8192, sizes=UNEVEN),               # A
        Case(suite, "offsets", 128, 3, 6144, 4096, sizes="empty:0.75"),                  # B
        Case(suite, "masked", 64, 3, 4608, 256, max_m=8192, sizes=UNEVEN),               # output
        Case(suite, "dense", 1, 1 << 20, 128, 2304),                                     # A, rows all in use
        Case(suite, "contiguous", 3, 131072, 6144, 128, sizes=UNEVEN),                   # output, rows all in use
    ]


def cpu_small(suite: str) -> list[Case]:
    """Small enough for Triton's interpreter: tails of M, N and K, empty groups, one expert, every layout and output."""
    return [
        *flydsl_contiguous(suite, ("bf16",), 1 << 16), *flydsl_masked(suite, ("bf16", ), 1 << 16),
        *(Case(suite, "dense", 1, m, n, k) for m, n, k in ((1, 128, 128), (17, 128, 256), (64, 112, 128),
                                                           (33, 200, 192), (130, 256, 320), (0, 128, 128))),
        Case(suite, "offsets", 5, 24, 96, 160, sizes=UNEVEN),
        Case(suite, "offsets", 6, 20, 128, 128, sizes="empty:0.5"),
        Case(suite, "offsets", 8, 8, 128, 256, sizes="few:1"),
        Case(suite, "offsets", 4, 16, 128, 128, sizes="zero"),
        Case(suite, "offsets", 1, 1, 128, 128),
        Case(suite, "offsets", 4, 30, 128, 128, sizes="skew:30", slack=9),
        Case(suite, "psum", 4, 40, 128, 128, sizes="empty:0.5"),
        Case(suite, "psum", 3, 20, 128, 256, sizes=UNEVEN, alignment=16),
        Case(suite, "contiguous", 5, 33, 128, 128, sizes=UNEVEN, alignment=1),
        Case(suite, "contiguous", 4, 50, 128, 128, sizes="empty:0.3", order="reversed"),
        Case(suite, "contiguous", 3, 30, 128, 128, sizes=UNEVEN, order="repeated", alignment=1),
        Case(suite, "contiguous", 2, 90, 128, 128, sizes=UNEVEN, zero_padding=False),
        Case(suite, "masked", 3, 20, 136, 192, max_m=50, sizes=UNEVEN),
        Case(suite, "masked", 3, 20, 128, 128, max_m=32, sizes="zero"),
        *(Case(suite, layout, g, m, 128, 256, max_m=x, sizes=s, out_dtype=d, accumulate=acc)
          for layout, g, m, x, s in (("dense", 1, 40, 0, "balanced"), ("contiguous", 2, 60, 0, UNEVEN),
                                     ("offsets", 3, 30, 0, UNEVEN), ("masked", 2, 30, 64, UNEVEN))
          for d, acc in (("fp32", False), ("fp16", False), ("bf16", True))),
        *(Case(suite, "k_grouped", g, 64, 96, k, a=FP8_1x128, b=FP8_1x128, sizes=s, out_dtype="fp32", accumulate=acc)
          for g, k, s, acc in ((2, 128, "balanced", False), (4, 100, "empty:0.5", False), (3, 130, UNEVEN, True))),
    ]


def cpu_formats(suite: str) -> list[Case]:
    """Every pair of formats once, dense and grouped."""
    e5m2, ue8m0 = FP8_1x128.with_element("e5m2"), (FP8_1x128.with_scale("e8m0"), FP8_128x128.with_scale("e8m0"))
    pairs = ((FP8_TENSOR, FP8_TENSOR), (FP8_ROW, FP8_ROW), (e5m2, FP8_128x128), ue8m0, (FP8_1x128, FP8_1x128),
             (MXFP8, MXFP8), (FP8_1x128, MXFP4), (MXFP8, MXFP4), (MXFP4, MXFP4), (BF16, MXFP4), (BF16, BF16))
    return [Case(suite, layout, g, m, 128, 256, max_m=x, sizes=s, a=a, b=b) for a, b in pairs
            for layout, g, m, x, s in (("dense", 1, 40, 0, "balanced"), ("offsets", 3, 30, 0, UNEVEN),
                                       ("masked", 2, 30, 64, UNEVEN))]


def layers(suite: str, models: Iterable[str], ep: Iterable[int], tokens: Iterable[int],
           weights: str = "fp8_128x128", logits: bool = False) -> list[LayerCase]:
    """Whole layers; cases of the same weights are neighbours."""
    return [LayerCase(suite, m, e, t, weights, logits=logits) for m in models for e in ep for t in tokens]


TRAINED = ("deepseek-v3", "qwen3-235b", "gpt-oss-20b")
ROW, TENSOR, BLOCK = (FP8_ROW, FP8_ROW), (FP8_TENSOR, FP8_TENSOR), (FP8_1x128, FP8_128x128)


def train_rows(suite: str, tokens: Iterable[tuple[int, tuple[Format, Format]]], backward: bool, models: Iterable[str] = TRAINED
               ) -> list[Case]:
    """Eight experts of the models: gate_up and down, forward; or what dgrad makes of them, whose weights are transposed."""
    return [Case(suite, "offsets", 8, t // 8, *((k, n) if backward else (n, k)), a=a, b=b)
            for model in models for n, k in (get_model(model).gate_up(), get_model(model).down()) for t, (a, b) in tokens]


def train_wgrad(suite: str) -> list[Case]:
    """Weight gradients of the same layers, however tokens spread; DeepGEMM's k-grouped list; many experts with few tokens each."""
    spreads = ((8192, "balanced"), (32768, "balanced"), (8192, "skew128:2"), (8192, "skew128:30"))
    return [
        *(Case(suite, "k_grouped", 8, n, k, tokens // 8, a=FP8_ROW, b=FP8_ROW, sizes=s)
          for n, k in (get_model(m).gate_up() for m in TRAINED) for tokens, s in spreads),
        *(Case(suite, "k_grouped", g, m, n, k, a=f, b=f, out_dtype="fp32", accumulate=True)
          for g, k in ((4, 8192), (16, 2048)) for m, n in ((4096, 7168), (7168, 2048)) for f in (FP8_ROW, FP8_1x128)),
        *(Case(suite, "k_grouped", g, 2048, 2048, k, a=FP8_ROW, b=FP8_ROW) for g, k in ((64, 256), (256, 128), (1, 16384)))]


def train_fast(suite: str) -> list[Case]:
    """Forward and weight gradients that never promote their partial sums, beside torch at the same `use_fast_accum`."""
    rows = [replace(c, fast_accum=True) for c in train_rows(suite, ((16384, ROW), (32768, TENSOR)), False, TRAINED[:2])]
    return rows + [replace(c, fast_accum=True) for c in train_wgrad(suite)[:8]]


def train_steps(suite: str, kinds: Iterable[str], tokens: Iterable[int], sizes: Iterable[str], micro: int = 0,
                models: Iterable[str] = TRAINED) -> list[StepCase]:
    """Steps of the same layers' experts; cases of the same tensors are neighbours. 1x128 scales don't fit gpt-oss's 2880."""
    times, spreads, ways = tuple(tokens), tuple(sizes), tuple(kinds)
    return [StepCase(suite, m, t, kind, s, micro) for m in models for t in times for s in spreads for kind in ways
            if kind != "block" or get_model(m).inter % 128 == 0]


def train_portable(suite: str, which: str) -> list[Case]:
    """Tensor-wise products of the same layers, 16384 tokens; `which`: 'fwd', 'dgrad', 'wgrad'."""
    if which != "wgrad":
        return train_rows(suite, ((16384, TENSOR), ), which == "dgrad")
    return [Case(suite, "k_grouped", 8, n, k, 2048, a=FP8_TENSOR, b=FP8_TENSOR)
            for m in map(get_model, TRAINED) for n, k in (m.gate_up(), m.down())]
