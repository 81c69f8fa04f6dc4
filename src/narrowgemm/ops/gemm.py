"""`gemm`: the dense product."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..formats import ScaledTensor, get_format
from ..kernels.operands import Operands
from ..prepack import PackedWeight
from ..problem import Config, Plan
from ..runtime.launch import again, run
from . import common, library, validate_data
from .common import Options
from .plan_cache import Empty, PlanCache, empty_of
from .routed import packed_gemm

_plans = PlanCache()


def gemm(a: ScaledTensor | Tensor, b: ScaledTensor | PackedWeight | Tensor, *, out: Tensor | None = None,
         out_dtype: torch.dtype | None = None, accumulate: bool = False, fast_accum: bool = False, backend: str | None = None,
         config: Config | None = None, max_sms: int = 0, validate: str | None = None,
         on_unsupported: str = "portable", workspace: Tensor | None = None) -> Tensor:
    """`out [M, N] = A [M, K] . B [N, K]^T`, summed in FP32 and rounded once.

    a: `[M, K]`, b: `[N, K]`: `ScaledTensor`s (any FORMATS entry), or BF16 / FP16 / FP32 tensors. Shapes are logical: pass an
        operand that is stored `[K, N]` as its transpose, which is a view. b may be packed (`prepack`).
    out: `[M, N]` BF16 / FP16 / FP32 with contiguous rows, written in place; allocated with `out_dtype` (BF16) if None.
        It has memory of its own: an operand's is refused where the first call of a signature shows it.
    accumulate: add the product to what `out` holds.
    fast_accum: row-wise and tensor-wise FP8 only: leave the whole sum to the tensor core, which keeps about 14 bits of it on
        Hopper, instead of promoting it to FP32 every 512 elements of K.
    backend: use only this one ('triton', 'gluon_sm90', 'reference'), or the kernel of this name. config: use this Config.
    max_sms: use at most so many SMs; 0 means all.
    validate: 'sync' reads the scales back and raises if one is NaN (slow). on_unsupported: 'raise' refuses the portable kernels.
    workspace: uint8 scratch memory, at least `explain(...).plan.workspace_bytes` bytes, aligned to 16; allocated if None.

    Returns `out`. No gradient is recorded (`grouped_linear` records one). Empty operands are legal; K = 0 gives zeros. Raises
    TypeError (dtype, type) or ValueError (shape, device, stride, option) before anything is written, and Unsupported if no kernel
    computes the problem.

    Scale recipes follow DeepSeek-V3 (1x128 activations, 128x128 weights), OCP MX (1x32) and torch.scaled_mm (row, tensor).
    """
    if isinstance(b, PackedWeight):
        plain = b.plain
        if b.folded is not None and not torch.compiler.is_compiling():
            a = common.as_operand(a, "a")
            plain = b.plain_for(math.prod(a.shape[:-1]), backend is not None)
        if plain is None:
            return packed_gemm(a, b, None, out, out_dtype, accumulate,
                               Options(backend, config, max_sms, validate, on_unsupported, fast_accum), workspace)
        b = plain
    if type(a) is not ScaledTensor or type(b) is not ScaledTensor:
        a, b = common.as_operand(a, "a"), common.as_operand(b, "b")
    if torch.compiler.is_compiling():
        return _traced(a, b, out, out_dtype, accumulate, backend, config, max_sms, on_unsupported, fast_accum)
    dtype = common.out_dtype_of(out, out_dtype, torch.bfloat16)
    rest = dtype, accumulate, fast_accum, backend, config, max_sms, validate, on_unsupported
    known, addresses = _plans.recall(a, b, out, None, *rest)
    if known is None:
        known, addresses = _plans.look_up(a, b, out, None, rest, validate, partial(
            _first_call, a, b, out, dtype, accumulate, backend, config, max_sms, validate, on_unsupported, fast_accum))
    plan, memo, empty, sync = known
    if sync:
        validate_data.check_scales(a, b)
    if out is None:
        out = empty.make()
    if workspace is None and again(memo, addresses, out):
        return out
    if plan is not None:
        run(plan, Operands(a, b, out, a.shape[0], b.shape[0], a.shape[1], memo=memo), workspace)
    return out


def _first_call(a: ScaledTensor, b: ScaledTensor, out: Tensor | None, dtype: torch.dtype, accumulate: bool,
                *options: Any) -> tuple[Plan | None, Empty]:
    """What `PlanCache.look_up` asks for where a signature is new. options: those of `Options`, in their order."""
    return (plan_of(a, b, out, dtype, accumulate, Options(*options)), empty_of((a.shape[0], b.shape[0]), dtype, a.device))


def plan_of(a: ScaledTensor, b: ScaledTensor, out: Tensor | None, dtype: torch.dtype, accumulate: bool,
            options: Options) -> Plan | None:
    """Check the call and select its Plan; None where there is nothing to compute."""
    options.check()
    common.check_pair(a, b, "[M, K]", "[N, K]", 2, 2)
    shape = (a.shape[0], b.shape[0])
    common.check_flags(accumulate=accumulate)
    common.check_out(out, shape, dtype, a.device, accumulate, a, b)
    if 0 in shape:
        return None
    like = out if out is not None else torch.empty(shape, dtype=dtype, device="meta")
    return common.plan("gemm", "dense", a, b, like, shape[0], 1, shape[0], accumulate, True, options)


def _traced(a: ScaledTensor, b: ScaledTensor, out: Tensor | None, dtype: torch.dtype | None, accumulate: bool,
            backend: str | None, config: Config | None, max_sms: int, on_unsupported: str, fast_accum: bool) -> Tensor:
    common.check_traced(config, out, accumulate)
    if out is None:
        out = torch.empty((a.shape[0], b.shape[0]), dtype=dtype or torch.bfloat16, device=a.device)
    torch.ops.narrowgemm.gemm(a.data, a.scale, b.data, b.scale, a.format.name, b.format.name, out, accumulate,
                              backend or "", max_sms, on_unsupported, fast_accum)
    return out


def _impl(a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor | None, a_format: str, b_format: str, out: Tensor,
          accumulate: bool, backend: str, max_sms: int, on_unsupported: str, fast_accum: bool = False) -> None:
    gemm(ScaledTensor(a, a_scale, get_format(a_format)), ScaledTensor(b, b_scale, get_format(b_format)), out=out,
         accumulate=accumulate, fast_accum=fast_accum, backend=backend or None, max_sms=max_sms, on_unsupported=on_unsupported)


library.register("gemm", f"{library.OPERANDS}, Tensor(a!) out, {library.OPTIONS}", _impl)
