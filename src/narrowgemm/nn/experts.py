"""`Experts`: an expert layer's weights in one module, run by `narrowgemm.ops.experts`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import expect, expect_count
from ..formats import Format, ScaledTensor, get_format
from ..ops import experts_check
from ..ops.experts import ROUTING, experts, experts_workspace
from ..ops.experts_arguments import Shared, Weights, as_weight, check_shared
from ..ops.experts_plan import Weight
from ..prepack import PackedWeight
from . import extra_state

WEIGHTS = ("gate_up", "down", "shared_gate_up", "shared_down")
PARTS = ("factor", "codes", "top")      # of a packed weight, beside data and scale
EXTRAS = ("gate_up_bias", "down_bias", "router_bias", "expert_map")


class Experts(torch.nn.Module):
    """Routed (and shared) experts with frozen weights, held as buffers: narrow weights are not trained.

    gate_up `[E, 2I, H]`, down `[E, H, I]` (prepacked ones too), biases, `shared` (gate_up `[2S, H]`, down `[H, S]`), `router_bias`,
    `expert_map`, `first_expert`, activation and routing options: as in `narrowgemm.experts`. The router itself is not part of
    it: `forward` takes its logits, or weights and ids.

    `state_dict` holds payloads and scales as they are, and the formats, tensors all of them; it loads into a module built from
    weights of the same shapes and formats. Moving the module moves the weights; changing its dtype does not change them.
    """

    def __init__(self, gate_up: Weights, down: Weights, *, top_k: int,
                 activation: str = "swiglu", activation_args: tuple[float, ...] = (), interleaved: bool = False,
                 activation_format: Format | str | None = None, gate_up_bias: Tensor | None = None,
                 down_bias: Tensor | None = None, shared: Shared | None = None,
                 router_bias: Tensor | None = None, expert_map: Tensor | None = None, first_expert: int = 0,
                 batch_invariant: bool = False, backend: str | None = None, **routing: Any) -> None:
        super().__init__()
        unknown = set(routing) - set(ROUTING)
        expect(not unknown, "routing options", sorted(unknown), f"some of {ROUTING}", error=TypeError)
        if shared is not None:
            check_shared(shared)
        pairs = [(name, as_weight(w, name)) for name, w in zip(WEIGHTS, (gate_up, down, *(shared or ())))]
        kind = (activation, activation_args, interleaved)
        weights = dict(pairs)
        both = (weights["shared_gate_up"], weights["shared_down"]) if shared is not None else None
        source = pairs[0][1].data.dtype if not pairs[0][1].format.scaled else torch.bfloat16
        x = torch.empty((0, pairs[0][1].shape[-1]), dtype=source, device=pairs[0][1].device)
        experts_check.layer(x, weights["gate_up"], weights["down"], kind, gate_up_bias, down_bias, both, None, None)
        expect_count(top_k, "top_k")
        self.formats = {name: w.format.name for name, w in pairs}
        self.packs = {name: (w.shape, w.pair, w.prepack) for name, w in pairs if isinstance(w, PackedWeight)}
        buffers: dict[str, Tensor | None] = {}
        for name, w in pairs:
            buffers |= {name: w.data, f"{name}_scale": w.scale}
            if isinstance(w, PackedWeight):
                buffers |= {f"{name}_{part}": getattr(w, part) for part in PARTS}
        buffers |= dict(zip(EXTRAS, (gate_up_bias, down_bias, router_bias, expert_map)))
        for name in sorted(buffers, key=lambda n: buffers[n] is None):      # torch.export miscounts those behind one that is None
            self.register_buffer(name, buffers[name])
        self.top_k, self.first_expert, self.routing = top_k, first_expert, routing
        self.activation, self.activation_args, self.interleaved = kind
        self.activation_format = None if activation_format is None else get_format(activation_format)
        self.batch_invariant, self.backend = batch_invariant, backend

    def weight(self, name: str) -> Weight:
        """The weight of that `name`, one of `WEIGHTS`, as an operand."""
        if name in self.packs:
            shape, pair, order = self.packs[name]
            parts = {part: getattr(self, f"{name}_{part}") for part in ("scale", *PARTS)}
            return PackedWeight(getattr(self, name), format=get_format(self.formats[name]), shape=shape, pair=pair, prepack=order,
                                **parts)
        return ScaledTensor(getattr(self, name), getattr(self, f"{name}_scale"), get_format(self.formats[name]))

    @property
    def shared(self) -> tuple[Weight, Weight] | None:
        return (self.weight("shared_gate_up"), self.weight("shared_down")) if "shared_down" in self.formats else None

    @property
    def num_experts(self) -> int:
        """Experts of this rank."""
        return self.weight("gate_up").shape[0]

    def forward(self, x: Tensor, router_logits: Tensor | None = None, *, topk_weights: Tensor | None = None,
                topk_ids: Tensor | None = None, shared_output: Tensor | None = None, out: Tensor | None = None,
                workspace: Tensor | None = None) -> Tensor:
        """`x` `[..., H]` through the layer: a tensor of x's shape.

        router_logits, topk_weights, topk_ids, shared_output, out, workspace: as in `experts`, whose errors it raises. They have a
        row for each token, leading axes flattened.
        """
        rows = x.reshape(-1, x.shape[-1])
        routing = self.routing | {"router_bias": self.router_bias, "top_k": self.top_k} if router_logits is not None else {}
        y = experts(rows, self.weight("gate_up"), self.weight("down"), router_logits=router_logits,
                    topk_weights=topk_weights, topk_ids=topk_ids, activation=self.activation,
                    activation_args=self.activation_args, interleaved=self.interleaved,
                    activation_format=self.activation_format, gate_up_bias=self.gate_up_bias,  # type: ignore[arg-type]
                    down_bias=self.down_bias, shared=self.shared, shared_output=shared_output,  # type: ignore[arg-type]
                    expert_map=self.expert_map, first_expert=self.first_expert, out=out,  # type: ignore[arg-type]
                    workspace=workspace, batch_invariant=self.batch_invariant, backend=self.backend, **routing)
        return y.view(x.shape)

    def workspace_bytes(self, tokens: int, num_experts: int = 0, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of workspace for `tokens` tokens of type `dtype`; `num_experts`: over all ranks, where there are several."""
        return experts_workspace(tokens, self.weight("gate_up"), self.weight("down"), top_k=self.top_k,
                                 num_experts=num_experts or self.num_experts,
                                 num_expert_group=self.routing.get("num_expert_group"), dtype=dtype,
                                 activation=self.activation, activation_args=self.activation_args,
                                 interleaved=self.interleaved, activation_format=self.activation_format,
                                 bias=self.gate_up_bias is not None, shared=self.shared,
                                 batch_invariant=self.batch_invariant, backend=self.backend)

    def _state(self) -> dict[str, str]:
        packs = {f"{name}, packed": f"{order} {pair} {list(shape)}" for name, (shape, pair, order) in self.packs.items()}
        return self.formats | packs

    def get_extra_state(self) -> Tensor:
        return extra_state.encode(self._state())

    def set_extra_state(self, state: object) -> None:
        found = extra_state.decode(state)
        expect(found == self._state(), "formats in the state", found, f"this module's, {self._state()}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        """Weights and scales keep their types: `module.to(torch.bfloat16)` would round FP32 scales and re-read payloads."""
        def keep(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(keep, recurse)
        return self

    def extra_repr(self) -> str:
        e, two, hidden = self.weight("gate_up").shape
        shared = f", shared {self.weight('shared_down').shape[1]}" if self.shared is not None else ""
        return f"experts {e}, hidden {hidden}, inter {two // 2}, top_k {self.top_k}, {self.formats['gate_up']}, " \
               f"{self.activation}{shared}"
