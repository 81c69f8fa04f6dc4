"""Compiling a model's kernels ahead: the calls that it will make, and the kernels that they come to.

`Products` and `Layer` each name calls that differ only in their number of rows, `sizes`. `by_kernels` splits one into parts that
processes compile side by side: sizes that come to the same kernels are in the same part, so no two parts do the same work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch

from ..arch import Arch
from ..formats import dtype_of, get_format
from ..prepack import prepack
from ..problem import Plan
from .experts import experts
from .explain import explain
from .explain_experts import explain_experts
from .prepare import prepare, zeros

PACKING = 3     # times the bytes of weights that packing them takes


class Workload(Protocol):
    """What `by_kernels` and `narrowgemm cache warm` ask of `Products` and `Layer`."""

    @property
    def sizes(self) -> tuple[int, ...]: ...

    @property
    def bytes(self) -> float:
        """Device memory that compiling takes."""

    def plans(self, size: int, arch: Arch) -> Mapping[str, Plan]:
        """The Plan of every step of a call of this size on `arch`, by the step's name. Raises Unsupported."""

    def compile(self, device: str) -> int:
        """Make the calls on weights of zeros, in this process; returns how many it made. Raises as the calls would."""


C = TypeVar("C", "Products", "Layer")


@dataclass(frozen=True)
class Products:
    """Calls of `gemm` or `grouped_gemm`: weights `[groups, n, k]` (dense: `[n, k]`), by rows (masked: rows expected in a group).

    max_m: the most rows (masked: the rows that a group can hold).
    packed: the weights go through `prepack`, with these `activations`; '' for weights as they are.
    """

    layout: str
    groups: int
    n: int
    k: int
    a: str
    b: str
    out_dtype: str
    max_m: int
    sizes: tuple[int, ...]
    packed: str = ""

    def __str__(self) -> str:
        return f"{self.layout:10s} G{self.groups} N{self.n} K{self.k}{_for(self.packed)} rows {_list(self.sizes)}"

    def plans(self, size: int, arch: Arch) -> dict[str, Plan]:
        """One plan, under no name."""
        masked = self.layout == "masked"
        return {"": explain("gemm" if self.layout == "dense" else "grouped_gemm", layout=self.layout, groups=self.groups,
                            m=self.max_m if masked else size, expected_m=size if masked else 0, n=self.n, k=self.k, a=self.a,
                            b=self.b, out_dtype=self.out_dtype, packed=self.packed or False, device=arch.name).plan}

    @property
    def bytes(self) -> float:
        """Weights, activations and an output."""
        rows = self.max_m * (self.groups if self.layout == "masked" else 1)
        return (PACKING ** bool(self.packed) * self.groups * get_format(self.b).storage_bytes(self.n, self.k)
                + get_format(self.a).storage_bytes(rows, self.k) + rows * self.n * 4)

    def compile(self, device: str) -> int:
        """One call a Plan; returns how many Plans there are."""
        where = torch.device(device)
        masked = self.layout == "masked"
        shape = (self.n, self.k) if self.layout == "dense" else (self.groups, self.n, self.k)
        plain = zeros(shape, get_format(self.b), where, mn_major=False)
        plans = prepare(prepack(plain, activations=self.packed) if self.packed else plain, layout=self.layout, max_m=self.max_m,
                        a_format=self.a, out_dtype=dtype_of(self.out_dtype), expected_m=self.sizes if masked else (),
                        sizes=() if masked else self.sizes)
        _wait(where)
        return len(plans)


@dataclass(frozen=True)
class Layer:
    """Calls of `experts`, by tokens: `experts` of the model's `world` experts are here.

    interleaved, bias: GPT-OSS's rows of gate and up, and its biases. packed: as in `Products`.
    """

    experts: int
    world: int
    hidden: int
    inter: int
    top_k: int
    weights: str
    activation: str
    interleaved: bool
    bias: bool
    dtype: str
    sizes: tuple[int, ...]
    packed: str = ""
    activations: str | None = None

    def __str__(self) -> str:
        return (f"{'experts':10s} E{self.experts} I{self.inter} H{self.hidden} top-{self.top_k}{_for(self.packed)} "
                f"tokens {_list(self.sizes)}")

    def plans(self, size: int, arch: Arch) -> dict[str, Plan]:
        """The plan of each step."""
        return explain_experts(tokens=size, hidden=self.hidden, inter=self.inter, experts=self.experts, top_k=self.top_k,
                               num_experts=self.world, weights=self.weights, activation_format=self.activations,
                               activation=self.activation, interleaved=self.interleaved, bias=self.bias,
                               packed=self.packed or False, dtype=dtype_of(self.dtype), device=arch.name).plan.steps

    @property
    def bytes(self) -> float:
        """Weights, tokens, and what lies between the steps."""
        fmt, rows = get_format(self.weights), max(self.sizes) * self.top_k
        weights = self.experts * (fmt.storage_bytes(2 * self.inter, self.hidden) + fmt.storage_bytes(self.hidden, self.inter))
        return PACKING ** bool(self.packed) * weights + rows * (2 * self.hidden + 6 * self.inter) * 2.0

    def compile(self, device: str) -> int:
        """Three calls a size: from logits, from int32 and from int64 ids, which are three routing kernels. Returns how many."""
        where, dtype = torch.device(device), dtype_of(self.dtype)
        up, down = (zeros((self.experts, n, k), get_format(self.weights), where, mn_major=False)
                    for n, k in ((2 * self.inter, self.hidden), (self.hidden, self.inter)))
        weights = (up, down) if not self.packed else (
            prepack(up, pair="interleaved" if self.interleaved else "halves", activations=self.packed),
            prepack(down, activations=self.packed))
        biases = [torch.zeros(self.experts, n, dtype=dtype, device=where) if self.bias else None
                  for n in (2 * self.inter, self.hidden)]
        calls = 0
        for tokens in self.sizes:
            x = torch.zeros(tokens, self.hidden, dtype=dtype, device=where)
            ids = torch.arange(tokens * self.top_k, device=where).view(tokens, -1) % self.world
            chosen: dict[str, Any] = {"topk_weights": torch.ones(ids.shape, device=where), "num_experts": self.world}
            logits: dict[str, Any] = {"router_logits": torch.zeros(tokens, self.world, device=where), "top_k": self.top_k}
            for routing in (logits, chosen | {"topk_ids": ids.int()}, chosen | {"topk_ids": ids}):
                experts(x, *weights, **routing, activation=self.activation, interleaved=self.interleaved,
                        activation_format=self.activations, gate_up_bias=biases[0], down_bias=biases[1])
                calls += 1
        _wait(where)
        return calls


def by_kernels(calls: C, arch: Arch) -> list[tuple[C, Mapping[str, Plan]]]:
    """The calls in parts, one for each set of kernels and configs on `arch`, with the plans of one of its sizes."""
    parts: dict[tuple[Any, ...], tuple[Mapping[str, Plan], list[int]]] = {}
    for size in calls.sizes:
        plans = calls.plans(size, arch)
        launched = tuple((name, s.kernel, s.config) for name, plan in plans.items() for s in plan.steps)
        parts.setdefault(launched, (plans, []))[1].append(size)
    return [(replace(calls, sizes=tuple(sizes)), plans) for plans, sizes in parts.values()]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _for(packed: str) -> str:
    return f" packed for {packed}" if packed else ""


def _list(sizes: tuple[int, ...]) -> str:
    return ",".join(map(str, sizes))
