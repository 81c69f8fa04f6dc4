"""A kernel's fingerprint: changed by its device code, candidates and launch; not by its cost model, comments, docstrings."""

from __future__ import annotations

from pathlib import Path

import pytest

from narrowgemm.kernels.registry import kernels
from narrowgemm.tuning.fingerprint import _source, fingerprint, of_file

HOST = '''"""A kernel."""

from __future__ import annotations

from dataclasses import dataclass

from ...launching import launch as run
from .parts import STAGES
from . import refusals

SHAPES: dict[int, int] = {64: 1, 128: 2}
BLOCK_TIMES = {64: 0.5}


@dataclass(frozen=True)
class Tile:
    """Compile time."""
    rows: int = 64
    BLOCK_TIMES: int = 0


def supports(problem, arch):
    return refusals.shape(problem)


def configs(problem, arch):
    # in order
    return [Tile(s) for s in SHAPES if s > STAGES]


def estimate(problem, config, arch):
    return BLOCK_TIMES[64]


def launches(step, problem, operands, workspace):
    """Of one step."""
    from . import toy_device as device

    return [(device.toy_kernel, len("a  # b"))]
'''
FILES = {
    "toy.py": HOST,
    "parts.py": "STAGES = 4\nOTHER = 5\n",
    "refusals.py": "def shape(problem):\n    return None\n",
    "toy_device.py": "from .inner_device import add\n\n\n@jit(specialize=1)\ndef toy_kernel(x):\n    add(x)\n\n\ndef unused(x):\n    return 3\n",
    "inner_device.py": "MASK = 7\n\n\n@jit\ndef add(x):\n    return x & MASK\n"}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def after(folder: Path, file: str, old: str, new: str) -> str:
    path = folder / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    of_file.cache_clear()
    _source.cache_clear()
    return of_file(folder / "toy.py")


@pytest.mark.parametrize(("file", "old", "new"), [
    ("toy.py", "128: 2", "256: 2"), ("toy.py", "rows: int = 64", "rows: int = 32"), ("toy.py", "len(", "sum("),
    ("parts.py", "STAGES = 4", "STAGES = 5"), ("toy_device.py", "specialize=1", "specialize=0"), ("toy_device.py", "add(x)", "add(x + 1)"),
    ("inner_device.py", "MASK = 7", "MASK = 3"), ("inner_device.py", "x & MASK", "x | MASK"),
])
def test_what_changes_the_speed_changes_it(toy: Path, file: str, old: str, new: str) -> None:
    before = of_file(toy / "toy.py")
    assert len(before) == 12 and after(toy, file, old, new) != before


@pytest.mark.parametrize(("file", "old", "new"), [
    ("toy.py", "{64: 0.5}", "{64: 0.6}"), ("toy.py", "BLOCK_TIMES[64]", "2 * BLOCK_TIMES[64]"), ("toy.py", "# in order", "# in disorder"),
    ("toy.py", "Of one step.", "Of a step."), ("toy.py", "Compile time.", "Fixed\n    then."), ("toy.py", "> STAGES]", ">  STAGES]  # legal"),
    ("refusals.py", "None", "'no'"), ("parts.py", "OTHER = 5", "OTHER = 6"), ("toy_device.py", "return 3", "return 4"),
])
def test_what_does_not_leaves_it(toy: Path, file: str, old: str, new: str) -> None:
    before = of_file(toy / "toy.py")
    assert after(toy, file, old, new) == before


def test_every_kernel_has_one_of_its_own() -> None:
    some = ("gluon_sm90.fp8_block", "gluon_sm90.fp8_cluster", "gluon_sm90.fp8_decode", "triton.fp8_block")
    found = {k: fingerprint(k) for k in some}
    assert all(k in kernels() for k in some) and len(set(found.values())) == len(some) and "" not in found.values()
    assert fingerprint("no such kernel") == ""
