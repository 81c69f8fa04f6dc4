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


def test_only_promising_candidates() -> None:
    every = space.candidates(space.problem_of(SUITES["fp8-dense"][0]), H200)
    least = space.pick(every).predicted_us
    assert space.promising(every, 1.3) == [c for c in every if c.predicted_us <= 1.3 * least] != every
    assert space.promising(every, 0.0) == every and space.promising([], 1.3) == []


def test_the_choice_against_the_portable_candidates() -> None:
    """What a call gets is there, whatever chose it, and the portable ones that are predicted to be the fastest."""
    for case in (*SUITES["fp8-contiguous"][:2], *SUITES["untuned"][::7]):
        problem = space.problem_of(case)
        every, chosen = space.candidates(problem, H200), space.choice(problem, H200)
        plan = dispatch.select(problem, H200)
        assert (chosen.kernel, chosen.config) == (plan.kernel, plan.config)
        found = space.versus_portable(every, chosen, 2)
        portable = sorted(c.predicted_us for c in every if c.backend == "triton")
        assert chosen.label in {c.label for c in found} and 2 <= len(found) <= 3
        assert sorted(c.predicted_us for c in found if c.backend == "triton")[:2] == portable[:2]


def test_untuned_shapes_have_no_row_in_a_packaged_table() -> None:
    assert len(SUITES["untuned"]) == 40
    for case in SUITES["untuned"]:
        assert store._found(space.problem_of(case), "h200", "") is None, case.id


def test_on_the_cpu_the_reference_is_a_candidate() -> None:
    found = space.candidates(space.problem_of(SUITES["cpu-small"][0]), get_arch("cpu"))
    assert [c.kernel for c in found] == ["reference"] and "reference" in kernels()
