"""gemm, grouped_gemm, grouped_gemm_wgrad: every case on the reference, torch's own checks, empty tensors, prepare."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import narrowgemm as ng
from narrowgemm.testing.cases import Case, build, get_suite


@pytest.mark.parametrize("case", [*get_suite("cpu-small"), *get_suite("cpu-formats")], ids=lambda c: f"{c.suite}/{c.id}")
def test_reference_passes_both_gates(case: Case) -> None:
    build(case, "cpu", seed=5).verify(backend="reference")


def tiny(layout: str, **kw) -> Case:
    if layout == "k_grouped":
        return Case("ops", layout, 3, 32, 48, 64, a=ng.FP8_1x128, b=ng.FP8_1x128, out_dtype="fp32", **kw)
    return Case("ops", layout, 1 if layout == "dense" else 3, 8, 64, 128, max_m=16 if layout == "masked" else 0, alignment=8, **kw)


LAYOUTS = ("dense", "contiguous", "psum", "offsets", "masked", "k_grouped")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_allocates_its_output(layout: str) -> None:
    i = build(tiny(layout), "cpu")
    if layout == "dense":
        out = ng.gemm(i.a, i.b, out_dtype=torch.float32)
    elif layout == "k_grouped":
        out = ng.grouped_gemm_wgrad(i.a, i.b, i.layout)
    else:
        out = ng.grouped_gemm(i.a, i.b, i.layout, out_dtype=torch.float16)
    assert out.shape == i.out.tensor.shape
    assert out.dtype == {"dense": torch.float32, "k_grouped": torch.float32}.get(layout, torch.float16)
    assert i.check(out.to(i.out.tensor.dtype)).ok


@pytest.mark.parametrize("bf16", [False, True], ids=["fp8", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str, bf16: bool) -> None:
    """Schema, fake tensor, autograd registration and AOT dispatch, by torch's own checker."""
    case = tiny(layout)
    i = build(replace(case, a=ng.BF16, b=ng.BF16) if bf16 else case, "cpu")
    i.call()  # warm
    out = torch.zeros_like(i.out.tensor)
    args = (i.a.data, i.a.scale, i.b.data, i.b.scale, i.a.format.name, i.b.format.name, out)
    tail = (False, "", 0, "portable")
    # torch's schema test multiplies its inputs, and the CPU has no FP8 product: it runs on BF16
    tests = ("test_schema",) * bf16 + ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if layout == "dense":
        torch.library.opcheck(torch.ops.narrowgemm.gemm.default, (*args, *tail), test_utils=tests)
    elif layout == "k_grouped":
        torch.library.opcheck(torch.ops.narrowgemm.grouped_gemm_wgrad.default, (*args, i.layout.index, *tail), test_utils=tests)
    else:
        torch.library.opcheck(torch.ops.narrowgemm.grouped_gemm.default, (*args, i.layout.index, layout, 8, 8, True, *tail),
                              test_utils=tests)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_as_one_graph(layout: str) -> None:
    i = build(tiny(layout), "cpu")
    eager = i.call().clone()

    def f(a_data, a_scale, b_data, b_scale, index):
        a, b = ng.ScaledTensor(a_data, a_scale, i.a.format), ng.ScaledTensor(b_data, b_scale, i.b.format)
        if layout == "dense":
            return ng.gemm(a, b) + 0
        if layout == "k_grouped":
            return ng.grouped_gemm_wgrad(a, b, ng.KGrouped(index)) + 0
        where = ng.Psum(index, 8) if layout == "psum" else type(i.layout)(index)
        return ng.grouped_gemm(a, b, where, out=torch.zeros_like(eager)) + 0

    index = i.layout.index if i.layout is not None else torch.zeros(1, dtype=torch.int32)
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    out = compiled(i.a.data, i.a.scale, i.b.data, i.b.scale, index)
    live = ~eager.isnan()
    assert torch.equal(out[live], eager[live])


@pytest.mark.parametrize(("m", "n", "k"), [(0, 64, 128), (8, 0, 128), (8, 64, 0), (0, 0, 0)])
def test_empty_dense(m: int, n: int, k: int) -> None:
    a = ng.quantize(torch.randn(m, k), ng.FP8_1x128)
    b = ng.quantize(torch.randn(n, k), ng.FP8_128x128)
    out = ng.gemm(a, b)
    assert out.shape == (m, n) and bool((out == 0).all())
    base = torch.ones(m, n)
    assert torch.equal(ng.gemm(a, b, out=base, accumulate=True), torch.ones(m, n))


@pytest.mark.parametrize("fmt", [ng.MXFP4, ng.MXFP8, ng.FP8_1x128, ng.FP8_ROW], ids=lambda f: f.name)
def test_wgrad_of_every_scale_block_and_packing(fmt: ng.Format) -> None:
    """Groups that begin and end inside a scale's block, and inside a byte of two elements."""
    torch.manual_seed(0)
    a, b = ng.quantize(torch.randn(8, 250), fmt), ng.quantize(torch.randn(6, 250), ng.FP8_1x128)
    bounds = [3, 34, 34, 101, 250]
    got = ng.grouped_gemm_wgrad(a, b, ng.KGrouped(torch.tensor(bounds)))
    for g, (start, end) in enumerate(zip(bounds, bounds[1:])):
        want = a.dequantize()[:, start:end] @ b.dequantize()[:, start:end].T
        assert torch.allclose(got[g], want, atol=1e-4), (g, start, end)


