"""Launching a kernel with TMA descriptors at the driver's own cost: descriptors and compiled handles are cached.

A plain launch rebuilds every descriptor (about 50 us) and derives anew what the kernel was specialised for (15 us).
Here a descriptor is cached under all that is encoded in it, base address included, so a freed and reallocated tensor
gets either its own descriptor or one that is equal to it. A compiled handle is cached under all that Triton
specialises for: dtypes, 16-byte alignment of pointers, and the integer arguments.

Where the caller knows that a call has the signature of an earlier one, `bind` leaves nothing but addresses to be put in.

The cached path builds the argument list of the launcher that Triton 3.6 generates. Where that is not there (newer
Triton), or a profiler has installed launch hooks, the ordinary launch runs instead.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

LIMIT = 4096


class Cache:
    """Bounded, oldest out, safe with several threads: a race builds an entry twice and keeps one."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._entries: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._limit = limit

    def find(self, key: Hashable) -> Any:
        return self._entries.get(key)

    def put(self, key: Hashable, value: Any) -> Any:
        with self._lock:
            value = self._entries.setdefault(key, value)
            while len(self._entries) > self._limit:
                self._entries.popitem(last=False)
        return value

    def replace(self, key: Hashable, value: Any) -> None:
        with self._lock:
            self._entries.pop(key, None)
        self.put(key, value)


class Box(NamedTuple):
    """A TMA descriptor to be: the first element's address, shape and strides in elements, and the box that it moves."""

    tensor: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


class Pointer:
    """A device address with a dtype: what Triton takes for a tensor argument, without the cost of a view."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


class Handle(NamedTuple):
    """A compiled kernel, ready. `raw` takes (grid, stream, function, ..., arguments); None: launch the ordinary way."""

    raw: Callable[..., None] | None
    head: tuple[Any, ...]
    meta: tuple[dict[str, Any], ...]


def current_device() -> int:
    return _current()[0]()


def current_stream(index: int) -> int:
    return _current()[1](index)


@lru_cache(maxsize=1)
def _current() -> tuple[Callable[[], int], Callable[[int], int]]:
    """The bare functions behind torch.cuda.current_device and current_stream, where torch is built with them."""
    from triton.runtime import driver

    device = getattr(torch._C, "_cuda_getDevice", None) or driver.active.get_current_device
    return device, getattr(torch._C, "_cuda_getCurrentRawStream", None) or driver.active.get_current_stream


@lru_cache(maxsize=1)
def _runtime() -> Any:
    from triton import knobs

    return knobs.runtime


def hooked() -> bool:
    """Whether a profiler wants to see launches."""
    runtime = _runtime()
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return (enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True))


_ORDINARY = Handle(None, (), ())
_descriptors = Cache()


class Launcher:
    """`kernel[(grid,)](*descriptors, *pointers, *ints, *constants, **options)`: the parameters are in that order.

    `layouts()` gives the shared-memory layout of each descriptor's box; it is called only where nothing is cached.
    """

    def __init__(self, kernel: Any, constants: Sequence[Hashable], options: dict[str, Any],
                 layouts: Callable[[], Sequence[Any]] = tuple) -> None:
        self.kernel, self.constants, self.options, self.layouts = kernel, tuple(constants), options, layouts
        self._handles = Cache()

    def arguments(self, boxes: Sequence[Box], pointers: Sequence[int], dtypes: Sequence[torch.dtype],
                  ints: Sequence[int]) -> list[Any]:
        """The arguments as Triton's own launch and `warmup` take them."""
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        descs = [TensorDescriptor(b.tensor, list(b.shape), list(b.strides), list(b.box), lay)
                 for b, lay in zip(boxes, self.layouts())]
        return [*descs, *map(Pointer, pointers, dtypes), *ints, *self.constants]

    def warm(self, boxes: Sequence[Box], pointers: Sequence[int], dtypes: Sequence[torch.dtype],
             ints: Sequence[int]) -> Any:
        """Compile what such a launch runs, without a launch: tensors may be on 'meta'."""
        return self.kernel.warmup(*self.arguments(boxes, pointers, dtypes, ints), grid=(1,), **self.options)

    def __call__(self, index: int, grid: int, boxes: Sequence[Box], pointers: tuple[int, ...],
                 dtypes: tuple[torch.dtype, ...], ints: tuple[int, ...]) -> None:
        """Launch on the current stream of CUDA device `index`."""
        if current_device() != index:
            with torch.cuda.device(index):
                self(index, grid, boxes, pointers, dtypes, ints)
                return
        key = _key(index, pointers, dtypes, ints)
        handle = self._handles.find(key)
        if handle is None:
            # this launch compiles, or loads the compiled kernel
            compiled = self.kernel[(grid,)](*self.arguments(boxes, pointers, dtypes, ints), **self.options)
            self._handles.put(key, _handle(compiled))
            return
        if handle.raw is None or hooked():
            self.kernel[(grid,)](*self.arguments(boxes, pointers, dtypes, ints), **self.options)
            return
        maps = _maps(index, boxes, handle.meta)
        handle.raw(grid, 1, 1, current_stream(index), *handle.head, *maps, *pointers, *ints, *self.constants)

    def bind(self, index: int, grid: int, boxes: Sequence[Box], pointers: tuple[int, ...],
             dtypes: tuple[torch.dtype, ...], ints: tuple[int, ...]) -> Bound | None:
        """What a launch like this one, which has been made, comes to: None where it goes the ordinary way, or where a
        pointer is off 16 bytes (the next call's may be on them, and would want another kernel)."""
        handle = self._handles.find(_key(index, pointers, dtypes, ints))
        if handle is None or handle.raw is None or any(p % 16 for p in pointers):
            return None
        return Bound(handle, index, grid, boxes, (*ints, *self.constants))


