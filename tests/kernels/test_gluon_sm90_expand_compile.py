"""The Hopper BF16 product, the FP8 one of MXFP8 activations and the launches in front of them compile: wgmma, TMA, no spills."""

from __future__ import annotations

import pytest

from narrowgemm.arch import get_arch

from .._compile import compile_jobs

JOBS = {"expand": ("bf16_kernel", "wgmma.mma_async"), "bf16": ("bf16_kernel", "wgmma.mma_async"),
        "fold_mixed": ("fold_mixed_product_kernel", "m64n128k32.f32.e4m3.e4m3"),
        "fold_both": ("fold_mixed_product_kernel", "m64n128k16.f32.bf16.bf16")}
SPILLS = 64     # bytes, around a store of FP32 with factors, and where warps of `fold_both` start


def check(which: str, *args: str) -> list[str]:
    product, op = JOBS[which]
    reports = compile_jobs("sm90", f"tests.kernels.gluon_sm90_{which}_jobs:jobs", *args, sass=which.startswith("fold_"))
    for r in reports:
        assert not r["serialized"], f"{r['job']}: ptxas serialises wgmma"
        assert not r.get("unwritten"), f"{r['job']}: {r['kernel']} reads registers that nothing has written"
        assert r["spills"] <= (SPILLS if r["kernel"] == product and ("fp32" in r["job"] or which == "fold_both") else 0), r
        if r["kernel"] == product:
            stated = int(r["job"].rsplit("|", 1)[1])
            assert r["shared"] <= stated <= get_arch("h200").smem, f"{r['job']}: {r['shared']} bytes of shared memory"
            assert r["ops"][op] and r["ops"]["cp.async.bulk.tensor"] and r["ops"]["setmaxnreg"], r
    return [r["kernel"] for r in reports]


@pytest.mark.compile
@pytest.mark.parametrize("which", JOBS)
def test_few(which: str) -> None:
    assert check(which).count(JOBS[which][0]) >= 1


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("which", JOBS)
def test_whole_search_space(which: str) -> None:
    check(which, "all")
