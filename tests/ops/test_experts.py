"""`experts`: the whole layer against its definition, against the composition of the public steps, and its contracts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from narrowgemm import FP8_ROW, FP8_TENSOR, MXFP4, MXFP8, FP8_1x128, FP8_128x128, ScaledTensor, quantize, route
from narrowgemm.formats import BF16, Format
from narrowgemm.kernels.launching import READY
from narrowgemm.ops import common, experts_warm, recall
from narrowgemm.ops import experts as experts_module
from narrowgemm.ops.experts import compose, experts, experts_workspace
from narrowgemm.ops.experts_plan import activations_for
from narrowgemm.ops.steps import PLAIN
from narrowgemm.reference import experts as reference
from narrowgemm.testing.numerics import calc_diff

# A last bit of the first product moves a few roundings of the activation: a step of E4M3 is 2^-4 of a value, of E2M1 2^-2.
LIMITS = {"bf16": 1e-5, "fp16": 1e-5, "fp32": 1e-5, "e4m3": 1e-4, "e2m1": 1e-3}
WEIGHTS = [FP8_128x128, FP8_ROW, FP8_TENSOR, MXFP8, MXFP4, BF16]
HERE = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=HERE)
def where(request) -> str:
    """The CPU, where the reference runs, or the GPU and what is chosen there."""
    return request.param


def made(fmt: Format, experts_: int, hidden: int, inter: int, device: str, seed: int = 0) -> tuple[ScaledTensor, ScaledTensor]:
    gen = torch.Generator().manual_seed(seed)
    up = torch.randn(experts_, 2 * inter, hidden, generator=gen).div(hidden**0.5)
    down = torch.randn(experts_, hidden, inter, generator=gen).div(inter**0.5)
    if not fmt.scaled:
        return tuple(ScaledTensor(w.bfloat16().to(device), None, BF16) for w in (up, down))
    return tuple(quantize(w.to(device), fmt) for w in (up, down))


def tokens(t: int, hidden: int, device: str, seed: int = 1) -> torch.Tensor:
    return torch.randn(t, hidden, generator=torch.Generator().manual_seed(seed)).bfloat16().to(device)


def choices(t: int, top_k: int, experts_: int, device: str, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return route(torch.randn(t, experts_, generator=gen).to(device), top_k)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int16)


def close(got: torch.Tensor, want: torch.Tensor, fmt: Format) -> None:
    """The layer against its definition, activations in `fmt`; every token too, so that none hides behind the others."""
    limit = LIMITS[fmt.element]
    assert calc_diff(got.float(), want) <= limit
    assert all(calc_diff(g.float(), w) <= 20 * limit for g, w in zip(got, want))


def composed(x, up, down, **options) -> torch.Tensor:
    full = dict(router_logits=None, top_k=0, topk_weights=None, topk_ids=None, routing={}, router_bias=None,
                kind=("swiglu", (), False), fmt=None, gate_up_bias=None, down_bias=None, shared=None, shared_output=None,
                expert_map=None, first_expert=0, out=None, backend=None) | options
    return compose(x, up, down, **full)


@pytest.mark.parametrize("fmt", WEIGHTS, ids=lambda f: f.name)
@pytest.mark.parametrize("t", [1, 33])
def test_every_weight_format(where, fmt, t):
    """Against the definition over the same bits, and bit for bit the composition of the public steps."""
    up, down = made(fmt, 5, 256, 128, where)
    x = tokens(t, 256, where)
    weights, ids = choices(t, 2, 5, where)
    got = experts(x, up, down, topk_weights=weights, topk_ids=ids)
    want = reference.experts(x, up, down, weights, ids, activation_format=activations_for(fmt, BF16))
    close(got, want, activations_for(fmt, BF16))
    assert torch.equal(bits(got), bits(composed(x, up, down, topk_weights=weights, topk_ids=ids)))


@pytest.mark.parametrize("fmt", [FP8_1x128, MXFP8, MXFP4, BF16], ids=lambda f: f.name)
def test_mxfp4_weights_with_every_activation(where, fmt):
    up, down = made(MXFP4, 4, 256, 128, where)
    x = tokens(9, 256, where)
    weights, ids = choices(9, 2, 4, where)
    got = experts(x, up, down, topk_weights=weights, topk_ids=ids, activation_format=fmt)
    want = reference.experts(x, up, down, weights, ids, activation_format=fmt)
    close(got, want, fmt)


ROUTINGS = [dict(top_k=2), dict(top_k=3, scoring="sigmoid", num_expert_group=4, topk_group=2, scaling_factor=2.5),
            dict(top_k=1, renormalize=False)]


@pytest.mark.parametrize("options", ROUTINGS, ids=str)
def test_routing_from_logits(where, options):
    up, down = made(FP8_128x128, 8, 256, 128, where)
    x = tokens(11, 256, where)
    logits = torch.randn(11, 8, generator=torch.Generator().manual_seed(3)).to(where)
    bias = torch.linspace(-0.1, 0.1, 8, device=where) if "scoring" in options else None
    got = experts(x, up, down, router_logits=logits, router_bias=bias, **options)
    top_k = options["top_k"]
    weights, ids = route(logits, top_k, bias=bias, **{k: v for k, v in options.items() if k != "top_k"})
    assert torch.equal(bits(got), bits(experts(x, up, down, topk_weights=weights, topk_ids=ids)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_types_of_tokens(where, dtype):
    """Products, activation and result have the tokens' type; narrow weights, and weights of that type."""
    gen = torch.Generator().manual_seed(8)
    plain = [torch.randn(s, generator=gen).div(11).to(where, dtype) for s in ((4, 256, 128), (4, 128, 128))]
    weights, ids = choices(7, 2, 4, where)
    x = torch.randn(7, 128, generator=gen).to(where, dtype)
    for up, down in (made(FP8_128x128, 4, 128, 128, where), made(MXFP4, 4, 128, 128, where), plain):
        got = experts(x, up, down, topk_weights=weights, topk_ids=ids)
        up, down = common.as_operand(up, "up"), common.as_operand(down, "down")
        want = reference.experts(x, up, down, weights, ids, activation_format=activations_for(up.format, PLAIN[dtype]))
        assert got.dtype == dtype
        close(got, want, activations_for(up.format, PLAIN[dtype]))


