"""`nn.Experts`: the op's numbers, a state_dict that goes round, and weights that keep their types."""

from __future__ import annotations

import pytest
import torch

from narrowgemm import MXFP4, MXFP8, FP8_1x128, FP8_128x128, prepack, quantize, route
from narrowgemm.nn import Experts
from narrowgemm.nn import experts as module_of_experts
from narrowgemm.ops.experts import experts


def weights(seed: int, e: int = 4, hidden: int = 128, inter: int = 128):
    gen = torch.Generator().manual_seed(seed)
    return (quantize(torch.randn(e, 2 * inter, hidden, generator=gen) / 11, FP8_128x128),
            quantize(torch.randn(e, hidden, inter, generator=gen) / 11, FP8_128x128))


def module(seed: int, **options) -> Experts:
    up, down = weights(seed)
    s_up, s_down = weights(seed + 100, 1)
    return Experts(up, down, top_k=2, shared=(s_up[0], s_down[0]), router_bias=torch.linspace(0, 1, 4), scoring="sigmoid",
                   gate_up_bias=torch.randn(4, 256, generator=torch.Generator().manual_seed(seed)), **options)


X = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(9)).bfloat16()
LOGITS = torch.randn(10, 4, generator=torch.Generator().manual_seed(10))


def test_forward_is_the_op():
    m = module(0)
    want = experts(X.view(10, 128), m.weight("gate_up"), m.weight("down"), router_logits=LOGITS, top_k=2,
                   scoring="sigmoid", router_bias=m.router_bias, shared=m.shared, gate_up_bias=m.gate_up_bias)
    assert torch.equal(m(X, LOGITS), want.view(X.shape))
    w, ids = route(LOGITS, 2, scoring="sigmoid", bias=m.router_bias)
    space = torch.empty(m.workspace_bytes(10), dtype=torch.uint8)
    assert torch.equal(m(X, topk_weights=w, topk_ids=ids, workspace=space), want.view(X.shape))
    assert m.num_experts == 4 and "top_k 2" in repr(m)


def test_every_option_reaches_the_op_and_its_workspace(monkeypatch):
    up, down = weights(0)
    options = {"activation": "swiglu_oai", "activation_args": (1.7, 7.0), "interleaved": True, "activation_format": FP8_1x128,
               "first_expert": 4, "batch_invariant": True, "backend": "reference", "top_k": 2}
    routing = {"scoring": "sigmoid", "renormalize": False, "num_expert_group": 2, "topk_group": 1, "scaling_factor": 2.5}
    tensors = {"gate_up_bias": torch.ones(4, 256), "down_bias": torch.ones(4, 128), "router_bias": torch.ones(4), "expert_map": torch.arange(8)}
    m = Experts(up, down, **options, **routing, **tensors)
    given: dict = {}
    monkeypatch.setattr(module_of_experts, "experts", lambda x, *w, **kw: given.update(kw) or x)
    own = {"router_logits": LOGITS, "workspace": torch.empty(8, dtype=torch.uint8), "out": torch.empty(10, 128), "shared_output": X}
    m(X, **own)
    assert {k: given[k] for k in options | routing} == options | routing
    assert all(given[k] is t for k, t in own.items()) and all(torch.equal(given[k], t) for k, t in tensors.items())
    given.clear()
    monkeypatch.setattr(module_of_experts, "experts_workspace", lambda *w, **kw: given.update(kw) or 0)
    m.workspace_bytes(10, num_experts=32, dtype=torch.float16)
    want = {k: v for k, v in options.items() if k != "first_expert"} | {"num_experts": 32, "num_expert_group": 2, "dtype": torch.float16, "bias": True}
    assert {k: given[k] for k in want} == want


def test_state_dict_goes_round(tmp_path):
    one, two = module(0), module(1)
    assert not torch.equal(one(X, LOGITS), two(X, LOGITS))
    torch.save(one.state_dict(), tmp_path / "state.pt")
    two.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(one(X, LOGITS), two(X, LOGITS))
    state = one.state_dict()
    state["_extra_state"] = {"gate_up": "mxfp8", "down": "mxfp8"}
    with pytest.raises(ValueError, match="formats"):
        two.load_state_dict(state)
    for other, error in ((torch.ones(4), TypeError), (torch.ones(4, dtype=torch.uint8), ValueError)):
        state["_extra_state"] = other
        with pytest.raises(error, match="extra state of a module"):
            two.load_state_dict(state)


@pytest.mark.parametrize("order", ["bf16", "fp8"])
@pytest.mark.parametrize("pair", ["", "halves"])
def test_every_order_of_packed_weights(order, pair):
    up, down = (quantize(w.dequantize(), MXFP4) for w in weights(3))
    packed = prepack(up, pair=pair, activations=order), prepack(down, activations=order)
    m = Experts(*packed, top_k=2)
    assert [m.weight(n).prepack for n in ("gate_up", "down")] == [p.prepack for p in packed]
    assert torch.equal(m(X, LOGITS).view(10, 128), experts(X.view(10, 128), *packed, router_logits=LOGITS, top_k=2))
    with pytest.raises(ValueError, match="formats in the state"):
        other = "fp8" if order == "bf16" else "bf16"
        Experts(prepack(up, pair=pair, activations=other), prepack(down, activations=other), top_k=2).load_state_dict(m.state_dict())


