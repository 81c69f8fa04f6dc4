"""What is fixed when the Hopper FP8 kernel of a gated product is compiled."""

from __future__ import annotations

from dataclasses import dataclass, field

from .fp8_cluster_tile import BARRIERS, CONSUMERS, Tile

BLOCK = 128             # results that a scale is for: of as many columns of gate and of up


@dataclass(frozen=True)
class GatedTile(Tile):
    """As `Tile`, of 128 rows x 128 results: 256 columns of B, gate's and up's for a warpgroup's 64, then the other's.

    A piece is one wgmma of 128 columns in two tensors, gate and up, so that a thread has both of a result."""

    WGM: int = 1
    WGN: int = 2
    MP: int = 2
    NP: int = 2
    WN: int = 64
    STAGES: int = 4
    OUT_BUFFERS: int = 2
    OUT_BYTES: int = 1
    ZERO: bool = False
    KERNEL: str = "fp8_gated_kernel"
    CLAMPED: int = 0         # as `activate` has it: GPT-OSS's SwiGLU; 2: with a limit that BF16 has
    MAXIMA_AT: int = field(init=False)      # bytes to the largest magnitudes of rows: [2 turns, 2 warpgroups, 128]
    MET_AT: int = field(init=False)         # to the barrier at which both warpgroups have written theirs
    RING_ROWS: int = field(init=False)      # of 128 bytes, of all that

    def __post_init__(self) -> None:
        super().__post_init__()

        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("B_BOX", self.WN)
        put("B_SCALES", 2)
        put("MET_AT", self.BARS_AT + self.STAGES * 16)
        put("MAXIMA_AT", self.BARS_AT + BARRIERS)
        put("RING_ROWS", (self.MAXIMA_AT + 2 * CONSUMERS * self.BM * 4) // 128)

    @property
    def boxes(self) -> tuple[tuple[int, int], ...]:
        return ()

    @property
    def shared_bytes(self) -> int:
        return super().shared_bytes + 2 * CONSUMERS * self.BM * 4
