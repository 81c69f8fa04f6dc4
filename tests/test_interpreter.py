"""The repaired interpreter computes what a device computes: casts, dots, loops, scans, against torch."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.interpret
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def cast_kernel(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@triton.jit
def dot_kernel(a, b, c, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BK)
    acc = tl.zeros((M, N), dtype=tl.float32)
    for k0 in range(0, K, BK):
        x = tl.load(a + m[:, None] * K + k0 + k[None, :], mask=(k0 + k)[None, :] < K, other=0.0)
        y = tl.load(b + n[:, None] * K + k0 + k[None, :], mask=(k0 + k)[None, :] < K, other=0.0)
        acc = tl.dot(x, tl.trans(y), acc)
    tl.store(c + m[:, None] * N + n[None, :], acc.to(c.dtype.element_ty))


@triton.jit
def control_kernel(x, y, n, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i, mask=i < n, other=0)
    total = 0
    j = 0
    while j * j < n:
        total += j
        j += 1
    for k in range(0, n):
        total += (k.to(tl.int64) * 0).to(tl.int32)
    tl.store(y + i, tl.cumsum(v, 0) + total, mask=i < n)


@triton.jit
def bf16_kernel(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(y + i, tl.where(v > 0.0, v * v, tl.full((N,), 1.5, tl.bfloat16)))


@triton.jit
def scaled_kernel(a, sa, b, sb, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k, s = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K), tl.arange(0, K // 32)
    h = tl.arange(0, K // 2)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + n[:, None] * (K // 2) + h[None, :])
    xs = tl.load(sa + m[:, None] * (K // 32) + s[None, :])
    ys = tl.load(sb + n[:, None] * (K // 32) + s[None, :])
    out = tl.dot_scaled(x, xs, "e4m3", tl.trans(y), ys, "e2m1")
    tl.store(c + m[:, None] * N + n[None, :], out)


DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


def test_repair_reports_and_is_idempotent(interpret):
    from ._interpreter import FAULTS, repair

    assert set(interpret) <= set(FAULTS) and repair() == interpret


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_casts(dtype, source):
    torch.manual_seed(0)
    x = torch.cat([torch.randn(400) * 10.0 ** torch.randint(-6, 6, (400,)), torch.arange(-512, 513) / 8.0,
                   torch.tensor([0.0, -0.0, 448, 464, 465, -1e6, 6e4, float("inf"), float("nan")])])
    x = torch.cat([x, torch.zeros(2048 - x.numel())]).to(source)
    y = torch.empty(2048, dtype=dtype)
    cast_kernel[(1,)](x, y, N=2048)
    top = torch.finfo(dtype).max
    want = (x.float().clamp(-top, top) if y.element_size() == 1 else x.float()).to(dtype)
    bits = torch.uint8 if y.element_size() == 1 else torch.int16
    nan = want.float().isnan()
    assert torch.equal(y.float().isnan(), nan)
    assert torch.equal(y.view(bits)[~nan], want.view(bits)[~nan])
    back = torch.empty(2048)
    cast_kernel[(1,)](want, back, N=2048)
    assert torch.equal(back[~nan], want.float()[~nan])


@pytest.mark.parametrize("dtype", DTYPES + [torch.float32])
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
def test_dot(dtype, out):
    torch.manual_seed(1)
    a, b = torch.randn(16, 90).to(dtype), torch.randn(32, 90).to(dtype)
    c = torch.empty(16, 32, dtype=out)
    dot_kernel[(1,)](a, b, c, 90, M=16, N=32, BK=32)
    want = a.double() @ b.double().T
    torch.testing.assert_close(c.double(), want, atol=5e-2 if out != torch.float32 else 1e-4, rtol=1e-2)


def test_masks_while_and_cumsum():
    x, y = torch.arange(16, dtype=torch.int32), torch.full((16,), -1, dtype=torch.int32)
    control_kernel[(1,)](x, y, 10, N=16)
    assert torch.equal(y[:10], torch.cumsum(x[:10], 0).int() + 6) and bool((y[10:] == -1).all())


def test_bf16_arithmetic():
    x = torch.randn(64).bfloat16()
    y = torch.empty_like(x)
    bf16_kernel[(1,)](x, y, N=64)
    assert torch.equal(y, torch.where(x > 0, x * x, torch.full_like(x, 1.5)))


def test_dot_scaled():
    from ._interpreter import E2M1

    torch.manual_seed(2)
    a, b = torch.randn(16, 64).to(torch.float8_e4m3fn), torch.randint(0, 256, (16, 32), dtype=torch.uint8)
    sa, sb = (torch.randint(120, 134, (16, 2), dtype=torch.uint8) for _ in range(2))
    c = torch.empty(16, 16)
    scaled_kernel[(1,)](a, sa, b, sb, c, M=16, N=16, K=64)
    x = a.float() * torch.exp2(sa.float() - 127).repeat_interleave(32, 1)
    y = torch.from_numpy(E2M1)[torch.stack([b & 15, b >> 4], -1).flatten(1).long()]
    y = y * torch.exp2(sb.float() - 127).repeat_interleave(32, 1)
    torch.testing.assert_close(c, x @ y.T)
