"""Both FP8 copies of a tensor against the definition, bit for bit: interpreted on the CPU, and on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import narrowgemm as ng
from narrowgemm.arch import detect
from narrowgemm.formats import FP8_ROW, FP8_TENSOR, Format, FP8_1x128, FP8_128x128, ScaledTensor
from narrowgemm.ops.quantize_both import Both, quantize_both
from narrowgemm.ops.steps import aligned
from narrowgemm.reference import quantize as reference

from .._compile import compile_jobs

KINDS = [FP8_TENSOR, FP8_ROW, FP8_1x128, FP8_1x128.with_element("e5m2"), FP8_1x128.with_scale("e8m0")]
SIZES = [3, 0, 128, 0, 130, 39]


def sample(*shape: int, device: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    g = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=g) * torch.exp(2 * torch.randn(shape, generator=g))
    x[..., 1, :] = 0
    x[..., 2, 0] = -0.0
    return x.to(device, dtype)


def raw(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8).cpu()


def equal(x: ScaledTensor, y: ScaledTensor, columns: slice = slice(None)) -> None:
    assert x.format == y.format
    per = x.format.group[1]
    scales = slice(columns.start // per, columns.stop // per) if per and columns.stop else slice(None)
    assert torch.equal(raw(x.scale[..., scales]), raw(y.scale[..., scales])), "scales differ"
    assert torch.equal(raw(x.data[..., columns]), raw(y.data[..., columns])), "payloads differ"


def offsets_of(sizes: list[int], device: str, first: int = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor([first, *sizes], device=device).cumsum(0).to(dtype)


def hopper_takes(x: torch.Tensor, fmt: Format) -> bool:
    """Whether the kernel of Hopper's own computes it here: it is not interpreted."""
    return x.is_cuda and detect(x.device).target == "sm90" and fmt.group != (128, 128) and aligned(x)


def check(x: torch.Tensor, fmt: Format, offsets: torch.Tensor | None = None, **options) -> Both:
    backends = ("triton", "gluon_sm90") if hopper_takes(x, fmt) else ("triton",)
    return [check_one(x, fmt, offsets, b, **options) for b in backends][-1]


def check_one(x: torch.Tensor, fmt: Format, offsets: torch.Tensor | None, backend: str, **options) -> Both:
    got, want = (quantize_both(x, fmt, offsets, backend=b, **options) for b in (backend, "reference"))
    if offsets is None:
        equal(got.rows, want.rows)
        equal(got.columns, want.columns)
        return got
    lo, hi = int(offsets[0]), int(offsets[-1])
    cut = lambda t: ScaledTensor(t.data[lo:hi], t.scale[lo:hi] if fmt.group[0] else t.scale, fmt)  # noqa: E731
    equal(cut(got.rows), cut(want.rows))
    assert torch.equal(got.layout.offsets, want.layout.offsets) and got.layout.alignment == 128
    equal(got.columns, want.columns, slice(0, int(want.layout.offsets[-1])))
    return got


@pytest.mark.parametrize("fmt", KINDS, ids=lambda f: f.name)
def test_groups_of_any_size(on, fmt):
    both = check(sample(sum(SIZES), 200, device=on), fmt, offsets_of(SIZES, on))
    starts = both.layout.offsets.tolist()
    assert starts == [0, 128, 128, 256, 256, 512, 640]
    assert not both.columns.data[:, 3:128].float().any(), "the rest of a segment is not zero"


@pytest.mark.parametrize("fmt", KINDS, ids=lambda f: f.name)
def test_copies_hold_what_quantize_gives(on, fmt):
    """Rows are `quantize` of the tensor; a group's columns are its rows again, to within the format's rounding."""
    x = sample(sum(SIZES), 256, device=on)
    both = quantize_both(x, fmt, offsets_of(SIZES, on), backend="triton")
    equal(both.rows, ng.quantize(x, fmt))
    start = 0
    dense = both.columns.dequantize()
    for size, at in zip(SIZES, both.layout.offsets.tolist()):
        part = x[start : start + size].float().T
        if size:
            error = (dense[:, at : at + size] - part).norm() / part.norm()
            assert error < (0.04 if fmt.element == "e4m3" else 0.08)
        start += size


