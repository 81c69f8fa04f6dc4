"""MXFP8 on a Hopper GPU: exponent extremes, any M, N and K, model shapes, weights past 2 GiB, aiter's names; against FP64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import narrowgemm as ng
from narrowgemm.compat import aiter
from narrowgemm.formats import MXFP8, ScaledTensor
from narrowgemm.testing.cases import Case, build, get_suite
from narrowgemm.testing.models import MODELS, MoEModel
from narrowgemm.testing.numerics import calc_diff

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]
DEV = "cuda"
GATE = {torch.bfloat16: 5e-6, torch.float16: 5e-6, torch.float32: 1e-6}


def double(q: ScaledTensor) -> Tensor:
    """The values in FP64: codes of 0 and 254 are far from its ends. NaN for 255."""
    code = q.scale.double() - 127
    scale = torch.where(q.scale == 255, torch.nan, torch.exp2(code)).repeat_interleave(32, -1)[..., : q.shape[-1]]
    return q.data.double() * scale


def mx(rows: tuple[int, ...], codes: tuple[int, int] = (118, 128)) -> ScaledTensor:
    """Random bits without NaN."""
    data = torch.randint(0, 256, rows, dtype=torch.uint8, device=DEV)
    data[(data & 127) == 127] = 3
    scale = torch.randint(*codes, MXFP8.scale_shape(rows), dtype=torch.uint8, device=DEV)
    return ScaledTensor(data.view(torch.float8_e4m3fn), scale, MXFP8)


def check(got: Tensor, want: Tensor) -> None:
    """The gate where the result is finite and in range, and NaN just where the definition has one."""
    assert torch.equal(got.isnan(), want.isnan())
    top = torch.finfo(got.dtype).max
    inside = want.abs() < top
    assert got[~inside & ~want.isnan()].isinf().all()
    assert calc_diff(torch.where(inside, got.double(), 0), torch.where(inside, want, 0)) <= GATE[got.dtype]


def extremes(q: ScaledTensor, kind: str, other: bool) -> None:
    """Plant codes in `q`; `other`: this is the side that keeps the products in range."""
    s = q.scale
    if kind == "ends":                              # 2^-127 meets 2^127, whose payload is below one: FP32 holds the values
        if other:
            q.data.view(torch.uint8).bitwise_and_(0xB7)
        s[:] = 254 if other else 0
        s[1::3] = 253 if other else 1
    elif kind == "ones":
        s[:] = 127
    elif kind == "spread":                          # blocks 2^30 apart in one row
        s[:] = 127
        s[:, ::2] = 127 if other else 97
        s[:, 1::4] = 127 if other else 128
    elif kind == "nan" and not other:
        s[1, 0] = 255
        q.data.view(torch.uint8)[-1, 5] = 0x7F
    elif kind == "zeros" and not other:             # blocks of zeros with any code, and a row of nothing but them
        q.data.view(torch.uint8)[:, :64] = 0
        s[:, 0], s[:, 1] = 254, 0
        q.data.view(torch.uint8)[2] = 0


@pytest.mark.parametrize("side", ["weights", "activations"])
@pytest.mark.parametrize("kind", ["ends", "ones", "spread", "nan", "zeros"])
@pytest.mark.parametrize("m", [1, 5, 64, 100, 700])
@pytest.mark.parametrize("k, packed", [(320, True), (320, False), (384, False)])
def test_exponent_extremes(m: int, k: int, packed: bool, kind: str, side: str) -> None:
    x, w = mx((max(m, 4), k)), mx((192, k))
    extremes(x, kind, side == "weights")
    extremes(w, kind, side != "weights")
    x = ScaledTensor(x.data[:m], x.scale[:m], MXFP8)
    for dtype in (torch.bfloat16, torch.float32):
        check(ng.gemm(x, ng.prepack(w) if packed else w, out_dtype=dtype), double(x) @ double(w).mT)


@pytest.mark.parametrize("codes", [(7, 120), (0, 127), (120, 10), (245, 90)])
def test_products_at_the_ends_of_fp32_are_not_lost_on_the_way(codes: tuple[int, int]) -> None:
    """Every block of a side has the one code; values and sums are FP32's, far below and far above one."""
    x, w = (mx((9 if i == 0 else 64, 256), (c, c + 1)) for i, c in enumerate(codes))
    got, want = ng.gemm(x, ng.prepack(w), out_dtype=torch.float32), double(x) @ double(w).mT
    assert calc_diff(got.double() / want.abs().max(), want / want.abs().max()) <= 1e-6


