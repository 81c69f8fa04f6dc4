"""aiter's small-M MXFP8 products: what returns None where it can't run, and the raw ops below that raise.

Definition: ROCm/aiter pull request 3783, `ops/smallm_gemm_mxfp8.py`. There None also hides failures; here a failure raises, and a
None gives its reason, as a warning, once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...errors import Unsupported, expect
from ...formats import MXFP8, ScaledTensor, dtype_name
from ...layout_convert import offsets_from_routed
from ...layouts import Routed
from ...ops.explain import can_run
from ...ops.gemm import gemm
from ...ops.routed import routed_gemm
from ...prepack import PackedWeight, prepack
from ...runtime import env
from ..notice import warn_once
from ..packed_copies import packed_copy

GEMV_ROWS = 16          # of the raw GEMV; `mxfp8_gemv` takes any
PLAIN_K = 128           # in whose multiples weights do as well as they are as packed, or better
MANY_ROWS = 64          # an expert, from which sorting the slots anew pays: the kernel for many tokens takes offsets


def mxfp8_gemv(xq: Tensor, x_scale: Tensor, wq: Tensor | PackedWeight, w_scale: Tensor | None,
               out_dtype: torch.dtype = torch.bfloat16, *, backend: str | None = None) -> Tensor | None:
    """`x [M, K] . w [N, K]^T` as `[M, N]`, or None where no kernel made for it runs it here, with a warning that says why.

    xq, wq: E4M3 or its bytes; x_scale `[M, K/32]`, w_scale `[N, K/32]`: E8M0 codes. Any M, N and K a multiple of 32 (the source's
    envelope is M <= 64 and the tuned N, K). out_dtype: BF16, FP16 or FP32. wq may be a PackedWeight, with w_scale None. Weights
    stay as they are where K is a multiple of 128 and both sides start on 16 bytes; else they are packed at their first such call,
    and kept (`packed_copies`). backend: on this one, whatever `can_run` says of the others, on packed weights.

    `narrowgemm.can_run("gemm", m=M, n=N, k=K, a="mxfp8", b="mxfp8", packed=True)` tells beforehand. Raises ValueError or TypeError
    for input that is no such product.
    """
    try:
        return _gemv(xq, x_scale, wq, w_scale, out_dtype, backend)
    except Unsupported as refusal:
        if backend is not None:
            raise
        _declined("mxfp8_gemv", refusal)
        return None


def grouped_gemm_mxfp8(a_q: Tensor, a_scale: Tensor, w: Tensor | PackedWeight, w_scale: Tensor | None, sorted_token_ids: Tensor,
                       expert_ids: Tensor, num_tokens_post_padded: Tensor, num_valid_tokens: int, top_k: int, block_m: int,
                       out_dtype: torch.dtype, a_div: int, mul_weight_by: Tensor | None = None,
                       topk_ids: Tensor | None = None, *, backend: str | None = None) -> Tensor | None:
    """`out[slot] = a[slot // a_div] . w[expert of slot]^T`, times `mul_weight_by[slot]`, as `[num_valid_tokens, N]`; or None.

    a_q `[rows, K]`, w `[E, N, K]`: E4M3 or its bytes, with E8M0 codes `[rows, K/32]`, `[E, N, K/32]`. The three index tensors are
    int32, as vLLM's `moe_align_block_size` makes them: blocks of `block_m` slots of one expert, filled up with num_valid_tokens;
    an expert id out of range skips its block. Rows of slots that no block computes are zero. mul_weight_by: FP32, one a slot.
    Any a_div, block_m, E, N, any K in multiples of 32, weights of any size. topk_ids is not needed, and not read.

    None, backend, packed weights and errors: as `mxfp8_gemv`.
    """
    try:
        return _grouped(a_q, a_scale, w, w_scale, sorted_token_ids, expert_ids, num_tokens_post_padded, num_valid_tokens, top_k,
                        block_m, out_dtype, a_div, mul_weight_by, None, backend)
    except Unsupported as refusal:
        if backend is not None:
            raise
        _declined("grouped_gemm_mxfp8", refusal)
        return None


# ---------------------------------------------------------------- the raw ops
def smallm_mxfp8_gemv(Xq: Tensor, Xs: Tensor, Wq: Tensor | PackedWeight, Ws: Tensor | None, out_dtype: torch.dtype,
                      block_n: int = 8, *, backend: str | None = None) -> Tensor:
    """`mxfp8_gemv` for M up to 16, which raises Unsupported instead of returning None. block_n has no effect."""
    expect(isinstance(Xq, Tensor), "Xq", type(Xq).__name__, "a torch.Tensor", error=TypeError)
    expect(Xq.shape[0] <= GEMV_ROWS, "M of a GEMV", Xq.shape[0], f"M<={GEMV_ROWS}")
    return _gemv(Xq, Xs, Wq, Ws, out_dtype, backend)


def smallm_mxfp8_mfma(Xq: Tensor, Xs: Tensor, Wq: Tensor | PackedWeight, Ws: Tensor | None, out_dtype: torch.dtype,
                      n_sub: int = 1, k_splits: int = 1, *, backend: str | None = None) -> Tensor:
    """`mxfp8_gemv` that raises Unsupported instead of returning None. n_sub and k_splits have no effect."""
    return _gemv(Xq, Xs, Wq, Ws, out_dtype, backend)


def smallm_mxfp8_moe_grouped_gemm(a_q: Tensor, a_scale: Tensor, w: Tensor | PackedWeight, w_scale: Tensor | None,
                                  sorted_token_ids: Tensor, expert_ids: Tensor, num_tokens_post_padded: Tensor, out: Tensor,
                                  E: int, N: int, K: int, num_valid_tokens: int, M_act: int, a_div: int, block_m: int,
                                  mul_weight_by: Tensor | None = None, block_n: int = 8, *, backend: str | None = None) -> None:
    """`grouped_gemm_mxfp8` into `out` `[num_valid_tokens or more, N]`, whose rows no block computes stay; raises Unsupported
    instead of returning None. E, N, K, M_act: the operands' sizes. block_n has no effect."""
    shape = tuple(w.shape)
    expect(shape == (E, N, K), "E, N, K", (E, N, K), f"the weights', {shape}")
    expect(a_q.shape[0] == M_act, "M_act", M_act, f"the rows of a_q, {a_q.shape[0]}")
    fits = out.dim() == 2 and out.shape[0] >= num_valid_tokens and out.shape[1] == N
    expect(fits, "out has", tuple(out.shape), f"{num_valid_tokens} rows or more of {N}")
    _grouped(a_q, a_scale, w, w_scale, sorted_token_ids, expert_ids, num_tokens_post_padded, num_valid_tokens, a_div, block_m,
             out.dtype, a_div, mul_weight_by, out[:num_valid_tokens], backend)


