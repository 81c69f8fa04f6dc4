"""Tuned tables: written and read back, the exact bucket first, then the nearest; illegal choices are passed by."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from narrowgemm.arch import get_arch
from narrowgemm.kernels.registry import kernels
from narrowgemm.ops.explain import describe
from narrowgemm.problem import Config
from narrowgemm.runtime import dispatch
from narrowgemm.tuning import store
from narrowgemm.tuning.fingerprint import fingerprint

DENSE = "gemm-dense-fp8_1x128-fp8_128x128.json"
GOOD = Config(64, 64, num_stages=4)


def row(rows: int, kernel: str = "triton.fp8_block", config: Config = GOOD, n: int = 512, k: int = 1024, **more: object) -> dict:
    return {"n": n, "k": k, "rows": rows, "adopted": True, "kernel": kernel, "config": config.to_dict(), "us": 5.0, **more}


def made_now() -> dict[str, str]:
    return {k: fingerprint(k) for k in kernels()}


def look(root: Path, m: int, n: int = 512, k: int = 1024, **how: object) -> store.Tuned | None:
    return store.lookup(describe("gemm", m=m, n=n, k=k, **how), "h200", str(root))  # type: ignore[arg-type]


def test_a_written_table_is_read_back_sorted(tmp_path: Path) -> None:
    path = store.write_table(tmp_path, "h200", DENSE, {"commit": "abc"}, [row(64), row(8), row(64, n=128)])
    doc = json.loads(path.read_text())
    assert (doc["schema"], doc["device"], doc["commit"]) == (store.SCHEMA, "h200", "abc")
    assert [store.row_key(r) for r in doc["rows"]] == [(128, 1024, 64), (512, 1024, 8), (512, 1024, 64)]
    assert path.read_text().count("\n") < 15 and not list(tmp_path.rglob("*.part"))   # a row a line
    found = look(tmp_path, 60)
    assert found is not None and (found.kernel, found.config, found.us) == ("triton.fp8_block", GOOD, 5.0)
    assert found.source == f"h200/{DENSE} (64 rows)"


def test_writing_again_replaces_keys_and_keeps_the_others(tmp_path: Path) -> None:
    store.write_table(tmp_path, "h200", DENSE, {}, [row(64), row(8)])
    assert look(tmp_path, 64).kernel == "triton.fp8_block"  # type: ignore[union-attr]
    store.write_table(tmp_path, "h200", DENSE, {}, [row(64, "other"), row(4096)])
    assert look(tmp_path, 64).kernel == "other" and look(tmp_path, 8).kernel == "triton.fp8_block"  # type: ignore[union-attr]
    assert len(store.read_rows(tmp_path / "h200" / DENSE)) == 3


@pytest.mark.parametrize(("have", "m", "expected"), [
    ((64, 96), 96, 96),      # its own bucket
    ((32, 64), 48, 64),      # 1.33 away rather than 1.5
    ((64,), 128, 64), ((256,), 128, 256),   # within a factor of two
    ((64, 256), 128, 256),   # equally near: the larger
    ((48,), 128, None), ((512,), 128, None), ((1,), 4096, None),
])
def test_the_nearest_bucket_within_a_factor_of_two(tmp_path: Path, have: tuple[int, ...], m: int, expected: int | None) -> None:
    store.write_table(tmp_path, "h200", DENSE, {}, [row(r, f"k{r}") for r in have])
    found = look(tmp_path, m)
    assert (found.kernel if found else None) == (f"k{expected}" if expected else None)
    assert look(tmp_path, m, n=640) is None and look(tmp_path, m, k=2048) is None


def test_packed_weights_take_larger_buckets_alone(tmp_path: Path) -> None:
    """Few tokens and many have kernels of their own."""
    weights = {"a": "mxfp8", "b": "mxfp8", "packed": True}
    problem = describe("gemm", m=96, n=512, k=1024, **weights)      # type: ignore[arg-type]
    name = store.table_name(problem)
    assert name != store.table_name(describe("gemm", m=96, n=512, k=1024, a="mxfp8", b="mxfp8"))
    store.write_table(tmp_path, "h200", name, {}, [row(64, "fewer")])
    assert look(tmp_path, 96, **weights) is None
    store.write_table(tmp_path, "h200", name, {}, [row(128, "more")])
    assert look(tmp_path, 96, **weights).kernel == "more"  # type: ignore[union-attr]
    assert look(tmp_path, 64, **weights).kernel == "fewer"  # type: ignore[union-attr]


def test_a_row_that_was_not_adopted_leaves_it_to_the_cost_model(tmp_path: Path) -> None:
    """Of its own bucket, and before a neighbour's choice."""
    store.write_table(tmp_path, "h200", DENSE, {}, [row(64, adopted=False), row(96)])
    assert look(tmp_path, 64) is None and look(tmp_path, 96) is not None


