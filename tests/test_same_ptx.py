"""`tools/same_ptx.py`: what it takes for code, and that it sees a change."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("same_ptx", ROOT / "tools" / "same_ptx.py")
assert spec is not None and spec.loader is not None
same_ptx = importlib.util.module_from_spec(spec)
spec.loader.exec_module(same_ptx)

PTX = """
.visible .entry kernel(
{
 .loc 1 20 4
$L__tmp3:
 add.s32 %r1, %r2, %r3;   // name.py:20
$L__BB0_1:
 bra $L__BB0_1;
}
 .file 1 "name.py"
 .section .debug_abbrev
{
.b8 1
}
"""


def test_code_is_what_the_device_runs() -> None:
    code = same_ptx.stripped(PTX)
    assert [line.strip() for line in code.splitlines()] == [
        ".visible .entry kernel(", "{", "add.s32 %r1, %r2, %r3;", "$L__BB0_1:", "bra $L__BB0_1;", "}"]
    assert same_ptx.stripped(PTX.replace("20", "21").replace("tmp3", "tmp4")) == code
    assert same_ptx.stripped(PTX.replace("%r3;", "%r4;")) != code


@pytest.mark.compile
def test_a_tree_has_the_ptx_of_its_own_revision(tmp_path: Path) -> None:
    """And another one where a kernel of it is changed."""
    pytest.importorskip("triton")
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "copy")], check=True)
    command = [sys.executable, "tools/same_ptx.py", "bf16_jobs:jobs"]
    tool = tmp_path / "copy" / "tools" / "same_ptx.py"
    tool.write_text((ROOT / "tools" / "same_ptx.py").read_text())
    done = subprocess.run(command, cwd=tool.parents[1], capture_output=True, text=True)
    assert done.returncode == 0 and "have the same PTX as in HEAD" in done.stdout, done.stdout + done.stderr
    device = tool.parents[1] / "src" / "narrowgemm" / "kernels" / "triton" / "bf16_device.py"
    device.write_text(device.read_text().replace("acc = tl.dot(a, b, acc)", "acc = tl.dot(a, b, acc) + 1"))
    done = subprocess.run(command, cwd=tool.parents[1], capture_output=True, text=True)
    assert done.returncode == 1 and "DIFFERS" in done.stdout, done.stdout + done.stderr
