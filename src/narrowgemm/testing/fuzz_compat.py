"""Random calls of other libraries' names for `fuzz_steps`, against the native reference on the CPU.

What is drawn is how a caller's tensors differ from ours: scales of every layout and dtype, FP4 payloads of every dtype, operands
that lie the other way, weights in others' orders, flat buffers, routing that others sorted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..compat import deep_gemm
from ..compat.aiter import grouped_gemm_mxfp8, moe_sorting, mxfp8_gemv, shuffle_scale_a16w4, shuffle_weight, shuffle_weight_a16w4
from ..compat.flydsl import (
    compile_a16w4_moe_gemm2,
    compile_grouped_gemm_blockscale_contiguous,
    compile_grouped_gemm_blockscale_masked,
)
from ..compat.torch_scaled import scaled_grouped_mm
from ..formats import BF16, FP8_ROW, FP8_TENSOR, MXFP4, MXFP8, Format, FP8_1x128, FP8_128x128, ScaledTensor
from ..layouts import Contiguous, KGrouped, Layout, Masked, Psum
from ..ops.gemm import gemm
from ..ops.grouped import grouped_gemm
from ..ops.route import moe_align_block_size
from ..ops.routed import routed_gemm
from ..ops.wgrad import grouped_gemm_wgrad
from ..reference import quantize as reference
from ..scales import mn_major_tma_aligned, pack_ue8m0
from . import fuzz_convert
from .fuzz_call import STORES, Call
from .fuzz_inputs import GuardedView, Store, stored

RELATIVE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-3}
OF_ROW = 2e-3       # what FP8 tensor cores leave of a sum
E8M0 = getattr(torch, "float8_e8m0fnu", torch.uint8)
X2 = getattr(torch, "float4_e2m1fn_x2", torch.int8)
MANY = (8, 64, 72, 128, 136, 256, 384, 576)
DEEP = (128, 256, 384, 512, 1024)
ROWS = (1, 2, 5, 16, 33, 64, 100, 128, 200, 300)


def _operand(c: Call, fmt: Format, *shape: int) -> ScaledTensor:
    x = torch.randn(shape, generator=c.generator) * c.pick((1.0, 1.0, 2.0**-4, 2.0**3))     # products stay inside FP16
    return reference.quantize(x.bfloat16(), fmt) if fmt.scaled else ScaledTensor(x.bfloat16(), None, fmt)


def _scales(c: Call, x: ScaledTensor) -> Tensor:
    """In some layout and dtype that DeepGEMM's callers have."""
    assert x.scale is not None
    scale = x.scale
    kinds: list[Callable[[Tensor], Tensor]] = [lambda s: s, mn_major_tma_aligned, lambda s: stored(s, Store(3, 1)),
                                               lambda s: s.mT.contiguous().mT]
    if scale.dtype == torch.uint8:
        if x.format.group[0] == 1:
            kinds += [pack_ue8m0, lambda s: mn_major_tma_aligned(pack_ue8m0(s))]
        kinds += [lambda s: s.view(E8M0)]
    made: Tensor = c.pick(kinds)(scale.to(c.device))
    if made.dtype != torch.int32 and made.shape[-1] != made.shape[-2] and c.chance(0.2):
        made = made.mT.contiguous()
    return made


def _four(c: Call, data: Tensor) -> Tensor:
    kind = c.pick((torch.int8, torch.int32, X2))
    return data.view(kind) if kind != torch.int32 or data.shape[-1] % 4 == 0 else data.view(torch.int8)


def _pair(c: Call, x: ScaledTensor, turned: bool = False) -> tuple[Tensor, Tensor]:
    """(payload, scales) on the device; turned: the payload lies the other way, and both are given as they lie."""
    data = x.data.to(c.device)
    if x.format.element == "e2m1":
        return _four(c, stored(data, Store(0, c.pick((0, 16))))), _scales(c, x)
    if turned:
        assert x.scale is not None
        return stored(data.mT.contiguous(), c.pick(STORES[:3])), x.scale.to(c.device).mT.contiguous()
    return stored(data, c.pick(STORES)), _scales(c, x)


