"""The one enumerator of cases: tests, benchmarks and the tuner take their problems from `SUITES`.

A suite has a fixed name, fixed case ids and a fixed count, so that a result that is missing is seen. `PEERS` says
against whom a suite is measured: every (case, peer) that the peer computes is a row of the result, or the report fails.
What the cases of a suite are: `suites.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from typing import Any

from ..errors import expect
from ..formats import BF16, FP8_ROW, MXFP4, MXFP8, FP8_1x128
from .case import Case
from .guard import Guarded, guarded_empty
from .inputs import Inputs, build
from .suites import (
    BLOCK,
    LARGE,
    PRODUCTS,
    ROW,
    SMALL,
    TENSOR,
    TRAINED,
    UNEVEN,
    a16w4,
    cpu_formats,
    cpu_small,
    dense,
    edge,
    flat,
    flydsl_contiguous,
    flydsl_masked,
    fp4_contiguous,
    fp4_experts,
    fp4_masked,
    fp4_masked_few,
    fp4_masked_spread,
    large,
    layers,
    masked,
    masked_eight,
    mxfp8_dense,
    mxfp8_folded,
    mxfp8_prefill,
    mxfp8_routed,
    offsets_spreads,
    routed,
    skewed,
    train_fast,
    train_portable,
    train_rows,
    train_steps,
    train_wgrad,
    untuned,
)

__all__ = ["PEERS", "SUITES", "Case", "Guarded", "Inputs", "build", "find", "get_case", "get_suite", "guarded_empty"]

BOTH = ("bf16", "fp16")
_BUILDERS: dict[str, Callable[[str], list[Any]]] = {
    "portable-contiguous": lambda s: [*flydsl_contiguous(s, BOTH), *flat(s, "contiguous", (*SMALL, *LARGE))],
    "portable-masked": lambda s: [
        *flydsl_masked(s, BOTH), *masked_eight(s),
        *masked(s, tuple((g, m, UNEVEN) for g, m in ((32, 192), (32, 20), (6, 1024), (6, 20))))],
    "portable-dense": lambda s: dense(s, (1, 64, 128, 4096)),
    "portable-offsets": lambda s: [*flat(s, "offsets", (*LARGE, *SMALL), UNEVEN), *offsets_spreads(s)],
    "fp8-contiguous": lambda s: flat(s, "contiguous", LARGE),
    "fp8-contiguous-small": lambda s: flat(s, "contiguous", SMALL),
    "fp8-offsets": lambda s: flat(s, "offsets", LARGE, UNEVEN),
    "fp8-offsets-small": lambda s: flat(s, "offsets", SMALL, UNEVEN),
    "fp8-offsets-e2e": lambda s: [replace(c, e2e=True) for c in flat(s, "offsets", (*LARGE, *SMALL), UNEVEN)],
    "fp8-masked": lambda s: masked(s, ((32, 192, UNEVEN), (6, 1024, UNEVEN))),
    "fp8-masked-eight": masked_eight,
    "fp8-masked-decode": lambda s: masked(s, tuple((g, m, UNEVEN if m == 20 else "balanced")
                                                   for g in (32, 6) for m in (20, 1, 2, 4, 8))),
    "fp8-dense": lambda s: dense(s, (1, 16, 64, 128, 4096, 8192)),
    "fp8-dense-models": lambda s: [*dense(s, (256, 512, 1024, 2048)), *dense(s, (1, 16, 64, 128, 256, 1024, 4096), PRODUCTS)],
    "fp8-skew": skewed,
    "untuned": untuned,
    "a16w4-decode": lambda s: a16w4(s, (1, 4, 8, 16)),
    "a16w4-mid": lambda s: a16w4(s, (64, 256), "fp8"),
    "a16w4-prefill": lambda s: a16w4(s, (1024, 4096)),
    # both stages of Qwen3-30B-A3B, weights as they are
    "bf16-routed": lambda s: [replace(c, packed=False) for c in routed(s, BF16, BF16, (1, 16, 64, 512, 2048, 4096),
                                                                       ((128, 8, 1536, 2048), (128, 8, 2048, 768)))],
    "mxfp8-routed": mxfp8_routed,
    "mxfp8-dense-decode": lambda s: mxfp8_dense(s, (1, 2, 4, 8, 16, 32, 64)),
    "mxfp4-contiguous": lambda s: fp4_contiguous(s, FP8_1x128),
    "mxfp4-a4w4": lambda s: fp4_contiguous(s, MXFP4),
    "mxfp4-mx8": lambda s: fp4_contiguous(s, MXFP8),
    "mxfp4-256": fp4_experts, "mxfp4-256-row": lambda s: fp4_experts(s, FP8_ROW),
    "mxfp4-masked": fp4_masked, "mxfp4-masked-few": fp4_masked_few, "mxfp4-masked-spread": fp4_masked_spread,
    "mxfp8-bandwidth": lambda s: mxfp8_dense(s, (1, 2, 4, 8, 16), 30_000_000),
    "mxfp8-plain-decode": lambda s: mxfp8_dense(s, (1, 2, 4, 8, 16, 32, 64), packed=False),
    "mxfp8-plain-bandwidth": lambda s: mxfp8_dense(s, (1, 2, 4, 8, 16), 30_000_000, packed=False),
    "mxfp8-prefill": mxfp8_prefill, "mxfp8-prefill-folded": mxfp8_folded,
    "train-fwd": lambda s: train_rows(s, ((8192, ROW), (16384, TENSOR), (32768, ROW)), False),
    "train-dgrad": lambda s: train_rows(s, ((8192, ROW), (16384, TENSOR), (32768, ROW)), True),
    "train-block": lambda s: [c for b in (False, True) for c in train_rows(s, ((16384, BLOCK), ), b, TRAINED[:2])],
    "train-wgrad": train_wgrad,
    "train-fast": train_fast,
    "train-step": lambda s: train_steps(s, ("delayed", ), (8192, 16384, 32768), ("balanced", "skew128:30")),
    "train-step-recipes": lambda s: [
        *train_steps(s, ("tensorwise", "rowwise", "block"), (16384, ), ("balanced", )),
        *train_steps(s, ("delayed", "block"), (16384, ), ("balanced", ), micro=1)],
    **{f"train-portable-{w}": partial(train_portable, which=w) for w in ("fwd", "dgrad", "wgrad")},
    "edge": edge,
    "large": large,
    "cpu-small": cpu_small,
    "cpu-formats": cpu_formats,
    "experts-fp8": lambda s: layers(s, ("deepseek-v3", "qwen3-235b", "minimax-m3"), (1, 8),
                                    (1, 16, 256, 4096, 16384)),
    "experts-mxfp4": lambda s: layers(s, ("gpt-oss-120b",), (1,), (1, 4, 16, 64, 256, 1024, 4096), "mxfp4", logits=True),
    "experts-cpu": lambda s: layers(s, ("tiny",), (1, 2), (0, 1, 24)),
}
# Any: a Case, or a LayerCase with what the reports read of one
SUITES: dict[str, tuple[Any, ...]] = {name: tuple(make(name)) for name, make in _BUILDERS.items()}

# Whom a suite is measured against; adapters of these names are in `peers.py`.
PEERS: dict[str, tuple[str, ...]] = {name: ("deepgemm", "floor") for name in SUITES} | {
    **{f"train-{x}": ("torch_row", "floor") for x in ("fwd", "dgrad", "fast")}, "train-wgrad": ("torch_row", "deepgemm", "floor"),
    "train-step": ("torch_step", "torch_step_fused"), "train-step-recipes": ("torch_step", "torch_step_fused"),
    **{f"train-portable-{x}": ("triton_best",) for x in ("fwd", "dgrad", "wgrad")},
    "experts-fp8": ("deepgemm_layer", "triton_moe", "floor"), "experts-cpu": ("floor",),
    "experts-mxfp4": ("triton_kernels_layer", "floor"),
    "a16w4-decode": ("triton_kernels", "humming", "floor"), "a16w4-mid": ("triton_kernels", "humming", "floor"),
    "a16w4-prefill": ("triton_kernels", "floor"), "bf16-routed": ("torch_bf16", "floor"),
    "mxfp8-routed": ("dot_scaled", "triton", "humming", "deepgemm_block", "floor"), "mxfp8-bandwidth": ("floor",),
    **{f"mxfp8-{x}-decode": ("dot_scaled", "triton", "humming", "torch_bf16", "deepgemm_block", "floor")
       for x in ("dense", "plain")},
    "mxfp8-plain-bandwidth": ("floor",),
    **{f"mxfp8-{x}": ("dequant_bf16", "torch_bf16", "deepgemm_block", "floor") for x in ("prefill", "prefill-folded")},
    **{f"mxfp4-{x}": ("deepgemm", "triton_kernels", "humming", "humming_w4a8_token", "floor") for x in ("contiguous", "256")},
    "mxfp4-a4w4": ("deepgemm", "floor"), "mxfp4-mx8": ("dequant_bf16", "torch_bf16", "floor"),
    "mxfp4-256-row": ("humming_w4a8_token", "floor"),
    "mxfp4-masked": ("own_fp8", "floor"), "mxfp4-masked-few": ("own_fp8", "floor"), "mxfp4-masked-spread": ("own_fp8", "floor"),
    "edge": (), "large": (), "cpu-small": ("torch_bf16", "floor"), "cpu-formats": ("torch_bf16", "floor")}


def get_suite(name: str) -> tuple[Case, ...]:
    """A suite by name; ValueError names the ones there are."""
    expect(name in SUITES, "suite", repr(name), f"one of {sorted(SUITES)}")
    return SUITES[name]


def get_case(suite: str, case: str) -> Case:
    """A case of a suite by id; ValueError where there is none."""
    found = [c for c in get_suite(suite) if c.id == case]
    expect(bool(found), f"case of suite {suite}", repr(case), "an id that `narrowgemm bench --suite NAME --list` shows")
    return found[0]


def find(pattern: str, suites: Iterable[str] = ()) -> list[Case]:
    """Cases whose id, or `suite/id`, matches a shell pattern, in `suites` (default: all)."""
    names = tuple(suites) or tuple(SUITES)
    return [c for s in names for c in get_suite(s) if fnmatch(c.id, pattern) or fnmatch(f"{c.suite}/{c.id}", pattern)]
