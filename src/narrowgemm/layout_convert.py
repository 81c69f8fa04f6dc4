"""Converters between the layouts of `layouts.py`, both ways, on the device: no index is read back, all can be captured.

`Offsets` (packed rows) is the hub. A converter whose rows move returns `Converted(layout, row_map)`: `row_map` int32,
in the shape of the new layout's rows, names the row of the old layout that each holds, -1 for padding.
`rows.gather_rows` moves the rows there, `rows.invert_row_map` gives the way back.

| from \\ to | offsets | contiguous | psum | masked | routed |
| --- | --- | --- | --- | --- | --- |
| offsets | | `contiguous_from_offsets` | `psum_from_offsets` | `masked_from_offsets` | `routed_from_offsets` |
| contiguous | `offsets_from_contiguous` | | | | |
| psum | `offsets_from_psum` | `contiguous_from_psum` | | | |
| masked | `offsets_from_masked` | | | | |
| routed | `offsets_from_routed` | | | | |

What only the host can know (how many rows a buffer has) is an argument. When the groups need more, the result is still
in bounds: rows that do not fit are left out, the index is clipped to the buffer, and `validate="sync"` (which reads the
index back) raises ValueError naming the group. Offsets that descend count as empty groups, or raise likewise.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from .errors import expect
from .formats import ScaledTensor
from .layouts import INT, Contiguous, KGrouped, Layout, Masked, Offsets, Psum, Routed, check_index
from .rows import check_rows, gather_rows, sort_ids
from .runtime import env


class Converted(NamedTuple):
    """`layout`, and `row_map` int32: for each of its rows the row it holds of the layout it came from, -1 for none."""

    layout: Any
    row_map: Tensor


def aligned_capacity(rows: int, groups: int, alignment: int) -> int:
    """Rows that hold `rows` rows in up to `groups` segments, each starting at a multiple of `alignment`, at worst."""
    expect(alignment >= 1, "alignment", alignment, "at least 1 row")
    return _up(rows + min(rows, groups) * (alignment - 1), alignment)


def group_lens(layout: Layout, num_groups: int | None = None) -> Tensor:
    """int64 `[G]`: rows (k_grouped: columns) of each group. `num_groups` is needed for contiguous and routed only.

    Raises ValueError where it is missing, TypeError for something that is no grouped layout.
    """
    if isinstance(layout, Offsets | KGrouped):
        return layout.offsets.long().diff().clamp(min=0)
    if isinstance(layout, Psum):
        return _psum_segments(layout)[1]
    if isinstance(layout, Masked):
        return layout.masked_m.long().clamp(min=0)
    if isinstance(layout, Contiguous):
        return offsets_from_contiguous(layout, _needed(num_groups, layout)).layout.offsets.diff()
    expect(isinstance(layout, Routed), "layout", type(layout).__name__, "a grouped layout", error=TypeError)
    return offsets_from_routed(cast(Routed, layout), _needed(num_groups, layout)).layout.offsets.diff()


def offsets_from_group_lens(lens: Tensor) -> Offsets:
    """`lens` int32 or int64 `[G]`, rows a group. The result's `offsets` are int64 `[G + 1]`."""
    return Offsets(_prefix(lens))


def k_grouped_from_group_lens(lens: Tensor) -> KGrouped:
    """`lens` int32 or int64 `[G]`, columns a group; DeepGEMM's `ks`, Primus-Turbo's `group_lens`."""
    return KGrouped(_prefix(lens))


# contiguous and psum -------------------------------------------------------------------------------------------------

