"""Humming's adapters against a stand-in that computes what its layer is documented to: which kernel, which operands, which rows."""

from __future__ import annotations

import json
import sys
import types
from typing import Any, ClassVar

import pytest
import torch

from narrowgemm.formats import BF16, MXFP4, MXFP8, FP8_1x128, ScaledTensor
from narrowgemm.ops.quantize import quantize
from narrowgemm.testing import humming_peers, peers, worker
from narrowgemm.testing.case import Case
from narrowgemm.testing.cases import PEERS, SUITES, build

from .test_peers import checked

DENSE = Case("t", "dense", 1, 5, 320, 320, a=MXFP8, b=MXFP8, packed=True)
SORTED = Case("t", "offsets", 4, 6, 192, 320, a=BF16, b=MXFP4, sizes="topk:8:2", packed=True)
BLOCKS = Case("t", "contiguous", 2, 128, 128, 256, a=FP8_1x128, b=MXFP4, packed=True)
FITS = {"humming": (DENSE, SORTED, BLOCKS), "humming_w4a8_token": (BLOCKS,)}


class Meta(types.SimpleNamespace):
    def to_str(self) -> str:
        return f"{self.n}x{self.k}"


class Method:
    """Humming's `HummingLayerMethod`, as far as the adapters call it. `transformed`: layers whose weights were ordered."""

    transformed: ClassVar[list[torch.nn.Module]] = []
    tuned: ClassVar[list[str]] = []

    @staticmethod
    def prepare_layer_meta(layer: Any, n: int, k: int, weights: Any, activations: Any, experts: int | None, torch_dtype: Any) -> Meta:
        layer.meta = Meta(n=n, k=k, weights=weights, activations=activations, experts=experts)
        return layer.meta

    @staticmethod
    def get_default_tuning_configs(layer: Any, gemm_type: str) -> list[tuple[int, int, dict[str, Any]]]:
        wide = 256 if layer.meta.n > 256 else 128
        return [(0, 16, {"block_shape": (8, wide, 64)}), (16, 1 << 30, {"block_shape": (64, 128, 64)})]

    @classmethod
    def transform_humming_layer(cls, layer: Any) -> None:
        m = layer.meta
        bits = 4 if m.weights["b_dtype"] == "float4e2m1" else 8
        shape = () if m.experts is None else (m.experts,)
        assert layer.weight.shape == (*shape, m.n, m.k * bits // 32) and layer.weight.dtype == torch.int32
        assert layer.weight_scale.shape == (*shape, m.n, m.k // 32)
        assert m.weights["bs_dtype"] == "float8e8m0" and layer.weight_scale.dtype == torch.float8_e8m0fnu
        cls.transformed.append(layer)

    @classmethod
    def forward_layer(cls, layer: Any, x: torch.Tensor, outputs: torch.Tensor, input_scale: torch.Tensor | None, compute_config: str,
                      tuning_config: str, expert_layout: torch.Tensor | None = None) -> None:
        m, kind = layer.meta, json.loads(compute_config)["gemm_type"]
        assert x.shape[1] == m.k and outputs.shape == (x.shape[0], m.n) and layer.locks.dtype == torch.int32
        cls.tuned.append(tuning_config)
        fmt = MXFP4 if m.weights["b_dtype"] == "float4e2m1" else MXFP8
        payload = layer.weight.data.view(torch.uint8)
        w = ScaledTensor(payload if fmt == MXFP4 else payload.view(fmt.elem.dtype), layer.weight_scale.data.view(torch.uint8), fmt).dequantize()
        a = x.float()
        if input_scale is not None:
            assert input_scale.shape == (x.shape[0], 1) and m.activations["input_scale_group_size"] == 0
            a = a * input_scale
        ends = [0, x.shape[0]] if expert_layout is None else expert_layout.tolist()
        assert (kind == "dense") == (expert_layout is None)
        for e, (start, end) in enumerate(zip(ends, ends[1:])):
            outputs[start:end] = (a[start:end] @ (w if expert_layout is None else w[e]).mT).to(outputs.dtype)


@pytest.fixture
def humming(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """Stand-ins for the modules that the adapters import; the configs that are compiled ahead."""
    def quant_input(inputs: torch.Tensor, dtype: str, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert dtype == "float8e4m3" and group_size == 0
        scale = inputs.float().abs().amax(1, keepdim=True) / 448
        return (inputs.float() / scale).to(torch.float8_e4m3fn), scale

    compiled: list[tuple[str, str, str]] = []
    layer = types.SimpleNamespace(HummingLayerMethod=Method, HummingWeightSchema=dict, HummingInputSchema=dict,
                                  ops=types.SimpleNamespace(quant_input=quant_input))
    kernel = types.SimpleNamespace(HummingKernel=types.SimpleNamespace(prepare_kernels=lambda *configs: compiled.append(configs)))
    monkeypatch.setitem(sys.modules, "humming.layer", layer)
    monkeypatch.setitem(sys.modules, "humming.kernel.humming", kernel)
    monkeypatch.setattr(humming_peers, "_ordered", [])
    monkeypatch.setattr(humming_peers, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(Method, "transformed", [])
    monkeypatch.setattr(Method, "tuned", [])
    return compiled


@pytest.mark.parametrize("peer, case", [(p, c) for p, cases in FITS.items() for c in cases], ids=lambda x: getattr(x, "id", x))
def test_humming_gets_what_it_takes(humming: list[tuple[str, str, str]], peer: str, case: Case) -> None:
    assert peers.computes(peer, case)
    inputs = build(case, seed=1)
    checked(case, inputs, peer)
    chosen = Method.tuned[-1]
    assert json.loads(chosen)["block_shape"][0] == (8 if case.rows <= 16 else 64)
    first = len(Method.transformed)
    checked(case, inputs, peer)
    assert len(Method.transformed) == first, "the same weights were ordered a second time"


def test_each_product_of_a_wrong_row_fails(humming: list[tuple[str, str, str]]) -> None:
    inputs = build(BLOCKS)
    inputs.b.data.view(torch.uint8)[1, 0, 0] ^= 0x77
    prepared = peers.get_peer("humming").prepare(BLOCKS, inputs)
    inputs.b.data.view(torch.uint8)[1, 0, 0] ^= 0x77
    prepared.run()
    bad = [not torch.allclose(prepared.rows(g).float(), inputs.same_bits(g), atol=0.5, rtol=0.02) for g in (0, 1)]
    assert bad == [False, True]


def test_n_and_k_are_padded_as_little_as_the_tile_allows(humming: list[tuple[str, str, str]]) -> None:
    peer = peers.get_peer("humming")
    assert [(t.n, t.k) for t in peer.tiles(DENSE)] == [(512, 384), (512, 512)]      # 320 of N in tiles of 256
    assert [(t.n, t.k) for t in peer.tiles(SORTED)] == [(256, 384), (256, 512)]
    assert [(t.n, t.k) for t in peer.tiles(BLOCKS)] == [(128, 256)]


@pytest.mark.parametrize("peer", FITS)
def test_what_is_compiled_ahead_is_what_runs(humming: list[tuple[str, str, str]], peer: str) -> None:
    adapter = peers.get_peer(peer)
    assert isinstance(adapter, peers.Compiled) and not isinstance(peers.get_peer("triton_kernels"), peers.Compiled)
    case = FITS[peer][0]
    inputs = build(case, hollow=True)
    worker._once(adapter, inputs)
    assert [t.configs for t in adapter.tiles(case)] == humming and humming
    assert len(Method.transformed) == 1, "compiling ahead orders weights of one size alone"
    humming_peers.Humming.prepare(adapter, case, build(case)).run()
    assert Method.tuned[-1] in {tuning for _, _, tuning in humming}


def test_what_the_adapters_refuse() -> None:
    assert "takes fp8_1x128 and fp8_row x mxfp4" in peers.get_peer("humming_w4a8_token").supports(SORTED)
    assert "sorted by expert" in peers.get_peer("humming").supports(Case("t", "masked", 2, 8, 128, 128, max_m=16, b=MXFP4))
    assert "compute capability 9.0" in peers.get_peer("humming").available(torch.device("cpu"))
    for suite, names in PEERS.items():
        for name in names:
            if name.startswith("humming"):
                assert all(peers.computes(name, c) for c in SUITES[suite]), (suite, name)


def test_rows_of_one_scale_are_held_against_their_sources(humming: list[tuple[str, str, str]]) -> None:
    inputs = build(BLOCKS)
    token, bits = (peers.get_peer(p).prepare(BLOCKS, inputs) for p in ("humming_w4a8_token", "humming"))
    assert (token.gate, bits.gate) == ("recipe", "kernel") and bits.limit < token.limit
    quantised = quantize(inputs.source_b(0), MXFP4).dequantize()
    token.run()
    want = inputs.source_a(0).float() @ quantised.mT
    assert torch.nn.functional.cosine_similarity(token.rows(0).float().flatten(), want.flatten(), dim=0) > 0.999
