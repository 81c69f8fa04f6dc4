"""narrowgemm as transformers' experts implementation: tiny random models and hand-made checkpoints, offline."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from narrowgemm import Unsupported
from narrowgemm.formats import get_format
from narrowgemm.integrations import transformers as narrow
from narrowgemm.integrations.transformers import weights
from narrowgemm.prepack_bits import FP8_PREPACK
from narrowgemm.testing.numerics import calc_diff, recipe_gate

from . import _models as models
from ._models import LAYER, MODEL, SIZES, fp8_on_cpu, logits, registered  # noqa: F401


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
