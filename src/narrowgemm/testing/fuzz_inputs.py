"""What `fuzz` calls a kernel with: operands of any bits and strides, outputs between guards, corrupt layouts."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..formats import E8M0_NAN, ELEMENTS, Format, ScaledTensor
from ..layouts import KGrouped, Layout, Masked, Offsets, Psum
from .case import Case
from .guard import GUARD, POISON, all_bytes
from .inputs import Inputs, make_layout
from .values import mn_major, poisoned, put

if TYPE_CHECKING:
    from .fuzz_draw import Draw

VALUES = {"normal": 5, "bits": 2, "spread": 2, "far": 2, "nan": 1, "inf": 1, "zero": 1}     # and how often each is drawn
# powers of two that one operand is moved up, and the other one down: by more, sums may leave FP32 before the second scale comes
FARTHEST = 96
CORRUPT = ("past", "negative", "huge", "shuffled", "beyond_int32")
GUARDS = 4096
E5M2_INFINITY = 0x7C


@dataclass(frozen=True, slots=True)
class Store:
    """How a `[..., R, C]` tensor lies: `pad` elements behind every row, from `offset` elements on, `gap` rows behind every group;
    `transposed`: columns are rows."""

    pad: int = 0
    offset: int = 0
    gap: int = 0
    transposed: bool = False


def stored(x: Tensor, how: Store) -> Tensor:
    """`x` in a buffer of its own, which ends where it does: a memory checker sees a read behind it."""
    view, _ = room(tuple(x.shape), x.dtype, x.device, how, 0)
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    view.view(size).copy_(x.view(size))
    return view


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, how: Store, guard: int = GUARDS
         ) -> tuple[Tensor, Tensor]:
    """(a view of `shape`, the bytes that it lies in, so many guards at both ends)."""
    if how.transposed:
        view, buffer = room((*shape[:-2], shape[-1], shape[-2]), dtype, device, replace(how, transposed=False), guard)
        return view.mT, buffer
    *lead, rows, columns = shape
    outer = (*lead, rows + (how.gap if lead else 0), columns + how.pad)
    size = torch.empty((), dtype=dtype).element_size()
    nbytes, start = size * math.prod(outer), guard + size * how.offset
    buffer = torch.full((start + nbytes + guard,), GUARD, dtype=torch.uint8, device=device)
    view = buffer[start : start + nbytes].view(dtype).view(outer)[..., :rows, :columns]
    return view, buffer


class GuardedView:
    """As `guard.Guarded`, for an output with strides: no byte of the buffer beside the view's own elements may change."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, how: Store) -> None:
        self.tensor, self.buffer = room(shape, dtype, device, how)
        size = {1: torch.int8, 2: torch.int16, 4: torch.int32}[self.tensor.element_size()]
        self._bits = self.tensor.view(size)
        self.reset()

    def reset(self) -> None:
        self.buffer.fill_(GUARD)
        self._bits.fill_(-1)

    def faults(self, untouched: list[Tensor] | None = None) -> list[str]:
        bad = [i for i, x in enumerate(untouched or ()) if x.numel() and not all_bytes(x.contiguous(), POISON)]
        out = [f"wrote rows that belong to no group (part {bad[0]} of {len(untouched or ())})"] if bad else []
        kept = self._bits.clone()
        self._bits.copy_(torch.full_like(kept, int.from_bytes(bytes([GUARD]) * kept.element_size(), "little", signed=True)))
        if not all_bytes(self.buffer, GUARD):
            at = (self.buffer != GUARD).nonzero().flatten()
            out.append(f"wrote {at.numel()} bytes beside the output, the first at byte {int(at[0]) - GUARDS}")
        self._bits.copy_(kept)
        return out


