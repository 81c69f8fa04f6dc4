"""`experts`: the whole layer against its definition, against the composition of the public steps, and its contracts."""

from __future__ import annotations

import pytest
import torch

from narrowgemm import FP8_ROW, MXFP4, MXFP8, FP8_1x128, FP8_128x128, ScaledTensor, route
from narrowgemm.formats import BF16
from narrowgemm.ops import common
from narrowgemm.ops.experts import experts, experts_workspace
from narrowgemm.ops.experts_plan import activations_for
from narrowgemm.ops.steps import PLAIN
from narrowgemm.reference import experts as reference

from ._experts import WEIGHTS, bits, choices, close, composed, made, tokens


@pytest.mark.parametrize("fmt", WEIGHTS, ids=lambda f: f.name)
@pytest.mark.parametrize("t", [1, 33])
def test_every_weight_format(where, fmt, t):
    """Against the definition over the same bits, and bit for bit the composition of the public steps."""
    up, down = made(fmt, 5, 256, 128, where)
    x = tokens(t, 256, where)
    weights, ids = choices(t, 2, 5, where)
    got = experts(x, up, down, topk_weights=weights, topk_ids=ids)
    want = reference.experts(x, up, down, weights, ids, activation_format=activations_for(fmt, BF16))
    close(got, want, activations_for(fmt, BF16))
    assert torch.equal(bits(got), bits(composed(x, up, down, topk_weights=weights, topk_ids=ids)))


@pytest.mark.parametrize("fmt", [FP8_1x128, MXFP8, MXFP4, BF16], ids=lambda f: f.name)
def test_mxfp4_weights_with_every_activation(where, fmt):
    up, down = made(MXFP4, 4, 256, 128, where)
    x = tokens(9, 256, where)
    weights, ids = choices(9, 2, 4, where)
    got = experts(x, up, down, topk_weights=weights, topk_ids=ids, activation_format=fmt)
    want = reference.experts(x, up, down, weights, ids, activation_format=fmt)
    close(got, want, fmt)


ROUTINGS = [dict(top_k=2), dict(top_k=3, scoring="sigmoid", num_expert_group=4, topk_group=2, scaling_factor=2.5),
            dict(top_k=1, renormalize=False)]


