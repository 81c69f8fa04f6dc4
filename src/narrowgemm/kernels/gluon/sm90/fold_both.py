"""FP8 products on Hopper of MXFP8 by MXFP8 weights that are held folded beside, for problems with many rows, dense and grouped.

The product is that of `fold_mixed.py`, without a launch that expands weights: they lie folded into E4M3 with one power of two a
row (`prepack_folded.py`); dense ones that are held as they came are folded by a launch in front (`fold_codes.py`). Elements that
don't fold meet columns of A that the launch in front, which folds A, brings to BF16 beside; their products are what a tile's sums
begin with. As there, blocks of A that don't fold are taken in parts. Where too many don't, or where scales are too far out, all of
it is multiplied in BF16: on tiles of 128 x 256 by the product launched behind, on others by the same launch, which brings both
operands there first (`fold_both_rest_device.py`).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .... import prepack_folded
from ....arch import Arch
from ....problem import Config, Problem, Step
from ...launching import Launch, Pointer
from ...operands import Operands
from . import expand, expand_gate, expand_rows, fold_beside, fold_both_tile, fold_codes, fold_mixed
from .expand import columns
from .fold_mixed import (
    BEHIND,
    BLOCK,
    FLAG_ROWS,
    FRONT,
    LIMIT,
    LOOK_BYTES,
    PROBES_AT,
    MixedTile,
    column,
    configs_of,
    front,
    gate,
    tiles_time,
)
from .fp8_block import tiles
from .fp8_block_tile import LAYOUTS, group_table
from .narrow import power_of_two
from .tensor_maps import output, row_tiles, stride

NAME = "gluon_sm90.fold_both"
BACKEND = "gluon_sm90"
KINDS = ("dense", "contiguous", "offsets")
MOST_BLOCKS = 255           # of K, that columns are left out of: what looks say is added up in ten bits each
WEIGHT_ROWS = 16            # of their weights, that a program takes at a time
WEIGHT_PROGRAMS = 4         # of those, an SM
REST_REGISTERS = 112        # of a lane of those, where they bring all to BF16
MOST_GROUPS = 128           # that the launch in front looks a row's group up in


# ---------------------------------------------------------------- what it takes
def supports(problem: Problem, arch: Arch) -> str | None:
    p, a, b = problem, problem.a, problem.b
    if (a.format.element, a.format.group, a.scale_dtype) != ("e4m3", (1, 32), "e8m0"):
        return f"folds MXFP8 activations, not {a.format.name}"
    if b.format.element != "e4m3" or b.picks < 0:
        return "takes packed MXFP8 weights that hold a folded copy, prepack(folded=True), of which enough folds"
    if expand.plain(p) and not expand_rows.pieces(columns(p.k)):
        return f"folds weights that are not in an order of their own up to K = {expand_rows.PIECE * expand_rows.MOST}, not {p.k}"
    if p.layout not in KINDS:
        return f"takes {', '.join(KINDS)} layouts, not {p.layout}"
    if p.layout == "offsets" and p.groups > MOST_GROUPS:
        return f"looks rows up in up to {MOST_GROUPS} groups, not {p.groups}"
    if (size := p.b.picks * pitch(p.m, p.groups)) >= 1 << 31:
        return f"counts up to 2^31 elements of picked columns, not {size}"
    if p.batch_invariant:
        return "decides for all rows together which product they take"
    if p.accumulate:
        return "writes its output, with no accumulation"
    return expand.supports(p, arch)


# ---------------------------------------------------------------- configs
# columns of a tile -> tensors of a piece, columns of one, slots of the ring
WIDTHS = {64: (1, 64, 8), 80: (5, 16, 7), 128: (2, 64, 6), 144: (9, 16, 6), 160: (5, 32, 5), 192: (3, 64, 5)}

# FLOPs up to which a product multiplies in BF16 itself what doesn't fold: beyond, launches behind that mostly do nothing cost less
# than what tiles of BF16's own product save where they are wanted
OWN = 1.5e11
PAIRED = (144, 192)         # for pairs of blocks, too, which share weights


def _config(columns: int, pairs: bool = False, strip: int = 8) -> Config:
    return Config(128, columns, BLOCK, 9, WIDTHS[columns][2], strip, persistent=True, extra=(("cluster_m", 2),) if pairs else ())


def of_widths() -> list[Config]:
    return [*map(_config, WIDTHS), *(_config(columns, True) for columns in PAIRED)]


def configs(problem: Problem, arch: Arch) -> list[Config]:
    offered = [*configs_of(), *(c for c in of_widths() if problem.layout == "dense" or not c.extra)]
    return [c for c in offered if legal(problem, c, arch) is None]


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run the problem, or None."""
    if config.block_n == 256:
        if (reason := fold_mixed.of_kind(config)) is not None:
            return reason
    elif config.block_n not in WIDTHS or config != replace(
            _config(config.block_n, bool(config.extra)), num_stages=config.num_stages, group_m=config.group_m):
        return f"{config}, expected {_config(192)} or one of {sorted(WIDTHS)} columns"
    elif problem.n % prepack_folded.TILE:
        return f"tiles that are not {prepack_folded.TILE} wide are for N in whole times that, not {problem.n}"
    elif config.extra and problem.max_sms == 1:
        return "pairs of blocks are for two SMs and more"
    elif not 2 <= config.num_stages <= 8 or config.group_m < 1:
        return f"num_stages={config.num_stages}, group_m={config.group_m}, expected 2 to 8, and at least 1"
    if tile_of(problem, config, arch) is None:
        return f"needs more shared memory than the {arch.smem} bytes of the device"
    return None


