"""Whole expert layers as cases: `experts` from tokens and routing to combined hidden states, with fresh tensors and a gate.

The interface is that of `case.Case` and `inputs.Inputs`, as far as the worker and the reports use it. The output is one
group: a token's row mixes experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import expect
from ..formats import BF16, MXFP4, Format, ScaledTensor, get_format
from ..prepack import PackedWeight, prepack
from .guard import Guarded, guarded_empty
from .models import ModelSizes, get_model
from .numerics import GateResult, Sums, independent
from .values import draw, poisoned

# calc_diff of a layer against FP32 over the same bits; last bits of the first product move roundings of the activation
GATE = {"bf16": 1e-5, "e4m3": 1e-4, "e2m1": 1e-3}
STEPS = 4096        # that scores are drawn in


@dataclass(frozen=True, slots=True)
class LayerCase(ModelSizes):
    """One layer of `model`, this rank's share of its experts under expert parallelism `ep`, `tokens` tokens.

    Routing is drawn evenly from the case's own seed, top_k distinct experts a token of all the model's; the rank is the first.
    `logits`: the call starts at the router's logits, as a peer does that routes for itself; else at weights and ids.
    """

    suite: str
    model: str
    ep: int
    tokens: int
    weights: str = "fp8_128x128"
    op: str = "experts"
    layout: str = "layer"
    sizes: str = "balanced"
    out_dtype: str = "bf16"
    logits: bool = False

    def __post_init__(self) -> None:
        expect(self.ep >= 1 and self.tokens >= 0, "ep and tokens", (self.ep, self.tokens), "at least 1 and 0")

    @property
    def id(self) -> str:
        return f"{self.model}-ep{self.ep}-t{self.tokens}"

    @property
    def a(self) -> Format:
        from ..ops.experts_plan import activations_for

        return activations_for(self.b, BF16)

    @property
    def b(self) -> Format:
        return get_format(self.weights)

    @property
    def groups(self) -> int:
        return get_model(self.model).local_experts(self.ep)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Rows of each expert of this rank."""
        model = get_model(self.model)
        return tuple(torch.bincount(choices(self.tokens, model.experts, model.top_k)[1].flatten(),
                                    minlength=model.experts)[:self.groups].tolist())

    @property
    def flops(self) -> float:
        """2·M·N·K of both products over the rows of this rank."""
        return 2.0 * self.rows * 3 * self.n * self.k

    @property
    def bytes(self) -> float:
        """Weights of experts with rows, tokens and result, each once; what goes through memory between is not counted."""
        active = sum(s > 0 for s in self.group_sizes)
        weights = self.b.storage_bytes(2 * self.n, self.k) + self.b.storage_bytes(self.k, self.n)
        return active * weights + 4.0 * self.tokens * self.k


def scores(tokens: int, experts: int) -> Tensor:
    """fp32 `[T, E]` in (0, 1) on the CPU, the same on every machine. Their logarithms are logits of the same choices and weights: a
    token's scores are ten last places apart and more, so that softmaxes that round differently choose the same experts."""
    drawn = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(tokens * 31 + experts))
    return (torch.floor(drawn * STEPS) + (torch.arange(experts) + 0.5) / experts) / STEPS


