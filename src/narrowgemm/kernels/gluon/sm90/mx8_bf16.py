"""Hopper product of MXFP8 x MXFP8 by BF16 wgmma, weights as a checkpoint has them: dense, 33 to 512 tokens.

How it works: `mx8_bf16_device.py`. Fewer tokens take `mx8_decode`, prepacked weights `narrow` and `narrow_prefill`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ....arch import Arch
from ....problem import Config, Problem, Step
from ...launching import Launch, Pointer
from ...operands import Operands
from . import mx8_tile as tile
from .mx8_tile import blocks_of, chunk_of, tiles_of
from .tensor_maps import planes

__all__ = ["BACKEND", "NAME", "configs", "estimate", "launches", "legal", "smem_bytes", "supports", "workspace"]

NAME = "gluon_sm90.mx8_bf16"
BACKEND = "gluon_sm90"
FEWEST, MOST = 33, 512       # tokens: fewer are one tile of `mx8_decode`, which has nothing in front; more are left to `expand`
ROWS = 64                    # weight rows of a consumer
PREP_K = 2048                # of K that one program of the launch in front brings
MAX_STAGES = 10
TOKENS = 64, 128             # columns of a tile
CONSUMERS = 2                # warpgroups of 64 weight rows at most
# by columns: registers of a thread at the launch, of a consumer's, of the other four warps'; with 64 the launch in front has room
REGISTERS = {64: (136, 184, 40), 128: (168, 240, 24)}
STEP = 4                     # weight rows of a consumer are a multiple of it
LEAST = 32                   # and no fewer


@dataclass(frozen=True, kw_only=True)
class Static(tile.Columns):
    """What the device code is compiled for; its fields are read by `mx8_bf16_device.py` and the parts of `fp8_decode`'s."""

    ROWS: int                # weight rows of a consumer's part of a tile
    W_AT: int                # bytes of shared memory in front of the weights
    BARS: int                # and of the barriers of boxes


@dataclass(frozen=True)
class PrepStatic:
    """What `mx8_bf16_prep_kernel` is compiled for."""

    BK: int                  # columns of a program
    GROUP: int = 32          # columns that share a scale
    PDL: bool = True         # the product starts meanwhile


def supports(problem: Problem, arch: Arch) -> str | None:
    return tile.of_tokens(problem, arch, FEWEST, MOST)


def slot_bytes(config: Config) -> int:
    """A ring slot: tokens in BF16, weights, three barriers."""
    return config.block_m * 256 + CONSUMERS * ROWS * 128 + 24


def smem_bytes(problem: Problem, config: Config) -> int:
    """Shared memory of a CTA; never less than the compiler's figure."""
    staging = CONSUMERS * config.block_m * ROWS * 4 if problem.out_dtype == "fp32" and config.split_k == 1 else 0
    codes = chunk_of(problem, config) * CONSUMERS * ROWS * 4
    return config.num_stages * slot_bytes(config) + codes + staging + 6144


