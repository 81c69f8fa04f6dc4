"""An expert layer over several ranks, checked against the same layer on one:

    python -m torch.distributed.run --nproc-per-node 2 -m narrowgemm.distributed.demo

One GPU a rank where there are as many, over NCCL; else the CPU, over gloo. Rank 0 prints, and the exit status is 1 where a
rank's result misses a whole layer's gate.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..formats import FP8_128x128
from ..ops.quantize import quantize
from ..ops.route import combine, gather, route, sort_by_expert
from ..testing.layer import GATE
from ..testing.models import MODELS
from ..testing.numerics import calc_diff
from .by_token import expert_layer
from .experts import expert_mlp
from .parallel import ExpertParallel


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="qwen3-235b", help="whose sizes (default qwen3-235b)")
    parser.add_argument("--tokens", type=int, default=0, help="tokens of each rank (default 64 on a CPU, 4096 on a GPU)")
    parser.add_argument("--experts", type=int, default=0, help="experts in all (default 4 on a CPU, the model's on a GPU)")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=0, help="another hidden size (default 512 on a CPU)")
    parser.add_argument("--inter", type=int, default=0, help="another intermediate size (default 256 on a CPU)")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--max-sms", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds until a lost rank is an error")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    ranks, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    options: dict[str, Any] = {}
    if gpu:
        torch.cuda.set_device(device)
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast is not to be had on every host
        options["device_id"] = device
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=args.timeout), **options)
    try:
        return run(args, device, dist.get_rank(), ranks)
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def run(args: argparse.Namespace, device: torch.device, rank: int, ranks: int) -> int:
    cpu = device.type == "cpu"
    shape = MODELS[args.model].scaled(hidden=args.hidden or 512 * cpu, inter=args.inter or 256 * cpu,
                                      experts=args.experts or 4 * cpu, top_k=args.top_k or 2 * cpu)
    tokens = args.tokens or (64 if cpu else 4096)
    whole = torch.Generator(device).manual_seed(0)       # the same experts on every rank; each keeps its own
    own = torch.Generator(device).manual_seed(1 + rank)  # its own tokens
    ep, by_token = ExpertParallel(shape.experts, wire="fp8_1x128"), ExpertParallel(shape.experts)
    stacks = []
    for rows, cols in ((2 * shape.inter, shape.hidden), (shape.hidden, shape.inter)):
        parts = [torch.randn(rows, cols, generator=whole, device=device) * cols ** -0.5 for _ in range(shape.experts)]
        stacks.append(quantize(torch.stack(parts).bfloat16(), FP8_128x128))
    x = torch.randn(tokens, shape.hidden, generator=own, device=device).bfloat16()
    weights, ids = route(torch.randn(tokens, shape.experts, generator=own, device=device), shape.top_k)
    mine = slice(ep.local_experts.start, ep.local_experts.stop)
    compute = expert_mlp(stacks[0][mine], stacks[1][mine], max_sms=args.max_sms)

    layer = expert_layer(by_token, stacks[0][mine], stacks[1][mine], max_sms=args.max_sms)
    ways: dict[str, Callable[[], Tensor]] = {
        "a row a slot, FP8 on the wire": lambda: ep(x, ids, weights, compute, micro_batches=args.micro_batches),
        "a row a token and rank": lambda: by_token.by_token(x, ids, weights, layer, micro_batches=args.micro_batches)}
    routing = sort_by_expert(ids, shape.experts)
    alone = combine(expert_mlp(*stacks)(gather(x, routing), routing.layout), routing, weights)
    if rank == 0:
        where = f"{ranks} processes, {'gloo, CPU' if cpu else torch.cuda.get_device_name(device)}"
        print(f"{shape.name}: {shape.experts} experts of {shape.hidden} x {shape.inter} over {where}; {tokens} tokens a rank, "
              f"top {shape.top_k}; against one process with all experts, limit {GATE['e4m3']:.0e}:")
    missed = 0
    for name, way in ways.items():
        seconds = []
        for _ in range(args.rounds + 1):  # the first one compiles
            dist.barrier()
            start = time.perf_counter()
            out = way()
            if not cpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        found = torch.tensor([calc_diff(out, alone), min(seconds[1:], default=seconds[0])], dtype=torch.float64, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        diff, best = found.tolist()
        missed |= diff > GATE["e4m3"]
        if rank == 0:
            print(f"  {name}: calc_diff {diff:.2g}; {1e3 * best:.2f} ms a layer, {ranks * tokens / best:,.0f} tokens/s")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
