"""`expert_mlp` against FP32 per expert: values and gradients of every recipe, compiled, checkpointed, accumulated."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import narrowgemm as ng
from narrowgemm.ops import expert_mlp as module
from narrowgemm.ops.expert_mlp import RECIPES, Scaling, expert_mlp
from narrowgemm.ops.expert_mlp_traced import _forward
from narrowgemm.ops.grouped_linear import quantize_weight
from narrowgemm.reference.activate import activate
from narrowgemm.testing.numerics import calc_diff

LENS = [5, 0, 130, 1]
H, I = 96, 160
FP8 = RECIPES[1:]
LIMIT = {"e4m3": 4e-3, "e5m2": 1.5e-2}      # two products one behind the other: twice the recipe's noise and more
CHECKS = ("test_autograd_registration", "test_faketensor")      # the others compare FP8 tensors, for which torch has no arithmetic


def inputs(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(LENS), H, generator=g).bfloat16().requires_grad_()
    w1, w2 = ((torch.randn(len(LENS), *s, generator=g) * 0.1).to(dtype).requires_grad_() for s in ((2 * I, H), (H, I)))
    return x, w1, w2, torch.tensor(LENS), torch.randn(sum(LENS), H, generator=g).bfloat16()


def reference(x, w1, w2, dy, **options) -> tuple[torch.Tensor, ...]:
    """y, dx, d gate_up, d down in FP32, expert by expert."""
    x, w1, w2 = (t.detach().float().requires_grad_() for t in (x, w1, w2))
    y = torch.cat([activate(a @ p.T, **options) @ q.T for a, p, q in zip(x.split(LENS), w1, w2)])
    y.backward(dy.float())
    return y.detach(), x.grad, w1.grad, w2.grad


def run(x, w1, w2, lens, dy, **options) -> tuple[torch.Tensor, ...]:
    y = expert_mlp(x, w1, w2, lens, **options)
    return y.detach(), *torch.autograd.grad(y, (x, w1, w2), dy)


@pytest.mark.parametrize(("recipe", "grads"), [*((r, "e4m3") for r in RECIPES), ("block", "e5m2"), ("tensorwise", "e5m2")])
def test_values_and_gradients(recipe: str, grads: str) -> None:
    x, w1, w2, lens, dy = inputs(torch.float32 if grads == "e5m2" else torch.bfloat16)
    got = run(x, w1, w2, lens, dy, recipe=recipe, grads=grads)
    limits = [2e-5] * 4 if recipe == "bf16" else [LIMIT["e4m3"]] + [LIMIT[grads]] * 3
    for a, b, limit, like in zip(got, reference(x, w1, w2, dy), limits, (x, x, w1, w2)):
        assert a.dtype == like.dtype and calc_diff(a.float(), b) < limit
    assert not got[2][1].any() and not got[3][1].any(), "the gradient of an empty group is not zero"


@pytest.mark.parametrize("recipe", ["bf16", "rowwise"])
def test_gpt_oss_activation(recipe: str) -> None:
    x, w1, w2, lens, dy = inputs()
    options = {"activation": "swiglu_oai", "args": (1.702, 3.0)}
    got = run(x, w1, w2, lens, dy, recipe=recipe, **options)
    for a, b in zip(got, reference(x, w1, w2, dy, **options)):
        # roundings move a few values over the clamp, where the gradient ends
        assert calc_diff(a.float(), b) < (5e-4 if recipe == "bf16" else 2 * LIMIT["e4m3"])


def test_tiny_gradients_are_not_flushed() -> None:
    """Those of a mean over many tokens lie far below the least magnitude that activations are scaled by."""
    x, w1, w2, lens, dy = inputs()
    for recipe in FP8:
        one, small = (run(x, w1, w2, lens, (dy.float() * s).bfloat16(), recipe=recipe) for s in (1.0, 2.0**-40))
        for a, b in zip(one[1:], small[1:]):
            assert calc_diff(a.float(), b.float() * 2.0**40) < 1e-4


def test_one_token_and_none() -> None:
    for count in (1, 0):
        x, w1, w2, _, dy = inputs()
        lens = torch.tensor([0, 0, count, 0])
        x = x.detach()[:count].requires_grad_()
        for recipe in RECIPES:
            y, dx, d1, d2 = run(x, w1, w2, lens, dy[:count], recipe=recipe)
            assert y.shape == dx.shape == (count, H) and bool(d1[2].any()) == bool(d2[2].any()) == bool(count)
            d1, d2 = torch.autograd.grad(expert_mlp(x, w1, w2, lens, recipe=recipe).sum(), (w1, w2))    # a gradient that is expanded
            assert bool(d1[2].any()) == bool(d2[2].any()) == bool(count)


def test_only_what_needs_a_gradient() -> None:
    """Frozen weights: nothing is transposed forward; and a frozen input, and one weight alone."""
    x, w1, w2, lens, dy = inputs()
    for recipe in RECIPES:
        how = {"recipe": recipe, "activation": "swiglu_oai", "args": (1.702, 0.5)}      # a clamp that most values meet
        y, dx, d1, d2 = run(x, w1, w2, lens, dy, **how)
        frozen = expert_mlp(x, w1.detach(), w2.detach(), lens, **how)
        assert torch.equal(frozen, y) and torch.equal(torch.autograd.grad(frozen, x, dy)[0], dx)
        assert torch.equal(torch.autograd.grad(expert_mlp(x.detach(), w1, w2.detach(), lens, **how), w1, dy)[0], d1)
        assert torch.equal(torch.autograd.grad(expert_mlp(x.detach(), w1.detach(), w2, lens, **how), w2, dy)[0], d2)
        with torch.no_grad():
            assert torch.equal(expert_mlp(x, w1, w2, lens, **how), y)


@pytest.mark.parametrize("recipe", ["bf16", "rowwise"])
def test_arguments_of_the_activation(recipe: str) -> None:
    x, w1, w2, lens, dy = inputs()
    options = {"activation": "swiglu_oai", "args": (1.2, 0.5)}
    y = expert_mlp(x, w1, w2, lens, recipe=recipe, **options)
    assert calc_diff(y.detach().float(), reference(x, w1, w2, dy, **options)[0]) < (2e-5 if recipe == "bf16" else LIMIT["e4m3"])


@pytest.mark.parametrize("recipe", ["rowwise", "bf16"])
def test_gradients_are_summed_up_in_each_masters_type(recipe: str) -> None:
    """That of an FP32 master has bits that BF16 has not, whatever the other weight is."""
    x, w1, w2, lens, dy = inputs(torch.float32)
    for first, second in ((w1, w2.detach().bfloat16().requires_grad_()), (w1.detach().bfloat16().requires_grad_(), w2)):
        grads = run(x, first, second, lens, dy, recipe=recipe)[2:]
        for g, w in zip(grads, (first, second)):
            assert g.dtype == w.dtype
            assert recipe == "bf16" or (w.dtype == torch.float32) == bool((g != g.bfloat16()).any())    # torch's product is BF16


def test_options_of_products_reach_all_of_them(monkeypatch) -> None:
    found = []
    for name in ("grouped_gemm", "grouped_gemm_wgrad"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, **kw: found.append((kw["fast_accum"], kw["max_sms"])) or real(*a, **kw))
    x, w1, w2, lens, dy = inputs()
    run(x, w1, w2, lens, dy, recipe="rowwise", fast_accum=True, max_sms=7)
    expert_mlp(x, w1.detach(), w2.detach(), lens, recipe="rowwise", fast_accum=True, max_sms=7)
    assert found == [(True, 7)] * 8     # two forward, four backward; two that keep nothing


@pytest.mark.parametrize("recipe", ["bf16", "tensorwise"])
def test_main_gradients(recipe: str) -> None:
    x, w1, w2, lens, dy = inputs()
    mains = torch.ones(w1.shape), torch.ones(w2.shape)
    y = expert_mlp(x, w1, w2, lens, recipe=recipe, main_grads=mains)
    y.backward(dy)
    assert w1.grad is None and w2.grad is None
    for main, grad in zip(mains, run(x, w1, w2, lens, dy, recipe=recipe)[2:]):
        assert calc_diff(main - 1, grad.float()) < 5e-6


def test_checkpointing_and_weights_quantised_once() -> None:
    x, w1, w2, lens, dy = inputs()
    q = tuple(quantize_weight(w.detach()) for w in (w1, w2))
    want = run(x, w1, w2, lens, dy)
    for f in (lambda a, b, c: expert_mlp(a, b, c, lens, quantized=q),
              lambda a, b, c: checkpoint(lambda *t: expert_mlp(*t, lens), a, b, c, use_reentrant=False)):
        y = f(x, w1, w2)
        for a, b in zip((y.detach(), *torch.autograd.grad(y, (x, w1, w2), dy)), want):
            assert torch.equal(a, b)


def test_delayed_scaling() -> None:
    """Scales that current scaling would find give its bits; the largest magnitudes come out."""
    x, w1, w2, lens, dy = inputs()
    found = Scaling(torch.zeros(4, 4), torch.zeros(4, 4), ready=False)
    want = run(x, w1, w2, lens, dy, recipe="tensorwise", scaling=found)
    assert bool((found.amax[:, 0] > 0).all())
    scaling = Scaling(found.amax / 448, torch.zeros(4, 4))
    got = run(x, w1, w2, lens, dy, recipe="tensorwise", scaling=scaling)
    for a, b in zip(got, want):
        assert calc_diff(a.float(), b.float()) < 1e-5
    torch.testing.assert_close(scaling.amax[:, 0], found.amax[:, 0], rtol=1e-2, atol=0)


@pytest.mark.parametrize("recipe", FP8)
def test_compiled_as_one_graph(recipe: str) -> None:
    x, w1, w2, lens, dy = inputs()
    f = lambda a, b, c, n: expert_mlp(a, b, c, n, recipe=recipe, grads="e5m2" if recipe == "tensorwise" else "") * 2  # noqa: E731
    y = torch.compile(f, fullgraph=True, backend="aot_eager")(x, w1, w2, lens)
    want = f(x, w1, w2, lens)
    assert torch.equal(y, want)
    for a, b in zip(torch.autograd.grad(y, (x, w1, w2), dy), torch.autograd.grad(want, (x, w1, w2), dy)):
        assert torch.equal(a, b)


def test_opcheck() -> None:
    x, w1, w2, lens, dy = inputs()
    flat = [t for w in (w1, w2) for part in (quantize_weight(w.detach(), "rowwise"),) for s in (part.rows, part.columns)
            for t in (s.data, s.scale)]
    offsets = torch.nn.functional.pad(lens.cumsum(0), (1, 0))
    how = ("fp8_row", "fp8_row", "fp8_row", "swiglu", [], False, 0)
    torch.library.opcheck(torch.ops.narrowgemm.expert_mlp.default, (x, w1, w2, *flat, offsets, *how), test_utils=CHECKS)
    with torch.no_grad():
        kept = _forward(x, w1, w2, *flat, offsets, *how)[1:]
    columns = [flat[i] for i in (2, 3, 6, 7)]
    torch.library.opcheck(torch.ops.narrowgemm.expert_mlp_backward.default, (dy, *kept, *columns, offsets, *how, "fp32", "bf16"),
                          test_utils=CHECKS)
    grads = torch.ops.narrowgemm.expert_mlp_backward(dy, *kept, *columns, offsets, *how, "fp32", "bf16")
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.bfloat16]
    layout = ng.Offsets(offsets)
    both = ng.activate_backward(kept[0], torch.ones(sum(LENS), I).bfloat16(), layout, "fp8_row")
    torch.library.opcheck(torch.ops.narrowgemm.activate_both.default,
                          (kept[0], torch.ones(sum(LENS), I).bfloat16(), offsets, both.layout.offsets, both.rows.data, both.rows.scale,
                           both.columns.data, both.columns.scale, None, True, "fp8_row", "swiglu", [], False, "rceil", 1e-4, ""),
                          test_utils=CHECKS)


def test_activation_compiled_alone() -> None:
    x, *_, dy = inputs()
    layout = ng.Offsets(torch.tensor([0, 5, 136]))
    h = torch.cat([x, x], 1).detach()
    for fmt in ("fp8_tensor", "fp8_row", "fp8_1x128", None):
        f = lambda a, b: ng.activate_backward(a, b, layout, fmt)  # noqa: B023, E731
        got, want = torch.compile(f, fullgraph=True, backend="aot_eager")(h, dy), f(h, dy)
        if fmt is None:
            assert torch.equal(got, want)
            continue
        end = int(want.layout.offsets[-1])
        assert torch.equal(got.rows.dequantize(), want.rows.dequantize())
        assert torch.equal(got.columns.dequantize()[:, :end], want.columns.dequantize()[:, :end])


def test_refusals() -> None:
    x, w1, w2, lens, _ = inputs()
    for call in (lambda: expert_mlp(x, w1, w2, lens, recipe="int4"), lambda: expert_mlp(x, w1, w2), lambda: expert_mlp(x[0], w1, w2, lens),
                 lambda: expert_mlp(x, w1[..., :80], w2, lens), lambda: expert_mlp(x, w1, w2[:, :80], lens),
                 lambda: expert_mlp(x, w1, w2, lens[:2]), lambda: expert_mlp(x, w1, w2, lens, grads="fp16"),
                 lambda: expert_mlp(x, w1, w2, lens, activation="gelu"),
                 lambda: expert_mlp(x, w1, w2, lens, main_grads=(torch.zeros(3), None)),
                 lambda: expert_mlp(x, w1, w2, lens, main_grads=(None, torch.zeros(w2.shape).bfloat16())),
                 lambda: expert_mlp(x, w1, w2, lens, scaling=Scaling(torch.ones(4, 4), torch.ones(4, 4))),
                 lambda: expert_mlp(x, w1, w2, lens, quantized=(quantize_weight(w2.detach()),) * 2)):
        with pytest.raises(ValueError, match="expected"):
            call()
    for call in (lambda: expert_mlp(x, w1, w2, lens, main_grads=None), lambda: expert_mlp(x, w1, w2, lens, main_grads=(1.0, None)),
                 lambda: expert_mlp(x, w1, w2, lens, quantized=quantize_weight(w1.detach())), lambda: expert_mlp(x, w1, w2, lens, quantized=(w1, w2))):
        with pytest.raises(TypeError, match=r"got .*, expected "):
            call()
