"""On a GPU: aiter's own test points at their full size through its names, each against FP64 over the same bits.

105 dense ones, and those of the experts, to which the weights of MiniMax-M3 without expert parallelism are added: past 2 GiB, where the
source declines.
"""

from __future__ import annotations

import pytest
import torch

import narrowgemm as ng
from narrowgemm.compat import aiter
from narrowgemm.formats import MXFP8, ScaledTensor
from narrowgemm.testing.suites import M3_DENSE

from ..test_mxfp8_gpu import DEV, GATE, calc_diff, check, double, extremes, mx
from .test_aiter import SOURCE

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]
ROWS = (1, 2, 4, 8, 16, 32, 64)


# every point compiles a kernel or two of its own, and `bench` holds the same products to the same gates: by default a fifth of them
@pytest.mark.parametrize("k, n", [pytest.param(*x, marks=[pytest.mark.slow] * (i % 5 > 0)) for i, x in enumerate(M3_DENSE)])
def test_dense_points(k: int, n: int) -> None:
    """Weights as they are, from an address on 16 bytes; and M = 128, FP16 and FP32 output, where the source declines."""
    w = mx((n, k), (112, 122))
    wide = double(w).mT.contiguous()
    for m in (*ROWS, 128):
        x = mx((m, k), (112, 122))
        for dtype in GATE if m == 64 else (torch.bfloat16,):
            y = aiter.mxfp8_gemv(x.data.view(torch.uint8), x.scale, w.data.view(torch.uint8), w.scale, dtype)
            assert y is not None and y.shape == (m, n) and y.dtype == dtype
            assert calc_diff(y.double(), double(x) @ wide) <= GATE[dtype], (m, dtype)


@pytest.mark.parametrize("e, n, k, a_div, weighted, tokens, top_k", [*SOURCE, (256, 1536, 6144, 4, False, 4, 4), (128, 6144, 384, 1, True, 8, 1)])
def test_points_of_the_experts(e: int, n: int, k: int, a_div: int, weighted: bool, tokens: int, top_k: int) -> None:
    w = mx((e, n, k), (112, 122))
    x = mx((tokens * top_k // a_div, k), (112, 122))
    ids = torch.rand(tokens, e, device=DEV).topk(top_k).indices.int()
    ids[0, 0] = e - 1
    weight = torch.rand(tokens * top_k, device=DEV) if weighted else None
    layout = ng.moe_align_block_size(ids, 64, e, a_div=a_div)
    for dtype in (torch.bfloat16, torch.float32):
        y = aiter.grouped_gemm_mxfp8(x.data, x.scale, w.data, w.scale, layout.sorted_token_ids, layout.expert_ids,
                                     layout.num_tokens_post_padded, tokens * top_k, top_k, 64, dtype, a_div, weight, ids)
        assert y is not None and y.shape == (tokens * top_k, n)
        rows = double(x)
        want = torch.stack([double(w[g]) @ rows[s // a_div] for s, g in enumerate(ids.flatten().tolist())])
        want = want if weight is None else want * weight[:, None]
        assert calc_diff(y.double(), want) <= GATE[dtype]


EXTREMES = ("ends", "ones", "spread", "nan", "zeros")


def planted(rows: tuple[int, ...], kind: str, other: bool) -> ScaledTensor:
    q = mx((rows[0] * rows[1], rows[2]) if len(rows) == 3 else rows)
    extremes(q, kind, other)
    if len(rows) == 2:
        return q
    return ScaledTensor(q.data.view(rows), q.scale.view(*rows[:2], -1), MXFP8)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("tokens", [3, 130])
@pytest.mark.parametrize("side", ["weights", "activations"])
@pytest.mark.parametrize("kind", EXTREMES)
def test_exponent_extremes_of_experts(kind: str, side: str, tokens: int, packed: bool) -> None:
    """As of dense products: by slot over vLLM's layout, and by offsets; a NaN stays with its token, or its expert's column."""
    e, n, k, top_k = 3, 96, 384, 2
    x, w = planted((max(tokens, 4), k), kind, side == "weights"), planted((e, n, k), kind, side != "weights")
    x = ScaledTensor(x.data[:tokens], x.scale[:tokens], MXFP8)
    ids = torch.rand(tokens, e, device=DEV).topk(top_k).indices.int()
    slots = torch.einsum("tk,enk->ten", double(x), double(w))[torch.arange(tokens, device=DEV)[:, None], ids.long()].view(-1, n)
    weights = ng.prepack(w) if packed else w
    order = ng.sort_by_expert(ids, e)
    for layout, extra in ((ng.moe_align_block_size(ids, 16, e, a_div=top_k), {}),
                          (order.layout, {"row_map": order.row_map, "top_k": top_k, "a_div": top_k})):
        y = ng.routed_gemm(x, weights, layout, out_dtype=torch.float32, **extra)        # a slot each, all of them computed
        check(y, slots)
