"""`import deep_gemm` gives the compat layer for the length of a test, with settings as at the start of a process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields
from types import ModuleType

import pytest
import torch

from narrowgemm.compat import deep_gemm as compat
from narrowgemm.compat.deep_gemm import delegate, state


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def where(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def fresh_settings() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    fresh = state.Settings()
    for f in fields(fresh):
        setattr(state.settings, f.name, getattr(fresh, f.name))
    state.calls.clear()


@pytest.fixture
def clean_modules() -> Iterator[None]:
    """Nothing named deep_gemm is imported, and nothing stays that the test imports."""
    names = ("deep_gemm", delegate.PRIVATE, "vllm")
    kept = {n: sys.modules.pop(n) for n in list(sys.modules) if n.split(".")[0] in names}
    delegate.forget()
    yield
    compat.uninstall()
    delegate.forget()
    for n in [n for n in sys.modules if n.split(".")[0] in names]:
        del sys.modules[n]
    sys.modules.update(kept)


@pytest.fixture
def deep_gemm(clean_modules: None) -> ModuleType:
    compat.install()
    import deep_gemm

    return deep_gemm
