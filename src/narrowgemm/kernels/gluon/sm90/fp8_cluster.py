"""FP8 block-scaled GEMM on Hopper for problems with many rows, on clusters of two blocks: what `fp8_block.py` computes, by PTX
where Gluon has no words for it.

A pair of blocks shares A or B through TMA multicast, so less comes from L2; a block may also be alone. Device code:
`fp8_cluster_device.py`; what is fixed at compile time: `fp8_cluster_tile.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from ....arch import Arch
from ....problem import Config, Problem, Step
from ...launching import Launch
from ...operands import Operands
from . import fp8_block
from .few_model import few, insured
from .fp8_block import BACKEND as BACKEND
from .fp8_block_tile import LAYOUTS, group_table
from .fp8_cluster_tile import Tile
from .tensor_maps import planes, row_tiles

NAME = "gluon_sm90.fp8_cluster"


def supports(problem: Problem, arch: Arch) -> str | None:
    if problem.a.scale_major != "mn" or problem.a.scale_dtype != "fp32":
        return "takes A's scales as TMA brings them, FP32 and MN-major: plain loads beside 128 rows of sums spill registers"
    if problem.max_sms == 1:
        return "runs on pairs of SMs"
    return fp8_block.supports(problem, arch)


# ---------------------------------------------------------------- configs
# block_m x block_n of one block -> warpgroups along M and N, pieces of a warpgroup, tensors of a piece, columns of one
_SHAPES = {
    (128, 256): (1, 2, 2, 1, 128), (128, 192): (2, 1, 1, 3, 64), (128, 176): (2, 1, 1, 11, 16), (128, 144): (2, 1, 1, 9, 16),
    (128, 160): (2, 1, 1, 5, 32),
}
_EXTRA = {"cluster_m": (1, 2), "cluster_n": (1, 2), "late_store": (0, 1), "mix": (0, 1), "wider": (0, 192)}


def _config(bm: int, bn: int, stages: int, strip: int = 16, **extra: int) -> Config:
    return Config(bm, bn, 128, 9, stages, strip, persistent=True, extra=tuple(sorted(extra.items())))


# of one piece a warpgroup, for where waves decide; 144 columns: four tiles of 576
_DENSE = (_config(128, 256, 4, cluster_n=2), _config(128, 192, 5, 8, cluster_m=2), _config(128, 144, 6))
_GROUPED = (_config(128, 256, 4, cluster_n=2), _config(128, 256, 4), _config(128, 160, 5, wider=192))
_MIXED = _config(128, 192, 5, 8, cluster_m=2, mix=1)
_FULL = 0.8                  # of the SMs' time in whole waves of 128x256: with more, nothing is won by mixing


def configs(problem: Problem, arch: Arch) -> list[Config]:
    if problem.layout != "dense":
        return [c for c in _GROUPED if legal(problem, c, arch) is None]
    waves = -(-problem.m // 128) * -(-problem.n // 256) / min(arch.sms, problem.max_sms or arch.sms)
    mixed = (_MIXED, ) if waves < _FULL * math.ceil(waves) else ()
    return [c for c in (*_DENSE, *mixed) if legal(problem, c, arch) is None]


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run the problem, or None."""
    extra = dict(config.extra)
    for name, value in extra.items():
        if value not in _EXTRA.get(name, ()):
            return f"{name}={value!r}, expected one of {_EXTRA.get(name, 'no such option')}"
    if (config.block_m, config.block_n) not in _SHAPES or config.block_k != 128:
        return f"tile {config.block_m}x{config.block_n}x{config.block_k}, expected one of {list(_SHAPES)} by 128"
    if not config.persistent or config.split_k != 1 or config.swap_ab:
        return "the kernel is persistent, without split_k and swap_ab"
    if not 2 <= config.num_stages <= 8 or config.group_m < 1:
        return f"num_stages={config.num_stages}, group_m={config.group_m}, expected 2 to 8, and at least 1"
    cluster_n = config.option("cluster_n", 1)
    cluster = config.option("cluster_m", 1) * cluster_n
    if cluster > min(2, problem.max_sms or 2):
        return f"clusters of {cluster} blocks on {problem.max_sms or 'all'} SMs, expected two at most, and an SM for each"
    if config.option("mix") and (problem.layout != "dense" or config.block_n != 192 or problem.n <= 256 or cluster_n > 1
                             or config.option("late_store")):
        return "mix=1 is for dense products of more than 256 columns on 192, clusters of rows, stores that aren't late"
    if config.option("wider") and (problem.layout in ("dense", "contiguous") or cluster > 1 or config.block_n != 160):
        return "wider=192 is for blocks of 160 columns that are alone, and for layouts whose sizes are on the device"
    if tile_of(problem, config, arch) is None:
        return f"needs more shared memory than the {arch.smem} bytes of the device"
    return None