@lru_cache(maxsize=16)
def choices(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """(weights fp32, ids int32) `[T, top_k]` on the CPU."""
    values, ids = scores(tokens, experts).topk(top_k, dim=1)
    return values / values.sum(1, keepdim=True), ids.to(torch.int32)


@dataclass(eq=False)
class LayerInputs:
    """Tensors of a layer case on a device."""

    case: LayerCase
    device: torch.device
    seed: int
    x: Tensor
    gate_up: ScaledTensor
    down: ScaledTensor
    topk_weights: Tensor
    topk_ids: Tensor
    out: Guarded
    weights_key: tuple[Any, ...] = ()
    packed: tuple[PackedWeight, PackedWeight] | None = None    # MXFP4 weights as the op is given them

    @property
    def weights(self) -> tuple[tuple[Any, ...], Any]:
        return self.weights_key, (self.gate_up, self.down, self.packed)

    def given(self, backend: str | None) -> tuple[Any, Any]:
        """(gate_up, down) of a call: packed ones, unless a backend is asked for."""
        return (self.gate_up, self.down) if self.packed is None or backend else self.packed

    @property
    def groups(self) -> Iterator[int]:
        return iter((0,) if self.case.tokens else ())

    @property
    def options(self) -> dict[str, Any]:
        model = get_model(self.case.model)
        return {"activation": model.activation, "interleaved": model.name.startswith("gpt-oss")}

    @cached_property
    def logits(self) -> Tensor:
        """Logits that `route` makes `topk_weights` and `topk_ids` of."""
        return scores(self.case.tokens, get_model(self.case.model).experts).log().to(self.device)

    @cached_property
    def space(self) -> Tensor:
        from ..ops.experts import experts_workspace

        model = get_model(self.case.model)
        need = experts_workspace(self.case.tokens, *self.given(None), top_k=model.top_k, num_experts=model.experts,
                                 **self.options)
        return torch.empty(need, dtype=torch.uint8, device=self.device)

    def call(self, **options: Any) -> Tensor:
        """The op into `self.out.tensor`, in one workspace of its own."""
        from ..ops.experts import experts

        gate_up, down = self.given(options.get("backend"))
        model = get_model(self.case.model)
        routing = {"router_logits": self.logits, "top_k": model.top_k} if self.case.logits else \
            {"topk_weights": self.topk_weights, "topk_ids": self.topk_ids}
        return experts(self.x, gate_up, down, **routing, num_experts=model.experts, out=self.out.tensor,
                       workspace=None if options.get("backend") else self.space, **self.options, **options)

    def plan(self, **options: Any) -> Any:
        """Backend and config of the two products."""
        from ..ops.experts import plan_for
        from ..ops.experts_plan import Options

        model = get_model(self.case.model)
        kind = (model.activation, (), bool(self.options["interleaved"]))
        p = plan_for(self.case.tokens, *self.given(options.get("backend")), model.top_k, model.experts, None, torch.bfloat16,
                     kind, None, False, None, Options(options.get("backend")), self.device)
        products = [p.steps[name] for name in ("gate_up", "down")]
        return SimpleNamespace(backend="+".join(dict.fromkeys(s.backend for s in products)),
                               config="; ".join(f"{s.kernel} {s.config}" for s in products))

    def rows(self, out: Tensor, g: int) -> Tensor:
        return out

    def reset_out(self) -> None:
        self.out.reset()

    def faults(self) -> list[str]:
        """What was written around the output."""
        return self.out.faults()

    def same_bits(self) -> Tensor:
        """The layer in FP32 over the same weights, and activations quantised as the op does."""
        from ..reference.experts import experts

        return experts(self.x, self.gate_up, self.down, self.topk_weights, self.topk_ids, activation_format=self.case.a,
                       **self.options)


def check_outputs(inputs: LayerInputs, outputs: Mapping[str, tuple[Callable[[int], Tensor], Mapping[str, float]]]
                  ) -> dict[str, GateResult]:
    """The gate of several results of one layer."""
    want = inputs.same_bits()
    out = {}
    for name, (rows, limits) in outputs.items():
        sums = Sums()
        sums.add(0, rows(0), want, independent(want, inputs.case.n))
        out[name] = GateResult(tuple(sums.gate(gate, limit) for gate, limit in limits.items()))
    return out


def build(case: LayerCase, device: torch.device | str, seed: int = 0, reuse: Any = None, hollow: bool = False) -> LayerInputs:
    """Fresh tokens and weights; `reuse`: a key and weights, taken where they are the same. `hollow`: poison, to compile."""
    device = torch.device(device)
    model = get_model(case.model)
    key = (case.model, case.weights, case.groups, str(device), seed, hollow)
    if reuse is not None and reuse[0] == key:
        gate_up, down, packed = reuse[1]
    else:
        gate_up, down = (stack(name, case, shape, device, seed, hollow)
                         for name, shape in (("gate_up", model.gate_up()), ("down", model.down())))
        pair = "interleaved" if model.name.startswith("gpt-oss") else "halves"
        packed = (prepack(gate_up, pair=pair), prepack(down)) if case.b == MXFP4 else None
    x = draw("x", 0, (case.tokens, model.hidden), device, seed)
    weights, ids = (t.to(device) for t in choices(case.tokens, model.experts, model.top_k))
    out = guarded_empty((case.tokens, model.hidden), torch.bfloat16, device)
    inputs = LayerInputs(case, device, seed, x, gate_up, down, weights, ids, out, key, packed)
    inputs.reset_out()
    return inputs


def stack(name: str, case: LayerCase, shape: tuple[int, int], device: torch.device, seed: int, hollow: bool) -> ScaledTensor:
    """`[E, *shape]` in the case's format, quantised expert by expert."""
    from ..ops.quantize import quantize

    out = poisoned((case.groups, *shape), case.b, device)
    for e in range(0 if hollow else case.groups):
        w = draw(name, e, shape, device, seed).div_(shape[1]**0.5)
        q = quantize(w, case.b) if case.b.scaled else ScaledTensor(w, None, case.b)
        out.data[e] = q.data
        if out.scale is not None and q.scale is not None:
            out.scale[e] = q.scale
    return out
