"""Tensors of a case: fresh random operands, poisoned padding, a guarded output, and the references to compare with.

Sources (what was quantised) are not kept: each group's is drawn again from its own generator when a reference asks for
it, so 256 experts of 4096 x 7168 need the memory of their FP8 bytes and of one unquantised expert. Padding rows of A
hold NaN payload and NaN scales: a kernel that lets one leak into a result fails every gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..formats import ELEMENTS, Format, ScaledTensor
from ..layouts import Contiguous, KGrouped, Layout, Masked, Offsets, Psum
from ..prepack import PackedWeight, prepack
from ..problem import Plan
from ..reference.float32 import full_float32
from .case import FOLDED, Case
from .guard import Guarded, guarded_empty
from .numerics import FAST_ACCUM_GATE, KERNEL_GATE, GateResult, Sums, independent, recipe_gate
from .tokens import Tokens, tokens_of
from .values import NAN_BYTE, draw, mn_major, poisoned, put, quantized

Weights = tuple[tuple[Any, ...], ScaledTensor, PackedWeight | None]


@dataclass(eq=False)
class Inputs:
    """Operands, layout and output of a case on a device. `a`, `b`, `layout`, `out.tensor` are what the op takes."""

    case: Case
    device: torch.device
    seed: int
    a: ScaledTensor
    b: ScaledTensor
    layout: Layout | None
    out: Guarded
    weights_key: tuple[Any, ...] = ()
    tokens: Tokens | None = None    # of an end-to-end case: `a` is written from them in every call
    _packed: PackedWeight | None = None

    @property
    def weights(self) -> Weights:
        """B, and what it depends on, for the `reuse` of a later case."""
        return self.weights_key, self.b, self._packed

    @property
    def groups(self) -> Iterator[int]:
        """Groups with rows."""
        return (g for g, s in enumerate(self.case.group_sizes) if s)

    @property
    def packed(self) -> PackedWeight:
        """B, prepacked."""
        if self._packed is None:
            kind = self.case.packed
            self._packed = prepack(self.b, activations=FOLDED.get(kind, kind) if isinstance(kind, str) else "bf16",
                                   folded=kind in FOLDED)
        return self._packed

    # ---- sources and references ------------------------------------------------------------------------------------

    def source_a(self, g: int) -> Tensor:
        """BF16 `[rows of g, K]` before quantisation; `[M, columns of g]` for k_grouped."""
        c = self.case
        shape = (c.m, c.group_sizes[g]) if c.layout == "k_grouped" else (c.group_sizes[g], c.k)
        x = draw("a", g, shape, self.device, self.seed)
        if c.outliers:
            x[:, 50::100] *= 30
        return x

    def source_b(self, g: int) -> Tensor:
        """BF16 `[N, K]` before quantisation; `[N, columns of g]` for k_grouped."""
        c = self.case
        return draw("b", g, (c.n, c.group_sizes[g] if c.layout == "k_grouped" else c.k), self.device, self.seed)

    def base(self, g: int) -> Tensor:
        """What `out` holds before an accumulating call, in the output's dtype, shaped like `rows(out, g)`."""
        c = self.case
        shape = (c.m, c.n) if c.layout == "k_grouped" else (c.group_sizes[g], c.n)
        return draw("c", g, shape, self.device, self.seed).to(self.out.tensor.dtype)

    def same_bits(self, g: int) -> Tensor:
        """FP32 product of group g over the dequantised operands, plus the accumulated base: for the kernel gate."""
        a, b = self._dequantized(g)
        with full_float32():
            return self._plus_base(g, a @ b.mT)

    def unquantised(self, g: int) -> Tensor:
        """FP32 product of group g's sources, plus the accumulated base: for the recipe gate."""
        with full_float32():
            return self._plus_base(g, self.source_a(g).float() @ self.source_b(g).float().mT)

    def _plus_base(self, g: int, product: Tensor) -> Tensor:
        return product + self.base(g).float() if self.case.accumulate else product

    def _dequantized(self, g: int) -> tuple[Tensor, Tensor]:
        if self.case.layout == "k_grouped":
            from ..reference.grouped import take_columns

            start = sum(self.case.group_sizes[:g])
            end = start + self.case.group_sizes[g]
            return take_columns(self.a, start, end), take_columns(self.b, start, end)
        a = self.a[g] if self.case.layout == "masked" else self.a
        by_row = a.scale is not None and a.format.group[0] == 1
        parts = [ScaledTensor(a.data[r], a.scale[r] if by_row and a.scale is not None else a.scale, a.format)
                 for r in self._slices(g)]
        b = self.b[g] if self.case.layout != "dense" else self.b
        return torch.cat([p.dequantize() for p in parts]), b.dequantize()

    # ---- rows ------------------------------------------------------------------------------------------------------

    def _slices(self, g: int) -> list[slice]:
        if self.case.layout == "masked":
            return [slice(0, self.case.group_sizes[g])]
        return self._by_group.get(g, [])

    @cached_property
    def _by_group(self) -> dict[int, list[slice]]:
        out: dict[int, list[slice]] = {}
        for g, start, n in self.case.segments:
            out.setdefault(g, []).append(slice(start, start + n))
        return out

    def rows(self, out: Tensor, g: int) -> Tensor:
        """Group g's rows of an output laid out like `self.out.tensor`: a view where they lie together."""
        if self.case.layout in ("masked", "k_grouped"):
            return out[g] if self.case.layout == "k_grouped" else out[g, : self.case.group_sizes[g]]
        parts = [out[s] for s in self._slices(g)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def padding(self, x: Tensor) -> list[Tensor]:
        """Rows of A, or of an output, that belong to no group."""
        c = self.case
        if c.layout == "masked":
            return [x[g, s:] for g, s in enumerate(c.group_sizes) if s < c.max_m]
        if c.layout in ("k_grouped", "dense"):
            return []
        gaps, row = [], 0
        for _, start, n in sorted(c.segments, key=lambda s: s[1]):
            gaps.append(x[row:start])
            row = start + n
        return [g for g in (*gaps, x[row:]) if g.shape[0]]

    # ---- the call and its checks -----------------------------------------------------------------------------------

    def reset_out(self) -> None:
        """Poison the output, and what a call writes on the way to it; write the base that an accumulating call adds to."""
        self.out.reset()
        if self.tokens is not None:
            self.a.data.view(torch.uint8).fill_(NAN_BYTE[self.case.a.element])
            self.a.scale.fill_(float("nan"))  # type: ignore[union-attr]
        self.write_base()

    def write_base(self) -> None:
        """Write into the output what an accumulating call adds to; nothing where the case does not accumulate."""
        c, out = self.case, self.out.tensor
        if not c.accumulate:
            return
        for g in range(c.groups) if c.layout == "k_grouped" else self.groups:
            base = self.base(g)
            if c.layout == "k_grouped":
                out[g] = base
                continue
            row = 0
            for s in self._slices(g):
                n = s.stop - s.start
                (out[g] if c.layout == "masked" else out)[s] = base[row : row + n]
                row += n

    def call(self, **options: Any) -> Tensor:
        """Run narrowgemm's op into `self.out.tensor`. `options`: `backend`, `config`, `max_sms`, `validate`, ..."""
        from ..ops.gemm import gemm
        from ..ops.grouped import grouped_gemm
        from ..ops.wgrad import grouped_gemm_wgrad

        c, out = self.case, self.out.tensor
        options.setdefault("fast_accum", c.fast_accum)
        if self.tokens is not None:
            self.tokens.quantize_into(self.a)
        if c.packed and options.get("backend") != "triton":     # the portable kernel takes weights as they are
            if c.layout == "dense":
                return gemm(self.a, self.packed, out=out, accumulate=c.accumulate, **options)
            assert self.layout is not None
            return grouped_gemm(self.a, self.packed, self.layout, zero_padding=c.zero_padding, out=out, accumulate=c.accumulate,
                                **options)
        if c.layout == "dense":
            return gemm(self.a, self.b, out=out, accumulate=c.accumulate, **options)
        if isinstance(self.layout, KGrouped):
            return grouped_gemm_wgrad(self.a, self.b, self.layout, out=out, accumulate=c.accumulate, **options)
        assert self.layout is not None
        return grouped_gemm(self.a, self.b, self.layout, zero_padding=c.zero_padding, out=out, accumulate=c.accumulate,
                            **options)

    def plan(self, **options: Any) -> Plan | None:
        """The Plan that `call` with these options follows; None where there is nothing to compute."""
        from ..ops import common, gemm, grouped, routed, wgrad

        c, out = self.case, self.out.tensor
        chosen = common.Options(**{"fast_accum": c.fast_accum, **options})
        packed = self.packed if c.packed and chosen.backend != "triton" else None
        plain = None if packed is None else packed.plain_for(self.a.shape[0], chosen.backend is not None)
        if packed is not None and plain is None:
            return routed.packed_plan(self.a, packed, self.layout, out, out.dtype, c.accumulate, chosen)
        if c.layout == "dense":
            b = self.b if plain is None else plain
            return gemm.plan_of(self.a, b, out, out.dtype, c.accumulate, chosen)
        if isinstance(self.layout, KGrouped):
            return wgrad.plan_of(self.a, self.b, self.layout, out, out.dtype, c.accumulate, chosen)
        assert self.layout is not None
        return grouped.plan_of(self.a, self.b, self.layout, out, out.dtype, c.accumulate, c.zero_padding, chosen)

    def faults(self) -> list[str]:
        """What the last call wrote and must not have, or did not write and should have, outside the groups' rows."""
        c = self.case
        outside = self.padding(self.out.tensor)
        zeroed = c.zero_padding and c.layout in ("contiguous", "psum")
        out = self.out.faults([] if zeroed else outside)
        if zeroed and not all(bool((x == 0).all()) for x in outside):
            out.append("padding rows are not zero")
        if c.layout == "k_grouped":
            empty = [g for g, s in enumerate(c.group_sizes) if not s]
            want = self.base if c.accumulate else (lambda g: torch.zeros_like(self.out.tensor[g]))
            out += [f"group {g} is empty and its output is not {'what it was' if c.accumulate else 'zero'}"
                    for g in empty if not torch.equal(self.out.tensor[g], want(g))]
        return out

    def check(self, out: Tensor | None = None, *, recipe: bool = True, fast_accum: bool = False) -> GateResult:
        """Both gates for `out` (default: the case's own output), overall and per group."""
        y = self.out.tensor if out is None else out
        return check_outputs(self, {"": (lambda g: self.rows(y, g), gate_limits(self.case, recipe, fast_accum))})[""]

    def verify(self, **options: Any) -> GateResult:
        """Poison, call, and assert that nothing outside was touched and both gates hold. For tests."""
        self.reset_out()
        self.call(**options)
        if bad := self.faults():
            raise AssertionError(f"{self.case.id}: {'; '.join(bad)}")
        return self.check(fast_accum=bool(options.get("fast_accum"))).assert_(self.case.id)

    def verify_repeats(self, times: int = 1, **options: Any) -> None:
        """`verify`, and assert that poison and the same call give the same bits, so many times. For tests."""
        self.verify(**options)
        first = self.out.tensor.contiguous().view(torch.uint8).clone()
        for _ in range(times):
            self.reset_out()
            self.call(**options)
            if not torch.equal(first, self.out.tensor.contiguous().view(torch.uint8)):
                raise AssertionError(f"{self.case.id}: other bits than the first time, {options}")


def gate_limits(case: Case, recipe: bool = True, fast_accum: bool = False) -> dict[str, float]:
    """The limits that a result of ours has to keep."""
    fast = fast_accum or case.fast_accum
    limits = {"kernel": FAST_ACCUM_GATE if fast else KERNEL_GATE[case.out_dtype]}
    return limits | ({"recipe": recipe_gate(case.a, case.b)} if recipe else {})


def check_outputs(inputs: Inputs, outputs: Mapping[str, tuple[Callable[[int], Tensor], Mapping[str, float]]]
                  ) -> dict[str, GateResult]:
    """Gates of several results of one case at once: a reference is made once a group, and only where a result needs it.

    `outputs`: name -> (rows of a group, limits by gate: 'kernel' against the same bits, 'recipe' against the sources).
    """
    c = inputs.case
    sums = {name: {gate: Sums() for gate in limits} for name, (_, limits) in outputs.items()}
    for g in inputs.groups:
        k = c.group_sizes[g] if c.layout == "k_grouped" else c.k
        for gate, make in (("kernel", inputs.same_bits), ("recipe", inputs.unquantised)):
            wanted = [name for name in outputs if gate in sums[name]]
            if not wanted:
                continue
            reference = make(g)
            for name in wanted:
                sums[name][gate].add(g, outputs[name][0](g), reference, independent(reference, k))
    return {name: GateResult(tuple(sums[name][gate].gate(gate, limit, sampling=gate == "recipe")
                                   for gate, limit in limits.items())) for name, (_, limits) in outputs.items()}


def build(case: Case, device: torch.device | str = "cpu", seed: int = 0, scale_layout: str = "mn_major",
          reuse: Inputs | Weights | None = None, hollow: bool = False) -> Inputs:
    """Random inputs of `case`. `scale_layout` of A: 'mn_major' (TMA-aligned, what kernels like) or 'row_major'.

    `reuse`: an earlier case's inputs, or their `weights`, taken over where they would be the same.
    `hollow`: every value is poison, for what needs shapes alone (compiling ahead).
    """
    if scale_layout not in ("mn_major", "row_major"):
        raise ValueError(f"scale_layout: got {scale_layout!r}, expected 'mn_major' or 'row_major'")
    device = torch.device(device)
    key = (case.b, case.packed, case.op, case.groups, case.n, case.k, str(device), seed, hollow)
    shape = (case.groups, case.m, case.n) if case.layout == "k_grouped" else (
        (case.groups, case.max_m, case.n) if case.layout == "masked" else (case.a_rows, case.n))
    out = guarded_empty(shape, ELEMENTS[case.out_dtype].dtype, device)
    inputs = Inputs(case, device, seed, None, None, make_layout(case, device), out, key)  # type: ignore[arg-type]
    if hollow:
        dims = (case.groups, case.max_m) if case.layout == "masked" else (case.a_rows,)
        k = case.rows if case.layout == "k_grouped" else case.k
        weights = (case.groups, case.n, k) if case.op == "grouped_gemm" else (case.n, k)
        inputs.a, inputs.b = poisoned((*dims, k), case.a, device), poisoned(weights, case.b, device)
        if case.packed:     # poison packs with factors, and compiles to another kernel
            inputs.b.data.view(torch.uint8).zero_()
            assert inputs.b.scale is not None
            inputs.b.scale.fill_(127)
    elif case.layout == "k_grouped":
        inputs.a, inputs.b = (_columns(inputs, f, s, r) for f, s, r in
                              ((case.a, inputs.source_a, case.m), (case.b, inputs.source_b, case.n)))
    else:
        known = reuse.weights if isinstance(reuse, Inputs) else reuse
        if known is not None and known[0] == key:
            _, inputs.b, inputs._packed = known
        else:
            inputs.b = _weights(inputs)
        inputs.a = _rows(inputs)
    if case.e2e and case.rows:
        # the order of groups is that of A's rows: there is no padding in the offsets layout
        sources = [inputs.a.data.bfloat16()] if hollow else [inputs.source_a(g) for g in inputs.groups]
        inputs.tokens = tokens_of(sources, seed)
    if scale_layout == "mn_major" or case.e2e:
        inputs.a = mn_major(inputs.a)
        inputs.b = mn_major(inputs.b) if case.layout == "k_grouped" else inputs.b
    inputs.reset_out()
    return inputs


def make_layout(case: Case, device: torch.device) -> Layout | None:
    """The layout object of a case, its index on `device`."""
    sizes, kind = case.group_sizes, case.layout
    if kind == "masked":
        return Masked(torch.tensor(sizes, dtype=torch.int32, device=device), case.expected_m)
    if kind in ("offsets", "k_grouped"):
        offsets = torch.tensor((0, *sizes), dtype=torch.int64).cumsum(0).to(torch.int32).to(device)
        return Offsets(offsets) if kind == "offsets" else KGrouped(offsets, case.column_alignment)
    if kind == "psum":
        ends, row = [], 0
        for s in sizes:
            row = -(-row // case.alignment) * case.alignment + s
            ends.append(row)
        return Psum(torch.tensor(ends, dtype=torch.int32, device=device), case.alignment)
    if kind == "contiguous":
        ids = torch.full((case.a_rows,), -1, dtype=torch.int32)
        for g, start, n in case.segments:
            ids[start : start + n] = g
        return Contiguous(ids.to(device))
    return None


def _weights(inputs: Inputs) -> ScaledTensor:
    c = inputs.case
    if c.layout == "dense":
        return quantized(inputs.source_b(0), c.b)
    b = poisoned((c.groups, c.n, c.k), c.b, inputs.device)
    for g in range(c.groups):
        put(b, g, quantized(inputs.source_b(g), c.b))
    return b


def _rows(inputs: Inputs) -> ScaledTensor:
    c = inputs.case
    if c.layout == "masked":
        a = poisoned((c.groups, c.max_m, c.k), c.a, inputs.device)
        for g in inputs.groups:
            put(a[g], slice(0, c.group_sizes[g]), quantized(inputs.source_a(g), c.a))
        return a
    if c.layout == "dense":
        return quantized(inputs.source_a(0), c.a) if c.m else poisoned((0, c.k), c.a, inputs.device)
    a = poisoned((c.a_rows, c.k), c.a, inputs.device)
    if not c.segments:
        return a
    # all rows at once, so that a tensor-wise scale covers the whole operand
    q = quantized(torch.cat([inputs.source_a(g) for g in inputs.groups]), c.a)
    first = dict(enumerate(accumulate(c.group_sizes, initial=0)))
    for g, start, n in c.segments:
        src = slice(first[g], first[g] + n)
        first[g] += n
        scale = q.scale if q.scale is None or c.a.group[0] == 0 else q.scale[src]
        put(a, slice(start, start + n), ScaledTensor(q.data[src], scale, c.a))
    return a


def _columns(inputs: Inputs, fmt: Format, source: Callable[[int], Tensor], rows: int) -> ScaledTensor:
    parts = [source(g) for g in inputs.groups]
    if not parts:
        return poisoned((rows, 0), fmt, inputs.device)
    return quantized(torch.cat(parts, dim=1), fmt)
