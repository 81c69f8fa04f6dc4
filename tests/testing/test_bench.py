"""The benchmark end to end on the CPU: a result file that is whole, a report that fails where it is not."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from narrowgemm.cli.bench import bench
from narrowgemm.cli.report import report
from narrowgemm.testing import results, runner
from narrowgemm.testing.cases import SUITES, get_suite
from narrowgemm.testing.worker import Job

SUITE = "cpu-small"
DENSE = [c for c in SUITES[SUITE] if c.layout == "dense"]
ROOT = Path(__file__).resolve().parents[2]


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(bench, [str(a) for a in ("--device", "cpu", "--rounds", 1, "--commit", "abc", *args)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of the whole suite."""
    path = tmp_path_factory.mktemp("bench") / "cpu" / "r.json"
    done = run("--suite", SUITE, "--json", path, "--csv", path.with_suffix(".csv"))
    assert done.exit_code == 0, done.output
    return path


def edited(path: Path, tmp_path: Path, change) -> Path:
    data = json.loads(path.read_text())
    change(data)
    out = tmp_path / "edited.json"
    out.write_text(json.dumps(data))
    return out


def test_a_result_has_every_row_and_every_column(whole: Path) -> None:
    data = results.read(whole)
    assert data["schema"] == results.SCHEMA and data["commit"] == "abc" and data["arch"] == "cpu"
    assert data["timer"]["name"] == "wall" and data["versions"]["torch"] and data["ceilings"]["read_gbs"] > 0
    assert {r["case"] for r in data["rows"]} == {c.id for c in SUITES[SUITE]}
    assert all(set(r) == set(results.COLUMNS) for r in data["rows"])
    for r in data["rows"]:
        assert r["error"] is None and r["us"] > 0
        assert r["peer"] is None or r["ratio"] == pytest.approx(r["peer_us"] / r["us"], abs=1e-3, rel=1e-3)
        assert r["calc_diff"] <= 5e-6 and r["recipe_diff"] <= 2e-3
        assert r["calc_diff"] == 0 or (r["snr_db"] >= 50 and 23 <= r["recipe_snr_db"] < r["snr_db"])
    peers = {r["peer"] for r in data["rows"]}
    assert peers == {"torch_bf16", "floor", None}  # None: cases of no rows, which nobody is compared on
    assert len(whole.with_suffix(".csv").read_text().splitlines()) == len(data["rows"]) + 1
    assert not list(whole.parent.glob("*.part"))


def test_the_report_of_a_whole_result_passes(whole: Path) -> None:
    done = CliRunner().invoke(report, [str(whole)])
    assert done.exit_code == 0, done.output
    assert "cpu-small" in done.output and "torch_bf16" in done.output
    table = CliRunner().invoke(report, [str(whole), "--markdown"])
    assert "| `cpu-small` | torch_bf16 |" in table.output
    data = json.loads(CliRunner().invoke(report, [str(whole), "--json"]).output)
    assert data["problems"] == [] and {s["peer"] for s in data["summaries"]} == {"torch_bf16", "floor"}


@pytest.mark.parametrize("what", ["row", "peer", "case", "error", "ratio", "suite", "unknown"])
def test_the_report_fails_where_something_is_missing(whole: Path, tmp_path: Path, what: str) -> None:
    victim = DENSE[1].id

    def change(data: dict) -> None:
        rows = data["rows"]
        mine = [r for r in rows if r["case"] == victim]
        if what == "row":
            rows.remove(mine[0])
        elif what == "case":
            data["rows"] = [r for r in rows if r["case"] != victim]
        elif what == "peer":
            data["rows"] = [r for r in rows if r["peer"] != "floor"]
        elif what == "error":
            mine[0]["error"] = "RuntimeError: it broke"
        elif what == "ratio":
            mine[0]["ratio"] = None
        elif what == "unknown":
            rows.append(mine[0] | {"case": "dense-of-old"})

    extra = ["--suite", "cpu-formats"] if what == "suite" else []
    path = str(edited(whole, tmp_path, change))
    assert CliRunner().invoke(report, [path, *extra, "--json"]).exit_code == 1
    done = CliRunner().invoke(report, [path, *extra])
    assert done.exit_code == 1
    expected = {"row": victim, "case": victim, "peer": "against floor: missing", "error": "it broke", "ratio": "no ratio",
                "suite": "cpu-formats/", "unknown": "no such case"}
    assert expected[what] in done.output


