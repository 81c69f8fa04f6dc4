"""`explain`: which kernel a problem runs on, with which config, and why each other one was passed over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..arch import Arch, detect, get_arch
from ..errors import Unsupported, expect
from ..formats import Format, get_format
from ..prepack import ACTIVATIONS, as_they_are, check_packable
from ..prepack_bits import FP8_PREPACK, PREPACK
from ..prepack_folded import FEWEST_ROWS, TILE, USUAL
from ..problem import LAYOUTS, Operand, Plan, Problem, bucket, promotion
from ..runtime import dispatch

OPS = ("gemm", "grouped_gemm", "grouped_gemm_wgrad", "routed_gemm")


@dataclass(frozen=True)
class Explanation:
    """A Plan with what it is up against: the floor is the larger of bytes / bandwidth and FLOPs / rate of the device."""

    plan: Plan
    arch: Arch

    @property
    def floor_us(self) -> float:
        """Microseconds that no kernel can be faster than."""
        p = self.plan.problem
        rate = self.arch.fp8_flops if p.a.format.elem.bits <= 8 and p.b.format.elem.bits <= 8 else self.arch.bf16_flops
        return 1e6 * max(p.bytes / self.arch.bandwidth, p.flops / max(rate or self.arch.bf16_flops, 1.0))

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for `explain --json`."""
        p = self.plan
        problem = {k: (v if not isinstance(v, Operand) else v.format.name) for k, v in
                   ((f, getattr(p.problem, f)) for f in ("op", "layout", "m", "n", "k", "groups", "rows", "a", "b", "out_dtype"))}
        return {"device": self.arch.name, "target": self.arch.target, "problem": problem, "backend": p.backend,
                "kernel": p.kernel, "config": p.config.to_dict(), "reason": p.reason, "predicted_us": p.predicted_us,
                "floor_us": self.floor_us, "flops": p.problem.flops, "bytes": p.problem.bytes,
                "workspace_bytes": p.workspace_bytes, "passed_over": [list(x) for x in p.passed_over]}

    def __str__(self) -> str:
        p, q = self.plan, self.plan.problem
        lines = [
            f"{q.op} ({q.layout}) {q.a.format.name} x {q.b.format.name} -> {q.out_dtype}: groups {q.groups}, M <= {q.m}, "
            f"{q.rows} rows a group, N {q.n}, K {q.k}, on {self.arch.name} ({self.arch.target})",
            f"  kernel     {p.kernel} [{p.backend}]  {p.config}",
            f"  why        {p.reason}",
            f"  predicted  {p.predicted_us:.1f} us; floor {self.floor_us:.1f} us "
            f"({q.flops / 1e9:.1f} GFLOP, {q.bytes / 1e6:.1f} MB); workspace {p.workspace_bytes} bytes",
        ]
        lines += [f"  not        {line}" for line in dispatch.by_reason(p.passed_over)]
        return "\n".join(lines)


