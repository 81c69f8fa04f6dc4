"""The launch of `fold_both.py` that folds weights which are held as they came. Device code: `fold_codes_device.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...launching import Launch, Pointer
from ...operands import Operands

ROWS, COLUMNS = 8, 1024     # of weights, of a program
SECONDS, COPY = 2.0e-6, 0.8     # of the launch, and of the streaming rate, in which it reads and writes a byte an element


def launch(x: Operands, top: Pointer, workspace: Tensor, start: int) -> Launch:
    """x's weights `[N, K]` to E4M3 at byte `start` of the workspace. top: codes of the rows' powers of two."""
    from .fold_codes_device import fold_codes_kernel

    codes = x.b.scale
    assert codes is not None
    return Launch(
        fold_codes_kernel, (-(-x.n // ROWS) * -(-x.k // COLUMNS),),
        (x.b.data, codes, top, Pointer(workspace, torch.float8_e4m3fn, start), x.n, x.k, x.b.data.stride(-2), *codes.stride()[-2:]),
        {"BN": ROWS, "BK": COLUMNS, "num_warps": 4})
