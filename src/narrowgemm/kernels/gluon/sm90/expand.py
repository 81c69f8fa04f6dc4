"""Hopper products of many rows with prepacked MXFP4 / MXFP8 weights: both sides to BF16 once a call, then a BF16 product.

Dense products of MXFP8 take weights as they are, too.

Where each weight meets hundreds of rows, expanding it anew for every tile costs more than writing it out once: a launch in front
brings weights of experts that have rows, and A, to BF16 in the workspace, without loss; the product behind runs at the BF16 rate,
on this package's kernel (dense, contiguous, offsets, psum, masked) or, dense and plain, on cuBLAS. Device code:
`expand_device.py`, `bf16_device.py`; the product's compile-time constants are those of `fp8_scaled_tile.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....arch import Arch
from ....problem import Config, Problem, Step
from ... import launching
from ...launching import Launch, Pointer
from ...operands import Operands
from . import bf16_cluster, expand_rows, narrow, refusals
from .fp8_block_tile import LAYOUTS, group_table
from .fp8_scaled import SHAPES, tiles
from .fp8_scaled_tile import OUT_COLS
from .fp8_scaled_tile import Tile as ScaledTile
from .narrow_tile import CHUNK, KINDS, ROWS
from .tensor_maps import output, row_tiles, stride

NAME = "gluon_sm90.expand"
BACKEND = "gluon_sm90"
BLOCK = 64                  # of K, BF16: 128 bytes
PREP_ROWS, PREP_K = 8, 1024     # of A that a program of the launch in front brings
PREP_PROGRAMS = 1056        # that share rows of A, where there are so many: each reads all scales of its rows
WEIGHT_ROWS, CHUNKS = 16, 4     # of weights, of 128 of K, that one expands
RESCALE = 64, 2048          # rows and columns that a program of the launch behind cuBLAS looks at
LARGEST = 1 << 32           # bytes that all weights of a call may take in BF16


@dataclass(frozen=True)
class Tile(ScaledTile):
    """As the kernel's for row-wise scales. GATE: a count on the device says whether the product is wanted."""

    GATE: bool = False
    TAIL: bool = False       # of two warpgroups along M: where a group's last tile has no rows for the second, it has no products
    FACTORS: bool = True     # sums are multiplied by factors of rows, and of columns where B_ROWS says so
    BLOCKS: bool = True      # for the store: sums come to it scaled
    BLOCK_K: int = BLOCK

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "BLOCK_BYTES", (self.BM + self.BN) * 2 * BLOCK)


class Gate(NamedTuple):
    """The launches do nothing where what `counter` holds is no more than `limit`."""

    counter: Pointer
    limit: int


# ---------------------------------------------------------------- what it takes
def supports(problem: Problem, arch: Arch) -> str | None:
    p = problem
    if (reason := refusals.op(p, arch)) is not None:
        return reason
    if (reason := _plain(p) if plain(p) else narrow.supports(replace(p, accumulate=False), arch)) is not None:
        return reason
    if not p.a.format.scaled or p.a.scale_dtype != "e8m0":
        return f"brings activations with E8M0 scales to BF16, not {p.a.format.name}"
    if ":" in p.b.prepack:
        return "stores rows in their order: weights packed with pair= are for an activation"
    if (size := 2 * p.groups * unit_rows(p.n) * columns(p.k)) > LARGEST:
        return f"would write {size} bytes of weights in BF16, over {LARGEST}"
    return refusals.shape(replace(p, promote=0), 32)


def plain(problem: Problem) -> bool:
    """Whether weights are as they are, not prepacked."""
    return not problem.b.prepack


def _plain(p: Problem) -> str | None:
    """Why weights that are not prepacked can't be taken."""
    sides = [(x.format.element, x.format.group, x.scale_dtype, x.major, x.prepack) for x in (p.a, p.b)]
    if p.layout != "dense" or any(side != ("e4m3", (1, 32), "e8m0", "k", "") for side in sides):
        return f"takes prepacked weights, and plain K-major MXFP8 in dense products, not {p.a.format.name} x {p.b.format.name}"
    return None


