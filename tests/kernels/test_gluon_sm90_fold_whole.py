"""Folded weights that are brought to E4M3 once a call, on the CPU: the expansion and the products, emulated (tests/_gluon)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from narrowgemm.arch import get_arch
from narrowgemm.kernels.gluon.sm90 import fold, fold_whole, fp8_cluster_tile
from narrowgemm.kernels.gluon.sm90.fp8_block_tile import LAYOUTS, Tile
from narrowgemm.problem import Config
from narrowgemm.runtime.dispatch import select

from .. import _gluon as emu
from .test_gluon_sm90_fold import Case, problem

H200, H100 = get_arch("h200"), get_arch("h100")
KINDS = {"alone": (1, 0), "clusters": (2, 0), "ahead": (2, 1)}      # blocks of a cluster, K blocks of a piece


@pytest.fixture(scope="module")
def modules():
    """Device modules, E4M3 as the bytes that it is."""
    found = {name: emu.load_device_module(f"{name}_device") for name in ("fold_whole", "fold_cluster", "fp8_block")}
    emu.words.patch(found["fold_whole"].expand_rows)
    emu.words.patch(found["fold_cluster"].ahead.__globals__["expand_rows"])
    return found


class WholeCase(Case):
    """A case of `test_gluon_sm90_fold`, with the workspace that both launches share."""

    def __init__(self, kind: str, layout: str, *args, **kw) -> None:
        super().__init__(layout, *args, **kw, MP=2)
        self.blocks_of_cluster, self.piece = KINDS[kind]
        t = self.tile
        same = dict(OUT_BYTES=self.out.size, ZERO=t.ZERO, FOLD=True, FACTOR=t.FACTOR, OUT_BUFFERS=2, OUT_SPLIT=2)
        if self.blocks_of_cluster > 1:
            self.product = fp8_cluster_tile.Tile(LAYOUTS[layout], 1, 2, 2, 1, 128, 1, 2, 3, PIECE=self.piece, **same)
        else:
            self.product = Tile(LAYOUTS[layout], 1, 2, 2, 1, 128, 3, UNROLL=1, HEAD=1, LATE_STORE=False, **same)
        units = self.packed.data.shape[1]
        # what a group without rows would have stays as it was: a NaN in E4M3
        self.made = np.full(self.groups * units * 64 * self.blocks * 32, -1, np.int32)
        self.sync = np.full(self.groups + 1, 7, np.int32)

    def run(self, modules: dict, grid: int = 3) -> np.ndarray:
        t, p = self.product, self.packed
        units, body = p.data.shape[1], self.memory[4096:-4096]
        index = emu.Pointer(np.asarray(self.index, np.int64 if self.layout == "offsets" else np.int32))
        packed = (emu.Pointer(p.data.numpy().reshape(-1).view(np.int32)), emu.Pointer(p.scale.numpy().reshape(-1).view(np.int32)),
                  emu.Pointer(p.top.numpy().reshape(-1)))
        made, sync = emu.Pointer(self.made), emu.Pointer(self.sync)
        count = 2
        programs = units * -(-self.blocks // count) * (1 if self.piece else self.groups)
        emu.launch(modules["fold_whole"].fold_whole_kernel, programs, *packed, made, sync if self.piece else None, index, self.m,
                   self.groups, self.alignment, units, self.blocks, t, count, self.piece)
        columns = -(-self.m // 4) * 4
        sa = np.full((self.planes * self.blocks, columns), np.nan, np.float32)
        sa[:, :self.m] = self.sa.transpose(0, 2, 1).reshape(-1, self.m)
        factor = emu.Pointer(p.factor.numpy().reshape(-1) if p.factor is not None else np.zeros(1, np.float32))
        words = self.made.reshape(self.groups, units * 64, self.blocks * 32)
        a_box = t.BM // self.blocks_of_cluster
        descs = (emu.Descriptor(self.a, [1, a_box, 128], emu.float8e4nv), emu.Descriptor(sa[:, :self.m], [1, t.BM], emu.float32),
                 emu.words.Descriptor(words, [1, t.B_BOX, 128], emu.float8e4nv),
                 emu.Descriptor(body.reshape(-1, self.n), [64, t.OUT_COLS], self.out), emu.Pointer(self.memory, 4096, self.out))
        sizes, to = (index, self.m, self.n, self.blocks, self.groups, self.alignment), (self.m * self.n, self.n, self.m, t)
        pitch = self.blocks if self.layout == "masked" else 0
        if self.blocks_of_cluster > 1:
            emu.cluster.launch(modules["fold_cluster"].fold_cluster_kernel, grid, 2, 6 if self.piece else 5, *descs[:3], None, *descs[3:], *packed, factor,
                                  made, sync if self.piece else None, packed[2], *sizes, 0, units, pitch, *to)
        else:
            emu.launch(modules["fp8_block"].fp8_block_kernel, grid, *descs, None, packed[2], *sizes, pitch, None, None, None, units * 64,
                       factor, 0, *to)
        assert (np.concatenate([self.memory[:4096], self.memory[-4096:]]) == 777.0).all(), "wrote outside the output"
        return body.reshape(self.planes, self.m, self.n)


RUNS = {"dense": (130, 1, [0], {}), "contiguous": (290, 3, [1] * 128 + [0] * 100 + [-1] * 28 + [1] * 30 + [9] * 4, {}),
        "offsets": (210, 4, [3, 3, 70, 70, 201], {"out": emu.bfloat16}), "psum": (210, 3, [100, 100, 130], {"alignment": 64}),
        "masked": (150, 3, [0, 150, 65], {"factors": True})}


def check(modules: dict, kind: str, layout: str, blocks: int) -> None:
    m, groups, index, options = RUNS[layout]
    WholeCase(kind, layout, m, 136, blocks, groups, index, **options).check(modules, 2)


FEW = [("alone", "dense"), ("clusters", "masked"), *(("ahead", layout) for layout in RUNS if layout != "dense")]


@pytest.mark.parametrize("kind, layout", FEW)
def test_product(modules, kind: str, layout: str) -> None:
    check(modules, kind, layout, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind, layout", [(kind, layout) for kind in KINDS for layout in RUNS if "dense" not in layout])
def test_every_product(modules, kind: str, layout: str) -> None:
    check(modules, kind, layout, 5)


def test_weights_come_bit_for_bit_and_only_of_groups_with_rows(modules) -> None:
    case = WholeCase("ahead", "offsets", 90, 72, 3, 4, [0, 0, 40, 40, 90])
    case.check(modules, 1)
    units = case.packed.data.shape[1]
    got = torch.from_numpy(case.made.view(np.uint8).reshape(4, units * 64, -1)).view(torch.float8_e4m3fn).double().numpy()
    scale = np.exp2(case.packed.top.numpy().astype(np.float64) - 133)
    for g in (1, 3):
        assert (got[g, :72] * scale[g, :72, None] == case.b[g]).all() and not got[g, 72:].any()
    assert (case.made.reshape(4, -1)[[0, 2]] == -1).all(), "a group without rows was expanded"


def in_front(modules, case: WholeCase) -> tuple[emu.Pointer, ...]:
    """The launch in front, of a group alone; what it takes first."""
    p, units = case.packed, case.packed.data.shape[1]
    given = (*(emu.Pointer(x.numpy().reshape(-1).view(np.int32)) for x in (p.data, p.scale)), emu.Pointer(p.top.numpy().reshape(-1)),
             emu.Pointer(case.made))
    emu.launch(modules["fold_whole"].fold_whole_kernel, units, *given, emu.Pointer(case.sync), emu.Pointer(np.asarray(case.index, np.int32)), case.m,
               case.groups, 1, units, 2, case.product, 2, 1)
    return given


def test_first_group_is_expanded_in_front(modules) -> None:
    """The product begins with it, so it doesn't wait for any piece."""
    case = WholeCase("ahead", "masked", 20, 72, 2, 3, [0, 20, 7])
    in_front(modules, case)
    done = (case.made.reshape(3, -1) != -1).all(1)
    assert done.tolist() == [False, True, False] and case.sync.tolist() == [0, 0, case.packed.data.shape[1] * 4 * 2, 0]


