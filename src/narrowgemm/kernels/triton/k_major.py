"""K-major copies of one-byte operands in the workspace, for kernels whose tensor cores take no others.

Where an operand comes with rows and columns exchanged, off 16 bytes, or in groups that start anywhere, a kernel may ask for a copy:
the Plan counts its bytes and its time, so that the cost model decides. `quantize_both` writes what needs no copy. Device code:
`k_major_device.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...arch import Arch
from ...problem import Operand
from ..launching import Launch, Pointer
from .common import LAUNCH_SECONDS

ALIGNMENT = 128
EFFICIENCY = 0.8        # of the streaming rate


def refuse(x: Operand) -> str | None:
    """Why there can be no copy, or None."""
    return None if x.major in ("k", "mn") else f"copies operands with one contiguous axis, not {x.major} ones"


def needed(x: Operand) -> bool:
    return x.major != "k" or not x.aligned


def columns(k: int, groups: int = 0) -> int:
    """Columns of a copy: those of K, on 16 bytes; with `groups` of any length in segments, at most."""
    return -(-k // ALIGNMENT) * ALIGNMENT + ALIGNMENT * groups if groups else -(-k // 16) * 16


def seconds(size: float, arch: Arch) -> float:
    """Predicted time of copying so many bytes."""
    return LAUNCH_SECONDS + 2 * size / (EFFICIENCY * arch.bandwidth)


@dataclass(frozen=True, slots=True)
class Copied:
    """A copy as what a TMA descriptor is made on: `base` points into the workspace."""

    base: Pointer
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def copy(x: Tensor, workspace: Tensor, at: int, index: Tensor | Pointer | None, segments: Pointer | None, groups: int
         ) -> tuple[Launch, Copied]:
    """`x` `[.., R, K]` into `workspace` from byte `at` on: the launch, and what it makes. With `segments` of `groups`, x is 2-D."""
    from . import k_major_device as device

    *lead, rows, k = x.shape
    batch, p = (lead[0] if lead else 1), columns(k, groups if segments is not None else 0)
    turn = x.stride(-1) != 1 and k > 1
    tiles_k = -(-p // ALIGNMENT)
    out = Pointer(workspace, x.dtype, at)
    other: Sequence[Tensor | Pointer] = (index, segments) if index is not None and segments is not None else (out, out)
    made = Launch(
        device.k_major_kernel, (batch * tiles_k * -(-rows // 128),),
        (x, out, *other, rows, k, groups, tiles_k, x.stride(0) if lead else 0, x.stride(-1) if turn else x.stride(-2),
         rows * p // 16, p // 16), {"TURN": turn, "GROUPED": segments is not None, "CHUNK": 256, "num_warps": 8, "num_stages": 1})
    shape, strides = (batch, rows, p if segments is not None else k), (rows * p, p, 1)
    return made, Copied(out, shape, strides)


def find_segments(index: Tensor, k: int, groups: int, workspace: Tensor, at: int) -> tuple[Launch, Pointer]:
    """The launch that writes int32 `[groups + 1]` from byte `at` of the workspace on: where each group's segment starts."""
    from . import quantize_both_device as device

    out = Pointer(workspace, torch.int32, at)
    return Launch(device.segments_kernel, (1,), (index, out, k, groups, columns(k, groups)), {"CHUNK": 256, "num_warps": 4}), out
