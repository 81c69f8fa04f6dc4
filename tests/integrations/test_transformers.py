"""narrowgemm as transformers' experts implementation: tiny random models and hand-made checkpoints, offline."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from narrowgemm import Unsupported
from narrowgemm import quantize as quantised
from narrowgemm.formats import BF16, FP8_128x128, get_format
from narrowgemm.integrations import transformers as narrow
from narrowgemm.integrations.transformers import weights
from narrowgemm.prepack_bits import FP8_PREPACK
from narrowgemm.testing.numerics import calc_diff, recipe_gate

from . import _models as models

# A recipe gate is for one product. A layer has two, and the first one's error counts in gate and in up.
LAYER, MODEL = 3, 6
# Every token goes to every expert, so that rounding can't change a choice, which no gate could bound.
SIZES = {"hidden": 128, "inter": 128, "experts": 4, "top_k": 4}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
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
    return model(models.prompt(4, 12)).logits.float()


def test_both_registries_have_the_name() -> None:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    assert narrow.register() == narrow.register() == "narrowgemm"
    assert "narrowgemm" in ALL_EXPERTS_FUNCTIONS and "narrowgemm" in ALL_FP8_EXPERTS_FUNCTIONS


def test_importing_is_inert() -> None:
    code = ("import sys, narrowgemm, narrowgemm.integrations.transformers as t\n"
            "assert 'transformers' not in sys.modules, 'imported transformers'\n"
            "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS\n"
            "assert 'narrowgemm' not in ALL_EXPERTS_FUNCTIONS, 'registered by itself'")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", models.NAMES)
def test_fp32_equals_eager(name: str) -> None:
    model = models.build(name)
    assert calc_diff(logits(model, "narrowgemm"), logits(model, "eager")) < 1e-10


@pytest.mark.parametrize("name", models.NAMES)
def test_bf16_generates_the_tokens_of_eager(name: str) -> None:
    model = models.build(name, torch.bfloat16)
    tokens, scores = models.greedy(model, models.prompt())
    model.set_experts_implementation("narrowgemm")
    ours, ours_scores = models.greedy(model, models.prompt())
    # both round every step to BF16, in another order; a model of two layers makes about 1e-5 of it
    assert calc_diff(ours_scores[0], scores[0]) < 2e-4
    assert models.same_but_for_ties(ours, tokens, scores, tie=0.1)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("quantize", sorted(narrow.WEIGHTS))
def test_quantised_in_place(name: str, quantize: str) -> None:
    model = models.build(name, **SIZES)
    experts = model.model.layers[0].mlp.experts
    call = torch.randn(64, 128), torch.rand(64, 4).argsort(1), torch.rand(64, 4)
    with torch.no_grad():
        want_layer, want = experts(*call), logits(model, "eager")
    assert narrow.quantize(model, quantize) == 2
    formats = getattr(experts, weights.FORMATS)
    assert formats[0] == get_format(narrow.WEIGHTS[quantize])
    assert experts.down_proj.element_size() == 1 and experts.down_proj.shape[1] == 128
    got = logits(model, "narrowgemm")
    with torch.no_grad():
        assert 1e-7 < calc_diff(experts(*call), want_layer) < LAYER * recipe_gate(*formats)
    assert 1e-7 < calc_diff(got, want) < MODEL * recipe_gate(*formats)
    with pytest.raises(ValueError, match="quantised already"):
        narrow.quantize(model, quantize)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("quantize, order", [("mxfp4", "bf16"), ("mxfp4", "fp8"), ("mxfp8", "bf16")])
def test_prepacked(name: str, quantize: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepacked experts are the same numbers, whether their activation is fused or the module's own runs behind."""
    from narrowgemm.integrations.transformers import experts

    model = models.build(name, torch.bfloat16, **SIZES)
    narrow.quantize(model, quantize, prepacked=False)
    model.set_experts_implementation("narrowgemm")
    layer = model.model.layers[0].mlp.experts
    call = torch.randn(64, 128).bfloat16(), torch.rand(64, 4).argsort(1), torch.rand(64, 4)
    with torch.no_grad():
        want, whole = layer(*call), logits(model)
        with pytest.raises(ValueError, match="order: got 'fp4'"):
            narrow.prepack(model, "fp4")
        assert narrow.prepack(model, order) == 2 and narrow.prepack(model) == 0
        assert (weights.plain(layer).up.prepack == FP8_PREPACK) == (order == "fp8")
        assert weights.plain(layer).up.pair == ("interleaved" if name == "gpt_oss" else "halves")
        assert calc_diff(layer(*call), want) < 1e-4
        layer.to(torch.float32)     # payload and scales stay what they are
        assert calc_diff(layer(*call), want) < 1e-4
        assert calc_diff(logits(model), whole) < 1e-2  # a random model makes more of a rounding that moved
        again = models.build(name, torch.bfloat16, implementation="narrowgemm", **SIZES)
        monkeypatch.setattr(experts, "fused", lambda module: None)
        narrow.quantize(again, quantize, prepacked=order)
        layer = again.model.layers[0].mlp.experts
        assert weights.plain(layer).up.pair == ""
        assert calc_diff(layer(*call), want) < 5e-4  # the module's own gate reads what was rounded to BF16


