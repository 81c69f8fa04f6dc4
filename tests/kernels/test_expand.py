"""The launch in front of the Hopper BF16 product: packed weights and activations in BF16, bit for bit, in every layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from narrowgemm.formats import MXFP4, MXFP8, Format, ScaledTensor
from narrowgemm.kernels.gluon.sm90 import expand, expand_rows, narrow
from narrowgemm.kernels.gluon.sm90.narrow_tile import KINDS
from narrowgemm.prepack import prepack, row_order
from narrowgemm.reference.quantize import dequantize

N, K = 100, 352        # a tile of rows that is not full, a chunk of K that is cut short
LAYOUTS = {"dense": None, "offsets": [0, 5, 5, 9], "masked": [2, 0, 3], "psum": [5, 5, 9], "contiguous": [0] * 5 + [2] * 4}


def mx(fmt: Format, *shape: int, codes: tuple[int, int] = (90, 125), seed: int = 0) -> ScaledTensor:
    """Random bits: every code that is a number."""
    g = torch.Generator().manual_seed(seed)
    *lead, k = shape
    data = torch.randint(0, 256, (*lead, k // fmt.elem.per_byte), dtype=torch.uint8, generator=g)
    if fmt.element == "e4m3":
        data[(data & 127) == 127] = 3
    return ScaledTensor(data.view(fmt.elem.dtype), torch.randint(*codes, fmt.scale_shape(shape), dtype=torch.uint8, generator=g), fmt)


def run(device: str, layout: str, a: ScaledTensor, b: ScaledTensor, plain: bool = False) -> dict[str, Tensor]:
    """Everything that the launch writes; 7 is what was there. plain: weights are not packed."""
    from narrowgemm.kernels.gluon.sm90.expand_device import expand_kernel

    packed = prepack(b).to(device)
    a = a.to(device)
    groups, kx, units = packed.groups, expand.columns(K), expand.unit_rows(N) // 64
    m = a.shape[-2]
    rows = m * (groups if layout == "masked" else 1)
    out = {"x": torch.full((rows, kx), 7.0, dtype=torch.bfloat16, device=device), "factor": torch.full((rows,), 7.0, device=device),
           "one": torch.full((1,), 7.0, device=device),
           "weights": torch.full((groups, units * 64, kx), 7.0, dtype=torch.bfloat16, device=device),
           "columns": torch.full((N,), 7.0, device=device)}
    index = torch.tensor(LAYOUTS[layout] or [0], dtype=torch.int64 if layout == "offsets" else torch.int32, device=device)
    steps = 2       # pieces of K: there is one, and the second is not there
    of_rows = -(-rows // expand.PREP_ROWS) * -(-kx // (expand.PREP_K * steps))
    of_weights = groups * units * (64 // expand.WEIGHT_ROWS) * -(-kx // (128 * expand.CHUNKS))
    w, fields, weights = packed.data.view(torch.int32), packed.scale, out["weights"].view(torch.int32)
    strides = (0, 0, 0)
    if plain:
        of_weights = -(-N // expand.PREP_ROWS) * -(-kx // (expand.PREP_K * steps))
        wide = b.to(device)
        w, fields, weights, strides = wide.data, wide.scale, out["weights"], (wide.data.stride(-2), *wide.scale.stride())
    cfg = expand.PrepStatic(KINDS[layout], narrow.XKINDS[a.format.element, "e8m0"], 32, b.format.element == "e4m3", PLAIN=plain)
    sxg, ssg = (a.data.stride(0), a.scale.stride(0)) if layout == "masked" else (0, 0)
    expand_kernel[(of_rows + of_weights,)](
        a.data, a.scale, out["x"], out["factor"], out["one"], w, fields, weights, out["columns"], index, rows, m, 1, K, kx, units, groups,
        of_rows, steps, sxg, a.data.stride(-2), ssg, a.scale.stride(-2), a.scale.stride(-1), N, steps, *strides, out["one"], 0, cfg)
    return {**out, "packed_factor": packed.factor}


def operands(layout: str, fa: Format, fb: Format, k: int = K, **kw) -> tuple[ScaledTensor, ScaledTensor]:
    groups = 1 if layout == "dense" else 3
    a = mx(fa, *((groups, 4) if layout == "masked" else (9,)), k, seed=1, **kw)
    return a, mx(fb, *(() if layout == "dense" else (groups,)), N, k, seed=2, **kw)


def same(got: Tensor, want: Tensor) -> None:
    """Bit for bit: signs of zeros too."""
    assert torch.equal(got.cpu().float().view(torch.int32), want.float().view(torch.int32))


@pytest.mark.parametrize("layout, fa, fb", [("offsets", MXFP8, MXFP8), ("masked", MXFP4, MXFP8), ("psum", MXFP8, MXFP4),
                                            ("dense", MXFP8, MXFP8), ("contiguous", MXFP4, MXFP4)])
def test_brings_what_is_in_use_and_nothing_else(device: str, layout: str, fa: Format, fb: Format) -> None:
    a, b = operands(layout, fa, fb)
    got = run(device, layout, a, b)
    x, w = dequantize(a, torch.float32).reshape(-1, K), dequantize(b, torch.float32).reshape(-1, N, K)
    used = torch.tensor([0, 1, 8, 9, 10] if layout == "masked" else range(9))
    same(got["x"][used, :K], x[used])
    assert not got["x"][used, K:].any() and (got["factor"][used] == 1).all() and got["one"].item() == 1
    rest = [i for i in range(len(x)) if i not in used.tolist()]
    assert (got["x"][rest] == 7).all() and (got["factor"][rest] == 7).all()
    assert got["packed_factor"] is None
    order = row_order(N)
    for g in range(len(w)):
        if layout in ("offsets", "masked", "psum") and g == 1:     # an expert without rows
            assert (got["weights"][g] == 7).all()
            continue
        same(got["weights"][g][order >= 0][:, :K], w[g])
        assert not got["weights"][g][:, K:].any() and not got["weights"][g][N:].any()


@pytest.mark.parametrize("fa, fb, codes", [(MXFP8, MXFP4, (0, 6)), (MXFP4, MXFP8, (250, 255))])
def test_shifts_what_bf16_can_not_hold(device: str, fa: Format, fb: Format, codes: tuple[int, int]) -> None:
    a, b = operands("dense", fa, fb, codes=codes)
    a.scale[4, 2], b.scale[5, 1] = 255, 255
    got = run(device, "dense", a, b)
    factor, wide = got["factor"].cpu().double(), got["x"].cpu().double()[:, :K]
    scale = torch.exp2(a.scale.double() - 127).repeat_interleave(32, -1)
    want = dequantize(ScaledTensor(a.data, torch.full_like(a.scale, 127), fa), torch.float32).double() * scale
    rows = [r for r in range(9) if r != 4]
    assert torch.equal((wide * factor[:, None])[rows], want[rows]) and factor[4].isnan()
    factor, wide = got["packed_factor"].cpu().double()[0, :N], got["weights"].cpu().double()[0, :N, :K]
    scale = torch.exp2(b.scale.double() - 127).repeat_interleave(32, -1)
    want = dequantize(ScaledTensor(b.data, torch.full_like(b.scale, 127), fb), torch.float32).double() * scale
    rows = [r for r in range(N) if r != 5]
    assert torch.equal((wide * factor[:, None])[rows], want[rows]) and factor[5].isnan()


@pytest.mark.parametrize("codes", [(90, 125), (0, 6)])
def test_weights_that_are_not_packed(device: str, codes: tuple[int, int]) -> None:
    """Rows of weights as rows of A are, with a factor each."""
    a, b = operands("dense", MXFP8, MXFP8, codes=codes)
    b.scale[5, 1] = 255
    got = run(device, "dense", a, b, plain=True)
    factor, wide = got["columns"].cpu().double(), got["weights"].cpu().double()[0]
    scale = torch.exp2(b.scale.double() - 127).repeat_interleave(32, -1)
    rows = [r for r in range(N) if r != 5]
    assert torch.equal((wide[:N, :K] * factor[:, None])[rows], (b.data.double() * scale)[rows]) and factor[5].isnan()
    assert not wide[:N, K:].any() and (wide[N:] == 7).all() and (factor[rows] == 1).all() == (codes[0] > 0)
    x = got["x"].cpu().double()[:, :K] * got["factor"].cpu().double()[:, None]
    assert torch.equal(x, a.data.double() * torch.exp2(a.scale.double() - 127).repeat_interleave(32, -1))


@pytest.mark.parametrize("k, codes, rows", [(K, (90, 125), (2, 1)), (2176, (0, 6), (2, 8)), (2176, (90, 125), (4, 4))], ids=str)
def test_whole_rows(device: str, k: int, codes: tuple[int, int], rows: tuple[int, int]) -> None:
    """As above, by whole rows; among rows that need no shift, some whose single code lies just beyond BF16, or within it."""
    from narrowgemm.kernels.gluon.sm90.expand_rows_device import PIECE, SHIFTED, expand_rows_kernel

    a, b = operands("dense", MXFP8, MXFP8, k, codes=codes)
    if codes[0]:
        for row, code in ((5, 255), (17, 2), (26, 3), (35, 240), (44, 241), (53, 254)):
            b.scale[row, -1] = code
        b.data.view(torch.uint8)[9, 3] = 0x7F
    wide = ScaledTensor(a.data, a.scale.mT.contiguous().mT, MXFP8).to(device), b.to(device)
    kx, made = expand.columns(k), []
    flag, one = torch.full((2,), 7, dtype=torch.int32, device=device), torch.full((1,), 7.0, device=device)
    for x in wide:
        made += [torch.full((len(x.data), kx), 7.0, dtype=torch.bfloat16, device=device), torch.full((len(x.data),), 7.0, device=device)]
    cfg = expand_rows.RowsStatic(-(-kx // 2048), *rows)
    of_rows = -(-9 // rows[0])

    def bring(n: int) -> None:
        expand_rows_kernel[(of_rows + -(-n // rows[1]),)](
            wide[0].data, wide[0].scale, made[0], made[1], flag, one, wide[1].data, wide[1].scale, made[2], made[3], 9, k, kx, of_rows, k,
            *wide[0].scale.stride(), n, k, *wide[1].scale.stride(), cfg)

    bring(5)        # of which none is shifted, if its codes are those of the others
    assert PIECE.value == expand_rows.PIECE and (flag[0] == SHIFTED.value) == (codes[0] == 0) and one.item() == 1 and (made[2][5:] == 7).all() and (made[3][5:] == 7).all()
    bring(N)
    assert flag.tolist() == [SHIFTED.value, 7]
    for x, y, factor in ((a, made[0], made[1]), (b, made[2], made[3])):
        got, of_row = y.cpu().double(), factor.cpu().double()
        want = x.data.double() * torch.exp2(x.scale.double() - 127).repeat_interleave(32, -1)
        lost = [5, 9, 44, 53] if codes[0] and x is b else []        # NaN, and what lies too far apart in one row
        kept = [r for r in range(len(want)) if r not in lost]
        assert torch.equal((got[:, :k] * of_row[:, None])[kept], want[kept]) and not got[:, k:].any()
        if lost:
            assert of_row[5].isnan() and got[9, 3].isnan() and [r for r in range(N) if of_row[r] != 1] == [5, 17, 44, 53]
            assert of_row[[17, 44, 53]].log2().tolist() == [-1, 1, 14]


def test_rescales_rows_and_columns_with_a_factor(device: str) -> None:
    from narrowgemm.kernels.gluon.sm90.expand_device import rescale_kernel
    from narrowgemm.kernels.gluon.sm90.expand_rows_device import SHIFTED

    shifted, none = (torch.tensor([v], dtype=torch.int32, device=device) for v in (SHIFTED.value, 0))
    y = torch.randn(4, 1100, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    factor = torch.tensor([1.0, 0.25, float("nan"), 2.0], device=device)
    want = (y.float() * factor[:, None]).bfloat16()
    rescale_kernel[(2, 3)](y, factor, factor, none, 4, 1100, 1100, BM=2, BN=512, STEP=256, COLS=False, FLAG=False)
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y[[0, 1, 3]], want[[0, 1, 3]])
    columns = torch.ones(1100, device=device)
    columns[1050] = 0.5
    want = (y.float() * factor[:, None] * columns).bfloat16()
    rescale_kernel[(2, 3)](y, factor, columns, shifted, 4, 1100, 1100, BM=2, BN=512, STEP=256, COLS=True, FLAG=True)
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y[[0, 1, 3]], want[[0, 1, 3]])
    ones = torch.ones(4, device=device)
    before = y.clone()
    rescale_kernel[(2, 3)](y, ones, torch.ones(1100, device=device), none, 4, 1100, 1100, BM=2, BN=512, STEP=256, COLS=True, FLAG=False)
    rescale_kernel[(2, 3)](y, factor, columns, none, 4, 1100, 1100, BM=2, BN=512, STEP=256, COLS=True, FLAG=True)
    assert torch.equal(y[[0, 1, 3]], before[[0, 1, 3]])
