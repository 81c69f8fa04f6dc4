"""`quantize`: a tensor into a scaled format. The definition, bit for bit, is `reference/quantize.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arch import detect
from ..errors import expect
from ..formats import PLAIN, Format, ScaledTensor, get_format
from ..kernels.operands import Memo, Operands
from ..problem import Config, Operand, Plan, Problem, bucket
from ..reference import quantize as reference
from ..runtime import dispatch, env
from ..runtime.launch import again, run
from ..scales import tma_aligned_rows
from . import common, library
from .plan_cache import Empty, Known, PlanCache, empty_of

SCALE_LAYOUTS = ("row_major", "mn_major")
SCALES = "scales"   # where the memo of a signature holds what scales are allocated with
_plans = PlanCache()


def quantize(x: Tensor, fmt: Format | str, *, rounding: str = "rceil", amax_clamp: float = 1e-4,
             scale_layout: str = "row_major", backend: str | None = None, config: Config | None = None) -> ScaledTensor:
    """`x` quantised to the format `fmt`: payload and scales, one scale per block.

    x: `[..., R, K]`, BF16, FP16 or FP32, any strides (a transposed view is quantised along its own K without a copy).
    fmt: a scaled entry of FORMATS or its name: tensor-wise (one scale per matrix `[R, K]`), row-wise, 1x128, 128x128,
        MXFP8, MXFP4. K of MXFP4 must be even. Blocks at the edge are scaled by the elements they have.
    rounding: of E8M0 scales: 'rceil' (the smallest power of two that saturates nothing), 'floor' (OCP MX), 'even'; FP32
        scales have none. amax_clamp: the least amax of a block, so that a block of zeros has a scale (DeepGEMM's 1e-4).
    scale_layout: strides of the scales `[..., ceil(R/rows), ceil(K/cols)]`: 'row_major', or 'mn_major', R contiguous
        with columns on 16 bytes, as TMA loads them.
    backend: use only this one ('triton', 'reference'). config: use this Config.

    Returns a ScaledTensor with payload `[..., R, K]`, K contiguous (E2M1: uint8 `[..., R, K/2]`, low nibble = even K),
    and float32 or uint8 E8M0 scales. Values beyond the range saturate; a NaN or an infinity makes its whole block NaN.
    Not differentiable. Empty tensors are legal. Raises TypeError / ValueError before anything is launched.
    """
    if torch.compiler.is_compiling():
        return _traced(x, fmt, rounding, amax_clamp, scale_layout, backend, config)
    fmt = get_format(fmt)
    expect(isinstance(x, Tensor), "input of quantize", type(x).__name__, "a torch.Tensor", error=TypeError)
    plan, memo, payload, _ = _known(x, fmt, rounding, amax_clamp, scale_layout, backend, config)
    data, scale = payload.make(), memo[SCALES].make()
    _fill(plan, x, fmt, data, scale, rounding, amax_clamp, memo)
    return ScaledTensor(data, scale, fmt)


def _known(x: Tensor, fmt: Format, rounding: str, amax_clamp: float, scale_layout: str, backend: str | None,
           config: Config | None) -> Known:
    where = x.get_device()      # a third of what `device` takes; CPU and meta tensors both say -1
    key = (fmt, x.shape, x.stride(), x.dtype, where if where >= 0 else x.device, common.off_16_bytes(x), rounding, amax_clamp,
           scale_layout, backend, config, env.choice())
    known = _plans.find(key)
    if known is None:
        plan = plan_of(x, fmt, rounding, amax_clamp, scale_layout, backend, config)
        payload, scales = _outputs(x, fmt, scale_layout)
        known = _plans.add(key, plan, payload, memo={SCALES: scales})
    return known


def plan_of(x: Tensor, fmt: Format, rounding: str, amax_clamp: float, scale_layout: str, backend: str | None,
            config: Config | None) -> Plan | None:
    """Check the call and select its Plan; None where there is nothing to launch."""
    _check(x, fmt, rounding, amax_clamp, scale_layout)
    if x.numel() == 0:
        return None
    rows = x.numel() // x.shape[-1]
    matrices = rows // x.shape[-2]
    source = ScaledTensor(x, None, PLAIN[x.dtype])
    problem = Problem(
        "quantize", "dense", bucket(rows), 0, x.shape[-1], matrices if fmt.group[0] == 0 else 1,
        Operand(source.format, source.major), Operand(fmt, scale_dtype=fmt.scale,
                                                      scale_major="mn" if scale_layout == "mn_major" else "k"),
        rows=bucket(x.shape[-2]))
    return dispatch.select(problem, detect(x.device), backend, config)


def _check(x: Tensor, fmt: Format | str, rounding: str, amax_clamp: float, scale_layout: str) -> Format:
    expect(scale_layout in SCALE_LAYOUTS, "scale_layout", repr(scale_layout), f"one of {SCALE_LAYOUTS}")
    return reference.check_input(x, fmt, rounding, amax_clamp)


class Padded(NamedTuple):
    """MN-major scales whose columns are longer than they look."""

    stored: Empty
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def make(self) -> Tensor:
        return self.stored.make().as_strided(self.shape, self.strides)


def _outputs(x: Tensor, fmt: Format, scale_layout: str) -> tuple[Empty, Empty | Padded]:
    """What payload and scales are allocated with."""
    *lead, k = x.shape
    payload = empty_of((*lead, k // fmt.elem.per_byte), fmt.elem.dtype, x.device)
    dtype = fmt.scale_dtype
    *lead, rows, cols = shape = fmt.scale_shape(x.shape)
    if scale_layout == "row_major":
        return payload, empty_of(shape, dtype, x.device)
    stored = empty_of((*lead, cols, tma_aligned_rows(rows, dtype.itemsize)), dtype, x.device)
    strides = torch.empty(stored.shape, device="meta")[..., :rows].mT.stride()
    if stored.shape[-1] == rows:
        return payload, stored._replace(shape=tuple(shape), strides=strides)
    return payload, Padded(stored, tuple(shape), strides)


def _fill(plan: Plan | None, x: Tensor, fmt: Format, data: Tensor, scale: Tensor, rounding: str,
          amax_clamp: float, memo: Memo) -> None:
    at = scale.data_ptr()
    if again(memo, (x.data_ptr(), 0, data.data_ptr(), at, 0), data, at):
        return
    if plan is None:  # no payload, but a matrix without elements still has a scale
        scale.copy_(reference.quantize(x, fmt, rounding, amax_clamp).scale)  # type: ignore[arg-type]
        return
    operands = Operands(ScaledTensor(x.detach(), None, PLAIN[x.dtype]), ScaledTensor(data, scale, fmt), data, x.shape[-2], 0,
                        x.shape[-1], out_scale=scale, rounding=rounding, amax_clamp=amax_clamp, memo=memo)
    run(plan, operands)


def _traced(x: Tensor, fmt: Format | str, rounding: str, amax_clamp: float, scale_layout: str, backend: str | None,
            config: Config | None) -> ScaledTensor:
    expect(config is None, "config under torch.compile", "a Config", "None: a tuned table decides there")
    fmt = _check(x, fmt, rounding, amax_clamp, scale_layout)
    payload, scales = _outputs(x, fmt, scale_layout)
    data, scale = payload.make(), scales.make()
    torch.ops.narrowgemm.quantize(x.detach(), data, scale, fmt.name, rounding, amax_clamp, backend or "")
    return ScaledTensor(data, scale, fmt)


def _impl(x: Tensor, data: Tensor, scale: Tensor, fmt: str, rounding: str, amax_clamp: float, backend: str) -> None:
    form = get_format(fmt)
    layout = "row_major" if scale.is_contiguous() else "mn_major"
    plan, memo, payload, _ = _known(x, form, rounding, amax_clamp, layout, backend or None, None)
    # what is bound is bound to the strides of outputs that we allocate; a compiled graph allocates its own
    alike = data.stride() == payload.strides and scale.stride() == memo[SCALES].strides
    _fill(plan, x, form, data, scale, rounding, amax_clamp, memo if alike else {})


library.register("quantize", "Tensor x, Tensor(a!) data, Tensor(b!) scale, str fmt, str rounding, float amax_clamp, "
                 "str backend", _impl)
