"""Columns of A that are far larger than others: found, left out of what is folded, and kept beside with their weights."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import Tensor

from narrowgemm.formats import MXFP8, ScaledTensor
from narrowgemm.reference.quantize import dequantize, quantize

from .. import _gluon as emu
from .test_fold_mixed_prep import BLOCKS, COLUMN, PITCH, K, M, emulated, emulated_pointer, stand_in, take, values

LIMIT = 128
LOOKS = 4 * BLOCKS


@cache
def outliers():
    """The device module beside `emulated()`'s, with its stand-ins."""
    kernels = emulated()
    names = kernels.looked.__globals__
    picks = kernels.place_block.__globals__
    names["take"] = partial(take, picks)
    names["over_code"], names["least_of"] = kernels.over_code, kernels.least_of
    return kernels, names


@cache
def kept_beside():
    return emu.load_device_module("fold_both_rest_device").rest_kernel


@cache
def beside_kernels(device: str):
    if device == "cpu":
        kernels = emu.load_device_module("fold_beside_device")
        folding, removing = kernels.fold_as_one.__globals__, kernels.pick_removed.__globals__
        stand_in(folding)
        removing["take"] = partial(take, folding["place_block"].__globals__)
        removing["over_code"], removing["least_of"] = folding["over_code"], folding["least_of"]
        return kernels
    from narrowgemm.kernels.gluon.sm90 import fold_beside_device

    return fold_beside_device


