"""What torch asks of its citizens: opcheck for every op, one graph for a whole expert layer, CUDA graphs, autocast, pickling."""

from __future__ import annotations

import copy
import io
import pickle
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import narrowgemm as ng
import narrowgemm.nn
from narrowgemm.testing.numerics import calc_diff

ROOT = Path(__file__).parents[1]
H, I, E, K = 256, 128, 8, 2
RECIPES = {"fp8": ("fp8_128x128", "fp8_1x128"), "mxfp8": ("mxfp8", "mxfp8"), "mxfp4": ("mxfp4", "bf16")}


def registered() -> list[str]:
    names = {n.partition(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("narrowgemm::")}
    return sorted(n.removeprefix("narrowgemm::") for n in names)


@pytest.mark.parametrize("op", registered())
def test_every_op_is_opchecked(op: str) -> None:
    """By a test of its own: schema, fake, autograd registration and dynamic shapes are for whoever knows its arguments."""
    text = "\n".join(p.read_text() for p in (ROOT / "tests").glob("**/test_*.py"))
    assert re.search(rf"opcheck\(\s*torch\.ops\.narrowgemm\.{op}\b", text), f"no test opchecks narrowgemm::{op}"


def test_the_ops_are_there() -> None:
    assert {"gemm", "grouped_gemm", "grouped_gemm_wgrad", "quantize"} <= set(registered())


def stacks(recipe: str, device: str = "cpu") -> tuple[ng.ScaledTensor, ng.ScaledTensor]:
    torch.manual_seed(0)
    weights = RECIPES[recipe][0]
    return tuple(ng.quantize(torch.randn(E, n, k, device=device).bfloat16() * k ** -0.5, weights) for n, k in ((2 * I, H), (H, I)))


def layer(x: torch.Tensor, logits: torch.Tensor, gate_up: ng.ScaledTensor, down: ng.ScaledTensor, activations: str) -> torch.Tensor:
    weights, ids = ng.route(logits, K)
    routing = ng.sort_by_expert(ids, E)

    def operand(rows: torch.Tensor) -> Any:
        return rows if activations == "bf16" else ng.quantize(rows, activations, scale_layout="mn_major")

    gate, up = ng.grouped_gemm(operand(ng.gather(x, routing)), gate_up, routing.layout).chunk(2, -1)
    act = torch.nn.functional.silu(gate) * up
    return ng.combine(ng.grouped_gemm(operand(act), down, routing.layout), routing, weights)


# tracing takes ten seconds a recipe: MXFP4 has the scales of MXFP8
@pytest.mark.parametrize("recipe", [pytest.param(r, marks=[pytest.mark.slow] * (r == "mxfp8")) for r in RECIPES])
def test_an_expert_layer_is_one_graph_for_every_token_count(recipe: str) -> None:
    gate_up, down = stacks(recipe)
    counter = CompileCounterWithBackend("aot_eager")

    def f(x, logits, *parts):
        return layer(x, logits, ng.ScaledTensor(parts[0], parts[1], gate_up.format), ng.ScaledTensor(parts[2], parts[3], down.format),
                     RECIPES[recipe][1])

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for tokens in (5, 9, 33):
        x, logits = torch.randn(tokens, H).bfloat16(), torch.randn(tokens, E)
        got = compiled(x, logits, gate_up.data, gate_up.scale, down.data, down.scale)
        assert torch.equal(got, layer(x, logits, gate_up, down, RECIPES[recipe][1]))
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1], f"compiled anew for another token count: {compilations}"


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["fp8"])
def test_an_expert_layer_in_a_graph_with_changed_routing(recipe: str) -> None:
    """Captured once; every replay has other tokens and other routing, all to one expert and some experts without any."""
    gate_up, down = stacks(recipe, "cuda")
    x, logits = torch.randn(64, H, device="cuda").bfloat16(), torch.randn(64, E, device="cuda")
    layer(x, logits, gate_up, down, RECIPES[recipe][1])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x, logits, gate_up, down, RECIPES[recipe][1])
    for case in range(4):
        torch.manual_seed(case)
        x.normal_()
        logits.normal_()
        if case == 1:
            logits[:, 3] += 100
            logits[:, 5] += 50
        if case == 2:
            logits[:, ::2] -= 100
        graph.replay()
        assert torch.equal(out, layer(x, logits, gate_up, down, RECIPES[recipe][1])), case


