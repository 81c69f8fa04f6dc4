"""Peers for MXFP8 products: Triton's plain `dot_scaled`, dequantising to BF16 in every call, and DeepGEMM's FP8 blocks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..formats import MXFP4, MXFP8, FP8_1x128, FP8_128x128, ScaledTensor
from ..problem import Config
from .case import Case
from .guard import Guarded
from .inputs import Inputs, build
from .mx_peers import hopper, sorted_rows, tight
from .peer import Prepared, import_error

# aiter 3783's baseline: BLOCK 64/128/128 with 8 warps, whatever the rows
STOCK = Config(64, 128, 128, 8, 3, persistent=True)
TWIN_BYTES = 2e9        # weights that are made a second time, in another format


class DotScaled:
    """`tl.dot_scaled` in 64x128x128 tiles of 8 warps: the portable kernel held to the one config that the source compares with."""

    name = "dot_scaled"

    def available(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else "dot_scaled needs a GPU"

    def supports(self, case: Case) -> str | None:
        if case.b not in (MXFP4, MXFP8) or case.a.name not in ("bf16", "mxfp8", "mxfp4") or case.k % 128:
            return "is compared on MX weights with K in multiples of 128"
        return None if case.rows else "no rows"

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        own = Inputs(replace(case, packed=False), inputs.device, inputs.seed, inputs.a, inputs.b, inputs.layout,
                     Guarded(torch.empty_like(inputs.out.tensor), inputs.out.buffer, inputs.out.guard))
        y = own.out.tensor
        return Prepared(lambda: own.call(backend="triton.mx", config=STOCK), lambda g: own.rows(y, g))


class DequantBf16:
    """Both operands to BF16 in every call, one kernel each, then cuBLAS or torch.nn.functional.grouped_mm: what a stack without
    an MX kernel runs on weights that it keeps in MXFP8 or MXFP4."""

    name = "dequant_bf16"

    def available(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "dequant_bf16 needs a GPU"
        return None if hasattr(torch.nn.functional, "grouped_mm") else "this torch has no nn.functional.grouped_mm"

    def supports(self, case: Case) -> str | None:
        laid_out = case.layout == "dense" or tight(case)
        if case.a not in (MXFP8, MXFP4) or case.b not in (MXFP8, MXFP4) or not laid_out or case.accumulate or case.slack:
            return "is compared on MX operands, dense and with rows sorted by expert"
        return None if case.rows else "no rows"

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        from torch.nn.functional import grouped_mm

        a, b = (torch.empty(x.shape, dtype=torch.bfloat16, device=inputs.device) for x in (inputs.a, inputs.b))
        result: list[Tensor] = []
        ends = None
        if inputs.layout is not None:
            ends = torch.tensor(case.group_sizes, device=inputs.device).cumsum(0).to(torch.int32)

        def run() -> None:
            dequantize(inputs.a, a)
            dequantize(inputs.b, b)
            result[:] = [torch.mm(a, b.mT) if ends is None else grouped_mm(a, b.mT, offs=ends, out_dtype=torch.bfloat16)]

        rows = {0: slice(0, case.rows)} if ends is None else sorted_rows(case)
        return Prepared(run, lambda g: result[0][rows[g]])


def dequantize(x: ScaledTensor, out: Tensor) -> None:
    """MXFP8 or MXFP4 `[..., R, K]` into BF16 `out`, both contiguous."""
    from .mx_dequant_device import mx_to_bf16_kernel

    assert x.scale is not None
    per_row, blocks, each = x.shape[-1] // 32, out.numel() // 32, 128
    scale = x.scale if x.scale.dim() == 2 else x.scale.flatten(0, -2)
    mx_to_bf16_kernel[(-(-blocks // each),)](x.data, scale, out, blocks, scale.stride(0), scale.stride(1), per_row, BLOCKS=each,
                                           E2M1=x.format == MXFP4)


class DeepGemmBlock:
    """DeepGEMM's FP8 1x128 by 128x128 product of the same sources: what one byte a weight costs where scales are coarse."""

    name = "deepgemm_block"

    def available(self, device: torch.device) -> str | None:
        return hopper(device) or import_error("deep_gemm")

    def supports(self, case: Case) -> str | None:
        if (case.a, case.b) != (MXFP8, MXFP8):
            return "stands beside MXFP8 x MXFP8"
        if case.groups * case.n * case.k > TWIN_BYTES:
            return f"makes the weights a second time: up to {TWIN_BYTES:.0g} bytes"
        from .peers import DeepGemm

        return DeepGemm().supports(self.twin(case))

    @staticmethod
    def twin(case: Case) -> Case:
        return replace(case, a=FP8_1x128, b=FP8_128x128, packed=False)

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        from .peers import DeepGemm

        hollow = bool(inputs.weights_key) and inputs.weights_key[-1] is True
        twin = self.twin(case)
        made = DeepGemm().prepare(twin, build(twin, inputs.device, inputs.seed, hollow=hollow))
        return Prepared(made.run, made.rows, "recipe", 1e-3)
