"""What is fixed when the Hopper FP8 prefill kernel is compiled, and the shared memory that follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ....problem import Problem

LAYOUTS = {"dense": 0, "contiguous": 1, "offsets": 2, "psum": 3, "masked": 4}
WARPGROUP_ROWS = 64     # rows of one wgmma
MAX_GROUPS = 4096       # groups that the table in shared memory holds
_BARRIER_BYTES = 8


def group_table(problem: Problem) -> int:
    """Groups that the table in shared memory holds: few sizes, so that not every number of groups compiles a kernel of its own."""
    return next(n for n in (32, 128, 512, MAX_GROUPS) if not problem.counted or n >= problem.groups)


@dataclass(frozen=True)
class Tile:
    """Passed to the kernel as one compile-time constant.

    A tile is WGM * MP * 64 rows by WGN * NP * WN columns: WGM x WGN consumer warpgroups, each with MP x NP pieces of 64 x WN.
    Triton caches a compiled kernel under this object's repr, so whatever device code reads is a field, not a property.
    """

    LAYOUT: int
    WGM: int = 2             # consumer warpgroups along M
    WGN: int = 1             # and along N
    MP: int = 1              # pieces of one warpgroup; one piece: two partial sums, wgmma k + 1 runs while k is promoted
    NP: int = 1              # and side by side
    WN: int = 128            # columns of a piece; at most one block of B's scales
    STAGES: int = 4          # slots of the ring
    KS: int = 1              # K blocks of 128 that a slot holds: fewer barriers with 2
    UNROLL: int = 4          # K blocks in a trip of the loop; a multiple of KS
    HEAD: int = 4            # K blocks before the first trip: 1 + (K / 128 - 1) mod UNROLL
    SKIP: int = 0            # empty places in a tile's first slot: (-K / 128) mod KS
    STRIP: int = 16          # tiles of M that share a strip, for L2
    CTAS: int = 1            # blocks of a persistent grid on one SM
    OUT_BUFFERS: int = 1     # staging buffers of a warpgroup for the store
    OUT_SPLIT: int = 1       # a 64-row piece is stored in this many parts along N, 1 or 2: less staging
    OUT_BYTES: int = 2       # bytes of an output element
    GROUPS: int = 32         # power of two, at least the number of groups
    A_SCALE_TMA: bool = True  # A's scales are FP32 and MN-major: TMA brings them; else plain loads, any layout or E8M0
    ZERO: bool = True        # rows of padding are written as zero
    ACCUMULATE: bool = False
    STORE_TMA: bool = True   # whole tiles leave by TMA
    LATE_STORE: bool = True  # a tile is stored while the first wgmma of the next one runs
    DOUBLE: bool = False     # of several pieces: two partial sums, the next piece runs while one is promoted
    SINGLE: bool = False     # of one piece: one partial sum, as of several
    FOLD: bool = False       # B's scales are in its payload but for one a column, which the store multiplies by: `fold.py`
    FACTOR: bool = False     # and columns have factors beside
    NIBBLES: bool = False    # weights that are folded are in the order FP8_PREPACK
    SUB: int = 1             # scales of A in a K block: 1, or 4, one every 32 (several pieces, one partial sum)
    TAIL: bool = False       # of two pieces along M: where a group's last tile has rows in the first half only, so are its products
    CONSUMER_REGISTERS: int = 232
    PRODUCER_REGISTERS: int = 40
    BM: int = field(init=False)
    BN: int = field(init=False)
    CONSUMERS: int = field(init=False)
    BLOCK_BYTES: int = field(init=False)    # that TMA brings for one K block
    A_BOX: int = field(init=False)          # rows of A that one TMA brings
    B_BOX: int = field(init=False)          # rows of B: a power of two
    OUT_COLS: int = field(init=False)       # columns of one store

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "BM", self.WGM * self.MP * WARPGROUP_ROWS)
        set_(self, "BN", self.WGN * self.NP * self.WN)
        set_(self, "A_BOX", self.BM // 2 if self.TAIL else self.BM)
        set_(self, "B_BOX", self.BN if self.BN & (self.BN - 1) == 0 else self.WN)
        set_(self, "OUT_COLS", self.WN // self.OUT_SPLIT)
        set_(self, "CONSUMERS", self.WGM * self.WGN)
        set_(self, "BLOCK_BYTES", (self.BM + self.BN) * 128 + (self.BM * 4 if self.A_SCALE_TMA else 0))

    @property
    def max_registers(self) -> int:
        """Registers a thread starts with. Warps come in fours: the producer's one counts as four in the register file."""
        return 168 if self.CONSUMERS == 2 else 128

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one block: an upper bound, within 256 bytes of what the compiler allocates."""
        ring = self.STAGES * (self.KS * self.BLOCK_BYTES + 2 * _BARRIER_BYTES)
        staging = self.CONSUMERS * self.OUT_BUFFERS * WARPGROUP_ROWS * self.OUT_COLS * self.OUT_BYTES
        table = 4 * self.GROUPS if LAYOUTS["offsets"] <= self.LAYOUT else 0
        captures = 256
        return ring + staging + table + captures
