"""Hopper product of MXFP8 x MXFP8 by FP16 wgmma, weights as a checkpoint has them: dense, hundreds of tokens.

How it works: `mx8_f16_device.py`. Fewer tokens take `mx8_bf16`, more than 2048 `expand`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ....arch import Arch
from ....problem import Config, Problem, Step
from ...launching import Launch, Pointer
from ...operands import Operands
from . import mx8_tile, narrow
from .mx8_tile import blocks_of
from .tensor_maps import planes

NAME = "gluon_sm90.mx8_f16"
BACKEND = "gluon_sm90"
FEWEST, MOST = 129, 2048     # tokens: fewer are for `mx8_bf16`; with more, expanding weights once a call takes little of it
MAX_K = 16384                # of a row, which a program of the launch in front has at once
# by consumers, of 64 weight rows each: token columns of a tile -> microseconds of its K block on one SM of a device of the rate
WIDTHS = {2: {64: 0.42, 80: 0.475, 96: 0.51, 112: 0.595, 128: 0.66, 160: 0.785, 176: 0.89, 192: 0.99, 256: 1.37},
          3: {64: 0.59, 96: 0.775, 112: 0.86, 128: 0.97, 160: 1.175}}
RATE = 0.76e15
REGISTERS = {2: (168, 240), 3: (128, 160)}                   # a thread's at the launch, a consumer's
WHOLE = {2: 160, 3: 96}                                      # most columns that leave registers for a whole K block, expanded
BUFFERS, STRIP, MAX_STAGES = 4, 8, 8
MOVED = 2048                 # of a token that the launch in front moves together
# behind: tokens and columns that are summed together, blocks of K that are asked for at once, flags that are looked at so
MEND = {"BM": 16, "BN": 32, "TOGETHER": 3, "LOOK": 2048, "num_warps": 4, "num_stages": 1, "maxnreg": 160, "launch_pdl": True}
SPARE = 1024                 # bytes of shared memory beside the ring


@dataclass(frozen=True)
class Tile:
    """What the product is compiled for."""

    BT: int                  # token columns
    CONSUMERS: int
    STAGES: int
    STRIP: int = STRIP       # tiles of weight rows that share tokens through L2
    OUT_BUFFERS: int = BUFFERS
    OUT_BYTES: int = 2
    STORE_TMA: bool = True
    CONSUMER_REGISTERS: int = 240
    PRODUCER_REGISTERS: int = 24
    HALF: bool = field(init=False)      # of a K block is expanded at a time
    BN: int = field(init=False)         # weight rows
    W_AT: int = field(init=False)       # bytes in front of the weights' ring, of 8192 a consumer's box
    X_AT: int = field(init=False)
    BARS_AT: int = field(init=False)

    def __post_init__(self) -> None:
        def put(name: str, value: int) -> None:
            object.__setattr__(self, name, value)

        put("HALF", WHOLE[self.CONSUMERS] < self.BT)
        put("BN", self.CONSUMERS * 64)
        put("W_AT", -(-self.CONSUMERS * self.OUT_BUFFERS * 16 * 64 * self.OUT_BYTES // 8192) * 8192)
        put("X_AT", self.W_AT + self.STAGES * self.BN * 128)
        put("BARS_AT", self.X_AT + self.STAGES * self.BT * 256)

    @property
    def boxes(self) -> tuple[tuple[int, int], ...]:
        return tuple((which, rows) for which, rows in ((0, self.BN), (1, self.BT)) if rows & (rows - 1))


@dataclass(frozen=True)
class PrepStatic:
    """What `mx8_f16_prep_kernel` is compiled for."""

    BLOCKS: int              # of 32, of a row: a power of two
    PIECES: int              # that a program holds of its tokens
    BK: int = MOVED          # of K in one of them, whole 128
    TOKENS: int = 2          # of a program
    ROWS: int = 8            # of weights that one looks at
    COPY: bool = True        # their codes, which the product takes four at a time, to the workspace
    LOOK: int = 64           # blocks of these, at a time, where a code is far below the largest
    PDL: bool = True         # the product starts meanwhile


def supports(problem: Problem, arch: Arch) -> str | None:
    if (reason := mx8_tile.of_tokens(problem, arch, FEWEST, MOST)) is not None:
        return reason
    return f"looks at scales of up to {MAX_K} of K at once, not {problem.k}" if problem.k > MAX_K else None


# ---------------------------------------------------------------- configs
def configs(problem: Problem, arch: Arch) -> list[Config]:
    """Of each number of consumers the three widths that take least."""
    out = []
    for consumers, widths in WIDTHS.items():
        every = [config_of(problem, w, consumers, arch) for w in widths]
        out += sorted((c for c in every if legal(problem, c, arch) is None), key=lambda c: estimate(problem, c, arch))[:3]
    return out


def config_of(problem: Problem, tokens: int, consumers: int, arch: Arch) -> Config:
    """With as many stages as fit."""
    def made(stages: int) -> Config:
        return Config(tokens, consumers * 64, 128, 4 * consumers + 1, stages, STRIP, swap_ab=True, persistent=True)

    return made(max(s for s in range(2, MAX_STAGES + 1) if s == 2 or smem_bytes(problem, made(s)) <= arch.smem))


def smem_bytes(problem: Problem, config: Config) -> int:
    return tile_of(problem, config).BARS_AT + SPARE


@lru_cache(maxsize=4096)
def tile_of(problem: Problem, config: Config) -> Tile:
    consumers = config.block_n // 64
    return Tile(BT=config.block_m, CONSUMERS=consumers, STAGES=config.num_stages, STRIP=config.group_m, OUT_BYTES=problem.out_bytes,
                STORE_TMA=problem.out_aligned, CONSUMER_REGISTERS=REGISTERS[consumers][1])


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run the problem, or None."""
    c = config
    if c.block_n % 64 or c.block_m not in WIDTHS.get(c.block_n // 64, ()) or c.block_k != 128:
        return f"tile {c.block_m}x{c.block_n}x{c.block_k}, expected tokens by consumers of 64 weight rows as in {WIDTHS}, and 128"
    if c.num_warps != c.block_n // 16 + 1 or not c.swap_ab or not c.persistent or c.split_k != 1 or c.extra:
        return f"expected {c.block_n // 16 + 1} warps, swap_ab and persistent, without split_k and extra options"
    if c.num_stages < 2 or c.group_m < 1 or smem_bytes(problem, c) > arch.smem:
        return f"{c.num_stages} stages take {smem_bytes(problem, c)} bytes of shared memory; expected 2 or more, in {arch.smem}"
    return None


# ---------------------------------------------------------------- workspace
class Regions(NamedTuple):
    """Byte offsets of the parts of the workspace, and its size: rows' largest codes and states, flags, weights' codes, tokens."""

    xtop: int
    xstate: int
    top: int
    state: int
    flags: int
    codes: int
    x: int
    size: int


def regions(problem: Problem, rows: int) -> Regions:
    sizes = (4 * rows, 4 * rows, 4 * problem.n, 4 * problem.n, rows + problem.n, problem.n * problem.k // 32, 2 * rows * problem.k)
    return Regions(*accumulate((-(-s // 256) * 256 for s in sizes), initial=0))


def workspace(problem: Problem, config: Config) -> int:
    return regions(problem, problem.m).size


# ---------------------------------------------------------------- cost
# fitted to 75 times on an H100, 256 to 2048 tokens, 3.4% in the mean, 9% at most: docs/measured.md
FRONT = 2.3e-6              # the launches, beside their bytes
COPY, CODES = 0.9, 0.15     # of the bandwidth, in the launch in front: tokens, codes of weights
READ = 0.75                 # and in the product
TILE = 3.0e-6
_POWER = 6


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds: rounds of tiles, or the bytes, and the launch in front."""
    rounds = math.ceil(-(-problem.m // config.block_m) * -(-problem.n // config.block_n) / arch.sms)
    block = WIDTHS[config.block_n // 64].get(config.block_m, math.inf) * 1e-6 * RATE / arch.bf16_flops * arch.sms / 132
    work = rounds * (blocks_of(problem) * block + TILE)
    weights, tokens = problem.b.format.storage_bytes(problem.n, problem.k), problem.m * problem.k
    memory = (weights + 2.0 * tokens) / (arch.bandwidth * READ)
    front = FRONT + (3.0 * tokens / COPY + problem.n * problem.k / 32 / CODES) / arch.bandwidth
    return front + (work**_POWER + memory**_POWER) ** (1 / _POWER)


# ---------------------------------------------------------------- launch
def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    """The launch in front, the product, and the one behind."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from ....arch import detect
    from . import mx8_f16_device as device
    from . import mx8_f16_prep_device as prep

    sw, sx = x.b.scale, x.a.scale
    assert sw is not None and sx is not None and workspace is not None
    cfg, at, i32 = tile_of(problem, step.config), regions(problem, x.m), torch.int32
    xtop, xstate, top, state = (Pointer(workspace, i32, o) for o in (at.xtop, at.xstate, at.top, at.state))
    xp = Pointer(workspace, torch.float16, at.x)
    tokens = TensorDescriptor(xp, [x.m, x.k], [x.k, 1], [narrow.power_of_two(cfg.BT), 64],
                              gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
    om = x.out.stride(-2)
    out = TensorDescriptor(x.out, [x.m, x.n], [om, 1], [16, 64], gl.NVMMASharedLayout.get_default_for(
        [16, 64], {2: gl.bfloat16, 4: gl.float32}[cfg.OUT_BYTES])) if cfg.STORE_TMA else None
    sms = detect(x.out.device).sms
    tiles = -(-x.m // cfg.BT) * -(-x.n // cfg.BN)
    lies = mx8_tile.row_alignment(sw) > 0
    codes, ssn = (Pointer(sw, i32), sw.stride(-2) // 4) if lies else (Pointer(workspace, i32, at.codes), blocks_of(problem))
    static = PrepStatic(COPY=not lies, BLOCKS=max(32, narrow.power_of_two(x.k // 32)), PIECES=-(-x.k // MOVED))
    programs = -(-x.m // static.TOKENS)
    strides = x.a.data.stride(-2), *sx.stride()[-2:], x.b.data.stride(-2), *sw.stride()[-2:]
    front = programs + -(-x.n // static.ROWS)
    flags = Pointer(workspace, torch.uint8, at.flags)
    return [
        Launch(prep.mx8_f16_prep_kernel, (front,),
               (x.a.data, sx, xp, xtop, xstate, x.b.data, sw, Pointer(workspace, torch.uint8, at.codes), top, state, flags,
                x.m, x.n, x.k, x.k // 32, programs, *strides, static), {"num_warps": 4}),
        Launch(device.mx8_f16_kernel, (min(sms, tiles),),
               (planes(x.b.data, x.k, narrow.power_of_two(cfg.BN)), tokens, out, x.out, codes, top, xtop, x.m, x.n,
                blocks_of(problem), ssn, om, cfg),
               {"num_warps": 4, "maxnreg": REGISTERS[cfg.CONSUMERS][0], "launch_pdl": True}, boxes=cfg.boxes),
        Launch(prep.mx8_f16_mend_kernel, (min(2 * sms, -(-x.m // MEND["BM"]) * -(-x.n // MEND["BN"])),),
               (x.a.data, sx, xstate, x.b.data, sw, state, flags, x.out, x.m, x.n, x.k, front, *strides, om), MEND)]
