"""FP8 block-scaled GEMM on Hopper, dense and grouped, for problems with many rows: TMA, wgmma, warp specialisation, in Gluon.

E4M3 with 1x128 scales on A and 128x128 on B, FP32 or E8M0; partial sums are promoted to FP32 every 128 of K. Persistent:
one block (or two) an SM takes tile after tile. Device code: `fp8_block_device.py`; what is fixed at compile time:
`fp8_block_tile.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from ....arch import Arch
from ....problem import Config, Problem, Step, middle
from ...launching import Launch
from ...operands import Operands
from . import refusals
from .few_model import SPREAD, few, insured
from .fp8_block_tile import LAYOUTS, Tile, group_table
from .occupancy import smem_budget
from .tensor_maps import output, planes, row_tiles, stride

NAME = "gluon_sm90.fp8_block"
BACKEND = "gluon_sm90"
TAIL_LEAST, TAIL_MOST = 192, 256    # expected rows of a group: with fewer, weights read again for tails cost more than they save
TAIL_GROUPS, TAIL_ROWS = 512, 1 << 28      # within which tiles of 128 rows, and groups, are counted in one integer


# ---------------------------------------------------------------- what it takes
def supports(problem: Problem, arch: Arch) -> str | None:
    p, a, b = problem, problem.a, problem.b
    if (reason := refusals.op(p, arch)) is not None:
        return reason
    if a.format.element != "e4m3" or b.format.element != "e4m3":
        return f"takes E4M3 on both sides, not {a.format.element} x {b.format.element}"
    if a.format.group != (1, 128) or b.format.group != (128, 128):
        return f"takes 1x128 scales on A and 128x128 on B, not {a.format.group} x {b.format.group}"
    if a.prepack or b.prepack:
        return "takes plain operands, not prepacked ones"
    if a.major != "k" or b.major != "k":
        return f"wgmma takes FP8 with K contiguous, not {a.major} x {b.major}"
    if not a.aligned or not b.aligned:
        return "TMA needs operands whose base and outer strides are multiples of 16 bytes"
    return refusals.shape(p, 128)


# ---------------------------------------------------------------- configs
# block_m x block_n, blocks an SM -> warpgroups along M and N, pieces along M and N and columns of a piece of each. Blocks with
# 2 an SM have one warpgroup.
_SHAPES = {
    (128, 128, 1): (2, 1, 1, 1, 128), (256, 128, 1): (2, 1, 2, 1, 128), (128, 256, 1): (1, 2, 2, 1, 128),
    (64, 256, 1): (1, 2, 1, 1, 128), (128, 64, 1): (2, 1, 1, 1, 64), (64, 128, 1): (1, 2, 1, 1, 64),
    (64, 128, 2): (1, 1, 1, 1, 128), (128, 128, 2): (1, 1, 2, 1, 128), (128, 192, 1): (2, 1, 1, 3, 64),
}
_EXTRA = {"ctas": (1, 2), "slot": (1, 2), "unroll": (1, 2, 4, 8), "late_store": (0, 1), "tails": (0, 1)}


def _config(bm: int, bn: int, stages: int, strip: int = 16, **extra: int) -> Config:
    warps = 4 * (1 if extra.get("ctas") == 2 else 2) + 1
    return Config(bm, bn, 128, warps, stages, strip, persistent=True, extra=tuple(sorted(extra.items())))


_CANDIDATES = (
    _config(128, 128, 5, 8), _config(128, 128, 5), _config(128, 128, 5, 8, late_store=1), _config(128, 128, 5, late_store=1),
    _config(128, 128, 5, 8, unroll=8, late_store=1), _config(128, 128, 3, slot=2), _config(128, 256, 4), _config(128, 256, 4, 8),
    _config(128, 256, 4, tails=0),
    _config(128, 192, 5), _config(128, 128, 3, ctas=2), _config(64, 256, 4), _config(64, 256, 4, late_store=1),
    _config(64, 128, 3, ctas=2), _config(64, 128, 8), _config(128, 64, 7),
)


def configs(problem: Problem, arch: Arch) -> list[Config]:
    return [c for c in _CANDIDATES if legal(problem, c, arch) is None and not _crowded(tile_of(problem, c, arch))]


def _crowded(tile: Tile | None) -> bool:
    """Plain loads of A's scales beside 128 rows of sums a warpgroup: registers spill (measured: 1.2 to 1.7 of the best)."""
    return tile is not None and tile.MP > 1 and not tile.A_SCALE_TMA


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run the problem, or None."""
    extra = dict(config.extra)
    for name, value in extra.items():
        if value not in _EXTRA.get(name, ()):
            return f"{name}={value!r}, expected one of {_EXTRA.get(name, 'no such option')}"
    shape = (config.block_m, config.block_n, config.option("ctas", 1))
    if shape not in _SHAPES or config.block_k != 128:
        return f"tile {config.block_m}x{config.block_n}x{config.block_k} with {shape[2]} an SM, expected one of {list(_SHAPES)}"
    if not config.persistent or config.split_k != 1 or config.swap_ab:
        return "the kernel is persistent, without split_k and swap_ab"
    if config.num_stages < 2 or config.group_m < 1:
        return f"num_stages={config.num_stages}, group_m={config.group_m}, expected at least 2 and 1"
    _, _, mp, np, _ = _SHAPES[shape]
    if mp * np > 1 and config.option("slot", 1) > 1:
        return "slot=2 is for tiles of one piece a warpgroup"
    if config.option("unroll", 4) % config.option("slot", 1):
        return f"unroll={config.option('unroll', 4)} is no multiple of slot={config.option('slot', 1)}"
    tile = tile_of(problem, config, arch)
    if tile is None:
        return f"needs more shared memory than the {arch.smem} bytes of the device"
    return None


@lru_cache(maxsize=4096)
def tile_of(problem: Problem, config: Config, arch: Arch) -> Tile | None:
    """The compile-time constants of a legal config; None where it needs more shared memory than there is."""
    ctas, slot = config.option("ctas", 1), config.option("slot", 1)
    wgm, wgn, mp, np, columns = _SHAPES[config.block_m, config.block_n, ctas]
    pieces = mp * np
    unroll = config.option("unroll", 4 if pieces == 1 else 2 if np > 1 else 1)
    blocks = problem.k // 128
    groups = group_table(problem)
    consumers = wgm * wgn
    # staging of the store: as much as fits; whole pieces, or halves of their columns
    for split, buffers in ((1, pieces), (2, 2), (2, 1)) if columns == 128 else ((1, pieces), (1, 2), (1, 1)):
        tile = Tile(
            LAYOUTS[problem.layout], WGM=wgm, WGN=wgn, MP=mp, NP=np, WN=columns, STAGES=config.num_stages, KS=slot, UNROLL=unroll,
            HEAD=1 + (blocks - 1) % unroll, SKIP=-blocks % slot, STRIP=config.group_m, CTAS=ctas, OUT_BUFFERS=buffers,
            OUT_SPLIT=split, OUT_BYTES=problem.out_bytes, GROUPS=groups,
            A_SCALE_TMA=problem.a.scale_major == "mn" and problem.a.scale_dtype == "fp32",
            ZERO=problem.zeroes, ACCUMULATE=problem.accumulate,
            STORE_TMA=problem.out_aligned, LATE_STORE=bool(config.option("late_store", 0)) and not problem.accumulate,
            DOUBLE=np > 1, TAIL=_halves(problem, config),
            CONSUMER_REGISTERS=232, PRODUCER_REGISTERS=40 if consumers == 2 else 24)
        if tile.shared_bytes <= smem_budget(config, arch):
            return tile
    return None


def _halves(problem: Problem, config: Config) -> bool:
    """Whether tiles of a config are of two pieces along M, and a group's last one may be worked on by half."""
    wgm, _, mp, _, _ = _SHAPES[config.block_m, config.block_n, config.option("ctas", 1)]
    return (wgm, mp) == (1, 2) and bool(config.option("tails", 1)) and has_tails(problem)


