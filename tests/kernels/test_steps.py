"""The kernels around the expert layer's products against their definitions: interpreted on the CPU, and on a GPU.

Bit for bit where the arithmetic is the same; the exponentials of softmax, sigmoid and SiLU are the device's own.
"""

from __future__ import annotations

import pytest
import torch

from narrowgemm import FP8_ROW, FP8_TENSOR, MXFP4, MXFP8, FP8_1x128, Offsets, ScaledTensor, combine, route, sort_by_expert
from narrowgemm.arch import get_arch
from narrowgemm.formats import BF16, Format
from narrowgemm.kernels.registry import kernels
from narrowgemm.kernels.step_operands import ActivateOperands, GatherOperands, SortGatherOperands
from narrowgemm.ops.activate import activate
from narrowgemm.ops.gather import gather_quantize
from narrowgemm.ops.steps import activate_problem, gather_problem, scale_layout_of, sort_gather_problem
from narrowgemm.problem import Config, Operand, Problem, Step
from narrowgemm.reference import activate as reference_activate
from narrowgemm.reference import route as reference
from narrowgemm.runtime.launch import launch
from narrowgemm.testing.numerics import calc_diff

FORMATS = [FP8_1x128, FP8_1x128.with_scale("e8m0"), MXFP8, MXFP4, FP8_ROW, BF16]


def tried(kernel: str, problem: Problem, device: str) -> list[Config]:
    """Configs to try: all of them on a GPU, one in the interpreter, which takes seconds for what a GPU does in none."""
    configs = kernels()[kernel].configs(problem, ARCH)
    return configs if device == "cuda" else configs[:1]


ARCH = get_arch("h200")
ROUTES = [  # experts, top_k, scoring, renormalize, bias, groups, topk_group, factor
    (8, 2, "softmax", True, False, None, None, 1.0),         # Mixtral
    (128, 8, "softmax", True, False, None, None, 1.0),       # Qwen3-MoE
    (160, 6, "softmax", False, False, 8, 3, 16.0),           # DeepSeek-V2
    (256, 8, "sigmoid", True, True, 8, 4, 2.5),              # DeepSeek-V3
    (384, 8, "sigmoid", True, True, 1, 1, 2.827),            # Kimi-K2
    (6, 6, "sigmoid", False, True, 3, 3, 1.0),
    (6, 2, "softmax", True, True, 6, 2, 1.0),                # one expert a group
    (40, 3, "softmax", True, True, 5, 2, 1.0),
    (1, 1, "softmax", True, False, None, None, 1.0),
]


@pytest.fixture
def on(device, monkeypatch):
    """The device, with a GPU to plan for where there is none."""
    if device == "cpu":
        monkeypatch.setenv("NARROWGEMM_ARCH", "h200")
    return device


def raw(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8).cpu()


