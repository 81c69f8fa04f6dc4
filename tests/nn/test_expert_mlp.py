"""`ExpertMLP`: weights quantised once for as long as they last, delayed scales, main gradients, state."""

from __future__ import annotations

import copy

import pytest
import torch

from narrowgemm.nn import ExpertMLP
from narrowgemm.nn import expert_mlp as module
from narrowgemm.ops.expert_mlp import expert_mlp
from narrowgemm.testing.numerics import calc_diff

LENS = torch.tensor([5, 0, 27])
E, H, I = 3, 64, 128


def made(recipe: str = "block", **options) -> ExpertMLP:
    torch.manual_seed(0)
    return ExpertMLP(E, H, I, recipe=recipe, **options)


def sample(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(int(LENS.sum()), H, generator=g).bfloat16() for _ in range(2))


@pytest.fixture
def counted(monkeypatch) -> list:
    """How often weights are quantised."""
    calls: list = []
    real = module.quantize_weight
    monkeypatch.setattr(module, "quantize_weight", lambda *args: calls.append(args[0].shape) or real(*args))
    return calls


def test_micro_batches_share_the_quantised_weights(counted):
    mlp = made("rowwise", dtype=torch.bfloat16)
    for seed in range(3):
        x, dy = sample(seed)
        mlp(x, LENS).backward(dy)
    assert len(counted) == 2 and mlp.gate_up.grad is not None
    with torch.no_grad():
        mlp.down.mul_(2)
    y = mlp(x, LENS)
    assert counted[2:] == [mlp.down.shape]
    assert torch.equal(y, expert_mlp(x, mlp.gate_up, mlp.down, LENS, recipe="rowwise"))
    mlp.down.data.fill_(1)      # its version says nothing
    assert torch.equal(mlp(x, LENS), y)
    mlp.invalidate()
    assert not torch.equal(mlp(x, LENS), y) and len(counted) == 5


def test_weights_that_were_replaced_are_quantised_anew(counted):
    """By another tensor, of whatever version, or for another recipe; copies hold no weights but their own."""
    mlp = made("rowwise")
    x, _ = sample()
    mlp(x, LENS)
    assert not copy.deepcopy(mlp)._cached and mlp._cached
    mlp.gate_up.data = mlp.gate_up.data.flip(0)
    assert torch.equal(mlp(x, LENS), expert_mlp(x, mlp.gate_up, mlp.down, LENS, recipe="rowwise")) and len(counted) == 3
    mlp.recipe = "block"
    assert torch.equal(mlp(x, LENS), expert_mlp(x, mlp.gate_up, mlp.down, LENS, recipe="block")) and len(counted) == 5


def test_every_option_reaches_the_op(monkeypatch):
    options = {"recipe": "rowwise", "element": "e5m2", "grads": "e4m3", "activation": "swiglu_oai", "args": (1.7, 7.0), "fast_accum": True,
               "max_sms": 9}
    given: dict = {}
    monkeypatch.setattr(module, "expert_mlp", lambda *a, **kw: given.update(kw))
    made(**options)(sample()[0], LENS)
    assert {k: given[k] for k in options} == options


def test_quantized_once_for_what_is_inside(counted):
    mlp = made()
    x, _ = sample()
    want = mlp(x, LENS)
    with mlp.quantized():
        for _ in range(2):
            mlp.gate_up.data.add_(0)
            assert torch.equal(mlp(x, LENS), want)
        assert len(counted) == 4
    assert mlp._held is None and made("bf16")._weights() is None


def test_a_capture_quantises_for_itself(counted, monkeypatch):
    """What a graph uses must be made in it: the cache is neither read nor written."""
    mlp = made()
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert mlp._weights() is None and not counted