def test_one_warp_expands_every_piece_that_is_left(modules) -> None:
    """A group's last piece, too, which it takes when all others are done."""
    case = WholeCase("ahead", "masked", 20, 72, 2, 4, [3, 20, 0, 7])
    given, index = in_front(modules, case), emu.Pointer(np.asarray(case.index, np.int32))
    units, number = case.packed.data.shape[1], lambda x: emu.wrap(np.int32(x))
    problem = (index, *map(number, (case.m, case.n, 2, 4, 1)))
    emu.launch(lambda *_: modules["fold_cluster"].ahead(given, emu.Pointer(case.sync), problem, number(units), case.product), 1)
    assert (case.made.reshape(4, -1) != -1).all(1).tolist() == [True, True, False, True]


# ---------------------------------------------------------------- host part
@pytest.mark.parametrize("layout", LAYOUTS)
def test_configs_are_legal(layout: str) -> None:
    p = problem(layout, 32768, groups=1 if layout == "dense" else 8)
    found = [c for c in fold.configs(p, H200) if fold.whole(c)]
    assert len(found) == {"dense": 1, "masked": 5}.get(layout, 3)
    for c in found:
        t = fold_whole.tile_of(p, c, H200)
        assert (c.block_m, c.block_n) == (t.BM, t.BN) and t.shared_bytes <= H200.smem
        assert fold.workspace(p, c) >= p.groups * p.n * p.k


