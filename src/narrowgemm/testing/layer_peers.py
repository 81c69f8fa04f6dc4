"""Peers of a whole expert layer: DeepGEMM with Triton steps around it, a Triton fused MoE as vLLM's is built, triton_kernels.

The first two start where ours does, at tokens, weights and ids, and run everything that a call needs: sorting, padding, quantising.
Sorting is ours, in one launch for few slots, where they would run a CUDA kernel of their own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..formats import MXFP4, FP8_1x128, FP8_128x128, ScaledTensor
from ..kernels.triton.quantize import next_pow2
from ..ops.activate import activate
from ..ops.quantize import quantize
from ..ops.route import sort_by_expert
from ..reference.activate import OAI_ARGS
from .layer import LayerCase, LayerInputs
from .models import get_model
from .mx_peers import ogs_weights

LIMIT = 1e-3   # calc_diff of a peer: only another layer fails
MASKED_TOKENS = 256


class Padding:
    """Slots sorted by expert, each expert's rows from a multiple of `align` on.

    The buffers hold the rows that the case has, not the most that there can be: serving stacks know that number from what they
    exchanged, and it is the best that a padded layout can do.
    """

    def __init__(self, inputs: LayerInputs, align: int, by_block: bool) -> None:
        ids = inputs.topk_ids
        self.ids, self.experts, self.align, self.by_block = ids, inputs.case.groups, align, by_block
        slots = ids.numel()
        self.rows = max(align, sum(-(-n // align) * align for n in inputs.case.group_sizes))
        device = inputs.device
        self.slot = torch.empty(self.rows, dtype=torch.int32, device=device)
        self.group = torch.empty(self.rows // align if by_block else self.rows, dtype=torch.int32, device=device)
        self.row = torch.empty(slots, dtype=torch.int32, device=device)

    def __call__(self) -> None:
        from . import layer_peers_device as device

        routing = sort_by_expert(self.ids, self.experts)
        self.slot.fill_(-1)
        self.group.fill_(-1)
        self.row.fill_(-1)
        device.pad_kernel[(self.experts,)](routing.offsets, routing.row_map, self.slot, self.group, self.row, self.experts,
                                           ALIGN=self.align, EP=next_pow2(self.experts), BLOCK=256, BY_BLOCK=self.by_block,
                                           num_warps=4)


def sum_rows(y: Tensor, row: Tensor, weights: Tensor, out: Tensor, weighted: bool, slots: bool) -> None:
    from . import layer_peers_device as device

    tokens, n = out.shape
    device.gather_sum_kernel[(tokens, -(-n // 1024))](y, row, weights, out, tokens, n, TOP_K=weights.shape[1], BN=1024,
                                                      WEIGHT=weighted, SLOTS=slots, num_warps=4)


def triton_moe(inputs: LayerInputs) -> Callable[[], Tensor]:
    """quantise -> align -> fused GEMM (gathers) -> activation -> quantise -> fused GEMM (weighs) -> sum."""
    from . import layer_peers_device as device

    case, x, options = inputs.case, inputs.x, inputs.options
    tokens, top_k = inputs.topk_ids.shape
    per_expert = tokens * top_k / max(1, len(case.group_sizes) * case.ep)
    bm, bn, warps, stages = (16, 128, 4, 4) if per_expert <= 24 else (64, 128, 4, 3) if per_expert <= 256 \
        else (128, 128, 8, 3)
    padding = Padding(inputs, bm, True)
    h = torch.empty((tokens * top_k, 2 * case.n), dtype=torch.bfloat16, device=inputs.device)
    y = torch.empty((tokens * top_k, case.k), dtype=torch.bfloat16, device=inputs.device)
    out = torch.empty_like(x)
    weights = inputs.topk_weights

    def product(a: ScaledTensor, b: ScaledTensor, c: Tensor, div: int, weighted: bool) -> None:
        _, n, k = b.shape
        assert a.scale is not None and b.scale is not None
        device.fused_moe_kernel[(padding.rows // bm * -(-n // bn),)](
            a.data, a.scale, b.data, b.scale, c, weights, padding.slot, padding.group, tokens * top_k, padding.rows, n, k,
            a.data.stride(0), a.scale.stride(0), b.data.stride(0), b.data.stride(1), b.scale.stride(0), b.scale.stride(1),
            DIV=div, BM=bm, BN=bn, GROUP=1 if bm == 16 else 32, WEIGHT=weighted, num_warps=warps, num_stages=stages)

    def run() -> Tensor:
        padding()
        product(quantize(x, FP8_1x128), inputs.gate_up, h, top_k, False)
        act = activate(h, activation=options["activation"], interleaved=options["interleaved"])
        product(quantize(act, FP8_1x128), inputs.down, y, 1, True)
        sum_rows(y, padding.row, weights, out, False, True)
        return out

    return run


def deepgemm_layer(inputs: LayerInputs) -> Callable[[], Tensor]:
    """quantise -> pad -> scatter -> DeepGEMM -> activation with quantisation -> DeepGEMM -> weighted sum.

    Few tokens: its masked layout, where an expert has room for all of them; else its contiguous one, 128 rows aligned.
    """
    from . import layer_peers_device as device

    dg = importlib.import_module("deep_gemm")
    case, x, options = inputs.case, inputs.x, inputs.options
    tokens, top_k = inputs.topk_ids.shape
    masked = tokens <= MASKED_TOKENS
    room = -(-tokens // 64) * 64
    padding = Padding(inputs, 1 if masked else 128, False)
    groups, room = (case.groups, room) if masked else (1, padding.rows)
    rows, dev = groups * room, inputs.device
    x8, act8 = (padded(groups, room, k, dev) for k in (case.k, case.n))
    h = torch.zeros((rows, 2 * case.n), dtype=torch.bfloat16, device=dev)
    y = torch.zeros((rows, case.k), dtype=torch.bfloat16, device=dev)
    out, weights = torch.empty_like(x), inputs.topk_weights
    up, down = ((w.data, w.scale) for w in (inputs.gate_up, inputs.down))
    expected = max(1, -(-tokens * top_k // (case.groups * case.ep)))
    alpha, limit = OAI_ARGS if options["activation"] == "swiglu_oai" else (1.0, 0.0)

    def layout() -> tuple[Tensor, Tensor]:
        """(row of each slot, group sizes or the group of each row)."""
        if not masked:
            padding()
            return padding.row, padding.group
        routing = sort_by_expert(inputs.topk_ids, case.groups)
        slot_ids = inputs.topk_ids.flatten().long()
        here = (slot_ids >= 0) & (slot_ids < case.groups)
        at = routing.inverse - routing.offsets[slot_ids.clamp(0, case.groups - 1)]
        return torch.where(here, slot_ids * room + at, -1).to(torch.int32), routing.offsets.diff().to(torch.int32)

    def product(a: tuple[Tensor, Tensor], b: tuple[Any, ...], c: Tensor, index: Tensor) -> None:
        if masked:
            dg.m_grouped_fp8_gemm_nt_masked(a, b, c.view(groups, room, -1), index, expected)
        else:
            dg.m_grouped_fp8_gemm_nt_contiguous((a[0][0], a[1][0]), b, c, index)

    def run() -> Tensor:
        row, index = layout()
        q = quantize(x, FP8_1x128)
        blocks = case.k // 128
        device.scatter_kernel[(tokens, -(-case.k // 1024))](
            q.data, q.scale, row, x8[0], x8[1], tokens, case.k, blocks, TOP_K=top_k, BK=1024, SP=next_pow2(blocks),
            ROOM=room, num_warps=4)
        product(x8, up, h, index)
        device.activate_rows_kernel[(tokens * top_k, -(-case.n // 1024))](
            h, row, act8[0], act8[1], case.n, case.n // 128, 1e-4, alpha, limit, BLOCKS=8, ROOM=room,
            CLAMPED=options["activation"] == "swiglu_oai", INTERLEAVED=options["interleaved"], num_warps=4)
        product(act8, down, y, index)
        sum_rows(y, row, weights, out, True, False)
        return out

    return run


def padded(groups: int, room: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """FP8 `[G, room, K]` and MN-major FP32 scales `[G, room, K / 128]`; `room` a multiple of four."""
    return (torch.zeros((groups, room, k), dtype=torch.float8_e4m3fn, device=device),
            torch.zeros((groups, k // 128, room), device=device).mT)


def triton_kernels_layer(inputs: LayerInputs) -> Callable[[], Tensor]:
    """routing -> matmul_ogs with gather and SwiGLU -> matmul_ogs with weights and scatter, as vLLM serves gpt-oss."""
    ogs = importlib.import_module("triton_kernels.matmul_ogs")
    swiglu = importlib.import_module("triton_kernels.swiglu")
    routing = importlib.import_module("triton_kernels.routing")
    model, logits = get_model(inputs.case.model), inputs.logits
    (up, up_scale), (down, down_scale) = (ogs_weights(w) for w in (inputs.gate_up, inputs.down))
    up_config, down_config = (ogs.PrecisionConfig(weight_scale=s) for s in (up_scale, down_scale))
    act = ogs.FusedActivation(ogs.FnSpecs("swiglu", swiglu.swiglu_fn, ("alpha", "limit")), OAI_ARGS, 2)

    def run() -> Tensor:
        data, gather, scatter = routing.routing(logits, model.top_k)
        h = ogs.matmul_ogs(inputs.x, up, None, data, gather_indx=gather, precision_config=up_config, fused_activation=act)
        return ogs.matmul_ogs(h, down, None, data, scatter_indx=scatter, precision_config=down_config, gammas=data.gate_scal)

    return run


MAKERS: dict[str, Callable[[LayerInputs], Callable[[], Tensor]]] = {
    "deepgemm_layer": deepgemm_layer, "triton_moe": triton_moe, "triton_kernels_layer": triton_kernels_layer}
MODULES = {"deepgemm_layer": "deep_gemm", "triton_kernels_layer": "triton_kernels.matmul_ogs"}


def supports(name: str, case: LayerCase) -> str | None:
    """Why a peer does not compute a layer, or None."""
    if case.tokens == 0:
        return "no tokens"
    if name == "triton_kernels_layer":
        oss = case.b == MXFP4 and case.ep == 1 and case.model.startswith("gpt-oss")
        return None if oss else "is compared on gpt-oss with MXFP4 weights, all experts on one rank"
    return None if case.b == FP8_128x128 else f"block-scaled FP8 weights, not {case.b.name}"
