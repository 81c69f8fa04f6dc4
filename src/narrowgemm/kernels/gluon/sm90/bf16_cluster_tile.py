"""What is fixed when Hopper's dense BF16 product on clusters is compiled, and where its shared memory lies."""

from __future__ import annotations

from dataclasses import dataclass

from . import fp8_cluster_tile

BLOCK = 64              # of K: 128 bytes


@dataclass(frozen=True)
class Tile(fp8_cluster_tile.Tile):
    """As the FP8 kernel's on clusters of rows: two consumers with a piece of 64 rows each, of NP * WN columns, or of half as many.
    A slot is 64 of K, 128 bytes."""

    NP: int = 4
    STAGES: int = 4
    A_SCALE_TMA: bool = False
    B_FACTORS: bool = False  # columns have factors, as rows have
    FLAG: bool = False       # a word says where all factors are one
    KERNEL: str = "bf16_cluster_kernel"
