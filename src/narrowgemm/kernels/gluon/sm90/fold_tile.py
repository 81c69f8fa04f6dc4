"""What is fixed when the Hopper prefill kernel with folded weights is compiled, and the shared memory that follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .fp8_block_tile import LAYOUTS, WARPGROUP_ROWS, Tile

UNIT_ROWS = 64          # weight rows of a tile of the prepack
UNIT_BYTES = 4096       # of such a tile, 128 of K
SCALE_BYTES = 512       # of its scales, 256 of K
MAX_FLAGS = 1024        # that the launch in front may raise, a program of it each
_BARRIER_BYTES = 8


@dataclass(frozen=True)
class FoldTile(Tile):
    """As the FP8 kernel's, with a second ring of 4-bit weights; one more warpgroup expands them into the first one."""

    FOLD: bool = True
    W_STAGES: int = 3        # slots of the ring of 4-bit weights
    GATE: int = 0            # 0; 1: does nothing where a flag is up; 2: where none is
    FLAGS: int = 32          # power of two, at least the number of flags
    EXPANDER_REGISTERS: int = 72
    STUB: int = 0            # rows beyond a group's last whole tile that may be worked on with it: `fold_stub_device.py`
    THREE: bool = False      # TAIL: of a tile with rows in three quarters of it the last one isn't multiplied
    QUARTERS: bool = False   # tails, and whole tiles of a last round, by quarters: `fold_quarters_device.py`
    LISTED: int = 0          # groups at most, then
    ITEMS: int = 0           # places of a block's list of tiles, then
    QUARTER: FoldTile | None = field(init=False)    # what the store of a quarter sees
    UNITS: int = field(init=False)           # 64-row tiles of the prepack
    W_BYTES: int = field(init=False)         # of weights and their scales in one slot

    def __post_init__(self) -> None:
        super().__post_init__()
        set_ = object.__setattr__
        set_(self, "UNITS", self.BN // UNIT_ROWS)
        set_(self, "W_BYTES", self.UNITS * (UNIT_BYTES + SCALE_BYTES))
        set_(self, "BLOCK_BYTES", self.BM * 128 + self.SUB * self.BM * 4)
        set_(self, "QUARTER", replace(self, QUARTERS=False, ITEMS=0, MP=1, WN=64, OUT_SPLIT=1) if self.QUARTERS else None)

    @property
    def max_registers(self) -> int:
        """Registers a thread starts with: two consumers, the expander, and the producer's warp, which counts as four."""
        return 128

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one block: an upper bound."""
        ring = self.STAGES * (self.BLOCK_BYTES + self.BN * 128 + 2 * _BARRIER_BYTES)
        weights = self.W_STAGES * (self.W_BYTES + 2 * _BARRIER_BYTES)
        staging = self.CONSUMERS * self.OUT_BUFFERS * WARPGROUP_ROWS * self.OUT_COLS * self.OUT_BYTES
        table = 16 * self.ITEMS or (4 * self.GROUPS if LAYOUTS["offsets"] <= self.LAYOUT else 0)
        captures = 768
        return ring + self.STAGES * self.STUB * (128 + 4) + weights + staging + table + captures
