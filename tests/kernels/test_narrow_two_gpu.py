"""On a GPU: BF16 tokens, each two E4M3 numbers, by MXFP4 weights that were packed for FP8, in both Hopper kernels over packed weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import narrowgemm as ng
from narrowgemm import BF16, MXFP4, Offsets
from narrowgemm.arch import detect
from narrowgemm.formats import ScaledTensor
from narrowgemm.kernels.gluon.sm90 import narrow, narrow_prefill
from narrowgemm.prepack_bits import FP8_PREPACK
from narrowgemm.problem import Config
from narrowgemm.testing.cases import Case, build
from narrowgemm.testing.numerics import calc_diff

from .test_gluon_sm90_narrow import routing, same_as_reference, weights

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]
KERNELS = (narrow.NAME, narrow_prefill.NAME)
# an odd number of chunks of K, N no multiple of a tile's rows, groups of every width of a tile and around it
CASES = [Case("two", layout, 24, m, 328, 672, sizes="uniform:0.0:2.4", alignment=1, a=BF16, b=MXFP4, packed="fp8", out_dtype=out,
              max_m=200 if layout == "masked" else 0, order="repeated" if layout == "contiguous" else "sorted", slack=40 * (layout == "offsets"))
         for layout, m, out in (("offsets", 3, "bf16"), ("offsets", 60, "fp32"), ("masked", 20, "fp32"), ("contiguous", 30, "bf16"), ("psum", 9, "fp16"))]
CASES += [Case("two", "dense", 1, m, 320, 1152, a=BF16, b=MXFP4, packed="fp8") for m in (1, 77)]
CASES += [Case("two", "offsets", 40, 4, 192, 256, sizes="empty:0.4", a=BF16, b=MXFP4, packed="fp8"),
          Case("two", "offsets", 4, 7, 256, 7168, a=BF16, b=MXFP4, packed="fp8", out_dtype="fp32")]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_gates(case: Case, kernel: str) -> None:
    build(case, "cuda", seed=5).verify_repeats(backend=kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_sm(kernel: str) -> None:
    """A block goes from tile to tile, each of which has powers of two of its own."""
    build(CASES[1], "cuda", seed=6).verify(backend=kernel, max_sms=1)


FEW = [narrow.make_config(tokens, *shape, keep=i % 2 == 0, wide=i % 3 > 0)
       for i, (tokens, shape) in enumerate((t, s) for t, shapes in narrow.SHAPES["e2m1"].items() for s in shapes)]
MANY = [*((t, u, "") for t, u in narrow_prefill.TWO_SHAPES), (*narrow_prefill.FP8_PAIR, "ctas"), *((t, u, "bf16") for t, u in narrow_prefill.WIDE_SHAPES)]


@pytest.mark.parametrize("config", [*FEW, *MANY], ids=str)
def test_every_config(config: Config | tuple[int, int, str]) -> None:
    """576 rows are nine tiles of 64: wider ones reach past the end. 1152 of K are nine chunks: a ring step does, too."""
    p = ng.prepack(weights((6, 576, 1152), MXFP4, False), activations="fp8")
    x = torch.randn(163, 1152, device="cuda").bfloat16()
    offsets = Offsets(torch.tensor([0, 3, 3, 133, 134, 134, 163], device="cuda"))
    if not isinstance(config, Config):
        tokens, units, kind = config
        problem = build(CASES[0], "cuda").plan(backend=narrow_prefill.NAME).problem
        config = next(c for c in narrow_prefill.configs(problem, detect(torch.device("cuda")))
                      if (c.block_m, c.block_n) == (tokens, 128 * units) and [n for n, _ in c.extra] == [kind] * bool(kind))
    if (config.block_m, config.num_warps, config.option("ctas")) == (32, 8, 2):
        with pytest.raises(ValueError, match="registers"):
            ng.grouped_gemm(x, p, offsets, config=config)
        return
    same_as_reference(lambda **kw: ng.grouped_gemm(x, p, offsets, config=None if "backend" in kw else config, **kw), (163, 576))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pair, activation, combine", [("interleaved", "swiglu_oai", False), ("halves", "swiglu", True), ("", None, True)])
def test_epilogue(pair: str, activation: str | None, combine: bool, kernel: str) -> None:
    experts, tokens, top_k, n, k = 16, 37, 4, 320, 672
    torch.manual_seed(3)
    p = ng.prepack(weights((experts, n, k), MXFP4, False), pair=pair, activations="fp8")
    assert p.prepack == FP8_PREPACK
    ids, weight = routing(tokens, experts, top_k, "skipped")
    r = ng.sort_by_expert(ids, experts)
    x = torch.randn(tokens, k, device="cuda").bfloat16()
    options: dict[str, Any] = {"row_map": r.row_map, "top_k": top_k, "a_div": top_k, "activation": activation, "combine": combine,
                               "routing_weight": weight if combine else None, "bias": torch.randn(experts, n, device="cuda")}
    same_as_reference(lambda **kw: ng.routed_gemm(x, p, r.layout, **options, **({"backend": kernel} | kw)),
                      (tokens if combine else tokens * top_k, n // 2 if activation else n))


@pytest.mark.parametrize("kernel", [*KERNELS, "as BF16"])
def test_exact_for_every_code_and_scale(kernel: str) -> None:
    """Tokens of one 1 each bring the weights out, bit for bit: every code at every scale that folds, rows of every largest scale."""
    payload = torch.arange(16, dtype=torch.uint8, device="cuda").repeat(30)
    payload = (payload[0::2] | payload[1::2] << 4)
    k = payload.numel() * 2
    top = torch.arange(15, 250, device="cuda").view(-1, 1)
    scale = (top - torch.arange(k // 32, device="cuda").view(1, -1)).to(torch.uint8)
    w = ScaledTensor(payload.expand(len(top), -1).contiguous().view(MXFP4.elem.dtype), scale, MXFP4)
    p = ng.prepack(w, activations="fp8")
    assert p.prepack == FP8_PREPACK and k // 32 == 15
    config = Config(128, 128, 128, 9, narrow_prefill.SHAPES[128, 1][0], swap_ab=True, persistent=True, extra=(("bf16", 1), ))
    config = config if kernel == "as BF16" else None
    got = ng.gemm(torch.eye(k, device="cuda").bfloat16(), p, out_dtype=torch.float32, backend=None if config else kernel, config=config)
    want = w.dequantize().t()
    assert torch.equal(got + 0.0, want + 0.0), (got != want).nonzero()[:5]      # a sum has no -0


@pytest.mark.parametrize("kernel", KERNELS)
def test_tokens_far_apart_and_no_numbers(kernel: str) -> None:
    """Tokens over 60 powers of two, outliers 2^12 above the rest of their row, NaN and infinities, NaN scales of weights."""
    torch.manual_seed(4)
    w = weights((3, 192, 640), MXFP4, False)
    w.scale[1, 100, 3] = 255
    p = ng.prepack(w, activations="fp8")
    x = torch.randn(60, 640, device="cuda") * 2.0 ** torch.linspace(-30, 30, 60, device="cuda").view(-1, 1)
    x[::3, 5] *= 4096
    x = x.bfloat16()
    layout = Offsets(torch.tensor([0, 20, 40, 60], device="cuda"))
    want = ng.grouped_gemm(x, w, layout, out_dtype=torch.float32, backend="reference")
    got = ng.grouped_gemm(x, p, layout, out_dtype=torch.float32, backend=kernel)
    assert torch.equal(got.isnan(), want.isnan()) and bool(want[20:40, 100].isnan().all())
    for row in range(60):
        at = want[row].isfinite()
        assert calc_diff(got[row, at].double(), want[row, at].double()) <= 1e-6, row
    x[7, 3], x[30, 9] = torch.nan, torch.inf
    want = ng.grouped_gemm(x, w, layout, out_dtype=torch.float32, backend="reference")
    got = ng.grouped_gemm(x, p, layout, out_dtype=torch.float32, backend=kernel)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    assert torch.equal(got[30].sign().nan_to_num(7.0), want[30].sign().nan_to_num(7.0))
