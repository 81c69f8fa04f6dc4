"""The Hopper prefill kernel on the CPU: its device code emulated (tests/_gluon), its host part, its launch cache."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from narrowgemm.arch import get_arch
from narrowgemm.formats import FP8_1x128, FP8_128x128
from narrowgemm.kernels.gluon.sm90 import fp8_block
from narrowgemm.kernels.gluon.sm90.fp8_block_tile import LAYOUTS, Tile
from narrowgemm.problem import Config, Operand, Problem

from .. import _gluon as emu

H200 = get_arch("h200")


@pytest.fixture(scope="module")
def device():
    return emu.load_device_module("fp8_block_device")


def shapes(tile: Tile, blocks: int, slot: int, unroll: int) -> dict[str, int]:
    return {"KS": slot, "UNROLL": unroll, "HEAD": 1 + (blocks - 1) % unroll, "SKIP": -blocks % slot}


TILES = {
    "128x128": dict(),
    "slot2": dict(STAGES=3, KS=2, OUT_SPLIT=2, OUT_BUFFERS=1),
    "256x128": dict(MP=2, STAGES=3, UNROLL=1, OUT_SPLIT=2, OUT_BUFFERS=2),
    "128x256": dict(WGM=1, WGN=2, MP=2, STAGES=3, UNROLL=1, OUT_BUFFERS=2),
    "64x256": dict(WGM=1, WGN=2),
    "64x128": dict(WGM=1, STAGES=3),
    "128x128-one": dict(WGM=1, MP=2, STAGES=3, UNROLL=1, OUT_SPLIT=2),
    "128x64": dict(WN=64, STAGES=2, UNROLL=2),
    "64x128-two": dict(WGM=1, WGN=2, WN=64, STAGES=3),
    "unroll8": dict(STAGES=5, UNROLL=8),
    "early-store": dict(LATE_STORE=False),
    "128x256-late": dict(WGM=1, WGN=2, MP=2, STAGES=2, UNROLL=2, OUT_SPLIT=2, OUT_BUFFERS=2),
    "128x192": dict(NP=3, WN=64, STAGES=3, UNROLL=2, DOUBLE=True),
    "128x192-single": dict(NP=3, WN=64, STAGES=2, UNROLL=1, LATE_STORE=False),
}
# of layouts whose tiles are counted by group
COUNTED = TILES | {
    "128x256-tail": dict(WGM=1, WGN=2, MP=2, STAGES=3, UNROLL=1, OUT_BUFFERS=2, LATE_STORE=False, TAIL=True),
    "128x128-tail-late": dict(WGM=1, MP=2, STAGES=2, UNROLL=1, OUT_SPLIT=2, TAIL=True),
}


class Case:
    """Random operands of a layout, the kernel's output for them, and what is expected. Guards are NaN."""

    GUARD = 777.0

    def __init__(self, layout: str, m: int, n: int, blocks: int, groups: int, index: list[int], *, alignment: int = 1,
                 seed: int = 0, zero: bool = True, accumulate: bool = False, a_scale: str = "mn", out: emu.DType = emu.float32,
                 store_tma: bool = True, **tile: int) -> None:
        rng = np.random.default_rng(seed)
        self.layout, self.m, self.n, self.groups, self.zero, self.accumulate = layout, m, n, groups, zero, accumulate
        planes = groups if layout == "masked" else 1
        k = blocks * 128
        self.a = rng.integers(-4, 5, (planes, m, k)).astype(np.float32) / 4
        self.b = rng.integers(-4, 5, (groups, n, k)).astype(np.float32) / 4
        self.index = index
        if a_scale == "e8m0":
            code_a, code_b = rng.integers(120, 130, (planes, m, blocks)), rng.integers(120, 130, (groups, -(-n // 128), blocks))
            self.sa, self.sb = 2.0 ** (code_a - 127.0), 2.0 ** (code_b - 127.0)
        else:
            self.sa = rng.uniform(0.5, 2, (planes, m, blocks)).astype(np.float32)
            self.sb = rng.uniform(0.5, 2, (groups, -(-n // 128), blocks)).astype(np.float32)
        self.alignment = alignment
        guard = 4096
        memory = np.full(planes * m * n + 2 * guard, self.GUARD, np.float32)
        if accumulate:
            memory[guard:-guard] = rng.integers(-8, 9, planes * m * n)
        self.before = memory.copy()
        self.memory, self.guard = memory, guard
        options = {"STAGES": 4, "KS": 1, "UNROLL": 4, **tile}
        options.update(HEAD=1 + (blocks - 1) % options["UNROLL"], SKIP=-blocks % options["KS"])
        anywhere = layout == "psum" and alignment % 4 != 0
        self.tile = Tile(LAYOUTS[layout], A_SCALE_TMA=a_scale == "mn" and not anywhere, ZERO=zero and layout in ("contiguous", "psum"),
                         ACCUMULATE=accumulate, STORE_TMA=store_tma, OUT_BYTES=out.size,
                         GROUPS=32 if groups <= 32 else 128, **options)
        self.out = out
        self.code = (code_a, code_b) if a_scale == "e8m0" else None
        self.plain_scale = a_scale != "mn"

    def run(self, device, grid: int, seed: int = 0) -> np.ndarray:
        t, planes = self.tile, self.a.shape[0]
        body = self.memory[self.guard:-self.guard]
        blocks = self.sa.shape[-1]
        columns = -(-self.m // 4) * 4
        sa_box = np.full((planes * blocks, columns), np.nan, np.float32)
        sa_box[:, :self.m] = self.sa.transpose(0, 2, 1).reshape(-1, self.m)
        index = np.asarray(self.index, np.int64 if self.layout == "offsets" else np.int32)
        a_desc = emu.Descriptor(self.a, [1, getattr(t, "A_BOX", t.BM), 128], emu.float8e4nv)
        b_desc = emu.Descriptor(self.b, [1, t.B_BOX, 128], emu.float8e4nv)
        sa_desc = emu.Descriptor(sa_box[:, :self.m], [1, t.BM], emu.float32)
        d_desc = emu.Descriptor(body.reshape(-1, self.n), [64, t.OUT_COLS], self.out)
        out_ptr = emu.Pointer(self.memory, self.guard, self.out)
        scales = (self.sa, self.sb) if self.code is None else tuple(c.astype(np.uint8) for c in self.code)
        sa_ptr = emu.Pointer(scales[0].astype(scales[0].dtype if self.code else np.float32).reshape(-1))
        sb_ptr = emu.Pointer(scales[1].astype(scales[1].dtype if self.code else np.float32).reshape(-1))
        self.launch(device, grid, a_desc, sa_desc, b_desc, d_desc, out_ptr, sa_ptr, sb_ptr,
                    emu.Pointer(index), self.m, self.n, blocks, self.groups, self.alignment, blocks, self.m * blocks, blocks, 1,
                    self.sb.shape[1] * blocks, blocks, 1, self.m * self.n, self.n, self.m, t, seed=seed)
        edges = np.concatenate([self.memory[:self.guard], self.memory[-self.guard:]])
        assert (edges == self.GUARD).all(), "wrote outside the output"
        return body.reshape(planes, self.m, self.n)

    def launch(self, device, grid: int, *args, seed: int) -> None:
        emu.launch(device.fp8_block_kernel, grid, *args, seed=seed)

    def expected(self) -> np.ndarray:
        sa = np.repeat(self.sa.astype(np.float64), 128, -1)
        sb = np.repeat(np.repeat(self.sb.astype(np.float64), 128, 1)[:, :self.n], 128, -1)
        out = self.before[self.guard:-self.guard].reshape(self.a.shape[0], self.m, self.n).astype(np.float64)
        owner = np.full(out.shape[:2], -1)
        for g in range(self.groups):
            if self.layout == "masked":
                owner[g, :min(max(self.index[g], 0), self.m)] = g
            elif self.layout == "dense":
                owner[0] = 0
            elif self.layout == "contiguous":
                owner[0, np.asarray(self.index) == g] = g
            else:
                start = self.index[g] if self.layout == "offsets" else \
                    -(-(self.index[g - 1] if g else 0) // self.alignment) * self.alignment
                owner[0, start:self.index[g + 1 if self.layout == "offsets" else g]] = g
        for p, r in itertools.product(*map(range, owner.shape)):
            g = owner[p, r]
            if g >= 0:
                y = (self.a[p, r] * sa[p, r]) @ (self.b[g] * sb[g]).T
                out[p, r] = y + out[p, r] if self.accumulate else y
            elif self.tile.ZERO:
                out[p, r] = 0
        return out

    def check(self, device, grid: int = 3, seed: int = 0) -> None:
        got, want = self.run(device, grid, seed), self.expected()
        tolerance = 1e-5 if self.out is emu.float32 else 1e-2
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * 30)


def offsets(sizes: list[int], start: int = 0) -> list[int]:
    return [start + sum(sizes[:i]) for i in range(len(sizes) + 1)]


# ---------------------------------------------------------------- device code
@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("blocks", [1, 7])
def test_dense(device, name: str, blocks: int) -> None:
    Case("dense", 200, 264, blocks, 1, [0], seed=blocks, **TILES[name]).check(device, grid=2)


@pytest.mark.parametrize("name", TILES)
def test_contiguous(device, name: str) -> None:
    # aligned segments, a segment that ends inside a tile, repeated and unsorted ids, padding, ids out of range
    ids = [2] * 128 + [0] * 100 + [-1] * 28 + [1] * 30 + [0] * 5 + [99] * 10 + [1] * 20 + [2] * 3
    Case("contiguous", len(ids), 136, 5, 3, ids, **TILES[name]).check(device)


@pytest.mark.parametrize("name", COUNTED)
def test_offsets(device, name: str) -> None:
    sizes = [0, 70, 1, 130, 0, 64, 3]
    Case("offsets", 300, 136, 3, 7, offsets(sizes, 5), **COUNTED[name]).check(device)


@pytest.mark.parametrize("start", [1, 2, 3])
@pytest.mark.parametrize("name", ["128x128", "128x256-late"])
def test_offsets_start_anywhere(device, name: str, start: int) -> None:
    """A's scales come in boxes from a multiple of 4 rows on, so a tile may begin in the group before: nothing of that is written.
    Accumulating shows a row that two groups write."""
    sizes = [1, 2, 0, 3, 65, 0, 0, 130, 1, 0]
    case = Case("offsets", 210, 72, 2, len(sizes), offsets(sizes, start), accumulate=True, **{**TILES[name], "LATE_STORE": False})
    assert case.tile.A_SCALE_TMA
    case.check(device)


@pytest.mark.parametrize("name", TILES)
def test_psum(device, name: str) -> None:
    Case("psum", 700, 136, 2, 5, [100, 100, 129, 385, 500], alignment=128, **TILES[name]).check(device)


@pytest.mark.parametrize("name", COUNTED)
def test_masked(device, name: str) -> None:
    Case("masked", 150, 136, 3, 5, [0, 150, 1, 64, 129], **COUNTED[name]).check(device)


@pytest.mark.parametrize("layout", ["contiguous", "psum"])
def test_padding_is_left_alone(device, layout: str) -> None:
    index = [0] * 70 + [-1] * 60 + [1] * 10 + [-1] * 200 if layout == "contiguous" else [70, 138]
    Case(layout, 340, 72, 2, 2, index, alignment=128, zero=False).check(device)


@pytest.mark.parametrize("layout, index", [("dense", [0]), ("contiguous", [0] * 90 + [1] * 60 + [-1] * 50),
                                           ("offsets", [0, 90, 150]), ("psum", [90, 150]), ("masked", [190, 7])])
@pytest.mark.parametrize("options", [dict(accumulate=True, LATE_STORE=False), dict(a_scale="k"), dict(a_scale="e8m0"),
                                     dict(store_tma=False), dict(out=emu.bfloat16), dict(a_scale="k", MP=2, STAGES=2, UNROLL=1)],
                         ids=["accumulate", "plain-scales", "e8m0", "plain-stores", "bf16", "plain-scales-mp2"])
def test_options(device, layout: str, index: list[int], options: dict) -> None:
    groups = 1 if layout == "dense" else 2
    Case(layout, 200, 136, 3, groups, index, alignment=32, **options).check(device)


@pytest.mark.parametrize("layout", ["offsets", "masked", "psum", "contiguous", "offsets tails", "masked tails"])
def test_many_groups(device, layout: str) -> None:
    rng = random.Random(1)
    groups = 100
    layout, _, tails = layout.partition(" ")
    tile = dict(WGM=1, MP=2, UNROLL=1, TAIL=True) if tails else dict(WGM=1)
    sizes = [rng.choice([0, 0, 0, 1, 5, 70, *((130, 200) if tails else ())]) for _ in range(groups)]
    m = max(sizes) + 10 if layout == "masked" else sum(sizes) + 9
    ids = [g for g in range(groups) for _ in range(sizes[g])] + [-1] * 9
    index = {"offsets": offsets(sizes), "masked": sizes, "psum": offsets(sizes)[1:], "contiguous": ids}[layout]
    Case(layout, m, 64, 1, groups, index, STAGES=2, **tile).check(device, grid=5)


def test_tails_and_whole_tiles_are_each_dealt_out_evenly(device, monkeypatch) -> None:
    """Groups of a whole tile and a tail, in turn: in one sequence an even number of blocks would have tails in every other block only."""
    sizes = [152, 192, 128, 140, 0, 64, 172, 300]
    store, stored = device.store_tile, []

    def seen(*args):
        _, g, first, end, _ = (int(emu.raw(x)) for x in args[6])
        stored.append((emu.local.program[0], first + 64 < end, g))
        store(*args)

    monkeypatch.setattr(device, "store_tile", seen)
    case = Case("offsets", sum(sizes), 256, 2, len(sizes), offsets(sizes), WGM=1, MP=2, UNROLL=1, STAGES=2, LATE_STORE=False, TAIL=True)
    case.check(device, grid=4)
    counts = [[sum(p == i and whole == kind for p, whole, _ in stored) for i in range(4)] for kind in (True, False)]
    assert [sum(c) for c in counts] == [14, 12] and all(max(c) - min(c) <= 1 for c in counts)
    for i in range(4):      # group by group, so that what one reads of its weights is near what the others read
        groups = [g for p, _, g in stored if p == i]
        assert groups == sorted(groups)


@pytest.mark.parametrize("layout, index", [("offsets", [0] * 4), ("masked", [0] * 3), ("psum", [0] * 3), ("contiguous", [-1] * 99)])
def test_nothing_to_do(device, layout: str, index: list[int]) -> None:
    Case(layout, 99, 64, 2, 3, index, alignment=128).check(device)


@pytest.mark.parametrize("layout, index", [("offsets", [-5, 40, 20, 1000]), ("masked", [-3, 1000, 5]), ("contiguous", [7, -9] * 45)])
def test_bad_sizes_stay_inside(device, layout: str, index: list[int]) -> None:
    Case(layout, 90, 64, 1, 3, index).run(device, 2)


def test_emulator_sees_a_slot_released_early(device, monkeypatch) -> None:
    """The emulator is worth its name: a wait taken out of the consumer is noticed."""
    case = Case("dense", 128, 128, 9, 1, [0], STAGES=2)
    monkeypatch.setitem(device.blocks.__globals__, "warpgroup_mma_wait", lambda n, deps: emu.warpgroup_mma_wait(2, deps))
    with pytest.raises(emu.EmulationError):
        case.check(device, grid=1)


# ---------------------------------------------------------------- host part
def problem(layout: str = "dense", m: int = 4096, n: int = 4096, k: int = 7168, groups: int = 1, **kw) -> Problem:
    a = Operand(FP8_1x128, scale_dtype="fp32", scale_major="mn")
    return Problem("gemm" if layout == "dense" else "grouped_gemm", layout, m, n, k, groups, kw.pop("a", a),
                   kw.pop("b", Operand(FP8_128x128, scale_dtype="fp32", scale_major="k")), rows=max(1, m // groups), **kw)


def test_supports() -> None:
    assert fp8_block.supports(problem(), H200) is None
    refused = [problem(k=192), problem(n=4), problem(wide=True), problem("offsets", groups=5000),
               problem(a=Operand(FP8_1x128.with_element("e5m2"))), problem(b=Operand(FP8_1x128)),
               problem(a=Operand(FP8_1x128, major="mn")), problem(a=Operand(FP8_1x128, aligned=False)), problem(promote=64)]
    for p in refused:
        reason = fp8_block.supports(p, H200)
        assert reason, p
    assert "sm90" in fp8_block.supports(problem(), get_arch("b200"))


def test_a_scales_come_by_tma_wherever_they_can() -> None:
    for layout in LAYOUTS:
        p = problem(layout, groups=4)
        assert all(fp8_block.tile_of(p, c, H200).A_SCALE_TMA for c in fp8_block.configs(p, H200)), layout
    e8m0 = problem("offsets", groups=4, a=Operand(FP8_1x128, scale_dtype="e8m0", scale_major="mn"))
    assert not any(fp8_block.tile_of(e8m0, c, H200).A_SCALE_TMA for c in fp8_block.configs(e8m0, H200))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("out_dtype", ["bf16", "fp32"])
def test_configs_are_legal(layout: str, out_dtype: str) -> None:
    for k in (128, 384, 2048, 7168):
        p = problem(layout, k=k, groups=8, out_dtype=out_dtype)
        found = fp8_block.configs(p, H200)
        assert len(found) >= 6
        for c in found:
            t = fp8_block.tile_of(p, c, H200)
            assert (c.block_m, c.block_n) == (t.BM, t.BN)
            assert t.shared_bytes * t.CTAS + 1024 * t.CTAS <= H200.smem + 1024
            assert 1 <= t.HEAD <= k // 128 and (k // 128 - t.HEAD) % t.UNROLL == 0
            assert (t.SKIP + t.HEAD) % t.KS == 0 or t.UNROLL % t.KS == 0
            assert (t.SKIP + k // 128) % t.KS == 0 and t.UNROLL % t.KS == 0
            assert 0 < fp8_block.estimate(p, c, H200) < 1


def test_illegal_configs_say_why() -> None:
    p, good = problem(), fp8_block.configs(problem(), H200)[0]
    assert fp8_block.legal(p, good, H200) is None
    for bad in (Config(96, 128, persistent=True), Config(128, 128, num_stages=9, persistent=True), Config(128, 128),
                Config(128, 128, persistent=True, extra=(("slot", 2), ("unroll", 1))),
                Config(128, 256, num_stages=2, persistent=True, extra=(("slot", 2),)),
                Config(128, 128, persistent=True, extra=(("colour", 1),))):
        assert fp8_block.legal(p, bad, H200)


def test_waves_decide_between_tiles() -> None:
    by = lambda p: min(fp8_block.configs(p, H200), key=lambda c: fp8_block.estimate(p, c, H200))  # noqa: E731
    assert by(problem("masked", 4096, 6144, 7168, 32, )).block_m >= 128
    # 32 x 4.5 tiles of 128 columns are two waves on 132 SMs, 32 x 3 of 192 are one
    assert by(problem("dense", 4096, 576, 7168)).block_n == 192
    assert by(problem("offsets", 32768, 6144, 7168, 4)).block_n == 256
    small = problem("offsets", 8 * 32, 2048, 7168, 8)
    assert by(small).block_m == 64
