"""A descriptor is rewritten only where all that is relied upon is as expected."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from narrowgemm.kernels import tensor_map


class PyCUtensorMap:
    """As Triton's: an object whose last 128 bytes are the descriptor."""

    __slots__ = tuple(f"word{i:02d}" for i in range(24))


def place(made: object) -> int:
    return id(made) + type(made).__basicsize__ - tensor_map.BYTES


def encoded(promotion: int, *what: Any) -> bytes:
    return (repr((promotion, what)).encode() * 8)[:tensor_map.BYTES]


def driver(target: int, dtype: int, base: int, shape: list[int], strides: list[int], box: list[int], swizzle: int,
           promotion: int) -> bool:
    ctypes.memmove(target, encoded(promotion, dtype, base, shape, strides, box, swizzle), tensor_map.BYTES)
    return True


DESCRIPTOR = SimpleNamespace(base=SimpleNamespace(data_ptr=lambda: 4096), shape=[2, 64, 256], strides=[16384, 256, 1], padding="zero")
META = {"elem_size": 1, "swizzle": 3, "block_size": [1, 64, 128], "fp4_padded": False}
WHAT = (0, 4096, DESCRIPTOR.shape, DESCRIPTOR.strides, META["block_size"], 3)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[PyCUtensorMap]:
    monkeypatch.setattr(tensor_map, "_encode_tiled", lambda: driver)
    x = PyCUtensorMap()
    yield x
    ctypes.memset(place(x), 0, tensor_map.BYTES)     # its slots hold no objects


def now(x: object) -> bytes:
    return ctypes.string_at(place(x), tensor_map.BYTES)


def put(x: object, content: bytes) -> None:
    ctypes.memmove(place(x), content, tensor_map.BYTES)


def test_fetches_by_256(made: PyCUtensorMap) -> None:
    put(made, encoded(tensor_map.BY_128, *WHAT))
    assert tensor_map.widen(made, DESCRIPTOR, META)
    assert now(made) == encoded(tensor_map.BY_256, *WHAT)


@pytest.mark.parametrize("meta", [{}, {"elem_size": 2}, {"fp4_padded": True}, {"is_im2col": True}, {"swizzle": 2}],
                         ids=["other bytes", "wider elements", "padded", "im2col", "another swizzle"])
def test_stays_as_it_is(made: PyCUtensorMap, meta: dict[str, Any]) -> None:
    there = encoded(tensor_map.BY_128, *WHAT) if meta else encoded(tensor_map.BY_256, *WHAT)
    put(made, there)
    assert not tensor_map.widen(made, DESCRIPTOR, META | meta)
    assert now(made) == there


def test_no_driver_and_other_objects(made: PyCUtensorMap, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not tensor_map.widen(("map",), DESCRIPTOR, META)
    monkeypatch.setattr(tensor_map, "_encode_tiled", lambda: None)
    put(made, encoded(tensor_map.BY_128, *WHAT))
    assert not tensor_map.widen(made, DESCRIPTOR, META)
