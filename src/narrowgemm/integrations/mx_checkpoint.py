"""One MoE layer of a checkpoint with MXFP4 or MXFP8 experts, bit for bit. `checkpoints.load_moe_layer` comes here.

| kind | tensors | payload | scales |
| --- | --- | --- | --- |
| GPT-OSS | `experts.gate_up_proj_blocks`, `_scales`, `_bias`; `down_proj_` | uint8 `[E, N, K/32, 16]` | uint8 `[E, N, K/32]` |
| compressed-tensors | `experts.E.gate_proj.weight_packed`, `.weight_scale` | uint8 `[N, K/2]` | uint8 `[N, K/32]` |
| DeepSeek-V4 | `experts.E.w1.weight`, `.scale` | int8 `[N, K/2]` | float8_e8m0fnu `[N, K/32]` |
| MXFP8 | `experts.E.gate_proj.weight`, `.weight_scale` (or `_inv`, or `.scale`) | float8_e4m3fn `[N, K]` | uint8 `[N, K/32]` |

In config.json: `quant_method: mxfp4`; `format: mxfp4-pack-quantized`; `expert_dtype: fp4`; of MXFP8 `quant_method: mxfp8`,
compressed-tensors' `format: mxfp8-quantized`, or modelopt's `quant_algo: MXFP8`.
MXFP4 has two a byte, low nibble = even K. GPT-OSS's gate and up rows alternate (`MoELayer.interleaved`); the others' are stacked
[gate; up]. Definitions: OCP MX v1.0; the projects' checkpoints.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import expect
from ..formats import MXFP4, MXFP8, Format, ScaledTensor

if TYPE_CHECKING:
    from .checkpoints import Checkpoint, MoELayer

GPT_OSS, PACKED, DEEPSEEK, EIGHT = "gpt-oss", "mxfp4-pack-quantized", "deepseek-v4", "mxfp8-quantized"
# format; the payload's name and those that scales may have beside an expert's projection, and the dtypes that safetensors names
PARTS = {PACKED: (MXFP4, "weight_packed", ("weight_scale",), ("U8",), ("U8", "F8_E8M0")),
         DEEPSEEK: (MXFP4, "weight", ("scale",), ("I8", "U8", "F4"), ("F8_E8M0", "U8")),
         EIGHT: (MXFP8, "weight", ("weight_scale", "weight_scale_inv", "scale"), ("F8_E4M3",), ("U8", "F8_E8M0"))}
_STACKED = re.compile(r"(?P<block>(?:.*\.)?layers\.(?P<layer>\d+)\.\w+)\.experts\.gate_up_proj_blocks")


def kind_of(config: dict[str, Any]) -> str:
    """Which of the kinds a config.json names; '' for none of them."""
    quant = config.get("quantization_config") or {}
    method = quant.get("quant_method")
    if method == "mxfp4":
        return GPT_OSS
    if method == "mxfp8" or (method == "modelopt" and quant.get("quant_algo") == "MXFP8"):
        return EIGHT
    groups = (quant.get("config_groups") or {}).values()
    for kind in (PACKED, EIGHT):
        if method == "compressed-tensors" and (quant.get("format") == kind or any(g.get("format") == kind for g in groups)):
            return kind
    return DEEPSEEK if "fp4" in (config.get("expert_dtype"), quant.get("expert_dtype")) else ""


def from_blocks(blocks: Tensor, scales: Tensor) -> ScaledTensor:
    """GPT-OSS's `*_blocks` uint8 `[.., N, K/32, 16]` and `*_scales` uint8 `[.., N, K/32]` as MXFP4 `[.., N, K]`: a view."""
    want = "uint8 [.., N, K/32, 16]"
    expect(blocks.dtype == torch.uint8, "blocks, dtype", blocks.dtype, want, error=TypeError)
    expect(blocks.dim() >= 3 and blocks.shape[-1] == 16, "blocks, shape", tuple(blocks.shape), want)
    expect(scales.shape == blocks.shape[:-1], "scales, shape", tuple(scales.shape), str(tuple(blocks.shape[:-1])))
    return ScaledTensor.make(blocks.flatten(-2), scales, MXFP4)


def load(ckpt: Checkpoint, kind: str, layer: int, experts: range | None, device: torch.device | str) -> MoELayer:
    """See `checkpoints.load_moe_layer`."""
    return _stacked(ckpt, layer, experts, device) if kind == GPT_OSS else _separate(ckpt, kind, layer, experts, device)


def _chosen(experts: range | None, total: int) -> range:
    chosen = range(total) if experts is None else experts
    fine = chosen.step == 1 and 0 <= chosen.start <= chosen.stop <= total
    expect(fine, "experts", chosen, f"a range with step 1 inside [0, {total}]")
    return chosen


