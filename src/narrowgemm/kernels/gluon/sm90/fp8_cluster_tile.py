"""What is fixed when the Hopper FP8 kernel on clusters is compiled, and where its shared memory lies."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from .fp8_block_tile import LAYOUTS, WARPGROUP_ROWS

CONSUMERS = 2
BARRIERS = 128          # bytes for the barriers of a ring of up to 8 slots
_CAPTURES = 256         # what partitions take with them, and a group table's alignment


@dataclass(frozen=True)
class Unit:
    """What the schedule sees: the tile that the blocks of a cluster share."""

    LAYOUT: int
    CLUSTER: int
    BM: int
    BN: int
    STRIP: int
    GROUPS: int
    A_SCALE_TMA: bool
    ZERO: bool
    MIX: bool


@dataclass(frozen=True)
class Tile:
    """Passed to the kernel as one compile-time constant.

    A block's part of a tile is WGM * MP * 64 rows by WGN * NP * WN columns: WGM x WGN = 2 consumer warpgroups, each with MP pieces
    of 64 rows; a piece is one wgmma of NP * WN columns, in NP tensors. Triton caches a compiled kernel under this object's repr,
    so whatever device code reads is a field, not a property.
    """

    LAYOUT: int
    WGM: int = 2             # consumer warpgroups along M
    WGN: int = 1             # and along N
    MP: int = 1              # pieces of a warpgroup
    NP: int = 3              # tensors of a piece
    WN: int = 64             # columns of one: a power of two, in one block of B's scales
    CLUSTER_M: int = 1       # blocks that share a tile, each with a part of its rows: both get B by multicast
    CLUSTER_N: int = 1       # each with a part of its columns: both get A
    STAGES: int = 5          # slots of the ring, a K block each
    STRIP: int = 16          # tiles of M that share a strip, for L2
    OUT_BUFFERS: int = 1     # staging buffers of a warpgroup for the store
    OUT_SPLIT: int = 1       # a tensor is stored in this many parts along N, 1 or 2: less staging
    OUT_BYTES: int = 2       # bytes of an output element
    GROUPS: int = 32         # power of two, at least the number of groups
    A_SCALE_TMA: bool = True  # A's scales are FP32 and MN-major: TMA brings them; else plain loads, any layout or E8M0
    ZERO: bool = True        # rows of padding are written as zero
    ACCUMULATE: bool = False
    STORE_TMA: bool = True   # whole tiles leave by TMA
    LATE_STORE: bool = False  # a tile is stored while the first wgmma of the next one runs
    MIX: bool = False        # of a dense product, three tensors a piece: tiles have three or two, see `mixed_tile`
    FOLD: bool = False       # B's scales are in its payload but for one a column, which the store multiplies by: `fold_whole.py`
    FACTOR: bool = False     # and columns have factors beside
    NIBBLES: bool = False    # weights that are folded are in the order FP8_PREPACK
    PIECE: int = 0           # K blocks of a piece of the weights of groups to come, which are expanded meanwhile; 0: none are
    GATE: int = 0            # as of `FoldTile`
    FLAGS: int = 32
    PITCH: int = 0           # rows of B that a slot has room for; 0: BN
    B_DESC: int = 0          # which of B's two descriptors
    WIDER: Tile | None = None    # the tile that is taken instead where the device finds that its rounds are shorter
    KERNEL: str = "fp8_cluster_kernel"      # whose parameters the descriptors are
    CONSUMER_REGISTERS: int = 232
    PRODUCER_REGISTERS: int = 40
    CLUSTER: int = field(init=False)        # blocks that share a tile
    BM: int = field(init=False)             # of a block
    BN: int = field(init=False)
    UNIT: Unit = field(init=False)
    STEP: int = field(init=False)           # columns that a tile's place is counted in
    BLOCK_BYTES: int = field(init=False)    # that come for one K block
    A_BOX: int = field(init=False)          # rows of A that one TMA brings: a power of two
    B_BOX: int = field(init=False)          # rows of B, any number up to 256
    OUT_COLS: int = field(init=False)       # columns of one store
    B_SCALES: int = field(init=False)       # blocks of 128 that a piece's columns may lie in
    A_AT: int = field(init=False)           # bytes from the start of shared memory, where the staging of the store is, to A's ring
    B_AT: int = field(init=False)           # to B's
    B_ROWS: int = field(init=False)         # rows of a slot of it
    SA_AT: int = field(init=False)          # to A's scales
    BARS_AT: int = field(init=False)        # to the barriers
    SA_PARAMETER: int = field(init=False)   # number, among the kernel's PTX parameters, of the descriptor of A's scales
    B_PARAMETER: int = field(init=False)    # of B's; A's is the first

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("CLUSTER", self.CLUSTER_M * self.CLUSTER_N)
        put("BM", self.WGM * self.MP * WARPGROUP_ROWS)
        put("BN", self.WGN * self.NP * self.WN)
        put("UNIT", Unit(self.LAYOUT, self.CLUSTER, self.BM * self.CLUSTER_M, self.BN * self.CLUSTER_N, self.STRIP, self.GROUPS,
                         self.A_SCALE_TMA, self.ZERO, self.MIX))
        put("STEP", self.WN if self.MIX else self.BN)
        put("A_BOX", self.BM // self.CLUSTER_N)
        put("B_BOX", self.BN // self.CLUSTER_M)
        width = self.NP * self.WN
        put("B_SCALES", -(-(128 - math.gcd(width, 128) + width) // 128))
        put("OUT_COLS", self.WN // self.OUT_SPLIT)
        put("BLOCK_BYTES", (self.BM + self.BN) * 128 + (self.BM * 4 if self.A_SCALE_TMA else 0))
        put("A_AT", CONSUMERS * self.OUT_BUFFERS * WARPGROUP_ROWS * self.OUT_COLS * self.OUT_BYTES)
        put("B_AT", self.A_AT + self.STAGES * self.BM * 128)
        put("B_ROWS", self.PITCH or self.BN)
        put("SA_AT", self.B_AT + self.STAGES * self.B_ROWS * 128)
        put("BARS_AT", self.SA_AT + (self.STAGES * self.BM * 4 if self.A_SCALE_TMA else 0))
        # a descriptor of rank r is 1 + 2 r parameters: itself, sizes, strides
        put("SA_PARAMETER", 7)
        put("B_PARAMETER", (12 if self.A_SCALE_TMA else 7) + 7 * self.B_DESC)

    @property
    def max_registers(self) -> int:
        return 168

    @property
    def boxes(self) -> tuple[tuple[int, int], ...]:
        """For `Launch.boxes`: rows of B's box, which Triton's frontend takes powers of two for."""
        which = (2 if self.A_SCALE_TMA else 1) + self.B_DESC
        own = ((which, self.B_BOX), ) if self.B_BOX & (self.B_BOX - 1) else ()
        return own + (self.WIDER.boxes if self.WIDER else ())

    def with_wider(self) -> Tile:
        """Of a tile whose slots have room for more columns: that with the wider one."""
        return replace(self, WIDER=replace(self, NP=self.PITCH // self.WN, B_DESC=1))

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one block: an upper bound, within 256 bytes of what the compiler allocates."""
        table = 4 * self.GROUPS if LAYOUTS["offsets"] <= self.LAYOUT else 0
        return self.BARS_AT + BARRIERS + table + _CAPTURES
