"""Selection: a pure function that never raises for a well-formed problem and never chooses what does not fit."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest

import narrowgemm as ng
from narrowgemm.arch import ARCHS, get_arch
from narrowgemm.formats import BF16, MXFP8, FP8_1x128
from narrowgemm.kernels.registry import candidates, kernels
from narrowgemm.ops import steps
from narrowgemm.ops.explain import describe, explain
from narrowgemm.problem import Config, bucket, middle
from narrowgemm.runtime import dispatch
from narrowgemm.testing.cases import build
from narrowgemm.tuning.fingerprint import fingerprint

from ..test_gpu import FP8_KERNELS, SPACE

TARGETS = ("h200", "h100", "h20", "b200", "rtx5090", "mi300x", "mi350x", "l40s", "a100", "cpu")


@pytest.mark.parametrize("device", TARGETS)
def test_no_rows_get_a_plan(device: str) -> None:
    """Of a layer without tokens every step and product is planned like any other."""
    problems = [describe("gemm" if layout == "dense" else "grouped_gemm", layout=layout, groups=1 if layout == "dense" else 8, m=0, n=256, k=256,
                         a=a, b=b) for layout in ("dense", "contiguous", "psum", "offsets", "masked")
                for a, b in (("fp8_1x128", "fp8_128x128"), ("mxfp8", "mxfp8"), ("bf16", "mxfp4"), ("bf16", "bf16"))]
    problems += [describe("gemm" if layout == "dense" else "routed_gemm", layout=layout, groups=1 if layout == "dense" else 8, m=0, n=256, k=256,
                          a=a, b=b, packed=packed) for layout in ("dense", "offsets", "routed")
                 for a, b, packed in (("mxfp8", "mxfp8", True), ("bf16", "mxfp4", True), ("fp8_1x128", "mxfp4", "fp8"), ("bf16", "mxfp8", True))]
    problems += [steps.route_problem(0, 8, 2, 0, BF16), steps.sort_problem(0, 8), steps.combine_problem(0, 256, 2, 8, BF16, False)]
    for fmt in (BF16, MXFP8, FP8_1x128):
        problems += [steps.activate_problem(0, 256, groups, 0, BF16, fmt, steps.scale_layout_of(fmt), "swiglu", (), False, False)
                     for groups in (0, 8)]
        problems += [make(0, 256, 2, 8, BF16, fmt, steps.scale_layout_of(fmt)) for make in (steps.gather_problem, steps.sort_gather_problem)]
    for problem in problems:
        plan = dispatch.select(problem, get_arch(device))
        assert plan.predicted_us >= 0, (plan, problem)


@pytest.mark.parametrize("packed", [False, True, "fp8"])
@pytest.mark.parametrize("sizes", [{"n": 0}, {"groups": 0}, {"k": 0}, {"m": 0}])
def test_empty_products_are_explained(sizes: dict, packed: bool | str) -> None:
    for op, layout in (("gemm", "dense"), ("grouped_gemm", "offsets"), ("grouped_gemm", "masked"), ("routed_gemm", "routed")):
        for a, b in (("fp8_1x128", "mxfp4"), ("mxfp8", "mxfp8"), ("bf16", "mxfp4"), *((("fp8_1x128", "fp8_128x128"), ) if not packed else ())):
            given = {"groups": 1 if layout == "dense" else 4, "m": 5, "n": 64, "k": 128} | sizes
            assert explain(op, layout=layout, a=a, b=b, packed=packed, device="h200", **given).plan.predicted_us >= 0


@pytest.mark.parametrize("device", TARGETS)
def test_thousands_of_problems_get_a_legal_plan(device: str) -> None:
    arch = get_arch(device)
    rng = random.Random(device)
    for _ in range(1500):
        layout = rng.choice(["dense", "contiguous", "psum", "offsets", "masked", "k_grouped"])
        op = {"dense": "gemm", "k_grouped": "grouped_gemm_wgrad"}.get(layout, "grouped_gemm")
        groups = 1 if layout == "dense" else rng.choice([1, 2, 3, 7, 32, 256, 1024])
        problem = describe(op, layout=layout, groups=groups, m=int(2 ** rng.uniform(0, 17)), n=rng.choice([1, 8, 72, 576, 2112, 7168, 32768]),
                           k=rng.choice([1, 32, 100, 128, 384, 2048, 7168, 16384]),
                           a=rng.choice(["fp8_1x128", "fp8_row", "fp8_tensor", "fp8_1x128_ue8m0", "mxfp8", "mxfp4", "bf16"]),
                           b="fp8_1x128" if layout == "k_grouped" else rng.choice(["fp8_128x128", "fp8_row", "mxfp8", "mxfp4", "bf16"]),
                           out_dtype=rng.choice(["bf16", "fp16", "fp32"]), max_sms=rng.choice([0, 0, 1, 64]))
        plan = dispatch.select(problem, arch)
        kernel = kernels()[plan.kernel]
        assert kernel.supports(problem, arch) is None
        assert dispatch.illegal(kernel, problem, plan.config, arch) is None, (plan, problem)
        assert plan.predicted_us > 0 and plan.reason
        assert {n for n, _ in plan.passed_over} == set(candidates(plan.problem.op)) - {plan.kernel}
        assert all(reason for _, reason in plan.passed_over)
        assert plan.workspace_bytes == kernel.workspace(problem, plan.config)


def test_every_candidate_is_legal() -> None:
    for arch in ARCHS.values():
        for layout, groups in (("dense", 1), ("contiguous", 8), ("offsets", 8), ("masked", 8), ("k_grouped", 8)):
            op = {"dense": "gemm", "k_grouped": "grouped_gemm_wgrad"}.get(layout, "grouped_gemm")
            for m in (1, 20, 200, 5000):
                problem = describe(op, layout=layout, groups=groups, m=m, n=4096, k=7168, b="fp8_1x128" if layout == "k_grouped" else "fp8_128x128")
                for kernel in kernels().values():
                    if kernel.supports(problem, arch) is None:
                        configs = kernel.configs(problem, arch)
                        offered = getattr(kernel, "_CANDIDATES", True)      # a kernel that is not chosen yet offers none
                        assert (1 if offered else 0) <= len(configs) <= 24
                        for c in configs:
                            assert dispatch.illegal(kernel, problem, c, arch) is None, (arch.name, problem, c)


FORMATS = (("fp8_1x128", "fp8_128x128", False), ("mxfp8", "mxfp8", False), ("mxfp8", "mxfp8", True), ("bf16", "mxfp4", True))


@pytest.mark.parametrize("a, b, packed", FORMATS)
def test_no_row_of_a_batch_invariant_product_is_summed_by_the_number_of_rows(a: str, b: str, packed: bool) -> None:
    """Neither in what is offered nor in what a tuned row or `config=` may ask for: what cuts K at other row counts is refused."""
    arch, cuts = get_arch("h200"), 0
    for m in (1, 16, 60):
        free = describe("gemm", m=m, n=1024, k=7168, a=a, b=b, packed=packed)
        fixed = dataclasses.replace(free, batch_invariant=True)
        for kernel in kernels().values():
            if kernel.supports(free, arch) is None and kernel.supports(fixed, arch) is None:
                allowed = kernel.configs(fixed, arch)
                assert all(c.split_k == 1 for c in allowed)
                others = [c for c in kernel.configs(free, arch) if c.split_k > 1 or (kernel.NAME == "gluon_sm90.narrow" and c not in allowed)]
                assert all(dispatch.illegal(kernel, fixed, c, arch) for c in others), kernel.NAME
                cuts += len(others)
    assert cuts


def test_bucket_is_monotone_and_close() -> None:
    values = [bucket(m) for m in range(0, 5000)]
    assert values == sorted(values)
    assert all(m <= b <= max(2 * m - 1, m) for m, b in enumerate(values) if m)
    assert len(set(values)) < 40
    assert all(b <= 1.25 * m for m, b in enumerate(values) if m > 64)     # whole waves of tiles hang on it there


def test_the_middle_of_a_bucket_is_the_mean_of_its_numbers() -> None:
    members: dict[int, list[int]] = {}
    for m in range(1, 4097):
        members.setdefault(bucket(m), []).append(m)
    assert all(abs(middle(b) - sum(v) / len(v)) <= 0.5 for b, v in members.items())


def test_a_new_token_count_in_the_bucket_keeps_the_plan() -> None:
    plans = {dispatch.select(describe("gemm", m=m, n=4096, k=7168), get_arch("h200")) for m in range(97, 113)}
    assert len(plans) == 1


def test_backend_is_honoured_or_refused(monkeypatch) -> None:
    problem = describe("gemm", m=64, n=512, k=512)
    assert dispatch.select(problem, get_arch("h200"), "reference").backend == "reference"
    with pytest.raises(ng.Unsupported, match="runs on a GPU"):
        dispatch.select(problem, get_arch("cpu"), "triton")
    with pytest.raises(ValueError, match="backend: got 'cuda'"):
        dispatch.select(problem, get_arch("h200"), "cuda")
    monkeypatch.setenv("NARROWGEMM_BACKEND", "reference")
    assert dispatch.select(problem, get_arch("h200")).backend == "reference"


def test_on_unsupported_raise_names_every_reason() -> None:
    problem = describe("gemm", m=64, n=512, k=512, a="mxfp8", b="fp8_128x128")
    assert dispatch.select(problem, get_arch("h200")).backend == "reference"
    with pytest.raises(ng.Unsupported, match=r"portable, and on_unsupported='raise'"):
        dispatch.select(problem, get_arch("h200"), on_unsupported="raise")


def test_illegal_config_is_named() -> None:
    problem = describe("gemm", m=64, n=512, k=512)
    with pytest.raises(ValueError, match="crosses a 128-column scale block"):
        dispatch.select(problem, get_arch("h200"), "triton", Config(64, 256))
    with pytest.raises(ValueError, match="bytes of shared memory"):
        dispatch.select(problem, get_arch("h200"), "triton", Config(128, 128, num_stages=12))


def test_a_tuned_table_decides_and_does_not_break_others(tmp_path, monkeypatch) -> None:
    """A row of the table is followed; a row that is illegal here is passed by; every other shape is untouched."""
    table = tmp_path / "h200" / "gemm-dense-fp8_1x128-fp8_128x128.json"
    table.parent.mkdir()
    good = {"n": 512, "k": 1024, "rows": 64, "kernel": "triton.fp8_block", "config": Config(64, 64, num_stages=4).to_dict(), "us": 5.0,
            "made": {k: fingerprint(k) for k in kernels()}}
    bad = {**good, "k": 2048, "config": Config(128, 128, num_stages=12).to_dict()}
    table.write_text(json.dumps({"schema": 1, "rows": [good, bad]}))
    monkeypatch.setenv("NARROWGEMM_TABLES", str(tmp_path))
    plan = explain("gemm", m=60, n=512, k=1024, device="h200").plan
    assert plan.config == Config(64, 64, num_stages=4) and plan.reason.startswith("tuned table") and plan.predicted_us == 5.0
    for k in (2048, 4096):
        assert "cost model" in explain("gemm", m=60, n=512, k=k, device="h200").plan.reason
    table.write_text(json.dumps({"schema": 99, "rows": []}))
    from narrowgemm.tuning import store

    store._table.cache_clear()
    with pytest.raises(ValueError, match="got schema 99"):
        store.lookup(describe("gemm", m=60, n=512, k=1024), "h200", str(tmp_path))
    store._table.cache_clear()


def test_explain_answers_without_a_gpu() -> None:
    e = explain("grouped_gemm", layout="masked", groups=32, m=20, n=6144, k=7168, device="h200")
    assert e.plan.problem.layout == "masked" and e.floor_us == pytest.approx(304, rel=0.05)
    doc = json.loads(json.dumps(e.to_dict()))
    assert doc["kernel"] == e.plan.kernel and doc["passed_over"]
    assert "predicted" in str(e) and all(name in str(e) for name in candidates("gemm"))


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"op": "matmul"}, "op: got 'matmul'"), ({"layout": "ragged"}, "layout: got 'ragged'"), ({"m": -1}, "m: got -1"),
    ({"a": "fp7"}, "format: got 'fp7'"), ({"out_dtype": "int8"}, "out_dtype: got 'int8'"), ({"device": "h2000"}, "device: got 'h2000'"),
    ({"layout": "masked"}, "layout of gemm"),
])
def test_explain_rejects(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain(**{"op": "gemm", "m": 64, "n": 512, "k": 512, "device": "h200", **kwargs})


def test_config_round_trips_through_json() -> None:
    c = Config(64, 128, num_stages=5, swap_ab=True, extra=(("consumers", 2),))
    assert Config.from_dict(json.loads(json.dumps(c.to_dict()))) == c


def test_the_kernels_of_fp8_blocks_are_those_that_a_gpu_is_tested_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/test_gpu.py` runs each config of each of them; one that comes is to be named there."""
    monkeypatch.setenv("NARROWGEMM_ARCH", "h200")
    problems = [build(c, "cpu", hollow=True).plan().problem for c in SPACE]
    taken = {name for name, k in kernels().items() for p in problems
             for arch in ARCHS.values() if arch.vendor != "cpu" and k.BACKEND != "reference" and k.supports(p, arch) is None}
    assert taken == set(FP8_KERNELS)


def test_the_reference_is_for_what_no_kernel_takes() -> None:
    """However few the FLOPs: its time is hardly predicted, and it may wait for the host."""
    for m in (1, 16):
        plan = explain("gemm", m=m, n=768, k=6144, a="mxfp8", b="mxfp4", device="h200").plan
        assert plan.kernel == "triton.mx" and "reference" in dict(plan.passed_over)
    assert explain("gemm", m=16, n=768, k=6144, a="fp32", b="fp32", device="h200").plan.backend == "reference"
