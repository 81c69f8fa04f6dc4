"""Hopper's dense BF16 product on clusters, on the CPU: its device code emulated (tests/_gluon), its host part."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from narrowgemm.arch import get_arch
from narrowgemm.kernels.gluon.sm90 import bf16_cluster, expand
from narrowgemm.kernels.gluon.sm90.bf16_cluster_tile import Tile
from narrowgemm.kernels.gluon.sm90.fp8_block_tile import LAYOUTS

from .. import _gluon as emu
from .test_gluon_sm90_expand_host import H100, problem
from .test_gluon_sm90_scaled import GUARD, MARK, guarded, random

PARTITIONS = 5


@pytest.fixture(scope="module")
def device():
    return emu.load_device_module("bf16_cluster_device")


SHIFTED = 0x5D1F7ED1


def run(device, m: int, n: int, k: int, *, grid: int = 2, out: emu.DType = emu.float32, factors: bool = True, flag: int = SHIFTED,
        **tile) -> None:
    rng = np.random.default_rng(k)
    a, b = random(rng, 1, m, k), random(rng, 1, n, k)
    sa, sb = (rng.uniform(0.5, 2, x).astype(np.float32) for x in (m, n))
    memory = guarded(m * n)
    body = memory[GUARD:-GUARD]
    t = Tile(LAYOUTS["dense"], OUT_BYTES=out.size, B_FACTORS=factors, **{"STAGES": 3, "OUT_BUFFERS": 2, **tile})
    box = lambda x, r: emu.Descriptor(x, [1, r, 64], emu.bfloat16)  # noqa: E731
    emu.cluster.launch(
        device.bf16_cluster_kernel, grid, t.CLUSTER, PARTITIONS, box(a, t.A_BOX), box(b, t.B_BOX), box(b, t.B_BOX // 2),
        emu.Descriptor(body.reshape(m, n), [64, t.OUT_COLS], out), emu.Pointer(memory, GUARD, out), emu.Pointer(sa), emu.Pointer(sb),
        emu.Pointer(np.array([flag], np.int32)), m, n, -(-k // 64), n, t, seed=m)
    assert (memory[:GUARD] == MARK).all() and (memory[-GUARD:] == MARK).all(), "wrote outside the output"
    scaled = flag == SHIFTED or not t.FLAG
    x = a[0].astype(np.float64) * (sa[:, None] if scaled else 1)
    y = b[0].astype(np.float64) * (sb[:, None] if scaled and factors else 1)
    tolerance = 1e-5 if out is emu.float32 else 1e-2
    np.testing.assert_allclose(body.reshape(m, n), x @ y.T, rtol=tolerance, atol=tolerance * 30)


TILES = {"one": dict(CLUSTER_M=1), "two": dict(CLUSTER_M=2)}


@pytest.mark.parametrize("name", TILES)
def test_product(device, name: str) -> None:
    """Tiles that end past the output in both directions, K in more blocks than the ring holds, the last one cut short."""
    run(device, 600, 584, 336, **TILES[name])


@pytest.mark.parametrize("options", [dict(out=emu.bfloat16), dict(factors=False), dict(FLAG=True), dict(FLAG=True, flag=0)], ids=lambda o: "-".join(o))
def test_options(device, options: dict) -> None:
    run(device, 300, 264, 192, CLUSTER_M=2, grid=1, **options)


def test_emulator_sees_a_slot_released_for_one_block_only(device, monkeypatch) -> None:
    """A part of B comes from the other block: where a consumer doesn't tell it, that block overwrites or never goes on."""
    monkeypatch.setattr(emu.Block, "TIMEOUT", 2.0)
    monkeypatch.setattr(device.cluster, "arrive", lambda bar, blocks: emu.raw(bar) < 0 or emu.current().by_address[int(emu.raw(bar))].update(
        arrivals=4))
    with pytest.raises(emu.EmulationError):
        run(device, 256, 256, 640, CLUSTER_M=2, grid=1)


# ---------------------------------------------------------------- host part
def test_tiles_beyond_full_rounds() -> None:
    """Of pairs on 132 SMs: 24 of 288 tiles are cut, 42 of 768 are a round of their own, 30 of 1152 are cut."""
    of = lambda m, n: bf16_cluster.left(problem(m, n, 6144), expand.PAIRS, H100)  # noqa: E731
    assert (of(2048, 9216), of(8192, 6144), of(8192, 9216), of(256, 256 * 66)) == ((4, 24), (12, 0), (17, 30), (1, 0))
    assert bf16_cluster.left(problem(2048, 9216, 6144, max_sms=8), expand.PAIRS, H100) == (72, 0)


@pytest.mark.parametrize("name", ["h100", "h200"])
def test_pairs_are_offered_where_tiles_are_cut_and_chosen_where_they_were_ahead(name: str) -> None:
    arch = get_arch(name)
    best = lambda *shape: min(expand.configs(p := problem(*shape), arch), key=lambda c: expand.estimate(p, c, arch))  # noqa: E731
    assert best(8192, 9216, 6144) == expand.PAIRS
    assert best(2048, 9216, 6144) == best(8192, 2304, 6144) == best(2048, 2304, 6144) == expand.CUBLAS
    assert expand.PAIRS not in expand.configs(problem(8192, 6144, 8192), arch)


@pytest.mark.parametrize("change, reason", [
    ({"layout": "offsets", "op": "grouped_gemm"}, "dense"), ({"max_sms": 1}, "SMs"), ({"accumulate": True}, "accumulation"),
    ({"out_aligned": False}, "16 bytes")])
def test_what_pairs_do_not_take(change: dict, reason: str) -> None:
    p = problem(2048, 2304, 6144)
    assert expand.legal(p, expand.PAIRS, H100) is None and expand.legal(replace(p, out_dtype="fp32"), expand.PAIRS, H100) is None
    assert reason in (expand.legal(replace(p, **change), expand.PAIRS, H100) or "")
    assert "clusters" in (expand.legal(p, replace(expand.PAIRS, extra=(("cluster_m", 3),)), H100) or "")
    assert "shared memory" in (expand.legal(p, replace(expand.PAIRS, num_stages=5), H100) or "")
    t = bf16_cluster.tile_of(p, expand.PAIRS, H100, True)
    assert t and t.A_AT % 1024 == t.B_AT % 1024 == t.BARS_AT % 128 == 0 and t.OUT_BUFFERS <= t.NP // 2
