"""The Hopper kernel for plain MXFP8 weights and few tokens: its device code, emulated on the CPU (tests/_gluon), and what it takes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from narrowgemm.arch import get_arch
from narrowgemm.formats import BF16
from narrowgemm.kernels.gluon.sm90 import mx8_decode
from narrowgemm.kernels.gluon.sm90.mx8_decode import chunk_of
from narrowgemm.problem import Config, Operand, Problem

from .. import _gluon as emu
from .test_gluon_sm90_mx8_decode_compile import problem

H200 = get_arch("h200")
EDGE = 1024
GUARD = 777.0
PARTITIONS = 4      # of a block in a cluster with one consumer


@pytest.fixture(scope="module")
def device():
    return emu.load_device_module("mx8_decode_device")


def config(bt: int, stages: int = 4, cluster: int = 1, consumers: int = 1, rows: int = 64) -> Config:
    return Config(bt, rows, 128, 4 * consumers, stages, split_k=cluster, swap_ab=True)


def factors(codes: np.ndarray) -> np.ndarray:
    return np.repeat(np.where(codes == 255, np.nan, 2.0 ** (codes.astype(np.float64) - 127)), 32, -1)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
# rows, N, K blocks, config, what rows of weights' and of tokens' codes start on, lowest and highest code
@pytest.mark.parametrize("m, n, blocks, made, sw, sx, codes", [
    (1, 64, 4, config(8, 8, consumers=2), 16, 4, (120, 134)), (5, 100, 13, config(8, 5), 4, 0, (120, 134)), (20, 150, 8, config(16, rows=36), 16, 16, (0, 254)),
    (9, 70, 6, config(16, 6), 0, 0, (100, 154)), (3, 64, 21, config(8, 8, consumers=2), 4, 4, (120, 134)), (33, 64, 9, config(32, 4), 4, 4, (100, 127)), (60, 64, 5, config(32, 8, consumers=2), 4, 0, (120, 134)),
    (3, 200, 16, config(8, 4, 2, rows=48), 16, 4, (120, 134)), (17, 64, 21, config(16, 6, 2, 2), 16, 0, (100, 127))], ids=str)
def test_sums(device, m: int, n: int, blocks: int, made: Config, sw: int, sx: int, codes: tuple[int, int]) -> None:
    """Whole tiles and clusters, more K than the ring holds, ends of every dimension, codes at both ends and NaN."""
    rng = np.random.default_rng(m * n)
    p = replace(problem(m, n, blocks * 128, "fp32"), m=m)
    cfg = mx8_decode.static(p, made, sw, sx)
    a, b = (rng.integers(-4, 5, (1, rows, p.k)).astype(np.float32) / 4 for rows in (m, n))
    sa, sb = (rng.integers(codes[0], codes[1] + 1, (rows, p.k // 32)).astype(np.uint8) for rows in (m, n))
    if codes == (0, 254):
        sa = 254 - rng.integers(0, 3, sa.shape).astype(np.uint8)
        sb = rng.integers(0, 3, sb.shape).astype(np.uint8)
    if codes[1] > 127:      # no code of a weight above that: what is kept within FP32 elsewhere needs no looking at
        sb[n // 2, 3] = 255
    if m > 1:
        sa[-1, 2] = 255
    memory = np.full(m * n + 2 * EDGE, GUARD, np.float32)
    boxes = [emu.Descriptor(x, [1, rows, 128], emu.float8e4nv) for x, rows in ((b, cfg.BN), (a, cfg.BT))]
    w_codes = emu.Pointer(sb.reshape(-1).view(np.int32) if cfg.VEC else sb.reshape(-1))
    x_codes = emu.Pointer(sa.reshape(-1).view(np.int32) if cfg.FOURS else sa.T.reshape(-1))     # single ones: rows next to each other
    strides = (blocks if cfg.VEC else 4 * blocks, *((blocks, 1) if cfg.FOURS else (1, m)))
    tiles = -(-m // cfg.BT) * -(-n // cfg.BN)
    launch = partial(emu.cluster.launch, device.mx8_decode_kernel, tiles, cfg.CLUSTER, PARTITIONS + cfg.CONSUMERS - 1) if cfg.CLUSTER > 1 \
        else partial(emu.launch, device.mx8_decode_kernel, tiles)
    launch(*boxes, emu.Pointer(memory, EDGE), w_codes, x_codes, m, n, blocks, chunk_of(p, made), *strides, n, cfg, seed=m)
    assert (memory[:EDGE] == GUARD).all() and (memory[-EDGE:] == GUARD).all(), "wrote outside the output"
    got, want = memory[EDGE:-EDGE].reshape(m, n), (a[0] * factors(sa)) @ (b[0] * factors(sb)).T
    assert np.array_equal(np.isnan(got), np.isnan(want)) and np.isnan(want).any()
    np.testing.assert_allclose(np.nan_to_num(got), np.nan_to_num(want), rtol=1e-5, atol=1e-5 * np.nanmax(np.abs(want)))


def refusal(**changes: object) -> str:
    return mx8_decode.supports(replace(problem(8, 768, 768, "bf16"), **changes), H200) or ""


def test_refusals() -> None:
    p = problem(8, 768, 768, "bf16")
    assert mx8_decode.supports(p, H200) is None
    assert "sm90" in (mx8_decode.supports(p, get_arch("mi350x")) or "")
    for changes, words in (({"op": "grouped_gemm"}, "dense"), ({"a": Operand(BF16)}, "MXFP8"),
                           ({"b": replace(p.b, prepack="x/1")}, "plain operands"), ({"accumulate": True}, "accumulation"),
                           ({"b": replace(p.b, aligned=False)}, "16 bytes"), ({"b": replace(p.b, scale_major="mn")}, "row by row"),
                           ({"k": 96}, "multiple of 128"), ({"max_sms": 8}, "SMs"), ({"m": 257}, "256 tokens and fewer")):
        assert words in refusal(**changes), changes


def legal(p: Problem, **changes: object) -> str:
    return mx8_decode.legal(p, replace(config(8), **changes), H200) or ""


def test_configs_are_legal_and_others_are_told_why() -> None:
    p = problem(8, 768, 768, "bf16")
    assert legal(p) == ""
    for m in (1, 16, 32, 64, 65, 256):
        for n, k in ((9216, 6144), (64, 128), (768, 16384)):
            found = mx8_decode.configs(problem(m, n, k, "bf16"), H200)
            assert found and all(mx8_decode.legal(problem(m, n, k, "bf16"), c, H200) is None for c in found)
    assert "token columns" in legal(p, block_m=64)
    assert "blocks of a cluster" in legal(p, split_k=3)
    assert "batch-invariant" in legal(replace(p, batch_invariant=True), split_k=2)
    assert "have no" in legal(p, split_k=4)
    assert "on an SM" in legal(p, extra=(("ctas", 4), )) and "registers" in legal(p, block_m=32, num_warps=8, extra=(("ctas", 2), ))
    assert "consumers" in legal(p, num_warps=12) and "even number" in legal(p, num_warps=8, num_stages=5)
    assert "shared memory" in legal(p, num_stages=40)
