"""Tensors that wrap others, and have no memory of their own: refused before anything is launched, never taken for empty."""

from __future__ import annotations

import pytest
import torch

import narrowgemm as ng
from narrowgemm.kernels.launching import READY
from narrowgemm.runtime.launch import again


class Wrapper(torch.Tensor):
    """As DTensor and AsyncCollectiveTensor are made: its address is 0, and it has elements."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict, meta: None, size: tuple, stride: tuple) -> Wrapper:
        return Wrapper(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        unwrap = lambda t: t.inner if isinstance(t, Wrapper) else t  # noqa: E731
        tree_map = torch.utils._pytree.tree_map
        out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return tree_map(lambda t: Wrapper(t) if isinstance(t, torch.Tensor) and not isinstance(t, Wrapper) else t, out)


def calls() -> dict:
    torch.manual_seed(0)
    x, logits = torch.randn(6, 128).bfloat16(), torch.randn(6, 4)
    a, w = ng.quantize(x, "fp8_1x128"), ng.quantize(torch.randn(4, 64, 128), "fp8_128x128")
    offsets, out = torch.tensor([0, 2, 2, 5, 6]), torch.empty(6, 64, dtype=torch.bfloat16)
    up, down = (ng.quantize(torch.randn(4, n, 128), "fp8_128x128") for n in (256, 128))
    scaled = lambda t, wrap: ng.ScaledTensor(wrap(t.data), t.scale, t.format)  # noqa: E731
    return {
        "gemm a": lambda wrap: ng.gemm(wrap(x), x), "gemm b": lambda wrap: ng.gemm(x, wrap(x)),
        "gemm out": lambda wrap: ng.gemm(x, x, out=wrap(torch.empty(6, 6).bfloat16())),
        "grouped a": lambda wrap: ng.grouped_gemm(scaled(a, wrap), w, ng.Offsets(offsets), out=out),
        "grouped b": lambda wrap: ng.grouped_gemm(a, scaled(w, wrap), ng.Offsets(offsets), out=out),
        "quantize": lambda wrap: ng.quantize(wrap(x), "mxfp8"), "route": lambda wrap: ng.route(wrap(logits), 2),
        "experts x": lambda wrap: ng.experts(wrap(x), up, down, router_logits=logits, top_k=2),
        "experts logits": lambda wrap: ng.experts(x, up, down, router_logits=wrap(logits), top_k=2),
        "experts weights": lambda wrap: ng.experts(x, scaled(up, wrap), down, router_logits=logits, top_k=2),
        "grouped_linear": lambda wrap: ng.grouped_linear(wrap(x), torch.randn(4, 64, 128).bfloat16(), torch.tensor([1, 2, 0, 3])),
    }


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", calls())
def test_refused(name: str, warm: bool) -> None:
    """warm: behind a call with plain tensors of the same signature, whose checks are not made again."""
    call = calls()[name]
    if warm:
        call(lambda t: t)
    with pytest.raises(TypeError, match="got Wrapper, expected a tensor with memory of its own"):
        call(Wrapper)


def test_bound_launches_are_not_given_null() -> None:
    launched = []

    class Bound:
        workspace_bytes = 0
        aligned = staticmethod(lambda bits: True)
        launch = staticmethod(lambda table: launched.append(table) or True)

    out = torch.empty(4)
    assert again({READY: Bound()}, (64, 0, 64, 0, 0), out) and len(launched) == 1
    assert not again({READY: Bound()}, (0, 0, 64, 0, 0), out) and not again({READY: Bound()}, (64, 0, 0, 0, 0), out)
    assert len(launched) == 1