def run(device: str, a: ScaledTensor, w: Tensor | None = None, index: list[int] | None = None, early: int = 0, layout: int = 0, groups: int = 1,
        aligned: bool = True, beside: bool = False) -> dict[str, Tensor]:
    """Picks of weights there are none, but room for 64. w [rows, K] E4M3. beside: A is folded and looked at in one launch."""
    m, rb = a.shape[-2], -(-a.shape[-2] // 64)
    w = torch.zeros(1, K, dtype=torch.float8_e4m3fn) if w is None else w
    given = {"x": a.data.view(torch.uint8), "s": a.scale, "index": torch.tensor(index or [0], dtype=torch.int32), "w": w.view(torch.uint8),
             "starts": torch.zeros(groups, BLOCKS + 1, dtype=torch.int32), "entries": torch.zeros(groups, 64, dtype=torch.int32)}
    out = {"y": torch.full((1, m, BLOCKS * 128), 7, dtype=torch.uint8), "scale": torch.full((1, BLOCKS, 4, COLUMN), 7.0),
           "flags": torch.full((1, rb, BLOCKS), 7, dtype=torch.int32), "count": torch.full((2,), 7, dtype=torch.int32),
           "looks": torch.full((5 * LOOKS,), 7, dtype=torch.int32), "list": torch.full((LIMIT,), 7, dtype=torch.int32),
           "picked": torch.full((64 + LIMIT, PITCH), 7.0, dtype=torch.bfloat16), "rest": torch.full((len(w), LIMIT), 7.0, dtype=torch.bfloat16)}
    given, out = ({k: v.to(device) for k, v in x.items()} for x in (given, out))
    x, s = given["x"], given["s"]
    each = 16 if aligned else 1
    if device == "cpu":
        kernels, names = outliers()
        look, weights, pointer = names["look_kernel"], kept_beside(), emulated_pointer
    else:
        from narrowgemm.kernels.gluon.sm90 import fold_both_rest_device
        from narrowgemm.kernels.gluon.sm90 import fold_mixed_prep_device as kernels
        from narrowgemm.kernels.gluon.sm90 import fold_outliers_device as own
        look, weights, pointer = own.look_kernel, fold_both_rest_device.rest_kernel, Tensor.view
    source = pointer(x, torch.int32 if aligned else torch.uint8)
    places = {k: pointer(v, v.dtype) for k, v in (given | out).items() if k not in ("w", "rest")}

    def call(kernel, grid: int, arguments: tuple, **constants) -> None:
        if device == "cpu":
            emu.launch(partial(kernel, **constants), grid, *arguments)
        else:
            kernel[(grid,)](*arguments, **constants, num_warps=4)

    if device == "cpu":
        of_w = emu.Pointer(given["w"].view(torch.float8_e4m3fn).float().numpy().reshape(-1), 0, emu.float8e4nv)
        rest = np.full(out["rest"].numel(), 7.0, np.float32)
        to = emu.Pointer(rest, 0, emu.bfloat16)
    else:
        of_w, to = given["w"].view(torch.float8_e4m3fn), out["rest"]
    if beside:
        own = beside_kernels(device)
        of_a = (source, places["s"], x.stride(-2) // each, *s.stride()[-2:], pointer(out["y"], torch.int32), places["scale"], places["flags"],
                places["looks"])
        picked = pointer(out["picked"], torch.int32)
        # of what nothing is read from or written to here
        wide = (source, places["s"], places["scale"], out["rest"], places["scale"], pointer(out["y"], torch.int64), places["s"])
        sizes = (BLOCKS, rb, COLUMN // 4, groups, 64, PITCH // 4)
        call(own.fold_beside_kernel, (rb + 4) * BLOCKS, (*of_a, places["starts"], places["entries"], picked, m, K, *sizes), ALIGNED=aligned)
        call(own.rest_beside_kernel, 5, (*of_a, places["count"], places["list"], picked, *wide, of_w, to, of_w, K, m, len(w), K, *sizes, 100),
             ALIGNED=aligned, BLOCKS=4, FACTOR=False, OUTLYING=16)
        if device == "cpu":
            out["rest"] = torch.from_numpy(rest).view(len(w), LIMIT).bfloat16()
        return out | {"y": out["y"].view(torch.float8_e4m3fn)}
    call(look, 4 * BLOCKS, (source, places["s"], places["looks"], places["count"], m, K, BLOCKS, rb, x.stride(-2) // each, *s.stride()[-2:]),
         ALIGNED=aligned)
    call(kernels.fold_mixed_kernel, rb * BLOCKS,
         (source, places["s"], places["index"], pointer(out["y"], torch.int32), places["scale"], places["flags"], places["count"],
          places["looks"], places["list"], places["starts"], places["entries"], pointer(out["picked"], torch.int32), m, K, BLOCKS, rb, 0, x.stride(-2) // each, 0,
          *s.stride()[-2:], COLUMN // 4, groups, 64, PITCH // 4),
         MASKED=False, ALIGNED=aligned, PROBES=8, PICKS=True, LAYOUT=layout, GROUPS=32, EARLY=early or 1, REMOVE=4)
    call(weights, 3, (places["count"], places["index"], None, None, K, K // 32, 1, *[None] * 7, of_w, places["list"], to, m, len(w), K, BLOCKS, 1, 100),
         LAYOUT=0, FACTOR=False, OUTLYING=16, WHOLE=False)
    if device == "cpu":
        out["rest"] = torch.from_numpy(rest).view(len(w), LIMIT).bfloat16()
    return out | {"y": out["y"].view(torch.float8_e4m3fn)}


def activations(columns: list[int], times: float = 30) -> ScaledTensor:
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(0))
    x[:, columns] *= times
    return quantize(x, MXFP8)


@pytest.mark.parametrize("columns", [[3, 50, 127, 128, 150, 159, 191, 300, 351], []], ids=["outliers", "none"])
def test_folded_and_looked_at_in_one_launch(device: str, columns: list[int]) -> None:
    """Bit for bit what three launches make of it."""
    a = activations(columns)
    w = torch.randn(70, K, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    want, got = run(device, a, w), run(device, a, w, beside=True)
    assert got["count"].tolist() == [0, len(columns)]
    for name in ("y", "scale", "flags", "looks", "picked", "rest"):
        assert torch.equal(got[name].contiguous().view(torch.uint8), want[name].contiguous().view(torch.uint8)), name
    assert got["list"].tolist()[:len(columns)] == columns


@pytest.mark.parametrize("kind", ["apart", "far out", "too many columns"])
def test_what_does_not_fold_is_said_to_the_product(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setitem(beside_kernels("cpu").__dict__, "make_wide", lambda *given: made.append(given))
    a = activations([k for k in range(K) if k // 32 % 2 == 0 and k % 32 < 22] if kind == "too many columns" else [], 200)
    if kind == "apart":
        a.scale[:, ::2] += 20
    elif kind == "far out":
        a.scale[70] = 200
    got = run("cpu", a, beside=True)
    assert got["count"].tolist() == [1 << 30, 0] and (got["rest"] == 7).all() and len(made) == 5


@pytest.mark.parametrize("layout, index", [(0, None), (1, [0] * 37 + [2] * 53 + [-1] * 10 + [1] * 50), (2, [0, 37, 90, 150])])
@pytest.mark.parametrize("early", [1, 100])
def test_large_columns_are_left_out_and_kept_beside(device: str, early: int, layout: int, index: list[int] | None) -> None:
    columns = [3, 50, 127, 128, 150, 159, 191, 300, 351]
    a = activations(columns)
    w = torch.randn(70, K, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    groups = 3 if layout else 1
    got = run(device, a, w, index, early, layout, groups)
    count, removed = got["count"].tolist()[:2]
    want = dequantize(a, torch.float32)
    kept = torch.ones(K, dtype=torch.bool)
    kept[columns] = False
    assert removed == len(columns)
    assert torch.equal(values(got).cpu()[0, :, :K], (want * kept).double())
    flags = got["flags"].cpu()[0]
    assert count == sum(f.bit_count() for f in flags.flatten().tolist()) <= 3
    picked = got["picked"].float().cpu()
    for r in range(M):
        group = sum(r >= e for e in index[1:]) if layout == 2 else 0
        place = r + index[group] % 8 // 4 * 4 + 128 * group if layout == 2 else r
        assert torch.equal(picked[64: 64 + removed, place], want[r, columns]) and not picked[64 + removed: 128, place].any(), r
    rest = got["rest"].float().cpu()
    assert torch.equal(rest[:, :removed], w.float()[:, columns]) and not rest[:, removed:64].any()


def test_data_without_large_columns_is_folded_as_ever(device: str) -> None:
    a = activations([])
    got = run(device, a)
    assert got["count"].tolist()[1] == 0 and torch.equal(values(got).cpu()[0, :, :K], dequantize(a, torch.float32).double())
    assert (got["picked"] == 7).all() and (got["rest"] == 7).all()


def test_more_large_columns_than_there_is_room_for(device: str) -> None:
    """Nothing is left out, and nothing is tried."""
    few, many = ([k for k in range(K) if k // 32 % 2 == 0 and k % 32 < each] for each in (21, 22))
    assert len(few) <= LIMIT < len(many)
    got = run(device, activations(few, 200))
    assert got["count"].tolist()[1] == len(few)
    got = run(device, activations(many, 200))
    assert got["count"].tolist() == [1 << 30, 0] and (got["flags"] == 7).all() and (got["picked"] == 7).all() and (got["rest"] == 7).all()
