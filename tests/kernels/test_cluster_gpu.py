"""The Hopper prefill kernel on clusters on a GPU: a dense product's tiles of two widths."""

from __future__ import annotations

import pytest

from narrowgemm.kernels.gluon.sm90.fp8_cluster import _MIXED, NAME
from narrowgemm.testing.cases import Case, build

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("m, n, k, options", [
    (4096, 2112, 1152, {}), (300, 456, 384, {"out_dtype": "fp16"}), (8000, 520, 640, {"out_dtype": "fp16", "accumulate": True}),
    (1, 320, 128, {}), (9000, 3000, 256, {})])
def test_tiles_of_two_widths(m: int, n: int, k: int, options: dict) -> None:
    """Both gates, guards, the same bits again: whole and ragged ends, one row of tiles and many."""
    x = build(Case("mixed", "dense", 1, m, n, k, **options), "cuda")
    x.verify_repeats(3, backend=NAME, config=_MIXED)
