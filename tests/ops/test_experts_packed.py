"""`experts` over prepacked weights: two products by slot, the activation and the combine inside, against the definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from narrowgemm import MXFP4, MXFP8, FP8_1x128, ScaledTensor, Unsupported, explain_experts, prepack, route
from narrowgemm.kernels.launching import READY
from narrowgemm.ops import experts as experts_module
from narrowgemm.ops import recall
from narrowgemm.ops.experts import experts, experts_workspace, plan_for
from narrowgemm.ops.experts_plan import Options
from narrowgemm.ops.explain_experts import operand, packed_operand
from narrowgemm.prepack_bits import FP8_PREPACK
from narrowgemm.reference import experts as reference
from narrowgemm.testing.numerics import calc_diff

from ._experts import aligned, bits, choices, composed, made, replays, tokens

E, H, I = 4, 256, 128


def packed(fmt, pair: str, device: str, seed: int = 0):
    up, down = made(fmt, E, H, I, device, seed)
    return (up, down), (prepack(up, pair=pair), prepack(down))


@pytest.mark.parametrize("t", [1, 21])
@pytest.mark.parametrize(("fmt", "activation", "pair"), [(MXFP4, "swiglu_oai", "interleaved"), (MXFP4, "swiglu", "halves"),
                                                         (MXFP8, "swiglu", "halves")], ids=str)
def test_against_the_definition(where, fmt, activation, pair, t):
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


def test_logits_shared_experts_and_a_range(where):
    plain, weights = packed(MXFP4, "halves", where)
    x = tokens(9, H, where)
    logits = torch.randn(9, 2 * E, generator=torch.Generator().manual_seed(5)).to(where)
    w, ids = route(logits, 3)
    one = made(MXFP4, 1, H, 64, where, seed=9)
    shared: tuple[ScaledTensor, ScaledTensor] = (one[0][0], one[1][0])
    got = experts(x, *weights, router_logits=logits, top_k=3, first_expert=E, shared=shared)
    assert calc_diff(got.float(), reference.experts(x, *plain, w, ids - E, shared=shared)) <= 2e-5
    assert experts(x[:0], *weights, router_logits=logits[:0], top_k=3).shape == (0, H)


@pytest.mark.parametrize("fmt", [MXFP8, FP8_1x128, MXFP4], ids=lambda f: f.name)
def test_narrow_activations(where, fmt):
    plain, weights = packed(MXFP4, "halves", where)
    x, (w, ids) = tokens(9, H, where), choices(9, 2, E, where)
    got = experts(x, *weights, topk_weights=w, topk_ids=ids, activation_format=fmt)
    want = reference.experts(x, *plain, w, ids, activation_format=fmt)
    assert calc_diff(got.float(), want) <= (4e-3 if fmt == MXFP4 else 4e-4)         # its h is not rounded


@pytest.mark.parametrize("t", [3, 70])
def test_fp16_tokens(where, t):
    """FP16 in, FP16 on the way and out, no bit of a token lost."""
    plain, weights = packed(MXFP4, "halves", where)
    x, (w, ids) = tokens(t, H, where).float().mul(1.001).half(), choices(t, 2, E, where)
    got = experts(x, *weights, topk_weights=w, topk_ids=ids)
    assert got.dtype == torch.float16 and calc_diff(got.float(), reference.experts(x, *plain, w, ids)) <= 1e-6


@pytest.mark.parametrize("fmt", [None, FP8_1x128], ids=["tokens", "fp8"])
@pytest.mark.parametrize("shared", [False, True], ids=["routed", "shared"])
@pytest.mark.parametrize("pair", ["halves", ""])
def test_bit_for_bit_the_composition(where, fmt, shared, pair):
    plain, weights = packed(MXFP4, pair, where)
    x, logits = tokens(19, H, where), torch.randn(19, E, generator=torch.Generator().manual_seed(7)).to(where)
    one = made(MXFP4, 1, H, 64, where, seed=9)
    options: dict = {"down_bias": torch.linspace(-1, 1, E * H, device=where).view(E, H)}
    if shared:
        options["shared"] = (one[0][0], one[1][0])
    got = experts(x, *weights, router_logits=logits, top_k=3, activation_format=fmt, **options)
    assert torch.equal(bits(got), bits(composed(x, *weights, router_logits=logits, top_k=3, fmt=fmt, **options)))
    if not pair:        # the steps of weights as they are
        w, ids = route(logits, 3)
        want = reference.experts(x, *plain, w, ids, activation_format=fmt, **options)
        assert calc_diff(got.float(), want) <= (1e-5 if fmt is None else 1e-4)


def test_one_workspace_is_the_callers(where):
    """Everything that the products need lies in it; what lay there before, and behind it, does not matter and is not touched."""
    _, weights = packed(MXFP4, "halves", where)
    x, (w, ids) = tokens(21, H, where), choices(21, 2, E, where)
    need = experts_workspace(21, *weights, top_k=2)
    buffer = torch.full((need + 512,), 0xFF, dtype=torch.uint8, device=where)
    skip = -buffer.data_ptr() % 256
    got = experts(x, *weights, topk_weights=w, topk_ids=ids, workspace=buffer[skip:skip + need])
    assert torch.equal(bits(got), bits(experts(x, *weights, topk_weights=w, topk_ids=ids)))
    assert bool((buffer[:skip] == 0xFF).all() and (buffer[skip + need:] == 0xFF).all())
    plan = experts_module._plans.newest().memo["plan"]
    assert plan.scratch[1] == max(p.workspace_bytes for p in plan.steps.values()) and set(plan.steps) == {"sort", "gate_up", "down"}


def test_batch_invariant(where):
    """A token's bits are the same alone, in a small batch and in a large one."""
    _, weights = packed(MXFP4, "halves", where)
    x, (w, ids) = tokens(300, H, where), choices(300, 2, E, where)
    whole = experts(x, *weights, topk_weights=w, topk_ids=ids, batch_invariant=True)
    for n in (1, 5, 64):
        part = experts(x[:n], *weights, topk_weights=w[:n], topk_ids=ids[:n], batch_invariant=True)
        assert torch.equal(bits(part), bits(whole[:n]))


