"""`narrowgemm env` answers whatever is broken, and says what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import narrowgemm
from narrowgemm.cli import env
from narrowgemm.cli.group import cli
from narrowgemm.runtime.env import VARIABLES

ROOT = Path(narrowgemm.__file__).parent


def stub(folder: Path, **modules: str) -> Path:
    """Modules of these names and sources, to be found first."""
    for name, source in modules.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(source)
    return folder


def report(path: Path | None = None, *command: str, **variables: str) -> dict:
    extra = variables | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run([sys.executable, *(command or ("-m", "narrowgemm", "env")), "--json"], capture_output=True,
                          text=True, env=os.environ | extra)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def healthy() -> dict:
    return report(NARROWGEMM_BACKEND="reference", NARROWGEMM_TABLES="/no/such/folder")


def test_a_healthy_install(healthy: dict) -> None:
    assert healthy["narrowgemm"]["version"] == narrowgemm.__version__
    assert healthy["import torch"]["version"] == healthy["packages"]["torch"]
    assert "reference" in healthy["import narrowgemm"]["kernels"]
    assert healthy["warm launches"] == ("bound to Triton's C launcher" if torch.cuda.is_available() else "no GPU here")
    assert healthy["variables"]["NARROWGEMM_BACKEND"] == "reference"
    assert set(VARIABLES) <= set(healthy["variables"])
    assert healthy["caches"]["triton"] and healthy["tuned tables"]["/no/such/folder"] == []


def test_text_has_the_same_facts(healthy: dict) -> None:
    text = env.text(healthy)
    for line in ("narrowgemm:", f"  version: {narrowgemm.__version__}", "  NARROWGEMM_BACKEND: reference"):
        assert line in text.splitlines()


@pytest.mark.parametrize(("source", "message"), [
    ("raise ImportError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
    ("raise OSError('undefined symbol')", "undefined symbol"),
    ("raise RuntimeError('built for another numpy')", "built for another numpy"),
    ("import os; os.kill(os.getpid(), 11)", "signal 11"),
    ("import sys; sys.exit('no')", "no"),
    ("print('not json')", "AttributeError"),
])
def test_broken_torch(tmp_path: Path, source: str, message: str) -> None:
    """From the file itself, so that a torch that kills the process is covered, too."""
    got = report(stub(tmp_path, torch=source), str(ROOT / "cli" / "env.py"))
    assert message in got["import torch"]["error"]
    assert got["python"]["version"] and got["variables"]


@pytest.mark.parametrize("source", ["raise ImportError('gone')", "raise OSError('gone')", "raise RuntimeError('gone')"])
def test_broken_torch_through_the_package(tmp_path: Path, source: str) -> None:
    got = report(stub(tmp_path, torch=source))
    assert "gone" in got["import torch"]["error"] and "gone" in got["import narrowgemm"]["error"]


def test_broken_triton(tmp_path: Path) -> None:
    got = report(stub(tmp_path, triton="raise ImportError('LLVM is too old')"))
    assert "LLVM is too old" in got["import triton"]["error"]
    assert "reference" in got["import narrowgemm"]["kernels"]  # narrowgemm works without it


def test_a_probe_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "PROBE_SECONDS", 1)
    assert env._finish(env._start("import time; time.sleep(60)")) == {"error": "importing it took more than 1 s"}


def test_guard_turns_failures_into_data() -> None:
    assert env.guard(lambda: 1 // 1) == 1
    assert env.guard(lambda: {}["key"]) == {"error": "KeyError: 'key'"}


def test_no_home_and_no_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert "found" in env._driver()
    assert env._caches() == {"triton": f"{tmp_path / 'cache'} (not there yet)"}
    (tmp_path / "cache" / "one").mkdir(parents=True)
    assert "1 entries, writable" in env._caches()["triton"]


def test_driver_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.95.05, 143771 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert env._driver() == ["nvidia-smi: NVIDIA H200, 580.95.05, 143771 MiB"]


def test_the_click_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "collect", lambda: {"a": {"b": ["c"]}, "none": []})
    assert json.loads(CliRunner().invoke(cli, ["env", "--json"]).output) == {"a": {"b": ["c"]}, "none": []}
    assert CliRunner().invoke(cli, ["env"]).output == "a:\n  b:\n    - c\nnone: none\n"
