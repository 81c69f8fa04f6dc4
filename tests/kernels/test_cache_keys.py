"""A kernel that was compiled in one process is found by the next."""

from __future__ import annotations

import pytest

from .._compile import compile_jobs


@pytest.mark.compile
def test_keys_are_the_same_in_every_process() -> None:
    assert compile_jobs("sm90", "tests.kernels.cache_key_jobs:jobs") == []
