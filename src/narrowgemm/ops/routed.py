"""`routed_gemm`: each slot's token times its expert, with what an expert layer does around it; products with packed weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..arch import detect
from ..errors import Unsupported, expect
from ..formats import ScaledTensor, dtype_name
from ..kernels.operands import Operands
from ..layouts import ROWS, Layout, Masked, Offsets, Routed, check_index
from ..prepack import PackedWeight
from ..problem import Config, Epilogue, Operand, Plan, Problem, bucket
from ..reference.routed import ALPHA, LIMIT
from ..runtime import dispatch, env
from ..runtime.launch import run
from . import common, traced, validate_data
from .common import Options
from .plan_cache import PlanCache, empty_of, signature_of
from .recall import Signature

ACTIVATIONS = ("swiglu", "swiglu_oai")
FLOATS = common.OUT_DTYPES
_plans = PlanCache()


@dataclass(slots=True, eq=False)
class Slots:
    """What `routed_gemm` has beside A, B and out, named as in `kernels.operands.Operands`. Counts of -1: as many as A has rows."""

    slots: Tensor | None
    num_slots: int
    top_k: int
    positions: int
    experts: Tensor | None = None
    posted: Tensor | None = None
    block_m: int = 1
    bias: Tensor | None = None
    weight: Tensor | None = None
    add: Tensor | None = None


def routed_gemm(a: ScaledTensor | Tensor, b: PackedWeight | ScaledTensor | Tensor, layout: Routed | Offsets, *,
                row_map: Tensor | None = None, top_k: int | None = None, a_div: int | None = None, bias: Tensor | None = None,
                activation: str | None = None, alpha: float = ALPHA, limit: float = LIMIT, interleaved: bool = False,
                routing_weight: Tensor | None = None, combine: bool = False, add: Tensor | None = None,
                out: Tensor | None = None, out_dtype: torch.dtype | None = None, zero_padding: bool = False,
                backend: str | None = None, config: Config | None = None, max_sms: int = 0, validate: str | None = None,
                on_unsupported: str = "portable", workspace: Tensor | None = None) -> Tensor:
    """`out[slot] = routing_weight[slot] * activation(A[slot // a_div] . B[expert of slot]^T + bias[expert])`, in one call.

    a: `[rows, K]`, BF16 / FP16 / FP32, or a ScaledTensor whose scales belong to single rows. b: `[E, N, K]`, packed (`prepack`)
        or not.
    layout: `Routed` (which has its own `top_k` and `a_div`), or `Offsets` over positions, with
    row_map: int32 `[R]`, the slot of each position (`Routing.row_map`); None: position r is slot r. The slots are then [0, R).
    top_k, a_div: of the slots, for Offsets (default 1): a token's slots are `token * top_k + j`, row of A = slot // a_div.
    bias: `[E, N]` FP32 / BF16 / FP16, its columns in the order of the weight's rows before `prepack`; added to the sum once.
    activation: 'swiglu' (silu(gate) * up) or 'swiglu_oai' (GPT-OSS: gate at most `limit`, up within +-`limit`,
        gate * sigmoid(alpha * gate) * (up + 1)); the output has N/2 columns. How gate and up rows lie is told by the packed
        weight's `pair`; for other weights by `interleaved`: True if they alternate, False for [gate; up].
    routing_weight: FP32, one per slot (or `[T, top_k]`). combine: sum a token's `top_k` slots in FP32, in order of j.
    add: `[slots / top_k, N or N/2]` FP32 / BF16 / FP16, added to that sum (shared experts).
    out: `[slots, N or N/2]`, combine: `[slots / top_k, ...]`, BF16 / FP16 / FP32; allocated with `out_dtype` (BF16) if None.
    zero_padding: write zeros to the rows of slots that no expert computes; otherwise they are not written. combine counts them
        as 0.
    Other arguments and errors as in `gemm`. Blocks of experts out of range are skipped, and so are slots out of range.

    Contract: aiter's grouped_gemm_mxfp8 and vLLM's fused-MoE kernels (routed), FlyDSL's A16W4 stage 2 (bias, weight, combine).
    """
    a = common.as_operand(a, "a")
    b = b if isinstance(b, PackedWeight) else common.as_operand(b, "b")
    expect(isinstance(layout, Routed | Offsets), "layout", type(layout).__name__, "Routed or Offsets", error=TypeError)
    s = slots_of(layout, row_map, top_k, bias, routing_weight, add)
    a_div = layout.a_div if isinstance(layout, Routed) else 1 if a_div is None else a_div
    epilogue = epilogue_of(b, bias, activation, alpha, limit, interleaved, routing_weight, combine, add)
    if torch.compiler.is_compiling():
        s.num_slots = a.shape[0] if s.num_slots < 0 else s.num_slots
        return traced.routed_gemm(a, b, layout, row_map, s.top_k, a_div, out_shape(b, s, epilogue), out, out_dtype, backend, config,
                                  max_sms, on_unsupported, bias=bias, activation=activation, alpha=alpha, limit=limit,
                                  interleaved=interleaved, routing_weight=routing_weight, combine=combine,
                                  add=add, zero_padding=zero_padding)
    dtype = common.out_dtype_of(out, out_dtype, torch.bfloat16)
    index = layout.index
    key = (*signature(a, b, out), dtype, backend, config, max_sms, validate, on_unsupported, layout.kind, a_div, epilogue,
           zero_padding, s.num_slots, s.top_k, s.positions, s.block_m,
           *(_like(x) for x in (index, s.slots, s.experts, s.posted)), _like(s.bias, "bias"), _like(s.weight, "routing_weight"),
           _like(s.add, "add"))
    known = _plans.find(key)
    if known is None:
        plan = _routed_plan(a, b, layout, s, out, dtype, a_div, epilogue, zero_padding,
                            Options(backend, config, max_sms, validate, on_unsupported))
        known = _plans.add(key, plan, empty_of(out_shape(b, s, epilogue), dtype, a.device), validate)
    plan, memo, empty, sync = known
    if s.num_slots < 0:     # positions are slots, and rows of A
        s.num_slots = s.positions = a.shape[0]
    if sync and isinstance(layout, Offsets):
        validate_data.check_layout(layout, s.positions, groups_of(b))
    if out is None:
        out = empty.make()
    if plan is not None:
        if zero_padding and not combine:
            out.zero_()
        packed, factor, top = (b, b.factor, b.top) if isinstance(b, PackedWeight) else (None, None, None)
        run(plan, Operands(a, _plain(b), out, s.num_slots, b.shape[-2], a.shape[-1], groups_of(b), index, packed=packed,
                           factor=factor, slots=s.slots, experts=s.experts, posted=s.posted, bias=s.bias, weight=s.weight,
                           add=s.add, top=top, num_slots=s.num_slots, positions=s.positions, top_k=s.top_k, block_m=s.block_m,
                           memo=memo), workspace)
    return out


def packed_gemm(a: ScaledTensor | Tensor, b: PackedWeight, layout: Layout | None, out: Tensor | None, out_dtype: torch.dtype | None,
                accumulate: bool, options: Options, workspace: Tensor | None, zero_padding: bool = True) -> Tensor:
    """`gemm` (layout None) and `grouped_gemm` with a packed weight; see there."""
    a = common.as_operand(a, "a")
    if torch.compiler.is_compiling():
        return traced.packed_gemm(a, b, layout, out, out_dtype, accumulate, zero_padding, options)
    dtype = common.out_dtype_of(out, out_dtype, torch.bfloat16)
    index, alignment = (None, 1) if layout is None else (layout.index, layout.alignment)
    key = (*signature(a, b, out), dtype, accumulate, zero_padding, options, _like(index),
           None if layout is None else (layout.kind, layout.expected_m, alignment))
    known = _plans.find(key)
    if known is None:
        known = _plans.add(key, packed_plan(a, b, layout, out, dtype, accumulate, options, zero_padding),
                           empty_of((*a.shape[:-1], b.n), dtype, a.device), options.validate)
    plan, memo, empty, sync = known
    if sync:
        if layout is not None:
            validate_data.check_layout(layout, a.shape[-2], b.groups)
        validate_data.check_scales(a, *(() if b.plain is None else (b.plain,)))
    if out is None:
        out = empty.make()
    if plan is not None:
        folded, rest = (None, None) if b.folded is None else (b.folded.data, b.folded.rest)
        run(plan, Operands(a, _plain(b), out, a.shape[-2], b.n, b.k, b.groups, index, alignment, packed=b, factor=b.factor,
                           top=b.top, folded=folded, folded_rest=rest, memo=memo), workspace)
    return out


# ---------------------------------------------------------------- what a call is
def slots_of(layout: Routed | Offsets, row_map: Tensor | None, top_k: int | None, bias: Tensor | None,
             weight: Tensor | None, add: Tensor | None) -> Slots:
    """The call's slots. Checks what its own arithmetic needs; the rest is checked once a signature."""
    if weight is not None:
        common.check_kinds(routing_weight=weight)
        choices = layout.top_k if isinstance(layout, Routed) else top_k or 1
        expect(weight.dim() == 1 or (weight.dim() == 2 and weight.shape[1] == choices), "routing_weight, shape",
               tuple(weight.shape), f"one a slot: [slots], or [tokens, {choices}]")
        weight = weight.reshape(-1)
    if isinstance(layout, Routed):
        expect(row_map is None, "row_map of a Routed layout", "a tensor", "None: the layout has its slots")
        expect(top_k in (None, layout.top_k), "top_k", top_k, f"the layout's, {layout.top_k}")
        return Slots(layout.sorted_token_ids, layout.num_slots, layout.top_k, layout.sorted_token_ids.numel(), layout.expert_ids,
                     layout.num_tokens_post_padded, layout.block_m, bias, weight, add)
    top_k = 1 if top_k is None else top_k
    expect(isinstance(top_k, int) and top_k >= 1, "top_k", top_k, "at least 1")
    if row_map is None:
        rows = -1 if weight is None else weight.numel()
        return Slots(None, rows, top_k, rows, bias=bias, weight=weight, add=add)
    check_index(row_map, "row_map", 1, (torch.int32,))
    return Slots(row_map, row_map.numel(), top_k, row_map.numel(), bias=bias, weight=weight, add=add)


