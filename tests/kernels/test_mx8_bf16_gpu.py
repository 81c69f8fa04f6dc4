"""On a GPU: MXFP8 x MXFP8 by BF16 wgmma on weights as a checkpoint has them; every config, any size, scales at the ends, graphs."""

from __future__ import annotations

import pytest
import torch

import narrowgemm as ng
from narrowgemm.arch import detect
from narrowgemm.formats import MXFP8, ScaledTensor
from narrowgemm.kernels.gluon.sm90 import mx8_bf16
from narrowgemm.testing.cases import Case, build

from ..test_mxfp8_gpu import GATE, calc_diff, check, double, extremes, mx

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
    """Both gates, poison and guards, and the same bits once more."""
    inputs = build(Case("space", "dense", 1, m, n, k, a=MXFP8, b=MXFP8, out_dtype=out), DEV, seed=5)
    plan = inputs.plan(backend=NAME)
    assert plan is not None
    for config in mx8_bf16.configs(plan.problem, detect(torch.device(DEV))):
        inputs.verify_repeats(backend=NAME, config=config)


@pytest.mark.parametrize("side", ["weights", "activations"])
@pytest.mark.parametrize("kind", ["ends", "ones", "spread", "nan", "zeros"])
@pytest.mark.parametrize("m", [33, 64])
def test_exponent_extremes(m: int, kind: str, side: str) -> None:
    x, w = mx((m, 384)), mx((192, 384))
    extremes(x, kind, side == "weights")
    extremes(w, kind, side != "weights")
    for dtype in (torch.bfloat16, torch.float32):
        check(ng.gemm(x, w, out_dtype=dtype, backend=NAME), double(x) @ double(w).mT)


@pytest.mark.parametrize("codes", [(7, 120), (0, 127), (120, 10), (245, 90), (90, 245)])
def test_products_at_the_ends_of_fp32(codes: tuple[int, int]) -> None:
    x, w = (mx((40 if i == 0 else 64, 256), (c, c + 1)) for i, c in enumerate(codes))
    got, want = ng.gemm(x, w, out_dtype=torch.float32, backend=NAME), double(x) @ double(w).mT
    assert calc_diff(got.double() / want.abs().max(), want / want.abs().max()) <= 1e-6


def test_weights_beyond_bf16_in_one_block_of_one_row() -> None:
    """Each K block is summed as its own scales want it."""
    x, w = mx((64, 2048)), mx((640, 2048))
    for row, block, code in ((3, 0, 250), (70, 17, 1), (639, 63, 140)):
        w.scale[row, block] = code
    x.data.view(torch.uint8)[:, :32] = 0        # what the first one is multiplied with: 2^123 is too much for anything else
    check(ng.gemm(x, w, out_dtype=torch.float32, backend=NAME), double(x) @ double(w).mT)


@pytest.mark.parametrize("off", [1, 2, 4, 12, 16])
def test_scales_off_16_bytes(off: int) -> None:
    x, w = mx((39, 1024)), mx((200, 1024))
    apart = torch.empty(200, 32 + off, dtype=torch.uint8, device=DEV)[:, off:]
    apart.copy_(w.scale)
    y = ng.gemm(x, ScaledTensor(w.data, apart, MXFP8), out_dtype=torch.float32, backend=NAME)
    check(y, double(x) @ double(w).mT)


def test_a_graph_follows_the_data() -> None:
    x, w = mx((33, 1024)), mx((640, 1024))
    out = torch.empty(33, 640, device=DEV)

    def call() -> None:
        ng.gemm(x, w, out=out, backend=NAME)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(3):
        new = mx((33, 1024))
        x.data.copy_(new.data)
        x.scale.copy_(new.scale)
        graph.replay()
        assert calc_diff(out.double(), double(x) @ double(w).mT) <= GATE[torch.float32]
