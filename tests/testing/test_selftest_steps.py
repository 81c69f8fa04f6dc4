"""The doctor's checks of the expert layer's steps: the portable kernels pass them, interpreted, and a wrong one would not."""

from __future__ import annotations

import pytest
import torch

from narrowgemm.arch import get_arch
from narrowgemm.kernels.registry import candidates
from narrowgemm.testing import selftest_steps

CHECKS = {name: (problem, run) for name, problem, run in selftest_steps.checks()}


@pytest.mark.interpret
@pytest.mark.parametrize("name", [n for n in CHECKS if n in ("route-sigmoid-groups", "sort", "gather-mxfp4",
                                                             "activate-fp8_1x128", "combine")])
def test_portable_kernels(name, monkeypatch):
    monkeypatch.setenv("NARROWGEMM_ARCH", "h200")
    problem, run = CHECKS[name]
    able = [k for k, m in candidates(problem.op).items() if k != "reference.steps" and m.supports(problem, get_arch("h200")) is None]
    assert len(able) == 1
    diff = run(able[0], torch.device("cpu"))
    assert diff is None or diff < 1e-4


@pytest.mark.parametrize("name", CHECKS)
def test_reference(name):
    problem, run = CHECKS[name]
    diff = run("reference.steps" if "reference.steps" in candidates(problem.op) else "reference", torch.device("cpu"))
    assert diff is None or diff < 5e-6


def test_other_bits_are_noticed():
    with pytest.raises(AssertionError, match="other bits"):
        selftest_steps.equal(torch.ones(2), torch.tensor([1.0, 1.5]))
