"""SwiGLU and its derivative in FP8 along both axes, against the definition: interpreted on the CPU, and on a GPU."""

from __future__ import annotations

import pytest
import torch

import narrowgemm as ng
from narrowgemm.arch import detect
from narrowgemm.formats import FP8_ROW, FP8_TENSOR, Format, FP8_1x128
from narrowgemm.ops.activate_both import activate_backward, activate_both
from narrowgemm.ops.quantize_both import Both
from narrowgemm.reference import activate as reference
from narrowgemm.testing.numerics import calc_diff

from .._compile import compile_jobs

KINDS = [FP8_TENSOR, FP8_ROW, FP8_1x128, FP8_1x128.with_element("e5m2"), FP8_1x128.with_scale("e8m0")]
SIZES = [3, 0, 130, 1, 39]
OAI = {"activation": "swiglu_oai", "args": (1.7, 2.0)}


def inputs(on: str, inter: int, sizes: list[int] = SIZES, before: int = 0, after: int = 0, dtype: torch.dtype = torch.bfloat16):
    g = torch.Generator().manual_seed(inter)
    t = before + sum(sizes) + after
    h, dy = (torch.randn(t, k, generator=g) * 2 for k in (2 * inter, inter))
    offsets = torch.tensor([before, *sizes]).cumsum(0)
    return h.to(on, dtype), dy.to(on, dtype), ng.Offsets(offsets.to(on))


def backends(on: str, fmt: Format, inter: int) -> tuple[str, ...]:
    """Hopper's own kernel is not interpreted."""
    hopper = on == "cuda" and detect(torch.device(on)).target == "sm90"
    return ("triton", "gluon_sm90") if hopper and not (fmt.group[1] and inter % 128) else ("triton",)


def same(got: torch.Tensor, want: torch.Tensor, fmt: Format | None = None) -> None:
    """Exponentials are the device's own: values agree to the last bits of what they were rounded to before."""
    got, want = got.float().cpu(), want.float().cpu()
    assert got.shape == want.shape and torch.equal(got.isnan(), want.isnan())
    assert calc_diff(got, want) < (5e-6 if fmt is None else 1e-4)
    step = 2**-7 if fmt is None else 2**-2
    assert bool(((got - want).abs() <= step * want.abs() + 1e-3).all())


def check(got: Both, want: torch.Tensor, layout: ng.Offsets, fmt: Format) -> None:
    """Both copies hold `want` `[T, C]`, group by group, as `quantize_both` would have them."""
    exact = ng.quantize_both(want, fmt, layout.offsets, backend="reference")
    seg = got.layout.offsets.tolist()
    assert seg == exact.layout.offsets.tolist() and got.layout.alignment == 128
    lo, hi = int(layout.offsets[0]), int(layout.offsets[-1])
    same(got.rows.dequantize()[lo:hi], exact.rows.dequantize()[lo:hi], fmt)
    same(got.columns.dequantize()[:, :seg[-1]], exact.columns.dequantize()[:, :seg[-1]], fmt)
    for start, end, first, last in zip(seg, seg[1:], layout.offsets.tolist(), layout.offsets.tolist()[1:]):
        assert not got.columns.data[:, start + last - first:end].float().any(), "the rest of a segment is not zero"


@pytest.mark.parametrize("fmt", KINDS, ids=lambda f: f.name)
@pytest.mark.parametrize("options", [{}, OAI], ids=["swiglu", "oai"])
def test_both_copies(on, fmt, options):
    h, dy, layout = inputs(on, 128)
    for backend in backends(on, fmt, 128):
        check(activate_both(h, layout, fmt, backend=backend, **options), reference.activate(h, **options), layout, fmt)
        got = activate_backward(h, dy, layout, fmt, backend=backend, **options)
        check(got, reference.activate_backward(h, dy, **options), layout, fmt)


@pytest.mark.parametrize("fmt", [FP8_TENSOR, FP8_ROW, FP8_1x128], ids=lambda f: f.name)
def test_odd_widths_and_rows_outside_the_groups(on, fmt):
    """I of 72 (blocks of scales straddle gradients of gate and of up, so it goes in two steps); rows in front and behind must not count."""
    h, dy, layout = inputs(on, 72, [130, 5], before=3, after=4)
    h[:3] = 1e30
    h[-4:] = float("nan")
    for backend in backends(on, fmt, 128):
        check(activate_both(h, layout, fmt, backend=backend), reference.activate(h), layout, fmt)
    for backend in backends(on, fmt, 72):
        check(activate_backward(h, dy, layout, fmt, backend=backend), reference.activate_backward(h, dy), layout, fmt)


