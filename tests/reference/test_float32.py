"""What the process says of FP32 products: references don't depend on it, and leave it as it is."""

from __future__ import annotations

import subprocess
import sys

import pytest

SETTINGS = {
    "none": "",
    "set_float32_matmul_precision": "torch.set_float32_matmul_precision('medium')",
    "set_float32_matmul_precision high": "torch.set_float32_matmul_precision('high')",
    "allow_tf32": "b.cuda.matmul.allow_tf32 = True",
    "cuda fp32_precision": "b.cuda.matmul.fp32_precision = 'tf32'",
    "fp32_precision": "b.fp32_precision = 'tf32'",
    "mkldnn fp32_precision": "b.mkldnn.matmul.fp32_precision = 'bf16'",
    "one of both": "torch.set_float32_matmul_precision('high'); b.mkldnn.matmul.fp32_precision = 'ieee'",
}
CODE = """
import threading
import torch
from narrowgemm import gemm, quantize
from narrowgemm.reference.float32 import full_float32
b = torch.backends
def state():
    def ask(f):
        try:
            return f()
        except RuntimeError:
            return "raises"
    return (ask(torch.get_float32_matmul_precision), ask(lambda: b.cuda.matmul.allow_tf32), b.cuda.matmul.fp32_precision,
            b.mkldnn.matmul.fp32_precision, b.fp32_precision)
x, w = quantize(torch.randn(4, 256), "fp8_1x128"), quantize(torch.randn(128, 256), "fp8_128x128")
{0}
before = state()
gemm(x, w)
assert state() == before, (before, state())
with full_float32():
    reduced = [x for x in state()[2:4] if x in ("tf32", "bf16")]
    assert not reduced and state()[0] in ("highest", "raises"), state()
    with full_float32():
        pass
    assert not [x for x in state()[2:4] if x in ("tf32", "bf16")], "an inner block ended the outer one"
    inside, leave = threading.Event(), threading.Event()
    def other():
        with full_float32():
            inside.set()
            leave.wait()
            assert not [x for x in state()[2:4] if x in ("tf32", "bf16")], "another thread's block was ended"
            ended.append(True)
    ended, thread = [], threading.Thread(target=other)
    thread.start()
    inside.wait()
leave.set()
thread.join()
assert ended and state() == before, (before, state())
b.fp32_precision = "tf32"
follows = b.cuda.matmul.fp32_precision
print(follows)
"""


@pytest.mark.parametrize("name", SETTINGS)
def test_state_is_left_as_it_was(name: str) -> None:
    """In a process of its own each: torch's state is one for all."""
    out = subprocess.run([sys.executable, "-c", CODE.format(SETTINGS[name])], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    if name in ("none", "fp32_precision", "mkldnn fp32_precision"):
        assert out.stdout.strip() == "tf32", "the backend's own setting no longer follows torch.backends.fp32_precision"
