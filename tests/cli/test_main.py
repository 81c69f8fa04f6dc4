"""The command line: lazy commands, clear answers without click, and the same from `python -m narrowgemm`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from narrowgemm.cli.group import COMMANDS, cli
from narrowgemm.cli.main import main
from narrowgemm.version import __version__

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(name + " is blocked", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run(*args: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m narrowgemm *args`, with `path` first on the module path."""
    env = os.environ | ({"PYTHONPATH": os.pathsep.join(filter(None, (str(path), os.environ.get("PYTHONPATH"))))} if path else {})
    return subprocess.run([sys.executable, "-m", "narrowgemm", *args], capture_output=True, text=True, env=env)


def test_help_lists_every_command_without_importing_any() -> None:
    result = CliRunner().invoke(cli, ["--help"])
    assert result.exit_code == 0
    for name in COMMANDS:
        assert f"  {name} " in result.output


def test_version() -> None:
    assert __version__ in CliRunner().invoke(cli, ["--version"]).output


def test_unknown_command() -> None:
    result = CliRunner().invoke(cli, ["nothing"])
    assert result.exit_code == 2 and "No such command" in result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_loads(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage:" in result.output


def test_a_command_that_cannot_be_loaded_breaks_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "broken", ("no_such_module", "broken", "Never loads."))
    result = CliRunner().invoke(cli, ["broken"])
    assert result.exit_code == 1 and "`narrowgemm broken` can't be loaded" in result.output
    assert CliRunner().invoke(cli, ["explain", "-M", "8", "-N", "128", "-K", "128"]).exit_code == 0


def test_module_entry_point() -> None:
    done = run("--version")
    assert done.returncode == 0 and __version__ in done.stdout


def test_without_click(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER.format(names={"click", "rich"}))
    done = run("demo", path=tmp_path)
    assert done.returncode == 2
    assert "pip install '.[cli]' in a checkout" in done.stderr and "Traceback" not in done.stderr
    assert run("env", "--help", path=tmp_path).returncode == 0     # its parser and its module; the report is tested in test_env.py


def test_errors_of_a_command_are_the_exit_status() -> None:
    with pytest.raises(SystemExit) as e:
        main(["explain"])
    assert e.value.code == 2
