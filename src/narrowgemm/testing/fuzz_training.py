"""Random training steps for `fuzz_steps`: outputs and gradients of `grouped_linear` and `expert_mlp`, against the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.expert_mlp import expert_mlp
from ..ops.grouped_linear import RECIPES, grouped_linear, quantize_weight
from .fuzz_call import Call
from .numerics import calc_diff

# The same bits are multiplied on both sides. An MLP's activation is quantised behind a sum: a few roundings fall to the other side.
LINEAR, MLP, FAST = 6e-6, 1e-3, 2e-3
SMALL = (16, 32, 64, 96, 128, 160)
SIZES = (*SMALL, 256, 320, 384, 512, 640, 1000)
TYPES = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)


def lens(c: Call, groups: int) -> Tensor:
    """Rows of each group: some empty, all on one, none at all."""
    kind = c.pick(("any", "any", "any", "one", "none", "multiples"))
    sizes = [c.pick((0, 0, 1, 2, 7, 16, 33, 100, 128, 129, 300)) for _ in range(groups)]
    if kind == "one":
        sizes = [0] * groups
        sizes[c.rng.randrange(groups)] = c.pick((1, 130, 513))
    elif kind == "none":
        sizes = [0] * groups
    elif kind == "multiples":
        sizes = [c.pick((0, 128, 256)) for _ in range(groups)]
    return torch.tensor(sizes, dtype=c.pick((torch.int32, torch.int64)))


def width(c: Call) -> int:
    return int(c.pick(SMALL if c.device.type == "cpu" else SIZES))


def numbers(c: Call, *shape: int) -> Tensor:
    return torch.randn(shape, generator=c.generator)


def on(device: torch.device, x: Tensor) -> Tensor:
    return x.detach().to(device).requires_grad_(x.requires_grad)


def compare(c: Call, what: str, got: list[Tensor | None], want: list[Tensor | None], limit: float, names: tuple[str, ...]) -> None:
    for name, x, y in zip(names, got, want):
        c.say(f"{what}: {name} is there on one side only", (x is None) != (y is None))
        if x is None or y is None:
            continue
        c.say(f"{what}: {name} {x.dtype} {tuple(x.shape)}, not {y.dtype}", (x.dtype, x.shape) != (y.dtype, y.shape))
        x, y = x.float().cpu(), y.float()
        if not bool(y.any()):
            c.say(f"{what}: {name} is not zero", bool(x.any()))
            continue
        diff = calc_diff(x, y)
        c.say(f"{what}: {name}, calc_diff {diff:.2g}", not diff <= limit)


def _recipe(c: Call) -> dict[str, Any]:
    element = c.pick(("e4m3", "e4m3", "e4m3", "e5m2"))
    recipe = c.pick(tuple(RECIPES))
    return {"recipe": recipe, "element": element, "grads": c.pick(("", "e4m3", "e5m2")),
            "fast_accum": recipe != "block" and c.chance(0.2)}


def linear(c: Call) -> None:
    groups, n, k = c.pick((1, 2, 3, 8, 17)), width(c), width(c)
    sizes, options, dtype = lens(c, groups), _recipe(c), c.pick(TYPES)
    x = numbers(c, int(sizes.sum()), k).to(dtype).requires_grad_(c.chance(0.8))
    w = (numbers(c, groups, n, k) / k**0.5).to(c.pick((dtype, torch.float32))).requires_grad_(c.chance(0.8))
    dy = numbers(c, x.shape[0], n).to(dtype) * c.pick((1.0, 1.0, 2.0**-12))
    held, main = c.chance(0.3), c.chance(0.3) and w.requires_grad
    offsets, scaled = c.chance(0.4), options["recipe"] == "tensorwise" and c.chance(0.3)

    def call(device: torch.device) -> list[Tensor | None]:
        x_, w_ = on(device, x), on(device, w)
        total = torch.full(w.shape, 0.5, dtype=torch.float32, device=device) if main else None
        where = sizes.to(device)
        bounds = torch.nn.functional.pad(where.cumsum(0), (1, 0))
        given: dict[str, Any] = {"group_offs": bounds} if offsets else {"group_lens": where}
        if held:
            given["quantized"] = quantize_weight(w_.detach(), options["recipe"], options["element"])
        if scaled:
            given["scales"] = tuple(torch.tensor([s], device=device) for s in (0.013, 0.02))
        y = grouped_linear(x_, w_, main_grad=total, **given, **options)
        if y.requires_grad:
            y.backward(dy.to(device))
        return [y.detach(), x_.grad, total if main else w_.grad]

    what = (f"{tuple(x.shape)} by {tuple(w.shape)} {dtype} {w.dtype} {options} groups {sizes.tolist()} held {held} main {main} "
            f"scales {scaled}")
    want, got, again = call(torch.device("cpu")), call(c.device), call(c.device)
    compare(c, what, got, want, FAST if options["fast_accum"] else LINEAR, ("y", "dx", "dw"))
    for a, b in zip(got, again):
        if a is not None and b is not None:
            c.same(f"{what}: a second call", a, b.cpu())


def mlp(c: Call) -> None:
    groups, hidden, inter = c.pick((1, 2, 3, 8)), width(c), width(c)
    sizes, options, dtype = lens(c, groups), _recipe(c), c.pick(TYPES[:3])
    x = numbers(c, int(sizes.sum()), hidden).to(dtype).requires_grad_()
    up = (numbers(c, groups, 2 * inter, hidden) / hidden**0.5).to(dtype).requires_grad_(c.chance(0.8))
    down = (numbers(c, groups, hidden, inter) / inter**0.5).to(dtype).requires_grad_(c.chance(0.8))
    dy = numbers(c, *x.shape).to(dtype)
    options["activation"] = c.pick(("swiglu", "swiglu_oai"))
    grad = c.chance(0.8)

    def call(device: torch.device) -> list[Tensor | None]:
        x_, up_, down_ = (on(device, t) for t in (x, up, down))
        with torch.set_grad_enabled(grad):
            y = expert_mlp(x_, up_, down_, sizes.to(device), **options)
        if grad:
            y.backward(dy.to(device))
        return [y.detach(), x_.grad, up_.grad, down_.grad]

    what = f"{tuple(x.shape)} inter {inter} {dtype} {options} groups {sizes.tolist()} grad {grad}"
    loose = 8.0 if "e5m2" in (options["element"], options["grads"]) else 1.0
    compare(c, what, call(c.device), call(torch.device("cpu")), MLP * loose, ("y", "dx", "d gate_up", "d down"))


OPS = {"grouped_linear": linear, "expert_mlp": mlp}


def run(op: str, c: Call) -> None:
    with torch.enable_grad():
        OPS[op](c)
