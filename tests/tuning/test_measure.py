"""One case with made-up kernels and times: gates, twins, stages, finalists, and candidates that can't be timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from narrowgemm.testing.cases import Case, get_case
from narrowgemm.testing.worker import DeviceLost
from narrowgemm.tuning import measure, sweep
from narrowgemm.tuning.measure import Job, Trial

from .fakes import LARGE, SMALL, SPLIT, FakeTimer, install, kernel, station

CASE = get_case("cpu-small", "offsets-g5-m24-n96-k160-uniform_0.7_1.3")
WHERE = f"{CASE.suite}/{CASE.id}"
A, B, C = f"fake.one {SMALL}", f"fake.one {LARGE}", f"fake.two {SMALL}"
GOOD = {A: 10.0, B: 20.0, C: 30.0}


def trial(monkeypatch: pytest.MonkeyPatch, us: dict[str, float], *, spoil: Any = None, case: Case = CASE,
          **job: Any) -> tuple[dict[str, Any], FakeTimer]:
    install(monkeypatch, kernel("fake.one", {SMALL: 30.0, LARGE: 20.0}, spoil=spoil),
            kernel("fake.two", {SMALL: 25.0}, "triton"))
    where = station(us)
    out = Trial(where, Job([(case.suite, case.id)], "cpu", **job), case).run()
    return out, where.timer  # type: ignore[return-value]


def by_label(out: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{c['kernel']} {measure.store.Config.from_dict(c['config'])}": c for c in out["candidates"]}


def test_every_candidate_is_gated_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    out, timer = trial(monkeypatch, GOOD, finalists=2)
    assert out["error"] is None and (out["n"], out["k"], out["rows"]) == (96, 160, 24)
    assert out["table"] == "grouped_gemm-offsets-fp8_1x128-fp8_128x128.json"
    entries = by_label(out)
    assert {label: c["us"] for label, c in entries.items()} == GOOD
    assert all(0 < c["calc_diff"] <= 5e-6 and 0 < c["recipe_diff"] <= 2e-3 for c in entries.values())
    assert {label: c["predicted_us"] for label, c in entries.items()} == {A: 30.0, B: 20.0, C: 25.0}
    # a quick round of all, then the two best and the best portable
    assert timer.asked == [([A, B, C], 2), ([A, B, C], 7)]
    assert sweep.model_pick(out)["predicted_us"] == 20.0


def test_only_finalists_are_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, kernel("fake.one", {SMALL: 30.0, LARGE: 20.0, SPLIT: 31.0}), kernel("fake.two", {SMALL: 5.0}, "triton"))
    split = f"fake.one {SPLIT}"
    where = station({A: 10.0, B: 20.0, split: 15.0, C: 90.0})
    out = by_label(Trial(where, Job([], "cpu", finalists=2), CASE).run())
    assert where.timer.asked[1] == ([A, split, C], 7)   # the model's pick is C, and portable: it is there although slow
    assert {label: c["rounds"] for label, c in out.items()} == {A: 7, split: 7, C: 7, B: 2}


@pytest.mark.parametrize("how", ["kernel", "nan", "padding"])
def test_a_candidate_that_fails_a_gate_is_recorded_and_never_timed(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    case = get_case("cpu-small", "offsets-g4-m30-n128-k128-skew_30-slack9")

    def spoil(config: Any, out: torch.Tensor) -> None:
        if config == SMALL:
            row = {"kernel": 0, "nan": 1, "padding": -1}[how]
            out[row] = float("nan") if how == "nan" else out[row].nan_to_num() + 1.0

    out, timer = trial(monkeypatch, GOOD, spoil=spoil, case=case)
    bad, good = by_label(out)[A], by_label(out)[B]
    expected = "wrote rows that belong to no group" if how == "padding" else "kernel gate FAILED"
    assert expected in bad["error"] and bad["us"] is None and good["us"] == 20.0
    assert all(A not in labels for labels, _ in timer.asked)
    assert [c["us"] for c in sweep.timed(out)] == [20.0, 30.0]


def test_results_of_the_same_bits_are_gated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    gates = measure.check_outputs
    monkeypatch.setattr(measure, "check_outputs", lambda inputs, outputs: made.append(list(outputs)) or gates(inputs, outputs))
    out, _ = trial(monkeypatch, GOOD)
    assert made == [[A]] and all(c["calc_diff"] for c in out["candidates"])
    made.clear()
    monkeypatch.setattr(measure, "KEPT_BYTES", 1)
    trial(monkeypatch, GOOD, spoil=lambda config, y: y[:1].mul_(1.5) if config == LARGE else None)
    assert made == [[A], [B], [C]]   # no room: what waits is judged first


def test_what_can_not_be_timed_costs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    out, timer = trial(monkeypatch, {A: 10.0, C: 30.0})
    entries = by_label(out)
    assert "timing: RuntimeError" in entries[B]["error"] and entries[A]["us"] == 10.0 and entries[C]["us"] == 30.0
    assert timer.asked[:4] == [([A, B, C], 2), ([A], 1), ([B], 1), ([C], 1)]


def test_what_killed_a_process_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    out, timer = trial(monkeypatch, GOOD, skip={WHERE: {A: "worker ended with -11"}}, careful=[WHERE])
    assert by_label(out)[A]["error"] == "worker ended with -11"
    assert timer.asked[:3] == [([B], 1), ([C], 1), ([B, C], 2)]


def test_a_lost_device_is_told_with_the_candidate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    install(monkeypatch, kernel("fake.one", {SMALL: 30.0}))
    where = station(GOOD)

    def attempt(step: Any) -> tuple[Any, str]:
        out = step()
        if out is None:
            raise DeviceLost("RuntimeError: illegal memory access")
        return out, ""

    monkeypatch.setattr(where, "attempt", attempt)
    with pytest.raises(DeviceLost):
        Trial(where, Job([], "cpu"), CASE).run()
    said = capsys.readouterr().out
    assert f'"stage": "{measure.TRY}{A}"' in said and "device lost: RuntimeError: illegal memory access" in said


def test_nothing_to_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    case = get_case("cpu-small", "offsets-g4-m16-n128-k128-zero")
    assert trial(monkeypatch, GOOD, case=case)[0]["error"] == "nothing to compute: no rows"
