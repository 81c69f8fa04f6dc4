"""In how many pieces the Hopper kernel for narrow weights cuts a tile along K where a product has few tiles.

Without a limit every CTA that fits takes a stretch, to one step of a tile: 24 pieces of a 64 x 64 tile are 393 KB of FP32 sums,
which one CTA reads back and adds. `deep` is the fewest steps of K a CTA takes; the grid is so much smaller.
"""

from __future__ import annotations

from dataclasses import replace

from ....arch import Arch
from ....problem import Config, Problem
from .narrow_tile import CHUNK, chunks_of

PIECES = (8, 4)


def ring_steps(problem: Problem, config: Config) -> int:
    return -(-chunks_of(problem) // (config.block_k // CHUNK))


def ctas_at_most(tiles: int, steps: int, config: Config) -> int:
    """CTAs that `tiles` tiles of `steps` ring steps are for."""
    return tiles * -(-steps // config.option("deep", 1))


def splits(problem: Problem, config: Config, arch: Arch) -> list[Config]:
    """`config` with tiles cut in fewer pieces, where the grid would cut them in more."""
    if problem.layout != "dense" or config.option("whole"):
        return []
    steps = ring_steps(problem, config)
    tiles = -(-problem.m // config.block_m) * -(-problem.n // config.block_n)
    grid = min(arch.sms, problem.max_sms or arch.sms) * config.option("ctas", 1)
    found = {}
    for pieces in PIECES:
        deep = -(-steps // pieces)
        c = replace(config, extra=tuple(sorted((*config.extra, ("deep", deep)))))
        if deep > 1 and ctas_at_most(tiles, steps, c) < min(grid, tiles * steps):
            found[deep] = c
    return list(found.values())
