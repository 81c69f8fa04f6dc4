"""The launches in front of and behind the Hopper kernel for plain MXFP8 by FP16 wgmma: tokens in the order of its registers, rows that FP16
does not hold."""

from __future__ import annotations

import torch
from torch import Tensor

from narrowgemm.kernels.gluon.sm90.mx8_f16 import PrepStatic

M, N, K = 9, 37, 384


def mx(rows: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return (torch.randn(rows, K, generator=g) * 50).to(torch.float8_e4m3fn), torch.randint(118, 128, (rows, K // 32), generator=g).byte()


def row_order(x: Tensor) -> Tensor:
    """out[i * 16 + h * 8 + q * 2 + r] = in[q * 32 + i * 4 + h * 2 + r] of every 128."""
    return x.view(x.shape[0], -1, 4, 8, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(x.shape)


def double(x: Tensor, s: Tensor) -> Tensor:
    return x.double() * torch.where(s == 255, torch.nan, torch.exp2(s.double() - 127)).repeat_interleave(32, 1)


def test_what_is_brought_and_what_is_mended(device: str) -> None:
    """Blocks just held and just not, of zeros, codes whose powers the store doesn't take, NaN; tokens' codes in either order."""
    from narrowgemm.kernels.gluon.sm90 import mx8_f16_prep_device as prep

    g = torch.Generator().manual_seed(0)
    (x, xs), (w, ws) = mx(M, g), mx(N, g)
    for q, s, other in ((x, xs, 40), (w, ws, 195)):
        s[1:4, 2], s[1:4, 3] = 128, torch.tensor([107, 106, 50]).byte()
        q.view(torch.uint8)[3, 96:128] = 0
        s[4], s[5], s[6, 1], s[7] = 60, other, 255, 0
        q.view(torch.uint8)[7] = 0
    x, xs, w, ws = (t.to(device) for t in (x, xs.t().contiguous().t(), w, ws))
    i32 = {"dtype": torch.int32, "device": device}
    xp, codes = torch.full((M, K), 7.0, dtype=torch.float16, device=device), torch.full((N, K // 32), 7, dtype=torch.uint8, device=device)
    xtop, xstate, top, state = (torch.full((n, ), 77, **i32) for n in (M, M, N + 1, N + 1))
    cfg = PrepStatic(32, 2, BK=256, LOOK=8, PDL=False)
    programs = -(-M // cfg.TOKENS)
    front = programs + -(-N // cfg.ROWS)
    flags = torch.full((front + 1, ), 7, dtype=torch.uint8, device=device)
    strides = x.stride(0), *xs.stride(), w.stride(0), *ws.stride()
    prep.mx8_f16_prep_kernel[(front, )](x, xs, xp, xtop, xstate, w, ws, codes, top, state, flags, M, N, K, K // 32, programs, *strides, cfg)
    assert torch.equal(codes, ws) and top[N] == state[N] == 77
    for tops, states, s, n in ((xtop, xstate, xs, M), (top, state, ws, N)):
        assert torch.equal(tops[:n], torch.where(s == 255, 0, s).amax(1).int().clamp(min=74))
        assert states[:n].tolist() == [0, 0, 1, 0, 0, 1, 2] + [0] * (n - 7)
    groups = [*xstate.split(cfg.TOKENS), *state[:N].split(cfg.ROWS)]
    assert flags.tolist() == [int(g.max()) for g in groups] + [7]
    tame = xstate == 0
    want = torch.where(xs.int() < xtop[:, None] - 21, 0.0, torch.exp2(xs.double() - xtop[:, None] + 7)).repeat_interleave(32, 1) * x.double()
    assert torch.equal(xp.double()[tame], row_order(want)[tame])
    y = torch.full((M, N + 3), 7.0, device=device)
    prep.mx8_f16_mend_kernel[(2, )](x, xs, xstate, w, ws, state, flags, y, M, N, K, front, *strides, N + 3, BM=16, BN=16, TOGETHER=5, LOOK=4,
                                    PDL=False)
    touched = (xstate != 0)[:, None] | (state[:N] != 0)[None, :]
    want = double(x, xs) @ double(w, ws).mT
    assert (y[:, N:] == 7).all() and (y[:, :N][~touched] == 7).all()
    assert torch.equal(y[:, :N].isnan(), want.isnan() & touched)
    got, want = y[:, :N][touched].double().nan_to_num(0), want[touched].nan_to_num(0)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
