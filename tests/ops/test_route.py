"""Routing against its definitions written token by token, and what it promises about skipped slots and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from narrowgemm import FP8_TENSOR, FP8_1x128, FP8_128x128, ScaledTensor
from narrowgemm.layouts import Offsets
from narrowgemm.ops.gather import gather_quantize
from narrowgemm.ops.route import Routing, combine, gather, moe_align_block_size, route, sort_by_expert
from narrowgemm.rows import gather_rows

from .._layouts import i32, naive_align, topk_ids


def naive_route(row, k, scoring, renormalize, bias, groups, kept, factor):
    """One token, in Python floats: ids and weights."""
    top = max(row)
    exps = [math.exp(v - top) for v in row]
    scores = [e / sum(exps) for e in exps] if scoring == "softmax" else [1 / (1 + math.exp(-v)) for v in row]
    choice = [s + b for s, b in zip(scores, bias or [0.0] * len(row))]
    eligible = range(len(row))
    if groups:
        size = len(row) // groups
        best = 1 if bias is None else min(2, size)
        rank = [sum(sorted(choice[g * size:(g + 1) * size], reverse=True)[:best]) for g in range(groups)]
        keep = sorted(range(groups), key=lambda g: -rank[g])[:kept]
        eligible = [e for e in eligible if e // size in keep]
    ids = sorted(eligible, key=lambda e: -choice[e])[:k]
    weights = [scores[e] for e in ids]
    total = sum(weights) if renormalize else 1.0
    return ids, [w / total * factor for w in weights]


CASES = [  # experts, top_k, scoring, renormalize, bias, groups, topk_group, factor
    (8, 2, "softmax", True, False, None, None, 1.0),         # Mixtral
    (128, 8, "softmax", True, False, None, None, 1.0),       # Qwen3-MoE
    (64, 6, "softmax", False, False, None, None, 1.0),       # DeepSeek-V2-Lite, OLMoE
    (160, 6, "softmax", False, False, 8, 3, 16.0),           # DeepSeek-V2
    (256, 8, "sigmoid", True, True, 8, 4, 2.5),              # DeepSeek-V3
    (384, 8, "sigmoid", True, True, 1, 1, 2.827),            # Kimi-K2
    (128, 4, "sigmoid", True, True, None, None, 1.0),
    (6, 6, "sigmoid", False, True, 3, 3, 1.0),
    (6, 2, "softmax", True, True, 6, 2, 1.0),                # one expert a group
    (1, 1, "softmax", True, False, None, None, 1.0),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_route(case, dtype):
    experts, k, scoring, renormalize, biased, groups, kept, factor = case
    gen = torch.Generator().manual_seed(0)
    # distinct in bf16 and far enough apart that fp32 scores are distinct too
    logits = torch.stack([torch.randperm(experts, generator=gen) for _ in range(50)]).to(dtype) / 64
    bias = torch.linspace(-0.037, 0.041, experts)[torch.randperm(experts, generator=gen)] if biased else None
    weights, ids = route(logits, k, scoring=scoring, renormalize=renormalize, bias=bias, num_expert_group=groups,
                         topk_group=kept, scaling_factor=factor)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32 and weights.shape == ids.shape == (50, k)
    biases = None if bias is None else bias.tolist()
    for row, w, i in zip(logits.float().tolist(), weights.tolist(), ids.tolist()):
        want_ids, want = naive_route(row, k, scoring, renormalize, biases, groups, kept, factor)
        assert i == want_ids
        assert w == pytest.approx(want, rel=2e-6)


def test_equal_scores_take_the_lower_id():
    _, ids = route(torch.zeros(3, 300), 5)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 3
    _, ids = route(torch.zeros(3, 300), 5, num_expert_group=10, topk_group=2, bias=torch.zeros(300))
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_the_bias_chooses_but_does_not_weigh():
    logits, bias = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0.0, 0.0, 5.0])
    weights, ids = route(logits, 1, scoring="sigmoid", bias=bias, renormalize=False)
    assert ids.tolist() == [[2]] and weights.tolist() == [[0.5]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1e4])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_ids_are_legal_whatever_the_logits(value, grouped, scoring):
    options = dict(num_expert_group=4, topk_group=2, bias=torch.zeros(16)) if grouped else {}
    logits = torch.randn(20, 16)
    logits[:10] = value
    logits[10:, 3] = value
    weights, ids = route(logits, 6, scoring=scoring, **options)
    assert ((ids >= 0) & (ids < 16)).all()
    assert all(len(set(row)) == 6 for row in ids.tolist())
    if value == -1e4 and scoring == "sigmoid":
        assert not weights[:10].any()  # all scores underflow: 0, not 0 / 0


def naive_sort(ids, experts):
    flat = [e for row in ids for e in row]
    live = [s for e in range(experts) for s, x in enumerate(flat) if x == e]
    skipped = [s for s, x in enumerate(flat) if not 0 <= x < experts]
    return live + skipped, [sum(0 <= x < e for x in flat) for e in range(experts)] + [len(live)]


@given(topk_ids, st.integers(1, 1024), st.sampled_from([torch.int32, torch.int64]))
@example([[3]] * 40, 4, torch.int32)             # all on one expert
@example([[-1, 7]] * 5, 7, torch.int32)          # all skipped
def test_sort_by_expert(ids, experts, dtype):
    routing = sort_by_expert(torch.tensor(ids, dtype=dtype), experts)
    row_map, offsets = naive_sort(ids, experts)
    assert routing.row_map.tolist() == row_map and routing.offsets.tolist() == offsets
    assert routing.inverse.tolist() == [row_map.index(s) for s in range(len(row_map))]
    assert (routing.top_k, routing.num_tokens, routing.num_experts) == (len(ids[0]), len(ids), experts)
    assert routing.row_map.dtype == routing.inverse.dtype == torch.int32 and routing.offsets.dtype == torch.int64
    assert isinstance(routing.layout, Offsets) and routing.layout.offsets is routing.offsets


@given(topk_ids, st.lists(st.integers(-2, 6), max_size=8), st.integers(1, 6))
def test_expert_map(ids, expert_map, experts):
    """Ids of all experts to those of this rank; what the map lacks, or maps outside, is skipped."""
    local = [[expert_map[e] if 0 <= e < len(expert_map) else -1 for e in row] for row in ids]
    got = sort_by_expert(i32(ids), experts, expert_map=i32(expert_map))
    want = sort_by_expert(i32(local), experts)
    assert torch.equal(got.row_map, want.row_map) and torch.equal(got.offsets, want.offsets)


@given(topk_ids, st.integers(1, 8), st.sampled_from([1, 4, 64]))
def test_moe_align_block_size(ids, experts, block):
    routed = moe_align_block_size(i32(ids), block, experts)
    want, blocks = naive_align(ids, experts, block)
    slots = len(ids) * len(ids[0])
    assert routed.num_tokens_post_padded.tolist() == [len(want)]
    assert routed.sorted_token_ids.tolist() == want + [slots] * (routed.sorted_token_ids.numel() - len(want))
    assert routed.expert_ids.tolist() == blocks + [-1] * (routed.expert_ids.numel() - len(blocks))
    assert (routed.num_slots, routed.top_k, routed.block_m, routed.a_div) == (slots, len(ids[0]), block, len(ids[0]))
    assert moe_align_block_size(i32(ids), block, experts, a_div=1).a_div == 1


@given(topk_ids, st.integers(1, 10), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_gather_and_combine(ids, experts, dtype, poison):
    """Against the definition, with every skipped row NaN and every skipped weight NaN."""
    tokens, k, n = len(ids), len(ids[0]), 8
    routing = sort_by_expert(i32(ids), experts)
    x = torch.randn(tokens, n).to(dtype)
    rows = gather(x, routing)
    assert torch.equal(rows, x[torch.tensor([s // k for s in routing.row_map.tolist()])])
    weights = torch.rand(tokens, k)
    scale = 1 + torch.arange(len(rows))[:, None] % 7
    y = (rows * scale).to(dtype)
    skipped = torch.tensor([[not 0 <= e < experts for e in row] for row in ids])
    if poison:
        y[int(routing.offsets[-1]):] = float("nan")
        weights[skipped] = float("nan")
    out = combine(y, routing, weights)
    assert out.dtype == dtype and out.shape == (tokens, n)
    want = torch.zeros(tokens, n, dtype=torch.float64)
    for t in range(tokens):
        for j in range(k):
            if not skipped[t, j]:
                want[t] += weights[t, j].double() * y[routing.inverse[t * k + j]].double()
    exact = combine(y, routing, weights, out_dtype=torch.float32)
    assert torch.allclose(exact.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(exact.to(dtype), out)
    assert torch.equal(combine(y, routing, weights), out)


def test_combine_sums_in_order_of_choice_in_fp32():
    routing = sort_by_expert(i32([[2, 1, 0]]), 3)
    y = torch.tensor([[1.0], [1e8], [-1e8]])  # rows of experts 0, 1, 2: choices 2, 1, 0
    assert combine(y, routing, torch.ones(1, 3)).tolist() == [[1.0]]
    routing = sort_by_expert(i32([[0, 1, 2]]), 3)
    assert combine(y, routing, torch.ones(1, 3)).tolist() == [[0.0]]


def test_gradients():
    routing = sort_by_expert(i32([[0, 2], [1, 0], [-1, 1]]), 3)
    x = torch.randn(3, 4, requires_grad=True)
    weights = torch.rand(3, 2, requires_grad=True)
    combine(gather(x, routing), routing, weights).sum().backward()
    live = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    assert torch.allclose(x.grad, (weights.detach() * live).sum(1, keepdim=True).expand(3, 4))
    assert torch.allclose(weights.grad, live * x.detach().sum(1, keepdim=True))


def test_gather_moves_scales():
    routing = sort_by_expert(i32([[1, 0], [0, 9]]), 2)
    data = torch.randn(2, 256).to(torch.float8_e4m3fn)
    x = ScaledTensor(data, torch.tensor([[1.0, 2.0], [3.0, 4.0]]).mT.contiguous().mT, FP8_1x128)
    rows = gather(x, routing)
    assert rows.scale.tolist() == [[1, 2], [3, 4], [1, 2], [3, 4]]
    assert torch.equal(rows.data.view(torch.uint8), data.view(torch.uint8)[[0, 1, 0, 1]])
    assert gather(ScaledTensor(data, torch.ones(1, 1), FP8_TENSOR), routing).scale.shape == (1, 1)
    with pytest.raises(ValueError, match="128x128"):
        gather(ScaledTensor(data, torch.ones(1, 2), FP8_128x128), routing)


def test_zero_tokens():
    weights, ids = route(torch.empty(0, 8), 2, num_expert_group=4, topk_group=2)
    assert weights.shape == ids.shape == (0, 2)
    routing = sort_by_expert(ids, 8, expert_map=i32(range(8)))
    assert routing.offsets.tolist() == [0] * 9 and routing.row_map.numel() == routing.num_tokens == 0
    assert gather(torch.empty(0, 5), routing).shape == (0, 5)
    assert combine(torch.empty(0, 7), routing, weights).shape == (0, 7)
    routed = moe_align_block_size(ids, 64, 8)
    assert routed.num_tokens_post_padded.tolist() == [0] and routed.expert_ids.numel() == 0
    assert combine(torch.empty(4, 0), sort_by_expert(i32([[0, 1]] * 2), 2), torch.ones(2, 2)).shape == (2, 0)


def test_the_routed_layout_and_the_sorted_rows_agree():
    ids = torch.randint(-1, 9, (37, 3), dtype=torch.int32)
    routing, routed = sort_by_expert(ids, 8), moe_align_block_size(ids, 16, 8)
    live = routed.sorted_token_ids < routed.num_slots
    assert torch.equal(routed.sorted_token_ids[live], routing.row_map[:int(routing.offsets[-1])])
    x = torch.randn(37, 4)
    padded = gather_rows(x, torch.where(live, routed.sorted_token_ids // routed.a_div, -1))
    assert torch.equal(padded[live], gather(x, routing)[:int(live.sum())])


L = torch.zeros(4, 8)
IDS = i32([[0, 1]] * 4)
ROUTING = sort_by_expert(IDS, 2)
W = torch.ones(4, 2)


@pytest.mark.parametrize(("call", "error", "says"), [
    (lambda: route([1.0], 1), TypeError, "logits"),
    (lambda: route(L.long(), 1), TypeError, "logits, dtype"),
    (lambda: route(L[0], 1), ValueError, "logits, shape"),
    (lambda: route(L, 0), ValueError, "top_k"),
    (lambda: route(L, 9), ValueError, "top_k"),
    (lambda: route(L, 2, scoring="relu"), ValueError, "scoring"),
    (lambda: route(L, 2, bias=torch.zeros(7)), ValueError, "bias, length"),
    (lambda: route(L, 2, bias=torch.zeros(8).long()), TypeError, "bias, dtype"),
    (lambda: route(L, 2, bias=torch.zeros(8, device="meta")), ValueError, "bias, device"),
    (lambda: route(L, 2, num_expert_group=4), ValueError, "both or none"),
    (lambda: route(L, 2, topk_group=4), ValueError, "both or none"),
    (lambda: route(L, 2, num_expert_group=3, topk_group=1), ValueError, "num_expert_group"),
    (lambda: route(L, 2, num_expert_group=4, topk_group=5), ValueError, "topk_group"),
    (lambda: route(L, 5, num_expert_group=4, topk_group=2), ValueError, "at most 4"),
    (lambda: sort_by_expert([[0]], 2), TypeError, "topk_ids"),
    (lambda: sort_by_expert(IDS.float(), 2), TypeError, "topk_ids, dtype"),
    (lambda: sort_by_expert(IDS[0], 2), ValueError, "topk_ids, shape"),
    (lambda: sort_by_expert(IDS[:, :0], 2), ValueError, "topk_ids, shape"),
    (lambda: sort_by_expert(IDS, 0), ValueError, "num_experts"),
    (lambda: sort_by_expert(IDS, 2, expert_map=IDS), ValueError, "expert_map"),
    (lambda: sort_by_expert(IDS, 2, expert_map=torch.zeros(2)), TypeError, "expert_map"),
    (lambda: moe_align_block_size(IDS, 0, 2), ValueError, "block_m"),
    (lambda: moe_align_block_size(IDS, 4, 2, a_div=0), ValueError, "a_div"),
    (lambda: gather(torch.zeros(5, 3), ROUTING), ValueError, "x, shape"),
    (lambda: gather(torch.zeros(4), ROUTING), ValueError, "x, shape"),
    (lambda: gather(torch.zeros(4, 3), IDS), TypeError, "routing: got Tensor, expected a Routing, as `sort_by_expert`"),
    (lambda: gather_quantize(torch.zeros(4, 128), IDS, FP8_1x128), TypeError, "routing: got Tensor"),
    (lambda: combine(torch.zeros(8, 3), W, ROUTING), TypeError, "routing: got Tensor"),
    (lambda: combine(torch.zeros(7, 3), ROUTING, W), ValueError, "y, rows"),
    (lambda: combine(torch.zeros(8, 3).long(), ROUTING, W), TypeError, "y, dtype"),
    (lambda: combine(torch.zeros(8, 3), ROUTING, W.half()), TypeError, "topk_weights, dtype"),
    (lambda: combine(torch.zeros(8, 3), ROUTING, W[:, :1]), ValueError, "topk_weights, shape"),
    (lambda: combine(torch.zeros(8, 3), ROUTING, W, out_dtype=torch.int32), TypeError, "out_dtype"),
    (lambda: combine(torch.zeros(8, 3, device="meta"), ROUTING, W), ValueError, "y, device"),
])
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_routing_is_frozen():
    with pytest.raises(AttributeError):
        ROUTING.top_k = 3
    assert isinstance(ROUTING, Routing)