@pytest.mark.parametrize(("experts_", "top_k"), [(1024, 16), (1024, 1), (16, 16), (1, 1)])
def test_many_experts_and_choices(where, experts_, top_k):
    up, down = made(FP8_128x128, experts_, 128, 128, where) if experts_ < 100 else (
        ScaledTensor(w.data.repeat(128, 1, 1), w.scale.repeat(128, 1, 1), w.format) for w in made(FP8_128x128, 8, 128, 128, where))
    x = tokens(3, 128, where)
    logits = torch.randn(3, experts_, generator=torch.Generator().manual_seed(3)).to(where)
    got = experts(x, up, down, router_logits=logits, top_k=top_k)
    weights, ids = route(logits, top_k)
    close(got, reference.experts(x, up, down, weights, ids, activation_format=FP8_1x128), FP8_1x128)


def test_gpt_oss_layer(where):
    """Interleaved, clamped, biased, sizes that are no multiple of 128."""
    up, down = made(MXFP4, 4, 192, 96, where)
    gen = torch.Generator().manual_seed(4)
    b1, b2 = torch.randn(4, 192, generator=gen).to(where), torch.randn(4, 192, generator=gen).to(where)
    x = tokens(13, 192, where) * 4
    weights, ids = choices(13, 3, 4, where)
    for args in ((), (1.5, 2.0)):
        options = dict(activation="swiglu_oai", activation_args=args, interleaved=True, gate_up_bias=b1, down_bias=b2)
        got = experts(x, up, down, topk_weights=weights, topk_ids=ids, **options)
        close(got, reference.experts(x, up, down, weights, ids, **options), BF16)


def test_shared_experts(where):
    up, down = made(FP8_128x128, 4, 256, 128, where)
    one = made(FP8_128x128, 1, 256, 384, where, seed=9)
    shared = (one[0][0], one[1][0])
    x = tokens(10, 256, where)
    weights, ids = choices(10, 2, 4, where)
    got = experts(x, up, down, topk_weights=weights, topk_ids=ids, shared=shared)
    want = reference.experts(x, up, down, weights, ids, activation_format=FP8_1x128, shared=shared)
    close(got, want, FP8_1x128)
    apart = composed(x, up, down, topk_weights=weights, topk_ids=ids, shared=shared)
    assert torch.equal(bits(got), bits(apart))
    given = torch.randn(10, 256, generator=torch.Generator().manual_seed(5)).bfloat16().to(where)
    got = experts(x, up, down, topk_weights=weights, topk_ids=ids, shared_output=given)
    want = reference.experts(x, up, down, weights, ids, activation_format=FP8_1x128, shared_output=given)
    close(got, want, FP8_1x128)


