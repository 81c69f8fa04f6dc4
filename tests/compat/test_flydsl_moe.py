"""FlyDSL's A16W4 stage 2 against the layer's definition: its own three cases (small), bias, pads, dtypes, splits, what it refuses."""

from __future__ import annotations

import warnings

import pytest
import torch

from narrowgemm import MXFP4, Unsupported, quantize
from narrowgemm.compat import aiter, flydsl, notice, packed_copies
from narrowgemm.testing.numerics import calc_diff

OUT = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
# (tokens, model, inter, E, top_k, tile_m, tile_n, tile_k, k_batch): the source's, model and inter made small for the CPU
CASES = [(16, 96, 512, 16, 4, 32, 256, 256, 1), (32, 96, 512, 16, 4, 64, 256, 256, 1), (4, 96, 512, 16, 4, 16, 128, 128, 2)]
FULL = [(16, 3072, 3072, 128, 4, 32, 256, 256, 1), (128, 3072, 3072, 128, 4, 64, 256, 256, 1), (4, 3072, 3072, 128, 4, 16, 128, 256, 2)]


@pytest.fixture(autouse=True)
def fresh():
    packed_copies._entries.clear()
    notice._given.clear()
    flydsl.compile_a16w4_moe_gemm2.cache_clear()
    torch.manual_seed(0)
    yield


class Layer:
    """Operands of a stage 2 as its callers have them, and the FP32 result over the same bits."""

    def __init__(self, case, device="cpu", pads=(0, 0), bias=False, routing="random"):
        self.tokens, self.n, self.k, self.experts, self.top_k, self.tile_m, self.tile_n, self.tile_k, self.k_batch = case
        self.pads, t, e = pads, self.tokens, self.experts
        self.live_n, self.live_k = self.n - pads[0], self.k - pads[1]
        self.a2 = (torch.randn(t * self.top_k, self.k, device=device) * 0.2).bfloat16()
        parts = [quantize(torch.randn(self.n, self.k, device=device) / 10, MXFP4) for _ in range(e)]
        self.w = aiter.shuffle_weight_a16w4(torch.stack([q.data for q in parts]), 16, False)
        self.scale = aiter.shuffle_scale_a16w4(torch.cat([q.scale.contiguous() for q in parts]), e, False)
        span = {"first": self.top_k, "random": e, "one": e}[routing]
        ids = torch.stack([torch.randperm(span)[:self.top_k] for _ in range(t)]) if t else torch.empty(0, self.top_k)
        self.ids = (ids * 0 if routing == "one" else ids).int().to(device)
        self.weights = torch.rand(t, self.top_k, device=device) + 0.1
        self.bias = torch.randn(e, self.n, device=device) if bias else None
        rows = self.a2.float()[:, :self.live_k]
        self.slots = torch.zeros(t * self.top_k, self.live_n, device=device)
        for expert in self.ids.unique().tolist():
            mine = (self.ids.flatten() == expert).nonzero()[:, 0]
            y = rows[mine] @ parts[expert].dequantize()[:self.live_n, :self.live_k].T
            self.slots[mine] = y + (0 if self.bias is None else self.bias[expert, :self.live_n])

    def want(self, weighted=True, accumulate=True):
        y = self.slots * (self.weights.flatten()[:, None] if weighted else 1.0)
        return y.view(self.tokens, self.top_k, self.live_n).sum(1) if accumulate else y

    def launch(self, out, weighted=True, flat=False, blocks=None, **options):
        compiled = flydsl.compile_a16w4_moe_gemm2(
            model_dim=self.n, inter_dim=self.k, experts=self.experts, topk=self.top_k, tile_m=self.tile_m, tile_n=self.tile_n,
            tile_k=self.tile_k, doweight_stage2=weighted, enable_bias=self.bias is not None, model_dim_pad=self.pads[0],
            inter_dim_pad=self.pads[1], k_batch=self.k_batch, **options)
        sorted_ids, weights, experts, valid, _ = aiter.moe_sorting(self.ids, self.weights, self.experts, self.n, torch.bfloat16,
                                                                   self.tile_m)
        tensors = (out, self.a2, self.w, self.scale)
        tensors = tuple(t.view(-1) for t in tensors) if flat else tensors
        compiled(*tensors, sorted_ids, experts, weights, valid, self.bias, self.tokens, self.n, self.k,
                 len(experts) if blocks is None else blocks, None)
        return out


DEVICES = [pytest.param("cpu", c, id=f"cpu-{c[0]}") for c in CASES]
DEVICES += [pytest.param("cuda", c, id=f"cuda-{c[0]}", marks=pytest.mark.gpu) for c in FULL]


@pytest.mark.parametrize("routing", ["first", "random", "one"])
@pytest.mark.parametrize("device, case", DEVICES)
def test_source_cases(device, case, routing):
    layer = Layer(case, device, routing=routing)
    out = layer.launch(torch.zeros(layer.tokens, layer.n, dtype=torch.bfloat16, device=device))
    assert calc_diff(out, layer.want()) < 1e-5


@pytest.mark.parametrize("device, case", [DEVICES[2], DEVICES[5]])
@pytest.mark.parametrize("out_dtype", ["bf16", "f16", "f32"])
def test_bias_counts_once_under_split_k_in_every_dtype(device, case, out_dtype):
    layer = Layer(case, device, bias=True)
    out = layer.launch(torch.zeros(layer.tokens, layer.n, dtype=OUT[out_dtype], device=device), out_dtype=out_dtype)
    assert calc_diff(out, layer.want()) < (1e-6 if out_dtype == "f32" else 1e-5)


