"""DeepGEMM's BF16 names: a real package's where there is one, else ours, in every form and layout, and what they refuse."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType

import pytest
import torch

from narrowgemm.compat import deep_gemm as compat
from narrowgemm.compat.deep_gemm import bf16

from ._caller import close, randn

M, N, K, G = 37, 72, 136, 3
GEMM = "a b d c=None compiled_dims={}"
SIGNATURES = {      # DeepGEMM 2.6.1, `csrc/apis/gemm.hpp`
    **{f"bf16_gemm_{x}": GEMM.format("'nk'" if x[0] == "n" else "'mn'") for x in ("nt", "nn", "tn", "tt")},
    **{f"cublaslt_gemm_{x}": "a b d c=None" for x in ("nt", "nn", "tn", "tt")},
    "m_grouped_bf16_gemm_nt_contiguous": "a b d grouped_layout compiled_dims='nk' use_psum_layout=False ensure_zero_padding=True "
                                         "expected_m_for_psum_layout=None",
    "m_grouped_bf16_gemm_nn_contiguous": "a b d grouped_layout compiled_dims='nk' use_psum_layout=False ensure_zero_padding=True",
    "m_grouped_bf16_gemm_nt_masked": "a b d masked_m expected_m compiled_dims='nk'",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    parameters = inspect.signature(getattr(bf16, name)).parameters.values()
    given = [p.name + ("" if p.default is p.empty else f"={p.default!r}") for p in parameters]
    assert given == SIGNATURES[name].split() and name in bf16.NAMES
    assert getattr(bf16, name).__doc__


def test_a_real_package_comes_first(clean_modules) -> None:
    assert compat.bf16_gemm_nt is bf16.bf16_gemm_nt and compat.bf16_m_grouped_gemm_nt_masked is bf16.m_grouped_bf16_gemm_nt_masked
    real = ModuleType("deep_gemm")
    real.bf16_gemm_nt = lambda *a: "real"       # type: ignore[attr-defined]
    sys.modules["deep_gemm"] = real
    assert compat.bf16_gemm_nt() == "real"
    assert compat.m_grouped_bf16_gemm_nt_masked is bf16.m_grouped_bf16_gemm_nt_masked, "which this one lacks"


@pytest.mark.parametrize("form", ["nt", "nn", "tn", "tt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["bf16_gemm", "cublaslt_gemm"])
def test_dense(where: str, name: str, form: str, dtype: torch.dtype) -> None:
    a = randn(M, K, device=where) if form[0] == "n" else randn(K, M, device=where)
    b = randn(N, K, device=where) if form[1] == "t" else randn(K, N, device=where)
    want = (a if form[0] == "n" else a.T).float() @ (b.T if form[1] == "t" else b).float()
    d, c = torch.empty(M, N, dtype=dtype, device=where), torch.randn(M, N, device=where).to(dtype)
    getattr(bf16, f"{name}_{form}")(a, b, d)
    close(d, want)
    getattr(bf16, f"{name}_{form}")(a, b, d, c)
    close(d, want + c.float())


@pytest.mark.parametrize("nn", [False, True])
def test_contiguous(where: str, nn: bool) -> None:
    ids = torch.tensor([2] * 9 + [-1] * 3 + [0] * 20 + [1] * 5, dtype=torch.int32, device=where)
    a, b = randn(M, K, device=where), randn(G, N, K, device=where)
    call = bf16.m_grouped_bf16_gemm_nn_contiguous if nn else bf16.m_grouped_bf16_gemm_nt_contiguous
    weights = b.mT.contiguous() if nn else b
    d = torch.full((M, N), 9.0, dtype=torch.bfloat16, device=where)
    call(a, weights, d, ids)
    for g in range(G):
        close(d[ids == g], a[ids == g].float() @ b[g].float().T)
    assert not d[9:12].any()
    compat.set_mk_alignment_for_contiguous_layout(16)
    ends = torch.tensor([5, 5, 37], dtype=torch.int32, device=where)
    for zero in (True, False):
        d = torch.full((M, N), 9.0, dtype=torch.bfloat16, device=where)
        call(a, weights, d, ends, use_psum_layout=True, ensure_zero_padding=zero)
        close(d[:5], a[:5].float() @ b[0].float().T)
        close(d[16:], a[16:].float() @ b[2].float().T)
        assert bool((d[5:16] == (0 if zero else 9)).all())


def test_masked(where: str) -> None:
    a, b = randn(G, 8, K, device=where), randn(G, N, K, device=where)
    d, rows = torch.full((G, 8, N), 9.0, dtype=torch.bfloat16, device=where), (0, 4, 8)
    bf16.m_grouped_bf16_gemm_nt_masked(a, b, d, torch.tensor(rows, dtype=torch.int32, device=where), 4)
    for g, n in enumerate(rows):
        if n:
            close(d[g, :n], a[g, :n].float() @ b[g].float().T)
        assert bool((d[g, n:] == 9).all())


X, W, D = torch.zeros(4, 16, dtype=torch.bfloat16), torch.zeros(8, 16, dtype=torch.bfloat16), torch.zeros(4, 8)
IDS = torch.zeros(4, dtype=torch.int32)


@pytest.mark.parametrize("call, error, match", [
    (lambda: bf16.bf16_gemm_nt(X.float(), W, D), TypeError, "a, dtype: got torch.float32, expected torch.bfloat16"),
    (lambda: bf16.bf16_gemm_nt((X, X), W, D), TypeError, "a: got tuple"),
    (lambda: bf16.bf16_gemm_nt(X, W[:, :8], D), ValueError, "K of a and b: got 16 and 8"),
    (lambda: bf16.bf16_gemm_nt(X, W, D[:2]), ValueError, "d, shape"),
    (lambda: bf16.bf16_gemm_nt(X, W, D, D.double()), TypeError, "c, dtype"),
    (lambda: bf16.bf16_gemm_nn(X, W[0], D), TypeError, "b: got"),
    (lambda: bf16.bf16_gemm_nt(X, W, D, compiled_dims="xy"), ValueError, "compiled_dims"),
    (lambda: bf16.m_grouped_bf16_gemm_nt_contiguous(X, W, D, IDS), ValueError, "b, shape"),
    (lambda: bf16.m_grouped_bf16_gemm_nt_contiguous(X, W[None], D, IDS[:3]), ValueError, "grouped_layout, length"),
    (lambda: bf16.m_grouped_bf16_gemm_nt_masked(X[None], W[None], D[None], IDS[:1], D), TypeError, "expected_m"),
])
def test_what_is_refused(call, error, match) -> None:
    with pytest.raises(error, match=match):
        call()
