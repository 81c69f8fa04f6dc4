"""Expert parallelism on several GPUs: a layer's time by ranks, wire format and micro-batches, and what its parts take.

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/expert_parallel.py --out ep.json

Every rank has the same number of tokens. `alone` is one rank with all experts and its own tokens, `compute` the products of a
dispatched layer without any exchange, `exchange` both exchanges without products: what overlap can hide is the smaller of the
two. Times are the slowest rank's, the median of interleaved rounds. It runs on gloo and the CPU, too (--small), to be tried.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from narrowgemm import FP8_128x128, ScaledTensor, combine, experts, gather, quantize, route, sort_by_expert
from narrowgemm.distributed import ExpertParallel, expert_layer, expert_mlp
from narrowgemm.testing.models import MODELS


def weights(shape, device: torch.device) -> tuple[ScaledTensor, ScaledTensor]:
    """All experts, quantised one at a time."""
    generator = torch.Generator(device).manual_seed(0)
    stacks = []
    for n, k in ((2 * shape.inter, shape.hidden), (shape.hidden, shape.inter)):
        parts = [quantize(torch.randn(n, k, generator=generator, device=device).bfloat16() * k ** -0.5, FP8_128x128)
                 for _ in range(shape.experts)]
        stacks.append(ScaledTensor(torch.stack([p.data for p in parts]), torch.stack([p.scale for p in parts]), FP8_128x128))
    return stacks[0], stacks[1]


def calls(ep: dict, stacks: tuple[ScaledTensor, ScaledTensor], x: torch.Tensor, ids: torch.Tensor, topk: torch.Tensor,
          max_sms: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    one = next(iter(ep.values()))
    mine = slice(one.local_experts.start, one.local_experts.stop)
    local, limited = (expert_mlp(stacks[0][mine], stacks[1][mine], max_sms=n) for n in (0, max_sms))
    routing = sort_by_expert(ids, one.num_experts)
    whole = expert_mlp(*stacks)
    ready = ep["fp8"].dispatch(x, ids)
    result = local(ready.rows, ready.layout)

    out: dict[str, Callable[[], object]] = {
        "alone": lambda: combine(whole(gather(x, routing), routing.layout), routing, topk),
        "compute": lambda: local(ready.rows, ready.layout),
        "exchange": lambda: ep["fp8"].combine(result, ep["fp8"].dispatch(x, ids), topk)}
    for wire, e in ep.items():
        for micro in (1, 2, 4):
            compute = local if micro == 1 else limited
            out[f"layer wire {wire} micro-batches {micro}"] = \
                lambda e=e, micro=micro, compute=compute: e(x, ids, topk, compute, micro_batches=micro)
    layers = [expert_layer(one, stacks[0][mine], stacks[1][mine], max_sms=n) for n in (0, max_sms)]
    for micro in (1, 2, 4):
        out[f"layer by token micro-batches {micro}"] = \
            lambda micro=micro, layer=layers[micro > 1]: ep["bf16"].by_token(x, ids, topk, layer, micro_batches=micro)
    out["exchange by token"] = lambda: ep["bf16"].by_token(x, ids, topk, lambda rows, i, w: rows)
    out["experts, alone"] = lambda: experts(x, *stacks, topk_ids=ids, topk_weights=topk)
    return out


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="qwen3-235b")
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--tokens", type=int, action="append", help="of each rank (default 256, 4096, 16384)")
    parser.add_argument("--max-sms", type=int, default=112, help="of products that overlap with an exchange")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="toy sizes, to try the script")
    parser.add_argument("--out")
    args = parser.parse_args()
    gpu = torch.cuda.is_available() and not args.small
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=60), **({"device_id": device} if gpu else {}))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shape = MODELS[args.model].scaled(experts=args.experts)
    if args.small:
        shape = shape.scaled(hidden=128, inter=128, experts=4, top_k=2)
    stacks = weights(shape, device)
    ep = {"fp8": ExpertParallel(shape.experts, wire="fp8_1x128"), "bf16": ExpertParallel(shape.experts)}
    rows = []
    for tokens in args.tokens or ([16] if args.small else [256, 4096, 16384]):
        generator = torch.Generator(device).manual_seed(1 + rank)
        x = torch.randn(tokens, shape.hidden, generator=generator, device=device).bfloat16()
        topk, ids = route(torch.randn(tokens, shape.experts, generator=generator, device=device), shape.top_k)
        timed = calls(ep, stacks, x, ids, topk, args.max_sms)
        times: dict[str, list[float]] = {name: [] for name in timed}
        for i in range(args.rounds + 2):  # two rounds compile and warm up
            for name, call in timed.items():
                dist.barrier()
                start = time.perf_counter()
                call()
                if gpu:
                    torch.cuda.synchronize()
                if i >= 2:
                    times[name].append(time.perf_counter() - start)
        medians = torch.tensor([statistics.median(t) for t in times.values()], dtype=torch.float64, device=device)
        dist.all_reduce(medians, dist.ReduceOp.MAX)
        for name, seconds in zip(times, medians.tolist()):
            rows.append({"tokens_per_rank": tokens, "what": name, "ms": 1e3 * seconds})
            if rank == 0:
                print(f"{tokens:6d} tokens a rank  {name:34s} {1e3 * seconds:9.3f} ms", flush=True)
    if args.out and rank == 0:
        name = torch.cuda.get_device_name() if gpu else "cpu"
        with open(args.out, "w") as f:
            json.dump({"device": name, "ranks": ranks, "model": shape.name, "experts": shape.experts, "hidden": shape.hidden,
                       "inter": shape.inter, "top_k": shape.top_k, "torch": torch.__version__, "rows": rows}, f, indent=1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
