"""The Hopper FP8 product of folded MXFP8 by folded MXFP8 on tiles of any width, on the CPU: its device code emulated (tests/_gluon)."""

from __future__ import annotations

import numpy as np
import pytest

from narrowgemm.kernels.gluon.sm90.fold_both_tile import Tile
from narrowgemm.kernels.gluon.sm90.fp8_block_tile import LAYOUTS

from .. import _gluon as emu
from .test_gluon_sm90_expand import Call, place
from .test_gluon_sm90_scaled import GUARD, MARK, random

BLOCKS = 5


@pytest.fixture(scope="module")
def device():
    return emu.load_device_module("fold_both_device")


def run(device, layout: str, tensors: int, columns: int, *, out: emu.DType = emu.float32, count: int = 3, removed: int = 0, pairs: bool = False) -> Call:
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
             CLUSTER_M=1 + pairs)
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
    of_picks = values.reshape(c.groups * 2, 256, 128)
    box = lambda x, rows, dtype: emu.Descriptor(x, [1, rows, 64 if dtype is emu.bfloat16 else 128], dtype)  # noqa: E731
    emu.cluster.launch(
        device.fold_both_product_kernel, 3 - pairs, t.CLUSTER, 5 if pairs else 3, box(c.a, 128, emu.float8e4nv), emu.Descriptor(of_rows[..., :c.m], [1, 4, 128], emu.float32),
        box(c.b, t.B_BOX, emu.float8e4nv), box(of_picks, t.B_BOX, emu.bfloat16), emu.Descriptor(placed, [64, 64], emu.bfloat16),
        box(rest, t.B_BOX, emu.bfloat16), emu.Descriptor(c.body.reshape(-1, n), [64, t.OUT_COLS], out), emu.Pointer(c.memory, GUARD, out),
        emu.Pointer(top.reshape(-1)), c.at, emu.Pointer(flags.reshape(-1)), emu.Pointer(np.array([count, removed], np.int32)),
        emu.Pointer(at.reshape(-1)), c.m, n, BLOCKS, rb, c.groups, c.alignment, 5, 256, n, t)
    if count <= 5:
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


def test_nothing_is_done_where_too_much_does_not_fold(device) -> None:
    """At the limit it does all, beyond it nothing."""
    run(device, "dense", 5, 32, count=5)
    assert (run(device, "dense", 5, 32, count=6).body == MARK).all()
