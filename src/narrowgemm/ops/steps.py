"""What the ops around an expert layer's products share: signatures, checks, the Problem's operands."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..arch import detect
from ..errors import expect, expect_count
from ..formats import PLAIN, Format, ScaledTensor
from ..problem import Config, Epilogue, Operand, Plan, Problem, bucket
from ..reference.route import Routing
from ..runtime import dispatch
from ..scales import empty_scales
from . import common
from .overlap import stored_twice

FLOATS = tuple(PLAIN)
SCALE_LAYOUTS = ("row_major", "mn_major")


def sign(x: Tensor | None) -> object:
    """What of a tensor belongs to a signature; of anything else its type, so that checks see it."""
    if not isinstance(x, Tensor):
        return type(x)
    at = x.get_device()
    try:
        return x.shape, x.stride(), x.dtype, at if at >= 0 else x.device, common.off_16_bytes(x)
    except RuntimeError as error:
        common.refuse(error, tensor=x)


def aligned(x: Tensor) -> bool:
    """Whether all rows begin on 16 bytes."""
    return x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s, n in zip(x.stride()[:-1], x.shape) if n > 1)


def scale_layout_of(fmt: Format) -> str:
    """How a kernel behind likes the scales of rows: TMA takes a column of 1x128's; 1x32's are one byte each, and written a
    row at a time."""
    return "row_major" if fmt.group[1] == 32 else "mn_major"


def wants_definition(*tensors: Tensor | None) -> bool:
    """Whether the definition in torch has to run: torch.compile traces it, and autograd needs its graph."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def target(fmt: Format, scale_layout: str = "") -> Operand:
    """The Problem's side of an output."""
    if not fmt.scaled:
        return Operand(fmt)
    return Operand(fmt, scale_dtype=fmt.scale, scale_major="mn" if scale_layout == "mn_major" else "k")


def route_problem(tokens: int, experts: int, top_k: int, groups: int, source: Format) -> Problem:
    return Problem("route", "dense", bucket(tokens), experts, top_k, groups, Operand(source), out_dtype="fp32")


def sort_problem(slots: int, experts: int) -> Problem:
    return Problem("sort_by_expert", "offsets", bucket(slots), 1, 1, experts)


def gather_problem(tokens: int, k: int, top_k: int, experts: int, source: Format, fmt: Format, scale_layout: str,
                   expected: int = 0) -> Problem:
    """`expected`: rows a group is expected to have, where that is known; 0: every slot may be a row."""
    return Problem("gather_quantize", "offsets", bucket(tokens), 1, k, experts, Operand(source), target(fmt, scale_layout),
                   rows=bucket(expected), gather=True, a_div=top_k)


def sort_gather_problem(tokens: int, k: int, top_k: int, experts: int, source: Format, fmt: Format, scale_layout: str,
                        expected: int = 0) -> Problem:
    """Sort and gather in one."""
    return replace(gather_problem(tokens, k, top_k, experts, source, fmt, scale_layout, expected), op="sort_gather")


def activate_problem(rows: int, inter: int, groups: int, expected: int, source: Format, fmt: Format, scale_layout: str,
                     activation: str, args: tuple[float, ...], interleaved: bool, bias: bool) -> Problem:
    """`groups` 0: every row is live; `expected`: rows a group is expected to have."""
    epilogue = Epilogue(bias=bias, activation=activation, activation_args=args, interleaved=interleaved)
    return Problem("activate", "offsets" if groups else "dense", bucket(rows), 1, inter, groups, Operand(source),
                   target(fmt, scale_layout), rows=bucket(expected), epilogue=epilogue)


