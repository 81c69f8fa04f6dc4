"""Predicted time of the product at BF16's rate: clocks of an SM for its tiles, by their widths, or the bytes."""

from __future__ import annotations

import math

from ....arch import Arch
from ....problem import Config, Problem
from .narrow_model import active_experts, rows_expected, slots_expected
from .narrow_prefill_tile import WIDTHS
from .narrow_tile import CHUNK, ROWS, chunks_of, k_blocks

# fitted to 23 products on an H100: docs/measured.md
# by weights: launches, the table, the first bytes, blocks that are idle at the end
START = {"e2m1": 12.0e-6, "e4m3": 8.0e-6}
DENSE = 1.0e-6              # seen beside it on dense products of few tiles
TILE_CLOCKS = 900.0         # of a tile, beyond its K blocks
EXPAND_CLOCKS = 520.0       # of one K block of two units: no less, however few the tokens
# of the tensor cores' rate at CLOCK, by most tokens and units of a tile
RATE = {(32, 1): 0.60, (64, 1): 0.60, (64, 2): 0.605, (128, 1): 0.72, (128, 2): 0.72, (192, 1): 0.70}
NIBBLES = (1.09, 1.65)      # of the arithmetic and the expansion, where weights in the order FP8_PREPACK become BF16
# what the arithmetic of dense products with E4M3 weights takes of that: seen on an H200 at 512 tokens, not at 2048
DENSE_E4M3 = {(64, 1): 1.11, (64, 2): 1.03, (128, 1): 0.92, (128, 2): 0.86, (192, 1): 0.94}
# of the streaming rate, by most tokens: they take the place of weights in flight
EFFICIENCY = {"e2m1": {32: 0.98, 64: 0.96, 128: 0.83, 192: 0.80}, "e4m3": {32: 0.90, 64: 0.90, 128: 0.83, 192: 0.80}}
COPY = 0.95                 # of the streaming rate, in the launch in front and the one behind
CLOCK = 1.7e9
_POWER = 6                  # of the norm that arithmetic and bytes are put together with


def width(rows: float, tokens: int) -> int:
    """Columns that a tile of `rows` tokens runs at."""
    return next((p + q for p, q in WIDTHS[tokens] if p + q >= rows), tokens)


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds: tiles by their widths, experts' sizes spread as a Poisson's do; or the bytes at the streaming rate."""
    sms = min(arch.sms, problem.max_sms or arch.sms)
    units = config.block_n // ROWS
    experts, rows = active_experts(problem), rows_expected(problem)
    spread = rows**0.5 if problem.layout == "offsets" else 0.0
    sizes = [max(1.0, rows + spread * z) for z in (-1.3, -0.7, -0.3, 0.0, 0.3, 0.7, 1.3)]
    chunks, element = chunks_of(problem), problem.b.format.element
    more, expand = NIBBLES if config.option("bf16") else (1.0, 1.0)
    clocks = entries = 0.0
    for size in sizes:
        whole, rest = divmod(round(size), config.block_m)
        for columns, count in ((config.block_m, whole), (width(rest, config.block_m), rest > 0)):
            block = units / 2 * max(8 * columns / RATE[config.block_m, units // 2] * more, EXPAND_CLOCKS * expand)
            clocks += count * (k_blocks(problem) * block + TILE_CLOCKS * units / 2) / len(sizes)
            entries += count / len(sizes)
    work = experts * -(-problem.n // config.block_n)        # an expert's entries are dealt out one by one
    compute = clocks / CLOCK * max(work / sms, 1.0 / entries)
    if problem.layout == "dense":       # the tiles are known, so the last wave counts whole
        compute = clocks / CLOCK / entries * math.ceil(round(work * entries / sms, 3))
        compute *= DENSE_E4M3.get((config.block_m, units // 2), 1.0) if element == "e4m3" and problem.m <= 512 else 1.0
    total = slots_expected(problem)
    written = total * problem.n * problem.out_bytes
    weights = experts * -(-problem.n // ROWS) * chunks * ROWS * (CHUNK * problem.b.format.elem.bits / 8 + 4)
    rate = arch.bandwidth * sms / arch.sms
    memory = (weights + 2 * written + 2.0 * total * problem.k) / (rate * EFFICIENCY[element][config.block_m])
    gather = 2 * 2.0 * total * problem.k / (rate * COPY)
    combine = 3 * 4.0 * total * problem.n / (rate * COPY) if problem.epilogue.combine else 0.0
    start = START[element] + (DENSE if problem.layout == "dense" else 0.0)
    return start + (compute**_POWER + memory**_POWER) ** (1 / _POWER) + gather + combine
