"""FP8 GEMM on Hopper with row-wise or tensor-wise scales, dense and grouped: TMA, wgmma, warp specialisation, in Gluon.

wgmma takes K-major FP8: an operand that lies the other way, or off 16 bytes, is copied into the workspace first (`k_major`).

E4M3, E5M2 or one of each; scales in the epilogue; partial sums are promoted to FP32 every `Problem.promote` of K (512 by
default, 0: never). Persistent: one block an SM takes tile after tile. Device code: `fp8_scaled_device.py`; what is fixed
at compile time: `fp8_scaled_tile.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

from torch import Tensor

from ....arch import Arch
from ....problem import Config, Operand, Problem, Step
from ...launching import Launch
from ...operands import Operands
from ...triton import k_major
from . import refusals
from .fp8_block_tile import LAYOUTS, group_table
from .fp8_scaled_tile import OUT_COLS, Tile
from .tensor_maps import output, planes, row_tiles, stride

NAME = "gluon_sm90.fp8_scaled"
BACKEND = "gluon_sm90"
FP8 = ("e4m3", "e5m2")
GROUPS = ((1, 0), (0, 0))


# ---------------------------------------------------------------- what it takes
def refuse_operands(a: Operand, b: Operand) -> str | None:
    """Why TMA and wgmma can't take the operands, or None."""
    if a.format.element not in FP8 or b.format.element not in FP8:
        return f"takes FP8 on both sides, not {a.format.element} x {b.format.element}"
    if a.prepack or b.prepack:
        return "takes plain operands, not prepacked ones"
    return k_major.refuse(a) or k_major.refuse(b)


def supports(problem: Problem, arch: Arch) -> str | None:
    p, a, b = problem, problem.a, problem.b
    if (reason := refusals.op(p, arch)) is not None:
        return reason
    if a.format.group not in GROUPS or b.format.group not in GROUPS:
        return f"takes row-wise and tensor-wise scales, not {a.format.group} x {b.format.group}"
    if (reason := refuse_operands(a, b)) is not None:
        return reason
    return refusals.shape(p, 16)


# ---------------------------------------------------------------- configs
# block_m x block_n -> warpgroups along M and N, columns of a warpgroup's one or two wgmma
SHAPES = {(128, 128): (2, 1, 128, 0), (128, 192): (2, 1, 128, 64), (128, 256): (2, 1, 256, 0),
          (64, 256): (1, 2, 128, 0), (64, 128): (1, 2, 64, 0)}
_LARGEST_PROMOTED = 192     # columns of a warpgroup whose sums and partial sums fit into registers


def config(bm: int, bn: int, stages: int, strip: int = 16) -> Config:
    return Config(bm, bn, 128, 9, stages, strip, persistent=True)


CANDIDATES = (
    config(128, 256, 4, 8), config(128, 256, 4), config(128, 192, 5, 8), config(128, 192, 5), config(128, 192, 4, 8),
    config(128, 128, 6, 8), config(128, 128, 6), config(128, 128, 5, 8), config(64, 256, 5), config(64, 256, 4),
    config(64, 128, 8), config(64, 128, 6),
)


def configs(problem: Problem, arch: Arch) -> list[Config]:
    return [c for c in CANDIDATES if legal(problem, c, arch) is None]


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run the problem, or None."""
    if (reason := legal_tile(problem, config)) is not None:
        return reason
    if tile_of(problem, config, arch) is None:
        return f"needs more shared memory than the {arch.smem} bytes of the device"
    return None


def legal_tile(problem: Problem, config: Config) -> str | None:
    """Why there is no such tile, or None."""
    shape = (config.block_m, config.block_n)
    if shape not in SHAPES or config.block_k != 128:
        return f"tile {config.block_m}x{config.block_n}x{config.block_k}, expected one of {list(SHAPES)} x 128"
    if not config.persistent or config.split_k != 1 or config.swap_ab or config.extra:
        return "the kernel is persistent, without split_k, swap_ab and extra options"
    if config.num_stages < 2 or config.group_m < 1:
        return f"num_stages={config.num_stages}, group_m={config.group_m}, expected at least 2 and 1"
    if problem.promote and sum(SHAPES[shape][2:]) > _LARGEST_PROMOTED:
        return f"{config.block_n} columns leave no registers for partial sums that are promoted"
    return None


@lru_cache(maxsize=4096)
def tile_of(problem: Problem, config: Config, arch: Arch) -> Tile | None:
    """The compile-time constants of a legal config; None where it needs more shared memory than there is."""
    wgm, wgn, cols0, cols1 = SHAPES[config.block_m, config.block_n]
    groups = group_table(problem)
    for buffers in (4, 3, 2, 1):       # staging of the store: as much as fits
        if buffers * OUT_COLS > cols0 + cols1:
            continue
        tile = Tile(
            LAYOUTS[problem.layout], WGM=wgm, WGN=wgn, COLS0=cols0, COLS1=cols1, STAGES=config.num_stages,
            PROMOTE=problem.promote // 128, STRIP=config.group_m, OUT_BUFFERS=buffers, OUT_BYTES=problem.out_bytes, GROUPS=groups,
            A_ROWS=problem.a.format.group[0] == 1, B_ROWS=problem.b.format.group[0] == 1,
            ZERO=problem.zeroes, ACCUMULATE=problem.accumulate,
            STORE_TMA=problem.out_aligned)
        if tile.shared_bytes <= arch.smem:
            return tile
    return None


def workspace(problem: Problem, config: Config) -> int:
    return sum(_copies(problem))


def _copies(problem: Problem) -> tuple[int, int]:
    """Bytes of K-major copies of A and of B, 0 where they need none. B's come first."""
    p = problem
    columns = k_major.columns(p.k)
    planes_a, planes_b = (p.groups if p.layout == "masked" else 1), (1 if p.layout == "dense" else p.groups)
    return (planes_a * p.m * columns if k_major.needed(p.a) else 0, planes_b * p.n * columns if k_major.needed(p.b) else 0)


