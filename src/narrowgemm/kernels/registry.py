"""Every kernel, one line each. Order breaks ties: the first of two equal estimates wins.

A kernel module has `NAME`, `BACKEND` and five functions:

    supports(problem, arch) -> None | str      None, or one sentence saying why not
    configs(problem, arch) -> list[Config]     legal candidates, about a dozen
    workspace(problem, config) -> int          bytes
    estimate(problem, config, arch) -> float   predicted seconds
    launches(step, problem, operands, workspace) -> list[Launch]    no validation, no decisions

It may have `OPS`, the ops that it is a candidate for (default: `PRODUCTS`), and `legal(problem, config, arch) -> None | str`, where
it runs more configs than it offers. One that launches nothing of Triton's, or not always, has `launch` with the arguments of
`launches`, on the current stream; `runtime.launch` makes the launches of the others.

The modules import without Triton and without a GPU: device code is in `*_device.py`, imported by `launches`.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Protocol

from ..arch import Arch
from ..problem import Config, Problem

MODULES: tuple[str, ...] = (
    "gluon.sm90.fp8_decode",
    "gluon.sm90.fp8_block",
    "gluon.sm90.fp8_cluster",
    "gluon.sm90.fp8_gated",
    "gluon.sm90.fp8_scaled",
    "gluon.sm90.fp8_wgrad",
    "gluon.sm90.quantize_both",
    "gluon.sm90.activate_both",
    "gluon.sm90.mx8_decode",
    "gluon.sm90.mx8_rows",
    "gluon.sm90.mx8_bf16",
    "gluon.sm90.mx8_f16",
    "gluon.sm90.narrow",
    "gluon.sm90.narrow_prefill",
    "gluon.sm90.expand",
    "gluon.sm90.bf16",
    "gluon.sm90.fold_mixed",
    "gluon.sm90.fold_both",
    "gluon.sm90.fold",
    "triton.fp8_block",
    "triton.mx",
    "triton.routed",
    "triton.bf16",
    "triton.fp8_wgrad",
    "triton.quantize",
    "triton.quantize_both",
    "torch_bf16",
    "triton.route",
    "triton.sort",
    "triton.gather",
    "triton.sort_gather",
    "triton.activate",
    "triton.activate_both",
    "triton.combine",
    "torch_steps",
    "torch_reference",
)

CHIPS = {"gluon_sm90": ("sm90", "NVIDIA Hopper")}     # backends whose kernels run on one target only
PRODUCTS = ("gemm", "grouped_gemm", "grouped_gemm_wgrad", "quantize", "routed_gemm")


class Kernel(Protocol):
    """What every kernel module has, beside `launches` or `launch`; see above."""

    NAME: str
    BACKEND: str

    def supports(self, problem: Problem, arch: Arch) -> str | None: ...
    def configs(self, problem: Problem, arch: Arch) -> list[Config]: ...
    def workspace(self, problem: Problem, config: Config) -> int: ...
    def estimate(self, problem: Problem, config: Config, arch: Arch) -> float: ...


@lru_cache(maxsize=1)
def kernels() -> dict[str, Kernel]:
    """Every kernel by name, in registry order."""
    mods = [import_module(f"{__package__}.{m}") for m in MODULES]
    return {m.NAME: m for m in mods}


def backends() -> tuple[str, ...]:
    """Every backend, in the order in which the registry first names it."""
    return tuple(dict.fromkeys(k.BACKEND for k in kernels().values()))


def candidates(op: str) -> dict[str, Kernel]:
    """The kernels that may compute `op`, by name, in registry order."""
    return {name: k for name, k in kernels().items() if op in getattr(k, "OPS", PRODUCTS)}


def other_chip(kernel: Kernel, arch: Arch) -> str | None:
    """Why a kernel written for one chip can't run on `arch`, whatever the problem; None where it can, and for portable ones."""
    target, name = CHIPS.get(kernel.BACKEND, (arch.target, ""))
    return None if target == arch.target else f"runs on {name} ({target}), not {arch.target}"
