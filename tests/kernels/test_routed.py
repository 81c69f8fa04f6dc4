"""The portable `routed_gemm` against the reference: interpreted on the CPU, and on a GPU; its machine code for every target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import narrowgemm as ng
from narrowgemm.arch import get_arch
from narrowgemm.formats import BF16, FP8_ROW, FP16, MXFP4, MXFP8, Format, FP8_1x128
from narrowgemm.kernels.triton import mx, routed
from narrowgemm.ops.explain import describe
from narrowgemm.testing.numerics import KERNEL_GATE, calc_diff

from .._compile import compile_jobs
from .test_mx_compile import operand

LEFT = 777.0
# A, weights, (experts, N, K), tokens, top_k, activation, interleaved, bias, combine
CASES = [
    (BF16, MXFP4, (5, 96, 192), 7, 2, None, False, True, True), (BF16, MXFP4, (4, 128, 160), 9, 3, "swiglu_oai", True, True, False),
    (MXFP8, MXFP4, (3, 64, 128), 5, 1, "swiglu", False, False, False), (BF16, MXFP8, (6, 72, 128), 1, 4, None, False, False, True),
    (FP8_1x128, MXFP4, (3, 96, 128), 20, 2, "swiglu", True, True, False), (MXFP4, MXFP4, (4, 64, 256), 6, 2, None, False, True, True),
    (FP8_ROW, MXFP4, (3, 64, 160), 9, 2, "swiglu", False, True, False), (FP16, MXFP4, (4, 64, 160), 7, 2, "swiglu_oai", True, True, False)]


@pytest.fixture(autouse=True)
def _as_mi350x(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setenv("NARROWGEMM_ARCH", "mi350x")


@pytest.mark.parametrize("kind", ["routed", "offsets"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0].name}-{c[1].name}-{c[5]}")
def test_against_the_reference(device: str, case: tuple, kind: str) -> None:
    """Skipped slots and repeated experts too; rows of slots that nobody computes are left alone, and repeats have the same bits."""
    a_fmt, b_fmt, (experts, n, k), tokens, top_k, activation, interleaved, biased, combine = case
    g = torch.Generator().manual_seed(n + k)
    w = ng.quantize(torch.randn(experts, n, k, generator=g), b_fmt, backend="reference")
    ids = torch.randint(-1, experts, (tokens, top_k), generator=g, dtype=torch.int32).to(device)
    weight = torch.rand(tokens, top_k, generator=g).to(device) if combine else None
    bias = torch.randn(experts, n, generator=g).to(device) if biased else None
    w = ng.ScaledTensor(w.data.to(device), w.scale.to(device), b_fmt)
    a_div = top_k if activation or not combine else 1
    x = torch.randn(-(-tokens * top_k // a_div), k, generator=g).to(torch.float16 if a_fmt is FP16 else torch.bfloat16).to(device)
    a = ng.quantize(x, a_fmt, backend="reference") if a_fmt.scaled else x
    order = ng.sort_by_expert(ids, experts, backend="reference")
    layout, extra = (ng.moe_align_block_size(ids, 4, experts, a_div=a_div), {}) if kind == "routed" else (
        order.layout, {"row_map": order.row_map, "top_k": top_k, "a_div": a_div})
    shape = (tokens if combine else tokens * top_k, n // 2 if activation else n)
    add = torch.randn(shape, generator=g).to(device) if combine and biased else None

    def call(backend: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        out = torch.full(shape, LEFT, dtype=dtype, device=device)
        options: dict[str, Any] = {"activation": activation, "interleaved": interleaved, "bias": bias, "routing_weight": weight, **extra}
        return ng.routed_gemm(a, w, layout, combine=combine, add=add, out=out, out_dtype=dtype, zero_padding=False, backend=backend,
                              **options)

    for dtype, gate in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        got, want = call("triton", dtype), call("reference", dtype)
        assert torch.equal((got == LEFT).all(1), (want == LEFT).all(1))
        assert calc_diff(got, want) <= KERNEL_GATE[gate]
    assert torch.equal(call("triton", torch.float32), got)


@pytest.mark.parametrize("codes, other", [((0, 4), (250, 255)), ((251, 255), (0, 4)), ((120, 130), (120, 130))])
@pytest.mark.parametrize("activation", [None, "swiglu"])
def test_scales_at_the_ends(codes: tuple[int, int], other: tuple[int, int], activation: str | None, device: str,
                            monkeypatch: pytest.MonkeyPatch) -> None:
    """What a conversion to BF16 would lose is shifted, as in `triton.mx`."""
    monkeypatch.setattr(mx, "converts", lambda arch: True)
    gen = torch.Generator().manual_seed(2)

    def side(codes: tuple[int, int], *shape: int) -> ng.ScaledTensor:
        data = torch.randint(0, 0x38, shape, dtype=torch.uint8, generator=gen)
        scale = torch.randint(*codes, (*shape[:-1], shape[-1] // 32), dtype=torch.uint8, generator=gen)
        return ng.ScaledTensor(data.view(torch.float8_e4m3fn).to(device), scale.to(device), MXFP8)

    def double(q: ng.ScaledTensor) -> torch.Tensor:
        return q.data.double() * torch.exp2(q.scale.double() - 127).repeat_interleave(32, -1)

    a, w = side(codes, 9, 160), side(other, 2, 40, 160)
    offsets = ng.Offsets(torch.tensor([0, 4, 9], device=device))
    got = ng.routed_gemm(a, w, offsets, activation=activation, out_dtype=torch.float32, backend="triton")
    h = torch.cat([double(a)[:4] @ double(w)[0].mT, double(a)[4:] @ double(w)[1].mT])
    want = torch.nn.functional.silu(h[:, :20]) * h[:, 20:] if activation else h
    assert calc_diff(got.double(), want) <= 1e-6


def test_positions_are_slots_without_a_row_map(device: str) -> None:
    w = ng.quantize(torch.randn(6, 64, 128, generator=torch.Generator().manual_seed(1)), MXFP4, backend="reference")
    w = ng.ScaledTensor(w.data.to(device), w.scale.to(device), MXFP4)
    x = torch.randn(12, 128, generator=torch.Generator().manual_seed(2)).bfloat16().to(device)
    offsets = ng.Offsets(torch.tensor([0, 2, 2, 5, 9, 9, 10], device=device))
    got, want = (ng.routed_gemm(x, w, offsets, out=torch.zeros(12, 64, device=device), out_dtype=torch.float32, backend=b)
                 for b in ("triton", "reference"))
    assert calc_diff(got, want) <= 1e-6 and not bool(got[10:].any())


def test_what_it_takes() -> None:
    sizes = {"layout": "offsets", "groups": 128, "m": 64, "n": 5760, "k": 2880, "a": "bf16"}
    for arch, b, says in (("mi350x", "mxfp4", None), ("h100", "mxfp8", None), ("mi300x", "mxfp4", None), ("h100", "fp8_128x128", "MXFP4"),
                          ("cpu", "mxfp4", "GPU")):
        reason = routed.supports(describe("routed_gemm", b=b, **sizes), get_arch(arch))
        assert reason is None if says is None else says in (reason or "")
    plan = ng.explain("routed_gemm", b="mxfp4", device="mi350x", **sizes).plan
    assert plan.kernel == routed.NAME and plan.workspace_bytes == 0


def jobs(target: str, which: str = "few") -> Iterator[tuple[str, Callable[[], object]]]:
    """gate_up with its activation and down with its combine; 'all': other formats, and many rows."""
    for a_fmt, b_fmt in ((BF16, MXFP4), (MXFP8, MXFP4), (BF16, MXFP8), (MXFP8, MXFP8)) if which == "all" else ((BF16, MXFP4),):
        if target == "gfx942" and a_fmt is MXFP8:
            continue
        for tokens in (4, 1024) if which == "all" else (4,):
            for stage, n, k in (("gate_up", 512, 256), ("down", 256, 256)):
                yield f"{a_fmt.name} x {b_fmt.name} {stage} {tokens}", lambda a=a_fmt, b=b_fmt, s=stage, t=tokens, n=n, k=k: run(a, b, s, t, n, k)


def run(a_fmt: Format, b_fmt: Format, stage: str, tokens: int, n: int, k: int) -> None:
    up, slots = stage == "gate_up", torch.zeros(tokens * 4, dtype=torch.int32)
    a = operand(a_fmt, tokens if up else tokens * 4, k)
    ng.routed_gemm(a if a.format.scaled else a.data, operand(b_fmt, 8, n, k), ng.Offsets(torch.zeros(9, dtype=torch.int64)),
                   row_map=slots, top_k=4, a_div=4 if up else 1, bias=torch.zeros(8, n, dtype=torch.bfloat16),
                   activation="swiglu_oai" if up else None, interleaved=up, routing_weight=None if up else torch.zeros(tokens, 4),
                   combine=not up, backend="triton")


WORST_SPILL = 96        # bytes a thread


@pytest.mark.compile
@pytest.mark.parametrize("target", ["sm90", "gfx950"])
def test_machine_code(target: str) -> None:
    check(target, compile_jobs(target, "tests.kernels.test_routed:jobs"))


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm90", "sm100", "gfx942", "gfx950"])
def test_machine_code_of_all(target: str) -> None:
    check(target, compile_jobs(target, "tests.kernels.test_routed:jobs", "all"))


def check(target: str, reports: list[dict]) -> None:
    assert {r["kernel"] for r in reports} == {"routed_kernel", "clear_kernel", "sum_kernel"}
    for r in reports:
        # MXFP8 on both sides is brought to BF16 there, in registers
        most = WORST_SPILL if target == "sm90" and r["job"].startswith("mxfp8 x mxfp8") else 0
        assert r["spills"] <= most and r["shared"] <= get_arch(target).smem, r
        if target == "gfx950" and r["kernel"] == "routed_kernel":
            want = "v_mfma_scale" if r["job"].startswith("mxfp8") else f"v_cvt_scalef32_pk_bf16_fp{4 if 'x mxfp4' in r['job'] else 8}"
            assert any(name.startswith(want) and count for name, count in r["ops"].items()), f"{r['job']}: no {want} in {r['ops']}"
