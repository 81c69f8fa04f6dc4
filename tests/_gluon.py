"""Runs Gluon device code for Hopper on the CPU: Triton's interpreter can't.

The device modules are imported once more, against stand-ins for Triton's modules, as plain Python. Every partition of a
block is a thread; tensors are NumPy arrays of the whole partition, layouts mean nothing. What goes wrong on a GPU in ways
that are hard to see goes wrong here in ways that aren't:

- a TMA load fills its box with NaN at once and brings the data later, from another thread; it counts its bytes;
- a wgmma reads shared memory only when it is waited for, so a slot released too early is read overwritten;
- a TMA store reads its buffer later, so a buffer reused too early is stored wrong;
- every load and store is checked against the tensor's bounds; a wait that never ends is an error.
"""

from __future__ import annotations

import importlib
import random
import sys
import threading
import types
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

import narrowgemm.kernels.gluon.sm90 as sm90

TIMEOUT = 60.0
COLUMNS_FIRST = object()    # a layout of shared memory: the only one that places anything
_local = threading.local()


class EmulationError(AssertionError):
    pass


# ---------------------------------------------------------------- values
class DType:
    def __init__(self, name: str, np_dtype: Any, size: int) -> None:
        self.name, self.np, self.size = name, np.dtype(np_dtype), size
        self.primitive_bitwidth = 8 * size

    def __repr__(self) -> str:
        return self.name


# FP8 and 16-bit floats are kept as float32, already rounded where it matters
float8e4nv, bfloat16 = DType("float8e4nv", np.float32, 1), DType("bfloat16", np.float32, 2)
float16, float32 = DType("float16", np.float16, 2), DType("float32", np.float32, 4)
int32, int64 = DType("int32", np.int32, 4), DType("int64", np.int64, 8)
uint8, int1 = DType("uint8", np.uint8, 1), DType("int1", np.bool_, 1)
int8 = DType("int8", np.int8, 1)
_OF_NP = {t.np: t for t in (float16, float32, int32, int64, uint8, int1)}


def round_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    out = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isnan(x), np.float32(np.nan), out)


class Tensor:
    def __init__(self, a: Any, dtype: DType | None = None) -> None:
        self.a = np.asarray(a)
        self.dtype = dtype or _OF_NP[self.a.dtype]

    @property
    def shape(self) -> list[int]:
        return list(self.a.shape)

    def to(self, dtype: DType, bitcast: bool = False) -> Tensor:
        if bitcast:
            return Tensor(np.ascontiguousarray(self.a).view(dtype.np), dtype)
        a = self.a.astype(dtype.np)
        return Tensor(round_bf16(a) if dtype is bfloat16 else a, dtype)

    def permute(self, order: tuple[int, ...]) -> Tensor:
        return Tensor(self.a.transpose(order), self.dtype)

    def __bool__(self) -> bool:
        assert self.a.ndim == 0, "a condition must be a scalar"
        return bool(self.a)

    def __index__(self) -> int:
        return int(self.a)


def raw(x: Any) -> Any:
    return x.a if isinstance(x, Tensor) else x


def wrap(a: Any) -> Tensor:
    a = np.asarray(a)
    if a.dtype == np.float64:
        a = a.astype(np.float32)
    if a.dtype not in _OF_NP:
        a = a.astype(np.int32)
    return Tensor(a)


