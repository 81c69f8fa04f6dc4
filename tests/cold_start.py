"""One process of a cold start: compile and launch a few kernels, on the GPU or past a driver that launches nothing.

    python -m tests.cold_start START        waits until time.time() >= START, prints {kernel seconds, result}
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time

import torch

import narrowgemm as ng
from narrowgemm.testing import stub_driver
from narrowgemm.testing.cases import Case, build

CASES = ((Case("cold", "dense", 1, 16, 512, 1024), "gluon_sm90.fp8_decode"), (Case("cold", "dense", 1, 512, 512, 1024), "gluon_sm90.fp8_block"),
         (Case("cold", "offsets", 4, 40, 512, 1024), "triton.fp8_block"))


def processor_seconds() -> float:
    """Of this process and its children: ptxas is one."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def main(start: float) -> None:
    import triton

    gpu = torch.cuda.is_available()
    if not gpu:
        stub_driver.install()
    device = "cuda" if gpu else "cpu"
    took: dict[str, list[float]] = {}
    since = [processor_seconds()]

    def compiled(*, src, times, cache_hit, **_) -> None:
        """Wall time, or where processes share processors what this one had of them since the last kernel: both are too long."""
        now = processor_seconds()
        if not cache_hit:
            took.setdefault(src.fn.__name__, []).append(round(min(times.total * 1e-6, now - since[0]), 3))
        since[0] = now

    triton.knobs.compilation.listener = compiled
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    time.sleep(max(0.0, start - time.time()))
    digest = hashlib.sha256()
    for case, kernel in CASES:
        i = build(case, device)     # quantises, too
        for _ in range(2):
            y = i.call(backend=kernel)
        if gpu:
            digest.update(y.view(torch.uint8).cpu().numpy().tobytes())
    q = ng.quantize(x, ng.FP8_1x128, backend="triton")
    if gpu:
        digest.update(q.data.view(torch.uint8).cpu().numpy().tobytes())
    print(json.dumps({"seconds": took, "result": digest.hexdigest()}))


if __name__ == "__main__":
    main(float(sys.argv[1]))
