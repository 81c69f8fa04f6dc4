"""`routed_gemm` in plain torch: the definition, in FP32 over the dequantised operands. Reads the layout on the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formats import ScaledTensor
from ..problem import Problem
from .gemm import product
from .grouped import rows_of_groups, take_rows

if TYPE_CHECKING:
    from ..kernels.operands import Operands

ALPHA, LIMIT = 1.702, 7.0        # GPT-OSS's


def slots_of_experts(kind: str, index: Tensor | None, s: Operands, groups: int) -> Iterator[tuple[int, Tensor]]:
    """(expert, its slots int64), perhaps in several parts. Slots and experts out of range are left out."""
    if kind == "routed":
        assert s.slots is not None and s.experts is not None and s.posted is not None
        posted = min(int(s.posted[0]), s.positions)
        for i, e in enumerate(s.experts.tolist()):
            if i * s.block_m >= posted:
                return
            if 0 <= e < groups:
                yield e, _inside(s.slots[i * s.block_m: min((i + 1) * s.block_m, posted)], s.num_slots)
        return
    assert index is not None
    for g, rows in rows_of_groups(kind, index, s.positions, groups):
        yield g, _inside(rows if s.slots is None else s.slots[rows], s.num_slots)


def _inside(slots: Tensor, num_slots: int) -> Tensor:
    slots = slots.long()
    return slots[(slots >= 0) & (slots < num_slots)]


def activate(y: Tensor, activation: str, args: tuple[float, ...], interleaved: bool) -> Tensor:
    """`[R, N]` gate and up to `[R, N/2]`. swiglu: silu(gate) * up; swiglu_oai (alpha, limit): GPT-OSS's, clamped, up + 1."""
    gate, up = (y[:, 0::2], y[:, 1::2]) if interleaved else y.chunk(2, dim=-1)
    if activation == "swiglu":
        return gate * torch.sigmoid(gate) * up
    alpha, limit = args
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def routed_gemm(s: Operands, b: ScaledTensor, problem: Problem) -> Tensor:
    """See `ops.routed.routed_gemm`. b `[G, N, K]` with rows in their logical order, in place of the operands' own."""
    a, out, index, e = s.a, s.out, s.index, problem.epilogue
    n = b.shape[-2] // 2 if e.activation else b.shape[-2]
    rows = torch.zeros((s.num_slots, n), dtype=torch.float32, device=out.device) if e.combine else out
    for g, slots in slots_of_experts(problem.layout, index, s, b.shape[0]):
        y = product(take_rows(a, slots // problem.a_div), b[g])
        if s.bias is not None:
            y = y + s.bias[g].float()
        if e.activation:
            y = activate(y, e.activation, e.activation_args, e.interleaved)
        if s.weight is not None:
            y = y * s.weight.reshape(-1)[slots, None]
        rows[slots] = y.to(rows.dtype)
    if e.combine:
        total = torch.zeros((s.num_slots // s.top_k, n), dtype=torch.float32, device=out.device)
        for j in range(s.top_k):        # in order: a fixed sum
            total = total + rows[j::s.top_k]
        if s.add is not None:
            total = total + s.add.float()
        out.copy_(total)
    return out
