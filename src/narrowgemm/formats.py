"""Number formats and the one container for narrow tensors.

A `Format` is an element type plus the block that shares one scale. A `ScaledTensor` is payload, scales and format.
Shapes are logical: the operand is `[..., R, K]` with K the contracted axis, whatever the strides and the packing.

Sources: OCP Microscaling Formats (MX) v1.0 for E8M0, E2M1, 1x32 blocks; OCP 8-bit Floating Point (OFP8) for E4M3, E5M2;
DeepSeek-V3 for 1x128 / 128x128 blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import expect

E8M0_NAN = 255


@dataclass(frozen=True, slots=True)
class Element:
    """An element type: its name, storage dtype, bits, and largest finite value."""

    name: str
    dtype: torch.dtype
    bits: int
    max: float
    emax: int  # exponent of the largest normal power of two (OCP MX `emax_elem`)

    @property
    def per_byte(self) -> int:
        return max(1, 8 // self.bits)


ELEMENTS: dict[str, Element] = {
    e.name: e
    for e in (
        Element("e4m3", torch.float8_e4m3fn, 8, 448.0, 8),
        Element("e5m2", torch.float8_e5m2, 8, 57344.0, 15),
        Element("e2m1", torch.uint8, 4, 6.0, 2),  # two a byte along K, low nibble = even index
        Element("bf16", torch.bfloat16, 16, 3.3895313892515355e38, 127),
        Element("fp16", torch.float16, 16, 65504.0, 15),
        Element("fp32", torch.float32, 32, 3.4028234663852886e38, 127),
    )
}

DTYPE_NAMES: dict[torch.dtype, str] = {e.dtype: e.name for e in ELEMENTS.values() if e.name != "e2m1"}


@dataclass(frozen=True, slots=True)
class Format:
    """Element type, scale block and scale type of an operand `[..., R, K]`.

    `group` is (rows, columns of K) that share one scale; 0 means the whole axis.
    `scale` is 'fp32', 'e8m0' or 'none'.
    """

    name: str
    element: str
    group: tuple[int, int]
    scale: str

    def __hash__(self) -> int:
        return hash(self.name)  # equal formats have equal names; a string keeps its hash, and every call hashes two formats

    @property
    def elem(self) -> Element:
        return ELEMENTS[self.element]

    @property
    def scaled(self) -> bool:
        return self.scale != "none"

    @property
    def scale_dtype(self) -> torch.dtype:
        """What scales are stored in: float32, or uint8 for E8M0 codes."""
        return torch.float32 if self.scale == "fp32" else torch.uint8

    @property
    def scaling_type(self) -> str:
        """Name of the matching `torch.nn.functional.ScalingType` member, or '' where torch has none."""
        names = {(0, 0): "TensorWise", (1, 0): "RowWise", (1, 32): "BlockWise1x32", (1, 128): "BlockWise1x128",
                 (128, 128): "BlockWise128x128"}
        return names.get(self.group, "") if self.scaled else ""

    def with_element(self, element: str) -> Format:
        """The same blocks over another element type, e.g. `FP8_TENSOR.with_element('e5m2')`."""
        expect(element in ELEMENTS, "element", repr(element), f"one of {sorted(ELEMENTS)}")
        if element == self.element:
            return self
        base, _, other = self.name.partition(":")       # only E4M3 goes without its name where there is another
        return replace(self, element=element, name=base if other and element == "e4m3" else f"{base}:{element}")

    def with_scale(self, scale: str) -> Format:
        """The same blocks with another scale type, 'fp32' or 'e8m0'."""
        expect(scale in ("fp32", "e8m0"), "scale type", repr(scale), "'fp32' or 'e8m0'")
        if scale == self.scale:
            return self
        base, colon, element = self.name.partition(":")
        base = base.removesuffix("_ue8m0") + ("_ue8m0" if scale == "e8m0" else "")
        return replace(self, scale=scale, name=base + colon + element)

    def scale_shape(self, shape: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
        """Logical scale shape `[..., ceil(R/rows), ceil(K/cols)]` of an operand of logical `shape` `[..., R, K]`."""
        *lead, rows, cols = shape
        gr, gc = self.group
        return (*lead, 1 if gr == 0 else -(-rows // gr), 1 if gc == 0 else -(-cols // gc))

    def storage_bytes(self, rows: int, cols: int) -> int:
        """Bytes of payload plus scales of a `[rows, cols]` operand."""
        payload = rows * -(-cols * self.elem.bits // 8)
        if not self.scaled:
            return payload
        sr, sc = self.scale_shape((rows, cols))
        return payload + sr * sc * (4 if self.scale == "fp32" else 1)


FP8_TENSOR = Format("fp8_tensor", "e4m3", (0, 0), "fp32")
FP8_ROW = Format("fp8_row", "e4m3", (1, 0), "fp32")
FP8_1x128 = Format("fp8_1x128", "e4m3", (1, 128), "fp32")
FP8_128x128 = Format("fp8_128x128", "e4m3", (128, 128), "fp32")
MXFP8 = Format("mxfp8", "e4m3", (1, 32), "e8m0")
MXFP4 = Format("mxfp4", "e2m1", (1, 32), "e8m0")
BF16 = Format("bf16", "bf16", (0, 0), "none")
FP16 = Format("fp16", "fp16", (0, 0), "none")
FP32 = Format("fp32", "fp32", (0, 0), "none")

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        *(x for b in (FP8_TENSOR, FP8_ROW, FP8_1x128, FP8_128x128) for x in (b, b.with_element("e5m2"))),
        *(x for b in (FP8_1x128, FP8_128x128) for x in (b.with_scale("e8m0"), b.with_scale("e8m0").with_element("e5m2"))),
        MXFP8, MXFP8.with_element("e5m2"), MXFP4, BF16, FP16, FP32,
    )
}


PLAIN: dict[torch.dtype, Format] = {f.elem.dtype: f for f in (BF16, FP16, FP32)}     # of tensors without scales


def get_format(fmt: Format | str) -> Format:
    """A format by object or by name; names are the keys of `FORMATS`."""
    if isinstance(fmt, Format):
        return fmt
    expect(isinstance(fmt, str), "format", type(fmt).__name__, "a Format, or the name of one", error=TypeError)
    expect(fmt in FORMATS, "format", repr(fmt), f"one of {sorted(FORMATS)}")
    return FORMATS[fmt]


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of an element type, by its name ('bf16', 'fp32', 'e4m3', ...): for a dtype, the inverse of `dtype_name`."""
    expect(name in ELEMENTS, "dtype", repr(name), f"one of {sorted(ELEMENTS)}")
    return ELEMENTS[name].dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as plans, tables and command lines have it. TypeError for a dtype that no element type is stored in."""
    expect(dtype in DTYPE_NAMES, "dtype", dtype, f"one of {[str(d) for d in DTYPE_NAMES]}", error=TypeError)
    return DTYPE_NAMES[dtype]


@dataclass(frozen=True, eq=False)
class ScaledTensor:
    """A narrow tensor: `data` payload, `scale` factors (value = payload * scale), `format`.

    `data`: `[..., R, K]` in the element's dtype; for E2M1 uint8 `[..., R, K/2]`, low nibble = even K index.
    `scale`: logical `[..., ceil(R/rows), ceil(K/cols)]`, any strides; float32, or uint8 holding E8M0 codes
    (2^(code-127); 0 is 2^-127, 255 is NaN). `None` for unscaled formats.

    The constructor trusts its arguments; use `ScaledTensor.make` for tensors that come from outside.
    """

    data: Tensor
    scale: Tensor | None
    format: Format

    def __repr__(self) -> str:
        return f"ScaledTensor({self.format.name} {list(self.shape)}{described(self.scale)}, {self.device})"

    def __reduce__(self) -> tuple[Any, ...]:
        # payloads go as bytes: plain pickle can't read a tensor of FP8 back (torch 2.13)
        data = self.data.view(torch.uint8) if self.format.elem.bits == 8 else self.data
        return _restore, (data, self.scale, self.format)

    @staticmethod
    def make(data: Tensor, scale: Tensor | float | None, fmt: Format | str, *, scale_layout: str = "auto") -> ScaledTensor:
        """Payload `data` and `scale`, checked against `fmt`; scales come to the one logical layout, copied only to unpack.

        `scale_layout`: 'row_major' (logical shape, any strides, so MN-major TMA-aligned is one too), 'transposed'
        (`[..., K/cols, R/rows]`), 'packed_ue8m0' (int32, four E8M0 codes along K), or 'auto': the first of these whose
        shape and dtype fit. Raises ValueError / TypeError naming what was given and what is expected.
        """
        from .scales import normalize_scale  # here, because scales.py builds on this module

        fmt = get_format(fmt)
        data = check_payload(data, fmt)
        out = ScaledTensor(data, None, fmt)
        if not fmt.scaled:
            expect(scale is None, f"scale of unscaled format {fmt.name}", type(scale).__name__, "None")
            return out
        expect(scale is not None, f"scale of format {fmt.name}", None, f"a tensor of shape {fmt.scale_shape(out.shape)}")
        assert scale is not None
        return ScaledTensor(data, normalize_scale(scale, out.shape, fmt, data.device, scale_layout), fmt)

    @property
    def shape(self) -> torch.Size:
        """Logical shape, in elements."""
        if self.format.element != "e2m1":
            return self.data.shape
        return torch.Size((*self.data.shape[:-1], self.data.shape[-1] * 2))

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def major(self) -> str:
        """'k' where K is contiguous, 'mn' where R is, 'strided' where neither is."""
        s = self.data.stride()
        if s[-1] == 1 or self.data.shape[-1] == 1:
            return "k"
        return "mn" if s[-2] == 1 or self.data.shape[-2] == 1 else "strided"

    def transpose(self) -> ScaledTensor:
        """A view with the two last axes exchanged; E2M1 packs along K and cannot be."""
        expect(self.format.element != "e2m1", "transpose of", self.format.name, "an element type of at least 8 bits")
        fmt = replace(self.format, group=self.format.group[::-1], name=self.format.name + ".T") \
            if self.format.group[0] != self.format.group[1] else self.format
        return ScaledTensor(self.data.mT, None if self.scale is None else self.scale.mT, fmt)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values as `dtype`, shape `[..., R, K]`; exact in float32."""
        from .reference.quantize import dequantize

        return dequantize(self, dtype)

    def to(self, device: torch.device | str) -> ScaledTensor:
        """A copy on `device`; TypeError for a dtype, to which a payload can't be brought without its scales."""
        check_device(device, "`dequantize(dtype)` gives values of one")
        return ScaledTensor(self.data.to(device), None if self.scale is None else self.scale.to(device), self.format)

    def __getitem__(self, group: int | slice) -> ScaledTensor:
        """Index the leading (group) axis of a stacked operand `[G, R, K]`."""
        expect(not isinstance(group, tuple), "index of a ScaledTensor", repr(group), "one index, of groups", error=TypeError)
        expect(self.data.dim() >= 3, "indexing a ScaledTensor of dimension", self.data.dim(), "at least 3, [G, R, K]")
        return ScaledTensor(self.data[group], None if self.scale is None else self.scale[group], self.format)