def test_illegal_configs_say_why() -> None:
    p, good = problem("contiguous", 32768, groups=8), fold_whole.CANDIDATES[0]
    assert fold.legal(p, good, H200) is None
    for bad in (Config(128, 128, 128, 9, 4, 16, persistent=True, extra=good.extra), Config(64, 128, 128, 9, 4, 8, persistent=True, extra=(("whole", 1), )),
                fold_whole._config(9, 16, whole=1),
                fold_whole._config(4, 16, whole=2), fold_whole._config(4, 16, whole=1, colour=2), fold_whole._config(4, 16, whole=3)):
        assert fold.legal(p, bad, H200), bad
    assert "registers" in fold.legal(problem("contiguous", 32768, groups=8, accumulate=True), good, H200)
    assert "clusters" in fold.legal(problem("contiguous", 32768, groups=8, max_sms=1), good, H200)
    assert "clusters" in fold.legal(problem(), good, H200)
    assert "bytes" in fold.legal(problem("contiguous", 1 << 20, groups=128), good, H200)


def test_two_widths_are_for_masked_groups() -> None:
    """Of few groups of about a thousand rows, whose weights are expanded soon enough; the device has both boxes of weights."""
    p = problem("masked", 4096, groups=1)
    p = replace(p, rows=1280)
    wide = fold_whole.CANDIDATES[-1]
    tile = fold_whole.tile_of(p, wide, H200).with_wider()
    assert (tile.BN, tile.WIDER.BN) == (160, 192) and tile.shared_bytes <= H200.smem
    assert wide in fold.configs(p, H200) and wide not in fold.configs(problem("offsets", 4096, groups=4), H200)
    assert fold.legal(problem("contiguous", 4096, groups=4), wide, H200) and fold.legal(problem(), wide, H200)
    assert fold.estimate(p, wide, H200) < min(fold.estimate(p, c, H200) for c in fold.configs(p, H200) if c.extra == ())


def test_many_rows_are_worth_the_expansion() -> None:
    def chosen(rows: int, groups: int = 8) -> int:
        step = select(problem("contiguous", rows * groups, groups=groups), H100, backend=fold.NAME).steps[0]
        return fold.whole(step.config)

    assert chosen(8192, 4) and chosen(4096)
    assert not chosen(128) and not chosen(256)
