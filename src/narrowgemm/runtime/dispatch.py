"""Which kernel, which config, and why: one pure function of (Problem, Arch). Reads no tensor and needs no GPU.

A tuned table for the device decides where it has the problem; else the cost model. M is in buckets and the number of
groups is no key, so a new token count or expert-parallel degree never disengages a tuned choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from ..arch import Arch
from ..errors import Unsupported, expect
from ..kernels.registry import PRODUCTS, Kernel, backends, candidates, kernels, other_chip
from ..problem import Config, Plan, Problem, Step
from ..tuning import store
from . import env

PORTABLE = ("triton", "reference")


def select(problem: Problem, arch: Arch, backend: str | None = None, config: Config | None = None,
           on_unsupported: str = "portable") -> Plan:
    """The Plan for `problem` on `arch`.

    `backend`: only that one, or only the kernel of that name (default: NARROWGEMM_BACKEND, else any).
    `config`: that config, where the kernel can run it.
    `on_unsupported`: 'portable' lets a problem without a fast kernel run on the portable ones, and the Plan says so;
    'raise' makes it an error. Raises Unsupported, with every kernel's reason, where nothing is left; ValueError for an
    unknown backend or an illegal config, TypeError for what is neither.
    """
    check_choice(backend, config)
    expect(on_unsupported in ("portable", "raise"), "on_unsupported", repr(on_unsupported), "'portable' or 'raise'")
    return _select(problem, arch, backend or env.get("NARROWGEMM_BACKEND"), config, on_unsupported,
                   env.get("NARROWGEMM_TABLES"))


def check_choice(backend: object, config: object) -> None:
    """TypeError for a `backend` that is no name and a `config` that is none."""
    expect(backend is None or isinstance(backend, str), "backend", type(backend).__name__, "the name of a backend or of a kernel",
           error=TypeError)
    expect(config is None or isinstance(config, Config), "config", type(config).__name__, "a narrowgemm.Config", error=TypeError)


@lru_cache(maxsize=8192)
def _select(problem: Problem, arch: Arch, backend: str, config: Config | None, on_unsupported: str, tables: str) -> Plan:
    expect(not backend or backend in (*backends(), *kernels()), "backend", repr(backend),
           f"one of {backends()}, or a kernel by name")
    passed: dict[str, str] = {}
    able: dict[str, Kernel] = {}
    for name, kernel in candidates(problem.op).items():
        reason = _unable(kernel, problem, arch, backend, config, on_unsupported)
        if reason is None:
            able[name] = kernel
        else:
            passed[name] = reason
    if not able:
        raise _refusal(problem, arch, backend, config, passed)
    offers = {name: _cheapest(kernel, problem, config, arch) for name, kernel in able.items()}
    name = min(offers, key=lambda n: (able[n].BACKEND == "reference", offers[n][0]))     # it is for what no kernel takes
    seconds, chosen = offers[name]
    tuned, remark = (None, "") if config else _tuned(problem, arch, tables, able, name)
    if tuned:
        name, chosen, seconds, why = tuned.kernel, tuned.config, tuned.us * 1e-6, f"tuned table {tuned.source}"
        passed |= {other: f"the tuned table prefers {name}" for other in able if other != name}
    else:
        why = ("config= was given" if config else "cost model") + remark
        passed |= {other: f"predicted {cost * 1e6:.1f} us, {name} {seconds * 1e6:.1f} us"
                   for other, (cost, _) in offers.items() if other != name}
        portable = arch.vendor != "cpu" and all(k.BACKEND in PORTABLE for k in able.values())
        if problem.op in PRODUCTS and portable and not (backend or config):
            why += "; no fast kernel takes this problem"
    step = Step(name, chosen, able[name].workspace(problem, chosen))
    order = tuple((n, passed[n]) for n in kernels() if n in passed)
    return Plan(problem, arch.name, able[name].BACKEND, (step,), why, seconds * 1e6, order)


def _tuned(problem: Problem, arch: Arch, tables: str, able: dict[str, Kernel], model: str) -> tuple[store.Tuned | None, str]:
    """(the tuned table's choice, what is said of one that is passed over). `model`: the kernel that the cost model takes."""
    tuned = store.choose(problem, arch, tables)
    if tuned is None or tuned.kernel not in able or illegal(able[tuned.kernel], problem, tuned.config, arch) is not None:
        return None, ""
    if changed := tuned.changed(tuned.kernel, model):
        return None, f"; the tuned row of {tuned.source} was not measured with {changed} as it is now"
    return tuned, ""


def _unable(kernel: Kernel, problem: Problem, arch: Arch, backend: str, config: Config | None,
            on_unsupported: str) -> str | None:
    """Why `kernel` is out of the question, or None."""
    if backend and backend not in (kernel.BACKEND, kernel.NAME):
        return _not_asked_for(backend)
    if (reason := other_chip(kernel, arch) or kernel.supports(problem, arch)) is not None:
        return reason
    if on_unsupported == "raise" and kernel.BACKEND in PORTABLE and not backend:
        return "portable, and on_unsupported='raise' asks for a fast kernel"
    if config is not None and (reason := illegal(kernel, problem, config, arch)) is not None:
        return f"config {config} is not legal here: {reason}"
    return None if config or kernel.configs(problem, arch) else "no config fits this device"


def _not_asked_for(backend: str) -> str:
    return f"backend {backend!r} was asked for"


def _cheapest(kernel: Kernel, problem: Problem, config: Config | None, arch: Arch) -> tuple[float, Config]:
    """(predicted seconds, config) of the kernel's best candidate; the first of equals."""
    candidates = [config] if config else kernel.configs(problem, arch)
    costs = [kernel.estimate(problem, c, arch) for c in candidates]
    best = min(range(len(costs)), key=costs.__getitem__)
    return costs[best], candidates[best]


def _refusal(problem: Problem, arch: Arch, backend: str, config: Config | None, passed: dict[str, str]) -> Exception:
    """Kernels that `backend` left out are not named."""
    reasons = "; ".join(by_reason((name, reason) for name, reason in passed.items() if reason != _not_asked_for(backend)))
    what = f"{problem.op} ({problem.layout}, {problem.a.format.name} x {problem.b.format.name}) on {arch.name}"
    what += f" with backend {backend!r}" if backend else ""
    if config is not None:
        return ValueError(f"config {config} can't run {what}: {reasons}")
    return Unsupported(f"no kernel runs {what}: {reasons}", "see narrowgemm.explain")


def by_reason(passed_over: Iterable[tuple[str, str]]) -> list[str]:
    """(kernel, reason) as text: each reason once, behind all kernels that gave it."""
    kernels_of: dict[str, list[str]] = {}
    for name, reason in passed_over:
        kernels_of.setdefault(reason, []).append(name)
    return [f"{', '.join(names)}: {reason}" for reason, names in kernels_of.items()]


def illegal(kernel: Kernel, problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run there, or None. Kernels may refine legality with a `legal` function of their own."""
    check = getattr(kernel, "legal", None)
    if check is not None:
        return check(problem, config, arch)
    return None if config in kernel.configs(problem, arch) else "not among the kernel's configs"
