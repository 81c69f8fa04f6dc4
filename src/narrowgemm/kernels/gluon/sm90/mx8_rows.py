"""Hopper product of MXFP8 x MXFP8, weights as a checkpoint has them, with tokens as the rows of wgmma: dense, one launch.

How it works: `mx8_rows_device.py`. Up to 32 tokens take `mx8_decode`, prepacked weights `narrow` and `narrow_prefill`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ....arch import Arch
from ....problem import Config, Problem, Step
from ...launching import Launch, Pointer
from ...operands import Operands
from . import mx8_tile as tile
from .mx8_tile import chunk_of, tiles_of

__all__ = ["BACKEND", "NAME", "configs", "estimate", "launches", "legal", "smem_bytes", "supports", "workspace"]

NAME = "gluon_sm90.mx8_rows"
BACKEND = "gluon_sm90"
FEWEST, MOST = 33, 64        # tokens: fewer are one tile of `mx8_decode`; more were never timed
TOKENS = 64                  # wgmma's rows
STEP = 8                     # weight rows are wgmma's columns: a multiple of it
LEAST, WIDEST = 24, 80
LEAST_STAGES, MAX_STAGES = 4, 16
CONSUMERS = 2
# registers of a thread at the launch, of a consumer's, of the other four warps'
REGISTERS = (168, 216, 72)


@dataclass(frozen=True, kw_only=True)
class Static(tile.Shared):
    """What the device code is compiled for; its fields are read by `mx8_rows_device.py` and the parts of `fp8_decode`'s."""

    PARTS: int               # of 8 weight rows
    MAIN: int                # weight rows whose powers a warp makes at once, a power of two
    REST: int                # and of those past them; 0: none
    CONSUMERS: int           # warpgroups that take K blocks in turn
    W_AT: int                # bytes of shared memory in front of the weights
    SX_AT: int               # of the tokens' powers
    MAIN_AT: int             # of the weights' powers
    REST_AT: int
    BARS: int                # and of the barriers of boxes
    TOKEN_CODES: int         # of tokens, by four tokens (2), by four of a row (1), or each is loaded (0)


def supports(problem: Problem, arch: Arch) -> str | None:
    return tile.of_tokens(problem, arch, FEWEST, MOST)


def powers_of(bn: int) -> tuple[int, int]:
    """Weight rows of a tile as powers of two: what a warp brings to powers at once, and what is left."""
    main = 64 if bn > 32 else 32
    return main, 0 if bn <= main else 8 if bn <= main + 8 else 16


def slot_bytes(config: Config) -> int:
    """A ring slot: tokens, weights, powers of both, whether these are wild, two barriers."""
    return (TOKENS + config.block_n) * 128 + 16 * (TOKENS + sum(powers_of(config.block_n))) + 20


def smem_bytes(problem: Problem, config: Config) -> int:
    """Shared memory of a CTA: the ring, and sums of all consumers but one. Never less than the compiler's figure."""
    return config.num_stages * slot_bytes(config) + (CONSUMERS - 1) * config.block_n * TOKENS * 4 + 1024