@pytest.mark.parametrize("ids", [[[0, 0]] * 4, [[-1, 9]] * 3, [[3, -1], [1, 3]]], ids=["repeated", "all skipped", "some"])
def test_odd_routings(where, ids):
    plain, weights = packed(MXFP4, "halves", where)
    ids = torch.tensor(ids, device=where)
    x, w = tokens(len(ids), H, where), torch.rand(ids.shape, generator=torch.Generator().manual_seed(6)).to(where)
    got = experts(x, *weights, topk_weights=w, topk_ids=ids)
    want = reference.experts(x, *plain, w, ids)
    assert bool(got.isfinite().all()) and (calc_diff(got.float(), want) <= 1e-5 if bool(want.any()) else not bool(got.any()))


def test_warm_calls_hand_bound_launches_the_right_addresses(warm):
    _, weights = packed(MXFP4, "halves", "cpu")
    x, logits = aligned(tokens(6, H, "cpu")), aligned(torch.randn(6, E))
    options: dict = {"router_logits": logits, "top_k": 2, "activation_format": MXFP8}
    spaces = [aligned(torch.empty(experts_workspace(6, *weights, top_k=2, activation_format=MXFP8), dtype=torch.uint8))
              for _ in range(2)]
    outs, slow = [aligned(x) for _ in range(2)], []
    want = experts(x, *weights, workspace=spaces[0], out=outs[0], **options).clone()
    plan = experts_module._plans.newest().memo["plan"]
    assert list(plan.steps) == ["route", "sort", "quantize", "gate_up", "requantize", "down"]
    warm(plan.memos)
    for space, out in zip(spaces, outs):
        plan.whole, experts_module._calls = None, recall.Calls()
        assert torch.equal(bits(experts(x, *weights, workspace=space, out=out, **options)), bits(want))
        slow.append({name: memo[READY].seen[-1] for name, memo in plan.memos.items()})
    for space, out, seen in zip(spaces, outs, slow):
        out.fill_(7.0)
        assert bool((experts(x, *weights, workspace=space, out=out, **options) == 7.0).all())
        assert {name: memo[READY].seen[-1] for name, memo in plan.memos.items()} == seen


