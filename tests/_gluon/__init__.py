"""Runs Gluon device code for Hopper on the CPU: Triton's interpreter can't.

The device modules are imported once more, against stand-ins for Triton's modules, as plain Python. Every partition of a
block is a thread; tensors are NumPy arrays of the whole partition, layouts mean nothing. What goes wrong on a GPU in ways
that are hard to see goes wrong here in ways that aren't:

- a TMA load fills its box with NaN at once and brings the data later, from another thread; it counts its bytes;
- a wgmma reads shared memory only when it is waited for, so a slot released too early is read overwritten;
- a TMA store reads its buffer later, so a buffer reused too early is stored wrong;
- every load and store is checked against the tensor's bounds; a wait that never ends is an error.
"""

from . import cluster, words
from .asynchronous import Descriptor, Pending, warpgroup_mma_wait
from .block import Block, current, local, start
from .language import atomic_add
from .modules import launch, load_device_module
from .shared import Barrier, Shared, allocate_shared_memory
from .values import (
    DType,
    EmulationError,
    Pointer,
    Tensor,
    arguments,
    bfloat16,
    float8e4nv,
    float16,
    float32,
    int32,
    load,
    raw,
    uint8,
    wrap,
)

__all__ = ["Barrier", "Block", "DType", "Descriptor", "EmulationError", "Pending", "Pointer", "Shared", "Tensor", "allocate_shared_memory",
           "arguments", "atomic_add", "bfloat16", "cluster", "current", "float8e4nv", "float16", "float32", "int32", "launch", "load",
           "load_device_module", "local", "raw", "start", "uint8", "warpgroup_mma_wait", "words", "wrap"]
