"""Predicted time of the Hopper FP8 decode kernel. Constants are fitted to times of an H200 and an H100.

Tiles go over the CTAs in waves. A wave ends when memory has delivered its bytes and the SM with the most work is done: an
SM takes weights and tokens in no faster than so many bytes a second, multiplies at the tensor cores' rate, and a CTA alone
can't go faster than what it has in flight per latency, nor than the steps of one K block that follow each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from ....arch import Arch
from ....problem import Config, Problem, middle
from .few_model import SPREAD, few, insured
from .fp8_decode_tile import pieces as pieces_of
from .fp8_decode_tile import register_split, trip_of

START = 3.5e-6               # launch, schedule, first bytes, drain
TABLE = 1.0e-6               # group sizes are read and added up before the first byte
FETCHED = 0.6e-6             # less of it where the first weights are fetched on a guess
EARLY = 0.4e-6               # less of START where those of a dense product are fetched before the warps part
EPILOGUE = 0.24e-9           # of an element of the last tile, from registers to memory
CUT_SECONDS = 1.3e-6         # of a product that is cut along K, what memory's time doesn't hide,
LAST_SECONDS = 1.8e-6        # and what it may: the last unit of a tile finds out that it is,
ADD_SECONDS = 6e-9           # and adds partial sums, for each column of each of them
CLUSTER_START = 0.8e-6       # of one that a cluster's blocks share: until they know of each other,
CLUSTER_SECONDS = 0.8e-6     # the wait for all sums, reading them,
CLUSTER_ADD_SECONDS = 8e-9   # for each column
SEGMENTS_SECONDS = 0.8e-6    # listing 1024 rows of m_indices
EFFICIENCY = 0.926           # of the peak bandwidth,
BOXED = 0.937                # where weights come by several K blocks,
THROUGH = 0.95               # and of the time where those pass through L2: 0.89-0.97 of layers of 1-16 tokens on an H100
COLD = 0.36                  # of the time for the first COLD_BYTES, that reading them takes longer
COLD_BYTES = 60e6
INTAKE = 114e9               # bytes/s that one SM takes in
L2_RATE = 9.2e12             # and all of them together, where every tile of tokens reads the weights again
LATENCY = 0.84e-6
DENSE_LATENCY = 1.5e-6       # of a dense product, by its times on rings of 6 and of 13 stages
STEP = 0.108e-6              # of one K block in a consumer: barriers, first wgmma to last
PROMOTE = 0.33e-9            # of one column of one piece: wgmma and its promotion, one after the other,
DENSE_PROMOTE = 1.6e-9       # and of a dense product: 191, 232 and 312 clocks a K block at 8, 32 and 64 columns
AHEAD = 0.8                  # of both, where they overlap within a trip
SHARP = 7                    # how sharply the longest of several limits takes over


class Tiles(NamedTuple):
    """Tiles of rows of one width: how many, and their token columns."""

    number: float
    columns: int


def expected_rows(problem: Problem) -> int:
    return max(1, problem.m if problem.layout == "dense" else problem.rows)


def width(config: Config, rows: int) -> int:
    """Token columns of a tile with so many rows."""
    return next((w for w in (config.option("narrow"), config.option("middle")) if rows <= w), config.block_m)


def tiles_of(config: Config, sizes: Iterable[int], each: float) -> list[Tiles]:
    """Tiles of rows of groups of these sizes, `each` of every size."""
    found: dict[int, float] = {}
    for rows in sizes:
        whole, rest = divmod(rows, config.block_m)
        if whole:
            found[config.block_m] = found.get(config.block_m, 0.0) + whole * each
        if rest:
            columns = width(config, rest)
            found[columns] = found.get(columns, 0.0) + each
    return [Tiles(count, columns) for columns, count in sorted(found.items(), reverse=True)]


@lru_cache(maxsize=4096)
def expected_tiles(problem: Problem, config: Config) -> tuple[Tiles, ...]:
    rows = expected_rows(problem)
    if problem.layout == "contiguous":
        rows = max(1, rows * 3 // 4)        # the rest is padding
    elif problem.layout != "dense" and problem.layout != "masked" and rows > 8:
        rows = middle(rows)
    even = problem.layout == "dense" or rows == 1
    most = problem.m if problem.layout == "masked" else rows * 2      # a masked group holds no more
    sizes = [rows] if even else [min(most, max(1, round(rows * x))) for x in SPREAD]
    return tuple(tiles_of(config, sizes, problem.active_groups / len(sizes)))


def tiles_expected(problem: Problem, config: Config) -> int:
    return max(1, round(sum(t.number for t in expected_tiles(problem, config)))) * -(-problem.n // config.block_n)


def block_seconds(config: Config, columns: int, ctas: int, arch: Arch, dense: bool) -> float:
    """One K block of a tile in each of `ctas` CTAs on an SM."""
    pieces = pieces_of(config)
    consumers = config.num_warps // 4
    taken = ctas * (config.block_n + columns) * 128 / INTAKE
    # wgmma of 64 x columns x 128: bound by its product, or by reading both operands from shared memory, 128 bytes a clock
    clock = arch.fp8_flops / arch.sms / 8192
    wgmma = ctas * consumers * pieces * max(2 * columns, 64 + columns) / clock
    trip = trip_of(config, columns, register_split(config, 32)[1]) if dense else config.option("trip", 1)
    chain = (STEP + pieces * columns * (DENSE_PROMOTE if dense else PROMOTE)) * (AHEAD if trip * config.option("box", 1) > 1 else 1)
    ahead = config.num_stages * config.option("box", 1)
    return longest(taken, (DENSE_LATENCY if dense else LATENCY) / ahead, wgmma, chain)


def longest(*seconds: float) -> float:
    return sum(s**SHARP for s in seconds) ** (1 / SHARP)


def tiles_seconds(problem: Problem, config: Config, arch: Arch, tiles: Iterable[Tiles], read: float) -> float:
    """Every tile of these over the grid. `read`: bytes through memory in all."""
    sms = min(arch.sms, problem.max_sms or arch.sms)
    per_sm = config.option("ctas", 1)
    ctas = sms * per_sm
    blocks_n = -(-problem.n // config.block_n)
    tiles = list(tiles)
    total = max(1, round(sum(t.number for t in tiles) * blocks_n))
    cluster = config.option("cluster", 1)
    split = cluster if cluster > 1 else max(1, min(config.split_k, ctas // total))
    k_blocks = -(-problem.k // 128 // split)
    dense = problem.layout == "dense"
    units = total * split

    # dense products were not seen to meet this limit: twice their weights come from L2 at more than that
    taken = 0.0 if dense else sum(t.number * (config.block_n + t.columns) for t in tiles) * blocks_n * problem.k

    efficiency = BOXED if config.option("box", 1) > 1 else EFFICIENCY

    def wave(n: int, columns: float) -> float:
        on_one = min(per_sm, -(-n // sms))
        memory = n / units * max(read / (arch.bandwidth * efficiency), taken / L2_RATE)
        last = 0.0
        if cluster > 1:
            last = CLUSTER_SECONDS + CLUSTER_ADD_SECONDS * columns
        elif split > 1:
            last = LAST_SECONDS + ADD_SECONDS * split * columns
        return longest(memory, k_blocks * block_seconds(config, round(columns), on_one, arch, dense) + last)

    columns = sum(t.number * t.columns for t in tiles) / sum(t.number for t in tiles)
    seconds = units // ctas * wave(ctas, columns) + (wave(units % ctas, columns) if units % ctas else 0.0)
    if cluster > 1:
        seconds += CLUSTER_START
    elif split > 1:
        # partial sums are written and read, mostly in L2
        seconds += CUT_SECONDS + units * config.block_n * columns * 8 / (arch.bandwidth * 1.2)
    seconds += COLD * min(read, COLD_BYTES) / arch.bandwidth
    return seconds + EPILOGUE * config.block_n * columns / cluster


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds, with what is lost where few groups have all the rows."""
    seconds, fewer = of_spread(problem, config, arch), few(problem)
    return insured(seconds, of_spread(fewer, config, arch), fewer, arch) if fewer else seconds


def of_spread(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds with the expected sizes of groups."""
    seconds = fixed(problem, config) + tiles_seconds(problem, config, arch, expected_tiles(problem, config), problem.bytes)
    return seconds * (THROUGH if config.option("box") and config.option("stream") else 1.0)


def fixed(problem: Problem, config: Config) -> float:
    seconds = START
    if problem.layout == "contiguous":
        seconds += SEGMENTS_SECONDS * -(-problem.m // 1024)
    if problem.layout != "dense":
        seconds += TABLE - (FETCHED if config.option("guess") else 0.0)
    elif config.option("guess"):
        seconds -= EARLY
    return seconds
