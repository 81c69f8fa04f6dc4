"""A random call of `fuzz_steps`: what is drawn, where its tensors lie, and how results are compared."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..formats import ScaledTensor
from ..kernels.registry import candidates
from .fuzz_inputs import Store, stored

DTYPES = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)
STORES = (Store(), Store(), Store(8), Store(0, 8), Store(3, 1), Store(1), Store(0, 2))


class Call:
    """Random things of one call, on one device."""

    def __init__(self, op: str, seed: int, device: torch.device) -> None:
        self.op, self.rng, self.device, self.found = op, random.Random(f"{op}/{seed}"), device, list[str]()
        self.generator = torch.Generator().manual_seed(seed)

    def pick(self, items: Sequence[Any]) -> Any:
        return self.rng.choice(items)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def kernel(self, *ops: str) -> str | None:
        """A kernel by name, or None for what dispatch takes."""
        names = [n for o in ops for n, k in candidates(o).items() if k.BACKEND != "reference"]
        return None if self.device.type == "cpu" or self.chance(0.4) else self.pick(names)

    def there(self, x: Tensor, odd: bool = True) -> Tensor:
        """On the device, in a buffer of its own with strides."""
        how = self.pick(STORES) if odd and x.dim() >= 2 else Store(0, self.pick((0, 0, 1)) if odd else 0)
        if x.dim() == 1:
            return stored(x.to(self.device)[None], how)[0]
        return stored(x.to(self.device), how)

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32, wild: bool = True) -> Tensor:
        """Values of one kind or another."""
        x = torch.randn(shape, generator=self.generator)
        kind = self.pick(("normal", "normal", "large", "tiny", "mixed", "zeros", "nan", "inf")) if wild else "normal"
        if kind == "large":
            x *= 1e4 if dtype == torch.float16 else 1e30
        elif kind == "tiny":
            x *= 1e-7 if dtype == torch.float16 else 1e-39
        elif kind == "mixed":
            x *= torch.exp2(torch.randint(-12, 12, shape, generator=self.generator).float())
        elif kind == "zeros":
            x[torch.rand(shape, generator=self.generator) < 0.9] = 0.0
        elif kind in ("nan", "inf") and x.numel():
            x.view(-1)[torch.randint(0, x.numel(), (3,), generator=self.generator)] = float(kind)
        return x.to(dtype)

    def say(self, what: str, bad: bool) -> None:
        if bad:
            self.found.append(f"{self.op}: {what}")

    def same(self, what: str, got: Tensor, want: Tensor) -> None:
        x, y = (t.cpu().clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (got, want))
        equal = got.shape == want.shape and torch.equal(x, y)
        self.say(f"{what}: other bits than the reference", not equal)

    def scaled(self, what: str, got: ScaledTensor, want: ScaledTensor, rows: slice = slice(None),
               columns: slice = slice(None)) -> None:
        """Payload and scales; the payload of a block whose scale is NaN may be anything."""
        x, y = got.dequantize().cpu()[..., rows, columns], want.dequantize().cpu()[..., rows, columns]
        self.say(f"{what}: NaN elsewhere", not torch.equal(x.isnan(), y.isnan()))
        differ = (x != y) & ~y.isnan() & ~x.isnan()
        if bool(differ.any()):
            at = tuple(int(i) for i in differ.nonzero()[0])
            self.say(f"{what}: {int(differ.sum())} of {differ.numel()} values differ, first {at}: {float(x[at])}, "
                     f"not {float(y[at])}", True)

    def near(self, what: str, got: Tensor, want: Tensor, relative: float, of_row: float = 0.0) -> None:
        x, y = got.float().cpu(), want.float().cpu()
        if x.shape != y.shape:
            return self.say(f"{what}: shape {tuple(x.shape)}, not {tuple(y.shape)}", True)
        ok = y.isfinite()
        self.say(f"{what}: NaN elsewhere", not torch.equal(x.isnan(), y.isnan()))
        if not y.numel():
            return None
        top = torch.where(ok, y.abs(), 0.0).amax(-1, keepdim=True)
        least = 6e-8 if got.dtype == torch.float16 else 1e-30
        off = torch.where(ok & ~x.isnan(), (x - y).abs() - relative * y.abs() - of_row * top - least, -1.0)
        if bool((off > 0).any()):
            at = tuple(int(i) for i in (off == off.max()).nonzero()[0])
            self.say(f"{what}: {int((off > 0).sum())} of {off.numel()} off, most {at}: {float(x[at])}, not {float(y[at])}",
                     True)
        return None