def test_shared_experts_packed_in_their_own_order():
    """MXFP8 for MXFP8 activations: dense weights that stay as they are."""
    up, down = (quantize(w.dequantize(), MXFP8) for w in weights(4))
    s_up, s_down = (quantize(w.dequantize()[0], MXFP8) for w in weights(104, 1))
    both = prepack(up), prepack(down)
    want = experts(X.view(10, 128), *both, router_logits=LOGITS, top_k=2, shared=(s_up, s_down))
    shared = prepack(s_up, activations="mxfp8"), prepack(s_down, activations="mxfp8")
    assert shared[0].plain is not None
    assert torch.equal(experts(X.view(10, 128), *both, router_logits=LOGITS, top_k=2, shared=shared), want)
    m = Experts(*both, top_k=2, shared=shared)
    assert torch.equal(m(X, LOGITS).view(10, 128), want)
    assert m.workspace_bytes(10) > 0


@pytest.mark.parametrize("packed", [False, True])
def test_safetensors_keep_all_of_the_state(tmp_path, packed):
    safetensors = pytest.importorskip("safetensors.torch")

    def made(seed: int) -> Experts:
        up, down = (w if not packed else quantize(w.dequantize(), MXFP4) for w in weights(seed))
        return Experts(prepack(up, pair="halves") if packed else up, prepack(down) if packed else down, top_k=2)

    one, two = made(0), made(1)
    safetensors.save_file(one.state_dict(), tmp_path / "state.safetensors")
    two.load_state_dict(safetensors.load_file(tmp_path / "state.safetensors"))
    assert torch.equal(one(X, LOGITS), two(X, LOGITS))


def test_exported():
    """By torch.export, over packed weights, some of whose tensors are not there."""
    up, down = (prepack(quantize(w.dequantize(), MXFP4), pair=pair) for w, pair in zip(weights(0), ("halves", "")))
    m = Experts(up, down, top_k=2, gate_up_bias=torch.randn(4, 256))
    program = torch.export.export(m, (X, LOGITS), strict=False)
    assert torch.equal(program.module()(X, LOGITS), m(X, LOGITS))


def test_prepacked_weights(tmp_path):
    """The same module over packed weights: forward is the op, a state_dict goes round, and one of another packing is refused."""
    def packed(seed: int, pair: str) -> Experts:
        gen = torch.Generator().manual_seed(seed)
        up, down = (quantize(torch.randn(4, *shape, generator=gen) / 11, MXFP4) for shape in ((256, 128), (128, 128)))
        return Experts(prepack(up, pair=pair), prepack(down), top_k=2, interleaved=pair == "interleaved")

    one, two = packed(0, "halves"), packed(1, "halves")
    assert one.weight("gate_up").top is not None and one.weight("gate_up").tensors().keys() == one.weight("down").tensors().keys()
    want = experts(X.view(10, 128), one.weight("gate_up"), one.weight("down"), router_logits=LOGITS, top_k=2)
    assert torch.equal(one(X, LOGITS), want.view(X.shape)) and "mxfp4" in repr(one)
    space = torch.empty(one.workspace_bytes(10), dtype=torch.uint8)
    assert torch.equal(one(X, LOGITS, workspace=space), want.view(X.shape))
    assert not torch.equal(one(X, LOGITS), two(X, LOGITS))
    torch.save(one.state_dict(), tmp_path / "state.pt")
    two.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(one(X, LOGITS), two(X, LOGITS))
    with pytest.raises(ValueError, match="formats in the state"):
        packed(2, "interleaved").load_state_dict(one.state_dict())


def test_a_change_of_dtype_leaves_the_weights_alone():
    m, before = module(0), module(0).state_dict()
    m.to(torch.bfloat16).half().double()
    for name, t in m.state_dict().items():
        if isinstance(t, torch.Tensor):
            assert t.dtype == before[name].dtype and torch.equal(t.view(torch.uint8), before[name].view(torch.uint8)), name
    assert m.to("meta").gate_up.device.type == "meta"


def test_no_parameters_and_bad_options():
    assert not list(module(0).parameters())
    up, down = weights(0)
    with pytest.raises(TypeError, match="routing options"):
        Experts(up, down, top_k=2, score="softmax")
    with pytest.raises(ValueError, match="down, shape"):
        Experts(up, up, top_k=2)
    with pytest.raises(ValueError, match="top_k"):
        Experts(up, down, top_k=0)
    with pytest.raises(TypeError, match="top_k: got NoneType, expected an int"):
        Experts(up, down, top_k=None)
