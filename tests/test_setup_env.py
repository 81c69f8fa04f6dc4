"""What `make demo` and `make test` install: the pinned CPU torch without a GPU, nothing over the torch that is there with one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
assert spec and spec.loader
setup_env = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup_env)


class Machine:
    """Records what would be installed. `fails`: pip calls that fail, by a word in them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, venv: Path, *, gpu_torch: bool = False, driver: bool = False,
                 modules: tuple[str, ...] = (), fails: tuple[str, ...] = ()) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.made: list[tuple[str, ...]] = []

        def pip(python: Path, *args: str) -> int:
            self.calls.append(args)
            return int(any(word in " ".join(args) for word in fails))

        def run(*command: str) -> None:
            self.made.append(command)
            (venv / "bin").mkdir(parents=True)

        monkeypatch.setattr(setup_env, "pip", pip)
        monkeypatch.setattr(setup_env, "run", run)
        monkeypatch.setattr(setup_env, "torch_sees_gpu", lambda python: gpu_torch)
        monkeypatch.setattr(setup_env, "has_gpu_driver", lambda: driver)
        monkeypatch.setattr(setup_env, "installed", lambda python, *names: all(n in modules for n in names))
        monkeypatch.setattr(setup_env.platform, "system", lambda: "Linux")
        monkeypatch.setattr(sys, "argv", ["setup_env.py", str(venv), "dev"])


def test_cpu_takes_the_cpu_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(monkeypatch, tmp_path / "v")
    assert setup_env.main() == 0
    assert machine.calls[0] == ("torch==2.13.0+cpu",)
    assert machine.calls[1] == ("-c", str(ROOT / "constraints" / "ci.txt"), "-e", f"{ROOT}[dev]")
    assert "--system-site-packages" not in machine.made[0]
    assert machine.calls[2:] == [("--no-deps", "--target", str(tmp_path / "v-triton"), setup_env.NEWEST_TRITON)]


def test_the_newest_triton_lies_beside_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    beside = tmp_path / "v-triton"
    (beside / "triton-3.0.0.dist-info").mkdir(parents=True)
    machine = Machine(monkeypatch, tmp_path / "v", fails=("--target",))
    assert setup_env.main() == 0                    # an older one goes, and what can't be had is said
    assert not beside.exists() and "are skipped" in capsys.readouterr().err
    (beside / f"triton-{setup_env.NEWEST_TRITON.partition('==')[2]}.dist-info").mkdir(parents=True)
    (tmp_path / "v" / "bin" / "python").touch()
    machine.calls.clear()
    assert setup_env.main() == 0 and not any("--target" in c for c in machine.calls)
    machine = Machine(monkeypatch, tmp_path / "w")
    monkeypatch.setattr(sys, "argv", ["setup_env.py", str(tmp_path / "w"), "cli"])
    assert setup_env.main() == 0 and not any("--target" in c for c in machine.calls)


def test_cpu_falls_back_to_pytorch_s_index_and_then_to_any_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(monkeypatch, tmp_path / "v", fails=("+cpu",))
    assert setup_env.main() == 0
    assert [c[0] for c in machine.calls[:3]] == ["torch==2.13.0+cpu", "torch==2.13.0+cpu", "torch==2.13.0"]
    assert "--index-url" in machine.calls[1]


def test_no_torch_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Machine(monkeypatch, tmp_path / "v", fails=("torch",))
    with pytest.raises(SystemExit, match=r"torch==2\.13\.0 could not be installed"):
        setup_env.main()


@pytest.mark.parametrize(("gpu_torch", "driver"), [(True, True), (True, False), (False, True)])
def test_gpu_pins_neither_torch_nor_triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu_torch: bool,
                                           driver: bool) -> None:
    machine = Machine(monkeypatch, tmp_path / "v", gpu_torch=gpu_torch, driver=driver)
    assert setup_env.main() == 0
    assert ("--system-site-packages" in machine.made[0]) == gpu_torch
    (call,) = machine.calls
    pins = [line for line in Path(call[1]).read_text().splitlines() if not line.startswith("#")]
    assert pins and not [p for p in pins if p.startswith(("torch", "triton"))]


def test_without_an_index_src_is_linked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    everything = ("torch", "triton", *setup_env.MODULES["dev"])
    Machine(monkeypatch, tmp_path / "v", gpu_torch=True, modules=everything, fails=("-e",))
    (tmp_path / "v" / "bin").mkdir(parents=True)
    (tmp_path / "v" / "bin" / "python").write_text(f"#!/bin/sh\necho {tmp_path}\n")
    (tmp_path / "v" / "bin" / "python").chmod(0o755)
    assert setup_env.main() == 0
    assert (tmp_path / "narrowgemm.pth").read_text() == f"{ROOT / 'src'}\n"
    Machine(monkeypatch, tmp_path / "v", gpu_torch=True, modules=everything[:-1], fails=("-e",))
    assert setup_env.main() == 1
    assert "missing here: mypy" in capsys.readouterr().err


def test_an_old_python_is_told_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert setup_env.main() == 1 and "3.10 or newer" in capsys.readouterr().err


def test_constraints_allow_the_package() -> None:
    """Pins stay inside what pyproject.toml asks for."""
    pins = dict(line.split("==") for line in (ROOT / "constraints" / "ci.txt").read_text().split() if "==" in line)
    wanted = (ROOT / "pyproject.toml").read_text()
    assert {"torch", "triton", "ruff", "mypy", "pytest"} <= set(pins)
    assert f"ruff=={pins['ruff']}" in wanted


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_ci_runs_make_test_and_pytest_comes_last(tmp_path: Path) -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "make test" in script.read_text()
    # under `make test` this make would be a recursive one, and say so in its output
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(["make", "-n", "test", f"VENV={tmp_path / 'v'}"], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "pytest" in lines[-1] and any("ruff check" in x for x in lines) and any("-m mypy" in x for x in lines)
