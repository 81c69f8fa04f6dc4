"""What is fixed when the Hopper product of folded MXFP8 by folded MXFP8 is compiled for tiles of any width, and where its shared
memory lies."""

from __future__ import annotations

from dataclasses import dataclass

from . import fp8_cluster_tile


@dataclass(frozen=True)
class Tile(fp8_cluster_tile.Tile):
    """As the kernel's on clusters, for blocks that are alone: 128 rows, 64 of each warpgroup, a piece of NP * WN columns. A K block
    has SUB scales of A a row; a slot holds 64 columns of picks and what they are multiplied by as well."""

    FOLD: bool = True
    SUB: int = 4
    WHOLE: bool = False      # where too much of A doesn't fold, all is multiplied in BF16, else nothing
    KERNEL: str = "fold_both_product_kernel"

    def __post_init__(self) -> None:
        super().__post_init__()
        put = object.__setattr__
        put(self, "BLOCK_BYTES", (self.BM + self.BN) * 128 + self.SUB * self.BM * 4)
        put(self, "BARS_AT", self.SA_AT + self.STAGES * self.SUB * self.BM * 4)

    @property
    def boxes(self) -> tuple[tuple[int, int], ...]:
        """B's, those of what picks are multiplied by, and of weights in BF16."""
        which = (2, 3, 5, 7) if self.WHOLE else (2, 3, 5)
        return () if self.B_BOX & (self.B_BOX - 1) == 0 else tuple((i, self.B_BOX) for i in which)