def check_device(device: object, hint: str) -> None:
    expect(not isinstance(device, torch.dtype), "device", device, f"a device, not a dtype: {hint}", error=TypeError)


def described(scale: Tensor | None) -> str:
    """Scales, as a repr shows them: reading values would wait for the device."""
    return "" if scale is None else f", scales {str(scale.dtype).removeprefix('torch.')} {list(scale.shape)}"


def _restore(data: Tensor, scale: Tensor | None, fmt: Format) -> ScaledTensor:
    return ScaledTensor(data.view(fmt.elem.dtype) if fmt.elem.bits == 8 else data, scale, fmt)


# `torch.load` makes nothing of other types unless asked to
torch.serialization.add_safe_globals([Format, ScaledTensor, _restore])


def check_payload(data: Tensor, fmt: Format) -> Tensor:
    """The payload in its storage dtype: bytes are viewed as FP8 or packed E2M1 where `fmt` says so; nothing is copied."""
    expect(isinstance(data, Tensor), "payload", type(data).__name__, "a torch.Tensor", error=TypeError)
    expect(data.dim() >= 2, f"payload of {fmt.name}, dimensions", tuple(data.shape), "at least [R, K]")
    want = fmt.elem.dtype
    if data.dtype == want:
        return data
    if fmt.element == "e2m1":
        x2 = getattr(torch, "float4_e2m1fn_x2", None)
        if data.dtype in (torch.int8, x2):
            return data.view(torch.uint8)
        if data.dtype == torch.int32:
            expect(data.stride(-1) == 1, "int32-packed E2M1, last stride", data.stride(-1), "1")
            return data.view(torch.uint8)
        raise TypeError(f"payload of {fmt.name}: got {data.dtype}, expected uint8, int8, int32 or float4_e2m1fn_x2 (packed)")
    if fmt.element in ("e4m3", "e5m2") and data.dtype in (torch.uint8, torch.int8):
        return data.view(want)
    hint = " or its bytes as uint8 / int8" if fmt.elem.bits == 8 else ""
    if data.dtype == ELEMENTS["e5m2"].dtype and fmt.element == "e4m3":
        hint += f"; the format of an E5M2 payload is {fmt.with_element('e5m2').name!r}"
    elif data.dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        hint += "; FNUZ codes stand for half the value of the same OCP codes, so convert values, not bytes"
    raise TypeError(f"payload of {fmt.name}: got {data.dtype}, expected {want}{hint}")
