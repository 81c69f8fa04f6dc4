"""Scale factors: E8M0 codes, the layouts that callers bring them in, and the one layout that kernels see.

Kernels see logical `[..., R/rows, K/cols]` with any strides, float32 or uint8 E8M0. Row-major, transposed and MN-major
TMA-aligned scales are views of that; only packed int32 UE8M0 is unpacked (a copy of the scales, never of the payload).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import expect
from .formats import Format


def e8m0_to_float(code: Tensor) -> Tensor:
    """uint8 E8M0 codes to float32: 2^(code-127); 0 gives 2^-127 (a float32 subnormal), 255 gives NaN."""
    bits = code.to(torch.int32) << 23
    bits = torch.where(code == 0, 0x00400000, bits)
    bits = torch.where(code == 255, 0x7FC00000, bits)
    return bits.view(torch.float32)


def float_to_e8m0(scale: Tensor) -> Tensor:
    """float32 powers of two to E8M0 codes. Raises ValueError where a scale is no power of two: that would round silently.

    Reads the values, so it synchronises with the device: a conversion for load time, not for the hot path.
    """
    bits = scale.float().view(torch.int32)
    exponent = (bits >> 23) & 0xFF
    exact = ((bits & 0x007FFFFF) == 0) & (bits > 0) & (exponent < 255)
    tiny, nan = bits == 0x00400000, scale.isnan()
    if not bool((exact | tiny | nan).all()):
        raise ValueError("float32 scales that are no powers of two can't be E8M0 without rounding; "
                         "requantise the payload (narrowgemm.quantize with an E8M0 format) instead")
    code = torch.where(tiny, 0, exponent)
    return torch.where(nan, 255, code).to(torch.uint8)


def scale_to_float(scale: Tensor) -> Tensor:
    """Normalised scales (float32 or E8M0 codes) as float32."""
    return e8m0_to_float(scale) if scale.dtype == torch.uint8 else scale


def unpack_ue8m0(packed: Tensor, count: int) -> Tensor:
    """int32 `[..., R, ceil(count/4)]` with four E8M0 codes along K, lowest byte first, to uint8 `[..., R, count]`."""
    # clone, not contiguous(): that keeps the strides of MN-major scales with one word a row, and view() refuses them
    return packed.clone(memory_format=torch.contiguous_format).view(torch.uint8)[..., :count]


def pack_ue8m0(code: Tensor) -> Tensor:
    """uint8 `[..., R, S]` to int32 `[..., R, ceil(S/4)]`, lowest byte first; the ragged last word is filled with 127 (1.0)."""
    pad = -code.shape[-1] % 4
    return torch.nn.functional.pad(code, (0, pad), value=127).contiguous().view(torch.int32)


def tma_aligned_rows(rows: int, itemsize: int) -> int:
    """Rows of an MN-major scale column rounded up so that each column starts on 16 bytes."""
    unit = 16 // itemsize
    return -(-rows // unit) * unit


def mn_major_tma_aligned(scale: Tensor) -> Tensor:
    """The same logical `[..., R, S]` values with R contiguous and the column stride a multiple of 16 bytes.

    The very same tensor object where it is in that layout already, so that nobody holds an alias of a freed copy.
    """
    *lead, rows, cols = scale.shape
    aligned = tma_aligned_rows(rows, scale.element_size())
    want = (1, aligned)
    if scale.stride()[-2:] == want and (not lead or scale.stride(-3) == aligned * cols):
        return scale
    out = torch.empty((*lead, cols, aligned), dtype=scale.dtype, device=scale.device)[..., :rows].mT
    return out.copy_(scale)


def empty_scales(shape: tuple[int, ...] | torch.Size, fmt: Format, device: torch.device, mn_major: bool) -> Tensor:
    """Uninitialised scales of an operand of logical `shape`: row-major, or MN-major with columns on 16 bytes, as TMA loads them."""
    *lead, rows, cols = fmt.scale_shape(shape)
    if not mn_major:
        return torch.empty((*lead, rows, cols), dtype=fmt.scale_dtype, device=device)
    stored = (*lead, cols, tma_aligned_rows(rows, fmt.scale_dtype.itemsize))
    return torch.empty(stored, dtype=fmt.scale_dtype, device=device)[..., :rows].mT


def normalize_scale(scale: Tensor | float, shape: tuple[int, ...] | torch.Size, fmt: Format, device: torch.device,
                    layout: str = "auto") -> Tensor:
    """Scales of a logical `shape` operand, as float32 or uint8 E8M0 `[..., R/rows, K/cols]`. See `ScaledTensor.make`."""
    want = fmt.scale_shape(shape)
    layouts = ("auto", "row_major", "transposed", "packed_ue8m0")
    expect(layout in layouts, "scale_layout", repr(layout), f"one of {layouts}")
    if not isinstance(scale, Tensor):
        expect(isinstance(scale, (int, float)), f"scale of {fmt.name}", type(scale).__name__, "a torch.Tensor, or one number",
               error=TypeError)
        scale = torch.full(want, float(scale), dtype=torch.float32, device=device)
    expect(scale.device == device, f"scale of {fmt.name}, device", scale.device, f"the payload's, {device}")
    if scale.dtype == getattr(torch, "float8_e8m0fnu", None):
        scale = scale.view(torch.uint8)

    if fmt.group == (0, 0) and scale.dtype == torch.float32:  # tensor-wise: a scalar, or one a group
        lead = want[:-2]
        groups = 1
        for x in lead:
            groups *= x
        expect(scale.numel() in (1, groups), f"tensor-wise scale of {tuple(shape)}, elements", scale.numel(),
               f"1 or {groups}")
        return scale.reshape(1).expand(*want) if scale.numel() == 1 else scale.reshape(want)
    if fmt.group == (1, 0) and scale.dtype == torch.float32 and tuple(scale.shape) == want[:-1]:
        return scale.unsqueeze(-1)

    if scale.dtype == torch.int32:
        expect(layout in ("auto", "packed_ue8m0"), "int32 scales with scale_layout", repr(layout), "'packed_ue8m0'")
        expect(fmt.scale == "e8m0", f"packed UE8M0 scales for format {fmt.name}", "int32", "an E8M0 format")
        packed = (*want[:-1], -(-want[-1] // 4))
        expect(tuple(scale.shape) == packed, f"packed UE8M0 scale of {fmt.name} for {tuple(shape)}, shape",
               tuple(scale.shape), str(packed))
        return unpack_ue8m0(scale, want[-1])
    expect(layout != "packed_ue8m0", "packed UE8M0 scales, dtype", scale.dtype, "torch.int32", error=TypeError)

    kinds = {"fp32": (torch.float32,), "e8m0": (torch.uint8, torch.float32)}[fmt.scale]
    expect(scale.dtype in kinds, f"scale of {fmt.name}, dtype", scale.dtype,
           "float32" if fmt.scale == "fp32" else "uint8 / float8_e8m0fnu codes, packed int32, or float32", error=TypeError)
    swapped = (*want[:-2], want[-1], want[-2])
    if tuple(scale.shape) == want and layout != "transposed":
        return scale
    if tuple(scale.shape) == swapped and layout in ("auto", "transposed"):
        return scale.mT
    raise ValueError(f"scale of {fmt.name} for an operand of shape {tuple(shape)}: got {tuple(scale.shape)}, expected "
                     f"{want} (row-major or MN-major) or {swapped} (transposed)"
                     + (f"; scale_layout is {layout!r}" if layout != "auto" else ""))
