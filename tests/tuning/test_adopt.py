"""What a key gets: the fastest that passed, if it beats the cost model by 3%; over several cases, the best worst case."""

from __future__ import annotations

from narrowgemm.tuning import adopt

from .fakes import LARGE, SMALL, candidate, record


def one(*candidates: dict) -> dict:
    row = adopt.verdict([record("dense-m64-n128-k256", *candidates)])
    assert row is not None
    return row


def test_a_win_by_three_percent_is_adopted() -> None:
    row = one(candidate("a", 100.0, 50.0), candidate("b", 97.0, 60.0), candidate("c", 120.0, 70.0))
    assert row["adopted"] and (row["kernel"], row["us"]) == ("b", 97.0)
    assert row["runner_up"] == {"kernel": "a", "config": SMALL.to_dict()} and row["runner_up_us"] == 100.0
    assert row["model"] == row["runner_up"] and row["model_us"] == 100.0 and row["calc_diff"] == 1e-6
    assert row["cases"] == 1 and row["case"] == "cpu-small/dense-m64-n128-k256" and row["worst_ratio"] == 1.0
    assert (row["n"], row["k"], row["rows"]) == (128, 256, 64)


def test_a_smaller_win_leaves_it_to_the_cost_model() -> None:
    row = one(candidate("a", 100.0, 50.0), candidate("b", 97.2, 60.0))
    assert not row["adopted"] and (row["kernel"], row["us"], row["model_us"]) == ("a", 100.0, 100.0)
    assert row["runner_up"]["kernel"] == "b" and row["runner_up_us"] == 97.2 and row["worst_ratio"] == 1.0288


def test_the_models_pick_is_never_adopted_over_itself() -> None:
    row = one(candidate("a", 90.0, 50.0, LARGE), candidate("a", 97.0, 60.0, SMALL))
    assert not row["adopted"] and row["config"] == LARGE.to_dict() and row["worst_ratio"] == 1.0


def test_a_pick_that_failed_is_replaced_whatever_it_costs() -> None:
    row = one(candidate("a", None, 50.0, error="kernel gate FAILED"), candidate("b", 500.0, 60.0))
    assert row["adopted"] and row["kernel"] == "b" and row["model_us"] is None and row["runner_up"] is None


def test_a_time_whose_rounds_differ_is_none() -> None:
    noisy = candidate("b", 1.0, 60.0) | {"spread": 0.16}
    row = one(candidate("a", 100.0, 50.0), noisy, candidate("c", 99.0, 70.0) | {"spread": 0.15})
    assert not row["adopted"] and row["kernel"] == "a" and row["runner_up"]["kernel"] == "c"
    # the pick's own: nothing to compare with
    assert adopt.tables([record("x", candidate("a", 100.0, 50.0) | {"spread": 0.5}, candidate("b", 50.0, 60.0))]) == {}


def test_a_figure_of_the_quick_round_alone_is_not_compared() -> None:
    first, second, third = candidate("a", 100.0, 50.0) | {"rounds": 7}, candidate("b", 96.0, 60.0) | {"rounds": 7}, candidate("c", 90.0, 70.0) | {"rounds": 2}
    assert one(first, second, third)["kernel"] == "b" and not one(first, third)["adopted"]


def test_a_candidate_with_an_error_is_never_chosen() -> None:
    row = one(candidate("a", 100.0, 50.0), candidate("b", 1.0, 60.0, error="recipe gate FAILED"))
    assert row["kernel"] == "a" and not row["adopted"] and row["runner_up"] is None


def test_several_cases_of_a_key_get_the_best_worst_case() -> None:
    first = record("one", candidate("a", 100.0, 1.0), candidate("b", 50.0, 2.0), candidate("c", 55.0, 3.0))
    second = record("two", candidate("a", 40.0, 1.0), candidate("b", 60.0, 2.0), candidate("c", 44.0, 3.0))
    row = adopt.verdict([first, second])
    # worst ratios: a 2.0, b 1.5, c 1.1
    assert row is not None and row["adopted"] and row["kernel"] == "c" and row["cases"] == 2
    assert row["worst_ratio"] == 1.1 and row["case"] == "cpu-small/one" and (row["us"], row["model_us"]) == (55.0, 100.0)
    assert row["runner_up"]["kernel"] == "b"


def test_the_model_may_pick_another_for_each_case_of_a_key() -> None:
    first = record("one", candidate("a", 50.0, 1.0), candidate("b", 100.0, 2.0))
    second = record("two", candidate("a", 100.0, 2.0), candidate("b", 50.0, 1.0))
    row = adopt.verdict([first, second])   # no single choice is as good as the picks
    assert row is not None and not row["adopted"] and row["worst_ratio"] == 1.0


def test_a_row_names_the_kernels_as_they_were_measured() -> None:
    """What records of two commits differ in is left out: the row does not stand for it."""
    first, second = (record(c, candidate("a", 100.0, 1.0)) for c in ("one", "two"))
    row = adopt.verdict([first | {"made": {"a": "1", "b": "2"}}, second | {"made": {"a": "1", "b": "3"}}])
    assert row is not None and row["made"] == {"a": "1"}
    assert adopt.verdict([first, second])["made"] == {}  # type: ignore[index]


def test_a_choice_has_to_run_every_case_of_the_key() -> None:
    first = record("one", candidate("a", 100.0, 1.0), candidate("b", 10.0, 2.0))
    second = record("two", candidate("a", 100.0, 1.0), candidate("b", None, 2.0, error="out of shared memory"))
    row = adopt.verdict([first, second])
    assert row is not None and row["kernel"] == "a" and not row["adopted"] and row["worst_ratio"] == 10.0
    assert adopt.verdict([record("one", candidate("a", 1.0, 1.0)), record("two", candidate("b", 1.0, 1.0))]) is None


def test_tables_are_by_key_and_without_cases_that_failed() -> None:
    fine = candidate("a", 10.0, 1.0)
    rows = adopt.tables([
        record("one", fine, key=(128, 256, 64)), record("two", fine, key=(128, 256, 64)),
        record("three", fine, key=(128, 256, 32)), record("four", fine, table="other.json"),
        record("five", fine, error="its process died"), record("six", candidate("a", None, 1.0, error="no"), table="x.json")])
    assert set(rows) == {"gemm-dense-fp8_1x128-fp8_128x128.json", "other.json"}
    assert [(r["rows"], r["cases"]) for r in rows["gemm-dense-fp8_1x128-fp8_128x128.json"]] == [(32, 1), (64, 2)]
