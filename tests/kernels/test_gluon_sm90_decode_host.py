"""Host side of the Hopper decode kernel: the search space, the cost model, and launches bound to a call's signature."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from narrowgemm.arch import get_arch
from narrowgemm.kernels.gluon.sm90 import fp8_decode, launcher
from narrowgemm.ops.explain import describe
from narrowgemm.problem import Problem, bucket

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
        assert (fp8_decode.workspace(p, c) > 0) == (c.split_k > 1 or p.layout == "contiguous")


@pytest.mark.parametrize("change", [{"block_m": 24}, {"block_n": 256}, {"split_k": 2}, {"num_stages": 40}, {"swap_ab": False},
                                    {"extra": (("narrow", 64),)}, {"extra": (("ctas", 5),)}])
def test_illegal(change: dict) -> None:
    p = PROBLEMS[0]
    c = fp8_decode.configs(p, ARCH)[0]
    assert fp8_decode.legal(p, replace(c, **change), ARCH)


def test_batch_invariant_is_never_split() -> None:
    p = replace(describe("gemm", m=64, n=576, k=7168), batch_invariant=True)
    assert {c.split_k for c in fp8_decode.configs(p, ARCH)} == {1}


# microseconds on an H200, of the config that the model has to rank first or nearly so
@pytest.mark.parametrize("p, us", [(grouped("masked", 32, 4096, 6144, 7168, 20), 339.9), (grouped("masked", 6, 4096, 4096, 2048, 20), 16.1),
                                   (grouped("masked", 32, 128, 4096, 2048, 1), 64.9), (describe("gemm", m=64, n=7168, k=2048), 7.9),
                                   (describe("gemm", m=16, n=4096, k=7168), 11.5)])
def test_model_is_near_the_measured(p: Problem, us: float) -> None:
    best = min(fp8_decode.estimate(p, c, ARCH) for c in fp8_decode.configs(p, ARCH)) * 1e6
    assert 0.8 < best / us < 1.2


def test_bound_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch gets the addresses of its own call, and a descriptor that encodes them."""
    made, seen = [], []
    monkeypatch.setattr(launcher, "_descriptor", lambda box, meta: made.append(box) or ("map", box.tensor.data_ptr()))
    monkeypatch.setattr(launcher, "_descriptors", launcher.Cache())
    handle = launcher.Handle(lambda *a: seen.append(a), ("head",), ({"swizzle": 3},))
    one, two = torch.zeros(4, 8), torch.zeros(4, 8)
    box = launcher.Box(one, (4, 8), (8, 1), (2, 8))
    bound = launcher.Bound(handle, 0, 5, [box], (7, "cfg"))
    for t in (one, two, one):
        bound(99, bound.maps((t,), t.data_ptr()), 11, 12)
    assert [b.tensor.data_ptr() for b in made] == [one.data_ptr(), two.data_ptr()]
    for t, call in zip((one, two, one), seen):
        assert call == (5, 1, 1, 99, "head", ("map", t.data_ptr()), 4, 8, 8, 1, 11, 12, 7, "cfg")
