"""What is fixed when the Hopper FP8 decode kernel is compiled, and the shared memory and registers that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

from ....arch import Arch
from ....problem import Config, Problem
from .occupancy import CLUSTERS, max_registers, smem_budget
from .refusals import FRONTS

LAYOUT_IDS = {"dense": 0, "contiguous": 1, "offsets": 2, "psum": 3, "masked": 4}
TOKENS = (8, 16, 32, 64, 128)
MAX_SPLIT = 16
TRIPS = (1, 2, 4)
AHEADS = (4, 8, 16)
BOXES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Static:
    """What the device code is compiled for; its fields are read by `fp8_decode_device.py`."""

    LAYOUT: int
    BT: int                  # token columns
    MIDDLE: int              # token columns of a tile with so few rows; 0: none but NARROW
    NARROW: int              # and of one with fewer; 0: always BT
    BN: int                  # weight rows, 128 at most: one row of weight scales
    CONSUMERS: int           # warpgroups that share the weight rows
    PIECES: int              # wgmma that a warpgroup's weight rows take
    TRIP: int                # K blocks whose wgmma overlap with promotions; of BT columns,
    TRIP_MIDDLE: int         # of MIDDLE,
    TRIP_NARROW: int         # of NARROW
    STAGES: int
    GUESS: int               # K blocks of weights fetched before group sizes are known
    SPLIT: int               # most units a tile is cut into along K
    BOX: int                 # K blocks of a slot, whose weights are one box of TMA's
    CLUSTER: int             # blocks of a cluster; more than 1: as many units are a tile's, and no memory is between them
    W_AT: int                # boxes in front of the weights', where the rings are one allocation
    X_AT: int                # and of the tokens'
    RING_ROWS: int           # 128 bytes each, of that allocation
    STREAM: bool             # weights pass through L2, which gives them up first
    F_AT: int                # then: words of 8 bytes in front of the full slots' barriers, in that allocation
    GROUPS: int              # size of the group table, a power of two from 32
    STORE_VEC: int           # elements of 16 bytes of output
    ACCUMULATE: bool
    ZERO: bool               # rows of no group are written as zero
    KEEP: bool               # output stays in L2
    AHEAD: int               # K blocks whose scales are loaded together
    FRONT: int               # the launch in front may still be at it, and brings tokens (1), or sizes of groups too (2)
    ARRIVALS: int            # at a full slot: weights and tokens, together or apart, and scales
    LOADER_REGS: int
    CONSUMER_REGS: int


def slot_bytes(config: Config) -> int:
    """A ring slot: weights, tokens, scales, two barriers."""
    return config.option("box", 1) * ((config.block_n + config.block_m) * 128 + config.block_m * 4) + 16


def smem_bytes(problem: Problem, config: Config) -> int:
    """Shared memory of a CTA: the ring, and where consumers transpose a tile. Never less than the compiler's figure."""
    if config.option("cluster"):
        return config.num_stages * slot_bytes(config) + 512      # sums go where the ring was
    wide = problem.out_dtype == "fp32" or problem.accumulate
    transpose = config.block_m * config.block_n * 4 if wide else 2048 * (config.num_warps // 4)
    return config.num_stages * slot_bytes(config) + transpose + 256


def register_split(config: Config, table: int) -> tuple[int, int]:
    """(registers of a loader's thread, of a consumer's), with a group table of that size in each loader."""
    regs = max_registers(config)
    wide = 16 * (config.block_m == 128) * (2 if config.option("box", 1) > 1 else 1)
    wide += 2 * (config.option("ahead", AHEADS[0]) - AHEADS[0]) * (-(-config.block_m // 32) + 1)
    if config.option("ctas", 1) == 1 and config.num_warps == 4:
        wide = min(wide + 112, 144)      # alone on an SM, there are registers for everybody, up to what warps start with
    loader = min(regs, 56 + -(-wide // 8) * 8 if table <= 256 else 88 if table <= 512 else 128)
    return loader, min(232, (regs * (config.num_warps + 4) - 4 * loader) // config.num_warps // 8 * 8)


def in_workspace(config: Config) -> bool:
    """Whether partial sums go through memory."""
    return config.split_k > 1 and not config.option("cluster")


def pieces(config: Config) -> int:
    """wgmma that a consumer's weight rows take."""
    return config.block_n // (16 * config.num_warps)


def trip_of(config: Config, columns: int, registers: int) -> int:
    """K blocks of a trip of such a tile: one where there are no registers for two partial sums."""
    need = columns * (pieces(config) + 2) // 2 + columns // 4 + 44
    return config.option("trip", 1) if need <= registers else 1


def static(problem: Problem, config: Config, groups: int) -> Static:
    table = 32
    while table < groups and problem.layout in ("offsets", "psum", "masked"):
        table *= 2
    loader, consumer = register_split(config, table)
    middle, narrow = config.option("middle"), config.option("narrow")
    wide_trip, middle_trip, narrow_trip = (trip_of(config, w, consumer) for w in (config.block_m, middle, narrow))
    cluster = config.option("cluster", 1)
    front = FRONTS[problem.front] if problem.layout == "offsets" else 0
    guess = config.option("guess") if front != 1 else 0       # where groups are known there is nothing to guess
    # the larger boxes come first, so that both rings start at a multiple of their box
    stream = config.option("stream")
    together = cluster > 1 or stream
    blocks = config.num_stages * config.option("box", 1)
    w_at = blocks * config.block_m // config.block_n if together and config.block_m > config.block_n else 0
    x_at = blocks * config.block_n // config.block_m if together and not w_at else 0
    rows = blocks * (config.block_m + config.block_n)
    return Static(
        LAYOUT=LAYOUT_IDS[problem.layout], BT=config.block_m, MIDDLE=middle, NARROW=narrow, BN=config.block_n,
        CONSUMERS=config.num_warps // 4, PIECES=pieces(config), TRIP=wide_trip, TRIP_MIDDLE=middle_trip, TRIP_NARROW=narrow_trip,
        STAGES=config.num_stages, GUESS=guess, SPLIT=config.split_k, BOX=config.option("box", 1), CLUSTER=cluster, W_AT=w_at,
        X_AT=x_at, RING_ROWS=rows + (-(-config.num_stages // 16) if stream else 0), STREAM=bool(stream),
        F_AT=rows * 16 if stream else 0, GROUPS=table, STORE_VEC=16 // problem.out_bytes, ACCUMULATE=problem.accumulate,
        ZERO=problem.zeroes, KEEP=bool(config.option("keep")), AHEAD=config.option("ahead", AHEADS[0]), FRONT=front,
        ARRIVALS=3 if guess or front == 1 else 2, LOADER_REGS=loader, CONSUMER_REGS=consumer)


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run the problem, or None."""
    if (reason := _illegal_tile(config)) is not None:
        return reason
    if config.block_k != 128 or not config.swap_ab or not config.persistent:
        return "expected block_k=128, swap_ab and persistent"
    if not 1 <= config.option("ctas", 1) <= 4:
        return f"ctas={config.option('ctas', 1)}, expected 1 to 4 on an SM"
    if config.option("trip", 1) not in TRIPS:
        return f"trip={config.option('trip')}, expected one of {TRIPS} K blocks"
    if config.option("ahead", AHEADS[0]) not in AHEADS:
        return f"ahead={config.option('ahead')}, expected one of {AHEADS} K blocks"
    columns = config.block_m
    need = columns * (pieces(config) + 1 + (pieces(config) > 1)) // 2 + 40
    there = register_split(config, 32)[1]
    if need > there:
        return f"{columns} columns of sums take about {need} registers, {there} there"
    if config.option("guess") and not 0 < config.option("guess") < config.num_stages:
        return f"guess={config.option('guess')}, expected fewer than the stages"
    if config.option("stream") not in (0, 1) or (config.option("stream") and problem.layout == "dense"):
        return f"stream={config.option('stream')}, expected 1 where there are groups, or 0"
    if config.option("guess") and config.split_k > 1 and problem.layout != "dense":
        return "guess has no split_k where there are groups"
    if not 1 <= config.split_k <= MAX_SPLIT:
        return f"split_k={config.split_k}, expected 1 to {MAX_SPLIT}"
    if config.split_k > 1 and (config.option("narrow") or config.option("ctas", 1) > 2):
        return "split_k takes registers that two widths (narrow) or three CTAs on an SM don't leave"
    if config.split_k > 1 and problem.batch_invariant:
        return "split_k cuts K by the work at hand: not batch-invariant"
    if in_workspace(config) and config.option("sms") < 1:
        return "split_k needs sms=... for its workspace"
    if (reason := _illegal_cluster(problem, config)) is not None:
        return reason
    if (reason := _illegal_box(problem, config)) is not None:
        return reason
    need = smem_bytes(problem, config)
    if config.num_stages < (3 if config.option("box", 1) == 1 else 2) or need > smem_budget(config, arch):
        return f"{config.num_stages} stages take {need} bytes of shared memory; expected 3 or more that fit, 2 of several K blocks"
    return None


def _illegal_box(problem: Problem, config: Config) -> str | None:
    box, ahead = config.option("box", 1), config.option("ahead", AHEADS[0])
    if box not in BOXES:
        return f"box={box}, expected one of {BOXES} K blocks"
    if box == 1:
        return None
    if problem.n % 8 or problem.k // 128 % box:
        return f"box={box} takes weight rows by 8 and K by {128 * box}, not N = {problem.n}, K = {problem.k}"
    if ahead % box:
        return f"box={box}, ahead={ahead}, expected scales of whole boxes"
    if config.split_k > 1:
        return f"box={box} is for whole tiles, not split_k={config.split_k}"
    if config.option("stream") and (config.option("guess") or config.block_m > config.block_n):
        return f"box={box} with stream takes no guess, and no more tokens than weight rows"
    return None


def _illegal_cluster(problem: Problem, config: Config) -> str | None:
    cluster = config.option("cluster")
    if not cluster:
        return None
    if cluster not in CLUSTERS or config.split_k != cluster or cluster > config.block_m:
        return f"cluster={cluster}, split_k={config.split_k}, expected both the same of {CLUSTERS}, and no more than token columns"
    if problem.layout != "dense" or config.block_n != 64 or config.num_warps != 4 or config.option("ctas", 1) > 1:
        return "clusters take tiles of 64 weight rows of dense products, 4 warps, and an SM a block"
    if cluster > problem.k // 128:
        return f"{cluster} blocks have no K block each"
    if problem.max_sms:
        return "a cluster a tile takes as many SMs as there are"
    return None


def _illegal_tile(config: Config) -> str | None:
    consumers = config.num_warps // 4
    bt, middle, narrow = config.block_m, config.option("middle"), config.option("narrow")
    if bt not in TOKENS or narrow not in (0, *TOKENS) or narrow >= bt:
        return f"block_m={bt} and narrow={narrow}, expected two of {TOKENS} token columns, or narrow=0"
    if middle and not (0 < narrow < middle < bt and middle in TOKENS):
        return f"middle={middle}, expected one of {TOKENS} between narrow={narrow} and block_m={bt}, or 0"
    if config.num_warps not in (4, 8) or config.block_n > 128 or config.block_n // consumers not in (64, 128):
        return f"block_n={config.block_n} with {config.num_warps} warps, expected 64 or 128 weight rows for 4 warps, 128 for 8"
    return None
