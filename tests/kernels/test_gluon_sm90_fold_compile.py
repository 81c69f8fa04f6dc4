"""The Hopper prefill kernel with folded weights compiles: E4M3 wgmma, no spills that count, wgmma not serialised, TMA,
no slot given back before it is read, and the shared memory that the host states is no less than the compiler's."""

from __future__ import annotations

import pytest

from narrowgemm.arch import get_arch

from .._compile import check_slots, compile_jobs

JOBS = "tests.kernels.gluon_sm90_fold_jobs:jobs"


# bytes, outside the loop over K: what a store with factors, or one that adds to the output, has no registers for, nor two places in the
# order of tiles. And inside it, where a tile has rows beyond: 13 of the registers that their sums take
SPILLS, SPILLS_TAILS, SPILLS_STUBS = 128, 384, 704


def check(reports: list[dict]) -> None:
    for r in reports:
        product = r["kernel"] in ("fold_kernel", "fold_cluster_kernel")
        limit = SPILLS if "tails=" not in r["job"] else SPILLS_STUBS if r["job"].startswith("offsets") else SPILLS_TAILS
        assert r["spills"] <= limit * product, f"{r['job']}: {r['spills']} bytes spilled in {r['kernel']}"
        assert not r["serialized"] and not r["starved"], f"{r['job']}: ptxas serialises wgmma"
        if r["kernel"] not in ("fold_kernel", "fold_cluster_kernel", "fp8_block_kernel"):
            continue
        stated = int(r["job"].rsplit("|", 1)[1])
        assert r["shared"] <= stated <= get_arch("h200").smem, f"{r['job']}: {r['shared']} bytes of shared memory, stated {stated}"
        columns = 192 if "wider=" in r["job"] and r["kernel"] == "fold_cluster_kernel" else 128
        for op in (f"m64n{columns}k32.f32.e4m3.e4m3", "cp.async.bulk.tensor", "setmaxnreg"):
            assert r["ops"][op], f"{r['job']}: no {op}"
        check_slots(r)


@pytest.mark.compile
def test_few() -> None:
    reports = compile_jobs("sm90", JOBS, sass=True)
    kernels = [r["kernel"] for r in reports]
    want = {"fold_kernel": 6, "fold_words_kernel": 1, "fold_scales_kernel": 1, "fold_whole_kernel": 2, "fold_cluster_kernel": 2}
    assert {n: kernels.count(n) for n in want} == want
    check(reports)


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.timeout(1900)
def test_whole_search_space() -> None:
    check(compile_jobs("sm90", JOBS, "all", sass=True))
