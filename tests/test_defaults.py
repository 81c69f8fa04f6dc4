"""Torch's default dtype and device, which loaders of models change, change nothing here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import narrowgemm as ng
from narrowgemm.ops import recall

IDS = torch.tensor([[0, 1], [2, 0], [1, 2], [2, 1]], dtype=torch.int32)
X, W = torch.randn(4, 128), torch.randn(3, 64, 128)
PACKED = ng.quantize(W, ng.MXFP4)
assert PACKED.scale is not None
WIDE = ng.ScaledTensor(PACKED.data, torch.where(torch.arange(64)[:, None] % 2 == 0, PACKED.scale, 250), ng.MXFP4)     # rows with a factor
ROUTING, WEIGHTS, OFFSETS = ng.sort_by_expert(IDS, 3), torch.rand(4, 2), torch.tensor([0, 1, 1, 4])
CALLS: dict[str, Callable[[], object]] = {
    "quantize": lambda: ng.quantize(X, ng.MXFP8),
    "quantize_both": lambda: ng.quantize_both(X, ng.FP8_ROW, OFFSETS).rows,
    "prepack": lambda: ng.prepack(WIDE),
    "unpack": lambda: ng.unpack(ng.prepack(WIDE, pair="halves")),
    "combine": lambda: ng.routed_gemm(X.bfloat16(), PACKED, ROUTING.layout, row_map=ROUTING.row_map, top_k=2, a_div=2,
                                      routing_weight=WEIGHTS, combine=True, out_dtype=torch.float32),
}


def tensors(x: object) -> Iterator[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        yield x
    for name in getattr(x, "__dataclass_fields__", ()):
        yield from tensors(getattr(x, name))


@pytest.fixture
def _restored() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, "meta"], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_nothing_changes(name: str, default: torch.dtype | str) -> None:
    want = list(tensors(CALLS[name]()))
    if isinstance(default, str):
        torch.set_default_device(default)
    else:
        torch.set_default_dtype(default)
    got = list(tensors(CALLS[name]()))
    assert len(got) == len(want) > 0
    for x, y in zip(got, want):
        assert (x.dtype, x.device, x.shape) == (y.dtype, y.device, y.shape)
        assert torch.equal(x.nan_to_num() if x.is_floating_point() and x.element_size() > 1 else x.view(torch.uint8),
                           y.nan_to_num() if y.is_floating_point() and y.element_size() > 1 else y.view(torch.uint8))


@pytest.mark.usefixtures("_restored")
def test_guards_are_found_under_another_default() -> None:
    usual = recall._maker.__wrapped__() is not None
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    assert (recall._maker.__wrapped__() is not None) == usual