def binary(name: str):
    def op(x: Tensor, y: Any) -> Any:
        if isinstance(y, Pointer):
            return getattr(y, name)(x)
        a, b = x.a, raw(y)
        if name in ("__floordiv__", "__mod__", "__rfloordiv__"):    # truncating, as on the device
            n, d = (b, a) if name.startswith("__r") else (a, b)
            q = np.where((np.asarray(n) < 0) != (np.asarray(d) < 0), -(abs(n) // abs(d)), n // d)
            return wrap(np.asarray(n - q * d if name == "__mod__" else q).astype(np.asarray(a).dtype))
        if not isinstance(y, Tensor) and not isinstance(b, bool):
            b = np.asarray(b, a.dtype if a.dtype != np.bool_ else np.int32)
        return wrap(getattr(np.asarray(a), name)(b))

    return op


for _name in ("add", "sub", "mul", "floordiv", "mod", "lt", "le", "gt", "ge", "eq", "ne", "and", "or", "xor", "lshift", "rshift",
              "radd", "rmul", "rsub", "rand", "ror"):
    setattr(Tensor, f"__{_name}__", binary(f"__{_name}__"))
Tensor.__neg__ = lambda self: wrap(-self.a)         # type: ignore[attr-defined]
Tensor.__invert__ = lambda self: wrap(~self.a)      # type: ignore[attr-defined]


class Pointer:
    """Into a flat array; every access is checked."""

    def __init__(self, memory: np.ndarray, offset: Any = 0, dtype: DType | None = None) -> None:
        self.memory, self.offset = memory, np.asarray(offset, np.int64)
        self.element = dtype or _OF_NP[memory.dtype]
        self.dtype = types.SimpleNamespace(element_ty=self.element)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + np.asarray(raw(other), np.int64), self.element)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset - np.asarray(raw(other), np.int64), self.element)

    def checked(self, mask: np.ndarray, what: str) -> np.ndarray:
        at = self.offset[mask] if self.offset.ndim else self.offset[None][mask.reshape(-1)]
        if at.size and (at.min() < 0 or at.max() >= self.memory.size):
            raise EmulationError(f"{what} out of bounds: [{at.min()}, {at.max()}] of {self.memory.size}")
        return at


def load(p: Pointer, mask: Any = None, other: Any = 0, **_: Any) -> Tensor:
    m = np.broadcast_to(True if mask is None else raw(mask), p.offset.shape)
    out = np.full(p.offset.shape, raw(other), p.memory.dtype)
    at = p.checked(m, "load")
    if p.offset.ndim:
        out[m] = p.memory[at]
    elif m:
        out = p.memory[int(p.offset)]
    return Tensor(out, p.element)


def store(p: Pointer, value: Tensor, mask: Any = None, **_: Any) -> None:
    assert value.dtype is p.element, (value.dtype, p.element)
    m = np.broadcast_to(True if mask is None else raw(mask), p.offset.shape)
    p.memory[p.checked(m, "store")] = np.broadcast_to(value.a, p.offset.shape)[m]


# ---------------------------------------------------------------- shared memory, barriers
class Shared:
    def __init__(self, a: np.ndarray, dtype: DType) -> None:
        self.a, self.dtype = a, dtype

    @property
    def shape(self) -> list[int]:
        return list(self.a.shape)

    def index(self, i: Any) -> Shared:
        i = int(raw(i))
        if not 0 <= i < len(self.a):
            raise EmulationError(f"shared memory index {i} of {len(self.a)}")
        return Shared(self.a[i], self.dtype)

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.a.transpose(order), self.dtype)

    def slice(self, start: Any, length: Any, dim: int = 0) -> Shared:
        part = slice(int(raw(start)), int(raw(start)) + int(raw(length)))
        return Shared(self.a[(slice(None),) * dim + (part,)], self.dtype)

    def view(self, dtype: DType, shape: list[int]) -> Shared:
        assert dtype is self.dtype
        return Shared(self.a.reshape([int(raw(s)) for s in shape]), dtype)

    def load(self, layout: Any) -> Tensor:
        return Tensor(self.a.copy(), self.dtype)

    def store(self, value: Tensor) -> None:
        assert value.dtype is self.dtype, (value.dtype, self.dtype)
        self.a[...] = value.a


class Barrier:
    def __init__(self) -> None:
        self.count = self.pending = self.tx = 0
        self.phase = -1
        self.changed = threading.Condition()

    def update(self, arrivals: int = 0, tx: int = 0) -> None:
        with self.changed:
            if self.phase < 0:
                raise EmulationError("a barrier is used before it is initialised")
            self.pending -= arrivals
            self.tx += tx
            if self.pending < 0:
                raise EmulationError("more arrivals at a barrier than it counts")
            if self.pending == 0 and self.tx == 0:
                self.phase += 1
                self.pending = self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            # passes once the phase of that parity is over; a fresh barrier counts the one before it as over
            if not self.changed.wait_for(lambda: _run().failed or (self.phase & 1) != parity, TIMEOUT):
                raise EmulationError(f"deadlock: waited {TIMEOUT} s at a barrier")
            if _run().failed:
                raise EmulationError("another partition failed")


