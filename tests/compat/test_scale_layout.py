"""The scale-layout helpers against their definitions in plain torch: values, shapes, strides, the same object back."""

from __future__ import annotations

import pytest
import torch

from narrowgemm import Unsupported


def powers(*shape: int) -> torch.Tensor:
    return torch.exp2(torch.randint(-20, 20, shape).float())


def definition(sf: torch.Tensor) -> torch.Tensor:
    """int32 words of four codes along the last axis, zeros at the end."""
    codes = (sf.contiguous().view(torch.int32) >> 23).to(torch.int64)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 4)).unflatten(-1, (-1, 4))
    word = (codes << torch.tensor([0, 8, 16, 24])).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def definition_of_codes(codes: list[int]) -> list[int]:
    return torch.tensor(codes, dtype=torch.uint8).view(torch.int32).tolist()


@pytest.mark.parametrize(("x", "size", "want"), [(1, 4, 4), (4, 4, 4), (5, 4, 8), (17, 1, 32), (3, 16, 3), (0, 4, 0)])
def test_tma_aligned_size(deep_gemm, x, size, want):
    assert deep_gemm.get_tma_aligned_size(x, size) == want
    with pytest.raises(ValueError, match=r"element_size: got 3, expected a divisor of 16"):
        deep_gemm.get_tma_aligned_size(x, 3)


@pytest.mark.parametrize("shape", [(96, 3), (97, 5), (1, 1), (2, 97, 5), (3, 64, 1), (0, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_mn_major_tma_aligned(deep_gemm, shape, transposed):
    sf = torch.randn(shape)
    sf = sf.mT.contiguous().mT if transposed else sf
    out = deep_gemm.get_mn_major_tma_aligned_tensor(sf)
    aligned = -(-shape[-2] // 4) * 4
    assert torch.equal(out, sf) and out.dtype == sf.dtype
    if not out.numel():
        return
    assert out.stride()[-2:] == (1, aligned)
    assert len(shape) == 2 or out.stride(0) == aligned * shape[-1]
    assert deep_gemm.get_mn_major_tma_aligned_tensor(out) is out, "no alias of what lies right already"


@pytest.mark.parametrize("shape", [(96, 4), (97, 5), (5, 1), (2, 30, 7), (3, 64, 13)])
@pytest.mark.parametrize("transposed", [False, True])
def test_packed(deep_gemm, shape, transposed):
    sf = powers(*shape)
    sf = sf.mT.contiguous().mT if transposed else sf
    out = deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf)
    assert torch.equal(out, definition(sf)) and out.dtype == torch.int32
    assert out.stride()[-2:] == (1, -(-shape[-2] // 4) * 4)
    assert deep_gemm.get_mn_major_tma_aligned_tensor(out) is out


def test_packing_never_rounds(deep_gemm):
    pack = deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor
    for bad in (3.0, -1.0, 1.5e-3, 2.0**-128):
        sf = powers(8, 4)
        sf[3, 2] = bad
        with pytest.raises(ValueError, match=r"no powers of two"):
            pack(sf)
        with pytest.raises(ValueError, match=r"no powers of two"):
            deep_gemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(sf, torch.tensor([8 * 128]).int(), [1024])
    ends = torch.tensor([[0.0, 2.0**-127, 2.0**127, float("nan")]])
    assert pack(ends).flatten().tolist() == definition_of_codes([0, 0, 254, 255])
    with pytest.raises(TypeError, match=r"sf, dtype: got torch.bfloat16"):
        pack(torch.ones((4, 4), dtype=torch.bfloat16))


@pytest.mark.gpu
def test_inexact_scales_on_a_device_become_nan(deep_gemm, monkeypatch):
    """They can't be seen without waiting for the device: what comes out is loud, not wrong."""
    sf = torch.full((4, 4), 2.0, device="cuda")
    sf[1, 1] = 3.0
    words = deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf).flatten().tolist()
    good, bad = definition_of_codes([128] * 4), definition_of_codes([128, 255, 128, 128])
    assert words == good + bad + good + good
    monkeypatch.setenv("NARROWGEMM_VALIDATE", "sync")
    with pytest.raises(ValueError, match=r"no powers of two"):
        deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf)


def test_packed_psum_skips_gaps(deep_gemm):
    deep_gemm.set_mk_alignment_for_contiguous_layout(16)
    ends = torch.tensor([5, 16 + 16, 32, 32 + 1], dtype=torch.int32)  # the third group is empty
    live = torch.zeros(64, dtype=torch.bool)
    for start, end in ((0, 5), (16, 32), (32, 33)):
        live[start:end] = True
    sf = powers(64, 6)
    want = torch.where(live[:, None], definition(sf), 0)
    sf[~live] = float("nan")
    sf[40] = 3.0
    assert torch.equal(deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf, ends), want)
    assert torch.equal(deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf, psum_layout=ends), want)
    with pytest.raises(ValueError, match=r"sf with psum_layout, shape"):
        deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(powers(2, 8, 4), ends)
    with pytest.raises(TypeError, match=r"psum_layout: got torch.int64"):
        deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf, ends.long())


