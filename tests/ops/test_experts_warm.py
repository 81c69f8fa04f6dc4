"""Warm calls of `experts`: bound launches get the right addresses, and no call is taken for another one."""

from __future__ import annotations

import pytest
import torch

from narrowgemm import FP8_128x128, ScaledTensor
from narrowgemm.kernels.launching import READY
from narrowgemm.ops import experts as experts_module
from narrowgemm.ops import recall
from narrowgemm.ops.experts import experts, experts_workspace

from ._experts import aligned, bits, choices, composed, made, tokens


@pytest.mark.parametrize("shared", [False, True])
def test_warm_calls_hand_bound_launches_the_right_addresses(warm, shared):
    """The addresses of a warm call, for which no tensor is made, are those that the steps had as tensors."""
    up, down = made(FP8_128x128, 3, 128, 128, "cpu")
    x, logits = aligned(tokens(6, 128, "cpu")), aligned(torch.randn(6, 3))
    extra = {"shared": (up[0], down[0])} if shared else {}
    spaces = [aligned(torch.empty(experts_workspace(6, up, down, top_k=2, **extra), dtype=torch.uint8)) for _ in range(2)]

    def call(space, out) -> torch.Tensor:
        return experts(x, up, down, router_logits=logits, top_k=2, workspace=space, out=out, **extra)

    outs = [aligned(x) for _ in range(2)]
    want = call(spaces[0], outs[0]).clone()
    plan = experts_module._plans.newest().memo["plan"]
    assert plan.whole is None                          # nothing is bound on a CPU
    joined = warm(plan.memos)
    slow = []
    for space, out in zip(spaces, outs):
        plan.whole = None
        experts_module._calls = recall.Calls()
        assert torch.equal(bits(call(space, out)), bits(want))
        slow.append({name: memo[READY].seen[-1] for name, memo in plan.memos.items()})
    for space, out, seen in zip(spaces, outs, slow):
        out.fill_(7.0)
        assert bool((call(space, out) == 7.0).all())   # the steps are left to the bound launches
        assert {name: memo[READY].seen[-1] for name, memo in plan.memos.items()} == seen
    joined[-1].answer = False                          # they can't: the steps run
    assert torch.equal(bits(call(spaces[0], outs[0])), bits(want))


def test_a_tensor_that_is_two_arguments_is_not_noted(warm):
    up, down = made(FP8_128x128, 3, 128, 128, "cpu")
    x, (weights, ids) = tokens(6, 128, "cpu"), choices(6, 2, 3, "cpu")
    experts(x, up, down, topk_weights=weights, topk_ids=ids, shared_output=x)
    plan = experts_module._plans.newest().memo["plan"]
    joined = warm(plan.memos)
    experts(x, up, down, topk_weights=weights, topk_ids=ids, shared_output=x)
    assert plan.whole is None and not joined


OTHERS = {
    "bias of the other product": lambda a: a.update(gate_up_bias=None, down_bias=a["gate_up_bias"]),
    "rows of x": lambda a: a.update(x=aligned(torch.cat([a["x"], a["x"]], 1))[:, :256]),
    "dtype of ids": lambda a: a.update(topk_ids=aligned(a["topk_ids"].long())),
    "alignment of ids": lambda a: a.update(topk_ids=aligned(a["topk_ids"], 4)),
    "an option": lambda a: a.update(batch_invariant=True),
    "the activation": lambda a: a.update(activation="swiglu_oai"),
    "a workspace": lambda a: a.update(workspace=aligned(torch.zeros(1 << 20, dtype=torch.uint8))),
    "scales of weights": lambda a: a.update(down=ScaledTensor(a["down"].data, a["down"].scale.repeat_interleave(2, 2)[..., ::2], a["down"].format)),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_a_call_that_differs_is_not_taken_for_one_that_was_seen(warm, change):
    up, down = made(FP8_128x128, 3, 256, 128, "cpu")
    (weights, ids), x = choices(6, 2, 3, "cpu"), tokens(6, 256, "cpu")
    bias = torch.linspace(-1, 1, 3 * 256).view(3, 256)
    call = dict(x=aligned(x), gate_up=up, down=down, topk_weights=aligned(weights), topk_ids=aligned(ids), gate_up_bias=aligned(bias),
                out=aligned(torch.zeros_like(x)))
    experts(**call)
    warm(experts_module._plans.newest().memo["plan"].memos)
    experts(**call)
    experts(**call)          # by the launches: its output is not written
    count = len(experts_module._calls.known)
    assert count == 1
    change(call)
    call["out"].fill_(float("nan"))
    got = experts(**call)
    assert torch.equal(bits(got), bits(composed(call["x"], up, call["down"], topk_weights=weights, topk_ids=ids,
                                                gate_up_bias=call["gate_up_bias"], down_bias=call.get("down_bias"),
                                                kind=(call.get("activation", "swiglu"), (), False))))
