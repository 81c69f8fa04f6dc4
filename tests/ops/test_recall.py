"""A warm call is found by torch's guards, and only where all of its signature is the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import narrowgemm as ng
from narrowgemm.formats import FP8_1x128, FP8_128x128, ScaledTensor
from narrowgemm.ops import recall
from narrowgemm.ops.plan_cache import NOTHING, Known, PlanCache

KNOWN = Known(None, {}, NOTHING)


def aligned(shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """Contiguous, `offset` bytes behind a multiple of 64."""
    size = torch.empty(shape, dtype=dtype, device="meta").nbytes
    raw = torch.zeros(size + 128, dtype=torch.uint8)
    start = -raw.data_ptr() % 64 + offset
    return raw[start:start + size].view(dtype).view(shape)


def operands() -> dict[str, torch.Tensor]:
    return {"x": aligned((16, 256), torch.float8_e4m3fn), "sx": aligned((16, 2), torch.float32),
            "y": aligned((128, 256), torch.float8_e4m3fn), "sy": aligned((1, 2), torch.float32),
            "out": aligned((16, 128), torch.bfloat16), "index": aligned((16,), torch.int32)}


def recalled(cache: PlanCache, t: dict[str, torch.Tensor], *rest: object) -> Known | None:
    a, b = ScaledTensor(t["x"], t["sx"], FP8_1x128), ScaledTensor(t["y"], t["sy"], FP8_128x128)
    known, addresses = cache.recall(a, b, t.get("out"), t.get("index"), *rest)
    if known is not None:
        index = t.get("index")
        assert addresses == (*(t[k].data_ptr() for k in ("x", "sx", "y", "sy")), 0 if index is None else index.data_ptr())
    return known


@pytest.fixture
def cache() -> PlanCache:
    if recall._maker() is None:
        pytest.skip("this torch's guards are not what they were")
    cache, t = PlanCache(), operands()
    a, b = ScaledTensor(t["x"], t["sx"], FP8_1x128), ScaledTensor(t["y"], t["sy"], FP8_128x128)
    cache.remember(KNOWN, a, b, t["out"], t["index"], "option", False)
    return cache


def test_other_tensors_of_the_same_signature(cache: PlanCache) -> None:
    assert recalled(cache, operands(), "option", False) is KNOWN


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "strides of the scales": lambda t: t["sx"].as_strided_((16, 2), (1, 16)),
    "strides of the output": lambda t: t.update(out=aligned((16, 256), torch.bfloat16)[:, :128]),
    "shape of the index": lambda t: t.update(index=aligned((17,), torch.int32)),
    "dtype of the index": lambda t: t.update(index=aligned((16,), torch.int64)),
    "dtype of the output": lambda t: t.update(out=aligned((16, 128), torch.float16)),
    "dtype of a scale": lambda t: t.update(sy=aligned((1, 2), torch.uint8)),
    "device": lambda t: t.update(index=t["index"].to("meta")),
    "rows": lambda t: t["x"].resize_(8, 256),
    "alignment of an operand": lambda t: t.update(sx=aligned((16, 2), torch.float32, 4)),
    "alignment of the output": lambda t: t.update(out=aligned((16, 128), torch.bfloat16, 2)),
    "alignment of the index": lambda t: t.update(index=aligned((16,), torch.int32, 4)),
    "no output": lambda t: t.pop("out"),
    "no index": lambda t: t.pop("index"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_differs_is_not_recalled(cache: PlanCache, change: Callable) -> None:
    t = operands()
    change(t)
    rest = ("option", False)
    try:
        assert recalled(cache, t, *rest) is None
    except RuntimeError as e:       # a meta tensor has no address
        assert "data_ptr" in str(e) or "storage" in str(e)


@pytest.mark.parametrize("name", ["x", "sx", "y", "sy", "out", "index"])
def test_a_call_off_16_bytes_is_not_remembered(name: str) -> None:
    """Its Plan may be one for tensors that TMA can't take: calls that are aligned must not get it."""
    if recall._maker() is None:
        pytest.skip("this torch's guards are not what they were")
    cache, t = PlanCache(), operands()
    t[name] = aligned(tuple(t[name].shape), t[name].dtype, 8)
    cache.remember(KNOWN, ScaledTensor(t["x"], t["sx"], FP8_1x128), ScaledTensor(t["y"], t["sy"], FP8_128x128), t["out"], t["index"])
    assert recalled(cache, operands()) is None


def test_options_and_environment(cache: PlanCache, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recalled(cache, operands(), "option", True) is None
    monkeypatch.setenv("NARROWGEMM_BACKEND", "reference")
    assert recalled(cache, operands(), "option", False) is None


def test_an_operand_that_changes_in_place_between_two_calls() -> None:
    """Nothing of a tensor is kept from one call to the next."""
    a, b = ng.quantize(torch.randn(16, 256), ng.FP8_1x128), ng.quantize(torch.randn(128, 256), ng.FP8_128x128)
    first = ng.gemm(a, b)
    assert torch.equal(ng.gemm(a, b), first)
    a.data.resize_(8, 256)
    a.scale.resize_(8, 2)
    assert ng.gemm(a, b).shape == (8, 128)
    a.data.resize_(8, 128)
    with pytest.raises(ValueError, match="scale shape"):
        ng.gemm(a, b)


def test_a_torch_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "_maker", lambda: None)
    cache, t = PlanCache(), operands()
    a, b = ScaledTensor(t["x"], t["sx"], FP8_1x128), ScaledTensor(t["y"], t["sy"], FP8_128x128)
    cache.remember(KNOWN, a, b, t["out"], None)
    assert recalled(cache, t) is None


def test_few_are_kept_of_one_shape(cache: PlanCache) -> None:
    for pad in range(1, 2 * recall.ALIKE):
        t = operands()
        t["out"] = aligned((16, 128 + 8 * pad), torch.bfloat16)[:, :128]
        a, b = ScaledTensor(t["x"], t["sx"], FP8_1x128), ScaledTensor(t["y"], t["sy"], FP8_128x128)
        cache.remember(KNOWN, a, b, t["out"], t["index"], "option", False)
    assert {len(kept) for kept in cache._calls.known.values()} == {recall.ALIKE}
    assert recalled(cache, operands(), "option", False) is None
