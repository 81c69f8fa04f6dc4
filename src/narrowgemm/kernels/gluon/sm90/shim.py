"""Gluon names that changed between Triton 3.6 and 3.9, under one name each. Imports Triton: only device code imports this.

3.8 gave TMA's additions a name, and renamed the TMA copies `async_copy_*` to `async_load` / `async_store`, cp.async's likewise (3.9
dropped the old names); 3.9 renamed `shared_memory_descriptor._reinterpret` to `reinterpret`; `thread_barrier` became `barrier`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

copy_to_shared = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared

if hasattr(tma, "async_load"):
    tma_load, tma_store = tma.async_load, tma.async_store
else:
    tma_load, tma_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global

if hasattr(tma, "async_atomic_add"):
    tma_add = tma.async_atomic_add
else:
    from triton._C.libtriton import ir
    from triton.experimental.gluon.language._core import builtin

    @builtin
    def tma_add(tensor_desc, coord, src, _semantic=None):
        """What the box holds += shared memory `src`, in L2: nothing comes back."""
        at = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, at, src.handle)

block_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier

HAS_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
# whether a view may be larger than what it is of
VIEWS_GROW = not HAS_REINTERPRET.value


@gluon.jit
def view_as(buf, dtype: gl.constexpr, n: gl.constexpr, rows: gl.constexpr, cols: gl.constexpr, layout: gl.constexpr):
    """The same shared memory as [n, rows, cols] in another layout."""
    if HAS_REINTERPRET:
        return buf.reinterpret(dtype, [n, rows, cols], layout)
    else:
        return buf._reinterpret(dtype, [n, rows, cols], layout)


@gluon.jit
def view_rows(buf, dtype: gl.constexpr, n: gl.constexpr, cols: gl.constexpr, layout: gl.constexpr):
    """The same shared memory as [n, cols] in another layout."""
    if HAS_REINTERPRET:
        return buf.reinterpret(dtype, [n, cols], layout)
    else:
        return buf._reinterpret(dtype, [n, cols], layout)


@gluon.jit
def view_boxes(buf, dtype: gl.constexpr, n: gl.constexpr, rows: gl.constexpr, cols: gl.constexpr, layout: gl.constexpr):
    """The same shared memory as n boxes [1, rows, cols] of a TMA descriptor."""
    if HAS_REINTERPRET:
        return buf.reinterpret(dtype, [n, 1, rows, cols], layout)
    else:
        return buf._reinterpret(dtype, [n, 1, rows, cols], layout)


@gluon.jit
def touch(ptrs):
    """Have L2 fetch what is there, in memory, by lines."""
    gl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptrs.to(gl.int64)], dtype=gl.int32, is_pure=False,
                              pack=1)


@gluon.jit
def view_cube(buf, dtype: gl.constexpr, n: gl.constexpr, planes: gl.constexpr, rows: gl.constexpr, cols: gl.constexpr,
              layout: gl.constexpr):
    """The same shared memory as [n, planes, rows, cols] in another layout."""
    if HAS_REINTERPRET:
        return buf.reinterpret(dtype, [n, planes, rows, cols], layout)
    else:
        return buf._reinterpret(dtype, [n, planes, rows, cols], layout)