def activate_both_problem(op: str, rows: int, inter: int, groups: int, source: Format, fmt: Format, activation: str,
                          args: tuple[float, ...], aligned: bool = True) -> Problem:
    return Problem(op, "offsets", bucket(rows), 1, inter, groups, Operand(source, aligned=aligned), target(fmt),
                   rows=bucket(-(-rows // max(groups, 1))), epilogue=Epilogue(activation=activation, activation_args=args))


def combine_problem(tokens: int, n: int, top_k: int, experts: int, source: Format, bias: bool) -> Problem:
    return Problem("combine", "offsets", bucket(tokens), n, top_k, experts, Operand(source),
                   epilogue=Epilogue(bias=bias, routing_weight=True, combine=True))


def check_routing(routing: object) -> None:
    if not isinstance(routing, Routing):
        expect(False, "routing", type(routing).__name__, "a Routing, as `sort_by_expert` returns it", error=TypeError)


def check_kind_of_out(out: object) -> None:
    """`out` is a ScaledTensor or None. Checked in front of the cache, whose key reads it."""
    if out is not None and not isinstance(out, ScaledTensor):
        expect(False, "out", type(out).__name__, "a ScaledTensor", error=TypeError)


def check_args(args: object, name: str = "args") -> None:
    """`args` is a tuple. Checked in front of the cache, whose key it is part of: a list can't be hashed."""
    if type(args) is not tuple:
        expect(False, name, type(args).__name__, "a tuple, (alpha, limit) of swiglu_oai or none", error=TypeError)


def like(routing: Routing) -> tuple[Any, ...]:
    """What of a Routing belongs to a signature, beside `row_map`."""
    x, y = routing.offsets, routing.inverse
    try:
        return routing.top_k, x.shape, x.stride(), x.dtype, y.shape, y.stride(), y.dtype
    except AttributeError:
        common.check_kinds(offsets=x, inverse=y)
        raise


def check_tensors_of(routing: Routing) -> None:
    """A Routing's tensors fit each other: it may be the caller's own, and kernels take its tensors by address."""
    slots = routing.row_map.numel()
    expect_count(routing.top_k, "routing, top_k")
    expect(slots % routing.top_k == 0, "routing, top_k", routing.top_k, f"a divisor of the {slots} slots of row_map")
    device = routing.row_map.device
    check_like(routing.row_map, "routing, row_map", (slots,), torch.int32, device)
    check_like(routing.inverse, "routing, inverse", (slots,), torch.int32, device)
    check_like(routing.offsets, "routing, offsets", (routing.offsets.numel(),), torch.int64, device)
    expect(routing.num_experts >= 1, "routing, offsets", tuple(routing.offsets.shape), "one more than there are experts")


def select(problem: Problem, device: torch.device, backend: str | None, config: Config | None) -> Plan:
    return dispatch.select(problem, detect(device), backend, config)


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` with contiguous rows; a copy only where they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else contiguous(x)


def contiguous(x: Tensor) -> Tensor:
    """`x` with the strides of a contiguous tensor; a copy only where it has others. A gradient of no tokens that a sum's backward
    expanded has strides of zero, and torch takes it for contiguous."""
    return x.contiguous() if x.numel() else x.new_empty(x.shape)


def check_like(x: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device,
               rows_only: bool = False) -> None:
    """An output of the caller's: shape, dtype, device, and contiguous (`rows_only`: each row)."""
    expect(isinstance(x, Tensor), name, type(x).__name__, "a torch.Tensor", error=TypeError)
    expect(x.dtype == dtype, f"{name}, dtype", x.dtype, str(dtype), error=TypeError)
    expect(tuple(x.shape) == shape, f"{name}, shape", tuple(x.shape), str(shape))
    expect(x.device == device, f"{name}, device", x.device, str(device))
    dense = x.is_contiguous() or (rows_only and x.stride(-1) == 1 and x.stride(0) >= x.shape[-1])
    expect(dense, f"{name}, strides", x.stride(), "contiguous rows" if rows_only else "contiguous")


def allocate(rows: int, k: int, fmt: Format, dtype: torch.dtype, device: torch.device, scale_layout: str) -> ScaledTensor:
    """An uninitialised `[rows, k]` in `fmt` (`dtype` where it has no scales), scales in `scale_layout`."""
    if not fmt.scaled:
        return ScaledTensor(torch.empty((rows, k), dtype=dtype, device=device), None, fmt)
    data = torch.empty((rows, k // fmt.elem.per_byte), dtype=fmt.elem.dtype, device=device)
    return ScaledTensor(data, empty_scales((rows, k), fmt, device, scale_layout != "row_major"), fmt)


def check_out(out: ScaledTensor, rows: int, k: int, fmt: Format, dtype: torch.dtype, device: torch.device) -> None:
    """A caller's ScaledTensor to write: payload and scales of the shape, and payload rows contiguous."""
    expect(out.format == fmt, "out, format", out.format.name, fmt.name)
    want = fmt.elem.dtype if fmt.scaled else dtype
    check_like(out.data, "out, payload", (rows, k // fmt.elem.per_byte), want, device, rows_only=True)
    if fmt.scaled:
        want = fmt.scale_dtype
        expect(isinstance(out.scale, Tensor), "out, scale", type(out.scale).__name__, "a torch.Tensor", error=TypeError)
        assert out.scale is not None
        expect(out.scale.dtype == want, "out, scale dtype", out.scale.dtype, str(want), error=TypeError)
        expect(tuple(out.scale.shape) == fmt.scale_shape((rows, k)), "out, scale shape", tuple(out.scale.shape),
               str(fmt.scale_shape((rows, k))))
        expect(out.scale.device == device, "out, scale device", out.scale.device, str(device))
        expect(not stored_twice(out.scale), "out, scale strides", out.scale.stride(), "no scale stored twice")
