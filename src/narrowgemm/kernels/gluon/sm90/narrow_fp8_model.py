"""Predicted time of the product of FP8 tokens by weights that were packed for them: clocks of an SM for its tiles, or the bytes."""

from __future__ import annotations

import math

from ....arch import Arch
from ....problem import Config, Problem
from .narrow_model import active_experts, rows_expected, slots_expected
from .narrow_prefill_tile import COLUMNS, FP8_WIDTHS, columns
from .narrow_tile import CHUNK, ROWS, by_row, chunks_of, in_two

# fitted to 60 products on an H200: docs/measured.md
# by blocks of an SM: two launches, the table, the first bytes, blocks that are idle at the end
START = {1: 12.0e-6, 2: 11.0e-6}
# where the product starts beside the launch in front, fitted to 240 products on an H100, 22 on an H200: both launches by blocks of
# an SM, start and end of the bytes, of the streaming rate by blocks of an SM (two are 0.2 to 4% faster where bytes hold the
# product), the same in the launch in front
AHEAD_START = {1: 5.2e-6, 2: 4.7e-6}
AHEAD_BYTES, AHEAD_EFFICIENCY, AHEAD_COPY = 3.4e-6, {1: 0.96, 2: 0.98}, 0.345
MAX_GROUPS = 256            # whose entries a warp finds by itself
ALONE = 0.71                # of the clocks of a K block, where hardly any other SM is at work
LAST_WAVE = 0.35            # power of the share of blocks that are at work in the mean, by which bytes take longer
TILE_CLOCKS: dict[tuple[int, float], float] = {(288, 1): 5000.0}        # of a tile, beyond its K blocks: of others 200
# of one K block of 64 weight rows on one SM: expansion, and for each column, by most tokens and half the units. (160, 1.5) is a
# quarter more than 64 experts took on an H100: 256 of 128 rows took 13-19% more than by (160, 1). On an H200 (144, 2) took 0.93 of
# (160, 1) at 128 and 256 rows, (80, 2) 0.92 of (96, 1.5) at 64
BLOCK_CLOCKS = {(32, 1): (170.0, 2.9), (32, 2): (170.0, 2.9), (64, 1): (205.0, 3.5), (64, 2): (170.0, 2.9), (128, 1): (200.0, 3.0),
                (96, 1.5): (230.0, 2.31), (160, 1): (239.0, 2.60), (160, 1.5): (375.0, 2.30),
                (144, 2): (275.0, 1.97), (80, 2): (182.0, 2.05)}
# the same of tokens with one scale
ROW_CLOCKS = {(32, 1): (160.0, 2.6), (32, 2): (160.0, 2.6), (64, 1): (195.0, 3.0), (64, 2): (175.0, 2.7), (128, 1): (200.0, 2.5),
              (96, 1): (170.0, 2.1), (96, 1.5): (185.0, 1.7), (160, 1): (191.0, 2.06), (288, 1): (290.0, 2.06)}
# the same of BF16 tokens, two numbers each, as a factor: fitted to 40 products
TWO_CLOCKS: dict[tuple[int, float], float] = {(32, 1): 1.10, (32, 2): 1.22, (64, 1): 1.10, (64, 2): 1.27}
EFFICIENCY = 0.97           # of the streaming rate
# seen with BF16 tokens: pairs of blocks are up to 2% faster than wide ones
TWO_EFFICIENCY: dict[tuple[int, float], float] = {(32, 1): 1.0, (32, 2): 0.98}
COPY = 0.5                  # of the streaming rate, in the launch in front
CLOCK = 1.7e9
_POWER = 6                  # of the norm that arithmetic and bytes are put together with
_SPREAD = (-1.3, -0.7, -0.3, 0.0, 0.3, 0.7, 1.3)


def width(rows: float, tokens: int) -> int:
    """Columns that a tile of `rows` tokens runs at."""
    widths = columns(tokens) if tokens in COLUMNS else FP8_WIDTHS[tokens]
    return next((p + q for p, q in widths if p + q >= rows), tokens)


def starts_ahead(problem: Problem) -> bool:
    """Whether the product starts while the launch in front runs, and asks for weights: it finds its entries itself. Beside
    two numbers a token it would spill registers."""
    return not in_two(problem) and problem.layout in ("dense", "masked", "offsets") and problem.groups <= MAX_GROUPS


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds: tiles by their widths, experts' sizes spread as a Poisson's do; or the bytes at the streaming rate."""
    sms = min(arch.sms, problem.max_sms or arch.sms)
    experts, rows = active_experts(problem), rows_expected(problem)
    spread = rows**0.5 if problem.layout != "dense" else 0.0
    sizes = [max(1.0, rows + spread * z) for z in (_SPREAD if spread else (0.0, ))]
    chunks, units, ctas = chunks_of(problem), config.block_n // ROWS, config.option("ctas", 1)
    shape, two = (config.block_m, units / 2), in_two(problem)
    expand, column = (x * (TWO_CLOCKS[shape] if two else 1.0) for x in (ROW_CLOCKS if by_row(problem) else BLOCK_CLOCKS)[shape])
    bytes_ = 2.0 if two else 1.0
    clocks = entries = 0.0
    for size in sizes:
        whole, rest = divmod(round(size), config.block_m)
        for wide, count in ((config.block_m, whole), (width(rest, config.block_m), rest > 0)):
            clocks += count * ctas * (chunks * units * (expand + column * wide) + TILE_CLOCKS.get(shape, 200.0)) / len(sizes)
            entries += count / len(sizes)
    work = experts * entries * -(-problem.n // config.block_n) / (sms * ctas)
    mean = clocks / entries
    # few tiles an SM: the last round counts whole
    compute = mean / CLOCK * (math.ceil(round(work, 3)) if work < 8 else work + 0.5)
    total = slots_expected(problem)
    written = total * problem.n * problem.out_bytes
    weights = experts * -(-problem.n // ROWS) * chunks * ROWS * (CHUNK / 2 + 4)
    rate = arch.bandwidth * sms / arch.sms
    moved, tokens = weights + 2 * written + bytes_ * total * problem.k, 2.0 * bytes_ * total * problem.k
    combine = 3 * 4.0 * total * problem.n / (rate * 0.95) if problem.epilogue.combine else 0.0
    if starts_ahead(problem):
        compute *= ALONE + (1 - ALONE) * min(1.0, work * ctas)
        share = max(0.6, work / math.ceil(work)) if work < 8 else 1.0
        memory = AHEAD_BYTES + moved / (rate * AHEAD_EFFICIENCY[ctas]) * share**-LAST_WAVE
        return AHEAD_START[ctas] + _both(compute, memory) + tokens / (rate * AHEAD_COPY) + combine
    efficiency = TWO_EFFICIENCY.get(shape, EFFICIENCY) if two else EFFICIENCY
    return START[ctas] + _both(compute, moved / (rate * efficiency)) + tokens / (rate * COPY) + combine


def _both(compute: float, memory: float) -> float:
    return (compute**_POWER + memory**_POWER) ** (1 / _POWER)