def test_a_mean_is_geometric_and_the_worst_is_named() -> None:
    a, b = get_suite("fp8-contiguous")[:2]
    rows = [results.make_row(a, "auto", "deepgemm", us=1.0, ratio=2.0),
            results.make_row(b, "auto", "deepgemm", us=1.0, ratio=0.5),
            results.make_row(b, "auto", "floor", us=1.0, error="broke", ratio=9.0)]
    (s,) = results.summarise(rows)
    assert (s.mean, s.worst, s.worst_case, s.cases) == (pytest.approx(1.0), 0.5, b.id, 2)
    problems = results.check(rows)
    assert len(problems) == 6 + 8  # of eight cases each: six against deepgemm, and all against the floor


def test_files_that_are_no_results(tmp_path: Path) -> None:
    for text, message in (("{", "no JSON"), ('{"schema": "other/1"}', "got schema 'other/1'"), ("[]", "got schema None"),
                          ('{"schema": "narrowgemm-bench/1", "rows": [{"case": "x"}]}', "has no 'suite'")):
        (tmp_path / "x.json").write_text(text)
        done = CliRunner().invoke(report, [str(tmp_path / "x.json")])
        assert done.exit_code == 1 and message in done.output


def test_split_results_count_as_one_and_an_error_does_not_replace_a_figure(whole: Path) -> None:
    data = results.read(whole)
    half = len(data["rows"]) // 2
    first, second = data | {"rows": data["rows"][:half]}, data | {"rows": data["rows"][half:]}
    assert results.check(results.merge([first])) and not results.check(results.merge([first, second]))
    broken = data | {"rows": [r | {"error": "broke"} for r in data["rows"]]}
    assert not results.check(results.merge([data, broken])) and not results.check(results.merge([broken, data]))
    inside = results.merge([data, data | {"scale_transform": True}])
    assert {r["asked"] for r in inside} == {"auto", "auto +transform"}


def test_resume_measures_what_is_left(whole: Path, tmp_path: Path) -> None:
    path = edited(whole, tmp_path, lambda d: d.update(rows=[r for r in d["rows"] if r["case"] != DENSE[0].id]))
    before = results.read(path)["rows"]
    done = run("--suite", SUITE, "--json", path, "--resume")
    assert done.exit_code == 0 and done.output.count("> Perf") == 1, done.output
    rows = results.read(path)["rows"]
    assert rows[: len(before)] == before and not results.check(rows)
    other = run("--suite", SUITE, "--json", path, "--resume", "--scale-transform")
    assert other.exit_code == 1 and "made with scale_transform False" in other.output


