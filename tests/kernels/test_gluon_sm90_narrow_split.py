"""How a dense product's tiles are cut along K: fewer pieces make a smaller grid, and the numbers stay right (on a GPU)."""

from __future__ import annotations

import pytest
import torch

import narrowgemm as ng
from narrowgemm.arch import get_arch
from narrowgemm.formats import BF16, MXFP4
from narrowgemm.kernels.gluon.sm90 import narrow, narrow_model
from narrowgemm.kernels.gluon.sm90.narrow_split import PIECES, ctas_at_most, ring_steps, splits
from narrowgemm.ops.explain import describe
from narrowgemm.prepack import PREPACK
from narrowgemm.problem import Operand, Problem
from narrowgemm.testing.numerics import calc_diff

ARCH = get_arch("h100")


@pytest.mark.parametrize("m, n, k", [(1, 768, 6144), (64, 768, 6144), (16, 2304, 6144), (64, 1152, 6144)])
def test_a_split_has_as_many_pieces_as_it_says(m: int, n: int, k: int) -> None:
    problem = describe("gemm", m=m, n=n, k=k, a="mxfp8", b="mxfp8", packed=True)
    base = [c for c in narrow.configs(problem, ARCH) if not c.option("deep")]
    for c in base:
        steps, tiles = ring_steps(problem, c), -(-m // c.block_m) * -(-n // c.block_n)
        for s in splits(problem, c, ARCH):
            assert narrow.legal(problem, s, ARCH) is None
            assert ctas_at_most(tiles, steps, s) <= tiles * max(PIECES)
            assert ctas_at_most(tiles, steps, s) < min(ARCH.sms * c.option("ctas"), tiles * steps)
    assert any(splits(problem, c, ARCH) for c in base)


def test_what_fills_the_chip_or_is_grouped_is_not_cut_anew() -> None:
    for given in ({"op": "gemm", "m": 64, "n": 65536, "k": 1024},
                  {"op": "routed_gemm", "layout": "offsets", "groups": 8, "m": 16, "n": 768, "k": 6144}):
        problem = describe(given.pop("op"), **given, a="mxfp8", b="mxfp8", packed=True)
        assert not any(c.option("deep") for c in narrow.configs(problem, ARCH))


@pytest.mark.gpu
@pytest.mark.parametrize("m, n, k", [(3, 700, 6144), (64, 768, 6144), (40, 1536, 4096)])
def test_every_config_and_split_is_right_and_repeats(m: int, n: int, k: int) -> None:
    x = ng.quantize(torch.randn(m, k, device="cuda"), ng.MXFP8)
    w = ng.quantize(torch.randn(n, k, device="cuda"), ng.MXFP8)
    packed, want = ng.prepack(w), x.dequantize().double() @ w.dequantize().double().mT
    problem = describe("gemm", m=m, n=n, k=k, a="mxfp8", b="mxfp8", packed=True)
    found = narrow.configs(problem, ARCH)
    assert any(c.option("deep") for c in found)
    for c in found:
        y = ng.gemm(x, packed, config=c, backend=narrow.NAME)
        assert calc_diff(y.double(), want) <= 5e-6
        assert torch.equal(ng.gemm(x, packed, config=c, backend=narrow.NAME), y)


def test_masked_groups_are_as_uneven_as_others() -> None:
    """Groups of 16 rows in the mean take more than a pass of 16 columns, but where they can hold no more."""
    def passes(m: int) -> float:
        p = Problem("grouped_gemm", "masked", m, 4096, 7168, 8, Operand(BF16), Operand(MXFP4, prepack=PREPACK, scale_dtype="e8m0"), rows=16)
        return narrow_model.entries_expected(p, 16) / 8

    assert passes(16) == 1.0 and 1.2 < passes(128) < 2.0
