"""Output buffers that notice a wrong write: guard bytes on both sides, and a poison in every byte not yet written."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GUARD = 0xA5    # in the guard bytes
POISON = 0xFF   # in the buffer: NaN in BF16, FP16, FP32, E4M3 and E5M2
CHUNK = 1 << 28


def all_bytes(x: Tensor, value: int) -> bool:
    """Whether every byte of a contiguous tensor is `value`. Synchronises."""
    flat = x.reshape(-1).view(torch.uint8)
    return all(bool((flat[i : i + CHUNK] == value).all()) for i in range(0, flat.numel(), CHUNK))


@dataclass(frozen=True, eq=False)
class Guarded:
    """`tensor` is the view to hand out; the rest of `buffer` must not change."""

    tensor: Tensor
    buffer: Tensor
    guard: int

    def reset(self) -> None:
        """Poison the tensor and restore the guards."""
        self.buffer.fill_(GUARD)
        self.buffer[self.guard : -self.guard].fill_(POISON)

    def faults(self, untouched: list[Tensor] | None = None) -> list[str]:
        """What was written and must not have been: guard bytes, and `untouched`, parts of `tensor`. Synchronises."""
        out = []
        if not all_bytes(self.buffer[: self.guard], GUARD):
            out.append("wrote before the output")
        if not all_bytes(self.buffer[-self.guard :], GUARD):
            out.append("wrote past the output")
        bad = [i for i, x in enumerate(untouched or ()) if x.numel() and not all_bytes(x, POISON)]
        if bad:
            out.append(f"wrote rows that belong to no group (part {bad[0]} of {len(untouched or ())})")
        return out

    def assert_clean(self, untouched: list[Tensor] | None = None) -> None:
        """AssertionError that names every fault of `faults`."""
        if bad := self.faults(untouched):
            raise AssertionError("; ".join(bad))


def guarded_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, guard: int = 4096) -> Guarded:
    """A poisoned contiguous tensor between two guards of `guard` bytes (a multiple of 256: alignment stays torch's)."""
    nbytes = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    buffer = torch.empty(guard + nbytes + guard, dtype=torch.uint8, device=device)
    out = Guarded(buffer[guard : guard + nbytes].view(dtype).view(shape), buffer, guard)
    out.reset()
    return out
