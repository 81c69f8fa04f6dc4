"""The Hopper prefill kernel on clusters, on the CPU: its device code emulated (tests/_gluon), its host part."""

from __future__ import annotations

import numpy as np
import pytest

from narrowgemm.arch import get_arch
from narrowgemm.kernels.gluon.sm90 import fp8_cluster
from narrowgemm.kernels.gluon.sm90.fp8_block_tile import LAYOUTS
from narrowgemm.kernels.gluon.sm90.fp8_cluster_tile import Tile
from narrowgemm.problem import Config
from narrowgemm.runtime import dispatch

from .. import _gluon as emu
from .test_gluon_sm90_prefill import H200, Case, offsets, problem

PARTITIONS = 5


@pytest.fixture(scope="module")
def device():
    return emu.load_device_module("fp8_cluster_device")


TILES = {
    "128x192": dict(),
    "128x192-rows": dict(CLUSTER_M=2),
    "128x192-columns": dict(CLUSTER_N=2, OUT_BUFFERS=2),
    "128x256-rows": dict(CLUSTER_M=2, WGM=1, WGN=2, MP=2, NP=1, WN=128, OUT_SPLIT=2, OUT_BUFFERS=2),
    "128x192-rows-late": dict(CLUSTER_M=2, LATE_STORE=True, OUT_BUFFERS=3),
    "128x176-columns": dict(CLUSTER_N=2, NP=11, WN=16), "128x144-columns": dict(CLUSTER_N=2, NP=9, WN=16, OUT_BUFFERS=2),
    "128x160-columns-late": dict(CLUSTER_N=2, NP=5, WN=32, LATE_STORE=True),
}


class ClusterCase(Case):
    """A case of `test_gluon_sm90_prefill`, on the other kernel. Its grid is of clusters."""

    def __init__(self, layout: str, *args, **kw) -> None:
        mine = {k: kw.pop(k) for k in list(kw) if k in Tile.__dataclass_fields__}
        super().__init__(layout, *args, **kw)
        t = self.tile
        self.tile = Tile(LAYOUTS[layout], A_SCALE_TMA=t.A_SCALE_TMA, ZERO=t.ZERO, ACCUMULATE=t.ACCUMULATE, STORE_TMA=t.STORE_TMA,
                         OUT_BYTES=t.OUT_BYTES, GROUPS=t.GROUPS, **{"STAGES": 3, **mine})

    def launch(self, device, grid: int, *args, seed: int) -> None:
        wider, tile = None, self.tile
        if tile.MIX:
            found = fp8_cluster.mixture(self.m, self.n, tile.UNIT.BM, grid)
            args = (*args[:11], found.strips, found.wide, *args[13:])
        if tile.PITCH:
            tile = tile.with_wider()
            wider = emu.Descriptor(self.b, [1, tile.WIDER.B_BOX, 128], emu.float8e4nv)
        emu.cluster.launch(device.fp8_cluster_kernel, grid, tile.CLUSTER, PARTITIONS, *args[:3], wider, *args[3:-1], tile, seed=seed)


@pytest.mark.parametrize("name", TILES)
def test_dense(device, name: str) -> None:
    ClusterCase("dense", 200, 456, 4, 1, [0], **TILES[name]).check(device, grid=1)


@pytest.mark.parametrize("m, n, rows", [(520, 520, 2), (250, 712, 1)])
def test_tiles_of_two_widths(device, m: int, n: int, rows: int) -> None:
    ClusterCase("dense", m, n, 2, 1, [0], CLUSTER_M=rows, MIX=True).check(device, grid=2)