@pytest.mark.parametrize("m, n, k", [(1, 1, 32), (2, 7, 64), (3, 100, 96), (16, 65, 160), (17, 2304, 6144), (33, 384, 192),
                                     (100, 1000, 1056), (129, 129, 2880), (200, 1000, 1152), (513, 768, 384), (2049, 576, 352)])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_any_size_and_output(packed: bool, m: int, n: int, k: int) -> None:
    x, w = mx((m, k), (112, 120)), mx((n, k), (112, 120))
    given, want = ng.prepack(w) if packed else w, double(x) @ double(w).mT
    for dtype in GATE:
        assert calc_diff(ng.gemm(x, given, out_dtype=dtype).double(), want) <= GATE[dtype]


@pytest.mark.parametrize("m", [1, 40, 64, 100, 600])
def test_dense_weights_packed_for_mxfp8_run_as_they_are(m: int) -> None:
    """The same kernel and bits, scales column by column, too; with BF16 activations the same product as of any other order."""
    x, w = mx((m, 768)), mx((640, 768))
    columns = ScaledTensor(w.data, w.scale.mT.contiguous().mT, MXFP8)
    y = ng.gemm(x, w)
    assert calc_diff(y.double(), double(x) @ double(w).mT) <= 5e-6
    for given in (w, columns):
        assert torch.equal(ng.gemm(x, ng.prepack(given, activations="mxfp8")), y)
    wide = torch.randn(m, 768, device=DEV).bfloat16()
    for kind in ("bf16", "mxfp8"):
        assert calc_diff(ng.gemm(wide, ng.prepack(w, activations=kind)).double(), wide.double() @ double(w).mT) <= 5e-6


SHAPES = [(m, tp, ep, stage) for m in (MODELS[n] for n in ("minimax-m3", "minimax-m2", "deepseek-v3", "qwen3-235b"))
          for tp, ep in ((1, 32), (2, 16), (4, 8), (8, 1)) for stage in ("gate_up", "down")]


