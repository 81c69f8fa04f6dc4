"""`deep_gemm.utils.math`: sizes, and the casts that DeepGEMM's users and tests quantise with, bit for bit.

Definitions: DeepGEMM's `deep_gemm/utils/math.py`. A block's scale is max(amax, 1e-4) over the largest value of the
element (448 for E4M3, 6 for E2M1), rounded up to a power of two with `use_ue8m0`; the payload is x times the reciprocal
of the scale. `narrowgemm.quantize` is the native and fast way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....errors import expect
from ....formats import ELEMENTS

__all__ = [
    "align", "cast_back_from_fp4", "ceil_div", "ceil_to_ue8m0", "pack_ue8m0_to_int", "per_block_cast_to_fp8",
    "per_channel_cast_to_fp8", "per_custom_dims_cast_to_fp8", "per_token_cast_to_fp4", "per_token_cast_to_fp8",
    "transpose_packed_fp4", "unpack_ue8m0_from_int",
]

AMAX_MIN = 1e-4
E4M3_MAX, E2M1_MAX = ELEMENTS["e4m3"].max, ELEMENTS["e2m1"].max
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # halfway between neighbours


def ceil_div(x: int, y: int) -> int:
    """The quotient rounded up."""
    return -(-x // y)


def align(x: int, y: int) -> int:
    """The least multiple of `y` that is at least `x`."""
    return ceil_div(x, y) * y


def ceil_to_ue8m0(x: Tensor) -> Tensor:
    """|x| rounded up to a power of two, float32, between 2^-126 and 2^127."""
    bits = x.abs().float().view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x007FFFFF) != 0)
    return (exponent.clamp(1, 254) << 23).view(torch.float32)


def pack_ue8m0_to_int(x: Tensor) -> Tensor:
    """float32 powers of two or zeros `[.., S]`, S a multiple of 4, to int32 `[.., S/4]` of E8M0 codes, low byte first.

    Raises TypeError / ValueError for other dtypes, lengths and values; reads the values, so it waits for the device.
    """
    expect(x.dtype == torch.float32, "scales to pack, dtype", x.dtype, "torch.float32", error=TypeError)
    expect(x.shape[-1] % 4 == 0, "scales to pack, last dimension", x.shape[-1], "a multiple of 4")
    bits = x.contiguous().view(torch.int32)
    expect(bool(((bits >= 0) & ((bits & 0x007FFFFF) == 0)).all()), "scales to pack", "values that are no powers of two",
           "non-negative powers of two, as use_ue8m0=True gives")
    return (bits >> 23).to(torch.uint8).view(torch.int32)


def unpack_ue8m0_from_int(packed_sf: Tensor) -> Tensor:
    """int32 `[.., S/4]` of E8M0 codes to float32 `[.., S]`; code 0 gives 0."""
    codes = packed_sf.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return (codes.to(torch.int32) << 23).view(torch.float32)


def per_token_cast_to_fp8(x: Tensor, use_ue8m0: bool, gran_k: int = 128,
                          use_packed_ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """`x` `[M, K]` to E4M3 `[M, K]` and float32 scales `[M, ceil(K / gran_k)]`, or packed int32 `[M, that / 4]`."""
    m, k = _numbers(x)
    count = ceil_div(k, gran_k)
    blocks = _pad(x, m, count * gran_k).view(m, count, gran_k)
    scale = _scale(blocks, (2,), E4M3_MAX, use_ue8m0)
    payload = (blocks * (1.0 / scale)).to(torch.float8_e4m3fn).view(m, count * gran_k)[:, :k].contiguous()
    scale = scale.view(m, count)
    return payload, pack_ue8m0_to_int(scale) if use_packed_ue8m0 else scale


def per_channel_cast_to_fp8(x: Tensor, use_ue8m0: bool, gran_k: int = 128) -> tuple[Tensor, Tensor]:
    """`x` `[K, N]`, K a multiple of `gran_k`, to E4M3 `[K, N]` and scales `[K / gran_k, N]`: blocks along columns."""
    k, n = _numbers(x)
    expect(k % gran_k == 0, "rows of x", k, f"a multiple of gran_k, {gran_k}")
    blocks = x.reshape(k // gran_k, gran_k, n)
    scale = _scale(blocks, (1,), E4M3_MAX, use_ue8m0)
    return (blocks * (1.0 / scale)).to(torch.float8_e4m3fn).view(k, n), scale.view(k // gran_k, n)


def per_block_cast_to_fp8(x: Tensor, use_ue8m0: bool, gran_k: int = 128) -> tuple[Tensor, Tensor]:
    """`x` `[N, K]` to E4M3 `[N, K]` and scales `[ceil(N / gran_k), ceil(K / gran_k)]`: square blocks."""
    n, k = _numbers(x)
    rows, cols = ceil_div(n, gran_k), ceil_div(k, gran_k)
    blocks = _pad(x, rows * gran_k, cols * gran_k).view(rows, gran_k, cols, gran_k)
    scale = _scale(blocks, (1, 3), E4M3_MAX, use_ue8m0)
    payload = (blocks * (1.0 / scale)).to(torch.float8_e4m3fn).view(rows * gran_k, cols * gran_k)[:n, :k].contiguous()
    return payload, scale.view(rows, cols)


def per_custom_dims_cast_to_fp8(x: Tensor, dims: Sequence[int], use_ue8m0: bool) -> tuple[Tensor, Tensor]:
    """`x` to E4M3 with one scale for each index of `dims`; the scales keep those dimensions, without ones of size 1."""
    reduced = tuple(i for i in range(x.dim()) if i not in set(dims))
    scale = _scale(x, reduced, E4M3_MAX, use_ue8m0)
    return (x * (1.0 / scale)).to(torch.float8_e4m3fn), scale.squeeze()


def per_token_cast_to_fp4(x: Tensor, use_ue8m0: bool, gran_k: int = 128,
                          use_packed_ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """`x` `[M, K]`, K even, to int8 `[M, K/2]` of two E2M1 each (low nibble: even column) and scales as for FP8.

    Halfway values go to the smaller magnitude. Packed scales are filled up with 1.0 to a multiple of 4.
    """
    m, k = _numbers(x)
    expect(k % 2 == 0, "columns of x", k, "an even number: two a byte")
    expect(use_ue8m0 or not use_packed_ue8m0, "use_packed_ue8m0 with use_ue8m0", use_ue8m0, "True")
    count = ceil_div(k, gran_k)
    blocks = _pad(x, m, count * gran_k).view(m, count, gran_k)
    scale = _scale(blocks, (2,), E2M1_MAX, use_ue8m0)
    codes = _e2m1_codes(blocks * (1.0 / scale)).view(m, count * gran_k // 2, 2)
    payload = (codes[..., 0] | codes[..., 1] << 4).view(torch.int8)[:, : k // 2].contiguous()
    scale = scale.view(m, count)
    if not use_packed_ue8m0:
        return payload, scale
    return payload, pack_ue8m0_to_int(torch.nn.functional.pad(scale, (0, -scale.shape[1] % 4), value=1.0))


def cast_back_from_fp4(packed: Tensor, sf: Tensor, gran_k: int = 128, use_packed_ue8m0: bool = False) -> Tensor:
    """float32 `[M, K]` of what `per_token_cast_to_fp4` gave."""
    _, half = _two_dims(packed)
    scale = unpack_ue8m0_from_int(sf) if use_packed_ue8m0 else sf
    codes = _nibbles(packed)
    values = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=packed.device)[(codes & 7).long()]
    values = torch.where(codes == 8, values, torch.where(codes > 8, -values, values))  # 8 is -0: keep it positive
    return values * scale.repeat_interleave(gran_k, 1)[:, : 2 * half]


def transpose_packed_fp4(a: Tensor) -> Tensor:
    """int8 `[M, K/2]` of two E2M1 each, M even, to the transpose `[K, M/2]`, packed along M."""
    expect(a.dtype == torch.int8, "packed E2M1, dtype", a.dtype, "torch.int8", error=TypeError)
    m, half = _two_dims(a)
    expect(m % 2 == 0, "rows of packed E2M1", m, "an even number: two a byte")
    codes = _nibbles(a).t().contiguous().view(2 * half, m // 2, 2)
    return (codes[..., 0] | codes[..., 1] << 4).view(torch.int8)


def _numbers(x: Tensor) -> tuple[int, int]:
    """`_two_dims` of what can be quantised. TypeError for anything else."""
    expect(isinstance(x, Tensor), "x", type(x).__name__, "a torch.Tensor", error=TypeError)
    wide = x.dtype.is_floating_point and x.element_size() > 1 and x.layout == torch.strided
    expect(wide, "x", f"{x.dtype}, {x.layout}", "dense numbers to quantise, float32, bfloat16 or float16", error=TypeError)
    return _two_dims(x)


def _two_dims(x: Tensor) -> tuple[int, int]:
    expect(x.dim() == 2, "x, shape", tuple(x.shape), "two dimensions")
    return x.shape[0], x.shape[1]


def _pad(x: Tensor, rows: int, cols: int) -> Tensor:
    if tuple(x.shape) == (rows, cols):
        return x.contiguous()
    out = x.new_zeros((rows, cols))
    out[: x.shape[0], : x.shape[1]] = x
    return out


def _scale(x: Tensor, dims: tuple[int, ...], largest: float, use_ue8m0: bool) -> Tensor:
    """float32 scale of each block, with the reduced dimensions kept."""
    scale = x.abs().float().amax(dim=dims, keepdim=True).clamp(AMAX_MIN) / largest
    return ceil_to_ue8m0(scale) if use_ue8m0 else scale


def _e2m1_codes(x: Tensor) -> Tensor:
    """uint8 E2M1 codes, sign in bit 3, -0 as 0."""
    code = torch.bucketize(x.abs(), torch.tensor(E2M1_BOUNDS, device=x.device, dtype=x.dtype)).to(torch.uint8)
    return code | ((x < 0) & (code != 0)).to(torch.uint8) << 3


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 `[M, K]` codes of `[M, K/2]` bytes."""
    b = packed.contiguous().view(torch.uint8)
    return torch.stack((b & 15, b >> 4), -1).flatten(-2)
