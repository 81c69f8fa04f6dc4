"""`gl`, the language of Gluon device code, as far as the kernels use it."""

from __future__ import annotations

import threading
import types
from typing import Any

import numpy as np

from .asynchronous import store_wait
from .block import Block, current, local, start
from .shared import BOXED, allocate_shared_memory
from .values import (
    EmulationError,
    Pointer,
    Tensor,
    bfloat16,
    float8e4nv,
    float16,
    float32,
    int1,
    int8,
    int16,
    int32,
    int64,
    load,
    raw,
    store,
    uint8,
    wrap,
)

_atomic = threading.Lock()


def atomic_add(p: Pointer, value: int, **_: Any) -> Tensor:
    with _atomic:
        old = load(p)
        store(p, wrap(np.asarray(old.a + raw(value), old.a.dtype)))
    return old


def atomic_max(p: Pointer, value: Any, **_: Any) -> Tensor:
    with _atomic:
        old = load(p)
        store(p, wrap(np.asarray(max(old.a, raw(value)), old.a.dtype)))
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
    block, program = current(), local.program

    def partition(f: Any, args: tuple) -> None:
        start(block, program)
        try:
            f(*args)
            if local.flight:
                raise EmulationError("a partition ends with wgmma in flight")
            store_wait(0)
        except BaseException as e:
            block.fail(e)

    threads = [threading.Thread(target=partition, args=fa, daemon=True) for fa in functions]
    for t in threads:
        t.start()
    for t in threads:
        t.join(2 * Block.TIMEOUT)
        if t.is_alive():
            raise EmulationError("deadlock: a partition never ended")
    if block.failed:
        raise block.failed


gl = types.ModuleType("triton.experimental.gluon.language")
gl.__dict__.update(
    constexpr=lambda x=None: x, float8e4nv=float8e4nv, bfloat16=bfloat16, float16=float16, float32=float32, int32=int32,
    int64=int64, int16=int16, pointer_type=lambda dtype: dtype, uint8=uint8, int8=int8, int1=int1, NVMMASharedLayout=Layout, SwizzledSharedLayout=Layout, BlockedLayout=Layout,
    SliceLayout=Layout, NVMMADistributedLayout=Layout, DistributedLinearLayout=Layout,
    DotOperandLayout=Layout, SharedLinearLayout=lambda *bases: BOXED, load=load, store=store,
    allocate_shared_memory=allocate_shared_memory,
    warp_specialize=warp_specialize, static_range=range, static_assert=_static_assert, associative_scan=_scan, split=_split,
    atomic_add=atomic_add, atomic_max=atomic_max, atomic_cas=atomic_cas, program_id=lambda axis: wrap(local.program[0]), num_programs=lambda axis=0: wrap(local.program[1]),
    to_tensor=wrap, where=_where, minimum=_keep(np.minimum), maximum=_keep(np.maximum),
    cdiv=lambda x, y: wrap((raw(x) + y - 1) // y), broadcast=_broadcast, expand_dims=_expand,
    arange=lambda start, end, layout=None: Tensor(np.arange(start, end, dtype=np.int32)),
    zeros=lambda shape, dtype, layout=None: Tensor(np.zeros(_shape(shape), dtype.np), dtype),
    full=lambda shape, value, dtype, layout=None: Tensor(np.full(_shape(shape), raw(value), dtype.np), dtype),
    join=lambda x, y: Tensor(np.stack([x.a, y.a], -1), x.dtype),
    zeros_like=lambda x: Tensor(np.zeros_like(x.a), x.dtype),
    fma=lambda x, y, z: Tensor(x.a * y.a + z.a),
    sum=lambda x, axis: wrap(x.a.sum(axis, dtype=x.a.dtype if x.a.dtype.kind == "f" else np.int32)),
    max=lambda x, axis: wrap(x.a.max(axis)), min=lambda x, axis: wrap(x.a.min(axis)),
    reshape=lambda x, shape: Tensor(x.a.reshape(_shape(shape)), x.dtype),
    permute=lambda x, order: Tensor(x.a.transpose(order), x.dtype),
    convert_layout=lambda x, layout, assert_trivial=False: x, multiple_of=lambda x, by: x,
    inline_asm_elementwise=lambda asm, constraints, args, dtype, is_pure, pack: wrap(raw(args[0])))
