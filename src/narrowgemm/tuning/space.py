"""What the tuner may choose from: every kernel that supports a problem, with each of its configs and its predicted time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch

from ..arch import Arch
from ..kernels.registry import kernels
from ..ops.explain import describe
from ..problem import Config, Problem, bucket
from ..runtime.dispatch import select
from ..testing.case import Case

PORTABLE = "triton"


@dataclass(frozen=True, slots=True)
class Candidate:
    kernel: str
    backend: str
    config: Config
    predicted_us: float

    @property
    def label(self) -> str:
        return f"{self.kernel} {self.config}"


def candidates(problem: Problem, arch: Arch, patterns: Sequence[str] = ()) -> list[Candidate]:
    """In registry order. `patterns`: only kernels whose name matches one; the cost model's pick is there all the same.

    On a GPU the reference is no candidate: it reads sizes on the host, so it can't be captured, and it is never fast.
    """
    found = []
    for name, kernel in kernels().items():
        if (kernel.BACKEND == "reference" and arch.vendor != "cpu") or kernel.supports(problem, arch) is not None:
            continue
        found += [Candidate(name, kernel.BACKEND, c, kernel.estimate(problem, c, arch) * 1e6)
                  for c in kernel.configs(problem, arch)]
    if not patterns or not found:
        return found
    best = pick(found)
    return [c for c in found if c is best or any(fnmatch(c.kernel, p) for p in patterns)]


def pick(found: Sequence[Candidate]) -> Candidate:
    """What the cost model chooses: the least predicted time, the first of equals."""
    return min(found, key=lambda c: c.predicted_us)


def problem_of(case: Case) -> Problem:
    """The Problem that a call with the case's operands has, aligned and scales MN-major; `case.rows` must not be 0."""
    m = case.max_m if case.layout == "masked" else case.a_rows
    p = describe(case.op, layout=case.layout, groups=case.groups, m=m, n=case.n,
                 k=case.rows if case.layout == "k_grouped" else case.k, a=case.a, b=case.b, out_dtype=case.out_dtype,
                 expected_m=case.expected_m if case.layout == "masked" else 0, packed=case.packed)
    if case.layout == "k_grouped":
        return replace(p, rows=bucket(case.m), accumulate=case.accumulate, b=replace(p.b, scale_major="mn"),
                       alignment=case.column_alignment)
    a = p.a if case.a.group[0] == 1 or not case.a.scaled else replace(p.a, scale_major="k")
    return replace(p, rows=min(p.rows, p.m), accumulate=case.accumulate, a=a,
                   alignment=case.alignment if case.layout == "psum" and case.packed else 1,
                   zero_padding=case.zero_padding or case.op != "grouped_gemm")


def promising(found: list[Candidate], within: float) -> list[Candidate]:
    """Those predicted to take at most `within` times what the fastest one is; all where it is 0."""
    return [c for c in found if not within or c.predicted_us <= within * pick(found).predicted_us]


def versus_portable(found: Sequence[Candidate], chosen: Candidate, count: int) -> list[Candidate]:
    """The choice, and the `count` portable candidates that are predicted to be the fastest, in the order of `found`."""
    portable = sorted((c for c in found if c.backend == PORTABLE), key=lambda c: c.predicted_us)[:count]
    return [c for c in found if c.label == chosen.label or c in portable]


def choice(problem: Problem, arch: Arch) -> Candidate:
    """What a call gets: by table or cost model."""
    plan = select(problem, arch)
    return Candidate(plan.kernel, plan.backend, plan.config, plan.predicted_us)
