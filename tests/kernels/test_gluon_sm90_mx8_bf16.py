"""The Hopper kernel for plain MXFP8 weights by BF16 wgmma: its device code, emulated on the CPU (tests/_gluon.py), and what it takes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from narrowgemm.arch import get_arch
from narrowgemm.formats import BF16
from narrowgemm.kernels.gluon.sm90 import mx8_bf16
from narrowgemm.problem import Config, Operand, Problem

from .. import _gluon as emu
from .test_gluon_sm90_mx8_decode_compile import problem

H200 = get_arch("h200")
EDGE = 1024
GUARD = 777.0


def expanded(w: emu.Tensor, s: emu.Tensor, operand: object) -> emu.Tensor:
    """What `expand` does with E4M3 values: NaN is 480, and K lies in the order of the registers."""
    code = (s.a.astype(np.int64) - 0x3C003C00) // 0x00800080
    x = np.where(np.isnan(w.a), 480.0, w.a) * np.where(s.a == 0, 0.0, 2.0 ** (np.where(s.a == 0, 0, code) - 127.0))
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
    (100, 140, 6, config(128, 3), 4, (120, 134)), (200, 150, 13, config(128, 4, 48, 2), 16, (0, 254))], ids=str)
def test_sums(device, m: int, n: int, blocks: int, made: Config, sw: int, codes: tuple[int, int]) -> None:
    """Whole tiles and clusters, more K than the ring holds, ends of every dimension, scales that BF16 does not hold, NaN of both kinds."""
    rng = np.random.default_rng(m * n)
    p = replace(problem(m, n, blocks * 128, "fp32"), m=m)
    cfg = mx8_bf16.static(p, made, sw)
    a, b = (rng.integers(-4, 5, (rows, p.k)).astype(np.float32) / 4 for rows in (m, n))
    sb = rng.integers(120, 135, (n, p.k // 32)).astype(np.uint8)
    sb[:64] = rng.integers(codes[0], codes[1] + 1, (64, p.k // 32))
    b[n - 1, 37] = np.nan
    if codes[1] > 134:
        sb[5, 3] = 255
        a *= np.float32(2.0**-60)       # so that no sum is beyond FP32
    factor = rng.choice([0.5, 1.0, 2.0], m).astype(np.float32)
    memory = np.full(m * n + 2 * EDGE, GUARD, np.float32)
    boxes = emu.Descriptor(b[None], [1, cfg.ROWS, 128], emu.float8e4nv), emu.Descriptor(row_order(a), [cfg.BT, 64], emu.bfloat16)
    codes_of = emu.Pointer(sb.reshape(-1).view(np.int32) if sw else sb.reshape(-1))
    tiles = mx8_bf16.tiles_of(p, made)
    launch = partial(emu.cluster.launch, device.mx8_bf16_kernel, tiles, cfg.CLUSTER, 5) if cfg.CLUSTER > 1 \
        else partial(emu.launch, device.mx8_bf16_kernel, tiles)
    launch(*boxes, codes_of, emu.Pointer(memory, EDGE), emu.Pointer(factor), m, n, blocks, mx8_bf16.chunk_of(p, made),
           blocks if sw else 4 * blocks, n, cfg, seed=m)
    assert (memory[:EDGE] == GUARD).all() and (memory[-EDGE:] == GUARD).all(), "wrote outside the output"
    scale = np.where(sb == 255, np.nan, 2.0 ** (sb.astype(np.float64) - 127)).repeat(32, -1)
    got, want = memory[EDGE:-EDGE].reshape(m, n), a * factor[:, None] @ (b * scale).T
    assert np.array_equal(np.isnan(got), np.isnan(want)) and np.isnan(want).any()
    got, want = np.nan_to_num(got.astype(np.float64)), np.nan_to_num(want)
    top = np.abs(want).max(0) + 1e-300
    np.testing.assert_allclose(got / top, want / top, rtol=1e-5, atol=1e-5)


def refusal(**changes: object) -> str:
    return mx8_bf16.supports(replace(problem(40, 768, 768, "bf16"), **changes), H200) or ""


def test_refusals() -> None:
    p = problem(40, 768, 768, "bf16")
    assert mx8_bf16.supports(p, H200) is None
    assert "sm90" in (mx8_bf16.supports(p, get_arch("mi350x")) or "")
    for changes, words in (({"op": "grouped_gemm"}, "dense"), ({"a": Operand(BF16)}, "MXFP8"), ({"m": 32}, "33 to 512 tokens"), ({"m": 513}, "33 to 512 tokens"),
                           ({"b": replace(p.b, prepack="x/1")}, "plain operands"), ({"accumulate": True}, "accumulation"),
                           ({"b": replace(p.b, aligned=False)}, "16 bytes"), ({"b": replace(p.b, scale_major="mn")}, "row by row"),
                           ({"k": 96}, "multiple of 128"), ({"max_sms": 8}, "SMs")):
        assert words in refusal(**changes), changes


def legal(p: Problem, **changes: object) -> str:
    return mx8_bf16.legal(p, replace(config(64, 4), **changes), H200) or ""


def test_configs_are_legal_and_others_are_told_why() -> None:
    p = problem(64, 768, 768, "bf16")
    assert legal(p) == ""
    for m in (33, 64, 65, 300, 512):
        for n, k in ((9216, 6144), (64, 128), (768, 16384)):
            q = problem(m, n, k, "fp32" if m <= 64 else "bf16")
            found = mx8_bf16.configs(q, H200)
            assert found and all(mx8_bf16.legal(q, c, H200) is None for c in found)
    assert "token columns" in legal(p, block_m=16) and "token columns" in legal(p, num_warps=4)
    assert "weight rows" in legal(p, block_n=56) and "weight rows" in legal(p, block_n=132)
    assert "blocks of a cluster" in legal(p, split_k=3)
    assert "batch-invariant" in legal(replace(p, batch_invariant=True), split_k=2)
    assert "have no" in legal(p, split_k=4)
    assert "shared memory" in legal(p, num_stages=40) and "shared memory" in legal(p, num_stages=3)


def test_tiles_have_as_few_rows_as_all_of_them_fit_with() -> None:
    """6144 rows on 66 clusters: two consumers of 48; on as many SMs as there are, 36 for 9216."""
    assert mx8_bf16.rows_of(6144, 66) == 48 and mx8_bf16.rows_of(9216, 132) == 36
    assert mx8_bf16.rows_of(768, 132) == 32 and mx8_bf16.rows_of(9216, 66) == 36       # no fewer; two waves
    assert mx8_bf16.rows_of(1 << 20, 132) == 64
    assert [c.split_k for c in mx8_bf16.configs(problem(64, 9216, 6144, "bf16"), H200)] == [1]
    assert [c.split_k for c in mx8_bf16.configs(problem(64, 6144, 6144, "bf16"), H200)] == [1, 2]