def test_time_that_is_over_leaves_rows_that_say_so(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    done = run("--case", f"{SUITE}/{DENSE[0].id}", "--case", f"{SUITE}/{DENSE[1].id}", "--peers", "floor", "--budget", 1e-9, "--json", path)
    rows = results.read(path)["rows"]
    assert [r["case"] for r in rows] == [c.id for c in DENSE[:2]]
    assert all("the time that was given is over" in r["error"] for r in rows)
    assert done.exit_code == 0 and "2 of 2 rows have no figure" in done.output


@pytest.mark.parametrize("stage", ["ours:auto", "peer:torch_bf16", "timing"])
def test_a_worker_that_dies_costs_its_case_or_its_peer(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    victim = DENSE[1].id
    killed: list[int] = []

    class Fragile(runner.Worker):
        def events(self):
            current = ""
            for event in super().events():
                current = event["case"][1] if event["event"] == "start" else current
                if event == {"event": "stage", "stage": stage} and current == victim:
                    killed.append(1)
                    yield event
                    self.kill()
                    # what it still says is lost with it
                    self._process.wait()
                    while self._lines.get(timeout=30) is not None:
                        pass
                    self._lines.put(None)
                else:
                    yield event

    monkeypatch.setattr(runner, "Worker", Fragile)
    peers = ["torch_bf16", "floor"]
    job = Job([(SUITE, c.id) for c in DENSE[:3]], {SUITE: peers}, ["auto"], "cpu", rounds=1)
    events = list(runner.run(job))
    rows = {(e["row"]["case"], e["row"]["peer"]): e["row"] for e in events if e["event"] == "row"}
    assert sum(e["event"] == "row" for e in events) == len(rows) == 6
    assert [e["case"][1] for e in events if e["event"] == "done"] == [c.id for c in DENSE[:3]]
    bad = {k: r["error"] for k, r in rows.items() if r["error"]}
    if stage.startswith("peer:"):
        assert set(bad) == {(victim, "torch_bf16")} and "died" in bad[victim, "torch_bf16"]
        assert rows[victim, "floor"]["ratio"] > 0
    else:
        assert set(bad) == {(victim, p) for p in peers}
        assert all(f"worker ended with -9 (at {stage})" in e for e in bad.values())
    assert len(killed) == 1


def test_a_worker_that_cannot_start_answers_for_all() -> None:
    job = Job([(SUITE, c.id) for c in DENSE[:2]], {SUITE: ["floor"]}, ["auto"], "no-such-device", rounds=1)
    rows = [e["row"] for e in runner.run(job) if e["event"] == "row"]
    assert len(rows) == 2 and all("worker ended with 1" in r["error"] for r in rows)


def test_a_silent_worker_is_ended() -> None:
    job = Job([(SUITE, DENSE[0].id)], {SUITE: ["floor"]}, ["auto"], "cpu", rounds=1)
    (row,) = (e["row"] for e in runner.run(job, timeout=0.01) if e["event"] == "row")
    assert "no answer for 0 s" in row["error"]


def test_a_peer_that_is_not_here_is_an_error_in_its_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    name = next(c.id for c in SUITES[SUITE] if c.layout == "contiguous")
    done = run("--suite", SUITE, "--case", name, "--peers", "deepgemm,floor,reference", "--json", path)
    rows = {r["peer"]: r for r in results.read(path)["rows"]}
    assert "DeepGEMM needs an NVIDIA GPU" in rows["deepgemm"]["error"] and rows["deepgemm"]["us"] > 0
    assert rows["floor"]["error"] is None and rows["reference"]["ratio"] > 0
    assert rows["reference"]["peer_calc_diff"] == rows["reference"]["calc_diff"]
    assert done.exit_code == 0 and "1 of 3 rows have no figure" in done.output


def test_several_backends_and_no_peer(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    done = run("--case", f"{SUITE}/{DENSE[2].id}", "--backends", "auto,triton", "--peers", "none", "--json", path)
    rows = {r["asked"]: r for r in results.read(path)["rows"]}
    assert rows["auto"]["backend"] == "reference" and rows["auto"]["peer"] is None and rows["auto"]["error"] is None
    assert "Unsupported" in rows["triton"]["error"] and rows["triton"]["us"] is None
    assert "> Perf (dense, m=64, n=112, k=128, bf16): triton: Unsupported" in done.output
    assert done.exit_code == 1 and "1 rows of ours failed" in done.output


@pytest.mark.parametrize("peer, error, ours", [("floor", None, False), ("floor", "floor: it broke", False), (None, "it broke", True),
                                               ("floor", "RuntimeError: it broke", True), ("floor", "deepgemm: said by us", True)])
def test_whose_failure_a_row_is(peer: str | None, error: str | None, ours: bool) -> None:
    assert results.own_failure(results.make_row(DENSE[0], "auto", peer, error=error)) is ours


def test_compiling_ahead_reports_each_case() -> None:
    job = Job([(SUITE, c.id) for c in DENSE[:3]], {SUITE: []}, ["auto"], "cpu")
    events = list(runner.warm(job, 2))
    assert sorted(e["case"][1] for e in events if e["event"] == "done") == sorted(c.id for c in DENSE[:3])


def test_options_that_name_nothing() -> None:
    for args, message in ((("--suite", "fp9"), "'fp9' is no suite; there are portable-contiguous"),
                          (("--case", "nothing*"), "no case matches 'nothing*'"),
                          (("--suite", SUITE, "--peers", "cutlass"), "'cutlass' is none of deepgemm"),
                          (("--suite", SUITE, "--backends", "cuda"), "'cuda' is none of auto"),
                          (("--suite", SUITE, "--json", "/proc/none/result.json"), "result.json can't be written: No such file"),
                          (("--suite", SUITE, "--csv", "/"), "/ can't be written: give a file"),
                          ((), "--suite NAME or --case PATTERN")):
        done = run(*args)
        assert done.exit_code == 2 and message in " ".join(done.output.replace("│", " ").split()), done.output
    listed = run("--list")
    assert listed.exit_code == 0 and "fp8-skew                 72 cases  against deepgemm, floor: FP8, 256 experts" in listed.output
    assert run("--suite", SUITE, "--list").output.count("\n") == len(SUITES[SUITE])


def test_a_plot_is_a_png(whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from narrowgemm.cli.plot import points, roofline

    data = results.read(whole)
    roofline(tmp_path / "r.png", data, data["rows"])
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert set(points(data["rows"])) == {"cpu-small (auto)", "torch_bf16"}


# ---- tables of the README -----------------------------------------------------------------------------------------------

def tables(name: str = "make_tables"):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_come_from_the_files(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make = tables()
    folder = tmp_path / "benchmarks" / "results" / "cpu"
    folder.mkdir(parents=True)
    readme = tmp_path / "README.md"
    readme.write_text(f"head\n{make.HEADLINE_BEGIN}\nold\n{make.HEADLINE_END}\nbetween\n{make.BEGIN}\nold\n{make.END}\ntail\n")
    assert make.main([], tmp_path) == 0
    assert "No result is committed yet." in readme.read_text()
    (folder / "2026-01-01-r.json").write_text(whole.read_text())
    (folder / "2026-01-01-tests.json").write_text('{"schema": "something else"}')
    assert make.main(["--check"], tmp_path) == 1
    assert make.main([], tmp_path) == 0 and make.main(["--check"], tmp_path) == 0
    text = readme.read_text()
    assert text.startswith("head\n") and text.endswith("tail\n") and "old" not in text
    assert re.search(r"^\| every layout .* \(`cpu-small`\) \| torch_bf16 \d+\.\d\d \(\d+\.\d\d\) \|$", text, re.MULTILINE)
    assert "commits `abc`" in text and "floor" not in text
    assert "| experts-" not in text, "no suite of the headline was measured there"
    edited(whole, folder, lambda d: d["rows"].pop())
    (folder / "edited.json").rename(folder / "2026-01-01-r.json")
    assert make.main([], tmp_path) == 1 and "MISSING cpu: cpu-small/" in capsys.readouterr().err


def page(make, folder: Path) -> str:
    """The performance page of the result files in a device's folder."""
    devices = make.make_tables.by_device(sorted(folder.glob("*.json")))
    return make.page_of(devices, {name: make.rows_of(files) for name, files in devices.items()})


def test_peers_that_a_run_was_not_asked_for_are_named(whole: Path, tmp_path: Path) -> None:
    make = tables()
    folder = tmp_path / "benchmarks" / "results" / "cpu"
    folder.mkdir(parents=True)
    data = json.loads(whole.read_text())
    data["peers"] = ["floor"]
    data["rows"] = [r for r in data["rows"] if r["peer"] != "torch_bf16"]
    (folder / "r.json").write_text(json.dumps(data))
    text, _, problems = make.render([folder / "r.json"])
    assert not problems and "(`cpu-small`) | floor " in text
    assert "Not measured there: torch_bf16 (`cpu-small`)." in page(tables("make_performance"), folder)
    data["peers"] = ["torch_bf16", "floor"]
    (folder / "r.json").write_text(json.dumps(data))
    assert any("against torch_bf16: missing" in p for p in make.render([folder / "r.json"])[2])


def test_wrong_peers_are_named_and_wrong_rows_of_ours_are_problems(whole: Path, tmp_path: Path) -> None:
    make = tables()
    folder = tmp_path / "benchmarks" / "results" / "cpu"
    folder.mkdir(parents=True)
    data = json.loads(whole.read_text())
    row = next(r for r in data["rows"] if r["peer"] == "torch_bf16")
    for error, named in (("torch_bf16: kernel gate FAILED: calc_diff 1", True), ("kernel gate FAILED: calc_diff 1", False),
                         ("torch_bf16: out of memory", False)):
        row.update(error=error, ratio=None)
        (folder / "r.json").write_text(json.dumps(data))
        problems = make.render([folder / "r.json"])[2]
        text = page(tables("make_performance"), folder)
        assert ("numeric gate: torch_bf16 (`cpu-small` 1)." in text) == named and bool(problems) != named


def test_the_performance_page_comes_from_the_files(whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    make = tables("make_performance")
    (tmp_path / "docs").mkdir()
    folder = tmp_path / "benchmarks" / "results" / "cpu"
    folder.mkdir(parents=True)
    (folder / "2026-01-01-r.json").write_text(whole.read_text())
    assert make.main(["--check"], tmp_path) == 1
    assert make.main([], tmp_path) == 0 and make.main(["--check"], tmp_path) == 0
    text = (tmp_path / "docs" / "performance.md").read_text()
    pictures = re.findall(r"\(pictures/(performance-cpu-\w+\.svg)\)", text)
    assert "| `cpu-small` | torch_bf16 |" in text and len(pictures) >= 2
    before = [(tmp_path / "docs" / "pictures" / p).read_bytes() for p in pictures]
    assert make.main([], tmp_path) == 0
    assert before == [(tmp_path / "docs" / "pictures" / p).read_bytes() for p in pictures]
    (tmp_path / "docs" / "pictures" / pictures[0]).unlink()
    assert make.main(["--check"], tmp_path) == 1


def test_figures_by_what_bounds_a_case() -> None:
    """What the floor of a case was, of suites whose aims hang on it."""
    make = tables("make_performance")
    bounds = {"a": "bytes", "b": "bytes", "c": "FLOPs"}
    ratios = {("a", "own_fp8"): 1.6, ("b", "own_fp8"): 1.4, ("c", "own_fp8"): 0.8,
              ("a", "floor"): 0.9, ("b", "floor"): 0.8, ("c", "floor"): 0.5}
    rows = [{"suite": "mxfp4-masked", "case": c, "asked": "auto", "peer": p, "ratio": x, "error": None,
             "note": "spread 0.1%" + (f"; floor by {bounds[c]}" if p == "floor" else "")} for (c, p), x in ratios.items()]
    found = make.bounds(rows)
    assert "| `mxfp4-masked` | bytes | own_fp8 | 2 | 1.50 | 1.40 |" in found
    assert "| `mxfp4-masked` | FLOPs | own_fp8 | 1 | 0.80 | 0.80 |" in found and "| `mxfp4-masked` | FLOPs | floor | 1 | 0.50 | 0.50 |" in found
    assert make.bounds([r | {"suite": "fp8-dense"} for r in rows]) == []


def test_time_over_tokens() -> None:
    """Tokens of routed products, layers and dense ones; a shape needs three of them."""
    make = tables("make_performance")
    rows = [{"suite": c.suite, "case": c.id, "us": 2.0, "error": None, "peer": "floor", "peer_us": 1.0}
            for s in ("a16w4-decode", "experts-mxfp4", "fp8-dense", "fp8-contiguous") for c in get_suite(s)]
    found = make.shapes(rows)
    assert found["layer gpt-oss-120b, EP 1, mxfp4"][64] == {"narrowgemm": 2.0, "floor": 1.0}
    assert found["routed, 128 experts of 5760 x 2880, bf16 x mxfp4"].keys() == {1, 4, 8, 16}
    assert found["dense 4096 x 7168, fp8_1x128 x fp8_128x128"].keys() == {1, 16, 64, 128, 4096, 8192}
    assert all("contiguous" not in name for name in found) and make.shapes(rows[:2]) == {}


def test_the_newest_commit_that_measured_a_suite_against_a_peer_counts() -> None:
    make = tables()
    row = lambda suite, peer, case="one": {"suite": suite, "peer": peer, "case": case}  # noqa: E731
    old = {"date": "1", "commit": "a", "rows": [row("fp8-dense", "deepgemm"), row("fp8-dense", "floor")]}
    new, part = ({"date": d, "commit": "b", "rows": [row("fp8-dense", "deepgemm")]} for d in ("2", "3"))
    other = {"date": "4", "commit": "c", "rows": [row("fp8-masked", "floor")]}
    chosen = make.newest([part, other, old, new])
    assert chosen == {("fp8-dense", False): [{**old, "rows": old["rows"][1:]}, new, part], ("fp8-masked", False): [other]}
    # a newer commit that was measured in some of the cases doesn't stand for all of them
    whole = {"date": "1", "commit": "a", "rows": [row("fp8-dense", "deepgemm"), row("fp8-dense", "deepgemm", "two")]}
    assert make.newest([new, whole]) == {("fp8-dense", False): [whole]}


def test_a_readme_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got no single block from <!-- results:begin -->"):
        tables().rewritten("no marks", "x")
