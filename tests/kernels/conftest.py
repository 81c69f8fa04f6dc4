"""Fixtures of kernel tests."""

from __future__ import annotations

import pytest


@pytest.fixture
def on(device, monkeypatch):
    """The device, with a GPU to plan for where there is none."""
    if device == "cpu":
        monkeypatch.setenv("NARROWGEMM_ARCH", "h200")
    return device
