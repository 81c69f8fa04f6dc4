"""Launches of the kernels around the expert layer's products for the compile tests: every format, sizes of real models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from narrowgemm import FP8_ROW, MXFP4, MXFP8, FP8_1x128, Offsets, combine, route, sort_by_expert
from narrowgemm.arch import get_arch
from narrowgemm.formats import BF16, Format
from narrowgemm.kernels.registry import kernels
from narrowgemm.kernels.step_operands import ActivateOperands, CombineOperands, SortGatherOperands
from narrowgemm.ops.activate import activate
from narrowgemm.ops.gather import gather_quantize
from narrowgemm.ops.steps import (
    activate_problem,
    allocate,
    combine_problem,
    gather_problem,
    scale_layout_of,
    select,
    sort_gather_problem,
)
from narrowgemm.problem import Config
from narrowgemm.reference.route import Routing
from narrowgemm.runtime.launch import run

FORMATS: tuple[Format, ...] = (FP8_1x128, FP8_1x128.with_scale("e8m0"), MXFP8, MXFP4, FP8_ROW, BF16)


def routing(tokens: int, top_k: int, experts: int) -> Routing:
    slots = torch.arange(tokens * top_k, dtype=torch.int32)
    return Routing(slots, torch.zeros(experts + 1, dtype=torch.int64), slots, top_k)


def by_row(fmt: Format) -> Config:
    problem = gather_problem(4096, 7168, 8, 256, BF16, fmt, scale_layout_of(fmt))
    return next(c for c in kernels()["triton.gather_quantize"].configs(problem, get_arch("h200")) if c.persistent)


def sort_gather(x: torch.Tensor, fmt: Format) -> None:
    """The step of `experts` for few slots, top-8 of 256."""
    r = routing(x.shape[0], 8, 256)
    scales = scale_layout_of(fmt)
    plan = select(sort_gather_problem(x.shape[0], x.shape[1], 8, 256, BF16, fmt, scales), x.device, "triton", None)
    rows = allocate(8 * x.shape[0], x.shape[1], fmt, x.dtype, x.device, scales)
    run(plan, SortGatherOperands(r.row_map.view(-1, 8), None, 0, 256, x, 8, r.row_map, r.offsets, r.inverse, rows, "rceil", 1e-4))


def behind(y: torch.Tensor, fmt: Format, name: str) -> None:
    """A step of `experts` that starts while the product in front of it is still at it."""
    (m, k), r, scales = y.shape, routing(y.shape[0] // 8, 8, 256), scale_layout_of(fmt)
    if name == "activate":
        problem = activate_problem(m, k // 2, 256, 1, BF16, fmt, scales, "swiglu", (), False, False)
        rows = allocate(m, k // 2, fmt, y.dtype, y.device, scales)
        operands = ActivateOperands(y, None, r.offsets, rows, "swiglu", (1.0, 0.0), False, "rceil", 1e-4, None)
    else:
        problem = combine_problem(m // 8, k, 8, 256, BF16, False)
        operands = CombineOperands(y, r.row_map, r.offsets, r.inverse, torch.zeros(m // 8, 8), None, None, y[:m // 8], None)
    run(select(replace(problem, front="tokens"), y.device, "triton", None), operands)


def jobs(target: str) -> Iterator[tuple[str, Callable[[], object]]]:
    triton = {"backend": "triton"}
    yield "route V3", lambda: route(torch.zeros(3, 256), 8, scoring="sigmoid", bias=torch.zeros(256), num_expert_group=8,
                                    topk_group=4, **triton)
    yield "route K3", lambda: route(torch.zeros(3, 896), 16, **triton)
    yield "route gpt-oss", lambda: route(torch.zeros(3, 128, dtype=torch.bfloat16), 4, **triton)
    for slots in (8, 1 << 17):
        ids = torch.zeros(slots // 8, 8, dtype=torch.int32)
        yield f"sort {slots}", lambda i=ids: sort_by_expert(i, 256, **triton)
    yield "sort with a map", lambda: sort_by_expert(torch.zeros(9, 8, dtype=torch.int64), 32,
                                                    expert_map=torch.zeros(256, dtype=torch.int32), **triton)
    r = routing(4096, 8, 256)
    x, h, y = (torch.zeros(n, k, dtype=torch.bfloat16) for n, k in ((4096, 7168), (32768, 4096), (32768, 7168)))
    for fmt in FORMATS:
        yield f"gather {fmt.name}", lambda f=fmt: gather_quantize(x, r, f, **triton)
        if fmt is not FP8_ROW:
            yield f"gather by row {fmt.name}", lambda f=fmt: gather_quantize(x, r, f, config=by_row(f))
        yield f"activate {fmt.name}", lambda f=fmt: activate(h, fmt=f, layout=r.layout, **triton)
    for fmt in FORMATS:
        if fmt is not FP8_ROW:
            yield f"sort and gather {fmt.name}", lambda f=fmt: sort_gather(x[:16], f)
            yield f"sort and gather by token {fmt.name}", lambda f=fmt: sort_gather(x[:100], f)
    yield "activate behind", lambda: behind(h[:128], FP8_1x128, "activate")
    yield "combine behind", lambda: behind(y[:128], FP8_1x128, "combine")
    yield "combine", lambda: combine(y, r, torch.zeros(4096, 8), **triton)
    small = routing(16, 4, 128)
    rows, bias = torch.zeros(64, 5760, dtype=torch.bfloat16), torch.zeros(128, 5760, dtype=torch.bfloat16)
    for fmt in (BF16, MXFP8, MXFP4):
        yield f"activate oai {fmt.name}", lambda f=fmt: activate(rows, activation="swiglu_oai", interleaved=True, bias=bias,
                                                                 layout=Offsets(small.offsets), fmt=f, **triton)
    yield "combine bias", lambda: combine(torch.zeros(64, 2880, dtype=torch.bfloat16), small, torch.zeros(16, 4),
                                          bias=bias[:, :2880], add=torch.zeros(16, 2880, dtype=torch.bfloat16), **triton)


def ordered_jobs(target: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """GPT-OSS's SwiGLU to MXFP8 and DeepSeek-V3's tokens to MXFP8: what waits for what."""
    h, r = torch.zeros(16384, 5760, dtype=torch.bfloat16), routing(4096, 4, 128)
    problem = activate_problem(16384, 2880, 128, 128, BF16, MXFP8, "row_major", "swiglu_oai", (), False, False)
    for config in kernels()["triton.activate"].configs(problem, get_arch("h200")):
        if config.block_m * config.block_k == 2048:
            way = "walk" if config.persistent else "once"
            yield way, lambda c=config: activate(h, activation="swiglu_oai", layout=r.layout, fmt=MXFP8, config=c)
    x, r = torch.zeros(4096, 7168, dtype=torch.bfloat16), routing(4096, 8, 256)
    yield "gather", lambda: gather_quantize(x, r, MXFP8, backend="triton")
