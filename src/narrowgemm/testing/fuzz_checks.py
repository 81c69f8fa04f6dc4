"""How `fuzz` calls a kernel and judges what came of it: bounds on every element, guards, repeats, graphs."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..formats import ScaledTensor
from ..reference.float32 import full_float32
from ..reference.grouped import grouped_gemm, own_scales, rows_of_groups, take_columns
from .fuzz_inputs import build
from .guard import GUARD, all_bytes
from .inputs import Inputs
from .numerics import FAST_ACCUM_GATE, KERNEL_GATE, Sums

if TYPE_CHECKING:
    from .fuzz_draw import Draw

MONOTONE = ("past", "negative", "beyond_int32")     # bounds still don't decrease, so whose row is which is defined
GROUPS_CHECKED = 48
# of the sum of magnitudes: what a sum of products may be off by, by the narrowest element. FP8 tensor cores cut products and the
# sum so far off 13 bits below the largest: up to 2^-12 of normal numbers at K = 256, less with more K: errors have either sign
SUM_ERROR = {"e4m3": 2.0**-10, "e5m2": 2.0**-10, "e2m1": 2.0**-10, "bf16": 2.0**-14, "fp16": 2.0**-14, "fp32": 2.0**-16}
LEAST_SHARE = 0.25  # of it, that many products come down to
GATED = 128         # elements of a group: the gate is a mean, and a few that happen to be near zero say nothing
FEW_LARGE = 4       # times as much where few products make the sum: a tensor core cuts each off below the largest
ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-10, "fp32": 2.0**-20}


def call(inputs: Inputs, draw: Draw, workspace: bool = True) -> list[str]:
    """The call, with a workspace of poison between guards; what it wrote beside that."""
    options: dict[str, Any] = {"backend": draw.kernel or None, "config": draw.config, "max_sms": draw.max_sms}
    plan = inputs.plan(**options)
    need = 0 if plan is None else plan.workspace_bytes
    guarded = torch.full((4096 + need + 4096,), GUARD, dtype=torch.uint8, device=inputs.device)
    own = guarded[4096 : 4096 + need]
    if workspace and need:
        own.fill_(0xFF if draw.seed % 2 else 0x01)
        options["workspace"] = own
    inputs.call(**options)
    own.fill_(GUARD)
    return [] if all_bytes(guarded, GUARD) else ["wrote beside the workspace"]


def run(draw: Draw, device: torch.device) -> list[str]:
    """What is wrong with the draw's result."""
    inputs = build(draw, device)
    found = call(inputs, draw)
    if draw.corrupt:
        return [*found, *corrupt_faults(inputs, draw)]
    found += inputs.faults()
    found += elements(inputs, draw)
    first = bits(inputs.out.tensor)
    for again in (True, False):
        inputs.reset_out()
        found += call(inputs, draw, again)
        if not torch.equal(first, bits(inputs.out.tensor)):
            found.append("other bits the second time" if again else "other bits without a workspace that was given")
    if draw.seed % 3 == 0 and not found:
        found += warm(draw, device)
    return list(dict.fromkeys(found))


def warm(draw: Draw, device: torch.device) -> list[str]:
    """Other tensors of the same signature, on a stream of their own, and replayed from a CUDA graph."""
    inputs = build(replace(draw, seed=draw.seed ^ 4), device)
    options: dict[str, Any] = {"backend": draw.kernel or None, "config": draw.config, "max_sms": draw.max_sms}
    if device.type != "cuda":
        inputs.call(**options)
        return [f"warm: {f}" for f in (*inputs.faults(), *elements(inputs, draw))]
    plan = inputs.plan(**options)
    if (plan is not None and plan.backend == "reference") or "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ:
        return []       # it reads sizes on the host; and memory that is not kept can't be had while a graph is captured
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        inputs.call(**options)
    torch.cuda.current_stream(device).wait_stream(stream)
    found = [f"warm: {f}" for f in (*inputs.faults(), *elements(inputs, draw))]
    first, graph = bits(inputs.out.tensor), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inputs.call(**options)
    for _ in range(2):
        inputs.reset_out()
        graph.replay()
        if not torch.equal(first, bits(inputs.out.tensor)):
            found.append("other bits from a graph")
    return found


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8).clone()


def sides(inputs: Inputs, g: int) -> tuple[Tensor, Tensor]:
    c = inputs.case
    if c.layout != "k_grouped":
        return inputs._dequantized(g)
    start = sum(c.group_sizes[:g])
    end = start + c.group_sizes[g]
    return take_columns(own_scales(inputs.a, g), start, end), take_columns(own_scales(inputs.b, g), start, end)


def sum_error(draw: Draw) -> float:
    """What a sum may be off by, of the sum of magnitudes."""
    c = draw.case
    if c.a.elem.bits == 16 and c.packed != "fp8":
        return SUM_ERROR["bf16"]
    # packed for FP8, each BF16 token is two E4M3 numbers, on FP8 tensor cores
    off = SUM_ERROR["e4m3" if c.a.elem.bits == 16 else c.a.element if c.a.elem.bits < c.b.elem.bits else c.b.element]
    if draw.values != "normal" or c.k < 128 or c.layout == "k_grouped" or c.fast_accum:
        return off * FEW_LARGE
    return off * max(LEAST_SHARE, (128 / c.k) ** 0.5)


