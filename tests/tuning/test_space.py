"""The tuner's problems and candidates are those of the ops and of dispatch."""

from __future__ import annotations

import pytest

from narrowgemm.arch import get_arch
from narrowgemm.kernels.registry import kernels
from narrowgemm.runtime import dispatch
from narrowgemm.testing.cases import SUITES
from narrowgemm.testing.inputs import build
from narrowgemm.tuning import space, store

H200 = get_arch("h200")


@pytest.mark.parametrize("suite", ["cpu-small", "cpu-formats"])
def test_the_problem_of_a_case_is_the_one_of_its_call(suite: str) -> None:
    for case in SUITES[suite]:
        if case.rows:
            plan = build(case).plan(backend="reference")
            assert plan is not None and space.problem_of(case) == plan.problem, case.id


@pytest.mark.parametrize("suite", [s for s in SUITES if s.startswith(("fp8-", "portable-"))])
def test_the_cost_models_pick_is_what_dispatch_selects(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PACKAGED", store.PACKAGED / "none")
    dispatch._select.cache_clear()
    for case in SUITES[suite][::5]:
        problem = space.problem_of(case)
        found = space.candidates(problem, H200)
        plan, pick = dispatch.select(problem, H200), space.pick(found)
        assert (pick.kernel, pick.config) == (plan.kernel, plan.config) and "cost model" in plan.reason
        assert len({c.label for c in found}) == len(found)
        assert not any(c.backend == "reference" for c in found)
        for c in found:
            assert dispatch.select(problem, H200, c.kernel, c.config).steps[0].config == c.config
    dispatch._select.cache_clear()


def test_patterns_keep_the_pick() -> None:
    problem = space.problem_of(SUITES["fp8-masked-decode"][0])
    every = space.candidates(problem, H200)
    portable = space.candidates(problem, H200, ["triton*"])
    assert space.pick(portable) == space.pick(every)
    assert {c.kernel for c in portable} == {"triton.fp8_block", space.pick(every).kernel} and len(portable) < len(every)


def test_on_the_cpu_the_reference_is_a_candidate() -> None:
    found = space.candidates(space.problem_of(SUITES["cpu-small"][0]), get_arch("cpu"))
    assert [c.kernel for c in found] == ["reference"] and "reference" in kernels()
