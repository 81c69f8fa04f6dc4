"""`routed_gemm`, and products with packed weights, as ops of torch: what `torch.compile` sees of them.

A packed weight is passed as its tensors and what describes them; the op puts it together again and makes the eager call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import ScaledTensor, get_format
from ..layouts import Layout, Offsets, Routed, layout_of_rows
from ..prepack import PackedWeight
from ..problem import Config
from . import common, library

WEIGHT = ("Tensor b, Tensor? b_scale, Tensor? b_factor, Tensor? b_codes, Tensor? b_top, str b_format, SymInt[] b_shape, "
          "str b_pair, str b_prepack")
TAIL = "str backend, int max_sms, str on_unsupported"


def parts(b: PackedWeight | ScaledTensor) -> tuple[Any, ...]:
    """What `WEIGHT` says, of a weight."""
    if isinstance(b, PackedWeight):
        return b.data, b.scale, b.factor, b.codes, b.top, b.format.name, list(b.shape), b.pair, b.prepack
    return b.data, b.scale, None, None, None, b.format.name, [], "", ""


def weight(b: Tensor, b_scale: Tensor | None, b_factor: Tensor | None, b_codes: Tensor | None, b_top: Tensor | None, b_format: str,
           b_shape: list[int], b_pair: str, b_prepack: str) -> PackedWeight | ScaledTensor:
    """The weight that `parts` took apart."""
    if not b_prepack:
        return ScaledTensor(b, b_scale, get_format(b_format))
    assert b_scale is not None
    return PackedWeight(b, b_scale, get_format(b_format), tuple(b_shape), b_pair, b_factor, b_codes, b_prepack, b_top)


# ---------------------------------------------------------------- gemm and grouped_gemm with packed weights
def packed_gemm(a: ScaledTensor, b: PackedWeight, layout: Layout | None, out: Tensor | None, dtype: torch.dtype | None,
                accumulate: bool, zero_padding: bool, options: common.Options) -> Tensor:
    """`routed.packed_gemm` in a trace."""
    common.check_traced(options.config, out, accumulate)
    if out is None:
        out = torch.empty((*a.shape[:-1], b.n), dtype=dtype or torch.bfloat16, device=a.device)
    rows: tuple[Any, ...] = (None, "dense", 0, 1)
    if layout is not None:
        rows = (layout.index, layout.kind, layout.expected_m, layout.alignment)
    torch.ops.narrowgemm.packed_gemm(a.data, a.scale, a.format.name, *parts(b), *rows, out, accumulate, zero_padding,
                                     options.backend or "", options.max_sms, options.on_unsupported)
    return out


def _packed_impl(a: Tensor, a_scale: Tensor | None, a_format: str, b: Tensor, b_scale: Tensor | None, b_factor: Tensor | None,
                 b_codes: Tensor | None, b_top: Tensor | None, b_format: str, b_shape: list[int], b_pair: str, b_prepack: str,
                 index: Tensor | None, layout: str, expected_m: int, alignment: int, out: Tensor, accumulate: bool,
                 zero_padding: bool, backend: str, max_sms: int, on_unsupported: str) -> None:
    from .routed import packed_gemm as eager

    w = weight(b, b_scale, b_factor, b_codes, b_top, b_format, b_shape, b_pair, b_prepack)
    assert isinstance(w, PackedWeight)
    how = None if index is None else layout_of_rows(layout, index, alignment, expected_m)
    eager(ScaledTensor(a, a_scale, get_format(a_format)), w, how, out, None, accumulate,
          common.Options(backend or None, None, max_sms, None, on_unsupported), None, zero_padding)


# ---------------------------------------------------------------- routed_gemm
def routed_gemm(a: ScaledTensor, b: PackedWeight | ScaledTensor, layout: Routed | Offsets, row_map: Tensor | None, top_k: int,
                a_div: int, shape: tuple[int, int], out: Tensor | None, dtype: torch.dtype | None, backend: str | None,
                config: Config | None, max_sms: int, on_unsupported: str, **epilogue: Any) -> Tensor:
    """`routed.routed_gemm` in a trace; `shape`: of the output."""
    common.check_traced(config, out, False)
    if out is None:
        out = torch.empty(shape, dtype=dtype or torch.bfloat16, device=a.device)
    blocks: tuple[Any, ...] = (None, None, 0, 0)
    if isinstance(layout, Routed):
        blocks = (layout.expert_ids, layout.num_tokens_post_padded, layout.num_slots, layout.block_m)
    torch.ops.narrowgemm.routed_gemm(a.data, a.scale, a.format.name, *parts(b), layout.index, *blocks, row_map, top_k, a_div,
                                     epilogue["bias"], epilogue["activation"] or "", epilogue["alpha"], epilogue["limit"],
                                     epilogue["interleaved"], epilogue["routing_weight"], epilogue["combine"], epilogue["add"], out,
                                     epilogue["zero_padding"], backend or "", max_sms, on_unsupported)
    return out


def _routed_impl(a: Tensor, a_scale: Tensor | None, a_format: str, b: Tensor, b_scale: Tensor | None, b_factor: Tensor | None,
                 b_codes: Tensor | None, b_top: Tensor | None, b_format: str, b_shape: list[int], b_pair: str, b_prepack: str,
                 index: Tensor, expert_ids: Tensor | None, posted: Tensor | None, num_slots: int, block_m: int,
                 row_map: Tensor | None, top_k: int, a_div: int, bias: Tensor | None, activation: str, alpha: float,
                 limit: float, interleaved: bool, routing_weight: Tensor | None, combine: bool, add: Tensor | None, out: Tensor,
                 zero_padding: bool, backend: str, max_sms: int, on_unsupported: str) -> None:
    from .routed import routed_gemm as eager

    own: dict[str, Any] = {"row_map": row_map, "top_k": top_k, "a_div": a_div}
    layout: Routed | Offsets = Offsets(index)
    if expert_ids is not None and posted is not None:
        layout, own = Routed(index, expert_ids, posted, num_slots, top_k, block_m, a_div), {}
    eager(ScaledTensor(a, a_scale, get_format(a_format)),
          weight(b, b_scale, b_factor, b_codes, b_top, b_format, b_shape, b_pair, b_prepack), layout, bias=bias,
          activation=activation or None, alpha=alpha, limit=limit, interleaved=interleaved, routing_weight=routing_weight,
          combine=combine, add=add, out=out, zero_padding=zero_padding, backend=backend or None, max_sms=max_sms,
          on_unsupported=on_unsupported, **own)


library.register("packed_gemm", f"Tensor a, Tensor? a_scale, str a_format, {WEIGHT}, Tensor? index, str layout, int expected_m, "
                 f"int alignment, Tensor(a!) out, bool accumulate, bool zero_padding, {TAIL}", _packed_impl)
library.register("routed_gemm", f"Tensor a, Tensor? a_scale, str a_format, {WEIGHT}, Tensor index, Tensor? expert_ids, "
                 "Tensor? num_tokens_post_padded, SymInt num_slots, int block_m, Tensor? row_map, int top_k, int a_div, "
                 "Tensor? bias, str activation, float alpha, float limit, bool interleaved, Tensor? routing_weight, bool combine, "
                 f"Tensor? add, Tensor(a!) out, bool zero_padding, {TAIL}", _routed_impl)
