"""What tests of Hopper's kernels for plain MXFP8 weights and few tokens share that emulate them (tests/_gluon): operands, the launch, guards
around the output, and what it is held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from narrowgemm.kernels.gluon.sm90 import mx8_tile
from narrowgemm.problem import Config, Problem

from .. import _gluon as emu

EDGE = 1024
GUARD = 777.0


def values(rng: np.random.Generator, rows: int, k: int) -> np.ndarray:
    return rng.integers(-4, 5, (rows, k)).astype(np.float32) / 4


def codes_between(rng: np.random.Generator, rows: int, k: int, ends: tuple[int, int]) -> np.ndarray:
    return rng.integers(ends[0], ends[1] + 1, (rows, k // 32)).astype(np.uint8)


def factors(codes: np.ndarray) -> np.ndarray:
    """Of each element of K."""
    return np.repeat(np.where(codes == 255, np.nan, 2.0 ** (codes.astype(np.float64) - 127)), 32, -1)


def operands(rng: np.random.Generator, p: Problem, ends: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """(a, b, codes of a, of b); with all codes (0, 254), those of a are the largest and those of b the smallest."""
    a, b = (values(rng, rows, p.k) for rows in (p.m, p.n))
    sa, sb = (codes_between(rng, rows, p.k, ends) for rows in (p.m, p.n))
    if ends == (0, 254):
        sa = 254 - rng.integers(0, 3, sa.shape).astype(np.uint8)
        sb = rng.integers(0, 3, sb.shape).astype(np.uint8)
    return a, b, sa, sb


def by_four(codes: np.ndarray, fours: object) -> emu.Pointer:
    """Codes in memory as they lie, four in an int32 or single ones."""
    return emu.Pointer(codes.reshape(-1).view(np.int32) if fours else codes.reshape(-1))


def run(kernel: Callable, p: Problem, made: Config, partitions: int, front: Sequence[object], back: Sequence[object], cfg: mx8_tile.Shared) -> np.ndarray:
    """The output [m, n] of a kernel whose arguments are `front`, the output, `back`, its stride and cfg. `partitions`: of a block in a cluster."""
    memory = np.full(p.m * p.n + 2 * EDGE, GUARD, np.float32)
    tiles = mx8_tile.tiles_of(p, made)
    launch = partial(emu.cluster.launch, kernel, tiles, cfg.CLUSTER, partitions) if cfg.CLUSTER > 1 else partial(emu.launch, kernel, tiles)
    launch(*front, emu.Pointer(memory, EDGE), *back, p.n, cfg, seed=p.k // 128)
    assert (memory[:EDGE] == GUARD).all() and (memory[-EDGE:] == GUARD).all(), "wrote outside the output"
    return memory[EDGE:-EDGE].reshape(p.m, p.n)


def check(got: np.ndarray, want: np.ndarray) -> None:
    """NaN in the same places, of which there are some; the rest by what is largest of each weight row."""
    assert np.array_equal(np.isnan(got), np.isnan(want)) and np.isnan(want).any()
    got, want = np.nan_to_num(got.astype(np.float64)), np.nan_to_num(want)
    top = np.abs(want).max(0) + 1e-300
    np.testing.assert_allclose(got / top, want / top, rtol=1e-5, atol=1e-5)
