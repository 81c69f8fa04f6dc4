"""Layer cases and their peers: the same numbers from ours, from the fused Triton MoE and from the DeepGEMM composition."""

from __future__ import annotations

import sys

import pytest
import torch

from narrowgemm.compat import deep_gemm
from narrowgemm.testing import layer, layer_peers
from narrowgemm.testing.cases import get_suite
from narrowgemm.testing.layer import GATE, LayerCase
from narrowgemm.testing.numerics import calc_diff
from narrowgemm.testing.peers import computes


@pytest.mark.parametrize("case", get_suite("experts-cpu"), ids=lambda c: c.id)
def test_ours_keeps_the_gate(case):
    inputs = layer.build(case, "cpu", seed=3)
    inputs.call()
    assert not inputs.faults()
    result = layer.check_outputs(inputs, {"ours": (lambda g: inputs.out.tensor, {"kernel": GATE[case.a.element]})})
    assert result["ours"].ok, result["ours"].message
    if case.tokens:
        inputs.out.tensor[0] = 0
        assert not layer.check_outputs(inputs, {"x": (lambda g: inputs.out.tensor, {"kernel": 1e-4})})["x"].ok


@pytest.mark.parametrize(("tokens", "experts"), [(1, 128), (1024, 128), (4096, 256), (2048, 384)])
def test_no_rounding_of_a_softmax_chooses_other_experts(tokens, experts):
    """Scores of a token are eight last places of FP32 apart, and more."""
    s = layer.scores(tokens, experts).sort(1).values
    assert s.dtype == torch.float32 and float(s.min()) > 0 and float(s.max()) < 1
    assert float(s.diff(dim=1).min()) >= 8 * 2.0**-24


@pytest.mark.interpret
@pytest.mark.parametrize("case", [LayerCase("t", "tiny", ep, t) for ep, t in ((2, 9),)], ids=lambda c: c.id)
@pytest.mark.parametrize("peer", ["triton_moe", "masked", "contiguous"])
def test_peers_compute_the_layer(case, peer, monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_gemm", deep_gemm)
    monkeypatch.setattr(layer_peers, "MASKED_TOKENS", 0 if peer == "contiguous" else 64)
    inputs = layer.build(case, "cpu", seed=4)
    run = layer_peers.MAKERS["triton_moe" if peer == "triton_moe" else "deepgemm_layer"](inputs)
    assert calc_diff(run().float(), inputs.same_bits()) <= 1e-4


def test_routing_is_the_cases_own():
    weights, ids = layer.choices(40, 16, 4)
    assert all(len(set(row)) == 4 for row in ids.tolist()) and torch.allclose(weights.sum(1), torch.ones(40))
    case = LayerCase("t", "tiny", 2, 40)
    assert case.rows == int((layer.choices(40, 8, 2)[1] < 4).sum()) and case.groups == 4
    assert case.flops == 2 * case.rows * 3 * 256 * 128
    assert computes("triton_moe", case) and computes("floor", case) and not computes("deepgemm", case)
    assert not computes("triton_moe", get_suite("cpu-small")[0])
    assert not computes("triton_moe", LayerCase("t", "tiny", 1, 8, "mxfp4"))
    assert all(computes("triton_kernels_layer", c) for c in get_suite("experts-mxfp4"))
    assert not computes("triton_kernels_layer", get_suite("experts-fp8")[0])


def test_mxfp4_layers_run_on_prepacked_weights():
    inputs = layer.build(LayerCase("t", "tiny", 1, 9, "mxfp4"), "cpu", seed=5)
    assert inputs.packed is not None and inputs.given("triton") == (inputs.gate_up, inputs.down)
    inputs.call()
    result = layer.check_outputs(inputs, {"ours": (lambda g: inputs.out.tensor, {"kernel": GATE["bf16"]})})
    assert result["ours"].ok and not inputs.faults() and inputs.plan().backend == "reference"
    chosen, ids = inputs.logits.topk(2)
    assert torch.equal(ids.int(), inputs.topk_ids) and torch.allclose(chosen.softmax(1), inputs.topk_weights)
    routed = layer.build(LayerCase("t", "tiny", 1, 9, "mxfp4", logits=True), "cpu", seed=5, reuse=inputs.weights)
    routed.call()
    assert calc_diff(routed.out.tensor.float(), inputs.out.tensor.float()) <= 1e-6
    assert all(c.logits for c in get_suite("experts-mxfp4"))        # the peer starts there, too


def test_weights_are_taken_over():
    one = layer.build(LayerCase("t", "tiny", 1, 4), "cpu")
    two = layer.build(LayerCase("t", "tiny", 1, 8), "cpu", reuse=one.weights)
    assert two.gate_up is one.gate_up
    assert layer.build(LayerCase("t", "tiny", 2, 8), "cpu", reuse=one.weights).gate_up is not one.gate_up
