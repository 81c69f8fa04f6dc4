"""What is fixed when the Hopper kernel for narrow weights is compiled, and the shared memory and workspace that follow."""

from __future__ import annotations

from dataclasses import dataclass

from ....arch import Arch
from ....prepack_bits import FP8_PREPACK
from ....problem import Config, Problem
from .occupancy import smem_budget

KINDS = {"dense": 0, "offsets": 1, "masked": 2, "routed": 3, "contiguous": 4, "psum": 5}
PAIR_IDS = {"": 0, "halves": 1, "interleaved": 2}
ACT_IDS = {"": 0, "swiglu": 1, "swiglu_oai": 2}
TOKENS = (8, 16, 32, 64)
ROWS = 64                    # weight rows of a packed tile
CHUNK = 128                  # of K
TABLE_HEAD = 16              # int32 in front of the expert table: [0] is the number of its entries
TAKEN = 1                    # of those, how many tiles were taken by number
MAX_CTAS = 1024


@dataclass(frozen=True)
class Static:
    """What the device code is compiled for; its fields are read by `narrow_device.py`."""

    E4M3: bool               # weights E4M3, else E2M1
    BT: int                  # token columns
    ROWS: int                # weight rows of a tile, 64 or 128
    CH: int                  # chunks of 128 of K a ring stage
    STAGES: int
    EVEN: bool               # chunks are a multiple of CH, and tiles of 64 rows fill those of ROWS
    SLOTS: bool              # positions are mapped to slots, else they are slots
    FACTOR: bool             # weight rows have factors
    XFACTOR: bool            # rows of A have factors
    PAIR: int
    ACT: int
    ALPHA: float
    LIMIT: float
    BIAS: bool
    WEIGHT: bool             # routing weights
    PDL: bool
    KEEP: bool               # output stays in L2
    WIDE: bool               # 16 bytes a store, through shared memory
    XSCALE: bool = False     # sums are scaled by FP32 scales of A, one for 128 of K
    DOUBLE: bool = False     # A is FP16, the sum of two BF16 numbers, each multiplied
    DENSE: bool = False      # one expert: entries follow from the number of rows
    WAYS: int = 4            # pieces of a tile that are loaded at a time
    STREAM: bool = False     # weights pass through L2, which gives them up first
    FP8: bool = False        # weights become E4M3, tokens are two E4M3 numbers each: see narrow_fp8_device
    EARLY: bool = False      # factors, biases and routing weights are loaded ahead of a tile's products

    @property
    def CW(self) -> int:
        """Tiles of 64 x 64 bytes a stage."""
        return self.CH * (2 if self.E4M3 else 1)

    @property
    def KT(self) -> int:
        """K that such a tile holds."""
        return self.CH * CHUNK // self.CW

    # the ring in shared memory: tokens of all stages, weights, scale fields
    @property
    def W_BOX(self) -> int:
        """Tiles of ROWS x 64 bytes in front of the weights."""
        tokens = self.STAGES * self.BT * self.CH * CHUNK * (4 if self.DOUBLE else 2)
        assert tokens % (self.ROWS * 64) == 0, "a view of weights begins on one of its tiles"
        return tokens // (self.ROWS * 64)

    @property
    def S_BOX(self) -> int:
        """Fields of ROWS rows and two chunks in front of the first."""
        return (self.W_BOX + self.STAGES * self.CW) * 8

    @property
    def RING_ROWS(self) -> int:
        """Of 128 bytes."""
        return (self.S_BOX + self.STAGES * (self.CH // 2)) * self.ROWS // 16


@dataclass(frozen=True)
class PrepStatic:
    """What `narrow_prep_kernel` is compiled for."""

    KIND: int
    BT: int
    GROUPS: int              # a power of two, no less than the groups
    XKIND: int               # 0: BF16, 1: E4M3, 2: E2M1, 3: FP8 whose scales go to the product, 4: FP16
    GROUP: int               # of K, that share a scale of A
    BLOCK: int               # entries of a block (routed), a power of two no less
    LIVE: bool               # marks slots that an expert computes
    BK: int
    PDL: bool


def packed_for_fp8(problem: Problem) -> bool:
    return problem.b.prepack.partition(":")[0] == FP8_PREPACK


def in_two(problem: Problem) -> bool:
    """Whether tokens are BF16, multiplied as two E4M3 numbers each."""
    return packed_for_fp8(problem) and problem.a.format.element == "bf16"


def by_row(problem: Problem) -> bool:
    """Whether A is FP8 with an FP32 scale a row, and B packed for FP8: sums are scaled at the end."""
    a = problem.a
    return packed_for_fp8(problem) and (a.format.element, a.format.group, a.scale_dtype) == ("e4m3", (1, 0), "fp32")


def promotes(problem: Problem) -> bool:
    """Whether A has FP32 scales, one for 128 of K: a sum is scaled by them once a chunk."""
    return problem.a.format.group == (1, CHUNK) and problem.a.scale_dtype == "fp32"


def doubles(problem: Problem) -> bool:
    """Whether A is FP16, whose 11 bits are two BF16 numbers."""
    return problem.a.format.element == "fp16"


def k_blocks(problem: Problem) -> int:
    """Blocks of 128 of K that the tokens are multiplied in: FP16 ones are two BF16 numbers, a block each."""
    return chunks_of(problem) * (2 if doubles(problem) else 1)


def chunks_of(problem: Problem) -> int:
    return -(-problem.k // CHUNK)


def stage_bytes(problem: Problem, config: Config) -> int:
    """A ring stage: weights, their scales, tokens, and their FP32 scales."""
    ch = config.block_k // CHUNK
    row = (CHUNK if problem.b.format.element == "e4m3" else CHUNK // 2) + 4
    token = CHUNK * (4 if doubles(problem) else 2) + (4 if promotes(problem) else 0)
    return ch * (config.block_n * row + config.block_m * token)


def smem_bytes(problem: Problem, config: Config) -> int:
    """Shared memory of a CTA; never less than the compiler's figure."""
    itemsize = 4 if problem.epilogue.combine else problem.out_bytes
    turn = config.block_n * config.block_m * itemsize if config.option("wide") else 0
    return config.num_stages * stage_bytes(problem, config) + turn + 512


def registers(config: Config) -> int:
    """Registers a thread that let the CTAs of one SM be resident together."""
    return min(255, 65536 // (config.option("ctas", 1) * config.num_warps * 32) // 8 * 8)


def rows_expected(problem: Problem) -> int:
    """Rows of an expert that has rows."""
    return max(1, problem.m if problem.layout == "dense" else problem.rows)


def entries_at_most(problem_layout: str, slots: int, groups: int, tokens: int) -> int:
    """Entries of the expert table: (expert, at most `tokens` rows)."""
    if problem_layout == "dense":
        return -(-slots // tokens)
    if problem_layout == "masked":
        return groups * -(-slots // tokens)
    return slots // tokens + (min(groups, slots) if problem_layout in ("offsets", "psum") else slots)


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run the problem, or None."""
    if config.block_m not in TOKENS or config.block_n not in (ROWS, 2 * ROWS):
        return f"tile {config.block_m} x {config.block_n}, expected {TOKENS} token columns x {ROWS} or {2 * ROWS} weight rows"
    if problem.batch_invariant and not config.option("whole"):
        return "cuts tiles along K where the number of tiles asks for it; expected whole=1 for a batch-invariant product"
    if config.block_k not in (256, 512) or config.num_warps != config.block_n // 16 or not config.swap_ab or not config.persistent:
        return "expected block_k 256 or 512, a warp for 16 rows, swap_ab and persistent"
    ctas = config.option("ctas", 1)
    if not 1 <= ctas <= 6:
        return f"ctas={ctas}, expected 1 to 6 on an SM"
    if config.num_stages < 2 or smem_bytes(problem, config) > smem_budget(config, arch):
        return f"{config.num_stages} stages take {smem_bytes(problem, config)} bytes of shared memory; expected 2 or more that fit"
    units = -(-problem.k // config.block_k) * -(-problem.n // config.block_n)
    if units < config.num_stages - 1:
        return f"{config.num_stages} stages for {units} steps of one expert"
    need = config.block_m // 2 * (2 if config.block_m > 16 else 1) + 72 + (24 if promotes(problem) else 0)
    need += config.block_m if in_two(problem) else 0
    if need > registers(config):
        return f"{config.block_m} token columns take about {need} registers, {registers(config)} there"
    return None