def values(shape: tuple[int, ...], fmt: Format, kind: str, device: torch.device, generator: torch.Generator, up: int = 0
           ) -> ScaledTensor:
    """An operand of one of `VALUES`, times 2^up: 'bits' has any finite code, 'spread' scales far apart, 'far' all far from 1,
    'nan' a row with one, and 'inf', where elements have any."""
    e = fmt.elem
    packed = (*shape[:-1], shape[-1] // e.per_byte)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, device=device, generator=generator)

    if e.bits == 4:
        data = torch.randint(0, 256, packed, dtype=torch.uint8, device=device, generator=generator)
        data = torch.zeros_like(data) if kind == "zero" else data
    elif e.bits == 8 and kind == "bits":
        codes = torch.randint(0, 256, packed, dtype=torch.uint8, device=device, generator=generator)
        data = codes.view(e.dtype)
        codes[~data.float().isfinite()] = 0x36
    else:
        x = torch.randn(packed, device=device, generator=generator)
        if e.bits == 8:
            x = (x * 56).clamp(-e.max, e.max)
        if e.bits == 16 and kind == "spread":
            x = x * torch.exp2((uniform(*packed[:-1], 1) * 16 - 8).round())
        if fmt.element == "bf16":
            x = x * 2.0**up
        data = (x * 0 if kind == "zero" else x).to(e.dtype)
    scale = None
    if fmt.scaled:
        size = fmt.scale_shape(shape)
        far = {"spread": 14.0 if fmt.element != "e2m1" or generator.initial_seed() % 2 else 40.0, "bits": 6.0}.get(kind, 2.0)
        if kind == "spread" and fmt.group[1] and shape[-1] > 2048:
            far = min(far, 14.0)
        exponent = (uniform(*size) - 0.5) * far
        if fmt.group[0] == 1 and fmt.group[1]:      # rows have sizes of their own
            exponent = exponent + (uniform(*size[:-1], 1) - 0.5) * 6.0
        if fmt.scale == "e8m0":
            scale = (127 + up + exponent.round()).to(torch.uint8)
        else:
            scale = torch.exp2(up + exponent)
    if kind == "nan" and data.numel():
        row = int(generator.initial_seed() % shape[-2])
        where = (0,) * (len(shape) - 2) + (row,)
        if fmt.element == "e2m1" or (scale is not None and fmt.group[0] == 1 and fmt.group[1] and generator.initial_seed() % 3):
            assert scale is not None
            scale[where + (scale.shape[-1] - 1,)] = E8M0_NAN if fmt.scale == "e8m0" else float("nan")
        elif e.bits == 8:
            data.view(torch.uint8)[where + (packed[-1] - 1,)] = 0x7F
        else:
            data[where + (packed[-1] - 1,)] = float("nan")
    if kind == "inf" and data.numel() and fmt.element in ("e5m2", "bf16", "fp16"):
        coded = data.view(torch.uint8) if e.bits == 8 else data
        coded[..., generator.initial_seed() % shape[-2], packed[-1] // 2] = E5M2_INFINITY if e.bits == 8 else float("inf")
    return ScaledTensor(data, scale, fmt)


def restored(x: ScaledTensor, how: Store, scales: str) -> ScaledTensor:
    scale = x.scale
    if scale is not None:
        if scales == "mn_major":
            scale = mn_major(x).scale if scale.dim() == x.data.dim() else scale
        elif scales == "odd" and scale.dim() >= 2:
            scale = stored(scale, Store(3, 1, 1))
    return ScaledTensor(stored(x.data, how), scale, x.format)


def build(draw: Draw, device: torch.device) -> Inputs:
    """Inputs of a draw, as `Inputs` has them."""
    c = draw.case
    generator = torch.Generator(device).manual_seed(draw.seed)

    far = draw.values == "far" and "fp16" not in (c.a.element, c.b.element)
    up = random.Random(draw.seed).randint(-FARTHEST, FARTHEST) if far else 0

    def make(shape: tuple[int, ...], fmt: Format, side: int) -> ScaledTensor:
        return values(shape, fmt, draw.values, device, generator, up * side)

    out_shape: tuple[int, ...]
    own = draw.own_scales and c.layout == "k_grouped"
    if c.layout == "k_grouped":
        k = c.rows + draw.columns
        a, b = (_columns(make((r, c.rows), f, side), r, k, f, device) for r, f, side in ((c.m, c.a, 1), (c.n, c.b, -1)))
        a, b = ((ScaledTensor(x.data, torch.stack([x.scale * (1 + g % 3) for g in range(c.groups)]), x.format)
                 if own and x.scale is not None and not x.format.group[1] and c.groups else x) for x in (a, b))
        out_shape = (c.groups, c.m, c.n)
    elif c.layout == "dense":
        a, b, out_shape = make((c.m, c.k), c.a, 1), make((c.n, c.k), c.b, -1), (c.m, c.n)
    else:
        b = make((c.groups, c.n, c.k), c.b, -1)
        lead = (c.groups, c.max_m) if c.layout == "masked" else (c.a_rows,)
        a = poisoned((*lead, c.k), c.a, device)
        if c.layout == "masked":
            for g, rows in enumerate(c.group_sizes):
                if rows:
                    put(a[g], slice(0, rows), make((rows, c.k), c.a, 1))
        elif c.segments:
            whole = make((sum(n for *_, n in c.segments), c.k), c.a, 1)
            at = 0
            for _, start, n in c.segments:
                scale = whole.scale if whole.scale is None or c.a.group[0] == 0 else whole.scale[at:at + n]
                put(a, slice(start, start + n), ScaledTensor(whole.data[at:at + n], scale, c.a))
                at += n
        out_shape = (*lead, c.n)
    layout = make_layout(c, device)
    if isinstance(layout, Masked) and draw.hint >= 0:
        layout = Masked(layout.masked_m, draw.hint)
    elif isinstance(layout, Psum) and draw.hint >= 0:
        layout = Psum(layout.ends, layout.alignment, draw.hint)
    elif isinstance(layout, Offsets) and draw.wide_index:
        layout = Offsets(layout.offsets.long())
    elif isinstance(layout, KGrouped) and draw.wide_index:
        layout = KGrouped(layout.offsets.long(), layout.alignment)
    out: Any = GuardedView(out_shape, ELEMENTS[c.out_dtype].dtype, device, draw.out)
    inputs = Inputs(c, device, draw.seed, restored(a, draw.a, draw.scale), restored(b, draw.b, draw.scale if c.layout == "k_grouped"
                                                                                     else "odd" if draw.scale == "odd" else ""),
                    layout, out)
    if draw.corrupt and layout is not None:
        inputs.layout = corrupted(layout, c, draw.corrupt, random.Random(draw.seed))
    inputs.reset_out()
    return inputs


def _columns(x: ScaledTensor, rows: int, k: int, fmt: Format, device: torch.device) -> ScaledTensor:
    """With columns of poison behind, up to `k`."""
    if x.shape[-1] == k:
        return x
    out = poisoned((rows, k), fmt, device)
    out.data[:, :x.shape[-1]] = x.data
    if x.scale is not None and out.scale is not None:
        out.scale[:, :x.scale.shape[-1]] = x.scale
    return out


def corrupted(layout: Layout, c: Case, how: str, rng: random.Random) -> Layout:
    """The layout with an index that no caller should have."""
    x = layout.index.clone()
    limit = c.a_rows
    if not x.numel():
        return layout
    i = rng.randrange(x.numel())
    if how == "beyond_int32" and isinstance(layout, Offsets):
        x = x.long()
        x[i:] = x[i:] + (1 << 32)
    elif how in ("past", "beyond_int32"):
        x[i:] = x[i:] + limit + 3
    elif how == "negative":
        x[: i + 1] = -5
    elif how == "huge":
        x[i] = 2**31 - 1
    else:
        x = x[torch.tensor(rng.sample(range(x.numel()), x.numel()), device=x.device)]
    if isinstance(layout, Masked):
        return Masked(x, layout.expected_m)
    if isinstance(layout, Psum):
        return Psum(x, layout.alignment, layout.expected_m)
    return type(layout)(x)      # type: ignore[call-arg]
