"""A DeepGEMM user's own test with only the import changed: `install()`, then `import deep_gemm`."""

from __future__ import annotations

import random

import pytest
import torch

from . import _caller as caller

GPU = pytest.mark.gpu


def on(cases: list, small: list) -> list:
    """(device, *case): small cases on the CPU, DeepGEMM's own on the GPU."""
    return [pytest.param("cpu", *c) for c in small] + [pytest.param("cuda", *c, marks=GPU) for c in cases]


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)


@pytest.mark.parametrize(("device", "m", "n", "k"), on(caller.DENSE, [(1, 256, 512), (128, 192, 384), (200, 384, 256)]))
@pytest.mark.parametrize("majors", ["nt", "nn"])
def test_dense(deep_gemm, device, m, n, k, majors):
    for out in (torch.bfloat16, torch.float32):
        a, b, c, d, ref = caller.dense(deep_gemm, m, n, k, device, out=out)
        if majors == "nn":
            b = tuple(x.t().contiguous() for x in b)
        assert getattr(deep_gemm, f"fp8_gemm_{majors}")(a, b, d, c=c, disable_ue8m0_cast=True) is None
        assert deep_gemm.testing.calc_diff(d, ref) < caller.LIMIT


@pytest.mark.parametrize(("device", "m", "n", "k"),
                         on([(n, 4096, k) for n, k in caller.DENSE_NK[:2]], [(256, 128, 384), (130, 70, 200)]))
@pytest.mark.parametrize("majors", ["nt", "nn", "tn", "tt"])
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_dense_weight_gradient(deep_gemm, device, m, n, k, majors, out):
    a, b, c, d, ref = caller.dense(deep_gemm, m, n, k, device, accumulate=True, out=out)
    if majors[0] == "t":
        a = tuple(x.t().contiguous() for x in a)
    if majors[1] == "n":
        b = tuple(x.t().contiguous() for x in b)
    getattr(deep_gemm, f"fp8_fp4_gemm_{majors}")(a, b, d, c=c, recipe=(1, 1, 128))
    assert deep_gemm.testing.calc_diff(d, ref) < caller.LIMIT


@pytest.mark.parametrize(("device", "groups", "mean", "n", "k"),
                         on(caller.CONTIGUOUS, [(4, 100, 256, 384), (3, 40, 128, 200)]))
@pytest.mark.parametrize("psum", [False, True])
@pytest.mark.parametrize("majors", ["nt", "nn"])
def test_contiguous(deep_gemm, device, groups, mean, n, k, psum, majors):
    deep_gemm.set_mk_alignment_for_contiguous_layout(deep_gemm.get_theoretical_mk_alignment_for_contiguous_layout())
    a, b, d, layout, ref, sizes, starts = caller.contiguous(deep_gemm, groups, mean, n, k, device, psum=psum)
    if majors == "nn":
        b = tuple(x.mT.contiguous() for x in b)
    function = getattr(deep_gemm, f"m_grouped_fp8_gemm_{majors}_contiguous")
    function(a, b, d, layout, disable_ue8m0_cast=True, use_psum_layout=psum, ensure_zero_padding=True)
    assert deep_gemm.testing.calc_diff(d, ref) < caller.LIMIT
    for start, size in zip(starts, sizes):
        assert deep_gemm.testing.calc_diff(d[start : start + size], ref[start : start + size]) < caller.LIMIT
    padding = torch.ones(len(d), dtype=torch.bool)
    for start, size in zip(starts, sizes):
        padding[start : start + size] = False
    assert not d[padding.to(device)].any()


@pytest.mark.parametrize(("device", "groups", "max_m", "mean", "n", "k"),
                         on(caller.MASKED, [(4, 128, 60, 256, 384), (6, 64, 5, 128, 200)]))
def test_masked(deep_gemm, device, groups, max_m, mean, n, k):
    for name in ("m_grouped_fp8_gemm_nt_masked", "fp8_m_grouped_gemm_nt_masked"):
        a, b, d, masked_m, ref = caller.masked(deep_gemm, groups, max_m, mean, n, k, device)
        d.fill_(7)
        getattr(deep_gemm, name)(a, b, d, masked_m, int(mean * 1.2), disable_ue8m0_cast=True)
        for g, size in enumerate(masked_m.tolist()):
            assert deep_gemm.testing.calc_diff(d[g, :size], ref[g, :size]) < caller.LIMIT
            assert (d[g, size:] == 7).all()