def test_the_users_rows_count_before_the_packaged_ones_of_the_same_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PACKAGED", tmp_path / "packaged")
    store.write_table(tmp_path / "packaged", "h200", DENSE, {}, [row(64, "packaged"), row(96, "packaged")])
    store.write_table(tmp_path / "mine", "h200", DENSE, {}, [row(64, "mine")])
    assert [look(tmp_path / "mine", m).kernel for m in (64, 96)] == ["mine", "packaged"]  # type: ignore[union-attr]
    assert store.lookup(describe("gemm", m=64, n=512, k=1024), "h200").kernel == "packaged"  # type: ignore[union-attr]
    assert store.lookup(describe("gemm", m=64, n=512, k=1024), "h100") is None


def test_groups_are_no_key(tmp_path: Path) -> None:
    name = "grouped_gemm-masked-fp8_1x128-fp8_128x128.json"
    store.write_table(tmp_path, "h200", name, {}, [row(24)])
    for groups in (1, 6, 32, 256):
        problem = describe("grouped_gemm", layout="masked", groups=groups, m=4096, expected_m=20, n=512, k=1024)
        assert store.lookup(problem, "h200", str(tmp_path)) is not None


def test_k_of_a_weight_gradient_is_a_bucket() -> None:
    keys = {store.key(describe("grouped_gemm_wgrad", layout="k_grouped", groups=8, m=512, n=512, k=k, b="fp8_1x128"))
            for k in (7200, 8000, 8192)}
    assert keys == {(512, 8192, 64)}


def test_no_rows_is_no_key(tmp_path: Path) -> None:
    store.write_table(tmp_path, "h200", DENSE, {}, [row(1)])
    problem = describe("gemm", m=1, n=512, k=1024)
    assert store.lookup(problem, "h200", str(tmp_path)) is not None
    assert store.lookup(dataclasses.replace(problem, rows=0), "h200", str(tmp_path)) is None


