"""The Hopper BF16 product and the FP8 one of MXFP8 activations on the CPU: their device code emulated (tests/_gluon)."""

from __future__ import annotations

import numpy as np
import pytest

from narrowgemm.kernels.gluon.sm90.expand import Tile
from narrowgemm.kernels.gluon.sm90.fold_mixed import MixedTile
from narrowgemm.kernels.gluon.sm90.fp8_block_tile import LAYOUTS

from .. import _gluon as emu
from .test_gluon_sm90_scaled import CASES, GUARD, MARK, TILES, guarded, owners, random


@pytest.fixture(scope="module")
def device():
    return emu.load_device_module("bf16_device")


@pytest.fixture(scope="module")
def mixed():
    return emu.load_device_module("fold_mixed_device")


class Call:
    """Random operands of a layout and the memory of an output, guarded."""

    def __init__(self, layout: str, n: int, k: int, out: emu.DType, accumulate: bool = False) -> None:
        self.layout, (self.m, self.index), self.n, self.out = layout, CASES[layout], n, out
        self.groups = {"dense": 1, "contiguous": 2, "offsets": 5}.get(layout, 4)
        self.rng = rng = np.random.default_rng(k)
        self.planes = self.groups if layout == "masked" else 1
        self.a, self.b = random(rng, self.planes, self.m, k), random(rng, self.groups, n, k)
        base = rng.integers(-8, 9, self.planes * self.m * n).astype(np.float32) if accumulate else None
        self.memory = guarded(self.planes * self.m * n, base)
        self.before = self.body.copy()
        self.alignment = 128 if layout == "psum" else 1

    @property
    def body(self) -> np.ndarray:
        return self.memory[GUARD:-GUARD]

    @property
    def at(self) -> emu.Pointer:
        return emu.Pointer(np.asarray(self.index, np.int64 if self.layout == "offsets" else np.int32))

    def check(self, a: np.ndarray, b: np.ndarray, zero: bool, accumulate: bool = False) -> None:
        """Against the products of a [planes, m, k] and b [groups, n, k], in FP64."""
        assert (self.memory[:GUARD] == MARK).all() and (self.memory[-GUARD:] == MARK).all(), "wrote outside the output"
        shape = (self.planes, self.m, self.n)
        want = self.before.astype(np.float64).reshape(shape)
        for (p, r), g in np.ndenumerate(owners(self.layout, self.m, self.groups, self.index, self.alignment)):
            if g >= 0:
                want[p, r] = b[g] @ a[p, r] + (want[p, r] if accumulate else 0)
            elif zero:
                want[p, r] = 0
        tolerance = 1e-5 if self.out is emu.float32 else 1e-2
        np.testing.assert_allclose(self.body.reshape(shape), want, rtol=tolerance, atol=tolerance * 30)


