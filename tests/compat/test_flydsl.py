"""FlyDSL's launchers: its 30 cases through its call, its signatures, what they ignore, and a device's streams."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace

import pytest
import torch

from narrowgemm import FP8_1x128, FP8_128x128
from narrowgemm.compat import flydsl
from narrowgemm.testing.cases import Case, build
from narrowgemm.testing.numerics import calc_diff, check_gates
from narrowgemm.testing.suites import FLYDSL_CONTIGUOUS, FLYDSL_MASKED

from . import _flydsl
from ._flydsl import FACTORIES, GPU, NAMES, as_bytes, fresh, launcher, problem, run  # noqa: F401 - a fixture

FULL = [Case("flydsl", "contiguous", g, m, n, k, sizes="uniform:0.8:1.2", zero_padding=False)
        for g, m, n, k in FLYDSL_CONTIGUOUS]
FULL += [Case("flydsl", "masked", g, m, n, k, max_m=x, sizes="empty:0.5" if m == 50 else "uniform:0.8:1.2")
         for g, x, m, n, k in FLYDSL_MASKED]
SMALL = [replace(c, n=min(c.n, 512) if c.n < 2048 else c.n // 8, k=c.k if c.k < 2048 else c.k // 1024 * 128 + 128)
         for c in FULL]
CASES = [pytest.param("cpu", replace(c, out_dtype=d), id=f"cpu-{c.id}-{d}") for c in SMALL for d in ("bf16", "fp16")]
CASES += [pytest.param("cuda", replace(c, out_dtype=d), id=f"cuda-{c.id}-{d}", marks=GPU)
          for c in FULL for d in ("bf16", "fp16")]
E8M0 = [replace(SMALL[4], a=FP8_1x128.with_scale("e8m0"), b=FP8_128x128.with_scale("e8m0")),
        replace(SMALL[9], a=FP8_1x128.with_scale("e8m0"), b=FP8_128x128.with_scale("e8m0"))]


def call(inputs, stream=None, **options):
    """The case through FlyDSL's names, the way its callers do: flat tensors, FP8 as int8, transposed scales."""
    c, a, b, d = inputs.case, inputs.a, inputs.b, inputs.out.tensor
    launch = FACTORIES[c.layout](n=c.n, k=c.k, num_groups=c.groups, out_dtype=NAMES[d.dtype], **options)
    launch(d.view(-1), as_bytes(a.data), as_bytes(flydsl.shuffle_weight(b.data)), a.scale.mT.contiguous().view(-1),
           b.scale.contiguous().view(-1), inputs.layout.index, c.a_rows, c.n, c.k, c.groups, stream)


def test_the_matrix_has_thirty_cases():
    assert sum(p.values[0] == "cpu" for p in CASES) == 30 == sum(p.values[0] == "cuda" for p in CASES)


@pytest.mark.parametrize(("device", "case"), CASES)
def test_case(device, case):
    inputs = build(case, device)
    call(inputs)
    assert not inputs.faults()
    inputs.check().assert_(case.id)


@pytest.mark.parametrize("case", E8M0, ids=lambda c: c.layout)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_e8m0_scales(device, case):
    inputs = build(case, device)
    assert inputs.a.scale.dtype == torch.uint8
    call(inputs)
    assert not inputs.faults()
    inputs.check().assert_(case.id)


