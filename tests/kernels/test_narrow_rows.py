"""Entries of the contiguous and psum layouts for the kernels over packed weights, the rows that are padding, FP32 scales of A."""

from __future__ import annotations

import pytest
import torch

from narrowgemm.formats import FP8_1x128
from narrowgemm.kernels.gluon.sm90.narrow_tile import KINDS, TABLE_HEAD, PrepStatic
from narrowgemm.reference.grouped import padding_rows, rows_of_groups
from narrowgemm.reference.quantize import quantize

BT = 8
RUNS = {"aligned": [(0, 16), (-1, 8), (2, 24), (1, 8)], "tails": [(3, 1), (0, 17), (0, 1), (5, 3), (2, 9), (-7, 2), (2, 2)],
        "padding": [(-1, 19)], "long": [(1, 2500), (0, 2100), (1, 30)], "one row": [(3, 1)]}


def prepared(device: str, kind: str, index: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, groups: int, alignment: int, cap: int,
             xkind: int = 3, room: int = 0) -> dict[str, torch.Tensor]:
    """What the launch in front leaves: the table, A in BF16, its scales. room: rows that a masked group can hold."""
    from narrowgemm.kernels.gluon.sm90.narrow_prep_device import narrow_prep_kernel as kernel

    m, k = x.shape
    kx = -(-k // 512) * 512
    out = {"table": torch.full((TABLE_HEAD + 3 * cap,), -9, dtype=torch.int32, device=device),
           "x": torch.full((m, kx), 7.0, dtype=torch.bfloat16, device=device), "scale": torch.full((m, kx // 128), 7.0, device=device)}
    counts, live = torch.ones(4, dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int8, device=device)
    cfg = PrepStatic(KINDS[kind], BT, 8, xkind, 128, 1, False, 2048, False)
    share = 2
    kernel[(1 + (groups * share if room else m),)](
        x, scale, out["x"], out["scale"], index, index, index, index, out["table"], counts, live, share, k, kx, room * x.stride(0), x.stride(0),
        room * scale.stride(0), scale.stride(0), scale.stride(1), groups, m, room or m, alignment, cap, 4, cfg)
    out["entries"] = out["table"][TABLE_HEAD:].view(3, cap)[:, :int(out["table"][0])].t()
    assert not bool(counts.any())
    return out


def entries(parts: list[tuple[int, int, int]]) -> list[list[int]]:
    """(group, first, rows) cut into at most BT rows."""
    return [[g, a + i, min(BT, n - i)] for g, a, n in parts for i in range(0, n, BT)]


@pytest.mark.parametrize("name", RUNS)
def test_contiguous_entries_and_padding(name: str, device: str) -> None:
    from narrowgemm.kernels.gluon.sm90.narrow_rows_device import zero_rows_kernel

    runs, groups = RUNS[name], 4
    ids = torch.cat([torch.full((n,), g, dtype=torch.int32) for g, n in runs])
    m = len(ids)
    first, parts = 0, []
    for g, n in runs:
        if parts and parts[-1][0] == g and parts[-1][1] + parts[-1][2] == first:
            parts[-1] = (g, parts[-1][1], parts[-1][2] + n)
        else:
            parts.append((g, first, n))
        first += n
    want = entries([p for p in parts if 0 <= p[0] < groups])
    table = torch.full((TABLE_HEAD + 3 * (m + 1),), -9, dtype=torch.int32, device=device)
    if m < 100:
        x, scale = torch.zeros(m, 128, device=device).to(torch.float8_e4m3fn), torch.ones(m, 1, device=device)
        got = prepared(device, "contiguous", ids.to(device), x, scale, groups, 1, m + 1)["entries"].tolist()
    else:
        from .narrow_rows_kernel import entries_kernel

        entries_kernel[(1,)](ids.to(device), table, m, groups, m + 1, BT)
        got = table[TABLE_HEAD:].view(3, -1)[:, :int(table[0])].t().tolist()
    assert got == want
    if m < 100:
        out = torch.full((m, 40), 5.0, device=device)
        zero_rows_kernel[(m,)](out, ids.to(device), m, 33, groups, 1, out.stride(0), KIND=4, GROUPS=4, BN=32)
        gone = torch.zeros(m, dtype=torch.bool)
        gone[padding_rows("contiguous", ids, m, groups)] = True
        assert bool((out[gone.to(device), :33] == 0).all()) and bool((out[~gone.to(device)] == 5).all())
        assert bool((out[:, 33:] == 5).all())


@pytest.mark.parametrize("ends, alignment", [([5, 20, 20, 40], 16), ([0, 3, 70, 9], 8), ([12, 30, 31, 60], 1)])
def test_psum_entries_padding_and_scales(ends: list[int], alignment: int, device: str) -> None:
    """Ends past the tensor, and behind the group before, lose rows and reach nothing; scales of any strides come as they are."""
    from narrowgemm.kernels.gluon.sm90.narrow_rows_device import zero_rows_kernel

    m, k, groups = 44, 200, 4
    g = torch.Generator().manual_seed(1)
    q = quantize(torch.randn(m, k, generator=g), FP8_1x128)
    index = torch.tensor(ends, dtype=torch.int32)
    scale = q.scale.mT.contiguous().mT.to(device)
    got = prepared(device, "psum", index.to(device), q.data.to(device), scale, groups, alignment, m)
    parts = [(g, int(r[0]), len(r)) for g, r in rows_of_groups("psum", index, m, groups, alignment)]
    assert got["entries"].tolist() == entries(parts)
    assert torch.equal(got["scale"][:, :2].cpu(), q.scale) and not bool(got["scale"][:, 2:].any())
    payload = got["x"].float().cpu().view(m, -1, 16, 4, 2).permute(0, 1, 3, 2, 4).reshape(m, -1)
    assert torch.equal(payload[:, :k], q.data.float()) and not bool(payload[:, k:].any())
    out = torch.full((m, 16), 5.0, device=device)
    zero_rows_kernel[(m,)](out, index.to(device), m, 16, groups, alignment, 16, KIND=5, GROUPS=4, BN=32)
    gone = torch.zeros(m, dtype=torch.bool)
    gone[padding_rows("psum", index, m, groups, alignment)] = True
    assert torch.equal((out == 0).all(1).cpu(), gone) and torch.equal((out == 5).all(1).cpu(), ~gone)


def test_programs_share_the_rows_of_a_masked_group(device: str) -> None:
    x = torch.randn(15, 256, generator=torch.Generator().manual_seed(8), device="cpu").to(device).to(torch.float8_e4m3fn)
    scale = torch.rand(15, 2, generator=torch.Generator().manual_seed(9)).to(device)
    got = prepared(device, "masked", torch.tensor([5, -1, 1], dtype=torch.int32, device=device), x, scale, 3, 1, 9, room=5)
    assert got["entries"].tolist() == entries([(0, 0, 5), (2, 10, 1)])
    used = torch.zeros(15, dtype=torch.bool, device=device)
    used[[*range(5), 10]] = True
    assert torch.equal(got["scale"][used, :2], scale[used]) and bool((got["scale"][~used] == 7).all())
    assert bool((got["x"][used, :256] != 7).any(1).all()) and bool((got["x"][~used] == 7).all())
