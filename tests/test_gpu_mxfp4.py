"""On a GPU: the suites with packed MXFP4 weights, and partial tiles of every layout, through both gates with poison and guards."""

from __future__ import annotations

import gc

import pytest
import torch

from narrowgemm.formats import MXFP4, MXFP8, Format, FP8_1x128
from narrowgemm.testing.cases import Case, build, get_suite

pytestmark = pytest.mark.gpu

SUITES = ("mxfp4-contiguous", "mxfp4-a4w4", "mxfp4-mx8", "mxfp4-256", "mxfp4-masked")
FORMATS = (FP8_1x128, FP8_1x128.with_scale("e8m0"), MXFP8, MXFP4)
_kept: dict = {}


@pytest.fixture(scope="module", autouse=True)
def _free():
    yield
    _kept.clear()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("case", [c for s in SUITES for c in get_suite(s)], ids=lambda c: f"{c.suite}/{c.id}")
def test_suites(case: Case) -> None:
    inputs = build(case, "cuda", seed=11, reuse=_kept.pop("weights", None))
    _kept["weights"] = inputs.weights
    inputs.verify()


def partial(a: Format) -> list[Case]:
    """Fewer rows than a tile, one row, none, a group that can hold less than a tile; N and K that no tile divides."""
    flat = [("dense", 1, 1, "balanced", 0), ("dense", 1, 131, "balanced", 0), ("offsets", 7, 3, "uniform:0.0:2.2", 0),
            ("offsets", 5, 40, "empty:0.4", 0), ("contiguous", 4, 33, "uniform:0.1:1.9", 0), ("psum", 4, 33, "uniform:0.1:1.9", 0),
            ("masked", 4, 5, "uniform:0.0:2.0", 7), ("masked", 3, 60, "uniform:0.0:1.9", 130), ("masked", 4, 1, "balanced", 1),
            ("masked", 4, 3, "empty:0.5", 256)]
    return [Case("partial", layout, g, m, 200, 352, a=a, b=MXFP4, sizes=sizes, max_m=x, packed=True, alignment=16,
                 out_dtype=("bf16", "fp32", "fp16")[i % 3]) for i, (layout, g, m, sizes, x) in enumerate(flat)]


@pytest.mark.parametrize("case", [c for f in FORMATS for c in partial(f)], ids=lambda c: c.id)
def test_partial_tiles(case: Case) -> None:
    build(case, "cuda", seed=12).verify()
