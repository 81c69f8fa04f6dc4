"""The Hopper kernels for plain MXFP8 weights and few tokens compile: wgmma as wide as a tile, TMA, no spills, wgmma not serialised,
no slot given back before it is read, and the shared memory that the host states is no less than the compiler's."""

from __future__ import annotations

import pytest

from .._compile import check_slots, compile_jobs
from .gluon_sm90_mx8_jobs import ARCH, FEW, KERNELS

JOBS = "tests.kernels.gluon_sm90_mx8_jobs:jobs"
OTHERS = ("mx8_bf16_prep_kernel", "mx8_f16_prep_kernel", "mx8_f16_mend_kernel")     # in front of a product and behind
# bytes, by Triton: the newest keeps a tile's state beyond the registers where two blocks share an SM and scales' rows lie off 16 bytes; none of
# its two loops over K has a local load (16 wgmma each)
BEYOND = {"oldest": 0, "newest": 352}


def check(reports: list[dict], spills: int = 0) -> None:
    for r in reports:
        most = spills if "w8 s8 g8 swap ctas=2" in r["job"] and r["kernel"] == "mx8_decode_kernel" else 0
        assert r["spills"] <= most, f"{r['job']}: {r['spills']} bytes spilled"
        assert not r["serialized"] and not r["starved"], f"{r['job']}: ptxas serialises wgmma"
        if r["kernel"] in OTHERS:
            continue
        stated = int(r["job"].rsplit("|", 1)[1])
        assert r["shared"] <= stated <= ARCH.smem, f"{r['job']}: {r['shared']} bytes of shared memory, stated {stated}"
        # of BF16 products: those of FP8 that look for NaN
        for op in ("cp.async.bulk.tensor", *(["m64n8k32.f32.e4m3.e4m3"] if r["kernel"] == "mx8_bf16_kernel" else [])):
            assert r["ops"][op], f"{r['job']}: no {op}"
        if r["kernel"] != "mx8_decode_kernel":      # tokens' scales may be late there: a warp stores them, not TMA
            check_slots(r)


@pytest.mark.compile
@pytest.mark.parametrize("triton", ["oldest", pytest.param("newest", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KERNELS)
def test_few(name: str, triton: str) -> None:
    reports = compile_jobs("sm90", JOBS, name, triton=triton, sass=True)
    assert sum(r["kernel"] == f"{name}_kernel" for r in reports) == len(FEW[KERNELS[name]])
    check(reports, BEYOND[triton])


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_whole_search_space(name: str) -> None:
    check(compile_jobs("sm90", JOBS, name, "all", sass=True))
