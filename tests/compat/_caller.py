"""What a DeepGEMM user's own test holds: cases with group sizes mean * U(0.7, 1.3), casts, and references from BF16.

Only DeepGEMM's names are used, and our gate. The shapes are those of DeepGEMM's tests, and small ones for the CPU.
"""

from __future__ import annotations

import random
from itertools import accumulate

import torch
from torch import Tensor

from narrowgemm.testing.numerics import KERNEL_GATE, calc_diff

LIMIT = 1e-3  # calc_diff of FP8 x FP8 against the BF16 product

DENSE_NK = [(2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
GROUPED_NK = [(6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048)]
DENSE = [(m, n, k) for m in (1, 128, 4096) for n, k in DENSE_NK]
CONTIGUOUS = [(g, m, n, k) for g, m in ((4, 8192), (8, 4096)) for n, k in GROUPED_NK]
MASKED = [(g, 4096, m, n, k) for g, m in ((32, 192), (6, 1024), (32, 20), (6, 20)) for n, k in GROUPED_NK]
K_GROUPED = [(4, 4096, 7168, 8192), (4, 7168, 2048, 8192), (8, 4096, 7168, 4096), (8, 7168, 2048, 4096),
             (16, 4096, 7168, 2048), (16, 7168, 2048, 2048)]


def group_sizes(groups: int, mean: int) -> list[int]:
    return [max(1, int(mean * random.uniform(0.7, 1.3))) for _ in range(groups)]


def randn(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def close(got: Tensor, want: Tensor) -> None:
    """`got`, in the dtype that it was computed in, passes the kernel gate."""
    assert calc_diff(got, want) <= KERNEL_GATE["fp32" if got.dtype == torch.float32 else "bf16"]


def each_block(dg, x: Tensor, use_ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """`[G, N, K]` weights, 128x128 blocks a group."""
    parts = [dg.per_block_cast_to_fp8(g, use_ue8m0=use_ue8m0) for g in x]
    return torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts])


def each_token(dg, x: Tensor, use_ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """`[G, M, K]` activations, 1x128 blocks."""
    g, m, k = x.shape
    payload, scale = dg.per_token_cast_to_fp8(x.reshape(g * m, k), use_ue8m0=use_ue8m0)
    return payload.view(g, m, k), scale.view(g, m, -1)


def dense(dg, m: int, n: int, k: int, device: str, *, accumulate: bool = False, out: torch.dtype = torch.bfloat16):
    """a, b, c, d, reference; with `accumulate` 1x128 scales on both sides (the weight gradient's form)."""
    a, b = randn(m, k, device=device), randn(n, k, device=device)
    d = torch.randn((m, n), device=device, dtype=out) * 32 if accumulate else a.new_empty((m, n), dtype=out)
    ref = (a.float() @ b.float().t() + (d.float() if accumulate else 0)).to(out)
    cast_b = dg.per_token_cast_to_fp8 if accumulate else dg.per_block_cast_to_fp8
    return (dg.per_token_cast_to_fp8(a, use_ue8m0=False), cast_b(b, use_ue8m0=False), d if accumulate else None, d, ref)


def contiguous(dg, groups: int, mean: int, n: int, k: int, device: str, *, psum: bool):
    """a, b, d, layout, reference with zero padding rows, real sizes and starts."""
    alignment = dg.get_mk_alignment_for_contiguous_layout()
    sizes = group_sizes(groups, mean)
    aligned = [dg.align(s, alignment) for s in sizes]
    starts = [0, *accumulate(aligned)][:-1]
    m = sum(aligned)
    a, b = randn(m, k, device=device), randn(groups, n, k, device=device)
    m_indices = torch.full((m,), -1, dtype=torch.int32)
    ref = torch.zeros((m, n), dtype=torch.bfloat16, device=device)
    for g, (start, size, full) in enumerate(zip(starts, sizes, aligned)):
        m_indices[start : start + size] = g
        a[start + size : start + full] = 0
        ref[start : start + size] = a[start : start + size] @ b[g].t()
    ends = torch.tensor([s + z for s, z in zip(starts, sizes)], dtype=torch.int32)
    d = torch.empty((m, n), dtype=torch.bfloat16, device=device)
    layout = (ends if psum else m_indices).to(device)
    return dg.per_token_cast_to_fp8(a, use_ue8m0=False), each_block(dg, b), d, layout, ref, sizes, starts


def masked(dg, groups: int, max_m: int, mean: int, n: int, k: int, device: str):
    """a, b, d, masked_m, reference."""
    a, b = randn(groups, max_m, k, device=device), randn(groups, n, k, device=device)
    ref = torch.bmm(a, b.mT)
    masked_m = torch.tensor([min(s, max_m) for s in group_sizes(groups, mean)], dtype=torch.int32, device=device)
    d = torch.empty((groups, max_m, n), dtype=torch.bfloat16, device=device)
    return each_token(dg, a), each_block(dg, b), d, masked_m, ref


def k_grouped(dg, groups: int, m: int, n: int, mean: int, device: str, *, k_major: bool, empty: bool):
    """a, b, c, d (which is c), reference, sizes; sizes are multiples of 128, one group without columns if `empty`."""
    ks = [dg.align(s, 128) for s in group_sizes(groups, mean)]
    if empty:
        ks[random.randrange(groups)] = 0
    a, b = randn(sum(ks), m, device=device), randn(sum(ks), n, device=device)
    c = torch.randn((groups, m, n), device=device) * 32
    ref = c.clone()
    for g, (end, k) in enumerate(zip(accumulate(ks), ks)):
        ref[g] += a[end - k : end].float().t() @ b[end - k : end].float()
    pairs = [dg.per_channel_cast_to_fp8(x, use_ue8m0=False) for x in (a, b)]
    if k_major:
        pairs = [(torch.cat([p.t().flatten() for p in x.split(ks)]), scale.t()) for x, scale in pairs]
    return *pairs, c, c, ref, ks