def test_two_widths_fill_the_waves() -> None:
    """4096 x 2112 are three rounds of 192 columns on 66 clusters, the last one two thirds full: two, and one of 128, all of them full."""
    found = fp8_cluster.mixture(4096, 2112, 256, 66)
    assert found.rounds == 2 + fp8_cluster._NARROW and found.tiles == 3 * 66
    for m, n, clusters in ((300, 520, 3), (4096, 2112, 66), (8192, 2112, 66), (130, 260, 5), (1000, 2000, 7)):
        _, wide, strips, tiles = fp8_cluster.mixture(m, n, 256, clusters)
        narrow = (-(-n // 64) - 3 * wide + 1) // 2
        num_m = -(-m // 256)
        columns = {64 * (3 * (wide - d) + 2 * (narrow + d // 2 * 3)) for d in ((0, 2) if strips < num_m else (0,))}
        assert 0 < strips <= num_m and narrow >= 0 and wide >= 2 and all(n <= c < n + 192 for c in columns)
        assert tiles == num_m * (wide + narrow) + num_m - strips


@pytest.mark.parametrize("name", TILES)
def test_contiguous(device, name: str) -> None:
    ids = [2] * 128 + [0] * 100 + [-1] * 28 + [1] * 30 + [0] * 5 + [99] * 10 + [1] * 20 + [2] * 3
    ClusterCase("contiguous", len(ids), 72, 2, 3, ids, **TILES[name]).check(device, grid=2)


@pytest.mark.parametrize("layout, index", [("offsets", offsets([0, 70, 1, 290, 0, 64, 3], 5)), ("masked", [0, 300, 1, 64, 129, 0, 257]),
                                           ("psum", [100, 100, 129, 385, 400, 400, 433])])
@pytest.mark.parametrize("name", TILES)
def test_groups(device, name: str, layout: str, index: list[int]) -> None:
    m = {"offsets": 440, "masked": 300, "psum": 700}[layout]
    ClusterCase(layout, m, 72, 2, 7, index, alignment=128, **TILES[name]).check(device, grid=2)


@pytest.mark.parametrize("n, columns", [(320, 160), (384, 192)])
def test_width_is_chosen_where_sizes_are_known(device, monkeypatch, n: int, columns: int) -> None:
    """On two blocks, two tiles of 160 columns or of 192 are a round for each 128 rows; three of 160 are more than two of 192."""
    taken = set()
    start = device.start_piece
    monkeypatch.setattr(device, "start_piece", lambda slot, p, cfg, *a: taken.add(cfg.BN) or start(slot, p, cfg, *a))
    ClusterCase("offsets", 300, n, 2, 4, offsets([0, 130, 1, 140], 3), NP=5, WN=32, PITCH=192, OUT_BUFFERS=2).check(device, grid=2)
    assert taken == {columns}


INDEX = {"dense": [0], "contiguous": [0] * 90 + [1] * 60 + [-1] * 50, "offsets": [3, 90, 150], "psum": [90, 150], "masked": [190, 7]}


@pytest.mark.parametrize("layout, options", [
    *((layout, dict(accumulate=True)) for layout in INDEX), ("masked", dict(a_scale="e8m0")), ("contiguous", dict(a_scale="k")),
    ("psum", dict(store_tma=False)), ("offsets", dict(store_tma=False, CLUSTER_M=1)), ("dense", dict(out=emu.bfloat16))],
    ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_options(device, layout: str, options: dict) -> None:
    groups = 1 if layout == "dense" else 2
    ClusterCase(layout, 200, 40, 2, groups, INDEX[layout], alignment=32, **{"CLUSTER_M": 2, **options}).check(device, grid=1)


def test_emulator_sees_a_slot_released_for_one_block_only(device, monkeypatch) -> None:
    """A part of B comes from the other block: where a consumer doesn't tell it, that block overwrites or never goes on."""
    case = ClusterCase("dense", 256, 192, 9, 1, [0], CLUSTER_M=2)
    monkeypatch.setattr(emu.Block, "TIMEOUT", 2.0)
    monkeypatch.setattr(device.cluster, "arrive", lambda bar, blocks: emu.current().by_address[int(emu.raw(bar))].update(arrivals=4))
    with pytest.raises(emu.EmulationError):
        case.check(device, grid=1)


def test_rows_of_another_group_are_not_summed_twice(device) -> None:
    case = ClusterCase("offsets", 420, 72, 2, 3, offsets([130, 3, 270], 2), accumulate=True, CLUSTER_M=2)
    case.check(device, grid=2)
    assert np.isfinite(case.memory).all()


# ---------------------------------------------------------------- host part
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("out_dtype", ["bf16", "fp32"])
def test_configs_are_legal(layout: str, out_dtype: str) -> None:
    for k in (128, 384, 7168):
        p = problem(layout, 16384, k=k, groups=8, out_dtype=out_dtype)
        for c in fp8_cluster.configs(p, H200):
            t = fp8_cluster.tile_of(p, c, H200)
            assert (c.block_m, c.block_n) == (t.BM, t.BN) and t.shared_bytes <= H200.smem
            assert t.A_AT % 1024 == 0 and t.B_AT % 1024 == 0 and t.SA_AT % 256 == 0 and t.BARS_AT % 128 == 0
            assert 0 < fp8_cluster.estimate(p, c, H200) < 1


def test_illegal_configs_say_why() -> None:
    p, good = problem("contiguous", groups=4), fp8_cluster._config(128, 256, 4, cluster_n=2)
    assert fp8_cluster.legal(p, good, H200) is None
    for bad in (Config(128, 128, persistent=True), Config(128, 256, num_stages=9, persistent=True), Config(128, 256),
                fp8_cluster._config(128, 256, 4, cluster_m=2, cluster_n=2), fp8_cluster._config(128, 256, 5, cluster_n=2),
                fp8_cluster._config(128, 256, 4, cluster_n=2, colour=1)):
        assert fp8_cluster.legal(p, bad, H200), bad
    assert fp8_cluster.legal(p, fp8_cluster._config(128, 144, 6), H200) is None      # a block alone
    assert "SM" in fp8_cluster.legal(problem("contiguous", groups=4, max_sms=1), good, H200)


def test_dense_products_take_the_tiles_that_fill_waves() -> None:
    tile = lambda *a: (s := dispatch.select(problem("dense", *a), H200).steps[0]).kernel == fp8_cluster.NAME and s.config.block_n  # noqa: E731
    assert tile(4096, 2112, 7168) == tile(8192, 2112, 7168) == 192 and tile(4096, 576, 7168) == tile(8192, 576, 7168) == 144
    assert not tile(4096, 4096, 7168) and not tile(8192, 24576, 1536)     # long enough for power to decide: 256 columns


def test_clusters_are_for_large_groups() -> None:
    step = lambda *a: dispatch.select(problem(*a), get_arch("h100")).steps[0]  # noqa: E731
    chosen = lambda *a: (s := step(*a)).kernel == fp8_cluster.NAME and dict(s.config.extra)  # noqa: E731
    assert chosen("contiguous", 32768, 6144, 7168, 4) == chosen("offsets", 32768, 4096, 2048, 8) == {"cluster_n": 2}
    assert chosen("contiguous", 4096, 7168, 2048, 8) == {} and chosen("dense", 8192, 4096, 7168) is False
    assert chosen("dense", 8192, 576, 7168) == {} and chosen("dense", 4096, 32768, 512) == {"cluster_n": 2}   # by waves; by short tiles


def test_two_widths_are_for_few_rounds_of_long_tiles() -> None:
    chosen = lambda *a: dict(dispatch.select(problem(*a), H200).steps[0].config.extra).get("wider")  # noqa: E731
    assert chosen("offsets", 2078, 2048, 7168, 8) == 192
    assert chosen("offsets", 2078, 7168, 2048, 8) is chosen("offsets", 32768, 2048, 7168, 8) is None
    p = problem("contiguous", 2048, 2048, 7168, 8)
    assert "sizes" in fp8_cluster.legal(p, fp8_cluster._config(128, 160, 5, wider=192), H200)
