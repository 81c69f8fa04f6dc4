"""Bound launches, held against every Triton that is there: see `launch_checks`."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from narrowgemm.kernels.bound import Pointer
from narrowgemm.kernels.operands import Operands

from .._compile import ROOT, TRITONS, with_triton

CHECKS = [name.id for node in ast.parse((Path(__file__).parent / "launch_checks.py").read_text()).body
          if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CHECKS" for name in node.value.elts]


@pytest.fixture(scope="module", params=TRITONS)
def found(request: pytest.FixtureRequest) -> dict[str, str]:
    """Check to error, '' where there is none."""
    env = with_triton(request.param) | {"NARROWGEMM_ARCH": "h200"}
    done = subprocess.run([sys.executable, "-m", "tests.kernels.launch_checks"], cwd=ROOT, env=env, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@pytest.mark.compile
@pytest.mark.parametrize("check", CHECKS)
def test_launch(found: dict[str, str], check: str) -> None:
    assert not found[check], f"Triton {found['triton']}: {found[check]}"


def test_addresses_cover_every_tensor() -> None:
    """A tensor field that `tensors` leaves out would be bound to its first address for good."""
    from narrowgemm.formats import BF16, ScaledTensor

    def tensor() -> torch.Tensor:
        return torch.empty(1)

    fields = {f.name: f.type for f in dataclasses.fields(Operands)}
    values = {n: ScaledTensor(tensor(), tensor(), BF16) if "ScaledTensor" in t else tensor() for n, t in fields.items()
              if "Tensor" in t}
    x = Operands(**values, m=1, n=1, k=1)
    held = [t for v in values.values() for t in ((v.data, v.scale) if isinstance(v, ScaledTensor) else (v,))]
    assert {id(t) for t in x.tensors()} == {id(t) for t in held}
    assert x.addresses(None) == (0, *(t.data_ptr() for t in x.tensors()))


def test_a_part_of_no_bytes_has_an_address_that_is_somebodys() -> None:
    """Where the buffer ends, its memory may."""
    buffer = torch.empty(512, dtype=torch.uint8)
    assert [Pointer(buffer, torch.float32, at).data_ptr() - buffer.data_ptr() for at in (0, 256, 512)] == [0, 256, 0]


EXACT = """
import torch
from narrowgemm.formats import BF16, FP8_1x128, MXFP4, MXFP8
from narrowgemm.testing.cases import Case, build
for a, b, packed, kernel in ((BF16, MXFP4, "fp8", "narrow_prefill"), (MXFP8, MXFP8, "folded", "fold_both"), (MXFP8, MXFP4, True, "fold_mixed")):
    case = Case("exact", "offsets", 2, 64, 256, 512, a=a, b=b, packed=packed)
    build(case, "cuda").verify(backend=f"gluon_sm90.{kernel}")
"""


@pytest.mark.gpu
@pytest.mark.slow
def test_workspaces_that_end_where_their_memory_does() -> None:
    """Every buffer an allocation of its own, of no byte more."""
    env = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1", PYTHONPATH=os.pathsep.join([str(ROOT / "src"), *sys.path]))
    done = subprocess.run([sys.executable, "-c", EXACT], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
