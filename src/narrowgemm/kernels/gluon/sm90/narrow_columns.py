"""Tiles of the Hopper prefill kernel whose FP8 tokens are multiplied in widths of COLUMNS: see `narrow_columns_device`."""

from __future__ import annotations

from ....problem import Problem
from .narrow_fp8_front import gives_ratios
from .narrow_model import rows_expected
from .narrow_tile import by_row, in_two

# most tokens of a tile and its units of 64 rows -> consumers, ring slots, their K blocks, PIECE of the tile
FP8_COLUMNS = {(96, 3): (3, 3, 2, 0), (160, 2): (2, 3, 2, 0), (160, 3): (3, 5, 1, 64), (144, 4): (2, 5, 1, 48),
               (80, 4): (2, 3, 2, 80), (96, 2): (2, 5, 2, 0), (288, 2): (2, 4, 1, 80)}
OF_ROWS = ((96, 2), (288, 2))       # of tokens with one scale a row alone
BOTH = {(144, 4): 128}              # BOTH of the tile: of 144 columns there are no registers for it


def offered(problem: Problem, tokens: int, units: int, piece: int) -> bool:
    """Products in no order have been run by offsets alone, of tokens with scales: three units if one tile holds an expert's,
    faster with few experts and slower with many (not chosen by the model), four by 80 columns where sums of two K blocks go on."""
    if (tokens, units) in OF_ROWS:      # timed by offsets
        return by_row(problem) and problem.op == "grouped_gemm" and problem.layout == "offsets"
    if in_two(problem) or (piece and (by_row(problem) or problem.op != "grouped_gemm" or problem.layout != "offsets")):
        return False
    if piece == tokens and not gives_ratios(problem):
        return False
    return not piece or units > 3 or rows_expected(problem) <= tokens