def own(problem: Problem, config: Config) -> bool:
    """Whether a product multiplies in BF16 itself: on tiles that are not 256 wide, by packed weights. Groups' was not run so on a
    GPU."""
    dense = problem.layout == "dense" and not expand.plain(problem)
    return config.block_n != prepack_folded.TILE and dense and problem.flops <= OWN


def tile_of(problem: Problem, config: Config, arch: Arch) -> MixedTile | fold_both_tile.Tile | None:
    """The product's compile-time constants; None where it needs more shared memory than there is."""
    if config.block_n == 256:
        return fold_mixed.tile_of(problem, config, arch, picks=True)
    tensors, columns, _ = WIDTHS[config.block_n]
    groups = group_table(problem)
    stages = config.num_stages - (problem.out_dtype == "fp32")      # staging of the store takes twice as much
    for buffers in (tensors, 2, 1):     # staging of the store: as much as fits
        tile = fold_both_tile.Tile(
            LAYOUTS[problem.layout], 2, 1, 1, tensors, columns, STAGES=stages, STRIP=config.group_m, OUT_BUFFERS=buffers,
            OUT_BYTES=problem.out_bytes, GROUPS=groups, ZERO=problem.zero_padding and problem.layout == "contiguous",
            STORE_TMA=problem.out_aligned, CLUSTER_M=1 + bool(config.extra), WHOLE=own(problem, config))
        if tile.shared_bytes <= arch.smem:
            return tile
    return None


# ---------------------------------------------------------------- workspace
class Regions(NamedTuple):
    """Byte offsets of the parts of the workspace. What BF16 needs starts where `x` does: one of the two is done."""

    counter: int
    x: int
    scale: int
    flags: int
    picks: int
    removed: int
    folded: int              # weights that are held as they came
    codes: int
    size: int


