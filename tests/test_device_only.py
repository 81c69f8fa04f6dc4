"""Routing and layout conversion read nothing back: as fake tensors, compiled to one graph, and captured on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from narrowgemm import FP8_1x128, ScaledTensor
from narrowgemm.layout_convert import (
    contiguous_from_psum,
    from_masked,
    group_lens,
    k_grouped_from_group_lens,
    masked_from_offsets,
    offsets_from_contiguous,
    offsets_from_group_lens,
    offsets_from_masked,
    offsets_from_psum,
    offsets_from_routed,
    pad_to_contiguous,
    psum_from_offsets,
    to_masked,
    unpad_from_contiguous,
)
from narrowgemm.moe_sorting import moe_sorting_from_routed, routed_from_moe_sorting
from narrowgemm.ops.route import combine, gather, moe_align_block_size, route, sort_by_expert
from narrowgemm.rows import invert_row_map

from ._graphs import unsynchronised

EXPERTS, TOP_K, MAX_M = 16, 4, 24


def everything(x, logits, bias, expert_map):
    """Every function of routing and conversion, as one step of a model: what comes out, tensors only."""
    weights, ids = route(logits, TOP_K, scoring="sigmoid", bias=bias, num_expert_group=4, topk_group=2)
    routing = sort_by_expert(ids, EXPERTS - 4, expert_map=expert_map)
    rows, slots, layout = gather(x, routing), ids.numel(), routing.layout
    padded, contiguous = pad_to_contiguous(rows, layout, 16)
    psum, _ = psum_from_offsets(layout, 2 * slots, alignment=16)
    masked_rows, masked = to_masked(rows, layout, MAX_M)
    routed = moe_align_block_size(ids, 16, EXPERTS, a_div=1)
    packed = moe_sorting_from_routed(routed, weights, EXPERTS)
    back, back_weights = routed_from_moe_sorting(packed)
    quantised = gather(ScaledTensor(x.to(torch.float8_e4m3fn), x[:, :1].float(), FP8_1x128), routing)
    results = [
        weights, ids, routing.row_map, routing.offsets, routing.inverse, padded, contiguous.m_indices, psum.ends,
        masked_rows, masked.masked_m, packed.sorted_ids, packed.sorted_weights, packed.num_valid_ids, back_weights,
        back.sorted_token_ids, quantised.data.float(), quantised.scale,
        unpad_from_contiguous(padded, layout, slots, 16), from_masked(masked_rows, layout, slots),
        contiguous_from_psum(psum, 2 * slots).m_indices, invert_row_map(routing.row_map, slots),
        group_lens(contiguous, EXPERTS - 4), group_lens(routed, EXPERTS),
        group_lens(k_grouped_from_group_lens(psum.ends)),
        offsets_from_group_lens(masked.masked_m).offsets, masked_from_offsets(layout, MAX_M).row_map,
        combine(rows, routing, weights),
    ]
    for converted in (offsets_from_contiguous(contiguous, EXPERTS - 4), offsets_from_psum(psum, slots),
                      offsets_from_masked(masked, MAX_M, slots), offsets_from_routed(routed, EXPERTS)):
        results += [converted.layout.offsets, converted.row_map]
    return results


def inputs(tokens, device="cpu", seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 128, generator=gen).bfloat16()
    logits = torch.randn(tokens, EXPERTS, generator=gen)
    bias = torch.randn(EXPERTS, generator=gen) / 10
    expert_map = (torch.randperm(EXPERTS, generator=gen) - 2).to(torch.int32)
    return [t.to(device) for t in (x, logits, bias, expert_map)]


def same(got, want):
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want)):
        assert a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu()), f"result {i}"


@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_fake_tensors(tokens):
    """A fake tensor has no values: .item(), nonzero, boolean indexing and the like raise."""
    with FakeTensorMode():
        args = [torch.empty(tokens, 128, dtype=torch.bfloat16), torch.empty(tokens, EXPERTS), torch.empty(EXPERTS),
                torch.empty(EXPERTS, dtype=torch.int32)]
        fake = everything(*args)
        with pytest.raises(DataDependentOutputException):
            masked_from_offsets(offsets_from_group_lens(torch.empty(3, dtype=torch.int64)), 4, validate="sync")
    for a, b in zip(fake, everything(*inputs(tokens)), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()


def test_compiles_to_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (40, 17, 33):
        args = inputs(tokens, seed=tokens)
        same(compiled(*args), everything(*args))


@pytest.mark.slow
def test_compiles_with_inductor():
    torch._dynamo.reset()
    args = inputs(40)
    got = torch.compile(everything, fullgraph=True)(*args)
    for a, b in zip(got, everything(*args), strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=2e-2, atol=1e-5)


@pytest.mark.gpu
def test_no_synchronisation():
    args = inputs(512, "cuda")
    everything(*args)
    with unsynchronised():
        got = everything(*args)
    same(got, everything(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 40, 4096])
def test_gpu_agrees_with_cpu(tokens):
    """Indices bit for bit, for the GPU's own choice of experts; weights and sums to rounding."""
    args = inputs(tokens, seed=tokens)
    on_gpu = everything(*(a.cuda() for a in args))
    on_cpu = everything(*args)
    flips = (on_gpu[1].cpu() != on_cpu[1]).any()  # two scores a last bit apart may change places between devices
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if not flips:
            assert torch.allclose(a.cpu().float(), b.float(), rtol=1e-2, atol=1e-5)
    routing = sort_by_expert(on_gpu[1].cpu(), EXPERTS - 4, expert_map=args[3])
    same(on_gpu[2:5], [routing.row_map, routing.offsets, routing.inverse])


@pytest.mark.gpu
def test_captured_and_replayed_with_changed_routing():
    static = inputs(256, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        everything(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = everything(*static)
    for seed in range(1, 5):
        fresh = inputs(256, "cuda", seed)
        if seed == 4:
            fresh[1].zero_()  # every token to the same experts
        for old, new in zip(static, fresh):
            old.copy_(new)
        graph.replay()
        same(got, everything(*fresh))
