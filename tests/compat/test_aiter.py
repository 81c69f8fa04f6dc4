"""aiter's names: orders un-shuffle bit for bit, sorting is its definition, products keep the None contract and its negative tests."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch

from narrowgemm import MXFP8, ScaledTensor, Unsupported, can_run, prepack, quantize
from narrowgemm.compat import aiter, notice, packed_copies
from narrowgemm.compat.aiter import mxfp8
from narrowgemm.moe_sorting import MoeSorting, routed_from_moe_sorting
from narrowgemm.ops.route import moe_align_block_size
from narrowgemm.testing.numerics import calc_diff

# (E, N, K, a_div, weighted, T, top_k) of the source's MoE tests, their E, N and K made small below
SOURCE = [(128, 1536, 6144, 4, False, 4, 4), (128, 6144, 768, 1, True, 8, 1), (128, 6144, 768, 1, False, 8, 1),
          (32, 1536, 6144, 4, False, 4, 4), (64, 6144, 768, 1, True, 8, 1), (128, 1536, 6144, 4, False, 16, 4),
          (32, 768, 6144, 4, False, 4, 4)]
DENSE = [(6144, 2304), (2048, 6144), (6144, 768), (768, 6144)]


@pytest.fixture(autouse=True)
def fresh():
    packed_copies._entries.clear()
    notice._given.clear()
    mxfp8._can_run.cache_clear()
    torch.manual_seed(0)
    yield


def mx(*shape):
    """(bytes, codes, values) of a random MXFP8 operand."""
    q = quantize(torch.randn(*shape), MXFP8)
    return q.data.view(torch.uint8), q.scale.contiguous(), q.dequantize()


# ---------------------------------------------------------------- orders
def naive_weight(x, gate_up):
    """The order as the kernels index it: byte 16 p + b of lane (kl, nl) in chunk k0 of row tile n0."""
    e, n, c = x.shape
    flat = []
    for ex in x:
        for n0 in range(n // (32 if gate_up else 16)):
            for half in range(2 if gate_up else 1):
                for k0 in range(c // 64):
                    for kl in range(4):
                        for nl in range(16):
                            row = half * (n // 2) + 16 * n0 + nl
                            flat.append(ex[row, 64 * k0 + 16 * kl: 64 * k0 + 16 * kl + 16])
    return torch.cat(flat).view(e, n, c)


def naive_scale(x, e, gate_up):
    n, s = x.shape[0] // e, x.shape[1]
    x, out = x.view(e, n, s), []
    for ex in x:
        for n1 in range(n // 32):
            for k1 in range(s // 8):
                for kl in range(4):
                    for nl in range(16):
                        for kp in range(2):
                            for np in range(2):
                                row = np * (n // 2) + 16 * n1 + nl if gate_up else 32 * n1 + 16 * np + nl
                                out.append(ex[row, 8 * k1 + 4 * kp + kl])
    return torch.stack(out).view(e * n, s)


@pytest.mark.parametrize("gate_up", [False, True])
def test_a16w4_orders_are_the_definition_and_come_back_bit_for_bit(gate_up):
    w = torch.randint(0, 256, (2, 64, 128), dtype=torch.uint8)
    s = torch.randint(0, 256, (2 * 64, 16), dtype=torch.uint8)
    shuffled = aiter.shuffle_weight_a16w4(w, 16, gate_up)
    assert torch.equal(shuffled, naive_weight(w, gate_up))
    assert torch.equal(aiter.unshuffle_weight_a16w4(shuffled, 16, gate_up), w)
    codes = aiter.shuffle_scale_a16w4(s, 2, gate_up)
    assert torch.equal(codes, naive_scale(s, 2, gate_up))
    assert torch.equal(aiter.unshuffle_scale_a16w4(codes, 2, gate_up), s)
    again = aiter.shuffle_weight_a16w4(aiter.unshuffle_weight_a16w4(shuffled, 16, gate_up), 16, gate_up)
    assert torch.equal(again, shuffled)
    assert torch.equal(aiter.shuffle_scale_a16w4(aiter.unshuffle_scale_a16w4(codes, 2, gate_up), 2, gate_up), codes)


def test_scales_are_filled_up_with_ones_to_eight_columns():
    s = torch.randint(0, 255, (64, 90), dtype=torch.uint8)        # K = 2880
    back = aiter.unshuffle_scale_a16w4(aiter.shuffle_scale_a16w4(s, 1, False), 1, False)
    assert back.shape == (64, 96) and torch.equal(back[:, :90], s) and (back[:, 90:] == 0x7F).all()


def test_orders_keep_the_dtype():
    for dtype in (torch.uint8, torch.int8, torch.float8_e8m0fnu):
        s = torch.randint(0, 255, (64, 8), dtype=torch.uint8).view(dtype)
        assert aiter.shuffle_scale_a16w4(s, 2, False).dtype == dtype
    w = torch.randint(0, 255, (1, 16, 64), dtype=torch.uint8)
    assert aiter.shuffle_weight_a16w4(w.view(torch.int8), 16, False).dtype == torch.int8


@pytest.mark.parametrize("call, match", [
    (lambda: aiter.shuffle_weight_a16w4(torch.zeros(1, 24, 64, dtype=torch.uint8), 16, False), "a multiple of 16"),
    (lambda: aiter.shuffle_weight_a16w4(torch.zeros(1, 16, 64, dtype=torch.uint8), 16, True), "a multiple of 32"),
    (lambda: aiter.shuffle_weight_a16w4(torch.zeros(1, 16, 96, dtype=torch.uint8), 16, False), "K of 128"),
    (lambda: aiter.shuffle_weight_a16w4(torch.zeros(1, 16, 64, dtype=torch.uint8), 32, False), "16 lanes"),
    (lambda: aiter.shuffle_weight_a16w4(torch.zeros(1, 16, 64), 16, False), "one-byte"),
    (lambda: aiter.shuffle_scale_a16w4(torch.zeros(48, 8, dtype=torch.uint8), 1, False), "a multiple of 32"),
    (lambda: aiter.shuffle_scale_a16w4(torch.zeros(32, 8), 1, False), "one byte each"),
    (lambda: aiter.shuffle_scale_a16w4(torch.zeros(32, 8, dtype=torch.uint8), 0, False), "experts_cnt"),
    (lambda: aiter.unshuffle_scale_a16w4(torch.zeros(32, 6, dtype=torch.uint8), 1, False), "a multiple of 8"),
])
def test_orders_refuse_other_shapes(call, match):
    with pytest.raises((ValueError, TypeError, Unsupported), match=match):
        call()


# ---------------------------------------------------------------- sorting
def naive_sorting(ids, weights, experts, block, mask=None, tokens_here=None):
    tokens, k = len(ids), len(ids[0])
    local = list(range(experts)) if mask is None else [sum(mask[:e]) if mask[e] else -1 for e in range(experts)]
    out, w, blocks = [], [], []
    for e in range(experts):
        mine = [(t, j) for t in range(tokens if tokens_here is None else tokens_here) for j in range(k) if ids[t][j] == e]
        if local[e] < 0 or not mine:
            continue
        pad = -len(mine) % block
        out += [(j << 24) | t for t, j in mine] + [(k << 24) | tokens] * pad
        w += [float(weights[t][j]) for t, j in mine] + [0.0] * pad
        blocks += [local[e]] * ((len(mine) + pad) // block)
    return out, w, blocks


@pytest.mark.parametrize("mask, here", [(None, None), ([1, 0, 0, 1, 1, 0], None), (None, 5), ([0, 1, 1, 0, 1, 0], 7)])
@pytest.mark.parametrize("block", [4, 32])
def test_moe_sorting_is_its_definition(mask, here, block):
    tokens, k, experts = 9, 3, 6
    ids = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]).int()
    weights = torch.rand(tokens, k)
    out = aiter.moe_sorting(ids, weights, experts, 64, torch.bfloat16, block,
                            None if mask is None else torch.tensor(mask, dtype=torch.int32),
                            None if here is None else torch.tensor([here], dtype=torch.int32))
    sorted_ids, sorted_weights, expert_ids, valid, buf = out
    want, want_weights, blocks = naive_sorting(ids.tolist(), weights.tolist(), experts, block, mask, here)
    assert sorted_ids.numel() == sorted_weights.numel() == tokens * k + experts * block - k
    assert expert_ids.numel() == -(-sorted_ids.numel() // block)
    n = valid.tolist()[0]
    assert valid.tolist() == [len(want), tokens]
    assert sorted_ids.tolist()[:n] == want and expert_ids.tolist()[:len(blocks)] == blocks
    assert sorted_weights.tolist()[:n] == pytest.approx(want_weights)
    assert buf.shape == (tokens, 64) and buf.dtype == torch.bfloat16 and not buf.any()
    routed, back = routed_from_moe_sorting(MoeSorting(sorted_ids, sorted_weights, expert_ids, valid, tokens, k, block))
    if mask is None and here is None:
        assert torch.equal(back, weights) and routed.num_slots == tokens * k


@pytest.mark.parametrize("change, match", [
    ({"topk_ids": torch.zeros(3, dtype=torch.int32)}, "topk_ids"), ({"topk_ids": torch.zeros(3, 2)}, "int32"),
    ({"topk_weights": torch.zeros(3, 1)}, "topk_weights"), ({"topk_weights": torch.zeros(3, 2).double()}, "float32"),
    ({"topk_weights": None}, "topk_weights: got NoneType"), ({"num_local_tokens": 2}, "num_local_tokens: got int"),
    ({"num_local_tokens": torch.zeros(0, dtype=torch.int32)}, "num_local_tokens"), ({"moebuf_dtype": "bf16"}, "moebuf_dtype: got 'bf16'"),
    ({"block_size": 0}, "block_size"), ({"expert_mask": torch.ones(3, dtype=torch.int32)}, "expert_mask")])
def test_moe_sorting_refuses(change, match):
    given = {"topk_ids": torch.zeros(3, 2, dtype=torch.int32), "topk_weights": torch.zeros(3, 2), "num_experts": 4, "model_dim": 8,
             "moebuf_dtype": torch.bfloat16, "block_size": 4} | change
    with pytest.raises((ValueError, TypeError), match=match):
        aiter.moe_sorting(**given)


# ---------------------------------------------------------------- products
@pytest.mark.parametrize("m", [1, 3, 17, 64])
@pytest.mark.parametrize("k, n", DENSE)
def test_gemv_takes_any_rows(m, k, n):
    k, n = k // 512 * 32, n // 24
    x, sx, xf = mx(m, k)
    w, sw, wf = mx(n, k)
    y = aiter.mxfp8_gemv(x, sx, w, sw, backend="reference")
    assert y.dtype == torch.bfloat16 and calc_diff(y, xf @ wf.T) < 5e-6
    for dtype in (torch.float16, torch.float32):
        got = aiter.mxfp8_gemv(x.view(torch.float8_e4m3fn), sx, w.view(torch.float8_e4m3fn), sw, dtype, backend="reference")
        assert got.dtype == dtype and calc_diff(got, xf @ wf.T) < 5e-6


@pytest.mark.parametrize("e, n, k, a_div, weighted, tokens, top_k", SOURCE)
def test_grouped_gemm_of_the_source(e, n, k, a_div, weighted, tokens, top_k):
    e, n, k = e // 8 + 4, n // 48, k // 24
    a, sa, af = mx(tokens * top_k // a_div, k)
    w, sw, wf = mx(e, n, k)
    ids = torch.stack([torch.randperm(e)[:top_k] for _ in range(tokens)]).int()
    layout = moe_align_block_size(ids, 64, e, a_div=a_div)
    weight = torch.rand(tokens * top_k) if weighted else None
    y = aiter.grouped_gemm_mxfp8(a, sa, w, sw, layout.sorted_token_ids, layout.expert_ids, layout.num_tokens_post_padded,
                                 tokens * top_k, top_k, 64, torch.bfloat16, a_div, weight, ids, backend="reference")
    want = torch.stack([wf[ids.flatten()[s]] @ af[s // a_div] for s in range(tokens * top_k)])
    want = want if weight is None else want * weight[:, None]
    assert y.shape == (tokens * top_k, n) and calc_diff(y, want) < 5e-6


@pytest.mark.parametrize("top_k", [1, 2])
def test_many_rows_of_an_expert_are_sorted_anew(monkeypatch, top_k):
    """As many slots as make it worth while: by offsets, the same result, skipped blocks zero, bad weights refused as before."""
    monkeypatch.setattr(mxfp8, "MANY_ROWS", 4)
    tokens, e = 40, 5
    a, sa, af = mx(tokens, 64)
    w, sw, wf = mx(e, 48, 64)
    ids = torch.stack([torch.randperm(e + 1)[:top_k] for _ in range(tokens)]).int()
    layout = moe_align_block_size(ids, 16, e)
    weight = torch.rand(tokens * top_k)
    args = (a, sa, w, sw, layout.sorted_token_ids, layout.expert_ids, layout.num_tokens_post_padded, tokens * top_k, top_k, 16)
    sorted_anew = []
    real = mxfp8.offsets_from_routed
    monkeypatch.setattr(mxfp8, "offsets_from_routed", lambda *a: sorted_anew.append(a) or real(*a))
    y = aiter.grouped_gemm_mxfp8(*args, torch.float32, top_k, weight, backend="reference")
    assert len(sorted_anew) == 1
    live = (ids.flatten() < e)
    want = torch.stack([wf[min(int(x), e - 1)] @ af[s // top_k] for s, x in enumerate(ids.flatten())]) * (weight * live)[:, None]
    assert calc_diff(y, want) < 1e-6 and not y[~live].any()
    monkeypatch.setattr(mxfp8, "MANY_ROWS", 10_000)
    assert calc_diff(aiter.grouped_gemm_mxfp8(*args, torch.float32, top_k, weight, backend="reference"), want) < 1e-6


def test_rows_of_skipped_blocks_are_zero():
    a, sa, af = mx(4, 64)
    w, sw, wf = mx(2, 48, 64)
    ids = torch.tensor([0, 1, 4, 4, 2, 3, 4, 4], dtype=torch.int32)
    y = aiter.grouped_gemm_mxfp8(a, sa, w, sw, ids, torch.tensor([-1, 1], dtype=torch.int32), torch.tensor([8], dtype=torch.int32),
                                 4, 1, 4, torch.float32, 1, backend="reference")
    assert not y[:2].any() and calc_diff(y[2:], af[2:] @ wf[1].T) < 1e-6


@pytest.mark.parametrize("many", [False, True])
def test_rows_of_an_out_that_no_block_computes_stay(monkeypatch, many):
    monkeypatch.setattr(mxfp8, "MANY_ROWS", 1 if many else 100)
    out = torch.full((6, 32), 7.0)
    moe(out=out, expert_ids=torch.tensor([-1], dtype=torch.int32))
    assert (out == 7).all()
    moe(out=out, sorted_token_ids=torch.tensor([0, 4, 2, 4], dtype=torch.int32))
    assert (out[[1, 3, 4, 5]] == 7).all() and not (out[[0, 2]] == 7).any()


def test_a_row_for_each_slot_of_several_choices(monkeypatch):
    """a_div of 1 where tokens have two experts each, as the second product of a layer has it; few slots and many."""
    tokens, e = 6, 3
    a, sa, af = mx(2 * tokens, 64)
    w, sw, wf = mx(e, 48, 64)
    ids = torch.stack([torch.randperm(e)[:2] for _ in range(tokens)]).int()
    layout = moe_align_block_size(ids, 4, e, a_div=1)
    want = torch.stack([wf[int(i)] @ row for i, row in zip(ids.flatten(), af)])
    for most in (1, 100):
        monkeypatch.setattr(mxfp8, "MANY_ROWS", most)
        y = aiter.grouped_gemm_mxfp8(a, sa, w, sw, layout.sorted_token_ids, layout.expert_ids, layout.num_tokens_post_padded, 2 * tokens, 2, 4,
                                     torch.float32, 1, backend="reference")
        assert calc_diff(y, want) < 1e-6


def test_a_backend_that_was_asked_for_and_can_not_run_raises():
    layout = [torch.tensor(v, dtype=torch.int32) for v in ([0, 1, 2, 3], [0], [4])]
    x, sx, _ = mx(4, 64)
    w, sw, _ = mx(2, 32, 64)
    with pytest.raises(Unsupported, match="on cpu with backend 'gluon_sm90'"):
        aiter.mxfp8_gemv(x, sx, w[0], sw[0], backend="gluon_sm90")
    with pytest.raises(Unsupported, match="on cpu with backend 'gluon_sm90'"):
        aiter.grouped_gemm_mxfp8(x, sx, w, sw, *layout, 4, 1, 4, torch.bfloat16, 1, backend="gluon_sm90")


@pytest.mark.parametrize("call", ["gemv", "grouped"])
def test_none_says_why_and_says_it_once(call):
    x, sx, _ = mx(4, 64)
    w, sw, _ = mx(2, 32, 64)
    i32 = [torch.tensor(v, dtype=torch.int32) for v in ([0, 1, 2, 3], [0], [4])]

    def run():
        if call == "gemv":
            return aiter.mxfp8_gemv(x, sx, w[0], sw[0])
        return aiter.grouped_gemm_mxfp8(x, sx, w, sw, *i32, 4, 1, 4, torch.bfloat16, 1)

    with pytest.warns(UserWarning, match="returned None: .*(runs on NVIDIA Hopper|a portable|portable)"):
        assert run() is None        # a CPU has no kernel made for it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run() is None
    op = {"gemv": ("gemm", {}), "grouped": ("routed_gemm", {"layout": "routed", "groups": 2})}[call]
    ok, reason = can_run(op[0], m=4, n=32, k=64, a="mxfp8", b="mxfp8", packed=True, device="cpu", **op[1])
    assert not ok and reason


def test_a_failure_is_no_none(monkeypatch):
    x, sx, _ = mx(4, 64)
    w, sw, _ = mx(32, 64)
    monkeypatch.setattr(mxfp8, "_allow", lambda *a: None)
    monkeypatch.setattr(mxfp8, "gemm", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("a launch failed")))
    with pytest.raises(RuntimeError, match="a launch failed"):
        aiter.mxfp8_gemv(x, sx, w, sw)


@pytest.mark.parametrize("rows, k, at, packed", [(1, 256, 0, False), (64, 256, 0, False), (600, 256, 0, False), (4, 96, 0, True), (4, 256, 4, True)])
def test_weights_stay_as_they_are(monkeypatch, rows, k, at, packed):
    """Where kernels for such weights take them; else they are packed. `at`: bytes that they start off 16."""
    seen = []

    def gemm(x, w, **kw):
        seen.append(not isinstance(w, ScaledTensor))
        return mxfp8_gemm(x, w, backend="reference", **kw)

    mxfp8_gemm = mxfp8.gemm
    monkeypatch.setattr(mxfp8, "gemm", lambda *a, backend=None, **kw: gemm(*a, **kw))
    monkeypatch.setattr(mxfp8, "can_run", lambda *a, device, **kw: can_run(*a, device="h200", **kw))
    x, sx, xf = mx(rows, k)
    w, sw, wf = mx(32, k)
    room = torch.empty(w.numel() + 16, dtype=torch.uint8)
    room = room[(at - room.data_ptr()) % 16:][: w.numel()].view(w.shape)
    y = aiter.mxfp8_gemv(x, sx, room.copy_(w), sw)
    assert seen == [packed] and bool(packed_copies._entries) == packed and calc_diff(y, xf @ wf.T) < 5e-6


def test_weights_are_packed_once_and_anew_after_a_write(monkeypatch):
    x, sx, xf = mx(4, 64)
    w, sw, wf = mx(32, 64)
    made = []
    monkeypatch.setattr(mxfp8, "prepack", lambda q: made.append(1) or prepack(q))
    first = aiter.mxfp8_gemv(x, sx, w, sw, backend="reference")
    assert torch.equal(aiter.mxfp8_gemv(x, sx, w, sw, backend="reference"), first) and len(made) == 1
    kept = next(iter(packed_copies._entries.values())).packed.data.data_ptr()
    w.view(torch.float8_e4m3fn).copy_((wf * 0.5).flip(0).to(torch.float8_e4m3fn))
    changed = aiter.mxfp8_gemv(x, sx, w, sw, backend="reference")
    want = ScaledTensor.make(w, sw, MXFP8).dequantize()
    assert calc_diff(changed, xf @ want.T) < 5e-6 and len(made) == 2
    assert next(iter(packed_copies._entries.values())).packed.data.data_ptr() == kept, "graphs that read the copy lose it"
    assert torch.equal(aiter.mxfp8_gemv(x, sx, prepack(ScaledTensor.make(w, sw, MXFP8)), None, backend="reference"), changed)
    del w
    gc.collect()
    assert not packed_copies._entries, "a copy outlives its weights"


def test_inference_weights_are_packed_every_time_with_a_warning():
    with torch.inference_mode():
        x, sx, xf = mx(2, 64)
        w, sw, wf = mx(32, 64)
        with pytest.warns(UserWarning, match="no version counter"):
            y = aiter.mxfp8_gemv(x, sx, w, sw, backend="reference")
        assert calc_diff(y, xf @ wf.T) < 5e-6 and not packed_copies._entries


# ---------------------------------------------------------------- the source's negative tests, and ours
def gemv(rows=4, k=64, n=32, **change):
    x, sx, _ = mx(rows, k)
    w, sw, _ = mx(n, k)
    given = {"Xq": x, "Xs": sx, "Wq": w, "Ws": sw, "out_dtype": torch.bfloat16, "backend": "reference"} | change
    return aiter.smallm_mxfp8_gemv(**given)


def moe(**change):
    x, sx, _ = mx(4, 64)
    w, sw, _ = mx(2, 32, 64)
    i32 = [torch.tensor(v, dtype=torch.int32) for v in ([0, 1, 2, 3], [0], [4])]
    given = {"a_q": x, "a_scale": sx, "w": w, "w_scale": sw, "sorted_token_ids": i32[0], "expert_ids": i32[1],
             "num_tokens_post_padded": i32[2], "out": torch.zeros(4, 32, dtype=torch.bfloat16), "E": 2, "N": 32, "K": 64,
             "num_valid_tokens": 4, "M_act": 4, "a_div": 1, "block_m": 4, "backend": "reference"} | change
    return aiter.smallm_mxfp8_moe_grouped_gemm(**given)


@pytest.mark.parametrize("call, match", [
    (lambda: gemv(Xq=torch.zeros(4, 48, dtype=torch.uint8)), "multiple of 32"),
    (lambda: gemv(rows=17), "M<=16"),
    (lambda: moe(mul_weight_by=torch.ones(4, dtype=torch.int32)), "float32"),
    (lambda: moe(out=torch.zeros(3, 32, dtype=torch.bfloat16)), "out has"),
    (lambda: moe(out=torch.zeros(4, 24, dtype=torch.bfloat16)), "out has"),
    (lambda: moe(E=3), "E, N, K"), (lambda: moe(M_act=5), "M_act"),
    (lambda: moe(sorted_token_ids=torch.zeros(4, dtype=torch.int64)), "int32"),
    (lambda: moe(expert_ids=torch.zeros(0, dtype=torch.int32)), "expert_ids"),
    (lambda: moe(a_div=0), "a_div"), (lambda: moe(block_m=0), "block_m"),
    (lambda: moe(num_valid_tokens=9, out=torch.zeros(9, 32, dtype=torch.bfloat16)), "rows"),
    (lambda: gemv(Xs=torch.zeros(4, 3, dtype=torch.uint8)), "scale"),
    (lambda: gemv(Ws=torch.zeros(32, 1, dtype=torch.uint8)), "scale"),
    (lambda: gemv(Ws=None), "scales of the weights"),
    (lambda: gemv(Xq=torch.zeros(4, 64)), "float8_e4m3fn"), (lambda: gemv(Xq=[1]), "torch.Tensor"),
    (lambda: gemv(Wq=torch.zeros(32, 128, dtype=torch.uint8)), "that of the activations"),
    (lambda: gemv(Wq=torch.zeros(2, 32, 64, dtype=torch.uint8)), r"\[N, K\]"),
    (lambda: gemv(out_dtype=torch.int32), "bfloat16|dtype"),
])
def test_negatives(call, match):
    with pytest.raises((ValueError, TypeError), match=match):
        call()


def test_packed_weights_of_another_format_and_scales_beside_them():
    x, sx, _ = mx(4, 64)
    four = prepack(quantize(torch.randn(32, 64), "mxfp4"))
    with pytest.raises(ValueError, match="mxfp8"):
        aiter.mxfp8_gemv(x, sx, four, None)
    w, sw, _ = mx(32, 64)
    with pytest.raises(ValueError, match="it has its own"):
        aiter.mxfp8_gemv(x, sx, prepack(ScaledTensor.make(w, sw, MXFP8)), sw)
    with pytest.raises(Unsupported):
        aiter.mxfp8_gemv(x, sx, w, sw, backend="gluon_sm90")
    assert aiter.mxfp8_gemv(x[:0], sx[:0], w, sw, backend="reference").shape == (0, 32)
