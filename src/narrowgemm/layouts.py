"""Which rows belong to which group. Every index lives on the device; nothing here reads it back.

| layout | A | index | rows of group g |
| --- | --- | --- | --- |
| `Contiguous` | `[M, K]` | `m_indices` int32 `[M]`, -1 = padding | rows with `m_indices == g`; any segment length and order |
| `Psum` | `[M, K]` | `ends` int32 `[G]` | `[align(ends[g-1]), ends[g])` |
| `Offsets` | `[M, K]` | `offsets` int32 / int64 `[G+1]` | `[offsets[g], offsets[g+1])`, packed, no padding |
| `Masked` | `[G, max_m, K]` | `masked_m` int32 `[G]` | the first `masked_m[g]` of the group's rows |
| `Routed` | `[T, K]` | slots sorted by expert, see the class | slots of blocks with that `expert_ids` |
| `KGrouped` | `[M, K_total]` | `offsets` int32 / int64 `[G+1]` along K | columns `[offsets[g], offsets[g+1])` |

Definitions: DeepGEMM (contiguous, psum, masked, k-grouped), Primus-Turbo and torch (offsets), vLLM's
`moe_align_block_size` and aiter's `moe_sorting` (routed).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .errors import expect, expect_count


@dataclass(frozen=True, eq=False)
class Layout:
    """Base of the grouped layouts: `kind` names it in a `Problem`, `index` is the device tensor kernels read.

    What the host knows beside the index, where a layout has these as fields: `alignment`, groups start at multiples of it;
    `expected_m`, the mean rows of a group, 0 for unknown.
    """

    kind: ClassVar[str] = ""
    alignment = 1       # not annotated, so no fields of every layout
    expected_m = 0

    @property
    def index(self) -> Tensor:
        raise NotImplementedError

    def groups(self, b_groups: int) -> int:
        """Number of groups, checked against the `b_groups` weights that came with the call. ValueError on a mismatch."""
        return b_groups


def check_index(x: Tensor, name: str, dim: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """An index tensor has one of these dtypes, so many dimensions, and is contiguous. TypeError, ValueError."""
    if isinstance(x, Tensor) and x.dtype in dtypes and x.dim() == dim and x.is_contiguous():
        return      # layouts are made in every call: no messages for what is right
    expect(isinstance(x, Tensor), name, type(x).__name__, "a torch.Tensor", error=TypeError)
    expect(x.dtype in dtypes, f"{name}, dtype", x.dtype, " or ".join(map(str, dtypes)), error=TypeError)
    expect(x.dim() == dim, f"{name}, shape", tuple(x.shape), f"{dim} dimension{'s' * (dim > 1)}")
    expect(x.numel() <= 1 or x.is_contiguous(), f"{name}, strides", x.stride(), "contiguous")


INT = (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class Contiguous(Layout):
    """`m_indices` int32 `[M]`: the group of each row, -1 for padding. Ids outside [0, G) act as -1."""

    kind: ClassVar[str] = "contiguous"
    m_indices: Tensor

    def __post_init__(self) -> None:
        check_index(self.m_indices, "m_indices", 1, (torch.int32,))

    @property
    def index(self) -> Tensor:
        return self.m_indices


def check_hint(expected_m: int) -> None:
    """A hint is an int: a tensor would be read back in every call. TypeError, ValueError."""
    if type(expected_m) is not int or expected_m < 0:
        expect_count(expected_m, "expected_m", 0, ", a number of rows, 0 for unknown")


@dataclass(frozen=True, eq=False)
class Psum(Layout):
    """`ends` int32 `[G]`: end row of each group; group g starts at `ends[g-1]` rounded up to `alignment` rows.

    `expected_m`: a host-side hint of the mean rows of a group, for buffers much larger than what they hold.
    """

    kind: ClassVar[str] = "psum"
    ends: Tensor
    alignment: int = 128
    expected_m: int = 0

    def __post_init__(self) -> None:
        check_index(self.ends, "psum ends", 1, (torch.int32,))
        if type(self.alignment) is not int or self.alignment < 1:
            expect_count(self.alignment, "psum alignment", 1, " row")
        check_hint(self.expected_m)

    @property
    def index(self) -> Tensor:
        return self.ends

    def groups(self, b_groups: int) -> int:
        expect(self.ends.numel() == b_groups, "psum ends, length", self.ends.numel(), f"the number of groups, {b_groups}")
        return b_groups


@dataclass(frozen=True, eq=False)
class Offsets(Layout):
    """`offsets` int32 or int64 `[G+1]`, an exclusive prefix sum: groups packed tightly, of any size."""

    kind: ClassVar[str] = "offsets"
    offsets: Tensor

    def __post_init__(self) -> None:
        check_index(self.offsets, "offsets", 1, INT)
        expect(self.offsets.numel() >= 1, "offsets, length", self.offsets.numel(), "G + 1")

    @property
    def index(self) -> Tensor:
        return self.offsets

    def groups(self, b_groups: int) -> int:
        expect(self.offsets.numel() == b_groups + 1, "offsets, length", self.offsets.numel(),
               f"groups + 1 = {b_groups + 1}")
        return b_groups


@dataclass(frozen=True, eq=False)
class Masked(Layout):
    """`masked_m` int32 `[G]`: valid rows of each group of `[G, max_m, K]`; `expected_m` is a host-side hint of the mean."""

    kind: ClassVar[str] = "masked"
    masked_m: Tensor
    expected_m: int = 0

    def __post_init__(self) -> None:
        check_index(self.masked_m, "masked_m", 1, (torch.int32,))
        check_hint(self.expected_m)

    @property
    def index(self) -> Tensor:
        return self.masked_m

    def groups(self, b_groups: int) -> int:
        expect(self.masked_m.numel() == b_groups, "masked_m, length", self.masked_m.numel(),
               f"the number of groups, {b_groups}")
        return b_groups


@dataclass(frozen=True, eq=False)
class Routed(Layout):
    """Routed slots in blocks of one expert each, as vLLM's `moe_align_block_size` makes them.

    `sorted_token_ids` int32 `[P]`: slot `token * top_k + k`, blocks filled up with the sentinel `num_slots`;
    `expert_ids` int32 `[P / block_m]`, outside [0, G) = skip the block; `num_tokens_post_padded` int32 `[1]`.
    A's row is `slot // a_div`, the output row is the slot.
    """

    kind: ClassVar[str] = "routed"
    sorted_token_ids: Tensor
    expert_ids: Tensor
    num_tokens_post_padded: Tensor
    num_slots: int
    top_k: int
    block_m: int
    a_div: int = 1

    def __post_init__(self) -> None:
        check_index(self.sorted_token_ids, "sorted_token_ids", 1, (torch.int32,))
        check_index(self.expert_ids, "expert_ids", 1, (torch.int32,))
        check_index(self.num_tokens_post_padded, "num_tokens_post_padded", 1, (torch.int32,))
        for name in ("block_m", "a_div", "top_k"):
            expect_count(getattr(self, name), name)
        expect_count(self.num_slots, "num_slots", 0)

    @property
    def index(self) -> Tensor:
        return self.sorted_token_ids


@dataclass(frozen=True, eq=False)
class KGrouped(Layout):
    """`offsets` int32 or int64 `[G+1]` along the contracted axis: group g contracts columns `[offsets[g], offsets[g+1])`.

    `alignment`: what the host knows of the offsets: each is a multiple of it. A group that has fewer columns holds zeros in
    the rest, as `quantize_both` writes it; 1 asks for nothing.
    """

    kind: ClassVar[str] = "k_grouped"
    offsets: Tensor
    alignment: int = 1

    def __post_init__(self) -> None:
        check_index(self.offsets, "k_grouped offsets", 1, INT)
        expect(self.offsets.numel() >= 1, "k_grouped offsets, length", self.offsets.numel(), "G + 1")
        if type(self.alignment) is not int or self.alignment < 1:
            expect_count(self.alignment, "k_grouped alignment", 1, " column")

    @property
    def index(self) -> Tensor:
        return self.offsets

    @property
    def num_groups(self) -> int:
        return self.offsets.numel() - 1


ROWS: dict[str, type[Layout]] = {c.kind: c for c in (Contiguous, Psum, Offsets, Masked)}     # layouts of rows, by name


def layout_of_rows(kind: str, index: Tensor, alignment: int = 1, expected_m: int = 0) -> Layout:
    """The layout of this kind over `index`, with what its class has of the rest. KeyError for a kind that is not in ROWS."""
    if kind == "psum":
        return Psum(index, alignment, expected_m)
    return Masked(index, expected_m) if kind == "masked" else ROWS[kind](index)  # type: ignore[call-arg]