class Barriers:
    def __init__(self, barriers: list[Barrier]) -> None:
        self.barriers = barriers

    def index(self, i: Any) -> Barrier:
        return self.barriers[int(raw(i))]


class MBarrierLayout:
    pass


def allocate_shared_memory(dtype: DType, shape: list[Any], layout: Any) -> Any:
    shape = [int(raw(s)) for s in shape]
    if isinstance(layout, MBarrierLayout):
        made = [Barrier() for _ in range(shape[0])]
        _run().barriers += made
        return Barriers(made)
    if dtype is int8:
        from ._gluon_cluster import allocate

        return allocate(shape)
    fill = np.nan if dtype.np.kind == "f" else -(1 << 30)
    return Shared(np.full(shape, fill, dtype.np), dtype)


def _init(bar: Barrier, count: int) -> None:
    bar.count = bar.pending = int(raw(count))
    bar.phase = 0


mbarrier = types.SimpleNamespace(
    MBarrierLayout=MBarrierLayout, init=_init,
    wait=lambda bar, phase, pred=True, **_: bar.wait(int(raw(phase))) if raw(pred) else None,
    arrive=lambda bar, count=1, pred=True, **_: bar.update(arrivals=int(count)) if raw(pred) else None,
    expect=lambda bar, n, pred=True, **_: bar.update(arrivals=1, tx=int(n)) if raw(pred) else None)


