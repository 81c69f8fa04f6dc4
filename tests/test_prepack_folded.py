"""The folded copy of MXFP8 weights: what it holds is the weights, bit for bit, and where there is none."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from narrowgemm import MXFP4, MXFP8, PackedWeight, ScaledTensor, prepack, quantize, unpack
from narrowgemm.prepack_folded import BLOCK, MOST, STEP, TILE, FoldedCopy, fold
from narrowgemm.reference.quantize import dequantize

SHAPE = (2, 300, 1056)


def normal(*shape: int, seed: int = 0) -> ScaledTensor:
    return quantize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), MXFP8, backend="reference")


def copy_of(w: ScaledTensor) -> FoldedCopy | None:
    assert w.scale is not None
    copy = fold(w.data.view(torch.uint8), w.scale)
    if copy is not None:
        copy.check(*w.shape)
    return copy


def values(copy: FoldedCopy, shape: tuple[int, ...]) -> Tensor:
    """FP64 `[G, N, K]`, as the product reads a copy: codes, and elements at their tile's picks."""
    top, at, starts, picks, rest = (copy.part(name, *shape) for name in ("top", "at", "starts", "picks", "values"))
    out = copy.data.view(torch.float8_e4m3fn).double()
    for g in range(shape[0]):
        assert all(x % STEP == 0 for x in at[g].tolist()) and starts[g, -1] == at[g, -1] <= copy.picks
        seen = []
        for block in range(-(-shape[2] // BLOCK)):
            for entry in picks[g, starts[g, block]: starts[g, block + 1]].tolist():
                pick, k = entry // BLOCK, block * BLOCK + entry % BLOCK
                tile = int((at[g] <= pick).sum()) - 1
                rows = slice(tile * TILE, min(shape[1], tile * TILE + TILE))
                out[g, rows, k] += rest[g, rows, pick - int(at[g, tile])].double()
                seen.append(pick)
        assert sorted(seen) == list(range(int(at[g, -1])))      # each column of picks is written
    return out * torch.exp2(top.double() - 133).unsqueeze(-1)


def same_values(copy: FoldedCopy, w: ScaledTensor) -> bool:
    return torch.equal(values(copy, tuple(w.shape)), dequantize(w, torch.float32).double())


def test_of_normal_weights_few_columns_are_left() -> None:
    w = normal(*SHAPE)
    copy = copy_of(w)
    assert copy is not None and same_values(copy, w)
    left = (copy.data & 127 == 0) & (w.data.view(torch.uint8) & 127 != 0)
    assert 0 < left.double().mean() < 2e-4 and copy.columns == STEP


def test_where_everything_folds_nothing_is_left() -> None:
    w = normal(*SHAPE)
    assert w.scale is not None
    w.scale[:] = torch.arange(100, 100 + SHAPE[1], dtype=torch.int32).remainder(100).add(80).to(torch.uint8)[None, :, None]
    copy = copy_of(w)
    assert copy is not None and same_values(copy, w)
    assert torch.equal(copy.data, w.data.view(torch.uint8)) and not copy.part("at", *SHAPE).any()


def test_outliers_are_left_rather_than_what_they_would_push_out() -> None:
    """One element far above its row is a column of its own; by the power of two that it asks for, the row would lose bits."""
    w = normal(*SHAPE)
    data = w.data.view(torch.uint8)
    data[:, :, 32:64] = 0
    assert w.scale is not None
    before = copy_of(w)
    data[0, ::7, 40], w.scale[0, :, 1] = 0x7E, 125           # 448 * 2^-2
    copy = copy_of(w)
    assert before is not None and copy is not None and same_values(copy, w)
    assert (copy.part("at", *SHAPE) <= before.part("at", *SHAPE) + STEP).all()
    assert (copy.data[0, 0::7, 40] == 0).any()


def test_zeros_nan_and_blocks_far_apart() -> None:
    w = normal(*SHAPE)
    data = w.data.view(torch.uint8)
    assert w.scale is not None
    data[0, 3], w.scale[0, 3] = 0x80, 0                     # a row of minus zero
    data[1, 5, 64:96], w.scale[1, 5, 2] = 0, 254            # a block of zeros, whatever its scale
    data[0, 7, 100] = 0xFF                                  # NaN stays where it is
    w.scale[1, 9, 4] -= 30
    copy = copy_of(w)
    assert copy is not None
    got, want = values(copy, SHAPE), dequantize(w, torch.float32).double()
    assert got[0, 7, 100].isnan() and got.isnan().sum() == 1
    assert torch.equal(got.nan_to_num(0), want.nan_to_num(0)) and (copy.data[0, 3] == 0x80).all()
    assert (copy.data[1, 9, 128:160] == 0).all()            # 2^30 below its row: every element is left


@pytest.mark.parametrize("spoil", ["nan", "large", "small", "apart", "spread"])
def test_where_there_is_no_copy(spoil: str) -> None:
    w = normal(1, 300, 1056)
    assert w.scale is not None
    if spoil == "nan":
        w.scale[0, 3, 4] = 255
    elif spoil in ("large", "small"):
        w.scale[0, 3] = {"large": 254, "small": 0}[spoil]
    elif spoil == "apart":
        w.scale[0, 3, 4] -= 60
    else:                       # more columns than `MOST` of a tile
        w.scale[0, : TILE // 8] -= (torch.arange(33) % 2 * 20).to(torch.uint8)
    assert MOST == 256 and copy_of(w) is None
    assert prepack(w, folded=True).folded is None


@pytest.mark.parametrize("columns", [MOST, MOST + 1])
def test_as_many_columns_as_a_tile_may_leave_out(columns: int) -> None:
    """One block 2^20 above the others, whose elements would lose their lowest bit."""
    k = 32 * 10
    data, scale = torch.full((1, 64, k), 0x38, dtype=torch.uint8), torch.full((1, 64, k // 32), 127, dtype=torch.uint8)
    scale[..., 1:], data[..., 32:] = 107, 0
    data[0, 5, 32:32 + columns] = 0x39
    assert (fold(data, scale) is not None) == (columns == MOST)


def test_packed_weights_hold_it_beside() -> None:
    w = normal(*SHAPE)
    packed = prepack(w, folded=True)
    assert packed.folded is not None and same_values(packed.folded, w) and prepack(w).folded is None
    back = unpack(packed)
    assert torch.equal(back.data.view(torch.uint8), w.data.view(torch.uint8)) and torch.equal(back.scale, w.scale)
    kept = io.BytesIO()
    torch.save(packed.state_dict(), kept)
    kept.seek(0)
    again = PackedWeight.from_state_dict(torch.load(kept, weights_only=True)).to("cpu")
    assert again.folded is not None and torch.equal(again.folded.data, packed.folded.data)
    assert torch.equal(again.folded.rest, packed.folded.rest) and again.folded.picks == packed.folded.picks
    with pytest.raises(ValueError, match="unpack with the version"):
        PackedWeight.from_state_dict({**packed.state_dict(), "folded": "folded_sm90/0"})
    with pytest.raises(ValueError, match="folded data, shape"):
        PackedWeight.from_state_dict({**packed.state_dict(), "folded_data": packed.folded.data[:1]})
    with pytest.raises(ValueError, match="multiple of 64"):
        PackedWeight.from_state_dict({**packed.state_dict(), "folded_sizes": [65, packed.folded.picks],
                                      "folded_rest": packed.folded.rest})


@pytest.mark.parametrize("fmt, options, match", [
    (MXFP4, {}, "mxfp8 without pair"), (MXFP8, {"pair": "halves"}, "mxfp8 without pair"), (MXFP8, {"folded": 1}, "True, False or None"),
    (MXFP8, {"activations": "fp8"}, "'bf16' or 'mxfp8'")])
def test_what_is_refused(fmt, options: dict, match: str) -> None:
    w = quantize(torch.randn(2, 64, 128), fmt, backend="reference")
    with pytest.raises((ValueError, TypeError), match=match):
        prepack(w, **{"folded": True, **options})


def test_weights_left_in_their_order_hold_no_codes() -> None:
    """What goes with a copy, without the copy; through a file and back."""
    w = normal(300, 256)
    packed, beside = prepack(w, activations="mxfp8", folded=True), prepack(w, folded=True)
    assert packed.plain is not None and packed.folded is not None and beside.folded is not None and packed.folded.data is None
    assert torch.equal(packed.folded.rest, beside.folded.rest) and prepack(w, activations="mxfp8").folded is None
    assert prepack(normal(2, 64, 256), activations="mxfp8", folded=True).folded.data is not None, "which are not left in their order"
    kept = io.BytesIO()
    torch.save(packed.state_dict(), kept)
    kept.seek(0)
    again = PackedWeight.from_state_dict(torch.load(kept, weights_only=True)).to("cpu")
    assert again.folded is not None and again.folded.data is None and torch.equal(again.folded.rest, packed.folded.rest)
    for one, other, got in ((packed, beside, "kept"), (beside, packed, "none")):
        state = {k: v for k, v in one.state_dict().items() if not k.startswith("folded")} | {
            k: v for k, v in other.state_dict().items() if k.startswith("folded")}
        with pytest.raises(ValueError, match=f"codes of the copy of weights in the order {one.prepack}: got {got}"):
            PackedWeight.from_state_dict(state)
