"""Shuffled weights: their order, and the plain copies that launchers compute with.

Kernels here read plain `[G, N, K]` weights, FlyDSL's callers bring shuffled ones, so the first launch with a weight
makes a plain copy and later launches find it. How that is never of another weight, or of an earlier state of this one:

* it belongs to the weight's storage, held weakly: views, flattened or as int8, find it; when the storage is freed a
  weak reference's callback drops the copy, and an entry counts only while its reference gives this very storage, so an
  address that is used again finds nothing. Within a storage the key is address and shape.
* it remembers torch's version counter, which every in-place torch operation on the weight or a view of it advances.
  Another number means another content: the copy is rewritten where it lies, so that captured graphs that read it keep
  a valid address.
* what has no version counter (tensors made under `torch.inference_mode`, dtype views made there among them) is copied
  at every launch, with a warning, unless `freeze_weight` was told that the weight stays.
* a weight first seen while a CUDA graph is captured is copied inside the graph, at every replay: launch once before.

The counter misses writes through `.data` or through inference tensors, by custom kernels and by collectives; and graphs
replay without looking at it. After those, call `refresh_weight`. Making or rewriting a copy waits for the device, so
that every stream may read it.
"""

from __future__ import annotations

import math
import threading
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import Unsupported, expect
from ..notice import warn_once

ROWS, COLUMNS, CHUNK = 16, 32, 16  # bytes; 16 rows x 16 columns lie together, two such side by side make a block
Shape = tuple[int, int, int]


