"""Random expert layers for `fuzz_steps`: cold and warm calls, each with tokens and routing of its own, against the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import BF16, FP8_ROW, FP8_TENSOR, MXFP4, MXFP8, Format, FP8_1x128, FP8_128x128, ScaledTensor
from ..ops.experts import Weights, experts
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
    x_format = c.pick(ACTIVATIONS.get(fmt, (None,)))
    up, down = weights(c, fmt, count, 2 * inter, hidden), weights(c, fmt, count, hidden, inter)
    biases = [c.floats(count, 2 * inter, wild=False), c.floats(count, hidden, wild=False)] if c.chance(0.4) else [None, None]
    shared = (weights(c, fmt, 2 * inter, hidden), weights(c, fmt, hidden, inter)) if not packed and c.chance(0.3) else None
    added = shared is None and c.chance(0.3)
    by_logits, first = c.chance(0.6), 0 if c.chance(0.8) else 1
    everyone = count + (3 if first or c.chance(0.2) else 0)
    invariant = c.chance(0.2)
    order = c.pick(("bf16", "fp8")) if fmt is MXFP4 else "bf16"

    def call(seed: int, device: torch.device, out: Tensor | None, pack: bool, backend: str | None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, hidden, generator=generator).bfloat16()
        logits = torch.randn(tokens, everyone, generator=generator)
        given: dict[str, Any] = {"router_logits": logits.to(device), "top_k": top_k} if by_logits else {
            "topk_weights": torch.rand(tokens, top_k, generator=generator).to(device),
            "topk_ids": logits.argsort(1)[:, :top_k].to(torch.int32).to(device)}
        output = torch.randn(tokens, hidden, generator=generator).bfloat16() if added else None
        mine: list[Weights] = [moved(w, device) for w in (up, down)]
        if pack:
            assert isinstance(mine[0], ScaledTensor) and isinstance(mine[1], ScaledTensor)
            mine = [prepack(mine[0], pair=pair, activations=order), prepack(mine[1], activations=order)]
        return experts(x.to(device), mine[0], mine[1], activation=kind, interleaved=interleaved, activation_format=x_format,
                       gate_up_bias=None if biases[0] is None else biases[0].to(device),
                       down_bias=None if biases[1] is None else biases[1].to(device),
                       shared=None if shared is None else (moved(shared[0], device), moved(shared[1], device)),
                       shared_output=None if output is None else output.to(device), first_expert=first, num_experts=everyone,
                       out=out, batch_invariant=invariant, backend=backend, **given)

    packing = f"packed {pair} {order}" if packed else ""
    what = (f"{fmt.name} {packing} x {x_format and x_format.name} {tokens}x{hidden}x{inter} of {count} by {top_k} {kind} "
            f"interleaved {interleaved} bias {biases[0] is not None} shared {shared is not None} added {added} first {first}")
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
