"""A thread without a CUDA context gets one before TMA descriptors are encoded in it."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import pytest
import torch

from narrowgemm.kernels import context


class Driver:
    """libcuda of one GPU: notes the calls, and what is current."""

    def __init__(self, current: int, fails: str = "") -> None:
        self.calls: list[str] = []
        self.current, self.fails = current, fails

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == "cuCtxGetCurrent":
                arguments[0]._obj.value = self.current
            elif name == "cuDevicePrimaryCtxRetain":
                arguments[0]._obj.value = 77
            elif name == "cuCtxSetCurrent":
                self.current = arguments[0].value
            return 201 if name == self.fails else 0
        return call


def in_thread(call: Any) -> list[BaseException]:
    """What `call` raised in a thread of its own."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except RuntimeError as e:
            raised.append(e)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(**options: Any) -> Driver:
        driver = Driver(**options)
        monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        return driver
    return make


def test_a_thread_without_one(gpu: Any) -> None:
    driver = gpu(current=0)
    assert not in_thread(lambda: (context.ensure(), context.ensure()))
    assert driver.current == 77 and driver.calls.count("cuCtxGetCurrent") == 1     # the second call asks nothing


def test_a_thread_with_one_keeps_it(gpu: Any) -> None:
    driver = gpu(current=5)
    assert not in_thread(context.ensure) and driver.current == 5 and driver.calls == ["cuCtxGetCurrent"]


def test_a_driver_that_refuses(gpu: Any) -> None:
    gpu(current=0, fails="cuCtxSetCurrent")
    raised = in_thread(context.ensure)
    assert len(raised) == 1 and "cuCtxSetCurrent failed with CUDA driver error 201" in str(raised[0])


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("loads the driver"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert not in_thread(context.ensure)


@pytest.mark.gpu
def test_first_launch_of_a_thread() -> None:
    """The kernel is compiled and bound by another thread: nothing but the descriptor's encoding asks for a context here."""
    import narrowgemm as ng
    from narrowgemm.formats import FP8_1x128, FP8_128x128

    w = ng.quantize(torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16), FP8_128x128)
    xs = [ng.quantize(torch.randn(300, 1024, device="cuda", dtype=torch.bfloat16), FP8_1x128) for _ in range(2)]
    want = [ng.gemm(x, w) for x in xs]
    assert want[0].isfinite().all()
    torch.cuda.synchronize()
    out = torch.zeros_like(want[1])
    fresh = ng.quantize(torch.randn(300, 1024, device="cuda", dtype=torch.bfloat16), FP8_1x128)
    assert not in_thread(lambda: ng.gemm(fresh, w, out=out))
    assert torch.equal(out, ng.gemm(fresh, w))
