"""Checks of the kernels around an expert layer's products, for `selftest`: (name, Problem, run(kernel, device))."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..formats import BF16, FP8_ROW, MXFP4, MXFP8, Format, FP8_1x128, FP8_128x128, ScaledTensor
from ..kernels.operands import Operands
from ..kernels.step_operands import SortGatherOperands
from ..layouts import Offsets
from ..ops import steps
from ..ops.activate import activate
from ..ops.gather import gather_quantize
from ..ops.grouped import grouped_gemm
from ..ops.quantize import quantize
from ..ops.route import combine, route, sort_by_expert
from ..ops.routed import routed_gemm
from ..problem import Epilogue, Operand, Problem, bucket
from ..reference import activate as reference_activate
from ..reference import route as reference
from ..reference.activate import OAI_ARGS
from ..runtime.launch import run
from .numerics import calc_diff

TOKENS, EXPERTS, TOP_K, K, N = 37, 24, 3, 512, 192
FORMATS = (FP8_1x128, MXFP8, MXFP4, FP8_ROW, BF16)
Run = Callable[[str, torch.device], float | None]


def checks() -> Iterator[tuple[str, Problem, Run]]:
    rows = TOKENS * TOP_K
    yield "route-sigmoid-groups", steps.route_problem(TOKENS, EXPERTS, TOP_K, 4, BF16), _route
    yield "sort", steps.sort_problem(rows, EXPERTS), _sort
    for fmt in FORMATS:
        layout = steps.scale_layout_of(fmt)
        yield f"gather-{fmt.name}", steps.gather_problem(TOKENS, K, TOP_K, EXPERTS, BF16, fmt, layout), partial(_gather, fmt)
        yield f"activate-{fmt.name}", steps.activate_problem(rows, K, EXPERTS, TOP_K, BF16, fmt, layout, "swiglu_oai", (),
                                                             True, True), partial(_activate, fmt)
        if fmt is not FP8_ROW:
            problem = steps.sort_gather_problem(TOKENS, K, TOP_K, EXPERTS, BF16, fmt, layout)
            yield f"sort-gather-{fmt.name}", problem, partial(_sort_gather, problem, fmt)
    for combined in (False, True):
        epilogue = Epilogue(True, "" if combined else "swiglu_oai", () if combined else OAI_ARGS, not combined, combined, combined)
        problem = Problem("routed_gemm", "offsets", bucket(rows), N, K, EXPERTS, Operand(BF16), Operand(MXFP4, scale_dtype="e8m0"),
                          rows=bucket(-(-rows // EXPERTS)), epilogue=epilogue, gather=True, a_div=TOP_K, zero_padding=False)
        yield f"routed-{'down' if combined else 'gate-up'}", problem, partial(_routed, combined)
    gated = Problem("gated_gemm", "offsets", 400, 512, K, 3, Operand(FP8_1x128, scale_dtype="fp32", scale_major="mn"),
                    Operand(FP8_128x128, scale_dtype="fp32"), rows=133, epilogue=Epilogue(activation="swiglu", quantize=FP8_1x128))
    yield "gated", gated, partial(_gated, gated)
    yield "combine", steps.combine_problem(TOKENS, K, TOP_K, EXPERTS, BF16, True), _combine


def tensors() -> tuple[Tensor, Tensor, reference.Routing]:
    """Logits `[T, E]`, tokens `[T, K]`, and a routing with skipped slots, on the CPU."""
    gen = torch.Generator().manual_seed(0)
    logits = torch.stack([torch.randperm(EXPERTS, generator=gen) for _ in range(TOKENS)]) / 16
    ids = torch.where(torch.rand(TOKENS, TOP_K, generator=gen) < 0.2, -1, logits.argsort(1)[:, :TOP_K]).to(torch.int32)
    return logits.bfloat16(), torch.randn(TOKENS, K, generator=gen).bfloat16(), reference.sort_by_expert(ids, EXPERTS)


def ids_of(routing: reference.Routing) -> Tensor:
    """`[T, top_k]` ids that are sorted like this."""
    ids = torch.empty(TOKENS * TOP_K, dtype=torch.int32)
    for e in range(EXPERTS):
        ids[routing.row_map[int(routing.offsets[e]):int(routing.offsets[e + 1])].long()] = e
    ids[routing.row_map[int(routing.offsets[-1]):].long()] = -1
    return ids.view(TOKENS, TOP_K)


def there(routing: reference.Routing, device: torch.device) -> reference.Routing:
    return reference.Routing(routing.row_map.to(device), routing.offsets.to(device), routing.inverse.to(device), routing.top_k)


def equal(got: Tensor, want: Tensor) -> None:
    a, b = (t.cpu().clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (got, want))
    if not torch.equal(a, b):
        raise AssertionError("other bits than the reference")


def within(diff: float, limit: float = 5e-6) -> float:
    """The difference, which is no larger than that."""
    if not diff <= limit:
        raise AssertionError(f"calc_diff {diff:.1e}")
    return diff


def _route(kernel: str, device: torch.device) -> float:
    logits, _, _ = tensors()
    options = dict(scoring="sigmoid", num_expert_group=4, topk_group=2, bias=torch.linspace(0, 0.01, EXPERTS))
    want = reference.route(logits, TOP_K, **options)  # type: ignore[arg-type]
    bias = options.pop("bias")
    got = route(logits.to(device), TOP_K, bias=bias.to(device), backend=kernel, **options)  # type: ignore
    equal(got[1], want[1])
    return calc_diff(got[0].cpu(), want[0])


def _sort(kernel: str, device: torch.device) -> None:
    _, _, want = tensors()
    got = sort_by_expert(ids_of(want).to(device), EXPERTS, backend=kernel)
    for a, b in ((got.row_map, want.row_map), (got.offsets, want.offsets), (got.inverse, want.inverse)):
        equal(a, b)


def _gather(fmt: Format, kernel: str, device: torch.device) -> None:
    _, x, routing = tensors()
    rows = int(routing.offsets[-1])
    got = gather_quantize(x.to(device), there(routing, device), fmt, backend=kernel)
    want = reference.gather_quantize(x, routing, fmt)
    equal(got.data[:rows], want.data[:rows])
    if got.scale is not None and want.scale is not None:
        equal(got.scale[:rows], want.scale[:rows])


def _sort_gather(problem: Problem, fmt: Format, kernel: str, device: torch.device) -> None:
    _, x, want = tensors()
    rows, slots = int(want.offsets[-1]), TOKENS * TOP_K
    out = steps.allocate(slots, K, fmt, x.dtype, device, steps.scale_layout_of(fmt))
    row_map, offsets, inverse = (torch.empty_like(t, device=device) for t in (want.row_map, want.offsets, want.inverse))
    run(steps.select(problem, device, kernel, None), SortGatherOperands(
        ids_of(want).to(device), None, 0, EXPERTS, x.to(device), TOP_K, row_map, offsets, inverse, out, "rceil", 1e-4))
    for a, b in ((row_map, want.row_map), (offsets, want.offsets), (inverse, want.inverse)):
        equal(a, b)
    exact = reference.gather_quantize(x, want, fmt)
    equal(out.data[:rows], exact.data[:rows])
    if out.scale is not None and exact.scale is not None:
        equal(out.scale[:rows], exact.scale[:rows])


def _routed(combined: bool, kernel: str, device: torch.device) -> float:
    _, x, routing = tensors()
    gen = torch.Generator().manual_seed(3)
    w, bias = quantize(torch.randn(EXPERTS, N, K, generator=gen), MXFP4), torch.randn(EXPERTS, N, generator=gen)
    weights = torch.rand(TOKENS, TOP_K, generator=gen) if combined else None

    def call(where: torch.device, backend: str) -> Tensor:
        r, b = there(routing, where), ScaledTensor(w.data.to(where), w.scale.to(where), w.format)     # type: ignore[union-attr]
        return routed_gemm(x.to(where), b, r.layout, row_map=r.row_map, top_k=TOP_K, a_div=TOP_K, bias=bias.to(where),
                           activation=None if combined else "swiglu_oai", interleaved=not combined, combine=combined,
                           routing_weight=None if weights is None else weights.to(where), zero_padding=True, backend=backend)

    return within(calc_diff(call(device, kernel).cpu(), call(torch.device("cpu"), "reference")))


def _activate(fmt: Format, kernel: str, device: torch.device) -> float:
    _, _, routing = tensors()
    rows, gen = int(routing.offsets[-1]), torch.Generator().manual_seed(1)
    h = torch.randn(TOKENS * TOP_K, 2 * K, generator=gen).mul(2).bfloat16()
    bias = torch.randn(EXPERTS, 2 * K, generator=gen)
    got = activate(h.to(device), activation="swiglu_oai", interleaved=True, bias=bias.to(device),
                   layout=there(routing, device).layout, fmt=fmt, backend=kernel)
    want = reference_activate.activate(h, activation="swiglu_oai", interleaved=True, bias=bias, offsets=routing.offsets)
    assert isinstance(want, Tensor)
    exact = reference_activate.activate(h, activation="swiglu_oai", interleaved=True, bias=bias, offsets=routing.offsets,
                                        fmt=fmt) if fmt.scaled else ScaledTensor(want, None, fmt)
    assert isinstance(exact, ScaledTensor)
    return within(calc_diff(_live(got, rows), _live(exact, rows)), 1e-3 if fmt is MXFP4 else 1e-4)


def _live(x: ScaledTensor, rows: int) -> Tensor:
    return ScaledTensor(x.data[:rows].cpu(), None if x.scale is None else x.scale[:rows].cpu(), x.format).dequantize()


def _gated(problem: Problem, kernel: str, device: torch.device) -> float:
    gen, m, n = torch.Generator().manual_seed(0), problem.m, problem.n
    x = quantize(torch.randn(m, K, generator=gen).bfloat16(), FP8_1x128, scale_layout="mn_major", backend="reference")
    w = quantize(torch.randn(3, n, K, generator=gen).bfloat16() / K**0.5, FP8_128x128, backend="reference")
    where = Offsets(torch.tensor([0, 130, 131, m]))
    want = activate(grouped_gemm(x, w, where, out_dtype=torch.bfloat16, backend="reference"), layout=where, fmt=FP8_1x128,
                    backend="reference")
    got = steps.allocate(m, n // 2, FP8_1x128, torch.bfloat16, device, "mn_major")
    a, b = (ScaledTensor(t.data.to(device), t.scale.to(device), t.format) for t in (x, w) if t.scale is not None)
    operands = Operands(a, b, got.data, m, n, K, 3, where.offsets.to(device), out_scale=got.scale)
    run(steps.select(problem, device, kernel, None), operands)
    return within(calc_diff(got.dequantize().cpu(), want.dequantize()), 1e-4)


def _combine(kernel: str, device: torch.device) -> float:
    _, _, routing = tensors()
    gen = torch.Generator().manual_seed(2)
    y, bias = torch.randn(TOKENS * TOP_K, K, generator=gen).bfloat16(), torch.randn(EXPERTS, K, generator=gen)
    weights = torch.rand(TOKENS, TOP_K, generator=gen)
    got = combine(y.to(device), there(routing, device), weights.to(device), bias=bias.to(device), backend=kernel)
    return within(calc_diff(got.float().cpu(), reference.combine(y, routing, weights, bias=bias, out_dtype=torch.float32)))
