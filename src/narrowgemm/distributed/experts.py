"""A `compute` for `ExpertParallel`: gate and up, SwiGLU, down, on the experts of one rank."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..formats import Format, ScaledTensor, get_format
from ..layouts import Offsets
from ..ops.activate import activate
from ..ops.grouped import grouped_gemm
from ..ops.quantize import quantize


def expert_mlp(gate_up: ScaledTensor | Tensor, down: ScaledTensor | Tensor, *, activations: Format | str = "fp8_1x128",
               max_sms: int = 0) -> Callable[[Tensor | ScaledTensor, Offsets], Tensor]:
    """`down(silu(gate) * up)` of each row by its expert. gate_up `[E, 2I, H]`, gate's rows first; down `[E, H, I]`.

    activations: what inputs of both products are quantised to, 'bf16' for as they are. max_sms: see `grouped_gemm`.
    Inference only. For training, `lambda rows, layout: mlp(rows, group_offs=layout.offsets)` of a `narrowgemm.nn.ExpertMLP`.
    """
    fmt = get_format(activations)

    def compute(rows: Tensor | ScaledTensor, layout: Offsets) -> Tensor:
        if fmt.scaled and isinstance(rows, Tensor):
            rows = quantize(rows, fmt, scale_layout="mn_major")
        h = grouped_gemm(rows, gate_up, layout, max_sms=max_sms)
        act = activate(h, layout=layout, fmt=fmt) if fmt.scaled else activate(h, layout=layout)
        return grouped_gemm(act, down, layout, max_sms=max_sms)

    return compute
