"""The layout dataclasses: what they refuse, and that they agree with the number of weights."""

from __future__ import annotations

import pytest
import torch

from narrowgemm import Contiguous, KGrouped, Masked, Offsets, Psum, Routed
from narrowgemm.problem import GROUPED

I32 = torch.zeros(4, dtype=torch.int32)
I64 = I32.long()


def routed(**change):
    args = dict(sorted_token_ids=I32, expert_ids=I32[:2], num_tokens_post_padded=I32[:1], num_slots=4, top_k=2)
    return Routed(**{**args, "block_m": 2, **change})


MAKE = {
    "contiguous": (Contiguous, "m_indices"), "psum": (Psum, "ends"), "offsets": (Offsets, "offsets"),
    "masked": (Masked, "masked_m"), "routed": (routed, "sorted_token_ids"), "k_grouped": (KGrouped, "offsets"),
}


def test_every_grouped_layout_has_a_class():
    assert {kind: make(**{name: I32}).kind for kind, (make, name) in MAKE.items()} == {k: k for k in GROUPED}


@pytest.mark.parametrize("kind", MAKE)
def test_the_index_is_the_tensor_given(kind):
    make, name = MAKE[kind]
    assert make(**{name: I32}).index is I32


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize(("bad", "error", "says"), [
    (I32.float(), TypeError, "torch.float32"),
    (I32.view(2, 2), ValueError, r"\(2, 2\)"),
    (I32.repeat(2)[::2], ValueError, "contiguous"),
    ([0, 1], TypeError, "list"),
    (None, TypeError, "NoneType"),
])
def test_bad_index(kind, bad, error, says):
    make, name = MAKE[kind]
    with pytest.raises(error, match=says):
        make(**{name: bad})


@pytest.mark.parametrize("kind", MAKE)
def test_int64_only_where_it_is_a_prefix_sum(kind):
    make, name = MAKE[kind]
    if kind in ("offsets", "k_grouped"):
        assert make(**{name: I64}).index.dtype == torch.int64
    else:
        with pytest.raises(TypeError, match=r"torch.int64, expected torch.int32"):
            make(**{name: I64})


@pytest.mark.parametrize("make", [
    lambda: Psum(I32, alignment=0), lambda: Masked(I32, expected_m=-1),
    lambda: Offsets(I32[:0]), lambda: KGrouped(I32[:0]),
    lambda: routed(block_m=0), lambda: routed(top_k=0), lambda: routed(a_div=0),
    lambda: routed(expert_ids=I32.view(2, 2)),
])
def test_bad_parameter(make):
    with pytest.raises(ValueError, match="expected"):
        make()


@pytest.mark.parametrize(("layout", "groups"), [(Psum(I32), 4), (Masked(I32), 4), (Offsets(I32), 3)])
def test_number_of_groups(layout, groups):
    assert layout.groups(groups) == groups
    with pytest.raises(ValueError, match=f"got 4.*{groups + 2}"):
        layout.groups(groups + 1 if layout.kind == "offsets" else groups + 2)


def test_contiguous_takes_its_groups_from_the_weights():
    assert Contiguous(I32).groups(7) == 7
    assert KGrouped(I32).num_groups == 3


def test_empty_is_legal():
    none = I32[:0]
    for layout in (Contiguous(none), Psum(none), Masked(none), Offsets(I32[:1]), KGrouped(I32[:1])):
        assert layout.groups(0) == 0
    routed(sorted_token_ids=none, expert_ids=none, num_slots=0)
