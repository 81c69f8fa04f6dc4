"""Checks of `experts`: whether tokens, weights, routing and options are one layer. ValueError / TypeError otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import expect
from ..formats import Format
from ..layouts import INT, check_index
from ..prepack import PackedWeight
from ..reference.activate import ACTIVATIONS
from ..rows import check_rows
from . import common, route, steps
from .experts_plan import Weight


def layer(x: Tensor, gate_up: Weight, down: Weight, kind: tuple[str, tuple[float, ...], bool],
          gate_up_bias: Tensor | None, down_bias: Tensor | None, shared: tuple[Weight, Weight] | None,
          shared_output: Tensor | None, out: Tensor | None) -> None:
    """Tokens, weights and what is added on the way."""
    expect(isinstance(x, Tensor), "x", type(x).__name__, "a torch.Tensor", error=TypeError)
    expect(x.dtype in steps.FLOATS, "x, dtype", x.dtype, f"one of {steps.FLOATS}", error=TypeError)
    expect(x.dim() == 2, "x, shape", tuple(x.shape), "[T, H]")
    packed = isinstance(gate_up, PackedWeight)
    weight(gate_up, "gate_up", "[E, 2I, H]", 3)
    weight(down, "down", "[E, H, I]", 3)
    expect(packed == isinstance(down, PackedWeight), "gate_up and down", (type(gate_up).__name__, type(down).__name__),
           "both prepacked, or none", error=TypeError)
    experts, two, hidden = gate_up.shape
    expect(experts >= 1 and two >= 2 and two % 2 == 0, "gate_up, shape", tuple(gate_up.shape), "[E, 2I, H], E and I at least 1")
    expect(x.shape[1] == hidden, "x, hidden size", x.shape[1], f"gate_up's, {hidden}")
    expect(tuple(down.shape) == (experts, hidden, two // 2), "down, shape", tuple(down.shape),
           str((experts, hidden, two // 2)))
    for name, w in (("gate_up", gate_up), ("down", down)):
        expect(w.device == x.device, f"{name}, device", w.device, f"x's, {x.device}")
        expect(w.format.scaled or w.data.dtype == x.dtype, f"{name}, dtype", w.data.dtype, f"x's, {x.dtype}", error=TypeError)
    activation, args, interleaved = kind
    common.check_flags(interleaved=interleaved)
    if isinstance(gate_up, PackedWeight) and gate_up.pair:
        expect((gate_up.pair == "interleaved") == interleaved, "interleaved", interleaved,
               f"as gate_up was packed, {gate_up.pair!r}")
    expect(activation in ACTIVATIONS, "activation", repr(activation), f"one of {ACTIVATIONS}")
    expect(not args or (activation == "swiglu_oai" and len(args) == 2), "activation_args", args,
           "(alpha, limit) of swiglu_oai, or none")
    for name, t, shape in (("gate_up_bias", gate_up_bias, (experts, two)), ("down_bias", down_bias, (experts, hidden)),
                           ("shared_output", shared_output, tuple(x.shape))):
        if t is not None:
            expect(isinstance(t, Tensor), name, type(t).__name__, "a torch.Tensor", error=TypeError)
            expect(t.dtype in steps.FLOATS, f"{name}, dtype", t.dtype, f"one of {steps.FLOATS}", error=TypeError)
            expect(tuple(t.shape) == shape, f"{name}, shape", tuple(t.shape), str(shape))
            expect(t.device == x.device, f"{name}, device", t.device, f"x's, {x.device}")
            expect(t.is_contiguous(), f"{name}, strides", t.stride(), "contiguous")
    if shared is not None:
        expect(shared_output is None, "shared and shared_output", "both", "one of them")
        weight(shared[0], "shared[0]", "[2S, H]", 2)
        weight(shared[1], "shared[1]", "[H, S]", 2)
        two = shared[0].shape[0]
        expect(two >= 2 and two % 2 == 0 and shared[0].shape[1] == hidden, "shared[0], shape", tuple(shared[0].shape),
               f"[2S, {hidden}]")
        expect(tuple(shared[1].shape) == (hidden, two // 2), "shared[1], shape", tuple(shared[1].shape),
               str((hidden, two // 2)))
        for w in shared:
            expect(w.device == x.device, "shared, device", w.device, f"x's, {x.device}")
            expect(w.format.name == gate_up.format.name, "shared, format", w.format.name, f"gate_up's, {gate_up.format.name}")
    if out is not None:
        steps.check_like(out, "out", tuple(x.shape), x.dtype, x.device, rows_only=True)


def weight(w: Weight, name: str, shape: str, dims: int) -> None:
    """Payload, scales and format agree with each other."""
    if isinstance(w, PackedWeight):
        w.check()
        expect(len(w.shape) == dims, f"{name}, shape", w.shape, shape)
        expect(w.data.data_ptr() % 16 == 0 and w.scale.data_ptr() % 16 == 0, f"{name}, alignment", "off 16 bytes", "on 16 bytes")
    else:
        common.check_operand(w, name, shape, dims)


def activations(fmt: Format, source: Format, gate_up: Weight) -> Format:
    """The format of the activations, once it is one that rows can have."""
    if not fmt.scaled:
        expect(fmt == source, "activation_format", fmt.name, f"a scaled one, or x's own, {source.name}")
    else:
        expect(fmt.group[0] == 1, "activation_format", fmt.name, "one with scales of its own for each row: with one for the "
               "whole tensor a token would depend on the others, use fp8_row")
        hidden, two = gate_up.shape[2], gate_up.shape[1]
        even = fmt.element != "e2m1" or (hidden % 2 == 0 and two % 4 == 0)
        expect(even, f"hidden and intermediate sizes, with {fmt.name}", (hidden, two // 2), "even numbers, two a byte")
    return fmt


def routing(x: Tensor, experts: int, logits: Tensor | None, top_k: int, weights: Tensor | None, ids: Tensor | None,
            bias: Tensor | None, options: dict[str, Any], expert_map: Tensor | None) -> tuple[int, int]:
    """(experts over all ranks, top_k)."""
    if expert_map is not None:
        check_index(expert_map, "expert_map", 1, INT)
        expect(expert_map.device == x.device, "expert_map, device", expert_map.device, f"x's, {x.device}")
    if logits is not None:
        expect(weights is None and ids is None, "routing", "router_logits and topk_weights or topk_ids",
               "router_logits with top_k, or topk_weights with topk_ids")
        route.check(logits, top_k, options["scoring"], bias, options["num_expert_group"], options["topk_group"],
                    options["renormalize"], options["scaling_factor"])
        expect(logits.shape[0] == x.shape[0], "router_logits, rows", logits.shape[0], f"x's, {x.shape[0]}")
        expect(logits.device == x.device, "router_logits, device", logits.device, f"x's, {x.device}")
        check_rows(x.shape[0] * top_k, "tokens * top_k")
        return logits.shape[1], top_k
    given = "topk_weights alone" if weights is not None else "topk_ids alone" if ids is not None else "neither"
    expect(weights is not None and ids is not None, "routing", given, "router_logits with top_k, or topk_weights with topk_ids")
    assert weights is not None and ids is not None
    expect(isinstance(weights, Tensor) and weights.dtype == torch.float32, "topk_weights, dtype",
           getattr(weights, "dtype", type(weights).__name__), "torch.float32", error=TypeError)
    expect(isinstance(ids, Tensor) and ids.dtype in INT, "topk_ids, dtype", getattr(ids, "dtype", type(ids).__name__),
           "int32 or int64", error=TypeError)
    expect(ids.dim() == 2 and ids.shape[0] == x.shape[0] and ids.shape[1] >= 1, "topk_ids, shape", tuple(ids.shape),
           f"[{x.shape[0]}, top_k]")
    expect(weights.shape == ids.shape, "topk_weights, shape", tuple(weights.shape), str(tuple(ids.shape)))
    expect(top_k in (0, ids.shape[1]), "top_k", top_k, f"that of topk_ids, {ids.shape[1]}")
    expect(weights.device == x.device and ids.device == x.device, "topk_weights and topk_ids, device",
           (weights.device, ids.device), f"x's, {x.device}")
    check_rows(ids.numel(), "topk_ids, slots")
    return (experts if expert_map is None else max(experts, expert_map.numel())), ids.shape[1]


def workspace(given: Tensor, need: int, device: torch.device) -> None:
    expect(isinstance(given, Tensor), "workspace", type(given).__name__, "a torch.Tensor", error=TypeError)
    expect(given.dtype == torch.uint8 and given.device == device and given.is_contiguous(), "workspace",
           f"{given.dtype} on {given.device}", f"contiguous uint8 on {device}")
    expect(given.data_ptr() % 16 == 0, "workspace, address", given.data_ptr(), "a multiple of 16")
    expect(given.numel() >= need, "workspace bytes", given.numel(), f"at least {need}, see experts_workspace")
