"""Folding is counted right: against trying every power of two on every block."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from narrowgemm import MXFP8, ScaledTensor

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "fold_rates.py"


def script():
    spec = importlib.util.spec_from_file_location("fold_rates", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks/ is not part of an installed package")
@pytest.mark.parametrize("width", [1, 3, 8])
def test_a_block_folds_where_some_power_of_two_holds_it(width):
    """`width`: how far the four scales of a block lie apart."""
    generator = torch.Generator().manual_seed(width)
    data = torch.randint(0, 256, (400, 128), dtype=torch.uint8, generator=generator)
    data[::2] &= 0xF8                           # rows of powers of two fold more often
    data[(data & 127) == 127] = 0
    data[torch.rand(400, 128, generator=generator) < 0.9] = 0x40
    scale = torch.randint(127, 127 + width, (400, 4), dtype=torch.uint8, generator=generator)
    q = ScaledTensor(data.view(torch.float8_e4m3fn), scale, MXFP8)
    values = q.dequantize()
    held = torch.stack([((values * 2.0 ** -b).to(torch.float8_e4m3fn).float() * 2.0**b == values).all(-1) for b in range(-20, 30)])
    once, twice = script().folds(q)
    assert torch.equal(once[:, 0], held.any(0)) and bool((twice | ~once).all())
    assert width == 1 or 0 < once.float().mean() < 1
