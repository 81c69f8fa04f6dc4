"""Numbers, tensors and pointers of the emulator: NumPy arrays with Triton's dtypes and operators."""

from __future__ import annotations

import types
from typing import Any

import numpy as np


class EmulationError(AssertionError):
    pass


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
int8, int16 = DType("int8", np.int8, 1), DType("int16", np.int16, 2)
_OF_NP = {t.np: t for t in (float16, float32, int16, int32, int64, uint8, int1)}


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

    def to(self, dtype: DType, bitcast: bool) -> Pointer:
        """To narrower elements of the same memory."""
        assert bitcast and self.element.size % dtype.size == 0
        return Pointer(self.memory.view(dtype.np), self.offset * (self.element.size // dtype.size))

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


def arguments(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A launch's: Python integers as scalars of the device."""
    return tuple(wrap(np.int32(a) if abs(a) < 2**31 else np.int64(a)) if type(a) is int else a for a in args)
