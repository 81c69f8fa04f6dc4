"""Random calls of the ops around an expert layer's products, against the reference on the CPU.

    python -m narrowgemm.testing.fuzz cuda 60 --steps
    python -m narrowgemm.testing.fuzz cuda --steps --replay '{...}'

A call is an op's name and a seed: everything else follows from these. What is promised bit for bit is compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..formats import BF16, FORMATS, FP8_ROW, FP8_TENSOR, FP16, MXFP4, MXFP8, PLAIN, FP8_1x128, ScaledTensor
from ..layouts import Offsets, Routed
from ..ops.activate import activate
from ..ops.activate_both import activate_backward, activate_both
from ..ops.gather import gather_quantize
from ..ops.quantize import quantize
from ..ops.quantize_both import quantize_both
from ..ops.route import combine, moe_align_block_size, route, sort_by_expert
from ..ops.routed import routed_gemm
from ..prepack import prepack
from ..reference import activate as reference_activate
from ..reference import quantize as reference_quantize
from ..reference import route as reference_route
from ..reference.route import Routing
from . import fuzz_compat, fuzz_layer, fuzz_training
from .fuzz_call import DTYPES, STORES, Call
from .fuzz_inputs import GuardedView

SCALED = tuple(f for f in FORMATS.values() if f.scaled)
BY_ROW = tuple(f for f in SCALED if f.group[0] == 1)
WIDTHS = (1, 2, 7, 8, 31, 32, 33, 64, 96, 100, 127, 128, 129, 160, 192, 256, 320, 384, 500, 512, 640, 1000, 1024, 1536, 2050)


def _quantize(c: Call) -> None:
    lead = c.pick(((), (), (3,), (2, 2)))
    fmt, rows, k = c.pick(SCALED), c.pick((1, 2, 5, 16, 33, 127, 128, 129, 200)), c.pick(WIDTHS)
    if fmt.element == "e2m1":
        k += k % 2
    x = c.floats(*lead, rows, k, dtype=c.pick(DTYPES))
    there = c.there(x)
    if c.chance(0.3) and k > 1:     # along the other axis, as a view
        there = c.there(x.mT.contiguous()).mT
    rounding, clamp = c.pick(("rceil", "floor", "even")), c.pick((1e-4, 1e-4, 0.0, 1e-20, 2.0))
    scales = c.pick(("row_major", "mn_major"))
    got = quantize(there, fmt, rounding=rounding, amax_clamp=clamp, scale_layout=scales, backend=c.kernel("quantize"))
    c.scaled(f"{fmt.name} {tuple(x.shape)} {x.dtype} {rounding} {clamp}", got, reference_quantize.quantize(x, fmt, rounding, clamp))
    x2 = quantize(there, fmt, rounding=rounding, amax_clamp=clamp, scale_layout=scales)
    c.scaled("again", x2, got)


def _offsets(c: Call, groups: int, rows: int) -> Tensor:
    """Bounds of groups, some empty, rows left over at either end."""
    cuts = sorted(c.rng.randrange(rows + 1) for _ in range(groups + 1)) if c.chance(0.7) else [0] * groups + [rows]
    if c.chance(0.5):
        cuts[0], cuts[-1] = 0, rows
    return torch.tensor(cuts, dtype=c.pick((torch.int32, torch.int64)))


def _quantize_both(c: Call) -> None:
    fmt = c.pick([f for f in SCALED if f.group in ((1, 128), (128, 128), (1, 0), (0, 0))])
    rows, k = c.pick((1, 3, 16, 100, 128, 129, 300)), c.pick(WIDTHS)
    grouped = fmt.group[0] != 128 and c.chance(0.5)
    lead = () if grouped else c.pick(((), (2,)))
    x = c.floats(*lead, rows, k, dtype=c.pick(DTYPES))
    offsets = _offsets(c, c.pick((1, 2, 5, 30)), rows) if grouped else None
    given = fmt.group == (0, 0) and c.chance(0.4)
    scale = torch.rand(lead[0] if lead and c.chance(0.5) else 1, generator=c.generator) + 0.01 if given else None
    amax = torch.tensor([c.pick((0.0, 1.0))]) if scale is not None and c.chance(0.5) and not lead else None
    where = [None if t is None else t.clone().to(c.device) for t in (offsets, scale, amax)]
    got = quantize_both(c.there(x), fmt, where[0], scale=where[1], amax=where[2], backend=c.kernel("quantize_both", "cast_both"))
    want = quantize_both(x, fmt, offsets, scale=scale, amax=amax, backend="reference")
    what = f"{fmt.name} {tuple(x.shape)} {x.dtype} {None if offsets is None else offsets.tolist()} {scale is not None}"
    live = slice(None) if offsets is None else slice(int(offsets[0]), int(offsets[-1]))
    c.scaled(f"{what} rows", got.rows, want.rows, live)
    end = x.shape[-2]
    if offsets is not None and want.layout is not None and got.layout is not None:
        c.same(f"{what} layout", got.layout.offsets, want.layout.offsets)
        end = int(want.layout.offsets[-1])
    c.scaled(f"{what} columns", got.columns, want.columns, slice(None), slice(0, end))
    if amax is not None and where[2] is not None:
        c.same(f"{what} amax", where[2], amax)


def _route(c: Call) -> None:
    experts = c.pick((1, 2, 3, 8, 16, 24, 60, 64, 100, 128, 160, 256, 384, 512, 1000))
    groups = c.pick([g for g in (None, None, 1, 2, 4, 8) if g is None or experts % g == 0])
    kept = None if groups is None else c.rng.randint(1, groups)
    most = experts if groups is None or kept is None else kept * (experts // groups)
    top_k, tokens = c.rng.randint(1, min(most, 12)), c.pick((0, 1, 2, 7, 33, 100, 513))
    logits = c.floats(tokens, experts, dtype=c.pick(DTYPES), wild=c.chance(0.3))
    bias = c.floats(experts, wild=False) / 8 if c.chance(0.4) else None
    options: dict[str, Any] = {"scoring": c.pick(("softmax", "sigmoid")), "renormalize": c.chance(0.5), "num_expert_group": groups,
                               "topk_group": kept, "scaling_factor": c.pick((1.0, 2.5))}
    weights, ids = route(c.there(logits), top_k, bias=None if bias is None else c.there(bias), backend=c.kernel("route"), **options)
    what = f"{tokens}x{experts} top {top_k} {logits.dtype} {options}"
    ids = ids.cpu().long()
    if not tokens:
        return
    c.say(f"{what}: ids out of range", bool(((ids < 0) | (ids >= experts)).any()))
    c.say(f"{what}: ids twice", bool((ids.sort(1).values.diff(dim=1) == 0).any()))
    want, chosen = reference_route.route(logits, top_k, bias=bias, **options)
    good = logits.float().isfinite().all(1)
    score = logits.float().softmax(-1) if options["scoring"] == "softmax" else logits.float().sigmoid()
    if bias is not None:
        score = score + bias
    gap = (score.gather(1, ids.clamp(0, experts - 1)) - score.gather(1, chosen.long())).abs().amax(1)
    # groups of equal scores may go either way by a rounding of exponentials
    c.say(f"{what}: other experts", bool((gap[good] > 1e-5).any()) and groups in (None, 1))
    same = good & (ids == chosen).all(1)
    c.near(f"{what}: weights", weights.cpu()[same], want[same], 1e-4)


def _ids(c: Call, experts: int, tokens: int = 0) -> Tensor:
    tokens, top_k = c.pick((0, 1, 2, 5, 17, 64, 150, tokens)), c.pick((1, 1, 2, 3, 4, 8))
    kind = c.pick(("any", "any", "one", "none", "huge"))
    dtype = c.pick((torch.int32, torch.int64))
    ids = torch.randint(-2, experts + 2, (tokens, top_k), generator=c.generator).to(dtype)
    if kind == "one":
        ids.fill_(c.rng.randrange(experts))
    elif kind == "none":
        ids.fill_(-1)
    elif kind == "huge" and ids.numel():
        ids.view(-1)[::3] += (1 << 32) if dtype == torch.int64 else (1 << 30)
    return ids


def _sort(c: Call) -> None:
    experts = c.pick((1, 2, 3, 7, 16, 31, 64, 127, 128, 129, 256, 512, 1000))
    ids = _ids(c, experts, c.pick((1500, 5000)))
    mapped = torch.randint(-1, experts + 1, (experts * 2,), generator=c.generator).to(c.pick((torch.int32, torch.int64))) \
        if c.chance(0.3) else None
    first = c.pick((0, 0, 1, experts // 2))
    got = sort_by_expert(c.there(ids), experts, expert_map=None if mapped is None else mapped.to(c.device), first_expert=first,
                         backend=c.kernel("sort_by_expert"))
    want = reference_route.sort_by_expert(ids, experts, expert_map=mapped, first_expert=first)
    for name in ("row_map", "offsets", "inverse"):
        c.same(f"{tuple(ids.shape)} {ids.dtype} of {experts} first {first} {name}", getattr(got, name), getattr(want, name))


def _routing(c: Call) -> tuple[Routing, Routing, Tensor]:
    """(on the CPU, on the device, ids)."""
    experts = c.pick((1, 3, 8, 32, 100))
    ids = _ids(c, experts)
    cpu = reference_route.sort_by_expert(ids, experts)
    row_map, offsets, inverse = (t.to(c.device) for t in (cpu.row_map, cpu.offsets, cpu.inverse))
    return cpu, Routing(row_map, offsets, inverse, cpu.top_k), ids


def _gather(c: Call) -> None:
    cpu, there, _ = _routing(c)
    dtype = c.pick(DTYPES)
    fmt = c.pick((*BY_ROW, *BY_ROW, FP8_TENSOR, PLAIN[dtype]))
    k = c.pick(WIDTHS)
    k += k % 2 if fmt.element == "e2m1" else 0
    x = c.floats(cpu.num_tokens, k, dtype=dtype)
    rounding = c.pick(("rceil", "floor", "even"))
    rows, live = cpu.row_map.numel(), int(cpu.offsets[-1])
    out, guard = None, None
    if c.chance(0.5):
        guard = GuardedView((rows, k // fmt.elem.per_byte), fmt.elem.dtype if fmt.scaled else dtype, c.device, c.pick(STORES))
        kind = fmt.scale_dtype
        scale = torch.zeros(fmt.scale_shape((rows, k)), dtype=kind, device=c.device) if fmt.scaled else None
        out = ScaledTensor(guard.tensor, scale, fmt)
    got = gather_quantize(c.there(x), there, fmt, rounding=rounding, out=out, backend=c.kernel("gather_quantize"))
    want = reference_route.gather_quantize(x, cpu, fmt, rounding=rounding)
    c.scaled(f"{fmt.name} {tuple(x.shape)} {dtype} of {cpu.num_experts} by {cpu.top_k}", got, want, slice(0, live))
    if guard is not None:
        c.found += [f"gather {f}" for f in guard.faults([guard.tensor[live:]])]


def _activate(c: Call) -> None:
    rows, inter = c.pick((0, 1, 5, 33, 128, 300)), c.pick(WIDTHS)
    dtype = c.pick(DTYPES)
    fmt = c.pick((None, PLAIN[dtype], *BY_ROW))
    inter += inter % 2 if fmt is not None and fmt.element == "e2m1" else 0
    h = c.floats(rows, 2 * inter, dtype=dtype, wild=c.chance(0.3))
    offsets = _offsets(c, c.pick((1, 2, 9)), rows) if c.chance(0.6) else None
    bias = c.floats(offsets.numel() - 1, 2 * inter, wild=False) if offsets is not None and c.chance(0.5) else None
    kind = c.pick(("swiglu", "swiglu_oai"))
    options: dict[str, Any] = {"activation": kind, "interleaved": c.chance(0.5),
                               "args": (1.5, 3.0) if kind != "swiglu" and c.chance(0.5) else ()}
    got = activate(c.there(h), layout=None if offsets is None else Offsets(offsets.to(c.device)), fmt=fmt,
                   bias=None if bias is None else c.there(bias), backend=c.kernel("activate"), **options)
    narrow = fmt is not None and fmt.scaled
    want = reference_activate.activate(h, bias=bias, offsets=offsets, fmt=fmt if narrow else None, **options)
    x, y = (t if isinstance(t, Tensor) else t.dequantize() for t in (got, want))
    live = slice(0, rows) if offsets is None else slice(int(offsets[0]), int(offsets[-1]))
    if fmt is not None and narrow:     # a scale may fall to either side of a rounding: its block is one step off
        step = {"e4m3": 0.14, "e5m2": 0.27, "e2m1": 0.55}[fmt.element]
        c.near(f"{fmt.name} {tuple(h.shape)} {dtype} {options}", x[live], y[live], step, 2e-3 if fmt.element != "e2m1" else 0.1)
    else:
        c.near(f"{tuple(h.shape)} {dtype} {options} {bias is not None}", x[live], y[live], 2e-5 if dtype == torch.float32 else 9e-3,
               1e-6)


def _activate_both(c: Call) -> None:
    rows, inter = c.pick((1, 5, 33, 128, 300)), c.pick(WIDTHS)
    fmt, dtype = c.pick((FP8_1x128, FP8_ROW, FP8_TENSOR, FP8_1x128.with_element("e5m2"))), c.pick(DTYPES)
    h, dy = c.floats(rows, 2 * inter, dtype=dtype, wild=False), c.floats(rows, inter, dtype=dtype, wild=False)
    offsets = _offsets(c, c.pick((1, 2, 9)), rows)
    kind, back = c.pick(("swiglu", "swiglu_oai")), c.chance(0.5)
    scale = torch.tensor([0.02]) if fmt is FP8_TENSOR and c.chance(0.5) else None
    amax = torch.zeros(1) if fmt is FP8_TENSOR and c.chance(0.5) else None
    there = Offsets(offsets.to(c.device))

    def call(h: Tensor, dy: Tensor, at: Offsets, amax: Tensor | None, backend: str | None) -> Any:
        own = {"activation": kind, "scale": None if scale is None else scale.to(h.device), "amax": amax, "backend": backend}
        return activate_backward(h, dy, at, fmt, **own) if back else activate_both(h, at, fmt, **own)

    where = None if amax is None else amax.clone().to(c.device)
    backend = None if c.device.type == "cpu" or c.chance(0.6) else c.pick(("triton", "gluon_sm90"))
    got = call(c.there(h), c.there(dy), there, where, backend)
    want = call(h, dy, Offsets(offsets), amax, "reference")
    what = f"{fmt.name} {tuple(h.shape)} {dtype} {offsets.tolist()} {kind} back {back} scale {scale is not None}"
    live, end = slice(int(offsets[0]), int(offsets[-1])), int(want.layout.offsets[-1])
    c.same(f"{what} layout", got.layout.offsets, want.layout.offsets)
    step = 0.27 if fmt.element == "e5m2" else 0.14
    c.near(f"{what} rows", got.rows.dequantize()[live], want.rows.dequantize()[live], step, 4e-3)
    c.near(f"{what} columns", got.columns.dequantize()[:, :end], want.columns.dequantize()[:, :end], step, 4e-3)
    if amax is not None and where is not None:
        c.near(f"{what} amax", where, amax, 0.01)


def _combine(c: Call) -> None:
    cpu, there, _ = _routing(c)
    n, dtype = c.pick(WIDTHS), c.pick(DTYPES)
    y = c.floats(cpu.row_map.numel(), n, dtype=dtype, wild=False)
    y[int(cpu.offsets[-1]):] = float("nan")
    weights = torch.rand(cpu.num_tokens, cpu.top_k, generator=c.generator)
    bias = c.floats(cpu.num_experts, n, wild=False) if c.chance(0.4) else None
    add = c.floats(cpu.num_tokens, n, dtype=c.pick(DTYPES), wild=False) if c.chance(0.4) else None
    out_dtype = c.pick((None, *DTYPES))
    guard = GuardedView((cpu.num_tokens, n), out_dtype or dtype, c.device, c.pick(STORES)) if c.chance(0.5) else None
    got = combine(c.there(y), there, c.there(weights), bias=None if bias is None else c.there(bias),
                  add=None if add is None else c.there(add), out_dtype=out_dtype, out=None if guard is None else guard.tensor,
                  backend=c.kernel("combine"))
    want = reference_route.combine(y, cpu, weights, bias=bias, add=add, out_dtype=torch.float32)
    c.near(f"{tuple(y.shape)} {dtype} of {cpu.num_experts} by {cpu.top_k} to {out_dtype}", got, want,
           {torch.float32: 1e-5, torch.float16: 1e-3}.get(out_dtype or dtype, 8e-3), 1e-6)
    if guard is not None:
        c.found += [f"combine {f}" for f in guard.faults()]


def _routed(c: Call) -> None:
    cpu, there, ids = _routing(c)
    experts, top_k = cpu.num_experts, cpu.top_k
    fmt = c.pick((MXFP4, MXFP4, MXFP8))
    a_fmt = c.pick((BF16, BF16, BF16, MXFP8, FP8_1x128, MXFP4, FP16, FP8_ROW))
    act = c.pick((None, None, "swiglu", "swiglu_oai"))
    k, n = c.pick((32, 64, 96, 128, 160, 256, 320, 512, 640)), 2 * c.pick((4, 8, 31, 32, 36, 64, 96, 100, 128, 160, 300))
    by_token = c.chance(0.5)
    x = c.floats(cpu.num_tokens if by_token else cpu.row_map.numel(), k, wild=False).bfloat16()
    a = (x if a_fmt is BF16 else x.half() if a_fmt is FP16 else reference_quantize.quantize(x, a_fmt))
    w = reference_quantize.quantize(c.floats(experts, n, k, wild=False).bfloat16(), fmt)
    pair = c.pick(("halves", "interleaved")) if act and c.chance(0.7) else ""
    plain = c.chance(0.3) or (act is not None and not pair)
    combined = c.chance(0.4)
    out_n = n // 2 if act else n
    bias = c.floats(experts, n, dtype=c.pick(DTYPES), wild=False) if c.chance(0.5) else None
    weights = torch.rand(cpu.num_tokens * top_k, generator=c.generator) if combined or c.chance(0.3) else None
    add = c.floats(cpu.num_tokens, out_n, dtype=c.pick(DTYPES), wild=False) if combined and c.chance(0.4) else None
    block = c.pick((0, 8, 16, 64))
    a_div = top_k if by_token else 1
    out_dtype = c.pick((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32))
    rows = cpu.num_tokens if combined else cpu.num_tokens * top_k
    guard = GuardedView((rows, out_n), out_dtype, c.device, c.pick(STORES))

    def call(device: torch.device, backend: str | None, out: Tensor | None, packed: bool) -> Tensor:
        own = cpu if device.type == "cpu" else there
        layout: Any = own.layout
        slots: dict[str, Any] = {"row_map": own.row_map, "top_k": top_k, "a_div": a_div}
        if block:
            r = moe_align_block_size(ids, block, experts, a_div=a_div)
            sorted_ids, expert_ids, posted = (t.to(device) for t in (r.sorted_token_ids, r.expert_ids, r.num_tokens_post_padded))
            layout = Routed(sorted_ids, expert_ids, posted, r.num_slots, top_k, block, a_div)
            slots = {}
        move: Callable[[Tensor], Tensor] = (lambda t: t) if out is None else c.there
        left: Any = move(a) if isinstance(a, Tensor) else ScaledTensor(move(a.data), a.to(device).scale, a.format)
        right: Any = w.to(device)
        if packed:
            right = prepack(right, pair=pair, activations=c.pick(("bf16", "fp8")) if fmt is MXFP4 else "bf16")
        return routed_gemm(left, right, layout, bias=None if bias is None else bias.to(device), activation=act,
                           interleaved=pair == "interleaved", routing_weight=None if weights is None else weights.to(device),
                           combine=combined, add=None if add is None else move(add), out=out, out_dtype=out_dtype if out is not None
                           else torch.float32, zero_padding=True, backend=backend, **slots)

    call(c.device, c.kernel("routed_gemm") if c.chance(0.7) else None, guard.tensor, not plain)
    want = call(torch.device("cpu"), "reference", None, False)
    what = (f"{a_fmt.name} x {fmt.name} {'plain' if plain else 'packed ' + pair} {cpu.num_tokens}x{k} of {experts} by {top_k}, "
            f"n {n} {act} combine {combined} block {block} {out_dtype}")
    c.near(what, guard.tensor, want, {torch.float32: 1e-3, torch.float16: 2e-3}.get(out_dtype, 1e-2), 2e-3)
    c.found += [f"{what}: {f}" for f in guard.faults()]


OPS: dict[str, Callable[[Call], None]] = {
    "quantize": _quantize, "quantize_both": _quantize_both, "route": _route, "sort": _sort, "gather": _gather,
    "activate": _activate, "activate_both": _activate_both, "combine": _combine, "routed": _routed,
    "experts": fuzz_layer.run, **fuzz_compat.OPS, **{op: partial(fuzz_training.run, op) for op in fuzz_training.OPS}}


def run(op: str, seed: int, device: torch.device) -> list[str]:
    """What is wrong with the call of this name and seed."""
    c = Call(op, seed, device)
    with torch.no_grad():
        OPS[op](c)
    return c.found

