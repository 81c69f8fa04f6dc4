"""The fuzzer: draws survive JSON, what is wrong is found, and a few seconds of it find nothing in the reference and the interpreter."""

from __future__ import annotations

import random
import sys
import time
from dataclasses import replace

import pytest
import torch

from narrowgemm.errors import Unsupported
from narrowgemm.formats import BF16, MXFP4
from narrowgemm.kernels.registry import kernels
from narrowgemm.ops.grouped import grouped_gemm
from narrowgemm.reference import gemm as reference
from narrowgemm.testing import fuzz, fuzz_compat, fuzz_steps, fuzz_training
from narrowgemm.testing.case import Case
from narrowgemm.testing.fuzz_checks import corrupt_faults, sum_error
from narrowgemm.testing.fuzz_inputs import GuardedView, Store, build, stored

CPU = torch.device("cpu")
SMALL = 1 << 18


def draws(seed: int, count: int) -> list[fuzz.Draw]:
    rng = random.Random(seed)
    return [fuzz.draw(rng, SMALL) for _ in range(count)]


def test_a_draw_survives_json() -> None:
    for one in draws(1, 50):
        assert fuzz.Draw.from_json(one.to_json()) == one


def test_the_reference_passes() -> None:
    for one in draws(2, 25):
        what, found = fuzz.attempt(one, CPU)
        assert what != "wrong", f"{found}\n{one.to_json()}"


@pytest.mark.parametrize("op", fuzz_steps.OPS)
def test_the_steps_pass(op: str) -> None:
    for seed in range(2):
        assert fuzz_steps.run(op, seed, CPU) == []


