"""Device modules as plain Python, against stand-ins for Triton's modules, and their launch."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

import narrowgemm.kernels.gluon.sm90 as sm90

from . import cluster
from .asynchronous import async_copy, copy_to_shared, tma, tma_add, tma_load, tma_store, warpgroup_mma, warpgroup_mma_wait
from .block import Block, start
from .language import gl
from .shared import BOXED, COLUMNS_FIRST, AddressedBarriers, Boxed, MBarrierLayout, Shared, mbarrier
from .values import arguments, raw, wrap


def _jit(fn: Any = None, **_: Any) -> Any:
    return fn if fn is not None else _jit


def _device_range(*bounds: Any) -> Any:
    return (wrap(np.int32(i)) for i in range(*(int(raw(b)) for b in bounds)))


def _view_as(buf: Shared, dtype: Any, n: int, rows: int, cols: int, layout: Any) -> Shared:
    if layout is COLUMNS_FIRST:
        return buf.view(dtype, [n, cols, rows]).permute((0, 2, 1))
    return Boxed(buf.view(dtype, [n, rows // 8, cols // 128, 8, 128]).a, dtype) if layout is BOXED else buf.view(dtype, [n, rows, cols])


def load_device_module(name: str) -> types.ModuleType:
    """A device module of kernels/gluon/sm90 as plain Python."""
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
        VIEWS_GROW=False, touch=lambda p: p.checked(np.broadcast_to(True, p.offset.shape), "touch"),
        view_as=_view_as,
        view_rows=lambda buf, dtype, n, cols, layout: AddressedBarriers() if isinstance(layout, MBarrierLayout)
        else buf.view(dtype, [n, cols]),
        view_cube=lambda buf, dtype, n, planes, rows, cols, layout: buf.view(dtype, [n, planes, rows, cols]),
        view_boxes=lambda buf, dtype, n, rows, cols, layout: buf.view(dtype, [n, 1, rows, cols]))
    cuda = types.ModuleType("triton.language.extra.cuda")
    cuda.__dict__.update(gdc_wait=lambda: None, gdc_launch_dependents=lambda: None)
    empty = ("triton", "triton.experimental", "triton.experimental.gluon.language.nvidia", "triton.language",
             "triton.language.extra")
    stand_ins = {**{n: types.ModuleType(n) for n in empty}, gluon.__name__: gluon, gl.__name__: gl, hopper.__name__: hopper,
                 ampere.__name__: ampere, cuda.__name__: cuda, package.__name__: package, shim.__name__: shim}
    stand_ins |= cluster.stand_ins(package.__name__)
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


def launch(kernel: Any, grid: int, *args: Any, seed: int = 0) -> None:
    """Every block of the grid, one after the other, the last one first where `seed` is odd: what a block writes beside its own must not be
    hidden by the next one. The first error of any partition is raised."""
    args = arguments(args)
    for number in range(grid)[:: -1 if seed % 2 else 1]:
        block = Block(seed * 1000 + number)
        start(block, (number, grid))
        try:
            kernel(*args)
        finally:
            block.end()
