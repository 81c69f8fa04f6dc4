"""The definition of quantisation against independent arithmetic: every code, every rounding mode, every edge."""

from __future__ import annotations

import math
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from narrowgemm.formats import FORMATS, FP8_ROW, FP8_TENSOR, MXFP4, MXFP8, Format, FP8_1x128, FP8_128x128, ScaledTensor
from narrowgemm.reference.quantize import (
    E2M1_VALUES,
    MANTISSA_BITS,
    ROUNDINGS,
    cast_fp8,
    decode_e2m1,
    dequantize,
    encode_e2m1,
    pack_e2m1,
    quantize,
    unpack_e2m1,
)
from narrowgemm.scales import e8m0_to_float, float_to_e8m0

SCALED = [f for f in FORMATS.values() if f.scaled]
E8M0 = [f for f in SCALED if f.scale == "e8m0"]
FP8_FORMATS = [MXFP8, MXFP8.with_element("e5m2")]
NAMES = dict(ids=lambda f: f.name)


def nearest_even(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Index of the nearest of ascending `values` (index parity = code parity), ties to even, saturating; float64 exact."""
    x = x.double().clamp(float(values[0]), float(values[-1]))
    high = torch.searchsorted(values, x).clamp(1, len(values) - 1)
    low = high - 1
    down, up = x - values[low], values[high] - x
    return torch.where((down < up) | ((down == up) & (low % 2 == 0)), low, high)


# -- elements ----------------------------------------------------------------------------------------------------------


def test_e2m1_codes_round_trip():
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(encode_e2m1(decode_e2m1(codes)), codes)
    assert decode_e2m1(codes).tolist() == list(E2M1_VALUES) and math.copysign(1, float(decode_e2m1(codes)[8])) == -1


def test_e2m1_rounding_against_arithmetic():
    values = torch.tensor(E2M1_VALUES[:8], dtype=torch.float64)
    ties = (values[1:] + values[:-1]) / 2
    x = torch.cat([ties, values, torch.linspace(0, 8, 4097, dtype=torch.float64)]).float()
    x = torch.cat([x, torch.nextafter(x, torch.tensor(10.0)), torch.nextafter(x, torch.tensor(-10.0)).clamp_min(0)])
    assert torch.equal(encode_e2m1(x), nearest_even(x, values).to(torch.uint8))
    assert torch.equal(encode_e2m1(-x), nearest_even(x, values).to(torch.uint8) | 8)


def test_e2m1_special_values():
    x = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -0.1, 1e30])
    assert encode_e2m1(x).tolist() == [7, 7, 7, 15, 0, 8, 8, 7]


def test_e2m1_packing_puts_the_even_index_in_the_low_nibble():
    codes = torch.arange(16, dtype=torch.uint8).reshape(2, 8)
    packed = pack_e2m1(codes)
    assert packed.tolist() == [[0x10, 0x32, 0x54, 0x76], [0x98, 0xBA, 0xDC, 0xFE]]
    assert torch.equal(unpack_e2m1(packed), codes)
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pack_e2m1(unpack_e2m1(every)), every)
    with pytest.raises(ValueError, match="even"):
        pack_e2m1(codes[:, :3])


@pytest.mark.parametrize("fmt", FP8_FORMATS, **NAMES)
def test_fp8_codes_and_rounding(fmt: Format):
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    values = codes.view(fmt.elem.dtype).float()
    finite = values.isfinite()
    assert torch.equal(cast_fp8(values, fmt).view(torch.uint8)[finite], codes[finite])
    grid = values[:128][finite[:128]].double()
    assert float(grid[-1]) == fmt.elem.max
    ties = ((grid[1:] + grid[:-1]) / 2).float()
    x = torch.cat([ties, torch.nextafter(ties, torch.tensor(1e9)), torch.nextafter(ties, torch.tensor(0.0)),
                   torch.randn(4096).abs() * torch.exp(4 * torch.randn(4096)), torch.tensor([448, 449, 464, 465, 480, 1e30])])
    assert torch.equal(cast_fp8(x, fmt).view(torch.uint8), nearest_even(x, grid).to(torch.uint8))
    assert torch.equal(cast_fp8(-x, fmt).view(torch.uint8), nearest_even(x, grid).to(torch.uint8) | 128)


@pytest.mark.parametrize("fmt", FP8_FORMATS, **NAMES)
def test_fp8_saturates_and_keeps_nan_and_signed_zero(fmt: Format):
    top = fmt.elem.max
    x = torch.tensor([float("inf"), -float("inf"), top, top * 1.5, float("nan"), -float("nan"), 0.0, -0.0])
    got = cast_fp8(x, fmt)
    assert got.float()[:4].tolist() == [top, -top, top, top]
    assert got.view(torch.uint8)[4:].tolist() == [0x7F, 0x7F, 0, 128]


def test_e8m0_codes():
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    values = e8m0_to_float(codes)
    assert [float(v) for v in values[:255]] == [2.0 ** (c - 127) for c in range(255)]
    assert bool(values[255].isnan())
    assert torch.equal(float_to_e8m0(values), codes)
    for bad in (3.0, 0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="powers of two"):
            float_to_e8m0(torch.tensor([1.0, bad]))


# -- scales ------------------------------------------------------------------------------------------------------------


def floor_log2(x: Fraction) -> int:
    e = math.frexp(float(x))[1] - 1
    while Fraction(2) ** (e + 1) <= x:
        e += 1
    while Fraction(2) ** e > x:
        e -= 1
    return e


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.scaled], ids=lambda f: f.name)
def test_the_largest_float32_gives_a_finite_payload_and_scale(fmt: Format) -> None:
    """With E8M0 scales it is rounded to 2^128, which only float64 holds."""
    largest = torch.finfo(torch.float32).max
    for rounding in ("rceil", "floor", "even"):
        q = quantize(torch.full((2, 128), largest), fmt, rounding)
        wide = q.dequantize(torch.float64)
        top = float(wide.max())
        assert bool(wide.isfinite().all()) and 0.75 * largest < top <= 2.0**128
        assert (top == 2.0**128) == (fmt.scale == "e8m0" and rounding != "floor")
        assert bool((q.dequantize().isinf() == (wide == 2.0**128)).all())


def exact_code(amax: float, fmt: Format, rounding: str) -> int:
    """The E8M0 code by rational arithmetic, straight from the words of the definition."""
    a, elem = Fraction(amax), fmt.elem
    if a == 0:
        return 0
    if rounding == "rceil":
        e = floor_log2(a / Fraction(elem.max))
        e += Fraction(2) ** e < a / Fraction(elem.max)
    else:
        if rounding == "even":
            ulp = Fraction(2) ** (floor_log2(a) - MANTISSA_BITS[elem.name])
            a = round(a / ulp) * ulp  # Python rounds halves to even
        e = floor_log2(a) - elem.emax
    return min(max(e + 127, 0), 254)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("fmt", [MXFP8, MXFP8.with_element("e5m2"), MXFP4], **NAMES)
def test_e8m0_scale_at_every_boundary(fmt: Format, rounding: str):
    """Powers of two, the element's largest value, halfway points, and their neighbours, in every binade."""
    marks = []
    for e in range(-140, 128):
        for m in (1.0, fmt.elem.max / 2**fmt.elem.emax, 1.75, 1.5, 1.25, 1.875, 1.9375, 1.96875):
            marks.append(math.ldexp(m, e))
    amax = torch.tensor(marks, dtype=torch.float64).float()
    amax = torch.cat([amax, torch.nextafter(amax, torch.tensor(0.0)), torch.nextafter(amax, torch.tensor(3e38))])
    x = torch.zeros(len(amax), 32)
    x[:, 7] = -amax
    got = quantize(x, fmt, rounding, amax_clamp=0.0)
    want = [exact_code(float(a), fmt, rounding) for a in amax]
    assert got.scale[:, 0].tolist() == want
    payload = decode_e2m1(unpack_e2m1(got.data)) if fmt is MXFP4 else got.data.float()
    assert bool(payload.isfinite().all()) and bool(got.dequantize(torch.float64).isfinite().all())


@given(st.floats(min_value=0, max_value=3.4028234663852886e38, width=32), st.sampled_from(ROUNDINGS),
       st.sampled_from([MXFP8, MXFP8.with_element("e5m2"), MXFP4]))
def test_e8m0_scale_of_any_amax(amax, rounding, fmt):
    got = quantize(torch.tensor([[amax] + [0.0] * 31]), fmt, rounding, amax_clamp=0.0)
    assert int(got.scale) == exact_code(amax, fmt, rounding)


@pytest.mark.parametrize("fmt", E8M0, **NAMES)
def test_rceil_is_the_smallest_scale_that_saturates_nothing(fmt: Format):
    x = torch.randn(128, 256) * torch.exp(5 * torch.randn(128, 1))
    scale = e8m0_to_float(quantize(x, fmt, amax_clamp=0.0).scale)
    amax = x.abs().unflatten(1, (-1, fmt.group[1])).amax(-1)
    amax = amax.amax(0, keepdim=True) if fmt.group[0] == 128 else amax
    assert bool((amax <= scale * fmt.elem.max).all()) and bool((amax > scale / 2 * fmt.elem.max).all())


def test_fp32_scale_is_amax_over_max_and_the_payload_takes_its_reciprocal():
    x = torch.randn(3, 256) * 7
    got = quantize(x, FP8_1x128)
    for row in range(3):
        for block in range(2):
            part = x[row, block * 128:][:128]
            scale = part.abs().amax() / 448.0
            assert float(got.scale[row, block]) == float(scale)
            assert torch.equal(got.data[row, block * 128:][:128].float(), (part * (1.0 / scale)).to(got.data.dtype).float())


# -- formats, shapes, edges --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", SCALED, **NAMES)
@pytest.mark.parametrize("shape", [(1, 2), (128, 128), (3, 130), (129, 64), (2, 3, 70, 200), (0, 64), (2, 0, 64), (3, 0)])
def test_shapes_and_error(fmt: Format, shape: tuple[int, ...]):
    torch.manual_seed(0)
    x = torch.randn(shape)
    got = quantize(x, fmt)
    assert got.shape == x.shape and got.data.is_contiguous() and tuple(got.scale.shape) == fmt.scale_shape(x.shape)
    assert got.scale.dtype == (torch.float32 if fmt.scale == "fp32" else torch.uint8)
    error = got.dequantize() - x
    bound = {"e4m3": 2**-4, "e5m2": 2**-3, "e2m1": 2**-2}[fmt.element]
    assert bool((error.abs() <= bound * x.abs() + 1e-2).all() if fmt.element != "e2m1" else
                (error.abs() <= x.abs().amax() / 4 + 1e-6).all() if x.numel() else True)


@pytest.mark.parametrize("fmt", SCALED, **NAMES)
def test_blocks_are_independent(fmt: Format):
    """Each block is what it is when quantised alone, ragged ones as well."""
    rows, cols = 150, 300
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 9, cols)
    got = quantize(x, fmt)
    br, bc = (g or n for g, n in zip(fmt.group, (rows, cols)))
    for i in range(0, rows, br * 37 if br == 1 else br):
        for j in range(0, cols, bc):
            alone = quantize(x[i:i + br, j:j + bc], fmt)
            assert float(alone.scale) == float(got.scale[i // br, j // bc])
            assert torch.equal(alone.dequantize(), got.dequantize()[i:i + br, j:j + bc])


@pytest.mark.parametrize("fmt", SCALED, **NAMES)
def test_zeros_have_the_scale_of_the_clamp(fmt: Format):
    got = quantize(torch.zeros(4, 128), fmt)
    assert bool((got.dequantize() == 0).all())
    want = torch.tensor(1e-4) / fmt.elem.max
    scale = got.scale.flatten()[0]
    if fmt.scale == "fp32":
        assert float(scale) == float(want)
    else:
        value = float(e8m0_to_float(scale))
        assert value / 2 < float(want) <= value
    assert bool((quantize(torch.zeros(4, 128), fmt, amax_clamp=0.0).dequantize() == 0).all())


@pytest.mark.parametrize("fmt", SCALED, **NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_make_their_block_nan(fmt: Format, bad: float):
    x = torch.ones(256, 256)
    x[3, 200] = bad
    got = quantize(x, fmt)
    out = got.dequantize()
    br, bc = (g or 256 for g in fmt.group)
    block = out[3 // br * br:][:br, 200 // bc * bc:][:, :bc]
    assert bool(block.isnan().all()) and int(out.isnan().sum()) == block.numel()
    if fmt.element == "e2m1":
        assert bool((unpack_e2m1(got.data)[3, 192:224] == 7).all()) and int(got.scale[3, 6]) == 255
    else:
        assert bool((got.data.view(torch.uint8)[out.isnan()] == 0x7F).all())


@pytest.mark.parametrize("fmt", SCALED, **NAMES)
@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-20, 65504.0, 3.4e38])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_finite_input_never_becomes_infinite(fmt: Format, magnitude: float, rounding: str):
    x = torch.tensor([magnitude, -magnitude, magnitude / 3, 0.0]).repeat(2, 64)
    for clamp in (0.0, 1e-4):
        got = quantize(x, fmt, rounding, clamp)
        payload = decode_e2m1(unpack_e2m1(got.data)) if fmt.element == "e2m1" else got.data.float()
        assert bool(payload.isfinite().all()) and float(payload.abs().max()) <= fmt.elem.max


@pytest.mark.parametrize("fmt", SCALED, **NAMES)
def test_input_dtypes_and_strides_do_not_matter(fmt: Format):
    x = torch.randn(2, 40, 160).bfloat16().float()
    want = quantize(x, fmt)
    for same in (x.bfloat16(), x.mT.contiguous().mT, torch.cat([x, x], -1)[..., :160]):
        got = quantize(same, fmt)
        assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8)) and torch.equal(got.scale, want.scale)
    half = quantize(x.half(), fmt)
    assert torch.equal(half.dequantize(), quantize(x.half().float(), fmt).dequantize())


