"""`full_float32`: what the process says of FP32 matrix products, set aside while a reference is computed.

Torch keeps it twice: `set_float32_matmul_precision` and `allow_tf32` write an older state and, below it, `fp32_precision` of each
backend; where a caller set the newer one alone, asking the older one raises, and so does what asks it later (the profiler does).
So nothing is touched where products are full FP32 anyway, and what is touched is left as it was found, in both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

REDUCED = ("tf32", "bf16")
_lock = threading.Lock()
_inside: list[Callable[[], None]] = []      # of each block that is open, in any thread: what the last one to close calls


@contextmanager
def full_float32() -> Iterator[None]:
    """FP32 matrix products without TF32, BF16 and autocast inside the block, whatever the process has set."""
    with _lock:
        _inside.append(_inside[0] if _inside else _take())
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        with _lock:
            restore = _inside.pop()
            if not _inside:
                restore()


def _take() -> Callable[[], None]:
    """Full precision from here on; what brings the present state back."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul     # type: ignore[attr-defined]
    before = [b.fp32_precision for b in backends]
    if not any(p in REDUCED for p in before):
        return lambda: None
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:        # a backend's own setting is another
        legacy = ""
    if legacy:
        torch.set_float32_matmul_precision("highest")
    for b in backends:
        b.fp32_precision = "ieee"

    def restore() -> None:
        if legacy:
            torch.set_float32_matmul_precision(legacy)
        for b, precision in zip(backends, before):
            b.fp32_precision = "none"
            if b.fp32_precision != precision:       # else it follows torch.backends.fp32_precision
                b.fp32_precision = precision

    return restore
