"""FP4 pairs of DeepGEMM's names: E2M1 payloads, int8 or int32, with a scale for 32 or 128 of K; and weights packed once.

    payload  int8 [.., R, K/2] (two a byte, low nibble first), int32 [.., R, K/8] (eight a word), or float4_e2m1fn_x2
    scales   int32 [.., R, ceil(K/128)] (four E8M0 codes of 32 of K a word), or one a block as float32 or E8M0 codes
             [.., R, ceil(K/32)]; blocks of 128 (`gran_k=128`): [.., R, ceil(K/128)], int32 [.., R, ceil(K/512)]

The FP4 branch passes int32 payloads through the `fp8` names too, with recipe (1, 1, 128) for 128 columns of K a word of scales.
Payloads are viewed, never copied. Scales become E8M0 codes of 32 of K: FP32 scales have to be powers of two.

A product with weights as they are runs on the portable kernel. On Hopper, weights that are packed once are several times faster:

    w = deep_gemm.prepack_fp4((payload, scales))       # at load time
    deep_gemm.m_grouped_fp8_fp4_gemm_nt_contiguous(a, w, d, m_indices)

Definition: the FP4 branch of DeepGEMM (`csrc/utils/math.hpp`, kPackedFP4), and deepseek-ai/DeepGEMM's `deep_gemm/utils/math.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import Unsupported, expect
from ...formats import MXFP4, ScaledTensor
from ...prepack import PackedWeight, prepack
from ...scales import unpack_ue8m0

X2 = getattr(torch, "float4_e2m1fn_x2", None)
FP4 = tuple(d for d in (torch.int8, torch.int32, X2) if d is not None)
Block = tuple[int, int]


def prepack_fp4(b: Sequence[Tensor], recipe_b: Sequence[int] | None = None, activations: str = "bf16") -> PackedWeight:
    """`b`, an FP4 pair `[N, K]` or `[G, N, K]`, in the order of the Hopper kernels: what every name here takes in its place.

    recipe_b: (1, 32) or (1, 128), where the scales' shape does not say. activations: 'fp8' where only FP8 1x128 ones will meet
    these weights, see `narrowgemm.prepack`. For load time: it reads the scales back. Raises what `narrowgemm.prepack` raises.
    """
    data = b[0] if isinstance(b, (tuple, list)) and len(b) == 2 else None
    expect(isinstance(data, Tensor) and data.dim() in (2, 3), "b", type(b).__name__,
           "a pair (payload, scales) of 2 or 3 dimensions", error=TypeError)
    assert data is not None
    expect(data.dtype in FP4, "b, payload dtype", data.dtype, " or ".join(map(str, FP4)), error=TypeError)
    expect(isinstance(b[1], Tensor), "b, scales", type(b[1]).__name__, "a torch.Tensor", error=TypeError)
    known = recipe_b is None or (isinstance(recipe_b, Sequence) and len(recipe_b) == 2)
    expect(known, "recipe_b", repr(recipe_b), "(1, 32) or (1, 128)", error=TypeError)
    block = None if recipe_b is None else (int(recipe_b[0]), int(recipe_b[1]))
    return prepack(operand(data, b[1], "b", block), activations=activations)


def operand(data: Tensor, scale: Tensor, name: str, block: Block | None) -> ScaledTensor:
    """An FP4 pair as an MXFP4 ScaledTensor."""
    if data.stride(-1) != 1 and data.shape[-1] > 1:
        raise Unsupported(f"{name}: FP4 packed along rows, strides {data.stride()}",
                          "pack it along K, once: deep_gemm.transpose_packed_fp4")
    if block is not None and block[0] != 1:
        raise Unsupported(f"{name}: scale blocks of {block[0]}x{block[1]} for FP4", "1x32 or 1x128")
    payload = data.view(torch.uint8)
    k = 2 * payload.shape[-1]
    cols = columns(scale, payload.shape, k, name, None if block is None else block[1], data.dtype == torch.int32)
    want = (*payload.shape[:-1], -(-k // cols))
    codes = _codes(scale, want)
    if cols == 128:
        codes = codes.repeat_interleave(4, -1)[..., : -(-k // 32)]
    return ScaledTensor(payload, codes, MXFP4)


def columns(scale: Tensor, shape: torch.Size, k: int, name: str, said: int | None, words: bool) -> int:
    """32 or 128 columns of K a scale: what the recipe says, where the shape agrees, else what the shape says.

    words: the payload is int32, so that 128 of a recipe are a word of four scales."""
    rows = tuple(shape[:-1])
    per = 4 if scale.dtype == torch.int32 else 1
    want = {c: -(-k // (c * per)) for c in (32, 128)}
    fits = [c for c in want if _matches(scale, (*rows, want[c]), packed=per == 4)]
    if said not in (None, 32, 128):
        raise Unsupported(f"{name}: scale blocks of 1x{said} for FP4", "1x32 or 1x128")
    if words and per == 4 and said == 128 and 32 in fits:
        return 32
    if fits and said in (None, *fits):
        return said or fits[0]
    raise ValueError(f"{name}, scales of an FP4 payload of {(*rows, k)}: got {tuple(scale.shape)} {scale.dtype}, expected "
                     f"[.., {rows[-1]}, {want[32]}] for 1x32 or [.., {rows[-1]}, {want[128]}] for 1x128"
                     + ("" if said is None else f"; the recipe says {said}"))


def _matches(scale: Tensor, want: tuple[int, ...], packed: bool) -> bool:
    got = tuple(scale.shape)
    return got == want or (not packed and got == (*want[:-2], want[-1], want[-2]))


def _codes(scale: Tensor, want: tuple[int, ...]) -> Tensor:
    """uint8 E8M0 codes of that shape, any strides."""
    from .scale_layout import exact_codes

    if scale.dtype == torch.int32:
        return unpack_ue8m0(scale, want[-1])
    if tuple(scale.shape) != want:
        scale = scale.mT
    return exact_codes(scale) if scale.dtype == torch.float32 else scale.view(torch.uint8)