@given(st.integers(-8, 40), st.integers(0, 2**31), st.sampled_from(ROUNDINGS), st.sampled_from(E8M0))
def test_powers_of_two_only_move_e8m0_codes(shift, seed, rounding, fmt):
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(seed)) + 0.1
    a, b = quantize(x, fmt, rounding), quantize(x * 2.0**shift, fmt, rounding)
    assert torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8))
    assert torch.equal(a.scale.int() + shift, b.scale.int())


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=2, max_size=80).filter(lambda v: len(v) % 2 == 0),
       st.sampled_from(SCALED))
def test_error_is_within_half_a_step(values, fmt):
    """RCEIL and FP32 scales: |error| <= half the step of the element at that magnitude, plus half its least subnormal."""
    x = torch.tensor([values])
    got = quantize(x, fmt, amax_clamp=1e-30)
    error = (got.dequantize(torch.float64) - x.double()).abs()
    ones = ScaledTensor(torch.ones_like(x).to(torch.float8_e4m3fn), got.scale, Format("s", "e4m3", fmt.group, fmt.scale))
    least = dequantize(ones, torch.float64) * 2.0 ** {"e4m3": -9, "e5m2": -16, "e2m1": -1}[fmt.element]
    step = x.double().abs() * 2.0 ** -MANTISSA_BITS[fmt.element] + least
    assert bool((error <= step / 2 * (1 + 1e-6)).all())


