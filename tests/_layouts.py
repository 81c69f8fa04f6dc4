"""What the layout and routing tests share: generators of sizes and ids, and definitions as Python loops."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from narrowgemm.layout_convert import offsets_from_group_lens
from narrowgemm.layouts import Offsets

sizes = st.one_of(
    st.lists(st.integers(0, 9), min_size=0, max_size=12),
    st.lists(st.sampled_from([0, 0, 0, 1, 127, 128, 129, 300]), min_size=1, max_size=6),
    st.builds(lambda g, at, n: [n if i == at % g else 0 for i in range(g)], st.integers(1, 1024), st.integers(0, 1023),
              st.integers(0, 50)),
)
topk_ids = st.integers(1, 4).flatmap(
    lambda k: st.lists(st.lists(st.integers(-2, 9), min_size=k, max_size=k), min_size=1, max_size=30))


def i32(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.int32)


def make_offsets(lens) -> Offsets:
    return offsets_from_group_lens(torch.tensor(lens, dtype=torch.int64))


def up(n: int, a: int) -> int:
    return -(-n // a) * a


def naive_align(ids, experts, block):
    """vLLM's definition: experts in turn, each one's slots in order, filled up to blocks of the sentinel."""
    flat = [e for row in ids for e in row]
    out, blocks = [], []
    for e in range(experts):
        mine = [s for s, x in enumerate(flat) if x == e]
        mine += [len(flat)] * (up(len(mine), block) - len(mine))
        out += mine
        blocks += [e] * (len(mine) // block)
    return out, blocks