@pytest.mark.parametrize(("text", "message"), [
    ("{", "no JSON"), ('{"schema": 99, "rows": []}', r"got schema 99, expected 1; make it anew"), ("[]", "got schema None"),
    ('{"schema": 1, "rows": [{"n": 1}]}', "a row has no 'k'"),
])
def test_files_that_are_no_tables(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "h200" / DENSE
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        look(tmp_path, 64)


def test_a_choice_that_can_not_run_this_call_is_passed_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key says nothing of dtype, strides, SMs: what is legal for one call may not be for another."""
    monkeypatch.setenv("NARROWGEMM_TABLES", str(tmp_path))
    h200 = get_arch("h200")
    plain = describe("gemm", m=64, n=4096, k=7168)
    decode = next((c for c in _decode_configs(plain) if _illegal_as_fp32(c)), None)
    assert decode is not None, "no config of the decode kernel that FP32 output rules out"
    store.write_table(tmp_path, "h200", DENSE, {}, [row(64, "gluon_sm90.fp8_decode", decode, 4096, 7168, made=made_now())])
    dispatch._select.cache_clear()
    assert dispatch.select(plain, h200).config == decode and "tuned table" in dispatch.select(plain, h200).reason
    other = dispatch.select(describe("gemm", m=64, n=4096, k=7168, out_dtype="fp32"), h200)
    assert other.config != decode and "cost model" in other.reason
    few = dispatch.select(describe("gemm", m=64, n=4096, k=7168, max_sms=20), h200)   # legal there, so it is kept
    assert few.config == decode
    odd = dispatch.select(describe("gemm", m=64, n=4096, k=7168), h200, "triton")     # another backend was asked for
    assert odd.backend == "triton" and "cost model" in odd.reason
    dispatch._select.cache_clear()


def _decode_configs(problem) -> list[Config]:
    return kernels()["gluon_sm90.fp8_decode"].configs(problem, get_arch("h200"))


def _illegal_as_fp32(config: Config) -> bool:
    problem = describe("gemm", m=64, n=4096, k=7168, out_dtype="fp32")
    return dispatch.illegal(kernels()["gluon_sm90.fp8_decode"], problem, config, get_arch("h200")) is not None


def test_a_device_without_tables_takes_rows_of_its_sibling_where_arithmetic_decides(tmp_path: Path) -> None:
    store.write_table(tmp_path, "h200", DENSE, {}, [row(8192, n=4096, k=4096), row(16, n=4096, k=4096), row(4096, n=4096, k=4096)])
    large, small, near = (describe("gemm", m=m, n=4096, k=4096) for m in (8192, 16, 3000))
    h100, h200, h20 = (get_arch(x) for x in ("h100", "h200", "h20"))
    assert store.choose(large, h100, str(tmp_path)).source.startswith("h200/")      # type: ignore[union-attr]
    assert store.choose(near, h100, str(tmp_path)) is not None
    assert store.choose(small, h200, str(tmp_path)) is not None and store.choose(small, h100, str(tmp_path)) is None
    assert store.choose(large, h20, str(tmp_path)) is None      # another number of SMs
    store.write_table(tmp_path, "h100", DENSE, {}, [row(8192, "mine", n=4096, k=4096), row(4096, n=4096, k=4096) | {"adopted": False}])
    assert store.choose(large, h100, str(tmp_path)).kernel == "mine"                # type: ignore[union-attr]
    assert store.choose(near, h100, str(tmp_path)) is None      # its own row says that the model is right


def test_a_slice_of_a_device_takes_no_packaged_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were measured on all SMs; its own rows, in a folder of the user's, count."""
    monkeypatch.setattr(store, "PACKAGED", tmp_path / "packaged")
    store.write_table(tmp_path / "packaged", "h200", DENSE, {}, [row(64)])
    problem, whole = describe("gemm", m=64, n=512, k=1024), get_arch("h200")
    part = dataclasses.replace(whole, sms=16)
    assert store.choose(problem, whole) is not None and store.choose(problem, part) is None
    store.write_table(tmp_path / "mine", "h200", DENSE, {}, [row(64, "mine")])
    assert store.choose(problem, part, str(tmp_path / "mine")).kernel == "mine"     # type: ignore[union-attr]


@pytest.mark.parametrize("older", ["gluon_sm90.fp8_decode", "model", "unknown", ""])
def test_a_row_that_is_older_than_a_kernel_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: str) -> None:
    """Than its own, or than the one that the cost model takes instead; and where it names none."""
    monkeypatch.setenv("NARROWGEMM_TABLES", str(tmp_path))
    problem, h200 = describe("gemm", m=64, n=4096, k=7168), get_arch("h200")
    monkeypatch.setattr(kernels()["triton.fp8_block"], "estimate", lambda problem, config, arch: 1e-9)
    model = dispatch.select(problem, h200, "triton")
    made = {"gluon_sm90.fp8_decode": "as it is", "triton.fp8_block": "as it is"}
    monkeypatch.setattr(store, "fingerprint", lambda kernel: "as it is")
    if older == "unknown":
        made = {}
    elif older:
        made["triton.fp8_block" if older == "model" else older] = "as it was"
    decode = _decode_configs(problem)[-1]
    store.write_table(tmp_path, "h200", DENSE, {}, [row(64, "gluon_sm90.fp8_decode", decode, 4096, 7168, made=made)])
    dispatch._select.cache_clear()
    plan = dispatch.select(problem, h200)
    if not older:
        assert plan.config == decode and plan.reason.startswith("tuned table")
        return
    assert (plan.kernel, plan.config) == ("triton.fp8_block", model.config)
    named = "triton.fp8_block" if older == "model" else "gluon_sm90.fp8_decode"
    assert f"h200/{DENSE} (64 rows) was not measured with {named} as it is now" in plan.reason
    assert len(store.outdated(store.read_rows(tmp_path / "h200" / DENSE))) == (older != "model")


def test_packaged_rows_name_kernels_that_are_there() -> None:
    """Whether they are as they were, `narrowgemm doctor` says: a kernel may change before its rows are measured again."""
    for path in sorted(store.PACKAGED.glob("*/*.json")):
        for r in store.read_rows(path):
            assert r["kernel"] in kernels() and r["made"].get(r["kernel"]), (path.name, store.row_key(r))