def columns(k: int) -> int:
    """Of an operand in BF16: K up to whole chunks."""
    return -(-k // CHUNK) * CHUNK


def unit_rows(n: int) -> int:
    """Rows of an expert's weights, in whole packed tiles."""
    return -(-n // ROWS) * ROWS


# ---------------------------------------------------------------- configs
def _config(bm: int, bn: int, stages: int, strip: int = 16, **more: int) -> Config:
    return Config(bm, bn, BLOCK, 9, stages, strip, persistent=True, extra=tuple(more.items()))


CUBLAS = _config(128, 256, 4, cublas=1)
PAIRS = _config(128, 256, 4, 8, cluster_m=2)
CANDIDATES = (_config(128, 256, 4, 8), _config(128, 256, 4), _config(128, 192, 5, 8), _config(128, 128, 6, 8), _config(64, 256, 5),
              _config(64, 128, 8), PAIRS, CUBLAS)


def configs(problem: Problem, arch: Arch) -> list[Config]:
    """Pairs of blocks where their last tiles are cut in two: elsewhere they are level with blocks that are alone."""
    offered = [c for c in CANDIDATES if legal(problem, c, arch) is None]
    return [c for c in offered if not bf16_cluster.blocks(c) or bf16_cluster.left(problem, c, arch)[1]]


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run the problem, or None."""
    p, shape = problem, (config.block_m, config.block_n)
    if shape not in SHAPES or config.block_k != BLOCK:
        return f"tile {config.block_m}x{config.block_n}x{config.block_k}, expected one of {list(SHAPES)} x {BLOCK}"
    if not config.persistent or config.split_k != 1 or config.swap_ab or dict(config.extra).keys() - {"cublas", "cluster_m"}:
        return "the kernel is persistent, without split_k, swap_ab and extra options but cublas or cluster_m"
    if config.num_stages < 2 or config.group_m < 1:
        return f"num_stages={config.num_stages}, group_m={config.group_m}, expected at least 2 and 1"
    if config.option("cublas") and (p.layout != "dense" or p.out_dtype != "bf16" or p.accumulate or p.max_sms or p.batch_invariant
                                    or p.n % 8):
        return "cuBLAS takes dense products into BF16, with N in multiples of 8 and all SMs"
    if bf16_cluster.blocks(config):
        return bf16_cluster.legal(p, config, arch)
    if tile_of(p, config, arch) is None:
        return f"needs more shared memory than the {arch.smem} bytes of the device"
    return None


@lru_cache(maxsize=4096)
def tile_of(problem: Problem, config: Config, arch: Arch, factor: bool = False, gate: bool = False) -> Tile | None:
    """The product's compile-time constants; None where it needs more shared memory than there is. factor: columns have factors."""
    wgm, wgn, cols0, cols1 = SHAPES[config.block_m, config.block_n]
    groups = group_table(problem)
    for buffers in (4, 2, 1):       # staging of the store: as much as fits
        if buffers * OUT_COLS > cols0 + cols1:
            continue
        tile = Tile(
            LAYOUTS[problem.layout], WGM=wgm, WGN=wgn, COLS0=cols0, COLS1=cols1, STAGES=config.num_stages, PROMOTE=0,
            STRIP=config.group_m, OUT_BUFFERS=buffers, OUT_BYTES=problem.out_bytes, GROUPS=groups, A_ROWS=True, B_ROWS=factor,
            ZERO=problem.zeroes, ACCUMULATE=problem.accumulate,
            STORE_TMA=problem.out_aligned, GATE=gate)
        if tile.shared_bytes <= arch.smem:
            return tile
    return None


# ---------------------------------------------------------------- workspace
class Regions(NamedTuple):
    """Byte offsets of the parts of the workspace, and its size."""

    one: int
    factor: int
    x: int
    weights: int
    columns: int             # factors of plain weights' rows
    size: int


def regions(problem: Problem, rows: int, start: int = 0) -> Regions:
    """`rows`: of A, of all groups; `start`: where the first part starts."""
    sizes = (4, 4 * rows, 2 * rows * columns(problem.k), 2 * problem.groups * unit_rows(problem.n) * columns(problem.k),
             4 * unit_rows(problem.n) * plain(problem))
    return Regions(*accumulate((-(-s // 256) * 256 for s in sizes), initial=start))


def workspace(problem: Problem, config: Config) -> int:
    return regions(problem, problem.m * (problem.groups if problem.layout == "masked" else 1)).size


# ---------------------------------------------------------------- cost
# fitted on an H100: docs/measured.md
LAUNCH_SECONDS = 4.0e-6     # beside their bytes, which L2 takes some of
TILE_SECONDS = 1.0e-6       # of a tile, beyond its K blocks
COPY = 0.82                 # of the streaming rate, in the launch in front
ROWS_SECONDS, ROWS_COPY = 2.0e-6, 0.95      # both, where it brings whole rows
# microseconds of one K block of 64 on one SM of a device of the rate below, where every SM is busy
BLOCK_TIMES = {(128, 128): 0.43, (128, 192): 0.51, (128, 256): 0.64, (64, 256): 0.43, (64, 128): 0.34}
RATE = 0.76e15
# FLOP/s of cuBLAS where a product is large; the second with K in whole 4096, of which it makes less than the kernel here
CUBLAS_RATE = 0.84e15, 0.80e15
CUBLAS_SECONDS = 6.0e-6     # beside it


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds: the bytes of the launch in front, then waves of tiles or the product's bytes, whichever is longer."""
    p = problem
    live = p.groups * p.rows if p.layout == "masked" else p.m
    sms = min(arch.sms, p.max_sms or arch.sms)
    rate = arch.bandwidth * sms / arch.sms
    wide = 2.0 * (live + p.active_groups * unit_rows(p.n)) * columns(p.k)
    read = p.active_groups * p.b.format.storage_bytes(unit_rows(p.n), p.k) + p.a.format.storage_bytes(live, p.k)
    seconds, copy = (ROWS_SECONDS, ROWS_COPY) if by_rows(p) else (LAUNCH_SECONDS, COPY)
    front = seconds + (wide + read) / (rate * copy)
    memory = (wide + live * p.n * p.out_bytes * (1 + p.accumulate)) / (rate * COPY)
    if config.option("cublas"):
        return front + CUBLAS_SECONDS + max(p.flops / (CUBLAS_RATE[p.k % 4096 == 0] * arch.bf16_flops / RATE), memory)
    work = tiles(p, config)
    unit = -(-p.k // BLOCK) * 1e-6 * (RATE / 132) / (arch.bf16_flops / arch.sms)
    if bf16_cluster.blocks(config):
        return front + max(bf16_cluster.estimate(p, config, arch, TILE_SECONDS, unit), memory)
    waves = work / sms
    waves = math.ceil(waves) if waves < 8 else waves + 0.5
    return front + max(waves * (unit * BLOCK_TIMES[config.block_m, config.block_n] + TILE_SECONDS), memory)


# ---------------------------------------------------------------- launch
@dataclass(frozen=True)
class PrepStatic:
    """What `expand_kernel` is compiled for."""

    KIND: int
    XKIND: int               # of A: `narrow.XKINDS`
    GROUP: int               # of K, that share a scale of A
    E4M3: bool               # weights E4M3, else E2M1
    BM: int = PREP_ROWS
    BK: int = PREP_K
    WR: int = WEIGHT_ROWS
    WC: int = CHUNKS
    SCALES: int = 64         # of a row that are looked at together, a power of two
    STAGES: int = 1          # pieces that are on their way to a program
    GATE: bool = False
    PLAIN: bool = False      # weights are rows as A's are


def launch(step: Step, problem: Problem, operands: Operands, workspace: Tensor | None) -> None:
    if step.config.option("cublas") and operands.factor is None:
        _launch_cublas(step, problem, operands, workspace)
    else:
        launching.launch(launches, step, problem, operands, workspace)


def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None, start: int = 0, gate: Gate | None = None
             ) -> list[Launch]:
    """The launch in front and the product. `start`: first byte of the workspace."""
    assert workspace is not None
    return [front(problem, x, workspace, start, gate), product_behind(step.config, problem, x, workspace, start, gate)]


def prep_steps(rows: int, kx: int) -> int:
    """Pieces of PREP_K columns that one program of the launch in front brings."""
    return max(1, min(-(-kx // PREP_K), rows // PREP_ROWS * -(-kx // PREP_K) // PREP_PROGRAMS))


def _rows(problem: Problem, x: Operands) -> int:
    return x.m * (x.groups if problem.layout == "masked" else 1)


def by_rows(problem: Problem) -> int:
    """Pieces of rows that the launch in front brings whole; 0 where weights are packed, or rows too long for it."""
    return expand_rows.pieces(columns(problem.k)) if plain(problem) else 0


def front(problem: Problem, x: Operands, workspace: Tensor, start: int = 0, gate: Gate | None = None) -> Launch:
    """Both operands to BF16 in the workspace, from byte `start` on."""
    from . import expand_device

    if by_rows(problem):
        assert not start and gate is None
        return expand_rows.front(x, columns(x.k), regions(problem, x.m), workspace)
    fields, scale, masked = x.b.scale, x.a.scale, problem.layout == "masked"
    assert fields is not None and scale is not None
    rows, units, kx = _rows(problem, x), unit_rows(x.n) // ROWS, columns(x.k)
    at = regions(problem, rows, start)
    steps = prep_steps(rows, kx)
    of_rows = -(-rows // PREP_ROWS) * -(-kx // (PREP_K * steps))
    own = plain(problem)
    w_steps = prep_steps(x.n, kx)
    of_weights = -(-x.n // PREP_ROWS) * -(-kx // (PREP_K * w_steps)) if own else \
        x.groups * units * (ROWS // WEIGHT_ROWS) * -(-kx // (CHUNK * CHUNKS))
    cfg = PrepStatic(KINDS[problem.layout], narrow.XKINDS[problem.a.format.element, problem.a.scale_dtype],
                     problem.a.format.group[1], problem.b.format.element == "e4m3",
                     SCALES=min(256, narrow.power_of_two(-(-x.k // 32))), GATE=gate is not None, PLAIN=own)
    one = Pointer(workspace, torch.float32, at.one)
    counter, limit = gate or (one, 0)
    return Launch(
        expand_device.expand_kernel, (of_rows + of_weights,),
        (x.a.data, scale, Pointer(workspace, torch.bfloat16, at.x), Pointer(workspace, torch.float32, at.factor),
         one, x.b.data if own else Pointer(x.b.data, torch.int32), fields,
         Pointer(workspace, torch.bfloat16 if own else torch.int32, at.weights), Pointer(workspace, torch.float32, at.columns),
         fields if x.index is None else x.index, rows, x.m, x.alignment, x.k, kx, units, x.groups, of_rows,
         steps, *narrow.a_strides(x, masked), x.n, w_steps, *((x.b.data.stride(-2), *fields.stride()[-2:]) if own else (0, 0, 0)),
         counter, limit, cfg), {"num_warps": 4})


def product_behind(config: Config, problem: Problem, x: Operands, workspace: Tensor, start: int, gate: Gate | None) -> Launch:
    """BF16's product of what the launch in front brought to the workspace."""
    from ....arch import detect

    arch = detect(x.out.device)
    masked, kx = problem.layout == "masked", columns(x.k)
    own = plain(problem)
    at, units = regions(problem, _rows(problem, x), start), unit_rows(x.n)
    weights = Pointer(workspace, torch.bfloat16, at.weights)
    one = Pointer(workspace, torch.float32, at.one)
    factors = Pointer(workspace, torch.float32, at.columns) if own else one if x.factor is None else x.factor
    if bf16_cluster.blocks(config):
        assert gate is None and not start, "the word about factors is the launch in front's"
        pair = bf16_cluster.tile_of(problem, config, arch, own or x.factor is not None, by_rows(problem) > 0)
        assert pair is not None, f"{config} is not legal for {problem}"
        boxes = (_planes(Pointer(workspace, torch.bfloat16, at.x), 1, x.m, kx, pair.BM), _planes(weights, 1, units, kx, pair.B_BOX),
                 _planes(weights, 1, units, kx, pair.B_BOX // 2))
        factor = Pointer(workspace, torch.float32, at.factor)
        return bf16_cluster.product(problem, config, x, arch, pair, boxes, kx, factor, factors, expand_rows.flag(workspace, at))
    tile = tile_of(problem, config, arch, own or x.factor is not None, gate is not None)
    assert tile is not None, f"{config} is not legal for {problem}"
    counter, limit = gate or (one, 0)
    planes = (_planes(Pointer(workspace, torch.bfloat16, at.x), x.groups if masked else 1, x.m, kx, tile.BM),
              _planes(weights, x.groups, units, kx, tile.WGN * tile.COLS0),
              _planes(weights, x.groups, units, kx, tile.COLS1) if tile.COLS1 else None)
    return product(problem, x, tile, arch, planes, kx, Pointer(workspace, torch.float32, at.factor), factors, counter,
                   (limit, x.m if masked else 0, 0 if x.factor is None else units))


def product(problem: Problem, x: Operands, tile: Tile, arch: Arch, planes: tuple[Any, Any, Any], k: int,
            factor: Pointer | None = None, factors: Pointer | Tensor | None = None, counter: Pointer | None = None,
            of_factors: tuple[int, int, int] = (0, 0, 0)) -> Launch:
    """The BF16 kernel over TMA descriptors of both operands, `k` wide; with factors of rows and columns where either was narrow."""
    from . import bf16_device as device

    om = stride(x.out, -2, x.n)
    og = stride(x.out, 0, om * x.m) if problem.layout == "masked" else 0
    if tile.STORE_TMA and og % om:
        tile = replace(tile, STORE_TMA=False)
    out_desc = output(x, og, om, tile.OUT_COLS, tile.OUT_BYTES) if tile.STORE_TMA else None
    sms = min(problem.max_sms or arch.sms, arch.sms)
    grid = max(1, min(sms, row_tiles(problem, x, tile.BM) * -(-x.n // tile.BN)))
    return Launch(
        device.bf16_kernel, (grid,),
        (*planes, out_desc, x.out, factor, factors, x.index, counter, x.m, x.n, -(-k // BLOCK), x.groups, x.alignment, *of_factors,
         og, om, og // om, tile), {"num_warps": 4, "maxnreg": tile.max_registers})


def _planes(base: Pointer, groups: int, rows: int, k: int, box: int) -> Any:
    """The TMA descriptor of an operand in the workspace, in boxes of `box` rows by a K block."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .bf16_device import PLANES

    return TensorDescriptor(base, [groups, rows, k], [rows * k, k, 1], [1, box, BLOCK], PLANES.value)


# ---------------------------------------------------------------- cuBLAS
def _launch_cublas(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> None:
    """The launch in front, cuBLAS, and the shifts taken back. What is bound of it is kept beside what whole plans bind."""
    assert workspace is not None
    front, back = (replace(step, kernel=f"{NAME}.{part}") for part in ("front", "back"))
    _run(front, problem, x, workspace, _front_alone)
    at, kx = regions(problem, x.m), columns(x.k)
    a = workspace[at.x: at.x + 2 * x.m * kx].view(torch.bfloat16).view(x.m, kx)
    b = workspace[at.weights: at.weights + 2 * x.n * kx].view(torch.bfloat16).view(x.n, kx)
    torch.mm(a, b.mT, out=x.out)
    _run(back, problem, x, workspace, _rescale)


def _front_alone(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    assert workspace is not None
    return [front(problem, x, workspace)]


def _rescale(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    from .expand_device import rescale_kernel

    assert workspace is not None
    at = regions(problem, x.m)
    factor, cols = (Pointer(workspace, torch.float32, a) for a in (at.factor, at.columns))
    bm, bn = RESCALE
    return [Launch(rescale_kernel, (-(-x.m // bm), -(-x.n // bn)), (x.out, factor, cols, expand_rows.flag(workspace, at), x.m, x.n,
                                                                    x.out.stride(-2)),
                   {"BM": bm, "BN": bn, "STEP": 64, "COLS": plain(problem), "FLAG": by_rows(problem) > 0, "num_warps": 4})]


def _run(step: Step, problem: Problem, x: Operands, workspace: Tensor, describe: launching.Describe) -> None:
    """A part of a step, by its bound launch once there is one."""
    bound = (x.memo or {}).get(step)
    if not bound or not launching.Ready(bound, x.out.get_device(), 0, x.addresses(workspace))(x.addresses(workspace)):
        launching.launch(describe, step, problem, x, workspace)
