"""`experts`, contract by contract for every format: bits of a token whatever the batch, the caller's workspace, composition, graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from narrowgemm import MXFP4, MXFP8, FP8_1x128, FP8_128x128, ScaledTensor, route
from narrowgemm.formats import BF16, Format
from narrowgemm.ops.experts import experts, experts_workspace, plan_for
from narrowgemm.ops.experts_plan import Options, activations_for
from narrowgemm.reference import experts as reference

from ._experts import WEIGHTS, bits, choices, close, composed, made, replays, tokens

E, H, I = 4, 128, 128
FORMATS = [(w, activations_for(w, BF16)) for w in WEIGHTS] + [(MXFP4, FP8_1x128), (MXFP4, MXFP8), (MXFP4, MXFP4)]
NAMES = [f"{w.name} {a.name}" for w, a in FORMATS]


def biases(n: int, device: str) -> torch.Tensor:
    return torch.randn(E, n, generator=torch.Generator().manual_seed(n)).to(device)


@pytest.mark.parametrize(("weights", "fmt"), FORMATS, ids=NAMES)
def test_batch_invariant(where, weights: Format, fmt: Format) -> None:
    """A token's bits are the same alone and among others, of one rank of two too, from logits: whatever its place and its neighbours."""
    up, down = made(weights, E, H, I, where)
    x = tokens(70, H, where)
    logits = torch.randn(70, 2 * E, generator=torch.Generator().manual_seed(3)).to(where)
    options: dict[str, Any] = dict(top_k=3, first_expert=E, activation_format=fmt, batch_invariant=True)
    whole = experts(x, up, down, router_logits=logits, **options)
    for at in ([7], [69, 3, 3], list(range(9, 69))):
        part = experts(x[at], up, down, router_logits=logits[at], **options)
        assert torch.equal(bits(part), bits(whole[at]))


@pytest.mark.parametrize(("weights", "fmt"), FORMATS, ids=NAMES)
def test_workspace_is_what_was_asked_for(where, weights: Format, fmt: Format) -> None:
    """What `experts_workspace` says is enough for every routing, one where this rank of eight gets all rows among them; what lay in it
    changes nothing, and nothing beside it is written."""
    up, down = made(weights, E, H, I, where)
    both = tuple(w[0] for w in made(weights, 1, H, 2 * I, where, seed=9))
    x = tokens(19, H, where)
    far, ids = choices(19, 2, 8 * E, where)
    need = experts_workspace(19, up, down, top_k=2, num_experts=8 * E, activation_format=fmt, shared=both)
    buffer = torch.full((need + 512,), 0xFF, dtype=torch.uint8, device=where)
    skip = -buffer.data_ptr() % 256
    for chosen in (ids, ids * 0 + 1):
        buffer.fill_(0xFF)
        out = torch.full_like(x, float("nan"))
        options: dict[str, Any] = dict(topk_weights=far, topk_ids=chosen, num_experts=8 * E, activation_format=fmt, shared=both)
        experts(x, up, down, workspace=buffer[skip:skip + need], out=out, **options)
        assert bool((buffer[:skip] == 0xFF).all() and (buffer[skip + need:] == 0xFF).all())
        assert torch.equal(bits(out), bits(experts(x, up, down, **options)))
        # ids that are no expert of this rank are left out, and the rest is the definition's
        want = reference.experts(x, up, down, far, chosen, activation_format=fmt, shared=both)
        close(out, want, fmt)


