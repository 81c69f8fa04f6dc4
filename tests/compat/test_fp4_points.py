"""The evaluation points of DeepGEMM's FP4 branch through its names, on a GPU: 129 of them, and its 38 other dense ones, plain and packed.

Constant and random operands, contiguous groups (debug shapes twice, production shapes three times), masked groups (debug shapes three
times, production shapes ten). Activations are FP4 as there, and FP8 1x128; outputs FP32 and BF16. The production shapes in the packed
form only: as they are, weights run on the portable kernel, which the debug shapes show to be right.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import narrowgemm as ng
from narrowgemm.compat import deep_gemm
from narrowgemm.formats import MXFP4, FP8_1x128, ScaledTensor
from narrowgemm.testing.numerics import KERNEL_GATE, calc_diff
from narrowgemm.testing.suites import FP4_CONTIGUOUS, FP4_MASKED, FP4_SHAPES

pytestmark = pytest.mark.gpu
DEV = "cuda"
DENSE = ((128, 128, 256), (256, 256, 512), (128, 512, 1024), (512, 128, 256), (1, 256, 512), (33, 384, 768), (512, 512, 2048), (640, 256, 256),
         (1024, 1024, 1024))
# (groups, rows a group, N, K); (groups, max_m, expected rows, N, K)
GROUPED = ((1, 128, 128, 256), (2, 128, 128, 256), (4, 128, 256, 512), (4, 256, 128, 256), (8, 128, 512, 256), (4, 384, 256, 512),
           (3, 200, 192, 320), (8, 70, 256, 1024), (2, 512, 384, 768))
MASKED = ((2, 128, 64, 128, 256), (4, 128, 32, 128, 256), (4, 256, 200, 128, 256), (4, 128, 128, 256, 512), (8, 128, 64, 256, 512))
POINTS = [*(("constant", s, 0) for s in DENSE), *(("random", s, 0) for s in DENSE), *(("contiguous", s, i) for s in GROUPED for i in range(2)),
          *(("contiguous", s, i) for s in FP4_CONTIGUOUS for i in range(3)), *(("masked", s, i) for s in MASKED for i in range(3)),
          *(("masked", (g, 4096, m, n, k), i) for g, m in FP4_MASKED for n, k in FP4_SHAPES for i in range(10))]


def test_there_are_129() -> None:
    assert len(POINTS) == len(set(POINTS)) == 129


def large(shape: tuple[int, ...]) -> bool:
    return shape[-1] * shape[-2] > 1 << 22


def operand(shape: tuple[int, ...], kind: str, g: torch.Generator, fmt: ng.Format = MXFP4) -> ScaledTensor:
    """Random values; constant: ones, so that a sum is K exactly."""
    x = torch.ones(shape, device=DEV) if kind == "constant" else torch.randn(shape, generator=g, device=DEV)
    return ng.quantize(x.bfloat16(), fmt)


def pair(x: ScaledTensor, words: bool) -> tuple[Tensor, Tensor]:
    """As callers have it: int8 with codes a byte, or the branch's int32 payload and int32 scales."""
    if x.format != MXFP4:
        return x.data, x.scale
    if not words:
        return x.data.view(torch.int8), x.scale
    codes = torch.nn.functional.pad(x.scale, (0, -x.scale.shape[-1] % 4), value=127)
    return x.data.view(torch.int32), codes.contiguous().view(torch.int32)


def recipes(a: ScaledTensor) -> dict[str, tuple[int, int]]:
    return {"recipe_a": a.format.group, "recipe_b": (1, 32)}


def gate(d: Tensor, a: ScaledTensor, w: ScaledTensor) -> None:
    if not d.numel():
        return
    want = a.dequantize() @ w.dequantize().mT
    assert calc_diff(d, want) <= KERNEL_GATE["fp32" if d.dtype == torch.float32 else "bf16"]


def rows_of(x: ScaledTensor, rows: slice) -> ScaledTensor:
    return ScaledTensor(x.data[rows], x.scale[rows], x.format)


def weights(groups: int, n: int, k: int, g: torch.Generator) -> ScaledTensor:
    parts = [operand((n, k), "random", g) for _ in range(groups)]
    return ScaledTensor(torch.stack([p.data for p in parts]), torch.stack([p.scale for p in parts]), MXFP4)


@pytest.mark.parametrize("a_fmt", (MXFP4, FP8_1x128), ids=lambda f: f.name)
@pytest.mark.parametrize("kind, shape", [(k, s) for k, s, _ in POINTS if k in ("constant", "random")],
                         ids=lambda x: x if isinstance(x, str) else "x".join(map(str, x)))
def test_dense(kind: str, shape: tuple[int, int, int], a_fmt: ng.Format) -> None:
    m, n, k = shape
    g = torch.Generator(DEV).manual_seed(m + n + k)
    a, w = operand((m, k), kind, g, a_fmt), operand((n, k), kind, g)
    for words, b in ((False, None), (True, None), (False, ng.prepack(w)), (True, ng.prepack(w, activations="fp8"))):
        d = torch.full((m, n), torch.nan, dtype=torch.bfloat16 if words else torch.float32, device=DEV)
        deep_gemm.fp8_fp4_gemm_nt(pair(a, words), pair(w, words) if b is None else b, d, **recipes(a))
        gate(d, a, w)
        if kind == "constant" and k <= 256:
            assert bool((d == d.flatten()[0]).all())


