"""DeepGEMM's einsum names: every expression against float64, views and slices, accumulation, empty sizes, and what is refused."""

from __future__ import annotations

import inspect

import pytest
import torch

from narrowgemm import Unsupported
from narrowgemm.compat import deep_gemm as compat
from narrowgemm.compat.deep_gemm import batched as module
from narrowgemm.compat.deep_gemm.utils import per_block_cast_to_fp8, per_channel_cast_to_fp8, per_token_cast_to_fp8

from ._caller import close, randn

B, H, D, R = 21, 3, 256, 384
Pair = tuple[torch.Tensor, torch.Tensor]


def tokens(*shape: int, device: str, e8m0: bool = False) -> Pair:
    """Activations and their scales, as upstream's tests make them."""
    data, scale = per_token_cast_to_fp8(randn(shape[0] * shape[1], shape[2], device=device), use_ue8m0=e8m0)
    return data.view(shape), scale.view(*shape[:2], -1)


def weights(*shape: int, device: str) -> Pair:
    casts = [per_block_cast_to_fp8(w, use_ue8m0=False) for w in randn(*shape, device=device)]
    return torch.stack([c[0] for c in casts]), torch.stack([c[1] for c in casts])


def double(pair: Pair, rows: int) -> torch.Tensor:
    data, scale = pair
    wide = scale.double().repeat_interleave(128, -1)
    return data.double() * (wide.repeat_interleave(128, -2) if rows > 1 else wide)


def gradients(k: int, heads: int, columns: int, device: str) -> Pair:
    data, scale = per_channel_cast_to_fp8(randn(k, heads * columns, device=device), use_ue8m0=False)
    return data.view(k, heads, columns), scale.view(-1, heads, columns)


@pytest.mark.parametrize("rows", [1, B, 600])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_heads_with_weights_of_their_own(where: str, rows: int, dtype: torch.dtype) -> None:
    x, w = tokens(rows, H, R, device=where), weights(H, D, R, device=where)
    want = torch.einsum("bhr,hdr->bhd", double(x, 1), double(w, 128))
    around = torch.full((rows, H + 1, D + 8), 9.0, dtype=dtype, device=where)
    z = around[:, :H, :D]
    compat.fp8_einsum("bhr,hdr->bhd", x, w, z)
    close(z, want)
    assert bool((around[:, H] == 9).all()) and bool((around[:, :, D:] == 9).all()), "written beside d"
    again = torch.empty_like(z)
    compat.fp8_einsum("bhr,hdr->bhd", x, w, again)
    assert torch.equal(again, z)


@pytest.mark.parametrize("rows", [B, 520])
def test_scales_of_e8m0_and_heads_cut_from_wider_rows(where: str, rows: int) -> None:
    data, scale = tokens(rows, H + 2, R, device=where, e8m0=True)
    x, w = (data[:, 1:-1], scale[:, 1:-1]), weights(H, D, R, device=where)
    z = torch.empty(rows, H, D, dtype=torch.bfloat16, device=where)
    compat.fp8_einsum("bhr,hdr->bhd", x, w, z)
    close(z, torch.einsum("bhr,hdr->bhd", double(x, 1), double(w, 128)))


def test_weights_from_their_other_side(where: str) -> None:
    x, w = tokens(B, H, D, device=where), weights(H, D, R, device=where)
    z = torch.empty(B, H, R, dtype=torch.bfloat16, device=where)
    compat.fp8_einsum("bhd,hdr->bhr", x, w, z)
    close(z, torch.einsum("bhd,hdr->bhr", double(x, 1), double(w, 128)))


def test_gradient_of_weights(where: str) -> None:
    x, y = gradients(256, H, D, where), gradients(256, H, R, where)
    z = torch.randn(H, D, R, device=where) * 10
    want = z + torch.einsum("bhd,bhr->hdr", *(d.double() * s.double().repeat_interleave(128, 0) for d, s in (x, y)))
    compat.fp8_einsum("bhd,bhr->hdr", x, y, z, z, recipe=(1, 1, 128))
    close(z, want)


@pytest.mark.parametrize("expr, shapes", [("bhr,hdr->bhd", ((B, H, R), (H, D, R), (B, H, D))),
                                          ("bhd,hdr->bhr", ((B, H, D), (H, D, R), (B, H, R))),
                                          ("bhd,bhr->hdr", ((B, H, D), (B, H, R), (H, D, R)))])
