"""FP8 GEMM on Hopper with prepacked MXFP4 weights, dense and grouped, for problems with many rows: weights expanded to E4M3.

Weights stay 4-bit in memory. A row's scales are folded into E4M3, losslessly where they lie within 15 powers of two of each
other (`PackedWeight.top`), and the row's own power of two is applied to the sum. Activations are FP8 with 1x128 scales, or MXFP4,
which a launch in front brings to FP8 with 1x128 scales; where the device finds that this would not be exact, a second product,
which is launched behind and does nothing otherwise, takes K 32 at a time with all of A's scales. A group's last tile that has rows
in its first half only may be worked on by half (`tails`), and a few rows beyond whole tiles with the last of them (`fold_stub.py`);
of few masked groups it may be in quarters, too, and so may whole tiles of a last round that leaves blocks idle, as the device finds
best (`quarters`). Device code: `fold_device.py`, `fold_stub_device.py`, `fold_quarters_device.py`; what is fixed at compile time:
`fold_tile.py`. To expand a tile anew for every 256 rows costs more instructions than there are beside wgmma: where groups have so
many rows that it pays, all weights are expanded once a call instead (`fold_whole.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....arch import Arch
from ....prepack_bits import ORDERS
from ....problem import Config, Problem, Step
from ...launching import Launch, Pointer
from ...operands import Operands
from . import fold_stub, fold_whole, fp8_block, refusals
from .fold_tile import MAX_FLAGS, SCALE_BYTES, UNIT_ROWS, FoldTile
from .fp8_block import LAUNCH_SECONDS
from .fp8_block_tile import LAYOUTS, group_table
from .fp8_scaled import MEMORY_EFFICIENCY, MEMORY_SECONDS
from .tensor_maps import output, planes, row_tiles, stride

NAME = "gluon_sm90.fold"
Flags = tuple[Pointer, int]      # where they are, and their number
BACKEND = "gluon_sm90"
BLOCK = 128             # of K
MASKED_ELEMENTS = 1 << 30
PREP_ROWS = 32          # of A that a program of the launch in front takes at a time


# ---------------------------------------------------------------- what it takes
def supports(problem: Problem, arch: Arch) -> str | None:
    p, a, b = problem, problem.a, problem.b
    if (reason := refusals.op(p, arch)) is not None:
        return reason
    if b.format.element != "e2m1" or b.prepack.partition(":")[0] not in ORDERS:
        orders = " or ".join(ORDERS)
        return f"takes MXFP4 weights that narrowgemm.prepack() brought to the order {orders}, not {b.format.name} as they are"
    if ":" in b.prepack:
        return "stores rows in their order: weights packed with pair= are for an activation"
    if not b.folds:
        return "takes weights whose rows have scales within 15 powers of two of each other: others are not exact in E4M3"
    if (a.format.element, a.format.group) not in (("e4m3", (1, 128)), ("e2m1", (1, 32))):
        return f"takes FP8 1x128 and MXFP4 activations, not {a.format.name}"
    if a.major != "k" or a.prepack:
        return "needs A K-major, as it is"
    if not a.aligned and a.format.element == "e4m3":
        return "TMA needs A's base and outer strides in multiples of 16 bytes"
    if p.layout == "masked" and a.format.element == "e2m1" and p.groups * p.m * p.k > MASKED_ELEMENTS:
        return f"has room for all {p.groups * p.m} rows of a masked A in E4M3, up to {MASKED_ELEMENTS} elements"
    if p.layout == "psum" and p.alignment % 4:
        return f"TMA brings A's scales in fours of rows: groups have to start at multiples of 4, not {p.alignment}"
    return refusals.shape(p, 32)


def direct(problem: Problem) -> bool:
    """Whether TMA takes A and its scales as they are."""
    return problem.a.format.element == "e4m3" and problem.a.scale_dtype == "fp32" and problem.a.scale_major == "mn"


# ---------------------------------------------------------------- configs
# block_m x block_n -> warpgroups along M and N, pieces of 64 x 128 of each along M
_SHAPES = {(256, 128): (2, 1, 2), (128, 256): (1, 2, 2), (128, 128): (2, 1, 1)}
_TAILS = (("tails", 1), )   # a group's last tile may be worked on by half
_QUARTERS = (("quarters", 1), )     # and so may whole tiles of the last round, by quarters
_ITEMS = 128                # places of a block's list of tiles and quarters
TAILS_LEAST = 128           # expected rows of a group, with fewer tiles of 128x128 do
_EXACT = (128, 128)     # tile of the product with all of A's scales
_WARPS = 13             # two consumers, the expander, the producer


def _config(bm: int, bn: int, strip: int, stages: int = 3, **extra: int) -> Config:
    return Config(bm, bn, BLOCK, _WARPS, stages, strip, persistent=True, extra=tuple(sorted(extra.items())))


_CANDIDATES = (_config(256, 128, 8), _config(128, 256, 8), _config(256, 128, 16), _config(128, 256, 16),
               _config(128, 128, 8, 4), _config(256, 128, 8, tails=1), _config(256, 128, 8, quarters=1))


def configs(problem: Problem, arch: Arch) -> list[Config]:
    # rows of the output off 16 bytes take registers that two places in the order of tiles leave none of
    fast, masked = expands_fast(problem), problem.layout == "masked"
    tails = (masked or fast) and problem.rows > TAILS_LEAST and problem.out_aligned
    offered = ((), _TAILS, _QUARTERS) if tails and fast and masked else ((), _TAILS) if tails else ((), )
    own = [c for c in _CANDIDATES if c.extra in offered and legal(problem, c, arch) is None]
    return [*own, *fold_whole.configs(problem, arch)]


def expands_fast(problem: Problem) -> bool:
    """Whether tiles take `_NIBBLE_TIMES`. By offsets that was measured with more rows than `TAILS_LEAST` only."""
    few = problem.layout == "offsets" and problem.rows <= TAILS_LEAST
    return fold_whole.nibbles(problem) and problem.layout in ("masked", "offsets") and not few


def whole(config: Config) -> int:
    """Whether all weights are expanded once a call."""
    return config.option("whole", 0)


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run the problem, or None."""
    if whole(config):
        return fold_whole.legal(problem, config, arch)
    if (config.block_m, config.block_n) not in _SHAPES or config.block_k != BLOCK:
        return f"tile {config.block_m}x{config.block_n}x{config.block_k}, expected one of {list(_SHAPES)}, and {BLOCK}"
    if config.num_warps != _WARPS or not config.persistent or config.split_k != 1 or config.swap_ab:
        return f"expected {_WARPS} warps and persistent, without split_k and swap_ab"
    if config.extra not in ((), _TAILS, _QUARTERS) or config.num_stages < 2 or config.group_m < 1:
        given = f"num_stages={config.num_stages}, group_m={config.group_m}, extra={config.extra}"
        return f"{given}, expected at least 2 and 1, and {_TAILS}, {_QUARTERS} or none"
    if config.extra and not (_SHAPES[config.block_m, config.block_n][2] > 1 and fp8_block.counts_tails(problem)):
        return "tails=1 is for two pieces along M, and for groups whose whole tiles and tails are counted in one integer"
    listed = problem.layout == "masked" and problem.groups <= 32 and _most_items(problem, config, arch) <= _ITEMS
    if config.extra == _QUARTERS and not listed:
        return f"quarters=1 is for up to 32 masked groups, of which a block has {_ITEMS} tiles at most"
    if problem.accumulate and (config.block_m, config.block_n) != (128, 128):
        return "adding to the output beside 128 rows of sums a warpgroup takes more registers than there are"
    if tile_of(problem, config, arch) is None:
        return f"needs more shared memory than the {arch.smem} bytes of the device"
    return None


