"""The Hopper kernel for plain MXFP8 by FP16 wgmma: its device code, emulated on the CPU (tests/_gluon), and its host part."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from narrowgemm.arch import get_arch
from narrowgemm.kernels.gluon.sm90 import mx8_f16
from narrowgemm.kernels.gluon.sm90.mx8_f16 import Tile

from .. import _gluon as emu
from .gluon_sm90_mx8_jobs import problem
from .mx8_emulation import EDGE, GUARD, codes_between, factors, values

H200 = get_arch("h200")


def row_order(x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[0], -1, 4, 8, 2, 2).transpose(0, 1, 3, 4, 2, 5).reshape(x.shape)


def words_of(box: emu.Shared) -> tuple[emu.Tensor, emu.Tensor]:
    """Values, not words: the first and the second half of every block of 32."""
    x = box.a.reshape(64, 4, 2, 16).copy()
    return emu.Tensor(x[:, :, 0], emu.float32), emu.Tensor(x[:, :, 1], emu.float32)


def expanded(w: emu.Tensor, f: emu.Tensor) -> emu.Tensor:
    """What it does with E4M3 values, K in the order of the registers."""
    assert ((f.a & 0xFFFF) == f.a >> 16).all()
    factor = np.where(f.a == 0, 0.0, 2.0 ** ((f.a >> 26) - 15.0))
    x = (w.a * factor[..., None]).astype(np.float32).reshape(64, 4, 4, 2, 2)
    return emu.Tensor(x.transpose(0, 2, 3, 1, 4).reshape(64, 64), emu.float32)


def product(parts: tuple, operand: emu.Tensor, at: object, columns: int) -> tuple:
    memory = emu.current().memory.at(int(emu.raw(at)), columns * 64, 2).reshape(columns, 64)
    started = [emu.Pending(operand, emu.Shared(memory[i * 16: i * 16 + 16].T, emu.bfloat16), p, emu.float32) for i, p in enumerate(parts)]
    emu.local.flight.extend(started)
    return tuple(started)


@pytest.fixture(scope="module")
def device():
    module = emu.load_device_module("mx8_f16_device")
    names = module.trip.__globals__
    names["words_of"], names["expanded"], names["product"] = words_of, expanded, product
    names["settle"] = lambda parts, columns: emu.warpgroup_mma_wait(0, deps=parts)
    names["weights_of"] = lambda ring, cfg: ring.view(emu.float8e4nv, [cfg.W_AT // 8192 + cfg.STAGES * cfg.BN // 64, 64, 128])
    return module


@pytest.mark.parametrize("m, n, blocks, tile, tma, blocks_of_grid", [
    (90, 150, 6, Tile(64, 2, 3), True, 2), (130, 100, 5, Tile(80, 2, 2), False, 5), (100, 400, 9, Tile(112, 3, 2), True, 2)], ids=str)
def test_sums(device, m: int, n: int, blocks: int, tile: Tile, tma: bool, blocks_of_grid: int) -> None:
    """Several tiles a block, more K than the ring holds, no whole trips, ends of every dimension, codes far below a row's largest."""
    rng = np.random.default_rng(m)
    t = Tile(tile.BT, tile.CONSUMERS, tile.STAGES, 2, 2, 4, tma)       # of three consumers, by halves of K blocks
    assert (t.CONSUMERS == 3) == t.HALF
    k = blocks * 128
    a, b = values(rng, m, k), values(rng, n, k)
    codes = codes_between(rng, n, k, (115, 130))
    codes[3, 2] = 90
    top, xtop = codes.max(1).astype(np.int32), rng.integers(120, 130, m).astype(np.int32)
    factor = factors(codes)
    factor[3, 64:96] = 0
    pitch = -(-n // 4) * 4
    memory = np.full(m * pitch + 2 * EDGE, GUARD, np.float32)
    body = memory[EDGE:-EDGE].reshape(m, pitch)
    tiles = -(-m // t.BT) * -(-n // t.BN)
    emu.launch(device.mx8_f16_kernel, min(blocks_of_grid, tiles), emu.Descriptor(b[None], [1, t.BN, 128], emu.float8e4nv),
               emu.Descriptor(row_order(a), [t.BT, 64], emu.bfloat16), emu.Descriptor(body[:, :n], [16, 64], emu.float32), emu.Pointer(memory, EDGE),
               emu.Pointer(codes.reshape(-1).view(np.int32)), emu.Pointer(top), emu.Pointer(xtop), m, n, blocks, blocks, pitch, t, seed=m)
    want = a @ (b * factor).T * 2.0 ** (xtop[:, None] - 134.0)
    np.testing.assert_allclose(body[:, :n], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    body[:, :n] = GUARD
    assert (memory == GUARD).all()


def test_what_it_takes_and_its_configs() -> None:
    p = problem(512, 2304, 6144, "bf16")
    for m, k, words in ((128, 6144, "129 to 2048"), (2049, 6144, "129 to 2048"), (512, 96, "multiple of 128"), (512, 1 << 15, "of K at once")):
        assert words in (mx8_f16.supports(replace(p, m=m, k=k), H200) or "")
    for m in (129, 300, 512, 2048):
        for out in ("bf16", "fp16", "fp32"):
            q = problem(m, 2304, 6144, out)
            found = mx8_f16.configs(q, H200)
            assert mx8_f16.supports(q, H200) is None and found and all(mx8_f16.legal(q, c, H200) is None for c in found)
    good = mx8_f16.configs(p, H200)[0]
    for words, changes in (("tokens by consumers", {"block_m": 72}), ("tokens by consumers", {"block_n": 96}), ("warps", {"num_warps": 8}),
                           ("warps", {"split_k": 2}), ("shared memory", {"num_stages": 20})):
        assert words in (mx8_f16.legal(p, replace(good, **changes), H200) or ""), changes
