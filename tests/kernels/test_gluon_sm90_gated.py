"""The gated product on Hopper, on the CPU: its device code emulated (tests/_gluon), its host part."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from narrowgemm.formats import FP8_1x128, FP8_128x128
from narrowgemm.kernels.gluon.sm90 import fp8_gated
from narrowgemm.kernels.gluon.sm90.fp8_block_tile import LAYOUTS
from narrowgemm.kernels.gluon.sm90.fp8_gated_tile import GatedTile
from narrowgemm.problem import Epilogue, Operand, Problem
from narrowgemm.runtime import dispatch

from .. import _gluon as emu
from .test_gluon_sm90_prefill import H200, offsets

PARTITIONS = 5
GUARD = 777.0
CLAMP = 1e-4


@pytest.fixture(scope="module")
def device():
    return emu.load_device_module("fp8_gated_device")


class Gated:
    """Random operands of groups, and what is expected. Guards are NaN where nothing is written."""

    def __init__(self, m: int, inter: int, blocks: int, index: list[int], seed: int = 0, **tile: int) -> None:
        rng = np.random.default_rng(seed)
        self.m, self.inter, self.blocks, self.index, groups = m, inter, blocks, index, len(index) - 1
        self.a = rng.integers(-4, 5, (1, m, blocks * 128)).astype(np.float32) / 4
        self.b = rng.integers(-4, 5, (groups, 2 * inter, blocks * 128)).astype(np.float32) / 16
        self.sa = rng.uniform(0.5, 2, (m, blocks)).astype(np.float32)
        self.sb = rng.uniform(0.5, 2, (groups, 2 * inter // 128, blocks)).astype(np.float32)
        self.tile = GatedTile(LAYOUTS["offsets"], GROUPS=32 if groups <= 32 else 128, **{"STAGES": 3, **tile})
        self.out = np.full(m * inter, GUARD, np.float32)
        self.columns = -(-m // 4) * 4
        self.scale = np.full(inter // 128 * self.columns, GUARD, np.float32)

    def run(self, device, grid: int, seed: int = 0) -> None:
        t, m = self.tile, self.m
        sa_box = np.full((self.blocks, self.columns), np.nan, np.float32)
        sa_box[:, :m] = self.sa.T
        emu.cluster.launch(
            device.fp8_gated_kernel, grid, t.CLUSTER, PARTITIONS,
            emu.Descriptor(self.a, [1, t.A_BOX, 128], emu.float8e4nv), emu.Descriptor(sa_box[:, :m], [1, t.BM], emu.float32),
            emu.Descriptor(self.b, [1, t.B_BOX, 128], emu.float8e4nv),
            emu.Descriptor(self.out.reshape(m, self.inter), [64, t.OUT_COLS], emu.float8e4nv),
            emu.Pointer(self.out, 0, emu.float8e4nv), emu.Pointer(self.scale), emu.Pointer(self.sb.reshape(-1)),
            emu.Pointer(np.asarray(self.index, np.int64)), m, 2 * self.inter, self.blocks, len(self.index) - 1, 1,
            self.sb.shape[1] * self.blocks, self.blocks, 1, self.inter, self.columns, CLAMP, 1.0, 0.0, t, seed=seed)

    def check(self, device, grid: int, seed: int = 0) -> None:
        self.run(device, grid, seed)
        out, scale = self.out.reshape(self.m, self.inter), self.scale.reshape(-1, self.columns)[:, :self.m].T
        sa = np.repeat(self.sa.astype(np.float64), 128, -1)
        written = np.zeros(self.m, bool)
        for g in range(len(self.index) - 1):
            rows = slice(self.index[g], self.index[g + 1])
            written[rows] = True
            sb = np.repeat(np.repeat(self.sb[g].astype(np.float64), 128, 0), 128, -1)
            h = (self.a[0, rows] * sa[rows]) @ (self.b[g] * sb).T
            y = h[:, :self.inter] / (1 + np.exp(-h[:, :self.inter])) * h[:, self.inter:]
            most = np.maximum(np.abs(y).reshape(len(y), self.inter // 128, 128).max(-1), CLAMP)
            np.testing.assert_allclose(scale[rows], most / 448, rtol=2e-2)
            np.testing.assert_allclose(out[rows] * np.repeat(scale[rows], 128, -1), y, rtol=3e-2, atol=float(np.abs(y).max(initial=0)) * 1e-2)
        assert (out[~written] == GUARD).all() and (scale[~written] == GUARD).all()


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("inter, blocks, sizes, seed", [
    (128, 1, [130], 0), (384, 4, [0, 70, 1, 290, 0, 64, 3], 0), (256, 5, [128, 1, 256, 63], 1)])
def test_groups(device, columns: int, inter: int, blocks: int, sizes: list[int], seed: int) -> None:
    Gated(sum(sizes) + 9, inter, blocks, offsets(sizes, 5), seed, CLUSTER_N=columns).check(device, 2, seed)


def test_nothing_to_do(device) -> None:
    Gated(12, 128, 2, [3, 3, 3]).check(device, 2)


def test_emulator_sees_maxima_taken_too_early(device, monkeypatch) -> None:
    """Without the wait a warpgroup may take what the other one wrote a tile or two before."""
    wait = device.cluster.wait
    case = Gated(300, 128, 2, [0, 130, 300], STAGES=3)
    met = case.tile.MET_AT
    monkeypatch.setattr(device.cluster, "wait", lambda bar, phase, pred: None if int(emu.raw(bar)) == met else wait(bar, phase, pred))
    slow = device.put_rows

    def late(at, values):
        time.sleep(0.05 if int(at.a[0]) % (4 * 128 * 2) == case.tile.MAXIMA_AT % (4 * 128 * 2) else 0)
        slow(at, values)

    monkeypatch.setattr(device, "put_rows", late)
    with pytest.raises(AssertionError):
        case.check(device, 1)


# ---------------------------------------------------------------- host part
def gated(**more) -> Problem:
    p = Problem("gated_gemm", "offsets", 4096, 3072, 4096, 16, Operand(FP8_1x128, scale_dtype="fp32", scale_major="mn"),
                Operand(FP8_128x128, scale_dtype="fp32"), rows=256, epilogue=fp8_gated.epilogue())
    return replace(p, **more)


def test_configs_are_legal() -> None:
    for groups in (1, 40, 300):
        p = gated(groups=groups)
        config, = fp8_gated.configs(p, H200)
        for extra in ((), (("cluster_n", 2),)):
            c = replace(config, extra=extra)
            t = fp8_gated.tile_of(p, c)
            assert fp8_gated.legal(p, c, H200) is None and t.shared_bytes <= H200.smem
            assert t.A_AT % 1024 == 0 and t.B_AT % 1024 == 0 and t.SA_AT % 256 == 0 and t.MET_AT + 8 <= t.MAXIMA_AT
            assert 0 < fp8_gated.estimate(p, c, H200) < 1
        assert fp8_gated.legal(p, replace(config, extra=(("colour", 1),)), H200) and fp8_gated.legal(p, replace(config, block_n=192), H200)


def test_who_takes_it() -> None:
    assert fp8_gated.supports(gated(), H200) is None
    assert fp8_gated.supports(gated(epilogue=fp8_gated.epilogue("swiglu_oai", (1.5, 3.0))), H200) is None
    for reason, more in (("rows a group", dict(rows=64)), ("SwiGLU", dict(epilogue=Epilogue())), ("multiple of 128", dict(n=2944)),
                         ("SwiGLU", dict(epilogue=replace(fp8_gated.epilogue(), interleaved=True))), ("BF16", dict(out_dtype="fp16")),
                         ("FP32 scales", dict(b=Operand(FP8_128x128, scale_dtype="e8m0"))), ("SwiGLU", dict(layout="masked"))):
        assert reason in (fp8_gated.supports(gated(**more), H200) or ""), reason
    assert dispatch.select(gated(), H200).kernel == fp8_gated.NAME and dispatch.select(gated(rows=16), H200).kernel == "reference"
