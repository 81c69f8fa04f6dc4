"""What an experts module of transformers holds, as operands.

A module that we quantised keeps its parameters' names: `gate_up_proj` is the payload `[E, N, K]` (also where the model
stores `[E, K, N]`), `gate_up_proj_scale` its scales, and `narrowgemm_formats` the formats of weights and activations.
Where `narrowgemm_packed` is set, both are in the order of `narrowgemm.prepack`: see `prepack_`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import Unsupported, expect
from ...formats import BF16, FP8_ROW, MXFP4, Format, FP8_1x128, FP8_128x128, ScaledTensor, get_format
from ...ops.quantize import quantize
from ...prepack import PackedWeight, prepack

FORMATS = "narrowgemm_formats"
PACKED = "narrowgemm_packed"        # of a prepacked module, by projection: what `_packed` needs beside the tensors


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """E experts, hidden H, inter I. `up` `[E, 2I, H]` (`[E, I, H]` without a gate), `down` `[E, H, I]`, their biases
    `[E, 2I]` and `[E, H]` or None, and the format that their inputs are quantised to."""

    up: ScaledTensor | PackedWeight | Tensor
    down: ScaledTensor | PackedWeight | Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    activations: Format

    @property
    def dtype(self) -> torch.dtype | None:
        """What inputs are cast to: the weights' own dtype where they are wide, None where any input will do."""
        return self.up.dtype if isinstance(self.up, Tensor) else None


def is_experts(module: Any) -> bool:
    """Whether transformers' decorator of replaceable experts made the module."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "down_proj")


def projections(module: Any) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def plain(module: Any) -> Weights:
    """The weights of an experts module of a model that is not FP8: wide, or quantised by us."""
    up, down = projections(module)
    formats = getattr(module, FORMATS, None)
    biases = [getattr(module, f"{p}_bias", None) if module.has_bias else None for p in (up, down)]
    if formats is None:
        wide = [getattr(module, p).mT if module.is_transposed else getattr(module, p) for p in (up, down)]
        return Weights(wide[0], wide[1], biases[0], biases[1], BF16)
    if getattr(module, PACKED, None) is not None:
        return Weights(_packed(module, up), _packed(module, down), biases[0], biases[1], formats[1])
    stacks = [ScaledTensor(getattr(module, p).data, getattr(module, f"{p}_scale").data, formats[0]) for p in (up, down)]
    return Weights(stacks[0], stacks[1], biases[0], biases[1], formats[1])


def fp8(module: Any) -> Weights:
    """The weights of transformers' `FP8Experts`: E4M3 in 128 x 128 blocks or one scale a matrix, or packed E2M1."""
    if module.activation_scheme != "dynamic":
        raise Unsupported(f"activation_scheme {module.activation_scheme!r} of {type(module).__name__}",
                          "narrowgemm quantises activations as they come: activation_scheme='dynamic'")
    if getattr(module, PACKED, None) is not None:
        return Weights(_packed(module, projections(module)[0]), _packed(module, "down_proj"), None, None, FP8_1x128)
    up, down = (_fp8(getattr(module, p), getattr(module, f"{p}_scale_inv"), module.block_size)
                for p in projections(module))
    activations = FP8_ROW if up.format == FP8_ROW else FP8_1x128
    return Weights(up, down, None, None, activations)


