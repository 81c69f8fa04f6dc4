"""The examples run on a CPU, for a few steps."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module       # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture(scope="module")
def train_moe():
    yield from example("train_moe")


@pytest.fixture(scope="module")
def generate():
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    yield from example("generate")


def test_text_from_a_model_on_disk(generate, tmp_path, monkeypatch):
    """The README's first step: what the small model learned comes back, from wide experts and from quantised ones."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = generate.write_model(tmp_path / "model")
    for arguments in ([], ["--quantize", "fp8"]):
        texts = generate.main(["--model", str(folder), "--device", "cpu", "--tokens", "12", *arguments])
        assert texts["eager"] == texts["narrowgemm"] == generate.TEXT[:len(generate.PROMPT) + 12]


def test_training_a_few_steps(train_moe, tmp_path):
    """BF16 and FP8 start from the same loss, it falls, and the gradients agree as far as FP8 can. Moved weights are nearly the same."""
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    result = train_moe.main(["--small", "--device", "cpu", "--recipes", "bf16,rowwise,bf16-moved", "--seeds", "0", "--steps", "4", "--lr", "1e-2",
                             "--snr-every", "9", "--text-bytes", "100000", "--out", str(out), "--plot", str(picture)])
    bf16, fp8, moved = result["runs"]
    assert moved["losses"] != bf16["losses"] and abs(moved["losses"][0] / bf16["losses"][0] - 1) < 1e-2 and not moved["snr_db"]
    assert abs(fp8["losses"][0] / bf16["losses"][0] - 1) < 1e-2 and fp8["losses"][-1] < fp8["losses"][0]
    assert len(fp8["snr_db"][0]) == 2 and all(15 < db < 40 for layer in fp8["snr_db"][0] for db in layer)
    assert {c["loss"] for c in result["against_bf16"]} == {"final", "held_out"} and picture.stat().st_size > 10000
    assert json.loads(out.read_text())["runs"][1]["recipe"] == "rowwise"


def test_the_model_is_what_it_claims(train_moe):
    size = train_moe.Size()
    count = sum(p.numel() for p in train_moe.Model(size, "bf16").parameters())
    assert count <= 50e6 and size.flops[0] >= 0.8 * size.flops[1]
    with pytest.raises(SystemExit):
        train_moe.main(["--recipes", "int4"])


def test_differences_spread_over_seeds(train_moe):
    runs = [{"recipe": r, "seed": s, "final": x, "held_out": x} for r, xs in (("bf16", (2.0, 4.0)), ("block", (2.02, 4.0)))
            for s, x in enumerate(xs)]
    final = train_moe.compare(runs)[0]
    assert final["seeds"] == {0: 0.01, 1: 0.0} and final["mean"] == round(0.02 / 6, 5) and final["spread"] == round(0.01 / 2**0.5, 5)
