"""Prepacked weights: bits that come back, values that the kernels' bit tricks give, what is refused, what is stored."""

from __future__ import annotations

import io
import pickle
import sys

import pytest
import torch
from torch import Tensor

from narrowgemm import (
    MXFP4,
    MXFP8,
    FP8_128x128,
    Offsets,
    PackedWeight,
    ScaledTensor,
    Unsupported,
    gemm,
    grouped_gemm,
    prepack,
    quantize,
    unpack,
)
from narrowgemm.formats import Format
from narrowgemm.prepack import PAIRS, PREPACK, row_order
from narrowgemm.prepack_bits import FP8_PREPACK, ROWS_PREPACK
from narrowgemm.prepack_scales import BIAS, power_of_two, unpack_scale
from narrowgemm.scales import e8m0_to_float

SHAPES = ((3, 128, 256), (2, 100, 360), (64, 32), (1, 2, 32))


def weights(shape: tuple[int, ...], fmt: Format, low: int = 100, high: int = 128, seed: int = 0) -> ScaledTensor:
    """Random bits, no NaN among them; scale codes in [low, high)."""
    g = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (*shape[:-1], shape[-1] // fmt.elem.per_byte), dtype=torch.uint8, generator=g)
    if fmt.element == "e4m3":
        data[(data & 127) == 127] = 3
    scale = torch.randint(low, high, fmt.scale_shape(shape), dtype=torch.uint8, generator=g)
    return ScaledTensor(data.view(fmt.elem.dtype), scale, fmt)


def same(x: ScaledTensor, y: ScaledTensor) -> bool:
    assert x.scale is not None and y.scale is not None
    return (x.format == y.format and x.shape == y.shape and torch.equal(x.data.view(torch.uint8), y.data.view(torch.uint8))
            and torch.equal(x.scale, y.scale))


def bf16(bits: Tensor) -> Tensor:
    return (bits.to(torch.int32) << 16).view(torch.float32)


def device_values(p: PackedWeight) -> Tensor:
    """What the kernels expand `p` to, FP32 `[E, NT * 64, K]`, by the shifts, masks and product of `narrow_expand_device`, times the
    row's factor: an independent reading of the order, element by element of a thread's 16 bytes."""
    e4m3 = p.format.element == "e4m3"
    groups, tiles, chunks = p.data.shape[:3]
    words = p.data.reshape(groups, tiles, chunks, -1, 64, 4, 16).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    if e4m3:
        regs = [words & 0x87F087F0,
                (words << 1) & 0x80008000 | (words >> 3) & 0x07000700 | (words << 4) & 0x00F000F0]
    else:
        regs = [words & 0x81C081C0, (words << 3) & 0x81C081C0, (words << 6) & 0x81C081C0,
                (words << 1) & 0x80008000 | (words >> 3) & 0x01800180 | (words >> 7) & 0x00400040]
    r = torch.stack(regs, -1)                                                    # E tile chunk sub row block word reg
    both = torch.stack((r & 0xFFFF, (r >> 16) & 0xFFFF), -1)                     # ... reg half
    fields = unpack_scale(p.scale).reshape(groups, tiles, 64, -1, 4)[:, :, :, :chunks].permute(0, 1, 3, 2, 4)
    scale = bf16(fields.to(torch.int32) << 7)[:, :, :, None, :, :, None, None, None]
    placed = bf16(both) * scale                                                  # FP32 is exact where BF16 is
    assert torch.equal(placed, placed.bfloat16().float()), "the product is not exact in BF16"
    # half h of register r of a word holds which K of the block: inverse of prepack's spread
    out = torch.empty(groups, tiles, chunks, 64, 4, 32)
    for sub in range(2 if e4m3 else 1):
        for word in range(4):
            for reg in range(len(regs)):
                for half in (0, 1):
                    k = sub * 16 + word * 4 + reg * 2 + half if e4m3 else word * 8 + reg * 2 + half
                    out[..., k] = placed[:, :, :, sub, :, :, word, reg, half]
    values = out.permute(0, 1, 3, 2, 4, 5).reshape(groups, tiles * 64, chunks * 128)
    return values if p.factor is None else values * p.factor.unsqueeze(-1)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", (MXFP4, MXFP8), ids=lambda f: f.name)
def test_round_trip(fmt: Format, shape: tuple[int, ...], pair: str) -> None:
    w = weights(shape, fmt)
    p = prepack(w, pair=pair)
    assert p.factor is None and p.shape == shape and p.prepack == PREPACK
    assert same(unpack(p), w)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("fmt", (MXFP4, MXFP8), ids=lambda f: f.name)
def test_values_on_the_device(fmt: Format, pair: str) -> None:
    w = weights((1, 100, 320), fmt)
    p = prepack(w, pair=pair)
    got, want = device_values(p), w.dequantize()
    order = row_order(100, pair)
    assert torch.equal(got[:, order >= 0][..., :320], want[:, order[order >= 0]])
    assert not got[:, order < 0].any() and not got[..., 320:].any()


@pytest.mark.parametrize("fmt", (MXFP4, MXFP8), ids=lambda f: f.name)
def test_every_code_with_every_scale(fmt: Format) -> None:
    """All codes of the element in one block each, a row for each of the 255 scale codes."""
    codes = torch.arange(256, dtype=torch.uint8)
    if fmt.element == "e4m3":
        codes[(codes & 127) == 127] = 0
    data = codes.view(1, 1, 256).expand(1, 255, 256).contiguous()
    k = 256 * fmt.elem.per_byte
    scale = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).expand(1, 255, k // 32).contiguous()
    w = ScaledTensor(data.view(fmt.elem.dtype), scale, fmt)
    p = prepack(w)
    assert p.factor is not None
    assert torch.equal(device_values(p)[:, :255].double(), w.dequantize(torch.float64).float().double())
    assert same(unpack(p), w)


@pytest.mark.parametrize("fmt", (MXFP4, MXFP8), ids=lambda f: f.name)
def test_blocks_far_apart_in_a_row(fmt: Format) -> None:
    w = weights((1, 64, 256), fmt, 127, 128)
    assert w.scale is not None
    w.scale[0, 0] = torch.tensor([254, 224, 194, 164, 134, 130, 127, 124], dtype=torch.uint8)
    w.scale[0, 1] = torch.tensor([0, 2, 4, 30, 60, 90, 120, 127], dtype=torch.uint8)
    p = prepack(w)
    assert p.factor is not None and (p.factor != 1).any()
    values = device_values(p)[:, :64].double()
    exact = w.dequantize(torch.float64)
    finite = exact.abs() < 3e38
    assert torch.equal(values[finite], exact[finite])


def test_nan_scales_and_payloads_make_the_row_nan() -> None:
    w = weights((1, 64, 128), MXFP4)
    assert w.scale is not None
    w.scale[0, 5, 2] = 255
    p = prepack(w)
    assert p.factor is not None and p.factor.isnan().nonzero().tolist() == [[0, 5]]
    assert same(unpack(p), w)
    w8 = weights((1, 64, 128), MXFP8)
    w8.data.view(torch.uint8)[0, 7, 100] = 0xFF
    p8 = prepack(w8)
    assert p8.factor is not None and p8.factor.isnan().nonzero().tolist() == [[0, 7]]
    assert same(unpack(p8), w8)


def test_blocks_of_zeros_need_no_window() -> None:
    w = weights((1, 64, 128), MXFP4)
    assert w.scale is not None
    w.data[0, 3, :16] = 0x80
    w.scale[0, 3, 0] = 250
    p = prepack(w)
    assert p.factor is not None and (p.factor == 1).all()
    assert same(unpack(p), w)


def test_rows_that_fold_into_e4m3() -> None:
    """`top`: the largest code of a row, where no live block of any row lies more than 14 powers of two below it."""
    w = weights((2, 70, 256), MXFP4, 100, 115)
    w.data[1, 5, :16], w.scale[1, 5, 0] = 0x80, 1           # a block of zeros counts for nothing
    packed = prepack(w)
    assert packed.top is not None and packed.top.shape == (2, 128)
    live = w.scale.clone()
    live[1, 5, 0] = 0
    assert torch.equal(packed.top[:, :70], live.amax(-1)) and not packed.top[:, 70:].any()
    assert torch.equal(prepack(w, pair="halves").top[0, [0, 8, 16]], live[0].amax(-1)[[0, 35, 8]])
    again = PackedWeight.from_state_dict(packed.state_dict())
    assert again.top is not None and torch.equal(again.top, packed.top) and again.to("cpu").top is not None
    w.scale[0, 3, 2] = w.scale[0, 3].amax() - 15
    assert prepack(w).top is None
    assert prepack(weights((2, 64, 64), MXFP8)).top is None


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_order_for_fp8_activations(shape: tuple[int, ...], pair: str) -> None:
    """The same but for bits within a word: magnitudes in nibbles in order, signs in bytes; and it comes back."""
    w = weights(shape, MXFP4, 115, 128)
    p, plain = prepack(w, pair=pair, activations="fp8"), prepack(w, pair=pair)
    assert p.prepack == FP8_PREPACK and p.top is not None and plain.top is not None
    assert torch.equal(p.scale, plain.scale) and torch.equal(p.top, plain.top)
    assert same(unpack(p), w) and same(unpack(PackedWeight.from_state_dict(p.state_dict())), w)
    assert p.to("cpu").prepack == FP8_PREPACK
    # thread (row, block of 32) reads 4 words; word i holds K 8 i to 8 i + 7 of the block
    bits = w.data.view(torch.uint8).view(-1, shape[-1] // 2)[0]
    codes = torch.stack([bits & 15, bits >> 4], -1).flatten()[:32].tolist()
    for i, word in enumerate(p.data[0, 0, 0, 0].view(torch.int32)[:4].tolist()):
        signs = [7, 15, 23, 31, 3, 11, 19, 27]
        assert [(word >> (4 * j) & 7) | (word >> signs[j] & 1) << 3 for j in range(8)] == codes[8 * i: 8 * i + 8]


def test_rows_that_do_not_fold_count_wherever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are looked at some at a time."""
    monkeypatch.setattr(sys.modules["narrowgemm.prepack"], "CHUNK_BYTES", 1)      # the package has a function of that name
    w = weights((3, 70, 256), MXFP4, 115, 128)
    assert prepack(w).top is not None
    w.scale[0, 3, 2] = w.scale[0, 3].amax() - 15
    assert prepack(w).top is None and prepack(w, activations="fp8").prepack == PREPACK


def test_rows_are_shifted_no_further_than_they_must() -> None:
    """A factor far from one would let sums overflow on the way to a result that does not."""
    w = weights((1, 64, 64), MXFP8, 100, 101)
    w.scale[0, 7], w.scale[0, 9], w.scale[0, 11] = torch.tensor([1, 100]), torch.tensor([100, 140]), torch.tensor([3, 134])
    factor = prepack(w).factor
    assert factor is not None
    assert factor[0, [7, 9, 11, 12]].tolist() == [0.25, 64.0, 1.0, 1.0]


def test_powers_of_two_are_exact_down_to_the_smallest() -> None:
    exponent = torch.arange(-149, 128)
    assert torch.equal(power_of_two(exponent.float()), torch.ldexp(torch.ones(277), exponent)) and power_of_two(torch.tensor(torch.nan)).isnan()


def test_order_for_fp8_activations_needs_weights_that_fold() -> None:
    """Others get the order that serves all: a row that doesn't fold, MXFP8."""
    w = weights((2, 70, 256), MXFP4, 115, 128)
    w.scale[1, 3, 2] = w.scale[1, 3].amax() - 15
    assert prepack(w, activations="fp8").prepack == PREPACK
    assert prepack(weights((64, 64), MXFP8), activations="fp8").prepack == PREPACK
    state = {**prepack(w).state_dict(), "prepack": FP8_PREPACK}
    with pytest.raises(ValueError, match="top"):
        PackedWeight.from_state_dict(state)


def test_dense_mxfp8_weights_of_mxfp8_activations_stay_as_they_are() -> None:
    """Nothing is moved that lies as the kernels take it, and no row is refused; `plain` is what they are given."""
    w = weights((100, 256), MXFP8, 0, 256)
    p = prepack(w, activations="mxfp8")
    assert p.prepack == ROWS_PREPACK and p.plain is not None and p.data.data_ptr() == w.data.data_ptr()
    assert same(p.plain, w) and same(unpack(p), w)
    again = PackedWeight.from_state_dict(p.state_dict())
    assert again.plain is not None and same(again.plain, w) and same(unpack(p.to("cpu")), w)
    assert same(unpack(pickle.loads(pickle.dumps(p))), w)


def test_weights_that_stay_as_they_are_are_brought_to_rows() -> None:
    """Scales that lie column by column, as FP32 or off 16 bytes, and payload in columns, too."""
    w = weights((100, 256), MXFP8)
    columns = ScaledTensor(w.data.mT.contiguous().mT, w.scale.mT.contiguous().mT, MXFP8)
    off = torch.empty(100 * 256 + 1, dtype=torch.uint8)[1:].view(torch.float8_e4m3fn).view(100, 256).copy_(w.data)
    for given in (columns, ScaledTensor(off, w.scale, MXFP8), ScaledTensor.make(w.data, e8m0_to_float(w.scale), MXFP8)):
        p = prepack(given, activations="mxfp8")
        assert p.prepack == ROWS_PREPACK and p.data.is_contiguous() and p.scale.is_contiguous() and same(unpack(p), w)
        assert p.data.data_ptr() % 16 == 0 and p.scale.data_ptr() % 16 == 0


def test_which_weights_of_mxfp8_activations_get_tiles() -> None:
    """By experts, in pairs, with a K that the kernels for rows don't take, and MXFP4."""
    for w, pair in ((weights((2, 64, 128), MXFP8), ""), (weights((64, 128), MXFP8), "halves"), (weights((64, 96), MXFP8), ""),
                    (weights((64, 128), MXFP4), "")):
        p = prepack(w, pair=pair, activations="mxfp8")
        assert p.prepack == PREPACK and p.plain is None and same(unpack(p), w)
    state = prepack(weights((2, 64, 128), MXFP8)).state_dict()
    with pytest.raises(ValueError, match=r"mxfp8 \[N, K\], not in pairs"):
        PackedWeight.from_state_dict({**state, "prepack": ROWS_PREPACK})


@pytest.mark.parametrize("a", ["mxfp8", "bf16", "fp8_1x128"])
@pytest.mark.parametrize("packed", ["bf16", "mxfp8"])
def test_activations_of_another_kind_give_the_same(packed: str, a: str) -> None:
    w = quantize(torch.randn(48, 256), MXFP8)
    x = torch.randn(5, 256).bfloat16() if a == "bf16" else quantize(torch.randn(5, 256), a)
    p = prepack(w, activations=packed)
    assert torch.equal(gemm(x, p), gemm(x, w))
    out = torch.zeros(5, 48)
    assert gemm(x, p, out=out, accumulate=True) is out and torch.equal(out, gemm(x, w, out_dtype=torch.float32))
    with pytest.raises(ValueError, match=r"\[E?G?, N, K\]"):
        grouped_gemm(x, p, Offsets(torch.tensor([0, 5])))


def test_folding_of_rows_with_factors() -> None:
    """Codes lie as the packed ones do: lowered by the row's shift."""
    w = weights((1, 64, 64), MXFP4, 120, 124)
    w.scale[0, 9] = 250
    packed = prepack(w)
    assert packed.top is not None and packed.factor is not None
    assert packed.top[0, 9] == 128 and packed.factor[0, 9] == 2.0 ** 122
    assert torch.equal(packed.top[0, :9], w.scale[0, :9].amax(-1))


def test_scales_too_far_apart_are_refused() -> None:
    w = weights((1, 64, 128), MXFP4)
    assert w.scale is not None
    w.scale[0, 3, :2] = torch.tensor([0, 254], dtype=torch.uint8)
    w.data[0, 3] = 0x22
    with pytest.raises(Unsupported, match="further apart"):
        prepack(w)


def test_float32_scales_come_back_as_codes() -> None:
    w = quantize(torch.randn(64, 128), MXFP8)
    assert w.scale is not None
    f = ScaledTensor.make(w.data, e8m0_to_float(w.scale), MXFP8)
    assert same(unpack(prepack(f)), w)


@pytest.mark.parametrize("wrong, error, words", [
    (None, TypeError, "weights, scale: got NoneType"), (lambda s: s[..., :3], ValueError, r"got \(3, 64, 3\), expected \(3, 64, 4\)"),
    (lambda s: s.repeat(1, 1, 2), ValueError, r"got \(3, 64, 8\)"), (lambda s: s[:2], ValueError, r"got \(2, 64, 4\)"),
    (lambda s: s.to("meta"), ValueError, "weights, scale device: got meta, expected the payload's, cpu")])
def test_scales_that_are_not_the_payloads_are_refused(wrong, error, words) -> None:
    """Fewer along K, or more, were taken without a word."""
    w = quantize(torch.randn(3, 64, 128), MXFP4)
    with pytest.raises(error, match=words):
        prepack(ScaledTensor(w.data, None if wrong is None else wrong(w.scale), w.format))


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match="ScaledTensor"):
        prepack(torch.randn(64, 128))  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="mxfp4 and mxfp8"):
        prepack(quantize(torch.randn(128, 128), FP8_128x128))
    with pytest.raises(ValueError, match="pair"):
        prepack(weights((64, 128), MXFP4), pair="both")
    with pytest.raises(ValueError, match="activations"):
        prepack(weights((64, 128), MXFP4), activations="mxfp4")
    with pytest.raises(ValueError, match="even"):
        prepack(weights((63, 128), MXFP4), pair="halves")


