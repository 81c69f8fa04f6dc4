"""Predicted time of the Hopper kernel for narrow weights: the bytes of the experts that have rows, and what comes beside them."""

from __future__ import annotations

from ....arch import Arch
from ....problem import Config, Problem
from . import narrow_dense_model
from .narrow_tile import CHUNK, ROWS, in_two

START = 8.0e-6               # two launches, the table, the first bytes, the pieces' sums
COMBINE = 2.5e-6
EFFICIENCY = 0.93            # of the peak bandwidth
STEP = {"e2m1": 0.105e-6, "e4m3": 0.115e-6}       # of a chunk of 64 rows x 128 of K in one of an SM's CTAs, expansion and product
INTAKE = 105e9               # bytes/s that one SM takes in
LATENCY = 0.8e-6
FROM_L2 = {"e2m1": 0.28, "e4m3": 0.25}     # of the time that bytes take from memory
TWO_ROWS = 1.06              # BF16 tokens as two E4M3 numbers each, more than a row or two an expert


def slots_expected(problem: Problem) -> int:
    """Slots that experts of this rank get: under expert parallelism fewer than there is room for."""
    if problem.layout == "masked":
        return problem.groups * problem.rows
    return min(problem.m, problem.groups * problem.rows) if problem.layout == "offsets" and problem.rows else problem.m


def active_experts(problem: Problem) -> float:
    """Experts that get rows when slots fall evenly at random."""
    if problem.layout == "dense":
        return 1.0
    if problem.layout == "masked":
        return float(problem.groups)
    g = max(1, problem.groups)
    return max(1.0, g * (1.0 - (1.0 - 1.0 / g) ** slots_expected(problem)))


def rows_expected(problem: Problem) -> float:
    """Mean rows of an expert that has rows."""
    return max(1.0, slots_expected(problem) / active_experts(problem))


def entries_expected(problem: Problem, tokens: int) -> float:
    """Passes over an expert's weights, over all experts that have rows. Sizes spread as a Poisson's do, up to what there can be."""
    rows = rows_expected(problem)
    if problem.layout == "dense":
        return active_experts(problem) * -(-int(rows) // tokens)
    spread = rows ** 0.5
    most = float(problem.m if problem.layout == "masked" else slots_expected(problem))
    sizes = [min(most, max(1.0, rows + spread * z)) for z in (-1.3, -0.7, -0.3, 0.0, 0.3, 0.7, 1.3)]
    return active_experts(problem) * sum(-(-int(s + 0.5) // tokens) for s in sizes) / len(sizes)


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds."""
    if problem.layout == "dense" and problem.b.format.element == "e4m3":
        return narrow_dense_model.estimate(problem, config, arch)
    sms = min(arch.sms, problem.max_sms or arch.sms)
    ctas = config.option("ctas", 1)
    chunks = -(-problem.k // CHUNK)
    tiles = entries_expected(problem, config.block_m) * -(-problem.n // ROWS)
    per_chunk = ROWS * (CHUNK * problem.b.format.elem.bits / 8 + 4)
    weights = active_experts(problem) * -(-problem.n // ROWS) * chunks * per_chunk
    total = slots_expected(problem)
    written = total * problem.n * problem.out_bytes
    # A is read for every tile of weight rows, again from memory where L2 doesn't keep it beside the stream of weights. Seen on an
    # H100: 8192 rows of 7168, 16 tiles: 1.75 ms, 0.6 of it beyond the weights
    rows = 2.0 * (total // problem.a_div) * problem.k
    again = max(0.0, rows - arch.l2 / 2) * -(-problem.n // config.block_n)
    # an expert's second pass reads its weights again, from memory where L2 doesn't hold them all: 256 experts of 7168 x 2048 took
    # 1.5 ms on 16 columns with 16 rows in the mean, 0.86 with 8
    again += max(0.0, tiles * chunks * per_chunk - weights) if weights > arch.l2 else 0.0
    rate = arch.bandwidth * EFFICIENCY * sms / arch.sms
    memory = (weights + 2 * written + again) / rate
    # and where L2 does keep it, distinct rows cost, too, as many as there are tiles of 64: a tenth of the time at eight rows an
    # expert. Rows that slots share don't, nor does a tile of 128 help
    memory += FROM_L2[problem.b.format.element] * rows * -(-problem.n // ROWS) / arch.bandwidth
    taken = tiles * chunks * (per_chunk + min(config.block_m, rows_expected(problem)) * CHUNK * 2)
    flight = config.num_stages * ctas * (config.block_k // CHUNK) * (config.block_n // ROWS) * per_chunk
    intake = taken / sms / min(INTAKE, flight / LATENCY)
    math = tiles * chunks / (sms * 4) * STEP[problem.b.format.element] * max(1.0, config.block_m / 16) * max(1.0, 4 / (ctas * 2))
    seconds = START + (memory**4 + intake**4 + math**4) ** 0.25
    seconds *= 1.001 if config.option("deep") else 1.0
    if in_two(problem) and rows_expected(problem) > 1.5:    # 2 to 11% slower than the kernel for many from 64 tokens on, on an H200
        seconds *= TWO_ROWS
    return seconds + (COMBINE + 3 * written / arch.bandwidth if problem.epilogue.combine else 0.0)
