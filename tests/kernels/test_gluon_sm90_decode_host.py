"""Host side of the Hopper decode kernel: the search space and the cost model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from narrowgemm.arch import get_arch
from narrowgemm.kernels.gluon.sm90 import few_model, fp8_block, fp8_decode, fp8_decode_model
from narrowgemm.ops.explain import describe
from narrowgemm.problem import Config, Problem, bucket
from narrowgemm.runtime import dispatch

ARCH = get_arch("h200")


def grouped(layout: str, groups: int, m: int, n: int, k: int, rows: int = 0) -> Problem:
    p = describe("grouped_gemm", layout=layout, groups=groups, m=m, n=n, k=k)
    return replace(p, rows=bucket(rows)) if rows else p


PROBLEMS = [describe("gemm", m=m, n=n, k=k) for m in (1, 16, 64, 128) for n, k in ((2112, 7168), (7168, 2048), (1, 128))]
PROBLEMS += [grouped("masked", 32, 4096, 6144, 7168, 20), grouped("masked", 1, 64, 72, 4096, 64), grouped("offsets", 256, 256, 4096, 7168),
             grouped("psum", 9, 900, 1000, 384), grouped("contiguous", 8, 1024, 7168, 2048)]


@pytest.mark.parametrize("p", PROBLEMS, ids=lambda p: f"{p.layout}-{p.m}x{p.n}x{p.k}")
def test_space(p: Problem) -> None:
    space = fp8_decode.configs(p, ARCH)
    assert 1 <= len(space) <= 30
    assert len(set(space)) == len(space)
    for c in space:
        assert fp8_decode.legal(p, c, ARCH) is None
        assert 0 < fp8_decode.estimate(p, c, ARCH) < 1
        assert (fp8_decode.workspace(p, c) > 0) == (fp8_decode.in_workspace(c) or p.layout == "contiguous")


TAKEN = grouped("contiguous", 64, 4096, 1024, 2048)


@pytest.mark.parametrize("problem, why", [
    (replace(TAKEN, groups=2048), "a table of 1024 groups, not 2048"), (replace(TAKEN, k=2080), "K a multiple of 128, not 2080"),
    (replace(TAKEN, m=65536, rows=64), "the segments of 32768 rows and fewer, not 65536"),
    (replace(TAKEN, rows=256), "for 192 rows a group and fewer"), (replace(TAKEN, wide=True), "within 2^31 elements"),
    (replace(TAKEN, a=replace(TAKEN.a, aligned=False)), "on 16 bytes"), (replace(TAKEN, b=replace(TAKEN.b, major="mn")), "K-major"),
    (replace(TAKEN, gather=True), "no fused gather"), (replace(TAKEN, op="routed_gemm"), "not routed_gemm"),
    (describe("grouped_gemm", layout="masked", groups=8, m=8, n=512, k=512, a="fp8_row", b="fp8_row"), "E4M3 in 1x128 x 128x128")])
def test_each_refusal_says_why(problem: Problem, why: str) -> None:
    assert fp8_decode.supports(TAKEN, ARCH) is None
    assert fp8_decode.supports(replace(TAKEN, m=32768, rows=64), ARCH) is None
    assert why in str(fp8_decode.supports(problem, ARCH))


@pytest.mark.parametrize("change", [{"block_m": 24}, {"block_n": 256}, {"split_k": 2}, {"num_stages": 40}, {"swap_ab": False},
                                    {"extra": (("narrow", 64),)}, {"extra": (("ctas", 5),)}])
def test_illegal(change: dict) -> None:
    p = PROBLEMS[0]
    c = fp8_decode.configs(p, ARCH)[0]
    assert fp8_decode.legal(p, replace(c, **change), ARCH)


@pytest.mark.parametrize("change, word", [
    ({"split_k": 2}, "the same"), ({"block_n": 128}, "64 weight rows"), ({}, "K block"), ({}, "SMs")])
def test_illegal_clusters_say_why(change: dict, word: str) -> None:
    good = Config(64, 64, 128, 4, 4, swap_ab=True, persistent=True, split_k=4, extra=(("cluster", 4), ))
    p = describe("gemm", m=100, n=576, k=7168)
    assert fp8_decode.legal(p, good, ARCH) is None
    p = replace(p, k=384) if word == "K block" else replace(p, max_sms=64) if word == "SMs" else p
    assert word in fp8_decode.legal(p, replace(good, **change), ARCH)
    assert fp8_decode.legal(grouped("masked", 32, 128, 576, 7168), good, ARCH)


@pytest.mark.parametrize("extra, stages, n, k, word", [
    ({"box": 3}, 3, 4096, 7168, "one of"), ({"box": 4}, 3, 4096, 384, "K by 512"), ({"box": 2}, 3, 4100, 7168, "rows by 8"),
    ({"box": 8}, 3, 4096, 7168, "whole boxes"), ({"box": 2, "stream": 1, "guess": 1}, 3, 4096, 7168, "no guess"), ({"box": 4}, 1, 4096, 7168, "2 of several")])
def test_illegal_boxes_say_why(extra: dict[str, int], stages: int, n: int, k: int, word: str) -> None:
    p, c = grouped("offsets", 32, 64, n, k, 2), Config(8, 64, 128, 4, stages, swap_ab=True, persistent=True, extra=(("box", 4), ))
    assert fp8_decode.legal(grouped("offsets", 32, 64, 4096, 7168, 2), replace(c, num_stages=3), ARCH) is None
    assert word in fp8_decode.legal(p, replace(c, extra=tuple(sorted(extra.items()))), ARCH)


@pytest.mark.parametrize("tokens, boxes, through", [(1, {4}, {1}), (16, {1, 2, 4}, {0}), (256, {1, 2, 4}, {0})])
def test_layers_of_few_rows_are_offered_boxes(tokens: int, boxes: set[int], through: set[int]) -> None:
    p = replace(grouped("offsets", 128, tokens * 4, 6144, 6144, max(1, tokens // 32)), front="tokens")
    space = fp8_decode.configs(p, ARCH)
    assert {c.option("box", 1) for c in space} == boxes and {c.option("stream") for c in space} == through
    assert {c.option("box", 1) for c in fp8_decode.configs(replace(p, front=""), ARCH)} == {1}


@pytest.mark.parametrize("chip, layout, wide", [("h100", "masked", True), ("h100", "offsets", True), ("h100", "dense", False),
                                                 ("h200", "masked", False), ("h200", "offsets", False)])
def test_l2_fetches_weights_by_what_memory_is_faster_by(chip: str, layout: str, wide: bool) -> None:
    p = grouped(layout, 32, 64, 4096, 7168, 2) if layout != "dense" else describe("gemm", m=16, n=4096, k=7168)
    assert fp8_decode.fetches_by_256(p, get_arch(chip)) == wide


def test_batch_invariant_is_never_split() -> None:
    p = replace(describe("gemm", m=64, n=576, k=7168), batch_invariant=True)
    assert {c.split_k for c in fp8_decode.configs(p, ARCH)} == {1}


# microseconds on an H200, of the config that the model has to rank first or nearly so
@pytest.mark.parametrize("p, us", [(grouped("masked", 32, 4096, 6144, 7168, 20), 339.9), (grouped("masked", 6, 4096, 4096, 2048, 20), 19.7),
                                   (grouped("masked", 32, 128, 4096, 2048, 1), 64.9), (describe("gemm", m=64, n=7168, k=2048), 7.9),
                                   (describe("gemm", m=16, n=4096, k=7168), 11.5)])
def test_model_is_near_the_measured(p: Problem, us: float) -> None:
    best = min(fp8_decode.estimate(p, c, ARCH) for c in fp8_decode.configs(p, ARCH)) * 1e6
    assert 0.8 < best / us < 1.2


# microseconds on an H100, 256 groups of 128 rows, by (weight rows, token columns)
@pytest.mark.parametrize("n, k, us", [(4096, 7168, {(128, 64): 2915, (64, 64): 4387}), (7168, 2048, {(128, 64): 1562, (64, 64): 2280})])
def test_groups_of_128_rows_read_their_weights_from_l2_again(n: int, k: int, us: dict[tuple[int, int], float]) -> None:
    p, arch = grouped("offsets", 256, 32768, n, k), get_arch("h100")
    configs = fp8_decode.configs(p, arch)
    assert {(c.block_n, c.block_m) for c in configs} == set(us)         # one tile of 128 tokens with tails took 5119 and 2531
    found = {(c.block_n, c.block_m): fp8_decode_model.of_spread(p, c, arch) * 1e6 for c in configs}
    assert all(0.8 < found[shape] / us[shape] < 1.2 for shape in us), found     # these had 128 rows each; sizes are taken to spread
    assert min(found, key=found.__getitem__) == (128, 64)


@pytest.mark.parametrize("n, k, split", [(4096, 7168, 4), (7168, 2048, 2), (6144, 6144, 2)])
def test_one_expert_of_a_rank_is_cut_along_k(n: int, k: int, split: int) -> None:
    p = replace(grouped("offsets", 32, 1, n, k), rows=1)
    assert {c.split_k for c in fp8_decode.configs(p, ARCH)} == {s for s in (2, 4) if s <= split}
    for other in (replace(p, batch_invariant=True), replace(p, m=32)):
        assert {c.split_k for c in fp8_decode.configs(other, ARCH)} == {1}


@pytest.mark.parametrize("n, k", [(4096, 7168), (7168, 2048)])
def test_what_few_groups_with_all_rows_would_take_decides_between_near_equals(n: int, k: int) -> None:
    """64 rows for each of 256 experts: tiles for many rows take as long where rows spread, and 0.75 where 8 experts have them all."""
    p = grouped("offsets", 256, 256 * 64, n, k)
    fewer = few_model.few(p)
    assert fewer is not None and (fewer.groups, fewer.rows, fewer.m) == (8, 2048, p.m)
    assert dispatch.select(p, ARCH).kernel in ("gluon_sm90.fp8_block", "gluon_sm90.fp8_cluster")
    assert dispatch.select(grouped("offsets", 32, 32 * 8, n, k), ARCH).kernel == "gluon_sm90.fp8_decode"
    assert few_model.few(grouped("masked", 32, 4096, n, k, 64)) is None and few_model.few(grouped("offsets", 8, 512, n, k)) is None
    assert few_model.insured(1.0, 0.0, fewer, ARCH) == 1.0 < few_model.insured(1.0, 1.0, fewer, ARCH)


def test_a_last_wave_that_leaves_sms_idle_makes_the_bytes_slower() -> None:
    """Microseconds on an H200: 224 tiles of 128x256 45.8, 448 of 128x128 46.8, 896 of 64x128 44.8 (contiguous 8 x 128, 7168 x 2048)."""
    p = grouped("contiguous", 8, 1024, 7168, 2048)
    best = min(fp8_block.configs(p, ARCH), key=lambda c: fp8_block.estimate(p, c, ARCH))
    assert (best.block_m, best.block_n) == (64, 128)