def epilogue_of(b: PackedWeight | ScaledTensor, bias: Tensor | None, activation: str | None, alpha: float, limit: float,
                interleaved: bool, weight: Tensor | None, combine: bool, add: Tensor | None) -> Epilogue:
    """What is done to the sums. How gate and up rows lie is a packed weight's own business; of others `interleaved` says it."""
    expect(activation in (None, *ACTIVATIONS), "activation", repr(activation), f"None or one of {ACTIVATIONS}")
    pair = b.pair if isinstance(b, PackedWeight) else ""
    args = (float(alpha), float(limit)) if activation == "swiglu_oai" else ()
    return Epilogue(bias is not None, activation or "", args, bool(activation) and (pair == "interleaved" if pair else interleaved),
                    weight is not None, combine, add is not None)


def out_shape(b: PackedWeight | ScaledTensor, s: Slots, epilogue: Epilogue) -> tuple[int, int]:
    return (s.num_slots // s.top_k if epilogue.combine else s.num_slots, b.shape[-2] // (2 if epilogue.activation else 1))


def groups_of(b: PackedWeight | ScaledTensor) -> int:
    return b.groups if isinstance(b, PackedWeight) else b.shape[0]


def _plain(b: PackedWeight | ScaledTensor) -> ScaledTensor:
    if isinstance(b, ScaledTensor):
        return b
    return ScaledTensor(b.data, b.scale, b.format) if b.plain is None else b.plain


def _stored(b: PackedWeight | ScaledTensor) -> list[ScaledTensor | Tensor]:
    return list(b.tensors().values()) if isinstance(b, PackedWeight) else [b]


def _like(x: Tensor | None, name: str = "a tensor argument") -> tuple[object, ...] | None:
    if x is None:
        return None
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        common.check_kinds(**{name: x})
    return (x.shape, x.stride(), x.dtype, x.device, common.off_16_bytes(x))


def signature(a: ScaledTensor, b: PackedWeight | ScaledTensor, out: Tensor | None) -> Signature:
    if isinstance(b, ScaledTensor):
        return signature_of(a, b, out)
    return (a.format, _like(a.data), _like(a.scale), _like(out), b.format, b.shape, b.pair, b.prepack, _like(b.factor),
            _like(b.top), _like(b.data), _like(b.scale), *_of_folded(b), env.choice())


def _of_folded(b: PackedWeight) -> tuple[object, ...]:
    f = b.folded
    return () if f is None else (_like(f.data), _like(f.rest), f.columns, f.picks)


def _check_weights(b: PackedWeight | ScaledTensor, dims: int) -> None:
    if isinstance(b, PackedWeight):
        b.check()
        expect(len(b.shape) == dims, "b, shape", b.shape, "[E, N, K]" if dims == 3 else "[N, K]")
        expect(b.data.data_ptr() % 16 == 0 and b.scale.data_ptr() % 16 == 0, "b, alignment", "off 16 bytes", "on 16 bytes")
    else:
        common.check_operand(b, "b", "[E, N, K]", dims)


def weight_operand(b: PackedWeight | ScaledTensor) -> Operand:
    """The Problem's side of weights, packed or as they are."""
    if isinstance(b, ScaledTensor) or b.plain is not None:
        return common.operand(_plain(b))
    return Operand(b.format, "k", f"{b.prepack}:{b.pair}" if b.pair else b.prepack, "e8m0", "", folds=b.top is not None)


def _check_slots(a: ScaledTensor, layout: Routed | Offsets, s: Slots, a_div: int, epilogue: Epilogue) -> None:
    """Slots, rows of A and blocks fit each other."""
    expect(isinstance(a_div, int) and a_div >= 1, "a_div", a_div, "at least 1")
    if s.slots is None and isinstance(layout, Offsets):     # positions are slots, and rows of A
        expect(a_div == 1, "a_div without a row_map", a_div, "1: position r is row r of a")
        expect(s.num_slots in (-1, a.shape[0]), "routing_weight, length", s.num_slots, f"one a row of a, {a.shape[0]}")
        s.num_slots = s.positions = a.shape[0]
    need = -(-s.num_slots // a_div)
    expect(a.shape[0] >= need, "a, rows", a.shape[0], f"at least {need}, for {s.num_slots} slots with a_div = {a_div}")
    expect(not epilogue.combine or s.num_slots % s.top_k == 0, "slots to combine", s.num_slots, f"a multiple of top_k = {s.top_k}")
    if isinstance(layout, Routed):
        blocks = -(-s.positions // s.block_m)
        expect(layout.expert_ids.numel() >= blocks, "expert_ids, length", layout.expert_ids.numel(), f"at least {blocks}")
        expect(layout.num_tokens_post_padded.numel() >= 1, "num_tokens_post_padded, length", 0, "1")


def _check_epilogue(a: ScaledTensor, layout: Routed | Offsets, s: Slots, groups: int, n: int, shape: tuple[int, int],
                    epilogue: Epilogue) -> None:
    """Bias, routing weights and what is added fit the product and each other; all indices are on the operands' device."""
    expect(not epilogue.activation or n % 2 == 0, "N of gate and up", n, "an even number")
    if s.bias is not None:
        expect(s.bias.dtype in FLOATS, "bias, dtype", s.bias.dtype, f"one of {FLOATS}", error=TypeError)
        expect(tuple(s.bias.shape) == (groups, n) and s.bias.is_contiguous(), "bias, shape", tuple(s.bias.shape),
               f"contiguous {(groups, n)}")
    if s.weight is not None:
        expect(s.weight.dtype == torch.float32, "routing_weight, dtype", s.weight.dtype, "float32", error=TypeError)
        expect(s.weight.numel() == s.num_slots, "routing_weight, length", s.weight.numel(), f"one a slot, {s.num_slots}")
    for name, x in (("layout", layout.index), ("row_map", s.slots), ("expert_ids", s.experts), ("num_tokens_post_padded", s.posted),
                    ("bias", s.bias), ("routing_weight", s.weight), ("add", s.add)):
        expect(x is None or x.device == a.device, f"{name}, device", None if x is None else x.device, f"the operands', {a.device}")
    if s.add is not None:
        expect(s.add.dtype in FLOATS, "add, dtype", s.add.dtype, f"one of {FLOATS}", error=TypeError)
        expect(epilogue.combine, "add", "a tensor", "None without combine: it is added to a token's sum")
        expect(tuple(s.add.shape) == shape and s.add.stride(-1) == 1, "add, shape", tuple(s.add.shape), f"{shape}, contiguous rows")


def _routed_plan(a: ScaledTensor, b: PackedWeight | ScaledTensor, layout: Routed | Offsets, s: Slots, out: Tensor | None,
                 dtype: torch.dtype, a_div: int, epilogue: Epilogue, zero_padding: bool, options: Options) -> Plan | None:
    """Check the call and select its Plan; None where there is nothing to compute. Fills in the counts of `s` that were -1."""
    options.check()
    common.check_operand(a, "a", "[rows, K]", 2)
    _check_weights(b, 3)
    groups, n, k = groups_of(b), b.shape[-2], b.shape[-1]
    expect(a.device == b.device, "b, device", b.device, f"a's, {a.device}")
    expect(a.shape[-1] == k, "K of a", a.shape[-1], f"b's, {k}")
    common.check_row_scales(a)
    layout.groups(groups)
    _check_slots(a, layout, s, a_div, epilogue)
    shape = out_shape(b, s, epilogue)
    _check_epilogue(a, layout, s, groups, n, shape, epilogue)
    common.check_flags(combine=epilogue.combine, interleaved=epilogue.interleaved, zero_padding=zero_padding)
    common.check_out(out, shape, dtype, a.device, False, a, *_stored(b), *(t for t in (s.bias, s.weight) if t is not None))
    if 0 in shape:
        return None
    expect(groups > 0, "groups of b", 0, "at least one")
    problem = Problem("routed_gemm", layout.kind, bucket(s.num_slots), n, k, groups, common.operand(a), weight_operand(b),
                      rows=bucket(max(1, -(-s.num_slots // groups))), out_dtype=dtype_name(dtype), epilogue=epilogue,
                      gather=s.slots is not None, a_div=a_div, zero_padding=False, max_sms=options.max_sms,
                      positions=bucket(s.positions) if isinstance(layout, Routed) else 0)
    return _select(problem, a.device, options)


def packed_plan(a: ScaledTensor, b: PackedWeight, layout: Layout | None, out: Tensor | None, dtype: torch.dtype, accumulate: bool,
                options: Options, zero_padding: bool = True) -> Plan | None:
    """As `gemm.plan_of` (layout None) and `grouped.plan_of`, of a packed weight."""
    options.check()
    if layout is not None and layout.kind not in ROWS:
        raise Unsupported(f"grouped_gemm has no {layout.kind} layout", "use Contiguous, Psum, Offsets or Masked; or routed_gemm")
    masked = isinstance(layout, Masked)
    common.check_operand(a, "a", "[G, max_m, K]" if masked else "[M, K]", 3 if masked else 2)
    _check_weights(b, 2 if layout is None else 3)
    expect(a.device == b.device, "b, device", b.device, f"a's, {a.device}")
    expect(a.shape[-1] == b.k, "K of b", f"{b.k} (b is {b.shape})", f"a's, {a.shape[-1]} (a is {tuple(a.shape)})")
    common.check_row_scales(a)
    m = a.shape[-2]
    if layout is not None:
        layout.groups(b.groups)
        expect(layout.index.device == a.device, f"{layout.kind} index, device", layout.index.device, f"the operands', {a.device}")
        expect(layout.kind != "contiguous" or layout.index.numel() == m, "m_indices, length", layout.index.numel(), f"M = {m}")
    expect(not masked or a.shape[0] == b.groups, "groups of a", a.shape[0], f"b's, {b.groups}")
    shape = (*a.shape[:-1], b.n)
    common.check_flags(accumulate=accumulate, zero_padding=zero_padding)
    expect(not options.fast_accum, f"fast_accum of packed {b.format.name}", True,
           "False: sums are scaled, and so promoted, every block of K")
    common.check_out(out, shape, dtype, a.device, accumulate, a, *_stored(b))
    if 0 in shape:
        return None
    even = out is None or not masked or out.shape[0] == 1 or out.stride(0) == m * out.stride(1)
    expect(even, "out, strides", None if out is None else out.stride(), "groups one behind the other, for a packed weight")
    like = out if out is not None else torch.empty(shape, dtype=dtype, device="meta")
    rows = m if layout is None else layout.expected_m or (m if masked else -(-m // b.groups))
    problem = Problem("gemm" if layout is None else "grouped_gemm", "dense" if layout is None else layout.kind, bucket(m), b.n, b.k,
                      b.groups, common.operand(a), replace(weight_operand(b), picks=-1 if b.folded is None else b.folded.picks),
                      rows=bucket(max(1, min(rows, m))),
                      out_dtype=dtype_name(dtype), out_aligned=common.on_16_bytes(like), accumulate=accumulate,
                      zero_padding=zero_padding, max_sms=options.max_sms,
                      alignment=1 if layout is None else layout.alignment)
    return _select(problem, a.device, options)


def _select(problem: Problem, device: torch.device, options: Options) -> Plan:
    return dispatch.select(problem, detect(device), options.backend, options.config, options.on_unsupported)
