"""The portable FP8 kernels: both gates, poison and guards on every case, interpreted on the CPU and compiled on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import narrowgemm as ng
from narrowgemm.arch import get_arch
from narrowgemm.kernels.triton import fp8_block, fp8_wgrad
from narrowgemm.problem import Config
from narrowgemm.testing.cases import Case, build, get_suite

SMALL = get_suite("cpu-small")
FP8 = [c for c in get_suite("cpu-formats") if c.a.element in ("e4m3", "e5m2") and c.b.element in ("e4m3", "e5m2") and c.a.group[1] != 32]


@pytest.fixture(autouse=True)
def _as_h200(device, monkeypatch):
    """Interpreted kernels are chosen as on an H200."""
    if device == "cpu":
        monkeypatch.setenv("NARROWGEMM_ARCH", "h200")


# what takes longest in the interpreter and is like the others: on a GPU, and with `pytest -m ''`
LONG = ("masked-g8-m300-n256-k256-x512-uniform_0.8_1.2", "contiguous-g4-m200-n256-k256-uniform_0.8_1.2")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c.id in LONG)) for c in (*SMALL, *FP8)],
                         ids=lambda c: f"{c.suite}/{c.id}")
def test_gates(case: Case, device: str) -> None:
    build(case, device, seed=7).verify(backend="triton")


def configs_for(case: Case) -> list[Config]:
    """Every config of the search space that the case's problem admits, for few rows and for many."""
    problem = build(case, "cpu", hollow=True).plan(backend="triton").problem
    kernel = fp8_wgrad if case.layout == "k_grouped" else fp8_block
    found = [c for rows in (8, 512) for c in kernel.configs(replace(problem, rows=rows), get_arch("h200"))]
    return list(dict.fromkeys(found))


CONFIG_CASES = [Case("configs", "dense", 1, 70, 272, 1000), Case("configs", "contiguous", 4, 45, 272, 320, sizes="uniform:0.7:1.3", alignment=1),
                Case("configs", "offsets", 4, 45, 272, 320, sizes="uniform:0.7:1.3"),
                Case("configs", "psum", 3, 45, 272, 320, sizes="uniform:0.7:1.3", alignment=32),
                Case("configs", "masked", 4, 45, 272, 320, max_m=90, sizes="uniform:0.7:1.3"),
                Case("configs", "k_grouped", 3, 64, 96, 300, a=ng.FP8_1x128, b=ng.FP8_1x128, sizes="uniform:0.7:1.3", out_dtype="fp32")]


SHARING = [c for c in CONFIG_CASES if c.layout in ("contiguous", "offsets", "psum")]


def test_the_layouts_that_share_a_search_space_have_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARROWGEMM_ARCH", "h200")
    assert len(SHARING) == 3 and len({tuple(configs_for(c)) for c in SHARING}) == 1


@pytest.mark.parametrize("case", CONFIG_CASES, ids=lambda c: c.id)
def test_every_config_is_right(case: Case, device: str, monkeypatch) -> None:
    """Gates hold for the whole search space, not only for what is chosen. Interpreted, stages and warps are nothing, and three grouped
    layouts share the space: what differs between them is how a tile finds its rows, and `test_gates` has that."""
    monkeypatch.setenv("NARROWGEMM_ARCH", "h200")
    inputs = build(case, device, seed=11)
    tried = configs_for(case)
    assert len(tried) >= 3
    if device == "cpu":
        tried = list({replace(c, num_stages=0, num_warps=0): c for c in tried}.values())
        if case in SHARING:
            tried = tried[SHARING.index(case)::len(SHARING)]
    for config in tried:
        inputs.verify(backend="triton", config=config)


@pytest.mark.parametrize("max_sms", [1, 3])
@pytest.mark.parametrize("layout", ["dense", "contiguous", "offsets", "masked"])
def test_max_sms(layout: str, max_sms: int, device: str) -> None:
    """A grid of so many programs covers every tile."""
    case = Case("sms", layout, 1 if layout == "dense" else 3, 40, 256, 256, max_m=64 if layout == "masked" else 0)
    build(case, device).verify(backend="triton", max_sms=max_sms)


def test_row_major_scales(device: str) -> None:
    build(Case("scales", "dense", 1, 70, 256, 384), device, scale_layout="row_major").verify(backend="triton")


