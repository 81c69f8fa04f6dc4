"""The enumerator is fixed, its inputs are poisoned, and what a wrong kernel does is noticed."""

from __future__ import annotations

import hashlib

import pytest
import torch

from narrowgemm.formats import FP8_1x128, ScaledTensor
from narrowgemm.scales import mn_major_tma_aligned
from narrowgemm.testing.case import Case, apportion, spread
from narrowgemm.testing.cases import PEERS, SUITES, TITLES, build, find, get_case, get_suite, guarded_empty
from narrowgemm.testing.inputs import make_layout
from narrowgemm.testing.peers import computes, names
from narrowgemm.testing.tokens import Tokens

COUNTS = {
    "portable-contiguous": 32, "portable-masked": 38, "portable-dense": 28, "portable-offsets": 20, "fp8-contiguous": 8,
    "fp8-contiguous-small": 8, "fp8-offsets": 8, "fp8-offsets-small": 8, "fp8-masked": 8, "fp8-masked-eight": 8,
    "fp8-masked-decode": 40, "fp8-dense": 42, "fp8-skew": 72, "fp8-offsets-e2e": 16,
}
# sha256 of the ids and group sizes of the suites above: results that are committed are compared by them
DIGEST = "5f09dc338b0c5048"


FP4_COUNTS = {"mxfp4-contiguous": 14, "mxfp4-a4w4": 14, "mxfp4-mx8": 14, "mxfp4-256": 18, "mxfp4-256-row": 18, "mxfp4-masked": 60,
              "mxfp4-masked-few": 8, "mxfp4-masked-spread": 155}


def test_fp4_suites() -> None:
    """DeepGEMM's FP4 branch's shapes; masks of one shape differ, and peers compute every case."""
    assert {s: len(SUITES[s]) for s in FP4_COUNTS} == FP4_COUNTS
    assert len({c.group_sizes for c in SUITES["mxfp4-masked"] if c.groups == 4 and c.k == 7168}) == 10
    assert all(computes(p, c) for s in FP4_COUNTS for c in SUITES[s] for p in PEERS[s])
    assert all(c.packed and max(c.group_sizes) <= 4096 for c in SUITES["mxfp4-masked"])


def digest() -> str:
    text = "\n".join(f"{s}/{c.id} {c.group_sizes}" for s in COUNTS for c in SUITES[s])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_suites_have_fixed_ids_counts_and_group_sizes() -> None:
    assert {s: len(SUITES[s]) for s in COUNTS} == COUNTS
    assert digest() == DIGEST, f"{digest()}: results that are committed name other cases; make a new suite instead"


@pytest.mark.parametrize("suite", SUITES)
def test_ids_are_unique_and_found(suite: str) -> None:
    ids = [c.id for c in get_suite(suite)]
    assert len(set(ids)) == len(ids)
    assert all(c.suite == suite for c in SUITES[suite])
    assert get_case(suite, ids[-1]) is SUITES[suite][-1]
    assert find(f"{suite}/*") == list(SUITES[suite])


def test_every_suite_names_its_peers() -> None:
    assert set(PEERS) == set(SUITES) == set(TITLES)
    assert len(set(TITLES.values())) == len(TITLES)
    assert all(p in names() for peers in PEERS.values() for p in peers)
    assert all(computes("deepgemm", c) for c in SUITES["fp8-masked-decode"] + SUITES["fp8-skew"] + SUITES["fp8-dense"])
    assert not computes("deepgemm", get_case("portable-contiguous", "contiguous-g1-m128-n128-k128-uniform_0.8_1.2-fp16"))


def test_an_end_to_end_case_reads_bf16_tokens() -> None:
    plain, e2e = (Case("t", "offsets", 3, 40, 128, 256, e2e=e) for e in (False, True))
    assert e2e.id == plain.id + "-e2e"
    assert e2e.bytes - plain.bytes == plain.rows * (2 * 256 - 256 - 4 * 2)
    with pytest.raises(ValueError, match="an end-to-end case: got dense"):
        Case("t", "dense", 1, 40, 128, 256, e2e=True)
    inputs = build(e2e)
    assert torch.equal(inputs.tokens.x[inputs.tokens.rows], torch.cat([inputs.source_a(g) for g in range(3)]))
    assert inputs.tokens.rows.tolist() != list(range(120))
    before = build(plain)
    inputs.verify()
    assert torch.equal(inputs.a.data.view(torch.uint8), before.a.data.view(torch.uint8)) and torch.equal(inputs.a.scale, before.a.scale)


