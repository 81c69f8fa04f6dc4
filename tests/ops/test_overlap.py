"""An output in memory that is read, or that holds a row twice, is refused before anything is written."""

from __future__ import annotations

import pytest
import torch

import narrowgemm as ng
from narrowgemm.ops.overlap import share_memory, stored_twice


def test_rows_stored_twice() -> None:
    x = torch.zeros(64)
    assert not any(stored_twice(t) for t in (x, x.view(8, 8), x.view(8, 8).mT, x.view(8, 8)[:, :3], x.view(2, 4, 8)[:, ::2],
                                             x.as_strided((2, 4, 4), (4, 16, 1)), x.as_strided((1, 8), (0, 1))))
    assert all(stored_twice(t) for t in (x.as_strided((4, 8), (7, 1)), x.as_strided((4, 8), (0, 1)), x.as_strided((4, 4), (1, 1)),
                                         x.as_strided((2, 4, 8), (24, 8, 1))))


def test_shared_memory() -> None:
    x = torch.zeros(1024)
    rows = x.view(32, 32)
    assert share_memory(rows, rows[5:6]) and share_memory(rows[:, :20], rows[:, 19:]) and share_memory(rows.mT, rows)
    assert share_memory(rows[:, :20].bfloat16().view(torch.float32), rows) is False      # a copy
    assert not share_memory(rows[:4], rows[4:]) and not share_memory(rows[:, :16], rows[:, 16:]) and not share_memory(rows, torch.zeros(4))
    assert not share_memory(rows[:, 16:], rows[:, :16]) and not share_memory(rows[:0], rows)
    planes = x.view(4, 8, 32)
    assert not share_memory(planes[..., :8], planes[..., 8:]) and share_memory(planes[..., :9], planes[..., 8:])
    wrapped = x.as_strided((31, 16), (32, 1), 24)       # its rows end in the first eight columns of the next ones
    assert share_memory(rows[:, :8], wrapped) and not share_memory(rows[:, 8:24], wrapped)
    shifted = x.as_strided((2, 4, 8), (4 * 32 + 16, 32, 1))     # its second plane lies 16 columns further on
    assert share_memory(shifted, rows[:, 16:24]) and share_memory(rows[:, 16:24], shifted)
    assert share_memory(rows.view(torch.bfloat16)[:, :2], rows) and not share_memory(rows.view(torch.bfloat16)[:, 2:], rows[:, :1])


def test_products() -> None:
    x, w = torch.randn(32, 128).bfloat16(), torch.randn(128, 128).bfloat16()
    before = x.clone()
    for call in (lambda: ng.gemm(x, w, out=x), lambda: ng.gemm(x[:16], w, out=x[8:24]), lambda: ng.gemm(x, w, out=w[:32]),
                 lambda: ng.grouped_gemm(x, w[None], ng.Offsets(torch.tensor([0, 32])), out=x)):
        with pytest.raises(ValueError, match="out: got memory of an operand"):
            call()
    assert torch.equal(x, before)
    both = torch.zeros(32, 256).bfloat16()
    both[:, :128] = x
    ng.gemm(both[:, :128], w, out=both[:, 128:])
    assert torch.equal(both[:, 128:], ng.gemm(x, w)) and torch.equal(both[:, :128], x)
    with pytest.raises(ValueError, match="no row stored twice"):
        ng.gemm(x, w, out=torch.zeros(8192).bfloat16().as_strided((32, 128), (64, 1)))
