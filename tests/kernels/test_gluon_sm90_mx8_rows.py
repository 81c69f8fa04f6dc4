"""The Hopper kernel for plain MXFP8 weights with tokens as wgmma's rows: its device code, emulated on the CPU (tests/_gluon)."""

from __future__ import annotations

import numpy as np
import pytest

from narrowgemm.kernels.gluon.sm90 import mx8_rows
from narrowgemm.problem import Config

from .. import _gluon as emu
from .gluon_sm90_mx8_jobs import problem
from .mx8_emulation import by_four, check, factors, operands, run


@pytest.fixture(scope="module")
def device():
    return emu.load_device_module("mx8_rows_device")


def config(rows: int, stages: int = 8, cluster: int = 1) -> Config:
    return Config(64, rows, 128, 8, stages, split_k=cluster)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
# rows, N, K blocks, config, what rows of weights' codes start on, how tokens' codes are loaded, lowest and highest code
@pytest.mark.parametrize("m, n, blocks, made, sw, sx, codes", [
    (64, 72, 20, config(72, 8), 16, 2, (120, 134)), (40, 100, 13, config(40, 8), 4, 1, (120, 134)), (33, 150, 5, config(72, 10), 0, 0, (0, 254)),
    (60, 48, 24, config(48, 10), 16, 2, (0, 254)), (64, 24, 6, config(24, 8), 4, 0, (100, 154)),
    (64, 150, 41, config(72, 8, 2), 16, 2, (120, 134)), (50, 40, 21, config(40, 8, 4), 16, 1, (120, 134)),
    (100, 40, 9, config(24, 8), 16, 2, (120, 134)), (40, 160, 6, config(80, 8), 16, 1, (120, 134))], ids=str)
def test_sums(device, m: int, n: int, blocks: int, made: Config, sw: int, sx: int, codes: tuple[int, int]) -> None:
    """Whole tiles, K in parts, more K than the ring holds, ends of every dimension, codes at both ends and NaN."""
    p = problem(m, n, blocks * 128, "fp32")
    cfg = mx8_rows.static(p, made, sw, sx)
    a, b, sa, sb = operands(np.random.default_rng(m * n), p, codes)
    if codes == (0, 254):       # no product of scales that FP32 does not hold comes into a sum
        a[:, 128:160], sb[:, 4] = 0, 254
    sb[n // 2, 3] = 255
    sb[-1, 17] = 255            # in a trip of its own, of rows past a power of two
    sa[-1, 2] = 255
    boxes = [emu.Descriptor(x[None], [1, rows, 128], emu.float8e4nv) for x, rows in ((b, cfg.BN), (a, 64))]
    x_codes = by_four(sa if sx == 1 else np.ascontiguousarray(sa.T), sx)
    strides = ((1, m), (blocks, 1), (0, m // 4))[sx]
    got = run(device.mx8_rows_kernel, p, made, 4 + cfg.CONSUMERS, boxes,
              (by_four(sb, cfg.VEC), x_codes, m, n, blocks, mx8_rows.chunk_of(p, made), blocks if cfg.VEC else 4 * blocks, *strides), cfg)
    check(got, (a * factors(sa)) @ (b * factors(sb)).T)