@pytest.mark.parametrize("rows", [1, 8, 37])
def test_tokens_are_gathered_and_quantised_in_one_pass(device: str, rows: int) -> None:
    """The kernel against the definition, bit for bit, padding rows and all."""
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(16, 640, generator=g).bfloat16()
    x[3, 200:300] = float("nan")
    index = torch.randint(-1, 16, (rows,), generator=g, dtype=torch.int32)
    index[0] = 3
    want, got = ((torch.full((rows, 640), 7.0).to(torch.float8_e4m3fn), torch.full((5, 40), 7.0)) for _ in range(2))
    as_operand = lambda pair, d: ScaledTensor(pair[0].to(d), pair[1].to(d)[:, :rows].mT, FP8_1x128)  # noqa: E731
    a, b = as_operand(want, "cpu"), as_operand(got, device)
    Tokens(x, index).quantize_into(a)
    Tokens(x.to(device), index.to(device)).launch(b)
    assert torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8).cpu())
    assert torch.equal(a.scale.view(torch.int32), b.scale.cpu().view(torch.int32))


def test_names_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="suite: got 'fp9', expected one of"):
        get_suite("fp9")
    with pytest.raises(ValueError, match="case of suite fp8-dense: got 'x'"):
        get_case("fp8-dense", "x")
    with pytest.raises(ValueError, match="sizes: got 'odd', expected balanced"):
        spread("odd", 4, 8)
    with pytest.raises(ValueError, match="layout: got ragged"):
        Case("t", "ragged", 1, 1, 1, 1)
    with pytest.raises(ValueError, match="max_m of a masked case: got 0"):
        Case("t", "masked", 1, 1, 1, 1)
    with pytest.raises(ValueError, match="scale_layout: got 'odd'"):
        build(Case("t", "dense", 1, 1, 128, 128), scale_layout="odd")


def test_group_sizes_spread_as_they_say() -> None:
    assert spread("balanced", 4, 7) == (7, 7, 7, 7)
    uniform = spread("uniform:0.7:1.3", 64, 1000)
    assert 700 <= min(uniform) < max(uniform) < 1300 and len(set(uniform)) > 32
    assert spread("uniform:0.7:1.3", 64, 1000) == uniform
    skew = spread("skew:30", 16, 100)
    assert sum(skew) == 1600 and 25 < max(skew) / min(skew) < 35
    few = spread("few:3", 16, 100)
    assert sum(few) == 1600 and sum(x > 0 for x in few) == 3
    assert sum(x == 0 for x in spread("empty:0.5", 16, 100)) == 8
    assert sum(spread("zero", 16, 100)) == 0
    assert max(spread("few:1", 8, 10, limit=50)) == 50
    local = spread("few:8", 32, 16, world=256)
    assert sum(local) == 16 * 256 and len(local) == 32
    assert apportion(10, [1.0, 1.0, 1.0]) == [4, 3, 3]


def test_flops_and_bytes_count_rows_in_use() -> None:
    case = Case("t", "masked", 4, 10, 256, 512, max_m=64, sizes="few:1")
    assert case.rows == 40 and case.flops == 2 * 40 * 256 * 512
    assert case.bytes == 40 * (512 + 4 * 4) + (256 * 512 + 2 * 4 * 4) + 40 * 256 * 2
    dense = Case("t", "dense", 1, 8, 128, 128, out_dtype="fp32", accumulate=True)
    assert dense.bytes == 8 * (128 + 4) + 128 * 128 + 4 + 8 * 128 * 4 * 2


@pytest.mark.parametrize("case", SUITES["cpu-formats"], ids=lambda c: c.id)
def test_every_format_builds_and_passes_the_reference(case: Case) -> None:
    build(case, seed=3).verify()