AT_LOAD = {"qwen3_moe": ("fp8", "mxfp8", "mxfp4"), "gpt_oss": ("fp8", "mxfp8", "mxfp4"), "mixtral": ("mxfp4",), "deepseek_v3": ("fp8",),
           "minimax": ("mxfp8",), "minimax_m2": ("mxfp4",)}


@pytest.mark.parametrize("name", models.NAMES)
def test_quantised_at_load_equals_quantised_in_place(name: str, tmp_path: Path) -> None:
    model = models.build(name, torch.bfloat16, **SIZES)
    folder = models.write_wide(tmp_path / "wide", model)
    for kind in AT_LOAD[name]:
        again = models.build(name, torch.bfloat16, **SIZES)
        narrow.quantize(again, kind)
        loaded = narrow.from_pretrained(folder, quantize=kind, dtype=torch.bfloat16)
        narrow_ones = {n: p for n, p in loaded.model.layers[1].mlp.experts.named_parameters() if p.element_size() == 1}
        assert not any(p.requires_grad for p in narrow_ones.values())
        size = loaded.hf_quantizer.param_element_size(loaded, "model.layers.1.mlp.experts.down_proj", narrow_ones["down_proj"])
        assert size == (0.5 if kind == "mxfp4" else 1.0)     # what memory is estimated by
        assert torch.equal(logits(loaded), logits(again, "narrowgemm"))


def test_activations_can_be_chosen() -> None:
    model = models.build("qwen3_moe", **SIZES)
    want = logits(model, "eager")
    narrow.quantize(model, "fp8", activations="bf16")
    finer = calc_diff(logits(model, "narrowgemm"), want)
    coarse = models.build("qwen3_moe", **SIZES)
    narrow.quantize(coarse, "fp8", activations="mxfp4")
    assert finer < calc_diff(logits(coarse, "narrowgemm"), want)
    with pytest.raises(ValueError, match="scales by row"):
        narrow.quantize(models.build("qwen3_moe"), "fp8", activations="fp8_tensor")


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


