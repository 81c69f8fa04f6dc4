"""Random expert layers for `fuzz_steps`: cold and warm calls, each with tokens and routing of its own, against the reference."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..formats import BF16, FP8_ROW, FP8_TENSOR, MXFP4, MXFP8, Format, FP8_1x128, FP8_128x128, ScaledTensor
from ..ops.experts import experts, plan_for
from ..ops.experts_arguments import Weights
from ..ops.experts_plan import Options
from ..prepack import prepack
from ..reference import quantize as reference
from .fuzz_call import STORES, Call
from .fuzz_inputs import GuardedView
from .numerics import calc_diff

WEIGHTS = (FP8_128x128, FP8_128x128, FP8_ROW, FP8_TENSOR, MXFP8, MXFP4, MXFP4, BF16)
ACTIVATIONS = {MXFP4: (None, None, FP8_1x128, MXFP8, FP8_ROW, MXFP4), MXFP8: (None, BF16)}
GATE = 2e-3     # a quantised activation may fall to the other side of a rounding, or of a scale's
WIDE = 2e-2     # of E2M1, whose steps are a quarter of a value


def weights(c: Call, fmt: Format, *shape: int) -> Any:
    w = (torch.randn(shape, generator=c.generator) / shape[-1] ** 0.5).bfloat16()
    return w if fmt is BF16 else reference.quantize(w, fmt)


def moved(w: Any, device: torch.device) -> Any:
    return w.to(device)


def run(c: Call) -> None:
    count, hidden, inter = c.pick((1, 2, 4, 8, 16, 33)), c.pick((128, 192, 256, 384, 512)), c.pick((32, 64, 96, 128, 256, 320))
    if c.device.type != "cpu" and c.chance(0.3):        # as many tiles as some kernels begin at
        count, hidden, inter = c.pick((8, 33, 64)), c.pick((512, 1024, 2048)), c.pick((128, 256, 512, 768))
    fmt = c.pick(WEIGHTS)
    tokens, top_k = c.pick((0, 1, 2, 5, 16, 33, 128, 300)), c.rng.randint(1, min(count, 4))
    kind = c.pick(("swiglu", "swiglu_oai"))
    pair = c.pick(("", "halves", "interleaved")) if fmt in (MXFP4, MXFP8) else ""
    packed = bool(pair) or (fmt in (MXFP4, MXFP8) and c.chance(0.5))
    interleaved = pair == "interleaved" if pair else c.chance(0.3)
    x_format = c.pick(ACTIVATIONS.get(fmt, (None,))) or (BF16 if packed else None)    # by default unpacked weights get another
    up, down = weights(c, fmt, count, 2 * inter, hidden), weights(c, fmt, count, hidden, inter)
    biases = [c.floats(count, 2 * inter, wild=False), c.floats(count, hidden, wild=False)] if c.chance(0.4) else [None, None]
    shared = (weights(c, fmt, 2 * inter, hidden), weights(c, fmt, hidden, inter)) if not packed and c.chance(0.3) else None
    added = shared is None and c.chance(0.3)
    by_logits, first = c.chance(0.6), 0 if c.chance(0.8) else 1
    everyone = count + (3 if first or c.chance(0.2) else 0)
    invariant = c.chance(0.2)
    order = c.pick(("bf16", "fp8")) if fmt is MXFP4 else "bf16"

    skipped = c.chance(0.3)     # choices of no expert at all
    mapped = torch.randperm(everyone, generator=c.generator) if not first and c.chance(0.3) else None
    expert_map = None if mapped is None else torch.where(mapped < count, mapped, -1).int()

    def tokens_of(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, hidden, generator=generator).bfloat16()
        logits = torch.randn(tokens, everyone, generator=generator)
        given = {"x": x, "router_logits": logits} if by_logits else {
            "x": x, "topk_weights": torch.rand(tokens, top_k, generator=generator),
            "topk_ids": logits.argsort(1)[:, :top_k].to(torch.int32)}
        if skipped and not by_logits:
            given["topk_ids"].masked_fill_(torch.rand(tokens, top_k, generator=generator) < 0.3, -1)
        if added:
            given["shared_output"] = torch.randn(tokens, hidden, generator=generator).bfloat16()
        return given

    def weights_on(device: torch.device, pack: bool) -> dict[str, Any]:
        mine: list[Weights] = [moved(w, device) for w in (up, down)]
        if pack:
            assert isinstance(mine[0], ScaledTensor) and isinstance(mine[1], ScaledTensor)
            mine = [prepack(mine[0], pair=pair, activations=order), prepack(mine[1], activations=order)]
        own: dict[str, Any] = {"gate_up": mine[0], "down": mine[1], "gate_up_bias": biases[0], "down_bias": biases[1],
                               "expert_map": expert_map}
        own = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in own.items()}
        return own | {"shared": None if shared is None else (moved(shared[0], device), moved(shared[1], device))}

    def layer(given: dict[str, Any], own: dict[str, Any], out: Tensor | None, backend: str | None) -> Tensor:
        return experts(**given, **own, top_k=top_k if by_logits else 0, activation=kind, interleaved=interleaved,
                       activation_format=x_format, first_expert=first, num_experts=everyone, out=out, batch_invariant=invariant,
                       backend=backend)

    def call(seed: int, device: torch.device, out: Tensor | None, pack: bool, backend: str | None) -> Tensor:
        given = {name: x.to(device) for name, x in tokens_of(seed).items()}
        return layer(given, weights_on(device, pack), out, backend)

    packing = f"packed {pair} {order}" if packed else ""
    what = (f"{fmt.name} {packing} x {x_format and x_format.name} {tokens}x{hidden}x{inter} of {count} by {top_k} {kind} "
            f"interleaved {interleaved} bias {biases[0] is not None} shared {shared is not None} added {added} first {first} "
            f"skipped {skipped} map {mapped is not None}")
    guard = GuardedView((tokens, hidden), torch.bfloat16, c.device, c.pick(STORES))
    seed = c.rng.randrange(1 << 30)
    first_bits: dict[int, Tensor] = {}
    for number in (seed, seed + 1, seed, seed + 2, seed):
        guard.reset()
        call(number, c.device, guard.tensor, packed, None)
        c.found += [f"{what}: {f}" for f in guard.faults()]
        got = guard.tensor.cpu().clone(memory_format=torch.contiguous_format)
        if number in first_bits:
            c.same(f"{what}: a warm call", got, first_bits[number])
        first_bits[number] = got
    for number in (seed, seed + 2):
        want = call(number, torch.device("cpu"), None, False, "reference")
        diff = calc_diff(first_bits[number], want)
        c.say(f"{what}: calc_diff {diff:.2g}", not diff <= (WIDE if x_format is MXFP4 else GATE))
    if c.device.type != "cuda" or not tokens or "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ:
        return
    own = weights_on(c.device, packed)
    plan = plan_for(tokens, own["gate_up"], own["down"], top_k, everyone, None, torch.bfloat16, (kind, (), interleaved), x_format,
                    biases[0] is not None, own["shared"], Options(None, invariant), c.device)
    if all(step.backend != "reference" for step in plan.steps.values()):        # which reads sizes on the host
        _replays(c, what, lambda given: layer(given, own, guard.tensor, None), tokens_of, guard, first_bits)


def _replays(c: Call, what: str, layer: Callable[[dict[str, Tensor]], Tensor], tokens_of: Callable[[int], dict[str, Tensor]],
             guard: GuardedView, first_bits: dict[int, Tensor]) -> None:
    """One graph, replayed with tokens and routing of each seed: the bits of the seed's own call."""
    given = {name: x.to(c.device) for name, x in tokens_of(next(iter(first_bits))).items()}
    side, graph = torch.cuda.Stream(c.device), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream(c.device))
    with torch.cuda.stream(side):
        layer(given)
    torch.cuda.current_stream(c.device).wait_stream(side)
    with torch.cuda.graph(graph):
        layer(given)
    for seed, bits in [*first_bits.items()] * 2:
        for name, x in tokens_of(seed).items():
            given[name].copy_(x)
        guard.reset()
        graph.replay()
        c.same(f"{what}: a graph", guard.tensor.cpu().clone(memory_format=torch.contiguous_format), bits)
        c.found += [f"{what}: a graph: {f}" for f in guard.faults()]