@pytest.mark.parametrize("case", [c for c in SUITES["cpu-small"] if c.rows < 200], ids=lambda c: c.id)
def test_padding_is_poison_and_operands_are_their_sources(case: Case) -> None:
    inputs = build(case)
    for part, scale in zip(inputs.padding(inputs.a.data), inputs.padding(inputs.a.scale)):
        assert part.float().isnan().all() and scale.isnan().all()
    for g in inputs.groups:
        a, b = inputs._dequantized(g)
        assert torch.allclose(a, inputs.source_a(g).float(), rtol=0.07, atol=0.01)
        assert torch.allclose(b, inputs.source_b(g).float(), rtol=0.07, atol=0.01)
        assert inputs.rows(inputs.out.tensor, g).float().isnan().all() or case.accumulate


def test_seeds_change_values_and_nothing_else() -> None:
    case = get_case("cpu-small", "offsets-g5-m24-n96-k160-uniform_0.7_1.3")
    one, again, other = build(case, seed=1), build(case, seed=1), build(case, seed=2)
    assert torch.equal(one.a.data.view(torch.uint8), again.a.data.view(torch.uint8))
    assert not torch.equal(one.a.data.view(torch.uint8), other.a.data.view(torch.uint8))
    assert torch.equal(one.layout.index, other.layout.index)


def test_scales_come_in_the_layout_that_is_asked_for() -> None:
    case = Case("t", "masked", 2, 20, 128, 384, max_m=30)
    mn, row = build(case), build(case, scale_layout="row_major")
    assert mn_major_tma_aligned(mn.a.scale) is mn.a.scale and row.a.scale.is_contiguous()
    assert torch.equal(mn.a.scale.nan_to_num(), row.a.scale.nan_to_num())


def test_weights_are_taken_over_where_they_are_the_same() -> None:
    small, big = Case("t", "masked", 2, 20, 128, 128, max_m=30), Case("t", "offsets", 2, 50, 128, 128)
    first = build(small)
    assert build(big, reuse=first).b is first.b and build(big, reuse=first.weights).b is first.b
    assert build(big, seed=1, reuse=first).b is not first.b
    assert build(Case("t", "offsets", 2, 50, 128, 256), reuse=first).b is not first.b


@pytest.mark.parametrize("case", SUITES["cpu-small"][::5], ids=lambda c: c.id)
def test_hollow_inputs_have_the_shapes_of_real_ones(case: Case) -> None:
    real, hollow = build(case), build(case, hollow=True)
    for x, y in ((real.a, hollow.a), (real.b, hollow.b)):
        assert x.shape == y.shape and x.scale.shape == y.scale.shape and x.scale.stride() == y.scale.stride()


@pytest.mark.parametrize("order", ["sorted", "reversed", "repeated"])
def test_contiguous_ids_mark_every_row(order: str) -> None:
    case = Case("t", "contiguous", 4, 30, 128, 128, sizes="empty:0.3", order=order, alignment=32, slack=3)
    ids = make_layout(case, torch.device("cpu")).index
    assert ids.numel() == case.a_rows and [int((ids == g).sum()) for g in range(4)] == list(case.group_sizes)
    assert (ids[-3:] == -1).all()
    assert all(start % 32 == 0 for _, start, _ in case.segments)


# ---- what a wrong kernel does -----------------------------------------------------------------------------------------

def test_guards_notice_a_write_on_either_side() -> None:
    g = guarded_empty((3, 5), torch.bfloat16, "cpu")
    g.assert_clean([g.tensor])
    base = g.buffer
    for at, text in ((g.guard - 1, "before"), (g.guard + 3 * 5 * 2, "past"), (0, "before"), (base.numel() - 1, "past")):
        g.reset()
        base[at] = 0
        assert g.faults() == [f"wrote {text} the output"]
    g.reset()
    g.tensor[2, 4] = 1.0
    assert g.faults() == []
    with pytest.raises(AssertionError, match=r"wrote rows that belong to no group \(part 1 of 2\)"):
        g.assert_clean([g.tensor[:2], g.tensor[2:]])
    assert g.tensor[:2].isnan().all()