def contiguous_from_offsets(offsets: Offsets, capacity: int, *, alignment: int = 128, starts: Tensor | None = None,
                            validate: str | None = None) -> Converted:
    """`offsets` as `Contiguous` of `capacity` rows; group g starts at `starts[g]`, or each at the next multiple of `alignment`.

    `starts`: int32 or int64 `[G]`, ascending, segments not overlapping (where they do, the later group has the row).
    `alignment=1` and `capacity` = the packed rows moves nothing: the row map is 0, 1, 2, ...
    Rows past `capacity` are left out. `validate='sync'` reads the index back and raises ValueError where rows don't fit.
    The definition is DeepGEMM's `m_indices`.
    """
    base, lens = _packed(offsets, validate)
    check_rows(capacity, "capacity")
    expect(alignment >= 1, "alignment", alignment, "at least 1 row")
    if starts is None:
        starts = _aligned_starts(lens, alignment)
    else:
        check_index(starts, "starts", 1, INT)
        expect(starts.numel() == lens.numel(), "starts, length", starts.numel(), f"{lens.numel()}, one a group")
        starts = starts.long()
    _fits(starts, lens, capacity, validate)
    group, local, live = _locate(starts, lens, capacity)
    return Converted(Contiguous(torch.where(live, group, -1).to(torch.int32)), _row_map(base, group, local, live))


def contiguous_from_psum(psum: Psum, rows: int) -> Contiguous:
    """`m_indices` of the same `rows` rows: the segments of `psum` stay where they are, the gaps become -1."""
    group, _, live = _locate(*_psum_segments(psum), check_rows(rows, "rows"))
    return Contiguous(torch.where(live, group, -1).to(torch.int32))


def offsets_from_contiguous(contiguous: Contiguous, num_groups: int, *, validate: str | None = None) -> Converted:
    """`contiguous` as `Offsets` over `M` packed rows, in any order of `m_indices`: a stable sort by group, padding rows last.

    `row_map` `[M]` is -1 past `offsets[num_groups]`. Ids outside [0, num_groups) act as padding; `validate="sync"`
    raises for one that is not -1.
    """
    expect(num_groups >= 0, "num_groups", num_groups, "at least 0")
    if _sync(validate):
        for row, g in enumerate(contiguous.m_indices.tolist()):
            expect(-1 <= g < num_groups, f"m_indices[{row}]", g, f"-1, or a group in [0, {num_groups})")
    order, offsets = sort_ids(contiguous.m_indices, num_groups)
    return Converted(Offsets(offsets), _cut(order, offsets))


def psum_from_offsets(offsets: Offsets, capacity: int, *, alignment: int = 128,
                      validate: str | None = None) -> Converted:
    """`offsets` as `Psum` over `capacity` rows: groups start at multiples of `alignment`, ends are clipped to `capacity`.

    `validate`: as in `contiguous_from_offsets`. The definition is DeepGEMM's psum layout.
    """
    base, lens = _packed(offsets, validate)
    check_rows(capacity, "capacity")
    expect(alignment >= 1, "alignment", alignment, "at least 1 row")
    starts = _aligned_starts(lens, alignment)
    _fits(starts, lens, capacity, validate)
    psum = Psum((starts + lens).clamp(max=capacity).to(torch.int32), alignment)
    return Converted(psum, _row_map(base, *_locate(starts, lens, capacity)))


def offsets_from_psum(psum: Psum, rows: int, *, validate: str | None = None) -> Converted:
    """`psum` as `Offsets` over up to `rows` packed rows; where the groups hold more, the last ones are cut.

    `validate='sync'` reads the index back and raises ValueError for that.
    """
    starts, lens = _psum_segments(psum)
    return _pack(starts, lens, rows, validate)


# masked --------------------------------------------------------------------------------------------------------------

def masked_from_offsets(offsets: Offsets, max_m: int, *, expected_m: int = 0, validate: str | None = None) -> Converted:
    """`offsets` as `Masked` of `max_m` rows a group, `row_map` `[G, max_m]`. Larger groups keep their first `max_m` rows.

    `expected_m`: the layout's hint. `validate='sync'` reads the index back and raises ValueError where a group is larger.
    """
    base, lens = _packed(offsets, validate)
    check_rows(max_m * lens.numel(), "max_m * groups")
    if _sync(validate):
        for g, n in enumerate(lens.tolist()):
            expect(n <= max_m, f"rows of group {g}", n, f"at most max_m = {max_m}")
    local = torch.arange(max_m, device=base.device).expand(lens.numel(), max_m)
    row_map = torch.where(local < lens[:, None], base[:, None] + local, -1).to(torch.int32)
    return Converted(Masked(lens.clamp(max=max_m).to(torch.int32), expected_m), row_map)