def _fp8(data: Tensor, scale: Tensor, block: tuple[int, int] | None) -> ScaledTensor:
    data, scale = data.detach(), scale.detach()
    if scale.dtype == torch.float8_e8m0fnu:
        scale = scale.view(torch.uint8)
    if data.dtype in (torch.int8, torch.uint8):
        return ScaledTensor.make(data, scale, MXFP4)
    if block is None:  # one scale a matrix, of gate and up each: a scale a row says the same
        rows = data.shape[-2]
        return ScaledTensor(data, scale.float().repeat_interleave(rows // scale.shape[-2], -2).contiguous(), FP8_ROW)
    expect(tuple(block) == (128, 128), "block_size of FP8 experts", tuple(block), "(128, 128), or None")
    return ScaledTensor(data, scale, FP8_128x128.with_scale("e8m0" if scale.dtype == torch.uint8 else "fp32"))


def formats(weights: str, activations: str) -> tuple[Format, Format]:
    """Both formats, checked: weights scaled, activations scaled along K by rows, or BF16."""
    w, a = get_format(weights), get_format(activations)
    expect(a == BF16 or (a.scaled and a.group[0] == 1), "activations", a.name, "'bf16', or a format with scales by row")
    return w, a


def quantize_(module: Any, weights: str, activations: str) -> None:
    """Quantise a module that holds wide weights, in place."""
    expect(getattr(module, FORMATS, None) is None, f"experts of {type(module).__name__}", "quantised already", "wide ones")
    expect(getattr(module, "block_size", None) is None and module.down_proj.element_size() > 1,
           f"experts of {type(module).__name__}", "an FP8 checkpoint's", "wide ones")
    pair = formats(weights, activations)
    for name in projections(module):
        q = quantized(module, getattr(module, name).detach(), pair[0])
        put(module, name, q.data, q.scale)
    setattr(module, FORMATS, pair)


def quantized(module: Any, weight: Tensor, fmt: Format) -> ScaledTensor:
    """`weight` as the module stores it, in `fmt` as `[E, N, K]`."""
    return quantize(weight.mT if module.is_transposed else weight, fmt)


def put(module: Any, name: str, data: Tensor, scale: Tensor | None) -> None:
    """Make payload and scales parameters of the module, in place of the wide ones."""
    if not isinstance(data, nn.Parameter):
        setattr(module, name, nn.Parameter(data, requires_grad=False))
    assert scale is not None
    setattr(module, f"{name}_scale", nn.Parameter(scale, requires_grad=False))


def prepack_(module: Any, pair: str, order: str = "bf16") -> bool:
    """Bring MXFP4 / MXFP8 weights of a module (those that we quantised, and a checkpoint's FP4) into the order of
    `narrowgemm.prepack`, in place, one projection at a time; whether it holds such weights that were not. pair: how gate and up
    rows lie, '' where the module's own gate runs behind; order: `activations` of `narrowgemm.prepack` where they stay BF16.

    Weights that meet FP8 1x128 activations are packed without their pair: the kernel for many such rows has no activation.
    Raises Unsupported where a row's scales are too far apart to be packed: the module is then as it was.
    """
    own = getattr(module, FORMATS, None)
    fp4 = own is None and hasattr(module, "down_proj_scale_inv") and module.down_proj.dtype in (torch.int8, torch.uint8)
    if getattr(module, PACKED, None) is not None or not (fp4 or (own is not None and own[0].name in ("mxfp4", "mxfp8"))):
        return False
    w = fp8(module) if fp4 else plain(module)
    names = projections(module)
    assert isinstance(w.up, ScaledTensor) and isinstance(w.down, ScaledTensor)
    for_fp8 = w.activations == FP8_1x128
    kind = "fp8" if for_fp8 else order if w.activations == BF16 else "bf16"
    packed = {names[0]: prepack(w.up, pair="" if for_fp8 else pair, activations=kind), names[1]: prepack(w.down, activations=kind)}
    del w
    for name, p in packed.items():
        setattr(module, name, nn.Parameter(p.data, requires_grad=False))
        setattr(module, _scale_of(module, name), nn.Parameter(p.scale, requires_grad=False))
        factor = None if p.factor is None else p.factor.view(torch.int32)  # what a `.to(dtype)` of the model leaves alone
        for part, t in (("factor", factor), ("codes", p.codes), ("top", p.top), (_order_of(p), p.data.new_empty(0))):
            module.register_buffer(f"{name}_{part}", t)
    setattr(module, PACKED, {name: (p.format, p.shape, p.pair, p.prepack) for name, p in packed.items()})
    return True


def _order_of(p: PackedWeight) -> str:
    """An empty buffer's name: a state_dict in another order, or in none, has other keys."""
    return p.prepack.replace("/", "_v")


def _scale_of(module: Any, name: str) -> str:
    return f"{name}_scale_inv" if hasattr(module, f"{name}_scale_inv") else f"{name}_scale"


def _packed(module: Any, name: str) -> PackedWeight:
    fmt, shape, pair, order = getattr(module, PACKED)[name]
    factor = getattr(module, f"{name}_factor")
    return PackedWeight(getattr(module, name).data, getattr(module, _scale_of(module, name)).data, fmt, shape, pair,
                        None if factor is None else factor.view(torch.float32), getattr(module, f"{name}_codes"), order,
                        getattr(module, f"{name}_top"))


def reserve(module: Any, weights: str, activations: str, *, payload: bool) -> None:
    """Parameters for a loader to fill, on the wide ones' device (usually meta).

    `payload`: as the checkpoint has it narrow already. Else the wide parameters stay until they are read and quantised,
    because a loader reads a tensor in the dtype of the parameter that waits for it.
    """
    pair = formats(weights, activations)
    for name in projections(module):
        w = getattr(module, name)
        e, n, k = (w.mT if module.is_transposed else w).shape
        scale = torch.empty(pair[0].scale_shape((e, n, k)), device=w.device,
                            dtype=pair[0].scale_dtype)
        data = torch.empty((e, n, k // pair[0].elem.per_byte), dtype=pair[0].elem.dtype, device=w.device) if payload else w
        put(module, name, data, scale)
    setattr(module, FORMATS, pair)
