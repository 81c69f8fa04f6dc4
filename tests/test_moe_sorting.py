"""aiter's packed routing layout against its definition, and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrowgemm.layout_convert import group_lens, routed_from_offsets
from narrowgemm.layouts import Offsets, Routed
from narrowgemm.moe_sorting import MoeSorting, moe_sorting_from_routed, routed_from_moe_sorting
from narrowgemm.rows import sort_ids

from ._layouts import i32, naive_align, topk_ids


@given(topk_ids, st.integers(1, 8), st.sampled_from([1, 4, 32]))
def test_moe_sorting(ids, experts, block):
    k, tokens = len(ids[0]), len(ids)
    slots, offsets = sort_ids(i32(ids).flatten(), experts)
    routed = routed_from_offsets(Offsets(offsets), slots, block_m=block, top_k=k)
    weights = torch.rand(tokens, k) + 0.5
    packed = moe_sorting_from_routed(routed, weights, experts)
    want, blocks = naive_align(ids, experts, block)
    n = len(want)
    for s, entry, w in zip(want, packed.sorted_ids.tolist(), packed.sorted_weights.tolist()):
        if s == tokens * k:
            assert (entry, w) == ((k << 24) | tokens, 0.0)
        else:
            assert (entry, w) == ((s % k << 24) | s // k, float(weights[s // k, s % k]))
    assert packed.sorted_ids.tolist()[n:] == [(k << 24) | tokens] * (packed.sorted_ids.numel() - n)
    assert packed.sorted_expert_ids.tolist()[:len(blocks)] == blocks
    assert packed.num_valid_ids.tolist() == [n, tokens]
    back, back_weights = routed_from_moe_sorting(packed)
    assert torch.equal(back.sorted_token_ids, routed.sorted_token_ids)
    assert back.expert_ids.tolist()[:len(blocks)] == blocks and back.num_tokens_post_padded.tolist() == [n]
    held = torch.tensor([[0 <= e < experts for e in row] for row in ids])
    assert torch.equal(back_weights, torch.where(held, weights, 0))


def test_moe_sorting_skipped_blocks_become_padding():
    routed = Routed(i32([0, 1, 2, 3]), i32([5, 0]), i32([4]), 4, 2, 2)
    packed = moe_sorting_from_routed(routed, torch.ones(2, 2), 2)
    sentinel = (2 << 24) | 2
    assert packed.sorted_ids.tolist() == [sentinel, sentinel, 1, (1 << 24) | 1]
    assert packed.sorted_expert_ids.tolist() == [0, 0]
    assert packed.sorted_weights.tolist() == [0, 0, 1, 1]


def test_moe_sorting_of_a_buffer_that_ends_inside_a_block():
    """aiter allocates top_k * T + E * block - top_k entries and leaves what follows num_valid_ids[0] as it was."""
    tokens, k, block = 3, 2, 4
    ids = [0, (1 << 24) | 1, 2, (2 << 24) | 3, -1, (1 << 24) | 2]
    packed = MoeSorting(i32(ids), torch.arange(6.0), i32([3, 99, 99]), i32([4, 3]), tokens, k, block)
    routed, weights = routed_from_moe_sorting(packed, a_div=2)
    assert routed.sorted_token_ids.tolist() == [0, 3, 4, 6, 6, 6, 6, 6]
    assert routed.expert_ids.tolist() == [3, 99] and routed.a_div == 2
    assert weights.tolist() == [[0, 0], [0, 1], [2, 0]]
    assert group_lens(routed, 4).tolist() == [0, 0, 0, 3]


def test_a_negative_choice_is_padding():
    """Of a token that there is: its sign bit is no choice."""
    packed = MoeSorting(i32([1, (-1 << 24) | 1]), torch.tensor([3.0, 5.0]), i32([0]), i32([2, 2]), 2, 1, 2)
    routed, weights = routed_from_moe_sorting(packed)
    assert routed.sorted_token_ids.tolist() == [1, 2] and weights.tolist() == [[0], [3]]


def slots(num_slots, top_k):
    return Routed(i32([0]), i32([0]), i32([1]), num_slots, top_k, 1)


@pytest.mark.parametrize(("call", "error"), [
    (lambda: moe_sorting_from_routed(slots(3, 2), torch.ones(1, 2), 1), ValueError),
    (lambda: moe_sorting_from_routed(slots(2, 2), torch.ones(2, 1), 1), ValueError),
    (lambda: moe_sorting_from_routed(slots(2, 2), torch.ones(1, 2).half(), 1), TypeError),
    (lambda: moe_sorting_from_routed(slots(128, 128), torch.ones(1, 128), 1), ValueError),
    (lambda: moe_sorting_from_routed(slots(2**24, 1), torch.empty(1).expand(2**24, 1), 1), ValueError),
    (lambda: MoeSorting(i32([0]), torch.ones(2), i32([0]), i32([1, 1]), 1, 1, 1), ValueError),
    (lambda: MoeSorting(i32([0, 0]), torch.ones(2), i32([0]), i32([1, 1]), 1, 1, 1), ValueError),
])
def test_bad_input(call, error):
    with pytest.raises(error, match="expected"):
        call()