# ---------------------------------------------------------------- both
def _gemv(xq: Tensor, x_scale: Tensor, wq: Tensor | PackedWeight, w_scale: Tensor | None, out_dtype: torch.dtype,
          backend: str | None) -> Tensor:
    x = operand(xq, x_scale, "xq", 2)
    check_weight(wq, w_scale, x.shape[-1], 2)
    m, n, k = x.shape[0], wq.shape[-2], x.shape[-1]
    if m and n and backend is None:
        asked = ("gemm", "dense", 1, m, n, k, dtype_name(out_dtype), x.device, env.choice())
        if isinstance(wq, PackedWeight) and wq.plain is not None:
            _allow(*asked, packed="mxfp8")
            return gemm(x, wq, out_dtype=out_dtype)
        as_it_is = k % PLAIN_K == 0 and isinstance(wq, Tensor) and _on_16_bytes(xq, wq)
        if as_it_is and _can_run(*asked, packed=False)[0]:
            assert isinstance(wq, Tensor)
            return gemm(x, operand(wq, w_scale, "weights", 2), out_dtype=out_dtype)
        _allow(*asked)
    return gemm(x, weight(wq, w_scale), out_dtype=out_dtype, backend=backend)


def _grouped(a_q: Tensor, a_scale: Tensor, w: Tensor | PackedWeight, w_scale: Tensor | None, sorted_token_ids: Tensor,
             expert_ids: Tensor, num_tokens_post_padded: Tensor, num_valid_tokens: int, top_k: int, block_m: int,
             out_dtype: torch.dtype, a_div: int, mul_weight_by: Tensor | None, out: Tensor | None, backend: str | None) -> Tensor:
    a = operand(a_q, a_scale, "a_q", 2)
    check_weight(w, w_scale, a.shape[-1], 3)
    layout = Routed(sorted_token_ids, expert_ids, num_tokens_post_padded, num_valid_tokens, top_k, block_m, a_div)
    e, n, k = tuple(w.shape)
    many = num_valid_tokens >= MANY_ROWS * max(1, e)
    if num_valid_tokens and n and backend is None:
        _allow("routed_gemm", "offsets" if many else "routed", e, num_valid_tokens, n, k, dtype_name(out_dtype), a.device,
               env.choice())
    if not many:
        return routed_gemm(a, weight(w, w_scale), layout, routing_weight=mul_weight_by, out=out, out_dtype=out_dtype,
                           zero_padding=out is None, backend=backend)
    offsets, row_map = offsets_from_routed(layout, e)
    return routed_gemm(a, weight(w, w_scale), offsets, row_map=row_map, top_k=top_k, a_div=a_div, routing_weight=mul_weight_by,
                       out=out, out_dtype=out_dtype, zero_padding=out is None, backend=backend)


