"""`import narrowgemm`: fast, with nothing but torch, and with every public name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import narrowgemm

ROOT = Path(narrowgemm.__file__).parent
# The names that the documentation uses. A name may be added; one that goes missing breaks somebody.
PUBLIC = {"BF16", "FORMATS", "FP8_128x128", "FP8_1x128", "FP8_ROW", "FP8_TENSOR", "MXFP4", "MXFP8", "Config",
          "Contiguous", "Explanation", "Format", "KGrouped", "Masked", "Offsets", "Plan", "Problem", "Psum", "Routed",
          "ScaledTensor", "Unsupported", "__version__", "combine", "explain", "gather", "gemm", "grouped_gemm",
          "grouped_gemm_wgrad", "prepare", "quantize", "route", "sort_by_expert"}

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(name + " is blocked", name=name)

sys.meta_path.insert(0, Blocker())
"""
NO_NETWORK = """
import socket

def refuse(*args, **kwargs):
    raise AssertionError("a connection was opened")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""
USE_EVERYTHING = """
import torch
import narrowgemm
from narrowgemm import Masked, grouped_gemm, quantize
from narrowgemm.kernels.registry import kernels

a = quantize(torch.randn(2, 16, 256), narrowgemm.FP8_1x128)
b = quantize(torch.randn(2, 128, 256), narrowgemm.FP8_128x128)
out = grouped_gemm(a, b, Masked(torch.tensor([16, 3], dtype=torch.int32)))
assert out.shape == (2, 16, 128) and out[0].isfinite().all()
str(narrowgemm.explain("gemm", m=64, n=512, k=512, device="h200"))
assert len(kernels()) > 1
assert not [m for m in sys.modules if m.partition(".")[0] == "triton" and sys.modules[m]], "triton was imported"
print("ok")
"""


def python(code: str, **variables: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_public_names() -> None:
    assert set(narrowgemm.__all__) >= PUBLIC
    for name in narrowgemm.__all__:
        assert getattr(narrowgemm, name) is not None


def test_without_triton_and_without_network() -> None:
    """Not only the import: quantising, a product, plans for a GPU and every kernel's host part."""
    extras = {"triton", "safetensors", "click", "rich", "matplotlib", "transformers", "vllm", "sglang", "numpy"}
    assert python(BLOCK.format(names=extras) + NO_NETWORK + USE_EVERYTHING, TRITON_INTERPRET="0") == "ok"


def test_importing_loads_none_of_the_packages_beside_the_ops() -> None:
    loaded = python("import sys, narrowgemm; print(*[m for m in sys.modules if m.startswith('narrowgemm.')])").split()
    assert "narrowgemm.ops.gemm" in loaded
    for module in ("compat", "integrations", "cli", "testing"):
        assert not [m for m in loaded if m.startswith(f"narrowgemm.{module}")]


def test_packages_beside_the_ops_are_there_when_asked_for() -> None:
    names = "compat distributed integrations nn testing"
    code = f"import narrowgemm; print(*[getattr(narrowgemm, n).__name__ for n in {names.split()!r}], hasattr(narrowgemm, 'none'))"
    assert python(code).split() == [*(f"narrowgemm.{n}" for n in names.split()), "False"]


def test_import_touches_no_gpu() -> None:
    assert python("import torch, narrowgemm; print(torch.cuda.is_initialized())") == "False"


def test_import_time() -> None:
    """0.3 s of CPU time on top of torch's own import; once in three, since the machine may be busy."""
    code = "import torch, time; t = time.process_time(); import narrowgemm; print(time.process_time() - t)"
    assert any(float(python(code)) < 0.3 for _ in range(3))


def test_broken_torch_fails_at_first_use_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so is missing')")
    code = """
import narrowgemm
print(narrowgemm.__version__)
try:
    narrowgemm.gemm
except ImportError as e:
    print(e)
try:
    from narrowgemm import quantize
except ImportError as e:
    print(e)
"""
    version, first, second = python(code, PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT.parent)))).splitlines()
    assert version == narrowgemm.__version__
    for line in (first, second):
        assert "libtorch.so is missing" in line and "narrowgemm env" in line


def test_py_typed_and_version() -> None:
    assert (ROOT / "py.typed").is_file()
    assert narrowgemm.__version__.count(".") == 2
