"""How often MXFP8 folds into E4M3 without loss, counted exactly on the CPU, on data of several kinds or on tensors of a file.

    python benchmarks/fold_rates.py [--rows 4096] [--k 4096]
    python benchmarks/fold_rates.py model.safetensors [--name down_proj] [--first 8]

What folds: `narrowgemm.testing.folding`. A file's tensors are taken to MXFP8 as `quantize` does; those that are FP8 already are not
looked at. A product of two operands that are two parts where they don't fold takes (2 - a)(2 - b) FP8 products a K block of a tile.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from narrowgemm import MXFP8, quantize
from narrowgemm.testing.folding import fold_rates

KINDS = ("normal", "lognormal", "outlier channels", "student-t 3", "blocks e^0.7N")


def source(kind: str, rows: int, k: int) -> Tensor:
    """BF16 `[rows, k]` of one of KINDS."""
    x = torch.randn(rows, k)
    if kind == "lognormal":                 # of either sign
        x = x.exp() * torch.randn(rows, k).sign()
    elif kind == "outlier channels":        # one column in a hundred, 30 times the others
        x[:, torch.randperm(k)[: k // 100]] *= 30
    elif kind == "student-t 3":
        x = torch.distributions.StudentT(3.0).sample((rows, k))
    elif kind == "blocks e^0.7N":           # blocks of 32 of very different sizes
        x *= torch.exp(0.7 * torch.randn(rows, k // 32)).repeat_interleave(32, 1)
    return x.bfloat16()


def tensors(path: str, name: str, first: int) -> Iterator[tuple[str, Tensor]]:
    """The first matrices of a safetensors file whose names contain `name`."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as f:
        names = f.keys()
        for key in [k for k in names if name in k and len(f.get_slice(k).get_shape()) in (2, 3)][:first]:
            x = f.get_tensor(key)
            if x.dtype in (torch.bfloat16, torch.float16, torch.float32):
                yield key, x


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", help="a safetensors file")
    parser.add_argument("--name", default="", help="part of the names of its tensors")
    parser.add_argument("--first", type=int, default=8, help="how many of them")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    given = tensors(args.file, args.name, args.first) if args.file else ((x, source(x, args.rows, args.k)) for x in KINDS)
    for name, x in given:
        r = fold_rates(quantize(x, MXFP8))
        print(f"{name:17s} " + ", ".join(f"{n} row{'s' * (n > 1)} {v:.4f}" for n, v in r.tiles.items())
              + f"; one power of two for 128x128 {r.square:.4f}"
              f"; as weights: " + ("no copy" if r.columns is None else f"{r.columns:.0f} columns a tile") +
              f"; two parts, 128 rows {r.two_parts:.4f}; rows over all of K {r.whole:.4f}, elements rounded there {r.rounded:.1e}"
              f"; both operands alike, 128x128: {r.tiles[128] ** 2:.3f}, {r.products ** 2:.2f} products", flush=True)


if __name__ == "__main__":
    main()
