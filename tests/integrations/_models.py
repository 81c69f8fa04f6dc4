"""Tiny random models of transformers, and checkpoints of them made by hand, offline."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from narrowgemm import MXFP4, FP8_128x128, quantize

NAMES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "minimax", "minimax_m2")
VOCABULARY = 64
# spread-out weights give logits whose best token is no near tie
SHARED = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY, "max_position_embeddings": 256,
          "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}

# A recipe gate is for one product. A layer has two, and the first one's error counts in gate and in up.
LAYER, MODEL = 3, 6
# Every token goes to every expert, so that rounding can't change a choice, which no gate could bound.
SIZES = {"hidden": 128, "inter": 128, "experts": 4, "top_k": 4}


def config(name: str, hidden: int = 64, inter: int = 32, experts: int = 8, top_k: int = 2) -> Any:
    import transformers

    head = hidden // 4
    common = SHARED | {"hidden_size": hidden, "num_experts_per_tok": top_k, "num_key_value_heads": 2}
    if name == "qwen3_moe":
        return transformers.Qwen3MoeConfig(**common, intermediate_size=inter, moe_intermediate_size=inter, num_experts=experts,
                                           head_dim=head)
    if name == "mixtral":
        return transformers.MixtralConfig(**common, intermediate_size=inter, num_local_experts=experts)
    if name == "deepseek_v3":
        return transformers.DeepseekV3Config(
            **common | {"num_key_value_heads": 4}, intermediate_size=inter, moe_intermediate_size=inter,
            n_routed_experts=experts, n_group=2, topk_group=1, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=16,
            qk_rope_head_dim=8, v_head_dim=16, first_k_dense_replace=1)
    if name == "gpt_oss":
        return transformers.GptOssConfig(
            **common, intermediate_size=inter, num_local_experts=experts, head_dim=head, sliding_window=16,
            layer_types=["full_attention", "sliding_attention"],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    if name == "minimax":
        return transformers.MiniMaxConfig(**common, intermediate_size=inter, num_local_experts=experts, head_dim=head,
                                          block_size=16, layer_types=["full_attention", "linear_attention"])
    return transformers.MiniMaxM2Config(**common, intermediate_size=inter, num_local_experts=experts, head_dim=head,
                                        rotary_dim=head // 2)


def build(name: str, dtype: torch.dtype = torch.float32, implementation: str = "eager", seed: int = 0, **sizes: int) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(name, **sizes), dtype=dtype, experts_implementation=implementation)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("_bias"):  # GPT-OSS starts them at zero, where a bias that is missing would not show
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def fp8_experts(config_: Any, block: tuple[int, int] | None, scale_fmt: str, expert_dtype: str) -> Any:
    """transformers' module of experts of an FP8 checkpoint; since 5.2x the type of its weights is an argument."""
    import inspect

    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
    from transformers.integrations.moe import use_experts_implementation

    config_.expert_dtype, config_._experts_implementation = expert_dtype, "narrowgemm"
    kind = FP8Experts if hasattr(FP8Experts.__init__, "__wrapped__") else \
        use_experts_implementation(experts_class=FP8Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    there = inspect.signature(kind.__init__).parameters
    if "scale_fmt" not in there:
        pytest.skip("this transformers has FP8 experts with float scales alone")
    own = {"expert_dtype": expert_dtype} if "expert_dtype" in there else {}
    return kind(config_, block_size=block, scale_fmt=scale_fmt, **own)


def prompt(batch: int = 2, length: int = 6) -> Tensor:
    return torch.arange(batch * length).reshape(batch, length) % (VOCABULARY - 3) + 3


def greedy(model: Any, ids: Tensor, tokens: int = 8) -> tuple[Tensor, Tensor]:
    """The new tokens `[B, tokens]` and the logits that chose them, float32 `[tokens, B, V]`."""
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                         output_logits=True, return_dict_in_generate=True)
    return out.sequences[:, ids.shape[1]:], torch.stack(out.logits).float()


def same_but_for_ties(ours: Tensor, eager: Tensor, logits: Tensor, tie: float) -> bool:
    """Whether two greedy runs agree, up to where a row's two best logits of the eager run were within `tie`.

    Past such a place the rows continue different texts and say nothing about each other.
    """
    for row in range(eager.shape[0]):
        differ = (ours[row] != eager[row]).nonzero()
        if differ.numel():
            best = logits[int(differ[0]), row].topk(2).values
            if best[0] - best[1] > tie:
                return False
    return True


def save(folder: Path, config_: Any, tensors: dict[str, Tensor], quantization: dict[str, Any] | None = None) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    doc = json.loads(config_.to_json_string(use_diff=False))
    if quantization:
        doc["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(doc))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_wide(folder: Path, model: Any) -> Path:
    """The model as transformers writes it."""
    model.save_pretrained(folder)
    return folder


def write_fp8(folder: Path, model: Any, *, attention: bool = True) -> Path:
    """A Qwen3-MoE model in 128 x 128 blocks, a tensor an expert and projection, as Qwen3-FP8 ships them.

    Without `attention` only the experts are narrow.
    """
    tensors = {}
    for name, value in model.state_dict().items():
        if attention and ".self_attn." in name and name.endswith("_proj.weight"):
            q = quantize(value, FP8_128x128)
            tensors |= {name: q.data, f"{name}_scale_inv": q.scale}
            continue
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = value
            continue
        base = name.rpartition(".")[0]
        parts = {"gate_proj": value.chunk(2, 1)[0], "up_proj": value.chunk(2, 1)[1]} if "gate_up" in name else {"down_proj": value}
        for projection, stack in parts.items():
            for e, weight in enumerate(stack):
                q = quantize(weight, FP8_128x128)
                tensors[f"{base}.{e}.{projection}.weight"] = q.data
                tensors[f"{base}.{e}.{projection}.weight_scale_inv"] = q.scale
    return save(folder, model.config, tensors, {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"] + [r".*\.self_attn\..*"] * (not attention)})


def write_fp8_experts(folder: Path, model: Any) -> Path:
    """Any model, with its experts alone in 128 x 128 blocks: a tensor an expert and projection, by the names of its own checkpoints."""
    from safetensors.torch import load_file

    tensors = {}
    for name, value in load_file(write_wide(folder, model) / "model.safetensors").items():
        if re.search(r"\.experts\.\d+\.\w+\.weight$", name):
            q = quantize(value, FP8_128x128)
            tensors |= {name: q.data, f"{name}_scale_inv": q.scale}
        else:
            tensors[name] = value
    assert any(t.dtype == torch.float8_e4m3fn for t in tensors.values())
    return save(folder, model.config, tensors, {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": [r".*(?<!\.experts)$"]})


def write_mxfp4(folder: Path, model: Any) -> Path:
    """A GPT-OSS model with experts in `*_blocks` and `*_scales`, as GPT-OSS ships them."""
    tensors = {}
    for name, value in model.state_dict().items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = value
            continue
        q = quantize(value.mT, MXFP4)  # [E, N, K]
        tensors[f"{name}_blocks"] = q.data.unflatten(-1, (-1, 16))
        tensors[f"{name}_scales"] = q.scale
    return save(folder, model.config, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "lm_head"]})


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from narrowgemm.integrations import transformers as narrow

    narrow.register()


@pytest.fixture
def fp8_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers dequantises FP8 checkpoints where there is no GPU; without its check it keeps them."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *a, **k: None)


@torch.no_grad()
def logits(model: Any, implementation: str | None = None) -> torch.Tensor:
    if implementation:
        model.set_experts_implementation(implementation)
    return model(prompt(4, 12)).logits.float()
