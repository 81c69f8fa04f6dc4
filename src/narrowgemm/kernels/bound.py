"""Launches that are bound to a signature: everything is fixed but addresses and the stream.

The only addresses that are kept are those in encoded TMA descriptors, which are looked up by that address; everything else in a
descriptor belongs to the signature. So a tensor that was freed and allocated again finds its own descriptor, or an equal one.
Threads do not disturb each other: a launch fills in a copy of the argument list. The stream is asked for in every launch; the
device is part of the signature.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from . import context

MAPS = 256          # encoded descriptors kept for one argument of one signature


class Pointer:
    """`tensor`'s address plus `offset` bytes, as a pointer to `dtype`: what Triton takes for a tensor, without a view's cost.

    A part without bytes may start where its buffer ends, at an address that belongs to nobody, which Triton refuses. Such a pointer
    is to the buffer's start.
    """

    __slots__ = ("dtype", "offset", "tensor")

    def __init__(self, tensor: Tensor, dtype: torch.dtype, offset: int = 0) -> None:
        self.tensor, self.dtype, self.offset = tensor, dtype, offset if offset and offset < tensor.nbytes else 0

    def data_ptr(self) -> int:
        return self.tensor.data_ptr() + self.offset

    def view(self) -> Tensor:
        """As a tensor; of a contiguous one."""
        return self.tensor.view(torch.uint8)[self.offset:].view(self.dtype)


class Ready:
    """A Plan's launches, bound to a signature. Called with addresses in the order of `Operands.addresses`; False where
    nothing was launched, because it has to go Triton's way."""

    __slots__ = ("_bound", "_current", "_device", "_odd", "_runtime", "_stream", "workspace_bytes")

    def __init__(self, bound: Sequence[Bound], device: int, workspace_bytes: int, addresses: Sequence[int]) -> None:
        self._bound, self._device, self.workspace_bytes = tuple(bound), device, workspace_bytes
        self._current, self._stream, self._runtime = _driver()
        odd = tuple(p & 15 for p in addresses)
        self._odd = odd if any(odd) else None

    def __call__(self, addresses: tuple[int, ...]) -> bool:
        bits = 0
        for p in addresses:
            bits |= p
        if bits & 15 if self._odd is None else tuple(p & 15 for p in addresses) != self._odd:
            return False
        return self.launch(addresses)

    def aligned(self, bits: int) -> bool:
        """Whether all operands are on 16 bytes, as far as the signature says, and the addresses that `bits` is the OR of too."""
        return not bits & 15 and self._odd is None

    def launch(self, addresses: tuple[int, ...]) -> bool:
        """As a call, for addresses whose alignment is known to be that of the signature."""
        runtime, device = self._runtime, self._device
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook      # a chain of hooks, or one, or None
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or self._current() != device:
            return False
        stream = self._stream(device)
        for bound in self._bound:
            bound(stream, addresses)
        return True

    def calls(self, addresses: tuple[int, ...]) -> list[Callable[[], None]]:
        """The C launcher with its arguments, once a launch: to measure what is left where nothing is worked out."""
        stream = self._stream(self._device)
        return [partial(bound._raw, *bound.arguments(stream, addresses)) for bound in self._bound]


def joined(parts: Sequence[tuple[Ready, Sequence[int]]], operands: int) -> Ready | None:
    """All launches of several, over one table of addresses: operand i of each is at its i-th place. None if one is off 16 bytes."""
    if any(ready._odd is not None for ready, _ in parts):
        return None
    return Ready([b.moved(at) for ready, at in parts for b in ready._bound], parts[0][0]._device, 0, (0,) * operands)


