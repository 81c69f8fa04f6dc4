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


FORKED = """
import os, sys, traceback
import torch, narrowgemm        # once for all: that takes longer than what is tried
for code in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            exec(code)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
    print("---", flush=True)
"""


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What CODE prints with each of SETTINGS, in a process of its own: torch's state is one for all."""
    codes = [CODE.format(setting) for setting in SETTINGS.values()]
    done = subprocess.run([sys.executable, "-c", FORKED, *codes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(SETTINGS, done.stdout.split("---\n")))


@pytest.mark.parametrize("name", SETTINGS)
def test_state_is_left_as_it_was(printed: dict[str, str], name: str) -> None:
    follows = printed[name].strip()
    assert follows in ("tf32", "ieee", "bf16", "none"), follows[-2000:]
    if name in ("none", "fp32_precision", "mkldnn fp32_precision"):
        assert follows == "tf32", "the backend's own setting no longer follows torch.backends.fp32_precision"
