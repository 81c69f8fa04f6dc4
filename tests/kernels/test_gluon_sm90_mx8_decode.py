"""The Hopper kernel for plain MXFP8 weights and few tokens: its device code, emulated on the CPU (tests/_gluon)."""

from __future__ import annotations

import numpy as np
import pytest

from narrowgemm.kernels.gluon.sm90 import mx8_decode
from narrowgemm.problem import Config

from .. import _gluon as emu
from .gluon_sm90_mx8_jobs import problem
from .mx8_emulation import by_four, check, factors, operands, run

PARTITIONS = 4      # of a block in a cluster with one consumer


@pytest.fixture(scope="module")
def device():
    return emu.load_device_module("mx8_decode_device")


def config(bt: int, stages: int = 4, cluster: int = 1, consumers: int = 1, rows: int = 64) -> Config:
    return Config(bt, rows, 128, 4 * consumers, stages, split_k=cluster, swap_ab=True)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
# rows, N, K blocks, config, what rows of weights' and of tokens' codes start on, lowest and highest code
@pytest.mark.parametrize("m, n, blocks, made, sw, sx, codes", [
    (1, 64, 4, config(8, 8, consumers=2), 16, 4, (120, 134)), (5, 100, 13, config(8, 5), 4, 0, (120, 134)), (20, 150, 8, config(16, rows=36), 16, 16, (0, 254)),
    (9, 70, 6, config(16, 6), 0, 0, (100, 154)), (3, 64, 21, config(8, 8, consumers=2), 4, 4, (120, 134)), (33, 64, 9, config(32, 4), 4, 4, (100, 127)), (60, 64, 5, config(32, 8, consumers=2), 4, 0, (120, 134)),
    (3, 200, 16, config(8, 4, 2, rows=48), 16, 4, (120, 134)), (17, 64, 21, config(16, 6, 2, 2), 16, 0, (100, 127))], ids=str)
def test_sums(device, m: int, n: int, blocks: int, made: Config, sw: int, sx: int, codes: tuple[int, int]) -> None:
    """Whole tiles and clusters, more K than the ring holds, ends of every dimension, codes at both ends and NaN."""
    p = problem(m, n, blocks * 128, "fp32")
    cfg = mx8_decode.static(p, made, sw, sx)
    a, b, sa, sb = operands(np.random.default_rng(m * n), p, codes)
    if codes[1] > 127:      # no code of a weight above that: what is kept within FP32 elsewhere needs no looking at
        sb[n // 2, 3] = 255
    if m > 1:
        sa[-1, 2] = 255
    boxes = [emu.Descriptor(x[None], [1, rows, 128], emu.float8e4nv) for x, rows in ((b, cfg.BN), (a, cfg.BT))]
    x_codes = by_four(sa if cfg.FOURS else sa.T, cfg.FOURS)     # single ones: rows next to each other
    strides = (blocks if cfg.VEC else 4 * blocks, *((blocks, 1) if cfg.FOURS else (1, m)))
    got = run(device.mx8_decode_kernel, p, made, PARTITIONS + cfg.CONSUMERS - 1, boxes,
              (by_four(sb, cfg.VEC), x_codes, m, n, blocks, mx8_decode.chunk_of(p, made), *strides), cfg)
    check(got, (a * factors(sa)) @ (b * factors(sb)).T)
