"""The measure and the gates: what they say about known errors, and that no error hides in a mean."""

from __future__ import annotations

import math

import pytest
import torch

from narrowgemm.formats import BF16, MXFP4, MXFP8, FP8_1x128, FP8_128x128
from narrowgemm.testing import numerics
from narrowgemm.testing.numerics import (
    KERNEL_GATE,
    Sums,
    assert_gates,
    calc_diff,
    check_gates,
    check_kernel,
    check_recipe,
    decibel,
    recipe_gate,
    slack,
    snr_db,
)

NAN, INF = float("nan"), float("inf")


def test_calc_diff_is_the_two_forms_of_its_definition() -> None:
    x, y = (torch.randn(100, 70, dtype=torch.float64) for _ in range(2))
    cosine = 1 - 2 * (x * y).sum() / (x * x + y * y).sum()
    assert calc_diff(x, y) == pytest.approx(float(cosine), rel=1e-12)
    assert calc_diff(x, x) == 0.0
    assert calc_diff(x, -x) == pytest.approx(2.0)


def test_one_rounding_to_bf16_is_what_the_kernel_gate_leaves_room_for() -> None:
    x = torch.randn(1 << 20)
    d = calc_diff(x.bfloat16(), x)
    assert 1.2e-6 < d < 1.6e-6 < KERNEL_GATE["bf16"]
    assert snr_db(x.bfloat16(), x) == pytest.approx(-10 * math.log10(2 * d))
    assert decibel(5e-6) == pytest.approx(50) and decibel(1e-3) == pytest.approx(27, abs=0.1) and decibel(0.0) == math.inf
    assert snr_db(x, x) == INF


@pytest.mark.parametrize(("x", "y", "want"), [
    ([1.0, NAN], [1.0, 2.0], 1.0), ([1.0, 2.0], [1.0, NAN], 1.0), ([1.0, NAN], [1.0, NAN], 1.0),
    ([1.0, INF], [1.0, 2.0], 1.0), ([INF, 1.0], [INF, 1.0], 1.0), ([0.0, 0.0], [0.0, 0.0], 0.0), ([], [], 0.0)])
def test_nothing_that_is_not_finite_passes_and_zero_is_zero(x: list[float], y: list[float], want: float) -> None:
    assert calc_diff(torch.tensor(x), torch.tensor(y)) == want


def test_chunks_and_strides_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(57, 33), torch.randn(57, 33)
    want = calc_diff(x, y)
    monkeypatch.setattr(numerics, "CHUNK", 100)
    assert calc_diff(x, y) == pytest.approx(want, rel=1e-12)
    assert calc_diff(x.mT, y.mT) == pytest.approx(want, rel=1e-12)
    assert calc_diff(x[::2], y[::2]) == pytest.approx(calc_diff(x[::2].clone(), y[::2].clone()), rel=1e-12)
    assert calc_diff(torch.tensor(2.0), torch.tensor(2.0)) == 0.0


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"calc_diff, shapes: got \(2, 3\) and \(3, 2\), expected equal"):
        calc_diff(torch.zeros(2, 3), torch.zeros(3, 2))


@pytest.mark.parametrize(("a", "b", "limit"), [
    (FP8_1x128, FP8_128x128, 1e-3), (FP8_1x128.with_element("e5m2"), FP8_128x128, 5e-3), (MXFP8, MXFP8, 1e-3),
    (FP8_1x128, MXFP4, 1e-2), (MXFP8.with_element("e5m2"), MXFP4, 1e-2), (BF16, MXFP4, 1e-2), (MXFP4, MXFP4, 2e-2),
    (BF16, BF16, 5e-6)])
def test_recipe_gate_follows_the_coarser_side(a, b, limit: float) -> None:
    assert recipe_gate(a, b) == recipe_gate(b, a) == limit


def test_one_bad_group_does_not_hide_behind_many_good_ones() -> None:
    reference = torch.randn(256, 4, 64)
    out = reference.clone()
    out[17] *= 1.01  # 1e-4 / 2 in its group, 2e-7 overall
    whole = check_kernel(out, reference)
    assert whole.ok and whole.get("kernel").overall < 1e-6
    by_group = check_kernel(out, reference, rows=list(range(256)))
    gate = by_group.get("kernel")
    assert not by_group.ok and gate.group == 17 and gate.worst == pytest.approx(5e-5, rel=0.02)
    with pytest.raises(AssertionError, match=r"expert products: kernel gate FAILED: .* in group 17, limit 1e-06"):
        by_group.assert_("expert products")


def test_nan_in_one_group_fails_both_gates() -> None:
    reference = torch.randn(3, 5, 64)
    out = reference.bfloat16()
    out[1, 2, 3] = NAN
    result = check_gates(out, reference, reference, FP8_1x128, FP8_128x128, rows=[0, 1, 2])
    assert [g.ok for g in result.gates] == [False, False]
    assert [g.worst for g in result.gates] == [1.0, 1.0] and all(g.group == 1 for g in result.gates)


def test_rows_may_be_slices_numbers_and_empty() -> None:
    reference = torch.randn(20, 8)
    rows = [slice(0, 7), torch.tensor([9, 8, 7]), slice(10, 10), slice(10, 20)]
    result = assert_gates(reference.bfloat16(), reference, reference, BF16, BF16, rows=rows)
    assert result.ok and "ok" in result.message
    masked = torch.randn(2, 6, 8)
    assert check_kernel(masked, masked.clone(), rows=[(0, slice(0, 4)), (1, slice(0, 0))]).ok


def test_the_limit_follows_the_output() -> None:
    reference = torch.randn(64, 64)
    noisy = reference * (1 + 2e-3)  # 2e-6
    assert check_kernel(noisy.half(), reference).ok
    assert not check_kernel(noisy, reference).ok


def test_few_values_may_miss_the_recipe_limit_by_their_sampling_error_alone() -> None:
    assert slack(128) == pytest.approx(1.53, abs=0.01) and slack(10**6) == pytest.approx(1.006)
    reference = torch.randn(1, 128)
    out = reference * (1 + math.sqrt(2 * 1.2e-3))
    assert check_recipe(out, reference, FP8_1x128, FP8_128x128).ok
    many = torch.randn(512, 128)
    out = many * (1 + math.sqrt(2 * 1.2e-3))
    assert not check_recipe(out, many, FP8_1x128, FP8_128x128).ok
    # one row of K = 16 averages 16 of A's errors, however many columns there are
    assert check_recipe(out[:1], many[:1], FP8_1x128, FP8_128x128, k=16).ok


def test_sums_synchronise_once_and_name_the_group() -> None:
    sums = Sums()
    assert sums.gate("kernel", 1e-6).ok and sums.gate("kernel", 1e-6).group == -1
    x = torch.randn(4, 4)
    for g in (3, 5):
        sums.add(g, x, x + (g == 5) * 0.1)
    sums.add(6, x[:0], x[:0])
    gate = sums.gate("kernel", 1e-6)
    assert not gate.ok and gate.group == 5


def test_float64_operands_are_left_alone() -> None:
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    before = x.clone(), y.clone()
    calc_diff(x, y)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])
