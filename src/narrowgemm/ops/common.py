"""What the GEMM ops share: operand checks, the Problem's operands, and the cache from a call's signature to its Plan.

Checks depend on nothing but shapes, strides, dtypes, devices, alignment and options, all of which are in the signature:
a call whose signature was seen before is known to be valid, and goes straight to its Plan.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ..arch import detect
from ..errors import expect
from ..formats import PLAIN, Format, ScaledTensor, dtype_name
from ..problem import Config, Operand, Plan, Problem, bucket, promotion
from ..runtime import dispatch, env
from .overlap import share_memory, stored_twice
from .recall import Calls

OUT_DTYPES = tuple(PLAIN)
_LIMIT = 4096


@dataclass(frozen=True, slots=True)
class Options:
    """What a caller may say about how, not what. See `gemm` for each."""

    backend: str | None = None
    config: Config | None = None
    max_sms: int = 0
    validate: str | None = None
    on_unsupported: str = "portable"
    fast_accum: bool = False

    def check(self) -> None:
        check_flags(fast_accum=self.fast_accum)
        dispatch.check_choice(self.backend, self.config)
        expect(isinstance(self.max_sms, int) and self.max_sms >= 0, "max_sms", self.max_sms, "0 (all) or a positive count")
        expect(self.validate in (None, "sync"), "validate", repr(self.validate), "None or 'sync'")


def as_operand(x: ScaledTensor | Tensor, name: str) -> ScaledTensor:
    """`x` as a ScaledTensor; BF16, FP16 and FP32 tensors come without scales. TypeError for anything else."""
    if isinstance(x, ScaledTensor):
        return x
    hint = "a ScaledTensor (ScaledTensor.make(data, scale, format) or narrowgemm.quantize), or a BF16 / FP16 / FP32 tensor"
    expect(isinstance(x, Tensor), name, type(x).__name__, hint, error=TypeError)
    expect(x.dtype in PLAIN, f"{name}, dtype", x.dtype, hint, error=TypeError)
    return ScaledTensor(x, None, PLAIN[x.dtype])


def signature(a: ScaledTensor, b: ScaledTensor, out: Tensor | None, *rest: object) -> tuple:
    """Everything that checks and the Plan depend on."""
    return identify(a, b, out, None, *rest)[0]


def check_kinds(**tensors: object) -> None:
    """TypeError for what is given for a tensor and is none with memory of its own; None is nothing."""
    for name, x in tensors.items():
        expect(x is None or isinstance(x, Tensor), name.replace("_", " "), type(x).__name__, "a torch.Tensor", error=TypeError)
        expect(x is None or x.layout == torch.strided, f"{name.replace('_', ' ')}, layout", getattr(x, "layout", None),     # type: ignore[attr-defined]
               "a dense strided tensor", error=TypeError)


def refuse(error: Exception, **tensors: object) -> NoReturn:
    """Say what `error`, met while shapes and addresses were read, comes from."""
    check_kinds(**tensors)
    if isinstance(error, RuntimeError):
        raise TypeError(f"tensors: got one without memory of its own ({str(error).partition(chr(10))[0]}), expected dense tensors: "
                        "nested ones, and those inside torch.func's vmap and grad, are not taken") from error
    raise error


def refuse_product(error: Exception, a: ScaledTensor, b: ScaledTensor, out: Tensor | None, index: Tensor | None) -> NoReturn:
    refuse(error, a=a.data, b=b.data, scale_of_a=a.scale, scale_of_b=b.scale, out=out, index=index)


def identify(a: ScaledTensor, b: ScaledTensor, out: Tensor | None, index: Tensor | None,
             *rest: object) -> tuple[tuple, tuple[int, ...]]:
    """(everything that checks and the Plan depend on, addresses of a, its scales, b, its scales and the index).

    It is made in every call, so it is plain reads, no objects of our own; a device is its number, which costs a third.
    """
    try:
        x, y, sx, sy = a.data, b.data, a.scale, b.scale
        p, q = x.data_ptr(), y.data_ptr()
        key: tuple
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


def _traits(t: Tensor | None) -> tuple | None:
    return None if t is None else (t.shape, t.stride(), t.dtype, t.get_device())


def check_traced(config: Config | None, out: Tensor | None, accumulate: bool) -> None:
    """What a call can't have under torch.compile; the rest is checked when the compiled graph runs."""
    expect(config is None, "config under torch.compile", "a Config", "None: a tuned table decides there")
    expect(out is not None or not accumulate, "out with accumulate=True", None, "the tensor to add to")


