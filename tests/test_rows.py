"""Row maps and the gather that moves rows, with their scales."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrowgemm import BF16, FP8_ROW, FP8_TENSOR, MXFP4, MXFP8, FP8_1x128, FP8_128x128, ScaledTensor
from narrowgemm.layout_convert import from_masked, pad_to_contiguous, to_masked, unpad_from_contiguous
from narrowgemm.rows import gather_rows, invert_row_map, sort_ids

from ._layouts import i32, make_offsets


@given(st.lists(st.integers(-3, 12), max_size=40), st.integers(0, 9))
def test_gather_and_invert(ids, rows):
    row_map, x = i32(ids), torch.randn(rows, 2)
    want = [x[i].tolist() if 0 <= i < rows else [0.0, 0.0] for i in ids]
    assert gather_rows(x, row_map).tolist() == want
    assert gather_rows(x[:, 0].contiguous(), row_map).tolist() == [w[0] for w in want]
    once = torch.randperm(rows + 3)[:rows].to(torch.int32) - 1  # some rows missing, some entries out of range
    inverse = invert_row_map(once, rows)
    assert inverse.tolist() == [once.tolist().index(r) if r in once.tolist() else -1 for r in range(rows)]


@pytest.mark.parametrize("groups", [1, 255, 1024, 2**15 - 2, 2**15 - 1, 40000])
def test_sort_ids_at_every_key_width(groups):
    ids = torch.tensor([groups - 1, groups, 0, -1, groups - 1, 2**40, -2**40, 2**32, 0])
    order, offsets = sort_ids(ids, groups)
    if groups == 1:
        assert order.tolist()[:4] == [0, 2, 4, 8] and offsets.tolist() == [0, 4]
    else:
        assert order.tolist() == [2, 8, 0, 4, 1, 3, 5, 6, 7]
        assert offsets.numel() == groups + 1 and offsets[[0, 1, -2, -1]].tolist() == [0, 2, 2, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.uint8, torch.bool,
                                   torch.float8_e4m3fn, torch.float8_e5m2])
def test_gather_rows_keeps_bits(dtype):
    x = (torch.randn(6, 8) * 4).to(dtype)
    out = gather_rows(x, i32([[5, -1], [0, 99]]))
    assert out.dtype == dtype and out.shape == (2, 2, 8)
    want = torch.stack([x[5].float(), torch.zeros(8), x[0].float(), torch.zeros(8)])
    assert torch.equal(out.float(), want.view(2, 2, 8))


def test_padding_does_not_read_the_rows_it_hides():
    x = torch.full((4, 3), float("nan"))
    assert not gather_rows(x, i32([-1, 4, -7])).any()


@pytest.mark.parametrize("fmt", [FP8_1x128, FP8_ROW, MXFP8, MXFP4, FP8_TENSOR, BF16], ids=lambda f: f.name)
def test_scaled_tensors_move_with_their_scales(fmt):
    lens, k = [3, 0, 2], 256
    data = torch.randint(1, 100, (5, k // 2 if fmt.element == "e2m1" else k), dtype=torch.uint8)
    data = torch.randn(5, k).bfloat16() if fmt is BF16 else data.view(fmt.elem.dtype)
    scale = None
    if fmt.scaled:
        scale = torch.randint(1, 9, fmt.scale_shape((5, k)))
        scale = scale.float() if fmt.scale == "fp32" else scale.to(torch.uint8)
        scale = scale.mT.contiguous().mT  # MN-major, as TMA wants them
    x = ScaledTensor(data, scale, fmt)
    y, layout = to_masked(x, make_offsets(lens), 4)
    assert y.shape == (3, 4, k) and layout.masked_m.tolist() == lens
    if fmt.scaled:
        assert y.scale.shape == fmt.scale_shape(y.shape)
    if fmt is not FP8_TENSOR:  # [G, 1, 1] tensor-wise scales may differ, so they do not go back
        back = from_masked(y, make_offsets(lens), 5)
        assert torch.equal(back.data.view(torch.uint8), data.view(torch.uint8))
        assert back.scale is None or torch.equal(back.scale, scale)
    padded, _ = pad_to_contiguous(x, make_offsets(lens), 4)
    again = unpad_from_contiguous(padded, make_offsets(lens), 5, 4)
    assert torch.equal(again.data.view(torch.uint8), data.view(torch.uint8))
    assert again.scale is None or torch.equal(again.scale, scale)


def test_scales_that_span_rows_do_not_move():
    x = ScaledTensor(torch.zeros(4, 128, dtype=torch.float8_e4m3fn), torch.ones(1, 1), FP8_128x128)
    with pytest.raises(ValueError, match="fp8_128x128"):
        gather_rows(x, i32([0]))
    x = ScaledTensor(torch.zeros(2, 4, 128, dtype=torch.float8_e4m3fn), torch.ones(2, 1, 1), FP8_TENSOR)
    with pytest.raises(ValueError, match="one for the whole tensor"):
        gather_rows(x, i32([0]))


@pytest.mark.parametrize(("call", "error"), [
    (lambda: gather_rows(torch.ones(3), torch.ones(3)), TypeError),
    (lambda: gather_rows(torch.tensor(1.0), i32([0])), ValueError),
    (lambda: invert_row_map(torch.ones(3), 3), TypeError),
    (lambda: invert_row_map(i32([0]), -1), ValueError),
])
def test_bad_input(call, error):
    with pytest.raises(error, match="expected"):
        call()
