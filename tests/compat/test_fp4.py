"""FP4 behind DeepGEMM's names: payloads and scales of every kind, blocks of 32 and 128, packed weights."""

from __future__ import annotations

import pytest
import torch

from narrowgemm import Unsupported
from narrowgemm.testing.numerics import calc_diff

G, M, N, K = 3, 37, 72, 288
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 5e-6}


def rows(deep_gemm, kind: str, m: int, k: int, seed: int, payload: torch.dtype = torch.int8, gran: int = 32,
         scales: str = "packed"):
    """((payload, scales), values) of `[m, k]`."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    if kind == "fp8":
        data, sf = deep_gemm.per_token_cast_to_fp8(x, use_ue8m0=False)
        return (data, sf), data.float() * sf.repeat_interleave(128, 1)[:, :k]
    if kind == "mxfp8":
        data, sf = deep_gemm.per_token_cast_to_fp8(x, use_ue8m0=True, gran_k=32)
        return (data, sf), data.float() * sf.repeat_interleave(32, 1)
    data, sf = deep_gemm.per_token_cast_to_fp4(x, True, gran)
    values = deep_gemm.cast_back_from_fp4(data, sf, gran)
    if scales == "packed":
        sf = deep_gemm.per_token_cast_to_fp4(x, True, gran, True)[1]
    elif scales == "codes":
        sf = (sf.view(torch.int32) >> 23).to(torch.uint8)
    elif scales == "e8m0":
        sf = (sf.view(torch.int32) >> 23).to(torch.uint8).view(torch.float8_e8m0fnu)
    elif scales == "mn":
        sf = deep_gemm.get_mn_major_tma_aligned_tensor(sf)
    elif scales == "transposed":
        sf = sf.t().contiguous()
    elif scales == "required":
        sf = deep_gemm.transform_sf_into_required_layout(sf, m, k, (1, gran))
    if payload == torch.int32:
        data = data.view(torch.uint8).view(torch.int32)
    elif payload != torch.int8:
        data = data.view(payload)
    return (data, sf), values


def weights(deep_gemm, groups: int, **kw):
    parts = [rows(deep_gemm, "fp4", N, K, 50 + g, **kw) for g in range(groups)]
    return tuple(torch.stack([p[0][i] for p in parts]) for i in (0, 1)), torch.stack([p[1] for p in parts])


def close(d: torch.Tensor, want: torch.Tensor) -> None:
    assert calc_diff(d, want) <= LIMIT[d.dtype]


SCALES = ("packed", "fp32", "codes", "e8m0", "mn", "transposed", "required")
WAYS = [*(("fp4", s, torch.int8) for s in SCALES), *((a, s, torch.int32) for a in ("fp8", "mxfp8") for s in ("packed", "fp32", "mn")),
        ("fp4", "packed", torch.int32), ("fp8", "codes", torch.float4_e2m1fn_x2)]


@pytest.mark.parametrize("a, scales, payload", WAYS, ids=str)
def test_dense(deep_gemm, a: str, scales: str, payload: torch.dtype) -> None:
    kw = {"payload": payload, "scales": scales}
    pa, va = rows(deep_gemm, a, M, K, 1, **(kw if a == "fp4" else {}))
    pb, vb = rows(deep_gemm, "fp4", N, K, 2, **kw)
    d = torch.full((M, N), 9.0)
    recipe = {"recipe_a": (1, 128 if a == "fp8" else 32), "recipe_b": (1, 32)}
    deep_gemm.fp8_fp4_gemm_nt(pa, pb, d, **recipe)
    close(d, va @ vb.t())
    before = d.clone()
    deep_gemm.fp8_gemm_nt(pa, pb, d, c=d, **recipe)
    close(d, before + va @ vb.t())
    if scales != "transposed":
        deep_gemm.fp8_fp4_gemm_nn(pa, (pb[0].mT, pb[1].mT), d, **recipe)
        assert torch.equal(d, before)


def test_the_branch_s_own_convention(deep_gemm) -> None:
    """int32 payloads and int32 scales through the FP8 names, recipe (1, 1, 128): a word of scales for 128 of K."""
    pa, va = rows(deep_gemm, "fp4", M, 256, 1, payload=torch.int32)
    pb, vb = rows(deep_gemm, "fp4", N, 256, 2, payload=torch.int32)
    d = torch.zeros(M, N)
    deep_gemm.fp8_gemm_nt(pa, pb, d, recipe=(1, 1, 128))
    close(d, va @ vb.t())


@pytest.mark.parametrize("scales", ["packed", "fp32"])
def test_blocks_of_128(deep_gemm, scales: str) -> None:
    pa, va = rows(deep_gemm, "fp8", M, K, 1)
    pb, vb = rows(deep_gemm, "fp4", N, K, 2, gran=128, scales=scales)
    d = torch.zeros(M, N)
    deep_gemm.fp8_fp4_gemm_nt(pa, pb, d, recipe_a=(1, 128), recipe_b=(1, 128))
    close(d, va @ vb.t())


def test_scales_that_are_no_powers_of_two_are_refused(deep_gemm) -> None:
    pb, _ = rows(deep_gemm, "fp4", N, K, 2, scales="fp32")
    with pytest.raises(ValueError, match="powers of two"):
        deep_gemm.fp8_fp4_gemm_nt(rows(deep_gemm, "fp8", M, K, 1)[0], (pb[0], pb[1] * 1.5), torch.zeros(M, N))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("a", ["fp8", "fp4"])
def test_grouped(deep_gemm, a: str, packed: bool) -> None:
    pair, vb = weights(deep_gemm, G)
    b = deep_gemm.prepack_fp4(pair) if packed else pair
    recipe = {"recipe_a": (1, 128 if a == "fp8" else 32), "recipe_b": (1, 32)}
    ids = torch.tensor([2] * 9 + [-1] * 3 + [0] * 20 + [1] * 5, dtype=torch.int32)
    pa, va = rows(deep_gemm, a, M, K, 3)
    want = torch.stack([va[r] @ vb[g].t() if g >= 0 else torch.zeros(N) for r, g in enumerate(ids.tolist())])
    for name in ("m_grouped_fp8_fp4_gemm_nt_contiguous", "m_grouped_fp8_gemm_nt_contiguous"):
        d = torch.full((M, N), 9.0, dtype=torch.bfloat16)
        getattr(deep_gemm, name)(pa, b, d, ids, **recipe)
        close(d, want)
        assert not d[9:12].any()
    ends = torch.tensor([5, 5, 37], dtype=torch.int32)
    deep_gemm.set_mk_alignment_for_contiguous_layout(16)
    d = torch.full((M, N), 9.0)
    deep_gemm.m_grouped_fp8_fp4_gemm_nt_contiguous(pa, b, d, ends, **recipe, use_psum_layout=True)
    close(d[:5], va[:5] @ vb[0].t())
    close(d[16:], va[16:] @ vb[2].t())
    assert not d[5:16].any()
    masked = torch.tensor([0, 4, 1], dtype=torch.int32)
    parts = [rows(deep_gemm, a, 8, K, 70 + g) for g in range(G)]
    pm = tuple(torch.stack([p[0][i] for p in parts]) for i in (0, 1))
    d = torch.full((G, 8, N), 9.0)
    deep_gemm.m_grouped_fp8_fp4_gemm_nt_masked(pm, b, d, masked, 2, **recipe)
    for g, rows_ in enumerate(masked.tolist()):
        if rows_:
            close(d[g, :rows_], parts[g][1][:rows_] @ vb[g].t())
        assert bool((d[g, rows_:] == 9).all())


def test_packed_weights_lie_one_way(deep_gemm) -> None:
    pair, _ = weights(deep_gemm, 1)
    b = deep_gemm.prepack_fp4((pair[0][0], pair[1][0]), (1, 32))
    assert deep_gemm.prepack_fp4((pair[0][0], pair[1][0]), (1, 32), "fp8").prepack != b.prepack
    a, _ = rows(deep_gemm, "fp8", M, K, 3)
    d, plain = torch.zeros(M, N), torch.zeros(M, N)
    deep_gemm.fp8_fp4_gemm_nt(a, b, d)
    deep_gemm.fp8_fp4_gemm_nt(a, (pair[0][0], pair[1][0]), plain)
    assert torch.equal(d, plain)
    with pytest.raises(Unsupported, match="the nt names"):
        deep_gemm.fp8_fp4_gemm_nn(a, b, d)
    with pytest.raises(ValueError, match="b, shape"):
        deep_gemm.m_grouped_fp8_fp4_gemm_nt_contiguous(a, b, d, torch.zeros(M, dtype=torch.int32))
    with pytest.raises(TypeError, match="payload dtype"):
        deep_gemm.prepack_fp4(a)
