"""Checkpoints that transformers reads: FP8 in blocks, with scales of other kinds, FP4, GPT-OSS's MXFP4; and states that went through `prepack`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from narrowgemm import quantize as quantised
from narrowgemm.formats import BF16, FP8_128x128
from narrowgemm.integrations import transformers as narrow
from narrowgemm.integrations.transformers import weights
from narrowgemm.testing.numerics import calc_diff, recipe_gate

from . import _models as models
from ._models import LAYER, MODEL, SIZES, fp8_on_cpu, logits, registered  # noqa: F401


@pytest.mark.usefixtures("fp8_on_cpu")
def test_fp8_checkpoint(tmp_path: Path) -> None:
    model = models.build("qwen3_moe", torch.bfloat16, **SIZES)
    loaded = narrow.from_pretrained(models.write_fp8(tmp_path / "fp8", model, attention=False), dtype=torch.bfloat16)
    experts, original = loaded.model.layers[0].mlp.experts, model.model.layers[0].mlp.experts
    assert type(experts).__name__ == "FP8Experts" and experts.gate_up_proj.dtype == torch.float8_e4m3fn
    assert calc_diff(weights.fp8(experts).up.dequantize(), original.gate_up_proj.float()) < recipe_gate(FP8_128x128, BF16)
    assert 1e-7 < calc_diff(logits(loaded), logits(model, "eager")) < MODEL * recipe_gate(FP8_128x128, FP8_128x128)
    tokens, _ = models.greedy(loaded, models.prompt())
    assert tokens.shape == (2, 8)


@pytest.mark.usefixtures("fp8_on_cpu")
@pytest.mark.parametrize("name", [n for n in models.NAMES if n not in ("qwen3_moe", "gpt_oss")])
def test_fp8_checkpoints_of_other_models(name: str, tmp_path: Path) -> None:
    """Mixtral's and MiniMax's per-expert names, DeepSeek's dense first layer and shared experts."""
    model = models.build(name, torch.bfloat16, **SIZES)
    loaded = narrow.from_pretrained(models.write_fp8_experts(tmp_path / "fp8", model), dtype=torch.bfloat16)
    ours, original = (m.model.layers[1].mlp.experts for m in (loaded, model))
    assert type(ours).__name__ == "FP8Experts" and ours.gate_up_proj.dtype == torch.float8_e4m3fn
    call = torch.randn(64, 128).bfloat16(), torch.rand(64, 4).argsort(1), torch.rand(64, 4)
    with torch.no_grad():
        assert 1e-7 < calc_diff(ours(*call), original(*call)) < LAYER * recipe_gate(FP8_128x128, FP8_128x128)
    assert models.greedy(loaded, models.prompt(), 2)[0].shape == (2, 2)


@pytest.mark.usefixtures("fp8_on_cpu")
def test_fp8_linears_run_without_kernels_from_the_hub(tmp_path: Path) -> None:
    from narrowgemm.integrations.transformers import linears

    model = models.build("qwen3_moe", torch.bfloat16, **SIZES)
    loaded = narrow.from_pretrained(models.write_fp8(tmp_path / "fp8", model), dtype=torch.bfloat16)
    x = torch.randn(2, 9, 128, dtype=torch.bfloat16)
    for name in ("q_proj", "k_proj", "o_proj"):
        ours, original = (getattr(m.model.layers[1].self_attn, name) for m in (loaded, model))
        assert type(ours).__name__ == "NarrowFP8Linear"
        got, want = ours(x), original(x)
        assert got.shape == want.shape and 1e-7 < calc_diff(got, want) < recipe_gate(FP8_128x128, FP8_128x128)
    tokens, _ = models.greedy(loaded, models.prompt())
    assert tokens.shape == (2, 8)
    fp8_class = type(ours).__mro__[1]
    for module in (ours, loaded.model.layers[0].self_attn.q_proj):      # one with scales of its activations stays transformers' own
        module.__class__ = fp8_class
    ours.activation_scheme = "static"
    assert linears.serve(torch.nn.ModuleList([ours, loaded.model.layers[0].self_attn.q_proj])) == 1 and type(ours) is fp8_class
    ours.__class__ = linears.NarrowFP8Linear
    ours.bias = torch.nn.Parameter(torch.randn(got.shape[-1]))
    assert torch.equal(ours(x), got + ours.bias.bfloat16())


