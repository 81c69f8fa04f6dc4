"""narrowgemm as an experts implementation of Hugging Face transformers (>= 5.7).

    from narrowgemm.integrations import transformers as narrow

    narrow.register()
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="narrowgemm", device_map="cuda")

    model = narrow.from_pretrained(path, quantize="mxfp4", device_map="cuda")      # experts quantised as they are read

`register` enters the name in both of transformers' registries: one serves the experts of BF16 models, the other those of
FP8 checkpoints. Nothing here imports transformers before it is called, and nothing changes before `register` is.

| model | experts | runs as |
| --- | --- | --- |
| BF16, FP16, FP32 | as they are | product in their type: on a GPU our 16-bit kernel for few rows, torch's for many BF16 ones |
| block FP8 checkpoint (DeepSeek-V3, Qwen3-FP8, ...) | E4M3, 128 x 128 | FP8 product, activations 1 x 128 |
| DeepSeek-V4 style `expert_dtype="fp4"` | MXFP4 | FP8 1 x 128 x MXFP4 |
| GPT-OSS MXFP4 checkpoint, through `from_pretrained` | MXFP4, as on disk | BF16 x MXFP4 |
| `quantize="fp8" / "mxfp8" / "mxfp4"` | quantised at load, one tensor at a time | see `ACTIVATIONS` |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import expect

if TYPE_CHECKING:
    import torch

NAME = "narrowgemm"
LEAST = "5.7"
# format of weights for each value of `quantize`, and the format that activations take beside it by default
WEIGHTS = {"fp8": "fp8_128x128", "mxfp8": "mxfp8", "mxfp4": "mxfp4"}
ACTIVATIONS = {"fp8": "fp8_1x128", "mxfp8": "mxfp8", "mxfp4": "bf16"}
ORDERS = ("bf16", "fp8")        # of prepacked MXFP4 weights that meet BF16 activations

__all__ = ["ACTIVATIONS", "NAME", "WEIGHTS", "from_pretrained", "prepack", "quantize", "register"]


def register() -> str:
    """Enter `narrowgemm` in transformers' registries of experts and of quantisers; the name. Again is harmless.

    Raises ImportError where transformers is missing or older than 5.7, which takes no names but its own.
    """
    try:
        from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as e:
        raise ImportError(f"narrowgemm.integrations.transformers needs transformers >= {LEAST}: "
                          f"pip install '.[transformers]' in a checkout of narrowgemm ({e})") from e
    from . import experts, quantizer

    ExpertsInterface.register(NAME, experts.forward)
    FP8ExpertsInterface.register(NAME, experts.fp8_forward)
    quantizer.register()
    return NAME


def from_pretrained(path: str, *, quantize: str | None = None, activations: str | None = None, auto_class: Any = None,
                    prepacked: bool | str | None = None, **options: Any) -> torch.nn.Module:
    """`auto_class.from_pretrained(path, **options)` (default: AutoModelForCausalLM) with experts on narrowgemm.

    quantize: None keeps the experts as they are; 'fp8', 'mxfp8' or 'mxfp4' quantises them as they are read, so that the
        wide weights of one projection of one layer are all that is held beside the model. Other layers stay as they are.
    activations: what the experts' inputs are quantised to, default by `ACTIVATIONS`; 'bf16' leaves them.
    prepacked: bring MXFP4 / MXFP8 experts into the order that the Hopper kernels read, see `prepack`, whose `order` it can be;
        None: on a Hopper GPU.

    A GPT-OSS checkpoint in MXFP4 keeps its experts bit for bit (`quantize` None or 'mxfp4'). Of a block FP8 checkpoint
    the linear layers run on `narrowgemm.gemm`, too: transformers' own way is a kernel from the hub. Raises ValueError for
    another value of `quantize`, or one that a checkpoint that is quantised already can't have.
    """
    import transformers

    from .quantizer import settings

    register()
    expect(quantize is None or quantize in WEIGHTS, "quantize", repr(quantize), f"None or one of {sorted(WEIGHTS)}")
    _check_prepacked(prepacked)
    auto_class = auto_class or transformers.AutoModelForCausalLM
    config = options.pop("config", None) or transformers.AutoConfig.from_pretrained(path)
    there = getattr(config, "quantization_config", None)
    there = there if there is None or isinstance(there, dict) else there.to_dict()
    if there is None:
        if quantize is not None:
            options["quantization_config"] = settings(quantize, activations)
    elif there.get("quant_method") == "mxfp4":
        expect(quantize in (None, "mxfp4"), "quantize of an MXFP4 checkpoint", repr(quantize), "None or 'mxfp4'")
        config.quantization_config = settings("mxfp4", activations, stored="blocks").to_dict()
    else:
        expect(quantize is None, f"quantize of a checkpoint that is quantised already ({there.get('quant_method')})",
               repr(quantize), "None: its experts run in their own format")
    model = auto_class.from_pretrained(path, config=config, experts_implementation=NAME, **options)
    if there is not None and there.get("quant_method") == "fp8":
        from . import linears

        linears.serve(model)
    _prepack(model, prepacked)
    return model


def prepack(model: torch.nn.Module, order: str = "bf16") -> int:
    """Bring MXFP4 / MXFP8 experts (those that `quantize` or `from_pretrained` made, and a checkpoint's `expert_dtype="fp4"`) into
    the order that the Hopper kernels for narrow weights read (`narrowgemm.prepack`), in place, a layer at a time; how many layers.
    It is a permutation: results are those of the same bits. Layers whose scales spread too far for it stay as they are.

    order: 'fp8' gives MXFP4 experts of a BF16 model the order that BF16 activations are multiplied with on FP8 tensor cores
        (`narrowgemm.prepack(activations="fp8")` says what for), 'bf16' the one for activations of every format; experts with FP8
        1x128 activations always get the former.
    """
    from ...errors import Unsupported
    from . import experts
    from . import weights as stored

    expect(order in ORDERS, "order", repr(order), f"one of {ORDERS}")
    done = 0
    for layer in model.modules():
        if stored.is_experts(layer):
            try:
                done += experts.prepack(layer, order)
            except Unsupported:  # scales of one row more than 2^131 apart: the portable kernel takes them
                continue
    return done


def _check_prepacked(wanted: object) -> None:
    """Before anything is read or quantised, which takes minutes."""
    expect(wanted is None or isinstance(wanted, bool) or wanted in ORDERS, "prepacked", repr(wanted),
           f"None, True, False or an order, one of {ORDERS}")


def _prepack(model: torch.nn.Module, wanted: bool | str | None) -> None:
    """`prepack` where it is `wanted`, in that order if it is one, or where None is and every parameter is on a Hopper GPU."""
    from ...arch import detect

    if wanted is None:
        devices = {p.device for p in model.parameters()}
        wanted = bool(devices) and all(d.type == "cuda" and detect(d).target == "sm90" for d in devices)
    if wanted:
        prepack(model, wanted if isinstance(wanted, str) else ORDERS[0])


def quantize(model: torch.nn.Module, weights: str, *, activations: str | None = None,
             prepacked: bool | str | None = None) -> int:
    """Quantise the experts of a model that is loaded, in place, one projection at a time; how many expert layers.

    `weights`, `activations` and `prepacked` as in `from_pretrained`. The model must use experts that transformers lets be replaced,
    with `model.set_experts_implementation("narrowgemm")`. Raises ValueError where it has none, or they are narrow already.
    """
    from . import weights as stored

    expect(weights in WEIGHTS, "weights", repr(weights), f"one of {sorted(WEIGHTS)}")
    _check_prepacked(prepacked)
    layers = [m for m in model.modules() if stored.is_experts(m)]
    expect(bool(layers), "expert layers of the model", 0, "at least one that `experts_implementation` serves")
    for layer in layers:
        stored.quantize_(layer, WEIGHTS[weights], activations or ACTIVATIONS[weights])
    _prepack(model, prepacked)
    return len(layers)
