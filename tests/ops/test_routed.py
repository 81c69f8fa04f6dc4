"""`routed_gemm` on the reference against loops over slots written out here, and products with packed weights; what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import narrowgemm as ng
from narrowgemm import MXFP4, MXFP8, Offsets, PackedWeight, Routed, ScaledTensor
from narrowgemm.formats import Format, FP8_1x128
from narrowgemm.testing.cases import Case, build

E, N, K, T, TOP_K = 6, 48, 96, 11, 2


def problem(seed: int = 0, skip: bool = True) -> tuple[Tensor, ScaledTensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    w = ng.quantize(torch.randn(E, N, K, generator=g), MXFP4, backend="reference")
    x = torch.randn(T, K, generator=g).bfloat16()
    ids = torch.randint(0, E, (T, TOP_K), generator=g, dtype=torch.int32)
    if skip:
        ids[3, 0], ids[7, 1], ids[8] = -1, E, -1
    return x, w, ids, torch.rand(T, TOP_K, generator=g), torch.randn(E, N, generator=g)


def by_hand(x: Tensor, w: ScaledTensor, ids: Tensor, weights: Tensor | None, bias: Tensor | None, activation: str | None, interleaved: bool,
            a_div: int) -> dict[int, Tensor]:
    """Slot to its row, FP32."""
    dense, out = w.dequantize(), {}
    for slot, e in enumerate(ids.reshape(-1).tolist()):
        if not 0 <= e < E:
            continue
        y = dense[e] @ x[slot // a_div].float()
        if bias is not None:
            y = y + bias[e].float()
        if activation:
            gate, up = (y[0::2], y[1::2]) if interleaved else (y[:N // 2], y[N // 2:])
            if activation == "swiglu":
                y = torch.nn.functional.silu(gate) * up
            else:
                gate, up = torch.minimum(gate, torch.tensor(7.0)), torch.clamp(up, -7.0, 7.0)
                y = gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
        out[slot] = y if weights is None else y * weights.reshape(-1)[slot]
    return out


def layouts(ids: Tensor, a_div: int) -> list[tuple[Routed | Offsets, dict]]:
    r = ng.sort_by_expert(ids, E)
    return [(ng.moe_align_block_size(ids, 4, E, a_div=a_div), {}),
            (r.layout, {"row_map": r.row_map, "top_k": TOP_K, "a_div": a_div})]


@pytest.mark.parametrize("pair", ("plain", "", "halves", "interleaved"))
@pytest.mark.parametrize("activation", (None, "swiglu", "swiglu_oai"))
@pytest.mark.parametrize("combine", (False, True))
def test_against_loops(pair: str, activation: str | None, combine: bool) -> None:
    x, w, ids, weights, bias = problem()
    b: ScaledTensor | PackedWeight = w if pair == "plain" else ng.prepack(w, pair=pair)
    interleaved = pair == "interleaved"
    a = x if combine else x.repeat_interleave(TOP_K, 0)
    a_div = TOP_K if combine else 1
    want = by_hand(a, w, ids, weights, bias, activation, interleaved, a_div)
    for layout, extra in layouts(ids, a_div):
        out = torch.full((T if combine else T * TOP_K, N // 2 if activation else N), 77.0)
        got = ng.routed_gemm(a, b, layout, bias=bias, activation=activation, routing_weight=weights, combine=combine, out=out,
                             out_dtype=torch.float32, interleaved=interleaved, **extra)
        assert got is out
        for row in range(out.shape[0]):
            if combine:
                parts = [want[s] for s in range(row * TOP_K, (row + 1) * TOP_K) if s in want]
                expected = torch.stack(parts).sum(0) if parts else torch.zeros(out.shape[1])
            else:
                expected = want.get(row, torch.full((out.shape[1],), 77.0))     # not written
            torch.testing.assert_close(out[row], expected, rtol=1e-5, atol=1e-5)


def test_rows_that_no_expert_computes_can_be_zeroed() -> None:
    x, w, ids, _, _ = problem()
    layout, extra = layouts(ids, TOP_K)[1]
    out = ng.routed_gemm(x, ng.prepack(w), layout, zero_padding=True, out=torch.full((T * TOP_K, N), 7.0).bfloat16(), **extra)
    skipped = ((ids < 0) | (ids >= E)).reshape(-1)
    assert not out[skipped].any() and out[~skipped].any(-1).all()


def test_positions_are_slots_without_a_row_map() -> None:
    x, w, _, _, _ = problem()
    offsets = torch.tensor([0, 2, 2, 5, 9, 9, 10])
    got = ng.routed_gemm(x, ng.prepack(w), Offsets(offsets), out=torch.zeros(T, N), out_dtype=torch.float32)
    want = ng.grouped_gemm(x, w, Offsets(offsets), out=torch.zeros(T, N), out_dtype=torch.float32)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("fmt", (MXFP4, MXFP8), ids=lambda f: f.name)
def test_packed_weights_in_gemm_and_grouped_gemm(fmt: Format) -> None:
    g = torch.Generator().manual_seed(1)
    w = ng.quantize(torch.randn(E, N, K, generator=g), fmt, backend="reference")
    p = ng.prepack(w)
    x = torch.randn(T, K, generator=g).bfloat16()
    one = ng.prepack(w[2])
    torch.testing.assert_close(ng.gemm(x, one), ng.gemm(x, w[2], backend="reference"))
    offsets = Offsets(torch.tensor([0, 2, 2, 5, 9, 9, T]))
    torch.testing.assert_close(ng.grouped_gemm(x, p, offsets), ng.grouped_gemm(x, w, offsets, backend="reference"))
    masked = ng.Masked(torch.tensor([2, 0, 1, 3, 3, 2], dtype=torch.int32))
    xm = torch.randn(E, 3, K, generator=g).bfloat16()
    a, b = (torch.zeros(E, 3, N).bfloat16() for _ in range(2))
    ng.grouped_gemm(xm, p, masked, out=a)
    ng.grouped_gemm(xm, w, masked, out=b, backend="reference")
    torch.testing.assert_close(a, b)


def test_no_slots_and_no_tokens() -> None:
    x, w, ids, _, _ = problem()
    layout, extra = layouts(ids[:0], TOP_K)[1]
    assert ng.routed_gemm(x[:0], ng.prepack(w), layout, **extra).shape == (0, N)
    layout, extra = layouts(torch.full_like(ids, -1), TOP_K)[1]
    assert not ng.routed_gemm(x, ng.prepack(w), layout, combine=True, **extra).any()


def test_what_is_refused() -> None:
    x, w, ids, weights, bias = problem()
    p = ng.prepack(w)
    (routed, _), (offsets, extra) = layouts(ids, TOP_K)
    with pytest.raises(TypeError, match="Routed or Offsets"):
        ng.routed_gemm(x, p, ng.Masked(torch.zeros(E, dtype=torch.int32)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="row_map"):
        ng.routed_gemm(x, p, routed, row_map=extra["row_map"])
    with pytest.raises(ValueError, match="top_k"):
        ng.routed_gemm(x, p, routed, top_k=TOP_K + 1)
    with pytest.raises(ValueError, match="activation"):
        ng.routed_gemm(x, p, offsets, activation="gelu", **extra)
    with pytest.raises(ValueError, match="bias, shape"):
        ng.routed_gemm(x, p, offsets, bias=bias[:, :4], **extra)
    with pytest.raises(ValueError, match="routing_weight, length"):
        ng.routed_gemm(x, p, offsets, routing_weight=weights[:3], **extra)
    with pytest.raises(ValueError, match="routing_weight, shape"):      # as many, but a slot's weight is not where it looks to be
        ng.routed_gemm(x, p, offsets, routing_weight=weights.mT, **extra)
    with pytest.raises(TypeError, match="float32"):
        ng.routed_gemm(x, p, offsets, routing_weight=weights.bfloat16(), **extra)
    for flag in ("combine", "zero_padding", "interleaved"):
        with pytest.raises(TypeError, match=f"{flag}: got 'no'"):
            ng.routed_gemm(x, w, offsets, activation="swiglu", **{flag: "no"}, **extra)
    with pytest.raises(ValueError, match="a, rows"):
        ng.routed_gemm(x[:4], p, offsets, **extra)
    with pytest.raises(ValueError, match="K of a"):
        ng.routed_gemm(x[:, :32], p, offsets, **extra)
    with pytest.raises(ValueError, match="out, shape"):
        ng.routed_gemm(x, p, offsets, combine=True, out=torch.zeros(T * TOP_K, N).bfloat16(), **extra)
    with pytest.raises(ValueError, match="to combine"):
        ng.routed_gemm(x, p, offsets, combine=True, **{**extra, "top_k": 4, "a_div": 4})
    with pytest.raises(ValueError, match="a_div without"):
        ng.routed_gemm(x, p, offsets, a_div=2)
    with pytest.raises(ValueError, match="offsets, length"):
        ng.routed_gemm(x, p, Offsets(torch.zeros(3, dtype=torch.int64)), **extra)


def test_can_run_has_a_reason() -> None:
    sizes = {"layout": "offsets", "groups": 128, "m": 16, "n": 5760, "k": 2880, "a": "bf16", "b": "mxfp4", "device": "h200"}
    able, why = ng.can_run("routed_gemm", **sizes, packed=True)
    assert able and why.startswith("gluon_sm90.narrow: ")
    able, why = ng.can_run("routed_gemm", **sizes)
    assert not able and "prepack()" in why
    able, why = ng.can_run("routed_gemm", **{**sizes, "device": "mi350x"}, packed=True)
    assert not able and "runs on NVIDIA Hopper (sm90), not gfx950" in why
    with pytest.raises(ValueError, match="op"):
        ng.can_run("gemv", **sizes)


def test_plan_says_what_prepack_would_do() -> None:
    from narrowgemm.arch import get_arch
    from narrowgemm.problem import Operand, Problem
    from narrowgemm.runtime import dispatch

    plain = Problem("routed_gemm", "offsets", 4, 2880, 2880, 128, b=Operand(MXFP4, scale_dtype="e8m0"), rows=1)
    plan = dispatch.select(plain, get_arch("h200"))
    assert plan.kernel == "triton.routed" and "prepack()" in dict(plan.passed_over)["gluon_sm90.narrow"]
    packed = Problem("routed_gemm", "offsets", 4, 2880, 2880, 128, b=Operand(MXFP4, prepack=ng.prepack(
        ScaledTensor(torch.zeros(64, 32, dtype=torch.uint8), torch.zeros(64, 2, dtype=torch.uint8), MXFP4)).prepack), rows=1)
    assert dispatch.select(packed, get_arch("h200")).kernel == "gluon_sm90.narrow"


PAIRS = ((FP8_1x128, MXFP4), (FP8_1x128.with_scale("e8m0"), MXFP4), (MXFP8, MXFP4), (MXFP4, MXFP4), (FP8_1x128, MXFP8))


@pytest.mark.parametrize("layout", ["contiguous", "psum", "offsets", "masked", "dense"])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p[0].name}-{p[1].name}")
def test_packed_weights_in_every_layout(layout: str, pair: tuple[Format, Format]) -> None:
    """The same bits as the weights unpacked; both gates; padding rows of contiguous and psum are zero."""
    case = Case("packed", layout, 1 if layout == "dense" else 3, 20, 40, 160, max_m=24 if layout == "masked" else 0, a=pair[0], b=pair[1],
                sizes="balanced" if layout == "dense" else "uniform:0.5:1.5", alignment=16, packed=True, out_dtype="fp32")
    inputs = build(case, "cpu", seed=3)
    inputs.verify()
    plain = inputs.out.tensor.clone()
    args = (inputs.b,) if inputs.layout is None else (inputs.b, inputs.layout)
    op = ng.gemm if inputs.layout is None else ng.grouped_gemm
    got = op(inputs.a, *args, out=plain, out_dtype=torch.float32)      # rows outside a masked group are NaN: compare bits
    assert torch.equal(got.view(torch.int32), inputs.out.tensor.view(torch.int32))


def test_packed_contiguous_leaves_padding_where_asked() -> None:
    p = ng.prepack(ng.quantize(torch.randn(2, 8, 64), MXFP4))
    ids = torch.tensor([0, -1, 1, 7], dtype=torch.int32)
    out = torch.full((4, 8), 5.0)
    ng.grouped_gemm(ng.quantize(torch.randn(4, 64), MXFP8), p, ng.Contiguous(ids), out=out, zero_padding=False, out_dtype=torch.float32)
    assert bool((out[[1, 3]] == 5).all()) and not bool((out[[0, 2]] == 5).any())
    with pytest.raises(ValueError, match="m_indices"):
        ng.grouped_gemm(ng.quantize(torch.randn(5, 64), MXFP8), p, ng.Contiguous(ids))