def test_fp8_experts_in_other_blocks_are_refused() -> None:
    experts = models.fp8_experts(models.config("qwen3_moe", hidden=128, inter=128, experts=2), (64, 64), "float", "fp8")
    with pytest.raises(ValueError, match=r"block_size of FP8 experts: got \(64, 64\), expected \(128, 128\)"):
        weights.fp8(experts)


@pytest.mark.usefixtures("fp8_on_cpu")
def test_fp8_scale_kinds() -> None:
    """One scale a matrix, E8M0 blocks and packed FP4, each against the module's own values."""
    config = models.config("qwen3_moe", hidden=128, inter=128, experts=2)
    torch.manual_seed(0)
    for block, fmt, fp4 in ((None, "float", False), ((128, 128), "ue8m0", False), ((128, 128), "float", False),
                            (None, "ue8m0", True)):
        experts = models.fp8_experts(config, block, fmt, "fp4" if fp4 else "fp8")
        values = {}
        for name in ("gate_up_proj", "down_proj"):
            data, scale = getattr(experts, name), getattr(experts, f"{name}_scale_inv")
            if fp4:
                data.data.copy_(torch.randint(-128, 127, data.shape, dtype=torch.int8))
            else:
                data.data.copy_((torch.randn(data.shape) * 64).to(data.dtype))
            scale.data.copy_((2.0 ** torch.randint(-9, -6, scale.shape)).to(scale.dtype))
            rows, cols = (1, 32) if fp4 else (data.shape[1] // scale.shape[1], data.shape[2] // scale.shape[2])
            w = weights.ScaledTensor(data.view(torch.uint8), None, weights.MXFP4) if fp4 else None
            wide = unpack_fp4(w.data) if w else data.float()
            values[name] = wide * scale.float().repeat_interleave(rows, 1).repeat_interleave(cols, 2)
        stored = weights.fp8(experts)
        assert torch.equal(stored.up.dequantize(), values["gate_up_proj"])
        assert torch.equal(stored.down.dequantize(), values["down_proj"])


@pytest.mark.parametrize("gate", ["swiglu", "swiglu_oai", "limit", "softcap"])
def test_fp4_experts_of_a_checkpoint_are_prepacked(gate: str) -> None:
    """DeepSeek-V4's experts: the same numbers out of the order that the Hopper kernels read, whichever the module's gate is."""
    from transformers.integrations.finegrained_fp8 import FP8Experts

    from narrowgemm.integrations.transformers import experts as forward

    config = models.config("qwen3_moe", hidden=128, inter=64, experts=4)
    if gate in ("swiglu_oai", "limit"):
        config.swiglu_limit = 1.5
        config.swiglu_alpha = 1.702 if gate == "swiglu_oai" else None
    if gate == "softcap":
        if not hasattr(models.fp8_experts(config, None, "ue8m0", "fp4"), "gate_softcap"):
            pytest.skip("this transformers has no such gate")
        config.mlp_gate_softcap, config.mlp_up_softcap = 1.0, 2.0
    layer = models.fp8_experts(config, None, "ue8m0", "fp4")
    torch.manual_seed(0)
    for name in ("gate_up_proj", "down_proj"):
        data, scale = getattr(layer, name), getattr(layer, f"{name}_scale_inv")
        data.data.copy_(torch.randint(-128, 127, data.shape, dtype=torch.int8))
        scale.data.copy_((2.0 ** torch.randint(-7, -4, scale.shape)).to(scale.dtype))
    kind = forward.fused(layer)
    if gate == "swiglu_oai":        # a release whose gate has a soft cap, too
        layer.gate_softcap = 1.0
        assert forward.fused(layer) is None
        layer.gate_softcap = None
    assert (None if kind is None else kind[0]) == {"swiglu": "swiglu", "swiglu_oai": "swiglu_oai"}.get(gate)
    call = torch.randn(33, 128).bfloat16(), torch.rand(33, 4).argsort(1)[:, :2], torch.rand(33, 2)
    with torch.no_grad():
        want = forward.fp8_forward(layer, *call)
        w = weights.fp8(layer)
        up = (quantize_rows(call[0]) @ w.up.dequantize().mT).bfloat16()             # [E, T, 2I]
        down = (quantize_rows(FP8Experts._apply_gate(layer, up)) @ w.down.dequantize().mT).bfloat16()
        hit = torch.nn.functional.one_hot(call[1], 4).float()                       # [T, K, E]
        assert calc_diff(want, torch.einsum("eth,tke,tk->th", down.float(), hit, call[2])) < 1e-4
        state = layer.state_dict()
        assert narrow.prepack(torch.nn.ModuleList([layer])) == 1 and narrow.prepack(torch.nn.ModuleList([layer])) == 0
        assert weights.fp8(layer).up.pair == "" and weights.fp8(layer).up.top is not None
        assert calc_diff(forward.fp8_forward(layer, *call), want) < 1e-5
        layer.to(torch.float32)
        assert calc_diff(forward.fp8_forward(layer, *call), want) < 1e-5
    with pytest.raises(RuntimeError, match="narrow_fp8_sm90_v1"):
        layer.load_state_dict(state)


def quantize_rows(x: torch.Tensor) -> torch.Tensor:
    return quantised(x, "fp8_1x128").dequantize()


def test_a_prepacked_state_is_never_reinterpreted() -> None:
    """It goes round, and one in another order, or in none, is refused, whichever of the two is the module's."""
    def build(prepacked: bool) -> Any:
        model = models.build("qwen3_moe", torch.bfloat16, implementation="narrowgemm", **SIZES)
        narrow.quantize(model, "mxfp4", prepacked=prepacked)
        return model

    plain, one, two = build(False), build(True), build(True)
    for p in two.parameters():
        if not p.is_floating_point():
            p.data.zero_()
    two.load_state_dict(one.state_dict())
    assert torch.equal(logits(two), logits(one))
    older = {k.replace("_v1", "_v0"): v for k, v in one.state_dict().items()}
    for module, state in ((plain, one.state_dict()), (one, plain.state_dict()), (one, older)):
        with pytest.raises(RuntimeError, match="narrow_sm90_v1"):
            module.load_state_dict(state)


def unpack_fp4(data: torch.Tensor) -> torch.Tensor:
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.stack((data & 15, data >> 4), -1).flatten(-2).long()
    return table[codes & 7] * torch.where(codes >= 8, -1.0, 1.0)


def test_gpt_oss_mxfp4_checkpoint_keeps_its_bits(tmp_path: Path) -> None:
    model = models.build("gpt_oss", torch.bfloat16, hidden=128, inter=96)
    folder = models.write_mxfp4(tmp_path / "mxfp4", model)
    loaded = narrow.from_pretrained(folder, dtype=torch.bfloat16)
    narrow.quantize(model, "mxfp4")
    for a, b in zip(loaded.model.layers, model.model.layers):
        for name in ("gate_up_proj", "down_proj", "gate_up_proj_scale", "gate_up_proj_bias", "down_proj_bias"):
            assert torch.equal(getattr(a.mlp.experts, name), getattr(b.mlp.experts, name)), name
    assert torch.equal(logits(loaded), logits(model, "narrowgemm"))
    with pytest.raises(ValueError, match="None or 'mxfp4'"):
        narrow.from_pretrained(folder, quantize="fp8")
    for call in (lambda: narrow.from_pretrained("no such folder", prepacked="int4"),     # before anything is read
                 lambda: narrow.quantize(torch.nn.Module(), "mxfp4", prepacked="int4")):
        with pytest.raises(ValueError, match="prepacked: got 'int4'"):
            call()
