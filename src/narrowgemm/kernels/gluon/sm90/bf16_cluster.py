"""The dense BF16 product behind `expand`'s launch in front on clusters of blocks that share B by multicast: tiles, cost, launch.

Device code: `bf16_cluster_device.py`; what is fixed at compile time: `bf16_cluster_tile.py`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor

from ....arch import Arch
from ....problem import Config, Problem
from ...launching import Launch, Pointer
from ...operands import Operands
from .bf16_cluster_tile import BLOCK, Tile
from .fp8_block_tile import LAYOUTS
from .tensor_maps import output, stride

SHAPE = (128, 256)          # of a block
BLOCKS = (1, 2)             # of a cluster; one is offered by no config: 2% slower (docs/measured.md)


def blocks(config: Config) -> int:
    """Of a cluster; 0: the kernel is not this one."""
    return config.option("cluster_m")


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config`, whose options are known, can't run the problem, or None."""
    if problem.layout != "dense" or (config.block_m, config.block_n) != SHAPE or blocks(config) not in BLOCKS:
        return f"clusters of {blocks(config)} blocks, expected one of {BLOCKS}, of {SHAPE}, in a dense product"
    if problem.accumulate or not problem.out_aligned:
        return "clusters store whole tiles by TMA, on 16 bytes, with no accumulation"
    if blocks(config) > min(arch.sms, problem.max_sms or arch.sms):
        return f"clusters of {blocks(config)} blocks on {problem.max_sms} SMs"
    if config.num_stages > 8 or tile_of(problem, config, arch, True) is None:
        return f"needs more shared memory than the {arch.smem} bytes of the device"
    return None


@lru_cache(maxsize=4096)
def tile_of(problem: Problem, config: Config, arch: Arch, columns: bool, flag: bool = False) -> Tile | None:
    """The compile-time constants; None where it needs more shared memory than there is. columns: they have factors, too; flag: a
    word says where all factors are one."""
    for buffers in (2, 1):      # staging of the store: as much as fits, and no more than a tile that is cut has stores
        tile = Tile(
            LAYOUTS["dense"], CLUSTER_M=blocks(config), STAGES=config.num_stages, STRIP=config.group_m, OUT_BUFFERS=buffers,
            OUT_BYTES=problem.out_bytes, B_FACTORS=columns, FLAG=flag)
        if tile.shared_bytes <= arch.smem:
            return tile
    return None


def clusters(problem: Problem, config: Config, arch: Arch) -> int:
    """That run at once."""
    return max(1, min(problem.max_sms or arch.sms, arch.sms) // blocks(config))


# fitted on an H100 and an H200, interleaved with cuBLAS
BLOCK_TIME = 0.64           # microseconds of one K block of 64 on one SM of a device of `expand.RATE`, where every SM is busy
CUT = 0.65                  # of a tile's time, one of half the columns
SECONDS = 3.0e-6            # until a cluster's blocks know of each other


def left(problem: Problem, config: Config, arch: Arch) -> tuple[int, int]:
    """(full rounds, tiles beyond them that are cut in two or else are a round), as `tiles` in the device code deals them out; those
    that are no less than half a round count as one."""
    every = -(-problem.m // (config.block_m * blocks(config))) * -(-problem.n // config.block_n)
    count = clusters(problem, config, arch)
    full, rest = divmod(every, count)
    return (full + 1, 0) if 2 * rest > count else (full, rest)


def estimate(problem: Problem, config: Config, arch: Arch, tile: float, unit: float) -> float:
    """Seconds of the product. tile: beyond a tile's K blocks; unit: microseconds of all of them, in seconds on this device."""
    full, rest = left(problem, config, arch)
    return (full + CUT * (rest > 0)) * (unit * BLOCK_TIME + tile) + SECONDS


def product(problem: Problem, config: Config, x: Operands, arch: Arch, tile: Tile, planes: tuple[Any, Any, Any], k: int,
            factor: Pointer, factors: Pointer | Tensor, flag: Pointer) -> Launch:
    """The kernel over TMA descriptors of A and, in both boxes, of B, `k` wide, with factors of rows and columns."""
    from . import bf16_cluster_device as device

    om = stride(x.out, -2, x.n)
    out_desc = output(x, 0, om, tile.OUT_COLS, tile.OUT_BYTES)
    grid = min(clusters(problem, config, arch), 2 * -(-x.m // tile.UNIT.BM) * -(-x.n // tile.BN))
    arguments = (*planes, out_desc, x.out, factor, factors, flag, x.m, x.n, -(-k // BLOCK), om, tile)
    return Launch(device.bf16_cluster_kernel, (grid,), arguments, {"num_warps": 4, "maxnreg": tile.max_registers}, tile.CLUSTER)
