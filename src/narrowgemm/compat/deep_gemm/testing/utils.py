"""`deep_gemm.testing.utils`: which architecture, and decorators that skip a test function."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from .... import arch

__all__ = ["get_arch_major", "ignore_env", "test_filter"]


def get_arch_major() -> int:
    """Major compute capability of the current GPU. 9 without an NVIDIA GPU: what is offered there is DeepGEMM's Hopper
    form (float32 scales, 128-row alignment)."""
    capability = arch.detect().capability
    return capability // 10 if capability else 9


def test_filter(condition: Callable[[], bool]) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Run the decorated function only where `condition()` holds; else print its name and that it was filtered."""

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            if condition():
                function(*args, **kwargs)
            else:
                print(f"{function.__name__}: filtered by {condition}\n")

        return run

    return decorate


test_filter.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it by its name


def ignore_env(name: str, condition: Callable[[], bool]) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Run the decorated function without the environment variable `name` where `condition()` holds."""

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            saved = os.environ.pop(name, None) if condition() else None
            try:
                function(*args, **kwargs)
            finally:
                if saved is not None:
                    os.environ[name] = saved

        return run

    return decorate
