"""FlyDSL's shuffled weights: their order, and the plain copies that launchers keep of weights that stay, change and go."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch

from narrowgemm import Unsupported
from narrowgemm.compat import flydsl
from narrowgemm.compat.flydsl import weights

from . import _flydsl
from ._flydsl import GPU, as_bytes, fresh, launcher, problem, run  # noqa: F401 - a fixture

# ---- shuffling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 32), (48, 96), (3, 32, 64), (2, 2, 16, 128), (0, 16, 32)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_shuffle_round_trip(shape, dtype):
    x = torch.randint(0, 120, shape, dtype=torch.uint8).view(dtype)
    kept = x.clone()
    y = flydsl.shuffle_weight(x)
    assert y.shape == x.shape and y.dtype == dtype and y.is_contiguous()
    for got in (flydsl.unshuffle_weight(y), flydsl.unshuffle_weight(flydsl.shuffle_weight(x.mT.contiguous().mT))):
        assert torch.equal(got.view(torch.uint8), kept.view(torch.uint8))


def test_shuffle_order():
    """Sixteen rows by sixteen columns lie together, then the next sixteen columns, then the next 32 columns."""
    n, k = 32, 64
    x = torch.arange(n * k).remainder(251).to(torch.uint8).view(n, k)
    y, at = flydsl.shuffle_weight(x).flatten().tolist(), 0
    for row, column, half in ((r, c, h) for r in range(0, n, 16) for c in range(0, k, 32) for h in (0, 16)):
        for r in range(row, row + 16):
            assert y[at : at + 16] == x[r, column + half : column + half + 16].tolist()
            at += 16


@pytest.mark.parametrize(("x", "layout", "error", "match"), [
    (torch.zeros(16, 32), (16, 16), Unsupported, "float32"), (torch.zeros(16, 32).byte(), (32, 16), Unsupported, "32, 16"),
    (torch.zeros(8, 32).byte(), (16, 16), ValueError, r"got \(8, 32\)"), (torch.zeros(16, 48).byte(), (16, 16), ValueError, "K of 32"),
    (torch.zeros(32).byte(), (16, 16), ValueError, "got")])
def test_shuffle_refuses(x, layout, error, match):
    for f in (flydsl.shuffle_weight, flydsl.unshuffle_weight):
        with pytest.raises(error, match=match):
            f(x, layout)


def test_e8m0_bytes():
    x = torch.tensor([2.0**-126, 0.75, 1.0, 1.5, 0.0, 2.0**127, -3.0])
    assert flydsl.fp32_to_e8m0(x).tolist() == [2.0**-126, 1.0, 1.0, 2.0, 2.0**-126, 2.0**127, 4.0]
    assert flydsl.fp32_e8m0_to_byte(flydsl.fp32_to_e8m0(x)).tolist() == [1, 127, 127, 128, 1, 254, 129]
    with pytest.raises(TypeError, match="float32"):
        flydsl.fp32_e8m0_to_byte(x.half())


# ---- weights that stay, change and go ------------------------------------------------------------------------------


@pytest.fixture
def copies(monkeypatch):
    """Every un-shuffling of a launch is counted."""
    made = []
    plain = weights._unshuffle

    def count(b, out):
        made.append(b.data_ptr())
        return plain(b, out)

    monkeypatch.setattr(weights, "_unshuffle", count)
    return made


def test_one_copy_for_all_views_and_launchers(copies):
    args = problem()
    want = run(args)
    for b in (args["b"].view(-1), args["b"].view(torch.int8), as_bytes(args["b"]), args["b"].detach()):
        assert torch.equal(run(args, b), want)
    launcher(out_dtype="f16")(**{**args, "d": args["d"].half()})
    assert len(copies) == 1


@pytest.mark.parametrize("how", ["copy_", "view", "row", "out"])
def test_changed_in_place(copies, how):
    args = problem()
    before = run(args)
    address = weights.plain_weight(args["b"], (2, 128, 256)).data_ptr()
    b, other = args["b"].view(torch.uint8), flydsl.shuffle_weight(problem(m=384)["b"].view(torch.uint8) ^ 0x80)
    if how == "copy_":
        b.copy_(other)
    elif how == "view":
        b.view(-1)[: b.numel() // 2].copy_(other.view(-1)[: b.numel() // 2])
    elif how == "row":
        b[1, 3].zero_()
    else:
        torch.bitwise_xor(b, 0x80, out=b)
    after = run(args)
    assert not torch.equal(after, before) and torch.equal(after, run(args, args["b"].clone()))
    assert weights.plain_weight(args["b"], (2, 128, 256)).data_ptr() == address, "graphs read it there"
    assert len(copies) == 3


def test_reallocated(copies):
    """New weights again and again at an address that was just freed, and each is read."""
    args = problem()
    first = args.pop("b").view(torch.uint8)
    seen = set()
    for i in range(6):
        b = first.clone()
        b[:, :, : 32 * i] ^= 0x80
        seen.add(b.data_ptr())
        plain = flydsl.unshuffle_weight(b)
        assert torch.equal(weights.plain_weight(b, (2, 128, 256)).view(torch.uint8), plain)
        run(args, b)
        del b
        gc.collect()
        assert not weights._storages, "the copy goes with its weight"
    assert len(copies) == 6 + 6  # one more by unshuffle_weight


def test_an_entry_of_another_storage_does_not_count():
    """As if y had come to lie where x was, and x's copies were still known there."""
    x, y = (torch.zeros(16, 32, dtype=torch.uint8) + i for i in (1, 2))
    shape = (1, 16, 32)
    weights.plain_weight(x, shape)
    stale = weights._storages[y.untyped_storage()._cdata] = weights._storages[x.untyped_storage()._cdata]
    stale.copies[y.data_ptr(), shape] = stale.copies[x.data_ptr(), shape]
    assert (weights.plain_weight(y, shape).view(torch.uint8) == 2).all()
    address = x.untyped_storage()._cdata
    weights._storages[address] = weights._storages[y.untyped_storage()._cdata]
    del x, stale
    gc.collect()
    assert address in weights._storages, "x's callback drops x's entry alone"