def shuffle_weight(x: Tensor, layout: tuple[int, int] = (16, 16)) -> Tensor:
    """`x` `[..., N, K]` of one-byte elements in aiter's preshuffled order, same shape and dtype, a copy.

    The order is `[..., N/16, K/32, 2, 16 rows, 16 columns]`. N is a multiple of 16, K of 32: ValueError otherwise.
    Unsupported for other layouts and element sizes.
    """
    _check(x, layout)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _plain_blocks(_bytes(y)).copy_(_bytes(x.contiguous()).view(-1, ROWS, x.shape[-1] // COLUMNS, 2, CHUNK)
                                   .permute(0, 2, 3, 1, 4))
    return y


def unshuffle_weight(x: Tensor, layout: tuple[int, int] = (16, 16)) -> Tensor:
    """The inverse of `shuffle_weight`: plain `[..., N, K]` from shuffled, a copy."""
    _check(x, layout)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _unshuffle(x.contiguous(), y)
    return y


def refresh_weight(b: Tensor) -> None:
    """Bring the plain copies of shuffled weight `b` up to date with what it holds now, at their present addresses.

    For writes that torch's version counter does not see, and for captured graphs, which replay without a look at it.
    `b`: the weight, or any view that starts where it does. Without copies nothing happens.
    """
    with _lock:
        for (address, shape), copy in list(_register(b).copies.items()):
            if address == b.data_ptr():
                version = _version(b)
                whole = torch.empty(0, dtype=torch.uint8, device=b.device).set_(
                    b.untyped_storage(), b.storage_offset() * b.element_size(), (math.prod(shape),), (1,))
                _write(whole, copy.plain)
                copy.version = version


def freeze_weight(b: Tensor) -> None:
    """Promise that whoever writes shuffled weight `b` from here on calls `refresh_weight` after it.

    For tensors without a version counter, whose copies then stay too. It holds for all of `b`'s storage as long as that
    lives.
    """
    with _lock:
        _register(b).frozen = True


def plain_weight(b: Tensor, shape: Shape) -> Tensor:
    """The plain E4M3 `[G, N, K]` of shuffled `b`, contiguous one-byte elements, `shape` = (G, N, K)."""
    entry = _entry(b)
    version = _version(b)
    if version is None and (entry is None or not entry.frozen):
        warn_once("a weight made, or viewed as another dtype, under torch.inference_mode has no version counter, so it "
                  "is un-shuffled at every launch; make it outside, or call freeze_weight")
        return _fresh(b, shape)
    copy = None if entry is None else entry.copies.get((b.data_ptr(), shape))
    if copy is None or not copy.shows(version):
        return _take(b, shape)
    if b.is_cuda and torch.cuda.current_stream(b.device) != copy.stream:
        copy.plain.record_stream(torch.cuda.current_stream(b.device))
    return copy.plain


@dataclass(slots=True)
class _Copy:
    plain: Tensor
    version: int | None          # None: written from a tensor without a counter
    stream: torch.Stream | None  # the one that the copy was allocated on

    def shows(self, version: int | None) -> bool:
        """Whether it holds that state of the weight; a frozen weight without a counter has but one."""
        return version is None or version == self.version


@dataclass(slots=True)
class _Storage:
    alive: weakref.ref[torch.UntypedStorage]
    copies: dict[tuple[int, Shape], _Copy] = field(default_factory=dict)
    frozen: bool = False


_storages: dict[int, _Storage] = {}
_lock = threading.Lock()


def _version(b: Tensor) -> int | None:
    return None if b.is_inference() else b._version


def _entry(b: Tensor) -> _Storage | None:
    """What is known of the storage that `b` lies in; of that storage, not of one that was at its address before."""
    storage = b.untyped_storage()
    entry = _storages.get(storage._cdata)
    return entry if entry is not None and entry.alive() is storage else None


def _take(b: Tensor, shape: Shape) -> Tensor:
    """Make, or rewrite, the copy that stays."""
    if b.is_cuda and torch.cuda.is_current_stream_capturing():
        warn_once("a weight that was not launched with before, or was changed since, is un-shuffled inside the "
                  "captured graph, at every replay; launch once before capturing")
        return _fresh(b, shape)
    with _lock:
        copies, key = _register(b).copies, (b.data_ptr(), shape)
        copy, version = copies.get(key), _version(b)
        if copy is not None and copy.shows(version):  # another thread was faster
            return copy.plain
        if copy is not None:
            _write(b, copy.plain)
            copy.version = version
            return copy.plain
        stream = torch.cuda.current_stream(b.device) if b.is_cuda else None
        copy = _Copy(_empty(b, shape), version, stream)
        _write(b, copy.plain)
        copies[key] = copy
        return copy.plain


def _register(b: Tensor) -> _Storage:
    """The same, from now on if it was not known."""
    storage, entry = b.untyped_storage(), _entry(b)
    address = storage._cdata
    if entry is None:
        def gone(ref: weakref.ref[torch.UntypedStorage]) -> None:  # takes no lock: it may run wherever the last reference goes
            if (now := _storages.get(address)) is not None and now.alive is ref:
                _storages.pop(address, None)

        entry = _storages[address] = _Storage(weakref.ref(storage, gone))
    return entry


def _fresh(b: Tensor, shape: Shape) -> Tensor:
    plain = _empty(b, shape)
    with torch.no_grad():
        _unshuffle(b, plain)
    return plain


def _empty(b: Tensor, shape: Shape) -> Tensor:
    with torch.inference_mode(False):  # else the copy could not be rewritten outside
        return torch.empty(shape, dtype=torch.float8_e4m3fn, device=b.device)


def _write(b: Tensor, plain: Tensor) -> None:
    """Un-shuffle into a copy that stays, and wait, so that no stream can read it too early."""
    with torch.inference_mode(False), torch.no_grad():
        _unshuffle(b, plain)
    if b.is_cuda:
        torch.cuda.current_stream(b.device).synchronize()


def _unshuffle(b: Tensor, plain: Tensor) -> None:
    size = plain.numel()
    rows = _bytes(plain).view(-1, ROWS, plain.shape[-1] // COLUMNS, 2, CHUNK)
    rows.copy_(_plain_blocks(_bytes(b).view(-1)[:size].view(plain.shape)).permute(0, 3, 1, 2, 4))


def _plain_blocks(x: Tensor) -> Tensor:
    """A shuffled weight's bytes as `[G*N/16, K/32, 2, 16 rows, 16 columns]`, a view."""
    return x.view(-1, x.shape[-1] // COLUMNS, 2, ROWS, CHUNK)


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


def _check(x: Tensor, layout: tuple[int, int]) -> None:
    if tuple(layout) != (16, 16) or x.element_size() != 1:
        raise Unsupported(f"shuffle layout {tuple(layout)} of {x.dtype}", "layout=(16, 16) of one-byte elements")
    expect(x.dim() >= 2 and x.shape[-2] % ROWS == 0 and x.shape[-1] % COLUMNS == 0, "weight to shuffle, shape",
           tuple(x.shape), f"[..., N, K], N a multiple of {ROWS}, K of {COLUMNS}")
