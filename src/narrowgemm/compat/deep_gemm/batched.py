"""DeepGEMM's einsum names: products of a batch, of heads that have weights of their own (`bhr,hdr->bhd`).

Definition: deepseek-ai/DeepGEMM, `csrc/apis/einsum.hpp`. A batch is a masked layout whose groups are full, on views: no operand is
copied but in `bmk,bnk->mn`. `fp8_einsum` is always ours, as all FP8 names; `einsum`, BF16, where there is no real DeepGEMM.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import Unsupported, expect
from ...formats import BF16, ScaledTensor
from ...layouts import Masked
from ...ops.grouped import grouped_gemm
from ...scales import mn_major_tma_aligned
from . import bf16, state
from .operands import Pair, check_out, prepare, split, take_c

NAMES = ("einsum",)
SUM = "bmk,bnk->mn"
# expression -> (A's, B's, D's axes as [batch, M, K], [batch, N, K], [batch, M, N])
AXES = {
    "bhr,hdr->bhd": ((1, 0, 2), (0, 1, 2), (1, 0, 2)),
    "bhd,hdr->bhr": ((1, 0, 2), (0, 2, 1), (1, 0, 2)),
    "bhd,bhr->hdr": ((1, 2, 0), (1, 2, 0), (0, 1, 2)),
}
FULL = 2**30        # rows of a group: sizes are clamped to what there is
MANY = 512          # rows from which on scales are copied to where TMA loads them
PARTS = 64          # most pieces of a sum over a batch that are multiplied side by side

_full: dict[tuple[int, torch.device], Tensor] = {}      # graphs hold their addresses, so none is let go


def fp8_einsum(expr: str, a: Pair, b: Pair, d: Tensor, c: Tensor | None = None, recipe: Sequence[int] = (1, 128, 128)) -> None:
    """`d = c + einsum(expr, a, b)`, written in place, for FP8 pairs (payload, scales), scales in the payload's order of axes.

    `bhr,hdr->bhd`: `a` (`[B, H, R]`, scales `[B, H, R/128]`), `b` (`[H, D, R]`, scales `[H, D/128, R/128]`), `d` `[B, H, D]`.
    `bhd,hdr->bhr`: the same weights from their other side. `bhd,bhr->hdr`: their gradient, `recipe` (1, 1, 128), `a` (`[B, H, D]`,
    scales `[B/128, H, D]`), `b` (`[B, H, R]`, scales `[B/128, H, R]`). Upstream has these two on Blackwell only.
    `d` BF16, FP16 or FP32 with unit stride along its last axis; `c` like `d`, or None. `recipe`: rows of A, rows of B and
    columns of K that share a scale.

    Raises ValueError / TypeError for what doesn't fit, Unsupported for other expressions and recipes.
    """
    axes = _axes(expr, "fp8_einsum")
    (x, sx), (y, sy) = split(a, "a"), split(b, "b")
    for name, t in (("a", x), ("a, scales", sx), ("b", y), ("b, scales", sy), ("d", d)):
        _three(t, name)
    out = d.permute(axes[2])
    p, q = prepare((x.permute(axes[0]), sx.permute(axes[0])), (y.permute(axes[1]), sy.permute(axes[1])), out, (3, 3), tuple(recipe),
                   None, None)
    assert isinstance(q, ScaledTensor) and p.scale is not None
    if p.shape[1] >= MANY:
        p = ScaledTensor(p.data, mn_major_tma_aligned(p.scale), p.format)
    _products(p, q, out, c is not None and take_c(c, d))


def einsum(expr: str, a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None, use_cublaslt: bool = False) -> None:
    """`d = c + einsum(expr, a, b)`, written in place, for BF16 `a` and `b`, expressions as of `fp8_einsum`, or `bmk,bnk->mn`.

    `bmk,bnk->mn`: the sum over a batch of products, `a` `[B, M, K]`, `b` `[B, N, K]`, `d` `[M, N]`; one copy of `a` and of `b` is
    made. `use_cublaslt` has no effect. Raises as `fp8_einsum`.
    """
    for name, t in (("a", a), ("b", b)):
        bf16.operand(t, name, 3)
    if expr == SUM:
        _summed(a, b, d, c)
        return
    axes = _axes(expr, "einsum")
    _three(d, "d")
    out = d.permute(axes[2])
    p, q = bf16.prepare(a.permute(axes[0]), b.permute(axes[1]), out, (3, 3))
    _products(p, q, out, c is not None and take_c(c, d))


def _summed(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None) -> None:
    """`bmk,bnk->mn`: pieces of the batch as K of products in FP32, added up."""
    (batch, m, k), n = a.shape, b.shape[1]
    expect((batch, k) == (b.shape[0], b.shape[2]), f"a and b of {SUM}", f"{tuple(a.shape)} and {tuple(b.shape)}",
           "the same batch and K")
    expect(a.device == b.device, "b, device", b.device, f"a's, {a.device}")
    check_out(d, (m, n), a.device)
    accumulate = c is not None and take_c(c, d)
    parts = max((i for i in range(1, min(batch, PARTS) + 1) if batch % i == 0), default=1)
    each = batch // parts
    x, y = (ScaledTensor(t.unflatten(0, (parts, each)).transpose(1, 2).reshape(parts, t.shape[1], each * k), None, BF16)
            for t in (a, b))
    sums = torch.empty((parts, m, n), dtype=torch.float32, device=d.device)
    _products(x, y, sums, False)
    total = sums.sum(0)
    d.copy_(total.add_(d) if accumulate else total)


def _products(a: ScaledTensor, b: ScaledTensor, out: Tensor, accumulate: bool) -> None:
    """`out[i] (+)= a[i] @ b[i].T` for every i."""
    groups, rows, k = a.shape
    if state.settings.compile_mode and state.skips("masked", a, b, out, rows):
        return
    if k == 0 and not accumulate:
        out.zero_()
    elif k and out.numel():
        grouped_gemm(a, b, Masked(_all_rows(groups, out.device), rows), out=out, accumulate=accumulate, max_sms=state.max_sms(out))


def _all_rows(groups: int, device: torch.device) -> Tensor:
    """`masked_m` of groups that are full, kept; what is made while a graph is captured is only written when that graph runs."""
    known = _full.get((groups, device))
    if known is None:
        known = torch.full((groups,), FULL, dtype=torch.int32, device=device)
        if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            _full[groups, device] = known
    return known


def _axes(expr: str, name: str) -> tuple[tuple[int, ...], ...]:
    if expr not in AXES:
        raise Unsupported(f"{name} {expr!r}", ", ".join(AXES) + (f" or {SUM}" if name in NAMES else ""))
    return AXES[expr]


def _three(t: object, name: str) -> None:
    expect(isinstance(t, Tensor), name, type(t).__name__, "a torch.Tensor", error=TypeError)
    assert isinstance(t, Tensor)
    expect(t.dim() == 3, f"{name}, shape", tuple(t.shape), "three dimensions")