class Bound:
    """One launch with everything fixed but addresses and stream. It keeps no tensor alive, but the compiled kernel."""

    __slots__ = ("_given", "_maps", "_offsets", "_pointers", "_raw", "_runs", "_stream_at", "compiled")

    def __init__(self, raw: Callable[..., None], given: list[Any], stream_at: int, pointers: Sequence[tuple[int, int, int]],
                 maps: Sequence[tuple[int, int, Maps]]) -> None:
        """`given`: what the C launcher gets.

        `pointers`: (place, operand, offset in bytes); `maps`: (place, operand, descriptors); places are in `given`.
        """
        self.compiled: Any = None       # Triton unloads a kernel that nothing holds
        self._raw, self._given, self._stream_at, self._maps = raw, given, stream_at, tuple(maps)
        self._pointers, self._runs = tuple(pointers), tuple(_runs(pointers))
        self._offsets = tuple((at, offset) for at, _, offset in pointers if offset)

    def moved(self, at: Sequence[int]) -> Bound:
        """The same launch, operand i found at `at[i]` of the addresses."""
        other = copy.copy(self)
        other._pointers = tuple((place, at[operand], offset) for place, operand, offset in self._pointers)
        other._runs = tuple(_runs(other._pointers))
        other._maps = tuple((place, at[operand], maps) for place, operand, maps in self._maps)
        return other

    def __call__(self, stream: int, addresses: Sequence[int]) -> None:
        self._raw(*self.arguments(stream, addresses))

    def arguments(self, stream: int, addresses: Sequence[int]) -> list[Any]:
        """What the C launcher gets for these addresses."""
        arguments = self._fill(addresses)
        arguments[self._stream_at] = stream
        return arguments

    def _fill(self, addresses: Sequence[int]) -> list[Any]:
        arguments = self._given.copy()
        for places, pick in self._runs:
            arguments[places] = pick(addresses)
        for at, offset in self._offsets:
            arguments[at] += offset
        for at, operand, maps in self._maps:
            arguments[at] = maps[addresses[operand]]
        return arguments


def _runs(pointers: Sequence[tuple[int, int, int]]) -> Iterator[tuple[slice, Callable[[Sequence[int]], tuple[int, ...]]]]:
    """Pointers that follow each other, and what picks their addresses, all at once."""
    start = 0
    for i in range(1, len(pointers) + 1):
        if i == len(pointers) or pointers[i][0] != pointers[i - 1][0] + 1:
            operands = [operand for _, operand, _ in pointers[start:i]]
            # a slice brings a tuple, as several indices do
            pick = itemgetter(*operands) if len(operands) > 1 else itemgetter(slice(operands[0], operands[0] + 1))
            yield slice(pointers[start][0], pointers[i - 1][0] + 1), pick
            start = i


class BoundNested(Bound):
    """From Triton 3.7 on: the C launcher takes the kernel's arguments as one list, behind the others."""

    __slots__ = ("_outer",)

    def __init__(self, raw: Callable[..., None], given: list[Any], stream_at: int, pointers: Sequence[tuple[int, int, int]],
                 maps: Sequence[tuple[int, int, Maps]], outer: Sequence[Any]) -> None:
        """`given`, `pointers`, `maps`: of the kernel's arguments; `stream_at`: among the `outer` ones."""
        super().__init__(raw, given, 0, pointers, maps)
        self._outer = tuple(outer[:stream_at]), tuple(outer[stream_at + 1:])

    def arguments(self, stream: int, addresses: Sequence[int]) -> list[Any]:
        before, after = self._outer
        return [*before, stream, *after, self._fill(addresses)]


class Maps(dict[int, Any]):
    """An operand's address to the encoded TMA descriptor on it, all else being fixed. A race encodes one twice."""

    def __init__(self, encode: Callable[[Any], Any], descriptor: Any) -> None:
        self._encode, self._descriptor = encode, copy.copy(descriptor)
        self._dtype, self._offset = descriptor.base.dtype, descriptor.base.offset if isinstance(descriptor.base, Pointer) else 0
        self._descriptor.base = None

    def __missing__(self, address: int) -> Any:
        descriptor = copy.copy(self._descriptor)
        descriptor.base = types.SimpleNamespace(data_ptr=lambda: address + self._offset, dtype=self._dtype)
        if len(self) >= MAPS:
            self.clear()
        context.ensure()
        made = self[address] = self._encode(descriptor)
        return made


@lru_cache(maxsize=1)
def _driver() -> tuple[Callable[[], int], Callable[[int], int], Any]:
    """Current device, current stream of a device, Triton's hooks: as bare functions, where torch is built with them."""
    from triton import knobs
    from triton.runtime import driver

    return (getattr(torch._C, "_cuda_getDevice", None) or driver.active.get_current_device,
            getattr(torch._C, "_cuda_getCurrentRawStream", None) or driver.active.get_current_stream, knobs.runtime)