def offsets_from_masked(masked: Masked, max_m: int, rows: int, *, validate: str | None = None) -> Converted:
    """`masked` as `Offsets` over up to `rows` packed rows; `row_map` `[rows]` counts rows of `[G * max_m, K]`.

    `masked_m` is clipped to [0, max_m]. Where the groups hold more than `rows` rows, the last ones are cut. `validate='sync'`
    reads the index back and raises ValueError for either.
    """
    groups = masked.masked_m.numel()
    check_rows(max_m * groups, "max_m * groups")
    if _sync(validate):
        for g, n in enumerate(masked.masked_m.tolist()):
            expect(0 <= n <= max_m, f"masked_m[{g}]", n, f"in [0, max_m = {max_m}]")
    lens = masked.masked_m.long().clamp(0, max_m)
    return _pack(torch.arange(groups, device=lens.device) * max_m, lens, rows, validate)


# routed --------------------------------------------------------------------------------------------------------------

def routed_from_offsets(offsets: Offsets, slots: Tensor, *, block_m: int, top_k: int, num_slots: int | None = None,
                        a_div: int = 1, capacity: int | None = None, validate: str | None = None) -> Routed:
    """`Routed` from `slots` int32 / int64 `[R]` sorted by expert: those of e are at `[offsets[e], offsets[e+1])`.

    `num_slots` (default R) is tokens * top_k, and the sentinel. `capacity` (default: enough at worst) is the length of
    `sorted_token_ids`, a multiple of `block_m`. Blocks past the last one have expert id -1. `top_k`, `a_div`: those of `Routed`;
    `validate`: as in `contiguous_from_offsets`. The definition is vLLM's `moe_align_block_size`, with the slots of an expert in
    the order that they are given.
    """
    base, lens = _packed(offsets, validate)
    check_index(slots, "slots", 1, INT)
    expect(block_m >= 1, "block_m", block_m, "at least 1")
    num_slots = check_rows(slots.numel() if num_slots is None else num_slots, "num_slots")
    if capacity is None:
        capacity = aligned_capacity(slots.numel(), lens.numel(), block_m)
    expect(check_rows(capacity, "capacity") % block_m == 0, "capacity", capacity, f"a multiple of block_m = {block_m}")
    starts = _aligned_starts(lens, block_m)
    _fits(starts, lens, capacity, validate)
    group, local, live = _locate(starts, lens, capacity)
    rows = _row_map(base, group, local, live)
    held = (rows >= 0) & (rows < slots.numel())
    ids = torch.where(held, gather_rows(slots, rows), num_slots).to(torch.int32)
    experts = torch.where(live, group, -1).to(torch.int32)[::block_m].contiguous()
    total = (_up(lens, block_m)).sum(dim=0, keepdim=True).clamp(max=capacity).to(torch.int32)
    return Routed(ids, experts, total, num_slots, top_k, block_m, a_div)


def offsets_from_routed(routed: Routed, num_groups: int) -> Converted:
    """`routed` as `Offsets` over up to `num_slots` packed rows; `row_map` `[num_slots]` holds each row's slot, -1 past the last.

    The blocks of an expert may be apart. Blocks with an expert id outside [0, num_groups), entries past
    `num_tokens_post_padded` and entries outside [0, num_slots) are skipped.
    """
    expect(num_groups >= 0, "num_groups", num_groups, "at least 0")
    group, live = routed_groups(routed, num_groups)
    order, offsets = sort_ids(torch.where(live, group, -1), num_groups)
    slots = torch.where(_cut(order, offsets) >= 0, routed.sorted_token_ids.index_select(0, order), -1)
    rows = routed.num_slots
    if slots.numel() < rows:
        slots = torch.cat((slots, slots.new_full((rows - slots.numel(),), -1)))
    return Converted(Offsets(offsets.clamp(max=rows)), slots[:rows])


