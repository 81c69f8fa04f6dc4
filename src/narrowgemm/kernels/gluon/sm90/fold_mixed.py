"""FP8 products on Hopper with MXFP8 activations and prepacked MXFP4 weights, for problems with many rows, dense and grouped.

Weights fold into E4M3 with one power of two a row, without loss (`PackedWeight.top`), and are expanded once a call. A launch in
front folds A's four scales of 128 of K into one wherever that is exact, 64 rows at a time, and the product takes such a block in
parts elsewhere. Where the device finds that too much of A does not fold, or that scales are so far out that sums would leave FP32,
that product does nothing, and BF16's (`expand.py`), launched behind, does it all. Device code: `fold_mixed_device.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....arch import Arch
from ....problem import Config, Problem, Step
from ...launching import Launch, Pointer
from ...operands import Operands
from . import expand
from .expand import columns, unit_rows
from .fp8_block import tiles
from .fp8_block_tile import LAYOUTS, Tile, group_table
from .narrow import a_strides, power_of_two
from .tensor_maps import output, row_tiles, stride

NAME = "gluon_sm90.fold_mixed"
BACKEND = "gluon_sm90"
BLOCK = 128             # of K
FLAG_ROWS = 64          # of A that have a flag a K block
WHOLE_BLOCKS = 8        # of K of 64 rows of weights that a program expands
PROBES = 128            # blocks of A that are looked at in front: where more than half of them don't fold, nothing is tried
LOOKS = 4               # of a K block, where columns are left out: `fold_outliers_device.py`
LIMIT = 128             # of such columns, whose list lies behind the probes
PROBES_AT = 256         # bytes behind the count
FRONT = PROBES_AT + 4 * PROBES
LOOK_BYTES = LOOKS * 4 * (1 + 4)        # of a K block
FOLD_REGISTERS = 112, 96    # of a lane of the four warps that fold a block: four blocks an SM; five, where there are more than four
EARLY_BLOCKS = 4        # an SM, that may start beside the look in front; five where they are smaller
MOST_FLAGS = 0.75       # cuts that there may be a block of A: beyond, BF16 is faster
BEHIND = expand.CANDIDATES[0]   # of the product that takes what this one leaves


@dataclass(frozen=True)
class MixedTile(Tile):
    """As the FP8 kernel's, with four scales of A a K block. PICKS: columns of A in BF16, for elements of B that don't fold."""

    PICKS: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "BLOCK_BYTES", (self.BM + self.BN) * 128 + self.SUB * self.BM * 4)

    @property
    def shared_bytes(self) -> int:
        return super().shared_bytes + (256 if self.PICKS else 0)    # two more descriptors go to each kind of warps


# ---------------------------------------------------------------- what it takes
def supports(problem: Problem, arch: Arch) -> str | None:
    a, b = problem.a, problem.b
    if (a.format.element, a.format.group, a.scale_dtype) != ("e4m3", (1, 32), "e8m0"):
        return f"folds MXFP8 activations, not {a.format.name}"
    if b.format.element != "e2m1" or not b.folds:
        return "takes packed MXFP4 weights whose rows have scales within 15 powers of two: others are not exact in E4M3"
    if problem.accumulate:
        return "writes its output, with no accumulation"
    if problem.layout == "psum" and problem.alignment % 4:
        return f"TMA brings A's scales in fours of rows: groups have to start at multiples of 4, not {problem.alignment}"
    return expand.supports(problem, arch)


# ---------------------------------------------------------------- configs
def _config(strip: int) -> Config:
    return Config(128, 256, BLOCK, 9, 4, strip, persistent=True)


def configs_of() -> list[Config]:
    return [_config(8), _config(16)]


def configs(problem: Problem, arch: Arch) -> list[Config]:
    return [c for c in configs_of() if legal(problem, c, arch) is None]


def of_kind(config: Config) -> str | None:
    """Why `config` is none of these kernels', or None."""
    if config not in (_config(config.group_m), ) or config.group_m < 1:
        return f"{config}, expected {_config(8)} with any group_m"
    return None


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run the problem, or None."""
    if (reason := of_kind(config)) is not None:
        return reason
    if tile_of(problem, config, arch) is None:
        return f"needs more shared memory than the {arch.smem} bytes of the device"
    return None


@lru_cache(maxsize=4096)
def tile_of(problem: Problem, config: Config, arch: Arch, factor: bool = False, picks: bool = False) -> MixedTile | None:
    """The product's compile-time constants; None where it needs more shared memory than there is. factor: weight rows have some;
    picks: `MixedTile.PICKS`."""
    groups = group_table(problem)
    stages = config.num_stages - (problem.out_dtype == "fp32")      # staging of the store takes twice as much
    tile = MixedTile(
        LAYOUTS[problem.layout], WGM=1, WGN=2, MP=2, NP=1, WN=128, STAGES=stages, KS=1, UNROLL=1, HEAD=1, SKIP=0,
        STRIP=config.group_m, CTAS=1, OUT_BUFFERS=1, OUT_SPLIT=2, OUT_BYTES=problem.out_bytes, GROUPS=groups, A_SCALE_TMA=True,
        ZERO=problem.zeroes, STORE_TMA=problem.out_aligned, LATE_STORE=False,
        FOLD=True, FACTOR=factor, SUB=4, PICKS=picks)
    return tile if tile.shared_bytes <= arch.smem else None


# ---------------------------------------------------------------- workspace
class Regions(NamedTuple):
    """Byte offsets of the parts of the workspace. What BF16 needs starts where `x` does: one of the two is done."""

    counter: int
    x: int
    scale: int
    flags: int
    weights: int
    size: int


def regions(problem: Problem, m: int) -> Regions:
    """`m`: rows of A, of one group where masked."""
    planes, kx = problem.groups if problem.layout == "masked" else 1, columns(problem.k)
    blocks = kx // BLOCK
    sizes = (FRONT, planes * m * kx, 16 * planes * blocks * column(m), 4 * planes * blocks * -(-m // FLAG_ROWS),
             problem.groups * unit_rows(problem.n) * kx)
    at = Regions(*accumulate((-(-s // 256) * 256 for s in sizes), initial=0))
    return at._replace(size=max(at.size, expand.regions(problem, planes * m, at.x).size))


def column(m: int) -> int:
    """Of A's scales: m up to 16 bytes."""
    return -(-m // 4) * 4


def workspace(problem: Problem, config: Config) -> int:
    return regions(problem, problem.m).size


# ---------------------------------------------------------------- cost
LAUNCH_SECONDS = 14e-6      # five launches, two of which do nothing
TILE_SECONDS = 1.0e-6       # of a tile, beyond its K blocks
BLOCK_TIME = 0.87e-6        # of one K block of 128 on one SM of a device of the rate below, normal data's flags up
RATE = 1.40e15
COPY = 0.80                 # of the streaming rate, in the launches in front


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds, where no more of A's blocks have their flags up than have with normal data."""
    p = problem
    live = p.groups * p.rows if p.layout == "masked" else p.m
    sms = min(arch.sms, p.max_sms or arch.sms)
    rate = arch.bandwidth * sms / arch.sms
    front = (2.2 * live * p.k + 1.55 * p.groups * p.n * p.k) / (rate * COPY)
    return LAUNCH_SECONDS + front + max(tiles_time(p, config, arch, sms), p.bytes / rate)


def tiles_time(p: Problem, config: Config, arch: Arch, sms: int, more: float = 0.0, block: float = BLOCK_TIME) -> float:
    """Seconds of a product's tiles on `sms` SMs. On a device of RATE, block: of a K block; more: of each."""
    works = {tiles(p, config, spread) for spread in ((False, True) if p.counted else (False, ))}
    unit = (-(-p.k // BLOCK) * block + more) * (RATE / 132) / (arch.fp8_flops / arch.sms)
    seconds = 0.0
    for work in works:
        waves = math.ceil(work / sms) if work < 8 * sms else work / sms + 0.5
        seconds += waves * (unit + TILE_SECONDS) / len(works)
    return seconds


# ---------------------------------------------------------------- launch
def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    """Weights to E4M3, A folded, the product; BF16's two launches, for what that left."""
    from ....arch import detect
    from . import fold_whole_device

    fields, top = x.b.scale, x.top
    assert workspace is not None and fields is not None and top is not None
    at, blocks, units = regions(problem, x.m), columns(x.k) // BLOCK, unit_rows(x.n) // 64
    behind = gate(problem, x, workspace, at)
    tile = tile_of(problem, step.config, detect(x.out.device), x.factor is not None)
    look, fold = front(problem, x, workspace, at)
    return [
        look,
        Launch(fold_whole_device.fold_whole_kernel, (x.groups * units * -(-blocks // WHOLE_BLOCKS),),
               (Pointer(x.b.data, torch.int32), Pointer(fields, torch.int32), top, Pointer(workspace, torch.int32, at.weights),
                None, x.index, x.m, x.groups, x.alignment, units, blocks, tile, WHOLE_BLOCKS, 0), {"num_warps": 4}),
        fold,
        _product(step.config, problem, x, workspace, behind.limit),
        *expand.launches(Step(expand.NAME, BEHIND), problem, x, workspace, at.x, behind)]


def a_blocks(problem: Problem, x: Operands) -> tuple[int, int, int]:
    """(planes, blocks of rows, of K) that A is folded in."""
    return x.groups if problem.layout == "masked" else 1, -(-x.m // FLAG_ROWS), columns(x.k) // BLOCK


def gate(problem: Problem, x: Operands, workspace: Tensor, at: Any) -> expand.Gate:
    """BF16's product is done where more than `MOST_FLAGS` cuts a block of A were counted. at: as in `front`."""
    return expand.Gate(Pointer(workspace, torch.int32, at.counter), int(MOST_FLAGS * math.prod(a_blocks(problem, x))))


def front(problem: Problem, x: Operands, workspace: Tensor, at: Any,
          picks: tuple[Pointer, Pointer, Pointer, int, int] | None = None, remove: int = 0, ahead: bool = True) -> list[Launch]:
    """A looked at; A folded. at: `Regions` of either kernel. picks: where the entries of each K block start, the entries, where
    columns go, entries of a group, and how many fours of rows lie between two columns. remove: `REMOVE` of `fold_mixed_kernel`.
    ahead: folding begins beside the look."""
    from ....arch import detect
    from . import fold_mixed_prep_device as device
    from . import fold_outliers_device

    scale, data, masked, words = x.a.scale, x.a.data, problem.layout == "masked", problem.a.aligned
    assert scale is not None
    planes, row_blocks, blocks = a_blocks(problem, x)
    count, probes = (Pointer(workspace, torch.int32, at.counter + far) for far in (0, PROBES_AT))
    index = count if x.index is None else x.index
    source = Pointer(data, torch.int32 if words else torch.uint8)
    xg, xm, sg, sm, sk = a_strides(x, masked)
    each = 16 if words else 1
    strides = (xg // each, xm // each, sg, sm, sk)
    sms = detect(x.out.device).sms
    many = planes * row_blocks * blocks > EARLY_BLOCKS * sms
    starts, entries, to, entries_of_group, pitch = picks or (count, count, count, 0, 0)
    options = {"MASKED": masked, "ALIGNED": words, "num_warps": 4}
    listed = Pointer(workspace, torch.int32, at.counter + PROBES_AT + LOOK_BYTES * blocks) if remove else count
    look = Launch(device.probe_kernel, (PROBES,),
                  (source, scale, index, probes, count, x.m, x.k, blocks, row_blocks, planes, *strides), options)
    if remove:
        look = Launch(fold_outliers_device.look_kernel, (LOOKS * blocks,),
                      (source, scale, probes, count, x.m, x.k, blocks, row_blocks, *strides[1:2], *strides[3:]),
                      {"ALIGNED": words, "num_warps": 4})
    return [
        look,
        Launch(device.fold_mixed_kernel, (planes * row_blocks * blocks,),
               (source, scale, index, Pointer(workspace, torch.int32, at.x), Pointer(workspace, torch.float32, at.scale),
                Pointer(workspace, torch.int32, at.flags), count, probes, listed, starts, entries, to, x.m, x.k, blocks, row_blocks,
                *strides, column(x.m) // 4, x.groups, entries_of_group, pitch),
               {**options, "PROBES": PROBES, "PICKS": picks is not None, "LAYOUT": LAYOUTS[problem.layout],
                "GROUPS": max(32, power_of_two(x.groups)), "EARLY": (EARLY_BLOCKS + many) * sms, "REMOVE": remove,
                "maxnreg": FOLD_REGISTERS[many], "launch_pdl": ahead})]


def _product(config: Config, problem: Problem, x: Operands, workspace: Tensor, limit: int) -> Launch:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from ....arch import detect
    from . import fold_mixed_device as device
    from .fp8_block_parts_device import FP8_PLANE

    arch, masked = detect(x.out.device), problem.layout == "masked"
    tile = tile_of(problem, config, arch, x.factor is not None)
    assert tile is not None and x.top is not None, f"{config} is not legal for {problem}"
    at, planes, kx = regions(problem, x.m), x.groups if masked else 1, columns(x.k)
    blocks, units, row_blocks, pitch = kx // BLOCK, unit_rows(x.n), -(-x.m // FLAG_ROWS), column(x.m)
    om = stride(x.out, -2, x.n)
    og = stride(x.out, 0, om * x.m) if masked else 0
    flat = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)
    y, weights = (Pointer(workspace, torch.float8_e4m3fn, offset) for offset in (at.x, at.weights))
    boxes = [
        TensorDescriptor(y, [planes, x.m, kx], [x.m * kx, kx, 1], [1, 128, BLOCK], FP8_PLANE.value),
        TensorDescriptor(Pointer(workspace, torch.float32, at.scale), [planes, blocks * 4, x.m], [4 * blocks * pitch, pitch, 1],
                         [1, 4, 128], flat),
        TensorDescriptor(weights, [x.groups, units, kx], [units * kx, kx, 1], [1, 256, BLOCK], FP8_PLANE.value),
        output(x, og, om, tile.OUT_COLS, tile.OUT_BYTES) if tile.STORE_TMA else None]
    sms = min(problem.max_sms or arch.sms, arch.sms)
    grid = max(1, min(sms, row_tiles(problem, x, tile.BM) * -(-x.n // tile.BN)))
    return Launch(
        device.fold_mixed_product_kernel, (grid,),
        (*boxes, None, None, None, x.out, x.top, x.top if x.factor is None else x.factor, x.index,
         Pointer(workspace, torch.int32, at.flags), Pointer(workspace, torch.int32, at.counter), None, x.m, x.n, blocks, row_blocks,
         x.groups, x.alignment, limit, units, 0, og, om, og // om, tile),
        {"num_warps": 4, "maxnreg": tile.max_registers, "launch_pdl": True})