def regions(problem: Problem, m: int) -> Regions:
    """`m`: rows of A."""
    kx = columns(problem.k)
    blocks = kx // BLOCK
    sizes = (max(FRONT, PROBES_AT + LOOK_BYTES * blocks + 4 * LIMIT + 4 * fold_beside.MOST), m * kx, 16 * blocks * column(m),
             4 * blocks * -(-m // FLAG_ROWS), 2 * (max(problem.b.picks, 1) + LIMIT) * pitch(m, problem.groups),
             2 * LIMIT * problem.groups * problem.n, problem.n * problem.k * expand.plain(problem), problem.groups * problem.n)
    at = Regions(*accumulate((-(-s // 256) * 256 for s in sizes), initial=0))
    codes = max(at.codes, expand.regions(problem, m, at.x).size)
    return at._replace(codes=codes, size=codes + at.size - at.codes)


def pitch(m: int, groups: int) -> int:
    """Rows of A, one behind the other, groups apart: see `column_of` in `fold_mixed_device.py`."""
    return -(-m // 64) * 64 + 128 * groups


def workspace(problem: Problem, config: Config) -> int:
    return regions(problem, problem.m).size


# ---------------------------------------------------------------- cost
# fitted on an H100: docs/measured.md
# six launches, three of which do nothing; of several groups, whose tiles take longer than their number says
LAUNCH_SECONDS = 11e-6, 36e-6
OWN_LAUNCH_SECONDS = 10e-6      # four launches, one of which does nothing, and more code
# of one group, more: launches that do nothing behind a product took 7 to 11 us on two H200s, 4 to 5 on H100s; four launches
SLOWER_LAUNCHES = {"h200": (8e-6, 3e-6)}
FOLD = 1.05e-12                 # an element of A, on a device of `fold_mixed.RATE`
PICK = 0.7e-12, 3.0e-12         # a row and a column of picks; of several groups
STEP_TIME = 0.75e-6             # 64 columns of picks of a tile of 256 columns, on one SM
# a K block of a tile that is narrower: so much, and so much a column, which 64 columns of picks take, too
BLOCK_TIME, COLUMN_TIME = 0.155e-6, 0.0026e-6
LONG_WAVES, LONG_PAIR = 5, 0.9  # from so many waves on pairs take so much of it: what both read comes from L2 once
SHARE = 0.1                     # of tiles and bytes, the one that takes less time


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds, where no more of A's blocks have their flags up than have with normal data."""
    p = problem
    sms = min(arch.sms, p.max_sms or arch.sms)
    front = (FOLD * p.k + PICK[p.groups > 1] * p.b.picks) * p.m * fold_mixed.RATE / arch.fp8_flops * arch.sms / sms
    steps = p.b.picks / prepack_folded.STEP / -(-p.n // prepack_folded.TILE)
    if config.block_n == prepack_folded.TILE:
        seconds = tiles_time(p, config, arch, sms, steps * STEP_TIME)
    else:
        column, pair = COLUMN_TIME * config.block_n, 1 + bool(config.extra)
        unit = replace(config, block_m=128 * pair)
        if pair > 1 and tiles(p, unit, False) > LONG_WAVES * (sms // pair):
            column *= LONG_PAIR
        seconds = tiles_time(p, unit, arch, sms // pair, steps * met(p.n, config.block_n) * column, BLOCK_TIME + column)
    memory = p.bytes / arch.bandwidth
    if expand.plain(p):
        front += fold_codes.SECONDS + 2.0 * p.n * p.k / (arch.bandwidth * fold_codes.COPY) * arch.sms / sms
    launch, slower = LAUNCH_SECONDS[0], SLOWER_LAUNCHES.get(arch.name, (0.0, 0.0))
    if p.groups > 1:
        launch = LAUNCH_SECONDS[1]
    elif own(p, config):
        launch = OWN_LAUNCH_SECONDS + slower[1] - fold_beside.SAVED_SECONDS * fold_beside.offered(p.m, p.k, MOST_BLOCKS)
    else:
        launch += slower[0]
    return launch + front + max(seconds, memory) + SHARE * min(seconds, memory)


def met(n: int, columns: int) -> float:
    """Of the tiles that weights are packed in, how many one of so many columns meets."""
    starts = range(0, n, columns)
    return sum((min(s + columns, n) - 1) // prepack_folded.TILE - s // prepack_folded.TILE + 1 for s in starts) / len(starts)


# ---------------------------------------------------------------- launch
def copy_of(x: Operands) -> prepack_folded.FoldedCopy | None:
    return None if x.packed is None else x.packed.folded


def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    """A looked at, folded and its columns picked, of few rows in one launch; the product; what BF16 needs or does, for what that
    leaves."""
    copy, kept = copy_of(x), x.folded_rest
    assert workspace is not None and copy is not None and kept is not None
    at = regions(problem, x.m)
    of = prepack_folded.regions(x.groups, x.n, x.k, copy.columns, copy.picks)
    behind = gate(problem, x, workspace, at)
    picks = (Pointer(kept, torch.int32, of.starts), Pointer(kept, torch.int32, of.picks), Pointer(workspace, torch.int32, at.picks),
             copy.picks, pitch(x.m, x.groups) // 4)
    blocks = columns(x.k) // BLOCK
    remove = power_of_two(blocks) if blocks <= MOST_BLOCKS else 0
    whole = own(problem, step.config)
    if whole and fold_beside.offered(x.m, x.k, MOST_BLOCKS):
        # not where BF16's operands go
        listed, flags = (Pointer(workspace, torch.int32, listed_at(at, x.k) + far) for far in (0, 4 * LIMIT))
        both = fold_beside.launches(problem, x, workspace, at, flags, listed, picks, behind.limit, WEIGHT_ROWS)
        return [*both, _product(step.config, problem, x, workspace, behind.limit, False, flags)]
    in_front = front(problem, x, workspace, at, picks, remove, not whole)
    if expand.plain(problem):
        in_front = [fold_codes.launch(x, Pointer(kept, torch.uint8, of.top), workspace, at.folded), *in_front]
    product = _product(step.config, problem, x, workspace, behind.limit, not whole)
    rest = [_rest(problem, x, workspace, at, behind.limit, whole)] if whole or remove else []
    gated = [] if whole else expand_gate.launches(Step(expand.NAME, BEHIND), problem, x, workspace, at.x, behind)
    return [*in_front, *rest, product, *gated]


def _folded(problem: Problem, x: Operands, workspace: Tensor, at: Regions) -> Pointer:
    """The weights' codes."""
    if expand.plain(problem):
        return Pointer(workspace, torch.float8_e4m3fn, at.folded)
    assert x.folded is not None
    return Pointer(x.folded, torch.float8_e4m3fn)


def listed_at(at: Regions, k: int) -> int:
    """Where the list of columns that are left out starts."""
    return at.counter + PROBES_AT + LOOK_BYTES * (columns(k) // BLOCK)


def _rest(problem: Problem, x: Operands, workspace: Tensor, at: Regions, limit: int, whole: bool) -> Launch:
    """What A's columns that are left out are multiplied by, or both operands in BF16; mostly nothing."""
    from ....arch import detect
    from .fold_both_rest_device import rest_kernel

    scale, fields, wide = x.a.scale, x.b.scale, expand.regions(problem, x.m, at.x)
    assert scale is not None and fields is not None
    count = Pointer(workspace, torch.int32, at.counter)
    return Launch(
        rest_kernel, (WEIGHT_PROGRAMS * detect(x.out.device).sms,),
        (count, count if x.index is None else x.index, Pointer(x.a.data, torch.float8_e4m3fn), scale, x.a.data.stride(-2),
         *scale.stride()[-2:], Pointer(x.b.data, torch.int32), fields, count if x.factor is None else x.factor,
         Pointer(workspace, torch.bfloat16, wide.x), Pointer(workspace, torch.float32, wide.factor),
         Pointer(workspace, torch.int64, wide.weights), Pointer(workspace, torch.uint8, at.codes),
         _folded(problem, x, workspace, at), Pointer(workspace, torch.int32, listed_at(at, x.k)),
         Pointer(workspace, torch.bfloat16, at.removed), x.m, x.n, x.k, columns(x.k) // BLOCK, x.groups, limit),
        {"LAYOUT": LAYOUTS[problem.layout], "FACTOR": x.factor is not None, "OUTLYING": WEIGHT_ROWS, "WHOLE": whole,
         "num_warps": 4, "maxnreg": REST_REGISTERS, "launch_pdl": not whole})


def _product(config: Config, problem: Problem, x: Operands, workspace: Tensor, limit: int, ahead: bool,
             flags: Pointer | None = None) -> Launch:
    """flags: of A's blocks, where they lie elsewhere than by `at`."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from ....arch import detect
    from . import fold_both_device, fold_mixed_device
    from .fp8_block_parts_device import FP8_PLANE

    arch = detect(x.out.device)
    tile = tile_of(problem, config, arch)
    copy, rest = copy_of(x), x.folded_rest
    assert tile is not None and copy is not None and rest is not None, f"{config}: not legal for {problem}"
    at, kx = regions(problem, x.m), columns(x.k)
    of = prepack_folded.regions(x.groups, x.n, x.k, copy.columns, copy.picks)
    blocks, row_blocks, across, rows = kx // BLOCK, -(-x.m // FLAG_ROWS), column(x.m), pitch(x.m, x.groups)
    om = stride(x.out, -2, x.n)
    box = tile.B_BOX & -tile.B_BOX if isinstance(tile, fold_both_tile.Tile) else tile.BN
    flat = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)
    plane = [x.groups, x.n, copy.columns]
    if isinstance(tile, fold_both_tile.Tile):     # by the tiles that weights are packed in, so that boxes end with one
        plane = [x.groups * x.n // prepack_folded.TILE, prepack_folded.TILE, copy.columns]
    a, sa, b, d, p, r, o = (
        TensorDescriptor(Pointer(workspace, torch.float8_e4m3fn, at.x), [1, x.m, kx], [x.m * kx, kx, 1], [1, 128, BLOCK],
                         FP8_PLANE.value),
        TensorDescriptor(Pointer(workspace, torch.float32, at.scale), [1, blocks * 4, x.m], [4 * blocks * across, across, 1],
                         [1, 4, 128], flat),
        TensorDescriptor(_folded(problem, x, workspace, at), [x.groups, x.n, x.k], [x.n * x.k, x.k, 1], [1, box, BLOCK],
                         FP8_PLANE.value),
        output(x, 0, om, tile.OUT_COLS, tile.OUT_BYTES) if tile.STORE_TMA else None,
        TensorDescriptor(Pointer(workspace, torch.bfloat16, at.picks), [copy.picks + LIMIT, rows], [rows, 1], [64, 64],
                         fold_mixed_device.PICK_TILE.value),
        TensorDescriptor(Pointer(rest, torch.bfloat16, of.values), plane, [plane[1] * plane[2], plane[2], 1], [1, box, 64],
                         fold_mixed_device.REST_PLANE.value),
        TensorDescriptor(Pointer(workspace, torch.bfloat16, at.removed), [x.groups, x.n, LIMIT], [x.n * LIMIT, LIMIT, 1],
                         [1, box, 64], fold_mixed_device.REST_PLANE.value))
    top = Pointer(rest, torch.uint8, of.top)
    blocks_of = tile.CLUSTER if isinstance(tile, fold_both_tile.Tile) else 1
    grid = max(1, min(min(problem.max_sms or arch.sms, arch.sms) // blocks_of,
                      row_tiles(problem, x, tile.BM * blocks_of) * -(-x.n // tile.BN)))
    flags, count, starts = (flags or Pointer(workspace, torch.int32, at.flags), Pointer(workspace, torch.int32, at.counter),
                            Pointer(rest, torch.int32, of.at))
    options = {"num_warps": 4, "maxnreg": tile.max_registers, "launch_pdl": ahead}
    if isinstance(tile, fold_both_tile.Tile):
        wide = expand.regions(problem, x.m, at.x)
        aw, bw = None, None
        if tile.WHOLE:
            aw, bw = (TensorDescriptor(Pointer(workspace, torch.bfloat16, start), [planes, height, kx], [height * kx, kx, 1],
                                       [1, lines, 64], fold_mixed_device.REST_PLANE.value)
                      for start, planes, height, lines in ((wide.x, 1, x.m, 128), (wide.weights, x.groups, x.n, box)))
        return Launch(
            fold_both_device.fold_both_product_kernel, (grid,),
            (a, sa, b, r, p, o, aw, bw, d, x.out, top, Pointer(workspace, torch.uint8, at.codes),
             Pointer(workspace, torch.float32, wide.factor), x.index, flags, count, starts, x.m, x.n, blocks, row_blocks, x.groups,
             x.alignment, limit, copy.picks, om, tile),
            options, blocks_of, boxes=tile.boxes)
    return Launch(
        fold_mixed_device.fold_mixed_product_kernel, (grid,),
        (a, sa, b, d, p, r, o, x.out, top, top, x.index, flags, count, starts, x.m, x.n, blocks, row_blocks, x.groups, x.alignment,
         limit, x.n, copy.picks, 0, om, 0, tile), options)
