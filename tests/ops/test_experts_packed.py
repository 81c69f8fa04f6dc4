"""`experts` over prepacked weights: two products by slot, the activation and the combine inside, against the definition."""

from __future__ import annotations

import pytest
import torch

from narrowgemm import MXFP4, MXFP8, ScaledTensor, prepack, route
from narrowgemm.ops.experts import experts, experts_workspace
from narrowgemm.reference import experts as reference
from narrowgemm.testing.numerics import calc_diff

from .test_experts import choices, made, tokens, where  # noqa: F401  where: a fixture

E, H, I = 4, 256, 128


def packed(fmt, pair: str, device: str, seed: int = 0):
    up, down = made(fmt, E, H, I, device, seed)
    return (up, down), (prepack(up, pair=pair), prepack(down))


@pytest.mark.parametrize("t", [1, 21])
@pytest.mark.parametrize(("fmt", "activation", "pair"), [(MXFP4, "swiglu_oai", "interleaved"), (MXFP4, "swiglu", "halves"),
                                                         (MXFP8, "swiglu", "halves")], ids=str)
def test_against_the_definition(where, fmt, activation, pair, t):  # noqa: F811
    plain, weights = packed(fmt, pair, where)
    gen = torch.Generator().manual_seed(4)
    bias = {"gate_up_bias": torch.randn(E, 2 * I, generator=gen).to(where), "down_bias": torch.randn(E, H, generator=gen).to(where)}
    options = {"activation": activation, "interleaved": pair == "interleaved", **bias}
    x, (topk_weights, ids) = tokens(t, H, where), choices(t, 2, E, where)
    ids = torch.where(torch.arange(t, device=where)[:, None] % 5 == 3, -1, ids.long()).to(torch.int32)
    got = experts(x, *weights, topk_weights=topk_weights, topk_ids=ids, **options)
    want = reference.experts(x, *plain, topk_weights, ids, **options)
    assert calc_diff(got.float(), want) <= 1e-5
    space = torch.empty(experts_workspace(t, *weights, top_k=2), dtype=torch.uint8, device=where)
    out = torch.empty_like(x)
    assert experts(x, *weights, topk_weights=topk_weights, topk_ids=ids, workspace=space, out=out, **options) is out
    assert torch.equal(out, got)


def test_logits_shared_experts_and_a_range(where):  # noqa: F811
    plain, weights = packed(MXFP4, "halves", where)
    x = tokens(9, H, where)
    logits = torch.randn(9, 2 * E, generator=torch.Generator().manual_seed(5)).to(where)
    w, ids = route(logits, 3)
    one = made(MXFP4, 1, H, 64, where, seed=9)
    shared: tuple[ScaledTensor, ScaledTensor] = (one[0][0], one[1][0])
    got = experts(x, *weights, router_logits=logits, top_k=3, first_expert=E, shared=shared)
    assert calc_diff(got.float(), reference.experts(x, *plain, w, ids - E, shared=shared)) <= 2e-5
    assert experts(x[:0], *weights, router_logits=logits[:0], top_k=3).shape == (0, H)


def test_narrow_activations(where):  # noqa: F811
    plain, weights = packed(MXFP4, "halves", where)
    x, (w, ids) = tokens(9, H, where), choices(9, 2, E, where)
    got = experts(x, *weights, topk_weights=w, topk_ids=ids, activation_format=MXFP8)
    assert calc_diff(got.float(), reference.experts(x, *plain, w, ids, activation_format=MXFP8)) <= 4e-4  # its h is not rounded


def test_bad_input():
    plain, weights = packed(MXFP4, "interleaved", "cpu")
    x, (w, ids) = tokens(4, H, "cpu"), choices(4, 2, E, "cpu")
    call = {"topk_weights": w, "topk_ids": ids}
    with pytest.raises(TypeError, match="PackedWeight"):
        experts(x, weights[0], plain[1], **call, interleaved=True)
    with pytest.raises(ValueError, match="as gate_up was packed"):
        experts(x, *weights, **call)
    with pytest.raises(ValueError, match="x, shape"):
        experts(x[:, :32], *weights, **call, interleaved=True)
    with pytest.raises(ValueError, match="batch_invariant"):
        experts(x, *weights, **call, interleaved=True, batch_invariant=True)
    with pytest.raises(ValueError, match="workspace bytes"):
        experts(x, *weights, **call, interleaved=True, workspace=torch.empty(64, dtype=torch.uint8))