def _layout(c: Call, groups: int, rows: int) -> tuple[Layout, int, tuple[int, ...]]:
    """(layout on the CPU, rows of A, leading shape of A)."""
    kind = c.pick(("contiguous", "psum", "masked"))
    sizes = [c.pick((0, 1, 7, 33, 128, 130)) if rows > 1 else c.pick((0, 1)) for _ in range(groups)]
    if kind == "masked":
        most = c.pick((max(1, *sizes), 128, 256))
        most = max(most, *sizes)
        return Masked(torch.tensor(sizes, dtype=torch.int32), c.pick((0, 1, 64))), most, (groups, most)
    starts, at = [], 0
    ends = []
    for size in sizes:
        starts.append(at)
        ends.append(at + size)
        at = -(-ends[-1] // 128) * 128
    total = max(at, 128)
    if kind == "psum":
        return Psum(torch.tensor(ends, dtype=torch.int32), 128), total, (total,)
    ids = torch.full((total,), -1, dtype=torch.int32)
    for g, (start, end) in enumerate(zip(starts, ends)):
        ids[start:end] = g
    return Contiguous(ids), total, (total,)


def _compare(c: Call, what: str, guard: GuardedView, want: Tensor, call: Callable[[], Any], base: Tensor | None = None) -> None:
    """Twice the same bits, near what is wanted, nothing beside; now and then from a CUDA graph, too."""
    first = None
    for _ in range(2):
        guard.reset()
        if base is not None:
            guard.tensor.copy_(base)
        call()
        got = guard.tensor.cpu().clone(memory_format=torch.contiguous_format)
        if first is not None:
            c.same(f"{what}: again", got, first)
        first = got
        c.found += [f"{what}: {f}" for f in guard.faults()]
    assert first is not None
    c.near(what, first, want, RELATIVE[first.dtype], OF_ROW)
    if c.device.type == "cuda" and c.chance(0.3) and "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        guard.reset()
        if base is not None:
            guard.tensor.copy_(base)
        graph.replay()
        c.same(f"{what}: a graph", guard.tensor.cpu().clone(memory_format=torch.contiguous_format), first)
        c.found += [f"{what}: a graph: {f}" for f in guard.faults()]


def _deep_gemm(c: Call) -> None:
    n, k, groups = c.pick(MANY), c.pick(DEEP), c.pick((1, 2, 5, 8))
    out_dtype = c.pick((torch.bfloat16, torch.bfloat16, torch.float32, torch.float16))
    four = c.chance(0.3)
    e8m0 = not four and c.chance(0.4)
    fa, fb = FP8_1x128, MXFP4 if four else c.pick((FP8_128x128, FP8_128x128, FP8_1x128))
    if e8m0:
        fa, fb = fa.with_scale("e8m0"), fb.with_scale("e8m0")
    elif not four and c.chance(0.2):
        fa = fa.with_element("e5m2")
    elif not four and c.chance(0.2):
        fa = fb = MXFP8
    recipes: dict[str, Any] = {}
    if MXFP8 in (fa, fb) or four:
        recipes = {"recipe_a": fa.group, "recipe_b": (1, 32)}
    sms = c.pick((0, 0, 0, 1, 7)) if c.device.type == "cuda" else 0
    before = deep_gemm.get_num_sms() if sms else 0
    try:
        if sms:
            deep_gemm.set_num_sms(sms)
        _deep_gemm_call(c, c.chance(0.4), n, k, groups, fa, fb, out_dtype, recipes)
    finally:
        if sms:
            deep_gemm.set_num_sms(before)


def _deep_gemm_call(c: Call, dense: bool, n: int, k: int, groups: int, fa: Format, fb: Format, out_dtype: torch.dtype,
                    recipes: dict[str, Any]) -> None:
    what = f"{fa.name} x {fb.name} n {n} k {k} {out_dtype}"
    four = fb is MXFP4
    how = c.pick(STORES[:4])
    if dense:
        m = c.pick(ROWS)
        a, b = _operand(c, fa, m, k), _operand(c, fb, n, k)
        turn_a, turn_b = (not four and not recipes and c.chance(0.3) for _ in range(2))
        name = f"fp8_gemm_{'t' if turn_a else 'n'}{'n' if turn_b else 't'}"
        guard = GuardedView((m, n), out_dtype, c.device, how)
        base = torch.randn(m, n, generator=c.generator).to(out_dtype) if c.chance(0.3) else None
        want = torch.zeros(m, n) if base is None else base.float().clone()
        gemm(a, b, out=want, accumulate=True, backend="reference")
        given = _pair(c, a, turn_a), _pair(c, b, turn_b)
        _compare(c, f"{what} {name} m {m} c {base is not None} scales {[tuple(x[1].shape) for x in given]}", guard, want,
                 lambda: getattr(deep_gemm, name)(*given, guard.tensor, c=None if base is None else guard.tensor, **recipes), base)
        return
    layout, rows, lead = _layout(c, groups, c.pick(ROWS))
    a, b = _operand(c, fa, *lead, k), _operand(c, fb, groups, n, k)
    turn_b = not four and not recipes and layout.kind != "masked" and c.chance(0.3)
    guard = GuardedView((*lead, n), out_dtype, c.device, how)
    base = torch.full((*lead, n), 3.0, dtype=out_dtype)
    keep = layout.kind == "psum" and c.chance(0.5)
    want = base.float().clone()
    grouped_gemm(a, b, layout, out=want, zero_padding=not keep, backend="reference")
    given, index = (_pair(c, a), _pair(c, b, turn_b)), layout.index.to(c.device)
    what = f"{what} {layout.kind} {layout.index.tolist() if layout.kind != 'contiguous' else rows} turned {turn_b} keep {keep}"
    if isinstance(layout, Masked):
        _compare(c, what, guard, want, lambda: deep_gemm.m_grouped_fp8_gemm_nt_masked(
            *given, guard.tensor, index, layout.expected_m, **recipes), base)
        return
    call = deep_gemm.m_grouped_fp8_gemm_nn_contiguous if turn_b else deep_gemm.m_grouped_fp8_gemm_nt_contiguous
    psum = layout.kind == "psum"
    _compare(c, what, guard, want, lambda: call(*given, guard.tensor, index, use_psum_layout=psum, ensure_zero_padding=not keep,
                                                **recipes), base)


def _k_grouped(c: Call) -> None:
    m, n = c.pick((8, 64, 128, 192)), c.pick((8, 64, 136, 256))
    ks = [128 * c.pick((0, 1, 1, 2, 5)) for _ in range(c.pick((1, 2, 4)))]
    if not sum(ks):
        ks[0] = 128
    total = sum(ks)
    a, b = _operand(c, FP8_1x128, m, total), _operand(c, FP8_1x128, n, total)
    lens = torch.tensor(ks, dtype=torch.int32)
    offsets = torch.nn.functional.pad(lens.cumsum(0), (1, 0))
    guard = GuardedView((len(ks), m, n), torch.float32, c.device, Store())
    base = torch.randn(len(ks), m, n, generator=c.generator) if c.chance(0.5) else None
    want = torch.zeros(len(ks), m, n) if base is None else base.clone()
    grouped_gemm_wgrad(a, b, KGrouped(offsets), out=want, accumulate=True, backend="reference")
    assert a.scale is not None and b.scale is not None
    tn = c.chance(0.5)
    if tn:
        pairs = [(x.data.mT.contiguous().to(c.device), x.scale.mT.contiguous().to(c.device)) for x in (a, b)]   # type: ignore[union-attr]
    else:
        pairs = [(torch.cat([part.contiguous().view(torch.uint8).flatten() for part in x.data.split(ks, 1)])
                  .view(x.data.dtype).to(c.device), _scales(c, x)) for x in (a, b)]
    call = deep_gemm.k_grouped_fp8_gemm_tn_contiguous if tn else deep_gemm.k_grouped_fp8_gemm_nt_contiguous
    there = lens.to(c.device)
    _compare(c, f"m {m} n {n} {ks} tn {tn} c {base is not None}", guard, want,
             lambda: call(pairs[0], pairs[1], guard.tensor, ks, there, None if base is None else guard.tensor), base)


def _aiter(c: Call) -> None:
    n, k, out_dtype = c.pick(MANY), c.pick((32, 96, 128, 160, 256, 512)), c.pick((torch.bfloat16, torch.float16, torch.float32))
    backend = "reference" if c.device.type == "cpu" else None
    if c.chance(0.4):
        m = c.pick((1, 2, 7, 16, 33, 64, 100))
        x, w = _operand(c, MXFP8, m, k), _operand(c, MXFP8, n, k)
        where = [t.to(c.device) for t in (x.data, x.scale, w.data, w.scale) if t is not None]
        if c.chance(0.5):
            where[0], where[2] = where[0].view(torch.uint8), where[2].view(torch.uint8)
        got = [mxfp8_gemv(*where, out_dtype, backend=backend) for _ in range(2)]       # type: ignore[arg-type,misc]
        want = gemm(x, w, out_dtype=torch.float32, backend="reference")
        what = f"gemv {m}x{n}x{k} {out_dtype}"
    else:
        experts, block, top_k = c.pick((1, 2, 8, 33)), c.pick((1, 4, 16, 64)), c.pick((1, 2, 4))
        tokens, down = c.pick((1, 2, 7, 33, 64, 300)), c.chance(0.5)
        ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=c.generator, dtype=torch.int32)
        a = _operand(c, MXFP8, tokens * (top_k if down else 1), k)
        w = _operand(c, MXFP8, experts, n, k)
        weight = torch.rand(tokens * top_k, generator=c.generator) if c.chance(0.5) else None
        routed = moe_align_block_size(ids, block, experts, a_div=1 if down else top_k)
        want = routed_gemm(a, w, routed, routing_weight=weight, out_dtype=torch.float32, zero_padding=True, backend="reference")
        where = [t.to(c.device) for t in (a.data, a.scale, w.data, w.scale, routed.sorted_token_ids, routed.expert_ids,
                                          routed.num_tokens_post_padded) if t is not None]
        by = None if weight is None else weight.to(c.device)
        rest: tuple[Any, ...] = (tokens * top_k, top_k, block, out_dtype, 1 if down else top_k, by)
        got = [grouped_gemm_mxfp8(*where, *rest, backend=backend) for _ in range(2)]  # type: ignore[arg-type]
        what = f"{tokens}x{n}x{k} of {experts} by {top_k} block {block} down {down} weight {weight is not None} {out_dtype}"
    c.say(f"{what}: returned None", got[0] is None or got[1] is None)
    if got[0] is not None and got[1] is not None:
        c.near(what, got[0], want, RELATIVE[out_dtype], OF_ROW)
        c.same(f"{what}: again", got[1], got[0].cpu())


