"""The launch in front of products of FP8 tokens in widths of COLUMNS, where a position is a row of A.

How it works: `narrow_fp8_front_device.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ....problem import Problem
from ...launching import Launch, Pointer
from ...operands import Operands
from . import narrow
from .narrow_fp8_model import starts_ahead
from .narrow_prefill_tile import Tile
from .narrow_tile import CHUNK, by_row

PREP_K = 2048           # of K that one program brings


@dataclass(frozen=True)
class FrontStatic:
    """What `narrow_fp8_front_kernel` is compiled for."""

    ROW: bool                # one scale a row, else one for 128 of K
    OFFSETS: bool            # the layout's index says where the last group ends
    ROWS: int = 2            # of A that a program brings, a power of two
    BK: int = PREP_K
    CHAIN: bool = False      # scales of every other K block are given as ratios to the next one's
    PDL: bool = True         # the product starts meanwhile


def takes(problem: Problem, x: Operands, tile: Tile) -> bool:
    """Whether it brings the tokens: where the product finds its entries by itself, and wants scales K block by K block, if any."""
    if not (tile.COLUMNS and tile.AHEAD) or problem.layout == "masked":
        return False
    return x.slots is None and x.weight is None and problem.a_div == 1 and not problem.epilogue.combine


def gives_ratios(problem: Problem) -> bool:
    """Whether it brings a problem's tokens in tiles of COLUMNS whatever the operands are, and so may give ratios of scales."""
    e, plain = problem.epilogue, problem.op == "grouped_gemm" and problem.layout == "offsets" and problem.a_div == 1
    return plain and not (by_row(problem) or e.combine or e.routing_weight) and starts_ahead(problem)


def launch(problem: Problem, x: Operands, tile: Tile, rows: int, to: tuple[Pointer, Pointer, Pointer], taken: Pointer, kx: int
           ) -> Launch:
    """to: tokens, factors, scales, in the workspace; taken: the counter of tiles there."""
    from .narrow_fp8_front_device import SCALE_BLOCKS, SCALE_POSITIONS, narrow_fp8_front_kernel

    cfg, (_, sxm, _, ssm, ssk) = FrontStatic(tile.ROW, problem.layout == "offsets", CHAIN=tile.CHAIN), narrow.a_strides(x, False)
    scales = 0 if tile.ROW else -(-rows // SCALE_POSITIONS.value) * -(-kx // (CHUNK * SCALE_BLOCKS.value))
    return Launch(narrow_fp8_front_kernel, (-(-rows // cfg.ROWS) * -(-kx // cfg.BK) + scales,),
                  (x.a.data, x.a.scale, *to, x.a.scale if x.index is None else x.index, taken, x.k, kx, sxm, ssm, ssk, x.groups,
                   rows, cfg),
                  {"num_warps": 4})
