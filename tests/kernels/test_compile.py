"""The portable FP8 kernels compile for every target: the matrix instruction they claim is there, and nothing spills."""

from __future__ import annotations

import pytest

from narrowgemm.arch import get_arch

from .._compile import TRITONS, compile_jobs

MATRIX_OPS = {
    "sm90": ("wgmma.mma_async", "e4m3"),
    "sm100": ("tcgen05.mma",),
    "gfx942": ("v_mfma_f32_32x32x8_f16",),        # E4M3FN is widened: its matrix unit takes E4M3FNUZ only
    "gfx950": ("v_mfma_f32_32x32x64_f8f6f4",),
}


@pytest.mark.compile
@pytest.mark.parametrize("triton", TRITONS)
@pytest.mark.parametrize("target", MATRIX_OPS)
def test_portable_kernels(target: str, triton: str) -> None:
    reports = [r for r in compile_jobs(target, "tests.kernels.fp8_block_jobs:jobs", triton=triton) if r["kernel"] != "reduce_splits_kernel"]
    assert len(reports) == 12
    for r in reports:
        missing = [op for op in MATRIX_OPS[target] if not r["ops"].get(op)]
        assert not missing, f"{target}, {r['job']}: no {missing} in {r['ops']}"
        assert r["spills"] == 0, f"{target}, {r['job']}: {r['spills']} bytes spilled"
        assert r["shared"] <= get_arch(target).smem, f"{target}, {r['job']}: {r['shared']} bytes of shared memory"


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("target", MATRIX_OPS)
def test_whole_search_space(target: str) -> None:
    """Every config of every layout; the stated shared memory is no less than the compiler's."""
    for r in compile_jobs(target, "tests.kernels.fp8_block_jobs:jobs", "all"):
        assert r["spills"] == 0 and r["shared"] <= get_arch(target).smem, r