@pytest.mark.parametrize("model, tp, ep, stage", SHAPES, ids=lambda x: getattr(x, "name", str(x)))
def test_model_shapes(model: MoEModel, tp: int, ep: int, stage: str) -> None:
    """Slots of 1 and 48 tokens by vLLM's layout and by offsets, experts of other ranks left out, FP32 and BF16."""
    n, k = getattr(model, stage)(tp)
    e = min(model.local_experts(ep), 64)
    w = mx((e, n, k))
    packed = ng.prepack(w)
    for tokens in (1, 48):
        ids = torch.rand(tokens, e * 2, device=DEV).topk(min(model.top_k, e)).indices.int()
        top_k = ids.shape[1]
        a_div = top_k if stage == "gate_up" else 1
        x = mx((tokens * top_k // a_div, k))
        weight = torch.rand(tokens * top_k, device=DEV)
        want = torch.zeros(tokens * top_k, n, dtype=torch.float64, device=DEV)
        for slot, expert in enumerate(ids.flatten().tolist()):
            if expert < e:
                want[slot] = double(w[expert]) @ double(ScaledTensor(x.data[slot // a_div], x.scale[slot // a_div], MXFP8)) * weight[slot]
        routed, sorted_ = ng.moe_align_block_size(ids, 16, e, a_div=a_div), ng.sort_by_expert(ids, e)
        y = ng.routed_gemm(x, packed, routed, routing_weight=weight, zero_padding=True, out_dtype=torch.float32)
        assert calc_diff(y.double(), want) <= 1e-6
        y = ng.routed_gemm(x, packed, sorted_.layout, row_map=sorted_.row_map, top_k=top_k, a_div=a_div, routing_weight=weight,
                           zero_padding=True)
        assert calc_diff(y.double(), want) <= 5e-6


@pytest.mark.parametrize("case", [*get_suite("mxfp8-prefill")[::2], *get_suite("mxfp8-prefill-folded")[1::3]], ids=lambda c: c.id)
def test_prefill_suite(case: Case) -> None:
    """Both gates, poison and guards on what is chosen."""
    build(case, DEV, seed=11).verify()


def test_weights_past_two_gib() -> None:
    """58 experts of 6144 x 6144: the last ones start beyond 2^31 bytes, plain and packed."""
    e, n, k = 58, 6144, 6144
    data = torch.randint(0, 0x78, (e, n, k), dtype=torch.uint8, device=DEV).view(torch.float8_e4m3fn)
    scale = torch.randint(118, 128, (e, n, k // 32), dtype=torch.uint8, device=DEV)
    packed = ng.prepack(ScaledTensor(data, scale, MXFP8))
    del data
    torch.cuda.empty_cache()
    assert packed.data.numel() > 2**31
    x = mx((8, k))
    experts = [57, 0, 56, 29, 57, 1, 55, 57]
    order = sorted(range(8), key=lambda i: experts[i])
    offsets = torch.tensor([sum(x < g for x in experts) for g in range(e + 1)], device=DEV)
    row_map = torch.tensor(order, dtype=torch.int32, device=DEV)
    y = ng.routed_gemm(x, packed, ng.Offsets(offsets), row_map=row_map, top_k=1)
    for expert in set(experts):
        one = ng.PackedWeight(packed.data[expert: expert + 1], packed.scale[expert: expert + 1], MXFP8, (1, n, k))
        w = double(ng.unpack(one)[0])
        mine = [i for i in range(8) if experts[i] == expert]
        assert calc_diff(y[mine].double(), double(x)[mine] @ w.mT) <= 5e-6


def test_aiter_names_compute_and_replay_in_a_graph() -> None:
    x, w = mx((5, 768)), mx((640, 768))
    args = [x.data.view(torch.uint8), x.scale, w.data.view(torch.uint8), w.scale]
    y = aiter.mxfp8_gemv(*args)
    assert y is not None and calc_diff(y.double(), double(x) @ double(w).mT) <= 5e-6
    e, top_k, tokens = 16, 4, 9
    a, b = mx((tokens, 384)), mx((e, 256, 384))
    ids = torch.rand(tokens, e, device=DEV).topk(top_k).indices.int()
    weight = torch.rand(tokens * top_k, device=DEV)

    def call() -> Tensor:
        lay = ng.moe_align_block_size(ids, 64, e)
        out = aiter.grouped_gemm_mxfp8(a.data, a.scale, b.data, b.scale, lay.sorted_token_ids, lay.expert_ids,
                                       lay.num_tokens_post_padded, tokens * top_k, top_k, 64, torch.bfloat16, top_k, weight, ids)
        assert out is not None
        return out

    def want() -> Tensor:
        return torch.stack([double(b[e]) @ double(a)[s // top_k] * weight[s] for s, e in enumerate(ids.flatten().tolist())])

    assert calc_diff(call().double(), want()) <= 5e-6
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    ids.copy_(torch.rand(tokens, e, device=DEV).topk(top_k).indices.int())
    graph.replay()
    assert calc_diff(out.double(), want()) <= 5e-6


def test_aiter_names_on_many_rows_an_expert() -> None:
    """The kernel for many tokens, over offsets made of the layout; slots of experts elsewhere come out zero."""
    e, top_k, tokens = 6, 2, 400
    a, b = mx((tokens, 384)), mx((e, 256, 384))
    ids = torch.rand(tokens, e + 2, device=DEV).topk(top_k).indices.int()
    lay = ng.moe_align_block_size(ids, 64, e)
    out = aiter.grouped_gemm_mxfp8(a.data, a.scale, b.data, b.scale, lay.sorted_token_ids, lay.expert_ids, lay.num_tokens_post_padded,
                                   tokens * top_k, top_k, 64, torch.bfloat16, top_k)
    flat = ids.flatten().long()
    want = torch.einsum("snk,sk->sn", double(b)[flat.clamp(max=e - 1)], double(a).repeat_interleave(top_k, 0)) * (flat < e)[:, None]
    assert out is not None and calc_diff(out.double(), want) <= 5e-6 and not out[flat >= e].any()


@pytest.mark.parametrize("m, k", [(1, 384), (64, 768), (3, 160), (65, 384)])
def test_aiter_gemv_of_few_and_many_rows(m: int, k: int) -> None:
    """Weights as they are, and packed where K is no multiple of 128 or rows are more."""
    x, w = mx((m, k), (112, 120)), mx((200, k), (112, 120))
    for dtype in GATE:
        y = aiter.mxfp8_gemv(x.data, x.scale, w.data, w.scale, dtype)
        assert y is not None and calc_diff(y.double(), double(x) @ double(w).mT) <= GATE[dtype]


def test_aiter_takes_weights_first_seen_in_a_capture_as_they_are() -> None:
    x, w, other = mx((2, 256)), mx((64, 256)), mx((64, 256))
    aiter.mxfp8_gemv(x.data, x.scale, other.data, other.scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = aiter.mxfp8_gemv(x.data, x.scale, w.data, w.scale)
    graph.replay()
    assert y is not None and calc_diff(y.double(), double(x) @ double(w).mT) <= 5e-6


def test_aiter_declines_weights_first_seen_in_a_capture() -> None:
    x, w = mx((2, 64)), mx((64, 64))
    aiter.mxfp8_gemv(x.data, x.scale, mx((64, 64)).data, w.scale)
    graph = torch.cuda.CUDAGraph()
    with pytest.warns(UserWarning, match="before a CUDA graph is captured"), torch.cuda.graph(graph):
        assert aiter.mxfp8_gemv(x.data, x.scale, w.data, w.scale) is None
        x.data.view(torch.uint8).add_(0)
