"""Peers for products with MX weights: triton_kernels (matmul_ogs) and Humming. See `peers.py`; inert until asked for."""

from __future__ import annotations

import importlib
import weakref
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formats import MXFP4, MXFP8, ScaledTensor
from .case import Case
from .inputs import Inputs
from .peer import Prepared


@lru_cache(maxsize=4)
def import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except (ImportError, OSError, AssertionError, RuntimeError) as e:
        return f"{module} can't be imported: {e}"
    return None


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


class Humming:
    """Humming's layer over the same payload and scales, with BF16 activations (W4A16, W8A16)."""

    name = "humming"
    BLOCK = 256

    def available(self, device: torch.device) -> str | None:
        return hopper(device) or import_error("humming.layer")

    def supports(self, case: Case) -> str | None:
        laid_out = tight(case) or case.layout == "dense"
        if not laid_out or case.b not in (MXFP4, MXFP8) or case.out_dtype != "bf16" or case.accumulate:
            return "is compared on MXFP4 and MXFP8 weights, dense and with rows sorted by expert"
        return None if case.rows else "no rows"

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        humming = importlib.import_module("humming.layer")
        config = importlib.import_module("humming.config")
        b, experts = inputs.b, None if case.layout == "dense" else case.groups
        assert b.scale is not None
        # its tiles want N and K in blocks: a user pads the weights once, and K of the activations outside the product
        n, k = (-(-x // self.BLOCK) * self.BLOCK for x in (case.n, case.k))
        per_byte, element = case.b.elem.per_byte, "float4e2m1" if case.b == MXFP4 else "float8e4m3"
        data = pad(b.data.view(torch.uint8), (0, (k - case.k) // per_byte, 0, n - case.n))
        scale = pad(b.scale, (0, k // 32 - b.scale.shape[-1], 0, n - case.n), value=127)
        layer: Any = humming.HummingLayer(
            shape_n=n, shape_k=k, num_experts=experts, torch_dtype=torch.bfloat16,
            weight_config={"dtype": element, "group_size": 32, "scale_dtype": "float8e8m0"})
        layer = layer.to(inputs.device)
        layer.load_from_tensors({"weight": data.view(torch.int32), "weight_scale": scale.view(torch.float8_e8m0fnu)})
        layer.transform()
        kind = config.GemmType.DENSE if experts is None else config.GemmType.GROUPED_CONTIGUOUS
        tuning = humming.HummingLayerMethod.get_default_tuning_configs(layer, gemm_type=kind)
        options: dict[str, Any] = {"compute_config": {"gemm_type": kind.value}, "tuning_config": tuning}
        if experts is not None:
            options["expert_layout"] = torch.tensor((0, *case.group_sizes), device=inputs.device).cumsum(0).to(torch.int32)
        # activations in BF16, which is what the library does fastest for few rows
        x = pad(bf16_rows(case, inputs), (0, k - case.k)).contiguous()
        y = torch.full((case.rows, n), float("nan"), dtype=torch.bfloat16, device=inputs.device)
        rows = sorted_rows(case) if experts is not None else {0: slice(0, case.rows)}
        return Prepared(lambda: layer(x, outputs=y, **options), lambda g: y[rows[g], : case.n])
