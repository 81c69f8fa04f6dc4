"""The report of a sweep: means and worsts by suite, against the best and the best portable, then and now."""

from __future__ import annotations

import pytest

from narrowgemm.arch import get_arch
from narrowgemm.testing.cases import get_case, get_suite
from narrowgemm.tuning import report, space

from .fakes import LARGE, candidate, record

IDS = [c.id for c in get_suite("fp8-contiguous")]
H200 = get_arch("h200")


def line(*records: dict, suites: tuple[str, ...] = ("fp8-contiguous",)) -> tuple[list[report.Line], list[str]]:
    return report.summarise(suites, records, report.recorded)


def test_means_are_geometric_and_worsts_are_named() -> None:
    first = record(IDS[0], candidate("p", 100.0, 2.0, backend="triton"), candidate("a", 50.0, 1.0))
    second = record(IDS[1], candidate("p", 80.0, 2.0, backend="triton"), candidate("a", 100.0, 1.0), candidate("b", 50.0, 3.0),
                    candidate("c", 1.0, 4.0, error="kernel gate FAILED"))
    (out,), problems = line(first, second)
    assert (out.cases, out.worst, out.worst_case) == (2, 2.0, IDS[1]) and out.mean == pytest.approx(2.0**0.5)
    assert out.portable_worst == 1.25 and out.portable_mean == pytest.approx((0.5 * 1.25) ** 0.5)
    assert out.portable_worst_case == IDS[1]
    (problem,) = problems   # the second case is over the limit
    assert problem.startswith(f"cpu-small/{IDS[1]}: 100.0 us with a ") and "1.250 of the portable kernel's 80.0 us" in problem
    assert "fp8-contiguous" in report.text([out])[1] and "1.250" in report.text([out])[1]


@pytest.mark.parametrize(("us", "slower"), [(103.0, 0), (103.2, 1)])
def test_three_percent_behind_the_portable_kernel_is_the_limit(us: float, slower: int) -> None:
    _, problems = line(record(IDS[0], candidate("a", us, 1.0), candidate("p", 100.0, 2.0, backend="triton")))
    assert len(problems) == slower


def test_what_has_no_figure_is_a_problem() -> None:
    out, problems = line(record(IDS[0], error="its process died"), record(IDS[1], candidate("a", None, 1.0, error="bad")),
                         record(IDS[2], candidate("a", None, 1.0, error="kernel gate FAILED"), candidate("b", 9.0, 2.0)))
    assert out == [] and ["its process died" in problems[0], "no candidate" in problems[1], "kernel gate FAILED" in problems[2]] == [True] * 3


def test_a_case_counts_in_each_suite_and_without_portables() -> None:
    shared = get_suite("fp8-offsets")[0].id
    out, problems = line(record(shared, candidate("a", 5.0, 1.0)), suites=("fp8-offsets", "portable-offsets", "fp8-dense"))
    assert [x.suite for x in out] == ["fp8-offsets", "portable-offsets"] and problems == []
    assert out[0].portable_worst_case == "" and report.text(out)[1].count(" - ") >= 1


def test_the_choice_of_this_version_is_planned_anew() -> None:
    case = get_case("fp8-contiguous", IDS[0])
    now = space.pick(space.candidates(space.problem_of(case), H200))
    mine = candidate(now.kernel, 10.0, 9.0, now.config, now.backend)
    old = record(IDS[0], candidate("gone", 8.0, 1.0, LARGE), mine, suite="fp8-contiguous")
    (then,), _ = report.summarise(["fp8-contiguous"], [old], report.recorded)
    (today,), _ = report.summarise(["fp8-contiguous"], [old], report.current(H200))
    assert (then.worst, today.worst) == (1.0, 1.25)
    lost = record(IDS[0], candidate("gone", 8.0, 1.0), suite="fp8-contiguous")
    out, problems = report.summarise(["fp8-contiguous"], [lost], report.current(H200))
    assert out == [] and "was not measured" in problems[0]
