"""The portable 16-bit kernel: both gates, poison and guards, interpreted on the CPU and compiled on a GPU; its machine code."""

from __future__ import annotations

import pytest
import torch

from narrowgemm import Contiguous, Offsets, Psum, explain, grouped_gemm
from narrowgemm.arch import get_arch
from narrowgemm.formats import BF16, FP16
from narrowgemm.kernels.triton import bf16
from narrowgemm.problem import Config
from narrowgemm.testing.cases import Case, build
from narrowgemm.testing.numerics import check_kernel

from .._compile import TRITONS, compile_jobs

UNEVEN = "uniform:0.3:1.7"
CASES = [Case("bf16", "dense", 1, 33, 200, 208, a=BF16, b=BF16), Case("bf16", "dense", 1, 1, 72, 100, a=BF16, b=BF16),
         Case("bf16", "dense", 1, 150, 136, 192, a=FP16, b=FP16, out_dtype="fp16"),
         Case("bf16", "offsets", 5, 33, 96, 160, sizes=UNEVEN, slack=9, a=BF16, b=BF16),
         Case("bf16", "offsets", 40, 3, 128, 128, sizes="empty:0.5", a=BF16, b=BF16),
         Case("bf16", "offsets", 260, 1, 64, 32, sizes="few:3", a=BF16, b=BF16),
         Case("bf16", "offsets", 4, 16, 128, 128, sizes="zero", a=BF16, b=BF16),
         Case("bf16", "offsets", 3, 150, 136, 96, sizes=UNEVEN, a=FP16, b=FP16, out_dtype="fp32", accumulate=True),
         Case("bf16", "masked", 3, 20, 136, 192, max_m=40, sizes=UNEVEN, a=BF16, b=BF16, out_dtype="fp32"),
         Case("bf16", "masked", 4, 70, 96, 72, max_m=100, sizes="empty:0.4", a=FP16, b=FP16, out_dtype="fp16", accumulate=True),
         Case("bf16", "contiguous", 5, 33, 96, 160, sizes=UNEVEN, alignment=1, a=BF16, b=BF16, out_dtype="fp32"),
         Case("bf16", "contiguous", 4, 50, 136, 100, sizes=UNEVEN, alignment=16, slack=40, order="repeated", a=BF16, b=BF16),
         Case("bf16", "contiguous", 3, 70, 72, 128, sizes="empty:0.4", a=FP16, b=FP16, out_dtype="fp16", zero_padding=False),
         Case("bf16", "psum", 4, 40, 128, 128, sizes="empty:0.5", a=BF16, b=BF16), Case("bf16", "psum", 3, 150, 72, 96, sizes=UNEVEN, a=BF16, b=BF16, out_dtype="fp32", accumulate=True),
         Case("bf16", "psum", 5, 21, 64, 208, sizes=UNEVEN, alignment=8, slack=70, a=FP16, b=FP16, out_dtype="fp16", zero_padding=False)]


@pytest.fixture(autouse=True)
def _as_h200(request, monkeypatch):
    """Interpreted kernels are chosen as on an H200."""
    if "device" in request.fixturenames and request.getfixturevalue("device") == "cpu":
        monkeypatch.setenv("NARROWGEMM_ARCH", "h200")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_gates(case: Case, device: str) -> None:
    inputs = build(case, device, seed=7)
    plan = inputs.plan(backend="triton")
    assert plan is None or plan.kernel == bf16.NAME
    inputs.verify(backend="triton")


@pytest.mark.parametrize("tile", [*bf16.FEW, *bf16.MANY], ids=str)
def test_every_tile_is_right(tile: tuple, device: str) -> None:
    if device == "cpu" and tile not in (bf16.FEW[0], bf16.MANY[1]):
        pytest.skip("the interpreter does not know tiles apart")
    bm, bn, bk, warps, stages, swap = tile
    config = Config(bm, bn, bk, warps, stages, swap_ab=swap, persistent=True)
    for case in (Case("bf16", "offsets", 3, 45, 144, 384, sizes=UNEVEN, a=BF16, b=BF16), Case("bf16", "dense", 1, 70, 72, 100, a=BF16, b=BF16)):
        build(case, device, seed=3).verify(backend="triton", config=config)


@pytest.mark.parametrize("major", ["k", "mn"])
def test_groups_and_nothing_else_are_written(major: str, device: str) -> None:
    """Rows in front of the first group and behind the last hold NaN and are not touched; weights may be stored [E, K, N]."""
    torch.manual_seed(0)
    a, b = torch.randn(60, 64, device=device).bfloat16(), torch.randn(4, 72, 64, device=device).bfloat16()
    b = b if major == "k" else b.mT.contiguous().mT
    offsets = torch.tensor([3, 3, 20, 21, 50], device=device)
    a[:3] = a[50:] = float("nan")
    out = torch.full((60, 72), 7.0, device=device, dtype=torch.bfloat16)
    grouped_gemm(a, b, Offsets(offsets), out=out, backend="triton")
    assert bool((out[:3] == 7).all()) and bool((out[50:] == 7).all())
    for g, (lo, hi) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        check_kernel(out[lo:hi], a[lo:hi].float() @ b[g].float().T).assert_()


