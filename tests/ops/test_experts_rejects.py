"""`experts` and `activate` on bad input: what was given and what is expected, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import narrowgemm as ng

T, H, I, E = 6, 128, 64, 4
X, UP, DOWN = torch.randn(T, H).bfloat16(), torch.randn(E, 2 * I, H).bfloat16(), torch.randn(E, H, I).bfloat16()
UP8, DOWN8 = ng.quantize(UP, ng.FP8_128x128), ng.quantize(DOWN, ng.FP8_128x128)
UP4, DOWN4 = (ng.prepack(ng.quantize(w, ng.MXFP4)) for w in (UP, DOWN))
LOGITS, WEIGHTS, IDS = torch.randn(T, E), torch.rand(T, 2), torch.zeros(T, 2, dtype=torch.int32)
GOOD: dict[str, Any] = {"x": X, "gate_up": UP, "down": DOWN, "topk_weights": WEIGHTS, "topk_ids": IDS}
ROUTED = {"topk_weights": None, "topk_ids": None, "router_logits": LOGITS, "top_k": 2}
META = torch.empty(T, H, dtype=torch.bfloat16, device="meta")


def both(w: torch.Tensor) -> torch.Tensor:
    return torch.cat((w, w), -1)


LAYER = {
    "tokens in a list": ({"x": [1.0]}, TypeError, "x: got list"), "tokens of integers": ({"x": X.int()}, TypeError, "x, dtype: got torch.int32"),
    "tokens in a batch": ({"x": X[None]}, ValueError, r"x, shape: got \(1, 6, 128\)"),
    "another hidden size": ({"x": both(X)}, ValueError, "x, hidden size: got 256, expected gate_up's, 128"),
    "an odd gate_up": ({"gate_up": UP[:, 1:]}, ValueError, r"gate_up, shape: got \(4, 127, 128\)"),
    "another down": ({"down": both(DOWN)}, ValueError, r"down, shape: got \(4, 128, 128\), expected \(4, 128, 64\)"),
    "weights of another dtype": ({"gate_up": UP.half()}, TypeError, "gate_up, dtype: got torch.float16, expected x's"),
    "weights elsewhere": ({"down": DOWN.to("meta")}, ValueError, "down, device: got meta"),
    "one packed": ({"gate_up": UP4, "down": ng.quantize(DOWN, ng.MXFP4)}, TypeError, "both prepacked, or none"),
    "packed for halves": ({"gate_up": ng.prepack(ng.quantize(UP, ng.MXFP4), pair="halves"), "down": DOWN4, "interleaved": True}, ValueError,
                          "interleaved: got True, expected as gate_up was packed, 'halves'"),
    "an activation": ({"activation": "gelu"}, ValueError, "activation: got 'gelu'"),
    "arguments of an activation": ({"activation_args": (1.7, 7.0)}, ValueError, r"activation_args: got \(1.7, 7.0\)"),
    "a bias of another shape": ({"gate_up_bias": torch.zeros(E, I)}, ValueError, r"gate_up_bias, shape: got \(4, 64\), expected \(4, 128\)"),
    "a bias of integers": ({"down_bias": torch.zeros(E, H).int()}, TypeError, "down_bias, dtype: got torch.int32"),
    "a bias in a list": ({"down_bias": [0.0]}, TypeError, "down_bias: got list"),
    "a bias with strides": ({"down_bias": torch.zeros(H, E).T}, ValueError, r"down_bias, strides: got \(1, 4\)"),
    "a shared output elsewhere": ({"shared_output": META}, ValueError, "shared_output, device: got meta"),
    "shared twice": ({"shared": (UP[0], DOWN[0]), "shared_output": X}, ValueError, "shared and shared_output: got both"),
    "another shared format": ({"shared": (UP8[0], DOWN8[0])}, ValueError, "shared, format: got fp8_128x128, expected gate_up's, bf16"),
    "another shared size": ({"shared": (UP[0], both(DOWN[0]))}, ValueError, r"shared\[1\], shape: got \(128, 128\)"),
    "activations of a whole tensor": ({"gate_up": UP8, "down": DOWN8, "activation_format": ng.FP8_TENSOR}, ValueError, "use fp8_row"),
    "plain activations of another type": ({"activation_format": "fp16"}, ValueError, "activation_format: got fp16"),
    "no routing": ({"topk_ids": None, "topk_weights": None}, ValueError, "routing: got neither"),
    "ids alone": ({"topk_weights": None}, ValueError, "routing: got topk_ids alone"),
    "weights alone": ({"topk_ids": None}, ValueError, "routing: got topk_weights alone"),
    "routing twice": ({"router_logits": LOGITS, "top_k": 2}, ValueError, "routing: got router_logits and topk_weights or topk_ids"),
    "weights of the routing": ({"topk_weights": WEIGHTS.bfloat16()}, TypeError, "topk_weights, dtype: got torch.bfloat16"),
    "ids of floats": ({"topk_ids": WEIGHTS}, TypeError, "topk_ids, dtype: got torch.float32"),
    "ids of fewer tokens": ({"topk_ids": IDS[1:]}, ValueError, r"topk_ids, shape: got \(5, 2\)"),
    "fewer weights": ({"topk_weights": WEIGHTS[:, :1]}, ValueError, r"topk_weights, shape: got \(6, 1\)"),
    "another top_k": ({"top_k": 3}, ValueError, "top_k: got 3, expected that of topk_ids, 2"),
    "logits of fewer tokens": (ROUTED | {"router_logits": LOGITS[1:]}, ValueError, "router_logits, rows: got 5, expected x's, 6"),
    "more choices than experts": (ROUTED | {"top_k": 5}, ValueError, "top_k: got 5"),
    "a map of floats": ({"expert_map": torch.zeros(2)}, TypeError, "expert_map"), "a backend": ({"backend": "nothing"}, ValueError, "backend: got 'nothing'"),
    "one shared weight": ({"shared": (UP[0], )}, TypeError, "shared: got 1 weights, expected a pair of weights"),
    "shared is a weight": ({"shared": UP8[0]}, TypeError, "shared: got ScaledTensor, expected a pair of weights"),
    "a shared output of fewer tokens": ({"shared_output": X[:2]}, ValueError, r"shared_output, shape: got \(2, 128\)"),
    "one expert's gate_up": ({"gate_up": UP8[0], "down": DOWN8}, ValueError, "gate_up, shape: got .*, expected 3 dimensions"),
    "an output of another shape": ({"out": X[1:]}, ValueError, r"out, shape: got \(5, 128\)"),
    "a workspace that is too small": ({"workspace": torch.zeros(16, dtype=torch.uint8)}, ValueError, "workspace bytes: got 16"),
    "a workspace of floats": ({"workspace": torch.zeros(1 << 20)}, ValueError, "workspace: got torch.float32 on cpu"),
}


@pytest.mark.parametrize("name", LAYER)
def test_experts(name: str) -> None:
    change, error, message = LAYER[name]
    ng.experts(**GOOD)
    with pytest.raises(error, match=message):
        ng.experts(**GOOD | change)


ROWS, LAYOUT = torch.randn(8, 64), ng.Offsets(torch.tensor([0, 3, 8]))
STEP = {
    "rows in a list": ({"h": [1.0]}, TypeError, "h"), "rows of integers": ({"h": ROWS.int()}, TypeError, "h, dtype: got torch.int32"),
    "an odd width": ({"h": ROWS[:, 1:]}, ValueError, r"h, shape: got \(8, 63\)"),
    "a bias without a layout": ({"bias": torch.zeros(2, 64)}, ValueError, "layout, with a bias: got None"),
    "a bias of another shape": ({"bias": torch.zeros(2, 32), "layout": LAYOUT}, ValueError, r"bias, shape: got \(2, 32\), expected \(2, 64\)"),
    "a bias of integers": ({"bias": torch.zeros(2, 64).int(), "layout": LAYOUT}, TypeError, "bias, dtype: got torch.int32"),
    "a layout elsewhere": ({"layout": ng.Offsets(torch.tensor([0, 3, 8], device="meta"))}, ValueError, "layout, device: got meta"),
    "a layout of scales": ({"fmt": ng.FP8_1x128, "scale_layout": "sideways"}, ValueError, "scale_layout: got 'sideways'"),
    "scales of the whole tensor": ({"fmt": ng.FP8_TENSOR}, ValueError, "format of the activation: got fp8_tensor"),
    "another plain format": ({"fmt": ng.BF16}, ValueError, "format of the activation: got bf16"),
}


@pytest.mark.parametrize("name", STEP)
def test_activate(name: str) -> None:
    change, error, message = STEP[name]
    with pytest.raises(error, match=message):
        ng.activate(**{"h": ROWS} | change)
