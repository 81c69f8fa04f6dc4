"""Hopper product of MXFP8 x MXFP8 for few tokens, weights as a checkpoint has them: dense, no prepack, one launch.

How it works: `mx8_decode_device.py`. Prepacked weights take `narrow`, other layouts `triton.mx`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ....arch import Arch
from ....problem import Config, Problem, Step
from ...launching import Launch, Pointer
from ...operands import Operands
from . import mx8_tile as tile
from .mx8_tile import TRIP
from .occupancy import max_registers, smem_budget

__all__ = ["BACKEND", "NAME", "configs", "estimate", "launches", "legal", "smem_bytes", "supports", "workspace"]

NAME = "gluon_sm90.mx8_decode"
BACKEND = "gluon_sm90"
TOKENS = (8, 16, 32)
GROUP = {8: 4, 16: 2, 32: 2}        # blocks of 32 of K whose sums are in flight together, twice: what registers hold
ROWS = 64                    # weight rows of a tile at most: wgmma's
STEP = 4                     # fewer, in steps of so many, where tiles of all SMs are equal then
LEAST = 32
MAX_ROWS = 256               # tokens; with more, `expand` does better
MAX_STAGES = 16


@dataclass(frozen=True, kw_only=True)
class Static(tile.Columns):
    """What the device code is compiled for; its fields are read by `mx8_decode_device.py` and the parts of `fp8_decode`'s."""

    GROUP: int               # blocks of 32 of K of a step
    CONSUMERS: int           # warpgroups that take K blocks in turn
    X_AT: int                # boxes of tokens in front of theirs, in the one allocation of both rings
    FOURS: bool              # codes of tokens are loaded by four, else each


def supports(problem: Problem, arch: Arch) -> str | None:
    if (reason := tile.supports(problem, arch)) is not None:
        return reason
    return None if problem.m <= MAX_ROWS else f"is for {MAX_ROWS} tokens and fewer, not {problem.m}"