@pytest.mark.parametrize("a_major", ["k", "mn"])
@pytest.mark.parametrize("b_major", ["k", "mn"])
def test_majors(a_major: str, b_major: str, device: str) -> None:
    """Operands stored transposed come in as views."""
    inputs = build(Case("majors", "dense", 1, 70, 208, 384), device)

    def stored(x: ng.ScaledTensor, major: str) -> ng.ScaledTensor:
        return x if major == "k" else ng.ScaledTensor(x.data.mT.contiguous().mT, x.scale, x.format)

    inputs.a, inputs.b = stored(inputs.a, a_major), stored(inputs.b, b_major)
    assert (inputs.a.major, inputs.b.major) == (a_major, b_major)
    inputs.verify(backend="triton")


@pytest.mark.parametrize("kind", ["contiguous", "offsets", "psum", "masked"])
def test_bad_device_data_stays_inside(kind: str, device: str) -> None:
    """Ids and sizes out of range lose rows; they never reach memory outside, and good groups come out right."""
    g, n, k = 3, 128, 256
    masked = kind == "masked"
    case = Case("bad", kind, g, 32, n, k, max_m=32 if masked else 0, alignment=32)
    inputs = build(case, device)
    i32 = torch.int32
    layout = {
        "contiguous": lambda: ng.Contiguous(torch.tensor([0] * 10 + [7] * 6 + [-5] * 4 + [1] * 20 + [2**31 - 1] * 4 + [2] * 52, dtype=i32)),
        "offsets": lambda: ng.Offsets(torch.tensor([0, 32, 32, 10_000_000])),
        "psum": lambda: ng.Psum(torch.tensor([32, 64, 2_000_000_000], dtype=i32), 32),
        "masked": lambda: ng.Masked(torch.tensor([32, -9, 2_000_000_000], dtype=i32), 32),
    }[kind]()
    layout = type(layout)(**{f: (v.to(device) if isinstance(v, torch.Tensor) else v) for f, v in vars(layout).items()})
    expected = torch.zeros_like(inputs.out.tensor)
    ng.grouped_gemm(inputs.a.to("cpu"), inputs.b.to("cpu"), type(layout)(**{f: (v.cpu() if isinstance(v, torch.Tensor) else v)
                    for f, v in vars(layout).items()}), out=(host := inputs.out.tensor.cpu().clone()), backend="reference")
    expected.copy_(host)
    ng.grouped_gemm(inputs.a, inputs.b, layout, out=inputs.out.tensor, backend="triton")
    assert not inputs.out.faults()
    same = (inputs.out.tensor.view(torch.int16) == expected.view(torch.int16)) | torch.isclose(
        inputs.out.tensor.float(), expected.float(), rtol=2e-2, atol=5e-2)
    assert bool(same.all())


def test_nan_scale_reaches_only_its_rows(device: str) -> None:
    inputs = build(Case("nan", "dense", 1, 40, 128, 256), device)
    assert inputs.a.scale is not None
    inputs.a.scale[7, 1] = float("nan")
    out = inputs.call(backend="triton")
    assert bool(out[7].isnan().all()) and not bool(out[:7].isnan().any()) and not bool(out[8:].isnan().any())


@pytest.mark.parametrize("layout", ["dense", "contiguous", "offsets", "masked"])
def test_same_bits_every_time(layout: str, device: str) -> None:
    """Interpreted, programs run one after another: only what was never written can differ there."""
    times, k = (10, 1024) if device == "cuda" else (1, 256)
    case = Case("repeat", layout, 1 if layout == "dense" else 4, 40, 256, k, max_m=64 if layout == "masked" else 0)
    inputs = build(case, device)
    first = inputs.call(backend="triton").clone()
    for _ in range(times):
        inputs.reset_out()
        assert torch.equal(inputs.call(backend="triton").view(torch.int16), first.view(torch.int16))


def test_workspace_of_the_caller(device: str) -> None:
    inputs = build(Case("ws", "dense", 1, 20, 128, 1024), device)
    config = Config(16, 128, 128, 4, 5, split_k=2, swap_ab=True)
    need = inputs.plan(backend="triton", config=config).workspace_bytes
    assert need == 4 * 2 * 24 * 128
    workspace = torch.full((need + 64,), 0xA5, dtype=torch.uint8, device=device)
    inputs.verify(backend="triton", config=config, workspace=workspace)
    assert bool((workspace[need:] == 0xA5).all())
    with pytest.raises(ValueError, match="workspace bytes: got 16"):
        inputs.call(backend="triton", config=config, workspace=workspace[:16])