def test_bf16(where: str, expr: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    x = randn(*shapes[0], device=where)
    wide = randn(*shapes[1][:2], shapes[1][2] + 128, device=where)
    y, z, c = wide[..., :shapes[1][2]], torch.empty(shapes[2], dtype=torch.bfloat16, device=where), randn(*shapes[2], device=where)
    want = torch.einsum(expr, x.double(), y.double())
    module.einsum(expr, x, y, z)
    close(z, want)
    module.einsum(expr, x, y, z, c, use_cublaslt=True)
    close(z, want + c.double())


@pytest.mark.parametrize("batch", [1, 129, 192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sum_over_the_batch(where: str, batch: int, dtype: torch.dtype) -> None:
    a, b = randn(batch, 40, 64, device=where), randn(batch, 72, 64, device=where)
    want = torch.einsum("bmk,bnk->mn", a.double(), b.double())
    d = torch.randn(40, 72, device=where).to(dtype)
    before = d.double()
    module.einsum("bmk,bnk->mn", a, b, d, d if dtype == torch.float32 else None)
    close(d, want + before if dtype == torch.float32 else want)


@pytest.mark.gpu
def test_in_a_graph() -> None:
    """What is made while a graph is captured is written only when it runs, so it must not be kept for others."""
    x, w = tokens(B, 5, R, device="cuda"), weights(5, D, R, device="cuda")
    z = torch.empty(B, 5, D, dtype=torch.bfloat16, device="cuda")
    compat.fp8_einsum("bhr,hdr->bhd", x, w, z)      # compiles
    module._full.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compat.fp8_einsum("bhr,hdr->bhd", x, w, z)
    assert not module._full
    want = torch.einsum("bhr,hdr->bhd", double(x, 1), double(w, 128))
    for _ in range(2):
        z.fill_(9)
        graph.replay()
        close(z, want)
    z.fill_(9)
    compat.fp8_einsum("bhr,hdr->bhd", x, w, z)
    close(z, want)
    assert len(module._full) == 1


def test_empty_sizes() -> None:
    w, z = torch.ones(H, D, R, dtype=torch.bfloat16), torch.ones(0, H, D, dtype=torch.bfloat16)
    module.einsum("bhr,hdr->bhd", w.new_empty(0, H, R), w, z)
    d = torch.ones(4, 8)
    module.einsum("bmk,bnk->mn", w.new_empty(0, 4, 16), w.new_empty(0, 8, 16), d, d)
    assert bool((d == 1).all()), "nothing is added"
    module.einsum("bmk,bnk->mn", w.new_empty(0, 4, 16), w.new_empty(0, 8, 16), d)
    assert not d.any()
    z = torch.ones(2, H, D)
    module.einsum("bhr,hdr->bhd", w.new_empty(2, H, 0), w[..., :0], z, z)
    assert bool((z == 1).all())
    module.einsum("bhr,hdr->bhd", w.new_empty(2, H, 0), w[..., :0], z)
    assert not z.any()


def test_signatures() -> None:
    def of(f: object) -> str:
        return " ".join(p.name + ("" if p.default is p.empty else f"={p.default!r}".replace(" ", ""))
                        for p in inspect.signature(f).parameters.values())      # type: ignore[arg-type]

    assert of(compat.fp8_einsum) == "expr a b d c=None recipe=(1,128,128)"
    assert of(module.einsum) == "expr a b d c=None use_cublaslt=False" and compat.einsum is module.einsum


X, W = tokens(4, 2, 128, device="cpu"), weights(2, 128, 128, device="cpu")
Z, A = torch.zeros(4, 2, 128), torch.zeros(4, 2, 16, dtype=torch.bfloat16)


@pytest.mark.parametrize("call, error, match", [
    (lambda: compat.fp8_einsum("bhr,hrd->bhd", X, W, Z), Unsupported, "fp8_einsum 'bhr,hrd->bhd'.*bhr,hdr->bhd"),
    (lambda: compat.fp8_einsum("bmk,bnk->mn", X, W, Z), Unsupported, "fp8_einsum 'bmk,bnk->mn'"),
    (lambda: compat.fp8_einsum("bhr,hdr->bhd", X[0], W, Z), TypeError, "a: got Tensor, expected a pair"),
    (lambda: compat.fp8_einsum("bhr,hdr->bhd", (X[0][0], X[1]), W, Z), ValueError, "a, shape"),
    (lambda: compat.fp8_einsum("bhr,hdr->bhd", X, (W[0], W[1][0]), Z), ValueError, "b, scales, shape"),
    (lambda: compat.fp8_einsum("bhr,hdr->bhd", X, W, Z[0]), ValueError, "d, shape"),
    (lambda: compat.fp8_einsum("bhr,hdr->bhd", X, W, Z[:3]), ValueError, "d, shape"),
    (lambda: compat.fp8_einsum("bhr,hdr->bhd", X, (W[0][:1], W[1][:1]), Z), ValueError, "groups of a and b: got 2 and 1"),
    (lambda: compat.fp8_einsum("bhr,hdr->bhd", X, W, Z, Z.double()), TypeError, "c, dtype"),
    (lambda: compat.fp8_einsum("bhr,hdr->bhd", X, W, Z, recipe=(1, 128)), ValueError, "recipe"),
    (lambda: compat.fp8_einsum("bhr,hdr->bhd", X, W, Z, recipe=(1, 64, 64)), Unsupported, "scale blocks"),
    (lambda: module.einsum("ij,jk->ik", A, A, Z), Unsupported, "einsum 'ij,jk->ik'.*bmk,bnk->mn"),
    (lambda: module.einsum("bmk,bnk->mn", A, A.float(), Z), TypeError, "b, dtype"),
    (lambda: module.einsum("bmk,bnk->mn", A, A[:3], Z), ValueError, "a and b of bmk,bnk->mn"),
    (lambda: module.einsum("bmk,bnk->mn", A, A, Z[0]), ValueError, "d, shape"),
    (lambda: module.einsum("bhr,hdr->bhd", A, A[:2], Z, Z), ValueError, "d, shape"),
    (lambda: module.einsum("bhr,hdr->bhd", A[0], A[:2], Z), ValueError, "a, shape"),
    (lambda: module.einsum("bhr,hdr->bhd", [A], A, Z), TypeError, "a: got list"),
])
def test_what_is_refused(call, error, match) -> None:
    with pytest.raises(error, match=match):
        call()
