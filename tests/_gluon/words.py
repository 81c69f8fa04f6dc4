"""For the kernels that bring packed E2M1 to E4M3 in memory: the bytes themselves, and a TMA that reads them as the values that they
hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..kernels import _ptx
from . import asynchronous
from .values import DType, Tensor, raw, wrap


def patch(expand_rows: Any) -> None:
    """Have the module of `expand_rows` expand by `_ptx`, which runs the device's own instructions."""
    names = expand_rows.__globals__
    own = names["expand"].__globals__
    tables = [own["tables_of"](wrap(np.int32(d))) for d in range(16)]
    low, high = (np.array([int(raw(t[i])) & 0xFFFFFFFF for t in tables], np.uint32) for i in (0, 1))

    def expand(words: Tensor, fields: Tensor, tops: Tensor, _: Any, nibbles: bool, warps: int = 4) -> Tensor:
        f, t = np.broadcast_arrays(fields.a, tops.a)
        # rows of a warp: g, then g + 8
        d = np.stack([(t - f) & 15, ((t >> 8) - (f >> 8)) & 15], 1).reshape(warps, 8, 2, 4).transpose(0, 2, 1, 3).reshape(-1, 4)
        out = _ptx.run(own["NIBBLES_ASM" if nibbles else "FOLD_ASM"], words.a.view(np.uint32).reshape(-1, 4, 4), low[d][..., None], high[d][..., None])
        return Tensor(np.ascontiguousarray(np.stack(out, -1)).reshape(-1, 32).view(np.int32))

    names["expand"] = expand


class _Values:
    """int32 words [planes, rows, words], read as E4M3 [planes, rows, 4 * words] when they are asked for."""

    def __init__(self, words: np.ndarray) -> None:
        self.bytes = words.view(np.uint8)
        self.shape = self.bytes.shape

    def __getitem__(self, at: Any) -> np.ndarray:
        return torch.from_numpy(np.ascontiguousarray(self.bytes[at])).view(torch.float8_e4m3fn).float().numpy()


class Descriptor(asynchronous.Descriptor):
    """Of E4M3 in memory that kernels write as words."""

    def __init__(self, words: np.ndarray, box: list[int], dtype: DType) -> None:
        super().__init__(_Values(words), box, dtype)  # type: ignore[arg-type]