def test_autocast_leaves_narrow_products_alone() -> None:
    gate_up, down = stacks("fp8")
    x, logits = torch.randn(7, H), torch.randn(7, E)
    want = layer(x, logits, gate_up, down, "fp8_1x128")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(x, logits, gate_up, down, "fp8_1x128")
    assert got.dtype == want.dtype and calc_diff(got, want) < 1e-10


@pytest.mark.parametrize("recipe", ["fp8", "mxfp4"])
def test_autocast_leaves_the_expert_layer_alone(recipe: str) -> None:
    gate_up, down = stacks(recipe)
    x, logits = torch.randn(7, H).bfloat16(), torch.randn(7, E)
    want = ng.experts(x, gate_up, down, router_logits=logits, top_k=K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ng.experts(x, gate_up, down, router_logits=logits, top_k=K)
    assert torch.equal(got, want)


def test_autocast_leaves_training_alone() -> None:
    """Forward and backward of FP8 experts: same bits, and gradients of the parameters' own type."""
    torch.manual_seed(0)
    mlp = ng.nn.ExpertMLP(2, 128, 128, recipe="rowwise")
    x, lens = torch.randn(20, 128).bfloat16(), torch.tensor([8, 12])
    found = []
    for enabled in (False, True):
        a = x.clone().requires_grad_()
        mlp.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = mlp(a, lens)
        y.float().square().sum().backward()
        found.append((y, a.grad, mlp.gate_up.grad, mlp.down.grad))
    assert all(torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(*found))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(*(t.contiguous().view(torch.uint8) for t in (a, b)))
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return a == b


def objects() -> dict[str, Any]:
    q = ng.quantize(torch.randn(4, 64, 128), "mxfp4")
    ids = torch.tensor([[0, 3], [1, -1]])
    plan = ng.explain("grouped_gemm", layout="masked", groups=4, m=8, n=512, k=512, device="h200").plan
    return {"format": ng.FP8_1x128.with_scale("e8m0"), "scaled": q, "mn_major": ng.quantize(torch.randn(9, 256), "fp8_1x128",
            scale_layout="mn_major"), "offsets": ng.Offsets(torch.arange(5)), "masked": ng.Masked(torch.zeros(3, dtype=torch.int32), 7),
            "routing": ng.sort_by_expert(ids, 4), "routed": ng.moe_align_block_size(ids, 8, 4), "plan": plan, "config": plan.config,
            "problem": plan.problem, "packed": ng.prepack(q, pair="halves")}


@pytest.mark.parametrize("name", objects())
def test_pickles_copies_and_saves(name: str) -> None:
    x = objects()[name]
    assert same(pickle.loads(pickle.dumps(x)), x)
    assert same(copy.deepcopy(x), x)
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    for only in (False, True) if name in ("format", "scaled", "mn_major", "packed") else (False,):     # True is what torch.load does
        buffer.seek(0)
        assert same(torch.load(buffer, weights_only=only), x)


def test_what_is_loaded_computes_the_same() -> None:
    a, b = ng.quantize(torch.randn(5, 256), "fp8_1x128", scale_layout="mn_major"), ng.quantize(torch.randn(64, 256), "fp8_128x128")
    assert torch.equal(ng.gemm(*pickle.loads(pickle.dumps((a, b)))), ng.gemm(a, b))
    assert hash(pickle.loads(pickle.dumps(a.format))) == hash(a.format)
