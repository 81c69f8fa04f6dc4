"""The transformers integration on a GPU: the same models, kernels instead of the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from narrowgemm.formats import FP8_128x128
from narrowgemm.integrations import transformers as narrow
from narrowgemm.integrations.transformers import weights
from narrowgemm.testing.numerics import calc_diff, recipe_gate

from . import _models as models

pytestmark = pytest.mark.gpu
SIZES = {"hidden": 256, "inter": 128, "experts": 8, "top_k": 8}
LAYER, MODEL = 3, 10  # recipe gates: a layer as in _models.py; the model's logits differ by 7.7 of them on the reference alone, too


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    narrow.register()


def layer_call(tokens: int, hidden: int, experts: int, top_k: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return (torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16),
            torch.rand(tokens, experts, device="cuda").argsort(1)[:, :top_k].contiguous(),
            torch.rand(tokens, top_k, device="cuda"))


@torch.no_grad()
def logits(model: Any, implementation: str) -> torch.Tensor:
    model.set_experts_implementation(implementation)
    return model(models.prompt(4, 12).cuda()).logits.float()


@pytest.mark.parametrize("name", models.NAMES)
def test_bf16_generates_the_tokens_of_eager(name: str) -> None:
    model = models.build(name, torch.bfloat16).cuda()
    tokens, scores = models.greedy(model, models.prompt().cuda(), 16)
    model.set_experts_implementation("narrowgemm")
    ours, ours_scores = models.greedy(model, models.prompt().cuda(), 16)
    assert calc_diff(ours_scores[0], scores[0]) < 2e-4
    assert models.same_but_for_ties(ours, tokens, scores, tie=0.1)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("quantize, prepacked", [*((w, None) for w in sorted(narrow.WEIGHTS)), ("mxfp4", "fp8")])
def test_quantised_experts(name: str, quantize: str, prepacked: str | None) -> None:
    model = models.build(name, torch.bfloat16, **SIZES).cuda()
    experts = model.model.layers[0].mlp.experts
    calls = [layer_call(t, 256, 8, 4) for t in (3, 300)]
    with torch.no_grad():
        wants, want = [experts(*c) for c in calls], logits(model, "eager")
        narrow.quantize(model, quantize, prepacked=prepacked)
        formats = getattr(experts, weights.FORMATS)
        assert calc_diff(logits(model, "narrowgemm"), want) < MODEL * recipe_gate(*formats)
        for call, expected in zip(calls, wants):
            got = experts(*call)
            # one token averages few quantisation errors
            assert calc_diff(got, expected) < LAYER * recipe_gate(*formats) * (2 if len(got) < 8 else 1)
            assert torch.equal(got, experts(*call))


def test_fp8_checkpoint_generates(tmp_path: Path) -> None:
    model = models.build("qwen3_moe", torch.bfloat16, hidden=512, inter=256).cuda()
    folder = models.write_fp8(tmp_path / "fp8", model.cpu())
    loaded = narrow.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda")
    experts, original = loaded.model.layers[0].mlp.experts, model.model.layers[0].mlp.experts.cuda()
    assert type(experts).__name__ == "FP8Experts"
    call = layer_call(64, 512, 8, 2)
    with torch.no_grad():
        assert calc_diff(experts(*call), original(*call)) < LAYER * recipe_gate(FP8_128x128, FP8_128x128)
    tokens, _ = models.greedy(loaded, models.prompt().cuda())
    again, _ = models.greedy(loaded, models.prompt().cuda())
    assert tokens.shape == (2, 8) and torch.equal(tokens, again)


@pytest.mark.parametrize("prepacked", [None, "fp8"])
def test_gpt_oss_mxfp4_checkpoint_generates(tmp_path: Path, prepacked: str | None) -> None:
    model = models.build("gpt_oss", torch.bfloat16, hidden=256, inter=128)
    path = models.write_mxfp4(tmp_path / "mxfp4", model)
    loaded = narrow.from_pretrained(path, prepacked=prepacked, dtype=torch.bfloat16, device_map="cuda")
    tokens, _ = models.greedy(loaded, models.prompt().cuda())
    assert tokens.shape == (2, 8) and loaded.model.layers[0].mlp.experts.down_proj.dtype == torch.uint8


def test_fp4_experts_of_a_checkpoint() -> None:
    """DeepSeek-V4's experts, prepacked: few tokens and many, against themselves as they came, on the CPU."""
    from narrowgemm.integrations.transformers import experts as forward

    layer = models.fp8_experts(models.config("qwen3_moe", hidden=256, inter=128, experts=8), None, "ue8m0", "fp4")
    torch.manual_seed(0)
    for name in ("gate_up_proj", "down_proj"):
        data, scale = getattr(layer, name), getattr(layer, f"{name}_scale_inv")
        data.data.copy_(torch.randint(-128, 127, data.shape, dtype=torch.int8))
        scale.data.copy_((2.0 ** torch.randint(-7, -4, scale.shape)).to(scale.dtype))
    calls = [(torch.randn(t, 256).bfloat16(), torch.rand(t, 8).argsort(1)[:, :4], torch.rand(t, 4)) for t in (3, 2000)]
    with torch.no_grad():
        wants = [forward.fp8_forward(layer, *c) for c in calls]
        layer.cuda()
        assert narrow.prepack(torch.nn.ModuleList([layer])) == 1
        for call, want in zip(calls, wants):
            on_gpu = tuple(t.cuda() for t in call)
            got = forward.fp8_forward(layer, *on_gpu)
            assert calc_diff(got.cpu(), want) < 1e-4
            assert torch.equal(got, forward.fp8_forward(layer, *on_gpu))


@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_layer_in_a_graph_with_changed_routing(quantize: str | None) -> None:
    model = models.build("qwen3_moe", torch.bfloat16, implementation="narrowgemm", hidden=256, inter=128).cuda()
    if quantize:
        narrow.quantize(model, quantize)
    experts = model.model.layers[0].mlp.experts
    static = layer_call(16, 256, 8, 2)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            experts(*static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = experts(*static)
        for seed in range(3):
            torch.manual_seed(seed)
            static[0].normal_()
            static[1].copy_(torch.rand(16, 8, device="cuda").argsort(1)[:, :2] if seed else torch.zeros_like(static[1]))
            graph.replay()
            assert torch.equal(out, experts(*static))
