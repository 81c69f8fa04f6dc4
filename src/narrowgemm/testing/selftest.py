"""Every kernel of the registry on this device, against the reference: `narrowgemm doctor`.

    python -m narrowgemm.testing.selftest cuda 45          # a JSON object a line, in a process of its own
    python -m narrowgemm.testing.selftest cuda 45 0/4      # the first of four shares of the kernels

Products are held to both numeric gates with poisoned padding and guards; quantisers to the reference, bit for bit. A kernel
that this device can't run is listed with the reason. After the budget of seconds only kernels without a result yet run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial

import torch

from ..arch import ARCHS, Arch, detect
from ..formats import BF16, FORMATS, FP8_ROW, FP8_TENSOR, MXFP4, MXFP8, Format, FP8_1x128, FP8_128x128, ScaledTensor
from ..kernels.registry import PRODUCTS, Kernel, kernels, other_chip
from ..layouts import Offsets
from ..ops.activate_both import activate_both
from ..ops.quantize import quantize
from ..ops.quantize_both import quantize_both
from ..problem import Problem
from ..reference import quantize as reference
from . import selftest_steps
from .case import FOLDED, Case
from .inputs import build
from .numerics import calc_diff
from .worker import FAILURES, failure

PAIRS = ((FP8_1x128, FP8_128x128), (FP8_ROW, FP8_ROW), (FP8_TENSOR, FP8_TENSOR), (MXFP8, MXFP8), (FP8_1x128, MXFP4),
         (MXFP8, MXFP4), (MXFP4, MXFP4), (BF16, MXFP4), (BF16, MXFP8), (BF16, BF16))
PER_KERNEL = 3
NOT_HERE = "not here"


@dataclass(frozen=True, slots=True)
class Result:
    """`status`: 'ok', 'failed', or 'not here' (this device can't run it), with `detail` saying how far off, or why."""

    kernel: str
    status: str
    case: str = ""
    detail: str = ""
    seconds: float = 0.0


def cases() -> list[Case]:
    """Small problems of every op, layout and pair of formats; tails of M and N, an empty group."""
    out = []
    for a, b in PAIRS:
        out += [Case("selftest", "offsets", 5, 24, 384, 512, a=a, b=b, sizes="empty:0.3", slack=8),
                Case("selftest", "dense", 1, 40, 384, 512, a=a, b=b),
                Case("selftest", "masked", 4, 12, 384, 512, max_m=32, a=a, b=b, sizes="uniform:0.3:1.7"),
                Case("selftest", "offsets", 3, 300, 384, 512, a=a, b=b, sizes="uniform:0.7:1.3")]
    for a, b in ((BF16, MXFP4), (MXFP8, MXFP8), (BF16, MXFP8), (FP8_1x128, MXFP4), (MXFP4, MXFP4), (MXFP8, MXFP4)):
        out += [Case("selftest", "offsets", 5, 24, 384, 512, a=a, b=b, sizes="empty:0.3", packed=True),
                Case("selftest", "dense", 1, 5, 384, 512, a=a, b=b, packed=True)]
    out += [Case("selftest", "dense", 1, 7, 384, 512, a=a, b=MXFP8, packed="mxfp8") for a in (MXFP8, BF16)]
    out += [Case("selftest", "dense", 1, 300, 384, 512, a=MXFP8, b=MXFP8, packed=packed) for packed in FOLDED]
    out += [Case("selftest", "offsets", 3, 300, 384, 512, a=MXFP8, b=MXFP8, packed="folded", sizes="uniform:0.7:1.3")]
    # columns of each group at multiples of 128, as `quantize_both` writes them
    out += [Case("selftest", "k_grouped", 3, 320, 256, 512, a=a, b=a, sizes="skew128:3", out_dtype="fp32")
            for a in (FP8_ROW, FP8_1x128, FP8_TENSOR)]
    return out + [Case("selftest", "k_grouped", 3, 128, 256, k, a=a, b=a, sizes="uniform:0.3:1.7", out_dtype="fp32")
                  for k in (256, 1024) for a in (FP8_1x128, FP8_ROW, FP8_TENSOR)]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to try: its name, the Problem that decides who can, and `run(kernel, device)`: calc_diff, None for equal bits."""

    name: str
    problem: Problem
    run: Callable[[str, torch.device], float | None]


@lru_cache(maxsize=1)
def checks() -> tuple[Check, ...]:
    """Everything there is to try. A kernel of another op needs checks of its own here."""
    return (*product_checks(), *quantize_checks(), *both_checks(), *activate_both_checks(),
            *(Check(*c) for c in selftest_steps.checks()))


def product_checks() -> Iterator[Check]:
    """Both gates of every case."""
    for case in cases():
        # tensors without memory, but where values decide how weights are packed
        plan = build(case, "cpu" if case.packed else "meta", hollow=True).plan(backend="reference")
        assert plan is not None
        yield Check(case.id, plan.problem, partial(_product, case))


def _product(case: Case, kernel: str, device: torch.device) -> float:
    return build(case, device).verify(backend=kernel).get("kernel").overall


def quantize_checks() -> Iterator[Check]:
    """`quantize` into every scaled format: the reference's bits."""
    from ..ops.quantize import plan_of

    for shape in ((40, 512), (3, 1056)):
        for fmt in (f for f in FORMATS.values() if f.scaled):
            plan = plan_of(torch.empty(shape, dtype=torch.bfloat16, device="meta"), fmt, "rceil", 1e-4, "row_major",
                           "reference", None)
            assert plan is not None
            yield Check(f"quantize-{fmt.name}-{shape[0]}x{shape[1]}", plan.problem, partial(_quantize, shape, fmt))


def _quantize(shape: tuple[int, int], fmt: Format, kernel: str, device: torch.device) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    _same_bits(quantize(x.to(device), fmt, backend=kernel), reference.quantize(x, fmt, "rceil", 1e-4))


def both_checks() -> Iterator[Check]:
    """`quantize_both`: the reference's bits, along rows and along columns."""
    from ..ops.quantize_both import plan_of

    for fmt in (FP8_1x128, FP8_ROW, FP8_TENSOR, FP8_128x128):
        plan = plan_of(torch.empty((200, 384), dtype=torch.bfloat16, device="meta"), fmt, None, None, "rceil", 1e-4, "reference")
        assert plan is not None
        yield Check(f"quantize-both-{fmt.name}-200x384", plan.problem, partial(_both, fmt))


def _both(fmt: Format, kernel: str, device: torch.device) -> None:
    x = torch.randn((200, 384), generator=torch.Generator().manual_seed(0)).bfloat16()
    got = quantize_both(x.to(device), fmt, backend=kernel)
    for q, source in ((got.rows, x), (got.columns, x.mT)):
        _same_bits(q, reference.quantize(source, fmt, "rceil", 1e-4))


def _same_bits(got: ScaledTensor, want: ScaledTensor) -> None:
    assert got.scale is not None and want.scale is not None
    data = torch.equal(got.data.cpu().view(torch.uint8), want.data.view(torch.uint8))
    if not (data and torch.equal(got.scale.cpu(), want.scale)):
        raise AssertionError("other bits than the reference")


def activate_both_checks() -> Iterator[Check]:
    """`activate_both`: within rounding of the reference."""
    from ..ops.activate_both import Call, plan_of

    for fmt in (FP8_1x128, FP8_ROW, FP8_TENSOR):
        h, offsets = torch.empty((200, 512), dtype=torch.bfloat16, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
        plan = plan_of(Call(h, None, Offsets(offsets), fmt, "swiglu", (), None, None, None, "rceil", 1e-4, "reference"))
        assert plan is not None
        yield Check(f"activate-both-{fmt.name}-200x256", plan.problem, partial(_activate_both, fmt))


def _activate_both(fmt: Format, kernel: str, device: torch.device) -> float:
    h = torch.randn((200, 512), generator=torch.Generator().manual_seed(0)).bfloat16()
    offsets = torch.tensor([0, 80, 200])
    got = activate_both(h.to(device), Offsets(offsets.to(device)), fmt, backend=kernel)
    want = activate_both(h, Offsets(offsets), fmt, backend="reference")
    assert want.layout is not None
    end = int(want.layout.offsets[-1])     # past it, columns are room
    diff = max(calc_diff(got.rows.dequantize().cpu(), want.rows.dequantize()),
               calc_diff(got.columns.dequantize()[:, :end].cpu(), want.columns.dequantize()[:, :end]))
    if not diff <= 1e-4:     # exponentials are the device's own, so a rounding may fall the other way
        raise AssertionError(f"calc_diff {diff:.1e}")
    return diff


def checks_of(kernel: Kernel, arch: Arch) -> list[Check]:
    """Up to `PER_KERNEL` checks that the kernel takes on this device: the first, the last and what lies between."""
    able = [c for c in checks() if c.problem.op in getattr(kernel, "OPS", PRODUCTS) and kernel.supports(c.problem, arch) is None]
    if len(able) <= PER_KERNEL:
        return able
    return [able[i * (len(able) - 1) // (PER_KERNEL - 1)] for i in range(PER_KERNEL)]


def why_not(kernel: Kernel, arch: Arch) -> str:
    """Why the kernel can't run here what it runs elsewhere."""
    for check in checks():
        if any(kernel.supports(check.problem, other) is None for other in ARCHS.values()):
            return other_chip(kernel, arch) or kernel.supports(check.problem, arch) or ""
    return "no check tries it"


def run(device: torch.device, budget: float = 45.0, share: tuple[int, int] = (0, 1)) -> Iterator[Result]:
    """A result a kernel and check, as they come: first one of every kernel, then more while the budget lasts. `share` (i, n): of
    every n-th kernel from the i-th on."""
    arch, start = detect(device), time.monotonic()
    chosen = {name: checks_of(kernel, arch) for name, kernel in list(kernels().items())[share[0]::share[1]]}
    for turn in range(PER_KERNEL):
        for name, able in chosen.items():
            if turn == 0 and not able:
                yield Result(name, NOT_HERE, detail=why_not(kernels()[name], arch))
            elif turn < len(able) and (turn == 0 or time.monotonic() - start < budget):
                yield attempt(name, able[turn], device)


def attempt(name: str, check: Check, device: torch.device) -> Result:
    """Run one check on one kernel; what went wrong is in the Result."""
    start = time.monotonic()
    try:
        diff = check.run(name, device)
        status, detail = "ok", "equal bits" if diff is None else f"calc_diff {diff:.1e}"
    except FAILURES as e:
        status, detail = "failed", failure(e)
    return Result(name, status, check.name, detail, round(time.monotonic() - start, 2))


def main(argv: list[str]) -> int:
    """`python -m narrowgemm.testing.selftest DEVICE SECONDS [I/N]`: 1 where a check failed."""
    device, budget = torch.device(argv[0]), float(argv[1])
    which, _, of = (argv[2] if len(argv) > 2 else "0/1").partition("/")
    failed = False
    for result in run(device, budget, (int(which), int(of))):
        failed |= result.status == "failed"
        print(json.dumps(asdict(result)), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
