"""A training step of one rank's experts as a case: forward and backward of `expert_mlp`, with fresh tensors and a gate.

The interface is that of `case.Case` and `inputs.Inputs`, as far as the worker and the reports use it. What is checked is the
output, x's gradient and both weights', of the first and of the last group with rows, against FP32: eight results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import expect
from ..formats import Format
from ..ops.expert_mlp import Scaling, expert_mlp
from ..ops.grouped_linear import RECIPES, quantize_weight
from ..ops.quantize_both import Both
from ..reference.activate import activate
from .case import spread
from .models import ModelSizes
from .numerics import GateResult, Sums, independent
from .values import draw

KINDS = ("tensorwise", "delayed", "rowwise", "block")
GROUPS = 8
RECIPE_GATE = 4e-3      # calc_diff against FP32, 21 dB: two quantised products one behind the other, 2e-3, and some
HEADROOM = 1.5          # of delayed scales over the largest magnitude
PARTS = ("y", "dx", "d gate_up", "d down")


@dataclass(frozen=True, slots=True)
class StepCase(ModelSizes):
    """`tokens` rows over eight experts of `model`'s sizes, spread as `sizes` says (`case.spread`); SwiGLU, all in and out BF16.

    `kind`: of `KINDS`. `micro`: micro-batches that share the weights' quantisation, which is timed where it is 1; else it is not.
    """

    suite: str
    model: str
    tokens: int
    kind: str = "delayed"
    sizes: str = "balanced"
    micro: int = 0
    op: str = "expert_mlp"
    layout: str = "step"
    out_dtype: str = "bf16"

    def __post_init__(self) -> None:
        expect(self.kind in KINDS, "kind", self.kind, f"one of {KINDS}")

    @property
    def id(self) -> str:
        spread_ = "" if self.sizes == "balanced" else "-" + self.sizes.replace(":", "_")
        return f"{self.model}-t{self.tokens}-{self.kind}{spread_}{'-weights' if self.micro == 1 else ''}"

    @property
    def recipe(self) -> str:
        return "tensorwise" if self.kind == "delayed" else self.kind

    @property
    def a(self) -> Format:
        return RECIPES[self.recipe][0]

    @property
    def b(self) -> Format:
        return RECIPES[self.recipe][1]

    @property
    def groups(self) -> int:
        return GROUPS

    @property
    def group_sizes(self) -> tuple[int, ...]:
        return spread(self.sizes, GROUPS, self.tokens // GROUPS)

    @property
    def flops(self) -> float:
        """2·M·N·K of all six products."""
        return 3 * 2.0 * self.rows * 3 * self.n * self.k

    @property
    def bytes(self) -> float:
        """Fewest bytes: x, dy in and y, dx out in BF16, the FP8 weights along both axes in, their gradients in BF16 out."""
        return 8.0 * self.rows * self.k + GROUPS * 3 * self.n * self.k * (2 + 2)


@dataclass(eq=False)
class StepInputs:
    """Tensors of a step case on a device. `results`: y, dx, d gate_up, d down of the last call."""

    case: StepCase
    device: torch.device
    seed: int
    shared: dict[str, Any]
    quantized: tuple[Both, Both]
    scaling: Scaling | None
    results: tuple[Tensor, ...] = ()
    out: Any = field(default_factory=lambda: SimpleNamespace(tensor=torch.empty(0)))

    @property
    def weights(self) -> tuple[Any, Any]:
        return self.shared["key"], self.shared

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """x and the weights as new leaves: one that was used before brings the stream of its first use into a capture."""
        x, gate_up, down = (self.shared[name].detach().requires_grad_() for name in ("x", "gate_up", "down"))
        return x, gate_up, down

    @property
    def ends(self) -> tuple[int, int]:
        """The first and the last group with rows."""
        full = [g for g, n in enumerate(self.case.group_sizes) if n]
        return (full[0], full[-1]) if full else (0, 0)

    def step(self, **options: Any) -> tuple[Tensor, ...]:
        leaves = self.leaves
        y = expert_mlp(*leaves, group_offs=self.shared["offsets"], **options)
        return y.detach(), *torch.autograd.grad(y, leaves, self.shared["dy"])

    def call(self, **options: Any) -> None:
        """Forward and backward; quantising the weights, where the case asks for it."""
        case = self.case
        quantized = tuple(quantize_weight(w.detach(), case.recipe) for w in self.leaves[1:]) if case.micro == 1 else self.quantized
        self.results = self.step(recipe=case.recipe, quantized=quantized, scaling=self.scaling)

    def plan(self, **options: Any) -> Any:
        return SimpleNamespace(backend="expert_mlp", config=f"{self.case.kind}; products as dispatch chooses")

    def reset_out(self) -> None:
        self.results = ()

    def faults(self) -> list[str]:
        return []

    @property
    def groups(self) -> Iterator[int]:
        return iter(range(8) if self.case.rows else ())

    def part(self, results: tuple[Tensor, ...], i: int) -> Tensor:
        """Result i of `PARTS` x (first group, last group)."""
        g, what = self.ends[i % 2], results[i // 2]
        if i >= 4:
            return what[g]
        start = sum(self.case.group_sizes[:g])
        return what[start : start + self.case.group_sizes[g]]

    def rows(self, out: Tensor, i: int) -> Tensor:
        return self.part(self.results, i)

    def reference(self) -> dict[int, Tensor]:
        """`part` of the step in FP32, made once for all cases of the same tensors."""
        known = self.shared.setdefault("reference", {})
        for side, g in enumerate(self.ends):
            if side in known:
                continue
            start = sum(self.case.group_sizes[:g])
            rows = slice(start, start + self.case.group_sizes[g])
            x, w1, w2 = (t.detach().float().requires_grad_() for t in
                         (self.shared["x"][rows], self.shared["gate_up"][g], self.shared["down"][g]))
            h = activate(x @ w1.mT)
            assert isinstance(h, Tensor)
            y = h @ w2.mT
            known[side] = [t.bfloat16().float() for t in (y.detach(), *torch.autograd.grad(y, (x, w1, w2),
                                                                                         self.shared["dy"][rows].float()))]
        return {2 * i + side: known[side][i] for side in (0, 1) for i in range(4)}


def check_outputs(inputs: StepInputs, outputs: Mapping[str, tuple[Callable[[int], Tensor], Mapping[str, float]]]
                  ) -> dict[str, GateResult]:
    """The gate of several results of one step."""
    want = inputs.reference()
    out = {}
    for name, (part, limits) in outputs.items():
        sums = Sums()
        for i in inputs.groups:
            sums.add(i, part(i), want[i], independent(want[i], inputs.case.n))
        out[name] = GateResult(tuple(sums.gate(gate, limit, sampling=True) for gate, limit in limits.items()))
    return out


def build(case: StepCase, device: torch.device | str, seed: int = 0, reuse: Any = None, hollow: bool = False) -> StepInputs:
    """Fresh tensors; `reuse`: a key and tensors, taken where they are the same. `hollow`: no reference is wanted."""
    device = torch.device(device)
    key = (case.model, case.tokens, case.sizes, str(device), seed)
    if reuse is not None and reuse[0] == key:
        shared = reuse[1]
    else:
        hidden, inter = case.k, case.n
        leaves = {"x": draw("x", 0, (case.rows, hidden), device, seed)}
        for name, shape in (("gate_up", (2 * inter, hidden)), ("down", (hidden, inter))):
            leaves[name] = torch.stack([draw(name, g, shape, device, seed).div_(shape[1]**0.5) for g in range(GROUPS)])
        shared = {name: t.requires_grad_() for name, t in leaves.items()}
        shared |= {"key": key, "dy": draw("dy", 0, (case.rows, hidden), device, seed),
                   "offsets": pad(torch.tensor(case.group_sizes, device=device).cumsum(0), (1, 0))}
    made = shared.setdefault("quantized", {})
    if case.recipe not in made:
        made.clear()
        made[case.recipe] = tuple(quantize_weight(shared[w].detach(), case.recipe) for w in ("gate_up", "down"))
    inputs = StepInputs(case, device, seed, shared, made[case.recipe], None)
    if case.kind == "delayed":
        found = Scaling(torch.zeros(4, 4, device=device), torch.zeros(4, 4, device=device), ready=False)
        inputs.step(recipe=case.recipe, quantized=inputs.quantized, scaling=found)
        inputs.scaling = Scaling(found.amax * (HEADROOM / case.a.elem.max), torch.zeros_like(found.amax))
    return inputs


# ---------------------------------------------------------------- peers
def fused(inputs: StepInputs) -> Callable[[], tuple[Tensor, ...]]:
    """torch's grouped products in BF16, our SwiGLU and its derivative between them, a launch each."""
    return lambda: inputs.step(recipe="bf16")


def plain(inputs: StepInputs) -> Callable[[], tuple[Tensor, ...]]:
    """The same in torch alone, its autograd too."""
    from torch.nn.functional import grouped_mm, silu

    dy = inputs.shared["dy"]
    ends = inputs.shared["offsets"][1:].to(torch.int32)

    def run() -> tuple[Tensor, ...]:
        leaves = x, gate_up, down = inputs.leaves
        gate, up = grouped_mm(x, gate_up.mT, offs=ends).chunk(2, dim=-1)
        y = grouped_mm(silu(gate) * up, down.mT, offs=ends)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    return run


PEERS: dict[str, Callable[[StepInputs], Callable[[], tuple[Tensor, ...]]]] = {"torch_step": plain, "torch_step_fused": fused}