def ids_of(tokens: int, top_k: int, experts: int, seed: int = 0, skip: float = 0.2) -> torch.Tensor:
    """Distinct experts a token; some slots name none."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(max(experts, top_k), generator=g)[:top_k] for _ in range(tokens)])
    return torch.where(torch.rand(ids.shape, generator=g) < skip, -1, ids).to(torch.int32)


def equal_routing(got: reference.Routing, want: reference.Routing) -> None:
    for name in ("offsets", "row_map", "inverse"):
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name).cpu()), name


@pytest.mark.parametrize("case", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_route(on, case, dtype):
    experts, k, scoring, renormalize, biased, groups, kept, factor = case
    gen = torch.Generator().manual_seed(0)
    # distinct in bf16 and far enough apart that fp32 scores are distinct too
    logits = torch.stack([torch.randperm(experts, generator=gen) for _ in range(3)]).to(dtype) / 64
    bias = torch.linspace(-0.037, 0.041, experts)[torch.randperm(experts, generator=gen)] if biased else None
    options = dict(scoring=scoring, renormalize=renormalize, num_expert_group=groups, topk_group=kept,
                   scaling_factor=factor)
    want = reference.route(logits, k, bias=bias, **options)
    for layout in (logits.to(on), logits.to(on).mT.contiguous().mT):
        weights, ids = route(layout, k, bias=None if bias is None else bias.to(on), backend="triton", **options)
        assert torch.equal(ids.cpu(), want[1])
        torch.testing.assert_close(weights.cpu(), want[0], rtol=2e-6, atol=0)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_route_takes_extremes_as_the_definition_does(on, scoring):
    nan, inf = float("nan"), float("inf")
    logits = torch.randn(9, 16, generator=torch.Generator().manual_seed(1)) * 30
    logits[0, 3], logits[1, 2:9], logits[2], logits[3] = nan, inf, -inf, nan
    logits[4, 5], logits[5], logits[6], logits[7, ::2] = -inf, -1e4, 0.0, -0.0
    for options in ({}, dict(num_expert_group=4, topk_group=2, bias=torch.zeros(16)),
                    dict(num_expert_group=4, topk_group=2)):
        want = reference.route(logits, 6, scoring=scoring, **options)
        moved = {k: v.to(on) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        weights, ids = route(logits.to(on), 6, scoring=scoring, backend="triton", **moved)
        assert torch.equal(ids.cpu(), want[1])
        torch.testing.assert_close(weights.cpu(), want[0], rtol=4e-6, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("launches", [1, 3])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(0, 2, 8), (1, 8, 40), (7, 4, 5), (40, 8, 6), (4, 16, 20),
                                                          (513, 4, 1)])
def test_sort_by_expert(on, tokens, top_k, experts, launches):
    ids = ids_of(tokens, top_k, experts) if tokens else torch.zeros((0, top_k), dtype=torch.int32)
    kernel = kernels()["triton.sort_by_expert"]
    for config in (c for c in kernel.configs(sort_problem(experts), ARCH) if c.split_k == launches):
        for cast in (torch.int32, torch.int64) if on == "cuda" else (torch.int32,):
            got = sort_by_expert(ids.to(on, cast), experts, config=config)
            equal_routing(got, reference.sort_by_expert(ids.to(cast), experts))


def sort_problem(experts: int) -> Problem:
    return Problem("sort_by_expert", "offsets", 1, 1, 1, experts)


@pytest.mark.parametrize("launches", [1, 3])
def test_sort_by_expert_with_a_map(on, launches):
    ids = torch.randint(-3, 40, (90, 3), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    table = torch.randint(-2, 9, (33,), generator=torch.Generator().manual_seed(3))
    config = next(c for c in kernels()["triton.sort_by_expert"].configs(sort_problem(7), ARCH) if c.split_k == launches)
    for cast in (torch.int32, torch.int64):
        got = sort_by_expert(ids.to(on), 7, expert_map=table.to(on, cast), config=config)
        equal_routing(got, reference.sort_by_expert(ids, 7, expert_map=table))
        got = sort_by_expert(ids.to(on, cast), 7, first_expert=16, config=config)
        equal_routing(got, reference.sort_by_expert(torch.where((ids >= 16) & (ids < 23), ids - 16, -1), 7))


def live_equal(got: ScaledTensor, want: ScaledTensor, rows: int, poison: int = 0xA5) -> None:
    """The rows that are live agree in every bit, and no other was written."""
    assert got.format == want.format and got.data.shape == want.data.shape
    assert torch.equal(raw(got.data)[:rows], raw(want.data)[:rows]), "payloads differ"
    assert bool((raw(got.data)[rows:] == poison).all()), "a row of a skipped slot was written"
    if want.scale is not None:
        assert torch.equal(raw(got.scale)[:rows], raw(want.scale)[:rows]), "scales differ"
        if want.scale.shape[0] > 1:
            assert bool((raw(got.scale)[rows:] == poison).all()), "a scale of a skipped slot was written"


def poisoned(rows: int, k: int, fmt: Format, dtype: torch.dtype, device: str, layout: str = "mn_major") -> ScaledTensor:
    from narrowgemm.ops.steps import allocate

    out = allocate(rows, k, fmt, dtype, torch.device(device), layout)
    for x in (out.data, out.scale):
        if x is not None:
            base = x if x.is_contiguous() else x.mT
            torch.as_strided(base, (base.shape[0] * base.stride(0),), (1,)).view(torch.uint8).fill_(0xA5)
    return out


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize(("tokens", "top_k", "k"), [(1, 8, 512), (13, 3, 200), (9, 2, 1024)])
def test_gather_quantize(on, fmt, tokens, top_k, k):
    experts = 6
    ids = ids_of(tokens, top_k, experts)
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(4)).bfloat16()
    x[0, :3] = torch.tensor([0.0, -0.0, float("nan")])
    routing = reference.sort_by_expert(ids, experts)
    there = reference.Routing(*(v.to(on) for v in (routing.row_map, routing.offsets, routing.inverse)), top_k)
    want = reference.gather_quantize(x, routing, fmt)
    for layout in ("mn_major", "row_major"):
        out = poisoned(tokens * top_k, k, fmt, x.dtype, on, layout)
        configs = kernels()["triton.gather_quantize"].configs(problem_of(fmt, k), ARCH)
        by_row = [c for c in configs if c.persistent][:1]
        for config in configs if on == "cuda" else [configs[0], *by_row]:
            gather_quantize(x.to(on), there, fmt, scale_layout=layout, out=out, config=config)
            live_equal(out, want, int(routing.offsets[-1]))


@pytest.mark.parametrize("fmt", [MXFP8, FP8_1x128, BF16], ids=lambda f: f.name)
def test_gather_of_tokens_that_have_no_rows_here(on, fmt, monkeypatch):
    """Read before that is known or after: the same bits, and nothing of them is written."""
    from narrowgemm.kernels.triton import gather

    tokens, top_k, k, experts = 11, 2, 200, 4
    ids = ids_of(tokens, top_k, experts, skip=0.6)
    assert bool((ids < 0).all(1).any())
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(13)).bfloat16()
    routing = reference.sort_by_expert(ids, experts)
    there = reference.Routing(*(v.to(on) for v in (routing.row_map, routing.offsets, routing.inverse)), top_k)
    problem = gather_problem(tokens, k, top_k, experts, BF16, fmt, "mn_major", expected=1)
    config = next(c for c in gather.configs(problem, ARCH) if not c.persistent)
    want = reference.gather_quantize(x, routing, fmt)
    for least in (gather.EAGER_BYTES, 0):
        monkeypatch.setattr(gather, "EAGER_BYTES", least)
        out = poisoned(tokens * top_k, k, fmt, x.dtype, on)
        launch(Step("triton.gather_quantize", config), problem, GatherOperands(
            x.to(on), there.row_map, there.offsets, there.inverse, top_k, out, "rceil", 1e-4))
        live_equal(out, want, int(routing.offsets[-1]))


def problem_of(fmt: Format, k: int, n: int = 1) -> Problem:
    return Problem("gather_quantize", "offsets", 1, n, k, 6, Operand(BF16), Operand(fmt))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gather_quantize_input_types_and_strides(on, dtype):
    ids = ids_of(9, 2, 4)
    x = torch.randn(9, 300, generator=torch.Generator().manual_seed(5)).to(dtype)[:, 20:276]
    routing = reference.sort_by_expert(ids, 4)
    there = reference.Routing(*(v.to(on) for v in (routing.row_map, routing.offsets, routing.inverse)), 2)
    rows = int(routing.offsets[-1])
    for fmt in (FP8_1x128, MXFP4, FP8_ROW, FP8_TENSOR):
        got = gather_quantize(x.to(on), there, fmt, backend="triton")
        want = reference.gather_quantize(x, routing, fmt)
        assert torch.equal(raw(got.data)[:rows], raw(want.data)[:rows]) and got.scale.shape == want.scale.shape
        assert torch.equal(raw(got.scale)[:rows], raw(want.scale)[:rows])


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f is not FP8_ROW], ids=lambda f: f.name)
@pytest.mark.parametrize(("tokens", "top_k", "k", "experts"), [(1, 8, 512, 20), (7, 3, 200, 6), (3, 16, 384, 40), (3, 1, 96, 1), (65, 8, 200, 20)])
def test_sort_gather_is_both_bit_for_bit(on, fmt, tokens, top_k, k, experts):
    """Tables and live rows are those of the sort and the gather, with skipped slots and maps; nothing else is written."""
    x = torch.randn(tokens, k + 16, generator=torch.Generator().manual_seed(4)).bfloat16()[:, :k]
    x[0, :3] = torch.tensor([0.0, -0.0, float("nan")])
    kernel, ids = kernels()["triton.sort_gather"], ids_of(tokens, top_k, experts)
    table = torch.randint(-2, experts, (experts + 3,), generator=torch.Generator().manual_seed(3))
    problem = sort_gather_problem(tokens, k, top_k, experts, BF16, fmt, scale_layout_of(fmt))
    assert kernel.supports(problem, ARCH) is None
    for expert_map, first, cast in ((None, 0, torch.int32), (table, 0, torch.int64), (None, experts // 3, torch.int64)):
        routing = reference.sort_by_expert(ids, experts, expert_map=expert_map, first_expert=first)
        want = reference.gather_quantize(x, routing, fmt)
        for config in tried("triton.sort_gather", problem, on):
            out = poisoned(tokens * top_k, k, fmt, x.dtype, on, scale_layout_of(fmt))
            got = reference.Routing(*(torch.full_like(t, -7).to(on) for t in (routing.row_map, routing.offsets, routing.inverse)), top_k)
            operands = SortGatherOperands(ids.to(on, cast), None if expert_map is None else expert_map.to(on), first, experts, x.to(on),
                                          top_k, got.row_map, got.offsets, got.inverse, out, "rceil", 1e-4)
            launch(Step(kernel.NAME, config), problem, operands)
            equal_routing(got, routing)
            live_equal(out, want, int(routing.offsets[-1]))


def test_sort_gather_is_for_few_slots_and_blocks():
    def reason(tokens: int, fmt: Format) -> str:
        return kernels()["triton.sort_gather"].supports(sort_gather_problem(tokens, 7168, 8, 256, BF16, fmt, "mn_major"), ARCH) or ""

    assert not reason(256, FP8_1x128)
    assert "2048 slots" in reason(257, FP8_1x128) and "whole rows" in reason(1, FP8_ROW)


ACTIVATIONS = [("swiglu", (), False, False), ("swiglu_oai", (), True, True), ("swiglu_oai", (1.5, 3.0), False, True),
               ("swiglu", (), True, False)]


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("kind", ACTIVATIONS, ids=str)
def test_activate(on, fmt, kind):
    """Against the definition with its own exponentials: at most a rounding apart, and the poisoned rows untouched."""
    name, args, interleaved, biased = kind
    gen = torch.Generator().manual_seed(6)
    rows, inter, offsets = 37, 320, torch.tensor([0, 5, 5, 19, 31])
    h = torch.randn(rows, 2 * inter, generator=gen).mul(3).bfloat16()
    bias = torch.randn(4, 2 * inter, generator=gen) if biased else None
    h[31:] = float("nan")
    want = reference_activate.activate(h, activation=name, args=args, interleaved=interleaved, bias=bias,
                                       offsets=offsets, fmt=fmt if fmt.scaled else None)
    want = want if isinstance(want, ScaledTensor) else ScaledTensor(want, None, fmt)
    for config in tried("triton.activate", problem_of(fmt, inter), on):
        out = poisoned(rows, inter, fmt, h.dtype, on)
        activate(h.to(on), activation=name, args=args, interleaved=interleaved, bias=None if bias is None else bias.to(on),
                 layout=Offsets(offsets.to(on)), fmt=fmt, out=out, config=config)
        got = ScaledTensor(out.data.cpu()[:31], None if out.scale is None else out.scale.cpu()[:31], fmt).dequantize()
        exact = ScaledTensor(want.data[:31], None if want.scale is None else want.scale[:31], fmt).dequantize()
        assert calc_diff(got, exact) <= (2e-4 if fmt is MXFP4 else 2e-6)
        assert bool((raw(out.data)[31:] == 0xA5).all())
        assert out.scale is None or bool((raw(out.scale)[31:] == 0xA5).all())


@pytest.mark.parametrize("fmt", [MXFP8, FP8_1x128, MXFP4, BF16], ids=lambda f: f.name)
@pytest.mark.parametrize("expected", [1, 4, 16])
def test_activate_of_more_and_fewer_rows_than_expected(on, fmt, expected):
    """Of rows that are expected programs read their own before they know how many there are: none is lost, none too many is written,
    and those that walk over tiles find the same bits."""
    rows, inter, live = 37, 320, 29
    h = torch.randn(rows, 2 * inter, generator=torch.Generator().manual_seed(11)).mul(3).bfloat16().to(on)
    offsets, scales = torch.tensor([0, 5, 5, 19, live], device=on), scale_layout_of(fmt)
    problem = activate_problem(rows, inter, 4, expected, BF16, fmt, scales, "swiglu", (), False, False)
    want = activate(h, fmt=fmt, backend="triton")
    h[live:] = float("nan")
    configs = kernels()["triton.activate"].configs(problem, ARCH)
    assert {c.persistent for c in configs} == {False, True}
    for config in configs if on == "cuda" else [next(c for c in configs if c.persistent == way) for way in (False, True)]:
        out = poisoned(rows, inter, fmt, h.dtype, on, scales)
        launch(Step("triton.activate", config), problem,
               ActivateOperands(h, None, offsets, out, "swiglu", (1.0, 0.0), False, "rceil", 1e-4, None))
        live_equal(out, want, live)


def test_activate_walks_where_most_rows_are_no_ones():
    """A rank of eight launches nothing for rows that it doesn't have, but where they are few."""
    def walks(rows: int, expected: int) -> bool:
        problem = activate_problem(rows, 2048, 32, expected, BF16, MXFP8, "row_major", "swiglu", (), False, False)
        return kernels()["triton.activate"].configs(problem, ARCH)[0].persistent

    assert walks(1 << 17, (1 << 17) // 256) and not walks(1 << 17, (1 << 17) // 32) and walks(1 << 11, (1 << 11) // 256)
    assert not walks(1 << 7, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("limit", [7.0, 0.5])
@pytest.mark.parametrize("interleaved", [False, True])
def test_clamps_of_two_bf16_an_instruction(interleaved, limit):
    """Every BF16 as gate and as up, NaN and infinities among them: as clamped in FP32, which is how it goes where there is a bias."""
    every = torch.arange(-1 << 15, 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    other = every[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(12))]
    h = torch.stack([every, other], 1).reshape(64, 2048) if interleaved else torch.cat([every.view(64, 1024), other.view(64, 1024)], 1)
    h, layout = h.cuda(), Offsets(torch.tensor([0, 64]).cuda())
    how = dict(activation="swiglu_oai", args=(1.702, limit), interleaved=interleaved, layout=layout, backend="triton")
    got = activate(h, **how)
    want = activate(h, bias=torch.zeros(1, 2048, device="cuda"), **how)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num())
    assert not torch.equal(want.nan_to_num(), activate(h, **how | {"args": (1.702, 2 * limit)}).nan_to_num())


def test_limits_that_are_no_bf16_are_clamped_in_fp32():
    from narrowgemm.kernels.triton.activate import is_bf16

    assert is_bf16(7.0) and is_bf16(0.5) and is_bf16(-448.0) and is_bf16(0.0)
    assert not is_bf16(7.03) and not is_bf16(257.0) and not is_bf16(float("inf"))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_activate_is_the_composition_bit_for_bit(on, fmt):
    """Fused or step by step on the same device: the same bits."""
    from narrowgemm.ops.quantize import quantize

    h = torch.randn(23, 512, generator=torch.Generator().manual_seed(7)).mul(2).bfloat16().to(on)
    step = activate(h, backend="triton")
    if fmt.scaled:
        fused, apart = activate(h, fmt=fmt, backend="triton"), quantize(step, fmt, backend="triton")
        assert torch.equal(raw(fused.data), raw(apart.data)) and torch.equal(raw(fused.scale), raw(apart.scale))


@pytest.mark.parametrize("rounding", ["floor", "even"])
@pytest.mark.parametrize("fmt", [MXFP4, MXFP8], ids=lambda f: f.name)
def test_roundings_of_scales_reach_what_is_fused(on, fmt, rounding):
    """Gather and SwiGLU with each rounding of E8M0 scales: the bits of `quantize` with it, which are not the default's."""
    from narrowgemm.ops.quantize import quantize

    x = torch.randn(12, 256, generator=torch.Generator().manual_seed(9)).bfloat16().to(on)
    routing = sort_by_expert(ids_of(12, 2, 4).to(on), 4)
    live = int(routing.offsets[-1])
    got = gather_quantize(x, routing, fmt, rounding=rounding, backend="triton")
    rows = x[(routing.row_map[:live] // 2).long()]
    step = activate(x, backend="triton")
    for fused, plain in ((ScaledTensor(got.data[:live], got.scale[:live], fmt), rows),
                         (activate(x, fmt=fmt, rounding=rounding, backend="triton"), step)):
        apart, other = quantize(plain, fmt, rounding=rounding, backend="triton"), quantize(plain, fmt, backend="triton")
        assert torch.equal(raw(fused.data), raw(apart.data)) and torch.equal(raw(fused.scale), raw(apart.scale))
        assert not torch.equal(raw(fused.scale), raw(other.scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "top_k", "n"), [(1, 8, 512), (5, 3, 200), (2, 16, 64)])
def test_combine(on, dtype, tokens, top_k, n):
    experts = 20
    gen = torch.Generator().manual_seed(8)
    ids = ids_of(tokens, top_k, experts)
    routing = reference.sort_by_expert(ids, experts)
    there = reference.Routing(*(v.to(on) for v in (routing.row_map, routing.offsets, routing.inverse)), top_k)
    y = torch.randn(tokens * top_k, n, generator=gen).to(dtype)
    y[int(routing.offsets[-1]):] = float("nan")
    weights = torch.rand(tokens, top_k, generator=gen)
    weights[ids < 0] = float("nan")
    bias, add = torch.randn(experts, n, generator=gen), torch.randn(tokens, n, generator=gen).to(dtype)
    for extra in ({}, {"bias": bias}, {"add": add}, {"bias": bias, "add": add}):
        moved = {k: v.to(on) for k, v in extra.items()}
        want = reference.combine(y, routing, weights, out_dtype=torch.float32, **extra)
        for config in tried("triton.combine", problem_of(BF16, 1, n), on):
            got = combine(y.to(on), there, weights.to(on), out_dtype=torch.float32, config=config, **moved)
            torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=2e-6)
            assert torch.equal(combine(y.to(on), there, weights.to(on), config=config, **moved), got.to(dtype))


def test_combine_sums_in_order_of_choice_in_fp32(on):
    y = torch.tensor([[1.0], [1e8], [-1e8]], device=on)  # rows of experts 0, 1, 2
    for order, want in (([2, 1, 0], 1.0), ([0, 1, 2], 0.0)):
        routing = sort_by_expert(torch.tensor([order], dtype=torch.int32, device=on), 3)
        assert combine(y, routing, torch.ones(1, 3, device=on), backend="triton").tolist() == [[want]]
