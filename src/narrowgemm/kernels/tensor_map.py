"""TMA descriptors that fetch into L2 by 256 bytes: Triton encodes all of its own with 128, and has no option for it.

The driver encodes Triton's descriptor again, in place. What is relied upon is looked at first: encoded by us with 128 bytes, it
must be byte by byte what Triton's object ends with. Where it is not, Triton's stays, which computes the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

BYTES = 128                 # of a CUtensorMap, aligned to 64
BY_128, BY_256 = 2, 3       # CUtensorMapL2promotion
UINT8 = 0                   # CUtensorMapDataType


def widen(made: Any, descriptor: Any, meta: Any) -> bool:
    """Let `made`, Triton's encoded descriptor of 1-byte elements, fetch by 256 bytes; whether it does now.

    descriptor: the TensorDescriptor; meta: what the compiled kernel says of it (box, swizzle, element size).
    """
    kind = type(made)
    encode_tiled = _encode_tiled()
    if encode_tiled is None or kind.__name__ != "PyCUtensorMap" or meta["elem_size"] != 1 or meta.get("fp4_padded") \
            or meta.get("is_im2col") or descriptor.padding == "nan":
        return False
    place = id(made) + kind.__basicsize__ - BYTES
    ours = ctypes.create_string_buffer(BYTES + 64)
    address = -(-ctypes.addressof(ours) // 64) * 64

    def encode(target: int, promotion: int) -> bool:
        return encode_tiled(target, UINT8, descriptor.base.data_ptr(), descriptor.shape, descriptor.strides, meta["block_size"],
                            meta["swizzle"], promotion)

    if not encode(address, BY_128) or ctypes.string_at(address, BYTES) != ctypes.string_at(place, BYTES):
        return False
    return encode(place, BY_256)


@lru_cache(maxsize=1)
def _encode_tiled() -> Callable[..., bool] | None:
    """`cuTensorMapEncodeTiled` of the installed driver; None where there is none."""
    try:
        call = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    except (OSError, AttributeError):
        return None
    u32, u64 = ctypes.c_uint32, ctypes.c_uint64

    def encode(target: int, dtype: int, base: int, shape: Sequence[int], strides: Sequence[int], box: Sequence[int], swizzle: int,
               promotion: int) -> bool:
        """Dimensions as Triton has them, outermost first; strides in elements of one byte, the last one 1."""
        rank = len(shape)
        pitches = [*reversed(strides[:-1]), shape[0] * strides[0]]
        return call(ctypes.c_void_p(target), dtype, u32(rank), ctypes.c_void_p(base), (u64 * rank)(*reversed(shape)),
                    (u64 * rank)(*pitches), (u32 * rank)(*reversed(box)), (u32 * rank)(*[1] * rank), 0, swizzle, promotion, 0) == 0

    return encode
