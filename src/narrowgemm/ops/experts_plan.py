"""What an expert layer will launch, and where in one workspace each step's result lies: sizes and formats alone decide.

T tokens of H, top_k choices, R = T * top_k rows in E groups, I intermediate. Buffers whose lives don't meet share their
bytes: the quantised rows with the quantised activation, the first product with the second.

gate_up weights that are prepacked with their pair have products that take rows by slot, activation and combine inside them:

    route -> sort -> gate_up with bias and activation -> down with bias, routing weight and the sum over a token's slots

and, where activations are narrow, `quantize` and `requantize` in front of each product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..arch import Arch
from ..errors import expect, expect_count
from ..formats import BF16, FP8_ROW, MXFP4, MXFP8, Format, FP8_1x128, ScaledTensor
from ..kernels.operands import Memo
from ..kernels.registry import kernels
from ..prepack import PackedWeight
from ..problem import Epilogue, Operand, Plan, Problem, bucket
from ..reference.activate import OAI_ARGS
from ..runtime import dispatch
from ..scales import tma_aligned_rows
from . import common, steps
from .routed import weight_operand

ALIGN = 256
Weight = ScaledTensor | PackedWeight
# the activations that a weight format is served with, by the name of its blocks
DEFAULTS = {"fp8_128x128": FP8_1x128, "fp8_1x128": FP8_1x128, "fp8_row": FP8_ROW, "fp8_tensor": FP8_ROW, "mxfp8": MXFP8}
LEADING = ("gluon_sm90.fp8_decode",)      # products that say that the launch behind may start
GATED = "gluon_sm90.fp8_gated"             # the product with the activation inside
INVARIANT_ROWS = 128       # rows a group for which a batch-invariant layer is planned, whatever it gets


@dataclass(frozen=True, slots=True)
class Sizes:
    """The layer, without tensors. `world`: experts over all ranks; `shared`: intermediate size of shared experts, or 0."""

    tokens: int
    hidden: int
    inter: int
    experts: int
    top_k: int
    world: int
    shared: int = 0

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k

    @property
    def expected(self) -> int:
        """Rows a group is expected to have, when this rank holds `experts` of `world`."""
        return max(1, min(self.rows, -(-self.rows // max(self.world, self.experts, 1))))

    @property
    def here(self) -> int:
        """Rows that this rank is expected to have in all."""
        return max(1, min(self.rows, -(-self.rows * self.experts // max(self.world, self.experts, 1))))


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is computed on the way. `source`: format of the tokens, of the products and of the result."""

    source: Format
    activations: Format
    activation: str = "swiglu"
    args: tuple[float, ...] = ()
    interleaved: bool = False
    routed: bool = True              # from logits; else weights and ids come with the call
    groups: int = 1                  # of experts, in routing
    gate_up_bias: bool = False
    down_bias: bool = False
    packed: bool = False             # products take rows by slot: see `by_slot`
    added: bool = False              # something is added to the result (shared experts)


@dataclass(frozen=True, slots=True)
class Options:
    backend: str | None = None
    batch_invariant: bool = False
    max_sms: int = 0
    on_unsupported: str = "portable"

    def check(self) -> None:
        expect_count(self.max_sms, "max_sms", 0, ": 0 (all) or a count")
        common.check_flags(batch_invariant=self.batch_invariant)