# rows to a layout and back -------------------------------------------------------------------------------------------

Rows = TypeVar("Rows", Tensor, ScaledTensor)


def to_masked(x: Rows, offsets: Offsets, max_m: int, *, expected_m: int = 0,
              validate: str | None = None) -> tuple[Rows, Masked]:
    """Packed rows x `[M, K]` of `offsets` as `[G, max_m, K]` with `masked_m`; what a group lacks is zero, what is over is left out.

    `expected_m`, `validate`: as in `masked_from_offsets`.
    """
    layout, row_map = masked_from_offsets(offsets, max_m, expected_m=expected_m, validate=validate)
    return gather_rows(x, row_map), layout


def from_masked(y: Rows, offsets: Offsets, rows: int) -> Rows:
    """y `[G, max_m, N]` as packed rows `[rows, N]` by the packed side's `offsets`: the way back from `to_masked`.

    Rows that did not fit in `max_m`, and rows in no group, come back zero.
    """
    shape = y.shape
    base, lens = _packed(offsets, None)
    expect(len(shape) == 3 and shape[0] == lens.numel(), "y, shape", tuple(shape), f"[{lens.numel()}, max_m, N]")
    starts = torch.arange(lens.numel(), device=base.device) * shape[1]
    return gather_rows(y, _row_map(starts, *_locate(base, lens.clamp(max=shape[1]), check_rows(rows, "rows"))))


def pad_to_contiguous(x: Rows, offsets: Offsets, alignment: int = 128, capacity: int | None = None, *,
                      starts: Tensor | None = None, validate: str | None = None) -> tuple[Rows, Contiguous]:
    """Packed rows x `[M, K]` as `[capacity, K]`, segments aligned and padded with zero rows, with their `m_indices`.

    `capacity`: default `aligned_capacity`, enough for any sizes. Other arguments as in `contiguous_from_offsets`.
    """
    if capacity is None:
        expect(starts is None, "capacity", None, "a number of rows where starts are given")
        capacity = aligned_capacity(x.shape[0], offsets.offsets.numel() - 1, alignment)
    layout, row_map = contiguous_from_offsets(offsets, capacity, alignment=alignment, starts=starts, validate=validate)
    return gather_rows(x, row_map), layout


def unpad_from_contiguous(y: Rows, offsets: Offsets, rows: int, alignment: int = 128, *,
                          starts: Tensor | None = None) -> Rows:
    """y `[capacity, N]` as packed rows `[rows, N]` by the packed side's `offsets`: the way back from `pad_to_contiguous`.

    `alignment`, `starts`: what was given there. Rows past the capacity, and rows in no group, come back zero.
    """
    base, lens = _packed(offsets, None)
    starts = _aligned_starts(lens, alignment) if starts is None else starts.long()
    return gather_rows(y, _row_map(starts, *_locate(base, lens, check_rows(rows, "rows"))))


# internals -----------------------------------------------------------------------------------------------------------

def _up(x: Any, multiple: int) -> Any:
    return (x + (multiple - 1)) // multiple * multiple


def _needed(num_groups: int | None, layout: Layout) -> int:
    if num_groups is None:
        raise ValueError(f"num_groups: got None, expected a number: the index of layout {layout.kind} does not tell")
    return num_groups


def _prefix(lens: Tensor) -> Tensor:
    check_index(lens, "group_lens", 1, INT)
    return _exclusive(lens.long().clamp(min=0))


def _exclusive(lens: Tensor) -> Tensor:
    """int64 `[G + 1]`: 0 and the running sums."""
    return torch.cat((lens.new_zeros(1), lens.cumsum(0)))


def _aligned_starts(lens: Tensor, alignment: int) -> Tensor:
    return _exclusive(_up(lens, alignment))[:-1]


