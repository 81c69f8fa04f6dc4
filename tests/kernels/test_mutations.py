"""The gates notice broken kernels: each mutation plants one fault in the portable kernel's source and must be caught."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from narrowgemm.kernels.triton import fp8_block
from narrowgemm.testing.cases import Case, build

DEVICE_MODULE = "narrowgemm.kernels.triton.fp8_block_device"
GROUPED = Case("mutations", "offsets", 4, 24, 200, 384, sizes="uniform:0.5:1.5", slack=8)
MASKED = Case("mutations", "masked", 3, 20, 200, 384, max_m=40, sizes="uniform:0.5:1.5")
CONTIGUOUS = Case("mutations", "contiguous", 4, 24, 200, 384, sizes="uniform:0.5:1.5", alignment=8)
TAIL = Case("mutations", "dense", 1, 40, 200, 320)

# name: (text, replacement, case, what the failure must say)
MUTATIONS = {
    "A's scale of the next K block": ("m_off * stride_sam + kb0 * stride_sak", "m_off * stride_sam + (kb0 + 1) % 2 * stride_sak", GROUPED, "kernel"),
    "B's scale never advances": ("        sb_ptrs += stride_sbk\n", "", GROUPED, "kernel"),
    "B's scale of the wrong columns": ("n_scale = n0 // GROUP_N", "n_scale = 0", GROUPED, "kernel"),
    "two groups swapped": ("b_ptr += g.to(tl.int64) * stride_bg", "b_ptr += (g ^ 1).to(tl.int64) * stride_bg", GROUPED, "kernel"),
    "rows stored without a mask": ("m_arange, n_off, m_arange < valid, col_live,", "m_arange, n_off, m_arange < BM, col_live,", MASKED, "belong to no group"),
    "columns stored without a mask": ("col_live = n_off < N - n0", "col_live = n_off < BN", MASKED, "past the output|belong to no group|kernel"),
    "padding rows not zeroed": ("if tl.sum(tl.where(real | (m_arange >= extent), 0, 1)) > 0:", "if M < 0:", CONTIGUOUS, "padding rows"),
    "one group a tile": ("gid = tl.min(tl.where(real & (ids > gid), ids, G))", "gid = G", CONTIGUOUS, "kernel"),
    "K tail not masked": ("offs_k, K - kb * BK, EVEN_K", "offs_k, BK, EVEN_K", TAIL, "kernel"),
    "last K block dropped": ("for kb in range(kb0, kb1):", "for kb in range(kb0, kb1 - 1):", GROUPED, "kernel"),
    "no promotion by scale": ("acc += p * (sa * sb)[None, :]", "acc += p", GROUPED, "kernel"),
}


@pytest.fixture
def planted(monkeypatch, tmp_path, request):
    """The device module, with one mutation."""
    text, replacement, _, _ = MUTATIONS[request.param]
    original = importlib.util.find_spec(DEVICE_MODULE)
    with open(original.origin) as f:
        source = f.read()
    assert text in source, f"{request.param}: the kernel has no such line any more"
    path = tmp_path / "mutated_device.py"
    path.write_text(source.replace(text, replacement))
    spec = importlib.util.spec_from_file_location(DEVICE_MODULE, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, DEVICE_MODULE, module)
    monkeypatch.setattr(sys.modules["narrowgemm.kernels.triton"], "fp8_block_device", module, raising=False)
    monkeypatch.setenv("NARROWGEMM_ARCH", "h200")
    return request.param


@pytest.mark.interpret
@pytest.mark.parametrize("planted", MUTATIONS, indirect=True)
def test_planted_fault_is_caught(planted: str) -> None:
    _, _, case, symptom = MUTATIONS[planted]
    with pytest.raises(AssertionError, match=symptom):
        build(case, "cpu", seed=3).verify(backend="triton")


@pytest.mark.interpret
@pytest.mark.parametrize("case", [GROUPED, MASKED, CONTIGUOUS, TAIL], ids=lambda c: c.layout)
def test_no_fault_without_mutation(case: Case, monkeypatch) -> None:
    monkeypatch.setenv("NARROWGEMM_ARCH", "h200")
    assert build(case, "cpu", hollow=True).plan(backend="triton").kernel == fp8_block.NAME
    build(case, "cpu", seed=3).verify(backend="triton")