def wants_sync(validate: str | None) -> bool:
    return validate == "sync" or env.get("NARROWGEMM_VALIDATE") == "sync"


class Known(NamedTuple):
    """What is known of a signature: its Plan (None: nothing to compute), the launches that the Plan is bound to
    (`kernels.launching`), what an output is allocated with, and whether calls read their data back to check it."""

    plan: Plan | None
    memo: dict
    empty: Empty
    sync: bool = False


class Empty(NamedTuple):
    """Arguments of `torch.empty_strided`, which takes two thirds of the time of `torch.empty` with a tuple."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Empty:
    """Of a contiguous tensor."""
    return Empty(tuple(shape), torch.empty(shape, device="meta").stride(), dtype, device)


NOTHING = Empty((0,), (1,), torch.uint8, torch.device("cpu"))


def _all_of(x: Tensor, sx: Tensor, y: Tensor, sy: Tensor, out: Tensor | None, index: Tensor | None) -> tuple[Tensor, ...]:
    if out is None:
        return (x, sx, y, sy) if index is None else (x, sx, y, sy, index)
    return (x, sx, y, sy, out) if index is None else (x, sx, y, sy, out, index)


class PlanCache:
    """What is known of signatures, bounded, safe with several threads. Signatures hold devices, so one cache serves them all."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple, Known] = OrderedDict()
        self._calls: Calls[Known] = Calls()
        self._lock = threading.Lock()

    def find(self, key: tuple) -> Known | None:
        """None where an argument can't be hashed, too: the checks of a call that is new say which, and why."""
        try:
            return self._known.get(key)
        except TypeError:
            return None

    def recall(self, a: ScaledTensor, b: ScaledTensor, out: Tensor | None, index: Tensor | None,
               *rest: object) -> tuple[Known | None, tuple[int, ...]]:
        """(what is known of a call, addresses as of `identify`), for scaled operands whose tensors start on 16 bytes and have
        the signature of a call that `remember` was told of. None: `identify` has to read it."""
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

    def remember(self, known: Known, a: ScaledTensor, b: ScaledTensor, out: Tensor | None, index: Tensor | None,
                 *rest: object) -> None:
        """For `recall`, what is known of a call with these arguments; nothing where a tensor is off 16 bytes: guards don't tell."""
        if a.scale is None or b.scale is None:
            return
        tensors = _all_of(a.data, a.scale, b.data, b.scale, out, index)
        if any(t.data_ptr() & 15 for t in tensors):
            return
        key = (a.format, a.data.shape, b.format, b.data.shape, rest, out is None, index is None, env.choice())
        self._calls.add(key, tensors, known)

    def add(self, key: tuple, plan: Plan | None, out: Empty, validate: str | None = None, memo: dict | None = None) -> Known:
        """`validate` and what the environment says of it are in the key. `memo`: what it begins with; another thread may find what
        was added at once."""
        with self._lock:
            known = self._known.setdefault(key, Known(plan, {} if memo is None else memo, out, wants_sync(validate)))
            if len(self._known) > _LIMIT:
                self._known.popitem(last=False)
        return known

    def get(self, key: tuple, make: Callable[[], Plan | None]) -> tuple[Plan | None, dict]:
        """(Plan, bound launches), for an op that makes its outputs itself; `make` checks a call that is the first of its kind, and
        plans it."""
        known = self.find(key)
        if known is None:
            known = self.add(key, make(), NOTHING)
        return known.plan, known.memo

    def newest(self) -> Known:
        """Of the signature that was seen for the first time last."""
        return next(reversed(self._known.values()))