@pytest.mark.parametrize("fmt", [FP8_ROW, FP8_1x128, FP8_1x128.with_scale("e8m0")], ids=lambda f: f.name)
def test_what_is_not_finite(on, fmt):
    """NaN and infinity make their own blocks NaN, along the rows and along the columns, and never the fill of a segment."""
    x = sample(sum(SIZES), 200, device=on)
    x[130, 7], x[140, 150], x[1, 3], x[170, 9] = float("nan"), -float("inf"), float("inf"), 1e-30
    both = check(x, fmt, offsets_of(SIZES, on))
    assert not both.columns.data[:, 3:128].float().any() and both.rows.data[130].float().isnan().any()


@pytest.mark.parametrize("fmt", KINDS, ids=lambda f: f.name)
def test_every_bf16_value(on, fmt):
    """Next to their neighbours and next to any others; without those that are not finite, too, which spoil a tensor. Interpreted, one
    in 16."""
    every = torch.arange(-32768, 32768, 1 if on == "cuda" else 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    mixed = every[torch.randperm(every.numel(), generator=torch.Generator().manual_seed(1))].view(-1, 128)
    for x in (every.view(-1, 128), mixed, mixed.where(mixed.isfinite(), 0.0)):
        check(x.to(on), fmt, offsets_of([19, len(x) - 19], on))


def test_rows_outside_the_groups(on):
    x = sample(300, 128, device=on)
    x[:5] = 1e30
    x[290:] = float("nan")
    for fmt in (FP8_ROW, FP8_TENSOR, FP8_1x128):
        both = check(x, fmt, offsets_of([100, 185], on, first=5, dtype=torch.int32))
        assert both.columns.scale.isfinite()[..., : 3 if fmt.group[1] else 1].all()


@pytest.mark.parametrize("fmt", [FP8_TENSOR, FP8_ROW, FP8_1x128, FP8_128x128], ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(130, 72), (2, 64, 200), (3, 128, 128)])
def test_weights(on, fmt, shape):
    """Without groups the columns are the transpose, matrix by matrix, rows of it on 16 bytes."""
    both = check(sample(*shape, device=on), fmt)
    assert both.layout is None and both.columns.shape == (*shape[:-2], shape[-1], shape[-2])
    assert both.columns.data.stride(-2) % 16 == 0
    if fmt.group[0] == fmt.group[1]:
        assert torch.equal(raw(both.columns.data), raw(both.rows.data.mT))


def test_given_scale(on):
    """Delayed scaling: the scale is taken as it is, and what is beyond the range saturates."""
    x = sample(200, 128, device=on)
    scale = (x.abs().max().float() / 448 / 4).reshape(1)
    both = check(x, FP8_TENSOR, offsets_of([150, 50], on), scale=scale)
    assert both.rows.data.float().abs().max() == 448 and both.rows.scale.item() == scale.item()
    check(sample(2, 130, 64, device=on), FP8_TENSOR, scale=torch.tensor([0.01, 3.0], device=on))
    bad = check(x, FP8_TENSOR, offsets_of([150, 50], on), scale=torch.tensor([float("nan")], device=on))
    assert bad.rows.data.float().isnan().all()


def test_largest_magnitude_on_the_way(on):
    """Rows of no group don't count, and what was there before is only raised."""
    x = sample(200, 128, device=on)
    x[190:] = 1e9
    fast = "gluon_sm90" if hopper_takes(x, FP8_TENSOR) else "triton"
    for first, backend in ((0.5, "triton"), (0.5, "reference"), (1e6, "triton"), (0.5, fast), (1e6, fast)):
        amax = torch.full((1,), first, device=on)
        quantize_both(x, FP8_TENSOR, offsets_of([150, 40], on), scale=torch.ones(1, device=on), amax=amax, backend=backend)
        assert float(amax) == max(first, float(x[:190].abs().max()))


@pytest.mark.parametrize("fmt", [FP8_TENSOR, FP8_128x128, FP8_ROW], ids=lambda f: f.name)
def test_fp32_weights(on, fmt):
    """Master weights: one conversion may feed both copies."""
    check(sample(2, 256, 192, device=on, dtype=torch.float32), fmt)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_inputs(on, dtype):
    wide = sample(140, 160, device=on, dtype=dtype)[:, :150]
    check(wide, FP8_1x128, offsets_of([140], on))