@pytest.mark.parametrize(("device", "groups", "m", "n", "mean"),
                         on(caller.K_GROUPED, [(4, 128, 192, 300), (3, 100, 70, 200)]))
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("majors", ["nt", "tn"])
def test_k_grouped(deep_gemm, device, groups, m, n, mean, empty, majors):
    a, b, c, d, ref, ks = caller.k_grouped(deep_gemm, groups, m, n, mean, device, k_major=majors == "nt", empty=empty)
    ks_tensor = torch.tensor(ks, dtype=torch.int32, device=device)
    getattr(deep_gemm, f"k_grouped_fp8_gemm_{majors}_contiguous")(a, b, d, ks, ks_tensor, c)
    assert deep_gemm.testing.calc_diff(d, ref) < caller.LIMIT
    for g in range(groups):
        assert deep_gemm.testing.calc_diff(d[g], ref[g]) < caller.LIMIT


def test_k_grouped_psum_needs_no_host_sizes(deep_gemm):
    ks, alignment = [300, 0, 77, 128], 128
    starts, end = [], 0
    for k in ks:
        starts.append(deep_gemm.align(end, alignment))
        end = starts[-1] + k
    total = deep_gemm.align(end, alignment)
    a, b = (torch.zeros((total, r), dtype=torch.bfloat16) for r in (64, 96))
    c = torch.randn((4, 64, 96))
    ref = c.clone()
    for g, (start, k) in enumerate(zip(starts, ks)):
        a[start : start + k], b[start : start + k] = (caller.randn(k, x.shape[1], device="cpu") for x in (a, b))
        ref[g] += a[start : start + k].float().t() @ b[start : start + k].float()
    pairs = [deep_gemm.per_channel_cast_to_fp8(x, use_ue8m0=False) for x in (a, b)]
    ends = torch.tensor([s + k for s, k in zip(starts, ks)], dtype=torch.int32)
    for host in (None, [], [deep_gemm.align(k, alignment) for k in ks]):
        d = torch.empty_like(c)
        deep_gemm.k_grouped_fp8_gemm_tn_contiguous(*pairs, d, host, ends, c, use_psum_layout=True)
        assert all(deep_gemm.testing.calc_diff(d[g], ref[g]) < caller.LIMIT for g in range(4))


def test_k_grouped_psum_without_room_behind_the_last_group(deep_gemm):
    """Its end, rounded up to the alignment, lies beyond the columns that there are."""
    deep_gemm.set_mk_alignment_for_contiguous_layout(256)
    a, b = caller.randn(384, 64, device="cpu"), caller.randn(384, 96, device="cpu")
    a[128:256] = b[128:256] = 0
    pairs = [deep_gemm.per_channel_cast_to_fp8(x, use_ue8m0=False) for x in (a, b)]
    d = torch.full((2, 64, 96), float("nan"))
    deep_gemm.k_grouped_fp8_gemm_tn_contiguous(*pairs, d, None, torch.tensor([128, 384], dtype=torch.int32), use_psum_layout=True)
    for g, rows in enumerate((slice(0, 256), slice(256, 384))):
        assert deep_gemm.testing.calc_diff(d[g], a[rows].float().t() @ b[rows].float()) < caller.LIMIT


@pytest.mark.parametrize("majors", ["nt", "tn"])
def test_k_grouped_without_a_column(deep_gemm, majors):
    """Zero, or what there was to add to."""
    flat, scales = torch.zeros(0).to(torch.float8_e4m3fn), torch.zeros(64, 0)
    pair = (flat, scales) if majors == "nt" else (flat.view(0, 64), scales.t())
    function = getattr(deep_gemm, f"k_grouped_fp8_gemm_{majors}_contiguous")
    for c in (None, torch.full((2, 64, 64), 3.0)):
        d = torch.full((2, 64, 64), 7.0)
        function(pair, pair, d, [0, 0], torch.zeros(2, dtype=torch.int32), c)
        assert torch.equal(d, torch.zeros_like(d) if c is None else c)


