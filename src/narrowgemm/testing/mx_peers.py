"""triton_kernels (matmul_ogs) as a peer of products with MX weights, and what such peers share. Inert until asked for."""

from __future__ import annotations

import importlib
import weakref
from typing import Any

import torch
from torch import Tensor

from ..formats import MXFP4, ScaledTensor
from .case import Case
from .inputs import Inputs
from .peer import Prepared, import_error


def hopper(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0):
        return "is compared on NVIDIA compute capability 9.0"
    return None


def sorted_rows(case: Case) -> dict[int, slice]:
    """Each expert's rows of the offsets layout."""
    return {g: slice(start, start + n) for g, start, n in case.segments}


def tight(case: Case) -> bool:
    """Whether rows are sorted by expert with nothing between: by offsets, or contiguous with groups of whole blocks."""
    whole = all(n % case.alignment == 0 for n in case.group_sizes) and case.order == "sorted" and not case.slack
    return case.layout == "offsets" or (case.layout == "contiguous" and whole)


def bf16_rows(case: Case, inputs: Inputs) -> Tensor:
    """A in BF16, as libraries without narrow activations of these kinds take it; brought there once, outside the timing."""
    a = inputs.a.data if case.a.name == "bf16" else inputs.a.dequantize(torch.bfloat16)
    return a[: case.rows]


_swizzled: list[tuple[weakref.ref[Tensor], tuple[Any, Any]]] = []


def ogs_weights(b: ScaledTensor) -> tuple[Any, Any]:
    """MXFP4 `[E, N, K]` and its scales in the layouts that triton_kernels likes on this device. Kept while `b` lives: the cases of
    a suite share weights, and bringing 4 GB there takes longer than timing them."""
    _swizzled[:] = [(source, made) for source, made in _swizzled if source() is not None]
    for source, made in _swizzled:
        if source() is b.data:
            return made
    tensor = importlib.import_module("triton_kernels.tensor")
    layout = importlib.import_module("triton_kernels.tensor_details.layout")
    assert b.scale is not None
    value_layout, value_args = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
    scale_layout, scale_args = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8)
    w = tensor.convert_layout(tensor.wrap_torch_tensor(b.data.mT, dtype=tensor.FP4), value_layout, **value_args)
    scale = tensor.convert_layout(tensor.wrap_torch_tensor(b.scale.mT), scale_layout, **scale_args)
    _swizzled.append((weakref.ref(b.data), (w, scale)))
    return w, scale


class TritonKernels:
    """triton_kernels.matmul_ogs: BF16 x MXFP4, its fastest on Hopper, rows sorted by expert, its routing data made once."""

    name = "triton_kernels"

    def available(self, device: torch.device) -> str | None:
        return hopper(device) or import_error("triton_kernels.matmul_ogs")

    def supports(self, case: Case) -> str | None:
        if not tight(case) or case.b != MXFP4 or case.out_dtype != "bf16" or case.accumulate:
            return "is compared on MXFP4 weights, rows sorted by expert"
        return None if case.rows else "no rows"

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        ogs = importlib.import_module("triton_kernels.matmul_ogs")
        routing = importlib.import_module("triton_kernels.routing")
        w, scale = ogs_weights(inputs.b)
        hist = torch.tensor(case.group_sizes, dtype=torch.int32, device=inputs.device)
        data = routing.compute_expt_data(hist, case.groups, case.rows)
        routed = routing.RoutingData(None, hist, case.groups, 1, data)
        config = ogs.PrecisionConfig(weight_scale=scale)
        x = bf16_rows(case, inputs)
        result: list[Tensor] = []
        rows = sorted_rows(case)

        def run() -> None:
            result[:] = [ogs.matmul_ogs(x, w, None, routed, precision_config=config)]

        return Prepared(run, lambda g: result[0].view(-1, case.n)[rows[g]])