@pytest.mark.parametrize("layout", ["contiguous", "masked"])
def test_callers_quantiser(layout):
    """Scales the way FlyDSL's callers make them, as E8M0 bytes, against the product before quantising."""
    g, m, n, k = 2, 128, 128, 256
    a, b = torch.randn(g, m, k), torch.randn(g, n, k)

    def cast(x, dims):
        scale = flydsl.fp32_to_e8m0(x.abs().amax(dims, keepdim=True).clamp(min=1e-12) / 448)
        return (x / scale).to(torch.float8_e4m3fn), flydsl.fp32_e8m0_to_byte(scale)

    qa, sa = cast(a.view(g, m, k // 128, 128), 3)
    qb, sb = cast(b.view(g, n // 128, 128, k // 128, 128), (2, 4))
    d = torch.zeros(g, m, n, dtype=torch.bfloat16)
    if layout == "masked":
        index, sa = torch.full((g,), m, dtype=torch.int32), sa.view(g, m, -1).mT
    else:
        index, sa = torch.arange(g, dtype=torch.int32).repeat_interleave(m), sa.view(g * m, -1).T
    qb = flydsl.shuffle_weight(qb.view(g, n, k), layout=(16, 16))
    launcher(layout, n, k, g)(d.view(-1), as_bytes(qa), as_bytes(qb), sa.contiguous().view(-1), sb.view(-1), index,
                              m if layout == "masked" else g * m, n, k, g, None)
    same = torch.bmm((qa.float().view(g, m, -1, 128) * (sa if layout == "masked" else sa.T.reshape(g, m, -1).mT).mT
                      .view(torch.uint8).int().sub(127).float().exp2().unsqueeze(-1)).view(g, m, k),
                     (flydsl.unshuffle_weight(qb).float().view(g, n // 128, 128, -1, 128)
                      * sb.int().sub(127).float().exp2()).view(g, n, k).mT)
    check_gates(d, same, torch.bmm(a, b.mT), FP8_1x128, FP8_128x128, rows=list(range(g)), k=k).assert_()


@pytest.mark.parametrize("layout", ["contiguous", "masked"])
def test_shapes_and_longer_flat_buffers(layout):
    args = problem(layout)
    launch = launcher(layout)
    launch(**args)
    want = args["d"].clone()
    rows = "max_m" if layout == "masked" else "M"
    long = {k: torch.cat([v.reshape(-1).view(torch.uint8), torch.full((64,), 9, dtype=torch.uint8)]).view(v.dtype)
            for k, v in args.items() if isinstance(v, torch.Tensor)}
    for step in (long, {**args, "a": args["a"].view(torch.uint8), "scale_a": args["scale_a"].view(-1)}):
        args = {**args, **step, "d": torch.full_like(step["d"], 7)}
        assert launch(*(args[k] for k in inspect.signature(launch).parameters)) is None
        assert torch.equal(args["d"].view(-1)[: want.numel()], want.view(-1))
        assert (args["d"].view(-1)[want.numel() :] == 7).all()
    assert rows in args


def test_no_rows():
    args = problem()
    args |= {"M": 0, "d": args["d"][:0], "a": args["a"][:0], "scale_a": args["scale_a"][:, :0].contiguous(),
             "grouped_layout": args["grouped_layout"][:0]}
    launcher()(**args)


def test_padding_inside_a_tile_is_left_alone():
    args = problem()
    args["grouped_layout"] = args["grouped_layout"].clone()
    args["grouped_layout"][5:9] = -1
    launcher()(**args)
    assert (args["d"][5:9] == 7).all() and not (args["d"][:5] == 7).all() and not (args["d"][9:] == 7).all(0).any()


@pytest.mark.parametrize(("layout", "names"), [
    ("contiguous", "d a b scale_a scale_b grouped_layout M n k num_groups stream"),
    ("masked", "d a b scale_a scale_b masked_m max_m n k num_groups stream")])
def test_signatures(layout, names):
    factory = inspect.signature(FACTORIES[layout]).parameters
    assert all(p.kind is p.KEYWORD_ONLY for p in factory.values())
    assert {n: p.default for n, p in factory.items() if p.default is not p.empty} == dict(
        tile_m=128, tile_n=128, tile_k=128, scale_block_k=128, scale_block_n=128, out_dtype="bf16", waves_per_eu=None)
    assert list(factory)[:3] == ["n", "k", "num_groups"]
    assert " ".join(inspect.signature(launcher(layout)).parameters) == names
    assert launcher(layout) is launcher(layout)


# ---- hints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "masked"])
def test_waves_per_eu_is_ignored_with_one_warning(layout):
    args = problem(layout)
    want = run(args, layout=layout)
    with pytest.warns(UserWarning, match="waves_per_eu=2 has no effect") as caught:
        launch = launcher(layout, waves_per_eu=2)
    assert len(caught) == 1 and caught[0].filename == _flydsl.__file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FACTORIES[layout].cache_clear()
        launcher(layout, waves_per_eu=2)
        launch(**args)
    assert torch.equal(args["d"], want)


def test_tiles_that_the_kernel_lacks_are_ignored_with_one_warning():
    args = problem()
    want = run(args)
    with pytest.warns(UserWarning, match=r"tile_m=64, tile_n=128, tile_k=128 has no effect: reference can't") as caught:
        launcher(tile_m=64)(**args)
    assert len(caught) == 1 and caught[0].filename == __file__ and torch.equal(args["d"], want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launcher(tile_m=64)(**args)


@pytest.mark.parametrize(("layout", "tiles", "honoured"), [
    ("contiguous", (64, 128, 128), True), ("masked", (64, 128, 128), True), ("contiguous", (32, 128, 128), True),
    ("contiguous", (96, 128, 128), False), ("contiguous", (128, 256, 128), False), ("masked", (128, 128, 256), False)])
def test_tiles_are_passed_where_the_kernel_can(monkeypatch, layout, tiles, honoured):
    """On an imagined device: what the op is called with, and that it selects that kernel with those tiles."""
    from narrowgemm.compat.flydsl import factories
    from narrowgemm.ops import common, grouped

    n = k = 512
    args = problem(layout, 2048, n, k)
    monkeypatch.setenv("NARROWGEMM_ARCH", "mi350x")
    seen = []
    monkeypatch.setattr(factories, "grouped_gemm", lambda *args, **options: seen.append((args, options)))
    options = dict(zip(("tile_m", "tile_n", "tile_k"), tiles))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        launcher(layout, n, k, **options)(**args)
        launcher(layout, n, k)(**args)
    assert [bool(c) for c in caught] == [True] * (not honoured)
    plans = []
    for operands, given in seen:
        assert given.pop("zero_padding") is False
        out = given.pop("out")
        plans.append(grouped.plan_of(*operands, out, out.dtype, False, False, common.Options(**given)))
    assert bool(seen[0][1]) == honoured and not seen[1][1]
    assert all(p.kernel == "triton.fp8_block" for p in plans)
    c = plans[0].config
    assert ((c.block_m, c.block_n, c.block_k) == tiles) == honoured


# ---- on a device ---------------------------------------------------------------------------------------------------


@GPU
@pytest.mark.parametrize("kind", ["torch", "handle", "null", "none"])
def test_stream(kind):
    """Work goes to the stream that is given: behind a long one there, and not before it."""
    args = problem(device="cuda")
    want = run(args)
    other = torch.cuda.default_stream() if kind == "null" else torch.cuda.Stream()
    a, d = torch.zeros_like(args["a"]), torch.full_like(args["d"], 7)
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        torch.cuda._sleep(100_000_000)
        a.view(torch.uint8).copy_(args["a"].view(torch.uint8))
    stream = {"torch": other, "handle": other.cuda_stream, "null": 0, "none": None}[kind]
    with torch.cuda.stream(other if kind == "none" else torch.cuda.Stream()):
        here = torch.cuda.current_stream()
        launcher()(**{**args, "a": a, "d": d, "stream": stream})
        assert torch.cuda.current_stream() == here
    torch.cuda.synchronize()
    assert torch.equal(d, want)


@GPU
@pytest.mark.parametrize(("layout", "tile_m"), [("contiguous", 64), ("masked", 64), ("contiguous", 128)])
def test_tiles_on_the_device(layout, tile_m):
    args = problem(layout, 1024, 512, 512, device="cuda")
    launcher(layout, 512, 512)(**args)
    want = args["d"].clone()
    launcher(layout, 512, 512, tile_m=tile_m)(**args)
    assert calc_diff(args["d"].float(), want.float()) < 5e-6
