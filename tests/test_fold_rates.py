"""Folding is counted right: against trying every power of two on every block."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from narrowgemm import MXFP8, FP8_1x128, ScaledTensor, quantize
from narrowgemm.testing.folding import fold_rates

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "fold_rates.py"


def random(rows: int, k: int, width: int) -> ScaledTensor:
    """`width`: how far the scales of a row lie apart; half of the rows are powers of two, which fold more often."""
    generator = torch.Generator().manual_seed(width)
    data = torch.randint(0, 256, (rows, k), dtype=torch.uint8, generator=generator)
    data[::2] &= 0xF8
    data[(data & 127) == 127] = 0
    data[torch.rand(rows, k, generator=generator) < 0.9] = 0x40
    scale = torch.randint(127, 127 + width, (rows, -(-k // 32)), dtype=torch.uint8, generator=generator)
    return ScaledTensor(data.view(torch.float8_e4m3fn), scale, MXFP8)


def held(values: torch.Tensor) -> torch.Tensor:
    """Whether some power of two makes a row E4M3."""
    found = [((values * 2.0 ** -b).to(torch.float8_e4m3fn).float() * 2.0**b == values).all(-1) for b in range(-12, 20)]
    return torch.stack(found).any(0)


@pytest.mark.parametrize("width", [1, 3, 8])
def test_a_block_folds_where_some_power_of_two_holds_it(width: int) -> None:
    q = random(160, 128, width)
    folds = held(q.dequantize())
    rates = fold_rates(q)
    assert rates.tiles[1] == pytest.approx(folds.float().mean().item()) and rates.whole == pytest.approx(rates.tiles[1])
    assert rates.tiles[8] == pytest.approx(folds.view(20, 8).all(1).float().mean().item())
    assert rates.two_parts >= rates.tiles[128] and (rates.rounded == 0) == bool(folds.all())
    assert width == 1 or 0 < rates.tiles[1] < 1


def test_the_whole_row_and_what_its_power_of_two_rounds() -> None:
    """Three experts, K of two blocks and a half, elements that the largest one's power of two rounds counted one by one."""
    q = random(3 * 64, 320, 3)
    values = q.dequantize()
    three = ScaledTensor(q.data.view(3, 64, 320), q.scale.view(3, 64, 10), MXFP8)
    rates = fold_rates(three)
    assert rates.whole == pytest.approx(held(values).float().mean().item())
    top = (values.abs().amax(-1, keepdim=True) / 448).log2().ceil()
    rounded = (values * torch.exp2(-top)).to(torch.float8_e4m3fn).float() * torch.exp2(top) != values
    assert rates.rounded == pytest.approx(rounded.float().mean().item()) and 0 < rates.rounded < 0.1
    blocks = torch.nn.functional.pad(values, (0, 64)).view(-1, 3, 128)
    assert rates.tiles[1] == pytest.approx(held(blocks).float().mean().item())
    assert rates.tiles[256] == pytest.approx(held(blocks).view(3, 64, 3).all(1).float().mean().item()), "tiles stay inside an expert"
    assert rates.square == pytest.approx(held(blocks.view(3, 64, 3, 128).transpose(1, 2).flatten(2)).float().mean().item())
    assert rates.columns == 64
    few = fold_rates(ScaledTensor(q.data[:3], q.scale[:3], MXFP8))
    assert few.square == pytest.approx(held(blocks[:3].transpose(0, 1).flatten(1)).float().mean().item())


def test_zeros_and_nan_ask_for_nothing() -> None:
    q = quantize(torch.zeros(8, 256), MXFP8)
    q.scale[0, 0], q.data.view(torch.uint8)[1, 5] = 255, 0x7F
    assert fold_rates(q) == ({1: 1.0, 8: 1.0, 64: 1.0, 128: 1.0, 256: 1.0}, 1.0, 1.0, 1.0, 0.0, None)


def test_outliers_fold_seldom() -> None:
    """Normal data, and one column in 64 30 times as large: what rates are there to tell apart."""
    torch.manual_seed(0)
    x = torch.randn(512, 512)
    normal = fold_rates(quantize(x, MXFP8))
    x[:, ::64] *= 30
    outliers = fold_rates(quantize(x, MXFP8))
    assert normal.tiles[128] > 0.85 > 0.4 > outliers.tiles[128] and outliers.rounded > 5 * normal.rounded
    assert normal.products < 1.15 and outliers.products > 1.6


@pytest.mark.parametrize("q, match", [(torch.zeros(4, 32), "ScaledTensor"), (quantize(torch.zeros(4, 128), FP8_1x128), "mxfp8"),
                                      (quantize(torch.zeros(0, 128), MXFP8), "empty")])
def test_refuses_what_it_cant_count(q: object, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        fold_rates(q)       # type: ignore[arg-type]


@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks/ is not part of an installed package")
def test_the_script_counts_kinds_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("fold_rates", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(["--rows", "64", "--k", "128"])
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == [k for k in script.KINDS]
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"a.down": torch.randn(32, 128), "a.up": torch.randn(32, 128), "b": torch.zeros(3)}, tmp_path / "x.safetensors")
    script.main([str(tmp_path / "x.safetensors"), "--name", "down"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("a.down") and "elements rounded" in line
