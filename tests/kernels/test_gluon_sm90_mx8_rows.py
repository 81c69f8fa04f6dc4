"""The Hopper kernel for plain MXFP8 weights with tokens as wgmma's rows: its device code, emulated on the CPU (tests/_gluon), and what it takes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from narrowgemm.arch import get_arch
from narrowgemm.formats import BF16
from narrowgemm.kernels.gluon.sm90 import mx8_rows
from narrowgemm.problem import Config, Operand, Problem

from .. import _gluon as emu
from .test_gluon_sm90_mx8_decode_compile import problem

H200 = get_arch("h200")
EDGE = 1024
GUARD = 777.0


@pytest.fixture(scope="module")
def device():
    return emu.load_device_module("mx8_rows_device")


def config(rows: int, stages: int = 8, cluster: int = 1) -> Config:
    return Config(64, rows, 128, 8, stages, split_k=cluster)


def factors(codes: np.ndarray) -> np.ndarray:
    return np.repeat(np.where(codes == 255, np.nan, 2.0 ** (codes.astype(np.float64) - 127)), 32, -1)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
# rows, N, K blocks, config, what rows of weights' codes start on, how tokens' codes are loaded, lowest and highest code
@pytest.mark.parametrize("m, n, blocks, made, sw, sx, codes", [
    (64, 72, 20, config(72, 8), 16, 2, (120, 134)), (40, 100, 13, config(40, 8), 4, 1, (120, 134)), (33, 150, 5, config(72, 10), 0, 0, (0, 254)),
    (60, 48, 24, config(48, 10), 16, 2, (0, 254)), (64, 24, 6, config(24, 8), 4, 0, (100, 154)),
    (64, 150, 41, config(72, 8, 2), 16, 2, (120, 134)), (50, 40, 21, config(40, 8, 4), 16, 1, (120, 134)),
    (100, 40, 9, config(24, 8), 16, 2, (120, 134))], ids=str)
def test_sums(device, m: int, n: int, blocks: int, made: Config, sw: int, sx: int, codes: tuple[int, int]) -> None:
    """Whole tiles, K in parts, more K than the ring holds, ends of every dimension, codes at both ends and NaN."""
    rng = np.random.default_rng(m * n)
    p = replace(problem(m, n, blocks * 128, "fp32"), m=m)
    cfg = mx8_rows.static(p, made, sw, sx)
    a, b = (rng.integers(-4, 5, (1, rows, p.k)).astype(np.float32) / 4 for rows in (m, n))
    sa, sb = (rng.integers(codes[0], codes[1] + 1, (rows, p.k // 32)).astype(np.uint8) for rows in (m, n))
    if codes == (0, 254):
        sa = 254 - rng.integers(0, 3, sa.shape).astype(np.uint8)
        sb = rng.integers(0, 3, sb.shape).astype(np.uint8)
    sb[n // 2, 3] = 255
    sa[-1, 2] = 255
    memory = np.full(m * n + 2 * EDGE, GUARD, np.float32)
    boxes = [emu.Descriptor(x, [1, rows, 128], emu.float8e4nv) for x, rows in ((b, cfg.BN), (a, 64))]
    w_codes = emu.Pointer(sb.reshape(-1).view(np.int32) if cfg.VEC else sb.reshape(-1))
    by_token = np.ascontiguousarray(sa.T).reshape(-1)
    x_codes = emu.Pointer((by_token.view(np.int32), sa.reshape(-1).view(np.int32), by_token)[2 - sx if sx != 1 else 1] if sx else by_token)
    strides = ((0, m // 4), (blocks, 1), (1, m))[2 - sx]
    tiles = -(-m // 64) * -(-n // cfg.BN)
    launch = partial(emu.cluster.launch, device.mx8_rows_kernel, tiles, cfg.CLUSTER, 4 + cfg.CONSUMERS) if cfg.CLUSTER > 1 \
        else partial(emu.launch, device.mx8_rows_kernel, tiles)
    launch(*boxes, emu.Pointer(memory, EDGE), w_codes, x_codes, m, n, blocks, mx8_rows.chunk_of(p, made), blocks if cfg.VEC else 4 * blocks,
               *strides, n, cfg, seed=m)
    assert (memory[:EDGE] == GUARD).all() and (memory[-EDGE:] == GUARD).all(), "wrote outside the output"
    got, want = memory[EDGE:-EDGE].reshape(m, n), (a[0] * factors(sa)) @ (b[0] * factors(sb)).T
    assert np.array_equal(np.isnan(got), np.isnan(want)) and np.isnan(want).any()
    np.testing.assert_allclose(np.nan_to_num(got), np.nan_to_num(want), rtol=1e-5, atol=1e-5 * np.nanmax(np.abs(want)))


def refusal(**changes: object) -> str:
    return mx8_rows.supports(replace(problem(40, 768, 768, "bf16"), **changes), H200) or ""


def test_refusals() -> None:
    p = problem(40, 768, 768, "bf16")
    assert mx8_rows.supports(p, H200) is None
    assert "sm90" in (mx8_rows.supports(p, get_arch("mi350x")) or "")
    most = mx8_rows.MOST
    for changes, words in (({"op": "grouped_gemm"}, "dense"), ({"a": Operand(BF16)}, "MXFP8"), ({"m": 32}, f"33 to {most} tokens"),
                           ({"m": most + 1}, f"33 to {most} tokens"), ({"b": replace(p.b, prepack="x/1")}, "plain operands"),
                           ({"accumulate": True}, "accumulation"), ({"b": replace(p.b, aligned=False)}, "16 bytes"),
                           ({"b": replace(p.b, scale_major="mn")}, "row by row"), ({"k": 96}, "multiple of 128"), ({"max_sms": 8}, "SMs")):
        assert words in refusal(**changes), changes


def legal(p: Problem, **changes: object) -> str:
    return mx8_rows.legal(p, replace(config(72), **{"extra": ()} | changes), H200) or ""


def test_configs_are_legal_and_others_are_told_why() -> None:
    p = problem(64, 768, 768, "bf16")
    assert legal(p) == ""
    for m in (33, 64):
        for n, k in ((9216, 6144), (64, 128), (768, 16384)):
            q = problem(m, n, k, "fp32")
            found = mx8_rows.configs(q, H200)
            assert found and all(mx8_rows.legal(q, c, H200) is None for c in found)
    assert "expected 64 tokens" in legal(p, block_m=32) and "expected 64 tokens" in legal(p, swap_ab=True) and "8 warps" in legal(p, num_warps=12)
    assert "weight rows" in legal(p, block_n=60) and "weight rows" in legal(p, block_n=96)
    assert "blocks of a cluster" in legal(p, split_k=3)
    assert "batch-invariant" in legal(replace(p, batch_invariant=True), split_k=2)
    assert "have no" in legal(p, split_k=4)
    assert "a multiple of 2 consumers" in legal(p, num_stages=9) and "4 or more" in legal(p, num_stages=2)
    assert "shared memory" in legal(p, num_stages=40)


def test_tiles_have_as_few_rows_as_all_of_them_fit_with() -> None:
    """72 rows bring 9216 onto 132 SMs at once, 48 bring 6144; 128 tokens of these are two waves of as many; no fewer than 24."""
    assert [mx8_rows.rows_of(n, m, 132) for n, m in ((9216, 1), (6144, 1), (9216, 2), (6144, 2), (768, 1))] == [72, 48, 72, 48, 24]
    assert mx8_rows.rows_of(4608, 1, 66) == 72


def test_how_codes_of_tokens_are_loaded() -> None:
    codes = torch.zeros(36, 64, dtype=torch.uint8)
    assert mx8_rows.token_codes(codes.T, 64) == 2 and mx8_rows.token_codes(codes.T[:62], 62) == 0
    assert mx8_rows.token_codes(codes, 36) == 1 and mx8_rows.token_codes(codes[:, 1:], 36) == 0