def configs(problem: Problem, arch: Arch) -> list[Config]:
    out = []
    columns = next((t for t in TOKENS if t >= problem.m), TOKENS[-1])
    tiles_m = -(-problem.m // columns)
    more = tile.caching(problem, tiles_m, arch)
    for split, room in tile.clusters_at_once(arch):
        if split > 1 and tiles_m == 1 and math.ceil(problem.n / (CONSUMERS * ROWS)) > room:      # too much for one wave is not cut
            continue
        rows = CONSUMERS * rows_of(problem.n, max(1, room // tiles_m))
        c = Config(columns, rows, 128, 4 * CONSUMERS, 0, split_k=split, swap_ab=True, extra=more)
        c = with_stages(problem, c, arch)
        if legal(problem, c, arch) is None:
            out.append(c)
    return out


def rows_of(n: int, room: int) -> int:
    """Weight rows of a consumer: as few as bring all tiles onto the chip at once, in as few waves as whole ones take. `room`: tiles
    that are on the chip together."""
    tiles = math.ceil(math.ceil(n / (CONSUMERS * ROWS)) / room) * room
    return max(LEAST, math.ceil(math.ceil(n / tiles) / CONSUMERS / STEP) * STEP)


def with_stages(problem: Problem, config: Config, arch: Arch) -> Config:
    """With as many as fit."""
    room = (arch.smem - smem_bytes(problem, config)) // slot_bytes(config)
    return replace(config, num_stages=min(room, MAX_STAGES))


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run the problem, or None."""
    if config.block_m not in TOKENS or config.block_k != 128 or config.num_warps != 4 * CONSUMERS or not config.swap_ab:
        return f"expected {TOKENS} token columns x 128 of K, {4 * CONSUMERS} warps and swap_ab"
    rows = config.block_n // CONSUMERS
    if config.block_n % CONSUMERS or not LEAST <= rows <= ROWS or rows % STEP:
        return f"{config.block_n} weight rows, expected {LEAST} to {ROWS} in steps of {STEP} for each of {CONSUMERS} consumers"
    if (reason := tile.illegal_split(problem, config)) is not None:
        return reason
    least = 3 if config.block_m > 64 and config.split_k == 1 else 4
    if config.num_stages < least or smem_bytes(problem, config) > arch.smem:
        given = f"{config.num_stages} stages take {smem_bytes(problem, config)} bytes of shared memory"
        return f"{given}; expected {least} or more that fit"
    return None


# ---------------------------------------------------------------- workspace
class Regions(NamedTuple):
    """Byte offsets of the parts of the workspace, and its size: tokens, and a factor of each."""

    x: int
    xfactor: int
    size: int


def regions(problem: Problem) -> Regions:
    return Regions(*accumulate((-(-s // 256) * 256 for s in (2 * problem.m * problem.k, 4 * problem.m)), initial=0))


def workspace(problem: Problem, config: Config) -> int:
    return regions(problem).size


# ---------------------------------------------------------------- cost
# fitted to 20 times on an H200 and an H100: docs/measured.md
# both launches, the first boxes, the store: 8.4 fits; mx8_decode's model is as much too high at 64 tokens (6144 x 4096: 18.6 us)
# of 128 columns to 21 times on an H100, whose waves of tiles do not overlap
START = {64: 9.3e-6, 128: 3.3e-6}
TILE = {64: 0.0, 128: 6e-6}     # of a wave of tiles, beside its K blocks
READ = 0.745                # of the bandwidth
BLOCK = {64: 0.66e-6, 128: 0.75e-6}     # a K block of a CTA by token columns, whatever its rows are
CUT = 0.7e-6                # a cluster of two adds its sums up; as much again for each doubling
_POWER = 8


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds: the bytes over the bandwidth and the K blocks of a CTA after one another, in waves."""
    waves = -(-tiles_of(problem, config) // tile.tiles_at_once(config, arch))
    work = waves * (chunk_of(problem, config) * BLOCK[config.block_m] + TILE[config.block_m])
    return tile.seconds(config, START[config.block_m], tile.read_seconds(problem, arch, READ), work, _POWER, CUT)


# ---------------------------------------------------------------- launch
def static(problem: Problem, config: Config, sw: int) -> Static:
    """`sw`: what `mx8_tile.row_alignment` says of the weights' scales."""
    w_at = config.num_stages * config.block_m * 256
    _, own, rest = REGISTERS[config.block_m]
    return Static(**tile.shared(problem, config, sw, own, rest), **tile.columns(problem, config, chunk_of(problem, config)),
                  ROWS=config.block_n // CONSUMERS, W_AT=w_at, BARS=w_at + config.num_stages * CONSUMERS * ROWS * 128)


def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    """The launch in front, and the product."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from . import mx8_bf16_device as device
    from . import mx8_bf16_prep_device as prep

    config = step.config
    sw, sx = x.b.scale, x.a.scale
    assert sw is not None and sx is not None and workspace is not None
    cfg, at = static(problem, config, tile.row_alignment(sw)), regions(problem)
    codes, swn = tile.weight_codes(sw, cfg)
    xp, xfactor = Pointer(workspace, torch.bfloat16, at.x), Pointer(workspace, torch.float32, at.xfactor)
    boxes = (planes(x.b.data, x.k, ROWS),
             TensorDescriptor(xp, [x.m, x.k], [x.k, 1], [cfg.BT, 64], device.X_TILE.value))
    return [
        Launch(prep.mx8_bf16_prep_kernel, (x.m, -(-x.k // PREP_K)),
               (x.a.data, sx, xp, xfactor, x.k, x.a.data.stride(-2), sx.stride(-2), sx.stride(-1), PrepStatic(PREP_K)),
               {"num_warps": 4}),
        Launch(device.mx8_bf16_kernel, (tiles_of(problem, config),),
               (*boxes, codes, x.out, xfactor, x.m, x.n, blocks_of(problem), chunk_of(problem, config), swn, x.out.stride(-2), cfg),
               {"num_warps": 4, "maxnreg": REGISTERS[cfg.BT][0], "launch_pdl": True}, cfg.CLUSTER,
               boxes=((0, cfg.ROWS),) if cfg.ROWS < ROWS else ())]