def check_operand(x: ScaledTensor, name: str, shape: str, dims: int, groups: int = 0) -> None:
    """Payload and scale agree with the format and with each other, in dtype, shape, device and strides. `groups`: scales that don't
    run along K may be there once for each of so many groups."""
    expect(isinstance(x.format, Format), f"{name}.format", type(x.format).__name__, "a Format", error=TypeError)
    fmt = x.format
    expect(x.data.dtype == fmt.elem.dtype, f"{name} ({fmt.name}), dtype", x.data.dtype, str(fmt.elem.dtype), error=TypeError)
    expect(x.data.dim() == dims, f"{name}, shape", tuple(x.shape), f"{dims} dimensions, {shape}")
    expect(x.data.layout == torch.strided, f"{name}, layout", x.data.layout, "a dense strided tensor", error=TypeError)
    if not fmt.scaled:
        expect(x.scale is None, f"{name}: scale of unscaled format {fmt.name}", "a tensor", "None")
        return
    want = fmt.scale_shape(x.shape)
    expect(x.scale is not None, f"{name} ({fmt.name}): scale", None, f"a tensor of shape {want}")
    assert x.scale is not None
    expect(x.scale.dtype in (torch.float32, torch.uint8), f"{name} ({fmt.name}): scale dtype", x.scale.dtype,
           "float32, or uint8 with E8M0 codes: ScaledTensor.make converts", error=TypeError)
    expect(x.scale.dtype == torch.float32 or fmt.scale == "e8m0", f"{name} ({fmt.name}): scale dtype", x.scale.dtype,
           "float32", error=TypeError)
    each = groups > 0 and fmt.group[1] == 0 and tuple(x.scale.shape) == (groups, *want)
    expect(each or tuple(x.scale.shape) == want, f"{name} ({fmt.name}) of shape {tuple(x.shape)}: scale shape",
           tuple(x.scale.shape), f"{want}: ScaledTensor.make takes other layouts")
    expect(x.scale.device == x.data.device, f"{name}: scale device", x.scale.device, f"the payload's, {x.data.device}")


def check_pair(a: ScaledTensor, b: ScaledTensor, a_shape: str, b_shape: str, a_dims: int, b_dims: int, groups: int = 0) -> None:
    check_operand(a, "a", a_shape, a_dims, groups)
    check_operand(b, "b", b_shape, b_dims, groups)
    expect(a.device == b.device, "b, device", b.device, f"a's, {a.device}")
    expect(a.shape[-1] == b.shape[-1], "K of b", f"{b.shape[-1]} (b is {tuple(b.shape)})",
           f"a's, {a.shape[-1]} (a is {tuple(a.shape)}): a is {a_shape}, b is {b_shape}")


def check_row_scales(a: ScaledTensor) -> None:
    """Rows of one scale block may belong to several groups."""
    expect(a.format.group[0] in (0, 1), f"a's scale block {a.format.group}, rows", a.format.group[0],
           "1 or whole tensor: rows of one block may belong to several groups")


def check_flags(**flags: object) -> None:
    """TypeError for what is neither True nor False: 'no' would count as True."""
    for name, given in flags.items():
        expect(isinstance(given, bool), name, repr(given), "True or False", error=TypeError)


