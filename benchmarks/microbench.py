"""Measurements beside the suites: quantisation, alone and fused with gather or SwiGLU, against a copy of the same bytes, and
what an eager call costs the CPU.

    python benchmarks/microbench.py --json FILE [--commit SHA]        on a GPU
    python benchmarks/microbench.py --stub                            the launch cost alone, with no GPU

`copy` moves as many bytes as the quantiser reads and writes. The launch cost is wall time of many calls that outrun nothing:
the kernels are smaller than the calls, and the queue is empty again before each batch.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

import narrowgemm as ng
from narrowgemm.kernels.launching import READY
from narrowgemm.kernels.operands import Operands
from narrowgemm.ops import gemm as gemm_op
from narrowgemm.ops import grouped as grouped_op
from narrowgemm.ops import quantize as quantize_op
from narrowgemm.ops.activate_both import activate_backward, activate_both
from narrowgemm.ops.plan_cache import PlanCache
from narrowgemm.testing.cases import Case, build
from narrowgemm.testing.inputs import Inputs
from narrowgemm.testing.models import get_model
from narrowgemm.testing.timers import GraphTimer, Timing

SHAPES = ((512, 7168), (4096, 7168), (16384, 7168), (16384, 2048))
FORMATS = ("fp8_1x128", "fp8_1x128_ue8m0", "mxfp8", "mxfp4", "fp8_128x128", "fp8_row", "fp8_tensor")


def quantisation(timer: GraphTimer | Once) -> list[dict]:
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


FUSED = (("minimax-m3", "mxfp8"), ("deepseek-v3", "mxfp8"), ("minimax-m3", "fp8_1x128"), ("deepseek-v3", "fp8_1x128"),
         ("gpt-oss-120b", "mxfp8"), ("gpt-oss-120b", "mxfp4"), ("deepseek-v3", "mxfp4"))
TOKENS = (256, 4096, 16384)


class Once:
    """In place of a timer: every call is made, so compiled, and none is timed."""

    def measure(self, calls: dict[str, Callable[[], object]]) -> dict[str, Timing]:
        for call in calls.values():
            call()
        synchronize()
        return {name: Timing(1.0, 0.0, 1) for name in calls}


def copy_of(nbytes: int) -> Callable[[], object]:
    """A copy that reads and writes so many bytes."""
    source = torch.empty(nbytes // 512 * 256, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def fused(timer: GraphTimer | Once) -> list[dict]:
    """`gather_quantize` and `activate` of a model's layer: each reads its input once and writes a narrow row a slot."""
    rows = []
    for model, name in FUSED:
        m, fmt = get_model(model), ng.FORMATS[name]
        for tokens in TOKENS:
            ids = torch.rand(tokens, m.experts, device="cuda").topk(m.top_k).indices.int()
            routing = ng.sort_by_expert(ids, m.experts)
            x = torch.randn(tokens, m.hidden, device="cuda", dtype=torch.bfloat16)
            slots = tokens * m.top_k
            h = torch.randn(slots, 2 * m.inter, device="cuda", dtype=torch.bfloat16)
            act = {"activation": m.activation, "layout": routing.layout, "fmt": fmt}
            steps = {"gather": (lambda x=x, r=routing, f=fmt: ng.gather_quantize(x, r, f),
                                2 * x.numel() + fmt.storage_bytes(slots, m.hidden)),
                     "swiglu": (lambda h=h, a=act: ng.activate(h, **a), 2 * h.numel() + fmt.storage_bytes(slots, m.inter))}
            for step, (call, nbytes) in steps.items():
                times = timer.measure({"ours": call, "copy": copy_of(nbytes)})
                ours, copy = times["ours"].us, times["copy"].us
                rows.append({"step": step, "model": model, "format": name, "tokens": tokens, "us": ours, "copy_us": copy,
                             "gbs": nbytes / ours / 1e3, "of_copy": copy / ours})
                print(f"{step} {model} {name:10s} {tokens:6d} tokens: {ours:7.1f} us {nbytes / ours / 1e3:6.0f} GB/s, "
                      f"{copy / ours:.2f} of copy", flush=True)
    return rows


# rows and columns of training's tensors: DeepSeek-V3, Qwen3-235B, GPT-OSS
BOTH = ((16384, 7168), (32768, 2048), (8192, 7168), (8192, 4096), (16384, 4096), (8192, 1536), (16384, 1536), (16384, 2880))
ACTIVATED = ((16384, 2048), (32768, 2048), (8192, 1536), (16384, 1536), (32768, 2880))


