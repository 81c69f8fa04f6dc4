"""The quantiser `narrowgemm` of transformers: experts in FP8, MXFP8 or MXFP4, everything else as the checkpoint has it.

Imported by `register` only: it needs transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...errors import expect
from ...formats import MXFP4, get_format
from . import ACTIVATIONS, NAME, WEIGHTS, weights

STORED = ("wide", "blocks")


class NarrowGemmConfig(QuantizationConfigMixin):
    """`quantization_config` for `from_pretrained`.

    quantize: 'fp8', 'mxfp8' or 'mxfp4'. activations: a format for the experts' inputs, default by `ACTIVATIONS`.
    stored: how the checkpoint holds experts: 'wide', or 'blocks', GPT-OSS's `*_blocks` and `*_scales`.
    """

    def __init__(self, quantize: str = "fp8", activations: str | None = None, stored: str = "wide", **_: Any) -> None:
        expect(quantize in WEIGHTS, "quantize", repr(quantize), f"one of {sorted(WEIGHTS)}")
        expect(stored in STORED, "stored", repr(stored), f"one of {STORED}")
        self.quant_method = NAME     # transformers' enum holds its own methods only
        self.quantize = quantize
        self.activations = activations or ACTIVATIONS[quantize]
        self.stored = stored
        weights.formats(WEIGHTS[quantize], self.activations)


def settings(quantize: str, activations: str | None = None, stored: str = "wide") -> NarrowGemmConfig:
    return NarrowGemmConfig(quantize, activations, stored)


class NarrowGemmQuantizer(HfQuantizer):
    """Replaces the parameters of expert layers by narrow ones and fills them as the checkpoint is read."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        layers = [m for m in model.modules() if weights.is_experts(m)]
        expect(bool(layers), f"expert layers of {type(model).__name__}", 0,
               "at least one that `experts_implementation` serves")
        for layer in layers:
            weights.reserve(layer, WEIGHTS[config.quantize], config.activations, payload=config.stored == "blocks")
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        module = model.get_submodule(path)
        return getattr(module, weights.FORMATS, None) is not None and name in weights.projections(module)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes an element that `param_name` will have, for transformers' estimate of the memory it needs."""
        if self.param_needs_quantization(model, param_name):
            return get_format(WEIGHTS[self.quantization_config.quantize]).elem.bits / 8
        return super().param_element_size(model, param_name, param)

    def get_quantize_ops(self) -> ConversionOps:
        return Quantize()

    def get_weight_conversions(self) -> list[WeightConverter]:
        if self.quantization_config.stored != "blocks":
            return []
        return [WeightConverter(source_patterns=[f"{p}_blocks", f"{p}_scales"], target_patterns=p,
                                operations=[FromBlocks()]) for p in ("gate_up_proj", "down_proj")]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for layer in model.modules():
            if getattr(layer, weights.FORMATS, None) is not None:
                for name in weights.projections(layer):
                    for parameter in (getattr(layer, name), getattr(layer, f"{name}_scale")):
                        parameter.requires_grad_(False)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class Quantize(ConversionOps):
    """A wide stack of experts, as it was read and merged, into payload and scales."""

    def convert(self, input_dict: dict[str, Any], *, model: Any = None, full_layer_name: str = "",
                missing_keys: set[str] | None = None, **kwargs: Any) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            module = model.get_submodule(name.rpartition(".")[0])
            weight = value[0] if isinstance(value, list) else value
            q = weights.quantized(module, weight, getattr(module, weights.FORMATS)[0])
            assert q.scale is not None
            out |= {name: q.data, f"{name}_scale": q.scale}
        return out


class FromBlocks(ConversionOps):
    """GPT-OSS's `*_blocks` uint8 `[E, N, K/32, 16]` and `*_scales` `[E, N, K/32]`: MXFP4 as it is, low nibble = even K."""

    def convert(self, input_dict: dict[str, Any], *, full_layer_name: str = "", **kwargs: Any) -> dict[str, Tensor]:
        found = {k: v[0] if isinstance(v, list) else v for k, v in input_dict.items()}
        blocks = next(v for k, v in found.items() if k.endswith("_blocks"))
        scale = next(v for k, v in found.items() if k.endswith("_scales"))
        expect(blocks.dtype == torch.uint8 and blocks.shape[-1] == MXFP4.group[1] // 2 and blocks.shape[:-1] == scale.shape,
               f"{full_layer_name}_blocks", f"{blocks.dtype} {tuple(blocks.shape)}",
               f"uint8 {(*scale.shape, MXFP4.group[1] // 2)}, as the scales imply")
        return {full_layer_name: blocks.flatten(-2).contiguous(), f"{full_layer_name}_scale": scale.contiguous()}


def register() -> None:
    """Enter both classes under their name; transformers' own functions refuse a name that is there."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = NarrowGemmConfig
    AUTO_QUANTIZER_MAPPING[NAME] = NarrowGemmQuantizer
