"""The calls that vLLM, SGLang and torchao make, argument by argument, with scales in every layout they bring.

vLLM: `vllm/utils/deep_gemm.py` and its DeepGEMM experts; SGLang: `deep_gemm_wrapper/entrypoint.py`; torchao:
its blockwise FP8 training of grouped experts.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util

import pytest
import torch

from narrowgemm.testing.numerics import KERNEL_GATE, calc_diff

from . import _caller as caller

M, N, K, G = 48, 384, 640, 3


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """The same bits on the CPU; on a GPU another scale layout may take another kernel, with another order of sums."""
    return torch.equal(got, want) if got.device.type == "cpu" else calc_diff(got, want) < KERNEL_GATE["bf16"]


def bf16(*shape: int, device: str) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device)


def codes(scale: torch.Tensor) -> torch.Tensor:
    """uint8 E8M0 codes of float32 powers of two."""
    return (scale.contiguous().view(torch.int32) >> 23).to(torch.uint8)


def packed(scale: torch.Tensor) -> torch.Tensor:
    """int32 of four codes along K, the last word filled with 1.0."""
    return torch.nn.functional.pad(codes(scale), (0, -scale.shape[-1] % 4), value=127).view(torch.int32)


def rows(scale: torch.Tensor, n: int) -> torch.Tensor:
    """128x128 scales expanded to one row each."""
    return scale.repeat_interleave(128, -2)[..., :n, :].contiguous()


def activations(dg, device: str, use_ue8m0: bool = False):
    x = caller.randn(M, K, device=device)
    return x, dg.per_token_cast_to_fp8(x, use_ue8m0=use_ue8m0)


def weights(dg, device: str, use_ue8m0: bool = False):
    w = caller.randn(G, N, K, device=device)
    return w, caller.each_block(dg, w, use_ue8m0)


A_LAYOUTS = {
    "row_major": lambda dg, s: s,
    "mn_major_tma_aligned": lambda dg, s: dg.get_mn_major_tma_aligned_tensor(s),
    "transposed": lambda dg, s: s.t().contiguous(),
    "e8m0_bytes": lambda dg, s: codes(s),
    "float8_e8m0fnu": lambda dg, s: codes(s).view(torch.float8_e8m0fnu),
    "packed": lambda dg, s: packed(s),
    "packed_mn_major": lambda dg, s: dg.get_mn_major_tma_aligned_packed_ue8m0_tensor(s),
}
B_LAYOUTS = {
    "row_major": lambda dg, s: s,
    "transposed": lambda dg, s: s.mT.contiguous(),
    "column_major": lambda dg, s: s.mT.contiguous().mT,
    "rows_fp32": lambda dg, s: rows(s, N),
    "e8m0_bytes": lambda dg, s: codes(s),
    "float8_e8m0fnu": lambda dg, s: codes(s).view(torch.float8_e8m0fnu),
    "packed": lambda dg, s: packed(s),
    "packed_rows": lambda dg, s: packed(rows(s, N)),
    "packed_rows_mn_major": lambda dg, s: dg.get_mn_major_tma_aligned_packed_ue8m0_tensor(rows(s, N)),
}


@pytest.mark.parametrize("a_layout", A_LAYOUTS)
@pytest.mark.parametrize("b_layout", B_LAYOUTS)
def test_every_scale_layout_gives_the_same_bits(deep_gemm, where, a_layout, b_layout):
    _, (a, sa) = activations(deep_gemm, where, use_ue8m0=True)
    _, (b, sb) = weights(deep_gemm, where, use_ue8m0=True)
    want, got = bf16(2, M, N, device=where)
    deep_gemm.fp8_gemm_nt((a, sa), (b[0], sb[0]), want)
    deep_gemm.fp8_gemm_nt((a, A_LAYOUTS[a_layout](deep_gemm, sa)), (b[0], B_LAYOUTS[b_layout](deep_gemm, sb)[0]), got)
    assert same(got, want)


@pytest.mark.parametrize("b_layout", B_LAYOUTS)
def test_every_weight_scale_layout_grouped(deep_gemm, where, b_layout):
    _, a = activations(deep_gemm, where, use_ue8m0=True)
    _, (b, sb) = weights(deep_gemm, where, use_ue8m0=True)
    ids = torch.arange(M, dtype=torch.int32, device=where) % G
    want, got = bf16(2, M, N, device=where)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, (b, sb), want, ids)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, (b, B_LAYOUTS[b_layout](deep_gemm, sb)), got, ids)
    assert same(got, want)


@pytest.mark.parametrize("m", [1, 5, 48])
def test_packed_scales_of_one_word_a_row(deep_gemm, where, m):
    """K up to 512: the one column of words has a stride of its own."""
    x, w = caller.randn(m, 384, device=where), caller.randn(N, 384, device=where)
    (a, sa), (b, sb) = (deep_gemm.per_token_cast_to_fp8(t, use_ue8m0=True) for t in (x, w))
    want, got = bf16(2, m, N, device=where)
    deep_gemm.fp8_gemm_nt((a, sa), (b, sb), want)
    pack = deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor
    deep_gemm.fp8_gemm_nt((a, pack(sa)), (b, pack(sb)), got)
    assert same(got, want)


def test_packed_rows_with_the_recipe_of_128x128(deep_gemm, where):
    _, a = activations(deep_gemm, where, use_ue8m0=True)
    _, (b, sb) = weights(deep_gemm, where, use_ue8m0=True)
    want, got = bf16(2, M, N, device=where)
    deep_gemm.fp8_gemm_nt(a, (b[0], sb[0]), want)
    deep_gemm.fp8_gemm_nt(a, (b[0], packed(rows(sb, N))[0]), got, recipe=(1, 128, 128))
    assert same(got, want)


def test_float32_scales_are_never_rounded(deep_gemm, where):
    """Without `disable_ue8m0_cast` upstream may cast scales on some GPUs; here the flag changes nothing."""
    x, a = activations(deep_gemm, where)
    w, (b, sb) = weights(deep_gemm, where)
    one, two = bf16(2, M, N, device=where)
    kept = a[1].clone(), sb.clone()
    deep_gemm.fp8_gemm_nt(a, (b[0], sb[0]), one, disable_ue8m0_cast=False)
    deep_gemm.fp8_gemm_nt(a, (b[0], sb[0]), two, disable_ue8m0_cast=True)
    assert torch.equal(one, two) and torch.equal(a[1], kept[0]) and torch.equal(sb, kept[1])
    assert deep_gemm.testing.calc_diff(one, x @ w[0].t()) < caller.LIMIT


def test_vllm(deep_gemm, where):
    assert importlib.util.find_spec("deep_gemm") is not None
    dg = importlib.import_module("deep_gemm")
    dg.set_pdl(True)

    @contextlib.contextmanager
    def mk_alignment_scope(value: int):
        before = dg.get_mk_alignment_for_contiguous_layout()
        dg.set_mk_alignment_for_contiguous_layout(value)
        try:
            yield
        finally:
            dg.set_mk_alignment_for_contiguous_layout(before)

    # dense linear: scales through transform_sf_into_required_layout
    x, (a, sa) = activations(dg, where)
    w, (b, sb) = weights(dg, where)
    assert dg.get_tma_aligned_size(M, 4) == M
    wanted = dg.transform_sf_into_required_layout(sf=sb[0].unsqueeze(0), mn=N, k=K, recipe=(1, 128, 128), num_groups=1,
                                                  is_sfa=False, disable_ue8m0_cast=True).squeeze(0)
    out = bf16(M, N, device=where)
    dg.fp8_gemm_nt((a, dg.get_mn_major_tma_aligned_tensor(sa)), (b[0], wanted), out, disable_ue8m0_cast=True)
    assert dg.testing.calc_diff(out, x @ w[0].t()) < caller.LIMIT

    # experts, contiguous and psum, under a per-call alignment
    align = dg.get_theoretical_mk_alignment_for_contiguous_layout(M, G)
    with mk_alignment_scope(align):
        for psum in (False, True):
            pair, stacked, d, layout, ref, *_ = caller.contiguous(dg, G, 100, N, K, where, psum=psum)
            dg.m_grouped_fp8_gemm_nt_contiguous(pair, stacked, d, layout, disable_ue8m0_cast=True, use_psum_layout=psum)
            assert dg.testing.calc_diff(d, ref) < caller.LIMIT
    assert dg.get_mk_alignment_for_contiguous_layout() == 128

    # batched experts
    pair, stacked, d, tokens, ref = caller.masked(dg, G, 64, 30, N, K, where)
    dg.fp8_m_grouped_gemm_nt_masked(pair, stacked, d, tokens, 30, disable_ue8m0_cast=True)
    assert all(dg.testing.calc_diff(d[g, :t], ref[g, :t]) < caller.LIMIT for g, t in enumerate(tokens.tolist()))


@pytest.mark.parametrize("pack", [False, True])
def test_vllm_mxfp8(deep_gemm, where, pack):
    """1x32 E8M0 scales on both sides, as float8_e8m0fnu or packed."""
    x, w = caller.randn(M, K, device=where), caller.randn(G, N, K, device=where)
    a, sa = deep_gemm.per_token_cast_to_fp8(x, use_ue8m0=True, gran_k=32)
    b, sb = deep_gemm.per_token_cast_to_fp8(w.view(-1, K), use_ue8m0=True, gran_k=32)
    b, sb = b.view(G, N, K), sb.view(G, N, -1)
    ids = (torch.arange(M, device=where) // 20).to(torch.int32)
    d = bf16(M, N, device=where)
    as_e8m0 = packed if pack else (lambda s: codes(s).view(torch.float8_e8m0fnu))
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous((a, as_e8m0(sa)), (b, as_e8m0(sb)), d, ids, disable_ue8m0_cast=False,
                                               recipe_a=(1, 32), recipe_b=(1, 32))
    for g in range(G):
        assert deep_gemm.testing.calc_diff(d[ids == g], x[ids == g] @ w[g].t()) < caller.LIMIT


@pytest.mark.parametrize("psum", [False, True])
def test_vllm_fp4_experts(deep_gemm, where, psum):
    """FP8 tokens with 1x128 scales on MXFP4 experts: payload as int8, scales as float8_e8m0fnu."""
    pair, _, d, layout, _, sizes, starts = caller.contiguous(deep_gemm, G, 60, N, K, where, psum=psum)
    w = caller.randn(G, N, K, device=where)
    parts = [deep_gemm.per_token_cast_to_fp4(x, True, 32) for x in w]
    b, sb = torch.stack([x for x, _ in parts]), torch.stack([codes(x) for _, x in parts]).view(torch.float8_e8m0fnu)
    deep_gemm.m_grouped_fp8_fp4_gemm_nt_contiguous(pair, (b.view(torch.int8), sb), d, layout, use_psum_layout=psum, recipe_a=(1, 128),
                                                   recipe_b=(1, 32))
    a = pair[0].float() * pair[1].repeat_interleave(128, -1)[:, :K]
    for g, (start, size) in enumerate(zip(starts, sizes)):
        values = deep_gemm.cast_back_from_fp4(*parts[g], 32)
        assert calc_diff(d[start:start + size], a[start:start + size] @ values.t()) < KERNEL_GATE["bf16"]


def test_names_that_are_optional_to_their_callers(deep_gemm):
    """vLLM takes symbols by getattr and lives without those that an older DeepGEMM lacks; the older arity is taken, too."""
    for name in ("fp8_mqa_logits", "fp8_paged_mqa_logits", "fp8_fp4_mega_moe", "tf32_hc_prenorm_gemm"):
        assert getattr(deep_gemm, name, None) is None
    assert deep_gemm.get_theoretical_mk_alignment_for_contiguous_layout(64) == 128


def test_sglang(deep_gemm, where):
    from deep_gemm.utils.layout import get_mn_major_tma_aligned_tensor

    x, (a, sa) = activations(deep_gemm, where)
    w, (b, sb) = weights(deep_gemm, where)
    before = deep_gemm.get_num_sms()
    deep_gemm.set_num_sms(before)
    ids = (torch.arange(M, device=where) // 16).to(torch.int32)
    out = bf16(M, N, device=where)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous([a, get_mn_major_tma_aligned_tensor(sa)], [b, sb], out, ids)
    for g in range(G):
        assert deep_gemm.testing.calc_diff(out[ids == g], x[ids == g] @ w[g].t()) < caller.LIMIT
    pair, stacked, d, tokens, ref = caller.masked(deep_gemm, G, 64, 30, N, K, where)
    got = deep_gemm.fp8_m_grouped_gemm_nt_masked(pair, stacked, d, tokens, 30, recipe_a=[1, 128], recipe_b=[128, 128])
    assert got is None
    assert all(deep_gemm.testing.calc_diff(d[g, :t], ref[g, :t]) < caller.LIMIT for g, t in enumerate(tokens.tolist()))
    # its warm-up: compile without launching
    mode = deep_gemm.get_compile_mode()
    deep_gemm.set_compile_mode(1)
    for m in range(1, 9):
        deep_gemm.fp8_gemm_nt((a[:m], sa[:m]), (b[0], sb[0]), out[:m])
    deep_gemm.set_compile_mode(mode)


def test_torchao(deep_gemm, where):
    module = importlib.import_module("deep_gemm")
    m_grouped = getattr(module, "m_grouped_fp8_gemm_nt_contiguous", None) or module.m_grouped_fp8_fp4_gemm_nt_contiguous
    pair, stacked, out, layout, ref, *_ = caller.contiguous(module, G, 100, N, K, where, psum=False)
    m_grouped(pair, stacked, out, layout, recipe_a=(1, 128), recipe_b=(128, 128), disable_ue8m0_cast=True)
    assert module.testing.calc_diff(out, ref) < caller.LIMIT

    a, b, c, _, ref, ks = caller.k_grouped(module, G, 96, 160, 200, where, k_major=True, empty=False)
    ks_tensor = torch.tensor(ks, dtype=torch.int32, device=where)
    out, zero = torch.empty_like(c), torch.zeros_like(c)
    module.k_grouped_fp8_gemm_nt_contiguous(a, b, out, ks_tensor.tolist(), ks_tensor, zero, recipe=(1, 1, 128))
    assert module.testing.calc_diff(out, ref - c) < caller.LIMIT and not zero.any()
