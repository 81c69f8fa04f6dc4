"""On a GPU: MXFP8 x MXFP8 with tokens as wgmma's rows on weights as a checkpoint has them; every config, any size, scales at the ends, graphs."""

from __future__ import annotations

import pytest
import torch

import narrowgemm as ng
from narrowgemm.arch import detect
from narrowgemm.formats import MXFP8, ScaledTensor
from narrowgemm.kernels.gluon.sm90 import mx8_rows

from ..test_mxfp8_gpu import check, double, mx
from ._mx8_gpu import (
    check_ends_of_fp32,
    check_every_config,
    check_extremes,
    check_graph_follows_the_data,
    check_scales_off_16_bytes,
)

pytestmark = pytest.mark.gpu
DEV = "cuda"
NAME = mx8_rows.NAME
SHAPES = ((64, 2304, 6144, "bf16"), (33, 100, 768, "fp32"), (40, 65, 256, "fp16"), (50, 384, 1152, "bf16"), (63, 768, 16384, "fp32"),
          (64, 9216, 640, "bf16"))


@pytest.fixture(autouse=True)
def _hopper():
    if detect(torch.device(DEV)).target != "sm90":
        pytest.skip("the kernel is for Hopper")
    torch.manual_seed(0)


@pytest.mark.parametrize("m, n, k, out", SHAPES, ids=str)
def test_every_config(m: int, n: int, k: int, out: str) -> None:
    check_every_config(mx8_rows, m, n, k, out)


@pytest.mark.parametrize("side", ["weights", "activations"])
@pytest.mark.parametrize("kind", ["ends", "ones", "spread", "nan", "zeros"])
@pytest.mark.parametrize("m", [33, 64])
def test_exponent_extremes(m: int, kind: str, side: str) -> None:
    check_extremes(mx8_rows, m, kind, side)


@pytest.mark.parametrize("codes", [(7, 120), (0, 127), (120, 10), (245, 90), (90, 245)])
def test_products_at_the_ends_of_fp32(codes: tuple[int, int]) -> None:
    check_ends_of_fp32(mx8_rows, 40, codes)


def test_blocks_of_zeros_whose_scales_are_beyond_fp32_together() -> None:
    x, w = mx((36, 256)), mx((64, 256))
    x.data.view(torch.uint8)[:, :32] = 0
    x.scale[:, 0] = w.scale[:, 0] = 254
    check(ng.gemm(x, w, out_dtype=torch.float32, backend=NAME), double(x) @ double(w).mT)


def test_wild_codes_in_one_trip_of_one_tile() -> None:
    """Each four K blocks are summed as their own scales want it."""
    x, w = mx((64, 2048)), mx((640, 2048))
    for row, block, code in ((3, 0, 250), (70, 17, 1), (639, 63, 192)):
        w.scale[row, block] = code
    x.data.view(torch.uint8)[:, :32] = 0        # what the first one is multiplied with: 2^123 is too much for anything else
    check(ng.gemm(x, w, out_dtype=torch.float32, backend=NAME), double(x) @ double(w).mT)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("m", [36, 37, 64])
def test_codes_of_tokens_in_either_order(m: int, columns: bool) -> None:
    x, w = mx((m, 1152)), mx((200, 1152))
    if columns:
        scale = torch.empty(36, -(-m // 16) * 16, dtype=torch.uint8, device=DEV).T[:m]
        x = ScaledTensor(x.data, scale.copy_(x.scale), MXFP8)
    check(ng.gemm(x, w, out_dtype=torch.float32, backend=NAME), double(x) @ double(w).mT)


@pytest.mark.parametrize("off", [1, 2, 4, 12, 16])
def test_scales_off_16_bytes(off: int) -> None:
    check_scales_off_16_bytes(mx8_rows, 39, off)


def test_a_graph_follows_the_data() -> None:
    check_graph_follows_the_data(mx8_rows, 33)
