"""`narrowgemm explain` on a machine without a GPU."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from narrowgemm import can_run
from narrowgemm.arch import ARCHS
from narrowgemm.cli.group import cli
from narrowgemm.kernels.registry import candidates

MASKED = ["--op", "grouped_gemm", "--layout", "masked", "-G", "32", "-M", "20", "-N", "6144", "-K", "7168"]


def explain(*args: str):
    return CliRunner().invoke(cli, ["explain", *args])


def test_masked_decode_on_h200() -> None:
    result = explain(*MASKED, "--device", "h200")
    assert result.exit_code == 0, result.output
    for part in ("grouped_gemm (masked)", "fp8_1x128 x fp8_128x128", "on h200 (sm90)", "predicted", "floor", "why"):
        assert part in result.output
    for name in candidates("grouped_gemm"):
        assert name in result.output  # taken or passed over, each is named


def test_json_names_every_kernel_with_a_reason() -> None:
    doc = json.loads(explain(*MASKED, "--device", "h200", "--json").output)
    assert doc["device"] == "h200" and doc["problem"]["groups"] == 32 and doc["problem"]["k"] == 7168
    passed = dict(doc["passed_over"])
    assert set(passed) | {doc["kernel"]} == set(candidates("grouped_gemm")) and all(passed.values())
    assert doc["predicted_us"] >= doc["floor_us"] > 0


@pytest.mark.parametrize("device", sorted(ARCHS))
@pytest.mark.parametrize(("op", "layout"), [("gemm", None), ("grouped_gemm", None), ("grouped_gemm", "offsets"),
                                            ("grouped_gemm", "psum"), ("grouped_gemm_wgrad", None)])
def test_every_device_and_layout(device: str, op: str, layout: str | None) -> None:
    args = ["--op", op, "-M", "100", "-N", "512", "-K", "1024", "--device", device, "--json"]
    args += ["-G", "4"] if op != "gemm" else []
    result = explain(*args, *(["--layout", layout] if layout else []))
    assert result.exit_code == 0, result.output
    default = {"gemm": "dense", "grouped_gemm": "contiguous", "grouped_gemm_wgrad": "k_grouped"}[op]
    assert json.loads(result.output)["problem"]["layout"] == (layout or default)


def test_default_device_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARROWGEMM_ARCH", "b200")
    assert json.loads(explain(*MASKED, "--json").output)["device"] == "b200"


def test_backend() -> None:
    doc = json.loads(explain(*MASKED, "--device", "h200", "--backend", "reference", "--json").output)
    assert doc["backend"] == "reference"
    assert any("was asked for" in reason for _, reason in doc["passed_over"])


@pytest.mark.parametrize(("args", "message"), [
    (["-M", "1", "-N", "1"], "Missing option '-K'"),
    (["-M", "-1", "-N", "1", "-K", "1"], "-1"),
    (["-M", "1", "-N", "1", "-K", "1", "--a", "fp7"], "'fp7' is not one of"),
    (["-M", "1", "-N", "1", "-K", "1", "--device", "h300"], "'h300'"),
    (["-M", "1", "-N", "1", "-K", "1", "--out-dtype", "int8"], "'int8'"),
    (["--op", "gemm", "--layout", "masked", "-M", "1", "-N", "1", "-K", "1"], "layout of gemm"),
    (["-M", "1", "-N", "1", "-K", "1", "--backend", "cublas"], "'cublas'"),
])
def test_bad_input(args: list[str], message: str) -> None:
    result = explain(*args)
    assert result.exit_code == 2, result.output
    assert message in result.output and "Traceback" not in result.output


def test_what_no_kernel_runs_is_an_error_that_says_why() -> None:
    result = explain(*MASKED, "--device", "h200", "--backend", "triton", "--a", "fp8_row:e5m2", "--b", "mxfp4")
    assert result.exit_code == 1
    assert "no kernel runs grouped_gemm (masked, fp8_row:e5m2 x mxfp4) on h200 with backend 'triton'" in result.output
    assert "triton.mx: " in result.output and "gluon" not in result.output and "was asked for" not in result.output


def test_a_reason_of_several_kernels_is_given_once() -> None:
    output = explain(*MASKED, "--device", "cpu", "--backend", "triton").output
    assert output.count("runs on a GPU") == 1 and "triton.fp8_block" in output


def test_packed_weights() -> None:
    sizes = ("-M", "16", "-N", "6144", "-K", "7168", "--device", "h200")
    assert "gluon_sm90.narrow" in explain("--op", "gemm", *sizes, "--a", "bf16", "--b", "mxfp4", "--packed").output.split("why")[0]
    doc = json.loads(explain("--op", "routed_gemm", "-G", "8", *sizes, "--a", "bf16", "--b", "mxfp4", "--packed", "--json").output)
    assert doc["problem"]["layout"] == "routed" and doc["kernel"] == "gluon_sm90.narrow"
    layer = explain("--op", "experts", "-G", "8", *sizes, "--a", "bf16", "--b", "mxfp4", "--packed").output
    assert "gluon_sm90.narrow" in layer


@pytest.mark.parametrize("op", ["gemm", "experts"])
def test_weights_that_have_no_packed_order(op: str) -> None:
    result = explain("--op", op, "-M", "16", "-N", "256", "-K", "256", "--device", "h200", "--packed")
    assert result.exit_code == 1 and "prepack takes mxfp4 and mxfp8 (E4M3), not fp8_128x128" in result.output
    assert can_run("gemm", m=16, n=256, k=256, packed=True, device="h200") == (False, "prepack takes mxfp4 and mxfp8 (E4M3), not fp8_128x128")


def test_an_expert_layer_step_by_step() -> None:
    args = ("--op", "experts", "-G", "32", "-M", "64", "-N", "2048", "-K", "7168", "--top-k", "8", "--device", "h200")
    result = explain(*args)
    assert result.exit_code == 0, result.output
    steps = ("route", "sort gather", "gate_up", "activate", "down", "combine")
    for name in steps:
        assert f"\n  {name} " in result.output
    assert "top-8 of 32" in result.output and "not reference.steps: predicted" in result.output
    doc = json.loads(explain(*args, "--json").output)
    assert tuple(doc["steps"]) == steps and doc["workspace_bytes"] > 64 * 8 * 7168
    assert doc["steps"]["gate_up"]["kernel"].startswith("gluon_sm90") and doc["steps"]["route"]["kernel"] == "triton.route"
    many = json.loads(explain(*args[:5], "4096", *args[6:], "--json").output)
    assert tuple(many["steps"]) == ("route", "sort", "gather", "gate_up", "down", "combine")
    assert many["steps"]["gate_up"]["kernel"] == "gluon_sm90.fp8_gated"
    assert explain(*args[:-1], "nothing").exit_code == 2
    few = explain("--op", "experts", "-G", "4", "-M", "64", "-N", "256", "-K", "256", "--device", "h200")      # fewer than the default of top-k
    assert few.exit_code == 0 and "top-4 of 4" in few.output
    asked = json.loads(explain(*args, "--backend", "reference", "--json").output)
    assert all(step["kernel"].startswith("reference") for step in asked["steps"].values())
