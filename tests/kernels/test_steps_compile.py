"""The kernels around the expert layer's products compile for every target, without a spill."""

from __future__ import annotations

import pytest

from narrowgemm.arch import get_arch

from .._compile import compile_jobs

KERNELS = {"route_kernel", "place_kernel", "histogram_kernel", "prefix_kernel", "scatter_kernel", "gather_kernel",
           "gather_rows_kernel", "gather_by_row_kernel", "sort_gather_kernel", "sort_gather_tokens_kernel", "activate_kernel",
           "activate_rows_kernel", "combine_kernel"}


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


@pytest.mark.compile
def test_loads_are_on_their_way_before_anything_is_waited_for() -> None:
    """Left alone, ptxas has loads wait for results of those before them, and all of them for the number of rows. And no lane asks
    another where a token's rows are: one barrier, for the scales."""
    reports = compile_jobs("sm90", "tests.kernels.steps_jobs:ordered_jobs", sass=True)
    assert {r["job"] for r in reports} == {"once", "walk", "gather"}
    for r in reports:
        order = r["order"]
        wide = [i for i, op in enumerate(order) if op.startswith("LDG") and op.endswith(".128")]
        assert wide, r["job"]
        if r["job"] == "gather":
            assert order.count("BAR.SYNC") == 1 and wide[-1] < order.index("BAR.SYNC"), order
            continue
        assert wide[-1] < next(i for i, op in enumerate(order) if op.startswith("MUFU.EX2")), (r["job"], order)
        if r["job"] == "once":
            assert wide[-1] < order.index("BAR.SYNC") < order.index("LDG.E.64") < order.index("EXIT", wide[-1]), (r["job"], order)
