"""The Hopper FP8 product of folded MXFP8 by folded MXFP8 on tiles of any width, on the CPU: its device code emulated (tests/_gluon)."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from narrowgemm.formats import MXFP8
from narrowgemm.kernels.gluon.sm90.fold_both_tile import Tile
from narrowgemm.kernels.gluon.sm90.fp8_block_tile import LAYOUTS
from narrowgemm.prepack import prepack
from narrowgemm.reference.quantize import dequantize, quantize

from .. import _gluon as emu
from .test_gluon_sm90_expand import Call, place
from .test_gluon_sm90_scaled import GUARD, MARK, random

BLOCKS = 5


@pytest.fixture(scope="module")
def device():
    return emu.load_device_module("fold_both_device")


def run(device, layout: str, tensors: int, columns: int, *, out: emu.DType = emu.float32, count: int = 3, removed: int = 0, pairs: bool = False,
        whole: bool = True) -> Call:
    """Scales of A change behind 32, 64 or 96 of a K block where the flag of 64 rows says so. Two times 256 rows of weights, each with 0 to
    128 columns of picks. `removed`: columns of A that are not in it, behind those."""
    n, k = 512, BLOCKS * 128
    c = Call(layout, n, k, out)
    rb = -(-c.m // 64)
    flags = c.rng.integers(0, 8, (rb, BLOCKS)).astype(np.int32) * (c.rng.uniform(size=(rb, BLOCKS)) < 0.5)
    sa = c.rng.choice([0.5, 1.0, 2.0, 4.0], (c.m, BLOCKS, 4)).astype(np.float32)
    for part in range(1, 4):
        cut = flags.repeat(64, 0)[:c.m] >> (part - 1) & 1
        sa[..., part] = np.where(cut == 1, sa[..., part], sa[..., part - 1])
    of_rows = np.full((1, BLOCKS * 4, -(-c.m // 4) * 4), np.nan, np.float32)
    of_rows[0, :, :c.m] = sa.reshape(c.m, -1).T
    top = c.rng.integers(125, 131, (c.groups, n)).astype(np.uint8)
    t = Tile(LAYOUTS[layout], NP=tensors, WN=columns, STAGES=3, OUT_BUFFERS=2, OUT_BYTES=out.size, ZERO=layout == "contiguous", STRIP=8,
             CLUSTER_M=1 + pairs, WHOLE=whole)
    steps = (np.arange(c.groups)[:, None] + np.array([1, 2])) % 3
    at = np.concatenate([np.zeros((c.groups, 1)), 64 * steps.cumsum(1)], 1).astype(np.int32)
    values = random(c.rng, c.groups, n, 128)
    picks = random(c.rng, 1, c.m, 256 + 128)[0]
    whole = -(-removed // 64) * 64
    picks[:, 256 + removed:] = 0
    rest = random(c.rng, c.groups, n, 128)
    placed = np.full((256 + 128, -(-c.m // 64) * 64 + 128 * c.groups), np.nan, np.float32)
    for r in range(c.m):
        if (row := place(layout, r, c.index)) is not None:
            placed[: 256 + whole, row] = picks[r, : 256 + whole]
    wide_a, wide_b = random(c.rng, 1, c.m, k), random(c.rng, c.groups, n, k)
    own, factors = c.rng.integers(132, 135, (c.groups, n)).astype(np.uint8), c.rng.choice([1.0, 0.5], (1, c.m, 1)).astype(np.float32)
    of_picks = values.reshape(c.groups * 2, 256, 128)
    box = lambda x, rows, dtype: emu.Descriptor(x, [1, rows, 64 if dtype is emu.bfloat16 else 128], dtype)  # noqa: E731
    emu.cluster.launch(
        device.fold_both_product_kernel, 3 - pairs, t.CLUSTER, 5 if pairs else 3, box(c.a, 128, emu.float8e4nv), emu.Descriptor(of_rows[..., :c.m], [1, 4, 128], emu.float32),
        box(c.b, t.B_BOX, emu.float8e4nv), box(of_picks, t.B_BOX, emu.bfloat16), emu.Descriptor(placed, [64, 64], emu.bfloat16),
        box(rest, t.B_BOX, emu.bfloat16), emu.Descriptor(wide_a, [1, 128, 64], emu.bfloat16), box(wide_b, t.B_BOX, emu.bfloat16),
        emu.Descriptor(c.body.reshape(-1, n), [64, t.OUT_COLS], out), emu.Pointer(c.memory, GUARD, out),
        emu.Pointer(top.reshape(-1)), emu.Pointer(own.reshape(-1)), emu.Pointer(factors.reshape(-1)), c.at, emu.Pointer(flags.reshape(-1)), emu.Pointer(np.array([count, removed], np.int32)),
        emu.Pointer(at.reshape(-1)), c.m, n, BLOCKS, rb, c.groups, c.alignment, 5, 256, n, t)
    if count > 5 and whole:
        c.check(wide_a.astype(np.float64) * factors, wide_b * np.exp2(own[..., None].astype(np.float64) - 133), t.ZERO)
    elif count <= 5:
        scale = np.exp2(top[..., None].astype(np.float64) - 133)
        of = np.zeros((c.groups, n, 256 + 128))
        for g, (begin, middle, end) in enumerate(at):
            of[g, :256, begin:middle], of[g, 256:, middle:end] = values[g, :256, :middle - begin], values[g, 256:, :end - middle]
        of[..., 256: 256 + removed] = rest[..., :removed]
        a = np.concatenate([c.a * sa.reshape(1, c.m, -1).repeat(32, 2), picks[None]], 2)
        c.check(a.astype(np.float64), np.concatenate([c.b, of], 2) * scale, t.ZERO)
    return c


@pytest.mark.parametrize("layout, tensors, columns, removed, pairs", [
    ("dense", 5, 16, 0, False), ("offsets", 9, 16, 70, False), ("contiguous", 5, 32, 64, False), ("dense", 3, 64, 1, False),
    ("offsets", 3, 64, 0, False), ("dense", 9, 16, 5, True), ("offsets", 3, 64, 70, True), ("contiguous", 3, 64, 0, True)])
def test_product(device, layout: str, tensors: int, columns: int, removed: int, pairs: bool) -> None:
    run(device, layout, tensors, columns, removed=removed, pairs=pairs, out=emu.bfloat16 if layout == "contiguous" else emu.float32)


@pytest.mark.parametrize("layout, tensors, columns, pairs", [("dense", 5, 16, False), ("offsets", 9, 16, False), ("contiguous", 3, 64, False),
                                                             ("dense", 3, 64, True), ("offsets", 9, 16, True)])
def test_all_is_multiplied_in_bf16_where_too_much_does_not_fold(device, layout: str, tensors: int, columns: int, pairs: bool) -> None:
    """Beyond the limit, and not at it."""
    run(device, layout, tensors, columns, count=6, pairs=pairs, removed=5, out=emu.bfloat16 if layout == "contiguous" else emu.float32)
    if not pairs:
        run(device, layout, tensors, columns, count=5)


def test_nothing_is_done_where_another_product_does_it(device) -> None:
    """At the limit it does all, beyond it nothing."""
    run(device, "dense", 5, 32, count=5, whole=False)
    assert (run(device, "dense", 5, 32, count=6, whole=False).body == MARK).all()


# ---------------------------------------------------------------- what the product needs beside
@pytest.fixture(scope="module")
def rest():
    return emu.load_device_module("fold_both_rest_device")


def run_rest(rest, count: int, removed: int, *, factors: bool = False) -> dict[str, np.ndarray]:
    """Of 2 groups of 64 rows, the second one without any of the rows of A."""
    m, n, k, groups = 10, 64, 1184, 2
    rng = np.random.default_rng(1)
    kx = -(-k // 128) * 128
    codes = rng.integers(120, 135, (m, k // 32)).astype(np.uint8)
    codes[1, 2], codes[2, 3], codes[4, 5], codes[9] = 0, 246, 255, 3
    w = quantize(torch.randn(groups, n, k, generator=torch.Generator().manual_seed(0)), MXFP8)
    packed = prepack(w)
    got = {"x": random(rng, m, k), "codes": codes, "folded": random(rng, groups * n, k), "list": rng.permutation(k)[:128].astype(np.int32),
           "y": np.full((m, kx), np.nan, np.float32), "factor": np.full(m, np.nan, np.float32), "v": np.full((groups, n, kx // 4), -7, np.int64),
           "of_rows": np.zeros((groups, n), np.uint8), "rest": np.full((groups * n, 128), np.nan, np.float32),
           "factors": rng.choice([0.125, 1.0, 2.0**40], (groups, n)).astype(np.float32), "want": dequantize(w, torch.float32).numpy()}
    got["factors"][0, 7] = np.nan
    at = {name: emu.Pointer(x.reshape(-1)) for name, x in got.items()}
    at |= {name: emu.Pointer(got[name].reshape(-1), 0, dtype) for name, dtype in (
        ("x", emu.float8e4nv), ("folded", emu.float8e4nv), ("y", emu.bfloat16), ("rest", emu.bfloat16))}
    words = emu.Pointer(packed.data.contiguous().view(torch.int32).numpy().reshape(-1))
    fields = emu.Pointer(packed.scale.contiguous().view(torch.uint8).numpy().reshape(-1))
    emu.launch(partial(rest.rest_kernel, LAYOUT=LAYOUTS["offsets"], FACTOR=factors, OUTLYING=16, WHOLE=True), 3,
               emu.Pointer(np.array([count, removed], np.int32)), emu.Pointer(np.array([0, m, m], np.int64)), at["x"], at["codes"], k, k // 32, 1,
               words, fields, at["factors"], at["y"], at["factor"], at["v"], at["of_rows"], at["folded"], at["list"], at["rest"], m, n, k,
               kx // 128, groups, 5)
    return got


def test_nothing_is_made_where_nothing_is_missing(rest) -> None:
    got = run_rest(rest, 5, 0)
    assert np.isnan(got["y"]).all() and np.isnan(got["rest"]).all() and (got["v"] == -7).all() and not got["of_rows"].any()


@pytest.mark.parametrize("removed", [3, 64, 70])
def test_weights_of_columns_that_are_left_out(rest, removed: int) -> None:
    got = run_rest(rest, 5, removed)
    assert np.array_equal(got["rest"][:, :removed], got["folded"][:, got["list"][:removed]])
    steps = -(-removed // 64) * 64
    assert not got["rest"][:, removed:steps].any() and np.isnan(got["rest"][:, steps:]).all() and np.isnan(got["y"]).all()


@pytest.mark.parametrize("factors", [True, False])
def test_all_in_bf16(rest, factors: bool) -> None:
    got = run_rest(rest, 6, 70, factors=factors)
    k = got["x"].shape[1]
    a = got["x"] * np.exp2(got["codes"].astype(np.float64) - 127).repeat(32, 1)
    made = got["y"].astype(np.float64) * got["factor"][:, None]
    assert np.isnan(made[4]).all() and not got["y"][:, k:].any() and np.isnan(got["rest"]).all()
    rows = [r for r in range(len(a)) if r != 4]
    assert np.array_equal(made[rows, :k], a[rows])
    w = (got["v"][0].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    own = [n for n in range(len(w)) if n != 7 or not factors]       # a row of weights whose factor is NaN is NaN
    assert np.array_equal(w[own, :k], got["want"][0][own]) and not w[own, k:].any() and (got["v"][1] == -7).all()
    assert np.isnan(np.delete(w, own, 0)).all()
    powers, there = np.exp2(got["of_rows"].astype(np.float64) - 133), np.isfinite(got["factors"])
    assert np.array_equal(powers[there], got["factors"][there] if factors else np.ones_like(powers[there]))
