"""The two numeric gates: how far a result may be from the product of the same bits, and from the unquantised product.

`calc_diff` = ||x - y||² / (||x||² + ||y||²) in float64 = 1 - 2 Σxy / Σ(x² + y²), the measure of DeepGEMM's tests
(`calc_diff`). It is about relerr² / 2, so one rounding to BF16 is 1.4e-6.

* kernel gate: against an FP32 product over the same dequantised bits. What is left is the sum's own error.
* recipe gate: against the FP32 product of the operands before they were quantised. What is left is the format's error.

Both hold overall and for every group, so that one wrong expert does not hide behind 255 right ones; NaN fails.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import expect
from ..formats import Format, dtype_name

CHUNK = 1 << 24  # elements that are converted to float64 at a time

KERNEL_GATE: dict[str, float] = {"bf16": 5e-6, "fp16": 5e-6, "fp32": 1e-6}
# `fast_accum`: nothing is promoted, so that Hopper's 14 bits add up over K: normal values, K up to 32768
FAST_ACCUM_GATE = 2e-5
RECIPE_GATE: dict[str, float] = {"e4m3": 1e-3, "e5m2": 5e-3, "one 4-bit side": 1e-2, "both 4-bit": 2e-2,
                                 "unquantised": 5e-6}


def recipe_gate(a: Format, b: Format) -> float:
    """The recipe gate's limit for operands of these formats; the coarser side decides."""
    narrow = [f.element for f in (a, b) if f.elem.bits < 16]
    four = sum(e == "e2m1" for e in narrow)
    if four:
        return RECIPE_GATE["both 4-bit" if four == 2 else "one 4-bit side"]
    if not narrow:
        return RECIPE_GATE["unquantised"]
    return RECIPE_GATE["e5m2" if "e5m2" in narrow else "e4m3"]


