"""Packed copies of weights that callers bring as they are, in every call: made once, kept as long as the weights live.

An entry is of storages, held weakly, with addresses, shapes and torch's version counters: other weights at the same address, or
the same ones after an in-place write, are packed anew (into the same memory where it fits, so that captured graphs stay valid).
What the counter does not see, writes through `.data` and by custom kernels, is not seen here: pack with `narrowgemm.prepack` and
pass the `PackedWeight`, where that happens.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import Unsupported
from ..prepack import PackedWeight
from .notice import warn_once


@dataclass(slots=True)
class _Entry:
    alive: tuple[weakref.ref[torch.UntypedStorage], ...]
    versions: tuple[int, ...]
    packed: PackedWeight


_entries: dict[tuple[Any, ...], _Entry] = {}
_lock = threading.Lock()


def packed_copy(tensors: tuple[Tensor, ...], what: str, make: Callable[[], PackedWeight]) -> PackedWeight:
    """The PackedWeight that `make` gives for `tensors`, from an earlier call where they are the same. `what`: how it is made.

    Raises what `make` raises, and Unsupported where a CUDA graph is being captured and there is no copy yet.
    """
    storages = tuple(t.untyped_storage() for t in tensors)
    key = (what, *((s._cdata, t.data_ptr(), t.shape, t.stride(), t.dtype) for s, t in zip(storages, tensors)))
    counted = not any(t.is_inference() for t in tensors)
    versions = tuple(t._version for t in tensors) if counted else ()
    entry = _entries.get(key)
    known = entry is not None and all(ref() is s for ref, s in zip(entry.alive, storages))
    if entry is not None and known and counted and entry.versions == versions:
        return entry.packed
    device = tensors[0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise Unsupported("weights that were not packed before a CUDA graph is captured", "call once before capturing, or prepack")
    if not counted:
        warn_once("a weight made, or viewed as another dtype, under torch.inference_mode has no version counter, so it is packed "
                  "in every call; make it outside, or pass what narrowgemm.prepack gives")
        return make()
    with _lock, torch.inference_mode(False), torch.no_grad():
        made = make()
        if entry is not None and known:
            made = _rewritten(entry.packed, made)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()     # any stream may read it from here on

        def gone(ref: weakref.ref[torch.UntypedStorage]) -> None:     # takes no lock: it may run wherever the last reference goes
            if (now := _entries.get(key)) is not None and ref in now.alive:
                _entries.pop(key, None)

        _entries[key] = _Entry(tuple(weakref.ref(s, gone) for s in storages), versions, made)
    return made


def _rewritten(old: PackedWeight, new: PackedWeight) -> PackedWeight:
    """`new` in `old`'s memory, where it has the same tensors."""
    a, b = old.tensors(), new.tensors()
    if {n: (t.shape, t.dtype) for n, t in a.items()} != {n: (t.shape, t.dtype) for n, t in b.items()}:
        return new
    for name, t in a.items():
        t.copy_(b[name])
    return old
