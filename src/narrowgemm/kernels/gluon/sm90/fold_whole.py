"""Folded MXFP4 weights that are brought to E4M3 once a call, into the workspace, for groups with so many rows that it pays: then
the FP8 kernels multiply, which have no instructions to spare for the expansion of every tile anew (`fold.py`).

All weights in a launch in front (`whole=1`), or those of the first group, and the others while the product runs (`whole=2`, on
clusters). Of few masked groups blocks that are alone take tiles of 160 or 192 columns (`wider`). Device code:
`fold_whole_device.py`, `fold_cluster_device.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ....arch import Arch
from ....prepack_bits import FP8_PREPACK
from ....problem import Config, Problem
from ...launching import Launch, Pointer
from ...operands import Operands
from . import fp8_block, fp8_cluster, fp8_cluster_tile
from .fold_tile import MAX_FLAGS, UNIT_ROWS
from .fp8_block_tile import LAYOUTS, Tile, group_table
from .tensor_maps import output, row_tiles, stride

BLOCK = 128             # of K
PROGRAM_BLOCKS = (4, 2)     # of K that a program of the launch in front takes: the most that leaves
MAX_BYTES = 1 << 31     # of the workspace, for weights
PROGRAMS = 4            # of it an SM
PIECE = 16              # that a warp takes of 16 rows at a time while the product runs
_WARPS = 9
_TILE = (128, 256)
_SMALL = (128, 128)     # of few masked groups, whose last wave is emptier with the other
_ALONE, _WIDER = (128, 160), 192    # of few groups: two widths, of which the device takes that of the shorter rounds
# tile -> warpgroups along M and N, pieces of one, K blocks of a trip
_SHAPES = {_TILE: (1, 2, 2, 1), _SMALL: (2, 1, 1, 4), _ALONE: (2, 1, 1, 1)}
_PIECES_K = 1024
_EXTRA = {"whole": (1, 2), "cluster_n": (1, 2), "wider": (0, _WIDER)}


# ---------------------------------------------------------------- configs
def _config(stages: int, strip: int, tile: tuple[int, int] = _TILE, **extra: int) -> Config:
    return Config(*tile, BLOCK, _WARPS, stages, strip, persistent=True, extra=tuple(sorted(extra.items())))


CANDIDATES = (_config(4, 16, whole=2, cluster_n=2), _config(4, 16, whole=1, cluster_n=2), _config(4, 16, whole=1),
              _config(5, 8, _SMALL, whole=1), _config(5, 16, _ALONE, whole=1, wider=_WIDER))


def configs(problem: Problem, arch: Arch) -> list[Config]:
    """Where K is short, to take pieces is most of the work: no candidate."""
    return [c for c in CANDIDATES if legal(problem, c, arch) is None and (c.option("whole") == 1 or problem.k >= _PIECES_K)
            and ((c.block_m, c.block_n) == _TILE or problem.layout == "masked")]


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config`, which has whole=, can't run the problem, or None."""
    extra = dict(config.extra)
    for name, value in extra.items():
        if value not in _EXTRA.get(name, ()):
            return f"{name}={value!r}, expected one of {_EXTRA.get(name, 'no such option')}"
    clustered = config.option("cluster_n", 1) > 1
    shapes = [_TILE] if clustered else [_ALONE] if config.option("wider") else [_TILE, _SMALL]
    if (config.block_m, config.block_n) not in shapes or config.block_k != BLOCK or config.num_warps != _WARPS:
        tile = f"{config.block_m}x{config.block_n}x{config.block_k} by {config.num_warps} warps"
        return f"tile {tile}, expected one of {shapes}, {BLOCK}, {_WARPS}"
    if not config.persistent or config.split_k != 1 or config.swap_ab:
        return "the kernel is persistent, without split_k and swap_ab"
    if not 2 <= config.num_stages <= 8 or config.group_m < 1:
        return f"num_stages={config.num_stages}, group_m={config.group_m}, expected 2 to 8, and at least 1"
    if weight_bytes(problem) > MAX_BYTES:
        return f"has room for weights of {MAX_BYTES} bytes in E4M3, not of {weight_bytes(problem)}"
    if problem.accumulate:
        return "has no registers to add to the output beside the scales of columns"
    if config.option("wider") and problem.layout in ("dense", "contiguous"):
        return f"wider={_WIDER} is for layouts whose sizes are on the device"
    if clustered and (problem.layout == "dense" or problem.max_sms == 1):
        return "clusters of two blocks are for grouped products on two SMs or more"
    if config.option("whole") == 2 and not clustered:
        return "weights are expanded while the product runs on clusters only: other blocks have no warps idle"
    if tile_of(problem, config, arch) is None:
        return f"needs more shared memory than the {arch.smem} bytes of the device"
    return None


