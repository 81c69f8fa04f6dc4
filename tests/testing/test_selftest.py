from __future__ import annotations

import pytest
import torch

from narrowgemm.arch import ARCHS, get_arch
from narrowgemm.kernels.registry import kernels
from narrowgemm.testing import selftest

CPU = torch.device("cpu")


def test_every_kernel_has_a_check() -> None:
    """On some device. A kernel of a new op, or of weights packed in a new way, needs checks of its own in `selftest.checks`."""
    assert [name for name, kernel in kernels().items() if not any(selftest.checks_of(kernel, arch) for arch in ARCHS.values())] == []


def test_shares_are_all_kernels() -> None:
    every = {r.kernel for share in range(3) for r in selftest.run(torch.device("cpu"), 0.0, (share, 3))}
    assert every == set(kernels())


def test_checks_of_a_kernel_differ() -> None:
    names = [c.name for c in selftest.checks_of(kernels()["triton.quantize"], get_arch("h200"))]
    assert len(set(names)) == selftest.PER_KERNEL


def test_kernels_that_can_not_run_say_why() -> None:
    results = {r.kernel: r for r in selftest.run(CPU)}
    assert results["reference"].status == "ok"
    assert results["gluon_sm90.fp8_block"].status == "not here" and "sm90" in results["gluon_sm90.fp8_block"].detail


@pytest.mark.parametrize("check", selftest.checks(), ids=lambda c: c.name)
def test_the_reference_passes(check: selftest.Check) -> None:
    result = selftest.attempt("reference", check, CPU)
    assert result.status == "ok", result


@pytest.mark.parametrize("op", sorted({c.problem.op for c in selftest.checks()}))
def test_a_wrong_kernel_fails(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first launch of the op writes something else; what it is compared with does not."""
    check = next(c for c in selftest.checks() if c.problem.op == op)
    kernel = next(k for k in kernels().values() if k.BACKEND == "reference" and k.supports(check.problem, get_arch("cpu")) is None)
    right, seen = kernel.launch, []

    def wrong(step, problem, operands, workspace) -> None:
        right(step, problem, operands, workspace)
        seen.append(problem.op)
        if problem.op != op or seen.count(op) > 1:
            return
        if operands.out.element_size() > 1:
            operands.out.view(-1)[0] += 1000
        else:
            operands.out.view(torch.uint8).view(-1)[:64] ^= 64

    monkeypatch.setattr(kernel, "launch", wrong)
    assert selftest.attempt(kernel.NAME, check, CPU).status == "failed"


def test_the_budget_ends_after_one_check_each() -> None:
    assert len([r for r in selftest.run(CPU, budget=0.0) if r.kernel == "reference"]) == 1
    assert len([r for r in selftest.run(CPU, budget=60.0) if r.kernel == "reference"]) == selftest.PER_KERNEL


@pytest.mark.gpu
def test_every_kernel_of_this_gpu() -> None:
    """What `narrowgemm doctor` runs; with a budget of nothing, one check a kernel."""
    results = list(selftest.run(torch.device("cuda"), budget=0.0))
    assert {r.kernel for r in results} == set(kernels())
    failed = [r for r in results if r.status == "failed"]
    assert not failed, failed
