"""The Hopper kernels for row-wise, tensor-wise and 1x128 x 1x128 scales compile for sm_90a: wgmma, TMA, no spills, nothing
serialised, no slot given back before it is read."""

from __future__ import annotations

import pytest

from .._compile import check_slots, compile_jobs

SHARED = 232448
JOBS = {"scaled": "fp8_scaled_kernel", "wgrad": "fp8_wgrad_kernel"}


def check(which: str, *args: str) -> int:
    reports = [r for r in compile_jobs("sm90", f"tests.kernels.gluon_sm90_{which}_jobs:jobs", *args, sass=True) if r["kernel"] == JOBS[which]]
    for r in reports:
        assert r["ops"]["wgmma.mma_async"] and r["ops"]["cp.async.bulk.tensor"] and r["ops"]["setmaxnreg"], r
        assert not r["serialized"] and not r["starved"], f"{r['job']}: ptxas serialises wgmma (C7514, C7511)"
        assert r["spills"] == 0, r
        check_slots(r)
        assert r["shared"] <= SHARED and r["registers"] <= 168, r
    return len(reports)


@pytest.mark.compile
@pytest.mark.parametrize("which", JOBS)
def test_representative_configs(which: str) -> None:
    assert check(which) >= 6


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("which", JOBS)
def test_every_config(which: str) -> None:
    check(which, "all")
