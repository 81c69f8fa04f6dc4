"""FP8 products on Hopper of MXFP8 by MXFP8 weights that are held folded beside, for problems with many rows, dense and grouped.

The product is that of `fold_mixed.py`, without a launch that expands weights: they lie folded into E4M3 with one power of two a
row (`prepack_folded.py`). Elements that don't fold meet columns of A that the launch in front, which folds A, brings to BF16
beside; their products are what a tile's sums begin with. As there, blocks of A that don't fold are taken in parts, and
the device leaves all of it to the BF16 product launched behind where too many don't, or where scales are too far out.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .... import prepack_folded
from ....arch import Arch
from ....problem import Config, Problem, Step
from ...launching import Launch, Pointer
from ...operands import Operands
from . import expand, fold_mixed
from .expand import columns
from .fold_mixed import BEHIND, BLOCK, FLAG_ROWS, FRONT, MixedTile, column, configs_of, front, gate, tiles_time
from .tensor_maps import output, row_tiles, stride

NAME = "gluon_sm90.fold_both"
BACKEND = "gluon_sm90"
KINDS = ("dense", "contiguous", "offsets")
MOST_GROUPS = 128           # that the launch in front looks a row's group up in


# ---------------------------------------------------------------- what it takes
def supports(problem: Problem, arch: Arch) -> str | None:
    p, a, b = problem, problem.a, problem.b
    if (a.format.element, a.format.group, a.scale_dtype) != ("e4m3", (1, 32), "e8m0"):
        return f"folds MXFP8 activations, not {a.format.name}"
    if b.format.element != "e4m3" or b.picks < 0:
        return "takes packed MXFP8 weights that hold a folded copy, prepack(folded=True), of which enough folds"
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
def configs(problem: Problem, arch: Arch) -> list[Config]:
    return [c for c in configs_of() if legal(problem, c, arch) is None]


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run the problem, or None."""
    if (reason := fold_mixed.of_kind(config)) is not None:
        return reason
    if tile_of(problem, config, arch) is None:
        return f"needs more shared memory than the {arch.smem} bytes of the device"
    return None


def tile_of(problem: Problem, config: Config, arch: Arch) -> MixedTile | None:
    """The product's compile-time constants; None where it needs more shared memory than there is."""
    return fold_mixed.tile_of(problem, config, arch, picks=True)


# ---------------------------------------------------------------- workspace
class Regions(NamedTuple):
    """Byte offsets of the parts of the workspace. What BF16 needs starts where `x` does: one of the two is done."""

    counter: int
    x: int
    scale: int
    flags: int
    picks: int
    size: int


