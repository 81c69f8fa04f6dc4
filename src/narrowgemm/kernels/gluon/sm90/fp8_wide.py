"""FP8 block-scaled GEMM on Hopper for problems with many rows, on clusters of two blocks: what `fp8_block.py` computes, by PTX
where Gluon has no words for it.

A pair of blocks shares A or B through TMA multicast, so less comes from L2; a wgmma has up to 192 columns, so A is read from shared
memory less often. Device code: `fp8_wide_device.py`; what is fixed at compile time: `fp8_wide_tile.py`.
"""

from __future__ import annotations

import math
from functools import lru_cache

from torch import Tensor

from ....arch import Arch
from ....problem import Config, Problem, Step
from ... import launching
from ...launching import Launch
from ...operands import Operands
from . import fp8_block
from .fp8_block import BACKEND as BACKEND
from .fp8_block import OUT_BYTES
from .fp8_block_tile import LAYOUTS, MAX_GROUPS
from .fp8_wide_tile import Tile
from .tensor_maps import row_tiles

NAME = "gluon_sm90.fp8_wide"


def supports(problem: Problem, arch: Arch) -> str | None:
    return fp8_block.supports(problem, arch)


# ---------------------------------------------------------------- configs
# block_m x block_n of one block -> warpgroups along M and N, pieces of a warpgroup, tensors of a piece, columns of one
_SHAPES = {
    (128, 192): (2, 1, 1, 3, 64), (128, 256): (1, 2, 2, 1, 128), (128, 160): (2, 1, 1, 5, 32), (128, 128): (2, 1, 1, 1, 128),
    (128, 96): (2, 1, 1, 3, 32),
}
_EXTRA = {"cluster_m": (1, 2), "cluster_n": (1, 2), "late_store": (0, 1)}


def _config(bm: int, bn: int, stages: int, strip: int = 16, **extra: int) -> Config:
    return Config(bm, bn, 128, 9, stages, strip, persistent=True, extra=tuple(sorted(extra.items())))


_CANDIDATES: tuple[Config, ...] = ()


def configs(problem: Problem, arch: Arch) -> list[Config]:
    return [c for c in _CANDIDATES if legal(problem, c, arch) is None]


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
    cluster = extra.get("cluster_m", 1) * extra.get("cluster_n", 1)
    if cluster > 2 or cluster > (problem.max_sms or cluster):
        return f"clusters of {cluster} blocks, expected at most two, and an SM for each"
    if tile_of(problem, config, arch) is None:
        return f"needs more shared memory than the {arch.smem} bytes of the device"
    return None


@lru_cache(maxsize=4096)
def tile_of(problem: Problem, config: Config, arch: Arch) -> Tile | None:
    """The compile-time constants of a legal config; None where it needs more shared memory than there is."""
    extra = dict(config.extra)
    wgm, wgn, pieces, tensors, columns = _SHAPES[config.block_m, config.block_n]
    counted = problem.layout not in ("dense", "contiguous")
    groups = next(n for n in (32, 128, 512, MAX_GROUPS) if not counted or n >= problem.groups)
    # staging of the store: as much as fits; whole tensors, or halves of their columns
    for split, buffers in ((1, pieces), (2, 2), (2, 1)) if columns == 128 else ((1, tensors), (1, 2), (1, 1)):
        tile = Tile(
            LAYOUTS[problem.layout], wgm, wgn, pieces, tensors, columns, extra.get("cluster_m", 1), extra.get("cluster_n", 1),
            config.num_stages, config.group_m, buffers, split, OUT_BYTES[problem.out_dtype], groups,
            A_SCALE_TMA=problem.a.scale_major == "mn" and problem.a.scale_dtype == "fp32",
            ZERO=problem.zero_padding and problem.layout in ("contiguous", "psum"), ACCUMULATE=problem.accumulate,
            STORE_TMA=problem.out_aligned, LATE_STORE=bool(extra.get("late_store", 0)) and not problem.accumulate)
        if tile.shared_bytes <= arch.smem:
            return tile
    return None


def workspace(problem: Problem, config: Config) -> int:
    return 0


# ---------------------------------------------------------------- cost
def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    return math.inf


# ---------------------------------------------------------------- launch
def launch(step: Step, problem: Problem, operands: Operands, workspace: Tensor | None) -> None:
    launching.launch(launches, step, problem, operands, workspace)


def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    from ....arch import detect
    from . import fp8_wide_device as device

    arch = detect(x.out.device)
    tile = tile_of(problem, step.config, arch)
    assert tile is not None, f"{step.config} is not legal for {problem}"
    tile, given = fp8_block.arguments(problem, x, tile, tile.A_BOX)
    clusters = min(problem.max_sms or arch.sms, arch.sms) // tile.CLUSTER
    grid = max(1, min(clusters, row_tiles(problem, x, tile.UNIT.BM) * -(-x.n // tile.UNIT.BN)))
    return [Launch(device.fp8_wide_kernel, (grid,), (*given, tile), {"num_warps": 4, "maxnreg": tile.max_registers}, tile.CLUSTER)]