def both_ways(timer: GraphTimer | Once) -> list[dict]:
    """`quantize_both`, `activate_both` and `activate_backward` of 8 groups. `of_copy` against a copy of what one read and the
    writes move; `of_bound`: where the maxima take a read of their own, against a copy of that too."""
    rows = []
    one, amax = torch.ones(1, device="cuda"), torch.ones(1, device="cuda")
    kinds: tuple[tuple[str, dict], ...] = (
        *((f, {}) for f in ("fp8_1x128", "fp8_1x128_ue8m0", "fp8_row", "fp8_tensor")), ("fp8_tensor", {"scale": one}),
        ("fp8_tensor", {"scale": one, "amax": amax}))

    def add(step: str, name: str, options: dict, m: int, k: int, call: Callable[[], object], read: int, written: int) -> None:
        times = timer.measure({"ours": call, "copy": copy_of((read + written) * m * k)})
        ours, copy = times["ours"].us, times["copy"].us
        twice = name in ("fp8_row", "fp8_tensor") and not options
        bound = copy * (2 * read + written) / (read + written) if twice else copy
        given = " and ".join(options)
        rows.append({"step": step, "format": name, "given": given, "m": m, "k": k, "us": ours, "copy_us": copy,
                     "of_copy": copy / ours, "of_bound": bound / ours})
        print(f"{step:9s}{name:16s}{given:15s} {m:6d} x {k}: {ours:7.1f} us, copy {copy:7.1f} us, {copy / ours:.2f} of copy, "
              f"{bound / ours:.2f} of the bound", flush=True)

    for m, k in BOTH:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        offsets = torch.arange(9, device="cuda") * (m // 8)
        for name, options in kinds:
            add("both", name, options, m, k, lambda x=x, n=name, s=offsets, o=options: ng.quantize_both(x, n, s, **o), 2, 2)
    for m, k in ACTIVATED:
        h, dy = (torch.randn(m, n, device="cuda", dtype=torch.bfloat16) for n in (2 * k, k))
        layout = ng.Offsets(torch.arange(9, device="cuda") * (m // 8))
        for name, options in kinds:
            if name == "fp8_1x128_ue8m0" or (name == "fp8_tensor" and len(options) == 1):
                continue
            add("forward", name, options, m, k, lambda h=h, s=layout, n=name, o=options: activate_both(h, s, n, **o), 4, 2)
            add("backward", name, options, m, k, lambda h=h, d=dy, s=layout, n=name, o=options: activate_backward(h, d, s, n, **o),
                6, 4)
    return rows


def host_us(call: Callable[[], object], batch: int = 50, rounds: int = 40) -> float:
    """CPU microseconds a call, the best of the rounds."""
    for _ in range(20):
        call()
    best = float("inf")
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        for _ in range(batch):
            call()
        best = min(best, time.perf_counter() - start)
    synchronize()
    return best / batch * 1e6


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def caller(i: Inputs, out: torch.Tensor | None, **options: object) -> Callable[[], object]:
    """The op's call as a user writes it."""
    a, b, layout = i.a, i.b, i.layout
    if layout is None:
        return lambda: ng.gemm(a, b, out=out, **options)
    return lambda: ng.grouped_gemm(a, b, layout, out=out, **options)


def bare_us(plans: PlanCache, addresses: tuple[int, ...]) -> float | None:
    """Of the C launcher alone, as the newest signature's launches call it; None where they are not bound."""
    ready = plans.newest().memo.get(READY)
    if ready is None:
        return None
    calls = ready.calls(addresses)
    return host_us(lambda: [call() for call in calls])


CASES = (Case("launch", "dense", 1, 16, 256, 256), Case("launch", "dense", 1, 512, 256, 256),
         Case("launch", "dense", 1, 64, 512, 7168), Case("launch", "offsets", 4, 8, 256, 256),
         Case("launch", "masked", 4, 8, 256, 256, max_m=64), Case("launch", "contiguous", 4, 128, 256, 256))


def launches(device: str) -> list[dict]:
    """CPU time of warm eager calls: with `out=`, without, and of the C launcher alone (the driver's launch)."""
    y = torch.zeros(16, device=device)
    rows: list[dict] = [{"call": "torch: y.mul_(1)", "us": host_us(lambda: y.mul_(1))}]
    print(f"launch {rows[0]['call']:48s} {rows[0]['us']:31.1f} us of CPU", flush=True)

    def add(name: str, kernel: str, bare: float | None, **times: float) -> None:
        row = {"call": name, "kernel": kernel, **times, "c_launcher_us": bare}
        if bare is not None:
            row["python_us"] = times["us"] - bare
        rows.append(row)
        print(f"launch {name:48s} {kernel:24s} {times['us']:6.1f} us of CPU, "
              + (f"C launcher {bare:.1f}, above it {row['python_us']:.1f}" if bare is not None else "not bound")
              + (f"; allocating its output {times['allocating_us']:.1f}" if "allocating_us" in times else ""), flush=True)

    for case in CASES:
        i = build(case, device)
        for backend in ("gluon_sm90", "triton"):
            plan = i.plan(backend=backend)
            out = i.out.tensor
            us = host_us(caller(i, out, backend=backend))
            work = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device)
            x = Operands(i.a, i.b, out, 0, 0, 0, index=None if i.layout is None else i.layout.index)
            bare = bare_us(gemm_op._plans if i.layout is None else grouped_op._plans, x.addresses(work))
            add(f"{case.id} {backend}", plan.kernel, bare, us=us, allocating_us=host_us(caller(i, None, backend=backend)))
    rows += layers(device)
    x = torch.randn(16, 256, device=device, dtype=torch.bfloat16)
    for layout in ("row_major", "mn_major"):
        us = host_us(lambda layout=layout: ng.quantize(x, ng.FP8_1x128, scale_layout=layout))
        q = ng.quantize(x, ng.FP8_1x128, scale_layout=layout)
        source = ng.ScaledTensor(x, None, ng.BF16)
        addresses = Operands(source, q, q.data, 0, 0, 0, out_scale=q.scale).addresses(None)
        add(f"quantize 16x256 fp8_1x128 {layout}", "triton.quantize", bare_us(quantize_op._plans, addresses), us=us)
    return rows


def layers(device: str) -> list[dict]:
    """CPU time of a warm `experts` at one token: a launch a step, from logits and from ids."""
    from narrowgemm.ops import experts as op

    up, down = (ng.quantize(torch.randn(4, *s, device=device), ng.FP8_128x128) for s in ((512, 512), (512, 256)))
    x, logits = torch.randn(1, 512, device=device).bfloat16(), torch.randn(1, 4, device=device)
    weights, ids = ng.route(logits, 2)
    space = torch.empty(op.experts_workspace(1, up, down, top_k=2), dtype=torch.uint8, device=device)
    out, found = torch.empty_like(x), []
    for name, routing in (("logits", {"router_logits": logits, "top_k": 2}), ("ids", {"topk_weights": weights, "topk_ids": ids})):
        us = host_us(lambda r=routing: ng.experts(x, up, down, out=out, workspace=space, **r))
        allocating = host_us(lambda r=routing: ng.experts(x, up, down, **r))
        count = op._plans.newest().memo["plan"].launches
        found.append({"call": f"experts, one token, from {name}", "launches": count, "us": us, "allocating_us": allocating})
        print(f"launch {found[-1]['call']:48s} {count} launches {us:14.1f} us of CPU; allocating {allocating:.1f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--only", choices=("launches", "quantisation", "both", "fused"))
    parser.add_argument("--stub", action="store_true",
                        help="with no GPU: calls on CPU tensors, planned for an H200, with a C launcher that does nothing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--once", action="store_true", help="make every call once, which compiles it, and time none")
    args = parser.parse_args()
    import triton

    device = "cpu" if args.stub else "cuda"
    if args.stub:
        from narrowgemm.testing import stub_driver

        os.environ["NARROWGEMM_ARCH"] = "h200"
        stub_driver.install("".format)      # takes any arguments, does nothing, in C
    doc = {"schema": "narrowgemm-micro/2", "device": "stub" if args.stub else torch.cuda.get_device_name(), "commit": args.commit,
           "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
           "versions": {"torch": torch.__version__, "triton": triton.__version__, "narrowgemm": ng.__version__}}
    if args.only in (None, "launches"):
        doc["launches"] = launches(device)
    if args.only in (None, "quantisation") and not args.stub:
        doc["quantisation"] = quantisation(Once() if args.once else GraphTimer(torch.device("cuda"), rounds=args.rounds))
    if args.only in (None, "both") and not args.stub:
        doc["quantize_both"] = both_ways(Once() if args.once else GraphTimer(torch.device("cuda"), rounds=args.rounds))
    if args.only in (None, "fused") and not args.stub:
        doc["fused"] = fused(Once() if args.once else GraphTimer(torch.device("cuda"), rounds=args.rounds))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(doc, indent=1) + "\n")


if __name__ == "__main__":
    main()