def _moe_sorting(c: Call) -> None:
    """On the device as on the CPU, bit for bit; and FlyDSL's stage 2 over it."""
    experts, top_k, tokens = c.pick((1, 2, 5, 8)), c.pick((1, 2, 4)), c.pick((1, 3, 16, 40, 129))
    block = c.pick((16, 32, 64))
    inter, model = c.pick((256, 512)), c.pick((64, 128, 288))
    ids = torch.randint(0, experts, (tokens, top_k), generator=c.generator, dtype=torch.int32)
    weights = torch.rand(tokens, top_k, generator=c.generator)
    where = ids.to(c.device), weights.to(c.device)
    want = moe_sorting(ids, weights, experts, model, torch.bfloat16, block)
    got = moe_sorting(*where, experts, model, torch.bfloat16, block)
    what = f"{tokens} of {experts} by {top_k} block {block} {model}x{inter}"
    live = int(want[3][0])
    for name, x, y, end in zip(("ids", "weights", "experts", "valid", "buffer"), got, want, (live, live, live // block, 2, tokens)):
        c.same(f"{what}: {name}", x[:end], y[:end])
    a = torch.randn(tokens * top_k, inter, generator=c.generator).bfloat16()
    w = _operand(c, MXFP4, experts, model, inter)
    assert w.scale is not None
    bias = torch.randn(experts, model, generator=c.generator) if c.chance(0.5) else None
    kind, accumulate = c.pick((("bf16", torch.bfloat16), ("f16", torch.float16))), c.chance(0.6)
    launch = compile_a16w4_moe_gemm2(model_dim=model, inter_dim=inter, experts=experts, topk=top_k, tile_m=block, tile_n=64,
                                     tile_k=128, doweight_stage2=True, out_dtype=kind[0], enable_bias=bias is not None,
                                     accumulate=accumulate)
    guard = GuardedView((tokens if accumulate else tokens * top_k, model), kind[1], c.device, Store())
    product = torch.einsum("sk,snk->sn", a.float(), w.dequantize()[ids.flatten().long()])
    product = (product + (0 if bias is None else bias[ids.flatten().long()])) * weights.view(-1, 1)
    expected = product.view(tokens, top_k, model).sum(1) if accumulate else product
    if not accumulate:      # a slot has its own row, even where an expert is chosen twice
        expected = product
    on = [t.to(c.device) for t in (a, shuffle_weight_a16w4(w.data, 16, False),
                                   shuffle_scale_a16w4(w.scale.reshape(experts * model, -1), experts, False))]
    there = None if bias is None else bias.to(c.device)
    _compare(c, f"{what} {kind[0]} accumulate {accumulate} bias {bias is not None}", guard, expected,
             lambda: launch(guard.tensor, *on, got[0], got[2], got[1], got[3], there, tokens, model, inter, got[2].numel(), None),
             torch.zeros(guard.tensor.shape))


def _flydsl(c: Call) -> None:
    n, k, groups = 128 * c.pick((1, 2, 3)), c.pick(DEEP), c.pick((1, 2, 5))
    kind, e8m0 = c.pick((("bf16", torch.bfloat16), ("f16", torch.float16))), c.chance(0.4)
    layout, rows, lead = _layout(c, groups, c.pick(ROWS))
    if isinstance(layout, Psum):
        return
    fa, fb = (f.with_scale("e8m0") if e8m0 else f for f in (FP8_1x128, FP8_128x128))
    a, b = _operand(c, fa, *lead, k), _operand(c, fb, groups, n, k)
    assert a.scale is not None and b.scale is not None
    guard = GuardedView((*lead, n), kind[1], c.device, Store())
    base = torch.full((*lead, n), 3.0, dtype=kind[1])
    want = base.float().clone()
    grouped_gemm(a, b, layout, out=want, zero_padding=False, backend="reference")
    make = compile_grouped_gemm_blockscale_masked if layout.kind == "masked" else compile_grouped_gemm_blockscale_contiguous
    tiles = c.pick(({}, {}, {"tile_m": 64}))
    launch = make(n=n, k=k, num_groups=groups, out_dtype=kind[0], **tiles)
    on = [t.to(c.device) for t in (a.data, shuffle_weight(b.data), a.scale.mT.contiguous(), b.scale, layout.index)]
    if c.chance(0.5):
        on = [t.view(torch.int8).flatten() if t.dtype == torch.float8_e4m3fn else t.flatten() for t in on]
    _compare(c, f"{layout.kind} {rows}x{n}x{k} of {groups} {kind[0]} e8m0 {e8m0} {tiles}", guard, want,
             lambda: launch(guard.tensor, *on, rows, n, k, groups, None), base)


def _scaled_grouped_mm(c: Call) -> None:
    """torch's own name, with operands that lie either way."""
    m, n, k, groups = c.pick((16, 64, 128)), c.pick((16, 64, 144)), c.pick((128, 256, 512)), c.pick((1, 3, 4))
    fa, fb = c.pick(((FP8_ROW, FP8_ROW), (FP8_TENSOR, FP8_TENSOR), (FP8_1x128, FP8_128x128), (MXFP8, MXFP8), (FP8_TENSOR, FP8_ROW)))
    shape = c.pick(("rows", "columns", "k", "stacked"))
    if shape == "columns" and fb.group[0] not in (0, 1):
        fb = fa
    if shape == "k" and fa.group[1] and fa.group != (1, 128):
        fa = fb = FP8_ROW
    if shape == "k":
        fb = fa
    cuts = sorted(c.rng.randrange(0, {"rows": m, "columns": n, "k": k, "stacked": 1}[shape] + 1) for _ in range(groups - 1))
    ends = torch.tensor([*cuts, {"rows": m, "columns": n, "k": k, "stacked": 1}[shape]], dtype=torch.int32)
    a = _operand(c, fa, *((groups, m, k) if shape in ("columns", "stacked") else (m, k)))
    b = _operand(c, fb, *((groups, n, k) if shape in ("rows", "stacked") else (n, k)))
    wide_a, wide_b = a.dequantize(), b.dequantize()
    bounds = [0, *ends.tolist()]
    if shape == "rows":
        want = torch.cat([wide_a[s:e] @ wide_b[g].T for g, (s, e) in enumerate(zip(bounds, bounds[1:]))])
    elif shape == "columns":
        want = torch.cat([wide_a[g] @ wide_b[s:e].T for g, (s, e) in enumerate(zip(bounds, bounds[1:]))], 1)
    elif shape == "k":
        want = torch.stack([wide_a[:, s:e] @ wide_b[:, s:e].T for s, e in zip(bounds, bounds[1:])])
    else:
        want = wide_a @ wide_b.mT
    assert a.scale is not None and b.scale is not None

    def flat(x: ScaledTensor) -> Tensor:
        assert x.scale is not None
        scale = x.scale.reshape(-1)[:1] if x.format.group == (0, 0) and x.scale.dim() == 2 else \
            x.scale.reshape(-1) if x.format.group == (0, 0) else x.scale.squeeze(-1) if x.format.group == (1, 0) else x.scale
        return scale.to(c.device)

    data_b = stored(b.data.to(c.device), c.pick(STORES[:3])).mT
    if c.chance(0.4):       # N contiguous
        data_b = b.data.to(c.device).mT.contiguous()
    dtype = c.pick((torch.bfloat16, torch.float32))
    what = f"{shape} {fa.name} x {fb.name} {m}x{n}x{k} {ends.tolist()} {dtype}"
    got = scaled_grouped_mm(stored(a.data.to(c.device), c.pick(STORES[:3])), data_b, flat(a), fa.scaling_type, flat(b),
                            fb.scaling_type, offs=None if shape == "stacked" else ends.to(c.device), output_dtype=dtype)
    c.say(f"{what}: {got.dtype}", got.dtype != dtype)
    c.near(what, got, want, RELATIVE[dtype], OF_ROW)


def _bf16_names(c: Call) -> None:
    """DeepGEMM's BF16 names, ours where there is no real DeepGEMM."""
    from ..compat.deep_gemm import bf16

    n, k, groups = c.pick(MANY), c.pick((*DEEP, 72)), c.pick((1, 2, 5))
    layout, rows, lead = _layout(c, groups, c.pick(ROWS))
    a, b = _operand(c, BF16, *lead, k), _operand(c, BF16, groups, n, k)
    out_dtype = c.pick((torch.bfloat16, torch.float32))
    guard = GuardedView((*lead, n), out_dtype, c.device, c.pick(STORES[:4]))
    base = torch.full((*lead, n), 3.0, dtype=out_dtype)
    want = base.float().clone()
    grouped_gemm(a, b, layout, out=want, backend="reference")
    x, w, index = c.there(a.data), c.there(b.data), layout.index.to(c.device)
    what = f"bf16 {layout.kind} {rows}x{n}x{k} of {groups} {out_dtype}"
    if isinstance(layout, Masked):
        call: Callable[[], Any] = lambda: bf16.m_grouped_bf16_gemm_nt_masked(x, w, guard.tensor, index, layout.expected_m)  # noqa: E731
    elif c.chance(0.5):
        call = lambda: bf16.m_grouped_bf16_gemm_nt_contiguous(      # noqa: E731
            x, w, guard.tensor, index, use_psum_layout=layout.kind == "psum")
    else:
        call = lambda: bf16.m_grouped_bf16_gemm_nn_contiguous(      # noqa: E731
            x, w.mT, guard.tensor, index, use_psum_layout=layout.kind == "psum")
    _compare(c, what, guard, want, call, base)


OPS: dict[str, Callable[[Call], None]] = {
    "convert": fuzz_convert.run, "deep_gemm": _deep_gemm, "k_grouped": _k_grouped, "aiter": _aiter, "moe_sorting": _moe_sorting,
    "flydsl": _flydsl, "scaled_grouped_mm": _scaled_grouped_mm, "bf16_names": _bf16_names}
