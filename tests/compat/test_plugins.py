"""Entry points of servers: there, and inert until the variable asks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GROUPS = ("vllm.general_plugins", "sglang.srt.plugins")


def run(code: str, value: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "NARROWGEMM_DEEP_GEMM"} | ({"NARROWGEMM_DEEP_GEMM": value} if value else {})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    return done.stdout if done.returncode == 0 else done.stderr


@pytest.mark.parametrize("group", GROUPS)
def test_the_entry_point_names_a_function(group: str) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(rf'^\[project\.entry-points\."{re.escape(group)}"\]\nnarrowgemm = "narrowgemm\.plugins:load"$', text, re.MULTILINE)


@pytest.mark.parametrize("value, there", [("", False), ("0", False), ("1", True)])
def test_inert_until_asked(value: str, there: bool) -> None:
    out = run("import sys; from narrowgemm.plugins import load; a = load(); b = load()\n"
              "print(a, b, 'deep_gemm' in sys.modules, 'narrowgemm.compat' in sys.modules)", value)
    assert out.split() == [str(there)] * 4


def test_another_value_is_an_error() -> None:
    assert "expected '0' or '1'" in run("from narrowgemm.plugins import load; load()", "yes")
