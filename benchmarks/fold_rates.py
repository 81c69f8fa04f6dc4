"""How often MXFP8 folds into E4M3 without loss, counted exactly on the CPU: one scale for 128 of K instead of four for 32.

    python benchmarks/fold_rates.py [--rows 4096] [--k 4096]

A row's K block of 128 folds where one power of two holds all of its elements as E4M3, bit for bit: the largest at most 448, and
no set bit below 2^-9. A tile's K block folds where all of its rows' do. What does not fold can be two E4M3 parts, the upper and the
lower bits: `two parts` says how often that holds everything. A product of two such operands takes (2 - a)(2 - b) FP8 products a K
block.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from narrowgemm import MXFP8, ScaledTensor, quantize

BLOCK, LOWEST, BINADES = 128, -9, 14     # E4M3's last bit; what a second part adds below


def sources(kind: str, rows: int, k: int) -> Tensor:
    x = torch.randn(rows, k)
    if kind == "outlier channels":        # one column in a hundred, 30 times the others
        x[:, torch.randperm(k)[: k // 100]] *= 30
    elif kind == "student-t 3":
        x = torch.distributions.StudentT(3.0).sample((rows, k))
    elif kind == "blocks e^0.7N":         # blocks of 32 of very different sizes
        x *= torch.exp(0.7 * torch.randn(rows, k // 32)).repeat_interleave(32, 1)
    return x.bfloat16()


def bits(q: ScaledTensor) -> tuple[Tensor, Tensor]:
    """int32 `[R, K]`: the least b with |value| <= 448 * 2^b, and the exponent of the lowest set bit. Zeros ask for nothing."""
    assert q.scale is not None
    code = q.data.view(torch.uint8).to(torch.int32) & 127
    e = q.scale.to(torch.int32).repeat_interleave(32, -1) - 127
    normal = code >= 8
    m = torch.where(normal, 8 + (code & 7), code & 7)
    p = torch.where(normal, (code >> 3) - 10, LOWEST) + e                   # value = m * 2^p, m < 16
    width = torch.tensor([0, 1, 2, 2, 3, 3, 3, 3, *[4] * 8])[m]
    most = p + width - 9 + (m == 15).int()                                  # 14 * 2^5 = 448; 15 needs the next power
    last = torch.tensor([0, 0, 1, 0, 2, 0, 1, 0, 3, 0, 1, 0, 2, 0, 1, 0])[m]
    return torch.where(m > 0, most, -1000), torch.where(m > 0, p + last, 1000)


def folds(q: ScaledTensor) -> tuple[Tensor, Tensor]:
    """bool `[R, K/128]`: whether a row's block folds, and whether two parts hold it."""
    most, last = (x.view(*x.shape[:-1], -1, BLOCK) for x in bits(q))
    room = last.amin(-1) - most.amax(-1)
    return room >= LOWEST, room >= LOWEST - BINADES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    args = parser.parse_args()
    torch.manual_seed(0)
    for kind in ("normal", "outlier channels", "student-t 3", "blocks e^0.7N"):
        once, twice = folds(quantize(sources(kind, args.rows, args.k), MXFP8))
        tiles = {r: once.view(-1, r, once.shape[1]).all(1).float().mean().item() for r in (1, 8, 64, 128, 256)}
        two = twice.view(-1, 128, once.shape[1]).all(1).float().mean().item()
        p = tiles[128]
        print(f"{kind:17s} " + ", ".join(f"{r} row{'s' * (r > 1)} {v:.4f}" for r, v in tiles.items())
              + f"; two parts, 128 rows {two:.4f}; both operands alike, 128x128: {p * p:.3f}, {(2 - p) ** 2:.2f} products",
              flush=True)


if __name__ == "__main__":
    main()
