"""What a type checker tells a user of the package: names that are not there are found, calls have their types."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import narrowgemm

USER = """
import torch
import narrowgemm
from narrowgemm import MXFP4, Offsets, PackedWeight, Routing, ScaledTensor, activate, gemm, prepack, quantize, route, sort_by_expert
from narrowgemm.compat import deep_gemm
from narrowgemm.compat.aiter import mxfp8_gemv

x = torch.randn(4, 64)
a: ScaledTensor = quantize(x, "mxfp4")
w: PackedWeight = prepack(quantize(torch.randn(2, 64, 64), MXFP4), pair="halves")
y: torch.Tensor = gemm(a, quantize(x, MXFP4), out_dtype=torch.float32)
ids: torch.Tensor = route(torch.randn(4, 2), top_k=1)[1]
routing: Routing = sort_by_expert(ids, num_experts=2)
layout: Offsets = routing.layout
h: torch.Tensor = activate(x)
z: torch.Tensor | None = mxfp8_gemv(x, x, x, x)
narrowgemm.nn.Experts(a, a, top_k=1)
narrowgemm.distributed.ExpertParallel
deep_gemm.bf16_gemm_nt(x, x, x)
gemm(3, x)                          # wrong
from narrowgemm import quantise     # wrong
narrowgemm.grouped_gem              # wrong
"""


@pytest.mark.slow
def test_a_users_file(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    file = tmp_path / "user.py"
    file.write_text(USER)
    path = {"MYPYPATH": str(Path(narrowgemm.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-m", "mypy", "--ignore-missing-imports", "--follow-imports", "silent", str(file)],
                          capture_output=True, text=True, env=os.environ | path, cwd=tmp_path)
    wrong = {n for n, line in enumerate(USER.splitlines(), 1) if "# wrong" in line}
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    assert found == wrong, done.stdout + done.stderr