# ---------------------------------------------------------------- TMA
class Descriptor:
    """A tensor and the box that is moved. Outside the tensor a load brings zeros and a store does nothing."""

    def __init__(self, a: np.ndarray, box: list[int], dtype: DType) -> None:
        self.a, self.box, self.dtype = a, box, dtype
        self.layout = None

    def windows(self, at: list[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        inside, boxed = [], []
        for x, size, n in zip(at, self.box, self.a.shape):
            x = int(raw(x))
            lo, hi = min(max(x, 0), n), min(max(x + size, 0), n)
            inside.append(slice(lo, hi))
            boxed.append(slice(lo - x, hi - x) if hi > lo else slice(0, 0))
        return tuple(inside), tuple(boxed)


class Run:
    """One block: its barriers, its failure, and the engine that moves boxes some time after it was told to."""

    def __init__(self, seed: int, cluster: Any = None, rank: int = 0) -> None:
        self.failed: BaseException | None = None
        self.cluster, self.rank, self.memory = cluster, rank, None
        self.by_address: dict[int, Barrier] = {}
        self.barriers: list[Barrier] = []
        self.random = random.Random(seed)
        self.queue: deque[Any] = deque()
        self.copies: list[Any] = []         # cp.async: there once they are waited for
        self.wake = threading.Condition()
        self.stop = False
        self.engine = threading.Thread(target=self._move, daemon=True)
        self.engine.start()

    def submit(self, job: Any) -> None:
        with self.wake:
            self.queue.append(job)
            self.wake.notify()

    def _move(self) -> None:
        while True:
            with self.wake:
                self.wake.wait_for(lambda: self.queue or self.stop)
                if not self.queue:
                    return
                # loads and stores overtake each other
                i = self.random.randrange(min(len(self.queue), 4))
                job = self.queue[i]
                del self.queue[i]
            job()

    def end(self) -> None:
        with self.wake:
            self.stop = True
            self.wake.notify_all()
        self.engine.join(TIMEOUT)

    def fail(self, e: BaseException) -> None:
        self.failed = self.failed or e
        if self.cluster is not None:
            self.cluster.all.abort()
        for b in self.barriers:
            with b.changed:
                b.changed.notify_all()


def _run() -> Run:
    return _local.run


def tma_load(desc: Descriptor, at: list[Any], bar: Barrier, out: Shared, pred: Any = True) -> None:
    if not raw(pred):
        return
    assert list(out.a.shape) == desc.box and out.dtype is desc.dtype, (out.a.shape, desc.box)
    if int(raw(at[-1])) * desc.dtype.size % 16:
        raise EmulationError("a box that doesn't start on 16 bytes: an illegal instruction on the H200")
    floats = out.a.dtype.kind == "f"
    out.a[...] = np.nan if floats else -(1 << 30)
    inside, boxed = desc.windows(at)

    def move() -> None:
        box = np.zeros(desc.box, np.float32 if floats else desc.a.dtype)
        box[boxed] = desc.a[inside]
        out.a[...] = box
        bar.update(tx=-box.size * desc.dtype.size)

    _run().submit(move)


def tma_store(desc: Descriptor, at: list[Any], src: Shared, add: bool = False) -> None:
    assert list(src.a.shape) == desc.box and src.dtype is desc.dtype
    inside, boxed = desc.windows(at)
    done = threading.Event()
    _local.stores.append(done)

    def move() -> None:
        desc.a[inside] = src.a[boxed] + (desc.a[inside] if add else 0)
        done.set()

    _run().submit(move)


def tma_add(desc: Descriptor, at: list[Any], src: Shared) -> None:
    tma_store(desc, at, src, add=True)


def store_wait(pending: int) -> None:
    while len(_local.stores) > int(pending):
        if not _local.stores.popleft().wait(TIMEOUT):
            raise EmulationError("a TMA store never ended")


tma = types.SimpleNamespace(store_wait=store_wait)


def copy_to_shared(out: Shared, p: Pointer, mask: Any = None) -> None:
    """cp.async, zeros where masked. A partition may wait for what was asked for before the warps parted: they are the same."""
    assert out.dtype is p.element, (out.dtype, p.element)
    value = load(p, mask=mask)
    out.a[...] = np.nan if out.a.dtype.kind == "f" else -(1 << 30)

    def move() -> None:
        out.a[...] = value.a

    _run().copies.append(move)


def _wait_copies(pending: int) -> None:
    assert int(raw(pending)) == 0, "groups of copies are not told apart"
    for move in _run().copies:
        move()
    _run().copies.clear()


async_copy = types.SimpleNamespace(commit_group=lambda: None, wait_group=_wait_copies)


# ---------------------------------------------------------------- wgmma
class Pending:
    """A sum in flight: nothing but a wait may take it."""

    def __init__(self, a: Shared, b: Shared, base: Any, dtype: DType) -> None:
        self.operands, self.base, self.dtype, self.value = (a, b), base, dtype, None

    def compute(self) -> None:
        a, b = (x.a.astype(np.float32) for x in self.operands)
        value = (a @ b).astype(np.float32)
        if self.base is not None:
            value = value + (self.base.value if isinstance(self.base, Pending) else self.base).a
        self.value = Tensor(value)

    @property
    def a(self) -> np.ndarray:
        raise EmulationError("a sum is taken while it is in flight")


def warpgroup_mma(a: Shared, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Pending:
    assert is_async
    use = bool(raw(use_acc))
    assert use or not isinstance(acc, Pending) or acc not in _local.flight, "registers of a sum in flight are given to another"
    p = Pending(a, b, acc if use else None, float32)
    _local.flight.append(p)
    return p


def warpgroup_mma_wait(pending: int = 0, deps: tuple[Any, ...] = ()) -> Any:
    while len(_local.flight) > pending:
        _local.flight.popleft().compute()
    out = []
    for d in deps:
        if isinstance(d, Pending):
            d = d if d.value is None else d.value       # in flight still: whoever takes it as a tensor finds out
        out.append(d)
    return out[0] if len(out) == 1 else tuple(out)


# ---------------------------------------------------------------- language
_atomic = threading.Lock()


def atomic_add(p: Pointer, value: int, **_: Any) -> Tensor:
    with _atomic:
        old = load(p)
        store(p, wrap(np.asarray(old.a + raw(value), old.a.dtype)))
    return old


def atomic_cas(p: Pointer, expected: Any, value: Any, **_: Any) -> Tensor:
    with _atomic:
        old = load(p)
        if old.a == raw(expected):
            store(p, value)
    return old


def _shape(shape: Any) -> list[int]:
    return [int(raw(s)) for s in shape]


def _broadcast(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    a, b = np.broadcast_arrays(x.a, y.a)
    return Tensor(a, x.dtype), Tensor(b, y.dtype)


def _expand(x: Any, axis: int) -> Any:
    if isinstance(x, Pointer):
        return Pointer(x.memory, np.expand_dims(x.offset, axis), x.element)
    return Tensor(np.expand_dims(x.a, axis), x.dtype)


def _keep(f: Any):
    """Minimum and the like: Python numbers take the tensor's dtype."""

    def op(x: Any, y: Any, propagate_nan: Any = None) -> Any:
        t = x if isinstance(x, Tensor) else y
        if not isinstance(t, Tensor):
            return wrap(f(x, y))
        both = [v.a if isinstance(v, Tensor) else np.asarray(v, t.a.dtype) for v in (x, y)]
        return wrap(f(*both))

    return op


def _where(c: Any, x: Any, y: Any) -> Any:
    if isinstance(x, Pointer):
        return x if raw(c) else y
    t = x if isinstance(x, Tensor) else y if isinstance(y, Tensor) else wrap(x)
    out = np.where(raw(c), *(v.a if isinstance(v, Tensor) else np.asarray(v, t.a.dtype) for v in (x, y)))
    return Tensor(out.astype(t.a.dtype), t.dtype)


def _scan(x: Tensor, axis: int, combine: Any) -> Tensor:
    out = x.a.copy()
    for i in range(1, len(out)):
        out[i] = raw(combine(Tensor(out[i - 1]), Tensor(x.a[i])))
    return Tensor(out, x.dtype)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    return Tensor(x.a[..., 0], x.dtype), Tensor(x.a[..., 1], x.dtype)


def _static_assert(condition: Any, *_: Any) -> None:
    assert condition


class Layout:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @staticmethod
    def get_default_for(*args: Any, **kwargs: Any) -> Layout:
        return Layout()


def warp_specialize(functions: list[tuple[Any, tuple]], warps: list[int], registers: list[int]) -> None:
    run, block = _run(), _local.block

    def partition(f: Any, args: tuple) -> None:
        _start(run, block)
        try:
            f(*args)
            if _local.flight:
                raise EmulationError("a partition ends with wgmma in flight")
            store_wait(0)
        except BaseException as e:
            run.fail(e)

    threads = [threading.Thread(target=partition, args=fa, daemon=True) for fa in functions]
    for t in threads:
        t.start()
    for t in threads:
        t.join(2 * TIMEOUT)
        if t.is_alive():
            raise EmulationError("deadlock: a partition never ended")
    if run.failed:
        raise run.failed


def _start(run: Run, block: tuple[int, int]) -> None:
    _local.run, _local.block, _local.flight, _local.stores = run, block, deque(), deque()


gl = types.ModuleType("triton.experimental.gluon.language")
gl.__dict__.update(
    constexpr=lambda x=None: x, float8e4nv=float8e4nv, bfloat16=bfloat16, float16=float16, float32=float32, int32=int32,
    int64=int64, uint8=uint8, int8=int8, int1=int1, NVMMASharedLayout=Layout, SwizzledSharedLayout=Layout, BlockedLayout=Layout,
    SliceLayout=Layout, NVMMADistributedLayout=Layout, DistributedLinearLayout=Layout, load=load, store=store,
    allocate_shared_memory=allocate_shared_memory,
    warp_specialize=warp_specialize, static_range=range, static_assert=_static_assert, associative_scan=_scan, split=_split,
    atomic_add=atomic_add, atomic_cas=atomic_cas, program_id=lambda axis: wrap(_local.block[0]), num_programs=lambda axis=0: wrap(_local.block[1]),
    to_tensor=wrap, where=_where, minimum=_keep(np.minimum), maximum=_keep(np.maximum),
    cdiv=lambda x, y: wrap((raw(x) + y - 1) // y), broadcast=_broadcast, expand_dims=_expand,
    arange=lambda start, end, layout=None: Tensor(np.arange(start, end, dtype=np.int32)),
    zeros=lambda shape, dtype, layout=None: Tensor(np.zeros(_shape(shape), dtype.np), dtype),
    zeros_like=lambda x: Tensor(np.zeros_like(x.a), x.dtype),
    fma=lambda x, y, z: Tensor(x.a * y.a + z.a), sum=lambda x, axis: wrap(x.a.sum(axis, dtype=np.int32)),
    max=lambda x, axis: wrap(x.a.max(axis)), min=lambda x, axis: wrap(x.a.min(axis)),
    reshape=lambda x, shape: Tensor(x.a.reshape(_shape(shape)), x.dtype),
    permute=lambda x, order: Tensor(x.a.transpose(order), x.dtype),
    convert_layout=lambda x, layout, assert_trivial=False: x, multiple_of=lambda x, by: x,
    inline_asm_elementwise=lambda asm, constraints, args, dtype, is_pure, pack: wrap(raw(args[0])))


def _jit(fn: Any = None, **_: Any) -> Any:
    return fn if fn is not None else _jit


def _device_range(*bounds: Any) -> Any:
    return (wrap(np.int32(i)) for i in range(*(int(raw(b)) for b in bounds)))


def load_device_module(name: str) -> types.ModuleType:
    """A device module of kernels/gluon/sm90 as plain Python."""
    from ._gluon_cluster import stand_ins as cluster_stand_ins

    gluon = types.ModuleType("triton.experimental.gluon")
    gluon.jit, gluon.constexpr_function, gluon.language = _jit, _jit, gl  # type: ignore[attr-defined]
    hopper = types.ModuleType("triton.experimental.gluon.language.nvidia.hopper")
    hopper.__dict__.update(fence_async_shared=lambda: None, mbarrier=mbarrier, tma=tma, warpgroup_mma=warpgroup_mma,
                           warpgroup_mma_wait=warpgroup_mma_wait, warpgroup_mma_init=lambda x: x)
    ampere = types.ModuleType("triton.experimental.gluon.language.nvidia.ampere")
    ampere.__dict__.update(async_copy=async_copy)
    package = types.ModuleType("_emulated_sm90")
    package.__path__ = [str(Path(sm90.__file__).parent)]
    shim = types.ModuleType("_emulated_sm90.shim")
    shim.__dict__.update(
        tma_load=tma_load, tma_store=tma_store, tma_add=tma_add, block_barrier=lambda: None, copy_to_shared=copy_to_shared,
        touch=lambda p: p.checked(np.broadcast_to(True, p.offset.shape), "touch"),
        view_as=lambda buf, dtype, n, rows, cols, layout: buf.view(dtype, [n, cols, rows]).permute((0, 2, 1))
        if layout is COLUMNS_FIRST else buf.view(dtype, [n, rows, cols]),
        view_rows=lambda buf, dtype, n, cols, layout: buf.view(dtype, [n, cols]),
        view_cube=lambda buf, dtype, n, planes, rows, cols, layout: buf.view(dtype, [n, planes, rows, cols]),
        view_boxes=lambda buf, dtype, n, rows, cols, layout: buf.view(dtype, [n, 1, rows, cols]))
    cuda = types.ModuleType("triton.language.extra.cuda")
    cuda.__dict__.update(gdc_wait=lambda: None, gdc_launch_dependents=lambda: None)
    empty = ("triton", "triton.experimental", "triton.experimental.gluon.language.nvidia", "triton.language",
             "triton.language.extra")
    stand_ins = {**{n: types.ModuleType(n) for n in empty}, gluon.__name__: gluon, gl.__name__: gl, hopper.__name__: hopper,
                 ampere.__name__: ampere, cuda.__name__: cuda, package.__name__: package, shim.__name__: shim}
    stand_ins |= cluster_stand_ins(package.__name__)
    stand_ins["triton.language"].PropagateNan = types.SimpleNamespace(ALL=None)     # type: ignore[attr-defined]
    before = {n: sys.modules.get(n) for n in stand_ins}
    sys.modules.update(stand_ins)
    try:
        module = importlib.import_module(f"_emulated_sm90.{name}")
        for n, m in sys.modules.items():
            if n.startswith("_emulated_sm90"):
                m.__dict__["range"] = _device_range
        return module
    finally:
        for n, old in before.items():
            if old is None:
                del sys.modules[n]
            else:
                sys.modules[n] = old
        for n in [n for n in sys.modules if n.startswith("_emulated_sm90")]:
            del sys.modules[n]


def arguments(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(wrap(np.int32(a) if abs(a) < 2**31 else np.int64(a)) if type(a) is int else a for a in args)


def launch(kernel: Any, grid: int, *args: Any, seed: int = 0) -> None:
    """Every block of the grid, one after the other. The first error of any partition is raised."""
    args = arguments(args)
    for block in range(grid):
        run = Run(seed * 1000 + block)
        _start(run, (block, grid))
        try:
            kernel(*args)
        finally:
            run.end()