@pytest.mark.parametrize("name", models.NAMES)
def test_the_fused_layer_is_the_steps_around_the_modules_own_gate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken for SwiGLU, or GPT-OSS's, is that; a gate that nobody knows is called."""
    from narrowgemm.integrations.transformers import experts

    model = models.build(name, **SIZES)
    narrow.quantize(model, "fp8")
    layer = next(m for m in model.modules() if weights.is_experts(m))
    assert experts.fused(layer) == (("swiglu_oai", (1.702, 7.0), True) if name == "gpt_oss" else ("swiglu", (), False))
    got = logits(model, "narrowgemm")
    monkeypatch.setattr(experts, "fused", lambda module: None)
    assert calc_diff(got, logits(model)) < 1e-5
    monkeypatch.undo()
    monkeypatch.setattr(type(layer), "_apply_gate", lambda self, x: x[..., :x.shape[-1] // 2] * 0)
    assert experts.fused(layer) is None and not torch.equal(got, logits(model))


@pytest.mark.parametrize("fused", [True, False])
def test_slots_of_other_ranks_count_as_zero(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expert parallelism marks them with ids from num_experts on, weight 0; NaN in their rows must not spread, nor biases be missed."""
    from narrowgemm.integrations.transformers import experts as forward

    if not fused:
        monkeypatch.setattr(forward, "fused", lambda module: None)
    model = models.build("gpt_oss", torch.bfloat16)
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 1], [8, 2], [8, 8], [3, 9], [7, 0]])
    topk = torch.rand(5, 2).masked_fill(ids >= 8, 0.0)
    model.set_experts_implementation("narrowgemm")
    with torch.no_grad():
        got = experts(x, ids, topk)
        alone = torch.stack([sum((experts(x[t:t + 1], ids[t:t + 1, j:j + 1], topk[t:t + 1, j:j + 1])[0].float()
                                  for j in range(2) if ids[t, j] < 8), torch.zeros(64)) for t in range(5)])
    assert torch.equal(got[2], torch.zeros(64, dtype=torch.bfloat16)) and calc_diff(got, alone) < 1e-5


def test_the_type_of_the_hidden_states_comes_back() -> None:
    """FP32 ones through BF16 experts, and BF16 ones through FP32 experts."""
    for dtype, other in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        experts = models.build("qwen3_moe", dtype, implementation="narrowgemm").model.layers[0].mlp.experts
        with torch.no_grad():
            assert experts(torch.randn(3, 64, dtype=other), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)).dtype == other


def test_factors_of_packed_rows_survive_another_type() -> None:
    """A row of scales beyond what BF16 multiplies by keeps a factor in FP32, whatever the model is brought to."""
    model = models.build("qwen3_moe", torch.bfloat16, implementation="narrowgemm", **SIZES)
    narrow.quantize(model, "mxfp4", prepacked=False)
    layer = model.model.layers[0].mlp.experts
    layer.down_proj_scale.data[:, 3] += 20
    call = torch.randn(9, 128).bfloat16(), torch.rand(9, 4).argsort(1), torch.rand(9, 4)
    with torch.no_grad():
        want = layer(*call)
        assert narrow.prepack(model) == 2 and weights.plain(layer).down.factor is not None
        layer.half()
        assert weights.plain(layer).down.factor.dtype == torch.float32 and calc_diff(layer(*call), want) < 1e-4


def test_no_tokens() -> None:
    model = models.build("qwen3_moe", torch.bfloat16, implementation="narrowgemm")
    experts = model.model.layers[0].mlp.experts
    out = experts(torch.empty(0, 64, dtype=torch.bfloat16), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    assert out.shape == (0, 64) and out.dtype == torch.bfloat16


def test_wide_experts_train_and_quantised_ones_say_that_they_do_not() -> None:
    model = models.build("qwen3_moe", implementation="narrowgemm")
    model(models.prompt()).logits.sum().backward()
    assert model.model.layers[0].mlp.experts.gate_up_proj.grad.abs().sum() > 0
    model.zero_grad()
    experts = model.model.layers[1].mlp.experts
    model.requires_grad_(False)
    experts.requires_grad_(True)        # experts alone: no input of theirs asks for a gradient
    model(models.prompt()).logits.sum().backward()
    assert experts.down_proj.grad.abs().sum() > 0
    model.requires_grad_(True)
    narrow.quantize(model, "fp8")
    with pytest.raises(Unsupported, match="no backward"):
        model(models.prompt()).logits.sum().backward()


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build("qwen3_moe", implementation="narrowgemm")
    experts = model.model.layers[0].mlp.experts
    experts.has_post_expert_norm = True
    with pytest.raises(ValueError, match="norm behind each"), torch.no_grad():
        model(models.prompt())
    with pytest.raises(ValueError, match="quantize"):
        narrow.from_pretrained("nowhere", quantize="int3")
    with pytest.raises(ValueError, match="expert layers"):
        narrow.quantize(torch.nn.Linear(4, 4), "fp8")
    monkeypatch.setitem(sys.modules, "transformers.integrations.finegrained_fp8", None)
    with pytest.raises(ImportError, match=r"transformers >= 5\.7"):
        narrow.register()


@pytest.mark.parametrize("quantize, prepacked", [("fp8", False), ("mxfp4", True)])
def test_compiles_into_one_graph(quantize: str, prepacked: bool) -> None:
    model = models.build("qwen3_moe", torch.bfloat16, implementation="narrowgemm", hidden=128, inter=128)
    narrow.quantize(model, quantize, prepacked=prepacked)
    experts = model.model.layers[0].mlp.experts
    x, ids, topk = torch.randn(7, 128, dtype=torch.bfloat16), torch.randint(0, 8, (7, 2)), torch.rand(7, 2)
    with torch.no_grad():
        want = experts(x, ids, topk)
        got = torch.compile(lambda *a: experts(*a), fullgraph=True, dynamic=True, backend="aot_eager")(x, ids, topk)
    assert torch.equal(got, want)