def has_tails(problem: Problem) -> bool:
    """Whether a group's last tile may be worked on by half: an entry of the schedule's table holds two sums then."""
    return TAIL_LEAST < problem.rows <= TAIL_MOST and counts_tails(problem)


def counts_tails(problem: Problem) -> bool:
    """Whether an entry of the schedule's table can hold both sums."""
    return problem.layout in ("offsets", "masked") and problem.groups <= TAIL_GROUPS and problem.m < TAIL_ROWS


def workspace(problem: Problem, config: Config) -> int:
    return 0


# ---------------------------------------------------------------- cost
LAUNCH_SECONDS = 3.0e-6
MEMORY_SECONDS = 6.5e-6     # to fill the pipes and drain them, where bytes decide
MEMORY_EFFICIENCY = 0.93    # of the streaming rate
TILE_SECONDS = 0.6e-6       # of a tile, beyond its K blocks
DENSE_TILE_SECONDS = 0.3e-6     # of a dense product's 128x128
TAIL = 0.74                 # of a tile's time, where it has rows in its first half only
_LAST_WAVE = 0.35           # power of the share of blocks that are at work in the mean, by which bytes take longer
_NOT_HIDDEN = 0.15          # of the shorter of arithmetic and bytes,
_BESIDE_BYTES = 4e-6        # but no more of arithmetic than this, where bytes take far longer
# microseconds of one K block of 128 on one SM of an H200: where every SM is busy (with two blocks an SM: both of them), where
# only a few are, and what plain loads of A's scales cost beside (1 = nothing). Fitted to a sweep: docs/measured.md
_BLOCK_TIMES = {
    (128, 128, 1): (0.430, 0.36, 1.02), (256, 128, 1): (1.060, 0.76, 1.13), (128, 256, 1): (0.785, 0.72, 1.20),
    (64, 256, 1): (0.470, 0.42, 1.00), (128, 64, 1): (0.290, 0.28, 1.02), (64, 128, 1): (0.260, 0.24, 1.15),
    (64, 128, 2): (0.546, 0.45, 1.00), (128, 128, 2): (0.985, 0.55, 1.15),
    (128, 192, 1): (0.670, 0.56, 1.15),
}
# of those, for a dense product: from 182 candidates of 84 shapes of 256 rows and more
_DENSE = {(128, 128, 1): 0.93, (128, 192, 1): 0.9, (128, 256, 1): 0.96, (128, 64, 1): 0.82, (64, 128, 1): 0.92}
_DENSE_WAVES = {(128, 64, 1): 1.2, (64, 128, 1): 1.1}       # and for one that takes more than two waves
_OUTSIDE = 0.8              # TMA is slow where a box reaches outside its tensor
_H200_RATE = 1.40e15        # FP8 rate of the device that the figures are from


