"""From a call to its Plan: what was worked out for a signature is kept, so that a warm call checks and plans nothing.

A signature is everything that checks and the Plan depend on: shapes, strides, dtypes, devices, alignment, options and what the
environment says, but no address and no data. A call whose signature was seen before is therefore known to be valid.

There are two ways to what is known. `PlanCache.recall` compares all tensors at once, by torch's guards (`recall.py`).
`PlanCache.look_up` reads the signature in Python: for the first call of a kind, and for tensors off 16 bytes, of which guards know
nothing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ..formats import ScaledTensor
from ..kernels.operands import Memo
from ..problem import Plan
from ..runtime import env
from .common import refuse
from .recall import Calls, Signature

LIMIT = 4096        # signatures that one op keeps


class Known(NamedTuple):
    """What is known of a signature."""

    plan: Plan | None       # None: nothing to compute
    memo: Memo              # the launches that the Plan is bound to (`kernels.launching`), and what an op adds
    empty: Empty            # what an output is allocated with
    sync: bool = False      # whether every call reads its data back to check it


class Empty(NamedTuple):
    """How an output is allocated: by `torch.empty_strided`, which takes two thirds of the time of `torch.empty` with a tuple."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


def empty_of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Empty:
    """The `Empty` of a contiguous tensor."""
    return Empty(tuple(shape), torch.empty(shape, device="meta").stride(), dtype, device)


NOTHING = Empty((0,), (1,), torch.uint8, torch.device("cpu"))       # for ops that make their outputs themselves


def _all_of(x: Tensor, sx: Tensor, y: Tensor, sy: Tensor, out: Tensor | None, index: Tensor | None) -> tuple[Tensor, ...]:
    if out is None:
        return (x, sx, y, sy) if index is None else (x, sx, y, sy, index)
    return (x, sx, y, sy, out) if index is None else (x, sx, y, sy, out, index)


class PlanCache:
    """What is known of signatures, bounded, safe with several threads. Signatures hold devices, so one cache serves them all."""

    def __init__(self) -> None:
        self._known: OrderedDict[Signature, Known] = OrderedDict()
        self._calls: Calls[Known] = Calls()
        self._lock = threading.Lock()

    def find(self, key: Signature) -> Known | None:
        """What is known of a signature. None, too, where an argument can't be hashed: a new call's checks say which, and why."""
        try:
            return self._known.get(key)
        except TypeError:
            return None

    def recall(self, a: ScaledTensor, b: ScaledTensor, out: Tensor | None, index: Tensor | None,
               *rest: object) -> tuple[Known | None, tuple[int, ...]]:
        """(what is known of a call, its addresses in `identify`'s order), where all tensors start on 16 bytes, operands have
        scales, and `look_up` has seen a call of this signature. None otherwise: `look_up` has to tell."""
        try:
            x, y, sx, sy = a.data, b.data, a.scale, b.scale
            if sx is None or sy is None:
                return None, ()
            alike = self._calls.known.get((a.format, x.shape, b.format, y.shape, rest, out is None, index is None, env.choice()))
            if alike is None:
                return None, ()
            addresses = x.data_ptr(), sx.data_ptr(), y.data_ptr(), sy.data_ptr(), 0 if index is None else index.data_ptr()
            bits = addresses[0] | addresses[1] | addresses[2] | addresses[3] | addresses[4] | (0 if out is None else out.data_ptr())
            if bits & 15:
                return None, ()
            tensors = _all_of(x, sx, y, sy, out, index)
            for check, known in alike:
                if check(*tensors):
                    return known, addresses
            return None, ()
        except TypeError:       # as in `find`
            return None, ()
        except (AttributeError, RuntimeError) as error:
            refuse_product(error, a, b, out, index)

    def look_up(self, a: ScaledTensor, b: ScaledTensor, out: Tensor | None, index: Tensor | None, rest: tuple[object, ...],
                validate: str | None, make: Callable[[], tuple[Plan | None, Empty]]) -> tuple[Known, tuple[int, ...]]:
        """What `recall` gives, for a call that it does not know; it knows the next one of this signature.

        make: checks and plans the call, where its signature is new; also gives what an output is allocated with.
        """
        key, addresses = identify(a, b, out, index, *rest)
        known = self.find(key)
        if known is None:
            known = self.add(key, *make(), validate)
        self.remember(known, a, b, out, index, *rest)
        return known, addresses

    def remember(self, known: Known, a: ScaledTensor, b: ScaledTensor, out: Tensor | None, index: Tensor | None,
                 *rest: object) -> None:
        """Have `recall` know calls like this one; not where a tensor is off 16 bytes, which guards don't tell."""
        if a.scale is None or b.scale is None:
            return
        tensors = _all_of(a.data, a.scale, b.data, b.scale, out, index)
        if any(t.data_ptr() & 15 for t in tensors):
            return
        key = (a.format, a.data.shape, b.format, b.data.shape, rest, out is None, index is None, env.choice())
        self._calls.add(key, tensors, known)

    def add(self, key: Signature, plan: Plan | None, out: Empty, validate: str | None = None, memo: Memo | None = None) -> Known:
        """Keep what was worked out for a signature; what another thread has added meanwhile stays.

        key: holds `validate` and what the environment says of it, too. memo: what `Known.memo` begins with.
        """
        with self._lock:
            known = self._known.setdefault(key, Known(plan, {} if memo is None else memo, out, env.wants_sync(validate)))
            if len(self._known) > LIMIT:
                self._known.popitem(last=False)
        return known

    def get(self, key: Signature, make: Callable[[], Plan | None]) -> tuple[Plan | None, Memo]:
        """(Plan, bound launches) of a signature, for ops that make their outputs themselves. make: checks and plans a new call."""
        known = self.find(key)
        if known is None:
            known = self.add(key, make(), NOTHING)
        return known.plan, known.memo

    def newest(self) -> Known:
        """What is known of the signature that was new last."""
        return next(reversed(self._known.values()))


