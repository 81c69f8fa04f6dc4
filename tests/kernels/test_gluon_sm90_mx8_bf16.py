"""The Hopper kernel for plain MXFP8 weights by BF16 wgmma: its device code, emulated on the CPU (tests/_gluon)."""

from __future__ import annotations

import numpy as np
import pytest

from narrowgemm.kernels.gluon.sm90 import mx8_bf16
from narrowgemm.problem import Config

from .. import _gluon as emu
from .gluon_sm90_mx8_jobs import problem
from .mx8_emulation import by_four, check, codes_between, factors, run, values


def expanded(w: emu.Tensor, s: emu.Tensor, operand: object) -> emu.Tensor:
    """What `expand` does with E4M3 values: NaN is 480, factors that BF16 does not hold are infinite, and K lies in the order of the
    registers."""
    code = (s.a.astype(np.int64) - 0x3C003C00) // 0x00800080
    factor = np.where(code > 134, np.inf, 2.0 ** (np.where(s.a == 0, 0, code) - 127.0))
    x = np.where(np.isnan(w.a), 480.0, w.a) * np.where(s.a == 0, 0.0, factor)
    return emu.Tensor(x.reshape(64, 4, 4, 2, 2).transpose(0, 2, 4, 1, 3).reshape(64, 64).astype(np.float32), emu.bfloat16)


@pytest.fixture(scope="module")
def device():
    module = emu.load_device_module("mx8_bf16_device")
    module.trip.__globals__["expand"] = expanded
    return module


def config(bt: int, stages: int, rows: int = 64, cluster: int = 1) -> Config:
    return Config(bt, 2 * rows, 128, 8, stages, split_k=cluster, swap_ab=True)


def row_order(x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[0], -1, 4, 8, 2, 2).transpose(0, 1, 3, 5, 2, 4).reshape(x.shape)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
# rows, N, K blocks, config, what rows of codes start on, codes of the first 64 rows' weights
@pytest.mark.parametrize("m, n, blocks, made, sw, codes", [
    (40, 128, 6, config(64, 4), 4, (120, 134)), (40, 200, 8, config(64, 4, 36), 16, (0, 254)),
    (64, 150, 5, config(64, 4, 48), 0, (100, 154)), (33, 140, 13, config(64, 5, cluster=2), 4, (120, 134)),
    (64, 100, 16, config(64, 4, cluster=2), 16, (3, 134)), (37, 110, 13, config(64, 4, 52, 4), 0, (0, 130)),
    (100, 140, 6, config(128, 3), 4, (120, 134)), (200, 150, 13, config(128, 4, 48, 2), 16, (0, 254)),
    (33, 128, 2, config(64, 4), 4, (130, 135))], ids=str)
def test_sums(device, m: int, n: int, blocks: int, made: Config, sw: int, codes: tuple[int, int]) -> None:
    """Whole tiles and clusters, more K than the ring holds, ends of every dimension, scales that BF16 does not hold, NaN of both kinds."""
    rng = np.random.default_rng(m * n)
    p = problem(m, n, blocks * 128, "fp32")
    cfg = mx8_bf16.static(p, made, sw)
    a, b = (values(rng, rows, p.k) for rows in (m, n))
    sb = codes_between(rng, n, p.k, (120, 134))
    sb[:64] = codes_between(rng, 64, p.k, codes)
    b[n - 1, 37] = np.nan
    if codes[1] > 135:
        sb[5, 3] = 255
        a *= np.float32(2.0**-60)       # so that no sum is beyond FP32
    factor = rng.choice([0.5, 1.0, 2.0], m).astype(np.float32)
    boxes = emu.Descriptor(b[None], [1, cfg.ROWS, 128], emu.float8e4nv), emu.Descriptor(row_order(a), [cfg.BT, 64], emu.bfloat16)
    got = run(device.mx8_bf16_kernel, p, made, 5, (*boxes, by_four(sb, sw)),
              (emu.Pointer(factor), m, n, blocks, mx8_bf16.chunk_of(p, made), blocks if sw else 4 * blocks), cfg)
    check(got, a * factor[:, None] @ (b * factors(sb)).T)