@pytest.mark.gpu
@pytest.mark.parametrize("t", [3, 300])
def test_graph_replay_with_changed_routing(t):
    plain, weights = packed(MXFP4, "halves", "cuda")
    x, logits = tokens(t, H, "cuda"), torch.randn(t, E, device="cuda")
    space = torch.empty(experts_workspace(t, *weights, top_k=2), dtype=torch.uint8, device="cuda")
    out = torch.empty_like(x)

    def call() -> None:
        experts(x, *weights, router_logits=logits, top_k=2, workspace=space, out=out)

    for _ in replays(call, x, logits, space, out, 3):
        w, ids = route(logits, 2)
        assert calc_diff(out.float(), reference.experts(x, *plain, w, ids)) <= 1e-5


def test_explained():
    """The plan of a packed layer by its sizes, on a machine with no GPU."""
    sizes = {"hidden": 2880, "inter": 2880, "experts": 128, "top_k": 4, "weights": "mxfp4", "packed": True, "device": "h200"}
    few = explain_experts(tokens=4, **sizes, interleaved=True, activation="swiglu_oai", bias=True)
    assert [few.steps[n].plan.kernel for n in ("gate_up", "down")] == ["gluon_sm90.narrow"] * 2
    assert few.steps["down"].plan.problem.epilogue.combine and few.plan.bytes >= few.plan.scratch[1] > 0
    assert few.plan.launches == 4 and "gluon_sm90.narrow" in str(few)
    for t, fmt in ((64, None), (4096, FP8_1x128)):      # as the op itself chooses, for weights in either order
        other = explain_experts(tokens=t, **sizes | {"packed": "fp8"}, activation_format=fmt)
        for plan in (other.steps[n].plan for n in ("gate_up", "down")):
            assert plan.problem.b.prepack.startswith(FP8_PREPACK) and plan.backend == "gluon_sm90"
    with pytest.raises(ValueError, match="packed: got 'fp9'"):
        explain_experts(tokens=4, **sizes | {"packed": "fp9"})
    fixed = [explain_experts(tokens=t, **sizes, batch_invariant=True).steps for t in (1, 4096)]
    assert all(fixed[0][n].plan.steps[0].config == fixed[1][n].plan.steps[0].config for n in ("gate_up", "down"))
    with pytest.raises(Unsupported, match="prepack takes mxfp4 and mxfp8"):
        explain_experts(tokens=4, **sizes | {"weights": "bf16"})


@pytest.mark.parametrize("weights, pair", [(MXFP4, ""), (MXFP4, "halves"), (MXFP8, "")], ids=str)
def test_one_rank_may_get_all_rows(weights, pair):
    """Products are chosen for the rows that are expected here, but their workspaces hold all that can come."""
    from narrowgemm.kernels.registry import kernels
    from narrowgemm.problem import bucket

    up, down = (packed_operand(operand((8, *s), weights, torch.bfloat16), p) for s, p in (((512, 256), pair), ((256, 256), "")))
    plan = plan_for(300, up, down, 4, 64, None, torch.bfloat16, ("swiglu", (), False), FP8_1x128, False, None, Options(), "h100")
    for name in ("gate_up", "down"):
        chosen = plan.steps[name]
        room = replace(chosen.problem, m=bucket(1200))
        assert chosen.workspace_bytes >= kernels()[chosen.kernel].workspace(room, chosen.config) > 0
        assert pair or chosen.problem.m == bucket(150)


def test_bad_input():
    plain, weights = packed(MXFP4, "interleaved", "cpu")
    x, (w, ids) = tokens(4, H, "cpu"), choices(4, 2, E, "cpu")
    call = {"topk_weights": w, "topk_ids": ids}
    with pytest.raises(TypeError, match="PackedWeight"):
        experts(x, weights[0], plain[1], **call, interleaved=True)
    with pytest.raises(ValueError, match="as gate_up was packed"):
        experts(x, *weights, **call)
    with pytest.raises(ValueError, match="hidden size"):
        experts(x[:, :32], *weights, **call, interleaved=True)
    with pytest.raises(ValueError, match="workspace bytes"):
        experts(x, *weights, **call, interleaved=True, workspace=torch.empty(64, dtype=torch.uint8))