@dataclass(frozen=True, slots=True)
class Buffer:
    """A tensor in the workspace, `at` bytes from its start."""

    at: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def view(self, bases: dict[torch.dtype, Tensor]) -> Tensor:
        base = bases[self.dtype]
        return base.as_strided(self.shape, self.strides, base.storage_offset() + self.at // self.dtype.itemsize)


@dataclass(slots=True)
class Pool:
    """Bytes of the workspace in the order in which they are given out."""

    bytes: int = 0
    buffers: dict[str, Buffer] = field(default_factory=dict)

    def take(self, nbytes: int) -> int:
        at, self.bytes = self.bytes, self.bytes + -(-nbytes // ALIGN) * ALIGN
        return at

    def plain(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, at: int | None = None) -> int:
        """Place a row-major tensor (`at` a byte that is taken already); where it ends."""
        nbytes = math.prod(shape) * dtype.itemsize
        at = self.take(nbytes) if at is None else at
        strides = tuple(math.prod(shape[i + 1:]) for i in range(len(shape)))
        self.buffers[name] = Buffer(at, shape, strides, dtype)
        return at + -(-nbytes // ALIGN) * ALIGN

    def scaled(self, name: str, rows: int, k: int, fmt: Format, at: int) -> int:
        """Place payload and scales; where they end."""
        end = self.plain(name, (rows, k // fmt.elem.per_byte), fmt.elem.dtype, at)
        if not fmt.scaled:
            return end
        dtype = fmt.scale_dtype
        sr, sc = fmt.scale_shape((rows, k))
        if steps.scale_layout_of(fmt) == "row_major":
            return self.plain(f"{name}.scale", (sr, sc), dtype, end)
        column = tma_aligned_rows(sr, dtype.itemsize)
        self.buffers[f"{name}.scale"] = Buffer(end, (sr, sc), (1, column), dtype)
        return end + -(-sc * column * dtype.itemsize // ALIGN) * ALIGN


@dataclass
class ExpertsPlan:
    """Plans of the steps in order, and the workspace. `bytes` is what the caller provides."""

    sizes: Sizes
    recipe: Recipe
    steps: dict[str, Plan]
    buffers: dict[str, Buffer]
    bytes: int
    scratch: tuple[int, int]         # where the steps' own workspaces lie, and how long they are
    memos: dict[str, Memo]
    whole: Any = None                # every step's launches as one, see `experts_warm`; None: warm calls make tensors

    @property
    def launches(self) -> int:
        return sum(len(p.steps) for p in self.steps.values())

    @property
    def predicted_us(self) -> float:
        return sum(p.predicted_us for p in self.steps.values())


def activations_for(weights: Format, source: Format) -> Format:
    """The format that activations take for weights of a format, unless the caller says otherwise."""
    if not weights.scaled or weights.element == MXFP4.element:
        return source
    name = weights.name.split(":")[0].removesuffix("_ue8m0")
    expect(name in DEFAULTS, "format of the weights", weights.name, f"one of {sorted(DEFAULTS)}, mxfp4, bf16")
    return DEFAULTS[name]


def by_slot(gate_up: Weight) -> bool:
    """Whether the products of a layer take rows by slot, with the activation and the combine inside them."""
    return isinstance(gate_up, PackedWeight) and bool(gate_up.pair)


def default_activations(weights: Weight, source: Format) -> Format:
    """As `activations_for`; prepacked weights are expanded to BF16, so tokens stay as they are."""
    return source if isinstance(weights, PackedWeight) else activations_for(weights.format, source)


def make(sizes: Sizes, recipe: Recipe, gate_up: Weight, down: Weight, arch: Arch, options: Options,
         shared: tuple[Weight, Weight] | None = None) -> ExpertsPlan:
    """Plan every step and lay the workspace out. Of the weights, shapes, formats, strides and alignment count."""
    s, r, fmt = sizes, recipe, recipe.activations
    dtype = r.source.elem.dtype
    pool = Pool()
    if r.routed:
        pool.plain("topk_weights", (s.tokens, s.top_k), torch.float32)
        pool.plain("topk_ids", (s.tokens, s.top_k), torch.int32)
    for name, length, kind in (("row_map", s.rows, torch.int32), ("inverse", s.rows, torch.int32),
                               ("offsets", s.experts + 1, torch.int64)):
        pool.plain(name, (length,), kind)
    inside = gated(s, r, gate_up, arch, options)
    _space(pool, s, fmt, dtype, r.packed, inside is not None)
    plans = _packed_plans(s, r, gate_up, down, pool.buffers, arch, options) if r.packed else \
        _plans(s, r, gate_up, down, pool.buffers, arch, options, inside)
    if shared is not None:
        plans = _shared_plans(s, r, *shared, pool.buffers, arch, options) | plans
    need = max(p.workspace_bytes for p in plans.values())
    scratch = (pool.take(need), need)
    order = ("route", "sort", "shared quantize", "shared gate_up", "shared activate", "shared down", "sort gather", "gather",
             "quantize", "gate_up", "activate", "requantize", "down", "combine")
    return ExpertsPlan(s, r, {name: plans[name] for name in order if name in plans}, pool.buffers, pool.bytes, scratch,
                       {name: {} for name in plans})


def _space(pool: Pool, s: Sizes, fmt: Format, dtype: torch.dtype, packed: bool, inside: bool) -> None:
    """Two regions: narrow activations, and products. Packed: `x` has a row a token, `h` is the activation. `inside`: the first
    product makes the second one's rows, of which its own are none."""
    lay = Pool()
    if inside:
        pool.scaled("act", s.rows, s.inter, fmt, pool.take(Pool().scaled("act", s.rows, s.inter, fmt, 0)))
    if packed:
        narrow = 0
        if fmt.scaled:
            narrow = max(lay.scaled("x", s.tokens, s.hidden, fmt, 0), lay.scaled("act", s.rows, s.inter, fmt, 0))
        wide = lay.plain("h", (s.rows, s.inter), dtype, 0)
    else:
        narrow, wide = lay.scaled("x", s.rows, s.hidden, fmt, 0), lay.plain("y", (s.rows, s.hidden), dtype, 0)
        if not inside:
            narrow = max(narrow, lay.scaled("act", s.rows, s.inter, fmt, 0))
            wide = max(wide, lay.plain("h", (s.rows, 2 * s.inter), dtype, 0))
    if s.shared:
        narrow = max(narrow, lay.scaled("shared.x", s.tokens, s.hidden, fmt, 0),
                     lay.scaled("shared.act", s.tokens, s.shared, fmt, 0))
        wide = max(wide, lay.plain("shared.h", (s.tokens, 2 * s.shared), dtype, 0))
        pool.plain("shared.y", (s.tokens, s.hidden), dtype)
    first, second = pool.take(narrow), pool.take(wide)
    for name, buffer in lay.buffers.items():
        start = second if name.split(".")[-1] in ("h", "y") else first
        pool.buffers.setdefault(name, replace(buffer, at=buffer.at + start))


def _operand(buffers: dict[str, Buffer], name: str, fmt: Format) -> Operand:
    """An activation in the workspace, all of whose buffers are aligned."""
    data = buffers[name]
    scale = buffers.get(f"{name}.scale")
    major = "" if scale is None else "mn" if scale.strides[0] == 1 and scale.strides[1] * scale.dtype.itemsize % 16 == 0 \
        else "k"
    return Operand(fmt, "k", "", fmt.scale if fmt.scaled else "", major, data.strides[0] * data.dtype.itemsize % 16 == 0)


def product(rows: int, groups: int, expected: int, a: Operand, b: Weight, out: Buffer, source: Format,
            options: Options, front: str = "") -> Problem:
    """A product of the layer over the `rows` that are expected here, which may be fewer than there is room for.
    `front`: as in Problem; what wrote the weights is two launches in front at least."""
    n, k = b.shape[-2:]
    wide = 256 * max(n, k) >= 2**31
    return Problem("grouped_gemm" if groups else "gemm", "offsets" if groups else "dense", bucket(rows), n, k,
                   groups or 1, a, weight_operand(b), rows=bucket(expected), out_dtype=source.name,
                   out_aligned=out.strides[0] * out.dtype.itemsize % 16 == 0, batch_invariant=options.batch_invariant,
                   max_sms=options.max_sms, wide=wide, front=front)


def slot_product(s: Sizes, r: Recipe, a: Operand, b: Weight, epilogue: Epilogue, a_div: int, options: Options) -> Problem:
    """A product over slots. `m` is what there is room for, of which `rows` a group are expected here."""
    n, k = b.shape[-2:]
    return Problem("routed_gemm", "offsets", bucket(s.rows), n, k, s.experts, a, weight_operand(b), rows=bucket(s.expected),
                   out_dtype=r.source.name, epilogue=epilogue, gather=True, a_div=a_div, zero_padding=False,
                   batch_invariant=options.batch_invariant, max_sms=options.max_sms)


def select_product(problem: Problem, room: int, arch: Arch, options: Options) -> Plan:
    """The Plan of a product, its workspace large enough for all the rows that there is room for: one rank may get them all.
    Batch-invariant: kernel and config of a fixed number of rows, so that they never change."""
    if options.batch_invariant:
        usual = replace(problem, m=bucket(INVARIANT_ROWS * problem.groups), rows=INVARIANT_ROWS)
        chosen = dispatch.select(usual, arch, options.backend, None, options.on_unsupported)
        plan = dispatch.select(problem, arch, chosen.kernel, chosen.config)
    else:
        plan = dispatch.select(problem, arch, options.backend, None, options.on_unsupported)
    most, table = replace(problem, m=max(problem.m, bucket(room))), kernels()
    sized = tuple(replace(x, workspace_bytes=table[x.kernel].workspace(most, x.config)) for x in plan.steps)
    return replace(plan, steps=sized)


def quantize_problem(rows: int, k: int, source: Format, fmt: Format) -> Problem:
    return Problem("quantize", "dense", bucket(rows), 0, k, 1, Operand(source), steps.target(fmt, steps.scale_layout_of(fmt)),
                   rows=bucket(rows))


def _packed_plans(s: Sizes, r: Recipe, gate_up: Weight, down: Weight, buffers: dict[str, Buffer], arch: Arch,
                  options: Options) -> dict[str, Plan]:
    fmt, backend = r.activations, options.backend if options.backend in ("triton", "reference") else None
    args = (r.args or OAI_ARGS) if r.activation == "swiglu_oai" else ()
    first = Epilogue(r.gate_up_bias, r.activation, args, r.interleaved)
    last = Epilogue(r.down_bias, routing_weight=True, combine=True, add=r.added)
    plans = {"sort": dispatch.select(steps.sort_problem(s.rows, s.experts), arch, backend)}
    if r.routed:
        plans["route"] = dispatch.select(steps.route_problem(s.tokens, s.world, s.top_k, r.groups, r.source), arch, backend)
    x = act = Operand(r.source)
    if fmt.scaled:
        plans["quantize"] = dispatch.select(quantize_problem(s.tokens, s.hidden, r.source, fmt), arch, backend)
        plans["requantize"] = dispatch.select(quantize_problem(s.rows, s.inter, r.source, fmt), arch, backend)
        x, act = _operand(buffers, "x", fmt), _operand(buffers, "act", fmt)
    plans["gate_up"] = select_product(slot_product(s, r, x, gate_up, first, s.top_k, options), s.rows, arch, options)
    plans["down"] = select_product(slot_product(s, r, act, down, last, 1, options), s.rows, arch, options)
    return plans


def gated(s: Sizes, r: Recipe, gate_up: Weight, arch: Arch, options: Options) -> Plan | None:
    """gate_up with activation and quantisation inside, where that is predicted to take less than the two steps; else None."""
    fmt = r.activations
    kind = (fmt, r.source, r.interleaved, r.gate_up_bias, options.batch_invariant)
    if r.packed or kind != (FP8_1x128, BF16, False, False, False) or not gate_up.format.scaled:
        return None
    lay = Pool()
    lay.scaled("x", s.rows, s.hidden, fmt, 0)
    lay.scaled("act", s.rows, s.inter, fmt, 0)
    plain = product(s.here, s.experts, s.expected, _operand(lay.buffers, "x", fmt), gate_up, lay.buffers["act"], r.source, options,
                    "tokens")
    kernel, epilogue = kernels()[GATED], Epilogue(activation=r.activation, activation_args=r.args, quantize=fmt)
    both = replace(plain, op="gated_gemm", epilogue=epilogue)
    if kernel.supports(both, arch) or options.backend not in (None, kernel.BACKEND) or not kernel.configs(both, arch):
        return None
    found = select_product(both, s.rows, arch, replace(options, backend=GATED))
    step = steps.activate_problem(s.rows, s.inter, s.experts, s.expected, r.source, fmt, steps.scale_layout_of(fmt), r.activation,
                                  r.args, r.interleaved, r.gate_up_bias)
    apart = (dispatch.select(plain, arch, options.backend), dispatch.select(step, arch))
    return found if found.predicted_us < sum(p.predicted_us for p in apart) else None


def _plans(s: Sizes, r: Recipe, gate_up: Weight, down: Weight, buffers: dict[str, Buffer], arch: Arch,
           options: Options, inside: Plan | None = None) -> dict[str, Plan]:
    fmt, backend = r.activations, options.backend if options.backend in ("triton", "reference") else None

    def step(problem: Problem) -> Plan:
        return dispatch.select(problem, arch, backend)

    plans = {}
    if r.routed:
        plans["route"] = step(steps.route_problem(s.tokens, s.world, s.top_k, r.groups, r.source))
    plans |= _arranged(s, r.source, fmt, step)
    if inside is not None:
        plans["gate_up"] = inside
    else:
        plans["gate_up"] = select_product(product(s.here, s.experts, s.expected, _operand(buffers, "x", fmt), gate_up,
                                                  buffers["h"], r.source, options, "sizes" if "sort gather" in plans else "tokens"),
                                          s.rows, arch, options)
        plans["activate"] = step(replace(steps.activate_problem(s.rows, s.inter, s.experts, s.expected, r.source, fmt,
                                                                steps.scale_layout_of(fmt), r.activation, r.args, r.interleaved,
                                                                r.gate_up_bias), front=front_of(plans["gate_up"], arch)))
    plans["down"] = select_product(product(s.here, s.experts, s.expected, _operand(buffers, "act", fmt), down,
                                           buffers["y"], r.source, options, "tokens"), s.rows, arch, options)
    plans["combine"] = step(replace(steps.combine_problem(s.tokens, s.hidden, s.top_k, s.experts, r.source, r.down_bias),
                                    front=front_of(plans["down"], arch)))
    return plans


def front_of(plan: Plan, arch: Arch) -> str:
    """`Problem.front` of a step behind a product. It starts early where L2 holds the product's weights: the step, or what is behind
    it, would take room on SMs from blocks of a longer one."""
    p = plan.problem
    few = p.active_groups * p.b.format.storage_bytes(p.n, p.k) <= arch.l2
    return "tokens" if p.front and few and plan.kernel in LEADING else ""


def arranged_apart(s: Sizes, source: Format, fmt: Format, step: Callable[[Problem], Plan]) -> dict[str, Plan]:
    """Sort, then gather."""
    return {"sort": step(steps.sort_problem(s.rows, s.experts)),
            "gather": step(steps.gather_problem(s.tokens, s.hidden, s.top_k, s.experts, source, fmt, steps.scale_layout_of(fmt),
                                                s.expected))}


def _arranged(s: Sizes, source: Format, fmt: Format, step: Callable[[Problem], Plan]) -> dict[str, Plan]:
    """Both in one launch, where one is predicted to take less."""
    apart = arranged_apart(s, source, fmt, step)
    one = step(steps.sort_gather_problem(s.tokens, s.hidden, s.top_k, s.experts, source, fmt, steps.scale_layout_of(fmt),
                                         s.expected))
    return {"sort gather": one} if one.predicted_us < sum(p.predicted_us for p in apart.values()) else apart


def _shared_plans(s: Sizes, r: Recipe, gate_up: Weight, down: Weight, buffers: dict[str, Buffer], arch: Arch,
                  options: Options) -> dict[str, Plan]:
    """Shared experts are a dense gated layer over all tokens; its result is added in `combine`."""
    fmt, backend = r.activations, options.backend if options.backend in ("triton", "reference") else None
    plans = {}
    if fmt.scaled:
        plans["shared quantize"] = dispatch.select(quantize_problem(s.tokens, s.hidden, r.source, fmt), arch, backend)
    a = _operand(buffers, "shared.x", fmt)
    plans["shared gate_up"] = select_product(product(s.tokens, 0, s.tokens, a, gate_up, buffers["shared.h"], r.source,
                                                     options), s.tokens, arch, options)
    plans["shared activate"] = dispatch.select(
        steps.activate_problem(s.tokens, s.shared, 0, s.tokens, r.source, fmt, steps.scale_layout_of(fmt), r.activation, r.args,
                               r.interleaved, False), arch, backend)
    a = _operand(buffers, "shared.act", fmt)
    plans["shared down"] = select_product(product(s.tokens, 0, s.tokens, a, down, buffers["shared.y"], r.source, options),
                                          s.tokens, arch, options)
    return plans