def test_bounds_that_are_wrong_reach_nothing_outside(device: str) -> None:
    a, b = (torch.randn(*s, device=device).bfloat16() for s in ((24, 64), (3, 64, 64)))
    for bounds in ([-5, 10, 5, 1000], [70, 80, 90, 100], [10, 0, 24, 24]):
        out = grouped_gemm(a, b, Offsets(torch.tensor(bounds, device=device)), backend="triton",
                           out=torch.zeros(24, 64, device=device, dtype=torch.bfloat16))
        assert bool(out.isfinite().all())


@pytest.mark.parametrize("psum", [False, True])
def test_padding_is_zeroed_or_left_and_bad_groups_are_padding(psum: bool, device: str) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(70, 64, device=device).bfloat16(), torch.randn(3, 72, 64, device=device).bfloat16()
    ids = torch.full((70,), -1, dtype=torch.int32)
    ids[0:5], ids[16:37], ids[48:49] = 0, 1, 2
    layout = Psum(torch.tensor([5, 37, 49], dtype=torch.int32, device=device), 16) if psum else Contiguous(ids.to(device))
    if not psum:
        ids[60:62] = torch.tensor([7, -9], dtype=torch.int32)
        layout = Contiguous(ids.to(device))
    live = (ids >= 0) & (ids < 3)
    a[~live] = float("nan")
    want = torch.stack([a[r].float() @ b[g].float().T if 0 <= g < 3 else torch.zeros(72, device=device) for r, g in enumerate(ids.tolist())])
    for zero in (True, False):
        out = torch.full((70, 72), 7.0, device=device, dtype=torch.bfloat16)
        grouped_gemm(a, b, layout, out=out, zero_padding=zero, backend="triton.bf16")
        assert bool((out[~live] == (0 if zero else 7)).all())
        check_kernel(out[live], want[live]).assert_()


def test_padded_layouts_leave_what_hopper_has_to_it_and_nothing_to_the_reference() -> None:
    def chosen(device: str, k: int = 512, **more: object) -> str:
        return explain("grouped_gemm", layout="contiguous", groups=8, m=256, n=512, k=k, a="bf16", b="bf16", device=device, **more).plan.kernel

    assert chosen("h200") == chosen("h100") == "gluon_sm90.bf16" and chosen("mi350x") == chosen("a100") == chosen("b200") == bf16.NAME
    assert explain("grouped_gemm", layout="psum", groups=8, m=256, n=512, k=512, a="fp16", b="fp16", device="h200").plan.kernel == bf16.NAME


def test_few_rows_are_ours_and_many_are_hoppers_or_torchs() -> None:
    def chosen(m: int, fmt: str = "bf16", device: str = "h200", **more: object) -> str:
        return explain("grouped_gemm", layout="offsets", groups=128, m=m, n=1536, k=2048, a=fmt, b=fmt, out_dtype=fmt, device=device,
                       **more).plan.kernel

    assert chosen(8) == chosen(128) == chosen(2048) == bf16.NAME
    assert chosen(4096) == chosen(32768) == chosen(32768, max_sms=64) == "gluon_sm90.bf16"
    assert chosen(32768, "fp16") == bf16.NAME       # the others are for BF16
    assert chosen(32768, device="b200") == "torch_bf16"


@pytest.mark.parametrize("why, changed", [
    ("on both sides", {"b": "mxfp4"}), ("on both sides", {"a": "fp16"}),
    ("matrix instruction", {"device": "cpu"})])
def test_says_what_it_does_not_take(why: str, changed: dict) -> None:
    case = {"layout": "offsets", "groups": 8, "m": 256, "n": 512, "k": 512, "device": "h200", "a": "bf16", "b": "bf16"} | changed
    assert why in dict(explain("grouped_gemm", **case).plan.passed_over)[bf16.NAME]


OPS = {"sm90": ("wgmma.mma_async",), "sm100": ("tcgen05.mma",), "gfx942": ("v_mfma_f32",), "gfx950": ("v_mfma_f32",)}


@pytest.mark.compile
@pytest.mark.parametrize("triton", [TRITONS[0], pytest.param(TRITONS[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", OPS)
def test_machine_code(target: str, triton: str) -> None:
    check(target, compile_jobs(target, "tests.kernels.bf16_jobs:jobs", triton=triton))


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("target", OPS)
def test_whole_search_space(target: str) -> None:
    check(target, compile_jobs(target, "tests.kernels.bf16_jobs:jobs", "all"))


def check(target: str, reports: list[dict]) -> None:
    assert len(reports) >= 4
    for r in reports:
        # Blackwell's fifth-generation tensor core takes 128 rows of A; fewer go to mma.sync
        wanted = OPS[target] if target != "sm100" or " 128x128" in r["job"] else ()
        missing = [op for op in wanted if not any(name.startswith(op) and n for name, n in r["ops"].items())]
        assert not missing, f"{target}, {r['job']}: no {missing} in {r['ops']}"
        assert r["spills"] == 0, f"{target}, {r['job']}: {r['spills']} bytes spilled"
        assert r["shared"] <= get_arch(target).smem, f"{target}, {r['job']}: {r['shared']} bytes of shared memory"
        assert r["shared"] <= int(r["job"].split(" | ")[1]), f"{target}, {r['job']}: {r['shared']} bytes of shared memory"
