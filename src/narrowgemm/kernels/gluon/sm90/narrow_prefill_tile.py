"""What is fixed when the Hopper prefill kernel for narrow weights is compiled, and the shared memory that follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field

UNIT_ROWS = 64          # weight rows of one wgmma, and of a tile of the prepack
SCALE_BYTES = 512       # of 64 rows x 256 of K
# token columns of a tile, by the most that there are: the narrowest pair that holds its tokens, a wgmma for each of the two
WIDTHS = {
    32: ((16, 0), (32, 0)),
    64: ((32, 0), (32, 16), (64, 0)),
    128: ((32, 0), (64, 0), (64, 32), (128, 0)),
    192: ((32, 0), (64, 0), (64, 32), (128, 0), (128, 16), (128, 32), (128, 64)),
}
# the same of FP8 tokens
FP8_WIDTHS = {
    32: ((8, 0), (16, 0), (32, 0)),
    64: ((16, 0), (32, 0), (32, 16), (64, 0)),
    128: ((32, 0), (64, 0), (64, 32), (128, 0)),
}
# widths that are one wgmma of a multiple of 16 columns, by the most tokens. Each has code of its own, the store included: 256x144
# is 0.6 to 3.7% faster without 48 and 80
COLUMNS = {
    96: (32, 48, 64, 80, 96),
    80: (32, 48, 64, 80),
    144: (32, 64, 96, 112, 128, 144),
    160: (32, 64, 80, 96, 112, 128, 144, 160),
    288: (64, 128, 160, 192, 224, 240, 256, 272, 288),
}
BOXES = (8, 16, 32, 64, 128)    # tokens of a TMA box
RATIO_BYTES = 16                # of a token in one slot: a number four times, the least that TMA moves
_BARRIER_BYTES = 8



def columns(tokens: int) -> tuple[tuple[int, int], ...]:
    """COLUMNS as widths of one piece."""
    return tuple((p, 0) for p in COLUMNS[tokens])


@dataclass(frozen=True)
class Tile:
    """Passed to the kernel as one compile-time constant.

    A tile is BN weight rows by up to BT tokens: two or three consumer warpgroups, each with MP units of 64 rows. Triton caches a
    compiled kernel under this object's repr, so whatever device code reads is a field, not a property.
    """

    BT: int = 128            # most tokens of a tile: a key of WIDTHS, FP8_WIDTHS or COLUMNS
    MP: int = 1              # 64-row units of one consumer
    STAGES: int = 4          # slots of the ring, each 128 of K
    UNROLL: int = 2          # K blocks in a trip of the loop
    REST: int = 0            # K blocks left over: their number mod UNROLL
    E4M3: bool = False       # weights E4M3, else E2M1
    SLOTS: bool = False      # positions are mapped to rows of the output, else they are the rows
    FACTOR: bool = False     # weight rows have factors
    XFACTOR: bool = False    # tokens have factors
    PAIR: int = 0            # how gate and up lie in the logical rows: see narrow_epilogue_device
    ACT: int = 0
    ALPHA: float = 0.0
    LIMIT: float = 0.0
    BIAS: bool = False
    WEIGHT: bool = False     # routing weights
    CHUNKED: bool = False    # tokens have FP32 scales, one for 128 of K: sums are rescaled from one to the next
    DOUBLE: bool = False     # tokens are FP16: two K blocks of BF16 for each of the weights
    FP8: bool = False        # tokens are FP8, weights packed for that: see narrow_fp8_device
    NIBBLES: bool = False    # weights that become BF16 are in the order FP8_PREPACK
    TWO: bool = False        # those are BF16 tokens, each the sum of two E4M3 numbers
    OUT_BYTES: int = 2
    OUT_TOKENS: int = 32     # tokens that a consumer stages at once for the store
    CTAS: int = 1            # blocks of an SM
    AHEAD: bool = False      # starts while the launch in front runs: entries are found by the block itself
    LAYOUT: int = 0          # of `fp8_block_tile.LAYOUTS` then
    GROUPS: int = 32         # a power of two, no less than the groups
    CONSUMER_REGISTERS: int = 232
    PRODUCER_REGISTERS: int = 40
    ROW: bool = False        # tokens are FP8 with one scale, applied at the end
    CONSUMERS: int = 2       # warpgroups that multiply
    COLUMNS: bool = False    # FP8 tokens in widths of COLUMNS: see narrow_columns_device
    BOX: int = 1             # K blocks of a slot, whose weights are one box of TMA
    BY_K: bool = False       # tokens' scales lie K block by K block in memory, else position by position
    STREAM: bool = False     # weights pass through L2, which gives them up first
    CHAIN: bool = False      # COLUMNS: sums of two K blocks go on in units of the second one's scale: see narrow_columns_device
    BOTH: int = 0            # COLUMNS: up to so many each unit of a consumer has sums of its own for products
    PIECE: int = 0           # consumers multiply in no order, products of so many columns at most; 0: in turns, all columns
    RING: bool = field(init=False)           # weights' slots, the largest allocation, are at the start of shared memory
    TOLD_AT: int = field(init=False)         # bytes in front of what is told of tiles, behind slots at the start of shared memory
    F_AT: int = field(init=False)            # RING: words of 8 bytes in front of the weights' barriers, in their allocation
    BN: int = field(init=False)
    UNITS: int = field(init=False)
    BOX_UNITS: int = field(init=False)       # units that one TMA brings: a power of two
    WIDTHS: tuple[tuple[int, int], ...] = field(init=False)
    T0: int = field(init=False)              # most tokens of a pair's first and second piece
    T1: int = field(init=False)
    X_BOXES: int = field(init=False)         # COLUMNS: 16 tokens x 128 of K each, more than any other allocation has, and one
    XT: int = field(init=False)              # COLUMNS: tokens that a slot has room for
    FT: int = field(init=False)              # COLUMNS: tokens whose scales a slot has room for
    TP: int = field(init=False)              # BT up to a power of two
    SCALES: bool = field(init=False)         # tokens' scales, or ratios of them, come beside their K blocks
    FEATURES: int = field(init=False)        # of the output that a unit gives
    WEIGHT_ROWS: int = field(init=False)     # 1024-byte rows of a unit in one slot
    WEIGHT_BYTES: int = field(init=False)    # of weights and scales in one slot

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "UNITS", self.CONSUMERS * self.MP)
        set_(self, "BN", self.UNITS * UNIT_ROWS)
        set_(self, "BOX_UNITS", self.UNITS if self.CONSUMERS == 2 else 1)
        set_(self, "WIDTHS", columns(self.BT) if self.COLUMNS else (FP8_WIDTHS if self.FP8 else WIDTHS)[self.BT])
        set_(self, "T0", max(w[0] for w in self.WIDTHS))
        set_(self, "T1", max(w[1] for w in self.WIDTHS))
        set_(self, "XT", -(-self.BT // 32) * 32)
        set_(self, "FT", -(-self.BT // 64) * 64)
        set_(self, "TP", 1 << (self.BT - 1).bit_length())
        set_(self, "SCALES", self.CHUNKED or (self.FP8 and not self.ROW))
        set_(self, "FEATURES", 32 if self.ACT else 64)
        set_(self, "WEIGHT_ROWS", 8 if self.E4M3 else 4)
        set_(self, "X_BOXES", self.STAGES * self.BOX * max(self.XT // 16, self.UNITS * self.WEIGHT_ROWS // 2) + 1)
        # of two rings of one size the tokens' is first where weights become BF16: TMA in PTX, which RING takes, cost 2-3% there
        larger = self.token_ring <= self.weight_ring if self.FP8 else self.token_ring < self.weight_ring
        set_(self, "RING", not self.COLUMNS and larger)
        set_(self, "F_AT", self.STAGES * self.UNITS * self.BOX * self.WEIGHT_ROWS * 128 if self.RING else 0)
        tokens = self.STAGES * self.BOX * (self.XT if self.COLUMNS else self.T0) * self.token_bytes
        set_(self, "TOLD_AT", 8 * self.F_AT + 128 if self.RING else tokens)
        set_(self, "WEIGHT_BYTES", self.UNITS * (self.BOX * self.WEIGHT_ROWS * 1024 + SCALE_BYTES))

    @property
    def token_bytes(self) -> int:
        """Of 128 of K."""
        return 128 if self.FP8 and not self.TWO else 256

    @property
    def max_registers(self) -> int:
        """Registers a thread starts with. Warps come in fours: the producer's one counts as four in the register file."""
        return 80 if self.CTAS == 2 else 168 if self.CONSUMERS == 2 else 128

    @property
    def token_ring(self) -> int:
        """Bytes of a K block's tokens in their larger ring."""
        return max(self.XT if self.COLUMNS else self.T0, self.T1) * self.token_bytes

    @property
    def weight_ring(self) -> int:
        """Bytes of a K block's weights."""
        return self.UNITS * self.WEIGHT_ROWS * 1024

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: an upper bound."""
        most = max(self.XT, 8 * self.UNITS * self.WEIGHT_ROWS) if self.COLUMNS else self.T0 + self.T1
        tokens = self.BOX * most * self.token_bytes
        tokens += self.BOX * ((self.FT if self.COLUMNS else self.T0) + self.T1) * (RATIO_BYTES if self.SCALES else 0)
        ring = self.STAGES * (self.WEIGHT_BYTES + tokens + 3 * _BARRIER_BYTES) + (1024 if self.RING else 2048)
        staging = self.CONSUMERS * self.OUT_TOKENS * self.FEATURES * self.OUT_BYTES
        vectors = self.CONSUMERS * self.TP * 4 * (self.SLOTS + self.XFACTOR + self.WEIGHT)
        return ring + staging + vectors + (4 * self.GROUPS if self.AHEAD else 0) + 1024