def test_bad_sizes_stay_inside(on):
    """Sizes that lie are clamped: nothing outside the tensors is touched, and what fits is right."""
    x = sample(100, 128, device=on)
    for bad in ([-5, 50, 300], [0, 90, 20, 100], [200, 300, 400]):
        backend = "gluon_sm90" if hopper_takes(x, FP8_1x128) else "triton"
        both = quantize_both(x, FP8_1x128, torch.tensor(bad, device=on), backend=backend)
        assert 0 <= int(both.layout.offsets[-1]) <= both.columns.shape[1]


@pytest.mark.parametrize("sizes", [[0, 0], []])
def test_nothing_to_do(on, sizes):
    both = quantize_both(torch.empty(0, 128, dtype=torch.bfloat16, device=on), FP8_1x128, offsets_of(sizes, on))
    assert both.layout.offsets.tolist() == [0] * (len(sizes) + 1)


def test_many_groups(on):
    sizes = [(i * 7) % 5 if i % 8 == 0 else 0 for i in range(300)]     # most of them empty: each that is not takes a tile
    check(sample(sum(sizes), 128, device=on), FP8_ROW, offsets_of(sizes, on))


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [31, 32, 33, 300])
def test_as_many_groups_as_a_warp_knows(groups):
    sizes = [(i * 7) % 5 for i in range(groups)]
    for fmt in KINDS:
        check(sample(sum(sizes), 128, device="cuda"), fmt, offsets_of(sizes, "cuda"))


