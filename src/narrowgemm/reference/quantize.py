"""Quantisation, bit for bit: the definition that every quantising kernel reproduces, and the CPU backend.

Per block of the format, in float32:

    amax  = max(max|x|, amax_clamp)
    scale = max(amax / elem_max, 2^-126)                      FP32 scales
    scale = 2^(code - 127), code from amax by `rounding`      E8M0 scales
    data  = cast(x * (1 / scale))                             to nearest even, saturating; 1 / scale is exact for E8M0

each step rounded to nearest even (so it is the reciprocal that is multiplied, as DeepGEMM's casts do: one operation an
element, and 448 is still never exceeded). E8M0 rounding modes:

* `rceil` (default): the smallest power of two >= amax / elem_max, so that nothing saturates;
* `floor`: 2^(floor(log2 amax) - emax), the OCP MX definition; elements up to 2^(emax+1) saturate;
* `even`: as `floor`, after amax was rounded to the element's mantissa, to nearest even.

All three are computed on the bits of amax, without logarithms. A code never leaves [0, 254]; 255 marks a block that
holds a NaN or an infinity: its scale is NaN (both scale types), its FP8 payload is NaN (0x7F), and its E2M1 payload, for
which there is no NaN, is +6 (0x7): it dequantises to NaN everywhere. A finite input never gives an infinity or a NaN as
payload or scale; with E8M0 scales, elements within half a step of 2^128 are rounded to 2^128, which is beyond float32.
The sign of zero is kept.

Sources: OCP Microscaling Formats (MX) v1.0 section 6.3 (floor); NVIDIA's cuBLAS block-scaling definition (rceil);
AMD Quark / torchao (even); DeepGEMM (FP32 scales, amax clamp of 1e-4).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import expect
from ..formats import Format, ScaledTensor, get_format
from ..scales import e8m0_to_float, scale_to_float

ROUNDINGS = ("floor", "rceil", "even")
AMAX_CLAMP = 1e-4
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
MANTISSA_BITS = {"e4m3": 3, "e5m2": 2, "e2m1": 1}
NAN_BITS = 0x7FC00000
FP8_NAN = float("nan")


def quantize(x: Tensor, fmt: Format | str, rounding: str = "rceil", amax_clamp: float = AMAX_CLAMP) -> ScaledTensor:
    """`x` `[..., R, K]` (BF16, FP16 or FP32) in the scaled format `fmt`; see the module for the definition.

    Returns payload `[..., R, K]` (E2M1: uint8 `[..., R, K/2]`) and scales `[..., ceil(R/rows), ceil(K/cols)]`,
    row-major, float32 or uint8 E8M0. A ragged last block is scaled by the elements it has. A block without elements
    (row- or tensor-wise over an empty axis) has the scale of `amax_clamp`. Raises ValueError / TypeError for an input
    that has no such form.
    """
    fmt = check_input(x, fmt, rounding, amax_clamp)
    with torch.no_grad():
        rows, cols = x.shape[-2:]
        br, bc = (max(1, g or n) for g, n in zip(fmt.group, (rows, cols)))
        sr, sc = fmt.scale_shape(x.shape)[-2:]
        blocks = F.pad(x.float(), (0, sc * bc - cols, 0, sr * br - rows))
        blocks = blocks.unflatten(-1, (sc, bc)).unflatten(-3, (sr, br))
        scale, inverse = block_scale(blocks.abs().amax((-3, -1)), fmt, rounding, amax_clamp)
        scaled = blocks * inverse.unsqueeze(-1).unsqueeze(-3)
        scaled = scaled.flatten(-4, -3).flatten(-2)[..., :rows, :cols]
        data = pack_e2m1(encode_e2m1(scaled)) if fmt.element == "e2m1" else cast_fp8(scaled, fmt)
        return ScaledTensor(data.contiguous(), scale, fmt)


def dequantize(st: ScaledTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values payload * scale as `dtype`, shape `[..., R, K]`.

    The product is formed in float32: exact for E8M0 scales, rounded once for FP32 scales; float64 is always exact.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    data = decode_e2m1(unpack_e2m1(st.data)) if st.format.element == "e2m1" else st.data
    if st.scale is None:
        return data.to(dtype)
    scale = scale_to_float(st.scale).to(wide)
    for axis, block in zip((-2, -1), st.format.group):
        if block > 1:
            scale = scale.repeat_interleave(block, axis).narrow(axis, 0, st.shape[axis])
    return (data.to(wide) * scale).to(dtype)


def check_input(x: Tensor, fmt: Format | str, rounding: str, amax_clamp: float) -> Format:
    """The format, once `x` and the options are known to be quantisable. ValueError / TypeError otherwise."""
    fmt = get_format(fmt)
    expect(isinstance(x, Tensor), "input of quantize", type(x).__name__, "a torch.Tensor", error=TypeError)
    expect(fmt.scaled, "format to quantise to", fmt.name, "a scaled format, such as fp8_1x128, mxfp8, mxfp4")
    expect(x.dtype in INPUT_DTYPES, "input of quantize, dtype", x.dtype, "bfloat16, float16 or float32",
           error=TypeError)
    expect(x.dim() >= 2, "input of quantize, shape", tuple(x.shape), "at least [R, K]")
    expect(fmt.element != "e2m1" or x.shape[-1] % 2 == 0, f"K of {fmt.name}", x.shape[-1], "an even number, two a byte")
    expect(rounding in ROUNDINGS, "rounding", repr(rounding), f"one of {ROUNDINGS}")
    expect(0.0 <= amax_clamp < float("inf"), "amax_clamp", amax_clamp, "a finite number, 0 or above")
    return fmt


def block_scale(amax: Tensor, fmt: Format, rounding: str, amax_clamp: float) -> tuple[Tensor, Tensor]:
    """Scales as the format stores them, and their float32 inverses, from float32 maxima of |x| per block."""
    finite = amax.isfinite()
    amax = torch.where(finite, amax.clamp_min(amax_clamp), torch.nan)
    if fmt.scale == "fp32":
        top = torch.full((), fmt.elem.max, dtype=torch.float32, device=amax.device)  # a number would do as its reciprocal on CUDA
        scale = (amax / top).clamp_min(2.0**-126)
        nan = torch.tensor(NAN_BITS, dtype=torch.int32, device=amax.device).view(torch.float32)
        scale = torch.where(finite, scale, nan)
        return scale, 1.0 / scale
    code = torch.where(finite, e8m0_code(amax, fmt, rounding), 255).to(torch.uint8)
    return code, torch.where(finite, e8m0_to_float((254 - code).clamp(0, 254)), torch.nan)


def e8m0_code(amax: Tensor, fmt: Format, rounding: str) -> Tensor:
    """int32 E8M0 codes, 0 to 254, of finite float32 amax >= 0."""
    bits = amax.view(torch.int32)
    if rounding == "even":
        # only the carry into the exponent counts, and there a tie always has an odd mantissa: half-up is half-to-even
        bits = bits + (1 << (22 - MANTISSA_BITS[fmt.element]))
    code = (bits >> 23) - fmt.elem.emax
    if rounding == "rceil":
        code = code + ((bits & 0x7FFFFF) > mantissa(fmt.elem.max)).to(torch.int32)
    return code.clamp(0, 254)


def mantissa(value: float) -> int:
    """The 23 mantissa bits of a float32."""
    return int(torch.tensor(value, dtype=torch.float32, device="cpu").view(torch.int32)) & 0x7FFFFF


def cast_fp8(x: Tensor, fmt: Format) -> Tensor:
    """float32 to FP8: to nearest even, saturating (infinities too), NaN to 0x7F; the same on every version of torch."""
    top = fmt.elem.max
    return torch.where(x.isnan(), FP8_NAN, x.clamp(-top, top)).to(fmt.elem.dtype)


def encode_e2m1(x: Tensor) -> Tensor:
    """float32 to E2M1 codes, uint8 0 to 15: to nearest even, saturating at 6, NaN to +6 (0x7). Same shape."""
    a = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for up in (a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0):  # a tie goes to the even code
        code += up
    return torch.where(x.isnan(), 7, code | (torch.signbit(x).to(torch.uint8) << 3))


def decode_e2m1(code: Tensor) -> Tensor:
    """E2M1 codes (uint8, 0 to 15) to float32. Same shape."""
    return torch.tensor(E2M1_VALUES, dtype=torch.float32, device=code.device)[code.long()]


def pack_e2m1(code: Tensor) -> Tensor:
    """Codes `[..., K]` to bytes `[..., K/2]`, the even K index in the low nibble."""
    expect(code.shape[-1] % 2 == 0, "E2M1 codes, last dimension", code.shape[-1], "an even number, two a byte")
    return code[..., 0::2] | (code[..., 1::2] << 4)


def unpack_e2m1(data: Tensor) -> Tensor:
    """Bytes `[..., K/2]` to codes `[..., K]`."""
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)
