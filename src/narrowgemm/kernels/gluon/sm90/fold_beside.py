"""The launches in front of products of folded MXFP8 by folded MXFP8 with few rows: one folds A and looks at it, one does more.

Device code: `fold_beside_device.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ....problem import Problem
from ...launching import Launch, Pointer
from ...operands import Operands
from . import expand
from .expand import columns
from .fold_mixed import BLOCK, FLAG_ROWS, FOLD_REGISTERS, LOOKS, PROBES_AT, column
from .narrow import a_strides, power_of_two

if TYPE_CHECKING:
    from .fold_both import Regions

MOST = 512          # blocks of 64 rows of A by 128 of K, whose flags every program of the launch behind reads
SAVED_SECONDS = 2.5e-6      # found 2.6 to 4.7 us
PROGRAMS = 3        # of that, an SM,
REST_REGISTERS = 144    # and of a lane of theirs


def offered(m: int, k: int, most_blocks: int) -> bool:
    """Whether A of m rows has so few blocks; most_blocks: of K, that columns are left out of."""
    blocks = columns(k) // BLOCK
    return -(-m // FLAG_ROWS) * blocks <= MOST and blocks <= most_blocks


def launches(problem: Problem, x: Operands, workspace: torch.Tensor, at: Regions, flags: Pointer, listed: Pointer,
             picks: tuple[Pointer, Pointer, Pointer, int, int], limit: int, outlying: int) -> list[Launch]:
    """flags: one a block of A, not where BF16's operands go; listed: columns that are left out; picks: as `fold_mixed.front` has
    them."""
    from ....arch import detect
    from .fold_beside_device import fold_beside_kernel, rest_beside_kernel

    scale, fields, wide = x.a.scale, x.b.scale, expand.regions(problem, x.m, at.x)
    assert scale is not None and fields is not None and x.folded is not None
    words, blocks, row_blocks = problem.a.aligned, columns(x.k) // BLOCK, -(-x.m // FLAG_ROWS)
    _, xm, _, sm, sk = a_strides(x, False)
    given = (Pointer(x.a.data, torch.int32 if words else torch.uint8), scale, xm // (16 if words else 1), sm, sk)
    made = (Pointer(workspace, torch.int32, at.x), Pointer(workspace, torch.float32, at.scale), flags)
    looks, count = (Pointer(workspace, torch.int32, at.counter + far) for far in (PROBES_AT, 0))
    starts, entries, to, number, pitch = picks
    sizes = (blocks, row_blocks, column(x.m) // 4, x.groups, number, pitch)
    options = {"ALIGNED": words, "num_warps": 4, "maxnreg": FOLD_REGISTERS[1]}
    fold = Launch(fold_beside_kernel, ((row_blocks + LOOKS) * blocks,),
                  (*given, *made, looks, starts, entries, to, x.m, x.k, *sizes), options)
    rest_options = {**options, "maxnreg": REST_REGISTERS, "BLOCKS": power_of_two(blocks), "FACTOR": x.factor is not None}
    rest = Launch(rest_beside_kernel, (PROGRAMS * detect(x.out.device).sms,),
                  (*given, *made, looks, count, listed, to, Pointer(x.b.data, torch.int32), fields,
                   count if x.factor is None else x.factor,
                   Pointer(workspace, torch.bfloat16, wide.x), Pointer(workspace, torch.float32, wide.factor),
                   Pointer(workspace, torch.int64, wide.weights), Pointer(workspace, torch.uint8, at.codes),
                   Pointer(x.folded, torch.float8_e4m3fn), Pointer(workspace, torch.bfloat16, at.removed),
                   Pointer(x.a.data, torch.float8_e4m3fn), x.a.data.stride(-2), x.m, x.n, x.k, *sizes, limit),
                  {**rest_options, "OUTLYING": outlying})
    return [fold, rest]

