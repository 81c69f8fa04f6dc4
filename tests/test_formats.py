"""Formats, scale layouts, and `ScaledTensor.make`: everything a caller may bring, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from narrowgemm import quantize
from narrowgemm.formats import (
    BF16,
    FORMATS,
    FP8_ROW,
    FP8_TENSOR,
    MXFP4,
    MXFP8,
    Format,
    FP8_1x128,
    FP8_128x128,
    ScaledTensor,
    get_format,
)
from narrowgemm.prepack import prepack, unpack
from narrowgemm.scales import (
    e8m0_to_float,
    float_to_e8m0,
    mn_major_tma_aligned,
    normalize_scale,
    pack_ue8m0,
    tma_aligned_rows,
    unpack_ue8m0,
)

NAMES = dict(ids=lambda f: f.name)
E4M3, U8, F32, I32 = torch.float8_e4m3fn, torch.uint8, torch.float32, torch.int32


def payload(fmt: Format, *shape: int) -> torch.Tensor:
    *lead, k = shape
    return torch.zeros(*lead, k // fmt.elem.per_byte, dtype=fmt.elem.dtype)


def scale_of(fmt: Format, *shape: int) -> torch.Tensor:
    want = fmt.scale_shape(shape)
    count = int(torch.tensor(want).prod())
    if fmt.scale == "e8m0":
        return (torch.arange(count) % 250).to(U8).reshape(want)
    return torch.arange(1, count + 1, dtype=F32).reshape(want)


# -- formats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS.values(), **NAMES)
def test_names_are_keys_and_formats_hash(fmt: Format):
    assert get_format(fmt.name) is fmt and get_format(fmt) is fmt and hash(fmt) == hash(get_format(fmt.name))
    assert fmt.elem.max > 0 and fmt.elem.per_byte in (1, 2)


def test_there_and_back_is_the_same_format():
    for name, fmt in FORMATS.items():
        if name.startswith("fp8"):
            for element, scale in itertools.product(("e4m3", "e5m2"), ("fp32", "e8m0") if "128" in name else ("fp32",)):
                for other in (fmt.with_element(element).with_scale(scale), fmt.with_scale(scale).with_element(element)):
                    assert get_format(other.name) == other and (other.element, other.scale, other.group) == (element, scale, fmt.group)
    assert get_format("mxfp8:e5m2").with_element("e4m3") == MXFP8


@pytest.mark.parametrize(("fmt", "shape", "want"), [
    (FP8_TENSOR, (4, 256), (1, 1)), (FP8_TENSOR, (3, 4, 256), (3, 1, 1)), (FP8_ROW, (4, 256), (4, 1)),
    (FP8_1x128, (4, 257), (4, 3)), (FP8_128x128, (129, 128), (2, 1)), (FP8_128x128, (5, 128, 300), (5, 1, 3)),
    (MXFP8, (4, 100), (4, 4)), (MXFP4, (2, 3, 64), (2, 3, 2)), (FP8_1x128, (0, 256), (0, 2)), (FP8_1x128, (4, 0), (4, 0)),
])
def test_scale_shape(fmt, shape, want):
    assert fmt.scale_shape(shape) == want and fmt.scale_shape(torch.Size(shape)) == want


def test_storage_bytes():
    assert FP8_1x128.storage_bytes(128, 512) == 128 * 512 + 128 * 4 * 4
    assert MXFP4.storage_bytes(3, 64) == 3 * 32 + 3 * 2
    assert BF16.storage_bytes(3, 64) == 3 * 128
    assert FP8_TENSOR.storage_bytes(3, 64) == 3 * 64 + 4


def test_variants():
    assert FP8_TENSOR.with_element("e5m2") is not FP8_TENSOR and FP8_TENSOR.with_element("e5m2") == FORMATS["fp8_tensor:e5m2"]
    assert FP8_1x128.with_scale("e8m0") == FORMATS["fp8_1x128_ue8m0"]
    assert FP8_1x128.with_scale("e8m0").with_scale("fp32") == FP8_1x128 and FP8_1x128.with_scale("fp32") is FP8_1x128
    assert FP8_1x128.scaling_type == "BlockWise1x128" and MXFP8.scaling_type == "BlockWise1x32" and BF16.scaling_type == ""
    with pytest.raises(ValueError, match="e9m9"):
        FP8_ROW.with_element("e9m9")
    with pytest.raises(ValueError, match="fp16"):
        FP8_ROW.with_scale("fp16")
    with pytest.raises(ValueError, match=r"fp8_2x2.*fp8_1x128"):
        get_format("fp8_2x2")


# -- scale layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 16, 128, 130])
@pytest.mark.parametrize("dtype", [F32, U8])
def test_mn_major_tma_aligned(rows, dtype):
    scale = (torch.arange(2 * rows * 5) % 200).to(dtype).reshape(2, rows, 5)
    got = mn_major_tma_aligned(scale)
    assert torch.equal(got, scale) and got.dtype == dtype
    assert got.stride(-2) == 1 and got.stride(-1) == tma_aligned_rows(rows, dtype.itemsize)
    assert got.stride(-1) * dtype.itemsize % 16 == 0 and got.data_ptr() % 16 == 0
    assert mn_major_tma_aligned(got) is got


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8])
def test_packed_ue8m0_round_trip(count):
    codes = torch.randint(0, 255, (2, 6, count), dtype=torch.int16).to(U8)
    packed = pack_ue8m0(codes)
    assert packed.dtype == I32 and packed.shape == (2, 6, -(-count // 4))
    assert torch.equal(unpack_ue8m0(packed, count), codes)
    assert packed.view(U8)[0, 0, 0] == codes[0, 0, 0]                    # lowest byte first
    if count % 4:
        assert bool((packed.view(U8)[..., count:] == 127).all())         # filled up with 1.0
    assert torch.equal(unpack_ue8m0(packed.mT.contiguous().mT, count), codes)


LAYOUTS = [FP8_1x128, FP8_128x128, MXFP8, MXFP4, FP8_1x128.with_scale("e8m0"), FP8_ROW]


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("fmt", LAYOUTS, **NAMES)
def test_make_takes_every_layout_without_a_copy(fmt: Format, lead: tuple[int, ...]):
    shape = (*lead, 260, 640)
    data, scale = payload(fmt, *shape), scale_of(fmt, *shape)
    stored = scale.mT.contiguous()
    for given in (scale, stored, stored.mT, mn_major_tma_aligned(scale)):
        for layout in ("auto", "transposed" if given is stored else "row_major"):
            got = ScaledTensor.make(data, given, fmt, scale_layout=layout)
            assert got.shape == torch.Size(shape) and torch.equal(got.scale, scale)
            assert got.data.data_ptr() == data.data_ptr() and got.scale.data_ptr() == given.data_ptr()


@pytest.mark.parametrize("fmt", [MXFP8, MXFP4, FP8_1x128.with_scale("e8m0"), FP8_128x128.with_scale("e8m0")], **NAMES)
def test_make_takes_packed_and_e8m0_dtypes(fmt: Format):
    data, scale = payload(fmt, 256, 640), scale_of(fmt, 256, 640)
    for layout in ("auto", "packed_ue8m0"):
        assert torch.equal(ScaledTensor.make(data, pack_ue8m0(scale), fmt, scale_layout=layout).scale, scale)
    typed = scale.view(torch.float8_e8m0fnu)
    assert torch.equal(ScaledTensor.make(data, typed, fmt).scale, scale)
    as_float = e8m0_to_float(scale)
    assert ScaledTensor.make(data, as_float, fmt).scale.dtype == F32


def test_a_square_scale_is_row_major_unless_said_otherwise():
    data = payload(FP8_128x128, 256, 256)
    scale = scale_of(FP8_128x128, 256, 256)
    assert torch.equal(ScaledTensor.make(data, scale, FP8_128x128).scale, scale)
    assert torch.equal(ScaledTensor.make(data, scale, FP8_128x128, scale_layout="transposed").scale, scale.mT)


def test_tensor_and_row_scales():
    data = payload(FP8_TENSOR, 3, 4, 32)
    for scale in (2.0, torch.tensor(2.0), torch.full((1,), 2.0), torch.full((1, 1), 2.0)):
        assert ScaledTensor.make(data, scale, FP8_TENSOR).scale.tolist() == [[[2.0]]] * 3
    per_group = torch.tensor([1.0, 2.0, 3.0])
    assert ScaledTensor.make(data, per_group, FP8_TENSOR).scale.flatten().tolist() == [1.0, 2.0, 3.0]
    rows = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(ScaledTensor.make(data, rows, FP8_ROW).scale, rows.unsqueeze(-1))
    with pytest.raises(ValueError, match=r"elements: got 2, expected 1 or 3"):
        ScaledTensor.make(data, torch.ones(2), FP8_TENSOR)


def test_normalize_fills_from_a_number():
    got = normalize_scale(0.5, (4, 256), FP8_1x128, torch.device("cpu"))
    assert got.shape == (4, 2) and bool((got == 0.5).all())


# -- payloads ----------------------------------------------------------------------------------------------------------


def test_payload_bytes_are_viewed():
    raw = torch.arange(256, dtype=torch.int16).to(U8).reshape(4, 64)
    for given in (raw, raw.view(torch.int8), raw.view(E4M3)):
        assert ScaledTensor.make(given, torch.ones(4, 1), FP8_ROW).data.dtype == E4M3
    for given in (raw, raw.view(torch.int8), raw.view(I32)):
        got = ScaledTensor.make(given, torch.full((4, 4), 127, dtype=U8), MXFP4)
        assert got.data.dtype == U8 and got.shape == (4, 128) and torch.equal(got.data, raw)


def test_shape_major_index_and_transpose():
    x = ScaledTensor.make(payload(FP8_1x128, 2, 4, 256), scale_of(FP8_1x128, 2, 4, 256), FP8_1x128)
    assert x.major == "k" and x[1].shape == (4, 256) and torch.equal(x[1].scale, x.scale[1])
    t = x[0].transpose()
    assert t.shape == (256, 4) and t.format.group == (128, 1) and t.major == "mn" and torch.equal(t.scale, x.scale[0].mT)
    w = ScaledTensor.make(payload(FP8_128x128, 256, 128), scale_of(FP8_128x128, 256, 128), FP8_128x128)
    assert w.transpose().format is FP8_128x128 and w.to("cpu").shape == w.shape
    four = ScaledTensor.make(payload(MXFP4, 4, 64), torch.full((4, 2), 127, dtype=U8), MXFP4)
    assert four.shape == (4, 64)
    with pytest.raises(ValueError, match="transpose"):
        four.transpose()
    with pytest.raises(ValueError, match="at least 3"):
        four[0]


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "data", "scale", "error", "words"), [
    (FP8_1x128, torch.zeros(4, 256), torch.ones(4, 2), TypeError, "float32.*float8_e4m3fn"),
    (FP8_1x128, torch.zeros(4, 256).to(torch.float8_e5m2), torch.ones(4, 2), TypeError, "float8_e5m2"),
    (FP8_1x128, [1, 2], torch.ones(4, 2), TypeError, "list"),
    (FP8_1x128, torch.zeros(256).to(E4M3), torch.ones(4, 2), ValueError, r"\[R, K\]"),
    (FP8_1x128, payload(FP8_1x128, 4, 256), None, ValueError, r"None.*\(4, 2\)"),
    (FP8_1x128, payload(FP8_1x128, 4, 256), torch.ones(4, 3), ValueError, r"\(4, 3\).*\(4, 2\).*\(2, 4\)"),
    (FP8_1x128, payload(FP8_1x128, 4, 256), torch.ones(4, 2).double(), TypeError, "float64"),
    (FP8_1x128, payload(FP8_1x128, 4, 256), torch.ones(4, 2).bfloat16(), TypeError, "bfloat16"),
    (FP8_1x128, payload(FP8_1x128, 4, 256), torch.ones(4, 2).to(U8), TypeError, "uint8"),
    (FP8_1x128, payload(FP8_1x128, 4, 256), torch.ones(4, 1).to(I32), ValueError, "E8M0"),
    (MXFP8, payload(MXFP8, 4, 256), torch.ones(4, 3).to(I32), ValueError, r"\(4, 3\).*\(4, 2\)"),
    (MXFP4, torch.zeros(4, 256).to(E4M3), torch.ones(4, 8), TypeError, "packed"),
    (BF16, torch.zeros(4, 256).bfloat16(), torch.ones(4, 2), ValueError, "None"),
    (FP8_1x128, payload(FP8_1x128, 4, 256), torch.ones(4, 2, device="meta"), ValueError, "meta"),
])
def test_refusals(fmt, data, scale, error, words):
    with pytest.raises(error, match=words):
        ScaledTensor.make(data, scale, fmt)


@pytest.mark.parametrize(("dtype", "hint"), [
    (torch.float8_e5m2, "the format of an E5M2 payload is 'fp8_1x128:e5m2'"),
    (torch.float8_e4m3fnuz, "FNUZ codes stand for half the value"),
])
def test_a_payload_of_another_fp8_type_is_told_what_to_do(dtype: torch.dtype, hint: str):
    with pytest.raises(TypeError, match=hint):
        ScaledTensor.make(torch.zeros(4, 256).to(dtype), torch.ones(4, 2), FP8_1x128)


def test_layout_names_are_checked():
    data, scale = payload(MXFP8, 4, 128), scale_of(MXFP8, 4, 128)
    with pytest.raises(ValueError, match=r"scale_layout.*'column'"):
        ScaledTensor.make(data, scale, MXFP8, scale_layout="column")
    with pytest.raises(TypeError, match=r"int32"):
        ScaledTensor.make(data, scale, MXFP8, scale_layout="packed_ue8m0")
    with pytest.raises(ValueError, match="packed_ue8m0"):
        ScaledTensor.make(data, pack_ue8m0(scale), MXFP8, scale_layout="row_major")
    with pytest.raises(ValueError, match="transposed"):
        ScaledTensor.make(payload(MXFP8, 4, 64), scale_of(MXFP8, 4, 64), MXFP8, scale_layout="transposed")


def test_fp32_scales_are_never_rounded_to_e8m0():
    exact = torch.tensor([1.0, 0.5, 2.0**-127, 2.0**127, float("nan")])
    assert float_to_e8m0(exact).tolist() == [127, 126, 0, 254, 255]
    for bad in (0.3, 0.0, -2.0, float("inf"), 2.0**-128):
        with pytest.raises(ValueError, match="requantise"):
            float_to_e8m0(torch.tensor([bad]))


@pytest.mark.parametrize("scales", ["codes", "float8_e8m0fnu", "fp32", "packed", "mn_major", "transposed", "packed_mn_major"])
@pytest.mark.parametrize("payload_kind", [torch.uint8, torch.int8, torch.int32, torch.float4_e2m1fn_x2], ids=str)
@pytest.mark.parametrize("lead", [(), (3,)], ids=["dense", "experts"])
def test_mxfp4_comes_in_every_way(lead, payload_kind, scales):
    """Every byte of E2M1 and every scale code, the same values and the same packed weight whichever way they come."""
    g = torch.Generator().manual_seed(5)
    data = torch.randint(0, 256, (*lead, 20, 80), generator=g, dtype=U8)
    data[..., 0, :] = torch.arange(80)
    code = torch.randint(30, 128, (*lead, 20, 5), generator=g, dtype=U8)
    want = ScaledTensor(data, code, MXFP4)
    given = {"codes": code, "float8_e8m0fnu": code.view(torch.float8_e8m0fnu), "fp32": e8m0_to_float(code), "packed": pack_ue8m0(code),
             "mn_major": mn_major_tma_aligned(code), "transposed": code.mT.contiguous(),
             "packed_mn_major": mn_major_tma_aligned(pack_ue8m0(code))}[scales]
    got = ScaledTensor.make(data.view(payload_kind), given, MXFP4)
    assert got.shape == (*lead, 20, 160) and torch.equal(got.data, data)
    assert torch.equal(got.dequantize(), want.dequantize())
    a, b = prepack(got), prepack(want)
    assert torch.equal(a.data, b.data) and torch.equal(a.scale, b.scale)
    assert torch.equal(unpack(a).data, data) and torch.equal(unpack(a).scale, code)


def test_what_moves_a_tensor_is_a_device() -> None:
    q = quantize(torch.randn(2, 4, 64), MXFP8)
    for x in (q, prepack(q)):
        with pytest.raises(TypeError, match=r"device: got torch\.bfloat16, expected a device, not a dtype"):
            x.to(torch.bfloat16)  # type: ignore[arg-type]
        assert x.to("cpu").device == x.device
    with pytest.raises(TypeError, match=r"index of a ScaledTensor: got \(0, 1\), expected one index"):
        q[0, 1]  # type: ignore[index]