def test_empty_grouped() -> None:
    b = ng.quantize(torch.randn(2, 64, 128), ng.FP8_128x128)
    none = ng.quantize(torch.randn(0, 128), ng.FP8_1x128)
    assert ng.grouped_gemm(none, b, ng.Offsets(torch.zeros(3, dtype=torch.int64))).shape == (0, 64)
    assert ng.grouped_gemm(none, b, ng.Contiguous(torch.zeros(0, dtype=torch.int32))).shape == (0, 64)
    no_groups = ng.ScaledTensor(b.data[:0], b.scale[:0], b.format)
    assert ng.grouped_gemm(none, no_groups, ng.Offsets(torch.zeros(1, dtype=torch.int64))).shape == (0, 64)
    no_columns = ng.ScaledTensor(none.data.mT, torch.zeros(128, 0), ng.FP8_1x128)
    dw = ng.grouped_gemm_wgrad(no_columns, no_columns, ng.KGrouped(torch.zeros(4, dtype=torch.int64)))
    assert dw.shape == (3, 128, 128) and bool((dw == 0).all())


@pytest.mark.parametrize("layout", ["dense", "contiguous", "psum", "offsets", "masked"])
def test_prepare_covers_the_calls(layout: str) -> None:
    """Every Plan that a later call selects was prepared."""
    i = build(tiny(layout), "cpu")
    plans = ng.prepare(i.b, layout=layout, max_m=16, alignment=8, expected_m=(8,))
    assert plans and i.plan().steps in {p.steps for p in plans}


@pytest.mark.interpret
def test_prepare_covers_every_m_on_a_gpu_target(monkeypatch) -> None:
    monkeypatch.setenv("NARROWGEMM_ARCH", "h200")
    b = ng.quantize(torch.randn(128, 512), ng.FP8_128x128)
    steps = {p.steps for p in ng.prepare(b, max_m=130, backend="triton")}
    assert len(steps) > 1
    for m in range(1, 131):
        assert ng.explain("gemm", m=m, n=128, k=512, device="h200", backend="triton").plan.steps in steps


def test_bf16_operands_need_no_scales() -> None:
    a, b = torch.randn(8, 64).bfloat16(), torch.randn(16, 64).bfloat16()
    assert torch.equal(ng.gemm(a, b), (a.float() @ b.float().T).bfloat16())


@pytest.mark.parametrize("order, folded", [("bf16", False), ("bf16", True), ("mxfp8", False), ("mxfp8", True)])
@pytest.mark.parametrize("layout", ["dense", "offsets"])
def test_validate_reads_the_scales_that_meet_packed_weights(order: str, folded: bool, layout: str) -> None:
    w = ng.quantize(torch.randn(64, 128) if layout == "dense" else torch.randn(2, 64, 128), "mxfp8")
    packed, x, out = ng.prepack(w, activations=order, folded=folded), ng.quantize(torch.randn(520, 128), "mxfp8"), torch.ones(520, 64).bfloat16()
    x.scale[7, 1] = 255
    with pytest.raises(ValueError, match=r"scale of a at \(7, 1\): got NaN"):
        if layout == "dense":
            ng.gemm(x, packed, out=out, validate="sync")
        else:
            ng.grouped_gemm(x, packed, ng.Offsets(torch.tensor([0, 100, 520])), out=out, validate="sync")
    assert bool((out == 1).all())


def test_weights_that_a_call_folds_are_plain_to_calls_of_few_rows() -> None:
    w = ng.quantize(torch.randn(256, 128), "mxfp8")
    packed = ng.prepack(w, activations="mxfp8", folded=True)
    assert packed.plain_for(511) is packed.plain is not None and packed.plain_for(512) is None and packed.plain_for(1, asked=True) is None
    plain = ng.prepack(w, activations="mxfp8")
    assert plain.folded is None and plain.plain_for(512, asked=True) is plain.plain
    for rows in (3, 600):
        x = ng.quantize(torch.randn(rows, 128), "mxfp8")
        assert torch.equal(ng.gemm(x, packed), ng.gemm(x, w))
    for shape in ((), (2, 600, 128)):
        with pytest.raises(ValueError, match="a, shape: got"):
            ng.gemm(torch.ones(shape).bfloat16(), packed)
    for rows, picks in ((256, -1), (1024, packed.folded.picks)):
        assert [p.problem.b.picks for p in ng.prepare(packed, max_m=1024, sizes=(rows,), a_format="mxfp8")] == [picks]


@pytest.mark.parametrize("order", ["bf16", "fp8", "mxfp8"])
@pytest.mark.parametrize("layout", ["dense", "offsets", "masked"])
def test_prepare_takes_packed_weights(layout: str, order: str) -> None:
    """The plans that calls with them have; dense MXFP8 weights that stay in their order count as they are."""
    w = ng.quantize(torch.randn(3, 64, 128), "mxfp8" if order == "mxfp8" else "mxfp4")
    packed = ng.prepack(w[0] if layout == "dense" else w, activations=order)
    fmt = "mxfp8" if order == "mxfp8" else "bf16"
    plans = ng.prepare(packed, layout=layout, max_m=16, a_format=fmt)
    assert plans and all(p.problem.layout == layout and p.problem.a.format.name == fmt for p in plans)
    assert all((p.problem.b.prepack == "") == (packed.plain is not None) for p in plans)
    with pytest.raises(ValueError, match="b, shape"):
        ng.prepare(packed, layout="masked" if layout == "dense" else "dense", max_m=4, a_format=fmt)
    with pytest.raises(TypeError, match="b: got Tensor, expected a ScaledTensor or a PackedWeight"):
        ng.prepare(w.data, max_m=4)  # type: ignore[arg-type]
