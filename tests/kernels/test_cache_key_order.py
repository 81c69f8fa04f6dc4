"""Keys of Triton's cache: the same whichever kernel comes first, or a process compiles again what another one has."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from narrowgemm.kernels import cache_keys

KERNELS = ("first_kernel", "second_kernel")


def fresh() -> ModuleType:
    """The kernels as a new process has them."""
    spec = importlib.util.spec_from_file_location("cache_key_kernels", Path(__file__).parent / "cache_key_kernels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def jit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def keys(order: tuple[str, ...]) -> dict[str, Any]:
    module = fresh()
    for name in order:
        cache_keys.settle(getattr(module, name))
    return {name: getattr(module, name).cache_key for name in KERNELS}


def test_keys_do_not_depend_on_which_kernel_comes_first() -> None:
    assert keys(KERNELS) == keys(KERNELS[::-1])
    assert len(set(keys(KERNELS).values())) == 2


def test_called_functions_are_those_that_are_named() -> None:
    module = fresh()
    assert {f.__name__ for f in cache_keys.called(module.second_kernel)} == {"step", "twice"}


def test_a_kernel_of_the_interpreter_gets_no_key() -> None:
    """It is no function of Triton's compiler, whatever attributes it has."""
    interpreted = SimpleNamespace(hash=None, cache_key="read")
    cache_keys.settle(interpreted)
    assert interpreted.hash is None


def test_a_key_is_worked_out_once_and_a_function_that_calls_itself_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    module, read = fresh(), []
    monkeypatch.setattr(cache_keys, "called", lambda f, of=cache_keys.called: read.append(f.__name__) or of(f))
    for _ in range(2):
        cache_keys.settle(module.first_kernel)
    assert sorted(read) == ["first_kernel", "step", "twice"]
    assert len(module.twice.cache_key) == 64
