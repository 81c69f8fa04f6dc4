"""What a call of `experts` brings, as one object: weights as operands, options of the router by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import expect
from ..formats import Format, ScaledTensor
from ..prepack import PackedWeight
from . import common, steps
from .experts_plan import Options, Weight
from .recall import Signature

Weights = ScaledTensor | Tensor | PackedWeight      # as a caller has them
Shared = tuple[Weights, Weights]
Kind = tuple[str, tuple[float, ...], bool]          # of an activation: its name, its arguments, whether gate and up alternate


@dataclass(slots=True, eq=False)
class Arguments:
    """Each as `experts` says; `routing` are the options of `route`."""

    x: Tensor
    gate_up: Weight
    down: Weight
    router_logits: Tensor | None = None
    top_k: int = 0
    topk_weights: Tensor | None = None
    topk_ids: Tensor | None = None
    router_bias: Tensor | None = None
    routing: dict[str, Any] = field(default_factory=dict)
    kind: Kind = ("swiglu", (), False)
    activation_format: Format | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    shared: tuple[Weight, Weight] | None = None
    shared_output: Tensor | None = None
    expert_map: Tensor | None = None
    first_expert: int = 0
    num_experts: int = 0
    out: Tensor | None = None
    options: Options = field(default_factory=Options)

    @property
    def weights(self) -> tuple[Weight, ...]:
        return self.gate_up, self.down, *(self.shared or ())

    def signature(self) -> Signature:
        """Everything that checks and the plan depend on."""
        tensors = (self.x, self.router_logits, self.topk_weights, self.topk_ids, self.router_bias, self.gate_up_bias,
                   self.down_bias, self.shared_output, self.expert_map, self.out)
        return (*map(steps.sign, tensors), *map(_sign, self.weights), self.top_k, self.first_expert, self.num_experts,
                *self.routing.values(), self.kind, self.activation_format, self.options)


def as_weight(w: Weights, name: str) -> Weight:
    """Weights as an operand, packed or not; those whose packed order is their own count as not. TypeError for what is neither."""
    return unwrapped(w) if isinstance(w, PackedWeight) else common.as_operand(w, name)


def unwrapped(w: PackedWeight) -> Weight:
    return w if w.plain is None else w.plain


def as_weights(shared: Shared | None) -> tuple[Weight, Weight] | None:
    """Those of the shared experts, if there are any. TypeError for what is no pair of weights."""
    return None if shared is None else (as_weight(shared[0], "shared[0]"), as_weight(shared[1], "shared[1]"))


def check_shared(shared: object) -> None:
    """In front of what takes the weights apart."""
    expect(isinstance(shared, tuple | list) and len(shared) == 2, "shared",
           f"{len(shared)} weights" if isinstance(shared, tuple | list) else type(shared).__name__,
           "a pair of weights, (gate_up, down)", error=TypeError)


def known_by(*weights: Weights) -> tuple[list[object], list[Tensor | None]]:
    """What is not in the tensors of weights, for a key, and the tensors. Weights of no known kind have none."""
    names: list[object] = []
    tensors: list[Tensor | None] = []
    for w in weights:
        w = unwrapped(w) if type(w) is PackedWeight else w
        if type(w) is ScaledTensor:
            names += (w.format, type(w.scale))
            tensors += (w.data, w.scale)
        elif type(w) is PackedWeight:
            names += (w.format, w.shape, w.pair, w.prepack, type(w.factor), type(w.top))
            tensors += (w.data, w.scale, w.factor, w.top)
        else:
            names.append(type(w))
            if isinstance(w, Tensor):
                tensors += (w, None)
    return names, tensors


def _sign(w: Weight) -> tuple[Any, ...]:
    if isinstance(w, ScaledTensor):
        return w.format, steps.sign(w.data), steps.sign(w.scale)
    return w.format, w.shape, w.pair, w.prepack, *map(steps.sign, (w.data, w.scale, w.factor, w.top))
