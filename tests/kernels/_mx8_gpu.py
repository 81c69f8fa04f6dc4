"""What both kernels for plain MXFP8 weights of few tokens are held to on a GPU."""

from __future__ import annotations

from types import ModuleType

import torch

import narrowgemm as ng
from narrowgemm.arch import detect
from narrowgemm.formats import MXFP8, ScaledTensor
from narrowgemm.testing.cases import Case, build

from ..test_mxfp8_gpu import DEV, GATE, calc_diff, check, double, extremes, mx


def check_every_config(kernel: ModuleType, m: int, n: int, k: int, out: str) -> None:
    """Both gates, poison and guards, and the same bits once more."""
    inputs = build(Case("space", "dense", 1, m, n, k, a=MXFP8, b=MXFP8, out_dtype=out), DEV, seed=5)
    plan = inputs.plan(backend=kernel.NAME)
    assert plan is not None
    for config in kernel.configs(plan.problem, detect(torch.device(DEV))):
        inputs.verify_repeats(backend=kernel.NAME, config=config)


def check_extremes(kernel: ModuleType, m: int, kind: str, side: str) -> None:
    x, w = mx((max(m, 4), 384)), mx((192, 384))
    extremes(x, kind, side == "weights")
    extremes(w, kind, side != "weights")
    x = ScaledTensor(x.data[:m], x.scale[:m], MXFP8)
    for dtype in (torch.bfloat16, torch.float32):
        check(ng.gemm(x, w, out_dtype=dtype, backend=kernel.NAME), double(x) @ double(w).mT)


def check_ends_of_fp32(kernel: ModuleType, m: int, codes: tuple[int, int]) -> None:
    x, w = (mx((m if i == 0 else 64, 256), (c, c + 1)) for i, c in enumerate(codes))
    got, want = ng.gemm(x, w, out_dtype=torch.float32, backend=kernel.NAME), double(x) @ double(w).mT
    assert calc_diff(got.double() / want.abs().max(), want / want.abs().max()) <= 1e-6


def check_scales_off_16_bytes(kernel: ModuleType, m: int, off: int) -> None:
    x, w = mx((m, 1024)), mx((200, 1024))
    apart = torch.empty(200, 32 + off, dtype=torch.uint8, device=DEV)[:, off:]
    apart.copy_(w.scale)
    y = ng.gemm(x, ScaledTensor(w.data, apart, MXFP8), out_dtype=torch.float32, backend=kernel.NAME)
    check(y, double(x) @ double(w).mT)


def check_graph_follows_the_data(kernel: ModuleType, m: int) -> None:
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
