"""Plans made with fake kernels or other tables do not outlive a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from narrowgemm.runtime import dispatch
from narrowgemm.tuning import store


@pytest.fixture(autouse=True)
def _fresh_plans() -> Iterator[None]:
    dispatch._select.cache_clear()
    yield
    dispatch._select.cache_clear()
    store._table.cache_clear()
