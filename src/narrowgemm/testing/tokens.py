"""The step in front of an end-to-end case: BF16 tokens to the FP8 rows that a grouped product takes, in the order of groups.

Ours and the peers' go through one kernel, with row maps of their own: packed groups for the offsets layout, groups padded to
their alignment for a peer that needs that. So what differs is the layout's work and the product, not the quantiser. The kernel
gathers and quantises in one pass (3 bytes an element of A read and written); quantising T tokens first and gathering FP8 rows
after that would move 5. Every row is a token of its own, in random order. Routing (row map, offsets, m_indices) is not timed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import ScaledTensor

CLAMP = 1e-4            # the least amax of a block: what `quantize` takes
TILE = (8, 4)           # rows x blocks of a program: a sector of scales, 4096 elements


@dataclass(frozen=True, eq=False)
class Tokens:
    """`x`: BF16 `[T, K]`. `rows`: int32 `[R]`, the token of each row, -1 for padding."""

    x: Tensor
    rows: Tensor

    def quantize_into(self, a: ScaledTensor) -> None:
        """`a[r] = quantize(x[rows[r]])`, 1x128 with FP32 scales; padding rows are zero. Bit for bit `quantize`.

        a: payload `[R, K]` with contiguous rows, scales `[R, K / 128]` MN-major.
        """
        assert a.scale is not None and a.scale.stride(0) == 1 and a.data.stride(1) == 1
        if a.data.is_cuda:
            self.launch(a)
            return
        from ..reference.quantize import quantize

        picked = torch.where((self.rows >= 0)[:, None], self.x[self.rows.clamp(min=0)], 0)
        q = quantize(picked, a.format, amax_clamp=CLAMP)
        assert q.scale is not None
        a.data.copy_(q.data)
        a.scale.copy_(q.scale)

    def launch(self, a: ScaledTensor) -> None:
        from ..kernels.triton.quantize import native
        from .tokens_device import gather_quantize_kernel

        assert a.scale is not None
        (r, k), (br, bg) = a.data.shape, TILE
        blocks = k // 128
        gather_quantize_kernel[(-(-r // br) * -(-blocks // bg),)](
            self.x, self.rows, a.data, a.scale, r, blocks, CLAMP, self.x.stride(0), a.data.stride(0), a.scale.stride(1),
            BR=br, BG=bg, TOP=a.format.elem.max, NATIVE=native(self.x), num_warps=8)

    def padded(self, parts: dict[int, slice], at: dict[int, slice], length: int) -> Tokens:
        """The same tokens for `length` rows in which group g's, `parts[g]` of these, lie at `at[g]`."""
        rows = torch.full((length,), -1, dtype=torch.int32, device=self.rows.device)
        for g, where in at.items():
            rows[where] = self.rows[parts[g]]
        return Tokens(self.x, rows)


def tokens_of(sources: list[Tensor], seed: int) -> Tokens:
    """Tokens whose rows, gathered, are `sources` one after the other."""
    flat = torch.cat(sources)
    order = torch.randperm(flat.shape[0], generator=torch.Generator().manual_seed(seed)).to(flat.device)
    x = torch.empty_like(flat)
    x[order] = flat
    return Tokens(x, order.to(torch.int32))
