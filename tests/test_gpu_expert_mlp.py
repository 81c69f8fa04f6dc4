"""On a GPU: the expert MLP in training against FP32, in CUDA graphs, bit-equal repeats, no synchronisation, any size."""

from __future__ import annotations

import gc

import pytest
import torch

import narrowgemm as ng
from narrowgemm.formats import FP8_TENSOR, FP8_1x128
from narrowgemm.nn import ExpertMLP
from narrowgemm.ops.expert_mlp import RECIPES, expert_mlp
from narrowgemm.reference.activate import activate, activate_backward
from narrowgemm.testing.numerics import calc_diff

from ._graphs import unsynchronised

pytestmark = pytest.mark.gpu
LENS = [500, 0, 1300, 40, 3000, 1]
H, I = 1024, 768


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    g = torch.Generator("cuda").manual_seed(0)
    x, dy = (torch.randn(sum(LENS), H, device="cuda", generator=g).bfloat16() for _ in range(2))
    w1, w2 = (torch.randn(len(LENS), *s, device="cuda", generator=g).mul_(s[1]**-0.5).to(dtype) for s in ((2 * I, H), (H, I)))
    return x.requires_grad_(), w1.requires_grad_(), w2.requires_grad_(), dy, torch.tensor(LENS, device="cuda")


def run(x, w1, w2, dy, lens, **options) -> tuple[torch.Tensor, ...]:
    y = expert_mlp(x, w1, w2, lens, **options)
    return y.detach(), *torch.autograd.grad(y, (x, w1, w2), dy)


@pytest.mark.parametrize(("recipe", "grads"), [*((r, "e4m3") for r in RECIPES), ("block", "e5m2"), ("rowwise", "e5m2")])
def test_against_fp32(recipe: str, grads: str) -> None:
    """Values and gradients; ten repeats give the same bits; nothing waits for the device."""
    x, w1, w2, dy, lens = inputs(torch.float32 if grads == "e5m2" else torch.bfloat16)
    got = run(x, w1, w2, dy, lens, recipe=recipe, grads=grads)
    leaves = [t.detach().float().requires_grad_() for t in (x, w1, w2)]
    y = torch.cat([activate(a @ p.T) @ q.T for a, p, q in zip(leaves[0].split(LENS), *leaves[1:])])
    want = y.detach(), *torch.autograd.grad(y, leaves, dy.float())
    for a, b, fine in zip(got, want, (True, False, False, False)):
        limit = 5e-5 if recipe == "bf16" else 4e-3 if fine or grads == "e4m3" else 1.5e-2
        assert calc_diff(a.float(), b) < limit
    assert not got[2][1].any() and not got[3][1].any()
    with unsynchronised():
        repeats = [run(x, w1, w2, dy, lens, recipe=recipe, grads=grads) for _ in range(10)]
    for other in repeats:
        assert all(torch.equal(a, b) for a, b in zip(got, other))


@pytest.mark.parametrize("recipe", ["bf16", "tensorwise", "delayed", "rowwise", "block"])
def test_steps_in_a_graph(recipe: str) -> None:
    """Two micro-batches into main gradients and an update of the weights, as one graph: replays quantise the new weights."""
    x, w1, w2, dy, lens = inputs(torch.float32)
    delayed = recipe == "delayed"

    def made() -> ExpertMLP:
        mlp = ExpertMLP(len(LENS), H, I, recipe="tensorwise" if delayed else recipe, delayed=delayed, device="cuda")
        with torch.no_grad():
            mlp.gate_up.copy_(w1)
            mlp.down.copy_(w2)
        for w in (mlp.gate_up, mlp.down):
            w.main_grad = torch.zeros_like(w)
        return mlp

    def step(mlp: ExpertMLP) -> None:
        with mlp.quantized():
            for _ in range(2):
                mlp(x.detach(), lens).backward(dy)
        if delayed:
            mlp.update_scales()
        with torch.no_grad():
            for w in (mlp.gate_up, mlp.down):
                w.sub_(w.main_grad, alpha=1e-4)
                w.main_grad.zero_()

    eager, graphed = made(), made()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(graphed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(graphed)
    for _ in range(2):
        graph.replay()
    for _ in range(4):
        step(eager)
    graphed.invalidate()
    for a, b in ((eager.gate_up, graphed.gate_up), (eager.down, graphed.down)):
        assert torch.equal(a, b)
    assert torch.equal(eager(x, lens), graphed(x, lens))


def test_compiled() -> None:
    x, w1, w2, dy, lens = inputs()
    f = torch.compile(lambda a, b, c: expert_mlp(a, b, c, lens, recipe="block") * 2, fullgraph=True)
    y, want = f(x, w1, w2), expert_mlp(x, w1, w2, lens, recipe="block") * 2
    assert torch.equal(y, want)
    for a, b in zip(torch.autograd.grad(y, (x, w1, w2), dy), torch.autograd.grad(want, (x, w1, w2), dy)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fmt", [FP8_TENSOR, FP8_1x128], ids=lambda f: f.name)
def test_activation_of_more_than_2_31_elements(fmt) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    t, inter = 270_000, 4096
    h = torch.randn(t, 2 * inter, device="cuda", dtype=torch.bfloat16)
    d = torch.randn(t, inter, device="cuda", dtype=torch.bfloat16)
    assert h.numel() > 2**31
    layout = ng.Offsets(torch.tensor([0, 100_000, t], device="cuda"))
    got = ng.activate_backward(h, d, layout, fmt, scale=torch.full((1,), 0.02, device="cuda") if fmt == FP8_TENSOR else None)
    rows = torch.tensor([0, 99_999, 100_000, t - 1], device="cuda")
    want = activate_backward(h[rows], d[rows])
    part = got.rows.data[rows].float()
    scale = got.rows.scale if fmt == FP8_TENSOR else got.rows.scale[rows].repeat_interleave(128, 1)
    assert calc_diff(part * scale, want.float()) < 1e-3
    start = int(got.layout.offsets[1])
    columns = got.columns.data[:, [0, 99_999, start, start + t - 1 - 100_000]].float().T
    if fmt == FP8_TENSOR:
        assert torch.equal(columns, part)
    else:
        at = torch.tensor([0, 99_999 // 128, start // 128, (start + t - 1 - 100_000) // 128], device="cuda")
        assert calc_diff(columns * got.columns.scale[:, at].T, want.float()) < 1e-3
    assert activate(h[:1]).shape == (1, inter)