@lru_cache(maxsize=4096)
def tile_of(problem: Problem, config: Config, arch: Arch) -> Tile | None:
    """The compile-time constants of a legal config; None where it needs more shared memory than there is."""
    wgm, wgn, pieces, tensors, columns = _SHAPES[config.block_m, config.block_n]
    groups = group_table(problem)
    # staging of the store: as much as fits; whole tensors, or halves of their columns
    for split, buffers in ((1, pieces), (2, 2), (2, 1)) if columns == 128 else ((1, tensors), (1, 2), (1, 1)):
        tile = Tile(
            LAYOUTS[problem.layout], WGM=wgm, WGN=wgn, MP=pieces, NP=tensors, WN=columns, CLUSTER_M=config.option("cluster_m", 1),
            CLUSTER_N=config.option("cluster_n", 1), STAGES=config.num_stages, STRIP=config.group_m, OUT_BUFFERS=buffers,
            OUT_SPLIT=split, OUT_BYTES=problem.out_bytes, GROUPS=groups,
            A_SCALE_TMA=problem.a.scale_major == "mn" and problem.a.scale_dtype == "fp32",
            ZERO=problem.zeroes, ACCUMULATE=problem.accumulate,
            STORE_TMA=problem.out_aligned, LATE_STORE=bool(config.option("late_store", 0)) and not problem.accumulate,
            MIX=bool(config.option("mix", 0)), PITCH=config.option("wider", 0))
        if tile.shared_bytes <= arch.smem:
            return tile
    return None


def workspace(problem: Problem, config: Config) -> int:
    return 0


# ---------------------------------------------------------------- cost
# microseconds of one K block of 128 on one SM of an H200: where every SM is busy, and where only a few are: docs/measured.md
_BLOCK_TIMES = {(128, 256): (0.757, 0.72), (128, 192): (0.640, 0.54), (128, 176): (0.680, 0.60),
                (128, 144): (0.540, 0.46), (128, 160): (0.600, 0.50)}
# of blocks that are alone in grouped products, by columns: the two, and where more than so many waves heat the chip
_ALONE_TIMES = {256: (0.783, 0.72, 0.783), 192: (0.620, 0.56, 0.73), 160: (0.515, 0.47, 0.60)}
_MANY_WAVES = 8
_LONG, _SHORT = 4096, 1.06      # of K: with less, the start and end of more tiles outweigh what two widths save
# of a dense product
_DENSE_TIMES = {(128, 256): (0.780, 0.74), (128, 192): (0.560, 0.52), (128, 144): (0.520, 0.46)}
_LONG_WAVES, _LONG_TIMES = 6, {(128, 192): 0.630}   # of one with more waves: power holds it
_NARROW = 0.9                # of a tile of 192 columns, one of 128: its sums are one after another as well
_CLUSTER_SECONDS = 3.0e-6    # until a cluster's blocks know of each other
_ROWS = 1024                 # of a group: with fewer, what clusters save is not what holds the product
_FEWER_ROWS = 1.08


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds: waves of the tiles that clusters share, or the bytes at the streaming rate, whichever is longer, and some of the
    other. Where only the device knows the sizes of groups: the mean of equal and of spread ones, as for blocks that are alone."""
    seconds, fewer = of_spread(problem, config, arch), few(problem)
    return insured(seconds, of_spread(fewer, config, arch), fewer, arch) if fewer else seconds


class Mixture(NamedTuple):
    """Of a dense product's tiles: the first `strips` rows of them have `wide` of 192 columns each, the others two fewer, and narrow
    ones of 128 for the rest."""

    rounds: float       # of a wide tile, until the last cluster is done
    wide: int
    strips: int
    tiles: int


@lru_cache(maxsize=4096)
def mixture(m: int, n: int, rows: int, clusters: int) -> Mixture:
    """The one that clusters, which take the tiles in turn, wide ones first, are done with first."""
    num_m, units = -(-m // rows), -(-n // 64)
    found = []
    for wide in range(2, (units + 1) // 3 + 1):
        narrow = (units - 3 * wide + 1) // 2
        for strips in range(1, num_m + 1):
            wides = num_m * wide - 2 * (num_m - strips)
            total = wides + num_m * narrow + 3 * (num_m - strips)
            # of the clusters that have as many, one each
            each = [(-(-(wides - c) // clusters), -(-(total - c) // clusters)) for c in {0, wides % clusters, total % clusters}]
            found.append(Mixture(max(w + (t - w) * _NARROW for w, t in each), wide, strips, total))
    return min(found, key=lambda x: (x.rounds, x.tiles)) if found else Mixture(0.0, 0, 0, 0)


def of_spread(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds with the expected sizes of groups."""
    rows, columns = config.option("cluster_m", 1), config.option("cluster_n", 1)
    unit = replace(config, block_m=config.block_m * rows, block_n=config.block_n * columns)
    if rows * columns == 1 and problem.layout != "dense" and config.block_n in _ALONE_TIMES:
        both = [_of_alone(problem, config, arch, spread) for spread in ((False, True) if problem.counted else (False, ))]
        return sum(both) / len(both)
    works = {fp8_block.tiles(problem, unit, spread) for spread in ((False, True) if problem.counted else (False, ))}
    clusters = min(arch.sms, problem.max_sms or arch.sms) // (rows * columns)
    busy, alone = _BLOCK_TIMES[config.block_m, config.block_n]
    tile = fp8_block.TILE_SECONDS
    if problem.layout == "dense":
        busy, alone = _DENSE_TIMES.get((config.block_m, config.block_n), (busy, alone))
        tile = fp8_block.DENSE_TILE_SECONDS
        if max(works) > _LONG_WAVES * clusters:
            busy = _LONG_TIMES.get((config.block_m, config.block_n), busy)
    block = problem.k // 128 * 1e-6 * fp8_block.rate(arch)
    total = 0.0
    for work in works:
        if config.option("mix"):
            seconds = mixture(problem.m, problem.n, unit.block_m, clusters).rounds * (block * busy + tile)
        elif work <= clusters:
            seconds = block * (alone + (busy - alone) * work / clusters) + tile
        else:
            seconds = fp8_block.waves(fp8_block.Work(work), clusters) * (block * busy + tile)
        total += fp8_block.with_memory(seconds, work * rows * columns, problem, arch)
    meet = _CLUSTER_SECONDS if rows * columns > 1 else 0.0
    return (total / len(works) + meet) * (_FEWER_ROWS if problem.layout != "dense" and problem.rows < _ROWS else 1.0)


