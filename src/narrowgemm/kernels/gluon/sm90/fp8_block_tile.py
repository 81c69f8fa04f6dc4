"""What is fixed when the Hopper FP8 prefill kernel is compiled, and the shared memory that follows from it."""

from __future__ import annotations

from dataclasses import dataclass

LAYOUTS = {"dense": 0, "contiguous": 1, "offsets": 2, "psum": 3, "masked": 4}
WARPGROUP_ROWS = 64     # rows of one wgmma
MAX_GROUPS = 4096       # groups that the table in shared memory holds
_BARRIER_BYTES = 8


@dataclass(frozen=True)
class Tile:
    """Passed to the kernel as one compile-time constant.

    A tile is WGM * MP * 64 rows by WGN * WN columns: WGM x WGN consumer warpgroups, each with MP pieces of 64 x WN.
    """

    LAYOUT: int
    WGM: int = 2             # consumer warpgroups along M
    WGN: int = 1             # and along N
    MP: int = 1              # 64-row pieces of one warpgroup
    WN: int = 128            # columns of one warpgroup; at most one block of B's scales
    STAGES: int = 4          # slots of the ring
    KS: int = 1              # K blocks of 128 a slot holds: fewer barriers with 2
    UNROLL: int = 4          # K blocks in a trip of the loop; a multiple of KS
    HEAD: int = 4            # K blocks before the first trip: 1 + (K / 128 - 1) mod UNROLL, less where K is shorter
    SKIP: int = 0            # empty places in a tile's first slot: (-K / 128) mod KS
    STRIP: int = 16          # tiles of M that share a strip, for L2
    CTAS: int = 1            # blocks of a persistent grid on one SM
    OUT_BUFFERS: int = 1     # staging buffers of a warpgroup for the store
    OUT_BYTES: int = 2       # bytes of an output element
    GROUPS: int = 32         # power of two, at least the number of groups
    A_SCALE_TMA: bool = True  # A's scales are FP32 and MN-major: TMA brings them; else plain loads, any layout or E8M0
    ZERO: bool = True        # rows of padding are written as zero
    ACCUMULATE: bool = False
    STORE_TMA: bool = True   # whole tiles leave by TMA

    @property
    def BM(self) -> int:
        return self.WGM * self.MP * WARPGROUP_ROWS

    @property
    def BN(self) -> int:
        return self.WGN * self.WN

    @property
    def CONSUMERS(self) -> int:
        return self.WGM * self.WGN

    @property
    def BLOCK_BYTES(self) -> int:
        """Bytes that TMA brings for one K block."""
        return (self.BM + self.BN) * 128 + (self.BM * 4 if self.A_SCALE_TMA else 0)

    @property
    def ROLLING(self) -> bool:
        """The next wgmma runs while the last one's sum is promoted: takes two partial sums in registers."""
        return self.MP == 1

    # a consumer warpgroup, the producer's warp, and what the block starts with; the register file has 64 K
    @property
    def MAX_REGISTERS(self) -> int:
        return 168 if self.CONSUMERS == 2 else 128

    @property
    def CONSUMER_REGISTERS(self) -> int:
        return 240

    @property
    def PRODUCER_REGISTERS(self) -> int:
        return 24

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one block, as the compiler allocates it."""
        ring = self.STAGES * (self.KS * self.BLOCK_BYTES + 2 * _BARRIER_BYTES)
        staging = self.CONSUMERS * self.OUT_BUFFERS * WARPGROUP_ROWS * self.WN * self.OUT_BYTES
        table = 4 * self.GROUPS if self.LAYOUT >= 2 else 0
        captures = 256
        return ring + staging + table + captures
