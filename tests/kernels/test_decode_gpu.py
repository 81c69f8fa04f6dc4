"""The Hopper decode kernel on a GPU: split K with whatever is in its workspace, and weights fetched by 256 bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from narrowgemm.arch import detect
from narrowgemm.kernels import binding
from narrowgemm.kernels.gluon.sm90 import fp8_decode
from narrowgemm.kernels.gluon.sm90.fp8_decode import NAME
from narrowgemm.kernels.gluon.sm90.fp8_decode_tile import TOKENS
from narrowgemm.kernels.gluon.sm90.occupancy import CLUSTERS
from narrowgemm.problem import Config
from narrowgemm.testing.cases import Case, build

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("m, n", [(1, 576), (64, 576), (128, 576)])
def test_split_k_takes_a_workspace_as_it_is(m: int, n: int) -> None:
    """Nobody clears the counters, and each launch leaves them as if never used."""
    x = build(Case("split", "dense", 1, m, n, 7168), "cuda")
    plan = x.plan(backend=NAME)
    config = next(c for c in fp8_decode.configs(plan.problem, detect(torch.device("cuda"))) if fp8_decode.in_workspace(c))
    plan = x.plan(backend=NAME, config=config)
    work = torch.zeros(plan.workspace_bytes, dtype=torch.uint8, device="cuda")
    x.call(backend=NAME, config=config, workspace=work)
    assert x.check().ok
    first = x.out.tensor.clone()
    for i in range(60):
        if i % 3 < 2:
            work.random_(0, 256) if i % 3 else work.fill_(255)
        x.reset_out()
        x.call(backend=NAME, config=config, workspace=work)
        assert torch.equal(first.view(torch.int16), x.out.tensor.view(torch.int16)), i
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.call(backend=NAME, config=config, workspace=work)
    for i in range(40):
        if i % 2:
            work.random_(0, 256)
        x.reset_out()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(first.view(torch.int16), x.out.tensor.view(torch.int16)), i


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_cluster_adds_up_a_tile(cluster: int, tokens: int) -> None:
    """Both gates, guards, the same bits again and in a graph; of three problems in turn."""
    m, n, blocks, out_dtype = ((128, 576, 56, "bf16"), (5, 72, 9, "fp32"), (150, 200, 17, "fp16"))[(cluster + TOKENS.index(tokens)) % 3]
    x = build(Case("cluster", "dense", 1, m, n, blocks * 128, out_dtype=out_dtype), "cuda")
    config = Config(tokens, 64, 128, 4, 6, swap_ab=True, persistent=True, split_k=cluster, extra=(("cluster", cluster), ("guess", 4)))
    x.verify(backend=NAME, config=config)
    first = x.out.tensor.clone()
    for _ in range(20):
        x.reset_out()
        x.call(backend=NAME, config=config)
        assert torch.equal(first.view(torch.uint8), x.out.tensor.view(torch.uint8))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.call(backend=NAME, config=config)
    x.reset_out()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(first.view(torch.uint8), x.out.tensor.view(torch.uint8))


@pytest.mark.parametrize("m, n, k", [(64, 4096, 7168), (37, 456, 640), (128, 3000, 512), (20, 32768, 512), (96, 4096, 1536)])
def test_dense_candidates(m: int, n: int, k: int) -> None:
    """Every one: a CTA alone on an SM, short tiles, two an SM, by clusters; both gates, guards, the same bits again."""
    x = build(Case("dense", "dense", 1, m, n, k), "cuda")
    for config in fp8_decode.configs(x.plan(backend=NAME).problem, detect(torch.device("cuda"))):
        x.verify_repeats(1, backend=NAME, config=config)


@pytest.mark.parametrize("case, tokens, rows, warps, more", [
    (Case("boxes", "masked", 4, 9, 1088, 2304, max_m=40), 8, 64, 4, {"ctas": 2}),
    (Case("boxes", "offsets", 9, 3, 456, 3072), 64, 64, 4, {"narrow": 8, "middle": 16}),
    (Case("boxes", "offsets", 5, 20, 1088, 1536), 128, 128, 8, {"narrow": 16, "middle": 64}),
    (Case("boxes", "contiguous", 4, 128, 512, 1536), 16, 128, 8, {}), (Case("boxes", "dense", 1, 37, 576, 7168), 32, 64, 4, {})],
    ids=lambda c: c.layout if isinstance(c, Case) else "")
def test_boxes_of_several_k_blocks_have_the_bits_of_one(case: Case, tokens: int, rows: int, warps: int, more: dict[str, int]) -> None:
    """Both gates, guards, the same bits again; and those of a box a K block. Where weights pass through L2, too."""
    x = build(case, "cuda")

    def config(box: int, stages: int, **extra: int) -> Config:
        return Config(tokens, rows, 128, warps, stages, swap_ab=True, persistent=True,
                      extra=tuple(sorted(({"box": box} | more | extra).items())))

    x.verify(backend=NAME, config=config(1, 4))
    first = x.out.tensor.clone()
    for tile in (config(2, 3, trip=2), config(2, 2, guess=1), config(2, 3, trip=2, stream=int(case.layout != "dense"))):
        x.reset_out()
        x.verify_repeats(2, backend=NAME, config=tile)
        assert torch.equal(first.view(torch.int16), x.out.tensor.view(torch.int16))


def test_weights_are_fetched_by_256_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """This driver and this Triton are as `tensor_map` expects them, and results have the same bits."""
    done: list[bool] = []
    widen = binding.widen

    def seen(*args: Any) -> bool:
        done.append(widen(*args))
        return done[-1]

    monkeypatch.setattr(binding, "widen", seen)
    monkeypatch.setattr(fp8_decode, "fetches_by_256", lambda problem, arch: True)       # on every chip
    x = build(Case("wide", "masked", 4, 8, 1088, 2304, max_m=40), "cuda")
    first = x.call(backend=NAME).clone()        # Triton's own launch
    x.reset_out()
    assert torch.equal(first.view(torch.int16), x.call(backend=NAME).view(torch.int16))
    assert done and all(done)
