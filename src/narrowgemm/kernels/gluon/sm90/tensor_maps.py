"""What the persistent FP8 kernels share on the host: TMA descriptors of operands and output, tiles of M, strides that matter."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ....problem import Problem
from ...operands import Operands
from ...triton.k_major import Copied


def planes(t: Tensor | Copied, k: int, box: int) -> Any:
    """The TMA descriptor of an operand as [1 or G, rows, K], moved in boxes of `box` rows by 128."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .fp8_block_parts_device import FP8_PLANE

    if isinstance(t, Copied):
        return TensorDescriptor(t.base, list(t.shape), list(t.strides), [1, box, 128], FP8_PLANE.value)
    rows, outer = t.shape[-2], stride(t, -2, k)
    count = t.shape[0] if t.dim() == 3 else 1
    plane = stride(t, 0, outer * rows) if t.dim() == 3 else outer * rows
    return TensorDescriptor(t, [count, rows, k], [plane, outer, 1], [1, box, 128], FP8_PLANE.value)


def planes_by_eight(t: Tensor, k: int, box: int, blocks: int) -> Any:
    """`planes` in boxes of `box` rows by `blocks` x 128: eight rows of a block lie together, as wgmma takes them, and a row of
    memory is read by `blocks` x 128 bytes. Rows are a multiple of 8."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    rows, outer = t.shape[-2], stride(t, -2, k)
    count = t.shape[0] if t.dim() == 3 else 1
    plane = stride(t, 0, outer * rows) if t.dim() == 3 else outer * rows
    shape = [1, box // 8, blocks, 8, 128]
    layout = gl.NVMMASharedLayout.get_default_for(shape, gl.float8e4nv)
    return TensorDescriptor(t, [count, rows // 8, k // 128, 8, 128], [plane, 8 * outer, 128, outer, 1], shape, layout)


def output(x: Operands, group_stride: int, row_stride: int, columns: int, itemsize: int) -> Any:
    """The TMA descriptor of the output as rows, group after group (`group_stride` 0: one group), in boxes of 64 x columns."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    rows = (x.groups - 1) * (group_stride // row_stride) + x.m if group_stride else x.m
    box = [64, columns]
    dtype = {2: gl.bfloat16, 4: gl.float32}[itemsize]     # only its width matters to the layout
    return TensorDescriptor(x.out, [rows, x.n], [row_stride, 1], box, gl.NVMMASharedLayout.get_default_for(box, dtype))


def row_tiles(problem: Problem, x: Operands, block_m: int) -> int:
    """Tiles of M, at most."""
    if problem.layout in ("offsets", "psum"):
        return x.m // block_m + x.groups
    return -(-x.m // block_m) * (x.groups if problem.layout == "masked" else 1)


def stride(t: Tensor, dim: int, packed: int) -> int:
    """The stride, or what it would be in a packed tensor where there is only one element to stride over."""
    return t.stride(dim) if t.shape[dim] > 1 else packed