@pytest.mark.parametrize("op", fuzz_training.OPS)
def test_a_wrong_gradient_is_found(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one of the runs x is a quarter larger."""
    right, calls = getattr(fuzz_training, op), 0

    def wrong(x, *args, **more):
        nonlocal calls
        calls += 1
        return right(x * 1.25 if calls == 1 and x.requires_grad else x, *args, **more)

    assert fuzz_steps.run(op, 3, CPU) == [] and not calls
    monkeypatch.setattr(fuzz_training, op, wrong)
    found = []
    for seed in range(3):
        calls = 0
        found += fuzz_steps.run(op, seed, CPU)
    assert any("calc_diff" in f for f in found)


PRODUCTS = {"deep_gemm": ("deep_gemm.grouped.grouped_gemm", "deep_gemm.dense.gemm"), "k_grouped": ("deep_gemm.kgrouped.grouped_gemm_wgrad",),
            "aiter": ("aiter.mxfp8.gemm", "aiter.mxfp8.routed_gemm"), "moe_sorting": ("flydsl.moe.routed_gemm",),
            "flydsl": ("flydsl.factories.grouped_gemm",), "bf16_names": ("deep_gemm.grouped.grouped_gemm",),
            "scaled_grouped_mm": ("torch_scaled.grouped_gemm", "torch_scaled.grouped_gemm_wgrad")}


@pytest.mark.parametrize("op", PRODUCTS)
def test_wrong_products_under_other_names_are_found(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are 5% off."""
    assert set(PRODUCTS) == set(fuzz_compat.OPS) - {"convert"}
    for at in PRODUCTS[op]:
        module, _, name = f"narrowgemm.compat.{at}".rpartition(".")
        right = getattr(sys.modules[module], name)

        def wrong(*args, right=right, **given):
            out = right(*args, **given)
            out[out != 0] *= 1.05
            return out

        monkeypatch.setattr(sys.modules[module], name, wrong)
    assert sum(bool(fuzz_steps.run(op, seed, CPU)) for seed in range(6)) >= 2


DENSE = fuzz.Draw(Case("fuzz", "dense", 1, 40, 64, 256), 5)


@pytest.mark.parametrize("fault", ["one element", "NaN", "a pad", "another time"])
def test_what_is_wrong_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    right = reference.gemm

    def wrong(a, b, out, **more):
        nonlocal calls
        calls += 1
        right(a, b, out, **more)
        if fault == "one element":      # of which the gate sees nothing
            out[7, 9] *= 1.5
        elif fault == "NaN":
            out[7, 9] = float("nan")
        elif fault == "a pad":
            out.as_strided((1,), (1,), out.storage_offset() + out.shape[1])[:] = 0
        elif calls > 1:
            out[7, 9] *= 1.004
        return out

    monkeypatch.setattr(reference, "gemm", wrong)
    what, found = fuzz.attempt(replace(DENSE, out=Store(3, 1)), CPU)
    assert what == "wrong" and found


def fourteen_bits(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total [M, N] + a [M, 32] . b [N, 32] as an FP8 tensor core of Hopper has it: everything cut off 13 bits below the largest exponent,
    and the sum 13 bits below its own. 97% of sums are of the same bits as the hardware's."""
    def exponent(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x == 0, -200.0, torch.frexp(x)[1].double() - 1)

    products = a[:, None] * b[None]
    exponents = torch.where(products == 0, -200.0, exponent(a)[:, None] + exponent(b)[None])
    unit = torch.exp2(torch.maximum(exponents.amax(2), exponent(total)) - 13)
    total = (products / unit[..., None]).trunc().sum(2) + (total / unit).trunc()
    unit = unit * torch.exp2(exponent(total) - 13)
    return (total * torch.exp2(13 - exponent(total))).trunc() * unit


def test_bounds_are_what_a_tensor_core_loses() -> None:
    g = torch.Generator().manual_seed(2)
    for k in (128, 256, 1024):
        a, b = ((torch.randn(48, k, generator=g) * 56).to(torch.float8_e4m3fn).double() for _ in range(2))
        got = torch.zeros(48, 48, dtype=torch.float64)
        for block in range(0, k, 128):
            part = torch.zeros_like(got)
            for i in range(block, block + 128, 32):
                part = fourteen_bits(part, a[:, i:i + 32], b[:, i:i + 32])
            got += part
        off = float(((got - a @ b.mT).abs() / (a.abs() @ b.abs().mT)).max())
        bound = sum_error(replace(DENSE, case=replace(DENSE.case, k=k)))
        assert 2 * off < bound < 16 * off, (k, off, bound)
    two = replace(DENSE, case=Case("fuzz", "dense", 1, 40, 64, 4096, a=BF16, b=MXFP4, packed="fp8"))
    assert sum_error(two) == sum_error(replace(DENSE, case=replace(DENSE.case, k=4096))) == 2.0**-12
    assert sum_error(replace(two, case=replace(two.case, packed=True))) == 2.0**-14


def test_stores_keep_values_and_notice_writes() -> None:
    x = torch.randn(2, 5, 6).bfloat16()
    for how in (Store(), Store(3, 1, 2), Store(transposed=True), Store(8, 8, 1, True)):
        assert torch.equal(stored(x, how), x)
    out = GuardedView((4, 8), torch.bfloat16, CPU, Store(2, 3))
    assert out.faults([out.tensor]) == []
    out.tensor[0] = 1.0
    assert out.faults() == [] and out.faults([out.tensor]) != []
    out.buffer[5000] = 0
    assert "beside the output" in out.faults()[0] or out.tensor.numel() * 2 + 4096 > 5000


@pytest.mark.interpret
def test_the_portable_kernels_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device, in Triton's interpreter."""
    monkeypatch.setenv("NARROWGEMM_ARCH", "h100")
    rng, tried = random.Random(3), 0
    while tried < 4:
        one = fuzz.draw(rng, 1 << 15)
        for each in fuzz.choose(one, rng, CPU, every=True):
            if each.kernel and kernels()[each.kernel].BACKEND == "triton":
                what, found = fuzz.attempt(each, CPU)
                assert what != "wrong", f"{found}\n{each.to_json()}"
                tried += 1


@pytest.mark.gpu
@pytest.mark.slow
def test_a_minute_on_a_gpu() -> None:
    """Another seed in every run; what it finds is printed so that it can be replayed."""
    seed = random.SystemRandom().randrange(1 << 31)
    wrong = [f"{found}\n{one.to_json()}" for one, what, found in fuzz.fuzz(torch.device("cuda"), 60.0, seed) if what == "wrong"]
    assert not wrong, f"seed {seed}:\n" + "\n".join(wrong)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("op", fuzz_steps.OPS)
def test_steps_on_a_gpu(op: str) -> None:
    rng, end, wrong = random.SystemRandom(), time.monotonic() + 6.0, []
    while time.monotonic() < end:
        seed = rng.randrange(1 << 31)
        try:
            found = fuzz_steps.run(op, seed, torch.device("cuda"))
        except Unsupported:
            continue
        if found:
            wrong.append(f"{op} {seed}: {found}")
    assert not wrong, "\n".join(wrong)


def test_sums_that_leave_fp16_may_be_off_by_a_share_of_what_they_are() -> None:
    """A tensor core's 2^-8 of a sum of a million is no fault where FP16 ends at 65504; 4% is."""
    case = Case("fuzz", "offsets", 4, 40, 16, 1024, out_dtype="fp16")
    one = fuzz.Draw(case, 3, values="bits", corrupt="past")
    for share, wrong in ((2.0**-8, False), (0.04, True)):
        inputs = build(one, CPU)
        wide = torch.zeros(inputs.out.tensor.shape)
        grouped_gemm(inputs.a, inputs.b, inputs.layout, out=wide, backend="reference")
        assert float(wide.abs().max()) > 1e6
        inputs.reset_out()
        written = wide.any(1)
        inputs.out.tensor[written] = (wide[written] + share * wide.abs().max()).to(torch.float16)
        assert bool(corrupt_faults(inputs, one)) == wrong


def test_inputs_are_what_a_draw_says() -> None:
    one = replace(DENSE, a=Store(16, 16), b=Store(transposed=True), out=Store(2, 1))
    inputs = build(one, CPU)
    assert inputs.a.data.stride() == (272, 1) and inputs.b.data.stride()[0] == 1 and inputs.out.tensor.stride() == (66, 1)