def regions(problem: Problem, m: int) -> Regions:
    """`m`: rows of A."""
    kx = columns(problem.k)
    blocks = kx // BLOCK
    sizes = (FRONT, m * kx, 16 * blocks * column(m), 4 * blocks * -(-m // FLAG_ROWS),
             2 * max(problem.b.picks, 1) * pitch(m, problem.groups))
    at = Regions(*accumulate((-(-s // 256) * 256 for s in sizes), initial=0))
    return at._replace(size=max(at.size, expand.regions(problem, m, at.x).size))


def pitch(m: int, groups: int) -> int:
    """Rows of A, one behind the other, groups apart: see `column_of` in `fold_mixed_device.py`."""
    return -(-m // 64) * 64 + 128 * groups


def workspace(problem: Problem, config: Config) -> int:
    return regions(problem, problem.m).size


# ---------------------------------------------------------------- cost
# of one group, and of several, whose tiles take longer than their number says
LAUNCH_SECONDS = 14e-6, 29e-6   # five launches, two of which do nothing
FOLD = 1.05e-12             # an element of A, on a device of `fold_mixed.RATE`
PICK = 0.7e-12, 3.0e-12     # a row and a column of picks
STEP_TIME = 0.75e-6         # 64 columns of picks of a tile, on one SM


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds, where no more of A's blocks have their flags up than have with normal data."""
    p = problem
    sms = min(arch.sms, p.max_sms or arch.sms)
    front = (FOLD * p.k + PICK[p.groups > 1] * p.b.picks) * p.m * fold_mixed.RATE / arch.fp8_flops * arch.sms / sms
    steps = p.b.picks / prepack_folded.STEP / -(-p.n // prepack_folded.TILE)
    return LAUNCH_SECONDS[p.groups > 1] + front + max(tiles_time(p, config, arch, sms, steps * STEP_TIME), p.bytes / arch.bandwidth)


# ---------------------------------------------------------------- launch
def copy_of(x: Operands) -> prepack_folded.FoldedCopy | None:
    return None if x.packed is None else x.packed.folded


def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    """A looked at, folded and its columns picked, the product; BF16's two launches, for what that left."""
    copy, rest = copy_of(x), x.folded_rest
    assert workspace is not None and copy is not None and rest is not None
    at = regions(problem, x.m)
    of = prepack_folded.regions(x.groups, x.n, x.k, copy.columns, copy.picks)
    behind = gate(problem, x, workspace, at)
    picks = (Pointer(rest, torch.int32, of.starts), Pointer(rest, torch.int32, of.picks), Pointer(workspace, torch.int32, at.picks),
             copy.picks, pitch(x.m, x.groups) // 4)
    return [
        *front(problem, x, workspace, at, picks),
        _product(step.config, problem, x, workspace, behind.limit),
        *expand.launches(Step(expand.NAME, BEHIND), problem, x, workspace, at.x, behind)]


def _product(config: Config, problem: Problem, x: Operands, workspace: Tensor, limit: int) -> Launch:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from ....arch import detect
    from . import fold_mixed_device as device
    from .fp8_block_parts_device import FP8_PLANE

    arch = detect(x.out.device)
    tile = tile_of(problem, config, arch)
    copy, rest = copy_of(x), x.folded_rest
    assert tile is not None and copy is not None and rest is not None and x.folded is not None, f"{config}: not legal for {problem}"
    at, kx = regions(problem, x.m), columns(x.k)
    of = prepack_folded.regions(x.groups, x.n, x.k, copy.columns, copy.picks)
    blocks, row_blocks, across, rows = kx // BLOCK, -(-x.m // FLAG_ROWS), column(x.m), pitch(x.m, x.groups)
    om = stride(x.out, -2, x.n)
    flat = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)
    boxes = [
        TensorDescriptor(Pointer(workspace, torch.float8_e4m3fn, at.x), [1, x.m, kx], [x.m * kx, kx, 1], [1, 128, BLOCK],
                         FP8_PLANE.value),
        TensorDescriptor(Pointer(workspace, torch.float32, at.scale), [1, blocks * 4, x.m], [4 * blocks * across, across, 1],
                         [1, 4, 128], flat),
        TensorDescriptor(Pointer(x.folded, torch.float8_e4m3fn), [x.groups, x.n, x.k], [x.n * x.k, x.k, 1], [1, 256, BLOCK],
                         FP8_PLANE.value),
        output(x, 0, om, tile.OUT_COLS, tile.OUT_BYTES) if tile.STORE_TMA else None,
        TensorDescriptor(Pointer(workspace, torch.bfloat16, at.picks), [copy.picks, rows], [rows, 1], [64, 64],
                         device.PICK_TILE.value),
        TensorDescriptor(Pointer(rest, torch.bfloat16, of.values), [x.groups, x.n, copy.columns],
                         [x.n * copy.columns, copy.columns, 1], [1, 256, 64], device.REST_PLANE.value)]
    top = Pointer(rest, torch.uint8, of.top)
    grid = max(1, min(min(problem.max_sms or arch.sms, arch.sms), row_tiles(problem, x, tile.BM) * -(-x.n // tile.BN)))
    return Launch(
        device.fold_mixed_product_kernel, (grid,),
        (*boxes, x.out, top, top, x.index, Pointer(workspace, torch.int32, at.flags), Pointer(workspace, torch.int32, at.counter),
         Pointer(rest, torch.int32, of.at), x.m, x.n, blocks, row_blocks, x.groups, x.alignment, limit, x.n, 0, om, 0, tile),
        {"num_warps": 4, "maxnreg": tile.max_registers, "launch_pdl": True})