def _psum_segments(psum: Psum) -> tuple[Tensor, Tensor]:
    """Start row and length of each group, int64 `[G]`."""
    ends = psum.ends.long()
    starts = torch.cat((ends.new_zeros(1), _up(ends, psum.alignment)))[:-1]
    return starts, (ends - starts).clamp(min=0)


def _locate(starts: Tensor, lens: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of `rows` rows: its group, its row in the group, and whether it is in one at all. `starts` ascend."""
    row = torch.arange(rows, device=starts.device)
    if starts.numel() == 0:
        return row, row, torch.zeros_like(row, dtype=torch.bool)
    group = (torch.searchsorted(starts, row, right=True) - 1).clamp(0, starts.numel() - 1)
    local = row - starts[group]
    return group, local, (local >= 0) & (local < lens[group])


def _row_map(base: Tensor, group: Tensor, local: Tensor, live: Tensor) -> Tensor:
    if base.numel() == 0:
        return torch.full_like(group, -1, dtype=torch.int32)
    return torch.where(live, base[group] + local, -1).to(torch.int32)


def _cut(row_map: Tensor, offsets: Tensor) -> Tensor:
    """-1 from row `offsets[-1]` on."""
    row = torch.arange(row_map.numel(), dtype=torch.int32, device=row_map.device)
    return torch.where(row < offsets[-1], row_map, -1)


def _packed(offsets: Offsets, validate: str | None) -> tuple[Tensor, Tensor]:
    """First row and length of each group, int64 `[G]`."""
    expect(isinstance(offsets, Offsets), "layout", type(offsets).__name__, "Offsets", error=TypeError)
    if _sync(validate):
        values = offsets.offsets.tolist()
        expect(values[0] >= 0, "offsets[0]", values[0], "at least 0")
        for g, (a, b) in enumerate(pairwise(values)):
            expect(a <= b, f"offsets[{g + 1}]", b, f"at least offsets[{g}] = {a}")
    return offsets.offsets[:-1].long(), group_lens(offsets)


def _pack(starts: Tensor, lens: Tensor, rows: int, validate: str | None) -> Converted:
    """Segments of some layout, packed into `rows` rows."""
    check_rows(rows, "rows")
    offsets = _exclusive(lens)
    if _sync(validate):
        total = int(offsets[-1])
        expect(total <= rows, "rows", rows, f"at least {total}, the sum over the groups")
    return Converted(Offsets(offsets.clamp(max=rows)), _row_map(starts, *_locate(offsets[:-1], lens, rows)))


def routed_groups(routed: Routed, num_groups: int) -> tuple[Tensor, Tensor]:
    """Of each entry of `sorted_token_ids` of `routed`: its expert, and whether it is a slot to compute by one of `num_groups`."""
    ids, experts = routed.sorted_token_ids, routed.expert_ids
    blocks = -(-ids.numel() // routed.block_m)
    expect(experts.numel() >= blocks, "expert_ids, length", experts.numel(),
           f"at least {blocks}, one for each block of {routed.block_m}")
    entry = torch.arange(ids.numel(), device=ids.device)
    group = experts[entry // routed.block_m]
    live = (entry < routed.num_tokens_post_padded) & (group >= 0) & (group < num_groups)
    return group, live & (ids >= 0) & (ids < routed.num_slots)


def _sync(validate: str | None) -> bool:
    expect(validate in (None, "sync"), "validate", repr(validate), "None or 'sync'")
    return env.wants_sync(validate)


def _fits(starts: Tensor, lens: Tensor, capacity: int, validate: str | None) -> None:
    if not _sync(validate):
        return
    end = 0
    for g, (start, n) in enumerate(zip(starts.tolist(), lens.tolist())):
        expect(start >= end, f"start of group {g}", start, f"at least {end}, where the group before it ends")
        end = start + n
        expect(end <= capacity, f"end row of group {g}", end, f"at most the capacity, {capacity}")