@pytest.mark.parametrize(("sizes", "first"), [(SIZES, 0), ([300, 7], 5), ([0, 0], 3), ([1] * 40, 0), ([5000], 0), ([], 0)])
def test_tiles_of_groups(on, sizes, first):
    """What Hopper's kernels have looked up for them: segments, and each tile's first row and its group's end. And zeros, and 1 / scale."""
    from narrowgemm.kernels.gluon.sm90.both_tile import front

    offsets, rows, groups = offsets_of(sizes, on, first), first + sum(sizes) + 2, len(sizes)
    tiles = -(-rows // 128) + groups
    for fresh in (True, False):
        segments = torch.full((groups + 1,), -7, dtype=torch.int32, device=on)
        table, zeros = (torch.full((n,), 9, dtype=torch.int32, device=on) for n in (2 * tiles, 1500))
        front(offsets, segments, table, zeros, zeros, rows, groups, 128 * tiles, tiles, 1400, not fresh, 0, True, fresh, False).run()
        want, starts = [], [0]
        for low, high in zip(offsets.tolist(), offsets.tolist()[1:]):
            want += [[row, high] for row in range(low, high, 128)]
            starts.append(128 * len(want))
        assert table.view(-1, 2)[:len(want)].tolist() == want
        assert segments.tolist() == (starts if fresh else [-7] * (groups + 1))
        assert bool((zeros[:1400] == (0 if fresh else -1)).all()) and bool((zeros[1400:] == 9).all())
    scales = torch.tensor([2.0, 3.0, float("inf"), float("nan"), 0.0], device=on)
    made = torch.zeros(5, dtype=torch.int32, device=on)
    front(scales, scales, made, made, scales, 1, 0, 0, 0, 0, False, 5, False, False, True).run()
    assert torch.equal(made.view(torch.float32).cpu().nan_to_num(nan=7.0, posinf=8.0), torch.tensor([0.5, 1 / 3, 7.0, 7.0, 8.0]))


def test_refusals():
    x = torch.zeros(8, 128, dtype=torch.bfloat16)
    offsets = torch.tensor([0, 8])
    for error, call in [
        (ValueError, lambda: quantize_both(x, "mxfp8")),
        (ValueError, lambda: quantize_both(x, FP8_128x128, offsets)),
        (ValueError, lambda: quantize_both(x[None], FP8_ROW, offsets)),
        (ValueError, lambda: quantize_both(x.T, FP8_ROW)),
        (TypeError, lambda: quantize_both(x, FP8_ROW, offsets.float())),
        (ValueError, lambda: quantize_both(x, FP8_ROW, scale=torch.ones(1))),
        (ValueError, lambda: quantize_both(x, FP8_TENSOR, scale=torch.ones(3))),
        (ValueError, lambda: quantize_both(x, FP8_TENSOR, amax=torch.ones(1))),
        (ValueError, lambda: quantize_both(x, FP8_TENSOR, scale=torch.ones(1), amax=torch.ones(2))),
        (TypeError, lambda: quantize_both(x, FP8_TENSOR, scale=torch.ones(1).double())),
        (TypeError, lambda: quantize_both(x.int(), FP8_TENSOR)),
    ]:
        with pytest.raises(error, match="expected"):
            call()


def test_quotients_without_divisions():
    """What NVIDIA kernels make of fused multiply-adds (`quantize_device.over_top`, `inverse_of`), in FP64, for every significand: x / top and 1 / x, correctly rounded."""
    f32, f64 = np.float32, np.float64
    x = (np.arange(1 << 23, dtype=np.int32) | (127 << 23)).view(f32)
    wide = x.astype(f64)
    fma = lambda a, b, c: (a.astype(f64) * b + c).astype(f32)  # noqa: E731
    for top in (448.0, 57344.0):
        one = f64(f32(1 / top))
        q = (wide * one).astype(f32)
        assert np.array_equal(fma(fma(q, f64(-top), wide), one, q.astype(f64)), x / f32(top))
    want = f32(1) / x
    for units in (-2, 2):
        r = (want.view(np.int32) + np.int32(units)).view(f32)
        for _ in range(2):
            r = fma(r, fma(-x, r.astype(f64), 1.0).astype(f64), r.astype(f64))
        # FP64 rounds a fused multiply-add once more than the device: two of these are ties only then
        wrong = np.flatnonzero(r != want).tolist()
        assert wrong == [8139319, 8258047, 8388607]
    assert want[-1].view(np.int32) == ((253 - 127) << 23) + 1


@pytest.mark.gpu
def test_scales_of_many_significands():
    """Bit for bit, scales and payloads, of 2^20 significands of FP32 maxima, the last ones among them."""
    if detect(torch.device("cuda")).target != "sm90":
        pytest.skip("Hopper's kernel")
    most = torch.randperm(1 << 23, device="cuda")[: 1 << 20]
    most[:64] = (1 << 23) - 1 - torch.arange(64, device="cuda")
    most = (most.int() | (127 + torch.arange(1 << 20, device="cuda", dtype=torch.int32) % 7 << 23)).view(torch.float32)
    x = torch.rand(1 << 17, 8, 128, device="cuda")
    x[..., 5] = most.view(1 << 17, 8)
    x = x.flatten(1)
    for fmt in (FP8_1x128, FP8_1x128.with_element("e5m2")):
        want = reference.quantize(x, fmt)
        for got in (quantize_both(x, fmt, backend="gluon_sm90").rows, ng.quantize(x, fmt, backend="triton")):
            assert torch.equal(got.scale, want.scale) and torch.equal(raw(got.data), raw(want.data))


@pytest.mark.compile
@pytest.mark.parametrize("target", ["sm90", "sm100", "gfx942", "gfx950"])
def test_compiles_for_every_target(target):
    """No spills, little shared memory."""
    reports = compile_jobs(target, "tests.kernels.quantize_both_jobs:jobs", sass=target == "sm90")
    assert {"segments_kernel", "zero_kernel", "amax_kernel", "both_kernel"} == {r["kernel"] for r in reports}
    for r in reports:
        assert r["spills"] == 0 and r["shared"] <= 32768 and not r.get("unwritten"), r


@pytest.mark.compile
@pytest.mark.parametrize("triton", ["oldest", pytest.param("newest", marks=pytest.mark.slow)])
def test_hopper_kernels_compile(triton):
    """No spills, and two blocks an SM, or one of FP32."""
    reports = compile_jobs("sm90", "tests.kernels.gluon_sm90_quantize_both_jobs:jobs", triton=triton, sass=True)
    assert {"front_kernel", "scales_kernel", "both_kernel"} == {r["kernel"] for r in reports}
    for r in reports:
        blocks = 2 if r["shared"] <= 113 << 10 else 1
        assert r["spills"] == 0 and r["registers"] <= 256 // blocks and not r["unwritten"], r
