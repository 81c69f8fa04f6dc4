"""Predicted time of the Hopper kernel for narrow weights on one dense product with E4M3 weights: few tiles, cut along K.

Fitted to MXFP8 products of aiter's list on an H100: docs/measured.md.
"""

from __future__ import annotations

from ....arch import Arch
from ....problem import Config, Problem
from .narrow_split import ctas_at_most, ring_steps
from .narrow_tile import CHUNK, ROWS

START = 4.5e-6              # launches, first bytes, the store
READ = 0.795                # of the bandwidth
PIECE = 1.1e-6              # a tile that is cut: its sums are left, counted, and read back
# by token columns: reading and adding four pieces of 64 rows; a chunk of 64 rows x 128 of K in an SM
FOUR = {8: 0.05e-6, 16: 0.37e-6, 32: 1.32e-6, 64: 3.11e-6}
BLOCK = {8: 0.25e-6, 16: 0.30e-6, 32: 0.41e-6, 64: 0.61e-6}
SHARED = 0.89               # of that, where two warpgroups share the tokens
LATENCY = 0.9e-6            # of a ring step, over those in flight
_POWER = 4


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds."""
    sms = min(arch.sms, problem.max_sms or arch.sms)
    steps, tiles = ring_steps(problem, config), max(1, -(-problem.m // config.block_m) * -(-problem.n // config.block_n))
    grid = min(sms * config.option("ctas", 1), ctas_at_most(tiles, steps, config))
    units = -(-tiles * steps // grid)           # ring steps of a CTA
    whole = config.option("whole") or (tiles * steps % grid == 0 and units % steps == 0)
    if config.option("whole"):
        grid = min(grid, tiles)
        units = -(-tiles // grid) * steps
    pieces = 1 if whole else min(steps, -(-grid // tiles) + 1)
    high = config.block_n // ROWS
    memory = (problem.b.format.storage_bytes(problem.n, problem.k) + 2.0 * problem.m * problem.k) / (
        arch.bandwidth * READ * sms / arch.sms)
    block = BLOCK[config.block_m] * high * (SHARED if high > 1 else 1.0)
    work = units * max((config.block_k // CHUNK) * block * max(1.0, grid / sms), LATENCY / (config.num_stages - 1))
    cut = PIECE + -(-pieces // 4) * FOUR[config.block_m] * high if pieces > 1 else 0.0
    return START + (memory**_POWER + work**_POWER) ** (1 / _POWER) + cut