def _allow(*asked: Any, packed: bool | str = True) -> None:
    """Unsupported, with the reason, where `can_run` says no of packed weights."""
    ok, reason = _can_run(*asked, packed=packed)
    if not ok:
        raise Unsupported(reason)


@lru_cache(maxsize=4096)
def _can_run(op: str, layout: str, groups: int, m: int, n: int, k: int, out_dtype: str, device: torch.device,
             choice: tuple[Any, ...], packed: bool | str) -> tuple[bool, str]:
    """`choice`: the variables that it depends on."""
    return can_run(op, layout=layout, groups=groups, m=m, n=n, k=k, a=MXFP8, b=MXFP8, out_dtype=out_dtype, packed=packed,
                   device=device)


def _on_16_bytes(*given: Tensor) -> bool:
    """What TMA takes; what is not contiguous is copied, to where it is."""
    return not any(t.is_contiguous() and t.data_ptr() % 16 for t in given)


def _declined(name: str, refusal: Unsupported) -> None:
    warn_once(f"{name} returned None: {refusal}")


def operand(data: Tensor, scale: Any, name: str, dims: int) -> ScaledTensor:
    """Payload `[..., K]` and row-major codes `[..., K/32]` as a ScaledTensor, contiguous."""
    expect(isinstance(data, Tensor), name, type(data).__name__, "a torch.Tensor", error=TypeError)
    expect(isinstance(scale, Tensor), f"scales of {name}", type(scale).__name__, "a torch.Tensor", error=TypeError)
    expect(data.dim() == dims, f"{name}, shape", tuple(data.shape), f"{dims} dimensions")
    expect(data.shape[-1] % 32 == 0, f"K of {name}", data.shape[-1], "a multiple of 32")
    return ScaledTensor.make(data.contiguous(), scale.contiguous(), MXFP8, scale_layout="row_major")


def check_weight(w: Tensor | PackedWeight, scale: Tensor | None, k: int, dims: int) -> None:
    if isinstance(w, PackedWeight):
        expect(scale is None, "scales of a PackedWeight", type(scale).__name__, "None: it has its own")
        expect(w.format == MXFP8, "format of the weights", w.format.name, "mxfp8")
    else:
        expect(isinstance(w, Tensor), "weights", type(w).__name__, "a torch.Tensor or a PackedWeight", error=TypeError)
    expect(len(w.shape) == dims, "weights, shape", tuple(w.shape), "[E, N, K]" if dims == 3 else "[N, K]")
    expect(w.shape[-1] == k, "K of the weights", w.shape[-1], f"that of the activations, {k}")


def weight(w: Tensor | PackedWeight, scale: Tensor | None) -> PackedWeight:
    """The weights, packed: as they came, or from an earlier call, or now."""
    if isinstance(w, PackedWeight):
        return w
    expect(isinstance(scale, Tensor), "scales of the weights", type(scale).__name__, "a torch.Tensor", error=TypeError)
    assert scale is not None
    return packed_copy((w, scale), MXFP8.name, lambda: prepack(operand(w, scale, "weights", w.dim())))
