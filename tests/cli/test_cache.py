"""`narrowgemm cache`: an account of Triton's folder, clearing no more than was asked, and what warming would take."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from narrowgemm import MXFP4, quantize
from narrowgemm.arch import get_arch
from narrowgemm.cli import cache as cli_cache
from narrowgemm.cli.group import cli
from narrowgemm.ops.compile_ahead import Layer, Products
from narrowgemm.ops.prepare import zeros
from narrowgemm.problem import buckets
from narrowgemm.runtime import cache

OWN, FOREIGN, HELPER = ("A" * 52, "B" * 52, "c" * 64)


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, ["cache", *args])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "triton"
    for key, name in ((OWN, "fp8_block_kernel.json"), (FOREIGN, "someone_elses.json"), (HELPER, "launcher.so")):
        (root / key).mkdir(parents=True)
        (root / key / name).write_text("x" * 500_000)
    (root / OWN / "__grp__fp8_block_kernel.json").write_text("x" * 500_000)
    (root / "notes").mkdir()
    (root / "notes" / "mine.txt").write_text("keep")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(root))
    return root


def test_the_folder_is_tritons_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    for name, value in (("TRITON_CACHE_DIR", str(tmp_path)), ("TRITON_CACHE_DIR", ""), ("TRITON_HOME", str(tmp_path))):
        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
        if value:
            monkeypatch.setenv(name, value)
        assert cache.folder() == Path(triton.knobs.cache.dir if name == "TRITON_CACHE_DIR" else tmp_path / ".triton" / "cache")


def test_our_kernels_are_known_by_name() -> None:
    names = cache.own_kernels()
    assert {"fp8_block_kernel", "reduce_splits_kernel", "fp8_decode_kernel", "fp8_wgrad_kernel"} <= names


def test_info(folder: Path) -> None:
    done = run("info")
    assert done.exit_code == 0 and "entries   3, 2.0 MB" in done.output and "1 are narrowgemm's, 1.0 MB" in done.output
    assert "    1  fp8_block_kernel" in done.output and str(folder) in done.output


def test_info_without_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "none"))
    assert "not there yet" in run("info").output and "nothing to remove" in run("clear", "--yes").output


def test_clear_asks_and_takes_our_kernels_alone(folder: Path) -> None:
    refused = CliRunner().invoke(cli, ["cache", "clear"], input="n\n")
    assert refused.exit_code == 1 and "remove 1 entries" in refused.output and (folder / OWN).exists()
    done = CliRunner().invoke(cli, ["cache", "clear"], input="y\n")
    assert done.exit_code == 0 and not (folder / OWN).exists() and (folder / FOREIGN).exists()
    done = run("clear", "--all", "--yes")
    assert "removed 2 entries" in done.output and [p.name for p in folder.iterdir()] == ["notes"]


def test_warm_without_a_gpu_lists_what_a_named_one_compiles() -> None:
    done = run("warm", "--model", "deepseek-v3", "--ep", "8", "--layout", "offsets,masked", "--max-m", "512", "--device", "h200")
    assert done.exit_code == 0 and "takes a GPU of the kind that will serve, here h200" in done.output
    for part in ("on h200 (sm90)", "offsets", "masked", "G32 N4096 K7168", "G32 N7168 K2048", "gluon_sm90.fp8_decode"):
        assert part in done.output
    here = run("warm", "--model", "gpt-oss-20b", "--max-m", "64", "--device", "cpu")
    assert here.exit_code == 1 and "--device h200 lists" in here.output and "nothing to compile" in here.output


def test_tensor_parallel_shapes_and_every_bucket() -> None:
    work = cli_cache.plan_work("deepseek-v3", 2, 1, ["dense"], 300, None, None, "bf16", get_arch("h200"))
    assert {(u.n, u.k, u.groups) for u, _ in work} == {(2048, 7168, 1), (7168, 1024, 1)}
    layers = [u for u, _ in cli_cache.plan_work("deepseek-v3", 2, 8, ["experts"], 8, None, None, "bf16", get_arch("h200"))]
    assert {(u.experts, u.world, u.hidden, u.inter) for u in layers} == {(32, 256, 7168, 1024)}
    for n in (2048, 7168):
        sizes = [s for u, _ in work if u.n == n for s in u.sizes]
        assert sorted(sizes) == list(buckets(300)) and sizes.count(300) == 1
    for calls, kernels in work:
        for size in calls.sizes:
            assert cli_cache.kernels_of(calls.plans(size, get_arch("h200"))) == kernels
    assert len({tuple(kernels) for u, kernels in work if u.n == 7168}) == sum(u.n == 7168 for u, _ in work), "one part for each"


@pytest.mark.parametrize(("model", "device", "packed", "wanted", "others"), [
    ("gpt-oss-120b", "h200", None, "gluon_sm90.narrow", "triton.mx"), ("gpt-oss-120b", "h200", "no", "triton.mx", "gluon_sm90"),
    ("gpt-oss-120b", "mi350x", None, "triton.mx", "gluon_sm90"), ("minimax-m3", "h200", None, "gluon_sm90.narrow", "triton.mx")])
def test_narrow_weights_are_packed_where_a_hopper_serves(model: str, device: str, packed: str | None, wanted: str, others: str) -> None:
    """For products and for the whole layer, as the transformers integration packs them."""
    work = cli_cache.plan_work(model, 1, 8, ["offsets", "experts"], 256, None, packed, "bf16", get_arch(device))
    for calls, kernels in work:
        assert calls.packed == ("bf16" if wanted.startswith("gluon") else "")
        assert wanted in str(kernels) and others not in str(kernels), kernels
    layers = [(u, k) for u, k in work if isinstance(u, Layer)]
    assert sorted(s for u, _ in layers for s in u.sizes) == sorted(buckets(256))
    assert all(k[0].startswith("route triton.route") for _, k in layers)


@pytest.mark.parametrize(("args", "message"), [
    (("--model", "deepseek-v9"), "'deepseek-v9' is not one of"),
    (("--model", "deepseek-v3", "--layout", "ragged"), "'ragged' is none of dense"),
    (("--model", "deepseek-v3", "--device", "h2000"), "'h2000'"),
    (("--model", "deepseek-v3", "--device", "h200", "--a", "fp7"), "fp7"),
    (("--model", "deepseek-v3", "--device", "h200", "--packed", "bf16"), "fp8_128x128, which needs no packing"),
])
def test_bad_input(args: tuple[str, ...], message: str) -> None:
    done = run("warm", *args)
    assert done.exit_code == 2 and message in done.output, done.output


@pytest.mark.parametrize("layout", ["dense", "masked", "offsets"])
def test_products_launch_each_of_their_plans(layout: str) -> None:
    plain = Products(layout, 1 if layout == "dense" else 2, 128, 128, "fp8_1x128", "fp8_128x128", "bf16", 8, (1, 8))
    assert plain.compile("cpu") == 1
    packed = Products(layout, plain.groups, 128, 128, "bf16", "mxfp4", "bf16", 8, (1, 8), "bf16")
    assert packed.compile("cpu") == 1


def test_weights_to_compile_for_lie_as_real_ones() -> None:
    """Triton compiles for strides of 1: with other strides than those to come, it would compile for nobody."""
    zero, real = zeros((2, 64, 64), MXFP4, torch.device("cpu"), mn_major=False), quantize(torch.randn(2, 64, 64), MXFP4)
    for x, y in ((zero.data, real.data), (zero.scale, real.scale)):
        assert (x.dtype, x.shape, x.stride()) == (y.dtype, y.shape, y.stride())


@pytest.mark.parametrize(("weights", "packed", "oss"), [("fp8_128x128", "", False), ("mxfp4", "bf16", True), ("mxfp8", "", False)])
def test_a_layer_is_called_with_every_size_and_routing(weights: str, packed: str, oss: bool) -> None:
    layer = Layer(2, 4, 128, 128, 2, weights, "swiglu_oai" if oss else "swiglu", oss, oss, "bf16", (1, 4), packed)
    assert layer.compile("cpu") == 6
    assert layer.bytes > 2 * 3 * 128 * 128 / 2


def test_parts_are_compiled_in_processes_and_failures_are_named() -> None:
    good = Products("dense", 1, 128, 128, "fp8_1x128", "fp8_128x128", "bf16", 8, (8,))
    bad = Products("dense", 1, 128, 128, "fp8_1x128", "fp8_128x128", "bf16", 8, (9,))
    cli_cache.run([(good, [])], "cpu", 1)
    with pytest.raises(cli_cache.click.ClickException, match="numbers of rows from 1 to max_m, 8"):
        cli_cache.run([(good, []), (bad, [])], "cpu", 2)
    with pytest.raises(cli_cache.click.ClickException, match="one that dies: its process died"):
        cli_cache.run([(Dies(), [])], "cpu", 1)     # type: ignore[list-item]


class Dies:
    def __str__(self) -> str:
        return "one that dies"

    def compile(self, where: str) -> int:
        os._exit(3)
