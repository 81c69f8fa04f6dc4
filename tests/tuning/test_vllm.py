"""vLLM's tuned files: read as candidates for the portable kernel, written from a sweep, refused where they are something else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from narrowgemm.arch import get_arch
from narrowgemm.cli.group import cli as main
from narrowgemm.problem import Config
from narrowgemm.testing.cases import get_suite
from narrowgemm.tuning import sweep, vllm
from narrowgemm.tuning.space import candidates, problem_of

TILE = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 32, "num_warps": 4, "num_stages": 4}
LARGE = TILE | {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128}
UP, DOWN = (256, 128), (128, 128)      # I = 128, H = 128
TABLE = "grouped_gemm-offsets-fp8_1x128-fp8_128x128.json"


def file(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_distinct_tiles_are_read(tmp_path: Path) -> None:
    got = vllm.read(file(tmp_path / "a.json", {"triton_version": "3.4.0", "1": TILE, "2": TILE, "64": LARGE}))
    assert got == [Config(16, 64, 128, 4, 4, 32), Config(64, 128, 128, 4, 4, 32)]


@pytest.mark.parametrize("data, match", [("{", "no JSON"), ([1], "object"), ({"triton_version": "3"}, "tiles"),
                                         ({"1": {"BLOCK_SIZE_M": 16}}, "BLOCK_SIZE_N"), ({"1": 3}, "missing")])
def test_other_files_are_refused(tmp_path: Path, data: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        vllm.read(file(tmp_path / "a.json", data))
    with pytest.raises(ValueError, match="that is there"):
        vllm.read(tmp_path / "none.json")


def test_what_the_kernel_can_not_run_is_left_out() -> None:
    arch, case = get_arch("h200"), next(c for c in get_suite("fp8-skew"))
    problem = problem_of(case)
    have = candidates(problem, arch)
    known = next(c for c in have if c.kernel == vllm.KERNEL)
    odd = replace(known.config, group_m=known.config.group_m + 5)
    found = vllm.candidates(problem, arch, [known.config, odd, replace(odd, block_k=64), replace(odd, block_n=256)], have)
    assert [c.config for c in found] == [odd] and found[0].predicted_us > 0
    assert vllm.candidates(replace(problem, op="routed_gemm"), arch, [odd], ()) == []


def record(n: int, k: int, m: int, times: dict[int, float | None]) -> dict[str, Any]:
    field = [{"kernel": vllm.KERNEL, "backend": "triton", "config": Config(b, 64, 128).to_dict(), "predicted_us": 1.0, "us": us,
              "error": None if us else "failed"} for b, us in times.items()]
    return {"suite": "s", "case": f"{n}-{k}-{m}", "table": TABLE, "n": n, "k": k, "rows": m, "groups": 4, "m": m, "error": None,
            "candidates": [*field, {**field[0], "kernel": "gluon_sm90.fp8_block", "us": 0.1, "error": None}]}


def test_the_best_of_both_products_is_written(tmp_path: Path) -> None:
    """16 rows a tile are best for one product, 64 failed in the other: 32 has the least sum."""
    records = [record(*UP, 64, {16: 1.0, 32: 2.0, 64: 1.5}), record(*DOWN, 64, {16: 9.0, 32: 2.0, 64: None}),
               record(*UP, 512, {32: 2.0, 64: 1.0}), record(*DOWN, 512, {32: 2.0, 64: 1.0}), record(4096, 7168, 64, {16: 1.0})]
    made = vllm.write(tmp_path, records, "NVIDIA H200", top_k=8)
    assert [p.name for p in made] == ["E=4,N=128,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"]
    data = json.loads(made[0].read_text())
    assert {t: v["BLOCK_SIZE_M"] for t, v in data.items()} == {"8": 32, "64": 64}
    assert vllm.read(made[0]) == [Config(32, 64, 128), Config(64, 64, 128)]
    alone = vllm.write(tmp_path / "alone", records, "NVIDIA H200", top_k=1)     # a layer whose tokens have one expert each
    assert list(json.loads(alone[0].read_text())) == ["64", "512"]
    few = vllm.write(tmp_path / "few", [record(*UP, 2, {16: 1.0}), record(*DOWN, 2, {16: 1.0})], "NVIDIA H200", top_k=8)
    assert list(json.loads(few[0].read_text())) == ["1"]      # fewer rows than a token has experts: still a token
    with pytest.raises(ValueError, match="top_k: got 0"):
        vllm.write(tmp_path, records, "NVIDIA H200", top_k=0)


def test_of_two_measurements_the_better_counts_and_a_cut_k_is_no_tile_of_vllms(tmp_path: Path) -> None:
    """Two cases of a product differ in what the key does not say: 16 rows were slow in one of them, and 32 never as fast."""
    records = [record(*UP, 64, {16: 1.0, 32: 3.0}), record(*UP, 64, {16: 9.0, 32: 3.0}), record(*DOWN, 64, {16: 1.0, 32: 1.0})]
    for r in records:
        split = Config(64, 64, 128, split_k=2).to_dict()
        r["candidates"].append({**r["candidates"][0], "config": split, "us": 0.1, "error": None})
    made = vllm.write(tmp_path, records, "NVIDIA H200", top_k=8)
    assert json.loads(made[0].read_text())["8"]["BLOCK_SIZE_M"] == 16


def test_commands(tmp_path: Path) -> None:
    log = tmp_path / "sweep.json"
    sweep.write(log, {"device": "NVIDIA H200", "arch": "h200"}, [record(*UP, 64, {16: 1.0}), record(*DOWN, 64, {16: 1.0})])
    done = CliRunner().invoke(main, ["tune", "--from", str(log), "--vllm-out", str(tmp_path / "out")])
    assert done.exit_code == 0 and "1 numbers of tokens" in done.output
    sweep.write(log, {"device": "NVIDIA H200", "arch": "h200"}, [record(*UP, 64, {16: 1.0})])
    done = CliRunner().invoke(main, ["tune", "--from", str(log), "--vllm-out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "two of a layer" in done.output
    done = CliRunner().invoke(main, ["tune", "--suite", "cpu-small", "--vllm", str(tmp_path / "none.json")])
    assert done.exit_code == 1 and "that is there" in done.output
    assert CliRunner().invoke(main, ["tune", "--suite", "cpu-small", "--vllm-out", "x"]).exit_code == 2
