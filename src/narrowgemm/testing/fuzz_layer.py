"""Random expert layers for `fuzz_steps`: cold and warm calls, each with tokens and routing of its own, against the reference."""

from __future__ import annotations

import os
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Layer:
    """What is drawn of a layer, on the CPU: all but its tokens and their routing, which come from seeds of their own."""

    weights: Format
    up: Weights                 # [E, 2I, H]
    down: Weights
    biases: tuple[Tensor | None, Tensor | None]
    shared: tuple[Weights, Weights] | None
    tokens: int
    top_k: int
    activation: str
    activation_format: Format | None
    interleaved: bool
    packed: bool                # with `pair`, for activations of `order`
    pair: str
    order: str
    by_logits: bool
    skipped: bool               # choices of no expert at all, where ids are given
    added: bool                 # an output of shared experts is
    first: int
    everyone: int               # experts of all ranks
    expert_map: Tensor | None
    invariant: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Experts, H, I."""
        count, twice, hidden = self.up.shape
        return count, hidden, twice // 2

    def __str__(self) -> str:
        count, hidden, inter = self.sizes
        packing = f"packed {self.pair} {self.order}" if self.packed else ""
        x_format = self.activation_format and self.activation_format.name
        bias, shared, mapped = (x is not None for x in (self.biases[0], self.shared, self.expert_map))
        return (f"{self.weights.name} {packing} x {x_format} {self.tokens}x{hidden}x{inter} of {count} by {self.top_k} "
                f"{self.activation} interleaved {self.interleaved} bias {bias} shared {shared} added {self.added} "
                f"first {self.first} skipped {self.skipped} map {mapped}")

    def tokens_of(self, seed: int) -> dict[str, Tensor]:
        """Tokens and routing, as arguments of `experts`."""
        generator = torch.Generator().manual_seed(seed)
        hidden = self.sizes[1]
        x = torch.randn(self.tokens, hidden, generator=generator).bfloat16()
        logits = torch.randn(self.tokens, self.everyone, generator=generator)
        given = {"x": x, "router_logits": logits} if self.by_logits else {
            "x": x, "topk_weights": torch.rand(self.tokens, self.top_k, generator=generator),
            "topk_ids": logits.argsort(1)[:, :self.top_k].to(torch.int32)}
        if self.skipped and not self.by_logits:
            given["topk_ids"].masked_fill_(torch.rand(self.tokens, self.top_k, generator=generator) < 0.3, -1)
        if self.added:
            given["shared_output"] = torch.randn(self.tokens, hidden, generator=generator).bfloat16()
        return given

    def weights_on(self, device: torch.device, pack: bool) -> dict[str, Any]:
        """The weights and what belongs to them, as arguments of `experts`."""
        up, down = self.up.to(device), self.down.to(device)
        if pack:
            assert isinstance(up, ScaledTensor) and isinstance(down, ScaledTensor)
            up, down = prepack(up, pair=self.pair, activations=self.order), prepack(down, activations=self.order)
        others = {"gate_up_bias": self.biases[0], "down_bias": self.biases[1], "expert_map": self.expert_map}
        shared = None if self.shared is None else tuple(w.to(device) for w in self.shared)
        moved = {name: None if x is None else x.to(device) for name, x in others.items()}
        return {"gate_up": up, "down": down, "shared": shared} | moved

    def run(self, given: dict[str, Tensor], own: dict[str, Any], out: Tensor | None = None, backend: str | None = None) -> Tensor:
        return experts(**given, **own, top_k=self.top_k if self.by_logits else 0, activation=self.activation,      # type: ignore[arg-type]
                       interleaved=self.interleaved, activation_format=self.activation_format, first_expert=self.first,
                       num_experts=self.everyone, out=out, batch_invariant=self.invariant, backend=backend)


def _weights(c: Call, fmt: Format, *shape: int) -> Weights:
    w = (torch.randn(shape, generator=c.generator) / shape[-1] ** 0.5).bfloat16()
    return w if fmt is BF16 else reference.quantize(w, fmt)


def draw(c: Call) -> Layer:
    count, hidden, inter = c.pick((1, 2, 4, 8, 16, 33)), c.pick((128, 192, 256, 384, 512)), c.pick((32, 64, 96, 128, 256, 320))
    if c.device.type != "cpu" and c.chance(0.3):        # as many tiles as some kernels begin at
        count, hidden, inter = c.pick((8, 33, 64)), c.pick((512, 1024, 2048)), c.pick((128, 256, 512, 768))
    fmt = c.pick(WEIGHTS)
    tokens, top_k = c.pick((0, 1, 2, 5, 16, 33, 128, 300)), c.rng.randint(1, min(count, 4))
    activation = c.pick(("swiglu", "swiglu_oai"))
    pair = c.pick(("", "halves", "interleaved")) if fmt in (MXFP4, MXFP8) else ""
    packed = bool(pair) or (fmt in (MXFP4, MXFP8) and c.chance(0.5))
    interleaved = pair == "interleaved" if pair else c.chance(0.3)
    x_format = c.pick(ACTIVATIONS.get(fmt, (None,))) or (BF16 if packed else None)    # by default unpacked weights get another
    up, down = _weights(c, fmt, count, 2 * inter, hidden), _weights(c, fmt, count, hidden, inter)
    biases = (c.floats(count, 2 * inter, wild=False), c.floats(count, hidden, wild=False)) if c.chance(0.4) else (None, None)
    shared = (_weights(c, fmt, 2 * inter, hidden), _weights(c, fmt, hidden, inter)) if not packed and c.chance(0.3) else None
    added = shared is None and c.chance(0.3)
    by_logits, first = c.chance(0.6), 0 if c.chance(0.8) else 1
    everyone = count + (3 if first or c.chance(0.2) else 0)
    invariant = c.chance(0.2)
    order = c.pick(("bf16", "fp8")) if fmt is MXFP4 else "bf16"
    skipped = c.chance(0.3)
    mapped = torch.randperm(everyone, generator=c.generator) if not first and c.chance(0.3) else None
    expert_map = None if mapped is None else torch.where(mapped < count, mapped, -1).int()
    return Layer(fmt, up, down, biases, shared, tokens, top_k, activation, x_format, interleaved, packed, pair, order, by_logits,
                 skipped, added, first, everyone, expert_map, invariant)


def run(c: Call) -> None:
    layer = draw(c)
    guard = GuardedView((layer.tokens, layer.sizes[1]), torch.bfloat16, c.device, c.pick(STORES))
    seed = c.rng.randrange(1 << 30)
    first_bits: dict[int, Tensor] = {}
    for number in (seed, seed + 1, seed, seed + 2, seed):
        guard.reset()
        given = {name: x.to(c.device) for name, x in layer.tokens_of(number).items()}
        layer.run(given, layer.weights_on(c.device, layer.packed), guard.tensor)        # each call's at addresses of its own
        c.found += [f"{layer}: {f}" for f in guard.faults()]
        got = guard.tensor.cpu().clone(memory_format=torch.contiguous_format)
        if number in first_bits:
            c.same(f"{layer}: a warm call", got, first_bits[number])
        first_bits[number] = got
    plain = layer.weights_on(torch.device("cpu"), False)
    for number in (seed, seed + 2):
        want = layer.run(layer.tokens_of(number), plain, backend="reference")
        diff = calc_diff(first_bits[number], want)
        c.say(f"{layer}: calc_diff {diff:.2g}", not diff <= (WIDE if layer.activation_format is MXFP4 else GATE))
    if c.device.type != "cuda" or not layer.tokens or "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ:
        return
    own = layer.weights_on(c.device, layer.packed)
    plan = plan_for(layer.tokens, own["gate_up"], own["down"], layer.top_k, layer.everyone, None, torch.bfloat16,
                    (layer.activation, (), layer.interleaved), layer.activation_format, layer.biases[0] is not None, own["shared"],
                    Options(None, layer.invariant), c.device)
    if all(step.backend != "reference" for step in plan.steps.values()):        # which reads sizes on the host
        _replays(c, layer, own, guard, first_bits)


def _replays(c: Call, layer: Layer, own: dict[str, Any], guard: GuardedView, first_bits: dict[int, Tensor]) -> None:
    """One graph, replayed with tokens and routing of each seed: the bits of the seed's own call."""
    given = {name: x.to(c.device) for name, x in layer.tokens_of(next(iter(first_bits))).items()}
    side, graph = torch.cuda.Stream(c.device), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream(c.device))
    with torch.cuda.stream(side):
        layer.run(given, own, guard.tensor)
    torch.cuda.current_stream(c.device).wait_stream(side)
    with torch.cuda.graph(graph):
        layer.run(given, own, guard.tensor)
    for seed, bits in [*first_bits.items()] * 2:
        for name, x in layer.tokens_of(seed).items():
            given[name].copy_(x)
        guard.reset()
        graph.replay()
        c.same(f"{layer}: a graph", guard.tensor.cpu().clone(memory_format=torch.contiguous_format), bits)
