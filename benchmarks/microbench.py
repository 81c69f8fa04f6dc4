"""Two measurements beside the suites: quantisation against a copy of the same bytes, and what an eager call costs the CPU.

    python benchmarks/microbench.py --json FILE [--commit SHA]        on a GPU

`copy` moves as many bytes as the quantiser reads and writes. The launch cost is wall time of many calls that outrun nothing:
the kernels are smaller than the calls, and the queue is empty again before each batch.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

import narrowgemm as ng
from narrowgemm.testing.cases import Case, build
from narrowgemm.testing.timers import GraphTimer

SHAPES = ((512, 7168), (4096, 7168), (16384, 7168), (16384, 2048))
FORMATS = ("fp8_1x128", "fp8_1x128_ue8m0", "mxfp8", "mxfp4", "fp8_128x128", "fp8_row", "fp8_tensor")


def quantisation(timer: GraphTimer) -> list[dict]:
    rows = []
    for m, k in SHAPES:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        for name in FORMATS:
            fmt = ng.FORMATS[name]
            nbytes = (2 * m * k + fmt.storage_bytes(m, k)) // 256 * 256  # odd sizes cost a copy its wide loads
            source = torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda")
            target = torch.empty_like(source)
            layout = "mn_major" if fmt.group[0] == 1 else "row_major"
            times = timer.measure({"ours": lambda x=x, fmt=fmt, layout=layout: ng.quantize(x, fmt, scale_layout=layout),
                                   "copy": lambda s=source, t=target: t.copy_(s)})
            ours, copy = times["ours"].us, times["copy"].us
            rows.append({"format": name, "m": m, "k": k, "us": ours, "gbs": nbytes / ours / 1e3, "copy_us": copy,
                         "copy_gbs": nbytes / copy / 1e3, "of_copy": copy / ours})
            print(f"quantize {name:18s} {m:6d} x {k}: {ours:7.1f} us {nbytes / ours / 1e3:6.0f} GB/s, copy {copy:7.1f} us, "
                  f"{copy / ours:.2f} of copy", flush=True)
    return rows


def host_us(call: Callable[[], object], batch: int = 100, rounds: int = 15) -> float:
    """CPU microseconds a call, the best of the rounds."""
    for _ in range(20):
        call()
    best = float("inf")
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(batch):
            call()
        best = min(best, time.perf_counter() - start)
    torch.cuda.synchronize()
    return best / batch * 1e6


def launches() -> list[dict]:
    y = torch.zeros(16, device="cuda")
    rows = [{"call": "torch: y.mul_(1)", "us": host_us(lambda: y.mul_(1))}]
    cases = (Case("launch", "dense", 1, 16, 256, 256), Case("launch", "offsets", 4, 8, 256, 256),
             Case("launch", "masked", 4, 8, 256, 256, max_m=64), Case("launch", "contiguous", 4, 128, 256, 256),
             Case("launch", "dense", 1, 512, 256, 256))
    for case in cases:
        i = build(case, "cuda")
        for backend in (None, *sorted({"triton", "gluon_sm90"})):
            try:
                plan = i.plan(backend=backend)
            except ng.Unsupported:
                continue
            options = {} if backend is None else {"backend": backend}
            us = host_us(lambda i=i, options=options: i.call(**options))
            rows.append({"call": f"{case.id} {backend or 'auto'}", "kernel": plan.kernel if plan else "", "us": us})
    x = torch.randn(16, 256, device="cuda", dtype=torch.bfloat16)
    rows.append({"call": "quantize 16x256 fp8_1x128", "us": host_us(lambda: ng.quantize(x, ng.FP8_1x128))})
    for r in rows:
        print(f"launch {r['call']:50s} {r.get('kernel', ''):28s} {r['us']:7.1f} us of CPU", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    import triton

    doc = {"schema": "narrowgemm-micro/1", "device": torch.cuda.get_device_name(), "commit": args.commit,
           "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
           "versions": {"torch": torch.__version__, "triton": triton.__version__, "narrowgemm": ng.__version__},
           "launches": launches(), "quantisation": quantisation(GraphTimer(torch.device("cuda"), rounds=5))}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(doc, indent=1) + "\n")


if __name__ == "__main__":
    main()
