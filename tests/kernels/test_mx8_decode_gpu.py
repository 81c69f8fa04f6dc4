"""On a GPU: MXFP8 x MXFP8 of few tokens on weights as a checkpoint has them; every config, any size, scales at the ends, graphs."""

from __future__ import annotations

import pytest
import torch

import narrowgemm as ng
from narrowgemm.arch import detect
from narrowgemm.formats import MXFP8, ScaledTensor
from narrowgemm.kernels.gluon.sm90 import mx8_decode
from narrowgemm.testing.cases import Case, build

from ..test_mxfp8_gpu import GATE, calc_diff, check, double, extremes, mx

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
    """Both gates, poison and guards, and the same bits once more."""
    inputs = build(Case("space", "dense", 1, m, n, k, a=MXFP8, b=MXFP8, out_dtype=out), DEV, seed=5)
    plan = inputs.plan(backend=mx8_decode.NAME)
    assert plan is not None
    for config in mx8_decode.configs(plan.problem, detect(torch.device(DEV))):
        inputs.verify_repeats(backend=mx8_decode.NAME, config=config)


@pytest.mark.parametrize("side", ["weights", "activations"])
@pytest.mark.parametrize("kind", ["ends", "ones", "spread", "nan", "zeros"])
@pytest.mark.parametrize("m", [1, 5, 16, 33, 150])
def test_exponent_extremes(m: int, kind: str, side: str) -> None:
    x, w = mx((max(m, 4), 384)), mx((192, 384))
    extremes(x, kind, side == "weights")
    extremes(w, kind, side != "weights")
    x = ScaledTensor(x.data[:m], x.scale[:m], MXFP8)
    for dtype in (torch.bfloat16, torch.float32):
        check(ng.gemm(x, w, out_dtype=dtype, backend=mx8_decode.NAME), double(x) @ double(w).mT)


@pytest.mark.parametrize("codes", [(7, 120), (0, 127), (120, 10), (245, 90)])
def test_products_at_the_ends_of_fp32(codes: tuple[int, int]) -> None:
    x, w = (mx((9 if i == 0 else 64, 256), (c, c + 1)) for i, c in enumerate(codes))
    got, want = ng.gemm(x, w, out_dtype=torch.float32, backend=mx8_decode.NAME), double(x) @ double(w).mT
    assert calc_diff(got.double() / want.abs().max(), want / want.abs().max()) <= 1e-6


def test_blocks_of_zeros_whose_scales_are_beyond_fp32_together() -> None:
    x, w = mx((3, 256)), mx((64, 256))
    x.data.view(torch.uint8)[:, :32] = 0
    x.scale[:, 0] = w.scale[:, 0] = 254
    check(ng.gemm(x, w, out_dtype=torch.float32, backend=mx8_decode.NAME), double(x) @ double(w).mT)


@pytest.mark.parametrize("off", [1, 2, 4, 12, 16])
def test_scales_off_16_bytes(off: int) -> None:
    x, w = mx((9, 1024)), mx((200, 1024))
    apart = torch.empty(200, 32 + off, dtype=torch.uint8, device=DEV)[:, off:]
    apart.copy_(w.scale)
    y = ng.gemm(x, ScaledTensor(w.data, apart, MXFP8), out_dtype=torch.float32, backend=mx8_decode.NAME)
    check(y, double(x) @ double(w).mT)


def test_a_graph_follows_the_data() -> None:
    x, w = mx((4, 1024)), mx((640, 1024))
    out = torch.empty(4, 640, device=DEV)

    def call() -> None:
        ng.gemm(x, w, out=out, backend=mx8_decode.NAME)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(3):
        new = mx((4, 1024))
        x.data.copy_(new.data)
        x.scale.copy_(new.scale)
        graph.replay()
        assert calc_diff(out.double(), double(x) @ double(w).mT) <= GATE[torch.float32]