# -- dequantise --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", E8M0, **NAMES)
def test_dequantize_is_exact_over_the_whole_range_of_scales(fmt: Format):
    if fmt.group[0] != 1:
        pytest.skip("the same arithmetic as 1x128")
    g = fmt.group[1]
    codes = torch.arange(0, 246, dtype=torch.int16).to(torch.uint8)
    data = torch.randint(0, 0x70, (246, g // fmt.elem.per_byte), dtype=torch.uint8)
    st_ = ScaledTensor(data if fmt.element == "e2m1" else data.view(fmt.elem.dtype), codes[:, None], fmt)
    values = decode_e2m1(unpack_e2m1(data)).double() if fmt.element == "e2m1" else st_.data.double()
    want = values * torch.exp2(codes.double() - 127)[:, None]
    assert torch.equal(dequantize(st_, torch.float64), want)
    fits = want.abs() < 3.4e38
    assert torch.equal(st_.dequantize().double()[fits], want[fits])


def test_dequantize_dtypes_and_expanded_scales():
    x = torch.randn(4, 256)
    q = quantize(x, FP8_TENSOR)
    shared = ScaledTensor.make(q.data, q.scale.reshape(()), FP8_TENSOR)
    assert torch.equal(shared.dequantize(), q.dequantize())
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(q.dequantize(torch.bfloat16), q.dequantize().bfloat16())
    per_row = quantize(x, FP8_ROW)
    assert torch.equal(per_row.dequantize(), per_row.data.float() * per_row.scale)
    assert torch.equal(ScaledTensor.make(x.bfloat16(), None, "bf16").dequantize(), x.bfloat16().float())
    block = quantize(torch.randn(130, 200), FP8_128x128)
    assert torch.equal(block.dequantize()[128:, 128:], block.data.float()[128:, 128:] * block.scale[1, 1])


@pytest.mark.parametrize(("x", "options", "error", "words"), [
    (torch.zeros(4), {}, ValueError, r"\[R, K\]"),
    (torch.zeros(4, 4, dtype=torch.int32), {}, TypeError, "int32"),
    (torch.zeros(4, 4, dtype=torch.float64), {}, TypeError, "float64"),
    ([1.0], {}, TypeError, "list"),
    (torch.zeros(4, 33), {"fmt": MXFP4}, ValueError, "even"),
    (torch.zeros(4, 32), {"fmt": "bf16"}, ValueError, "scaled format"),
    (torch.zeros(4, 32), {"fmt": "fp9"}, ValueError, "fp9"),
    (torch.zeros(4, 32), {"rounding": "up"}, ValueError, "'up'.*rceil"),
    (torch.zeros(4, 32), {"amax_clamp": -1.0}, ValueError, "-1.0"),
    (torch.zeros(4, 32), {"amax_clamp": float("nan")}, ValueError, "amax_clamp"),
    (torch.zeros(4, 32), {"amax_clamp": float("inf")}, ValueError, "amax_clamp"),
])
def test_bad_input(x, options, error, words):
    options = {"fmt": MXFP8, **options}
    with pytest.raises(error, match=words):
        quantize(x, **options)