def trip_of(config: Config) -> int:
    """K blocks of a trip of all consumers."""
    return TRIP * (config.num_warps // 4)


def chunk_of(problem: Problem, config: Config) -> int:
    """K blocks of one block of a cluster: whole trips of all consumers."""
    return tile.chunk_of(problem, config, trip_of(config))


def slot_bytes(config: Config) -> int:
    """A ring slot: weights, tokens, their powers of two, two barriers."""
    return (ROWS + config.block_m) * 128 + config.block_m * 16 + 16


def fixed_bytes(problem: Problem, config: Config) -> int:
    """Codes of weights of all of a block's K, and where the tile is transposed."""
    codes = chunk_of(problem, config) // TRIP * ROWS * 16
    sums = 4 * config.block_m * ROWS * (config.num_warps > 4)
    return codes + sums + config.block_m * ROWS * problem.out_bytes + 512


def smem_bytes(problem: Problem, config: Config) -> int:
    """Shared memory of a CTA; never less than the compiler's figure."""
    return config.num_stages * slot_bytes(config) + fixed_bytes(problem, config)


def loader_registers(config: Config) -> int:
    """Registers of a thread of the loader and of the scaler."""
    if config.num_warps == 4:
        return 56
    return 40 if config.option("ctas", 1) > 1 else 88


def consumer_registers(config: Config) -> int:
    """Registers of a consumer's thread, once the loaders have given up theirs."""
    return min(232, (max_registers(config) * (config.num_warps + 4) - 4 * loader_registers(config)) // config.num_warps // 8 * 8)


def configs(problem: Problem, arch: Arch) -> list[Config]:
    bt = next((t for t in TOKENS if t >= problem.m), TOKENS[-1])
    tiles_m = -(-problem.m // bt)
    caching = tile.caching(problem, tiles_m, arch)
    out = []
    for split, room in tile.clusters_at_once(arch):
        for rows, ctas in rows_of(problem.n, tiles_m, split, room):
            for warps in (4, 8):
                # two consumers need no longer ring than two CTAs on an SM have, even where one each would do; fewer rows need one
                if warps == 8 and bt < 32:
                    if rows < ROWS and ctas == 1:
                        continue
                    ctas = 2
                elif warps == 8:
                    ctas = 1
                more = ((("ctas", ctas), ) if ctas > 1 else ()) + caching
                c = Config(bt, rows, 128, warps, 0, split_k=split, swap_ab=True, extra=more)
                stages = min(MAX_STAGES, (smem_budget(c, arch) - fixed_bytes(problem, c)) // slot_bytes(c))
                c = replace(c, num_stages=stages // 2 * 2 if warps == 8 else stages)
                if legal(problem, c, arch) is None:
                    out.append(c)
    return out


def rows_of(n: int, tiles_m: int, split: int, room: int) -> list[tuple[int, int]]:
    """(weight rows of a tile, CTAs on an SM): 64 rows; and the fewest with which all tiles are on the chip at once, with one or two
    CTAs on an SM, so that all SMs have as much to do. K is not cut where there are more tiles than two CTAs on each SM take.

    room: how many tiles of `split` CTAs are on the chip at once, with one on an SM.
    """
    def ctas(rows: int) -> int:
        return -(-(-(-n // rows) * tiles_m) // room)

    whole = ctas(ROWS)
    found = [(ROWS, min(whole, 2))] if split == 1 or whole <= 2 else []
    for most in (1, 2) if split == 2 else (1,) if whole == 1 else (2,):
        fewest = next((r for r in range(LEAST, ROWS, STEP) if ctas(r) <= most), 0)
        found += [(fewest, most)] if fewest and fewest not in [r for r, _ in found] else []
    return found


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run the problem, or None."""
    if config.block_m not in TOKENS or config.block_k != 128 or not config.swap_ab:
        return f"expected {TOKENS} token columns x 128 of K, and swap_ab"
    if not LEAST <= config.block_n <= ROWS or config.block_n % STEP:
        return f"{config.block_n} weight rows, expected {LEAST} to {ROWS} in steps of {STEP}"
    if config.num_warps not in (4, 8):
        return f"{config.num_warps} warps, expected one or two consumers of 4"
    if config.num_warps == 8 and config.num_stages % 2:     # who does not see each use of a slot can't tell one from the next
        return f"{config.num_stages} stages, expected an even number, so that each of two consumers has slots of its own"
    if (reason := tile.illegal_split(problem, config, trip_of(config))) is not None:
        return reason
    ctas, there = config.option("ctas", 1), consumer_registers(config)
    need = 56 + config.block_m // 2 * (1 + 2 * GROUP[config.block_m])
    if not 1 <= ctas <= 2 or need > there:
        return f"ctas={ctas}, expected 1 or 2 on an SM that leave a consumer {need} registers a thread, not {there}"
    if config.num_stages < 4 or smem_bytes(problem, config) > smem_budget(config, arch):
        return f"{config.num_stages} stages take {smem_bytes(problem, config)} bytes of shared memory; expected 4 or more that fit"
    return None


def workspace(problem: Problem, config: Config) -> int:
    return 0


# fitted to 749 times of 105 products on an H200: docs/measured.md
START = 3.06e-6
READ, STREAM = 0.62, 0.745      # of the bandwidth: of weights that stay in L2, that pass through it
UNEVEN = 0.05               # power of what SMs with most tiles have more than the mean
# a K block of a CTA by token columns and warps of consumers
BLOCK = {(8, 4): 0.154e-6, (8, 8): 0.128e-6, (16, 4): 0.184e-6, (16, 8): 0.151e-6, (32, 4): 0.242e-6, (32, 8): 0.273e-6}
BESIDE = 0.72               # more of it, where two CTAs are on an SM
TILE = {4: 1.85e-6, 8: 2.26e-6}     # beside its K blocks
CUT = 0.53e-6               # a cluster of two adds its sums up; as much again for each doubling
_POWER = 2.6


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds: the bytes over the bandwidth and the K blocks of a CTA after one another, in waves."""
    ctas, alone, tiles = config.option("ctas", 1), tile.tiles_at_once(config, arch), tile.tiles_of(problem, config)
    block = BLOCK[config.block_m, config.num_warps] * (1.0 + BESIDE * (ctas > 1 and tiles > alone))
    work = -(-tiles // (alone * ctas)) * (chunk_of(problem, config) * block + TILE[config.num_warps])
    memory = tile.read_seconds(problem, arch, STREAM if config.option("stream") else READ)
    if tiles > alone:
        memory *= (-(-tiles // alone) * alone / tiles) ** UNEVEN
    return tile.seconds(config, START, memory, work, _POWER, CUT)


# ---------------------------------------------------------------- launch
def static(problem: Problem, config: Config, sw: int, sx: int) -> Static:
    """`sw`, `sx`: what `mx8_tile.row_alignment` says of both scales."""
    return Static(**tile.shared(problem, config, sw, consumer_registers(config), loader_registers(config)),
                  **tile.columns(problem, config, chunk_of(problem, config)),
                  GROUP=GROUP[config.block_m], CONSUMERS=config.num_warps // 4, X_AT=config.num_stages * ROWS // config.block_m,
                  FOURS=sx > 0)


def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    from . import mx8_decode_device as device

    config = step.config
    sw, sx = x.b.scale, x.a.scale
    assert sw is not None and sx is not None
    cfg = static(problem, config, tile.row_alignment(sw), tile.row_alignment(sx))
    x_codes = (Pointer(sx, torch.int32), sx.stride(-2) // 4, 1) if cfg.FOURS else (sx, sx.stride(-2), sx.stride(-1))
    return [tile.launch(device.mx8_decode_kernel, x, cfg.BT, ROWS, x_codes, chunk_of(problem, config), max_registers(config), cfg)]
