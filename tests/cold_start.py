"""One process of a cold start: compile and launch a few kernels, on the GPU or past a driver that launches nothing.

    python -m tests.cold_start START        waits until time.time() >= START, prints {kernel seconds, result}
"""

from __future__ import annotations

import hashlib
import json
import sys
import time

import torch

import narrowgemm as ng
from narrowgemm.testing import stub_driver
from narrowgemm.testing.cases import Case, build

CASES = ((Case("cold", "dense", 1, 16, 512, 1024), "gluon_sm90.fp8_decode"), (Case("cold", "dense", 1, 512, 512, 1024), "gluon_sm90.fp8_block"),
         (Case("cold", "offsets", 4, 40, 512, 1024), "triton.fp8_block"))


def main(start: float) -> None:
    import triton

    gpu = torch.cuda.is_available()
    if not gpu:
        stub_driver.install()
    device = "cuda" if gpu else "cpu"
    took: dict[str, list[float]] = {}
    triton.knobs.compilation.listener = lambda *, src, times, cache_hit, **_: None if cache_hit else took.setdefault(
        src.fn.__name__, []).append(times.total * 1e-6)
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
