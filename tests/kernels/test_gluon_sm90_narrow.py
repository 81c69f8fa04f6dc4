"""The Hopper kernel for narrow weights on a GPU, against the reference over the same bits: layouts, formats, epilogues, extremes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import narrowgemm as ng
from narrowgemm.formats import FP16, MXFP4, MXFP8, Format, FP8_1x128, ScaledTensor
from narrowgemm.kernels.gluon.sm90 import narrow
from narrowgemm.problem import Config
from narrowgemm.testing.cases import Case, build, get_suite
from narrowgemm.testing.numerics import KERNEL_GATE, calc_diff

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]
DEV = "cuda"
LEFT = 777.0                # what rows hold that nobody writes
FP8 = FP8_1x128.with_scale("e8m0")
# weights, (experts, N, K), tokens, top_k, A, routing
PRODUCTS = (
    (MXFP4, (32, 2880, 2880), 1, 4, None, "even"), (MXFP4, (32, 5760, 2880), 33, 4, None, "even"),
    (MXFP8, (32, 720, 2880), 16, 4, MXFP8, "even"), (MXFP4, (1024, 64, 256), 100, 16, None, "even"),
    (MXFP4, (8, 2880, 720), 7, 2, MXFP4, "few"), (MXFP8, (128, 384, 192), 37, 8, FP8, "repeated"),
    (MXFP4, (8, 2880, 360), 64, 4, None, "skipped"), (MXFP4, (256, 512, 7168), 4, 8, None, "even"),
    (MXFP8, (64, 256, 7168), 3, 8, MXFP8, "one"), (MXFP4, (4, 640, 256), 200, 4, None, "one"), (MXFP4, (1, 64, 32), 1, 1, None, "even"),
    (MXFP8, (3, 100, 96), 9, 1, MXFP8, "skipped"), (MXFP4, (48, 1440, 2880), 256, 4, MXFP8, "even"),
    (MXFP4, (24, 640, 1184), 37, 4, FP8_1x128, "even"), (MXFP8, (8, 192, 720), 19, 2, FP8_1x128, "skipped"),
    (MXFP4, (4, 320, 3072), 150, 2, FP8_1x128, "one"),
    (MXFP4, (24, 640, 1184), 37, 4, FP16, "even"), (MXFP8, (8, 192, 720), 5, 2, FP16, "skipped"))


def weights(shape: tuple[int, ...], fmt: Format, wild: bool) -> ScaledTensor:
    """Random bits. `wild`: scales over 130 powers of two, rows far apart, and a NaN scale here and there."""
    data = torch.randint(0, 256, (*shape[:-1], shape[-1] // fmt.elem.per_byte), dtype=torch.uint8, device=DEV)
    if fmt.element == "e4m3":
        data[(data & 127) == 127] = 3
    scale = torch.randint(*((20, 150) if wild else (110, 124)), fmt.scale_shape(shape), dtype=torch.uint8, device=DEV)
    if wild:
        rows = torch.rand(scale.shape[:-1], device=DEV)
        scale[rows < 0.2] += 90
        scale[..., 0][rows > 0.97] = 255
    return ScaledTensor(data.view(fmt.elem.dtype), scale, fmt)


def activations(rows: int, k: int, fmt: Format | None) -> ScaledTensor | Tensor:
    x = torch.randn(rows, k, device=DEV)
    return x.bfloat16() if fmt is None else x.half() if fmt is FP16 else ng.quantize(x, fmt)


def routing(tokens: int, experts: int, top_k: int, kind: str) -> tuple[Tensor, Tensor]:
    score = torch.rand(tokens, experts, device=DEV)
    if kind == "few":
        score[:, top_k:] = 0
    elif kind == "one":
        score = torch.arange(experts, 0, -1, device=DEV).expand(tokens, -1)
    ids = score.topk(top_k, -1).indices.to(torch.int32)
    if kind == "repeated":
        ids[:, 1:] = ids[:, :1]
    elif kind == "skipped":
        ids[torch.rand(tokens, top_k, device=DEV) < 0.4] = -1
    return ids, torch.rand(tokens, top_k, device=DEV)


def same_as_reference(call: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> None:
    """The kernel gate where both are finite, the same NaN and infinities, the same rows left alone, the same bits again."""
    got, again, want = (torch.full(shape, LEFT, dtype=dtype, device=DEV) for _ in range(3))
    call(out=got, out_dtype=dtype)
    call(out=want, out_dtype=dtype, backend="reference")
    call(out=again, out_dtype=dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(got.view(bits), again.view(bits))
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    finite = got.isfinite()
    assert calc_diff(torch.where(finite, got, 0), torch.where(finite, want, 0)) <= KERNEL_GATE["fp32" if dtype == torch.float32 else "bf16"]
    assert torch.equal((got == LEFT).all(-1), (want == LEFT).all(-1))


@pytest.mark.parametrize("wild", (False, True), ids=("usual", "wild"))
@pytest.mark.parametrize("number", range(len(PRODUCTS)))
def test_routed(number: int, wild: bool) -> None:
    """Each product in one of the ways of calling it, and all ways over the products."""
    fmt, (experts, n, k), tokens, top_k, a_fmt, kind = PRODUCTS[number]
    torch.manual_seed(number)
    pair = ("", "halves", "interleaved")[(number + wild) % 3]
    p = ng.prepack(weights((experts, n, k), fmt, wild), pair=pair)
    assert (p.factor is not None) == wild
    activation = ("swiglu", "swiglu_oai")[number % 2] if pair else None
    ids, weight = routing(tokens, experts, top_k, kind)
    r = ng.sort_by_expert(ids, experts)
    for combine in (False, True):
        a_div = top_k if combine == bool(number % 2) else 1
        layout, extra = (ng.moe_align_block_size(ids, 16, experts, a_div=a_div), {}) if (number + combine) % 2 else (
            r.layout, {"row_map": r.row_map, "top_k": top_k, "a_div": a_div})
        x = activations(-(-tokens * top_k // a_div), k, a_fmt)
        options: dict[str, Any] = {"activation": activation, "combine": combine, "routing_weight": weight if combine else None,
                                   "bias": torch.randn(experts, n, device=DEV) if number % 3 == 0 else None, **extra}
        same_as_reference(lambda **kw: ng.routed_gemm(x, p, layout, **options, **kw),  # noqa: B023
                          (tokens if combine else tokens * top_k, n // 2 if activation else n),
                          torch.float32 if combine and number % 2 else torch.bfloat16)


@pytest.mark.parametrize("fmt", (MXFP4, MXFP8), ids=lambda f: f.name)
def test_dense_offsets_masked(fmt: Format) -> None:
    dense = ng.prepack(weights((1000, 1056), fmt, False))
    for m in (1, 17, 130):
        x = activations(m, 1056, None if m % 2 else MXFP8)
        same_as_reference(lambda **kw: ng.gemm(x, dense, **kw), (m, 1000))  # noqa: B023
    p = ng.prepack(weights((6, 576, 1152), fmt, False))
    x = activations(66, 1152, None)
    offsets = ng.Offsets(torch.tensor([0, 3, 3, 40, 41, 41, 60], device=DEV))
    same_as_reference(lambda **kw: ng.grouped_gemm(x, p, offsets, **kw), (66, 576), torch.float16)
    masked = ng.Masked(torch.tensor([0, 20, 3, 9, 1, 17], device=DEV, dtype=torch.int32))
    same_as_reference(lambda **kw: ng.grouped_gemm(x[:60].view(6, 10, 1152), p, masked, **kw), (6, 10, 576))


@pytest.mark.parametrize("a_fmt", (None, FP8_1x128, FP8, MXFP4), ids=lambda f: "bf16" if f is None else f.name)
@pytest.mark.parametrize("fmt", (MXFP4, MXFP8), ids=lambda f: f.name)
def test_contiguous_and_psum(fmt: Format, a_fmt: Format | None) -> None:
    """Runs of any length, groups that come twice, ids that are none; gaps of psum; padding rows zero or left alone."""
    p = ng.prepack(weights((5, 200, 544), fmt, False))
    runs = [(0, 7), (-1, 3), (2, 70), (2, 1), (9, 2), (0, 40), (4, 1), (1, 5), (-1, 1)]
    ids = torch.cat([torch.full((n,), g, dtype=torch.int32, device=DEV) for g, n in runs])
    x = activations(len(ids), 544, a_fmt)
    ends = torch.tensor([5, 16, 100, 101, 126], dtype=torch.int32, device=DEV)
    for layout in (ng.Contiguous(ids), ng.Psum(ends, 16)):
        for zero in (True, False):
            same_as_reference(lambda **kw: ng.grouped_gemm(x, p, layout, zero_padding=zero, **kw), (len(ids), 200))  # noqa: B023
        plan = ng.grouped_gemm(x, p, layout, on_unsupported="raise")
        assert plan is not None


@pytest.mark.parametrize("scales", ("row_major", "mn_major"))
@pytest.mark.parametrize("a_fmt", (FP8_1x128, FP8, MXFP8), ids=lambda f: f.name)
def test_masked_with_scales_of_any_strides(a_fmt: Format, scales: str) -> None:
    p = ng.prepack(weights((6, 136, 640), MXFP4, False))
    x = ng.quantize(torch.randn(6, 20, 640, device=DEV), a_fmt, scale_layout=scales)
    x.data[1, 3:] = torch.nan
    masked = ng.Masked(torch.tensor([0, 3, 20, 9, 1, 17], device=DEV, dtype=torch.int32))
    same_as_reference(lambda **kw: ng.grouped_gemm(x, p, masked, **kw), (6, 20, 136), torch.float32)


EVERY = [(fmt, narrow.make_config(tokens, *shape, keep=i % 2 == 0, wide=i % 3 > 0)) for fmt in (MXFP4, MXFP8)
         for i, (tokens, shape) in enumerate((t, s) for t, shapes in narrow.SHAPES[fmt.element].items() for s in shapes)]


@pytest.mark.parametrize("a_fmt", (None, FP8_1x128), ids=("bf16", "fp8"))
@pytest.mark.parametrize(("fmt", "config"), EVERY, ids=lambda x: str(x) if isinstance(x, Config) else x.name)
def test_every_config(fmt: Format, config: Config, a_fmt: Format | None) -> None:
    """576 rows are nine tiles of 64: a tile of 128 reaches past the end. 1152 of K are nine chunks: a ring step does, too."""
    p = ng.prepack(weights((6, 576, 1152), fmt, False))
    x = activations(90, 1152, a_fmt)
    offsets = ng.Offsets(torch.tensor([0, 3, 3, 70, 71, 71, 90], device=DEV))
    if a_fmt is not None and dict(config.extra)["ctas"] > 4:
        with pytest.raises(ValueError, match="registers"):
            ng.grouped_gemm(x, p, offsets, config=config)
        return
    same_as_reference(lambda **kw: ng.grouped_gemm(x, p, offsets, config=None if "backend" in kw else config, **kw), (90, 576))


@pytest.mark.parametrize("kernel", ("gluon_sm90.narrow", "gluon_sm90.narrow_prefill"))
@pytest.mark.parametrize("fmt", (MXFP4, MXFP8), ids=lambda f: f.name)
def test_expansion_is_exact_for_every_code_and_scale(fmt: Format, kernel: str) -> None:
    """Tokens of one 1 each bring the expanded weights out, bit for bit: every code of a row's scale, a row for every scale."""
    codes = 16 if fmt.element == "e2m1" else 256
    payload = torch.arange(codes, dtype=torch.uint8, device=DEV).repeat(256 // codes)
    if fmt.element == "e2m1":
        payload = payload[0::2] | payload[1::2] << 4
    else:
        payload[(payload & 127) == 127] = 3
    k = payload.numel() * fmt.elem.per_byte
    scale = torch.arange(255, dtype=torch.uint8, device=DEV).view(255, 1).expand(-1, k // 32).contiguous()
    w = ScaledTensor(payload.expand(255, -1).contiguous().view(fmt.elem.dtype), scale, fmt)
    got = ng.gemm(torch.eye(k, device=DEV).bfloat16(), ng.prepack(w), out_dtype=torch.float32, backend=kernel)
    want = w.dequantize().t()
    assert torch.equal(got + 0.0, want + 0.0), (got != want).nonzero()[:5]      # a sum has no -0


def test_offsets_that_are_wrong_stay_inside() -> None:
    p = ng.prepack(weights((4, 128, 256), MXFP4, False))
    x = activations(10, 256, None)
    for bad in ([0, 20, 30, 40, 50], [-5, 2, 1, 4, 3], [0, 0, 10_000_000, 0, 7]):
        out = torch.full((10, 128), LEFT, device=DEV).bfloat16()
        ng.grouped_gemm(x, p, ng.Offsets(torch.tensor(bad, device=DEV)), out=out)
        torch.cuda.synchronize()
        assert bool(out.isfinite().all())


@pytest.mark.parametrize("kernel", ("gluon_sm90.narrow", "gluon_sm90.narrow_prefill"))
@pytest.mark.parametrize("order", ("bf16", "fp8"))
def test_no_tokens_and_tokens_of_nobody(order: str, kernel: str) -> None:
    p = ng.prepack(weights((4, 128, 256), MXFP4, False), activations=order)
    for tokens in (0, 3):
        r = ng.sort_by_expert(torch.full((tokens, 2), -1, dtype=torch.int32, device=DEV), 4)
        options = {"row_map": r.row_map, "top_k": 2, "a_div": 2, "backend": kernel}
        x = activations(tokens, 256, None)
        assert ng.routed_gemm(x, p, r.layout, **options).shape == (2 * tokens, 128)
        out = ng.routed_gemm(x, p, r.layout, combine=True, routing_weight=torch.ones(tokens, 2, device=DEV), **options)
        assert out.shape == (tokens, 128) and not bool(out.any())


def test_graph_with_changed_routing() -> None:
    experts, tokens, top_k = 32, 6, 4
    p = ng.prepack(weights((experts, 256, 512), MXFP4, False))
    x = activations(tokens, 512, None)
    ids, weight = routing(tokens, experts, top_k, "even")

    def call(ids: Tensor, backend: str | None = None) -> Tensor:
        return ng.routed_gemm(x, p, ng.moe_align_block_size(ids, 8, experts), routing_weight=weight, combine=True, backend=backend)

    call(ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(ids)
    for kind in ("few", "one", "skipped"):
        ids.copy_(routing(tokens, experts, top_k, kind)[0])
        graph.replay()
        assert calc_diff(out, call(ids, "reference")) <= KERNEL_GATE["bf16"]


@pytest.mark.parametrize("case", [replace(c, packed=c.packed if c.b == MXFP4 else True)
                                  for s in ("a16w4-decode", "a16w4-mid", "a16w4-prefill", "mxfp8-routed", "mxfp8-dense-decode") for c in get_suite(s)
                                  if c.groups * c.b.storage_bytes(c.n, c.k) < 7e8][::8], ids=lambda c: f"{c.suite}/{c.id}")
def test_suites(case: Case) -> None:
    inputs = build(case, DEV, seed=5)
    plan = inputs.plan()
    assert plan is not None and plan.kernel in (narrow.NAME, "gluon_sm90.narrow_prefill"), plan  # at 64 rows either is chosen
    inputs.verify()