def check_out(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, accumulate: bool,
              *reads: ScaledTensor | Tensor) -> None:
    """`reads`: what is read while `out` is written."""
    if out is None:
        expect(dtype in OUT_DTYPES, "out_dtype", dtype, f"one of {OUT_DTYPES}", error=TypeError)
        expect(not accumulate, "out with accumulate=True", None, "the tensor to add to")
        return
    expect(out.dtype in OUT_DTYPES, "out, dtype", out.dtype, f"one of {OUT_DTYPES}", error=TypeError)
    expect(out.dtype == dtype, "out, dtype", out.dtype, f"out_dtype, {dtype}", error=TypeError)
    expect(tuple(out.shape) == shape, "out, shape", tuple(out.shape), str(shape))
    expect(out.device == device, "out, device", out.device, f"the operands', {device}")
    expect(out.stride(-1) == 1 or out.shape[-1] <= 1, "out, strides", out.stride(), "contiguous rows (last stride 1)")
    expect(out.numel() == 0 or not stored_twice(out), "out, strides", out.stride(), "no row stored twice")
    if out.device.type == "meta":
        return
    for x in (t for r in reads for t in ((r.data, r.scale) if isinstance(r, ScaledTensor) else (r,)) if t is not None):
        expect(x.device != out.device or not share_memory(out, x), "out", f"memory of an operand, {tuple(x.shape)}",
               "memory of its own: operands are read while it is written")


def off_16_bytes(x: Tensor) -> int:
    """Bytes that it starts off 16; -1 for a tensor without memory: what is known of others is not known of it."""
    try:
        at = x.data_ptr()
    except (AttributeError, RuntimeError) as error:
        refuse(error, tensor=x)
    return at & 15 if at else -1


def on_16_bytes(x: Tensor) -> bool:
    """Whether its first element and every row start at multiples of 16 bytes."""
    size = x.element_size()
    s = sorted(x.stride())
    return x.data_ptr() % 16 == 0 and all(v * size % 16 == 0 for v in s[1:])


def _scale_major(x: ScaledTensor) -> str:
    if x.scale is None:
        return ""
    s = x.scale
    if s.stride(-2) == 1 and s.data_ptr() % 16 == 0 and all(v * s.element_size() % 16 == 0 for v in s.stride()[:-2]) \
            and s.stride(-1) * s.element_size() % 16 == 0:
        return "mn"
    return "k" if s.stride(-1) == 1 else "strided"


def operand(x: ScaledTensor, prepack: str = "") -> Operand:
    scale = "" if x.scale is None else "e8m0" if x.scale.dtype == torch.uint8 else "fp32"
    return Operand(x.format, x.major, prepack, scale, _scale_major(x), on_16_bytes(x.data))


def is_wide(*tensors: Tensor | None) -> bool:
    """An offset inside a tile of 256 rows or a K block of 128 can pass 2^31 elements."""
    return any(256 * max(t.stride()[-2:], default=0) >= 2**31 for t in tensors if t is not None)


def plan(op: str, layout: str, a: ScaledTensor, b: ScaledTensor, out: Tensor, m: int, groups: int, rows: int,
         accumulate: bool, zero_padding: bool, options: Options, alignment: int = 1) -> Plan:
    """Name the Problem and select its Plan."""
    n, k = b.shape[-2], a.shape[-1]
    expect(not options.fast_accum or promotion(a.format, b.format, True) == 0, f"fast_accum of {a.format.name} x {b.format.name}",
           True, "False: sums are scaled, and so promoted, every block of K")
    problem = Problem(
        op, layout, bucket(m), n, k, groups, operand(a), operand(b), rows=bucket(max(rows, 1)),
        out_dtype=dtype_name(out.dtype), out_aligned=on_16_bytes(out), accumulate=accumulate, zero_padding=zero_padding,
        promote=promotion(a.format, b.format, options.fast_accum), max_sms=options.max_sms, wide=is_wide(a.data, b.data, out),
        alignment=alignment)
    return dispatch.select(problem, detect(a.device), options.backend, options.config, options.on_unsupported)


def out_dtype_of(out: Tensor | None, dtype: torch.dtype | None, default: torch.dtype) -> torch.dtype:
    if out is not None and not isinstance(out, Tensor):
        expect(False, "out", type(out).__name__, "a torch.Tensor", error=TypeError)
    return dtype if dtype is not None else default if out is None else out.dtype
