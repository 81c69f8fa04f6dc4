"""Tensors without memory: on 'meta', and torch's fake ones. Every op gives outputs of the right shape, and launches nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import narrowgemm as ng
from narrowgemm import FP8_ROW, MXFP4, MXFP8, FP8_1x128, FP8_128x128, PackedWeight, ScaledTensor
from narrowgemm.runtime import launch

G, N, K, M = 3, 64, 128, 10


def operands() -> dict[str, Any]:
    torch.manual_seed(0)
    w = torch.randn(G, N, K)
    return {"x": torch.randn(M, K).bfloat16(), "a": ng.quantize(torch.randn(M, K), FP8_1x128), "b": ng.quantize(w, FP8_128x128),
            "w4": ng.quantize(w, MXFP4), "p4": ng.prepack(ng.quantize(w, MXFP4), pair="halves"), "one": ng.prepack(ng.quantize(w[0], MXFP8)),
            "up": ng.quantize(torch.randn(G, 2 * K, K), FP8_128x128), "down": ng.quantize(torch.randn(G, K, K), FP8_128x128),
            "o": torch.tensor([0, 3, 3, M]), "logits": torch.randn(M, G), "master": w.bfloat16()}


def without_memory(v: Any, move: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(v, Tensor):
        return move(v)
    if isinstance(v, ScaledTensor):
        return ScaledTensor(move(v.data), None if v.scale is None else move(v.scale), v.format)
    return PackedWeight(**{k: move(t) for k, t in v.tensors().items()}, format=v.format, shape=v.shape, pair=v.pair, prepack=v.prepack)


CALLS: dict[str, Callable[[dict], Any]] = {
    "gemm": lambda t: ng.gemm(t["a"], t["b"][0]), "gemm packed": lambda t: ng.gemm(t["x"], t["one"], out_dtype=torch.float32),
    "grouped": lambda t: ng.grouped_gemm(t["a"], t["b"], ng.Offsets(t["o"])),
    "masked": lambda t: ng.grouped_gemm(t["x"].expand(G, M, K), t["w4"], ng.Masked(t["o"][:G].int()),
                                        out=torch.zeros(G, M, N, dtype=torch.bfloat16, device=t["x"].device)),
    "contiguous": lambda t: ng.grouped_gemm(t["x"], t["w4"], ng.Contiguous(t["logits"][:, 0].int())),
    "grouped packed": lambda t: ng.grouped_gemm(t["x"], t["p4"], ng.Offsets(t["o"])),
    "routed": lambda t: ng.routed_gemm(t["x"], t["p4"], ng.Offsets(t["o"]), activation="swiglu"),
    "wgrad": lambda t: ng.grouped_gemm_wgrad(t["x"].T.contiguous(), t["x"].T.contiguous(), ng.KGrouped(t["o"])),
    "quantize": lambda t: ng.quantize(t["x"], MXFP4).data, "quantize_both": lambda t: ng.quantize_both(t["x"], FP8_ROW).columns.data,
    "route": lambda t: ng.route(t["logits"], 2)[1],
    "gather": lambda t: ng.gather_quantize(t["x"], ng.sort_by_expert(ng.route(t["logits"], 2)[1], G), MXFP8).data,
    "activate": lambda t: ng.activate(t["x"], fmt=MXFP8).data, "unpack": lambda t: ng.unpack(t["p4"]).data,
    "experts": lambda t: ng.experts(t["x"], t["up"], t["down"], router_logits=t["logits"], top_k=2),
    "grouped_linear": lambda t: ng.grouped_linear(t["x"], t["master"], t["o"][1:]),
}


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("name", CALLS)
def test_shapes(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = operands()
    want = CALLS[name](given)
    monkeypatch.setattr(launch, "launch", lambda *a: pytest.fail("launched what has no memory"))
    if kind == "meta":
        got = CALLS[name]({k: without_memory(v, lambda t: t.to("meta")) for k, v in given.items()})
    else:
        with FakeTensorMode() as mode:
            got = CALLS[name]({k: without_memory(v, mode.from_tensor) for k, v in given.items()})
    assert (got.shape, got.stride(), got.dtype, got.device.type) == (want.shape, want.stride(), want.dtype, "meta" if kind == "meta" else "cpu")


def test_a_device_that_is_not_there() -> None:
    with FakeTensorMode():
        x = torch.empty(M, K, dtype=torch.bfloat16, device="cuda")
        w = ScaledTensor(torch.empty(N, K // 2, dtype=torch.uint8, device="cuda"), torch.empty(N, K // 32, dtype=torch.uint8, device="cuda"), MXFP4)
        y = ng.gemm(ng.quantize(x, MXFP8), w)
    assert tuple(y.shape) == (M, N) and y.device.type == "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_fake_calls_between_real_ones(name: str) -> None:
    """On a GPU, where launches are bound after the first call: a fake call of the same signature finds none of them, nor leaves any."""
    given = {k: without_memory(v, lambda t: t.to("cuda")) for k, v in operands().items()}
    want = [CALLS[name](given) for _ in range(3)][-1].clone()
    with FakeTensorMode() as mode:
        fake = {k: without_memory(v, mode.from_tensor) for k, v in given.items()}
        for _ in range(3):
            assert CALLS[name](fake).shape == want.shape
    torch.cuda.synchronize()
    got = CALLS[name](given)
    assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


def test_prepack_needs_data() -> None:
    with pytest.raises(ng.Unsupported, match="weights without memory, on meta"):
        ng.prepack(ng.quantize(torch.randn(N, K), MXFP4).to("meta"))


def test_transforms_of_torch_func_are_refused_by_name() -> None:
    t = operands()
    x, w = t["x"].expand(2, M, K), t["w4"][0]
    for call in (lambda a: ng.gemm(a, w), lambda a: ng.gemm(a, t["one"]), lambda a: ng.quantize(a, MXFP8).data, lambda a: ng.route(a, 2)[0]):
        with pytest.raises(TypeError, match="vmap"):
            torch.vmap(call)(x)
