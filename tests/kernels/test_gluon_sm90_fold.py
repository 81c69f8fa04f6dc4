"""The Hopper prefill kernel with folded weights on the CPU: its device code emulated (tests/_gluon), its host part."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from narrowgemm import prepack
from narrowgemm.arch import get_arch
from narrowgemm.formats import BF16, MXFP4, MXFP8, FP8_1x128, ScaledTensor
from narrowgemm.kernels.gluon.sm90 import fold, fold_stub, fold_whole, fp8_block
from narrowgemm.kernels.gluon.sm90.fold_tile import FoldTile
from narrowgemm.kernels.gluon.sm90.fp8_block_tile import LAYOUTS
from narrowgemm.prepack import PREPACK
from narrowgemm.prepack_bits import FP8_PREPACK
from narrowgemm.problem import Config, Operand, Problem, Step

from .. import _gluon as emu
from . import _ptx

H200 = get_arch("h200")
GUARD = 777.0
TILES = {"256x128": dict(MP=2), "128x256": dict(WGM=1, WGN=2, MP=2, OUT_SPLIT=2, OUT_BUFFERS=2), "128x128": dict(SINGLE=True), "exact": dict(SINGLE=True, SUB=4)}


@pytest.fixture(scope="module")
def device():
    """The device module, expansion by `_ptx` between the same bytes; E4M3 words are kept as the values that they hold."""
    module = emu.load_device_module("fold_device")
    names = module.expander.__globals__
    own = names["expand"].__globals__
    tables = [own["tables_of"](emu.wrap(np.int32(d))) for d in range(16)]
    low, high = (np.array([int(emu.raw(t[i])) & 0xFFFFFFFF for t in tables], np.uint32) for i in (0, 1))

    def expand(words, fields, tops, tables, nibbles):
        f, t = np.broadcast_arrays(fields.a, tops.a)
        d = np.stack([(t - f) & 15, ((t >> 8) - (f >> 8)) & 15], 1).reshape(4, 8, 2, 4).transpose(0, 2, 1, 3).reshape(64, 4)
        out = _ptx.run(own["NIBBLES_ASM" if nibbles else "FOLD_ASM"], words.a.view(np.uint32).reshape(64, 4, 4), low[d][..., None], high[d][..., None])
        # rows of a warp: g, then g + 8
        bytes_ = np.ascontiguousarray(np.stack(out, -1)).reshape(64, 32).view(np.uint8)
        return emu.Tensor(torch.from_numpy(bytes_).view(torch.float8_e4m3fn).float().numpy(), emu.float8e4nv)

    def view_as(buf, dtype, n, rows, cols, layout):
        if dtype is emu.int32 and buf.dtype is emu.float8e4nv:
            return buf.view(buf.dtype, [n, rows, cols * 4])
        return buf.view(dtype, [n, rows, cols])

    names["expand"], names["view_as"] = expand, view_as
    return module


class Case:
    """Random operands of a layout, the kernel's output for them, and what is expected."""

    def __init__(self, layout: str, m: int, n: int, blocks: int, groups: int, index: list[int], *, alignment: int = 1, seed: int = 0,
                 accumulate: bool = False, factors: bool = False, out: emu.DType = emu.float32, gate: int = 0, flag: int = 0, **tile: int) -> None:
        rng = np.random.default_rng(seed)
        self.layout, self.m, self.n, self.blocks, self.groups, self.index, self.out = layout, m, n, blocks, groups, index, out
        self.planes, self.alignment, self.accumulate, self.gate, self.flag = groups if layout == "masked" else 1, alignment, accumulate, gate, flag
        k = blocks * 128
        codes = rng.integers(113, 128, (groups, n, k // 32)) + rng.integers(-3, 2, (groups, n, 1))
        payload = rng.integers(0, 256, (groups, n, k // 2))
        # a block of zeros counts for nothing, whatever its scale
        payload[:, ::7, :16], codes[:, ::7, 0] = rng.choice([0, 8, 128, 136], payload[:, ::7, :16].shape), 3
        if factors:
            codes[:, ::5] += 60
        weights = ScaledTensor(torch.from_numpy(payload.astype(np.uint8)), torch.from_numpy(codes.astype(np.uint8)), MXFP4)
        self.b = weights.dequantize().double().numpy()
        self.packed = prepack(weights)
        assert self.packed.top is not None and (self.packed.factor is not None) == factors
        self.a = rng.integers(-4, 5, (self.planes, m, k)).astype(np.float32) / 4
        sub = tile.get("SUB", 1)
        self.sa = rng.uniform(0.5, 2, (self.planes, m, blocks * sub)).astype(np.float32)
        self.memory = np.full(self.planes * m * n + 8192, GUARD, np.float32)
        if accumulate:
            self.memory[4096:-4096] = rng.integers(-8, 9, self.planes * m * n)
        self.before = self.memory.copy()
        options = {"STAGES": 3, "UNROLL": 1, "HEAD": 1, "LATE_STORE": False, "W_STAGES": 2, **tile}
        self.tile = FoldTile(LAYOUTS[layout], ZERO=layout in ("contiguous", "psum"), ACCUMULATE=accumulate, FACTOR=factors,
                             OUT_BYTES=out.size, GATE=gate, **options)

    def run(self, device, grid: int = 3) -> np.ndarray:
        t, p = self.tile, self.packed
        body = self.memory[4096:-4096]
        units = p.data.shape[1]
        columns = -(-self.m // 4) * 4
        sa = np.full((*self.sa.shape[::2], columns), np.nan, np.float32)
        sa[..., :self.m] = self.sa.transpose(0, 2, 1)
        words = p.data.numpy().reshape(-1).view(np.int32).reshape(self.groups * units, self.blocks * 4, 256)
        fields = p.scale.numpy().reshape(-1).view(np.int32).reshape(self.groups * units, -1, 128)
        at = np.asarray(self.index, np.int64 if self.layout == "offsets" else np.int32)
        factor = p.factor.numpy().reshape(-1) if p.factor is not None else np.zeros(1, np.float32)
        flags = np.array([0, self.flag, 0], np.int32)
        def rows(count: int) -> tuple[emu.Descriptor, emu.Descriptor]:
            return emu.Descriptor(self.a, [1, count, 128], emu.float8e4nv), emu.Descriptor(sa[..., :self.m], [1, t.SUB, count], emu.float32)

        emu.launch(device.fold_kernel, grid, rows(t.A_BOX)[0], rows(t.BM)[1], emu.Descriptor(words, [t.UNITS, 4, 256], emu.int32),
                   emu.Descriptor(fields, [t.UNITS, 1, 128], emu.int32), *(rows(t.STUB) if t.STUB else (None, None)),
                   emu.Descriptor(body.reshape(-1, self.n), [64, t.OUT_COLS], self.out), emu.Pointer(self.memory, 4096, self.out),
                   emu.Pointer(p.top.numpy().reshape(-1)), emu.Pointer(factor), emu.Pointer(at), emu.Pointer(flags), self.m, self.n,
                   self.blocks, self.groups, self.alignment, 3, units, self.m * self.n, self.n, self.m, t)
        assert (np.concatenate([self.memory[:4096], self.memory[-4096:]]) == GUARD).all(), "wrote outside the output"
        return body.reshape(self.planes, self.m, self.n)

    def expected(self) -> np.ndarray:
        out = self.before[4096:-4096].reshape(self.planes, self.m, self.n).astype(np.float64)
        owner = np.full(out.shape[:2], -1)
        for g in range(self.groups):
            if self.layout == "dense":
                owner[0] = 0
            elif self.layout == "masked":
                owner[g, :self.index[g]] = g
            elif self.layout == "contiguous":
                owner[0, np.asarray(self.index) == g] = g
            else:
                start = self.index[g] if self.layout == "offsets" else -(-(self.index[g - 1] if g else 0) // self.alignment) * self.alignment
                owner[0, start:self.index[g + 1 if self.layout == "offsets" else g]] = g
        a = self.a.astype(np.float64) * np.repeat(self.sa.astype(np.float64), 128 // self.tile.SUB, -1)
        for p, r in itertools.product(*map(range, owner.shape)):
            g = owner[p, r]
            if g >= 0:
                out[p, r] = a[p, r] @ self.b[g].T + (out[p, r] if self.accumulate else 0)
            elif self.tile.ZERO:
                out[p, r] = 0
        return out

    def check(self, device, grid: int = 3) -> None:
        got, want = self.run(device, grid), self.expected()
        scale = np.abs(want).max((0, 1))
        np.testing.assert_allclose(got / scale, want / scale, rtol=1e-5 if self.out is emu.float32 else 1e-2, atol=1e-5)


# ---------------------------------------------------------------- device code
@pytest.mark.parametrize("name", TILES)
def test_dense(device, name: str) -> None:
    Case("dense", 130, 200, 3, 1, [0], **TILES[name]).check(device, 2)


RUNS = {"contiguous": ([1] * 128 + [0] * 100 + [-1] * 28 + [1] * 30 + [9] * 4, {}), "offsets": ([3, 70, 70, 201], {"out": emu.bfloat16}),
        "psum": ([100, 100, 130], {"alignment": 64}), "masked": ([150, 0, 65], {"factors": True})}


@pytest.mark.parametrize("layout", RUNS)
def test_grouped(device, layout: str) -> None:
    index, options = RUNS[layout]
    m = len(index) if layout == "contiguous" else 150 if layout == "masked" else 210
    Case(layout, m, 136, 2, 3, index, **TILES["256x128"], **options).check(device)


# groups of one row, of half a tile and a row more, of a tile and some, of two tiles; and none with rows
TAILS = {"masked": [150, 0, 1, 129, 300, 256], "offsets": [3, 4, 70, 70, 201, 480, 736], "offsets-empty": [0] * 7}


@pytest.mark.parametrize("three", [False, True])
def test_tails(device, three: bool) -> None:
    """A group's last tile by half where it has no more rows, or without its last quarter: the same product, no block left out."""
    Case("masked", 300, 136, 1, 6, TAILS["masked"], **TILES["256x128"], TAIL=True, THREE=three).check(device, 3)


# of a few rows more than half a tile, a tile, two tiles; of more than that
STUBS = {"offsets": [4, 136, 137, 281, 441, 445, 733, 733, 1050, 1210], "masked": [288, 289, 260, 32, 128, 160, 161, 130, 200]}


@pytest.mark.parametrize("three", [False, True])
@pytest.mark.parametrize("layout", STUBS)
def test_stub(device, layout: str, three: bool) -> None:
    """A group's few rows beyond a tile or half of one, with that."""
    index = STUBS[layout]
    groups, m = len(index) - (layout == "offsets"), 300 if layout == "masked" else 1210
    Case(layout, m, 200, 2, groups, index, **TILES["256x128"], TAIL=True, THREE=three, STUB=32, factors=three,
         out=emu.bfloat16 if three else emu.float32).check(device, 3)


QUARTERS = dict(MP=2, OUT_SPLIT=2, OUT_BUFFERS=2, TAIL=True, QUARTERS=True, ITEMS=32, LISTED=8)


# parts are halves in the second and third, of tails and of whole tiles
@pytest.mark.parametrize("index, grid", [(TAILS["masked"], 3), ([40, 0, 128], 4), ([256, 250], 8), ([256, 300, 0, 40, 130, 1], 7), ([256], 16), ([0, 0], 2)])
def test_quarters(device, index: list[int], grid: int) -> None:
    """Groups' last rows by halves or quarters, and whole tiles of the last round: the same product, by every block in its turn."""
    Case("masked", 300, 200, 1, len(index), index, **QUARTERS).check(device, grid)


@pytest.mark.slow
@pytest.mark.parametrize("case", TAILS)
@pytest.mark.parametrize("name", ["256x128", "128x256"])
def test_tails_of_every_layout(device, name: str, case: str) -> None:
    layout, index = case.partition("-")[0], TAILS[case]
    for grid in (1, 3, 40):
        Case(layout, 300 if layout == "masked" else 736, 264, 2, 6, index, **TILES[name], TAIL=True).check(device, grid)


@pytest.mark.slow
@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("layout", RUNS)
@pytest.mark.parametrize("accumulate", [False, True])
def test_every_tile(device, layout: str, name: str, accumulate: bool) -> None:
    index, options = RUNS[layout]
    m = len(index) if layout == "contiguous" else 150 if layout == "masked" else 210
    Case(layout, m, 328, 3, 3, index, accumulate=accumulate, **TILES[name], **options).check(device)


@pytest.mark.parametrize("layout, index", [("dense", [0]), ("masked", [40])])
@pytest.mark.parametrize("gate, flag", [(1, 0), (1, 1), (2, 0), (2, 1)])
def test_gate(device, layout: str, index: list[int], gate: int, flag: int) -> None:
    """Of two products behind each other one does all, the other nothing."""
    case = Case(layout, 40, 72, 1, 1, index, gate=gate, flag=flag, **TILES["128x128"])
    if gate == flag + 1:
        case.check(device, 1)
    else:
        assert (case.run(device, 1) == GUARD).all()


# ---------------------------------------------------------------- host part
def problem(layout: str = "dense", m: int = 4096, n: int = 4096, k: int = 7168, groups: int = 1, **kw) -> Problem:
    a = Operand(FP8_1x128, scale_dtype="fp32", scale_major="mn")
    b = Operand(MXFP4, prepack=PREPACK, scale_dtype="e8m0", folds=True)
    return Problem("gemm" if layout == "dense" else "grouped_gemm", layout, m, n, k, groups, kw.pop("a", a), kw.pop("b", b),
                   rows=max(1, m // groups), **kw)


def test_supports() -> None:
    assert fold.supports(problem(k=672), H200) is None
    assert fold.supports(problem(a=Operand(MXFP4, scale_dtype="e8m0", scale_major="k", aligned=False)), H200) is None
    for p in (problem(k=48), problem(n=4), problem(wide=True), problem("offsets", groups=5000), problem("psum", alignment=2),
              problem(b=Operand(MXFP4, prepack=PREPACK, scale_dtype="e8m0")), problem(b=Operand(MXFP4)),
              problem(b=Operand(MXFP4, prepack=f"{PREPACK}:halves", folds=True)), problem(a=Operand(BF16)), problem(a=Operand(MXFP8)),
              problem(a=Operand(FP8_1x128.with_element("e5m2"))), problem(a=Operand(FP8_1x128, aligned=False))):
        assert fold.supports(p, H200), p
    assert "sm90" in fold.supports(problem(), get_arch("b200"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("out_dtype", ["bf16", "fp32"])
def test_configs_are_legal(layout: str, out_dtype: str) -> None:
    for k in (32, 672, 7168):
        p = problem(layout, k=k, groups=8, out_dtype=out_dtype)
        found = [c for c in fold.configs(p, H200) if not fold.whole(c)]
        assert len(found) >= 3
        for c in found:
            t = fold.tile_of(p, c, H200)
            assert (c.block_m, c.block_n) == (t.BM, t.BN) and t.shared_bytes <= H200.smem
            assert 0 < fold.estimate(p, c, H200) < 1


def test_stubs() -> None:
    """By offsets, with tails, where there are registers, of calls with about 256 rows a group."""
    weights = Operand(MXFP4, prepack=FP8_PREPACK, scale_dtype="e8m0", folds=True)
    many = problem("offsets", m=256 * 256, groups=256, b=weights)
    tails = next(c for c in fold.configs(many, H200) if c.extra == (("tails", 1), ))
    tile = fold.tile_of(many, tails, H200, stub=True)
    assert tile is not None and tile.STUB == 32 and tile.GROUPS == 512 and tile.shared_bytes <= H200.smem
    assert fold.tile_of(many, tails, H200).STUB == fold.tile_of(many, tails, H200, factor=True, stub=True).STUB == 0
    for other in (replace(many, out_dtype="fp32"), replace(many, layout="masked", m=512, groups=8), replace(many, groups=600)):
        assert fold.tile_of(other, tails, H200, stub=True).STUB == 0
    assert fold.tile_of(many, replace(tails, extra=()), H200, stub=True).STUB == 0
    assert [fold_stub.wins(rows * 64, 64) for rows in (128, 240, 256, 272, 300)] == [False, False, True, True, False]


def test_tails_by_half_are_for_masked_groups() -> None:
    """Where they were timed: more than 128 rows a group, by offsets with weights that expand fast. They pay where groups are little more than
    whole tiles."""
    def offered(p: Problem) -> list[Config]:
        return [c for c in fold.configs(p, H200) if c.extra == (("tails", 1), )]

    four = replace(problem("masked", groups=4), rows=300)
    tails, = offered(four)
    whole = replace(tails, extra=())
    assert not offered(replace(four, out_aligned=False)) and not offered(problem("offsets", groups=4)) and not offered(replace(four, rows=128)) and not offered(problem())
    fast = replace(problem("offsets", m=65536, groups=256), b=replace(four.b, prepack=FP8_PREPACK))     # 1.10 of the kernel for many tokens
    assert offered(fast) and not offered(replace(fast, m=32768, rows=128)) and not offered(replace(fast, layout="psum"))
    assert fold.estimate(four, tails, H200) < 0.95 * fold.estimate(four, whole, H200)
    assert fold.tile_of(four, tails, H200).A_BOX == 128 and fold.tile_of(four, whole, H200).A_BOX == 256
    assert fold.legal(problem("contiguous", groups=4), tails, H200) and fold.legal(replace(four, groups=600), tails, H200)


def test_quarters_are_for_few_masked_groups() -> None:
    """Rounds of tiles that leave most blocks idle cost less by quarters; a block's list holds all that it may get."""
    two = replace(problem("masked", groups=2), rows=640)
    assert not any(c.extra == (("quarters", 1),) for c in fold.configs(two, H200))       # seen with weights that expand faster only
    two = replace(two, b=replace(two.b, prepack=FP8_PREPACK))
    by = {c.extra: c for c in fold.configs(two, H200)}
    quarters, tails = by[("quarters", 1),], by[("tails", 1),]
    assert fold.estimate(two, quarters, H200) < 0.9 * fold.estimate(two, tails, H200)
    tile = fold.tile_of(two, quarters, H200)
    assert tile.QUARTERS and (tile.QUARTER.BN, tile.QUARTER.OUT_COLS) == (64, tile.OUT_COLS)
    for bad in (replace(two, layout="offsets"), replace(two, groups=33), replace(two, max_sms=1), replace(two, m=1 << 20)):
        assert "masked groups" in fold.legal(bad, quarters, H200)


@pytest.mark.parametrize("whole, tails, rounds", [(128, 0, 1.0), (160, 0, 1.52), (160, 32, 1.76), (128, 64, 1.52), (128, 128, 1.76), (192, 0, 1.76),
                                                  (224, 0, 2.0), (0, 132, 0.76), (0, 66, 0.52)])
def test_rounds_of_quarters(whole: int, tails: int, rounds: float) -> None:
    assert fold._rounds(fp8_block.Work(whole, tails), 132) == pytest.approx(rounds)


def test_a_mean_of_few_groups_is_close_to_their_sizes() -> None:
    two, one = replace(problem("masked", groups=2), rows=448), replace(problem("masked", groups=1), rows=1024)
    assert 0.7 < fold_whole.spread_width(two) < 0.71 and fold_whole.spread_width(one) == 0
    assert fold_whole.spread_width(problem("offsets", groups=2)) == 1
    # two groups of 448 take a round of tiles of 256 rows, were they up to 512
    best = min(fold.configs(two, H200), key=lambda c: fold.estimate(two, c, H200))
    assert (best.block_m, best.block_n) == (256, 128) and not fold.whole(best)


@pytest.mark.parametrize("groups", [4, 64])
def test_masked_groups_of_more_rows_take_longer(groups: int) -> None:
    """Weights that expand fast do so however few the rows and however many the groups."""
    p = problem("masked", groups=groups)
    p = replace(p, b=replace(p.b, prepack=FP8_PREPACK))
    config = next(c for c in fold.configs(p, H200) if (c.block_m, c.block_n, c.extra) == (256, 128, ()))
    seconds = [fold.estimate(replace(p, rows=rows), config, H200) for rows in (96, 160, 224, 256, 320)]
    assert seconds == sorted(seconds)


def test_quarters_have_a_block_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tiles may be fewer than blocks where their parts are not."""
    from .gluon_sm90_fold_jobs import describe, operands

    monkeypatch.setenv("NARROWGEMM_ARCH", "h200")
    p = replace(describe("masked", order=FP8_PREPACK), rows=256)
    grids = {c.extra: fold.launches(Step(fold.NAME, c), p, operands(p), None)[-1].grid for c in fold.configs(p, H200)
             if (c.block_m, c.block_n) == (256, 128) and not fold.whole(c)}
    assert grids[()] == (2 * 4 * 12, ) and grids[("quarters", 1), ] == (H200.sms, )


def test_illegal_configs_say_why() -> None:
    good = fold.configs(problem(), H200)[0]
    for bad in (Config(96, 128, num_warps=13, num_stages=3, persistent=True), Config(256, 128, num_warps=13, num_stages=9, persistent=True),
                Config(256, 128, num_warps=9, num_stages=3, persistent=True), Config(256, 128, num_warps=13, num_stages=3),
                Config(256, 128, num_warps=13, num_stages=3, persistent=True, extra=(("late_store", 1),)),
                Config(256, 128, num_warps=13, num_stages=3, persistent=True, extra=(("tails", 1), ))):
        assert fold.legal(problem(), bad, H200)
    assert fold.legal(problem(), good, H200) is None


def test_workspace_holds_what_is_brought_over() -> None:
    c = fold.configs(problem(), H200)[0]
    assert fold.workspace(problem(), c) == 0
    fp4 = problem("masked", 100, k=672, groups=3, a=Operand(MXFP4, scale_dtype="e8m0", scale_major="k"))
    assert fold.workspace(fp4, c) >= 3 * 100 * 768 + 3 * 24 * 100 * 4 + 4
    e8m0 = problem(a=Operand(FP8_1x128.with_scale("e8m0"), scale_dtype="e8m0", scale_major="mn"))
    assert fold.workspace(e8m0, c) >= 4096 * 56 * 4
