"""Training steps as cases: the gate holds for every recipe, sees a wrong gradient, and a report owes its rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from narrowgemm.arch import get_arch
from narrowgemm.formats import FP8_TENSOR
from narrowgemm.kernels.registry import kernels
from narrowgemm.testing import peers, training_peers, worker
from narrowgemm.testing.cases import PEERS, Case, get_suite
from narrowgemm.testing.inputs import build
from narrowgemm.testing.step import KINDS, RECIPE_GATE, StepCase

CASE = StepCase("t", "tiny", 64, sizes="skew:30")
LIMITS = {"recipe": RECIPE_GATE}


def check(inputs, call, limits=LIMITS):
    return worker.check_outputs(inputs, {"x": (call, limits)})["x"]


def test_every_kind_and_peer_passes_and_a_wrong_gradient_does_not():
    reuse = None
    for kind in KINDS:
        inputs = worker.build(replace(CASE, kind=kind, micro=1), torch.device("cpu"), 0, "mn_major", reuse)
        reuse = inputs.weights
        inputs.call()
        assert check(inputs, lambda i: inputs.rows(None, i)).ok  # noqa: B023
    for name in ("torch_step", "torch_step_fused"):
        prepared = peers.get_peer(name).prepare(CASE, inputs)
        prepared.run()
        assert check(inputs, prepared.rows, {prepared.gate: prepared.limit}).ok
    for wrong in range(4):
        results = [t.detach().clone() for t in inputs.results]
        results[wrong] *= 1.2
        assert not check(inputs, lambda i: inputs.part(tuple(results), i)).ok  # noqa: B023


def test_ids_figures_and_peers():
    assert StepCase("t", "deepseek-v3", 8192).id == "deepseek-v3-t8192-delayed"
    assert StepCase("t", "deepseek-v3", 8192, "block", "skew128:30", 1).id == "deepseek-v3-t8192-block-skew128_30-weights"
    assert StepCase("t", "tiny", 64).flops == 18 * 64 * 256 * 128
    assert len(get_suite("train-step")) == 18 and {c.kind for c in get_suite("train-step-recipes")} == set(KINDS)
    for suite in ("train-step", "train-step-recipes"):
        for c in get_suite(suite):
            assert c.rows == c.tokens and all(peers.computes(p, c) for p in PEERS[suite]) and not peers.computes("torch_row", c)
    assert not peers.computes("torch_step", get_suite("train-fwd")[0])
    with pytest.raises(ValueError, match="expected"):
        StepCase("t", "tiny", 64, "int4")


@pytest.mark.parametrize("layout", ["offsets", "k_grouped"])
def test_best_config_of_the_portable_kernel(layout, monkeypatch):
    """Every config of the kernel is tried, and the fastest is what is timed."""
    inputs = build(Case("t", layout, 2, 128, 128, 128, a=FP8_TENSOR, b=FP8_TENSOR), "cpu")
    monkeypatch.setenv("NARROWGEMM_ARCH", "h200")
    tried, called = [], []
    monkeypatch.setattr(training_peers.BestConfig, "seconds", lambda self, i, config: tried.append(config) or -float(len(tried)))
    monkeypatch.setattr(type(inputs), "call", lambda self, **options: called.append(options["config"]))
    peers.get_peer("triton_best").prepare(inputs.case, inputs).run()
    plan = inputs.plan(backend="triton")
    assert len(tried) > 3 and tried == kernels()[plan.kernel].configs(plan.problem, get_arch("h200")) and called == [tried[-1]]
