"""Tiles of the Hopper prefill kernel whose FP8 tokens are multiplied in widths of COLUMNS: see `narrow_columns_device`."""

from __future__ import annotations

from ....problem import Problem
from .narrow_model import rows_expected
from .narrow_tile import by_row, in_two

# most tokens of a tile and its units of 64 rows -> consumers, ring slots, their K blocks, columns of a product if several
FP8_COLUMNS = {(96, 3): (3, 3, 2, 0), (160, 2): (2, 3, 2, 0), (160, 3): (3, 5, 1, 64), (144, 4): (2, 4, 1, 48),
               (96, 2): (2, 5, 2, 0), (288, 2): (2, 4, 1, 80)}
OF_ROWS = ((96, 2), (288, 2))       # of tokens with one scale a row alone


def offered(problem: Problem, tokens: int, units: int, piece: int) -> bool:
    """Several products a K block have been run by offsets alone, of tokens with scales: three units if one tile holds an expert's.

    Faster with few experts, slower with many: candidates that the model doesn't choose."""
    if (tokens, units) in OF_ROWS:      # timed by offsets
        return by_row(problem) and problem.op == "grouped_gemm" and problem.layout == "offsets"
    if in_two(problem) or (piece and (by_row(problem) or problem.op != "grouped_gemm" or problem.layout != "offsets")):
        return False
    return not piece or units > 3 or rows_expected(problem) <= tokens