# ---------------------------------------------------------------- signatures
def signature_of(a: ScaledTensor, b: ScaledTensor, out: Tensor | None, *rest: object) -> Signature:
    """The signature of a product without an index; `rest`: its options."""
    return identify(a, b, out, None, *rest)[0]


def identify(a: ScaledTensor, b: ScaledTensor, out: Tensor | None, index: Tensor | None,
             *rest: object) -> tuple[Signature, tuple[int, ...]]:
    """(signature, addresses of a, its scales, b, its scales and the index; 0 where there is none).

    It is made in every call that is not recalled, so it is plain reads, with a device's number for the device, which costs a third.
    """
    try:
        x, y, sx, sy = a.data, b.data, a.scale, b.scale
        p, q = x.data_ptr(), y.data_ptr()
        key: Signature
        if sx is not None and sy is not None:
            ps, qs = sx.data_ptr(), sy.data_ptr()
            key = (a.format, x.shape, x.stride(), x.dtype, x.get_device(), sx.shape, sx.stride(), sx.dtype, sx.get_device(),
                   b.format, y.shape, y.stride(), y.dtype, y.get_device(), sy.shape, sy.stride(), sy.dtype, sy.get_device(),
                   rest, env.choice())
        else:
            ps, qs = 0 if sx is None else sx.data_ptr(), 0 if sy is None else sy.data_ptr()
            key = (a.format, b.format, _traits(x), _traits(y), _traits(sx), _traits(sy), rest, env.choice())
        bits = p | ps | q | qs
        if out is not None:
            bits |= out.data_ptr()
            key += (out.shape, out.stride(), out.dtype, out.get_device())
        pi = 0
        if index is not None:
            pi = index.data_ptr()
            bits |= pi
            key += (index.shape, index.dtype, index.get_device())
        if bits & 15:
            key += (p & 15, ps & 15, q & 15, qs & 15, 0 if out is None else out.data_ptr() & 15, pi & 15)
        if not p:       # a tensor without elements, or one without memory, whose calls are no others'
            key += (x.numel(),)
        if x.get_device() < 0:      # CPU and meta tensors both say -1
            key += tuple([t if t is None else t.device for t in (x, sx, y, sy, out, index)])
        return key, (p, ps, q, qs, pi)
    except (AttributeError, RuntimeError) as error:
        refuse_product(error, a, b, out, index)


def _traits(t: Tensor | None) -> tuple[object, ...] | None:
    return None if t is None else (t.shape, t.stride(), t.dtype, t.get_device())


def refuse_product(error: Exception, a: ScaledTensor, b: ScaledTensor, out: Tensor | None, index: Tensor | None) -> NoReturn:
    refuse(error, a=a.data, b=b.data, scale_of_a=a.scale, scale_of_b=b.scale, out=out, index=index)
