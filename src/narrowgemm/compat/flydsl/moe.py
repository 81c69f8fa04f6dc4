"""FlyDSL's A16W4 stage 2: a factory of launchers over aiter's sorted layout and shuffled MXFP4 weights.

Definition: ROCm/FlyDSL pull request 431, `kernels/mixed_moe_gemm_2stage.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...errors import expect
from ...formats import MXFP4, ScaledTensor
from ...moe_sorting import MoeSorting, routed_from_moe_sorting
from ...ops.routed import routed_gemm
from ...prepack import PackedWeight, prepack
from ..aiter.shuffle import unshuffle_scale_a16w4, unshuffle_weight_a16w4
from ..notice import warn_once
from ..packed_copies import packed_copy
from .streams import on_stream

OUTPUTS = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
FOUR = tuple(d for d in (torch.uint8, torch.int8, getattr(torch, "float4_e2m1fn_x2", None)) if d is not None)
CODES = tuple(d for d in (torch.uint8, torch.int8, getattr(torch, "float8_e8m0fnu", None)) if d is not None)
_Stream = torch.Stream | int | None


@lru_cache(maxsize=128)
def compile_a16w4_moe_gemm2(*, model_dim: int, inter_dim: int, experts: int, topk: int, tile_m: int, tile_n: int, tile_k: int,
                            doweight_stage2: bool, out_dtype: str = "bf16", use_cshuffle_epilog: bool | None = None,
                            enable_bias: bool = False, model_dim_pad: int = 0, inter_dim_pad: int = 0, accumulate: bool = True,
                            waves_per_eu: int = 0, k_batch: int = 1) -> Callable[..., None]:
    """A launcher of the down projection: `weight * (a2[slot] @ w[expert].T + bias[expert])`, summed over a token's slots.

    `launch(out, a2, w, scale_w, sorted_token_ids, sorted_expert_ids, sorted_weights, num_valid_ids, bias, tokens, n, k,
    size_expert_ids, stream)` writes `out` and returns None. Tensors are contiguous, of these shapes or flattened:

    `a2` BF16 `[tokens * topk, inter_dim]`, row token * topk + slot; `w` MXFP4 `[experts, model_dim, inter_dim / 2]` in the order of
    `shuffle_weight_a16w4(w, 16, False)`; `scale_w` `[experts * model_dim, inter_dim / 32 up to a multiple of 8]` in that of
    `shuffle_scale_a16w4(scale, experts, False)`; `sorted_*` and `num_valid_ids` as `aiter.moe_sorting` gives them with
    block_size = tile_m; `bias` FP32 `[experts, model_dim]` with enable_bias, added once, before the weight. doweight_stage2: slots
    count by `sorted_weights`. `n`, `k`: model_dim and inter_dim. size_expert_ids: blocks, the length of sorted_expert_ids or less.

    accumulate: `out` `[tokens, model_dim]`, to which each token's sum is added, in a fixed order in FP32, rounded once; else `out`
    `[tokens * topk, model_dim]`, a row a slot, and rows that no block computes stay. model_dim_pad, inter_dim_pad: columns at the
    end that are padding: those of `out` stay, those of `a2` and `w` are not read. k_batch, tile_n, tile_k, use_cshuffle_epilog and
    waves_per_eu are checked as there and have no effect: the kernel cuts K itself.

    Weights are un-shuffled and packed at their first launch and kept (`packed_copies`). Raises ValueError or TypeError for what the
    source refuses and for tensors that don't fit.
    """
    for name, v in (("model_dim", model_dim), ("inter_dim", inter_dim), ("experts", experts), ("topk", topk), ("tile_m", tile_m),
                    ("tile_n", tile_n), ("tile_k", tile_k), ("k_batch", k_batch)):
        expect(isinstance(v, int) and not isinstance(v, bool), name, repr(v), "an integer", error=TypeError)
        expect(v >= 1, name, v, "at least 1")
    expect(out_dtype in OUTPUTS, "out_dtype", repr(out_dtype), f"one of {tuple(OUTPUTS)}")
    expect(tile_k * 2 % 64 == 0, "tile_k", tile_k, "a multiple of 32")
    expect(tile_m * tile_k * 2 % 256 == 0, "tile_m * tile_k", tile_m * tile_k, "a multiple of 128")
    expect(inter_dim % (k_batch * tile_k) == 0, "inter_dim", inter_dim, f"a multiple of k_batch * tile_k = {k_batch * tile_k}")
    steps = inter_dim // k_batch // tile_k
    expect(steps >= 2 and steps % 2 == 0, "tiles of K in a split", steps, "an even number, 2 or more")
    expect(model_dim % 32 == 0 and inter_dim % 128 == 0, "model_dim, inter_dim", (model_dim, inter_dim),
           "multiples of 32 and 128, which the shuffled order has")
    if out_dtype == "f32":
        expect(accumulate and not use_cshuffle_epilog, "out_dtype f32", f"accumulate={accumulate}, "
               f"use_cshuffle_epilog={use_cshuffle_epilog}", "accumulate=True without use_cshuffle_epilog")
    else:
        expect(use_cshuffle_epilog is None or use_cshuffle_epilog, f"use_cshuffle_epilog with out_dtype {out_dtype}",
               use_cshuffle_epilog, "None or True")
    expect(accumulate or tile_n % 64 == 0, "tile_n without accumulate", tile_n, "a multiple of 64")
    expect(0 <= model_dim_pad < model_dim, "model_dim_pad", model_dim_pad, f"in [0, {model_dim})")
    expect(0 <= inter_dim_pad < inter_dim and inter_dim_pad % 32 == 0, "inter_dim_pad", inter_dim_pad,
           f"a multiple of 32 in [0, {inter_dim})")
    if waves_per_eu:
        warn_once(f"waves_per_eu={waves_per_eu} has no effect: it is an occupancy hint to FlyDSL's compiler for AMD")
    spec = _Spec(model_dim, inter_dim, experts, topk, tile_m, doweight_stage2, OUTPUTS[out_dtype], enable_bias,
                 model_dim - model_dim_pad, inter_dim - inter_dim_pad, accumulate)

    def launch(out: Tensor, a2: Tensor, w: Tensor, scale_w: Tensor, sorted_token_ids: Tensor, sorted_expert_ids: Tensor,
               sorted_weights: Tensor | None, num_valid_ids: Tensor, bias: Tensor | None, tokens: int, n: int, k: int,
               size_expert_ids: int, stream: _Stream = None) -> None:
        with on_stream(stream, out.device):
            spec.launch(out, a2, w, scale_w, sorted_token_ids, sorted_expert_ids, sorted_weights, num_valid_ids, bias, tokens,
                        (n, k), size_expert_ids)

    return launch


@dataclass(frozen=True, slots=True)
class _Spec:
    """What the factory fixed. `n`, `k`: model_dim and inter_dim; `live_n`, `live_k`: without their padding."""

    n: int
    k: int
    experts: int
    top_k: int
    block_m: int
    weighted: bool
    dtype: torch.dtype
    biased: bool
    live_n: int
    live_k: int
    accumulate: bool

    def launch(self, out: Tensor, a2: Tensor, w: Tensor, scale_w: Tensor, ids: Tensor, expert_ids: Tensor, weights: Tensor | None,
               valid: Tensor, bias: Tensor | None, tokens: int, dims: tuple[int, int], blocks: int) -> None:
        expect(isinstance(tokens, int) and tokens >= 0, "tokens", repr(tokens), "a number of tokens")
        expect(dims == (self.n, self.k), "n, k of the launch", dims, f"the factory's, {(self.n, self.k)}")
        expect(isinstance(blocks, int) and blocks >= 0, "size_expert_ids", repr(blocks), "a number of blocks")
        slots = tokens * self.top_k
        y = _shaped("out", out, (tokens if self.accumulate else slots, self.n), (self.dtype,))[:, :self.live_n]
        a = _shaped("a2", a2, (slots, self.k), (torch.bfloat16,))[:, :self.live_k]
        if self.biased:
            expect(isinstance(bias, Tensor), "bias with enable_bias", type(bias).__name__, "a torch.Tensor", error=TypeError)
            assert bias is not None
            bias = _shaped("bias", bias, (self.experts, self.n), (torch.float32,))[:, :self.live_n].contiguous()
        packed = self.packed(w, scale_w)
        if not tokens:
            return
        if weights is None or not weights.numel():
            expect(not self.weighted, "sorted_weights with doweight_stage2", None, "FP32, one an entry of sorted_token_ids")
            weights = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        block = self.block_m
        blocks = min(blocks, expert_ids.numel(), -(-ids.numel() // block))
        entries = min(ids.numel(), blocks * block)
        sorting = MoeSorting(ids[:entries], weights[:entries], expert_ids[:blocks], valid, tokens, self.top_k, block)
        routed, slot_weights = routed_from_moe_sorting(sorting)
        added, by_slot = (bias if self.biased else None), (slot_weights if self.weighted else None)
        if self.accumulate:
            y += routed_gemm(a, packed, routed, bias=added, routing_weight=by_slot, combine=True, out_dtype=torch.float32)
        else:
            routed_gemm(a, packed, routed, bias=added, routing_weight=by_slot, out=y)

    def packed(self, w: Tensor, scale_w: Tensor) -> PackedWeight:
        columns = -(-self.k // 256) * 8
        data = _shaped("w", w, (self.experts, self.n, self.k // 2), FOUR)
        scale = _shaped("scale_w", scale_w, (self.experts * self.n, columns), CODES)

        def make() -> PackedWeight:
            plain = unshuffle_weight_a16w4(data.view(torch.uint8), 16, False)[:, :self.live_n, :self.live_k // 2]
            codes = unshuffle_scale_a16w4(scale.view(torch.uint8), self.experts, False).view(self.experts, self.n, columns)
            return prepack(ScaledTensor(plain.contiguous(), codes[:, :self.live_n, :self.live_k // 32].contiguous(), MXFP4))

        return packed_copy((w, scale_w), f"a16w4 {self.n} {self.k} {self.live_n} {self.live_k}", make)


def _shaped(name: str, t: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """The tensor, or the front of a flat one, as `shape`: a view."""
    expect(isinstance(t, Tensor), name, type(t).__name__, "a torch.Tensor", error=TypeError)
    expect(t.dtype in dtypes, f"{name}, dtype", t.dtype, " or ".join(map(str, dtypes)), error=TypeError)
    expect(t.is_contiguous(), f"{name}, strides", t.stride(), "contiguous")
    need = math.prod(shape)
    fits = tuple(t.shape) == shape or (t.dim() == 1 and t.numel() >= need)
    expect(fits, f"{name}, shape", tuple(t.shape), f"{shape}, or flat with {need} elements")
    return t if tuple(t.shape) == shape else t[:need].view(shape)
