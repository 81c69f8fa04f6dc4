"""One rank of the expert-parallel tests: runs the checks named on the command line, prints a JSON object of what they found.

    python -m tests.distributed._worker RANK RANKS STORE TIMEOUT CHECK...
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from narrowgemm import FP8_128x128, combine, experts, gather, quantize, sort_by_expert
from narrowgemm.distributed import ExpertParallel, expert_layer, expert_mlp
from narrowgemm.layouts import Offsets
from narrowgemm.nn import ExpertMLP
from narrowgemm.testing.numerics import calc_diff

H, I, E, K = 128, 128, 7, 3
LOST_SECONDS = 3.0


def tokens(rank: int) -> int:
    return (9, 0, 5, 12)[rank]


def case(rank: int, ids: str = "random") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(10 + rank)
    t = tokens(rank)
    x = torch.randn(t, H, generator=g)
    topk = {"random": torch.rand(t, E, generator=g).argsort(1)[:, :K], "one": torch.full((t, K), E - 1),
            "some": torch.randint(-1, E + 1, (t, K), generator=g)}[ids]
    return x, topk, torch.rand(t, K, generator=g)


def stacks() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(E, 2 * I, H, generator=g) * H ** -0.5, torch.randn(E, H, I, generator=g) * I ** -0.5


def wide(gate_up: torch.Tensor, down: torch.Tensor) -> Callable[[torch.Tensor, Offsets], torch.Tensor]:
    """A differentiable compute."""
    def compute(rows: torch.Tensor, layout: Offsets) -> torch.Tensor:
        bounds = layout.offsets.tolist()
        parts = []
        for e, (lo, hi) in enumerate(zip(bounds, bounds[1:])):
            if hi > lo:
                gate, up = (rows[lo:hi] @ gate_up[e].T).chunk(2, -1)
                parts.append((torch.nn.functional.silu(gate) * up) @ down[e].T)
        return torch.cat(parts) if parts else rows.new_zeros((0, H))
    return compute


def alone(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, compute: Any) -> torch.Tensor:
    """The layer on one rank, with every expert. Out of plain indexing where gradients are wanted."""
    routing = sort_by_expert(ids, E)
    n = int(routing.offsets[-1])
    if not x.requires_grad:
        y = compute(gather(x, routing)[:n], routing.layout)
        return combine(torch.cat((y, y.new_zeros(len(routing.row_map) - n, H))), routing, weights)
    y = compute(x[routing.row_map // K], routing.layout)
    return (y[routing.inverse].view(-1, K, H) * weights[..., None]).sum(1)


def forward(group: Any, ids: str, **options: Any) -> float:
    ep = ExpertParallel(E, group, wire=options.pop("wire", None))
    mine = slice(ep.local_experts.start, ep.local_experts.stop)
    gate_up, down = (quantize(w, FP8_128x128) for w in stacks())
    x, topk, weights = case(ep.rank, ids)
    with torch.no_grad():
        got = ep(x, topk, weights, expert_mlp(gate_up[mine], down[mine]), **options)
        want = alone(x, topk, weights, expert_mlp(gate_up, down))
    assert got.shape == want.shape and got.dtype == want.dtype
    return calc_diff(got, want)


def by_token(group: Any, ids: str, **options: Any) -> float:
    ep = ExpertParallel(E, group)
    mine = slice(ep.local_experts.start, ep.local_experts.stop)
    gate_up, down = (quantize(w, FP8_128x128) for w in stacks())
    x, topk, weights = case(ep.rank, ids)
    with torch.no_grad():
        got = ep.by_token(x, topk, weights, expert_layer(ep, gate_up[mine], down[mine]), **options)
        want = experts(x, gate_up, down, topk_ids=topk, topk_weights=weights)
    assert got.shape == want.shape and got.dtype == want.dtype
    return calc_diff(got, want)


def wires_agree(group: Any) -> bool:
    """Quantising before the exchange or after it is the same to the bit."""
    gate_up, down = (quantize(w, FP8_128x128) for w in stacks())
    out = []
    for wire in (None, "fp8_1x128"):
        ep = ExpertParallel(E, group, wire=wire)
        mine = slice(ep.local_experts.start, ep.local_experts.stop)
        with torch.no_grad():
            out.append(ep(*case(ep.rank), expert_mlp(gate_up[mine], down[mine])))
    return torch.equal(*out)


def backward(group: Any, ids: str) -> dict[str, float]:
    """Gradients of the inputs, the routing weights and this rank's experts, against those of one rank with everything."""
    ep = ExpertParallel(E, group)
    mine = slice(ep.local_experts.start, ep.local_experts.stop)
    local = [w[mine].clone().requires_grad_() for w in stacks()]
    x, topk, weights = case(ep.rank, ids)
    x.requires_grad_()
    weights.requires_grad_()
    ep(x, topk, weights, wide(*local)).square().sum().backward()

    whole = [w.clone().requires_grad_() for w in stacks()]
    found: dict[str, float] = {}
    for rank in range(ep.ranks):
        rx, rtopk, rweights = case(rank, ids)
        rx.requires_grad_()
        rweights.requires_grad_()
        if tokens(rank):
            alone(rx, rtopk, rweights, wide(*whole)).square().sum().backward()
        if rank == ep.rank and tokens(rank):
            found = {"x": calc_diff(x.grad, rx.grad), "weights": calc_diff(weights.grad, rweights.grad)}
    for name, a, b in zip(("gate_up", "down"), local, whole):
        zero = torch.zeros_like(a)
        found[name] = calc_diff(zero if a.grad is None else a.grad, zero if b.grad is None else b.grad[mine])
    return found