def elements(inputs: Inputs, draw: Draw) -> list[str]:
    """The kernel gate, and every element within what its own sum can be off by."""
    c, found = inputs.case, []
    sums, off = Sums(), sum_error(draw)
    worst: tuple[float, str] = (0.0, "")
    top = torch.finfo(inputs.out.tensor.dtype).max
    groups = list(inputs.groups)
    if len(groups) > GROUPS_CHECKED:
        groups = [groups[0], groups[-1], *random.Random(draw.seed).sample(groups[1:-1], GROUPS_CHECKED - 2)]
    for g in groups:
        a, b = sides(inputs, g)
        with full_float32():
            want, size = a @ b.mT, a.abs().nan_to_num() @ b.abs().nan_to_num().mT
        if c.accumulate:
            base = inputs.base(g).float()
            want, size = want + base, size + base.abs()
        got = inputs.rows(inputs.out.tensor, g).float()
        live = want.isfinite() & (want.abs() + off * size <= 0.99 * top)
        nan = want.isnan() != got.isnan()
        if bool(nan.any()):
            at = [int(x) for x in nan.nonzero()[0]]
            found.append(f"group {g}: {int(nan.sum())} elements are NaN that should not be, or the other way, first {at}: "
                         f"{float(got[tuple(at)])}, {float(want[tuple(at)])}")
            continue
        if draw.values == "inf" and bool((other := want.isinf() & (got != want)).any()):
            at = [int(x) for x in other.nonzero()[0]]
            found.append(f"group {g}: {int(other.sum())} elements are not infinite, first {at}: {float(got[tuple(at)])}")
        tolerance = ROUNDING[c.out_dtype] * want.abs() + off * size + (6e-8 if c.out_dtype == "fp16" else 0.0)
        excess = torch.where(live, (got - want).abs() - tolerance, -1.0)
        if excess.numel() and bool((excess > 0).any()):
            at = [int(x) for x in divmod(int(excess.argmax()), excess.shape[1])]
            x, y, t = (float(v[tuple(at)]) for v in (got, want, tolerance))
            if x != x or abs(x - y) / max(t, 1e-38) > worst[0]:
                worst = (abs(x - y) / max(t, 1e-38), f"group {g}, {int((excess > 0).sum())} of {excess.numel()} elements are off, "
                         f"most {at}: {x}, expected {y} +- {t:.3g}")
        if int(live.sum()) >= GATED:
            sums.add(g, torch.where(live, got, 0.0), torch.where(live, want, 0.0))
    gate = sums.gate("kernel", FAST_ACCUM_GATE if c.fast_accum else KERNEL_GATE[c.out_dtype])
    if worst[1]:
        found.append(worst[1])
    if not gate.ok and draw.values == "normal":
        found.append(str(gate))
    return found


def corrupt_faults(inputs: Inputs, draw: Draw) -> list[str]:
    """With a corrupt layout: rows of one group only are that group's product, rows of none are not written, nothing beside."""
    c, layout = inputs.case, inputs.layout
    assert layout is not None
    if layout.kind in ("offsets", "psum") and draw.corrupt not in MONOTONE:
        return [f for f in inputs.out.faults() if "beside" in f]
    got = inputs.out.tensor.clone()
    found = inputs.out.faults()
    owners = torch.zeros(got.shape[:-1], dtype=torch.int32, device=got.device)
    for g, rows in rows_of_groups(layout.kind, layout.index, inputs.a.shape[-2], c.groups, layout.alignment):
        (owners[g] if c.layout == "masked" else owners)[rows] += 1
    inputs.reset_out()
    want = grouped_gemm(inputs.a, inputs.b, inputs.out.tensor, layout.kind, layout.index, alignment=layout.alignment,
                        accumulate=c.accumulate, zero_padding=c.zero_padding)
    none = owners == 0
    if not torch.equal(bits(got[none]), bits(want[none])):
        found.append(f"corrupt {layout.kind}: rows of no group differ from the reference's")
    one = owners == 1
    x, y = got[one].float(), want[one].float()
    if not torch.equal(x.isnan(), y.isnan()):
        return [*found, f"corrupt {layout.kind}: NaN in other rows than the reference"]
    if got.dtype == torch.float16 and bool(y.isinf().any()):    # what a sum may be off by is of its size, not of FP16's range
        wide = torch.zeros(got.shape, device=got.device)
        y = grouped_gemm(inputs.a, inputs.b, wide, layout.kind, layout.index, alignment=layout.alignment)[one]
    off = 0.02 * float(torch.where(y.isfinite(), y.abs(), 0.0).amax()) + 1e-6 if y.numel() else 0.0
    top = 0.9 * torch.finfo(got.dtype).max
    x, low, high = (t.clamp(-top, top) for t in (x, y - off, y + off))
    if bool(((x < low) | (x > high)).any()):
        found.append(f"corrupt {layout.kind}: rows of one group differ from the reference's")
    return found


def differences(draw: Draw, device: torch.device) -> list[str]:
    """For a replay: what the call is."""
    inputs = build(draw, device)
    plan = inputs.plan(backend=draw.kernel or None, config=draw.config, max_sms=draw.max_sms)

    def describe(x: ScaledTensor) -> str:
        scale = None if x.scale is None else (tuple(x.scale.shape), x.scale.stride())
        return f"{x.format.name} {tuple(x.data.shape)} {x.data.stride()} scale {scale}"

    return [f"a {describe(inputs.a)}", f"b {describe(inputs.b)}", f"out {inputs.out.tensor.stride()}",
            f"plan {plan and (plan.kernel, str(plan.config), plan.reason)}"]