def diff_terms(x: Tensor, y: Tensor) -> Tensor:
    """float64 `[2]` on the device: Σ(x-y)² and Σ(x²+y²), in chunks of `CHUNK` elements."""
    expect(x.shape == y.shape, "calc_diff, shapes", f"{tuple(x.shape)} and {tuple(y.shape)}", "equal shapes")
    if x.is_contiguous() and y.is_contiguous():
        x, y, rows = x.reshape(-1), y.reshape(-1), CHUNK
    else:
        rows = max(1, CHUNK // max(1, math.prod(x.shape[1:])))
    total = torch.zeros(2, dtype=torch.float64, device=x.device)
    for i in range(0, x.shape[0] if x.dim() else 1, rows):
        p, q = (x[i : i + rows].double(), y[i : i + rows].double()) if x.dim() else (x.double(), y.double())
        # not in place: float64 operands are the caller's own
        total += torch.stack(((p - q).square_().sum(), p.square().sum() + q.square().sum()))
    return total


def ratio(terms: Sequence[float]) -> float:
    """calc_diff from its two sums: 1.0 where anything is not finite, 0 where both operands are zero or empty."""
    num, den = terms
    if not (math.isfinite(num) and math.isfinite(den)):
        return 1.0
    return num / den if den > 0 else 0.0


def calc_diff(x: Tensor, y: Tensor) -> float:
    """||x - y||² / (||x||² + ||y||²) in float64; 0 for equal, 1.0 where either holds NaN or infinity. Synchronises.

    `x`, `y`: equal shapes, any float dtypes, any strides. Raises ValueError where the shapes differ.
    """
    return ratio(diff_terms(x, y).tolist())


def snr_db(x: Tensor, y: Tensor) -> float:
    """Signal to noise of `x` against the reference `y` in dB, -10·log10(2·calc_diff); inf for equal tensors."""
    return decibel(calc_diff(x, y))


def decibel(diff: float) -> float:
    """A calc_diff as signal to noise in dB: 27 for 1e-3, 50 for 5e-6."""
    return math.inf if diff == 0 else -10.0 * math.log10(2.0 * diff)


@dataclass(frozen=True, slots=True)
class Gate:
    """One gate's measurement. `worst` is the largest calc_diff of a group, `group` names that group."""

    name: str
    limit: float
    overall: float
    worst: float
    group: int
    ok: bool

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "FAILED"
        return (f"{self.name} gate {verdict}: calc_diff {self.overall:.3g} overall, {self.worst:.3g} in group "
                f"{self.group}, limit {self.limit:.3g}")


@dataclass(frozen=True, slots=True)
class GateResult:
    """All gates of one result."""

    gates: tuple[Gate, ...]

    @property
    def ok(self) -> bool:
        return all(g.ok for g in self.gates)

    @property
    def message(self) -> str:
        return "; ".join(map(str, self.gates))

    def get(self, name: str) -> Gate:
        return next(g for g in self.gates if g.name == name)

    def assert_(self, what: str = "") -> GateResult:
        """Itself, where every gate holds; else AssertionError with the figures."""
        if not self.ok:
            raise AssertionError(f"{what}: {self.message}" if what else self.message)
        return self


class Sums:
    """Collects the sums of one gate, group by group, without a synchronisation until `gate` is asked for."""

    def __init__(self) -> None:
        self.labels: list[int] = []
        self.terms: list[Tensor] = []
        self.samples: list[int] = []

    def add(self, group: int, x: Tensor, y: Tensor, samples: int = 0) -> None:
        """One group's result and reference. `samples`: independent values behind it where fewer than elements."""
        if x.numel():
            self.labels.append(group)
            self.terms.append(diff_terms(x, y))
            self.samples.append(min(x.numel(), samples or x.numel()))

    def gate(self, name: str, limit: float, *, sampling: bool = False) -> Gate:
        """Evaluate. `sampling` widens the limit by the sampling error of few values (`slack`)."""
        if not self.terms:
            return Gate(name, limit, 0.0, 0.0, -1, True)
        rows = torch.stack(self.terms).tolist()
        values = [ratio(r) for r in rows]
        overall = ratio([sum(r[0] for r in rows), sum(r[1] for r in rows)])
        factors = [slack(n) if sampling else 1.0 for n in self.samples]
        ok = overall <= limit * (slack(sum(self.samples)) if sampling else 1.0)
        ok = ok and all(v <= limit * f for v, f in zip(values, factors))
        i = max(range(len(values)), key=lambda j: values[j] / factors[j])
        return Gate(name, limit, overall, values[i], self.labels[i], ok)


def slack(samples: int) -> float:
    """How far a quantisation error, a mean over `samples` values, may pass its limit: 1.06 at 10^4, 1.006 at 10^6.

    Three standard errors, each 2 / sqrt(samples): measured over 200 seeds, 0.17 of the mean for one row of 128 x 128.
    """
    return 1.0 + 6.0 / math.sqrt(max(samples, 1))


def check_kernel(out: Tensor, reference: Tensor, *, rows: Sequence[Any] | None = None) -> GateResult:
    """The kernel gate: `out` against `reference`, the FP32 product over the same dequantised bits.

    `rows`: what indexes each group in both (slices, row numbers, `(g, slice)` for masked); None is one group. The limit
    follows `out`'s dtype.
    """
    return GateResult((_gate("kernel", out, reference, KERNEL_GATE[dtype_name(out.dtype)], rows, 0, False),))


def check_recipe(out: Tensor, reference: Tensor, a: Format, b: Format, *, rows: Sequence[Any] | None = None,
                 k: int = 0) -> GateResult:
    """The recipe gate: `out` against `reference`, the FP32 product of the unquantised operands of formats `a` and `b`.

    `k`: the contracted length; with it a group of few rows is known to average few quantisation errors.
    """
    return GateResult((_gate("recipe", out, reference, recipe_gate(a, b), rows, k, True),))


def check_gates(out: Tensor, same_bits: Tensor, unquantised: Tensor, a: Format, b: Format, *,
                rows: Sequence[Any] | None = None, k: int = 0) -> GateResult:
    """Both gates, overall and per group; see `check_kernel` and `check_recipe`."""
    return GateResult((*check_kernel(out, same_bits, rows=rows).gates,
                       *check_recipe(out, unquantised, a, b, rows=rows, k=k).gates))


def assert_gates(out: Tensor, same_bits: Tensor, unquantised: Tensor, a: Format, b: Format, *,
                 rows: Sequence[Any] | None = None, k: int = 0) -> GateResult:
    """`check_gates`, raising AssertionError with the figures where a gate fails."""
    return check_gates(out, same_bits, unquantised, a, b, rows=rows, k=k).assert_()


def _gate(name: str, out: Tensor, reference: Tensor, limit: float, rows: Sequence[Any] | None, k: int,
          sampling: bool) -> Gate:
    sums = Sums()
    groups: Iterable[Any] = (Ellipsis,) if rows is None else rows
    for g, r in enumerate(groups):
        x, y = out[r], reference[r]
        sums.add(g, x, y, independent(x, k))
    return sums.gate(name, limit, sampling=sampling)


def independent(x: Tensor, k: int) -> int:
    """Independent values behind a `[M, N]` result contracted over `k`: no more than A's or B's own elements."""
    n = x.shape[-1] if x.dim() else 1
    m = x.numel() // max(n, 1)
    return min(x.numel(), m * k, n * k) if k else x.numel()
