from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from narrowgemm.cli import doctor
from narrowgemm.cli.group import cli
from narrowgemm.kernels.registry import kernels
from narrowgemm.tuning import store
from narrowgemm.tuning.fingerprint import fingerprint


def run(*arguments: str) -> tuple[int, dict]:
    result = CliRunner().invoke(cli, ["doctor", "--device", "cpu", "--json", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, json.loads(result.output)


def test_a_sound_installation_passes_and_names_every_kernel() -> None:
    code, doc = run()
    status = {f["what"]: f["status"] for f in doc["findings"]}
    assert code == 0 and doc["counts"]["failed"] == 0, doc
    assert status["torch"] == status["reference"] == status["compile cache"] == "ok"
    assert set(kernels()) <= set(status)


def test_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "selftest", lambda *a: iter([doctor.Finding("some.kernel", "failed", "calc_diff 1")]))
    result = CliRunner().invoke(cli, ["doctor", "--device", "cpu"])
    assert result.exit_code == 1 and "failed    some.kernel" in result.output and "1 failed" in result.output


def test_a_self_test_that_dies_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dies.py").write_text("import os, sys; print('{\"kernel\": \"a\", \"status\": \"ok\", \"case\": \"\", \"detail\": \"\"}',"
                                      " flush=True); print('CUDA error', file=sys.stderr, flush=True); os._exit(7)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "SELFTEST", "dies")
    first, last = doctor.selftest("cpu", 1.0)
    assert first.status == "ok" and last.status == "failed" and "7" in last.detail and "CUDA error" in last.detail


def test_a_self_test_in_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU several processes take part; one that dies is a finding, and the others' results are there."""
    (tmp_path / "shares.py").write_text(
        "import os, sys; i, n = sys.argv[3].split('/'); what = 'failed' if i == '2' else 'ok'; assert 'TRITON_INTERPRET' not in os.environ; "
        "print('{\"kernel\": \"' + i + ' of ' + n + '\", \"status\": \"' + what + '\", \"case\": \"\", \"detail\": \"\"}', flush=True)\n"
        "import time; i == '1' and time.sleep(1); i == '1' and os._exit(9); i == '2' and os._exit(1)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "SELFTEST", "shares")
    monkeypatch.setenv("TRITON_INTERPRET", "1")     # of the caller's: the kernels that are tested are compiled ones
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 6)
    found = list(doctor.selftest("cuda:0", 1.0))
    assert {f.what for f in found if f.status == "ok"} == {"0 of 3", "1 of 3"}
    failed = [(f.what, f.detail) for f in found if f.status == "failed"]       # one that says what failed ends with 1: no second finding
    assert failed == [("2 of 3", ""), ("self-test", "its process ended with 9: ")]


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"torch": "2.9.1", "transformers": "5.6.0"}

    def version(name: str) -> str:
        if name not in there:
            raise metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = {f.what: f for f in doctor.versions()}
    assert found["torch"].status == "failed" and "2.10" in found["torch"].detail
    assert found["triton"].status == "warning" and found["transformers"].status == "warning"
    there |= {"torch": "2.10.0+cu130", "triton": "3.6.0", "transformers": "6.0"}
    assert all(f.status == "ok" for f in doctor.versions())


def test_cache_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "not" / "there" / "yet"))
    assert doctor.compile_cache().status == "ok"
    with monkeypatch.context() as full:
        full.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**8))
        assert doctor.compile_cache().status == "warning"
    monkeypatch.setattr(doctor.os, "access", lambda *a: False)
    assert doctor.compile_cache().status == "failed"
    monkeypatch.undo()
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "bad.json").write_text("{")
    monkeypatch.setenv("NARROWGEMM_TABLES", str(tmp_path))
    own, packaged = doctor.tables()
    assert own.status == "failed" and "bad.json" in own.detail
    assert packaged.status in ("ok", "warning") and str(store.PACKAGED) in packaged.detail


def test_rows_that_are_older_than_their_kernels_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"n": 128, "k": 128, "rows": 8, "kernel": "triton.fp8_block", "config": {}, "us": 1.0}
    store.write_table(tmp_path, "h200", "t.json", {}, [row, row | {"rows": 16, "made": {row["kernel"]: fingerprint(row["kernel"])}},
                                                   row | {"rows": 32, "adopted": False}])
    monkeypatch.setenv("NARROWGEMM_TABLES", str(tmp_path))
    own, _ = doctor.tables()
    assert own.status == "warning" and "3 rows" in own.detail and "1 of them, for the h200, are passed over" in own.detail


def test_packaged_rows_of_another_device_are_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_table(tmp_path, "h200", "t.json", {}, [{"n": 128, "k": 128, "rows": 8, "kernel": "triton.fp8_block", "config": {}, "us": 1.0}])
    monkeypatch.delenv("NARROWGEMM_TABLES", raising=False)
    monkeypatch.setattr(store, "PACKAGED", tmp_path)
    status = {name: [f.status for f in doctor.tables(name)] for name in ("", "cpu", "b200", "h100", "h200")}
    assert status == {"": ["ok"], "cpu": ["ok"], "b200": ["ok"], "h100": ["warning"], "h200": ["warning"]}


def test_no_such_device() -> None:
    result = CliRunner().invoke(cli, ["doctor", "--device", "tpu"])
    assert result.exit_code == 1 and "tpu" in result.output, sys.exc_info()
