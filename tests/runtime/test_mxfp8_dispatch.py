"""Every MXFP8 problem that a model brings gets a kernel made for it on Hopper, whatever its sizes; one refusal a guard, with its reason."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from narrowgemm import Unsupported, can_run
from narrowgemm.arch import get_arch
from narrowgemm.kernels.gluon.sm90 import narrow
from narrowgemm.ops.explain import describe, explain
from narrowgemm.problem import Epilogue, Operand
from narrowgemm.runtime import dispatch
from narrowgemm.testing.models import MODELS
from narrowgemm.testing.suites import M3_DENSE

MX = {"a": "mxfp8", "b": "mxfp8", "packed": True}
TOKENS = (1, 16, 256, 16384)


@pytest.mark.parametrize("device", ["h200", "h100"])
@pytest.mark.parametrize("name", ["minimax-m3", "minimax-m2", "deepseek-v3", "qwen3-235b"])
def test_models_at_every_tp_and_ep(name: str, device: str) -> None:
    """Both products, by offsets and by vLLM's slots; K down to 384 and 192 (Qwen3 and M2 at TP 8)."""
    m = MODELS[name]
    seen = set()
    for tp in (1, 2, 4, 8):
        for ep in (1, 2, 4, 8, 16, 32):
            for n, k in (m.gate_up(tp), m.down(tp)):
                seen.add(k)
                for tokens in TOKENS:
                    for layout in ("offsets", "routed"):
                        ok, why = can_run("routed_gemm", layout=layout, groups=m.local_experts(ep), m=max(1, tokens * m.top_k // ep),
                                          n=n, k=k, device=device, **MX)
                        assert ok and why.startswith("gluon_sm90.narrow"), (tp, ep, n, k, tokens, layout, why)
    assert m.inter // 8 in seen


@pytest.mark.parametrize("out_dtype", ["bf16", "fp16", "fp32"])
def test_dense_of_any_size(out_dtype: str) -> None:
    sizes = [(k, n) for k, n in M3_DENSE] + [(32, 1), (64, 7), (96, 100), (384, 6144), (192, 3072), (2880, 720), (7168, 576)]
    for k, n in sizes:
        for m in (*range(1, 19), 33, 64, 65, 129, 1000, 100_000):
            ok, why = can_run("gemm", m=m, n=n, k=k, out_dtype=out_dtype, device="h100", **MX)
            assert ok and why.startswith(("gluon_sm90.narrow", "gluon_sm90.expand")), (m, n, k, why)


def test_dense_weights_that_are_not_packed() -> None:
    """Few tokens in FP8, 33 to 64 beside large weights as rows; from 65 to 512 in BF16, from 129 to 2048 in FP16, weights in registers; many in
    BF16; the portable one, which takes them as well, is not what is chosen."""
    for k, n in M3_DENSE:
        for m in (1, 5, 16, 33, 64, 65, 80, 128, 160, 192, 256, 257, 400, 1000, 100_000):
            given = {"m": m, "n": n, "k": k, "a": "mxfp8", "b": "mxfp8", "device": "h200"}
            ok, why = can_run("gemm", **given)
            kernels = ("gluon_sm90.mx8_decode", ) * (m <= 256) + ("gluon_sm90.expand", ) * (m > 64)
            kernels += ("gluon_sm90.mx8_bf16", ) * (64 < m <= 512) + ("gluon_sm90.mx8_f16", ) * (128 < m <= 2048)
            kernels = ("gluon_sm90.mx8_rows", ) if 33 <= m <= 64 and n * k > 13e6 else kernels
            assert ok and why.startswith(kernels), (m, n, k, why)
            assert explain("gemm", **given).plan.kernel in kernels, (m, n, k)


def test_experts_are_no_key_and_weights_may_pass_two_gib() -> None:
    """M3 has 128 experts, M2 256: what is chosen does not change with their number while each has as many rows."""
    chosen = set()
    for groups in (32, 64, 128, 256, 512):
        ok, _ = can_run("routed_gemm", layout="routed", groups=groups, m=groups * 2, n=6144, k=6144, device="h100", **MX)
        chosen.add(explain("routed_gemm", layout="routed", groups=groups, m=groups * 2, n=6144, k=6144, device="h100", **MX).plan.kernel)
        assert ok
    assert chosen == {narrow.NAME}


@pytest.mark.parametrize("b, m, n, k, groups, kernel", [
    ("mxfp8", 16, 6144, 6144, 1, "narrow"), ("mxfp8", 512, 9216, 6144, 1, "narrow_prefill"), ("mxfp8", 8192, 9216, 6144, 1, "expand"),
    ("mxfp8", 8192, 6144, 6144, 8, "narrow_prefill"), ("mxfp4", 32768, 4096, 7168, 4, "fold_mixed")])
def test_the_more_rows_a_weight_meets_the_earlier_it_is_expanded(b: str, m: int, n: int, k: int, groups: int, kernel: str) -> None:
    """In registers for each tile, once a call to BF16, or to FP8 where MXFP4 folds."""
    given = {"op": "gemm"} if groups == 1 else {"op": "grouped_gemm", "layout": "contiguous", "groups": groups}
    problem = describe(m=m, n=n, k=k, a="mxfp8", b=b, packed=True, **given)
    problem = replace(problem, b=replace(problem.b, folds=b == "mxfp4"))
    assert dispatch.select(problem, get_arch("h100")).kernel == f"gluon_sm90.{kernel}"


@pytest.mark.parametrize("m, n, k, groups, kernel", [
    (16, 6144, 6144, 1, "narrow"), (512, 2304, 6144, 1, "fold_both"), (2048, 2304, 6144, 1, "fold_both"), (2048, 9216, 6144, 1, "fold_both"), (8192, 6144, 6144, 8, "fold_both"),
    (64, 6144, 6144, 8, "narrow_prefill")])
def test_a_folded_copy_is_for_many_rows(m: int, n: int, k: int, groups: int, kernel: str) -> None:
    given = {"op": "gemm"} if groups == 1 else {"op": "grouped_gemm", "layout": "offsets", "groups": groups}
    problem = describe(m=m, n=n, k=k, a="mxfp8", b="mxfp8", packed=True, **given)
    problem = replace(problem, b=replace(problem.b, picks=-(-n // 256) * 128))
    plan = dispatch.select(problem, get_arch("h200"))
    assert plan.kernel == f"gluon_sm90.{kernel}"
    plain = dispatch.select(replace(problem, b=replace(problem.b, picks=-1)), get_arch("h200"))
    assert plain.kernel != "gluon_sm90.fold_both" and "folded copy" in dict(plain.passed_over)["gluon_sm90.fold_both"]


SIZES = {"m": 8, "n": 256, "k": 512, "device": "h100"}


@pytest.mark.parametrize("change, match", [
    ({"packed": False, "op": "grouped_gemm", "layout": "masked", "groups": 8}, "takes weights that narrowgemm.prepack"),
    ({"packed": False, "n": 4, "k": 96}, "K a multiple of 128"),
    ({"device": "mi350x"}, "runs on NVIDIA Hopper"), ({"device": "b200"}, "runs on NVIDIA Hopper"), ({"device": "cpu"}, "runs on NVIDIA Hopper"),
    ({"a": "fp8_row"}, "brings BF16, FP16, MXFP8, MXFP4 and FP8 1x128"),
    ({"op": "routed_gemm", "layout": "offsets", "groups": 2000}, "lists 1024 experts"),
    ({"m": 1 << 19, "k": 8192}, r"within 2\^31 elements"),
    ({"op": "grouped_gemm", "layout": "masked", "groups": 256, "m": 4096, "k": 7168}, r"within 2\^31|has room for"),
    ({"op": "grouped_gemm", "layout": "masked", "groups": 40, "m": 4096, "k": 7168, "a": "fp16"}, "has room for less than 4294967296 bytes"),
])
def test_each_guard_says_why(change: dict, match: str) -> None:
    given = {"op": "gemm", **MX, **SIZES} | change
    op = given.pop("op")
    ok, why = can_run(op, **given)
    assert not ok and re.search(match, why), why


@pytest.mark.parametrize("change, match", [
    ({"accumulate": True, "wide": True}, "no accumulation"),
    ({"epilogue": Epilogue(activation="swiglu")}, "weights packed with pair="),
    ({"epilogue": Epilogue(quantize=describe("gemm", m=1, n=1, k=32, a="mxfp8", b="mxfp8").a.format)}, "no quantised output"),
    ({"a": Operand(describe("gemm", m=1, n=1, k=32, a="mxfp8", b="mxfp8").a.format, "mn", "", "e8m0", "mn")}, "K-major"),
])
def test_guards_of_what_a_call_adds(change: dict, match: str) -> None:
    problem = replace(describe("gemm", m=8, n=256, k=512, **MX), **change)
    with pytest.raises(Unsupported, match=match):
        dispatch.select(problem, get_arch("h100"), on_unsupported="raise")


def test_what_a_fast_kernel_refuses_runs_and_says_so() -> None:
    found = explain("grouped_gemm", layout="masked", groups=8, m=8, n=256, k=512, a="mxfp8", b="mxfp8", device="h100")
    assert found.plan.kernel == "triton.mx" and "no fast kernel takes this problem" in found.plan.reason
    assert "prepack" in dict(found.plan.passed_over)[narrow.NAME]
