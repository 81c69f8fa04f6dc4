"""Predicted time of the Hopper FP8 decode kernel. Constants are fitted to an H200's times of 26 cases in 12 configs each.

Tiles go over the CTAs in waves. A wave ends when memory has delivered its bytes and the SM with the most work has taken its
share in: an SM takes tokens in again with every tile of weights, and no faster than what it has in flight per latency.
"""

from __future__ import annotations

from ....arch import Arch
from ....problem import Config, Problem
from .fp8_decode_tile import ITEMSIZE, extra

START = 3.7e-6               # launch, schedule, first bytes, drain
DEPENDENT = -0.5e-6          # less of it where the sum of the partial sums is launched ahead
STEP = 0.12e-6               # of one K block of 64 weight rows, in one warpgroup, however narrow
EPILOGUE = 0.2e-9            # of a tile's sum, from registers to memory at the end of all
SUM_SECONDS = 2.0e-6         # the kernel that adds partial sums
SEGMENTS_SECONDS = 1.0e-6    # listing 1024 rows of m_indices
EFFICIENCY = 0.93            # of the peak bandwidth
INTAKE = 105e9               # bytes/s that one SM takes in
LATENCY = 0.75e-6
WIDE = 1.18                  # 128 token columns: their sums leave no registers to run ahead in
WRITE = 2                    # a byte written among reads costs so many read,
WRITE_KEPT = 1               # and so many where it is kept in L2
INSURANCE = 0.01             # what it is worth that a group of many times the expected size costs few passes over its weights
SPREAD = (0.7, 0.85, 1.0, 1.15, 1.3)          # groups' sizes over the expected one


def expected_rows(problem: Problem) -> int:
    return max(1, problem.m if problem.layout == "dense" else problem.rows)


def pieces(problem: Problem, config: Config) -> tuple[float, float]:
    """Expected (tiles of rows, token columns that they take in) of a group that has rows."""
    rows, bt, narrow = expected_rows(problem), config.block_m, extra(config, "narrow")
    if problem.layout == "contiguous":
        rows = max(1, rows * 3 // 4)        # the rest is padding
    count = columns = 0
    sizes = [rows] if problem.layout == "dense" or rows == 1 else [max(1, round(rows * x)) for x in SPREAD]
    for size in sizes:
        whole, rest = divmod(size, bt)
        count += whole + (rest > 0)
        columns += whole * bt + (0 if not rest else narrow if rest <= narrow else bt)
    return count / len(sizes), columns / len(sizes)


def passes(problem: Problem, config: Config) -> float:
    """How often a group that is far larger than expected is gone through, over the best that can be, 0 to 1. A masked
    layout's expected size is its caller's word, so twice that is enough there."""
    most = min(128, problem.m)
    if problem.layout == "dense" or config.block_m >= (min(64, most) if problem.layout == "masked" else most):
        return 0.0
    return 1 - config.block_m / most


def tiles_expected(problem: Problem, config: Config) -> int:
    count, _ = pieces(problem, config)
    return max(1, round(problem.active_groups * count)) * -(-problem.n // config.block_n)


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds."""
    sms = min(arch.sms, problem.max_sms or arch.sms)
    ctas = sms * extra(config, "ctas", 1)
    count, columns = pieces(problem, config)
    tiles = tiles_expected(problem, config)
    k_blocks = problem.k // 128
    split = max(1, min(config.split_k, ctas // tiles))
    units, k_blocks = tiles * split, -(-k_blocks // split)
    size = config.block_n * columns / count
    written = problem.active_groups * expected_rows(problem) * problem.n * ITEMSIZE[problem.out_dtype]
    read = (problem.bytes + ((WRITE_KEPT if extra(config, "keep") else WRITE) - 1) * written) / units
    slot = (config.block_n + columns / count) * 128
    alone = min(INTAKE, config.num_stages * slot / LATENCY)

    def wave(n: int) -> float:
        memory = n * read / (arch.bandwidth * EFFICIENCY)
        intake = k_blocks * slot * max(-(-n // sms) / INTAKE, 1 / alone)
        step = k_blocks * STEP * config.block_n / (16 * config.num_warps)
        return max((memory**3 + intake**3) ** (1 / 3), step)

    seconds = START + EPILOGUE * size + units // ctas * wave(ctas) + (wave(units % ctas) if units % ctas else 0.0)
    if extra(config, "pdl"):
        seconds += DEPENDENT
    if split > 1:
        # partial sums are written and read, mostly in L2
        seconds += SUM_SECONDS + units * size * 8 / (arch.bandwidth * 1.2)
    if problem.layout == "contiguous":
        seconds += SEGMENTS_SECONDS * -(-problem.m // 1024)
    if config.block_m == 128 and not extra(config, "narrow"):
        seconds *= WIDE
    return seconds * (1 + INSURANCE * passes(problem, config))