@lru_cache(maxsize=4096)
def tile_of(problem: Problem, config: Config, arch: Arch, factor: bool = False) -> Tile | fp8_cluster_tile.Tile | None:
    """The compile-time constants of the product; None where it needs more shared memory than there is."""
    groups = group_table(problem)
    layout, zero = LAYOUTS[problem.layout], problem.zeroes
    size = problem.out_bytes
    tile: Tile | fp8_cluster_tile.Tile
    wgm, wgn, mp, unroll = _SHAPES[config.block_m, config.block_n]
    head = 1 + (-(-problem.k // BLOCK) - 1) % unroll
    columns, wider = config.option("cluster_n", 1), config.option("wider", 0)
    for split, buffers in ((1, 5), (1, 2), (1, 1)) if wider else ((1, mp), (2, 2), (2, 1)):
        if columns > 1 or wider:
            ahead = config.option("whole") == 2
            np, wn = (5, 32) if wider else (1, 128)
            tile = fp8_cluster_tile.Tile(
                layout, WGM=wgm, WGN=wgn, MP=mp, NP=np, WN=wn, CLUSTER_M=1, CLUSTER_N=columns, STAGES=config.num_stages,
                STRIP=config.group_m, OUT_BUFFERS=buffers, OUT_SPLIT=split, OUT_BYTES=size, GROUPS=groups, A_SCALE_TMA=True,
                ZERO=zero, STORE_TMA=problem.out_aligned, FOLD=True, FACTOR=factor, PITCH=wider,
                NIBBLES=nibbles(problem), PIECE=PIECE if ahead else 0,
                GATE=0 if problem.a.format.element == "e4m3" else 1, FLAGS=MAX_FLAGS, KERNEL="fold_cluster_kernel",
                CONSUMER_REGISTERS=224 if ahead else 232, PRODUCER_REGISTERS=64 if ahead else 40)
        else:
            tile = Tile(layout, WGM=wgm, WGN=wgn, MP=mp, NP=1, WN=128, STAGES=config.num_stages, KS=1, UNROLL=unroll, HEAD=head,
                        SKIP=0, STRIP=config.group_m, CTAS=1, OUT_BUFFERS=buffers, OUT_SPLIT=split, OUT_BYTES=size, GROUPS=groups,
                        A_SCALE_TMA=True, ZERO=zero, STORE_TMA=problem.out_aligned, LATE_STORE=False, FOLD=True,
                        FACTOR=factor, NIBBLES=nibbles(problem), CONSUMER_REGISTERS=232, PRODUCER_REGISTERS=40)
        if tile.shared_bytes <= arch.smem:
            return tile
    return None


def nibbles(problem: Problem) -> bool:
    """Whether weights are packed for FP8 activations, whose expansion is cheap."""
    return problem.b.prepack == FP8_PREPACK


# ---------------------------------------------------------------- workspace
def weight_bytes(problem: Problem) -> int:
    """Of all weights in E4M3."""
    return problem.groups * -(-problem.n // UNIT_ROWS) * UNIT_ROWS * -(-problem.k // BLOCK) * BLOCK


def workspace(problem: Problem, config: Config) -> int:
    """Weights, and counters."""
    return weight_bytes(problem) + (4 * (1 + problem.groups) if config.option("whole") == 2 else 0)


# ---------------------------------------------------------------- cost
_BLOCK_TIMES = {1: 0.75, 2: 0.72}       # microseconds of a K block of a tile, by blocks of a cluster: docs/measured.md
_TILE_SECONDS = 1.4e-6                  # of a tile beyond them, with the powers of two of its columns
_SMALL_TIME, _SMALL_ALONE = 0.39, 0.31  # of a K block of the small tile, where every SM is busy and where only a few are
RATE = 0.88                             # of the streaming rate, in the launch in front
_FEW_RATE, _HIDDEN = 0.80, 1.0e-6       # the same for few masked groups, and what of the two launches is at the same time
_CLUSTER_SECONDS = 3.0e-6
_ROWS, _FEWER_ROWS = 1024, 1.08         # of a group: with fewer, sizes of groups decide, and the launch in front is most of it
_COST = 1.3                             # of the streaming rate: what expansion beside the product costs that, in instructions
_AHEAD_RATE = 0.28                      # and its own rate, where the product waits for it
_AHEAD_HIDDEN = 0.65                    # of the product, which is done meanwhile then


def spread_width(problem: Problem) -> float:
    """Of the sizes of masked groups about the mean that their caller gave: one of a few numbers is less far from their own mean
    than from that of many, and alone it is the mean."""
    return math.sqrt(1 - 1 / max(problem.groups, 1)) if problem.layout == "masked" else 1.0


def moved_bytes(problem: Problem) -> float:
    """By the launch in front, of all weights."""
    return 1.55 * problem.active_groups * problem.n * problem.k


def _in_front(problem: Problem, arch: Arch) -> float:
    """Seconds that the launch in front adds for few masked groups."""
    rate = arch.bandwidth * min(arch.sms, problem.max_sms or arch.sms) / arch.sms
    return moved_bytes(problem) / (rate * _FEW_RATE) - _HIDDEN


def _of_alone(problem: Problem, config: Config, arch: Arch, spread: bool) -> float:
    """Seconds of the product of two widths: of that which the device will find the faster one."""
    sms = min(arch.sms, problem.max_sms or arch.sms)
    width = spread_width(problem)
    works = {n: fp8_block.tiles(problem, replace(config, block_n=n), spread, width) for n in (_WIDER, config.block_n)}
    n = min(works, key=lambda n: math.ceil(works[n] / sms) * n)
    busy, alone, many = fp8_cluster._ALONE_TIMES[n]
    waves, block = works[n] / sms, -(-problem.k // BLOCK) * 1e-6 * fp8_block.rate(arch)
    if waves <= 1:
        seconds = block * (alone + (busy - alone) * waves) + fp8_block.TILE_SECONDS
    else:
        rounds = fp8_block.waves(fp8_block.Work(works[n]), sms)
        seconds = rounds * (block * (many if waves > 8 else busy) + fp8_block.TILE_SECONDS)
    return fp8_block.with_memory(seconds, works[n], problem, arch)


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds of the product and the launch in front of it."""
    columns = config.option("cluster_n", 1)
    unit = replace(config, block_n=config.block_n * columns)
    spreads = (False, True) if problem.counted else (False, )
    if config.option("wider"):
        seconds = sum(_of_alone(problem, config, arch, x) for x in spreads) / len(spreads)
        return seconds + _in_front(problem, arch)
    works = {fp8_block.tiles(problem, unit, spread, spread_width(problem)) for spread in spreads}
    clusters = min(arch.sms, problem.max_sms or arch.sms) // columns
    unit_seconds, small = -(-problem.k // BLOCK) * 1e-6 * fp8_block.rate(arch), (config.block_m, config.block_n) == _SMALL
    total = 0.0
    for work in works:
        waves = work / clusters
        if small:
            time = _SMALL_ALONE + (_SMALL_TIME - _SMALL_ALONE) * min(1.0, waves)
            each = unit_seconds * time + fp8_block.TILE_SECONDS
        else:
            each = unit_seconds * _BLOCK_TIMES[columns] + _TILE_SECONDS
        seconds = (math.ceil(waves) if waves < 8 else waves + 0.5) * each
        total += fp8_block.with_memory(seconds, work * columns, problem, arch)
    if small and problem.layout == "masked":
        return total / len(works) + _in_front(problem, arch)
    seconds = (total / len(works) + _CLUSTER_SECONDS * (columns > 1)) * (_FEWER_ROWS if problem.rows < _ROWS else 1.0)
    rate = arch.bandwidth * clusters * columns / arch.sms
    moved = moved_bytes(problem)
    if config.option("whole") == 2:
        first = moved / problem.active_groups
        rest = (moved - first) / rate
        seconds = max(seconds + rest / _COST, rest / _AHEAD_RATE + (1 - _AHEAD_HIDDEN) * seconds)
        moved = first
    return seconds + moved / (rate * RATE) + fp8_block.LAUNCH_SECONDS


# ---------------------------------------------------------------- launch
def launches(problem: Problem, config: Config, x: Operands, arch: Arch, a: Any, scales: Tensor | Pointer, strides: tuple[int, int],
             workspace: Tensor, at: int, flags: tuple[Pointer, int] | None) -> list[Launch]:
    """The expansion and the product. `a`: makes A's TMA descriptor for boxes of so many rows; `strides`: of A's scales, from one
    group to the next and from one row of M scales to the next; `at`: bytes of the workspace that are taken; `flags`: where one is
    up, a product behind does all (one here that is not on clusters doesn't look, and is overwritten)."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from . import fold_cluster_device, fold_whole_device, fp8_block_device

    fields, top = x.b.scale, x.top
    assert fields is not None and top is not None
    tile = tile_of(problem, config, arch, x.factor is not None)
    assert tile is not None, f"{config} is not legal for {problem}"
    masked, columns = problem.layout == "masked", config.option("cluster_n", 1)
    blocks, units = -(-x.k // BLOCK), -(-x.n // UNIT_ROWS)
    om = stride(x.out, -2, x.n)
    og = stride(x.out, 0, om * x.m) if masked else 0
    if tile.STORE_TMA and og % om:
        tile = replace(tile, STORE_TMA=False)
    piece = getattr(tile, "PIECE", 0)
    size = x.groups * units * UNIT_ROWS * blocks * BLOCK
    words, sync = Pointer(workspace, torch.int32, at), Pointer(workspace, torch.int32, at + size)
    packed = (Pointer(x.b.data, torch.int32), Pointer(fields, torch.int32), top, words)
    expanded = units * (1 if piece else x.groups)
    count = next((n for n in PROGRAM_BLOCKS if expanded * blocks >= n * PROGRAMS * arch.sms and not piece), PROGRAM_BLOCKS[-1])
    front = Launch(fold_whole_device.fold_whole_kernel, (expanded * -(-blocks // count), ),
                   (*packed, sync if piece else None, x.index, x.m, x.groups, x.alignment, units, blocks, tile, count, piece),
                   {"num_warps": 4})

    pitch = strides[0] // strides[1] if masked else 0
    rows = (x.groups - 1) * pitch + blocks if masked else blocks
    sa_desc = TensorDescriptor(scales, [rows, x.m], [strides[1], 1], [1, tile.BM],
                               gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2))
    made = partial(fp8_rows, Pointer(workspace, torch.float8_e4m3fn, at), x.groups, units * UNIT_ROWS, blocks * BLOCK)
    b_desc, wider = made(tile.B_BOX & -tile.B_BOX), None
    out_desc = output(x, og, om, tile.OUT_COLS, tile.OUT_BYTES) if tile.STORE_TMA else None
    factor = top if x.factor is None else x.factor
    clusters = min(problem.max_sms or arch.sms, arch.sms) // columns
    grid = max(1, min(clusters, row_tiles(problem, x, tile.BM) * -(-x.n // (tile.BN * columns))))
    options: dict[str, Any] = {"num_warps": 4, "maxnreg": tile.max_registers}
    sizes = (x.index, x.m, x.n, blocks, x.groups, x.alignment)
    descs = (a(tile.BM // columns), sa_desc, b_desc)
    if not isinstance(tile, fp8_cluster_tile.Tile):
        alone = (*descs, out_desc, x.out, None, top, *sizes, pitch, None, None, None, units * UNIT_ROWS, factor, 0, og, om,
                 og // om, tile)
        return [front, Launch(fp8_block_device.fp8_block_kernel, (grid, ), alone, options)]
    if tile.PITCH:
        tile, wider = tile.with_wider(), made(tile.PITCH & -tile.PITCH)
    pointer, up = flags or (top, 0)
    given = (*descs, wider, out_desc, x.out, *packed[:3], factor, words, sync if piece else None, pointer, *sizes, up, units, pitch,
             og, om, og // om, tile)
    options["launch_pdl"] = True
    return [front, Launch(fold_cluster_device.fold_cluster_kernel, (grid, ), given, options, columns, boxes=tile.boxes)]


def fp8_rows(y: Pointer, planes: int, rows: int, k: int, box: int) -> Any:
    """The TMA descriptor of E4M3 rows in the workspace."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .fp8_block_parts_device import FP8_PLANE

    return TensorDescriptor(y, [planes, rows, k], [rows * k, k, 1], [1, box, BLOCK], FP8_PLANE.value)