def configs(problem: Problem, arch: Arch) -> list[Config]:
    tiles_m = -(-problem.m // TOKENS)
    more = tile.caching(problem, tiles_m, arch)
    out = []
    for split, room in tile.clusters_at_once(arch):
        if split > 1 and math.ceil(problem.n / WIDEST) * tiles_m > room:      # what is too much for one wave is not cut
            continue
        c = Config(TOKENS, rows_of(problem.n, tiles_m, room), 128, 4 * CONSUMERS, 0, split_k=split, extra=more)
        stages = min(MAX_STAGES, (arch.smem - smem_bytes(problem, c)) // slot_bytes(c))
        c = replace(c, num_stages=stages - stages % CONSUMERS)
        if legal(problem, c, arch) is None:
            out.append(c)
    return out


def rows_of(n: int, tiles_m: int, room: int) -> int:
    """Weight rows of a tile: as few as bring all tiles onto the chip in as few waves as the widest ones take. `room`: tiles that
    are on the chip together."""
    tiles = math.ceil(math.ceil(n / WIDEST) * tiles_m / room) * room // tiles_m
    return min(WIDEST, max(LEAST, math.ceil(math.ceil(n / max(tiles, 1)) / STEP) * STEP))


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run the problem, or None."""
    if config.block_m != TOKENS or config.block_k != 128 or config.num_warps != 4 * CONSUMERS or config.swap_ab:
        return f"expected {TOKENS} tokens x 128 of K, {4 * CONSUMERS} warps, and no swap_ab"
    if not LEAST <= config.block_n <= WIDEST or config.block_n % STEP:
        return f"{config.block_n} weight rows, expected {LEAST} to {WIDEST} in steps of {STEP}"
    if (reason := tile.illegal_split(problem, config)) is not None:
        return reason
    # who does not see each use of a slot can't tell one from the next, so each consumer has slots of its own
    if config.num_stages % CONSUMERS or config.num_stages < LEAST_STAGES:
        return f"{config.num_stages} stages, expected {LEAST_STAGES} or more, a multiple of {CONSUMERS} consumers"
    if smem_bytes(problem, config) > arch.smem:
        return f"{config.num_stages} stages take {smem_bytes(problem, config)} bytes of shared memory; expected as many as fit"
    return None


def workspace(problem: Problem, config: Config) -> int:
    return 0


# ---------------------------------------------------------------- cost
# fitted to 11 times on an H100 and an H200, 2304 to 9216 weight rows and K from 4096: docs/measured.md. START is 1.7 us above what
# fits, so that smaller weights, which were not timed, are left to `mx8_decode`
START = 7.1e-6
READ = 0.95                 # of the bandwidth
BLOCK, ROW = 0.02e-6, 6.3e-9        # a K block of a CTA, and each of its weight rows
CUT = 1.8e-6                # a cluster of two adds its sums up; as much again for each doubling
_POWER = 8


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds: the bytes over the bandwidth and the K blocks of a CTA after one another, in waves."""
    waves = -(-tiles_of(problem, config) // tile.tiles_at_once(config, arch))
    work = waves * chunk_of(problem, config) * (BLOCK + ROW * config.block_n)
    return tile.seconds(config, START, tile.read_seconds(problem, arch, READ), work, _POWER, CUT)


# ---------------------------------------------------------------- launch
def static(problem: Problem, config: Config, sw: int, codes: int) -> Static:
    """`sw`: what `mx8_tile.row_alignment` says of the weights' scales; `codes`: `token_codes`."""
    bn, stages = config.block_n, config.num_stages
    main, rest = powers_of(bn)
    _, own, others = REGISTERS
    sx_at = stages * (TOKENS + bn) * 128
    main_at = sx_at + stages * 16 * TOKENS
    rest_at = main_at + stages * 16 * main
    return Static(**tile.shared(problem, config, sw, own, others), PARTS=bn // 8, MAIN=main, REST=rest, CONSUMERS=CONSUMERS,
                  W_AT=stages * TOKENS * 128, SX_AT=sx_at, MAIN_AT=main_at, REST_AT=rest_at, BARS=rest_at + stages * 16 * rest,
                  TOKEN_CODES=codes)


def token_codes(scale: Tensor, m: int) -> int:
    """How codes of m tokens are loaded: by four tokens (2), by four of a row (1), each (0)."""
    if scale.stride(-2) == 1 and scale.stride(-1) % 4 == scale.data_ptr() % 4 == m % 4 == 0:
        return 2
    return int(tile.row_alignment(scale) > 0)


def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    from . import mx8_rows_device as device

    config = step.config
    sw, sx = x.b.scale, x.a.scale
    assert sw is not None and sx is not None
    cfg = static(problem, config, tile.row_alignment(sw), token_codes(sx, x.m))
    x_codes = [(sx, sx.stride(-2), sx.stride(-1)), (Pointer(sx, torch.int32), sx.stride(-2) // 4, 1),
               (Pointer(sx, torch.int32), 0, sx.stride(-1) // 4)][cfg.TOKEN_CODES]
    box = 64 if cfg.BN <= 64 else 128
    return [tile.launch(device.mx8_rows_kernel, x, TOKENS, box, x_codes, chunk_of(problem, config), REGISTERS[0], cfg)]
