"""What the tests of `experts` share: layers of random weights, tokens, routing, and what a result is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from narrowgemm import FP8_ROW, FP8_TENSOR, MXFP4, MXFP8, FP8_128x128, ScaledTensor, quantize, route
from narrowgemm.formats import BF16, Format
from narrowgemm.ops.experts import compose
from narrowgemm.ops.experts_arguments import Arguments
from narrowgemm.ops.experts_plan import Options
from narrowgemm.testing.numerics import calc_diff

from .._graphs import captured

# A last bit of the first product moves a few roundings of the activation: a step of E4M3 is 2^-4 of a value, of E2M1 2^-2.
LIMITS = {"bf16": 1e-5, "fp16": 1e-5, "fp32": 1e-5, "e4m3": 1e-4, "e2m1": 1e-3}
WEIGHTS = [FP8_128x128, FP8_ROW, FP8_TENSOR, MXFP8, MXFP4, BF16]


def made(fmt: Format, experts_: int, hidden: int, inter: int, device: str, seed: int = 0) -> tuple[ScaledTensor, ScaledTensor]:
    gen = torch.Generator().manual_seed(seed)
    up = torch.randn(experts_, 2 * inter, hidden, generator=gen).div(hidden**0.5)
    down = torch.randn(experts_, hidden, inter, generator=gen).div(inter**0.5)
    if not fmt.scaled:
        return tuple(ScaledTensor(w.bfloat16().to(device), None, BF16) for w in (up, down))
    return tuple(quantize(w.to(device), fmt) for w in (up, down))


def tokens(t: int, hidden: int, device: str, seed: int = 1) -> torch.Tensor:
    return torch.randn(t, hidden, generator=torch.Generator().manual_seed(seed)).bfloat16().to(device)


def choices(t: int, top_k: int, experts_: int, device: str, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return route(torch.randn(t, experts_, generator=gen).to(device), top_k)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int16)


def close(got: torch.Tensor, want: torch.Tensor, fmt: Format) -> None:
    """The layer against its definition, activations in `fmt`; every token too, so that none hides behind the others.

    One last place of a row's largest element gives the row another scale: 1.2e-4 for that token in the middle of 200 draws of FP8
    row-wise, 7.6e-4 at most. So few tokens have the bound of one.
    """
    limit = LIMITS[fmt.element]
    assert calc_diff(got.float(), want) <= limit * (1 if len(got) >= 16 else 20)
    assert all(calc_diff(g.float(), w) <= 20 * limit for g, w in zip(got, want))


def composed(x, up, down, *, fmt: Format | None = None, backend: str | None = None, **given) -> torch.Tensor:
    """By the public steps."""
    return compose(Arguments(x, up, down, activation_format=fmt, options=Options(backend), **given))


def replays(call: Callable[[], None], x: torch.Tensor, logits: torch.Tensor, space: torch.Tensor, out: torch.Tensor,
            count: int) -> Iterator[None]:
    """`call`, of these tensors, captured once without a sync and replayed for other tokens and routings, all scores equal in the last, on a
    poisoned workspace. Yields after each, with an eager call's output in `out`, which has the replay's bits."""
    graph = captured(call)
    for seed in range(count):
        x.copy_(tokens(*x.shape, "cuda", seed + 10))
        logits.copy_(torch.randn(logits.shape) if seed < count - 1 else torch.zeros(logits.shape))
        space.fill_(0xFF)
        graph.replay()
        first = out.clone()
        space.fill_(0xFF)
        out.fill_(float("nan"))
        call()
        assert torch.equal(bits(first), bits(out))
        yield


def aligned(x: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """A copy that starts `offset` bytes behind a multiple of 64."""
    raw = torch.zeros(x.nbytes + 128, dtype=torch.uint8)
    start = -raw.data_ptr() % 64 + offset
    return raw[start:start + x.nbytes].view(x.dtype).view(x.shape).copy_(x)