@pytest.mark.parametrize(("layout", "extra"), [("masked", {"max_m": 40}), ("offsets", {"slack": 9})])
def test_rows_outside_every_group_must_stay(layout: str, extra: dict) -> None:
    inputs = build(Case("t", layout, 3, 20, 128, 128, sizes="uniform:0.7:1.3", **extra))
    inputs.call()
    assert inputs.faults() == []
    inputs.padding(inputs.out.tensor)[-1][0, 7] = 0.0
    assert "belong to no group" in inputs.faults()[0]


def test_padding_rows_of_a_contiguous_layout_must_be_zero_or_stay() -> None:
    for zero in (True, False):
        inputs = build(Case("t", "contiguous", 2, 90, 128, 128, zero_padding=zero))
        inputs.call()
        assert inputs.faults() == []
        inputs.padding(inputs.out.tensor)[0][0, 0] = 3.0
        assert inputs.faults() == ["padding rows are not zero" if zero else
                                   "wrote rows that belong to no group (part 0 of 2)"]


def test_an_empty_group_of_a_weight_gradient_must_be_zero() -> None:
    inputs = build(Case("t", "k_grouped", 3, 32, 32, 128, b=FP8_1x128, sizes="few:1", out_dtype="fp32"))
    inputs.call()
    assert inputs.faults() == []
    empty = inputs.case.group_sizes.index(0)
    inputs.out.tensor[empty, 0, 0] = 1.0
    assert inputs.faults() == [f"group {empty} is empty and its output is not zero"]


def test_gates_notice_what_was_not_written() -> None:
    inputs = build(Case("t", "offsets", 3, 20, 128, 128))
    inputs.call()
    inputs.rows(inputs.out.tensor, 1)[-1, -1] = float("nan")
    result = inputs.check()
    assert not result.ok and result.get("kernel").group == 1


@pytest.mark.parametrize("plant", ["swap", "scale", "row", "column", "round"])
def test_gates_notice_a_planted_error(plant: str) -> None:
    inputs = build(Case("t", "masked", 3, 40, 256, 512, max_m=64, sizes="uniform:0.7:1.3"))
    true_scale = inputs.a.scale.clone()
    if plant == "scale":    # K block 1 with the scales of block 0
        inputs.a.scale[1, :, 1] = inputs.a.scale[1, :, 0]
    if plant == "swap":     # two groups' weights
        inputs.b.data[:2] = inputs.b.data[:2].flip(0).clone()
    inputs.call()
    y = inputs.out.tensor
    if plant == "row":      # one row from its neighbour
        y[2, 3] = y[2, 4]
    if plant == "column":   # one column off by 1/16
        y[2, :, 100] *= 1.0625
    if plant == "round":    # half a percent too much everywhere
        y.copy_((y.float() * 0.9 + y.float() * 0.1 * 1.05).to(y.dtype))
    inputs.a.scale.copy_(true_scale)
    if plant == "swap":
        inputs.b.data[:2] = inputs.b.data[:2].flip(0).clone()
    assert not inputs.check(recipe=False).ok


def test_accumulating_adds_to_what_was_there() -> None:
    inputs = build(Case("t", "contiguous", 3, 20, 128, 128, sizes="uniform:0.7:1.3", accumulate=True, order="repeated",
                        alignment=1))
    inputs.verify()
    inputs.call()  # once more: the base of the second call is the result of the first
    assert not inputs.check().ok


def test_the_plan_is_the_one_a_call_follows() -> None:
    inputs = build(Case("t", "offsets", 3, 20, 128, 128))
    plan = inputs.plan(backend="reference")
    assert plan.backend == "reference" and plan.problem.layout == "offsets" and plan.problem.n == 128
    assert build(Case("t", "dense", 1, 0, 128, 128)).plan() is None


def test_repeats_have_to_be_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = build(Case("t", "offsets", 3, 20, 128, 128))
    inputs.verify_repeats(2, backend="reference")
    call, made = type(inputs).call, []

    def wavering(self, **options):
        out = call(self, **options)
        made.append(out)
        if len(made) == 3:
            out.view(torch.int16)[-1, -1] ^= 1
        return out

    monkeypatch.setattr(type(inputs), "call", wavering)
    with pytest.raises(AssertionError, match="other bits"):
        inputs.verify_repeats(2, backend="reference")