def run(device, layout: str, *, factors: bool = True, accumulate: bool = False, out: emu.DType = emu.float32, count: int = 1, n: int = 200,
        **tile) -> Call:
    k = 336
    c = Call(layout, n, k, out, accumulate)
    sa = c.rng.uniform(0.5, 2, (c.planes, c.m, 1)).astype(np.float32)
    sb = c.rng.uniform(0.5, 2, (c.groups, n, 1)).astype(np.float32) if factors else np.ones((1, 1, 1), np.float32)
    t = Tile(LAYOUTS[layout], **{"STAGES": 3, "OUT_BYTES": out.size, "PROMOTE": 0, "B_ROWS": factors, "ACCUMULATE": accumulate,
                                 "ZERO": layout in ("contiguous", "psum"), "OUT_BUFFERS": 2, "GATE": True, **tile})
    box = lambda x, r: emu.Descriptor(x, [1, r, 64], emu.bfloat16)  # noqa: E731
    emu.launch(device.bf16_kernel, 3, box(c.a, t.BM), box(c.b, t.WGN * t.COLS0), box(c.b, t.COLS1) if t.COLS1 else None,
               emu.Descriptor(c.body.reshape(-1, n), [64, 64], out), emu.Pointer(c.memory, GUARD, out), emu.Pointer(sa.reshape(-1)),
               emu.Pointer(sb.reshape(-1)), c.at, emu.Pointer(np.array([count], np.int32)), c.m, n, -(-k // 64), c.groups, c.alignment, 0,
               c.m, n if factors else 0, c.m * n, n, c.m, t)
    if count:
        c.check(c.a.astype(np.float64) * (sa if t.FACTORS else 1), c.b.astype(np.float64) * sb, t.ZERO, accumulate)
    return c


@pytest.mark.parametrize("layout, name", [("offsets", "128x192"), ("dense", "128x256"), ("contiguous", "128x128"), ("psum", "64x128"),
                                          ("masked", "64x256")])
def test_bf16_product(device, layout: str, name: str) -> None:
    """Every tile, every layout, K in blocks that are more than the ring holds, the last one cut short."""
    run(device, layout, factors=layout != "dense", **{**TILES[name], "PROMOTE": 0})


def test_bf16_product_is_added_and_rounded(device) -> None:
    run(device, "offsets", accumulate=True, out=emu.bfloat16)


@pytest.mark.parametrize("layout", ["offsets", "masked"])
@pytest.mark.parametrize("name", ["128x256", "128x192"])
def test_plain_bf16_product(device, layout: str, name: str) -> None:
    """No factors; a group's last tile may have rows for one warpgroup only."""
    run(device, layout, factors=False, FACTORS=False, TAIL=True, **{**TILES[name], "PROMOTE": 0})


def test_bf16_product_does_nothing_where_the_count_is_within_the_limit(device) -> None:
    c = run(device, "dense", count=0)
    assert (c.body == MARK).all()


def run_mixed(device, layout: str, *, factors: bool = False, out: emu.DType = emu.float32, count: int = 3, picks: bool = False) -> Call:
    """A with scales that change behind 32, 64 or 96 of a K block where the flag of 64 rows says so. picks: two tiles of weights, of which
    each group's begin with so many times 64 columns of A, none among them."""
    n, blocks = 300 if picks else 200, 5
    k, units = blocks * 128, 320 if picks else 256
    c = Call(layout, n, k, out)
    rb = -(-c.m // 64)
    flags = c.rng.integers(0, 8, (c.planes, rb, blocks)).astype(np.int32) * (c.rng.uniform(size=(c.planes, rb, blocks)) < 0.5)
    sa = c.rng.choice([0.5, 1.0, 2.0, 4.0], (c.planes, c.m, blocks, 4)).astype(np.float32)
    for part in range(1, 4):
        cut = flags.repeat(64, 1)[:, :c.m] >> (part - 1) & 1
        sa[..., part] = np.where(cut == 1, sa[..., part], sa[..., part - 1])
    column = -(-c.m // 4) * 4
    of_rows = np.full((c.planes, blocks * 4, column), np.nan, np.float32)
    of_rows[..., :c.m] = sa.reshape(c.planes, c.m, -1).transpose(0, 2, 1)
    top = c.rng.integers(125, 131, (c.groups, units)).astype(np.uint8)
    factor = c.rng.choice([1.0, 0.25], (c.groups, units)).astype(np.float32)
    t = MixedTile(LAYOUTS[layout], 1, 2, 2, 1, 128, 3, 1, 1, 1, 0, 8, 1, 1, 2, out.size, A_SCALE_TMA=True,
                  ZERO=layout in ("contiguous", "psum"), LATE_STORE=False, FOLD=True, FACTOR=factors, SUB=4, PICKS=picks)
    weights = np.full((c.groups, units, k), np.nan, np.float32)
    weights[:, :n] = c.b
    steps = (np.arange(c.groups)[:, None] + np.array([0, 1])) % 3        # of both tiles
    at = np.concatenate([np.zeros((c.groups, 1)), 64 * steps.cumsum(1)], 1).astype(np.int32)[:, : 3 if picks else 2].copy()
    values = random(c.rng, c.groups, units, 128)
    columns = random(c.rng, 1, c.m, 256 + 64)[0]
    removed = 40 * picks        # columns that are left out of A, behind the others
    columns[:, 256 + removed:] = 0
    rest_of_those = random(c.rng, c.groups, units, 128)
    placed = np.full((256 + 64, -(-c.m // 64) * 64 + 128 * c.groups), np.nan, np.float32)
    for r in range(c.m):
        if (at_row := place(layout, r, c.index)) is not None:
            placed[:, at_row] = columns[r]
    emu.launch(device.fold_mixed_product_kernel, 3, emu.Descriptor(c.a, [1, 128, 128], emu.float8e4nv),
               emu.Descriptor(of_rows[..., :c.m], [1, 4, 128], emu.float32), emu.Descriptor(weights, [1, 256, 128], emu.float8e4nv),
               emu.Descriptor(c.body.reshape(-1, n), [64, t.OUT_COLS], out), emu.Descriptor(placed, [64, 64], emu.bfloat16),
               emu.Descriptor(values, [1, 256, 64], emu.bfloat16), emu.Descriptor(rest_of_those, [1, 256, 64], emu.bfloat16), emu.Pointer(c.memory, GUARD, out),
               emu.Pointer(top.reshape(-1)), emu.Pointer(factor.reshape(-1)), c.at, emu.Pointer(flags.reshape(-1)),
               emu.Pointer(np.array([count, removed], np.int32)), emu.Pointer(at.reshape(-1)), c.m, n, blocks, rb, c.groups, c.alignment, 5, units,
               256, c.m * n, n, c.m, t)
    if count <= 5:
        scale = np.exp2(top[:, :n, None].astype(np.float64) - 133) * (factor[:, :n, None] if factors else 1)
        a, b = c.a * sa.reshape(c.planes, c.m, -1).repeat(32, 2), c.b * scale
        if picks:
            rest = np.zeros((c.groups, n, 256 + 64))
            rest[..., 256: 256 + removed] = rest_of_those[:, :n, :removed]
            for g, (begin, middle, end) in enumerate(at):
                rest[g, :256, begin:middle], rest[g, 256:, middle:end] = values[g, :256, :middle - begin], values[g, 256:n, :end - middle]
            a = np.concatenate([a, np.broadcast_to(columns, (c.planes, c.m, 256 + 64))], 2)
            b = np.concatenate([b, rest * scale], 2)
        c.check(a.astype(np.float64), b, t.ZERO)
    return c


def place(layout: str, row: int, index: list[int]) -> int | None:
    """Where a row has its picks."""
    if layout != "offsets":
        return row
    for group in range(len(index) - 1):
        if index[group] <= row < index[group + 1]:
            return row + index[group] % 8 // 4 * 4 + 128 * group
    return None


@pytest.mark.parametrize("layout", ["offsets", "contiguous", "dense"])
def test_mixed_product_with_picks(mixed, layout: str) -> None:
    run_mixed(mixed, layout, picks=True)


@pytest.mark.parametrize("layout", ["offsets", "contiguous", "masked"])
def test_mixed_product(mixed, layout: str) -> None:
    run_mixed(mixed, layout, factors=layout == "masked", out=emu.bfloat16 if layout == "contiguous" else emu.float32)


def test_mixed_product_does_nothing_where_too_much_does_not_fold(mixed) -> None:
    """At the limit it does all, beyond it nothing."""
    run_mixed(mixed, "dense", count=5)
    assert (run_mixed(mixed, "dense", count=6).body == MARK).all()
