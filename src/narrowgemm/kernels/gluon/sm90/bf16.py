"""BF16 grouped products of many rows on Hopper: contiguous, offsets, psum, masked. TMA, wgmma, warp specialisation, in Gluon.

Few rows a group are `triton.bf16`'s, dense products cuBLAS's. torch's grouped product computes the same sums, but it allocates its
result and writes rows outside of the groups, so rows are copied behind it; this writes where it is told. The kernel is that of
packed weights brought to BF16 (`expand.py`), without factors: device code in `bf16_device.py`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import Tensor

from ....arch import Arch
from ....problem import Config, Problem, Step
from ...launching import Launch
from ...operands import Operands
from . import expand, refusals
from .expand import BLOCK, RATE, TILE_SECONDS, Tile
from .fp8_block import dealt, has_tails, waves, with_memory
from .fp8_scaled import SHAPES
from .tensor_maps import stride

NAME = "gluon_sm90.bf16"
BACKEND = "gluon_sm90"
ELEMENTS = 8                # 16 bytes, in which TMA counts


def supports(problem: Problem, arch: Arch) -> str | None:
    p = problem
    if (reason := refusals.op(p, arch)) is not None:
        return reason
    if p.layout == "dense":
        return "computes grouped products"
    if p.a.format.name != "bf16" or p.b.format.name != "bf16":
        return f"takes BF16 on both sides, not {p.a.format.name} x {p.b.format.name}"
    if p.a.prepack or p.b.prepack or p.a.major != "k" or p.b.major != "k" or not p.a.aligned or not p.b.aligned:
        return "needs operands with K contiguous, on 16 bytes and not prepacked"
    return refusals.shape(replace(p, promote=0), ELEMENTS)


def configs(problem: Problem, arch: Arch) -> list[Config]:
    return [c for c in expand.CANDIDATES if not c.extra and legal(problem, c, arch) is None]


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run the problem, or None."""
    if config.extra:
        return "has no extra options"
    return expand.legal(problem, config, arch)


@lru_cache(maxsize=4096)
def tile_of(problem: Problem, config: Config, arch: Arch) -> Tile | None:
    """The compile-time constants of a legal config; None where it needs more shared memory than there is."""
    tile = expand.tile_of(problem, config, arch)
    return None if tile is None else replace(tile, FACTORS=False, TAIL=tile.WGM == 2 and has_tails(problem))


def workspace(problem: Problem, config: Config) -> int:
    return 0


# microseconds of one K block of 64 on one SM of an H200, where every SM is busy: docs/measured.md
BLOCK_TIMES = {(128, 128): 0.38, (128, 192): 0.57, (128, 256): 0.74, (64, 256): 0.40, (64, 128): 0.205}

FEW_ROWS, FEW = 16, 1.1     # of a group: `triton.bf16` reads weights faster then


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds: waves of tiles, or the bytes at the streaming rate, whichever is longer, and some of the other; the mean of groups
    whose sizes are equal and spread. Weights that a tail needs are read for it once more."""
    sms = min(arch.sms, problem.max_sms or arch.sms)
    unit = -(-problem.k // BLOCK) * 1e-6 * (RATE / 132) / (arch.bf16_flops / arch.sms)
    block = unit * BLOCK_TIMES[config.block_m, config.block_n] + TILE_SECONDS
    halves = SHAPES[config.block_m, config.block_n][0] == 2 and has_tails(problem)
    works = {dealt(problem, config, spread, halves) for spread in (False, True)}
    few = FEW if problem.rows <= FEW_ROWS else 1.0
    again = 2.0 * config.block_n * problem.k
    each = [with_memory(waves(work, sms) * block, work.tiles, problem, arch, more=again * work.again) for work in works]
    return few * sum(each) / len(each)


def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    from ....arch import detect

    arch = detect(x.out.device)
    tile = tile_of(problem, step.config, arch)
    assert tile is not None, f"{step.config} is not legal for {problem}"
    a, b = x.a.data, x.b.data
    planes = (_planes(a, x.k, tile.BM), _planes(b, x.k, tile.WGN * tile.COLS0), _planes(b, x.k, tile.COLS1) if tile.COLS1 else None)
    return [expand.product(problem, x, tile, arch, planes, x.k)]


def _planes(t: Tensor, k: int, box: int) -> Any:
    """The TMA descriptor of an operand as [1 or G, rows, K], moved in boxes of `box` rows by a K block."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .bf16_device import PLANES

    rows, outer = t.shape[-2], stride(t, -2, k)
    count = t.shape[0] if t.dim() == 3 else 1
    plane = stride(t, 0, outer * rows) if t.dim() == 3 else outer * rows
    return TensorDescriptor(t, [count, rows, k], [plane, outer, 1], [1, box, BLOCK], PLANES.value)