def _most_items(problem: Problem, config: Config, arch: Arch) -> int:
    """Tiles, quarters and an end that a block's list may come to hold."""
    blocks, n = min(arch.sms, problem.max_sms or arch.sms), -(-problem.n // config.block_n)
    whole = problem.groups * -(-problem.m // config.block_m) * n
    return -(-whole // blocks) + -(-(problem.groups * 2 * n + 4 * blocks) // blocks) + 4


@lru_cache(maxsize=4096)
def tile_of(problem: Problem, config: Config, arch: Arch, factor: bool = False, exact: bool = False,
            stub: bool = False) -> FoldTile | None:
    """The compile-time constants of a config; None where it needs more shared memory than there is. factor: weight rows have
    factors; exact: of the product with all of MXFP4's scales; stub: rows beyond whole tiles are worked on with them, if offered."""
    shape = _EXACT if exact else (config.block_m, config.block_n)
    wgm, wgn, mp = _SHAPES[shape]
    stub = stub and config.extra == _TAILS and not factor and not exact and fold_stub.offered(problem)
    groups = fold_stub.TABLE if stub else group_table(problem)
    gate = 0 if problem.a.format.element == "e4m3" else 2 if exact else 1
    # staging of the store and slots of 4-bit weights: as much as fits
    quarters = config.extra == _QUARTERS and not exact
    for w_stages, split, buffers in ((3, 1, mp), (3, 2, 2), (3, 2, 1), (2, 2, 1))[quarters:]:
        tile = FoldTile(
            LAYOUTS[problem.layout], WGM=wgm, WGN=wgn, MP=mp, NP=1, WN=128, STAGES=config.num_stages, KS=1, UNROLL=1, HEAD=1,
            SKIP=0, STRIP=config.group_m, CTAS=1, OUT_BUFFERS=buffers, OUT_SPLIT=split, OUT_BYTES=problem.out_bytes, GROUPS=groups,
            A_SCALE_TMA=True,
            ZERO=problem.zeroes, ACCUMULATE=problem.accumulate,
            STORE_TMA=problem.out_aligned, LATE_STORE=False, SINGLE=mp == 1, TAIL=bool(config.extra) and not exact, FACTOR=factor,
            NIBBLES=fold_whole.nibbles(problem), SUB=4 if exact else 1, CONSUMER_REGISTERS=216 if stub else 208,
            EXPANDER_REGISTERS=56 if stub else 72,
            PRODUCER_REGISTERS=24, W_STAGES=w_stages, GATE=gate, FLAGS=MAX_FLAGS if gate else 32,
            THREE=config.extra == _TAILS and not exact and problem.layout == "offsets",     # run and timed there: 12% at 192 rows
            STUB=fold_stub.ROWS if stub else 0, QUARTERS=quarters, ITEMS=_ITEMS if quarters else 0,
            LISTED=next(n for n in (1, 2, 4, 8, 16, 32) if n >= problem.groups) if quarters else 0)
        if tile.shared_bytes <= arch.smem:
            return tile
    return None


# ---------------------------------------------------------------- workspace
class Regions(NamedTuple):
    """Byte offsets of the parts of the workspace, and its size."""

    x: int
    scale: int
    flags: int
    size: int


def regions(problem: Problem, m: int) -> Regions:
    """`m`: rows of A, of one group where masked."""
    if direct(problem):
        return Regions(0, 0, 0, 0)
    groups, blocks = problem.groups if problem.layout == "masked" else 1, -(-problem.k // BLOCK)
    fp4 = problem.a.format.element == "e2m1"
    sizes = (groups * m * blocks * BLOCK if fp4 else 0, 4 * groups * blocks * (4 if fp4 else 1) * column(m),
             4 * MAX_FLAGS if fp4 else 0)
    return Regions(*accumulate((-(-s // 256) * 256 for s in sizes), initial=0))


def column(m: int) -> int:
    """Of A's scales: m up to 16 bytes."""
    return -(-m // 4) * 4


def workspace(problem: Problem, config: Config) -> int:
    return regions(problem, problem.m).size + (fold_whole.workspace(problem, config) if whole(config) else 0)


# ---------------------------------------------------------------- cost
TILE_SECONDS = 0.9e-6       # of a tile, beyond its K blocks
_NIBBLE_SECONDS = 1.7e-6    # the same of those with `_NIBBLE_TIMES`
# microseconds of one K block of 128 on one SM, where every SM is busy: docs/measured.md
_BLOCK_TIMES = {(256, 128): 1.15, (128, 256): 1.50, (128, 128): 0.82}
# the same of weights packed for FP8 activations, in masked groups of any size (`expands_fast`)
_NIBBLE_TIMES = {(256, 128): 0.88, (128, 256): 1.10, (128, 128): 0.62}
_ALONE = 0.95               # of these, where hardly any other SM is at work
_TAIL = 0.76                # of a tile's time, where it has rows in its first half only
_QUARTER = 0.52             # and of a quarter's
_LIST_SECONDS = 1.2e-6      # until a block has its list of tiles and quarters
_MANY_ROUNDS = 8            # with more, the last one is half full in the mean
_H200_RATE = 1.40e15
_MANY_GROUPS = 64           # by offsets are never of one size
_FEW_ROWS, _SPREAD = 256, 1.4       # and those of few rows took so much more, with weights in the other order
COPY = 0.80                 # of the streaming rate, in the launch in front
_NOT_HIDDEN = 0.15


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds: waves of tiles, or the bytes at the streaming rate, whichever is longer, and what is launched around."""
    front, rate = 0.0, arch.bandwidth * min(arch.sms, problem.max_sms or arch.sms) / arch.sms
    blocks = -(-problem.k // BLOCK)
    if not direct(problem):
        rows = problem.m * (problem.groups if problem.layout == "masked" else 1)
        live = problem.groups * problem.rows if problem.layout == "masked" else problem.m
        fp4 = problem.a.format.element == "e2m1"
        front = (1.6 * live * problem.k if fp4 else 8 * rows * blocks) / (rate * COPY) + LAUNCH_SECONDS * (2 if fp4 else 1)
    return front + (fold_whole.estimate(problem, config, arch) if whole(config) else _product_seconds(problem, config, arch))


def _product_seconds(problem: Problem, config: Config, arch: Arch) -> float:
    halves = bool(config.extra)
    width = fold_whole.spread_width(problem)
    sms = min(arch.sms, problem.max_sms or arch.sms)
    blocks = -(-problem.k // BLOCK)
    nibbles = expands_fast(problem)
    routed = nibbles and problem.layout == "offsets" and problem.groups >= _MANY_GROUPS
    spreads = (False, ) if not problem.counted else (True, ) if routed else (False, True)
    works = {fp8_block.dealt(problem, config, spread, halves, width) for spread in spreads}
    times = _NIBBLE_TIMES if nibbles else _BLOCK_TIMES
    unit = blocks * 1e-6 * (_H200_RATE / 132) / (arch.fp8_flops / arch.sms) * times[config.block_m, config.block_n]
    tile = unit + (_NIBBLE_SECONDS if nibbles else TILE_SECONDS)
    half, quarter = (1 - (1 - share) * unit / tile for share in (_TAIL, _QUARTER))
    seconds = _LIST_SECONDS if config.extra == _QUARTERS else 0.0
    for work in works:
        rounds = _rounds(work, sms, half, quarter) if config.extra == _QUARTERS else fp8_block.waves(work, sms, half)
        alone = _ALONE if nibbles else 1.0
        seconds += rounds * tile * (alone + (1 - alone) * min(1.0, work.tiles / sms)) / len(works)
    if problem.groups >= _MANY_GROUPS and problem.rows <= _FEW_ROWS and problem.counted and not nibbles:
        seconds *= _SPREAD
    rate = arch.bandwidth * sms / arch.sms
    memory = MEMORY_SECONDS + problem.bytes / (rate * MEMORY_EFFICIENCY)
    return LAUNCH_SECONDS + max(seconds, memory) + _NOT_HIDDEN * min(seconds, memory)


def _rounds(work: fp8_block.Work, blocks: int, half: float = _TAIL, quarter: float = _QUARTER) -> float:
    """In whole tiles' times, of which parts take so much: the rule of `fold_quarters_device.py`."""
    if work.whole >= _MANY_ROUNDS * blocks:
        return fp8_block.waves(work, blocks, half)
    whole, tails = math.ceil(work.whole), math.ceil(work.tails)
    left = whole % blocks
    found = []
    for share, time in ((1, half), (2, quarter)):
        found.append(-(-(share * (tails + 2 * left)) // blocks) * time)
        if left:
            found.append(1.0 + -(-max(0, share * (tails - (blocks - left))) // blocks) * time)
    return whole // blocks + min(found)


# ---------------------------------------------------------------- launch
def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    """The launch in front, if there is one, the product, and the one that is exact where that isn't."""
    from ....arch import detect
    from . import fold_prep_device

    arch = detect(x.out.device)
    a, scale = x.a.data, x.a.scale
    assert scale is not None
    masked, blocks = problem.layout == "masked", -(-x.k // BLOCK)
    groups, pitch = x.groups if masked else 1, column(x.m)
    if direct(problem):
        pitch = stride(scale, -1, pitch)
        group = stride(scale, 0, pitch * blocks) if masked else pitch * blocks
        return _products(step.config, problem, x, arch, partial(planes, a, x.k), scale, (group, pitch), workspace, 0)
    assert workspace is not None
    at = regions(problem, x.m)
    scales = Pointer(workspace, torch.float32, at.scale)
    ssg = scale.stride(0) if masked else 0
    if problem.a.format.element == "e4m3":
        prep = Launch(fold_prep_device.fold_scales_kernel, (groups * -(-x.m // 128),),
                      (scale, scales, x.m, blocks, ssg, scale.stride(-2), scale.stride(-1), pitch),
                      {"BM": 128, "BK": 32, "E8M0": scale.dtype == torch.uint8, "num_warps": 4})
        own = partial(planes, a, x.k)
        return [prep, *_products(step.config, problem, x, arch, own, scales, (pitch * blocks, pitch), workspace, at.size)]
    rows = groups * -(-x.m // PREP_ROWS)
    count = min(MAX_FLAGS, rows * blocks)
    y, flags = Pointer(workspace, torch.float8_e4m3fn, at.x), Pointer(workspace, torch.int32, at.flags)
    prep = _rows_to_fp8(problem, x, y, scales, flags, count, rows, pitch)
    tile = tile_of(problem, step.config, arch, x.factor is not None, True)
    assert tile is not None
    made, group, up = partial(fold_whole.fp8_rows, y, groups, x.m, blocks * BLOCK), 4 * pitch * blocks, (flags, count)
    # without SUB: the first of the four scales of a block, which are one
    return [prep, *_products(step.config, problem, x, arch, made, scales, (group, 4 * pitch), workspace, at.size, up),
            _product(tile, problem, x, arch, made, scales, (group, pitch), up)]


def _rows_to_fp8(problem: Problem, x: Operands, y: Pointer, scales: Pointer, flags: Pointer, count: int, rows: int,
                 pitch: int) -> Launch:
    """MXFP4 activations to E4M3: word by word where rows lie on 16 bytes, else byte by byte, which takes several times as long."""
    from . import fold_prep_device, fold_words_device

    a, scale, masked, blocks = x.a.data, x.a.scale, problem.layout == "masked", -(-x.k // BLOCK)
    assert scale is not None
    words = problem.a.aligned
    each, k = (4, x.k // 32) if words else (1, x.k)
    source, to = (Pointer(a, torch.int32), Pointer(y.tensor, torch.int32, y.offset)) if words else (a, y)
    kernel: Any = fold_words_device.fold_words_kernel if words else fold_prep_device.fold_rows_kernel
    given = (source, scale, flags if x.index is None else x.index, to, scales, flags, x.m, k, blocks, rows,
             a.stride(0) // each if masked else 0, a.stride(-2) // each, scale.stride(0) if masked else 0, scale.stride(-2),
             scale.stride(-1), pitch)
    return Launch(kernel, (count,), given, {**({} if words else {"BM": PREP_ROWS}), "MASKED": masked, "num_warps": 4})


def _products(config: Config, problem: Problem, x: Operands, arch: Arch, a: Callable[[int], Any], scales: Tensor | Pointer,
              strides: tuple[int, int], workspace: Tensor | None, at: int, flags: Flags | None = None) -> list[Launch]:
    """The product with one scale of A every 128 of K. `a`: makes A's TMA descriptor for boxes of so many rows; `at`: bytes of
    the workspace that are taken; `strides`, `flags`: see `_product`."""
    if whole(config):
        if not strides[0] % strides[1]:
            assert workspace is not None
            return fold_whole.launches(problem, config, x, arch, a, scales, strides, workspace, at, flags)
        config = _CANDIDATES[0]     # the FP8 kernels take A's scales as rows of one matrix
    tile = tile_of(problem, config, arch, x.factor is not None, stub=fold_stub.wins(x.m, x.groups))
    assert tile is not None, f"{config} is not legal for {problem}"
    return [_product(tile, problem, x, arch, a, scales, strides, flags)]


def _product(tile: FoldTile, problem: Problem, x: Operands, arch: Arch, a: Callable[[int], Any], scales: Tensor | Pointer,
             strides: tuple[int, int], flags: Flags | None) -> Launch:
    """`a`: see `_products`; `strides`: of A's scales, from one group to the next and from one row of M scales to the next; `flags`:
    of what is not exact, and their number."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from . import fold_device as device

    fields, top = x.b.scale, x.top
    assert fields is not None and top is not None
    masked = problem.layout == "masked"
    blocks, units = -(-x.k // BLOCK), -(-x.n // UNIT_ROWS)
    om = stride(x.out, -2, x.n)
    og = stride(x.out, 0, om * x.m) if masked else 0

    def of_scales(rows: int) -> Any:
        flat = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)
        shape = [x.groups if masked else 1, blocks * tile.SUB, x.m]
        return TensorDescriptor(scales, shape, [*strides, 1], [1, tile.SUB, rows], flat)

    descriptors = [a(tile.A_BOX), of_scales(tile.BM)]
    for base, deep, box in ((Pointer(x.b.data, torch.int32), blocks * 4, [tile.UNITS, 4, 256]),
                            (Pointer(fields, torch.int32), -(-blocks // 2), [tile.UNITS, 1, SCALE_BYTES // 4])):
        descriptors.append(TensorDescriptor(base, [x.groups * units, deep, box[2]], [deep * box[2], box[2], 1], box,
                                            device.PLANES.value))
    descriptors += [a(tile.STUB), of_scales(tile.STUB)] if tile.STUB else [None, None]
    descriptors.append(output(x, og, om, tile.OUT_COLS, tile.OUT_BYTES) if tile.STORE_TMA else None)
    sms = min(problem.max_sms or arch.sms, arch.sms)
    grid = max(1, min(sms, row_tiles(problem, x, tile.BM) * -(-x.n // tile.BN) * (4 if tile.QUARTERS else 1)))
    pointer, count = flags or (top, 0)
    given = (x.out, top, top if x.factor is None else x.factor, x.index, pointer)
    sizes = (x.m, x.n, blocks, x.groups, x.alignment, count, units, og, om, og // om)
    options = {"num_warps": 4, "maxnreg": tile.max_registers}
    return Launch(device.fold_kernel, (grid,), (*descriptors, *given, *sizes, tile), options)
