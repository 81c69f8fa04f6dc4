"""`narrowgemm demo`, the whole way on a tiny layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("safetensors")

from narrowgemm.cli import moe_block
from narrowgemm.cli.group import cli
from narrowgemm.integrations.checkpoints import load_moe_layer, write_fp8_checkpoint
from narrowgemm.ops import experts, experts_plan, steps
from narrowgemm.ops.plan_cache import PlanCache
from narrowgemm.testing.models import MODELS, MoEModel
from narrowgemm.testing.timers import make_timer

TINY = ["--device", "cpu", "--tokens", "12", "--hidden", "256", "--inter", "128"]
FP8_STEPS = ["route", "sort", "gather", "gate_up", "swiglu", "down", "combine", "experts"]
BF16_STEPS = ["gather", "gate_up", "swiglu", "down", "combine"]


def demo(*args: str):
    return CliRunner().invoke(cli, ["demo", *args])


def document(*args: str) -> dict:
    result = demo(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_json() -> None:
    doc = document(*TINY, "--model", "qwen3-235b")
    assert [s["name"] for s in doc["fp8"]] == FP8_STEPS and [s["name"] for s in doc["bf16"]] == BF16_STEPS
    assert doc["sizes"] == {"tokens": 12, "hidden": 256, "inter": 128, "experts": 4, "top_k": 2,
                            "active_experts": doc["sizes"]["active_experts"]}
    assert doc["full_sizes"] == {"experts": 128, "top_k": 8} and doc["device"] == "cpu"
    for step in doc["fp8"] + doc["bf16"]:
        assert step["us"] > 0 and step["gbs"] > 0 and step["of_roof"] > 0
    for step in doc["fp8"]:
        assert (step["tflops"] > 0) == (step["name"] in ("route", "gate_up", "down", "experts"))
        assert (step["error"] is None) == (step["name"] in ("route", "sort"))
    assert doc["same_bits"] and doc["total_us"]["fp8"] == doc["fp8"][-1]["us"]
    assert doc["gates_ok"] and {g["gate"] for g in doc["gates"]["down"]} == {"kernel", "recipe"}


def test_steps_that_the_layer_makes_in_one_launch(monkeypatch) -> None:
    """The demo runs them one by one, whatever `experts` does; and both have the same bits."""
    whole = {"sort gather": lambda s, source, fmt: steps.sort_gather_problem(s.tokens, s.hidden, s.top_k, s.experts, source, fmt,
                                                                             steps.scale_layout_of(fmt))}
    monkeypatch.setattr(experts_plan, "_arranged", lambda s, source, fmt, step: {n: step(p(s, source, fmt)) for n, p in whole.items()})
    monkeypatch.setattr(experts, "_plans", PlanCache())
    doc = document(*TINY, "--model", "qwen3-235b")
    assert [s["name"] for s in doc["fp8"]] == FP8_STEPS and doc["same_bits"]
    assert list(experts._plans.newest().memo["plan"].steps)[:2] == ["route", "sort gather"]


def test_errors_are_those_of_the_formats() -> None:
    doc = document(*TINY)
    fp8, bf16 = ({s["name"]: s for s in doc[k]} for k in ("fp8", "bf16"))
    assert bf16["gather"]["error"] == 0 and 1e-5 < fp8["gather"]["error"] < 1e-3
    assert 1e-5 < fp8["combine"]["error"] == fp8["experts"]["error"] < 2e-3
    assert 1e-7 < bf16["combine"]["error"] < 5e-5
    for name in ("gather", "gate_up", "swiglu", "down"):
        assert fp8[name]["kernel"].startswith("reference") and "cost model" in fp8[name]["why"]
        assert "triton" in fp8[name]["why"]  # what was passed over is named


def test_tables() -> None:
    result = demo(*TINY)
    assert result.exit_code == 0, result.output
    for part in (*FP8_STEPS, "deepseek-v3: 12 tokens", "the model has top-8 of 256", "% roof", "BF16 err",
                 "kernel gate ok", "gate_up ran on reference: cost model", "narrowgemm explain", "the same bits as its steps"):
        assert part in result.output, part
    assert max(map(len, result.stdout.split("error: calc_diff")[0].splitlines())) <= 125


def test_same_seed_same_numbers() -> None:
    def errors(*args: str) -> list:
        return [s["error"] for s in document(*TINY, *args)["fp8"]]

    assert errors("--seed", "3") == errors("--seed", "3") != errors("--seed", "4")


def test_keep_writes_once_and_checkpoint_reads_it(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    first = document(*TINY, "--keep", str(folder))
    stamp = (folder / "config.json").stat().st_mtime_ns
    again = document(*TINY, "--keep", str(folder))
    assert (folder / "config.json").stat().st_mtime_ns == stamp and "kept from before" in again["weights"]
    read = document("--device", "cpu", "--tokens", "12", "--checkpoint", str(folder))
    for doc in (again, read):
        assert [s["error"] for s in doc["fp8"]] == [s["error"] for s in first["fp8"]]
    result = demo("--device", "cpu", "--hidden", "384", "--inter", "128", "--keep", str(folder))
    assert result.exit_code == 1 and "choose another folder" in result.output


def test_checkpoint_layer_and_fewer_experts(tmp_path: Path) -> None:
    write_fp8_checkpoint(tmp_path / "c", MoEModel("t", 256, 128, 6, 3), layers=2)
    doc = document("--device", "cpu", "--tokens", "5", "--checkpoint", str(tmp_path / "c"), "--layer", "1",
                   "--experts", "5")
    assert doc["weights"].endswith("layer 1")
    assert doc["sizes"]["experts"] == 5 and doc["sizes"]["top_k"] == 3 and doc["full_sizes"]["experts"] >= 6


@pytest.mark.parametrize(("args", "status", "message"), [
    (["--checkpoint", "/no/such/folder"], 1, "no such folder"),
    (["--checkpoint", "x", "--keep", "y"], 2, "--checkpoint brings its own"),
    (["--model", "gpt-5"], 2, "deepseek-v3"),
    (["--device", "tpu"], 1, "--device"),
    (["--device", "mps"], 1, "--device"),
    (["--device", "cpu", "--hidden", "256", "--inter", "192", "--tokens", "4"], 1, "no multiple of 128"),
])
def test_bad_input(args: list[str], status: int, message: str) -> None:
    result = demo(*args)
    assert result.exit_code == status and message in result.output and "Traceback" not in result.output


def test_a_wrong_kernel_fails_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    right = moe_block.grouped.grouped_gemm

    def wrong(a, b, layout, **options):
        return right(a, b, layout, **options) * 1.01

    monkeypatch.setattr(moe_block.grouped, "grouped_gemm", wrong)
    result = demo(*TINY)
    assert result.exit_code == 1 and "kernel gate FAILED" in result.output


def test_one_token_and_experts_without_tokens(tmp_path: Path) -> None:
    write_fp8_checkpoint(tmp_path / "c", MoEModel("t", 256, 128, 8, 1))
    layer = load_moe_layer(tmp_path / "c", 0)
    timer = make_timer(torch.device("cpu"), rounds=1)
    roof = moe_block.Roof(1e12, 1e12, 1e12, "made up")
    x = torch.randn(1, 256).bfloat16()
    block = moe_block.run_block(layer, x, top_k=1, activation="swiglu_oai", timer=timer, roof=roof)
    assert block.active_experts == 1 and all(g.ok for g in block.gates.values())


def test_activations() -> None:
    h = torch.tensor([[-1.0, 9.0, 2.0, -9.0]])
    gate, up = h[:, :2], h[:, 2:]
    assert torch.equal(moe_block.swiglu(h, "swiglu"), torch.nn.functional.silu(gate) * up)
    clamped = torch.tensor([[-1.0, 7.0]])
    want = clamped * torch.sigmoid(1.702 * clamped) * torch.tensor([[3.0, -6.0]])
    assert torch.allclose(moe_block.swiglu(h, "swiglu_oai"), want)


def test_every_model_has_the_shapes_of_its_config() -> None:
    v3 = MODELS["deepseek-v3"]
    assert v3.gate_up() == (4096, 7168) and v3.down() == (7168, 2048) and v3.gate_up(8) == (512, 7168)
    assert v3.local_experts(32) == 8 and v3.scaled(experts=4).top_k == 4
    for m in MODELS.values():
        assert m.top_k <= m.experts and m.hidden % 32 == 0 and m.inter % 32 == 0