@pytest.mark.parametrize("options", [{}, OAI], ids=["swiglu", "oai"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_gradient_in_the_inputs_type(on, options, dtype):
    """Against autograd of the definition."""
    h, dy, layout = inputs(on, 72, dtype=dtype)
    got = activate_backward(h, dy, layout, backend="triton", **options)
    leaf = h.float().requires_grad_()
    reference.activate(leaf, **options).backward(dy.float())
    assert got.dtype == dtype
    same(got, leaf.grad)
    same(reference.activate_backward(h, dy, **options), leaf.grad)


def test_delayed_scaling(on):
    """The scale is taken as it is, what is beyond it saturates, and the largest magnitude is found on the way."""
    h, dy, layout = inputs(on, 128)
    want = reference.activate_backward(h, dy)
    scale = want.float().abs().max().reshape(1) / 448 / 4
    for backend in backends(on, FP8_TENSOR, 128):
        amax = torch.full((1,), 0.5, device=on)
        got = activate_backward(h, dy, layout, FP8_TENSOR, scale=scale, amax=amax, backend=backend)
        assert got.rows.data.float().abs().max() == 448 and torch.equal(got.rows.scale.reshape(1), scale)
        assert abs(float(amax) / float(want.float().abs().max()) - 1) < 2**-7
        again = torch.zeros(1, device=on)
        activate_backward(h, dy, layout, FP8_TENSOR, amax=again, backend=backend)
        assert torch.equal(again, amax)
        activate_both(h, layout, FP8_TENSOR, scale=scale, amax=amax, backend=backend)
        assert float(amax) >= float(again)


def test_segments_of_an_earlier_call(on):
    h, dy, layout = inputs(on, 128)
    for backend in backends(on, FP8_ROW, 128):
        first = activate_both(h, layout, FP8_ROW, backend=backend)
        second = activate_backward(h, dy, layout, FP8_ROW, segments=first.layout, backend=backend)
        assert second.layout.offsets.data_ptr() == first.layout.offsets.data_ptr()
        check(second, reference.activate_backward(h, dy), layout, FP8_ROW)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", [FP8_TENSOR, FP8_ROW, FP8_1x128], ids=lambda f: f.name)
@pytest.mark.parametrize("groups", [32, 33])
def test_many_groups(groups, fmt):
    h, dy, layout = inputs("cuda", 128, [i % 3 for i in range(groups)])
    for backend in backends("cuda", fmt, 128):
        check(activate_backward(h, dy, layout, fmt, backend=backend), reference.activate_backward(h, dy), layout, fmt)


def test_nothing_to_do(on):
    h, dy, layout = inputs(on, 128, [0, 0])
    for fmt in (FP8_TENSOR, FP8_ROW, FP8_1x128):
        got = activate_backward(h, dy, layout, fmt)
        assert got.layout.offsets.tolist() == [0, 0, 0] and got.rows.shape == (0, 256)


def test_refusals():
    h, dy, layout = inputs("cpu", 128)
    for error, call in [
        (ValueError, lambda: activate_both(h, layout, "mxfp8")),
        (ValueError, lambda: activate_both(h, layout, "fp8_128x128")),
        (ValueError, lambda: activate_both(h[:, :-1], layout, FP8_ROW)),
        (ValueError, lambda: activate_both(h, layout, FP8_ROW, activation="gelu")),
        (ValueError, lambda: activate_both(h, layout, FP8_ROW, args=(1.0, 2.0))),
        (ValueError, lambda: activate_both(h, layout, FP8_ROW, scale=torch.ones(1))),
        (TypeError, lambda: activate_both(h, layout, FP8_TENSOR, scale=torch.ones(1).double())),
        (ValueError, lambda: activate_both(h, layout, FP8_ROW, amax=torch.ones(1))),
        (TypeError, lambda: activate_both(h, layout.offsets, FP8_ROW)),
        (TypeError, lambda: activate_both(h.int(), layout, FP8_ROW)),
        (ValueError, lambda: activate_backward(h, dy[:, :-1], layout)),
        (TypeError, lambda: activate_backward(h, dy.float(), layout)),
        (ValueError, lambda: activate_backward(h, dy, layout, FP8_ROW, segments=ng.KGrouped(layout.offsets))),
    ]:
        with pytest.raises(error, match="expected"):
            call()


@pytest.mark.compile
@pytest.mark.parametrize("target", ["sm90", "sm100", "gfx942", "gfx950"])
def test_compiles_for_every_target(target):
    reports = compile_jobs(target, "tests.kernels.activate_both_jobs:jobs", sass=target == "sm90")
    assert {"both_kernel", "maxima_kernel", "scales_kernel", "segments_kernel", "zero_kernel"} == {r["kernel"] for r in reports}
    for r in reports:
        assert r["spills"] <= 8 and r["shared"] <= 65536 and not r.get("unwritten"), r


@pytest.mark.compile
@pytest.mark.parametrize("triton", ["oldest", pytest.param("newest", marks=pytest.mark.slow)])
def test_hopper_kernels_compile(triton):
    """Two blocks an SM."""
    reports = compile_jobs("sm90", "tests.kernels.gluon_sm90_quantize_both_jobs:activation_jobs", triton=triton, sass=True)
    assert {"front_kernel", "scales_kernel", "both_kernel"} == {r["kernel"] for r in reports}
    for r in reports:
        assert r["spills"] <= 24 and r["registers"] <= 128 and 2 * (r["shared"] + 1024) <= 228 << 10 and not r["unwritten"], r
