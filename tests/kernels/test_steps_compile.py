"""The kernels around the expert layer's products compile for every target, without a spill."""

from __future__ import annotations

import pytest

from narrowgemm.arch import get_arch

from .._compile import compile_jobs

KERNELS = {"route_kernel", "place_kernel", "histogram_kernel", "prefix_kernel", "scatter_kernel", "gather_kernel",
           "gather_rows_kernel", "gather_by_row_kernel", "sort_gather_kernel", "activate_kernel", "activate_rows_kernel", "combine_kernel"}


@pytest.mark.compile
@pytest.mark.parametrize("target", ["sm90", "sm100", "gfx942", "gfx950"])
def test_steps(target: str) -> None:
    reports = compile_jobs(target, "tests.kernels.steps_jobs:jobs")
    assert {r["kernel"] for r in reports} == KERNELS
    for r in reports:
        assert r["spills"] == 0, f"{target}, {r['job']}: {r['spills']} bytes spilled"
        assert r["shared"] <= get_arch(target).smem, f"{target}, {r['job']}: {r['shared']} bytes of shared memory"
        if target.startswith("sm"):
            assert r["ops"]["griddepcontrol.wait"] == r["job"].endswith("behind"), r["job"]
