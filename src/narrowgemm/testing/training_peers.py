"""Peers in training: torch's row-wise grouped product, DeepGEMM's k-grouped one, our portable kernel at its best, whole steps."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arch import detect
from ..formats import FP8_ROW, FP8_TENSOR, FP8_1x128, ScaledTensor
from ..kernels.registry import kernels
from ..problem import Config
from .case import Case
from .guard import Guarded
from .inputs import Inputs
from .peer import Prepared
from .step import PEERS, StepCase

SCALED = (FP8_ROW, FP8_TENSOR)
Call = tuple[Callable[[], object], Callable[[int], Tensor]]     # a run, and rows of a group after it


def torch_row_refuses(case: Case) -> str | None:
    """Why torch's row-wise grouped product does not compute the case, or None."""
    if case.a not in SCALED or case.b not in SCALED:
        return f"torch's grouped product takes row-wise scales, not {case.a.name} x {case.b.name}"
    if case.layout not in ("offsets", "k_grouped"):
        return f"has no {case.layout} layout"
    if case.out_dtype != "bf16" or case.accumulate:
        return "its output is BF16, without accumulation"
    if case.k % 16 or case.n % 16 or (case.layout == "k_grouped" and any(s % 16 for s in case.group_sizes)):
        return "its operands' rows are multiples of 16 bytes"
    return "no rows" if case.rows == 0 or case.slack else None


def torch_row(case: Case, inputs: Inputs) -> Call:
    """torch._scaled_grouped_mm, partial sums promoted (use_fast_accum=False) where ours are. Tensor-wise scales are spread over
    rows: it has no others."""
    a, b = inputs.a, inputs.b
    index = inputs.layout.index  # type: ignore[union-attr]
    offs = index[1:].to(torch.int32).contiguous()
    groups = case.groups
    assert a.scale is not None and b.scale is not None
    out: list[Tensor] = []
    if case.layout == "k_grouped":
        sa = a.scale.expand(a.shape[0], 1).reshape(-1).repeat(groups)
        sb = b.scale.expand(b.shape[0], 1).reshape(-1).repeat(groups)
        other = b.data.T
    else:
        sa = a.scale.expand(a.shape[0], 1).reshape(-1).contiguous()
        sb = b.scale.expand(groups, b.shape[1], 1).reshape(groups, -1).contiguous()
        other = b.data.transpose(1, 2)

    def run() -> None:
        out[:] = [torch._scaled_grouped_mm(a.data, other, sa, sb, offs=offs, out_dtype=torch.bfloat16,
                                           use_fast_accum=case.fast_accum)]

    return run, lambda g: inputs.rows(out[0], g)


def deepgemm_k_grouped_refuses(case: Case) -> str | None:
    """Why DeepGEMM's k-grouped product does not compute the case, or None."""
    if (case.a, case.b) != (FP8_1x128, FP8_1x128) and not (case.a in SCALED and case.b in SCALED):
        return f"its k-grouped product takes E4M3 with 1x128 scales on both sides, not {case.a.name} x {case.b.name}"
    if case.out_dtype != "fp32" or not case.accumulate:
        return "its k-grouped product adds to an FP32 output"
    return "its groups are multiples of 128 columns" if any(s % 128 for s in case.group_sizes) else None


def deepgemm_k_grouped(case: Case, inputs: Inputs) -> Call:
    """Every group's columns copied together, K-major, which is what its user's quantiser would write. It has 1x128 scales alone, so
    row-wise and tensor-wise ones are written for every K block: the same product."""
    dg = importlib.import_module("deep_gemm")
    own = Inputs(case, inputs.device, inputs.seed, inputs.a, inputs.b, inputs.layout,
                 Guarded(torch.empty_like(inputs.out.tensor), inputs.out.buffer, inputs.out.guard))
    own.write_base()
    y, sizes = own.out.tensor, list(case.group_sizes)
    device_sizes = torch.tensor(sizes, dtype=torch.int32, device=inputs.device)

    def flat(x: Tensor) -> Tensor:
        parts = x.view(torch.uint8).split(sizes, 1)
        return torch.cat([p.contiguous().view(-1) for p in parts]).view(x.dtype)

    def spread(x: ScaledTensor) -> Tensor:
        assert x.scale is not None
        blocks = sum(sizes) // 128
        return x.scale if x.format == FP8_1x128 else x.scale.expand(x.shape[0], 1).mT.expand(blocks, -1).contiguous().mT

    a, b = ((flat(x.data), spread(x)) for x in (inputs.a, inputs.b))
    return (lambda: dg.k_grouped_fp8_gemm_nt_contiguous(a, b, y, sizes, device_sizes, c=y)), lambda g: own.rows(y, g)


@dataclass(frozen=True)
class StepPeer:
    """A training step of the experts in BF16, see `step.py`."""

    name: str

    def available(self, device: torch.device) -> str | None:
        return None if hasattr(torch.nn.functional, "grouped_mm") else "this torch has no nn.functional.grouped_mm"

    def supports(self, case: Any) -> str | None:
        return None if isinstance(case, StepCase) else "computes training steps"

    def prepare(self, case: Any, inputs: Any) -> Prepared:
        run = PEERS[self.name](inputs)
        made: list[Any] = []

        def keep() -> None:
            made[:] = [run()]

        return Prepared(keep, lambda i: inputs.part(made[0], i), "recipe", 5e-5)


@dataclass(frozen=True)
class BestConfig:
    """Our portable kernel with the fastest of all its configs, tried one after the other before it is timed."""

    name = "triton_best"
    TRIES = 5

    def available(self, device: torch.device) -> str | None:
        return None

    def supports(self, case: Case) -> str | None:
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        plan = inputs.plan(backend="triton")
        assert plan is not None
        own = Inputs(case, inputs.device, inputs.seed, inputs.a, inputs.b, inputs.layout,
                     Guarded(torch.empty_like(inputs.out.tensor), inputs.out.buffer, inputs.out.guard))
        own.write_base()
        best = min(kernels()[plan.kernel].configs(plan.problem, detect(inputs.device)), key=lambda c: self.seconds(own, c))
        return Prepared(lambda: own.call(backend="triton", config=best), lambda g: own.rows(own.out.tensor, g))

    def seconds(self, inputs: Inputs, config: Config) -> float:
        inputs.call(backend="triton", config=config)
        if inputs.device.type == "cuda":
            torch.cuda.synchronize(inputs.device)
        start = time.perf_counter()
        for _ in range(self.TRIES):
            inputs.call(backend="triton", config=config)
        if inputs.device.type == "cuda":
            torch.cuda.synchronize(inputs.device)
        return time.perf_counter() - start