def test_state_survives_saving() -> None:
    p = prepack(weights((2, 100, 320), MXFP4, 100, 150), pair="halves")
    assert p.factor is not None and p.codes is not None
    buffer = io.BytesIO()
    torch.save(p.state_dict(), buffer)
    buffer.seek(0)
    back = PackedWeight.from_state_dict(torch.load(buffer, weights_only=True))
    assert same(unpack(back), unpack(p)) and back.pair == p.pair
    assert same(unpack(pickle.loads(pickle.dumps(p))), unpack(p))
    buffer = io.BytesIO()
    torch.save(p, buffer)
    buffer.seek(0)
    assert same(unpack(torch.load(buffer)), unpack(p))
    assert repr(p) == f"PackedWeight({p.format.name} {list(p.shape)}, {p.prepack}{', ' * bool(p.pair)}{p.pair}, cpu)"


def test_another_order_is_never_reinterpreted() -> None:
    state = prepack(weights((64, 128), MXFP4)).state_dict()
    with pytest.raises(ValueError, match="prepack order"):
        PackedWeight.from_state_dict({**state, "prepack": "narrow_sm90/0"})
    with pytest.raises(ValueError, match="missing"):
        PackedWeight.from_state_dict({k: v for k, v in state.items() if k != "pair"})
    with pytest.raises(ValueError, match="shape"):
        PackedWeight.from_state_dict({**state, "shape": [128, 128]})
    with pytest.raises(TypeError, match="dtype"):
        PackedWeight.from_state_dict({**state, "scale": state["scale"].to(torch.int32)})


def test_bias_of_the_exponent_field() -> None:
    """The smallest and largest code of the usual case are the fields that the multiplication is built on."""
    w = weights((64, 128), MXFP4, 128, 129)
    assert (unpack_scale(prepack(w).scale)[..., :4] == BIAS["e2m1"] + 128).all()
