"""Compiling a whole expert layer ahead: what `experts` launches for a model's layer, by numbers of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..arch import Arch
from .cache import PACKING

if TYPE_CHECKING:
    from ..ops.experts_plan import ExpertsPlan


@dataclass(frozen=True)
class Layer:
    """Calls of `experts` to compile for: `experts` of `world` experts here, and numbers of tokens.

    interleaved, bias: GPT-OSS's rows of gate and up, and its biases. packed: as in `cache.Unit`.
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

    def plan(self, tokens: int, arch: Arch) -> ExpertsPlan:
        """The plan of a call of so many tokens on `arch`. Raises Unsupported."""
        from ..formats import get_format
        from ..ops.explain_experts import explain_experts

        return explain_experts(tokens=tokens, hidden=self.hidden, inter=self.inter, experts=self.experts, top_k=self.top_k,
                               num_experts=self.world, weights=self.weights, activation_format=self.activations,
                               activation=self.activation, interleaved=self.interleaved, bias=self.bias,
                               packed=self.packed or False, dtype=get_format(self.dtype).elem.dtype, device=arch.name).plan

    @property
    def bytes(self) -> float:
        """Device memory that compiling takes: weights, tokens, and what lies between the steps."""
        from ..formats import get_format

        fmt, rows = get_format(self.weights), max(self.sizes) * self.top_k
        weights = self.experts * (fmt.storage_bytes(2 * self.inter, self.hidden) + fmt.storage_bytes(self.hidden, self.inter))
        return PACKING ** bool(self.packed) * weights + rows * (2 * self.hidden + 6 * self.inter) * 2.0


def split_layer(layer: Layer, arch: Arch) -> list[tuple[Layer, ExpertsPlan]]:
    """A `Layer` for each set of kernels that it needs on `arch`, with the plan of one of its sizes."""
    plans: dict[tuple, tuple[ExpertsPlan, list[int]]] = {}
    for tokens in layer.sizes:
        plan = layer.plan(tokens, arch)
        plans.setdefault(tuple((name, s.kernel, s.config) for name, p in plan.steps.items() for s in p.steps),
                         (plan, []))[1].append(tokens)
    return [(replace(layer, sizes=tuple(sizes)), plan) for plan, sizes in plans.values()]


def compile_layer(layer: Layer, device: str) -> int:
    """Call `experts` with every size, from logits, from int32 and from int64 ids, on weights of zeros; how many calls that were."""
    import torch

    from ..formats import FORMATS, get_format
    from ..ops.experts import experts
    from ..ops.prepare import zeros
    from ..prepack import prepack

    where, dtype = torch.device(device), get_format(layer.dtype).elem.dtype
    up, down = (zeros((layer.experts, n, k), FORMATS[layer.weights], where, mn_major=False)
                for n, k in ((2 * layer.inter, layer.hidden), (layer.hidden, layer.inter)))
    weights = (up, down) if not layer.packed else (
        prepack(up, pair="interleaved" if layer.interleaved else "halves", activations=layer.packed),
        prepack(down, activations=layer.packed))
    biases = [torch.zeros(layer.experts, n, dtype=dtype, device=where) if layer.bias else None
              for n in (2 * layer.inter, layer.hidden)]
    calls = 0
    for tokens in layer.sizes:
        x = torch.zeros(tokens, layer.hidden, dtype=dtype, device=where)
        ids = torch.arange(tokens * layer.top_k, device=where).view(tokens, -1) % layer.world
        chosen: dict[str, Any] = {"topk_weights": torch.ones(ids.shape, device=where), "num_experts": layer.world}
        logits: dict[str, Any] = {"router_logits": torch.zeros(tokens, layer.world, device=where), "top_k": layer.top_k}
        for routing in (logits, chosen | {"topk_ids": ids.int()}, chosen | {"topk_ids": ids}):
            experts(x, *weights, **routing, activation=layer.activation, interleaved=layer.interleaved,
                    activation_format=layer.activations, gate_up_bias=biases[0], down_bias=biases[1])
            calls += 1
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return calls
