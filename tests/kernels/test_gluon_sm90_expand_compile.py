"""The Hopper BF16 product, the FP8 one of MXFP8 activations and the launches in front of them compile: wgmma, TMA, no spills, no
slot given back before it is read."""

from __future__ import annotations

import pytest

from narrowgemm.arch import get_arch

from .._compile import check_slots, compile_jobs

JOBS = {"expand": {"bf16_kernel": "wgmma.mma_async", "bf16_cluster_kernel": "multicast::cluster"}, "bf16": {"bf16_kernel": "wgmma.mma_async"},
        "fold_mixed": {"fold_mixed_product_kernel": "m64n128k32.f32.e4m3.e4m3"},
        "fold_both": {"fold_mixed_product_kernel": "m64n128k16.f32.bf16.bf16", "fold_both_product_kernel": "m64n192k32.f32.e4m3.e4m3"}}
SPILLS = 64     # bytes, around a store of FP32 with factors, and where warps of `fold_both` start


def check(which: str, *args: str) -> list[str]:
    products = JOBS[which]
    reports = compile_jobs("sm90", f"tests.kernels.gluon_sm90_{which}_jobs:jobs", *args, sass=True)
    for r in reports:
        assert not r["serialized"] and not r["starved"], f"{r['job']}: ptxas serialises wgmma"
        assert not r["unwritten"], f"{r['job']}: {r['kernel']} reads registers that nothing has written"
        product = r["kernel"] in products
        few = (product and ("fp32" in r["job"] or which == "fold_both")) or r["kernel"] == "gated_expand_kernel"
        assert r["spills"] <= (SPILLS if few else 0), r
        if product:
            check_slots(r)
            stated = int(r["job"].rsplit("|", 1)[1]) or get_arch("h200").smem
            assert r["shared"] <= stated <= get_arch("h200").smem, f"{r['job']}: {r['shared']} bytes of shared memory"
            op = products[r["kernel"]]
            assert r["ops"][op if args != ("all",) else "wgmma.mma_async"] and r["ops"]["cp.async.bulk.tensor"] and r["ops"]["setmaxnreg"], r
    return [r["kernel"] for r in reports]


@pytest.mark.compile
@pytest.mark.parametrize("which", JOBS)
def test_few(which: str) -> None:
    assert set(check(which)) >= set(JOBS[which])


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("which", JOBS)
def test_whole_search_space(which: str) -> None:
    check(which, "all")