def test_two_weights_in_one_storage(copies):
    args = problem()
    both = torch.stack([args["b"].view(torch.uint8), args["b"].view(torch.uint8) ^ 0x80])
    for _ in range(2):
        assert torch.equal(run(args, both[0]), run(args)) and torch.equal(run(args, both[1]), -run(args))
    assert len(copies) == 3


def test_storage_exchanged_under_the_tensor():
    args = problem()
    b = torch.nn.Parameter(args["b"].view(torch.uint8).clone(), requires_grad=False)
    want = run(args, b)
    b.data = args["b"].view(torch.uint8) ^ 0x80
    assert torch.equal(run(args, b), -want)


def test_refresh_after_writes_that_torch_does_not_see():
    args = problem()
    want = run(args)
    b = args["b"].view(torch.uint8)
    b.data.bitwise_xor_(0x80)
    flydsl.refresh_weight(b[:1])
    assert torch.equal(run(args), -want)
    flydsl.refresh_weight(torch.zeros(16))  # unknown: nothing happens


def flip(b):
    """Change the sign of every element, in place, as torch sees it."""
    b.copy_((b.view(torch.uint8) ^ 0x80).view(b.dtype))


def test_inference_mode(copies):
    """Views of a normal tensor keep its counter there; tensors and dtype views made there have none."""
    args = problem()
    with torch.inference_mode():
        want = run(args)
        flip(args["b"])
        assert torch.equal(run(args, args["b"].view(-1)), -want) and len(copies) == 2
        made = args["b"].clone()
    flip(args["b"])
    assert torch.equal(run(args), want) and len(copies) == 3
    with pytest.warns(UserWarning, match="freeze_weight") as caught:
        assert torch.equal(run(args, made), -want)
    assert caught[0].filename == _flydsl.__file__
    with torch.inference_mode():
        flip(made)
        assert torch.equal(run(args, made), want) and torch.equal(run(args, args["b"].view(torch.int8)), want)
    assert len(copies) == 6


@pytest.mark.parametrize("made_inside", [True, False])
def test_frozen_in_inference_mode(copies, made_inside):
    args = problem()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        b = args["b"].clone() if made_inside else args["b"]
        flydsl.freeze_weight(b)
        want = run(args, b)
        for _ in range(3):
            assert torch.equal(run(args, as_bytes(b)), want)
        assert len(copies) == 1
        b.view(torch.uint8).bitwise_xor_(0x80)
        flydsl.refresh_weight(b.view(torch.int8))
        assert torch.equal(run(args, as_bytes(b)), -want) and len(copies) == 2
    del b, args
    gc.collect()
    assert not weights._storages


@GPU
@pytest.mark.parametrize("known", [True, False])
def test_graph(known):
    """A captured launch reads the copy; of an unknown weight it un-shuffles in the graph, and keeps no copy of that."""
    args, warm = problem(device="cuda"), problem(device="cuda")
    want = run(warm)
    if known:
        run(args)
    graph, d = torch.cuda.CUDAGraph(), torch.full_like(args["d"], 7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.cuda.graph(graph):
            launcher()(**{**args, "d": d})
    assert bool(caught) != known
    assert (weights._entry(args["b"]) is not None) == known
    graph.replay()
    assert torch.equal(d, want)
    args["b"].view(torch.uint8).bitwise_xor_(0x80)
    if known:
        flydsl.refresh_weight(args["b"])
    graph.replay()
    assert torch.equal(d, -want)