@pytest.mark.parametrize("gran_k", [32, 128])
@pytest.mark.parametrize("ks", [[512, 128, 640], [128, 0, 256], [0, 0], [384]])
def test_k_grouped_packed(deep_gemm, gran_k, ks):
    counts = [k // gran_k for k in ks]
    sf = powers(sum(counts), 12)
    want = torch.cat([definition(p.t()).t() for p in sf.split(counts)]) if sum(ks) else torch.empty((0, 12)).int()
    function = deep_gemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor
    got = function(sf, torch.tensor(ks, dtype=torch.int32), ks, gran_k, gran_k)
    assert torch.equal(got, want) and got.is_contiguous()
    assert torch.equal(function(sf, torch.tensor(ks, dtype=torch.int32), ks, gran_k), want)


@pytest.mark.parametrize("alignment", [32, 160])
def test_k_grouped_packed_psum(deep_gemm, alignment):
    ks, gran_k = [300, 0, 70, 640], 32
    ends, end = [], 0
    for k in ks:
        end = deep_gemm.align(end, alignment) + k
        ends.append(end)
    counts = [deep_gemm.ceil_div(k, gran_k) for k in ks]
    sf = powers(sum(counts), 8)
    want = torch.cat([definition(p.t()).t() for p in sf.split(counts)])
    layout = torch.tensor(ends, dtype=torch.int32)
    function = deep_gemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor
    assert torch.equal(function(sf, layout, ks, gran_k, alignment, use_psum_layout=True), want)
    for host in (None, [], [deep_gemm.align(k, alignment) for k in ks]):
        got = function(sf, layout, host, gran_k, alignment, True)
        assert torch.equal(got[: len(want)], want) and not got[len(want) :].any()


@pytest.mark.parametrize(("change", "error", "match"), [
    ({"gran_k": 64}, ValueError, r"gran_k: got 64"),
    ({"k_alignment": 20}, ValueError, r"k_alignment: got 20"),
    ({"ks_cpu": [128]}, ValueError, r"ks_cpu, length: got 1"),
    ({"ks_cpu": [128, 256]}, ValueError, r"sf, rows: got 4, expected those of ks_cpu, 3"),
    ({"ks_cpu": None}, ValueError, r"ks_cpu without use_psum_layout"),
    ({"grouped_layout": [128, 384]}, TypeError, r"grouped_layout: got list"),
    ({"sf": torch.ones(2, 4, 8)}, ValueError, r"sf, shape"),
    ({"sf": [1.0]}, TypeError, r"sf: got list"),
])
def test_k_grouped_errors(deep_gemm, change, error, match):
    args = {"sf": torch.ones(4, 8), "grouped_layout": torch.tensor([128, 384]).int(), "ks_cpu": [128, 384]} | change
    with pytest.raises(error, match=match):
        deep_gemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(**args)


@pytest.mark.parametrize("arch", ["cpu", "h200", "mi350x"])
def test_transform(deep_gemm, monkeypatch, arch):
    monkeypatch.setenv("NARROWGEMM_ARCH", arch)
    transform = deep_gemm.transform_sf_into_required_layout
    tokens, blocks = torch.rand(97, 5), torch.rand(3, 2, 5)
    for out in (transform(tokens, 97, 640, (1, 128, 128), is_sfa=True), transform(tokens, 97, 640, (1, 128)),
                transform(tokens, 97, 160, (1, 32))):
        assert torch.equal(out, tokens) and out.stride() == (1, 100)
    assert transform(blocks, 200, 640, (1, 128, 128), 3, False) is blocks
    assert transform(blocks, 200, 640, [128, 128], num_groups=3) is blocks
    e8m0 = torch.zeros((97, 5), dtype=torch.float8_e8m0fnu)
    assert transform(e8m0, 97, 640, (1, 128)) is e8m0
    words = torch.zeros((97, 2), dtype=torch.int32)
    assert transform(words, 97, 640, (1, 1, 128), is_sfa=False).stride() == (1, 100)


def test_transform_on_capability_10(deep_gemm, monkeypatch):
    monkeypatch.setenv("NARROWGEMM_ARCH", "b200")
    transform = deep_gemm.transform_sf_into_required_layout
    tokens, blocks = powers(97, 5), powers(3, 2, 5)
    assert torch.equal(transform(tokens, 97, 640, (1, 128)), definition(tokens))
    expanded = blocks.repeat_interleave(128, 1)[:, :200]
    out = transform(blocks, 200, 640, (1, 128, 128), 3, False)
    assert torch.equal(out, definition(expanded)) and out.stride() == (2 * 200, 1, 200)
    assert transform(blocks, 200, 640, (128, 128), 3, disable_ue8m0_cast=True) is blocks
    with pytest.raises(ValueError, match=r"no powers of two"):
        transform(blocks * 3, 200, 640, (128, 128), 3)


@pytest.mark.parametrize(("args", "error", "match"), [
    ((torch.ones(97, 5), 97, 640, (1, 128, 128)), ValueError, r"is_sfa with a recipe of three"),
    ((torch.ones(97, 5), 97, 640, (1, 128), None, True), ValueError, r"is_sfa with a recipe of two"),
    ((torch.ones(97, 5), 97, 640, (1,)), ValueError, r"recipe: got \(1,\)"),
    ((torch.ones(97, 5), 97, 640, (1, 16)), Unsupported, r"scale blocks of 1x16"),
    ((torch.ones(97, 5), 96, 640, (1, 128)), ValueError, r"shape: got \(97, 5\), expected \(96, 5\)"),
    ((torch.ones(97, 5), 97, 640, (1, 128), 2), ValueError, r"expected \(2, 97, 5\)"),
    ((torch.ones(97, 5).int(), 97, 640, (1, 128)), ValueError, r"expected \(97, 2\)"),
    ((torch.ones(1, 2).int(), 97, 640, (128, 128)), ValueError, r"packed scales with a recipe of rows: got 128"),
    ((torch.ones(97, 5).half(), 97, 640, (1, 128)), TypeError, r"sf, dtype: got torch.float16"),
])
def test_transform_errors(deep_gemm, args, error, match):
    with pytest.raises(error, match=match):
        deep_gemm.transform_sf_into_required_layout(*args)
