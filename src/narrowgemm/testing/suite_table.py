"""Every suite, one row each: what it measures, whom it is measured against, and how its cases are made (`suites.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from ..formats import BF16, FP8_ROW, MXFP4, MXFP8, FP8_1x128
from . import suites


class Suite(NamedTuple):
    """A list of cases with a name."""

    title: str                              # for `bench --list` and for tables that people read
    peers: tuple[str, ...]                  # adapters of these names are in `peers.py`
    make: Callable[[str], list[Any]]        # cases from the suite's name: `Case`s, or `LayerCase`s with what reports read of one


BOTH = ("bf16", "fp16")
DEEPGEMM = ("deepgemm", "floor")
FEW_TOKENS = ("dot_scaled", "triton", "humming", "torch_bf16", "deepgemm_block", "floor")
MANY_ROWS = ("dequant_bf16", "torch_bf16", "deepgemm_block", "floor")
FP8_MXFP4 = ("deepgemm", "triton_kernels", "humming", "humming_w4a8_token", "floor")
STEPS = ("torch_step", "torch_step_fused")

TABLE: dict[str, Suite] = {
    "portable-contiguous": Suite(
        "the portable kernel, FP8, contiguous groups", DEEPGEMM,
        lambda s: [*suites.flydsl_contiguous(s, BOTH), *suites.flat(s, "contiguous", (*suites.SMALL, *suites.LARGE))]),
    "portable-masked": Suite(
        "the portable kernel, FP8, masked groups", DEEPGEMM,
        lambda s: [*suites.flydsl_masked(s, BOTH), *suites.masked_eight(s),
                   *suites.masked(s, [(g, m, suites.UNEVEN) for g, m in ((32, 192), (32, 20), (6, 1024), (6, 20))])]),
    "portable-dense": Suite("the portable kernel, FP8, dense", DEEPGEMM, lambda s: suites.dense(s, (1, 64, 128, 4096))),
    "portable-offsets": Suite(
        "the portable kernel, FP8, groups without padding", DEEPGEMM,
        lambda s: [*suites.flat(s, "offsets", (*suites.LARGE, *suites.SMALL), suites.UNEVEN), *suites.offsets_spreads(s)]),
    "fp8-contiguous": Suite(
        "FP8, contiguous, 4 or 8 groups of thousands of rows", DEEPGEMM, lambda s: suites.flat(s, "contiguous", suites.LARGE)),
    "fp8-contiguous-small": Suite(
        "FP8, contiguous, 8 groups of 64 to 512 rows", DEEPGEMM, lambda s: suites.flat(s, "contiguous", suites.SMALL)),
    "fp8-offsets": Suite(
        "FP8, no padding, 4 or 8 groups of thousands of rows", DEEPGEMM,
        lambda s: suites.flat(s, "offsets", suites.LARGE, suites.UNEVEN)),
    "fp8-offsets-small": Suite(
        "FP8, no padding, 8 groups of 64 to 512 rows", DEEPGEMM, lambda s: suites.flat(s, "offsets", suites.SMALL, suites.UNEVEN)),
    "fp8-offsets-e2e": Suite(
        "FP8, no padding, timed from BF16 tokens", DEEPGEMM,
        lambda s: [replace(c, e2e=True) for c in suites.flat(s, "offsets", (*suites.LARGE, *suites.SMALL), suites.UNEVEN)]),
    "fp8-masked": Suite(
        "FP8, masked, 192 or 1024 rows a group", DEEPGEMM,
        lambda s: suites.masked(s, ((32, 192, suites.UNEVEN), (6, 1024, suites.UNEVEN)))),
    "fp8-masked-eight": Suite("FP8, masked, 8 groups of 64 to 512 rows", DEEPGEMM, suites.masked_eight),
    "fp8-masked-decode": Suite(
        "FP8, masked, 1 to 20 rows a group", DEEPGEMM,
        lambda s: suites.masked(s, [(g, m, suites.UNEVEN if m == 20 else "balanced") for g in (32, 6) for m in (20, 1, 2, 4, 8)])),
    "fp8-dense": Suite("FP8, dense, 1 to 8192 rows", DEEPGEMM, lambda s: suites.dense(s, (1, 16, 64, 128, 4096, 8192))),
    "fp8-dense-models": Suite(
        "FP8, dense, shapes of four more models", DEEPGEMM,
        lambda s: [*suites.dense(s, (256, 512, 1024, 2048)), *suites.dense(s, (1, 16, 64, 128, 256, 1024, 4096), suites.PRODUCTS)]),
    "fp8-skew": Suite("FP8, 256 experts, a few of which have most rows", DEEPGEMM, suites.skewed),
    "untuned": Suite("FP8, shapes in no tuned table", DEEPGEMM, suites.untuned),
    "a16w4-decode": Suite(
        "BF16 x MXFP4 experts, 1 to 16 tokens", ("triton_kernels", "humming", "floor"), lambda s: suites.a16w4(s, (1, 4, 8, 16))),
    "a16w4-mid": Suite(
        "BF16 x MXFP4 experts, 64 and 256 tokens", ("triton_kernels", "humming", "floor"),
        lambda s: suites.a16w4(s, (64, 256), "fp8")),
    "a16w4-prefill": Suite(
        "BF16 x MXFP4 experts, 1024 and 4096 tokens", ("triton_kernels", "floor"), lambda s: suites.a16w4(s, (1024, 4096))),
    # both stages of Qwen3-30B-A3B, weights as they are
    "bf16-routed": Suite(
        "BF16 experts, 1 to 4096 tokens", ("torch_bf16", "floor"),
        lambda s: [replace(c, packed=False) for c in suites.routed(
            s, BF16, BF16, (1, 16, 64, 512, 2048, 4096), ((128, 8, 1536, 2048), (128, 8, 2048, 768)))]),
    "mxfp8-routed": Suite(
        "MXFP8 experts, packed, 1 to 256 tokens", ("dot_scaled", "triton", "humming", "deepgemm_block", "floor"),
        suites.mxfp8_routed),
    "mxfp8-dense-decode": Suite(
        "MXFP8, dense, packed, 1 to 64 tokens", FEW_TOKENS, lambda s: suites.mxfp8_dense(s, (1, 2, 4, 8, 16, 32, 64))),
    "mxfp4-contiguous": Suite(
        "FP8 x MXFP4, contiguous, groups of thousands of rows", FP8_MXFP4, lambda s: suites.fp4_contiguous(s, FP8_1x128)),
    "mxfp4-a4w4": Suite(
        "MXFP4 x MXFP4, contiguous, groups of thousands of rows", DEEPGEMM, lambda s: suites.fp4_contiguous(s, MXFP4)),
    "mxfp4-mx8": Suite(
        "MXFP8 x MXFP4, contiguous, groups of thousands of rows", ("dequant_bf16", "torch_bf16", "floor"),
        lambda s: suites.fp4_contiguous(s, MXFP8)),
    "mxfp4-256": Suite("FP8 x MXFP4, 256 experts, 32 to 8192 tokens", FP8_MXFP4, suites.fp4_experts),
    "mxfp4-256-row": Suite(
        "FP8 with one scale a row x MXFP4, 256 experts, top-8, 32-8192 tokens", ("humming_w4a8_token", "floor"),
        lambda s: suites.fp4_experts(s, FP8_ROW)),
    "mxfp4-masked": Suite("FP8 x MXFP4, masked, 256 to 1024 rows a group", ("own_fp8", "floor"), suites.fp4_masked),
    "mxfp4-masked-few": Suite("FP8 x MXFP4, masked, 4 or 16 rows a group", ("own_fp8", "floor"), suites.fp4_masked_few),
    "mxfp4-masked-spread": Suite(
        "FP8 x MXFP4, masked, 1 to 64 groups of 1 to 2048 rows: where choices change", ("own_fp8", "floor"),
        suites.fp4_masked_spread),
    "mxfp8-bandwidth": Suite(
        "MXFP8, dense, packed, large weights, 1 to 16 tokens", ("floor",),
        lambda s: suites.mxfp8_dense(s, (1, 2, 4, 8, 16), 30_000_000)),
    "mxfp8-plain-decode": Suite(
        "MXFP8, dense, as stored, 1 to 64 tokens", FEW_TOKENS,
        lambda s: suites.mxfp8_dense(s, (1, 2, 4, 8, 16, 32, 64), packed=False)),
    "mxfp8-plain-bandwidth": Suite(
        "MXFP8, dense, as stored, large weights, 1 to 16 tokens", ("floor",),
        lambda s: suites.mxfp8_dense(s, (1, 2, 4, 8, 16), 30_000_000, packed=False)),
    "mxfp8-prefill": Suite("MXFP8, packed, hundreds to thousands of rows", MANY_ROWS, suites.mxfp8_prefill),
    "mxfp8-prefill-refolded": Suite("MXFP8 as it came, folded by each call, hundreds to thousands of rows", MANY_ROWS,
                                    suites.mxfp8_refolded),
    "mxfp8-prefill-folded": Suite("MXFP8, packed and folded, hundreds to thousands of rows", MANY_ROWS, suites.mxfp8_folded),
    "train-fwd": Suite(
        "training, forward, row- and tensor-wise FP8", ("torch_row", "floor"),
        lambda s: suites.train_rows(s, ((8192, suites.ROW), (16384, suites.TENSOR), (32768, suites.ROW)), False)),
    "train-dgrad": Suite(
        "training, gradients of the input, row- and tensor-wise FP8", ("torch_row", "floor"),
        lambda s: suites.train_rows(s, ((8192, suites.ROW), (16384, suites.TENSOR), (32768, suites.ROW)), True)),
    "train-block": Suite(
        "training, forward and input gradients, FP8 in blocks", DEEPGEMM,
        lambda s: [c for b in (False, True) for c in suites.train_rows(s, ((16384, suites.BLOCK),), b, suites.TRAINED[:2])]),
    "train-wgrad": Suite("training, weight gradients", ("torch_row", "deepgemm", "floor"), suites.train_wgrad),
    "train-fast": Suite("training, sums left to the tensor core", ("torch_row", "floor"), suites.train_fast),
    "train-step": Suite(
        "training, a whole step of the experts, delayed scaling", STEPS,
        lambda s: suites.train_steps(s, ("delayed",), (8192, 16384, 32768), ("balanced", "skew128:30"))),
    "train-step-recipes": Suite(
        "training, a whole step, other recipes", STEPS,
        lambda s: [*suites.train_steps(s, ("tensorwise", "rowwise", "block"), (16384,), ("balanced",)),
                   *suites.train_steps(s, ("delayed", "block"), (16384,), ("balanced",), micro=1)]),
    "train-portable-fwd": Suite(
        "training, forward, tensor-wise FP8, 16384 tokens", ("triton_best",), partial(suites.train_portable, which="fwd")),
    "train-portable-dgrad": Suite(
        "training, gradients of the input, tensor-wise FP8, 16384 tokens", ("triton_best",),
        partial(suites.train_portable, which="dgrad")),
    "train-portable-wgrad": Suite(
        "training, weight gradients, tensor-wise FP8, 16384 tokens", ("triton_best",),
        partial(suites.train_portable, which="wgrad")),
    "edge": Suite("what breaks kernels: tails, empty and repeated groups, many experts", (), suites.edge),
    "large": Suite("tensors of more than 2^31 elements", (), suites.large),
    "cpu-small": Suite("every layout and output, small, for a CPU", ("torch_bf16", "floor"), suites.cpu_small),
    "cpu-formats": Suite("every pair of formats, small, for a CPU", ("torch_bf16", "floor"), suites.cpu_formats),
    "experts-fp8": Suite(
        "a whole expert layer, FP8, 1 to 16384 tokens", ("deepgemm_layer", "triton_moe", "floor"),
        lambda s: suites.layers(s, ("deepseek-v3", "qwen3-235b", "minimax-m3"), (1, 8), (1, 16, 256, 4096, 16384))),
    "experts-mxfp4": Suite(
        "a whole expert layer, MXFP4, 1 to 4096 tokens", ("triton_kernels_layer", "floor"),
        lambda s: suites.layers(s, ("gpt-oss-120b",), (1,), (1, 4, 16, 64, 256, 1024, 4096), "mxfp4", logits=True)),
    "experts-cpu": Suite(
        "a whole expert layer, small, for a CPU", ("floor",), lambda s: suites.layers(s, ("tiny",), (1, 2), (0, 1, 24))),
}