def trained(group: Any) -> dict[str, float]:
    """`nn.ExpertMLP` as the compute, in BF16: its gradients and x's against one rank with all experts."""
    def module(experts: slice) -> ExpertMLP:
        made = ExpertMLP(len(range(E)[experts]), H, I, recipe="bf16", dtype=torch.float32)
        with torch.no_grad():
            for parameter, stack in zip((made.gate_up, made.down), stacks()):
                parameter.copy_(stack[experts])
        return made

    ep = ExpertParallel(E, group)
    mine = slice(ep.local_experts.start, ep.local_experts.stop)
    local, whole = module(mine), module(slice(0, E))
    x, topk, weights = case(ep.rank)
    x = x.bfloat16().requires_grad_()
    ep(x, topk, weights, lambda rows, layout: local(rows, group_offs=layout.offsets)).float().square().sum().backward()
    found: dict[str, float] = {}
    for rank in range(ep.ranks):
        rx, rtopk, rweights = case(rank)
        rx = rx.bfloat16().requires_grad_()
        if tokens(rank):
            alone(rx, rtopk, rweights, lambda rows, layout: whole(rows, group_offs=layout.offsets)).float().square().sum().backward()
        if rank == ep.rank and tokens(rank):
            found["x"] = calc_diff(x.grad, rx.grad)
    for name in ("gate_up", "down"):
        a, b = getattr(local, name).grad, getattr(whole, name).grad
        found[name] = calc_diff(torch.zeros_like(getattr(local, name)) if a is None else a, b[mine])
    return found


def mesh(group: Any) -> float:
    from torch.distributed.device_mesh import init_device_mesh

    return forward(init_device_mesh("cpu", (dist.get_world_size(),)), "random")


def lost(group: Any, how: str) -> dict[str, Any]:
    """The last rank dies or hangs before the exchange; what the first one gets, and after how long."""
    short = dist.new_group(timeout=datetime.timedelta(seconds=LOST_SECONDS))  # starting the processes may take longer
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(0 if how == "dies" else 120)
        os._exit(0)
    start = time.monotonic()
    try:
        forward(short, "random")
    except RuntimeError as e:
        return {"error": str(e)[:200], "seconds": time.monotonic() - start}
    return {"error": "", "seconds": time.monotonic() - start}


CHECKS: dict[str, Callable[[Any], Any]] = {
    "random": lambda g: forward(g, "random"), "one": lambda g: forward(g, "one"), "some": lambda g: forward(g, "some"),
    "wire": lambda g: forward(g, "some", wire="fp8_1x128"), "micro": lambda g: forward(g, "random", micro_batches=2),
    "token": lambda g: by_token(g, "random"), "token-some": lambda g: by_token(g, "some"),
    "token-one": lambda g: by_token(g, "one", micro_batches=2), "micro-wire": lambda g: forward(g, "random", micro_batches=3, wire="fp8_1x128"), "wires": wires_agree,
    "backward": lambda g: backward(g, "random"), "backward-one": lambda g: backward(g, "one"), "mesh": mesh, "trained": trained,
    "dies": lambda g: lost(g, "dies"), "hangs": lambda g: lost(g, "hangs"),
}


def main() -> None:
    rank, ranks, store, timeout, *names = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(ranks),
                            timeout=datetime.timedelta(seconds=float(timeout)))
    found = {}
    for name in names:
        found[name] = CHECKS[name](None)
    print("FOUND " + json.dumps(found), flush=True)
    if {"dies", "hangs"} & set(names):
        os._exit(0)                     # gloo's threads wait for the lost rank, and may end an interpreter that takes them down
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
