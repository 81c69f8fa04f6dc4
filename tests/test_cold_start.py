"""Eight processes that start at once on an empty compile cache: each gets its kernels, and the cache is whole afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from narrowgemm.runtime import cache

from ._compile import ROOT, with_triton

PROCESSES = 8
SECONDS = 3.0       # to compile a kernel, with a processor of its own


def start(folder: Path, count: int, device: bool) -> list[dict]:
    """What `count` processes print that begin to compile at the same time, in an empty cache `folder`."""
    env = with_triton("oldest") | {"TRITON_CACHE_DIR": str(folder)} | ({} if device else {"NARROWGEMM_ARCH": "h200"})
    at = time.time() + (12 if device else 25)
    children = [subprocess.Popen([sys.executable, "-m", "tests.cold_start", str(at)], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True) for _ in range(count)]
    out = []
    for child in children:
        stdout, stderr = child.communicate(timeout=600)
        assert child.returncode == 0, stderr[-3000:]
        out.append(json.loads(next(line for line in stdout.splitlines() if line.startswith("{"))))
    return out


def check(folder: Path, reports: list[dict]) -> None:
    assert len({r["result"] for r in reports}) == 1, "processes compute different results"
    compiled = {name for r in reports for name in r["seconds"]}
    assert {"fp8_decode_kernel", "fp8_block_kernel", "groups_kernel"} <= compiled, compiled
    left = [str(f) for f in folder.rglob("*") if "tmp" in f.name]
    assert not left, f"unfinished files stay in the cache: {left[:3]}"
    assert {e.kernel for e in cache.entries(folder) if e.own} >= compiled


@pytest.mark.compile
@pytest.mark.slow
def test_eight_processes_start_cold(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    check(folder, start(folder, PROCESSES, device=False))
    again, = start(folder, 1, device=False)
    assert not again["seconds"], f"compiled again, although in the cache: {again['seconds']}"


@pytest.mark.gpu
def test_cold_start_on_a_gpu(tmp_path: Path) -> None:
    """As above, launched; and a kernel compiles in at most 3 s."""
    alone, = start(tmp_path / "one", 1, device=True)
    slow = {name: s for name, s in alone["seconds"].items() if max(s) > SECONDS}
    assert not slow, f"more than {SECONDS} s to compile: {slow}"
    folder = tmp_path / "cache"
    reports = start(folder, PROCESSES, device=True)
    check(folder, reports)
    assert reports[0]["result"] == alone["result"]
    print({name: max(s) for name, s in alone["seconds"].items()}, os.cpu_count(), "processors")
