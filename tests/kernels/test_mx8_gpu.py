"""On a GPU: MXFP8 x MXFP8 of few tokens on weights as a checkpoint has them, by each kernel for them; every config, any size, scales at
the ends, graphs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import ModuleType

import pytest
import torch

import narrowgemm as ng
from narrowgemm.arch import detect
from narrowgemm.formats import MXFP8, ScaledTensor
from narrowgemm.kernels.gluon.sm90 import mx8_bf16, mx8_decode, mx8_f16, mx8_rows
from narrowgemm.testing.cases import Case, build

from ..test_mxfp8_gpu import DEV, GATE, calc_diff, check, double, extremes, mx

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]
EITHER = ((64, 2304, 6144, "bf16"), (33, 100, 768, "fp32"), (40, 65, 256, "fp16"), (50, 384, 1152, "bf16"), (63, 768, 16384, "fp32"))
SHAPES = {
    mx8_decode: ((1, 9216, 6144, "bf16"), (5, 100, 768, "fp32"), (16, 65, 256, "fp16"), (3, 7, 128, "bf16"), (17, 384, 1152, "bf16"),
                 (64, 2304, 6144, "fp32"), (8, 768, 16384, "bf16"), (201, 392, 1152, "bf16")),
    # tiles of 128 tokens, too, whole and not, one and several
    mx8_bf16: (*EITHER, (65, 100, 768, "fp32"), (100, 2304, 1152, "bf16"), (300, 200, 2048, "fp16"), (512, 648, 1024, "bf16")),
    mx8_rows: (*EITHER, (64, 9216, 640, "bf16")),
    mx8_f16: ((130, 100, 768, "fp32"), (300, 200, 2048, "fp16"), (512, 648, 1024, "bf16"), (512, 2304, 6144, "bf16"),
              (150, 96, 16384, "bf16")),
}
KINDS = ("ends", "ones", "spread", "nan", "zeros")
EXTREMES = {
    mx8_decode: [(m, kind) for m in (1, 5, 16, 33, 150) for kind in KINDS],
    mx8_bf16: [*((m, kind) for m in (33, 64) for kind in KINDS), (130, "ends"), (130, "spread"), (130, "nan")],
    mx8_rows: [(m, kind) for m in (33, 64) for kind in KINDS],
    mx8_f16: [(130, kind) for kind in KINDS],
}
CODES = [(7, 120), (0, 127), (120, 10), (245, 90)]
MOST = [*CODES, (90, 245)]


def each(table: Mapping[ModuleType, Iterable[object]]) -> list:
    """(kernel, what the table has for it), one test each."""
    return [pytest.param(kernel, x, id="-".join([kernel.NAME, *re.findall(r"\w+", str(x))])) for kernel, xs in table.items() for x in xs]


@pytest.mark.parametrize("kernel, shape", each(SHAPES))
def test_every_config(kernel: ModuleType, shape: tuple[int, int, int, str]) -> None:
    """Both gates, poison and guards, and the same bits once more."""
    m, n, k, out = shape
    inputs = build(Case("space", "dense", 1, m, n, k, a=MXFP8, b=MXFP8, out_dtype=out), DEV, seed=5)
    plan = inputs.plan(backend=kernel.NAME)
    assert plan is not None
    for config in kernel.configs(plan.problem, detect(torch.device(DEV))):
        inputs.verify_repeats(backend=kernel.NAME, config=config)


@pytest.mark.parametrize("side", ["weights", "activations"])
@pytest.mark.parametrize("kernel, of", each(EXTREMES))
def test_exponent_extremes(kernel: ModuleType, of: tuple[int, str], side: str) -> None:
    m, kind = of
    x, w = mx((max(m, 4), 384)), mx((192, 384))
    extremes(x, kind, side == "weights")
    extremes(w, kind, side != "weights")
    x = ScaledTensor(x.data[:m], x.scale[:m], MXFP8)
    for dtype in (torch.bfloat16, torch.float32):
        check(ng.gemm(x, w, out_dtype=dtype, backend=kernel.NAME), double(x) @ double(w).mT)


@pytest.mark.parametrize("kernel, of", each({mx8_decode: [(9, c) for c in CODES], mx8_bf16: [(40, c) for c in MOST],
                                             mx8_rows: [(40, c) for c in MOST],
                                             mx8_f16: [(140, c) for c in MOST]}))
def test_products_at_the_ends_of_fp32(kernel: ModuleType, of: tuple[int, tuple[int, int]]) -> None:
    m, codes = of
    x, w = (mx((m if i == 0 else 64, 256), (c, c + 1)) for i, c in enumerate(codes))
    got, want = ng.gemm(x, w, out_dtype=torch.float32, backend=kernel.NAME), double(x) @ double(w).mT
    assert calc_diff(got.double() / want.abs().max(), want / want.abs().max()) <= 1e-6


@pytest.mark.parametrize("kernel, m", each({mx8_decode: [3], mx8_rows: [36]}))
def test_blocks_of_zeros_whose_scales_are_beyond_fp32_together(kernel: ModuleType, m: int) -> None:
    x, w = mx((m, 256)), mx((64, 256))
    x.data.view(torch.uint8)[:, :32] = 0
    x.scale[:, 0] = w.scale[:, 0] = 254
    check(ng.gemm(x, w, out_dtype=torch.float32, backend=kernel.NAME), double(x) @ double(w).mT)


@pytest.mark.parametrize("kernel, last", each({mx8_bf16: [140], mx8_rows: [192], mx8_f16: [140]}))
def test_wild_codes_in_one_block_of_one_row(kernel: ModuleType, last: int) -> None:
    """Each K block, or four of them, or a row, is summed as its own scales want it."""
    x, w = mx((64 + 72 * (kernel is mx8_f16), 2048)), mx((640, 2048))
    for row, block, code in ((3, 0, 250), (70, 17, 1), (639, 63, last)):
        w.scale[row, block] = code
    x.data.view(torch.uint8)[:, :32] = 0        # what the first one is multiplied with: 2^123 is too much for anything else
    check(ng.gemm(x, w, out_dtype=torch.float32, backend=kernel.NAME), double(x) @ double(w).mT)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("m", [36, 37, 64])
def test_codes_of_tokens_in_either_order(m: int, columns: bool) -> None:
    x, w = mx((m, 1152)), mx((200, 1152))
    if columns:
        scale = torch.empty(36, -(-m // 16) * 16, dtype=torch.uint8, device=DEV).T[:m]
        x = ScaledTensor(x.data, scale.copy_(x.scale), MXFP8)
    check(ng.gemm(x, w, out_dtype=torch.float32, backend=mx8_rows.NAME), double(x) @ double(w).mT)


@pytest.mark.parametrize("off", [1, 2, 4, 12, 16])
@pytest.mark.parametrize("kernel, m", each({mx8_decode: [9], mx8_bf16: [39], mx8_rows: [39], mx8_f16: [139]}))
def test_scales_off_16_bytes(kernel: ModuleType, m: int, off: int) -> None:
    x, w = mx((m, 1024)), mx((200, 1024))
    apart = torch.empty(200, 32 + off, dtype=torch.uint8, device=DEV)[:, off:]
    apart.copy_(w.scale)
    y = ng.gemm(x, ScaledTensor(w.data, apart, MXFP8), out_dtype=torch.float32, backend=kernel.NAME)
    check(y, double(x) @ double(w).mT)


@pytest.mark.parametrize("kernel, m", each({mx8_decode: [4], mx8_bf16: [33], mx8_rows: [33], mx8_f16: [130]}))
def test_a_graph_follows_the_data(kernel: ModuleType, m: int) -> None:
    x, w = mx((m, 1024)), mx((640, 1024))
    out = torch.empty(m, 640, device=DEV)

    def call() -> None:
        ng.gemm(x, w, out=out, backend=kernel.NAME)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(3):
        new = mx((m, 1024))
        x.data.copy_(new.data)
        x.scale.copy_(new.scale)
        graph.replay()
        assert calc_diff(out.double(), double(x) @ double(w).mT) <= GATE[torch.float32]


def test_rows_that_fp16_does_not_hold() -> None:
    """Of either side, beside such as it just holds, and blocks of zeros far below."""
    x, w = mx((200, 1152)), mx((300, 1152))
    for q, row in ((x, 5), (w, 7)):
        q.scale[row, 3], q.scale[row + 1, 3], q.scale[row + 2, 3] = 128 - 21, 128 - 22, 60
        q.scale[row: row + 3, 4] = 128
        q.data.view(torch.uint8)[row + 2, 96: 128] = 0
    w.data.view(torch.uint8)[:200, :96] = 0
    w.data.view(torch.uint8)[:200, 128:] = 0        # so that the small block is all there is
    for dtype in (torch.bfloat16, torch.float32):
        check(ng.gemm(x, w, out_dtype=dtype, backend=mx8_f16.NAME), double(x) @ double(w).mT)