@pytest.mark.parametrize("options", ROUTINGS, ids=str)
def test_routing_from_logits(where, options):
    up, down = made(FP8_128x128, 8, 256, 128, where)
    x = tokens(11, 256, where)
    logits = torch.randn(11, 8, generator=torch.Generator().manual_seed(3)).to(where)
    bias = torch.linspace(-0.1, 0.1, 8, device=where) if "scoring" in options else None
    got = experts(x, up, down, router_logits=logits, router_bias=bias, **options)
    top_k = options["top_k"]
    weights, ids = route(logits, top_k, bias=bias, **{k: v for k, v in options.items() if k != "top_k"})
    assert torch.equal(bits(got), bits(experts(x, up, down, topk_weights=weights, topk_ids=ids)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_types_of_tokens(where, dtype):
    """Products, activation and result have the tokens' type; narrow weights, and weights of that type."""
    gen = torch.Generator().manual_seed(8)
    plain = [torch.randn(s, generator=gen).div(11).to(where, dtype) for s in ((4, 256, 128), (4, 128, 128))]
    weights, ids = choices(7, 2, 4, where)
    x = torch.randn(7, 128, generator=gen).to(where, dtype)
    for up, down in (made(FP8_128x128, 4, 128, 128, where), made(MXFP4, 4, 128, 128, where), plain):
        got = experts(x, up, down, topk_weights=weights, topk_ids=ids)
        up, down = common.as_operand(up, "up"), common.as_operand(down, "down")
        want = reference.experts(x, up, down, weights, ids, activation_format=activations_for(up.format, PLAIN[dtype]))
        assert got.dtype == dtype
        close(got, want, activations_for(up.format, PLAIN[dtype]))


@pytest.mark.parametrize(("experts_", "top_k"), [(1024, 16), (1024, 1), (16, 16), (1, 1)])
def test_many_experts_and_choices(where, experts_, top_k):
    up, down = made(FP8_128x128, experts_, 128, 128, where) if experts_ < 100 else (
        ScaledTensor(w.data.repeat(128, 1, 1), w.scale.repeat(128, 1, 1), w.format) for w in made(FP8_128x128, 8, 128, 128, where))
    x = tokens(3, 128, where)
    logits = torch.randn(3, experts_, generator=torch.Generator().manual_seed(3)).to(where)
    got = experts(x, up, down, router_logits=logits, top_k=top_k)
    weights, ids = route(logits, top_k)
    close(got, reference.experts(x, up, down, weights, ids, activation_format=FP8_1x128), FP8_1x128)


def test_gpt_oss_layer(where):
    """Interleaved, clamped, biased, sizes that are no multiple of 128."""
    up, down = made(MXFP4, 4, 192, 96, where)
    gen = torch.Generator().manual_seed(4)
    b1, b2 = torch.randn(4, 192, generator=gen).to(where), torch.randn(4, 192, generator=gen).to(where)
    x = tokens(13, 192, where) * 4
    weights, ids = choices(13, 3, 4, where)
    for args in ((), (1.5, 2.0)):
        options = dict(activation="swiglu_oai", activation_args=args, interleaved=True, gate_up_bias=b1, down_bias=b2)
        got = experts(x, up, down, topk_weights=weights, topk_ids=ids, **options)
        close(got, reference.experts(x, up, down, weights, ids, **options), BF16)


def test_shared_experts(where):
    up, down = made(FP8_128x128, 4, 256, 128, where)
    one = made(FP8_128x128, 1, 256, 384, where, seed=9)
    shared = (one[0][0], one[1][0])
    x = tokens(10, 256, where)
    weights, ids = choices(10, 2, 4, where)
    got = experts(x, up, down, topk_weights=weights, topk_ids=ids, shared=shared)
    want = reference.experts(x, up, down, weights, ids, activation_format=FP8_1x128, shared=shared)
    close(got, want, FP8_1x128)
    apart = composed(x, up, down, topk_weights=weights, topk_ids=ids, shared=shared)
    assert torch.equal(bits(got), bits(apart))
    given = torch.randn(10, 256, generator=torch.Generator().manual_seed(5)).bfloat16().to(where)
    got = experts(x, up, down, topk_weights=weights, topk_ids=ids, shared_output=given)
    want = reference.experts(x, up, down, weights, ids, activation_format=FP8_1x128, shared_output=given)
    close(got, want, FP8_1x128)


def test_expert_parallel_ranks_add_up(where):
    """Two ranks by range, and two by a map, sum to the layer on one."""
    up, down = made(FP8_128x128, 6, 256, 128, where)
    x = tokens(17, 256, where)
    weights, ids = choices(17, 3, 6, where)
    whole = reference.experts(x, up, down, weights, ids, activation_format=FP8_1x128)
    halves = [experts(x, up[a:a + 3], down[a:a + 3], topk_weights=weights, topk_ids=ids, first_expert=a) for a in (0, 3)]
    close(sum(h.float() for h in halves), whole, FP8_1x128)
    parts = []
    for own in ([0, 2, 5], [4, 1, 3]):
        table = torch.full((6,), -1, dtype=torch.int32)
        table[own] = torch.arange(3, dtype=torch.int32)
        mine = [ScaledTensor(w.data[own], w.scale[own], w.format) for w in (up, down)]
        parts.append(experts(x, *mine, topk_weights=weights, topk_ids=ids, expert_map=table.to(where)))
    close(sum(p.float() for p in parts), whole, FP8_1x128)


@pytest.mark.parametrize("ids", [[[0, 0]] * 4, [[-1, 9]] * 3, [[3, -1], [1, 3]]], ids=["repeated", "all skipped", "some"])
def test_odd_routings(where, ids):
    up, down = made(FP8_128x128, 4, 128, 128, where)
    ids = torch.tensor(ids, device=where)
    x = tokens(len(ids), 128, where)
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(6)).to(where)
    got = experts(x, up, down, topk_weights=weights, topk_ids=ids)
    want = reference.experts(x, up, down, weights, ids, activation_format=FP8_1x128)
    close(got, want, FP8_1x128)
    assert bool(got.isfinite().all())


def test_no_tokens(where):
    up, down = made(FP8_128x128, 4, 128, 128, where)
    assert experts(tokens(0, 128, where), up, down, router_logits=torch.zeros(0, 4, device=where), top_k=2).shape == (0, 128)
    assert experts_workspace(0, up, down, top_k=2) >= 0


def test_one_workspace_and_out_are_the_callers(where):
    """Enough is what `experts_workspace` says; what lay in it and behind it does not matter and is not touched."""
    up, down = made(FP8_128x128, 4, 256, 128, where)
    x = tokens(21, 256, where)
    weights, ids = choices(21, 2, 4, where)
    need = experts_workspace(21, up, down, top_k=2)
    buffer = torch.full((need + 512,), 0xFF, dtype=torch.uint8, device=where)
    skip = -buffer.data_ptr() % 256
    space = buffer[skip:skip + need]
    out = torch.full((21, 256), float("nan"), dtype=torch.bfloat16, device=where)
    assert experts(x, up, down, topk_weights=weights, topk_ids=ids, workspace=space, out=out) is out
    assert torch.equal(bits(out), bits(experts(x, up, down, topk_weights=weights, topk_ids=ids)))
    assert bool((buffer[:skip] == 0xFF).all() and (buffer[skip + need:] == 0xFF).all())
    with pytest.raises(ValueError, match="workspace bytes"):
        experts(x, up, down, topk_weights=weights, topk_ids=ids, workspace=space[:256])


@pytest.mark.parametrize("fmt", [FP8_128x128, FP8_ROW], ids=lambda f: f.name)
def test_batch_invariant(where, fmt):
    """A token's bits are the same alone, in a small batch and in a large one."""
    up, down = made(fmt, 4, 256, 256, where)
    x = tokens(700, 256, where)
    weights, ids = choices(700, 2, 4, where)
    whole = experts(x, up, down, topk_weights=weights, topk_ids=ids, batch_invariant=True)
    for n in (1, 5, 64):
        part = experts(x[:n], up, down, topk_weights=weights[:n], topk_ids=ids[:n], batch_invariant=True)
        assert torch.equal(bits(part), bits(whole[:n]))


def test_operands_are_named():
    assert common.as_operand(torch.zeros(4, 128, dtype=torch.bfloat16), "x").format is BF16
