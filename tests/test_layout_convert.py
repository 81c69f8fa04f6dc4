"""Layout converters against definitions written as Python loops, round trips, overflow, and bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from narrowgemm.layout_convert import (
    aligned_capacity,
    contiguous_from_offsets,
    contiguous_from_psum,
    from_masked,
    group_lens,
    k_grouped_from_group_lens,
    masked_from_offsets,
    offsets_from_contiguous,
    offsets_from_group_lens,
    offsets_from_masked,
    offsets_from_psum,
    offsets_from_routed,
    pad_to_contiguous,
    psum_from_offsets,
    routed_from_offsets,
    to_masked,
    unpad_from_contiguous,
)
from narrowgemm.layouts import Contiguous, KGrouped, Masked, Offsets, Psum, Routed
from narrowgemm.rows import gather_rows, invert_row_map, sort_ids

from ._layouts import i32, make_offsets, naive_align, sizes, topk_ids, up

alignments = st.sampled_from([1, 2, 4, 16, 128])


def aligned(lens, alignment):
    """Start of each aligned segment, and the end of the last."""
    starts, at = [], 0
    for n in lens:
        starts.append(at)
        at += up(n, alignment)
    return starts, at


def naive_contiguous(lens, starts, capacity):
    """m_indices and row map, a row at a time."""
    m, rows, packed = [-1] * capacity, [-1] * capacity, 0
    for g, (n, start) in enumerate(zip(lens, starts)):
        for i in range(n):
            if start + i < capacity:
                m[start + i], rows[start + i] = g, packed
            packed += 1
    return m, rows


@given(sizes)
@example([])
@example([0])
@example([0] * 1024)
def test_group_lens(lens):
    want, total = torch.tensor(lens, dtype=torch.int64), sum(lens)
    offsets = make_offsets(lens)
    assert offsets.offsets.dtype == torch.int64
    assert offsets.offsets.tolist() == [sum(lens[:g]) for g in range(len(lens) + 1)]
    narrow = Offsets(offsets.offsets.to(torch.int32))
    psum = psum_from_offsets(offsets, aligned_capacity(total, len(lens), 128)).layout
    for layout in (offsets, narrow, k_grouped_from_group_lens(want), psum,
                   masked_from_offsets(narrow, max(lens, default=0)).layout):
        assert torch.equal(group_lens(layout), want), layout
    contiguous = contiguous_from_offsets(offsets, total, alignment=1).layout
    assert torch.equal(group_lens(contiguous, len(lens)), want)
    routed = routed_from_offsets(offsets, torch.arange(total), block_m=4, top_k=1)
    assert torch.equal(group_lens(routed, len(lens)), want)


@given(sizes, alignments, st.integers(-40, 40))
def test_contiguous_and_psum_from_offsets(lens, alignment, slack):
    starts, end = aligned(lens, alignment)
    capacity = max(0, end + slack)
    m, rows = naive_contiguous(lens, starts, capacity)
    offsets = make_offsets(lens)
    layout, row_map = contiguous_from_offsets(offsets, capacity, alignment=alignment)
    assert layout.m_indices.tolist() == m and row_map.tolist() == rows
    psum, psum_map = psum_from_offsets(offsets, capacity, alignment=alignment)
    assert psum.ends.tolist() == [min(s + n, capacity) for s, n in zip(starts, lens)] and psum.alignment == alignment
    assert psum_map.tolist() == rows
    assert contiguous_from_psum(psum, capacity).m_indices.tolist() == m
    assert row_map.dtype == psum_map.dtype == layout.m_indices.dtype == psum.ends.dtype == torch.int32


@given(sizes, st.data())
def test_contiguous_from_offsets_with_starts(lens, data):
    starts, at = [], 0
    for n in lens:
        at += data.draw(st.integers(0, 5))
        starts.append(at)
        at += n
    layout, row_map = contiguous_from_offsets(make_offsets(lens), at + 3, starts=i32(starts), validate="sync")
    assert (layout.m_indices.tolist(), row_map.tolist()) == naive_contiguous(lens, starts, at + 3)
    x = torch.randn(sum(lens), 3)
    padded, _ = pad_to_contiguous(x, make_offsets(lens), capacity=at + 3, starts=i32(starts))
    assert torch.equal(unpad_from_contiguous(padded, make_offsets(lens), len(x), starts=i32(starts)), x)


@given(st.integers(0, 6), st.lists(st.integers(-2, 8), max_size=80))
def test_offsets_from_contiguous(groups, ids):
    """Any order, ids repeated or out of range: a stable sort."""
    want = [r for g in range(groups) for r, x in enumerate(ids) if x == g]
    (layout, row_map) = offsets_from_contiguous(Contiguous(i32(ids)), groups)
    assert layout.offsets.tolist() == [sum(0 <= x < g for x in ids) for g in range(groups)] + [len(want)]
    assert row_map.tolist() == want + [-1] * (len(ids) - len(want))


@given(sizes, alignments)
def test_contiguous_round_trip(lens, alignment):
    total, offsets = sum(lens), make_offsets(lens)
    x = torch.randn(total, 5)
    padded, layout = pad_to_contiguous(x, offsets, alignment, validate="sync")
    assert padded.shape[0] == aligned_capacity(total, len(lens), alignment)
    assert torch.equal(unpad_from_contiguous(padded, offsets, total, alignment), x)
    assert (padded[layout.m_indices < 0] == 0).all()
    back = offsets_from_contiguous(layout, len(lens))
    assert torch.equal(back.layout.offsets, offsets.offsets)
    assert torch.equal(gather_rows(padded, back.row_map)[:total], x)


@given(sizes, alignments, st.integers(0, 20))
def test_psum_round_trip(lens, alignment, slack):
    total, offsets = sum(lens), make_offsets(lens)
    x = torch.randn(total, 5)
    psum, row_map = psum_from_offsets(offsets, aligned_capacity(total, len(lens), alignment), alignment=alignment,
                                      validate="sync")
    back = offsets_from_psum(psum, total + slack, validate="sync")
    assert torch.equal(back.layout.offsets, offsets.offsets)
    rows = gather_rows(gather_rows(x, row_map), back.row_map)
    assert torch.equal(rows[:total], x) and not rows[total:].any()
    assert torch.equal(invert_row_map(row_map, total + slack), back.row_map)


def test_psum_with_an_end_inside_the_gap():
    """DeepGEMM also writes an empty group as the end before it, unaligned: it stays empty and nobody else moves."""
    psum = Psum(i32([5, 5, 10]), alignment=8)
    assert group_lens(psum).tolist() == [5, 0, 2]
    assert contiguous_from_psum(psum, 16).m_indices.tolist() == [0] * 5 + [-1] * 3 + [2] * 2 + [-1] * 6


@given(sizes, st.integers(0, 40))
def test_masked_from_offsets(lens, max_m):
    """Groups larger than max_m keep their first rows."""
    total, offsets = sum(lens), make_offsets(lens)
    layout, row_map = masked_from_offsets(offsets, max_m, expected_m=3)
    assert layout.masked_m.tolist() == [min(n, max_m) for n in lens] and layout.expected_m == 3
    base = [sum(lens[:g]) for g in range(len(lens))]
    assert row_map.shape == (len(lens), max_m)
    assert row_map.tolist() == [[b + i if i < n else -1 for i in range(max_m)] for b, n in zip(base, lens)]
    x = torch.randn(total, 3)
    kept = torch.tensor([i < max_m for n in lens for i in range(n)], dtype=torch.bool)
    y, _ = to_masked(x, offsets, max_m)
    assert torch.equal(from_masked(y, offsets, total), torch.where(kept[:, None], x, 0))
    back = offsets_from_masked(layout, max_m, total, validate="sync")
    assert torch.equal(group_lens(back.layout), group_lens(layout))
    assert torch.equal(gather_rows(y, back.row_map)[:int(kept.sum())], x[kept])


@given(st.lists(st.integers(-3, 12), max_size=10), st.integers(0, 60))
def test_offsets_from_masked_clips(masked_m, rows):
    """masked_m outside [0, max_m] is clipped, and the index never points past `rows`."""
    layout, row_map = offsets_from_masked(Masked(i32(masked_m)), 8, rows)
    held = [(g, i) for g, n in enumerate(masked_m) for i in range(min(max(n, 0), 8))]
    assert row_map.tolist() == [8 * g + i for g, i in held[:rows]] + [-1] * max(0, rows - len(held))
    assert int(layout.offsets[-1]) == min(len(held), rows)


@given(topk_ids, st.integers(1, 8), st.sampled_from([1, 2, 16, 64]))
def test_routed_round_trip(ids, experts, block):
    slots, offsets = sort_ids(i32(ids).flatten(), experts)
    k, total = len(ids[0]), len(ids) * len(ids[0])
    routed = routed_from_offsets(Offsets(offsets), slots, block_m=block, top_k=k, a_div=k, validate="sync")
    want, blocks = naive_align(ids, experts, block)
    post = routed.num_tokens_post_padded.tolist()
    assert post == [len(want)]
    assert routed.sorted_token_ids.tolist() == want + [total] * (routed.sorted_token_ids.numel() - len(want))
    assert routed.expert_ids.tolist() == blocks + [-1] * (routed.expert_ids.numel() - len(blocks))
    assert routed.expert_ids.numel() * block == routed.sorted_token_ids.numel()
    assert (routed.num_slots, routed.top_k, routed.a_div, routed.block_m) == (total, k, k, block)
    back = offsets_from_routed(routed, experts)
    live = int(offsets[-1])
    assert torch.equal(back.layout.offsets, offsets)
    assert back.row_map.tolist() == slots[:live].tolist() + [-1] * (total - live)


def test_offsets_from_routed_skips():
    """Blocks of no expert, entries past the count, bad slots; blocks of one expert apart; a last block cut short."""
    routed = Routed(i32([3, 9, 0, 9, 1, -5, 2, 4, 5]), i32([1, 7, 1, -1, 0]), i32([8]), 9, 3, 2)
    layout, row_map = offsets_from_routed(routed, 2)
    assert layout.offsets.tolist() == [0, 0, 2]
    assert row_map.tolist() == [3, 1] + [-1] * 7


def test_offsets_from_routed_never_point_past_the_rows():
    """A malformed layout that holds slots several times is cut at num_slots rows."""
    layout, row_map = offsets_from_routed(Routed(i32([0, 0, 1, 1]), i32([0, 1]), i32([4]), 3, 1, 2), 2)
    assert layout.offsets.tolist() == [0, 2, 3] and row_map.tolist() == [0, 0, 1]


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=9), st.integers(0, 60))
def test_garbage_offsets_stay_in_bounds(values, rows):
    """Descending, negative, past the end: every index that comes out is -1 or a row of the buffer, after the gather."""
    offsets, x = Offsets(torch.tensor(values)), torch.ones(20, 2)
    groups = len(values) - 1
    for layout, row_map in (contiguous_from_offsets(offsets, rows, alignment=4),
                            psum_from_offsets(offsets, rows, alignment=4), masked_from_offsets(offsets, 8)):
        assert gather_rows(x, row_map).shape == (*row_map.shape, 2)
        if isinstance(layout, Contiguous):
            assert ((layout.m_indices >= -1) & (layout.m_indices < max(groups, 1))).all()
        else:
            assert (layout.index >= 0).all() and (layout.index <= max(rows, 8)).all()
    assert from_masked(torch.ones(groups, 8, 2), offsets, rows).shape == (rows, 2)
    assert unpad_from_contiguous(torch.ones(16, 2), offsets, rows, 4).shape == (rows, 2)
    routed = routed_from_offsets(offsets, torch.arange(20), block_m=4, top_k=1, capacity=40)
    assert ((routed.sorted_token_ids >= 0) & (routed.sorted_token_ids <= 20)).all()
    assert 0 <= int(routed.num_tokens_post_padded) <= 40


OFF = make_offsets([3, 5, 0])


@pytest.mark.parametrize(("call", "says"), [
    (lambda v: contiguous_from_offsets(OFF, 6, alignment=4, validate=v), "end row of group 1.*got 9.*capacity, 6"),
    (lambda v: psum_from_offsets(OFF, 4, alignment=4, validate=v), "end row of group 1.*got 9.*capacity, 4"),
    (lambda v: pad_to_contiguous(torch.ones(8, 2), OFF, 4, 8, validate=v), "end row of group 1"),
    (lambda v: contiguous_from_offsets(OFF, 99, starts=i32([0, 2, 9]), validate=v), "start of group 1.*got 2.*least 3"),
    (lambda v: masked_from_offsets(OFF, 4, validate=v), "rows of group 1.*got 5.*max_m = 4"),
    (lambda v: to_masked(torch.ones(8, 2), OFF, 4, validate=v), "rows of group 1.*got 5.*max_m = 4"),
    (lambda v: routed_from_offsets(OFF, i32(range(8)), block_m=4, top_k=1, capacity=8, validate=v), "group 1.*capac"),
    (lambda v: offsets_from_psum(Psum(i32([3, 9]), 4), 7, validate=v), "rows: got 7.*at least 8"),
    (lambda v: offsets_from_masked(Masked(i32([3, 4])), 4, 6, validate=v), "rows: got 6.*at least 7"),
    (lambda v: offsets_from_masked(Masked(i32([3, 5])), 4, 9, validate=v), r"masked_m\[1\].*got 5"),
    (lambda v: offsets_from_masked(Masked(i32([-3, 4])), 4, 9, validate=v), r"masked_m\[0\].*got -3"),
    (lambda v: masked_from_offsets(Offsets(i32([0, 5, 3])), 9, validate=v), r"offsets\[2\].*got 3.*offsets\[1\] = 5"),
    (lambda v: masked_from_offsets(Offsets(i32([-1, 5])), 9, validate=v), r"offsets\[0\].*got -1"),
    (lambda v: offsets_from_contiguous(Contiguous(i32([0, -1, 3])), 3, validate=v), r"m_indices\[2\].*got 3"),
])
def test_overflow_and_bad_data(call, says, monkeypatch):
    call(None)  # defined and in bounds
    with pytest.raises(ValueError, match=says):
        call("sync")
    monkeypatch.setenv("NARROWGEMM_VALIDATE", "sync")
    with pytest.raises(ValueError, match=says):
        call(None)


@pytest.mark.parametrize(("call", "error"), [
    (lambda: contiguous_from_offsets(OFF, -1), ValueError),
    (lambda: contiguous_from_offsets(OFF, 2**31), ValueError),
    (lambda: contiguous_from_offsets(OFF, 8, alignment=0), ValueError),
    (lambda: contiguous_from_offsets(OFF, 8, starts=i32([0, 1])), ValueError),
    (lambda: contiguous_from_offsets(OFF, 8, starts=torch.zeros(3)), TypeError),
    (lambda: contiguous_from_offsets(OFF, 8, validate="yes"), ValueError),
    (lambda: contiguous_from_offsets(OFF.offsets, 8), TypeError),
    (lambda: pad_to_contiguous(torch.ones(8, 2), OFF, starts=i32([0, 3, 8])), ValueError),
    (lambda: psum_from_offsets(OFF, 8, alignment=0), ValueError),
    (lambda: masked_from_offsets(OFF, -1), ValueError),
    (lambda: from_masked(torch.ones(2, 4, 2), OFF, 8), ValueError),
    (lambda: from_masked(torch.ones(8, 2), OFF, 8), ValueError),
    (lambda: offsets_from_contiguous(Contiguous(i32([0])), -1), ValueError),
    (lambda: offsets_from_group_lens(torch.ones(3)), TypeError),
    (lambda: routed_from_offsets(OFF, torch.arange(8), block_m=0, top_k=1), ValueError),
    (lambda: routed_from_offsets(OFF, torch.arange(8), block_m=4, top_k=1, capacity=9), ValueError),
    (lambda: routed_from_offsets(OFF, torch.ones(8), block_m=4, top_k=1), TypeError),
    (lambda: offsets_from_routed(Routed(i32([0, 1, 2]), i32([0]), i32([2]), 3, 1, 2), 1), ValueError),
    (lambda: group_lens(Contiguous(i32([0]))), ValueError),
    (lambda: group_lens(OFF.offsets), TypeError),
])
def test_bad_input(call, error):
    with pytest.raises(error, match="expected"):
        call()


def test_k_grouped_is_offsets_along_k():
    layout = k_grouped_from_group_lens(i32([128, 0, 256]))
    assert isinstance(layout, KGrouped) and layout.offsets.tolist() == [0, 128, 128, 384]