def _stacked(ckpt: Checkpoint, layer: int, experts: range | None, device: torch.device | str) -> MoELayer:
    from .checkpoints import CheckpointError, MoELayer

    blocks = {int(m["layer"]): m["block"] for m in map(_STACKED.fullmatch, ckpt.files) if m}
    expect(layer in blocks, "layer", layer, f"one with experts: {sorted(blocks)}")
    name = f"{blocks[layer]}.experts"
    total = ckpt.header(f"{name}.gate_up_proj_blocks")[1][0]
    chosen = _chosen(experts, total)
    out: dict[str, Any] = {}
    for proj in ("gate_up", "down"):
        parts = []
        for what in ("blocks", "scales"):
            key = f"{name}.{proj}_proj_{what}"
            dtype, shape = ckpt.header(key)
            if dtype != "U8" or len(shape) != 3 + (what == "blocks") or shape[0] != total:
                raise CheckpointError(f"checkpoint {ckpt.path}: {key}: got {dtype} {shape}, expected U8 [{total}, N, K/32"
                                      + (", 16]" if what == "blocks" else "]"))
            parts.append(ckpt.tensor(key)[chosen.start:chosen.stop].to(device, copy=True))
        try:
            out[proj] = from_blocks(*parts)
        except ValueError as e:
            raise CheckpointError(f"checkpoint {ckpt.path}: {name}.{proj}_proj: {e}") from e
        key = f"{name}.{proj}_proj_bias"
        out[f"{proj}_bias"] = ckpt.tensor(key)[chosen.start:chosen.stop].to(device, copy=True) if key in ckpt.files else None
    router = f"{blocks[layer]}.router"
    weight, bias = (ckpt.tensor(f"{router}.{x}").to(device, copy=True) if f"{router}.{x}" in ckpt.files else None
                    for x in ("weight", "bias"))
    routing = {"scoring": "softmax", "renormalize": True, "num_expert_group": None, "topk_group": None, "scaling_factor": 1.0}
    top_k = int(ckpt.config.get("num_experts_per_tok", ckpt.config.get("experts_per_token", 1)))
    return MoELayer(out["gate_up"], out["down"], weight, None, layer, chosen, total, top_k, routing,
                    gate_up_bias=out["gate_up_bias"], down_bias=out["down_bias"], router_logit_bias=bias, interleaved=True)


def _separate(ckpt: Checkpoint, kind: str, layer: int, experts: range | None, device: torch.device | str) -> MoELayer:
    from . import checkpoints as c

    fmt, payload, scales, payload_dtypes, scale_dtypes = PARTS[kind]
    per = fmt.elem.per_byte
    block, names = c._layer_names(ckpt, layer)
    c._check_experts(ckpt, layer, sorted(names))
    total = len(names)
    chosen = _chosen(experts, total)
    found: dict[tuple[int, str], tuple[str, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for e in chosen or range(1):
        for proj in ("gate", "up", "down"):
            kinds = names[e].get(proj, {})
            where = f"checkpoint {ckpt.path}: layer {layer}, expert {e}, {proj} projection"
            scale = next((s for s in scales if s in kinds), "")
            if payload not in kinds or not scale:
                raise c.CheckpointError(f"{where}: got {sorted(kinds.values()) or 'nothing'}, expected {payload} and "
                                        f"{' or '.join(scales)}")
            dtype, shape = ckpt.header(kinds[payload])
            sdtype, sshape = ckpt.header(kinds[scale])
            if dtype not in payload_dtypes or len(shape) != 2 or shape != shapes.setdefault(proj, shape):
                raise c.CheckpointError(f"{where}: {kinds[payload]}: got {dtype} {shape}, expected "
                                        f"{shapes.get(proj, f'[N, K/{per}]')} in {' or '.join(payload_dtypes)}")
            want = fmt.scale_shape((shape[0], per * shape[1]))
            if sdtype not in scale_dtypes or sshape != want:
                raise c.CheckpointError(f"{where}: {kinds[scale]}: got {sdtype} {sshape}, expected {want} in "
                                        f"{' or '.join(scale_dtypes)}")
            found[e, proj] = kinds[payload], kinds[scale]
    inter, hidden = shapes["gate"][0], per * shapes["gate"][1]
    if shapes["up"] != shapes["gate"] or shapes["down"] != (hidden, inter // per):
        raise c.CheckpointError(f"checkpoint {ckpt.path}: layer {layer}: gate {shapes['gate']}, up {shapes['up']} and down "
                                f"{shapes['down']} don't belong together, {'two elements' if per == 2 else 'one element'} a byte")
    gate_up, down = (_empty(fmt, len(chosen), *nk, device) for nk in ((2 * inter, hidden), (hidden, inter)))
    for slot, e in enumerate(chosen):
        for proj, stack, row in (("gate", gate_up, 0), ("up", gate_up, inter), ("down", down, 0)):
            for name, target in zip(found[e, proj], (stack.data, stack.scale)):
                source = ckpt.tensor(name).view(torch.uint8)
                assert target is not None
                target.view(torch.uint8)[slot, row:row + len(source)].copy_(source)
    router = c._router(ckpt, f"{block}.gate.weight", (total, hidden), device)
    biases = [f"{block}.{n}" for n in ("gate.e_score_correction_bias", "gate.bias", "e_score_correction_bias")]
    bias = next((c._router(ckpt, n, (total,), device) for n in biases if n in ckpt.files), None)
    return c.MoELayer(gate_up, down, router, bias, layer, chosen, total, int(ckpt.config.get("num_experts_per_tok", 1)),
                      c._routing(ckpt.config, bias))


def _empty(fmt: Format, experts: int, rows: int, cols: int, device: torch.device | str) -> ScaledTensor:
    shape = (experts, rows, cols)
    return ScaledTensor(torch.empty((experts, rows, cols // fmt.elem.per_byte), dtype=fmt.elem.dtype, device=device),
                        torch.empty(fmt.scale_shape(shape), dtype=torch.uint8, device=device), fmt)
