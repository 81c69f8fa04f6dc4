"""What is fixed when a Hopper FP8 kernel with row-wise or tensor-wise scales is compiled, and its shared memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from .fp8_block_tile import LAYOUTS, WARPGROUP_ROWS

OUT_COLS = 64           # columns of one store
_BARRIER_BYTES = 8


@dataclass(frozen=True)
class Tile:
    """Passed to the kernel as one compile-time constant.

    A tile is WGM * MP * 64 rows by WGN * (COLS0 + COLS1) columns: WGM x WGN consumer warpgroups, each with one wgmma of COLS0
    columns and, where COLS1 is not 0, one of COLS1. Triton caches a compiled kernel under this object's repr, so whatever
    device code reads is a field, not a property.
    """

    LAYOUT: int
    WGM: int = 2             # consumer warpgroups along M
    WGN: int = 1             # and along N
    COLS0: int = 128         # columns of a warpgroup's first wgmma
    COLS1: int = 0           # and of its second, 0: there is none
    STAGES: int = 4          # slots of the ring, a K block of 128 each
    PROMOTE: int = 4         # K blocks that are summed by the tensor core alone; 0: all of them
    STRIP: int = 16          # tiles of M that share a strip, for L2
    OUT_BUFFERS: int = 1     # staging buffers of a warpgroup for the store
    OUT_BYTES: int = 2       # bytes of an output element
    GROUPS: int = 32         # power of two, at least the number of groups
    A_ROWS: bool = True      # A has a scale a row, else one for all
    B_ROWS: bool = True      # B has a scale a row (a column of the output), else one a group
    BLOCKS: bool = False     # both have a scale a row and K block of 128 (k_grouped)
    ZERO: bool = True        # rows of padding are written as zero
    ACCUMULATE: bool = False
    STORE_TMA: bool = True   # whole tiles leave by TMA
    SPLIT: bool = False      # weight gradient: long tiles are cut into chunks along K
    BLOCK_K: int = 128       # elements of K in a block
    TABLES: int = 1          # tables of GROUPS integers
    MP: int = 1              # pieces of 64 rows of a warpgroup, one after another with one partial sum: BLOCKS alone
    A_SCALE_TMA: bool = False  # for the schedule: tiles start where their group does
    CONSUMER_REGISTERS: int = 232
    PRODUCER_REGISTERS: int = 40
    BM: int = field(init=False)
    BN: int = field(init=False)
    WN: int = field(init=False)             # columns of a warpgroup
    CONSUMERS: int = field(init=False)
    BLOCK_BYTES: int = field(init=False)    # that TMA brings for one K block
    OUT_COLS: int = field(init=False)
    ADD_TMA: bool = field(init=False)       # whole tiles are added to the output in L2: FP32, which TMA adds as the kernel would

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "BM", self.WGM * self.MP * WARPGROUP_ROWS)
        set_(self, "WN", self.COLS0 + self.COLS1)
        set_(self, "BN", self.WGN * self.WN)
        set_(self, "OUT_COLS", OUT_COLS)
        set_(self, "ADD_TMA", self.ACCUMULATE and self.STORE_TMA and self.OUT_BYTES == 4)
        set_(self, "CONSUMERS", self.WGM * self.WGN)
        set_(self, "BLOCK_BYTES", (self.BM + self.BN) * (128 + (4 if self.BLOCKS else 0)))

    @property
    def max_registers(self) -> int:
        """Registers a thread starts with. Warps come in fours: the producer's one counts as four in the register file."""
        return 168 if self.CONSUMERS == 2 else 128

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one block: an upper bound, within 256 bytes of what the compiler allocates."""
        ring = self.STAGES * (self.BLOCK_BYTES + 2 * _BARRIER_BYTES)
        staging = self.CONSUMERS * self.OUT_BUFFERS * WARPGROUP_ROWS * OUT_COLS * self.OUT_BYTES
        table = 4 * self.GROUPS * self.TABLES if LAYOUTS["offsets"] <= self.LAYOUT else 0
        captures = 256
        return ring + staging + table + captures