def test_delayed_scales_follow_the_largest_magnitudes():
    mlp, plain = made("tensorwise", delayed=True, history=2, grads="e5m2"), made("tensorwise", grads="e5m2")
    x, dy = sample()
    seen = []
    for factor in (1.0, 4.0, 1.0, 1.0):
        for m in (mlp, plain):
            m.zero_grad()
            y = m((x * factor).bfloat16(), LENS)
            y.backward(dy)
        seen.append(mlp.amax[:, 0].clone())
        mlp.update_scales()
        past = torch.stack(seen[-2:]).amax(0)
        torch.testing.assert_close(mlp.scale[:, 0], past / torch.tensor([448.0, 448.0, 57344.0, 57344.0]), rtol=1e-6, atol=0)
        assert not mlp.amax.any()
    # scales of the same magnitudes, or larger ones
    assert calc_diff(mlp.gate_up.grad, plain.gate_up.grad) < 3e-2 and seen[1][0] == 4 * seen[0][0]
    mlp.amax.fill_(float("inf"))        # an overflow is not remembered
    mlp.update_scales()
    assert mlp.scale.isfinite().all() and bool((mlp.scale[:, 0] > 0).all())
    other = made("tensorwise", delayed=True, history=2, grads="e5m2")
    other.load_state_dict(mlp.state_dict())
    assert torch.equal(other(x, LENS), mlp(x, LENS)) and torch.equal(copy.deepcopy(mlp)(x, LENS), mlp(x, LENS))


def test_steps_without_tokens_say_nothing_of_scales():
    """A rank of expert parallelism may have none in its first step, and in later ones."""
    def step(mlp, tokens):
        mlp.zero_grad()
        x, dy = (t[:tokens].requires_grad_(i == 0) for i, t in enumerate(sample()))
        y = mlp(x, LENS if tokens else torch.zeros_like(LENS))
        y.backward(dy)
        return y

    one, two = made("tensorwise", delayed=True, history=2), made("tensorwise", delayed=True, history=2)
    for tokens in (0, 32, 0, 0, 0, 32, 32):
        step(one, tokens)
        one.update_scales()
        if tokens:
            step(two, tokens)
            two.update_scales()
        for name in module.STATE:
            assert torch.equal(getattr(one, name), getattr(two, name)), (tokens, name)
    assert one.scale[:, 0].gt(0).all() and torch.equal(step(one, 32), step(two, 32))
    step(one, 0)        # a micro-batch without tokens beside one that has some
    one.update_scales()
    two.update_scales()
    assert torch.equal(one.scale, two.scale)


def test_sharded_checkpoints_keep_all_of_the_state(tmp_path):
    """They load in place: into a state of the same size, whether scales are known or not."""
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    one, two = (made("tensorwise", delayed=True) for _ in range(2))
    x, _ = sample()
    one(x, LENS)
    one.update_scales()
    checkpoint.save(one.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    state = two.state_dict()
    assert all(isinstance(t, torch.Tensor) for t in state.values())
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    two.load_state_dict(state)
    assert two._ready and torch.equal(one(x, LENS), two(x, LENS))


def test_main_gradients():
    mlp, plain = made("block"), made("block")
    x, dy = sample()
    for w in (mlp.gate_up, mlp.down):
        w.main_grad = torch.zeros(w.shape)
    for _ in range(2):
        mlp(x, LENS).backward(dy)
    plain(x, LENS).backward(dy)
    assert mlp.gate_up.grad is None
    for name in ("gate_up", "down"):
        assert calc_diff(getattr(mlp, name).main_grad, 2 * getattr(plain, name).grad) < 5e-6


def test_compiled():
    mlp = made("rowwise")
    x, _ = sample()
    y = torch.compile(lambda a: mlp(a, LENS) * 2, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, mlp(x, LENS) * 2)


def test_what_it_says_and_refuses():
    assert "rowwise, e4m3, gradients e5m2" in repr(made("rowwise", grads="e5m2")) and "delayed" in repr(made("tensorwise", delayed=True))
    for call in (lambda: made("int4"), lambda: made("block", delayed=True), lambda: made("tensorwise", delayed=True, history=0),
                 lambda: made("block").update_scales()):
        with pytest.raises(ValueError, match="expected"):
            call()
    for change, match in (({"inter": None}, "inter: got NoneType"), ({"hidden": 64.0}, "hidden: got float"), ({"dtype": "bf16"}, "dtype: got bf16"),
                          ({"dtype": torch.float8_e4m3fn}, "dtype: got torch.float8_e4m3fn, expected one of")):
        with pytest.raises(TypeError, match=match):
            ExpertMLP(**{"num_experts": E, "hidden": H, "inter": I} | change)
    with pytest.raises(ValueError, match="hidden: got 0, expected at least 1"):
        ExpertMLP(E, 0, I)
