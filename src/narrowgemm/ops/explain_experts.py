"""`explain_experts`: which kernel each step of an expert layer takes, and what workspace the layer needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..arch import Arch, detect, get_arch
from ..errors import expect
from ..formats import ELEMENTS, Format, ScaledTensor, get_format
from ..prepack import ACTIVATIONS, CHUNK, PackedWeight, check_packable, tiles_of
from ..prepack_bits import FP8_PREPACK, PREPACK, TILE
from ..runtime.dispatch import by_reason
from .experts import plan_for
from .experts_plan import ExpertsPlan, Options, Weight
from .explain import Explanation


@dataclass(frozen=True)
class ExpertsExplanation:
    """The steps in order, each with its Plan; `str()` shows them, `to_dict()` is for programs."""

    plan: ExpertsPlan
    arch: Arch

    @property
    def steps(self) -> dict[str, Explanation]:
        return {name: Explanation(p, self.arch) for name, p in self.plan.steps.items()}

    def to_dict(self) -> dict[str, Any]:
        s, r = self.plan.sizes, self.plan.recipe
        return {"op": "experts", "device": self.arch.name, "target": self.arch.target,
                "sizes": {f: getattr(s, f) for f in s.__dataclass_fields__}, "activations": r.activations.name,
                "activation": r.activation, "workspace_bytes": self.plan.bytes, "predicted_us": self.plan.predicted_us,
                "steps": {name: e.to_dict() for name, e in self.steps.items()}}

    def __str__(self) -> str:
        s, r = self.plan.sizes, self.plan.recipe
        shared = f", shared {s.shared}" if s.shared else ""
        lines = [f"experts: {s.tokens} tokens, top-{s.top_k} of {s.world}, {s.experts} here, hidden {s.hidden}, inter "
                 f"{s.inter}{shared}, activations {r.activations.name}, {r.activation}, on {self.arch.name} "
                 f"({self.arch.target})",
                 f"  {len(self.plan.steps)} steps, predicted {self.plan.predicted_us:.1f} us, workspace "
                 f"{self.plan.bytes} bytes"]
        for name, p in self.plan.steps.items():
            lines.append(f"  {name:16s} {p.kernel} [{p.backend}]  {p.config}  {p.predicted_us:.1f} us; {p.reason}")
            lines += [f"  {'':16s} not {line}" for line in by_reason(p.passed_over)]
        return "\n".join(lines)


def explain_experts(*, tokens: int, hidden: int, inter: int, experts: int, top_k: int, num_experts: int = 0,
                    weights: Format | str = "fp8_128x128", activation_format: Format | str | None = None,
                    activation: str = "swiglu", interleaved: bool = False, bias: bool = False, shared: int = 0,
                    num_expert_group: int | None = None, packed: bool | str = False, dtype: torch.dtype = torch.bfloat16,
                    batch_invariant: bool = False, max_sms: int = 0, device: str | torch.device | None = None,
                    backend: str | None = None) -> ExpertsExplanation:
    """The plan of `experts` for a layer given by its sizes, on `device` (as in `explain`). Needs no GPU.

    tokens, hidden, inter, top_k: rows of x, its columns H, columns I of the intermediate, experts that a token takes.
    experts: on this rank, of `num_experts` over all (default: the same). shared: intermediate size of shared experts.
    weights: their format; dtype: x's. bias: whether gate_up has one. Others as in `experts`.
    packed: the routed experts' weights went through `prepack`, gate_up with its pair; 'fp8': with these `activations`.
    Raises as the op itself would: ValueError, Unsupported.
    """
    fmt = get_format(weights)
    for name, v in (("hidden", hidden), ("inter", inter), ("experts", experts)):
        expect(isinstance(v, int) and v >= 1, name, v, "a size of at least 1")
    arch = get_arch(device) if isinstance(device, str) else detect(device)
    plain = operand((experts, 2 * inter, hidden), fmt, dtype), operand((experts, hidden, inter), fmt, dtype)
    up: Weight = plain[0]
    down: Weight = plain[1]
    if packed:
        check_packable(fmt)
        expect(packed is True or packed in ACTIVATIONS, "packed", repr(packed), f"True, or what for: one of {ACTIVATIONS}")
        order = FP8_PREPACK if packed == "fp8" and fmt.element == "e2m1" else PREPACK
        up = packed_operand(plain[0], "interleaved" if interleaved else "halves", order)
        down = packed_operand(plain[1], "", order)
    both = (operand((2 * shared, hidden), fmt, dtype), operand((hidden, shared), fmt, dtype)) if shared else None
    plan = plan_for(tokens, up, down, top_k, num_experts, num_expert_group, dtype, (activation, (), interleaved),
                    activation_format, bias, both, Options(backend, batch_invariant, max_sms), arch.name)
    return ExpertsExplanation(plan, arch)


def packed_operand(w: ScaledTensor, pair: str, order: str = PREPACK) -> PackedWeight:
    """`prepack` without memory, of weights whose scales are as near to each other as they usually are."""
    groups, n, k = w.shape
    tiles, chunks = tiles_of(n), -(-k // CHUNK)
    halves = (2,) if w.format.element == "e4m3" else ()
    data = torch.empty((groups, tiles, chunks, *halves, TILE, TILE), dtype=torch.uint8, device="meta")
    scale = torch.empty((groups, tiles, -(-chunks // 2), 4, 8, 4, 2, 2), dtype=torch.uint8, device="meta")
    top = torch.empty((groups, tiles * TILE), dtype=torch.uint8, device="meta") if w.format.element == "e2m1" else None
    return PackedWeight(data, scale, w.format, tuple(w.shape), pair, prepack=order, top=top)


def operand(shape: tuple[int, ...], fmt: Format, dtype: torch.dtype) -> ScaledTensor:
    """Weights without memory."""
    if not fmt.scaled:
        return ScaledTensor(torch.empty(shape, dtype=dtype, device="meta"), None, fmt)
    data = torch.empty((*shape[:-1], shape[-1] // fmt.elem.per_byte), dtype=ELEMENTS[fmt.element].dtype, device="meta")
    scale = torch.empty(fmt.scale_shape(shape), dtype=fmt.scale_dtype, device="meta")
    return ScaledTensor(data, scale, fmt)