# the branch's other tests of dense products: (M, N, K), and the scale codes that both operands have, (lowest, highest); None: quantised
OTHER = [*((s, None) for s in ((128, 128, 512), (128, 256, 256), (256, 128, 1024), (256, 512, 512), (512, 256, 2048), (128, 1024, 768),
                               (1024, 128, 4096))),                                                      # a sweep
         *((s, None) for s in ((2048, 128, 256), (128, 4096, 256), (64, 192, 7168))),                    # asymmetric
         *(((128, 128, 512), (127 + e, 127 + e)) for e in range(-14, 15, 2)),                            # one scale for all
         *(((128, 256, 512), (127 - e, 127 + e)) for e in range(1, 9)),                                  # random scales
         *((s, None) for s in ((512, 256, 512), (512, 512, 1024), (1024, 256, 2048), (2048, 512, 512), (4096, 256, 1024)))]  # multicast


def test_there_are_38_others() -> None:
    assert len(OTHER) == len(set(OTHER)) == 38


@pytest.mark.parametrize("shape, codes", OTHER, ids=lambda x: "quantised" if x is None else "x".join(map(str, x)))
def test_other_dense_points(shape: tuple[int, int, int], codes: tuple[int, int] | None) -> None:
    m, n, k = shape
    g = torch.Generator(DEV).manual_seed(m + 3 * n + k)
    a, w = operand((m, k), "random", g), operand((n, k), "random", g)
    for q in (a, w) if codes is not None else ():
        q.scale.copy_(torch.randint(codes[0], codes[1] + 1, q.scale.shape, generator=g, device=DEV))
    for words, b in ((True, None), (False, ng.prepack(w)), (True, ng.prepack(w, activations="fp8"))):
        d = torch.full((m, n), torch.nan, dtype=torch.float32 if words else torch.bfloat16, device=DEV)
        deep_gemm.fp8_fp4_gemm_nt(pair(a, words), pair(w, words) if b is None else b, d, **recipes(a))
        gate(d, a, w)


@pytest.mark.parametrize("shape", [s for k, s, i in POINTS if k == "contiguous" and i == 0], ids=lambda x: "x".join(map(str, x)))
def test_contiguous(shape: tuple[int, int, int, int]) -> None:
    groups, m, n, k = shape
    g = torch.Generator(DEV).manual_seed(sum(shape))
    w = weights(groups, n, k, g)
    packed, for_fp8 = ng.prepack(w), ng.prepack(w, activations="fp8")
    for draw in range(sum(1 for kind, s, _ in POINTS if (kind, s) == ("contiguous", shape))):
        sizes = [max(1, int(m * random.Random(f"{shape}/{draw}/{i}").uniform(0.7, 1.3))) for i in range(groups)]
        starts, row = [], 0
        for s in sizes:
            starts.append(row)
            row += -(-s // 128) * 128
        ids = torch.full((row,), -1, dtype=torch.int32, device=DEV)
        for i, (start, s) in enumerate(zip(starts, sizes)):
            ids[start:start + s] = i
        a = operand((row, k), "random", g, (MXFP4, FP8_1x128)[draw % 2])
        d = torch.full((row, n), torch.nan, dtype=torch.bfloat16 if large(shape) or draw else torch.float32, device=DEV)
        for b in (packed, for_fp8) if large(shape) else (packed, for_fp8, pair(w, bool(draw))):
            deep_gemm.m_grouped_fp8_fp4_gemm_nt_contiguous(pair(a, False), b, d, ids, **recipes(a))
            for i, (start, s) in enumerate(zip(starts, sizes)):
                gate(d[start:start + s], rows_of(a, slice(start, start + s)), w[i])
            assert not d[ids < 0].any()


@pytest.mark.parametrize("shape", [s for k, s, i in POINTS if k == "masked" and i == 0], ids=lambda x: "x".join(map(str, x)))
def test_masked(shape: tuple[int, int, int, int, int]) -> None:
    """Fewer valid rows than a tile, one valid row, and none, among them."""
    groups, max_m, expected, n, k = shape
    g = torch.Generator(DEV).manual_seed(sum(shape))
    w = weights(groups, n, k, g)
    packed, for_fp8 = ng.prepack(w), ng.prepack(w, activations="fp8")
    for draw in range(sum(1 for kind, s, _ in POINTS if (kind, s) == ("masked", shape))):
        sizes = [min(max_m, int(expected * random.Random(f"{shape}/{draw}/{i}").uniform(0.7, 1.3))) for i in range(groups)]
        if draw % 3 == 2:
            sizes = [(0, 1, 17, 65)[(i + draw) % 4] for i in range(groups)]
        top = max(*sizes, 1)
        fmt = (MXFP4, FP8_1x128)[draw % 2]
        live = operand((groups, top, k), "random", g, fmt)
        a = ScaledTensor(torch.zeros((groups, max_m, live.data.shape[-1]), dtype=live.data.dtype, device=DEV),
                         torch.ones((groups, max_m, live.scale.shape[-1]), dtype=live.scale.dtype, device=DEV), fmt)
        a.data.view(torch.uint8)[:, :top] = live.data.view(torch.uint8)
        a.scale[:, :top] = live.scale
        masked_m = torch.tensor(sizes, dtype=torch.int32, device=DEV)
        d = torch.full((groups, max_m, n), 7.0, dtype=torch.float32 if draw == 0 else torch.bfloat16, device=DEV)
        for b in (packed, for_fp8) if large(shape) else (packed, for_fp8, pair(w, bool(draw))):
            deep_gemm.m_grouped_fp8_fp4_gemm_nt_masked(pair(a, False), b, d, masked_m, expected, **recipes(a))
            for i, s in enumerate(sizes):
                gate(d[i, :s], rows_of(a[i], slice(0, s)), w[i])
                assert bool((d[i, s:] == 7).all()), "rows that a group doesn't use are not written"
