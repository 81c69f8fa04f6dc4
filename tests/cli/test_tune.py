"""`narrowgemm tune` end to end on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from narrowgemm.cli.group import cli
from narrowgemm.testing.cases import get_suite
from narrowgemm.tuning import store, sweep

DENSE = [c for c in get_suite("cpu-small") if c.layout == "dense" and c.rows]


def tune(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, ["tune", *map(str, args)])


def measured(*args: str | Path) -> Result:
    done = tune("--suite", "cpu-small", "--device", "cpu", "--rounds", 1, "--commit", "abc", *args)
    assert done.exit_code == 0, done.output
    return done


def test_tables_resume_and_report(tmp_path: Path) -> None:
    out = tmp_path / "tables"
    done = measured("--case", DENSE[0].id, "--out", out)
    assert f"NARROWGEMM_TABLES={out}" in done.output and "reference" in done.output
    table = out / "cpu" / "gemm-dense-fp8_1x128-fp8_128x128.json"
    (row,) = store.read_rows(table)
    assert not row["adopted"] and row["kernel"] == "reference" and row["us"] == row["model_us"] > 0
    log = out / "tune-cpu.json"
    before = sweep.read(log)["cases"]
    done = measured("--case", "dense-m1[67]*", "--case", DENSE[0].id, "--out", out, "--resume")
    assert sweep.read(log)["cases"][0] == before[0] and len(sweep.read(log)["cases"]) == 2
    assert done.output.count(" > ") == 1
    refused = tune("--suite", "cpu-small", "--device", "cpu", "--commit", "def", "--resume", "--out", out)
    assert refused.exit_code == 1 and "of one commit" in refused.output
    report = tune("--report", log)
    assert report.exit_code == 0 and "cpu-small                    2    1.000   1.000" in report.output, report.output


def test_a_sweep_and_tables_from_it(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    done = measured("--case", "dense-*", "--sweep", path, "--budget", 0.001)
    assert f"{len(DENSE)} of {len(DENSE)} cases are left" in done.output
    measured("--case", "dense-m[13]*", "--sweep", path)
    cases = sweep.read(path)["cases"]
    assert cases and set(cases[0]["candidates"][0]) >= {"kernel", "config", "predicted_us", "us", "calc_diff", "error"}
    assert [p.name for p in tmp_path.rglob("*.json")] == ["sweep.json"]
    done = tune("--from", path, "--out", tmp_path / "t")
    assert done.exit_code == 0 and "0 that beat the cost model" in done.output
    table = tmp_path / "t" / "cpu" / "gemm-dense-fp8_1x128-fp8_128x128.json"
    assert store.read_rows(table)
    later = tmp_path / "later.json"
    later.write_text(json.dumps(json.loads(path.read_text()) | {"commit": "later"}))
    assert tune("--from", path, "--from", later, "--out", tmp_path / "t").exit_code == 0 and json.loads(table.read_text())["commit"] == "later"


def test_report_fails_where_a_case_has_no_figure(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    measured("--case", DENSE[0].id, "--sweep", path)
    data = json.loads(path.read_text())
    data["cases"][0]["error"] = "its process died"
    path.write_text(json.dumps(data))
    done = tune("--report", path)
    assert done.exit_code == 1 and "its process died" in done.output


def test_the_space_of_another_device_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARROWGEMM_ARCH", "h200")
    done = tune("--suite", "fp8-contiguous,fp8-contiguous-small", "--list")
    assert done.exit_code == 0 and "16 cases, 14 keys" in done.output and "on h200" in done.output
    monkeypatch.delenv("NARROWGEMM_ARCH")
    assert tune("--suite", "fp8-contiguous,fp8-contiguous-small", "--list", "--device", "h200").output == done.output


@pytest.mark.parametrize(("args", "message"), [
    ((), "say what to tune"), (("--suite", "fp9"), "'fp9' is no suite"), (("--case", "nothing"), "no case matches"),
    (("--suite", "fp8-dense", "--packaged", "--out", "x"), "two places"),
    (("--suite", "fp8-dense", "--sweep", "s.json", "--packaged"), "--sweep writes no tables"),
    (("--suite", "fp8-dense", "--portable", "2"), "give --sweep FILE"),
    (("--suite", "fp8-dense", "--device", "h200"), "got 'h200', expected cuda, cuda:N or cpu"),
    (("--suite", "fp8-dense", "--device", "cuda:99"), "but torch sees"),
])
def test_bad_input(args: tuple[str, ...], message: str) -> None:
    done = tune(*args)
    assert done.exit_code == 2 and message in " ".join(done.output.replace("│", " ").split()), done.output


def test_a_file_that_is_no_sweep(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    for args in (("--report", tmp_path / "x.json"), ("--from", tmp_path / "x.json", "--out", tmp_path)):
        done = tune(*args)
        assert done.exit_code == 1 and "schema: got None" in done.output
    missing = tune("--report", tmp_path / "none.json")
    assert missing.exit_code == 1 and "expected a file that" in missing.output
