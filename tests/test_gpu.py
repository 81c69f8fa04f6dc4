"""On a GPU: every suite through both gates with poison and guards, graphs with changed routing, no host sync, bit-equal repeats.

`-m gpu` runs all of it. What is chosen by default and every backend are both held to the gates.
"""

from __future__ import annotations

import gc
import time
from dataclasses import replace

import pytest
import torch

import narrowgemm as ng
from narrowgemm.arch import detect
from narrowgemm.kernels.gluon.sm90 import fp8_cluster
from narrowgemm.kernels.registry import backends, kernels
from narrowgemm.runtime import dispatch
from narrowgemm.testing.cases import Case, build, get_suite

from ._graphs import captured, unsynchronised

pytestmark = pytest.mark.gpu

SUITES = ("edge", "portable-contiguous", "portable-masked", "portable-dense", "portable-offsets", "fp8-masked-decode", "fp8-skew")
ALL = [c for s in SUITES for c in get_suite(s)]
SEED = time.time_ns() % 2**31  # fresh numbers in every run, the same weights for neighbouring cases
_kept: dict = {}


def inputs_of(case: Case):
    """Inputs, weights taken over from the case before where they are the same."""
    inputs = build(case, "cuda", seed=SEED, reuse=_kept.pop("weights", None))
    _kept["weights"] = inputs.weights
    return inputs


@pytest.fixture(scope="module", autouse=True)
def _free():
    yield
    _kept.clear()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("case", ALL, ids=lambda c: f"{c.suite}/{c.id}")
def test_gates(case: Case) -> None:
    """What is chosen, and every backend of ours that takes the case."""
    inputs = inputs_of(case)
    inputs.verify()
    for backend in backends():
        if backend == "reference":
            continue
        try:
            plan = inputs.plan(backend=backend)
        except ng.Unsupported:
            continue
        if plan is not None:
            inputs.verify(backend=backend)


@pytest.mark.parametrize("case", get_suite("large"), ids=lambda c: c.id)
def test_beyond_2_to_31_elements(case: Case) -> None:
    _kept.clear()
    gc.collect()
    torch.cuda.empty_cache()
    inputs = build(case, "cuda", seed=1)
    assert max(inputs.a.data.numel(), inputs.b.data.numel(), inputs.out.tensor.numel()) > 2**31
    inputs.verify()
    inputs.verify(backend="triton")
    del inputs
    torch.cuda.empty_cache()


SPACE = [Case("space", "dense", 1, 333, 1088, 1152), Case("space", "dense", 1, 24, 640, 2048),
         Case("space", "contiguous", 6, 150, 640, 1152, sizes="uniform:0.3:1.7", alignment=1),
         Case("space", "contiguous", 6, 20, 640, 1152, sizes="uniform:0.3:1.7", alignment=1, order="repeated"),
         Case("space", "offsets", 6, 150, 640, 1152, sizes="uniform:0.3:1.7", slack=40),
         Case("space", "offsets", 40, 7, 640, 1152, sizes="empty:0.4"),
         Case("space", "psum", 6, 150, 640, 1152, sizes="uniform:0.3:1.7", alignment=64),
         Case("space", "masked", 6, 150, 640, 1152, max_m=300, sizes="uniform:0.3:1.7"),
         Case("space", "masked", 6, 9, 640, 1152, max_m=100, sizes="empty:0.4")]


FP8_KERNELS = ("gluon_sm90.fp8_decode", "gluon_sm90.fp8_block", "gluon_sm90.fp8_cluster", "triton.fp8_block")


@pytest.mark.parametrize("layout", ["offsets", "masked", "psum"])
@pytest.mark.parametrize("rows", [256, 384])
def test_either_width_of_a_tile(layout: str, rows: int) -> None:
    """16 blocks of 128 rows x 2048 columns are fewer rounds of 160 columns, 24 are fewer of 192: on 132 SMs the device takes both."""
    inputs = inputs_of(Case("space", layout, 8, rows, 2048, 640, max_m=rows if layout == "masked" else 0))
    config, = (c for c in fp8_cluster._GROUPED if "wider" in dict(c.extra))
    inputs.verify(backend=fp8_cluster.NAME, config=config)


@pytest.mark.parametrize("kernel", FP8_KERNELS)
@pytest.mark.parametrize("case", SPACE, ids=lambda c: c.id)
def test_every_config_of_every_kernel(case: Case, kernel: str) -> None:
    """Gates, poison and determinism hold in the whole search space, for few rows and for many."""
    inputs = build(case, "cuda", seed=3)
    arch, problem, module = detect(inputs.device), inputs.plan().problem, kernels()[kernel]
    if reason := module.supports(problem, arch):
        pytest.skip(reason)
    likes = [replace(problem, rows=rows) for rows in (4, 16, 64, 128, 1024)]
    found = dict.fromkeys(c for p in likes if module.supports(p, arch) is None for c in module.configs(p, arch))
    tried = [c for c in found if dispatch.illegal(module, problem, c, arch) is None]
    assert len(tried) >= 2
    for config in tried:
        inputs.verify_repeats(backend=kernel, config=config)


REPEAT = [Case("repeat", "dense", 1, 64, 2112, 7168), Case("repeat", "contiguous", 8, 256, 2048, 7168),
          Case("repeat", "offsets", 32, 20, 2048, 2048, sizes="uniform:0.3:1.7"), Case("repeat", "masked", 6, 20, 4096, 2048, max_m=1024)]


