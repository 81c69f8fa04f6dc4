"""DeepGEMM's k-grouped names, the weight gradient: one `[M, N]` product a group, over that group's part of K.

Definition: deepseek-ai/DeepGEMM, `csrc/apis/gemm.hpp`. The native op is `narrowgemm.grouped_gemm_wgrad`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import Unsupported, expect
from ...formats import ScaledTensor
from ...layouts import KGrouped
from ...ops.wgrad import grouped_gemm_wgrad
from ...runtime import env
from ...scales import mn_major_tma_aligned
from . import state
from .operands import Pair, check_options, check_out, operand, split, take_c, transposed

GRANULARITY = 128  # columns of K a scale; groups start at multiples of it, so a scale's index follows from its column


def k_grouped_fp8_gemm_nt_contiguous(a: Pair, b: Pair, d: Tensor, ks_cpu: Sequence[int] | Tensor | None,
                                     grouped_layout: Tensor, c: Tensor | None = None,
                                     recipe: Sequence[int] = (1, 1, 128), compiled_dims: str = "mn",
                                     use_psum_layout: bool = False) -> None:
    """`d[g] = c[g] + a_g @ b_g.T` for every group, written in place; a group without columns gives `c[g]`, or zero.

    `a`: (FP8, flat: `[M, k_g]` row-major of every group one after another, scales `[M, sum(k)/128]`), `b` the same with
    N; `d` `[G, M, N]` fp32 (bf16, fp16 too), contiguous; `c` like `d` or None (upstream needs it), `c is d`
    accumulates.
    `ks_cpu`: host list of the `k_g`, multiples of 128; `grouped_layout` int32 `[G]`: the same on the device.
    The flat form is re-laid to `[M, sum(k)]` by one copy of A and of B; the native op takes that form without copies.
    Raises ValueError / TypeError; Unsupported for `use_psum_layout` and other recipes, as upstream.
    """
    check_recipe(recipe, compiled_dims)
    if use_psum_layout:
        raise Unsupported("k_grouped_fp8_gemm_nt_contiguous with use_psum_layout", "k_grouped_fp8_gemm_tn_contiguous")
    groups, m, n = check_shape(d)
    ks = host_sizes(ks_cpu, groups)
    expect(ks is not None, "ks_cpu", ks_cpu, "the sizes of the groups along K, on the host")
    assert ks is not None
    offsets = group_offsets(grouped_layout, groups, ks)
    x, y = (restack(pair, name, rows, ks) for pair, name, rows in ((a, "a", m), (b, "b", n)))
    run(x, y, d, c, offsets)


def k_grouped_fp8_gemm_tn_contiguous(a: Pair, b: Pair, d: Tensor, ks_cpu: Sequence[int] | Tensor | None,
                                     grouped_layout: Tensor, c: Tensor | None = None,
                                     recipe: Sequence[int] = (1, 1, 128), compiled_dims: str = "mn",
                                     use_psum_layout: bool = False) -> None:
    """`d[g] = c[g] + a_g.T @ b_g` for every group, written in place.

    `a`: (FP8 `[sum(k), M]`, scales `[sum(k)/128, M]`), `b` the same with N; on Hopper the kernel turns both in a
    workspace (its tensor cores take FP8 with K contiguous), nothing else is copied. With `use_psum_layout`
    `grouped_layout` int32 `[G]` holds the end of each group along K, groups start at multiples of
    `get_mk_alignment_for_contiguous_layout()` (a multiple of 128 here), gaps hold zeros, and `ks_cpu` may be None or
    empty. The rest as `k_grouped_fp8_gemm_nt_contiguous`.
    """
    check_recipe(recipe, compiled_dims)
    groups, _, _ = check_shape(d)
    ks = host_sizes(ks_cpu, groups, exact=not use_psum_layout)
    x, y = (operand(transposed(pair, name), name, (1, GRANULARITY), 2) for pair, name in ((a, "a"), (b, "b")))
    total = x.data.shape[1]
    if use_psum_layout:
        alignment = state.settings.mk_alignment
        if alignment % GRANULARITY:
            raise Unsupported(f"k-grouped psum layout with alignment {alignment}",
                              f"set_mk_alignment_for_contiguous_layout with a multiple of {GRANULARITY}")
        check_sizes_tensor(grouped_layout, groups)
        ends = (grouped_layout + (alignment - 1)) // alignment * alignment
        offsets = torch.nn.functional.pad(ends.clamp(max=total), (1, 0)).to(torch.int32)
    else:
        expect(ks is not None, "ks_cpu without use_psum_layout", ks_cpu, "the sizes of the groups along K, on the host")
        assert ks is not None
        expect(sum(ks) == total, "sum of ks_cpu", sum(ks), f"the rows of a, {total}")
        offsets = group_offsets(grouped_layout, groups, ks)
    run(x, y, d, c, offsets)


def run(x: ScaledTensor, y: ScaledTensor, d: Tensor, c: Tensor | None, offsets: Tensor) -> None:
    (m, k), (n, k_b) = x.data.shape, y.data.shape
    expect(k == k_b, "K of a and b", f"{k} and {k_b}", "the same")
    check_out(d, (d.shape[0], m, n), x.data.device)
    expect(d.is_contiguous(), "d, strides", d.stride(), "contiguous")
    layout = KGrouped(offsets, GRANULARITY)
    # what Hopper's kernel takes: scales as TMA loads them, a copy of the scales where they aren't
    x, y = (ScaledTensor(t.data, None if t.scale is None else mn_major_tma_aligned(t.scale), t.format) for t in (x, y))
    accumulate = c is not None and take_c(c, d)
    if state.settings.compile_mode and state.skips("k_grouped", x, y, d):
        return
    if k == 0:
        if not accumulate:
            d.zero_()
        return
    grouped_gemm_wgrad(x, y, layout, out=d, accumulate=accumulate, max_sms=state.max_sms(d))


def check_recipe(recipe: Sequence[int], compiled_dims: str) -> None:
    check_options(compiled_dims, None)
    if tuple(recipe) != (1, 1, GRANULARITY):
        raise Unsupported(f"k-grouped recipe {tuple(recipe)}", f"(1, 1, {GRANULARITY})")


def check_shape(d: Tensor) -> tuple[int, int, int]:
    expect(isinstance(d, Tensor), "d", type(d).__name__, "a torch.Tensor", error=TypeError)
    expect(d.dim() == 3, "d, shape", tuple(d.shape), "[G, M, N]")
    g, m, n = d.shape
    return g, m, n


def host_sizes(ks: Sequence[int] | Tensor | None, groups: int, *, exact: bool = True) -> list[int] | None:
    """The group sizes as a list; None where there are none. A tensor on a device is refused: it would synchronise."""
    if ks is None:
        return None
    if isinstance(ks, Tensor):
        expect(ks.device.type == "cpu", "ks_cpu, device", ks.device, "a list, or a tensor on the CPU")
        ks = ks.tolist()
    many = hasattr(ks, "__iter__") and not isinstance(ks, str)
    expect(many, "ks_cpu", repr(ks), "a list of sizes, or a tensor on the CPU", error=TypeError)
    sizes = [int(k) for k in ks]
    if not sizes:
        return None if groups else []
    expect(len(sizes) == groups, "ks_cpu, length", len(sizes), f"the number of groups, {groups}")
    for g, k in enumerate(sizes):
        expect(k >= 0 and not (exact and k % GRANULARITY), f"ks_cpu[{g}]", k,
               f"a multiple of {GRANULARITY}, at least 0" if exact else "at least 0")
    return sizes


def check_sizes_tensor(grouped_layout: Tensor, groups: int) -> None:
    expect(isinstance(grouped_layout, Tensor), "grouped_layout", type(grouped_layout).__name__, "a torch.Tensor",
           error=TypeError)
    expect(grouped_layout.dtype == torch.int32, "grouped_layout, dtype", grouped_layout.dtype, "torch.int32",
           error=TypeError)
    expect(grouped_layout.dim() == 1 and grouped_layout.is_contiguous(), "grouped_layout, shape and strides",
           f"{tuple(grouped_layout.shape)} and {grouped_layout.stride()}", "one contiguous dimension")
    expect(grouped_layout.numel() == groups, "grouped_layout, length", grouped_layout.numel(),
           f"the number of groups, {groups}")


def group_offsets(grouped_layout: Tensor, groups: int, ks: list[int]) -> Tensor:
    """int32 `[G+1]` from the sizes on the device, so that no copy from the host waits; both lists must agree."""
    check_sizes_tensor(grouped_layout, groups)
    if grouped_layout.device.type == "cpu" or env.wants_sync():
        given = grouped_layout.tolist()
        expect(given == ks, "grouped_layout", given, f"ks_cpu, {ks}")
    return torch.nn.functional.pad(grouped_layout.cumsum(0, dtype=torch.int32), (1, 0))


def restack(pair: Pair, name: str, rows: int, ks: list[int]) -> ScaledTensor:
    """The flat K-major groups as one `[rows, sum(ks)]` operand: one concatenation, or a view where one group is all."""
    data, scale = split(pair, name)
    total = sum(ks)
    expect(data.is_contiguous(), f"{name}, strides", data.stride(), "contiguous")
    expect(data.numel() == rows * total, f"{name}, elements", data.numel(), f"rows x sum(ks_cpu) = {rows} x {total}")
    live = [k for k in ks if k]
    flat = data.view(-1).view(torch.uint8)
    parts = [part.view(rows, k) for part, k in zip(flat.split([rows * k for k in live]), live)] if live else []
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1) if parts else flat.view(rows, 0)
    return operand((whole.view(data.dtype), scale), name, (1, GRANULARITY), 2)
