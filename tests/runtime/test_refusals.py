"""What each kernel refuses, and what it says: a condition that is dropped fails here, before a device finds it by reading outside a tensor.

Refusals of formats and layouts are met by other tests on the way; these are of strides, sizes and options that few calls have.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from narrowgemm.arch import get_arch
from narrowgemm.formats import BF16, FP8_ROW, MXFP8, FP8_1x128, FP8_128x128
from narrowgemm.kernels.registry import kernels
from narrowgemm.ops import steps
from narrowgemm.ops.explain import describe
from narrowgemm.problem import Config, Epilogue, Operand, Problem

H200 = get_arch("h200")
BIASED = Epilogue(bias=True)


def wgrad(fmt: str, **kw: Any) -> Problem:
    p = describe("grouped_gemm_wgrad", layout="k_grouped", groups=4, m=512, n=512, k=4096, a=fmt, b=fmt, out_dtype="fp32")
    return replace(p, a=replace(p.a, scale_major="mn"), b=replace(p.b, scale_major="mn"), alignment=128, **kw)


def both(fmt: Any = FP8_1x128, source: Any = BF16, **kw: Any) -> Problem:
    return Problem("quantize_both", "offsets", 512, 0, 512, 4, Operand(source), Operand(fmt, scale_dtype=fmt.scale), **kw)


def backward(fmt: Any = FP8_ROW, source: Any = BF16, inter: int = 256, **kw: Any) -> Problem:
    return steps.activate_both_problem("activate_backward", 512, inter, 4, source, fmt, "swiglu", (), **kw)


def folded(a: str, m: int = 512) -> Problem:
    return describe("grouped_gemm", layout="masked", groups=4, m=m, n=512, k=1024, a=a, b="mxfp4", packed=True)


BLOCKS = describe("grouped_gemm", layout="masked", groups=4, m=256, n=512, k=1024)
ROWS, FINE = wgrad("fp8_row"), wgrad("fp8_1x128")
HALVES = describe("grouped_gemm", layout="masked", groups=4, m=64, n=512, k=1024, a="bf16", b="bf16")
DENSE = describe("gemm", m=256, n=512, k=1024, a="bf16", b="bf16")
MX = describe("grouped_gemm", layout="masked", groups=4, m=64, n=512, k=1024, a="mxfp8", b="mxfp8")
PACKED = replace(BLOCKS.b, prepack="an order")
REFUSED = [
    ("gluon_sm90.fp8_wgrad", FINE, {"alignment": 64}, "at multiples of 128"), ("gluon_sm90.fp8_wgrad", ROWS, {"n": 4}, "at least 8 columns"),
    ("gluon_sm90.fp8_wgrad", ROWS, {"out_dtype": "fp64"}, "not fp64"), ("gluon_sm90.fp8_wgrad", ROWS, {"promote": 64}, "not every 64"),
    ("gluon_sm90.fp8_wgrad", ROWS, {"groups": 1 << 20}, "groups, not 1048576"), ("gluon_sm90.fp8_wgrad", ROWS, {"wide": True}, "2^31"),
    ("gluon_sm90.fp8_block", BLOCKS, {"out_dtype": "fp64"}, "not fp64"), ("gluon_sm90.fp8_block", BLOCKS, {"b": PACKED}, "not prepacked"),
    ("gluon_sm90.quantize_both", both(), {"a": Operand(BF16, aligned=False)}, "begin on 16 bytes"),
    ("gluon_sm90.quantize_both", both(), {"b": Operand(FP8_128x128)}, "no scales of 128x128"),
    ("gluon_sm90.activate_both", backward(), {"a": Operand(BF16, aligned=False)}, "begin on 16 bytes"),
    ("gluon_sm90.activate_both", backward(), {"k": 252}, "begin on 16 bytes"), ("gluon_sm90.activate_both", backward(), {"b": Operand(BF16)}, "FP8"),
    ("triton.activate_both", backward(FP8_1x128), {"k": 192}, "blocks of 128, not 192"),
    ("triton.activate_both", backward(), {"b": Operand(MXFP8)}, "scales of (1, 32)"), ("triton.quantize_both", both(), {"b": Operand(MXFP8)}, "(1, 32)"),
    ("gluon_sm90.fold", folded("mxfp4"), {"m": 1 << 20}, "room for all 4194304 rows"),
    ("gluon_sm90.fold", folded("fp8_1x128"), {"a": Operand(FP8_1x128, major="mn", scale_dtype="fp32")}, "K-major"),
    ("torch_bf16", DENSE, {"epilogue": BIASED}, "no epilogue"), ("torch_bf16", DENSE, {"gather": True}, "no fused gather"),
    ("triton.bf16", HALVES, {"epilogue": BIASED}, "no epilogue"), ("triton.bf16", HALVES, {"b": replace(HALVES.b, prepack="an order")}, "not prepacked"),
    ("triton.fp8_block", BLOCKS, {"epilogue": BIASED}, "no epilogue"), ("triton.fp8_block", BLOCKS, {"b": PACKED}, "not prepacked"),
    ("triton.mx", MX, {"b": replace(MX.b, major="mn")}, "K-major"), ("triton.mx", MX, {"b": replace(MX.b, scale_dtype="fp32")}, "not mxfp8"),
]
LIKE_BLOCKS = Config(64, 64, persistent=True, num_stages=4)
ILLEGAL = [
    ("triton.fp8_block", BLOCKS, LIKE_BLOCKS, {"block_k": 64}, "128"), ("triton.fp8_block", BLOCKS, LIKE_BLOCKS, {"block_n": 512}, "block_n=512"),
    ("triton.fp8_block", BLOCKS, LIKE_BLOCKS, {"split_k": 2}, "dense problems"),
    ("triton.fp8_block", BLOCKS, LIKE_BLOCKS, {"persistent": False}, "persistent=True"),
    ("triton.fp8_block", BLOCKS, LIKE_BLOCKS, {"num_stages": 40}, "bytes of shared memory"),
    ("triton.bf16", HALVES, LIKE_BLOCKS, {"split_k": 2}, "without split_k"), ("triton.bf16", HALVES, LIKE_BLOCKS, {"block_m": 256}, "block_m=256"),
    ("triton.bf16", HALVES, LIKE_BLOCKS, {"num_stages": 40}, "bytes of shared memory"),
    ("triton.mx", MX, replace(LIKE_BLOCKS, num_stages=3), {"block_n": 256}, "block_n=256"),
    ("triton.mx", MX, replace(LIKE_BLOCKS, num_stages=3), {"swap_ab": True}, "without split_k and swap_ab"),
]


@pytest.mark.parametrize("name, problem, change, why", REFUSED, ids=[f"{r[0]} {r[3]}" for r in REFUSED])
def test_a_problem_is_refused(name: str, problem: Problem, change: dict[str, Any], why: str) -> None:
    kernel = kernels()[name]
    assert kernel.supports(problem, H200) is None
    assert why in str(kernel.supports(replace(problem, **change), H200))


@pytest.mark.parametrize("name, problem, config, change, why", ILLEGAL, ids=[f"{r[0]} {r[4]}" for r in ILLEGAL])
def test_a_config_is_refused(name: str, problem: Problem, config: Config, change: dict[str, Any], why: str) -> None:
    legal = kernels()[name].legal       # type: ignore[attr-defined]
    assert legal(problem, config, H200) is None
    assert why in str(legal(problem, replace(config, **change), H200))