def test_expert_parallel_ranks_add_up(where):
    """Two ranks by range, and two by a map, sum to the layer on one."""
    up, down = made(FP8_128x128, 6, 256, 128, where)
    x = tokens(17, 256, where)
    weights, ids = choices(17, 3, 6, where)
    whole = reference.experts(x, up, down, weights, ids, activation_format=FP8_1x128)
    halves = [experts(x, up[a:a + 3], down[a:a + 3], topk_weights=weights, topk_ids=ids, first_expert=a) for a in (0, 3)]
    close(sum(h.float() for h in halves), whole, FP8_1x128)
    parts = []
    for own in ([0, 2, 5], [4, 1, 3]):
        table = torch.full((6,), -1, dtype=torch.int32)
        table[own] = torch.arange(3, dtype=torch.int32)
        mine = [ScaledTensor(w.data[own], w.scale[own], w.format) for w in (up, down)]
        parts.append(experts(x, *mine, topk_weights=weights, topk_ids=ids, expert_map=table.to(where)))
    close(sum(p.float() for p in parts), whole, FP8_1x128)


@pytest.mark.parametrize("ids", [[[0, 0]] * 4, [[-1, 9]] * 3, [[3, -1], [1, 3]]], ids=["repeated", "all skipped", "some"])
def test_odd_routings(where, ids):
    up, down = made(FP8_128x128, 4, 128, 128, where)
    ids = torch.tensor(ids, device=where)
    x = tokens(len(ids), 128, where)
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(6)).to(where)
    got = experts(x, up, down, topk_weights=weights, topk_ids=ids)
    want = reference.experts(x, up, down, weights, ids, activation_format=FP8_1x128)
    close(got, want, FP8_1x128)
    assert bool(got.isfinite().all())


def test_no_tokens(where):
    up, down = made(FP8_128x128, 4, 128, 128, where)
    assert experts(tokens(0, 128, where), up, down, router_logits=torch.zeros(0, 4, device=where), top_k=2).shape == (0, 128)
    assert experts_workspace(0, up, down, top_k=2) >= 0


def test_one_workspace_and_out_are_the_callers(where):
    """Enough is what `experts_workspace` says; what lay in it and behind it does not matter and is not touched."""
    up, down = made(FP8_128x128, 4, 256, 128, where)
    x = tokens(21, 256, where)
    weights, ids = choices(21, 2, 4, where)
    need = experts_workspace(21, up, down, top_k=2)
    buffer = torch.full((need + 512,), 0xFF, dtype=torch.uint8, device=where)
    skip = -buffer.data_ptr() % 256
    space = buffer[skip:skip + need]
    out = torch.full((21, 256), float("nan"), dtype=torch.bfloat16, device=where)
    assert experts(x, up, down, topk_weights=weights, topk_ids=ids, workspace=space, out=out) is out
    assert torch.equal(bits(out), bits(experts(x, up, down, topk_weights=weights, topk_ids=ids)))
    assert bool((buffer[:skip] == 0xFF).all() and (buffer[skip + need:] == 0xFF).all())
    with pytest.raises(ValueError, match="workspace bytes"):
        experts(x, up, down, topk_weights=weights, topk_ids=ids, workspace=space[:256])


@pytest.mark.parametrize("fmt", [FP8_128x128, FP8_ROW], ids=lambda f: f.name)
def test_batch_invariant(where, fmt):
    """A token's bits are the same alone, in a small batch and in a large one."""
    up, down = made(fmt, 4, 256, 256, where)
    x = tokens(700, 256, where)
    weights, ids = choices(700, 2, 4, where)
    whole = experts(x, up, down, topk_weights=weights, topk_ids=ids, batch_invariant=True)
    for n in (1, 5, 64):
        part = experts(x[:n], up, down, topk_weights=weights[:n], topk_ids=ids[:n], batch_invariant=True)
        assert torch.equal(bits(part), bits(whole[:n]))


class Ready:
    """In place of a step's bound launches: notes what it is called with, and launches nothing."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, addresses) -> bool:
        self.seen.append(addresses)
        return False


class Joined:
    """In place of all steps' launches as one: hands each step its addresses."""

    def __init__(self, parts, operands: int) -> None:
        self.parts, self.operands, self.answer = parts, operands, True

    def launch(self, addresses) -> bool:
        assert len(addresses) == self.operands
        for ready, at in self.parts:
            ready.seen.append(tuple(addresses[i] for i in at))
        return self.answer


