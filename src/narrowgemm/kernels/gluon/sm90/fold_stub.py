"""A group's few rows beyond its last whole tile of 256, worked on with that tile: where.

Experts of 256 rows in the mean have 257 to 288 as often as not, and half a tile for them takes three quarters of a tile's time.
Device code: `fold_stub_device.py`.
"""

from __future__ import annotations

from ....problem import Problem
from . import fold_whole

ROWS = 32               # of a group, beyond its last whole tile
MANY, TABLE = 64, 512   # groups; the schedule's table has places for so many
LEAST, MOST = 250, 272  # rows of a group in the mean


def offered(problem: Problem) -> bool:
    """Whether tiles with tails may have them, unless rows of the weights have factors: where the ptxas of Triton 3.6 doesn't
    serialise wgmma, as it does for outputs of 4 bytes, factors, and tables of other sizes."""
    takes = problem.layout == "offsets" and MANY <= problem.groups <= TABLE and fold_whole.nibbles(problem)
    return takes and problem.a.format.element == "e4m3" and problem.out_bytes == 2


def wins(rows: int, groups: int) -> bool:
    """Whether about half of the groups have such rows: tiles without take up to 14% longer. Of a call, whose rows a problem has in
    buckets only."""
    return LEAST * groups <= rows <= MOST * groups
