"""Products whose operands are brought to BF16, or folded to FP8, once a call: what they take, configs, workspace."""

from __future__ import annotations

from dataclasses import replace

import pytest

from narrowgemm.arch import get_arch
from narrowgemm.formats import BF16, MXFP4, MXFP8, Format
from narrowgemm.kernels.gluon.sm90 import expand, fold_both, fold_mixed
from narrowgemm.prepack import PREPACK
from narrowgemm.problem import Epilogue, Operand, Problem

H100 = get_arch("h100")


def problem(m: int, n: int, k: int, groups: int = 1, layout: str = "dense", a: Format = MXFP8, b: Format = MXFP8, **kw) -> Problem:
    return Problem("gemm" if layout == "dense" else "grouped_gemm", layout, m, n, k, groups, Operand(a, scale_dtype="e8m0"),
                   Operand(b, prepack=PREPACK, scale_dtype="e8m0", folds=b == MXFP4), rows=-(-m // groups), **kw)


MIXED = problem(8192, 4096, 2048, 4, "contiguous", b=MXFP4)
BOTH = problem(8192, 4096, 2048, 4, "offsets")
BOTH = replace(BOTH, b=replace(BOTH.b, picks=16 * 64))


@pytest.mark.parametrize("change, reason", [
    ({"a": Operand(BF16)}, "E8M0 scales"),
    ({"b": Operand(MXFP4, scale_dtype="e8m0")}, "prepack"),
    ({"b": Operand(MXFP8, scale_dtype="e8m0"), "layout": "offsets", "op": "grouped_gemm"}, "dense products"),
    ({"b": Operand(MXFP8, "mn", scale_dtype="e8m0")}, "K-major"),
    ({"b": Operand(MXFP8, prepack=f"{PREPACK}:halves", scale_dtype="e8m0")}, "pair="),
    ({"epilogue": Epilogue(bias=True)}, "epilogue"),
    ({"op": "routed_gemm", "layout": "routed"}, "routed"),
    ({"groups": 512, "n": 4096, "k": 7168, "layout": "offsets", "op": "grouped_gemm"}, "in BF16, over"),
])
def test_expand_says_what_it_does_not_take(change: dict, reason: str) -> None:
    good = problem(2048, 2304, 6144)
    assert expand.supports(good, H100) is None and expand.supports(replace(good, accumulate=True), H100) is None
    assert expand.supports(replace(good, b=Operand(MXFP8, scale_dtype="e8m0")), H100) is None
    assert reason in (expand.supports(replace(good, **change), H100) or "")
    assert "sm90" in (expand.supports(good, get_arch("b200")) or "")


@pytest.mark.parametrize("change, reason", [
    ({"a": Operand(MXFP4, scale_dtype="e8m0")}, "MXFP8 activations"),
    ({"b": Operand(MXFP4, prepack=PREPACK, scale_dtype="e8m0")}, "15 powers of two"),
    ({"b": Operand(MXFP8, prepack=PREPACK, scale_dtype="e8m0")}, "MXFP4 weights"),
    ({"accumulate": True}, "accumulation"),
    ({"layout": "psum", "alignment": 2}, "multiples of 4"),
])
def test_fold_mixed_says_what_it_does_not_take(change: dict, reason: str) -> None:
    assert fold_mixed.supports(MIXED, H100) is None
    assert reason in (fold_mixed.supports(replace(MIXED, **change), H100) or "")


@pytest.mark.parametrize("change, reason", [
    ({"a": Operand(MXFP4, scale_dtype="e8m0")}, "MXFP8 activations"),
    ({"b": replace(BOTH.b, picks=-1)}, "folded copy"),
    ({"b": replace(MIXED.b, picks=64)}, "MXFP8 weights"),
    ({"accumulate": True}, "accumulation"), ({"layout": "masked"}, "layouts"), ({"batch_invariant": True}, "all rows together"),
    ({"m": 1 << 21}, "picked columns"), ({"groups": 200}, "up to 128 groups"),
])
def test_fold_both_says_what_it_does_not_take(change: dict, reason: str) -> None:
    assert fold_both.supports(BOTH, H100) is None
    assert reason in (fold_both.supports(replace(BOTH, **change), H100) or "")


def test_every_config_fits_and_cublas_is_for_plain_dense_products() -> None:
    dense = problem(2048, 2304, 6144)
    assert expand.configs(dense, H100) == list(expand.CANDIDATES)
    for p in (replace(dense, out_dtype="fp32"), replace(dense, max_sms=8), replace(dense, n=2300), replace(dense, accumulate=True),
              replace(dense, batch_invariant=True), problem(8192, 6144, 6144, 8, "offsets")):
        assert len(expand.configs(p, H100)) >= 2 and expand.CUBLAS not in expand.configs(p, H100)
    for layout in ("dense", "contiguous", "offsets", "psum", "masked"):
        for out in ("bf16", "fp16", "fp32"):
            if layout in fold_both.KINDS:
                assert fold_both.configs(replace(BOTH, layout=layout, out_dtype=out), H100)
            for p in (problem(512, 4096, 2048, 4, layout, out_dtype=out), replace(MIXED, layout=layout, out_dtype=out, alignment=128)):
                module = expand if p.b.format == MXFP8 else fold_mixed
                assert all(module.tile_of(p, c, H100, True).shared_bytes <= H100.smem for c in module.configs(p, H100))


@pytest.mark.parametrize("change, reason", [
    ({"block_m": 256}, "tile"), ({"block_k": 128}, "tile"), ({"split_k": 2}, "split_k"), ({"persistent": False}, "persistent"),
    ({"extra": (("late", 1),)}, "extra"), ({"num_stages": 1}, "num_stages"), ({"num_stages": 9}, "shared memory")])
def test_illegal_configs(change: dict, reason: str) -> None:
    p = problem(2048, 2304, 6144)
    assert reason in (expand.legal(p, replace(expand.CANDIDATES[0], **change), H100) or "")
    assert fold_both.legal(BOTH, replace(fold_both.configs(BOTH, H100)[0], block_n=136), H100) is not None
    assert fold_mixed.legal(MIXED, replace(fold_mixed.configs(MIXED, H100)[0], block_m=256), H100) is not None


def test_workspace_holds_everything() -> None:
    p = problem(300, 1000, 352)
    at = expand.regions(p, 300)
    assert list(at) == sorted(at) and all(x % 256 == 0 for x in at)
    assert at.x - at.factor >= 4 * 300 and at.weights - at.x >= 2 * 300 * 384 and at.columns - at.weights >= 2 * 1024 * 384
    assert at.size == at.columns and expand.regions(replace(p, b=Operand(MXFP8, scale_dtype="e8m0")), 300).size >= at.columns + 4 * 1000
    p = replace(MIXED, layout="masked", m=100, n=1000, k=352)
    at = fold_mixed.regions(p, 100)
    assert list(at) == sorted(at) and all(x % 256 == 0 for x in at)
    assert at.scale - at.x >= 4 * 100 * 384 and at.flags - at.scale >= 4 * 4 * 4 * 3 * 100 and at.weights - at.flags >= 4 * 4 * 3 * 2
    assert at.size - at.weights >= 4 * 1024 * 384
    both = replace(BOTH, layout="dense", groups=1, m=300, n=1000, k=352, b=replace(BOTH.b, picks=192))
    of = fold_both.regions(both, 300)
    assert list(of) == sorted(of) and of.size >= of.picks + 2 * 192 * fold_both.pitch(300, 1) and fold_both.pitch(300, 1) >= 300 + 24
    assert of.flags - of.scale >= 16 * 3 * 300 and of.picks - of.flags >= 4 * 3 * 5 and of.size >= expand.regions(both, 300, of.x).size
    assert at.x >= fold_mixed.FRONT and of.x >= fold_mixed.FRONT >= fold_mixed.PROBES_AT + 4 * fold_mixed.PROBES
    # what BF16 needs, where FP8's product leaves it
    assert fold_mixed.workspace(p, fold_mixed.configs(p, H100)[0]) >= expand.regions(p, 400, at.x).size


def test_tiles_that_fill_the_last_round_are_chosen() -> None:
    """2048 x 2304 are 144 tiles of 128x256 for 132 SMs, and 256 of 128x144; long products are left to pairs of blocks, or to 128x256."""
    def best(m: int, n: int, k: int, picks: int) -> tuple[int, int]:
        p = replace(BOTH, layout="dense", op="gemm", m=m, n=n, k=k, groups=1, rows=m, b=replace(BOTH.b, picks=picks))
        c = min(fold_both.configs(p, H100), key=lambda c: fold_both.estimate(p, c, H100))
        return c.block_n, c.option("cluster_m", 1)

    assert best(512, 2304, 6144, 1152) == (80, 1) and best(2048, 2304, 6144, 1152) == (144, 1)
    assert best(512, 6144, 8192, 3900) == (192, 1) and best(8192, 9216, 6144, 4608) == (192, 2)
    assert fold_both.met(2304, 80) == pytest.approx(36 / 29) and fold_both.met(2304, 256) == 1 and fold_both.met(768, 192) == 1.5


def test_tiles_of_other_widths_ask_for_whole_packed_ones() -> None:
    wide, narrow, pairs = fold_both.configs_of()[0], fold_both.of_widths()[1], fold_both.of_widths()[-1]
    assert fold_both.legal(BOTH, narrow, H100) is None and fold_both.legal(BOTH, pairs, H100) is None
    other = replace(BOTH, n=4000)
    assert fold_both.legal(other, wide, H100) is None and "256 wide" in (fold_both.legal(other, narrow, H100) or "")
    for reason, bad in (("expected 2 to 8", replace(narrow, num_stages=9)), ("expected", replace(narrow, extra=(("mix", 1),))),
                        ("expected", replace(narrow, block_m=64)), ("shared memory", replace(pairs, num_stages=8))):
        assert reason in (fold_both.legal(BOTH, bad, H100) or "")
    assert "two SMs" in (fold_both.legal(replace(BOTH, max_sms=1), pairs, H100) or "")
    assert pairs in fold_both.configs(replace(BOTH, layout="dense", op="gemm", groups=1), H100) and pairs not in fold_both.configs(BOTH, H100)
