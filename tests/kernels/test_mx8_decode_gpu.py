"""On a GPU: MXFP8 x MXFP8 of few tokens on weights as a checkpoint has them; every config, any size, scales at the ends, graphs."""

from __future__ import annotations

import pytest
import torch

import narrowgemm as ng
from narrowgemm.arch import detect
from narrowgemm.kernels.gluon.sm90 import mx8_decode

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
SHAPES = ((1, 9216, 6144, "bf16"), (5, 100, 768, "fp32"), (16, 65, 256, "fp16"), (3, 7, 128, "bf16"), (17, 384, 1152, "bf16"),
          (64, 2304, 6144, "fp32"), (8, 768, 16384, "bf16"), (201, 392, 1152, "bf16"))


@pytest.fixture(autouse=True)
def _hopper():
    if detect(torch.device(DEV)).target != "sm90":
        pytest.skip("the kernel is for Hopper")
    torch.manual_seed(0)


@pytest.mark.parametrize("m, n, k, out", SHAPES, ids=str)
def test_every_config(m: int, n: int, k: int, out: str) -> None:
    check_every_config(mx8_decode, m, n, k, out)


@pytest.mark.parametrize("side", ["weights", "activations"])
@pytest.mark.parametrize("kind", ["ends", "ones", "spread", "nan", "zeros"])
@pytest.mark.parametrize("m", [1, 5, 16, 33, 150])
def test_exponent_extremes(m: int, kind: str, side: str) -> None:
    check_extremes(mx8_decode, m, kind, side)


@pytest.mark.parametrize("codes", [(7, 120), (0, 127), (120, 10), (245, 90)])
def test_products_at_the_ends_of_fp32(codes: tuple[int, int]) -> None:
    check_ends_of_fp32(mx8_decode, 9, codes)


def test_blocks_of_zeros_whose_scales_are_beyond_fp32_together() -> None:
    x, w = mx((3, 256)), mx((64, 256))
    x.data.view(torch.uint8)[:, :32] = 0
    x.scale[:, 0] = w.scale[:, 0] = 254
    check(ng.gemm(x, w, out_dtype=torch.float32, backend=mx8_decode.NAME), double(x) @ double(w).mT)


@pytest.mark.parametrize("off", [1, 2, 4, 12, 16])
def test_scales_off_16_bytes(off: int) -> None:
    check_scales_off_16_bytes(mx8_decode, 9, off)


def test_a_graph_follows_the_data() -> None:
    check_graph_follows_the_data(mx8_decode, 4)
