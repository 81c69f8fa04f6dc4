"""On a GPU: MXFP8 x MXFP8 by BF16 wgmma on weights as a checkpoint has them; every config, any size, scales at the ends, graphs."""

from __future__ import annotations

import pytest
import torch

import narrowgemm as ng
from narrowgemm.arch import detect
from narrowgemm.kernels.gluon.sm90 import mx8_bf16

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
NAME = mx8_bf16.NAME
SHAPES = ((64, 2304, 6144, "bf16"), (33, 100, 768, "fp32"), (40, 65, 256, "fp16"), (50, 384, 1152, "bf16"), (63, 768, 16384, "fp32"))


@pytest.fixture(autouse=True)
def _hopper():
    if detect(torch.device(DEV)).target != "sm90":
        pytest.skip("the kernel is for Hopper")
    torch.manual_seed(0)


@pytest.mark.parametrize("m, n, k, out", SHAPES, ids=str)
def test_every_config(m: int, n: int, k: int, out: str) -> None:
    check_every_config(mx8_bf16, m, n, k, out)


@pytest.mark.parametrize("side", ["weights", "activations"])
@pytest.mark.parametrize("kind", ["ends", "ones", "spread", "nan", "zeros"])
@pytest.mark.parametrize("m", [33, 64])
def test_exponent_extremes(m: int, kind: str, side: str) -> None:
    check_extremes(mx8_bf16, m, kind, side)


@pytest.mark.parametrize("m, n, k, out", [(65, 100, 768, "fp32"), (100, 2304, 1152, "bf16"), (300, 200, 2048, "fp16"), (512, 648, 1024, "bf16")],
                         ids=str)
def test_many_tokens(m: int, n: int, k: int, out: str) -> None:
    """Tiles of 128 tokens, whole and not, one and several."""
    check_every_config(mx8_bf16, m, n, k, out)


@pytest.mark.parametrize("side", ["weights", "activations"])
@pytest.mark.parametrize("kind", ["ends", "spread", "nan"])
def test_exponent_extremes_of_many_tokens(kind: str, side: str) -> None:
    check_extremes(mx8_bf16, 130, kind, side)


@pytest.mark.parametrize("codes", [(7, 120), (0, 127), (120, 10), (245, 90), (90, 245)])
def test_products_at_the_ends_of_fp32(codes: tuple[int, int]) -> None:
    check_ends_of_fp32(mx8_bf16, 40, codes)


def test_weights_beyond_bf16_in_one_block_of_one_row() -> None:
    """Each K block is summed as its own scales want it."""
    x, w = mx((64, 2048)), mx((640, 2048))
    for row, block, code in ((3, 0, 250), (70, 17, 1), (639, 63, 140)):
        w.scale[row, block] = code
    x.data.view(torch.uint8)[:, :32] = 0        # what the first one is multiplied with: 2^123 is too much for anything else
    check(ng.gemm(x, w, out_dtype=torch.float32, backend=NAME), double(x) @ double(w).mT)


@pytest.mark.parametrize("off", [1, 2, 4, 12, 16])
def test_scales_off_16_bytes(off: int) -> None:
    check_scales_off_16_bytes(mx8_bf16, 39, off)


def test_a_graph_follows_the_data() -> None:
    check_graph_follows_the_data(mx8_bf16, 33)