@pytest.mark.parametrize("weighted", [True, False])
def test_rows_of_slots_without_accumulate(weighted):
    layer = Layer(CASES[0], bias=True)
    out = torch.full((layer.tokens * layer.top_k, layer.n), float("nan"), dtype=torch.bfloat16)
    layer.launch(out, weighted, accumulate=False)
    assert calc_diff(out, layer.want(weighted, False)) < 5e-6


def test_accumulate_adds_to_what_is_there():
    layer = Layer(CASES[0])
    base = torch.randn(layer.tokens, layer.n)
    out = layer.launch(base.clone(), out_dtype="f32")
    assert calc_diff(out, base + layer.want()) < 1e-6


@pytest.mark.parametrize("device, case, pads", [
    pytest.param("cpu", (8, 128, 512, 8, 2, 16, 128, 128, 1), (40, 192), id="cpu"),
    pytest.param("cuda", FULL[0], (192, 192), id="cuda", marks=pytest.mark.gpu)])
def test_padding_is_neither_read_nor_written(device, case, pads):
    layer = Layer(case, device, pads, bias=True)
    layer.a2[:, layer.live_k:] = float("nan")
    out = torch.zeros(layer.tokens, layer.n, dtype=torch.bfloat16, device=device)
    out[:, layer.live_n:] = 7
    layer.launch(out, flat=True)
    assert calc_diff(out[:, :layer.live_n], layer.want()) < 1e-5
    assert (out[:, layer.live_n:] == 7).all()


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens):
    layer = Layer((tokens, *CASES[2][1:]))
    out = layer.launch(torch.zeros(tokens, layer.n, dtype=torch.bfloat16))
    assert calc_diff(out, layer.want()) < 1e-5


def test_a_grid_that_was_meant_for_entries_is_not_more_blocks():
    """The source's own test hands the number of entries over as that of blocks."""
    layer = Layer(CASES[0])
    out = layer.launch(torch.zeros(layer.tokens, layer.n, dtype=torch.bfloat16), blocks=10_000)
    assert calc_diff(out, layer.want()) < 1e-5


def test_weights_are_packed_once_and_repeats_are_the_same_bits():
    layer = Layer(CASES[0])
    first = layer.launch(torch.zeros(layer.tokens, layer.n, dtype=torch.bfloat16))
    assert len(packed_copies._entries) == 1
    assert torch.equal(layer.launch(torch.zeros_like(first)), first) and len(packed_copies._entries) == 1


GOOD = {"model_dim": 96, "inter_dim": 512, "experts": 16, "topk": 4, "tile_m": 32, "tile_n": 256, "tile_k": 256,
        "doweight_stage2": True}


@pytest.mark.parametrize("change, match", [
    ({"tile_k": 48}, "tile_k"), ({"tile_m": 1, "tile_k": 32}, "tile_m"), ({"inter_dim": 384}, "k_batch"),
    ({"k_batch": 2}, "tiles of K"), ({"tile_k": 512}, "tiles of K"), ({"inter_dim": 768}, "even"), ({"out_dtype": "f64"}, "out_dtype"),
    ({"out_dtype": "f32", "accumulate": False}, "accumulate=True"), ({"out_dtype": "f32", "use_cshuffle_epilog": True}, "f32"),
    ({"use_cshuffle_epilog": False}, "cshuffle"), ({"accumulate": False, "tile_n": 48}, "tile_n"), ({"model_dim": 80}, "multiples"),
    ({"model_dim_pad": 96}, "model_dim_pad"), ({"inter_dim_pad": 16}, "inter_dim_pad"), ({"topk": 0}, "topk"),
    ({"experts": 1.5}, "integer"), ({"k_batch": True}, "integer")])
def test_what_the_factory_refuses(change, match):
    with pytest.raises((ValueError, TypeError), match=match):
        flydsl.compile_a16w4_moe_gemm2(**GOOD | change)


def test_an_occupancy_hint_is_said_to_have_no_effect():
    with pytest.warns(UserWarning, match="waves_per_eu=2 has no effect"):
        flydsl.compile_a16w4_moe_gemm2(**GOOD, waves_per_eu=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flydsl.compile_a16w4_moe_gemm2(**GOOD)


def broken(field, value):
    def change(layer):
        setattr(layer, field, value(getattr(layer, field)))
    return change


@pytest.mark.parametrize("change, match", [
    (broken("a2", lambda t: t.float()), "a2, dtype"), (broken("a2", lambda t: t[:-1]), "a2, shape"),
    (broken("a2", lambda t: t.T.contiguous().T), "contiguous"), (broken("w", lambda t: t[:, :64]), "w, (shape|strides)"),
    (broken("w", lambda t: t.float()), "w, dtype"), (broken("scale", lambda t: t[:, :8].contiguous()), "scale_w, shape"),
    (broken("bias", lambda t: t.bfloat16()), "bias, dtype"), (broken("bias", lambda t: t[1:].contiguous()), "bias, shape"),
    (broken("tokens", lambda t: -1), "tokens|rows")])
def test_what_a_launch_refuses(change, match):
    layer = Layer(CASES[0], bias=True)
    out = torch.zeros(layer.tokens, layer.n, dtype=torch.bfloat16)
    change(layer)
    with pytest.raises((ValueError, TypeError, Unsupported), match=match):
        layer.launch(out)
    assert not out.any()
