"""Which kernel, which config, and why: one pure function of (Problem, Arch). Reads no tensor and needs no GPU.

A tuned table for the device decides where it has the problem; else the cost model. M is in buckets and the number of
groups is no key, so a new token count or expert-parallel degree never disengages a tuned choice.
"""

from __future__ import annotations

from functools import lru_cache

from ..arch import Arch
from ..errors import Unsupported, expect
from ..kernels.registry import Kernel, backends, kernels
from ..problem import Config, Plan, Problem, Step
from ..tuning import store
from . import env

PORTABLE = ("triton", "reference")


def select(problem: Problem, arch: Arch, backend: str | None = None, config: Config | None = None,
           on_unsupported: str = "portable") -> Plan:
    """The Plan for `problem` on `arch`.

    `backend`: only that one (default: NARROWGEMM_BACKEND, else any). `config`: that config, where the kernel can run it.
    `on_unsupported`: 'portable' lets a problem without a fast kernel run on the portable ones, and the Plan says so;
    'raise' makes it an error. Raises Unsupported, with every kernel's reason, where nothing is left; ValueError for an
    unknown backend or an illegal config.
    """
    expect(on_unsupported in ("portable", "raise"), "on_unsupported", repr(on_unsupported), "'portable' or 'raise'")
    return _select(problem, arch, backend or env.get("NARROWGEMM_BACKEND"), config, on_unsupported,
                   env.get("NARROWGEMM_TABLES"))


@lru_cache(maxsize=8192)
def _select(problem: Problem, arch: Arch, backend: str, config: Config | None, on_unsupported: str, tables: str) -> Plan:
    expect(not backend or backend in backends(), "backend", repr(backend), f"one of {backends()}")
    passed: list[tuple[str, str]] = []
    best: tuple[float, Kernel, Config] | None = None
    tuned = None if config else store.lookup(problem, arch.name, tables)
    why = "cost model"
    for name, kernel in kernels().items():
        if backend and kernel.BACKEND != backend:
            passed.append((name, f"backend {backend!r} was asked for"))
            continue
        reason = kernel.supports(problem, arch)
        if reason is None and on_unsupported == "raise" and kernel.BACKEND in PORTABLE and not backend:
            reason = "portable, and on_unsupported='raise' asks for a fast kernel"
        if reason is not None:
            passed.append((name, reason))
            continue
        legal = kernel.configs(problem, arch)
        if config is not None:
            if reason := illegal(kernel, problem, config, arch):
                passed.append((name, f"config {config} is not legal here: {reason}"))
                continue
            legal = [config]
        elif tuned and tuned.kernel == name and illegal(kernel, problem, tuned.config, arch) is None:
            best, why = (tuned.us * 1e-6, kernel, tuned.config), f"tuned table {tuned.source}"
            continue
        if not legal:
            passed.append((name, "no config fits this device"))
            continue
        seconds, chosen = min(((kernel.estimate(problem, c, arch), c) for c in legal), key=lambda x: x[0])
        if why.startswith("tuned"):
            passed.append((name, f"the tuned table prefers {best[1].NAME}" if best else ""))
        elif best is None or seconds < best[0]:
            if best is not None:
                passed.append((best[1].NAME, f"predicted {best[0] * 1e6:.1f} us, {seconds / best[0]:.2f}x of it here"))
            best = (seconds, kernel, chosen)
        else:
            passed.append((name, f"predicted {seconds * 1e6:.1f} us, slower than {best[1].NAME}"))
    if best is None:
        reasons = "; ".join(f"{n}: {r}" for n, r in passed)
        if config is not None:
            raise ValueError(f"config {config} can't run {problem.op} ({problem.layout}) on {arch.name}: {reasons}")
        raise Unsupported(f"no kernel runs {problem.op} ({problem.layout}, {problem.a.format.name} x "
                          f"{problem.b.format.name}) on {arch.name}: {reasons}", "see narrowgemm.explain")
    seconds, kernel, chosen = best
    if config is not None:
        why = "config= was given"
    if kernel.BACKEND in PORTABLE and arch.vendor != "cpu" and not backend and why == "cost model":
        why += "; no fast kernel takes this problem" if not any(
            r.startswith(("predicted", "the tuned")) for n, r in passed if kernels()[n].BACKEND not in PORTABLE) else ""
    step = Step(kernel.NAME, chosen, kernel.workspace(problem, chosen))
    return Plan(problem, arch.name, kernel.BACKEND, (step,), why, seconds * 1e6, tuple(passed))


def illegal(kernel: Kernel, problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run there, or None. Kernels may refine legality with a `legal` function of their own."""
    check = getattr(kernel, "legal", None)
    if check is not None:
        return check(problem, config, arch)
    return None if config in kernel.configs(problem, arch) else "not among the kernel's configs"
