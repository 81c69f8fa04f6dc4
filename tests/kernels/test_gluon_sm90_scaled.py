"""The Hopper kernels for row-wise and tensor-wise scales on the CPU: device code emulated (tests/_gluon), host part, plan."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from narrowgemm.arch import get_arch
from narrowgemm.formats import FP8_ROW, FP8_TENSOR, FP8_1x128
from narrowgemm.kernels.gluon.sm90 import fp8_scaled, fp8_wgrad
from narrowgemm.kernels.gluon.sm90.fp8_block_tile import LAYOUTS
from narrowgemm.kernels.gluon.sm90.fp8_scaled_tile import Tile
from narrowgemm.kernels.launching import Launch
from narrowgemm.problem import Config, Operand, Problem, promotion

from .. import _gluon as emu

H200 = get_arch("h200")
GUARD, MARK = 4096, 777.0
TILES = {
    "128x128": dict(), "128x192": dict(COLS1=64, STAGES=3), "128x256": dict(COLS0=256, STAGES=2, PROMOTE=0),
    "two pieces": dict(WGM=1, WGN=2, MP=2, STAGES=3, PROMOTE=0, BLOCKS=True),
    "64x256": dict(WGM=1, WGN=2), "64x128": dict(WGM=1, WGN=2, COLS0=64, OUT_BUFFERS=1), "every-block": dict(PROMOTE=1),
}


@pytest.fixture(scope="module")
def device():
    return emu.load_device_module("fp8_scaled_device")


@pytest.fixture(scope="module")
def wgrad_device():
    return emu.load_device_module("fp8_wgrad_device")


def guarded(count: int, base: np.ndarray | None = None) -> np.ndarray:
    memory = np.full(count + 2 * GUARD, MARK, np.float32)
    if base is not None:
        memory[GUARD:-GUARD] = base
    return memory


def random(rng, *shape: int) -> np.ndarray:
    return rng.integers(-4, 5, shape).astype(np.float32) / 4


def owners(layout: str, m: int, groups: int, index: list[int], alignment: int) -> np.ndarray:
    """Group of every row, -1 for none: [planes, m]."""
    out = np.full((groups if layout == "masked" else 1, m), -1)
    for g in range(groups):
        if layout == "masked":
            out[g, : index[g]] = g
        elif layout == "dense":
            out[:] = 0
        elif layout == "contiguous":
            out[0, np.asarray(index) == g] = g
        elif layout == "offsets":
            out[0, index[g] : index[g + 1]] = g
        else:
            out[0, -(-(index[g - 1] if g else 0) // alignment) * alignment : index[g]] = g
    return out


def check(device, layout: str, m: int, n: int, k: int, groups: int, index: list[int], *, alignment: int = 1, rows: bool = True,
          accumulate: bool = False, zero: bool = True, store_tma: bool = True, out: emu.DType = emu.float32, grid: int = 3,
          **tile) -> None:
    rng = np.random.default_rng(k)
    planes = groups if layout == "masked" else 1
    a, b = random(rng, planes, m, k), random(rng, groups, n, k)
    sa = rng.uniform(0.5, 2, (planes, m, 1) if rows else (planes, 1, 1)).astype(np.float32)
    sb = rng.uniform(0.5, 2, (groups, n, 1) if rows else (groups, 1, 1)).astype(np.float32)
    base = rng.integers(-8, 9, planes * m * n).astype(np.float32) if accumulate else None
    memory = guarded(planes * m * n, base)
    t = Tile(LAYOUTS[layout], **{"STAGES": 4, "OUT_BYTES": out.size, "A_ROWS": rows, "B_ROWS": rows, "ACCUMULATE": accumulate,
                                 "ZERO": zero and layout in ("contiguous", "psum"), "STORE_TMA": store_tma, "OUT_BUFFERS": 2,
                                 "GROUPS": 32 if groups <= 32 else 128, **tile})
    body = memory[GUARD:-GUARD]
    box = lambda x, r: emu.Descriptor(x, [1, r, 128], emu.float8e4nv)  # noqa: E731
    kind = np.int64 if layout == "offsets" else np.int32
    emu.launch(device.fp8_scaled_kernel, grid, box(a, t.BM), box(b, t.WGN * t.COLS0), box(b, t.COLS1) if t.COLS1 else None,
               emu.Descriptor(body.reshape(-1, n), [64, 64], out), emu.Pointer(memory, GUARD, out), emu.Pointer(sa.reshape(-1)),
               emu.Pointer(sb.reshape(-1)), emu.Pointer(np.asarray(index, kind)), m, n, -(-k // 128), groups, alignment,
               m if rows else 1, int(rows), n if rows else 1, int(rows), m * n, n, m, t)
    assert (memory[:GUARD] == MARK).all() and (memory[-GUARD:] == MARK).all(), "wrote outside the output"
    got, before = body.reshape(planes, m, n), (guarded(planes * m * n, base)[GUARD:-GUARD]).reshape(planes, m, n)
    want = before.astype(np.float64)
    for (p, r), g in np.ndenumerate(owners(layout, m, groups, index, alignment)):
        if g >= 0:
            y = (b[g].astype(np.float64) @ a[p, r]) * (sa[p, r if rows else 0] * sb[g, :, 0])
            want[p, r] = y + (before[p, r] if accumulate else 0)
        elif t.ZERO:
            want[p, r] = 0
    tolerance = 1e-5 if out is emu.float32 else 1e-2
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * 30)


CASES = {"dense": (200, [0]), "contiguous": (340, [1] * 128 + [0] * 70 + [-1] * 58 + [1] * 30 + [99] * 14 + [0] * 40),
         "offsets": (300, [5, 75, 75, 76, 206, 270]), "psum": (400, [100, 100, 129, 385]), "masked": (150, [0, 150, 1, 64])}


@pytest.mark.parametrize("layout, name", [*(("offsets", t) for t in TILES if t != "two pieces"), *((x, "128x128") for x in CASES if x != "offsets")])
def test_tiles(device, layout: str, name: str) -> None:
    """Every tile, every layout, K in blocks that are more than the ring holds, the last one cut short."""
    m, index = CASES[layout]
    groups = {"dense": 1, "contiguous": 2, "offsets": 5}.get(layout, 4)
    check(device, layout, m, 200, 656, groups, index, alignment=128 if layout == "psum" else 1, **TILES[name])


@pytest.mark.parametrize("layout", ["offsets", "contiguous"])
@pytest.mark.parametrize("options", [dict(rows=False), dict(accumulate=True), dict(store_tma=False), dict(out=emu.bfloat16)],
                         ids=["tensor", "accumulate", "plain-stores", "bf16"])
def test_options(device, layout: str, options: dict) -> None:
    m, index = CASES[layout]
    groups = {"dense": 1, "contiguous": 2, "offsets": 5}.get(layout, 4)
    check(device, layout, m, 136, 272, groups, index, alignment=128 if layout == "psum" else 1, **options)


def test_padding_is_left_alone(device) -> None:
    check(device, "psum", 340, 72, 160, 2, [70, 138], alignment=128, zero=False)


# ---------------------------------------------------------------- weight gradient
def plan_of(offsets: list[int], groups: int, tiles: int, most: int = 1 << 30) -> tuple[np.ndarray, int]:
    """What `plan_kernel` writes where tiles of more than `most` K blocks are cut; and the items that makes."""
    blocks = [-(-(b - a) // 128) for a, b in zip(offsets, offsets[1:])]
    order = sorted(range(len(blocks)), key=lambda g: (-blocks[g], g))
    plan = np.zeros((4, groups), np.int32)
    plan[0, : len(order)] = order
    plan[2] = 1
    plan[2, : len(order)] = [max(1, -(-blocks[g] // most)) for g in order]
    items = np.cumsum(np.where(np.arange(groups) < len(order), plan[2] * tiles, 0))
    cut = np.where((plan[2] > 1), plan[2] * tiles, 0)
    plan[1], plan[3] = items, np.cumsum(cut) - cut
    return plan.reshape(-1), int(items[-1])


@pytest.mark.parametrize("name, options", [
    *((t, {}) for t in TILES), ("128x192", dict(ACCUMULATE=True)), ("128x128", dict(SPLIT=True)), ("128x192", dict(SPLIT=True)),
    ("128x128", dict(BLOCKS=True, PROMOTE=0)),
    ("64x256", dict(BLOCKS=True, PROMOTE=0, SPLIT=True, ACCUMULATE=True)),
    ("two pieces", dict(SPLIT=True, ACCUMULATE=True)), ("two pieces", dict(STAGES=2, OUT_BUFFERS=1))])
def test_weight_gradient(wgrad_device, name: str, options: dict) -> None:
    """Groups of any length, empty ones too, shorter than their segments; NaN behind the last one; tiles cut along K."""
    rng = np.random.default_rng(1)
    sizes, m, n = [5, 0, 400, 0, 130], 130, 200
    starts = np.cumsum([0, *(-(-s // 128) * 128 for s in sizes)]).tolist()
    k = starts[-1] + 128
    a, b = (np.full((1, r, k), np.nan, np.float32) for r in (m, n))
    for s, at, end in zip(sizes, starts, starts[1:]):
        for x in (a, b):
            x[0, :, at:end] = 0
            x[0, :, at : at + s] = random(rng, x.shape[1], s)
    t = Tile(LAYOUTS["masked"], **{"STAGES": 4, "OUT_BYTES": 4, "ZERO": False, "OUT_BUFFERS": 2, "TABLES": 2, **TILES[name], **options})
    scales = [rng.uniform(0.5, 2, (k // 128 if t.BLOCKS else 1, r)).astype(np.float32) for r in (m, n)]
    if t.BLOCKS:
        for s in scales:
            s[starts[-1] // 128:] = np.nan
    count = len(sizes) * m * n
    base = rng.integers(-8, 9, count).astype(np.float32) if t.ACCUMULATE else None
    memory = guarded(count, base)
    plan, items = plan_of(starts, t.GROUPS, -(-m // t.BM) * -(-n // t.BN), 2 if t.SPLIT else 1 << 30)
    body = memory[GUARD:-GUARD]
    box = lambda x, r: emu.Descriptor(x, [1, r, 128], emu.float8e4nv)  # noqa: E731
    scale_box = lambda x, r: emu.Descriptor(x, [1, r], emu.float32)  # noqa: E731
    counts, sums = np.zeros(items * 2, np.int32), np.full(items * t.BM * t.BN, np.nan, np.float32)
    emu.launch(wgrad_device.fp8_wgrad_kernel, 3, box(a, t.BM), box(b, t.WGN * t.COLS0), box(b, t.COLS1) if t.COLS1 else None,
               scale_box(scales[0], t.BM), scale_box(scales[1], t.BN), emu.Descriptor(body.reshape(-1, n), [64, 64], emu.float32),
               emu.Pointer(memory, GUARD, emu.float32), *(emu.Pointer(s.reshape(-1)) for s in scales),
               emu.Pointer(np.asarray(starts, np.int32)), emu.Pointer(plan), emu.Pointer(counts), emu.Pointer(sums), m, n, k, 0, 1, 0, 1,
               m * n, n, m, t)
    assert (memory[:GUARD] == MARK).all() and (memory[-GUARD:] == MARK).all(), "wrote outside the output"
    assert counts.any() == t.SPLIT
    got = body.reshape(len(sizes), m, n)
    sa, sb = (np.repeat(s.T, 128, 1) if t.BLOCKS else np.repeat(s.T, k, 1) for s in scales)
    for g, (s, at) in enumerate(zip(sizes, starts)):
        ks = slice(at, at + s)
        want = (a[0, :, ks] * sa[:, ks]).astype(np.float64) @ (b[0, :, ks] * sb[:, ks]).T
        want += base.reshape(got.shape)[g] if t.ACCUMULATE else 0
        np.testing.assert_allclose(got[g], want, rtol=1e-5, atol=1e-3)
        assert s or t.ACCUMULATE or not got[g].any()


# ---------------------------------------------------------------- host part
def problem(layout: str = "offsets", a=FP8_ROW, b=FP8_ROW, k: int = 2048, **kw) -> Problem:
    op = {"dense": "gemm", "k_grouped": "grouped_gemm_wgrad"}.get(layout, "grouped_gemm")
    kw = {"promote": promotion(a, b), "alignment": 128 if layout == "k_grouped" else 1, **kw}
    return Problem(op, layout, 4096, 2048, k, 8, Operand(a, scale_dtype="fp32", scale_major="k"),
                   Operand(b, scale_dtype="fp32", scale_major="k"), rows=512, **kw)


def test_promotion_follows_the_formats() -> None:
    assert promotion(FP8_ROW, FP8_TENSOR) == 512 and promotion(FP8_ROW, FP8_ROW, fast_accum=True) == 0
    assert promotion(FP8_1x128, FP8_ROW, fast_accum=True) == 128


@pytest.mark.parametrize("layout", [*LAYOUTS, "k_grouped"])
@pytest.mark.parametrize("out", ["bf16", "fp32"])
@pytest.mark.parametrize("promote", [0, 512])
def test_configs_fit(layout: str, out: str, promote: int) -> None:
    kernel = fp8_wgrad if layout == "k_grouped" else fp8_scaled
    p = problem(layout, out_dtype=out, promote=promote)
    assert kernel.supports(p, H200) is None
    found = kernel.configs(p, H200)
    assert found and (promote == 0) == any((c.block_m, c.block_n) == (128, 256) for c in found)
    for c in found:
        t = kernel.tile_of(p, c, H200)
        assert (c.block_m, c.block_n) == (t.BM, t.BN) and t.MP == 1
        assert t.shared_bytes <= H200.smem and t.OUT_BUFFERS * 64 <= t.WN and promote // 128 == t.PROMOTE
        assert 0 < kernel.estimate(p, c, H200) < 1


@pytest.mark.parametrize("change, words", [
    (dict(k=2056), "multiples of 16"), (dict(a=FP8_1x128), "row-wise and tensor-wise"), (dict(b=FP8_1x128), "row-wise and tensor-wise"),
    (dict(promote=64), "every 128"), (dict(layout="k_grouped", a=FP8_1x128, b=FP8_1x128), "MN-major"), (dict(wide=True), "2.31")])
def test_refusals(change: dict, words: str) -> None:
    p = problem(**change)
    kernel = fp8_wgrad if p.layout == "k_grouped" else fp8_scaled
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(kernel.supports(p, H200))
    assert kernel.supports(replace(p), get_arch("mi350x")) and kernel.supports(problem("dense" if p.layout == "k_grouped" else "k_grouped"), H200)


def test_illegal_configs_say_why() -> None:
    p = problem()
    for bad in (Config(96, 128, persistent=True), Config(128, 128, num_stages=9, persistent=True), Config(128, 128),
                Config(128, 256, num_stages=4, persistent=True), Config(128, 128, persistent=True, extra=(("colour", 1),))):
        assert fp8_scaled.legal(p, bad, H200) and fp8_wgrad.legal(problem("k_grouped"), bad, H200)


def test_wide_tiles_are_for_long_groups() -> None:
    """Short ones are held by the store, of which a wide tile has half in its staging."""
    import narrowgemm as ng

    for k, columns in ((8192, 256), (2048, 128)):
        groups = 32768 // k
        p = replace(problem("k_grouped", a=FP8_1x128, b=FP8_1x128, out_dtype="fp32", accumulate=True), m=4096, n=7168, k=32768, groups=groups)
        best = min(fp8_wgrad.configs(p, get_arch("h100")), key=lambda c: fp8_wgrad.estimate(p, c, get_arch("h100")))
        assert (best.block_m, best.block_n) == (128, columns)
    assert ng.explain("grouped_gemm_wgrad", layout="k_grouped", groups=64, m=2048, n=2048, k=16384, a="fp8_row", b="fp8_row",
                      device="h100").plan.steps[0].config.num_stages == 4


def test_wide_tiles_of_blocks_add_by_tma() -> None:
    p = problem("k_grouped", a=FP8_1x128, b=FP8_1x128, out_dtype="fp32", accumulate=True)
    wide = next(c for c in fp8_wgrad.configs(p, H200) if c.block_n == 256 and c.block_m == 128)
    assert fp8_wgrad.tile_of(p, wide, H200).MP == 2
    assert "TMA adds" in str(fp8_wgrad.legal(replace(p, out_aligned=False), wide, H200))
    for dtype in ("bf16", "fp16", "fp32"):
        assert fp8_wgrad.legal(replace(p, out_dtype=dtype, accumulate=False), wide, H200) is None


@pytest.mark.parametrize("kernel", [fp8_scaled, fp8_wgrad], ids=lambda k: k.NAME.split(".")[-1])
@pytest.mark.parametrize("max_sms", [0, 24])
def test_the_grid_is_within_max_sms(kernel, max_sms: int, monkeypatch) -> None:
    """Forward and dgrad, or the weight gradient."""
    from . import gluon_sm90_scaled_jobs, gluon_sm90_wgrad_jobs

    monkeypatch.setenv("NARROWGEMM_ARCH", "h200")
    grids = []
    monkeypatch.setattr(Launch, "run", lambda self: grids.append(self.grid))
    if kernel is fp8_scaled:
        p = gluon_sm90_scaled_jobs.describe("offsets", max_sms=max_sms)
        gluon_sm90_scaled_jobs.call(p, kernel.configs(p, H200)[0])
    else:
        p = gluon_sm90_wgrad_jobs.describe(max_sms=max_sms)
        gluon_sm90_wgrad_jobs.call(p, kernel.configs(p, H200)[0])
    assert 0 < grids[-1][0] <= (max_sms or H200.sms) and (not max_sms or grids[-1][0] == max_sms)


@pytest.mark.interpret
@pytest.mark.parametrize("sizes", [[5, 0, 700, 128, 0, 130], [0, 0], [i % 7 * 50 for i in range(100)]])
def test_plan(interpret, sizes: list[int]) -> None:
    from narrowgemm.kernels.gluon.sm90.fp8_wgrad_plan_device import plan_kernel

    starts = torch.tensor([0, *(-(-s // 128) * 128 for s in sizes)]).cumsum(0).to(torch.int32)
    groups = 32 if len(sizes) <= 32 else 128
    plan = torch.full((4 * groups,), -1, dtype=torch.int32)
    plan_kernel[(1,)](starts, plan, plan, int(starts[-1]), len(sizes), 6, 1, GROUPS=groups, COUNTS=0, SPLIT=False)
    want, _ = plan_of(starts.tolist(), groups, 6)
    assert plan.view(4, groups)[:3].tolist() == want.reshape(4, groups)[:3].tolist()


@pytest.mark.interpret
def test_plan_cuts_long_tiles(interpret) -> None:
    """A tile longer than 2 / share of the work is cut into chunks of at most 1 / share; their sums have places of their own."""
    from narrowgemm.kernels.gluon.sm90.fp8_wgrad_plan_device import plan_kernel

    starts = torch.tensor([0, 2, 100, 103]).mul(128).to(torch.int32)
    plan, counts = torch.full((4 * 32,), -1, dtype=torch.int32), torch.full((16,), -1, dtype=torch.int32)
    plan_kernel[(1,)](starts, plan, counts, 103 * 128, 3, 6, 40, GROUPS=32, COUNTS=16, SPLIT=True)
    order, ends, chunks, places = plan.view(4, 32)[:, :3].tolist()
    most = -(-103 * 6 // 40)
    assert order == [1, 2, 0] and chunks == [-(-98 // most), 1, 1] and ends == [chunks[0] * 6, chunks[0] * 6 + 6, chunks[0] * 6 + 12]
    assert places[0] == 0 and not counts.any()


def test_plans_are_chosen() -> None:
    import narrowgemm as ng

    for op, layout in (("gemm", "dense"), ("grouped_gemm", "offsets")):
        plan = ng.explain(op, layout=layout, groups=8 if layout == "offsets" else 1, m=8192, n=4096, k=7168, a="fp8_row", b="fp8_row",
                          device="h200").plan
        assert plan.kernel == fp8_scaled.NAME, plan


def test_every_shape_is_costed() -> None:
    assert set(fp8_scaled.SHAPES) == set(fp8_scaled.BLOCK_TIMES)
    assert {(c.block_m, c.block_n) for c, _ in itertools.product(fp8_scaled.CANDIDATES, (0,))} == set(fp8_scaled.SHAPES)