def _of_alone(problem: Problem, config: Config, arch: Arch, spread: bool) -> float:
    """Seconds of blocks that are alone; of two widths, that which the device will find the faster one."""
    sms = min(arch.sms, problem.max_sms or arch.sms)
    works = {n: fp8_block.tiles(problem, replace(config, block_n=n), spread)
             for n in (config.option("wider"), config.block_n) if n}
    n = min(works, key=lambda n: math.ceil(works[n] / sms) * n)
    busy, alone, many = _ALONE_TIMES[n]
    work, block = works[n], problem.k // 128 * 1e-6 * fp8_block.rate(arch)
    waves = work / sms
    if waves <= 1:
        seconds = block * (alone + (busy - alone) * waves) + fp8_block.TILE_SECONDS
    else:
        rounds = fp8_block.waves(fp8_block.Work(work), sms)
        seconds = rounds * (block * (many if waves > _MANY_WAVES else busy) + fp8_block.TILE_SECONDS)
    slower = (math.ceil(waves) / waves) ** fp8_block._LAST_WAVE if waves > 1 else 1.0
    seconds = fp8_block.with_memory(seconds, work, problem, arch, slower)
    return seconds * (_SHORT if len(works) > 1 and problem.k < _LONG else 1.0)


# ---------------------------------------------------------------- launch
def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    from ....arch import detect
    from . import fp8_cluster_device as device

    arch = detect(x.out.device)
    tile = tile_of(problem, step.config, arch)
    assert tile is not None, f"{step.config} is not legal for {problem}"
    tile, given = fp8_block.arguments(problem, x, tile, tile.A_BOX)
    wider = None
    if tile.PITCH:
        tile, wider = tile.with_wider(), planes(x.b.data, x.k, tile.PITCH & -tile.PITCH)
    clusters = min(problem.max_sms or arch.sms, arch.sms) // tile.CLUSTER
    grid = max(1, min(clusters, row_tiles(problem, x, tile.UNIT.BM) * -(-x.n // tile.UNIT.BN)))
    if tile.MIX:
        found = mixture(x.m, x.n, tile.UNIT.BM, clusters)
        grid = min(clusters, found.tiles)
        given = (*given[:11], found.strips, found.wide, *given[13:])     # in place of groups and their alignment
    options = {"num_warps": 4, "maxnreg": tile.max_registers}
    arguments = (*given[:3], wider, *given[3:], tile)
    return [Launch(device.fp8_cluster_kernel, (grid,), arguments, options, tile.CLUSTER, boxes=tile.boxes)]