def test_packed_scales_of_blocks_with_a_row_for_each_of_the_operands(deep_gemm):
    """As transform_sf_into_required_layout gives them on the newest chips: one row of a block counts."""
    a, b = (deep_gemm.per_token_cast_to_fp8(caller.randn(m, 1024, device="cpu"), use_ue8m0=True) for m in (40, 384))
    blocks = 2.0 ** torch.randint(-3, 4, (3, 8)).float()
    want, got = torch.empty(40, 384), torch.empty(40, 384)
    deep_gemm.fp8_gemm_nt(a, (b[0], blocks), want, recipe=(1, 128, 128))
    packed = deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(blocks.repeat_interleave(128, 0))
    packed_a = deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(a[1])
    deep_gemm.fp8_gemm_nt((a[0], packed_a), (b[0], packed), got, recipe=(1, 128, 128))
    assert torch.equal(got, want)


def test_c_beside_d_is_copied_and_kept(deep_gemm):
    a, b, _, d, _ = caller.dense(deep_gemm, 64, 128, 256, "cpu", out=torch.float32)
    deep_gemm.fp8_gemm_nt(a, b, d)
    c = torch.randn_like(d)
    kept, got = c.clone(), torch.full_like(d, float("nan"))
    deep_gemm.fp8_gemm_nt(a, b, got, c)
    torch.testing.assert_close(got, d + c)
    assert torch.equal(c, kept)


def test_c_without_k(deep_gemm):
    """No columns to contract: d = c, or zero."""
    empty = (torch.empty((4, 0), dtype=torch.float8_e4m3fn), torch.empty((4, 0)))
    weight = (torch.empty((6, 0), dtype=torch.float8_e4m3fn), torch.empty((1, 0)))
    c = torch.randn((4, 6))
    d = torch.full_like(c, 5.0)
    deep_gemm.fp8_gemm_nt(empty, weight, d, c)
    assert torch.equal(d, c)
    deep_gemm.fp8_gemm_nt(empty, weight, d)
    assert not d.any()


@pytest.mark.parametrize("shape", [(0, 128, 256), (16, 0, 256)])
def test_empty(deep_gemm, shape):
    m, n, k = shape
    a = (torch.empty((m, k), dtype=torch.float8_e4m3fn), torch.empty((m, k // 128)))
    b = (torch.empty((n, k), dtype=torch.float8_e4m3fn), torch.empty((-(-n // 128), k // 128)))
    deep_gemm.fp8_gemm_nt(a, b, torch.empty((m, n), dtype=torch.bfloat16))
    stacked = (b[0][None], b[1][None])
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, stacked, torch.empty((m, n), dtype=torch.bfloat16),
                                               torch.zeros(m, dtype=torch.int32))


def test_segments_of_any_length_and_order(deep_gemm):
    """More than upstream: no alignment, unsorted and repeated ids, -1 anywhere."""
    ids = torch.tensor([2, 2, -1, 0, 0, 0, 2, 1, -1], dtype=torch.int32)
    a, b = caller.randn(9, 128, device="cpu"), caller.randn(3, 64, 128, device="cpu")
    d = torch.full((9, 64), float("nan"), dtype=torch.bfloat16)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(deep_gemm.per_token_cast_to_fp8(a, use_ue8m0=False),
                                               caller.each_block(deep_gemm, b), d, ids)
    for row, g in enumerate(ids.tolist()):
        ref = a[row] @ b[g].t() if g >= 0 else torch.zeros(64)
        assert deep_gemm.testing.calc_diff(d[row], ref) < 2e-3, row


def test_psum_without_zero_padding_leaves_gaps(deep_gemm):
    a, b, d, ends, ref, sizes, starts = caller.contiguous(deep_gemm, 3, 50, 64, 128, "cpu", psum=True)
    d.fill_(7)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, ends, use_psum_layout=True, ensure_zero_padding=False,
                                               expected_m_for_psum_layout=50)
    for g, (start, size) in enumerate(zip(starts, sizes)):
        stop = starts[g + 1] if g + 1 < len(starts) else len(d)
        assert deep_gemm.testing.calc_diff(d[start : start + size], ref[start : start + size]) < caller.LIMIT
        assert (d[start + size : stop] == 7).all()


def test_psum_follows_the_alignment_that_is_set(deep_gemm):
    deep_gemm.set_mk_alignment_for_contiguous_layout(32)
    a, b, d, ends, ref, *_ = caller.contiguous(deep_gemm, 5, 20, 64, 128, "cpu", psum=True)
    assert len(d) < 5 * 128
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, ends, use_psum_layout=True)
    assert deep_gemm.testing.calc_diff(d, ref) < caller.LIMIT
