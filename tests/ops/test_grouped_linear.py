"""`grouped_linear` against FP32 per group: values and gradients of every recipe, compiled, checkpointed, accumulated."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import narrowgemm as ng
from narrowgemm.ops.grouped_linear import RECIPES, grouped_linear, quantize_weight
from narrowgemm.testing.numerics import calc_diff

LENS = [5, 0, 130, 40]
N, K = 96, 160
CHECKS = ("test_autograd_registration", "test_faketensor")      # the others compare FP8 tensors, for which torch has no arithmetic
LIMIT = {"e4m3": 1e-3, "e5m2": 5e-3}


def inputs(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(LENS), K, generator=g).to(dtype).requires_grad_()
    w = (torch.randn(len(LENS), N, K, generator=g) * 0.1).to(dtype).requires_grad_()
    return x, w, torch.tensor(LENS)


def reference(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """y, dx, dw in FP32, group by group."""
    x, w = x.detach().float().requires_grad_(), w.detach().float().requires_grad_()
    y = torch.cat([a @ b.T for a, b in zip(x.split(LENS), w)])
    y.backward(dy.float())
    return y.detach(), x.grad, w.grad


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("element", "grads"), [("e4m3", "e4m3"), ("e4m3", "e5m2"), ("e5m2", "e4m3")])
def test_values_and_gradients(recipe: str, element: str, grads: str) -> None:
    x, w, lens = inputs()
    y = grouped_linear(x, w, lens, recipe=recipe, element=element, grads=grads)
    dy = torch.randn_like(y)
    y.backward(dy)
    want, most = reference(x, w, dy), max(LIMIT[element], LIMIT[grads])
    assert y.dtype == x.dtype and x.grad.dtype == x.dtype and w.grad.dtype == w.dtype
    for got, ref, limit in zip((y.detach(), x.grad, w.grad), want, (LIMIT[element], most, most)):
        assert calc_diff(got.float(), ref) < limit * 1.1
    assert not w.grad[1].any(), "the gradient of an empty group is not zero"


def test_tiny_gradients_are_not_flushed() -> None:
    """Those of a mean over many tokens lie far below the least magnitude that activations are scaled by."""
    x, w, lens = inputs()
    dy = torch.randn(sum(LENS), N).bfloat16()
    one, small = (torch.autograd.grad(grouped_linear(x, w, lens, recipe="rowwise"), (x, w), (dy.float() * s).bfloat16()) for s in (1.0, 2.0**-40))
    for a, b in zip(one, small):
        assert calc_diff(a.float(), b.float() * 2.0**40) < 1e-4


def test_offsets_fp32_master_and_one_side_only() -> None:
    x, w, lens = inputs()
    master = w.detach().float().requires_grad_()
    offs = torch.nn.functional.pad(lens.cumsum(0), (1, 0))
    y = grouped_linear(x.detach(), master, group_offs=offs, recipe="rowwise")
    assert torch.equal(y, grouped_linear(x, w, lens, recipe="rowwise"))
    y.backward(torch.ones_like(y))
    assert master.grad.dtype == torch.float32
    y = grouped_linear(x, w.detach(), lens, recipe="rowwise")
    y.backward(torch.ones_like(y))
    assert x.grad is not None and w.grad is None


@pytest.mark.parametrize("recipe", RECIPES)
def test_weight_quantised_once(recipe: str) -> None:
    x, w, lens = inputs()
    q = quantize_weight(w, recipe)
    y = grouped_linear(x, w, lens, recipe=recipe, quantized=q)
    assert torch.equal(y, grouped_linear(x, w, lens, recipe=recipe))
    with pytest.raises(ValueError, match="quantize_weight"):
        grouped_linear(x, w[:, :64], lens, recipe=recipe, quantized=q)


@pytest.mark.parametrize("recipe", RECIPES)
def test_weight_without_a_master(recipe: str) -> None:
    """Quantised weights alone: the same values and input gradients; their own gradient goes to `main_grad`, or nowhere."""
    x, w, lens = inputs()
    q = quantize_weight(w, recipe)
    dy = torch.randn(sum(LENS), N).bfloat16()
    y = grouped_linear(x, w, lens, recipe=recipe)
    y.backward(dy)
    for main in (None, torch.zeros(w.shape)):
        x2 = x.detach().clone().requires_grad_()
        y2 = grouped_linear(x2, q, lens, recipe=recipe, main_grad=main)
        y2.backward(dy)
        assert torch.equal(y, y2) and torch.equal(x.grad, x2.grad)
        if main is not None:
            assert calc_diff(main, w.grad.float()) < 5e-6
    if recipe == "block":
        x2 = x.detach().clone().requires_grad_()
        f = lambda a: grouped_linear(a, q, lens, recipe=recipe)  # noqa: E731
        y2 = torch.compile(f, fullgraph=True, backend="aot_eager")(x2)
        y2.backward(dy)
        assert torch.equal(y, y2) and torch.equal(x.grad, x2.grad)
    with pytest.raises(ValueError, match="requires_grad"):
        grouped_linear(x.detach(), q, lens, recipe=recipe, main_grad=torch.zeros(w.shape))
    with pytest.raises(ValueError, match="quantize_weight"):
        grouped_linear(x, quantize_weight(w, "tensorwise" if recipe == "rowwise" else "rowwise"), lens, recipe=recipe)


def test_main_grad_is_added_to() -> None:
    x, w, lens = inputs()
    main = torch.ones(w.shape)
    dy = torch.randn(sum(LENS), N).bfloat16()
    grouped_linear(x, w, lens, recipe="tensorwise").backward(dy)
    grouped_linear(x, w, lens, recipe="tensorwise", main_grad=main).backward(dy)
    assert calc_diff(main - 1, w.grad.float()) < 5e-6 and torch.equal(main[1], torch.ones_like(main[1]))


def test_delayed_scaling() -> None:
    x, w, lens = inputs()
    dy = torch.randn(sum(LENS), N).bfloat16()
    scales = tuple((t.detach().abs().max().float() / 448).reshape(1) for t in (x, dy))
    y = grouped_linear(x, w, lens, recipe="tensorwise", scales=scales)
    y.backward(dy)
    x2, w2, _ = inputs()
    y2 = grouped_linear(x2, w2, lens, recipe="tensorwise")
    y2.backward(dy)
    assert torch.equal(y, y2) and torch.equal(x.grad, x2.grad) and torch.equal(w.grad, w2.grad)


def test_gradients_take_the_scale_that_is_given() -> None:
    """One that is too small for them cuts them off; compiled, too."""
    x, w, lens = inputs()
    dy = torch.randn(sum(LENS), N).bfloat16()
    sx, sdy = ((t.detach().abs().max().float() / 448).reshape(1) for t in (x, dy))
    f = lambda a, b, s: grouped_linear(a, b, lens, recipe="tensorwise", scales=(sx, s))  # noqa: E731
    for how in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        for scale in (sdy, sdy / 64):
            most = 448 * float(scale)
            for got, want in zip(torch.autograd.grad(how(x, w, scale), (x, w), dy), reference(x, w, dy.clamp(-most, most))[1:]):
                assert calc_diff(got.float(), want) < 1.1 * LIMIT["e4m3"]


def test_the_gradient_of_an_fp32_master_is_no_rounded_one() -> None:
    x, w, lens = inputs()
    master = w.detach().float().requires_grad_()
    f = lambda a, b: grouped_linear(a, b, lens, recipe="rowwise")  # noqa: E731
    for how in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        dw, = torch.autograd.grad(how(x, master), master, torch.randn(sum(LENS), N).bfloat16())
        assert dw.dtype == torch.float32 and bool((dw != dw.bfloat16()).any())


def test_checkpointing_gives_the_same() -> None:
    x, w, lens = inputs()
    f = lambda a, b: grouped_linear(torch.nn.functional.silu(a), b, lens)  # noqa: E731
    f(x, w).sum().backward()
    x2, w2, _ = inputs()
    checkpoint(f, x2, w2, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, x2.grad) and torch.equal(w.grad, w2.grad)


@pytest.mark.parametrize("scaling", ["current", "delayed"])
def test_checkpointed_and_compiled_with_either_scaling(scaling: str) -> None:
    """Tensor-wise, E4M3 x E5M2 gradients: the recomputed forward takes the same scales, and so gives the same bits."""
    dy = torch.randn(sum(LENS), N).bfloat16()
    grads = []
    for how in ("plain", "checkpointed", "compiled"):
        x, w, lens = inputs()
        scales = None
        if scaling == "delayed":
            scales = (x.detach().abs().max().float() / 448).reshape(1), (dy.abs().max().float() / 57344).reshape(1)
        f = lambda a, b: grouped_linear(a, b, lens, recipe="tensorwise", grads="e5m2", scales=scales)  # noqa: E731, B023
        if how == "checkpointed":
            y = checkpoint(f, x, w, use_reentrant=False)
        else:
            y = f(x, w) if how == "plain" else torch.compile(f, fullgraph=True, backend="aot_eager")(x, w)
        y.backward(dy)
        grads.append((y.detach(), x.grad, w.grad))
    for other in grads[1:]:
        assert all(torch.equal(p, q) for p, q in zip(grads[0], other))
    want = reference(*inputs()[:2], dy)
    assert all(calc_diff(p.float(), q) < 1.1 * LIMIT["e5m2"] for p, q in zip(grads[0], want))


@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_as_one_graph(recipe: str) -> None:
    x, w, lens = inputs()
    f = lambda a, b, n: grouped_linear(a, b, n, recipe=recipe) * 2  # noqa: E731
    y = torch.compile(f, fullgraph=True, backend="aot_eager")(x, w, lens)
    y.sum().backward()
    x2, w2, _ = inputs()
    y2 = f(x2, w2, lens)
    y2.sum().backward()
    assert torch.equal(y, y2) and torch.equal(x.grad, x2.grad) and torch.equal(w.grad, w2.grad)


def test_opcheck() -> None:
    x, w, lens = inputs()
    q = quantize_weight(w, "rowwise")
    offs = torch.nn.functional.pad(lens.cumsum(0), (1, 0))
    torch.library.opcheck(torch.ops.narrowgemm.grouped_linear.default,
                          (x, w, q.rows.data, q.rows.scale, q.columns.data, q.columns.scale, offs, None, None, "fp8_row", "fp8_row",
                           "fp8_row", False, 0, True), test_utils=CHECKS)
    both = ng.quantize_both(x, "fp8_row", offs)
    torch.library.opcheck(torch.ops.narrowgemm.grouped_linear_backward.default,
                          (torch.randn(x.shape[0], N).bfloat16(), q.columns.data, q.columns.scale, offs, None, both.columns.data,
                           both.columns.scale, both.layout.offsets, "fp8_row", "fp8_row", "fp8_row", False, 0, "bf16", "bf16", True),
                          test_utils=CHECKS)
    torch.library.opcheck(torch.ops.narrowgemm.quantize_both.default,
                          (x.detach(), offs, both.rows.data, both.rows.scale, both.columns.data, both.columns.scale, both.layout.offsets,
                           "fp8_row", False, "rceil", 1e-4, ""), test_utils=CHECKS)


def test_refusals() -> None:
    x, w, lens = inputs()
    for call in (lambda: grouped_linear(x, w, lens, recipe="int4"), lambda: grouped_linear(x, w, lens, grads="fp16"),
                 lambda: grouped_linear(x, w), lambda: grouped_linear(x, w[..., :80], lens), lambda: grouped_linear(x, w, group_offs=torch.zeros(6, dtype=torch.int64)),
                 lambda: grouped_linear(x[0], w, lens),
                 lambda: grouped_linear(x, w, lens[:2]), lambda: grouped_linear(x, w, lens, scales=(lens, lens)),
                 lambda: grouped_linear(x, w, lens, recipe="rowwise", scales=(torch.ones(1), torch.ones(1))),
                 lambda: grouped_linear(x, w, lens, recipe="tensorwise", main_grad=torch.zeros(3)),
                 lambda: grouped_linear(x, w, lens, fast_accum=True)):
        with pytest.raises(ValueError, match="expected"):
            call()
    for call in (lambda: grouped_linear(x, w, lens, quantized=w), lambda: grouped_linear(x, w, lens, main_grad=3)):
        with pytest.raises(TypeError, match=r"got .*, expected "):
            call()
    with pytest.raises(ValueError, match=f"group_lens, length: got 2, expected the number of groups of the weights, {w.shape[0]}"):
        grouped_linear(x, w, lens[:2])
    assert ng.grouped_linear is grouped_linear


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "block"])
def test_no_rows_and_a_gradient_that_is_expanded(recipe: str) -> None:
    """A rank without tokens: the sum's gradient has strides of zero, and torch takes it for contiguous."""
    x, w = torch.empty(0, 256).bfloat16().requires_grad_(), torch.randn(3, 64, 256).bfloat16().requires_grad_()
    dx, dw = torch.autograd.grad(grouped_linear(x, w, torch.zeros(3, dtype=torch.int64), recipe=recipe).sum(), (x, w))
    assert dx.shape == (0, 256) and dw.shape == w.shape and not bool(dw.any())