@pytest.fixture
def warm(monkeypatch) -> Callable[[dict[str, dict]], list[Joined]]:
    """Binds the steps of a plan to nothing; what their launches are put into comes back as it is made."""
    made: list[Joined] = []

    def joined(parts, operands: int) -> Joined:
        made.append(Joined(parts, operands))
        return made[-1]

    def bind(memos: dict[str, dict]) -> list[Joined]:
        for memo in memos.values():
            memo[READY] = Ready()
        return made

    if recall._maker() is None:
        pytest.skip("this torch's guards are not what they were")
    monkeypatch.setattr(experts_warm, "joined", joined)
    monkeypatch.setattr(experts_module, "_calls", recall.Calls())
    return bind


def aligned(x: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """A copy that starts `offset` bytes behind a multiple of 64."""
    raw = torch.zeros(x.nbytes + 128, dtype=torch.uint8)
    start = -raw.data_ptr() % 64 + offset
    return raw[start:start + x.nbytes].view(x.dtype).view(x.shape).copy_(x)


@pytest.mark.parametrize("shared", [False, True])
def test_warm_calls_hand_bound_launches_the_right_addresses(warm, shared):
    """The addresses of a warm call, for which no tensor is made, are those that the steps had as tensors."""
    up, down = made(FP8_128x128, 3, 128, 128, "cpu")
    x, logits = aligned(tokens(6, 128, "cpu")), aligned(torch.randn(6, 3))
    extra = {"shared": (up[0], down[0])} if shared else {}
    spaces = [aligned(torch.empty(experts_workspace(6, up, down, top_k=2, **extra), dtype=torch.uint8)) for _ in range(2)]

    def call(space, out) -> torch.Tensor:
        return experts(x, up, down, router_logits=logits, top_k=2, workspace=space, out=out, **extra)

    outs = [aligned(x) for _ in range(2)]
    want = call(spaces[0], outs[0]).clone()
    plan = experts_module._plans.newest().memo["plan"]
    assert plan.whole is None                          # nothing is bound on a CPU
    joined = warm(plan.memos)
    slow = []
    for space, out in zip(spaces, outs):
        plan.whole = None
        experts_module._calls = recall.Calls()
        assert torch.equal(bits(call(space, out)), bits(want))
        slow.append({name: memo[READY].seen[-1] for name, memo in plan.memos.items()})
    for space, out, seen in zip(spaces, outs, slow):
        out.fill_(7.0)
        assert bool((call(space, out) == 7.0).all())   # the steps are left to the bound launches
        assert {name: memo[READY].seen[-1] for name, memo in plan.memos.items()} == seen
    joined[-1].answer = False                          # they can't: the steps run
    assert torch.equal(bits(call(spaces[0], outs[0])), bits(want))


def test_a_tensor_that_is_two_arguments_is_not_noted(warm):
    up, down = made(FP8_128x128, 3, 128, 128, "cpu")
    x, (weights, ids) = tokens(6, 128, "cpu"), choices(6, 2, 3, "cpu")
    experts(x, up, down, topk_weights=weights, topk_ids=ids, shared_output=x)
    plan = experts_module._plans.newest().memo["plan"]
    joined = warm(plan.memos)
    experts(x, up, down, topk_weights=weights, topk_ids=ids, shared_output=x)
    assert plan.whole is None and not joined


OTHERS = {
    "bias of the other product": lambda a: a.update(gate_up_bias=None, down_bias=a["gate_up_bias"]),
    "rows of x": lambda a: a.update(x=aligned(torch.cat([a["x"], a["x"]], 1))[:, :256]),
    "dtype of ids": lambda a: a.update(topk_ids=aligned(a["topk_ids"].long())),
    "alignment of ids": lambda a: a.update(topk_ids=aligned(a["topk_ids"], 4)),
    "an option": lambda a: a.update(batch_invariant=True),
    "the activation": lambda a: a.update(activation="swiglu_oai"),
    "a workspace": lambda a: a.update(workspace=aligned(torch.zeros(1 << 20, dtype=torch.uint8))),
    "scales of weights": lambda a: a.update(down=ScaledTensor(a["down"].data, a["down"].scale.mT.contiguous().mT, a["down"].format)),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_a_call_that_differs_is_not_taken_for_one_that_was_seen(warm, change):
    up, down = made(FP8_128x128, 3, 256, 128, "cpu")
    (weights, ids), x = choices(6, 2, 3, "cpu"), tokens(6, 256, "cpu")
    bias = torch.linspace(-1, 1, 3 * 256).view(3, 256)
    call = dict(x=aligned(x), gate_up=up, down=down, topk_weights=aligned(weights), topk_ids=aligned(ids), gate_up_bias=aligned(bias))
    experts(**call)
    warm(experts_module._plans.newest().memo["plan"].memos)
    experts(**call)
    experts(**call)          # by the launches: its output is not written
    count = len(experts_module._calls.known)
    assert count == 1
    change(call)
    got = experts(**call)
    assert torch.equal(bits(got), bits(composed(call["x"], up, call["down"], topk_weights=weights, topk_ids=ids,
                                                gate_up_bias=call["gate_up_bias"], down_bias=call.get("down_bias"),
                                                kind=(call.get("activation", "swiglu"), (), False))))


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", [FP8_128x128, FP8_ROW], ids=lambda f: f.name)
@pytest.mark.parametrize("t", [3, 300])
def test_graph_replay_with_changed_routing(fmt, t):
    """Captured once, without a sync; replayed with other tokens and other routing: an eager call's bits."""
    up, down = made(fmt, 8, 512, 256, "cuda")
    x = tokens(t, 512, "cuda")
    logits = torch.randn(t, 8, device="cuda")
    space = torch.empty(experts_workspace(t, up, down, top_k=2), dtype=torch.uint8, device="cuda")
    out = torch.empty_like(x)

    def call() -> None:
        experts(x, up, down, router_logits=logits, top_k=2, workspace=space, out=out)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for seed in range(4):
        x.copy_(tokens(t, 512, "cuda", seed + 10))
        logits.copy_(torch.randn(t, 8))
        if seed == 3:
            logits.fill_(0.0)
        space.fill_(0xFF)
        graph.replay()
        first = out.clone()
        space.fill_(0xFF)
        out.fill_(float("nan"))
        call()
        assert torch.equal(bits(first), bits(out))
        weights, ids = route(logits, 2)
        want = reference.experts(x, up, down, weights, ids, activation_format=activations_for(fmt, BF16))
        close(out, want, activations_for(fmt, BF16))


X = torch.zeros(4, 128, dtype=torch.bfloat16)
UP, DOWN = made(FP8_128x128, 2, 128, 128, "cpu")
IDS, W = torch.zeros(4, 2, dtype=torch.int32), torch.ones(4, 2)


@pytest.mark.parametrize(("change", "error", "says"), [
    (dict(x=X[:, :64]), ValueError, "hidden size"),
    (dict(x=X.long()), TypeError, "x, dtype"),
    (dict(gate_up=ScaledTensor(UP.data[0], UP.scale[0], UP.format)), ValueError, "gate_up, shape"),
    (dict(down=UP), ValueError, "down, shape"),
    (dict(topk_weights=None), ValueError, "routing"),
    (dict(topk_weights=W.half()), TypeError, "topk_weights, dtype"),
    (dict(topk_weights=W[:, :1]), ValueError, "topk_weights, shape"),
    (dict(topk_ids=IDS[:3]), ValueError, "topk_ids, shape"),
    (dict(router_logits=torch.zeros(4, 2), top_k=1), ValueError, "routing"),
    (dict(router_logits=torch.zeros(3, 2), top_k=1, topk_weights=None, topk_ids=None), ValueError, "router_logits, rows"),
    (dict(router_logits=torch.zeros(4, 2), top_k=3, topk_weights=None, topk_ids=None), ValueError, "top_k"),
    (dict(activation="relu"), ValueError, "activation"),
    (dict(activation_args=(1.0, 2.0)), ValueError, "activation_args"),
    (dict(activation_format="fp8_tensor"), ValueError, "fp8_row"),
    (dict(activation_format="fp16"), ValueError, "activation_format"),
    (dict(gate_up_bias=torch.zeros(2, 128)), ValueError, "gate_up_bias, shape"),
    (dict(down_bias=torch.zeros(2, 128).long()), TypeError, "down_bias, dtype"),
    (dict(shared=(UP[0], UP[0])), ValueError, "shared"),
    (dict(shared=(UP[0], DOWN[0]), shared_output=X), ValueError, "one of them"),
    (dict(shared_output=X[:2]), ValueError, "shared_output, shape"),
    (dict(out=X[:2]), ValueError, "out, shape"),
    (dict(workspace=torch.zeros(8)), ValueError, "workspace"),
    (dict(expert_map=torch.zeros(2)), TypeError, "expert_map"),
    (dict(backend="nothing"), ValueError, "backend"),
])
def test_bad_input(change, error, says):
    call = dict(x=X, gate_up=UP, down=DOWN, topk_weights=W, topk_ids=IDS) | change
    with pytest.raises(error, match=says):
        experts(call.pop("x"), call.pop("gate_up"), call.pop("down"), **call)


def test_operands_are_named():
    assert common.as_operand(X, "x").format is BF16