@pytest.mark.parametrize("case", REPEAT, ids=lambda c: c.id)
def test_ten_bit_equal_repeats(case: Case) -> None:
    inputs = build(case, "cuda")
    first = inputs.call().clone()
    for _ in range(10):
        inputs.reset_out()
        assert torch.equal(inputs.call().view(torch.int16), first.view(torch.int16))


@pytest.mark.parametrize("layout", ["contiguous", "psum", "offsets", "masked"])
@pytest.mark.parametrize("rows", [6, 200])
def test_graph_replay_with_changed_routing(layout: str, rows: int) -> None:
    """Captured once, replayed with other group sizes: the same numbers as an eager call, and no host sync on the way."""
    g, n, k = 8, 512, 1024
    spreads = ("uniform:0.3:1.7", "skew:30", "few:1", "empty:0.5", "zero")
    cases = [Case("graph", layout, g, rows, n, k, sizes=s, max_m=rows * g if layout == "masked" else 0,
                  slack=0 if layout == "masked" else 4096) for s in spreads]
    # every case in buffers of one size, so that only device data changes between replays
    capacity = max(c.a_rows for c in cases)
    built = [build(c, "cuda", seed=9) for c in cases]
    lead = (g, capacity) if layout == "masked" else (capacity,)
    scale = torch.zeros((*lead[:-1], k // 128, -(-capacity // 4) * 4), device="cuda")[..., :capacity].mT
    a = ng.ScaledTensor(torch.zeros((*lead, k), dtype=torch.float8_e4m3fn, device="cuda"), scale, ng.FP8_1x128)
    index = torch.zeros_like(built[0].layout.index) if layout != "contiguous" else torch.full((capacity,), -1, dtype=torch.int32, device="cuda")
    where = ng.Masked(index, rows) if layout == "masked" else ng.Psum(index, 128) if layout == "psum" else type(built[0].layout)(index)
    out = torch.empty((*lead, n), dtype=torch.bfloat16, device="cuda")
    b = built[0].b

    def load(i) -> None:
        a.data.zero_()
        scale.fill_(1.0)
        if layout == "masked":
            a.data[:, : i.case.max_m].copy_(i.a.data)
            scale[:, : i.case.max_m].copy_(i.a.scale)
            index.copy_(i.layout.index)
        else:
            a.data[: i.case.a_rows].copy_(i.a.data)
            scale[: i.case.a_rows].copy_(i.a.scale)
            if layout == "contiguous":
                index.fill_(-1)
                index[: i.case.a_rows].copy_(i.layout.index)
            else:
                index.copy_(i.layout.index)

    load(built[0])
    graph = captured(lambda: ng.grouped_gemm(a, b, where, out=out))
    for i in built:
        load(i)
        out.fill_(float("nan"))
        graph.replay()
        replayed = out.clone()
        out.fill_(float("nan"))
        ng.grouped_gemm(a, b, where, out=out)
        assert torch.equal(replayed.view(torch.int16), out.view(torch.int16)), i.case.id
        target = i.out.tensor
        target.copy_(out[:, : i.case.max_m] if layout == "masked" else out[: i.case.a_rows])
        if i.case.rows:
            i.check().assert_(i.case.id)


def test_warm_calls_do_not_synchronise() -> None:
    inputs = build(REPEAT[2], "cuda")
    inputs.call()
    torch.cuda.synchronize()
    with unsynchronised():
        inputs.call()


def test_two_streams_and_two_threads() -> None:
    """Calls from two threads on two streams give what one gives."""
    from concurrent.futures import ThreadPoolExecutor

    cases = [REPEAT[0], REPEAT[2]]
    inputs = [build(c, "cuda") for c in cases]
    expected = [i.call().clone() for i in inputs]
    torch.cuda.synchronize()

    def work(n: int) -> bool:
        i = build(cases[n], "cuda")
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            for _ in range(20):
                out = ng.gemm(i.a, i.b) if n == 0 else ng.grouped_gemm(i.a, i.b, i.layout)
            torch.cuda.current_stream().synchronize()
        return torch.equal(out.view(torch.int16), expected[n].view(torch.int16))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, (0, 1)))


def test_freed_and_reallocated_tensors() -> None:
    """Nothing cached from one tensor is used for another at the same address with other sizes."""
    for m, n, k in ((64, 512, 1024), (128, 256, 1024), (32, 1024, 1024), (64, 512, 1024), (512, 512, 256)):
        inputs = build(Case("realloc", "dense", 1, m, n, k), "cuda", seed=m)
        inputs.verify()
        del inputs
        torch.cuda.empty_cache()


def test_compiled_as_one_graph_on_the_gpu() -> None:
    inputs = build(REPEAT[2], "cuda")
    eager = inputs.call().clone()

    def f(a_data, a_scale, b_data, b_scale, index):
        return ng.grouped_gemm(ng.ScaledTensor(a_data, a_scale, inputs.a.format), ng.ScaledTensor(b_data, b_scale, inputs.b.format),
                               ng.Offsets(index)) * 1

    compiled = torch.compile(f, fullgraph=True)
    out = compiled(inputs.a.data, inputs.a.scale, inputs.b.data, inputs.b.scale, inputs.layout.index)
    rows = inputs.case.rows
    assert torch.equal(out[:rows], eager[:rows])