# ---------------------------------------------------------------- cost
LAUNCH_SECONDS = 3.0e-6
MEMORY_SECONDS = 5.0e-6     # to fill the pipes and drain them, where bytes decide
MEMORY_EFFICIENCY = 0.85    # of the streaming rate
TILE_SECONDS = 0.8e-6       # of a tile, beyond its K blocks and waits for staging
STORE_SECONDS = 0.7e-6      # until what was stored from staging has been read, at least
NOT_HIDDEN = 0.15          # of the shorter of arithmetic and bytes
# microseconds of one K block of 128 on one SM of an H200, where every SM is busy
BLOCK_TIMES = {(128, 128): 0.386, (128, 192): 0.550, (128, 256): 0.700, (64, 256): 0.415, (64, 128): 0.260}
H200_RATE = 1.40e15        # FP8 rate of the device that the figures are from


def tiles(problem: Problem, config: Config) -> float:
    """Tiles expected to have work."""
    num_n = -(-problem.n // config.block_n)
    if problem.layout in ("dense", "contiguous"):
        return -(-problem.m // config.block_m) * num_n
    groups = problem.groups if problem.layout == "masked" else problem.active_groups
    rows = max(problem.rows, 1)
    # sizes spread about their mean: half a tile a group goes to waste, where they don't all fit into one
    per_group = rows / config.block_m + 0.5 if rows > config.block_m else 1
    return groups * max(1.0, per_group) * num_n


def store_seconds(problem: Problem, tile: Tile | None, arch: Arch) -> float:
    """What a tile's store waits for: staging is written again once all that is in it has been read."""
    assert tile is not None
    rounds = -(-(tile.MP * tile.WN // OUT_COLS) // tile.OUT_BUFFERS)
    size = tile.OUT_BUFFERS * tile.CONSUMERS * 64 * OUT_COLS * tile.OUT_BYTES * (2 if problem.accumulate else 1)
    return (rounds - 1) * max(STORE_SECONDS, size * arch.sms / arch.bandwidth)


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds: waves of tiles, or the bytes at the streaming rate, whichever is longer, and some of the other."""
    sms = min(arch.sms, problem.max_sms or arch.sms)
    work = tiles(problem, config)
    unit = -(-problem.k // 128) * 1e-6 * (H200_RATE / 132) / (arch.fp8_flops / arch.sms)
    waves = work / sms
    waves = math.ceil(waves) if waves < 8 else waves + 0.5
    tile = TILE_SECONDS + store_seconds(problem, tile_of(problem, config, arch), arch)
    seconds = waves * (unit * BLOCK_TIMES[config.block_m, config.block_n] + tile)
    memory = MEMORY_SECONDS + problem.bytes / (arch.bandwidth * MEMORY_EFFICIENCY * min(1.0, max(work, 1) / (0.6 * sms)))
    copies = sum(k_major.seconds(size, arch) for size in _copies(problem) if size)
    return LAUNCH_SECONDS + max(seconds, memory) + NOT_HIDDEN * min(seconds, memory) + copies


# ---------------------------------------------------------------- launch
def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    from ....arch import detect
    from . import fp8_scaled_device as device

    arch = detect(x.out.device)
    a, b, sa, sb, out = x.a.data, x.b.data, x.a.scale, x.b.scale, x.out
    assert sa is not None and sb is not None
    masked = problem.layout == "masked"
    tile = tile_of(problem, step.config, arch)
    assert tile is not None, f"{step.config} is not legal for {problem}"
    om = stride(out, -2, x.n)
    og = stride(out, 0, om * x.m) if masked else 0
    if tile.STORE_TMA and og % om:
        tile = replace(tile, STORE_TMA=False)
    out_desc = None
    if tile.STORE_TMA:
        out_desc = output(x, og, om, tile.OUT_COLS, tile.OUT_BYTES)
    sms = arch.sms if not problem.max_sms else min(problem.max_sms, arch.sms)
    grid = max(1, min(sms, row_tiles(problem, x, tile.BM) * -(-x.n // tile.BN)))
    first, at = [], 0
    copied: list[Tensor | k_major.Copied] = [a, b]
    for i, size in ((1, _copies(problem)[1]), (0, _copies(problem)[0])):
        if size:
            assert workspace is not None
            made, copied[i] = k_major.copy((a, b)[i], workspace, at, None, None, 0)
            first.append(made)
            at += size
    a, b = copied  # type: ignore[assignment]
    arguments = (
        planes(a, x.k, tile.BM), planes(b, x.k, tile.WGN * tile.COLS0), planes(b, x.k, tile.COLS1) if tile.COLS1 else None,
        out_desc, out, sa, sb, x.index, x.m, x.n, -(-x.k // 128), x.groups, x.alignment, sa.stride(0) if masked else 0,
        sa.stride(-2), sb.stride(0) if sb.dim() == 3 else 0, sb.stride(-2), og, om, og // om, tile)
    return [*first, Launch(device.fp8_scaled_kernel, (grid,), arguments, {"num_warps": 4, "maxnreg": tile.max_registers})]