@pytest.mark.parametrize(("weights", "fmt"), FORMATS, ids=NAMES)
@pytest.mark.parametrize("kind", ["swiglu", "swiglu_oai"])
def test_composition(where, weights: Format, fmt: Format, kind: str) -> None:
    """Bit for bit the public steps: from logits, with biases, a map of experts and something to add."""
    up, down = made(weights, E, H, I, where)
    x, add = tokens(23, H, where), tokens(23, H, where, seed=5)
    logits = torch.randn(23, 6, generator=torch.Generator().manual_seed(3)).to(where)
    table = torch.tensor([2, -1, 0, 3, -1, 1], dtype=torch.int32, device=where)
    given: dict[str, Any] = dict(router_logits=logits, top_k=3, gate_up_bias=biases(2 * I, where), down_bias=biases(H, where),
                                 shared_output=add, expert_map=table)
    got = experts(x, up, down, activation=kind, interleaved=True, activation_format=fmt, **given)
    routing = dict(scoring="softmax", renormalize=True, num_expert_group=None, topk_group=None, scaling_factor=1.0)
    assert torch.equal(bits(got), bits(composed(x, up, down, kind=(kind, (), True), fmt=fmt, routing=routing, **given)))


@pytest.mark.gpu
@pytest.mark.parametrize(("weights", "fmt"), FORMATS, ids=NAMES)
@pytest.mark.parametrize("t", [1, 40, 600])
def test_graph_with_changed_routing(weights: Format, fmt: Format, t: int) -> None:
    """Captured once; replayed for other tokens and routings on a poisoned workspace: an eager call's bits, and the definition's values."""
    up, down = made(weights, 8, 512, 256, "cuda")
    x, logits = tokens(t, 512, "cuda"), torch.randn(t, 8, device="cuda")
    space = torch.empty(experts_workspace(t, up, down, top_k=2, activation_format=fmt), dtype=torch.uint8, device="cuda")
    out = torch.empty_like(x)

    def call() -> None:
        experts(x, up, down, router_logits=logits, top_k=2, activation_format=fmt, workspace=space, out=out)

    for _ in replays(call, x, logits, space, out, 6):
        gates, ids = route(logits, 2)
        close(out, reference.experts(x, up, down, gates, ids, activation_format=fmt), fmt)


@pytest.mark.gpu
@pytest.mark.parametrize("t", [1, 16, 64, 200])
def test_steps_that_overlap(t: int) -> None:
    """Products start while rows are brought to them. Calls on end without a pause, each with another routing, on a workspace of NaN: the
    bits of the public steps, which follow each other."""
    pair = made(FP8_128x128, 2, 2048, 1024, "cuda")
    up, down = (ScaledTensor(w.data.view(torch.uint8).repeat(32, 1, 1).view(w.data.dtype), w.scale.repeat(32, 1, 1), w.format) for w in pair)
    calls = []
    for seed in range(12):
        gates, ids = choices(t, 4, 64, "cuda", seed)
        calls.append((tokens(t, 2048, "cuda", seed), gates, ids))
    outs = [torch.empty_like(x) for x, *_ in calls]
    space = torch.full((experts_workspace(t, up, down, top_k=4),), 0xFF, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        for (x, gates, ids), out in zip(calls, outs):
            experts(x, up, down, topk_weights=gates, topk_ids=ids, workspace=space, out=out)
        space.fill_(0xFF)
    for (x, gates, ids), out in zip(calls, outs):
        assert torch.equal(bits(out), bits(composed(x, up, down, topk_weights=gates, topk_ids=ids)))


@pytest.mark.parametrize(("t", "world", "fronts"), [(1, 512, ("sizes", "tokens", "tokens", "tokens")), (16, 64, ("sizes", "", "tokens", "")),
                                                    (512, 64, ("tokens", "", "tokens", ""))])
def test_who_may_start_meanwhile(t: int, world: int, fronts: tuple[str, ...]) -> None:
    """Steps behind products whose weights L2 could hold; behind longer ones they'd be in the way."""
    up, down = (ScaledTensor(torch.empty(64, *s, dtype=torch.float8_e4m3fn, device="meta"),
                             torch.empty(64, *(n // 128 for n in s), device="meta"), FP8_128x128) for s in ((3072, 4096), (4096, 1536)))
    plan = plan_for(t, up, down, 8, world, None, torch.bfloat16, ("swiglu", (), False), None, False, None, Options(), "h200")
    assert tuple(plan.steps[name].problem.front for name in ("gate_up", "activate", "down", "combine")) == fronts