def tiles(problem: Problem, config: Config, spread: bool, width: float = 1.0) -> float:
    """Tiles expected to have work, of groups whose sizes are equal or spread about their mean."""
    return dealt(problem, config, spread, False, width).tiles


class Work(NamedTuple):
    """Tiles: whole ones, tails, and those among the tails whose group has whole ones too."""

    whole: float
    tails: float = 0.0
    again: float = 0.0

    @property
    def tiles(self) -> float:
        return self.whole + self.tails


def dealt(problem: Problem, config: Config, spread: bool, halves: bool, width: float = 1.0) -> Work:
    """Of these, which are worked on by half; `halves`: whether any are; `width`: of the spread."""
    num_n = -(-problem.n // config.block_n)
    if problem.layout == "dense":
        return Work(-(-problem.m // config.block_m) * num_n)
    if problem.layout == "contiguous":
        # a tile that two segments share is worked on twice; segments are taken to be aligned to 128 rows, half of them to 256
        shared = min(1.0, problem.groups * config.block_m / max(problem.m, 1)) / 2 if config.block_m > 128 else 0.0
        return Work(-(-problem.m // config.block_m) * num_n * (1 + shared))
    groups = problem.groups if problem.layout == "masked" else problem.active_groups
    rows = middle(problem.rows) if problem.rows > 8 else max(problem.rows, 1)
    most = problem.m if problem.layout == "masked" else 2 * rows       # a masked group holds no more
    sizes = [min(most, max(1, round(rows * (1 + (x - 1) * width)))) for x in SPREAD] if spread else [rows]
    each = groups * num_n / len(sizes)
    cut = [size for size in sizes if halves and 0 < size % config.block_m <= config.block_m // 2]
    whole = sum(-(-size // config.block_m) for size in sizes) - len(cut)
    return Work(whole * each, len(cut) * each, sum(size > config.block_m for size in cut) * each)


def waves(work: Work, blocks: int, tail: float = TAIL) -> float:
    """On so many blocks, each kind dealt out by itself: in whole tiles' times, of which a tail takes `tail`."""
    full = work.whole / blocks
    if full >= 8:
        return full + 0.5 + tail * work.tails / blocks
    full = math.ceil(full)
    return full + tail * math.ceil(max(0.0, work.tails - (full * blocks - work.whole)) / blocks)


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds: waves of tiles, or the bytes at the streaming rate, whichever is longer, and some of the other.

    Where only the device knows the sizes of groups, the mean of equal and of spread ones: a wave more or less hangs on it.
    """
    seconds, fewer = of_spread(problem, config, arch), few(problem)
    return insured(seconds, of_spread(fewer, config, arch), fewer, arch) if fewer else seconds


def of_spread(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds with the expected sizes of groups."""
    spreads = (False, True) if problem.counted else (False, )
    works = {dealt(problem, config, spread, _halves(problem, config)) for spread in spreads}
    return sum(_seconds(problem, config, arch, work) for work in works) / len(works)


def _seconds(problem: Problem, config: Config, arch: Arch, dealt: Work) -> float:
    ctas, work = config.option("ctas", 1), dealt.tiles
    sms = min(arch.sms, problem.max_sms or arch.sms)
    busy, alone, plain = _BLOCK_TIMES[config.block_m, config.block_n, ctas]
    tile = TILE_SECONDS
    if problem.a.scale_major != "mn" or problem.a.scale_dtype != "fp32":
        busy, alone = busy * plain, alone * plain
    if problem.layout == "dense" and problem.m < config.block_m:
        outside = 1 + _OUTSIDE * (1 - problem.m / config.block_m)
        busy, alone = busy * outside, alone * outside
    if problem.layout == "dense":
        shape = config.block_m, config.block_n, ctas
        less = _DENSE.get(shape, 1.0) * (_DENSE_WAVES.get(shape, 1.0) if work > 2 * sms else 1.0)
        busy, alone, tile = busy * less, alone * less, DENSE_TILE_SECONDS * config.block_m * config.block_n / (128 * 128)
    unit = problem.k // 128 * 1e-6 * rate(arch)
    if work <= sms:     # one tile an SM: the fewer, the faster
        seconds = unit * (alone + (busy / ctas - alone if ctas == 1 else 0.0) * work / sms) + tile
        seconds *= 1.0 if dealt.whole else TAIL
    else:
        last_alone = ctas == 2 and 0 < work % (sms * ctas) <= sms
        seconds = waves(dealt, sms * ctas) * (unit * busy + tile) - (unit * (busy - alone) if last_alone else 0.0)
    if config.option("late_store"):
        # the store beside the next tile's first product: seen to pay where K is long and tiles are many
        seconds *= 0.98 if problem.k >= 4096 and work > 2 * sms else 1.005
    busy_share = 1.0 if work <= sms else work / (sms * ctas) / math.ceil(work / (sms * ctas))
    # a tail is worked on so long after the whole tiles of its columns that their weights are read for it again
    return with_memory(seconds, work, problem, arch, busy_share ** -_LAST_WAVE, dealt.again * config.block_n * problem.k)


def rate(arch: Arch) -> float:
    """Time of one SM's arithmetic, in that of the device that the figures are from."""
    return (_H200_RATE / 132) / (arch.fp8_flops / arch.sms)


def with_memory(seconds: float, work: float, problem: Problem, arch: Arch, slower: float = 1.0, more: float = 0.0) -> float:
    """The launch's seconds, of the arithmetic's and of the bytes (`more` of them than there are at least): `work` blocks are at it,
    and bytes take so much longer."""
    sms = min(arch.sms, problem.max_sms or arch.sms)
    rate = arch.bandwidth * MEMORY_EFFICIENCY * min(1.0, max(work, 1) / (0.6 * sms))
    memory = MEMORY_SECONDS + slower * (problem.bytes + more) / rate
    if seconds > memory:
        return LAUNCH_SECONDS + seconds + _NOT_HIDDEN * memory
    beside = _NOT_HIDDEN * seconds
    return LAUNCH_SECONDS + memory + min(beside, max(_BESIDE_BYTES, beside * (seconds / memory) ** 2))


# ---------------------------------------------------------------- launch
def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    from ....arch import detect
    from . import fp8_block_device as device

    arch = detect(x.out.device)
    tile = tile_of(problem, step.config, arch)
    assert tile is not None, f"{step.config} is not legal for {problem}"
    tile, given = arguments(problem, x, tile, tile.A_BOX)
    sms = arch.sms if not problem.max_sms else min(problem.max_sms, arch.sms)
    # blocks spread over the SMs before two share one, so a limit on SMs takes one block each
    grid = max(1, min(sms * (tile.CTAS if sms == arch.sms else 1), row_tiles(problem, x, tile.BM) * -(-x.n // tile.BN)))
    return [Launch(device.fp8_block_kernel, (grid,), (*given, tile), {"num_warps": 4, "maxnreg": tile.max_registers})]


def arguments(problem: Problem, x: Operands, tile: Any, a_box: int) -> tuple[Any, tuple[Any, ...]]:
    """(the tile, without what these operands' strides don't allow; the kernel's arguments up to it). `tile`: of this kernel or
    of the one on clusters; `a_box`: rows of A in a box."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    a, b, sa, sb, out = x.a.data, x.b.data, x.a.scale, x.b.scale, x.out
    assert sa is not None and sb is not None
    masked = problem.layout == "masked"
    blocks = x.k // 128
    om = stride(out, -2, x.n)
    og = stride(out, 0, om * x.m) if masked else 0
    if tile.STORE_TMA and og % om:
        tile = replace(tile, STORE_TMA=False)
    pitch = 0
    if tile.A_SCALE_TMA:
        column = stride(sa, -1, -(-x.m // 4) * 4)
        group = stride(sa, 0, column * blocks) if masked else 0
        if column and not group % column and not column % 4 and not (problem.layout == "psum" and x.alignment % 4):
            pitch = group // column
        else:
            tile = replace(tile, A_SCALE_TMA=False)

    sa_desc = None
    if tile.A_SCALE_TMA:
        rows = (x.groups - 1) * pitch + blocks if masked else blocks
        sa_desc = TensorDescriptor(sa, [rows, x.m], [column, 1], [1, tile.BM],
                                   gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2))
    out_desc = None
    if tile.STORE_TMA:
        out_desc = output(x, og, om, tile.OUT_COLS, tile.OUT_BYTES)
    plain: tuple[Tensor | int | None, ...] = (None, None, None, None)     # where A's scales come by plain loads
    if not tile.A_SCALE_TMA:
        plain = (sa, sa.stride(0) if masked else 0, sa.stride(-2), sa.stride(-1))
    return tile, (
        planes(a, x.k, a_box), sa_desc, planes(b, x.k, tile.B_BOX & -tile.B_BOX), out_desc, out, plain[0], sb, x.index, x.m, x.n,
        blocks, x.groups, x.alignment, pitch, *plain[1:], sb.stride(0) if sb.dim() == 3 else 0, sb.stride(-2),
        sb.stride(-1), og, om, og // om)
