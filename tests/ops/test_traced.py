"""Products with packed weights and `routed_gemm` under torch.compile: opcheck, and one graph for every token count."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import narrowgemm as ng
from narrowgemm.ops import traced

E, N, K, TOP_K = 4, 64, 96, 2


def weights(pair: str = "") -> ng.PackedWeight:
    torch.manual_seed(0)
    return ng.prepack(ng.quantize(torch.randn(E, N, K), "mxfp4"), pair=pair)


def test_opcheck() -> None:
    b, x = weights(), torch.randn(6, K).bfloat16()
    offsets = torch.tensor([0, 2, 2, 5, 6])
    parts, tail = traced.parts(b), ("reference", 0, "portable")
    out = torch.empty(6, N, dtype=torch.bfloat16)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.narrowgemm.packed_gemm.default,
                          (x, None, "bf16", *parts, offsets, "offsets", 0, 1, out, False, True, *tail), test_utils=tests)
    routing = ng.sort_by_expert(torch.randint(0, E, (3, TOP_K)), E)
    torch.library.opcheck(torch.ops.narrowgemm.routed_gemm.default,
                          (x, None, "bf16", *parts, routing.offsets, None, None, 0, 0, routing.row_map, TOP_K, 1,
                           torch.randn(E, N), "", 0.0, 0.0, False, torch.rand(3, TOP_K), True, torch.randn(3, N),
                           torch.empty(3, N, dtype=torch.bfloat16), False, *tail), test_utils=tests)


@pytest.mark.parametrize("kind", ["contiguous", "psum"])
def test_layouts_with_padding_reach_the_op(kind: str) -> None:
    """What an op of torch is handed makes the same call: which rows are padding, and whether they are written."""
    b, x = weights(), torch.randn(6, K).bfloat16()
    ids = torch.tensor([0, 0, -1, 3, 1, -1], dtype=torch.int32)
    layout = ng.Contiguous(ids) if kind == "contiguous" else ng.Psum(torch.tensor([1, 3, 5, 6], dtype=torch.int32), 2)
    for zero in (True, False):
        got, want = (torch.full((6, N), 3.0, dtype=torch.bfloat16) for _ in range(2))
        torch.ops.narrowgemm.packed_gemm(x, None, "bf16", *traced.parts(b), layout.index, kind, 0, 2, got, False, zero, "reference", 0,
                                         "portable")
        ng.grouped_gemm(x, b, layout, out=want, zero_padding=zero)
        assert torch.equal(got, want) and bool((want == 3).all(1).any()) != zero


@pytest.mark.parametrize("layout", ["dense", "offsets", "masked", "routed",
                                    pytest.param("blocks", marks=pytest.mark.slow)])
def test_one_graph_for_every_token_count(layout: str) -> None:
    b = weights("halves" if layout == "routed" else "")
    first = ng.PackedWeight(b.data[:1], b.scale[:1], b.format, b.shape[1:], b.pair)

    def f(x: torch.Tensor, ids: torch.Tensor, topk: torch.Tensor) -> torch.Tensor:
        if layout == "dense":
            return ng.gemm(x, first)
        if layout == "masked":
            return ng.grouped_gemm(x.expand(E, *x.shape), b, ng.Masked(torch.full((E,), x.shape[0], dtype=torch.int32)))
        if layout == "blocks":
            return ng.routed_gemm(x, b, ng.moe_align_block_size(ids, 4, E), zero_padding=True)
        routing = ng.sort_by_expert(ids, E)
        if layout == "offsets":
            return ng.grouped_gemm(ng.gather(x, routing), b, routing.layout)
        return ng.routed_gemm(x, b, routing.layout, row_map=routing.row_map, top_k=TOP_K, a_div=TOP_K, activation="swiglu",
                              routing_weight=topk, combine=True, out_dtype=torch.float32)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for tokens in (5, 9, 12):
        call = torch.randn(tokens, K).bfloat16(), torch.randint(0, E, (tokens, TOP_K), dtype=torch.int32), torch.rand(tokens, TOP_K)
        assert torch.equal(compiled(*call), f(*call))
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1], f"compiled anew for another token count: {frames}"


def test_weights_that_prepack_left_as_they_are() -> None:
    w, x = ng.prepack(ng.quantize(torch.randn(N, 128), "mxfp8"), activations="mxfp8"), torch.randn(5, 128).bfloat16()
    torch._dynamo.reset()
    assert torch.equal(torch.compile(lambda x: ng.gemm(x, w), fullgraph=True, backend="aot_eager")(x), ng.gemm(x, w))