class Bound:
    """A launch with everything fixed but the addresses: `bound(stream, bound.maps(tensors, addresses), *pointers)`.

    Pointers are on 16 bytes, and tensors have the dtypes, shapes and strides that it was bound with: neither is checked.
    """

    __slots__ = ("_boxes", "_found", "_grid", "_handle", "_head", "_index", "_raw", "_tail")

    def __init__(self, handle: Handle, index: int, grid: int, boxes: Sequence[Box], tail: tuple[Any, ...]) -> None:
        assert handle.raw is not None
        self._handle, self._raw, self._head = handle, handle.raw, handle.head
        self._index, self._grid, self._tail = index, grid, tail
        self._boxes = [box[1:] for box in boxes]
        self._found = Cache(256)

    def maps(self, tensors: Sequence[Tensor], addresses: Hashable) -> tuple[Any, ...]:
        """The descriptors' arguments. `addresses`: of all different tensors among `tensors`, one a box."""
        found = self._found.find(addresses)
        if found is None:
            boxes = [Box(t, *b) for t, b in zip(tensors, self._boxes)]
            found = self._found.put(addresses, tuple(_maps(self._index, boxes, self._handle.meta)))
        return found

    def __call__(self, stream: int, maps: tuple[Any, ...], *pointers: int) -> None:
        self._raw(self._grid, 1, 1, stream, *self._head, *maps, *pointers, *self._tail)


def _key(index: int, pointers: tuple[int, ...], dtypes: tuple[torch.dtype, ...], ints: tuple[int, ...]) -> tuple[Any, ...]:
    odd = 0
    for p in pointers:
        odd |= p
    return index, ints, dtypes, tuple(p % 16 for p in pointers) if odd % 16 else ()


def _maps(index: int, boxes: Sequence[Box], metas: Sequence[dict[str, Any]]) -> list[Any]:
    """Each box's descriptor, shape and strides, in the order of the generated launcher's arguments."""
    maps: list[Any] = []
    for box, meta in zip(boxes, metas):
        tag = (index, box.tensor.data_ptr(), box.tensor.dtype, meta["swizzle"], *box[1:])
        found = _descriptors.find(tag)
        if found is None:
            found = _descriptors.put(tag, _descriptor(box, meta))
        maps += (found, *box.shape, *box.strides)
    return maps


def _handle(kernel: Any) -> Handle:
    """The generated launcher behind a compiled kernel, past the wrapper that rebuilds descriptors."""
    run = kernel.run
    names = ("launch", "launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")
    if not all(hasattr(run, n) for n in names) or run.global_scratch_size or run.profile_scratch_size:
        return _ORDINARY
    launch = run.launch
    if inspect.isfunction(launch):
        launch = inspect.getclosurevars(launch).nonlocals.get("launcher")
    meta = tuple(getattr(kernel.metadata, "tensordesc_meta", None) or ())
    if launch is None or any(m is None for m in meta):
        return _ORDINARY
    # function, flags, two scratch buffers, metadata, launch metadata, two hooks
    head = (kernel.function, run.launch_cooperative_grid, run.launch_pdl, None, None, kernel.packed_metadata)
    return Handle(launch, (*head, None, None, None), meta)


def _descriptor(box: Box, meta: dict[str, Any]) -> Any:
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
    from triton.runtime import driver

    return driver.active.utils.fill_tma_descriptor(
        box.tensor.data_ptr(), meta["swizzle"], meta["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]],
        meta["block_size"], list(box.shape), list(box.strides), 0)