def describe(op: str, *, layout: str = "dense", groups: int = 1, m: int, n: int, k: int, a: Format | str = "fp8_1x128",
             b: Format | str = "fp8_128x128", out_dtype: str = "bf16", expected_m: int = 0, max_sms: int = 0,
             packed: bool | str = False) -> Problem:
    """The Problem of a call with contiguous, aligned operands. For masked, `m` is the expected rows a group; for routed_gemm the
    slots. `packed`: B is a `PackedWeight`; see `explain`."""
    expect(op in OPS, "op", repr(op), f"one of {OPS}")
    expect(layout in LAYOUTS, "layout", repr(layout), f"one of {LAYOUTS}")
    for name, v in (("m", m), ("n", n), ("k", k), ("groups", groups), ("expected_m", expected_m)):
        expect(isinstance(v, int) and v >= 0, name, v, "a size of at least 0")
    expect(out_dtype in ("bf16", "fp16", "fp32"), "out_dtype", repr(out_dtype), "'bf16', 'fp16' or 'fp32'")
    expect((op == "gemm") == (layout == "dense"), f"layout of {op}", repr(layout), "'dense' for gemm, and for gemm only")
    expect(layout != "routed" or op == "routed_gemm", f"layout of {op}", "'routed'", "one of its own: routed is routed_gemm's")
    expect((op == "grouped_gemm_wgrad") == (layout == "k_grouped"), f"layout of {op}", repr(layout),
           "'k_grouped' for grouped_gemm_wgrad, and for it only")
    n, groups = max(n, 1), max(groups, 1)       # nothing is launched without them: what one would get
    fa, fb = get_format(a), get_format(b)
    rows = {"dense": m, "masked": expected_m or m}.get(layout, -(-m // groups))
    sa, sb = [Operand(f, "k", "", f.scale if f.scaled else "", "mn" if f.scaled and i == 0 else "k" if f.scaled else "",
                    k * f.elem.bits // 8 % 16 == 0) for i, f in enumerate((fa, fb))]
    if packed:
        check_packable(fb)
        expect(packed is True or packed in ACTIVATIONS, "packed", repr(packed), f"True, or what for: one of {ACTIVATIONS}")
    if packed and not as_they_are(fb, (n, k) if layout == "dense" else (groups, n, k), "", str(packed)):
        order = FP8_PREPACK if packed == "fp8" and fb.element == "e2m1" else PREPACK
        sb = Operand(fb, "k", order, fb.scale, "", folds=fb.element == "e2m1")
    elif packed and m >= FEWEST_ROWS:       # as many columns as of normal weights don't fold
        sb = replace(sb, picks=-(-n // TILE) * USUAL)
    return Problem(op, layout, bucket(m), n, k, groups, sa, sb, rows=bucket(max(rows, 1)), out_dtype=out_dtype,
                   out_aligned=n * (4 if out_dtype == "fp32" else 2) % 16 == 0, promote=promotion(fa, fb), max_sms=max_sms,
                   alignment=128 if layout == "psum" else 1)


def explain(op: str, *, layout: str = "dense", groups: int = 1, m: int, n: int, k: int, a: Format | str = "fp8_1x128",
            b: Format | str = "fp8_128x128", out_dtype: str = "bf16", expected_m: int = 0, max_sms: int = 0,
            packed: bool | str = False, device: str | torch.device | None = None, backend: str | None = None,
            on_unsupported: str = "portable") -> Explanation:
    """The Plan for a problem given by its sizes, on `device`: a name ('h200', 'sm90', 'cpu'), a torch device, or the one here.

    op: 'gemm', 'grouped_gemm', 'grouped_gemm_wgrad' or 'routed_gemm'; layout: the layout's kind; groups: of a grouped one.
    m: rows of A (masked: expected rows per group; routed_gemm: slots). n: rows of B, columns of the output. k: contracted length.
    a, b: formats. out_dtype: 'bf16', 'fp16' or 'fp32'. expected_m: the hint of a masked layout.
    packed: B went through `prepack`; 'fp8', 'mxfp8': with these `activations`. max_sms, backend, on_unsupported: as in `gemm`.
    Needs no GPU. Raises what the op itself would raise: ValueError, Unsupported.
    """
    arch = detect(device if isinstance(device, torch.device) else None) if device is None or isinstance(device, torch.device) \
        else get_arch(device)
    problem = describe(op, layout=layout, groups=groups, m=m, n=n, k=k, a=a, b=b, out_dtype=out_dtype, expected_m=expected_m,
                       max_sms=max_sms, packed=packed)
    return Explanation(dispatch.select(problem, arch, backend, None, on_unsupported), arch)


def can_run(op: str, **problem: Any) -> tuple[bool, str]:
    """(whether a fast kernel computes the problem, which one and why, or why none does). Arguments as in `explain`.

    Portable kernels do not count; `explain` says what would run. Raises ValueError for arguments that describe no problem.
    """
    try:
        plan = explain(op, **problem, on_unsupported="raise").plan
    except Unsupported as error:
        return False, error.reason
    return True, f"{plan.kernel}: {plan.reason}"
