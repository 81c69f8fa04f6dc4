"""The Hopper decode kernel's device code, emulated on the CPU (tests/_gluon)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from narrowgemm.arch import get_arch
from narrowgemm.kernels.gluon.sm90 import fp8_decode
from narrowgemm.kernels.gluon.sm90.fp8_decode_tile import static
from narrowgemm.ops.explain import describe
from narrowgemm.problem import Config, Problem

from .. import _gluon as emu

H200 = get_arch("h200")
GUARD = 777.0
EDGE = 1024
PARTITIONS = 4      # of a block in a cluster


@pytest.fixture(scope="module")
def device():
    return emu.load_device_module("fp8_decode_device")


def tile(bt: int, bn: int, warps: int = 4, split: int = 1, stages: int = 3, **extra: int) -> Config:
    if "cluster" in extra:
        split = extra["cluster"]
    elif split > 1:
        extra |= {"sms": 132}
    return Config(bt, bn, 128, warps, stages, swap_ab=True, persistent=True, split_k=split, extra=tuple(sorted(extra.items())))


class Case:
    """Random operands of a layout and what is expected. `index`: as the layout has it. Around the output are guards."""

    def __init__(self, layout: str, m: int, n: int, blocks: int, groups: int, index: list[int], alignment: int = 1,
                 zero: bool = True, accumulate: bool = False, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.layout, self.m, self.n, self.blocks, self.groups = layout, m, n, blocks, groups
        self.index, self.alignment = index, alignment
        planes, k = groups if layout == "masked" else 1, blocks * 128
        self.a = rng.integers(-4, 5, (planes, m, k)).astype(np.float32) / 4
        self.b = rng.integers(-4, 5, (groups, n, k)).astype(np.float32) / 4
        self.sa = rng.uniform(0.5, 2, (planes, m, blocks)).astype(np.float32)
        self.sb = rng.uniform(0.5, 2, (groups, -(-n // 128), blocks)).astype(np.float32)
        self.problem = self._problem(zero, accumulate)
        self.before = np.full(planes * m * n + 2 * EDGE, GUARD, np.float32)
        if accumulate:
            self.before[EDGE:-EDGE] = rng.integers(-8, 9, planes * m * n)

    def _problem(self, zero: bool, accumulate: bool) -> Problem:
        if self.layout == "dense":
            p = describe("gemm", m=self.m, n=self.n, k=self.blocks * 128, out_dtype="fp32")
        else:
            p = describe("grouped_gemm", layout=self.layout, groups=self.groups, m=self.m, n=self.n, k=self.blocks * 128,
                         out_dtype="fp32")
        return replace(p, zero_padding=zero, accumulate=accumulate)

    def owners(self) -> np.ndarray:
        """The group of each row of each plane; -1: of none."""
        owner = np.full(self.a.shape[:2], -1)
        for g in range(self.groups):
            if self.layout == "dense":
                owner[0] = 0
            elif self.layout == "masked":
                owner[g, :min(max(self.index[g], 0), self.m)] = g
            elif self.layout == "contiguous":
                owner[0, np.asarray(self.index) == g] = g
            elif self.layout == "offsets":
                owner[0, self.index[g]:self.index[g + 1]] = g
            else:
                start = -(-(self.index[g - 1] if g else 0) // self.alignment) * self.alignment
                owner[0, start:self.index[g]] = g
        return owner

    def expected(self) -> np.ndarray:
        sa = np.repeat(self.sa.astype(np.float64), 128, -1)
        sb = np.repeat(np.repeat(self.sb.astype(np.float64), 128, 1)[:, :self.n], 128, -1)
        out = self.before[EDGE:-EDGE].reshape(*self.a.shape[:2], self.n).astype(np.float64)
        pads = self.problem.zeroes
        for (p, r), g in np.ndenumerate(self.owners()):
            if g >= 0:
                y = (self.a[p, r] * sa[p, r]) @ (self.b[g] * sb[g]).T
                out[p, r] = y + out[p, r] if self.problem.accumulate else y
            elif pads:
                out[p, r] = 0
        return out

    def run(self, device, config: Config, grid: int, seed: int) -> np.ndarray:
        # stages are as few as the ring can do with, not as many as fit
        assert fp8_decode.legal(self.problem, config, H200) is None, fp8_decode.legal(self.problem, config, H200)
        cfg = static(self.problem, config, self.groups)
        memory = self.before.copy()
        parts = np.full(grid * cfg.BT * cfg.BN, np.nan, np.float32)
        counts = np.full(grid * cfg.CONSUMERS, -(1 << 50), np.int64)
        table = np.full(4 + 3 * self.m, -(1 << 30), np.int32)
        index = np.asarray(self.index or [0], np.int64 if self.layout == "offsets" else np.int32)
        boxes = [emu.Descriptor(x, [1, rows, 128], emu.float8e4nv) for x, rows in (
            (self.b, cfg.BN), (self.a, cfg.BT), (self.a, cfg.MIDDLE or cfg.BT), (self.a, cfg.NARROW or cfg.BT))]
        if cfg.BOX > 1:
            by_eight = self.b.reshape(self.groups, self.n // 8, 8, self.blocks, 128).transpose(0, 1, 3, 2, 4)
            boxes[0] = emu.Descriptor(by_eight, [1, cfg.BN // 8, cfg.BOX, 8, 128], emu.float8e4nv)
        out, ids, part, tab = (emu.Pointer(memory, EDGE), emu.Pointer(index), emu.Pointer(parts), emu.Pointer(table))
        masked = self.layout == "masked"
        sog, som = (self.m * self.n if masked else 0), self.n
        common = (self.m, self.n, self.blocks // cfg.BOX, self.groups, self.alignment, self.m)
        blocks = -(-self.m // cfg.BT) * -(-self.n // cfg.BN)
        launch = partial(emu.cluster.launch, device.fp8_decode_kernel, blocks, cfg.CLUSTER, PARTITIONS) if cfg.CLUSTER > 1 \
            else partial(emu.launch, device.fp8_decode_kernel, grid)
        launch(*boxes, out, emu.Pointer(self.sa.reshape(-1)), emu.Pointer(self.sb.reshape(-1)),
                   ids, part, emu.Pointer(counts), tab, *common, self.m * self.blocks if masked else 0, self.blocks, 1,
                   self.sb.shape[1] * self.blocks, self.blocks, 1, sog, som, cfg, seed=seed)
        assert (memory[:EDGE] == GUARD).all() and (memory[-EDGE:] == GUARD).all(), "wrote outside the output"
        return memory[EDGE:-EDGE].reshape(*self.a.shape[:2], self.n)

    def check(self, device, config: Config, grid: int = 3, seed: int = 0) -> None:
        got = self.run(device, config, grid, seed)
        np.testing.assert_allclose(got, self.expected(), rtol=1e-5, atol=3e-4)


def offsets(*sizes: int) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes) + 1)]


DENSE = {
    "swapped": tile(16, 64), "trips": tile(32, 64, trip=4), "pieces": tile(32, 128, trip=2), "two consumers": tile(32, 128, 8, trip=4),
    "split": tile(16, 64, split=3, trip=2), "early": tile(16, 64, stages=5, guess=4), "split, two consumers": tile(32, 128, 8, split=3), "split, early": tile(16, 64, split=3, stages=4, guess=3),
    "cluster": tile(16, 64, cluster=2), "cluster, early": tile(32, 64, cluster=2, stages=4, guess=2, trip=2),
    "cluster, wide": tile(128, 64, cluster=2, stages=4),
}


@pytest.mark.parametrize("config", DENSE.values(), ids=DENSE)
@pytest.mark.parametrize("m, n, blocks", [(5, 72, 7), (70, 136, 2)])
def test_dense(device, config: Config, m: int, n: int, blocks: int) -> None:
    Case("dense", m, n, blocks, 1, []).check(device, config, grid=60 if config.split_k > 1 else 3)


WIDTHS = {"one": tile(16, 64), "two": tile(64, 64, narrow=8), "three": tile(64, 64, narrow=8, middle=32, trip=2),
          "three of pieces": tile(32, 128, narrow=8, middle=16, trip=2)}


@pytest.mark.parametrize("config", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("case", [
    Case("offsets", 110, 72, 3, 5, offsets(3, 0, 70, 20, 9)), Case("offsets", 40, 64, 2, 1, offsets(33)),
    Case("masked", 40, 72, 3, 4, [40, 0, 3, 17]), Case("masked", 20, 64, 2, 3, [20, 90, -4], seed=3),
    Case("psum", 96, 72, 3, 3, [5, 48, 90], alignment=16), Case("psum", 60, 64, 2, 3, [5, 16, 50], alignment=16, zero=False),
    Case("contiguous", 90, 72, 2, 3, [2] * 37 + [-1] * 3 + [0] * 30 + [2] * 5 + [9] * 5 + [1] * 10),
    Case("contiguous", 30, 64, 2, 2, [1] * 9 + [-1] * 21, zero=False), Case("offsets", 40, 64, 2, 2, offsets(9, 30), accumulate=True),
], ids=lambda c: f"{c.layout}-{c.m}" + "-acc" * c.problem.accumulate)
def test_grouped(device, case: Case, config: Config) -> None:
    case.check(device, config)


@pytest.mark.parametrize("config", [tile(16, 64, stages=4, guess=2), tile(64, 64, narrow=8, middle=32, trip=2, guess=2),
                                    tile(32, 128, 8, stages=4, narrow=8, guess=3)])
@pytest.mark.parametrize("case", [
    Case("offsets", 110, 72, 3, 5, offsets(3, 0, 70, 20, 9)), Case("offsets", 60, 136, 1, 3, offsets(5, 9, 16)),
    Case("masked", 40, 72, 3, 4, [40, 0, 3, 17]), Case("masked", 20, 64, 5, 3, [20, 8, 4]), Case("masked", 20, 64, 2, 2, [0, 0]),
    Case("psum", 96, 72, 3, 3, [5, 48, 90], alignment=16), Case("contiguous", 300, 72, 2, 3, [1] * 9 + [-1] * 119 + [0] * 128 + [2] * 44),
    Case("contiguous", 200, 72, 2, 3, [1] * 130 + [0] * 70)], ids=lambda c: f"{c.layout}-{c.m}-{c.blocks}")
@pytest.mark.parametrize("grid", [2, 9])
def test_weights_fetched_on_a_guess(device, case: Case, config: Config, grid: int) -> None:
    case.check(device, config, grid)


@pytest.mark.parametrize("config", [tile(8, 64, trip=4, stages=5, guess=3), tile(8, 64, split=4, trip=4), tile(8, 64, split=2, trip=4)])
@pytest.mark.parametrize("sizes, grid", [((0, 0, 1, 0), 9), ((0, 1, 0, 2), 9), ((3, 0, 11, 1), 3), ((0, 0, 0, 0), 9)])
def test_few_experts_with_tokens(device, config: Config, sizes: tuple[int, ...], grid: int) -> None:
    """One or two groups of a rank have rows: tiles are cut along K where the grid has room for the parts, which only the device knows."""
    Case("offsets", 16, 72, 9, 4, offsets(*sizes, 0)[:5]).check(device, config, grid)


@pytest.mark.parametrize("config", [
    tile(16, 64, stages=2, box=2, ahead=8, trip=4), tile(8, 64, stages=2, box=4, guess=1), tile(64, 64, narrow=8, middle=32, trip=2, stages=3, box=2, guess=2),
    tile(32, 128, 8, stages=2, narrow=8, box=4, ahead=8, trip=4), tile(32, 128, trip=2, box=2), tile(32, 128, box=2)])
@pytest.mark.parametrize("case", [
    Case("offsets", 110, 72, 4, 5, offsets(3, 0, 70, 20, 9)), Case("offsets", 60, 136, 12, 3, offsets(5, 9, 16)),
    Case("masked", 40, 72, 4, 4, [40, 0, 3, 17]), Case("psum", 96, 72, 8, 3, [5, 48, 90], alignment=16),
    Case("contiguous", 200, 72, 4, 3, [1] * 130 + [0] * 70), Case("dense", 70, 136, 4, 1, [])], ids=lambda c: f"{c.layout}-{c.m}-{c.blocks}")
def test_weights_of_several_k_blocks_in_a_box(device, case: Case, config: Config) -> None:
    case.check(device, config)


def test_any_order_of_arrival(device) -> None:
    case, config = Case("offsets", 70, 136, 5, 3, offsets(40, 2, 28)), tile(32, 128, 8, narrow=8, trip=4, stages=4)
    first = case.run(device, config, 2, 0)
    for seed in range(1, 6):
        np.testing.assert_array_equal(first, case.run(device, config, 2, seed))
