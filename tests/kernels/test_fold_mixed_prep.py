"""A's scales of 128 of K folded into one, 64 rows at a time, where that is exact: bits, flags, and what else goes to the product."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import Tensor

from narrowgemm.formats import MXFP8, ScaledTensor
from narrowgemm.prepack_folded import fold
from narrowgemm.reference.quantize import dequantize, quantize

from .. import _gluon as emu
from . import _ptx

M, K = 150, 352
BLOCKS, COLUMN = 3, 152
PITCH, PROBES = 576, 8


def emulated_pointer(x: Tensor, dtype: torch.dtype) -> emu.Pointer:
    """bf16 as the words that it lies in."""
    flat = x.reshape(-1)
    return emu.Pointer((flat.view(torch.int32) if dtype is torch.bfloat16 else flat.view(dtype)).numpy())


@cache
def emulated():
    """The device module, its PTX by the words of `_ptx` and by what the conversions are in torch."""
    kernels = emu.load_device_module("fold_mixed_prep_device")
    stand_in(kernels.__dict__)
    return kernels


def stand_in(names: dict) -> None:
    """What PTX does, in the modules that a device module's `names` are of."""
    words = names["over_code"].__globals__
    words["over"] = over
    words["room_of"] = lambda x: word(_ptx.run(words["ROOM_ASM"], x.a.view(np.uint32))[0])
    picks = names["place_block"].__globals__
    picks["turned"] = lambda *rows: tuple(map(word, _ptx.run(picks["TURN_ASM"], *(np.ascontiguousarray(r.a).view(np.uint32) for r in rows))))
    picks["put"], picks["take"] = put, partial(take, picks)


def word(x: np.ndarray) -> emu.Tensor:
    return emu.Tensor(np.ascontiguousarray(x).view(np.int32))


def elements(x: np.ndarray) -> Tensor:
    """Words to four values each."""
    x = np.ascontiguousarray(x)
    return torch.from_numpy(x.view(np.uint8).reshape(*x.shape, 4)).view(torch.float8_e4m3fn).float()


def over(x: emu.Tensor, s: emu.Tensor) -> tuple[emu.Tensor, emu.Tensor]:
    """`FOLD_ASM`."""
    scale = torch.from_numpy(np.ascontiguousarray(np.broadcast_to(s.a, x.a.shape)).view(np.float16).reshape(*x.a.shape, 2)[..., :1].astype(np.float32))
    want = elements(x.a) * scale
    y = want.clamp(-448, 448).to(torch.float8_e4m3fn)
    lost = ((y.float() != want) & ~want.isnan()).any(-1)
    return word(y.view(torch.uint8).numpy().reshape(*x.a.shape, 4).view(np.uint32)[..., 0]), word(lost.int().numpy())


def put(place: emu.Shared, at: emu.Tensor, value: emu.Tensor) -> None:
    at, value = np.broadcast_arrays(at.a, value.a)
    assert not (at % 4).any() and at.min() >= 0 and at.max() < 4 * place.a.size
    place.a.reshape(-1)[at // 4] = value


def take(names: dict, place: emu.Shared, k: emu.Tensor, quad: emu.Tensor) -> tuple[emu.Tensor, emu.Tensor]:
    """`TAKE_ASM`."""
    words = place.a.reshape(-1)
    x = elements(words[names["word_at"](k, quad).a // 4])
    scales = words[names["scale_at"](k >> 5, quad * 4).a[..., None] // 4 + np.arange(4)].view(np.float32)
    bits = (x * torch.from_numpy(scales)).bfloat16().contiguous().view(torch.int32).numpy()
    return word(bits[..., 0]), word(bits[..., 1])


def run(device: str, a: ScaledTensor, index: list[int] | None = None, picks: tuple | None = None, probes: list[int] | None = None,
        aligned: bool = True, early: int = 2) -> dict[str, Tensor]:
    """7 is what was there. picks: (layout, groups, the entries' starts, entries), by index's groups. probes: what the look in front says,
    instead of what it finds."""
    layout, groups, starts, entries = picks or (0, 1, None, None)
    planes, masked = (a.shape[0], True) if a.data.dim() == 3 else (1, False)
    m = a.shape[-2]
    rb = -(-m // 64)
    none = torch.zeros(4, dtype=torch.int32)
    given = {"x": a.data.view(torch.uint8), "s": a.scale, "index": torch.tensor(index or [0], dtype=torch.int32),
             "starts": none if starts is None else starts, "entries": none if entries is None else entries}
    out = {"y": torch.full((planes, m, BLOCKS * 128), 7, dtype=torch.uint8),
           "scale": torch.full((planes, BLOCKS, 4, COLUMN), 7.0),
           "flags": torch.full((planes, rb, BLOCKS), 7, dtype=torch.int32),
           "count": torch.full((2,), 7, dtype=torch.int32),
           "probes": torch.full((PROBES,), 7, dtype=torch.int32),
           "picked": torch.full((1 if entries is None else entries.shape[1], PITCH), 7.0, dtype=torch.bfloat16)}
    given, out = ({k: v.to(device) for k, v in x.items()} for x in (given, out))
    each = 16 if aligned else 1
    x, s = given["x"], given["s"]
    strides = (x.stride(0) // each if masked else 0, x.stride(-2) // each, s.stride(0) if masked else 0, *s.stride()[-2:])
    shape = (m, K, BLOCKS, rb)
    if device == "cpu":
        kernels, pointer = emulated(), emulated_pointer
    else:
        from narrowgemm.kernels.gluon.sm90 import fold_mixed_prep_device as kernels
        pointer = Tensor.view
    source = pointer(x, torch.int32) if aligned else pointer(x, torch.uint8)
    places = {k: pointer(v, v.dtype) for k, v in (given | out).items()}

    def call(kernel, grid: int, arguments: tuple, **constants) -> None:
        if device == "cpu":
            emu.launch(partial(kernel, **constants), grid, *arguments)
        else:
            kernel[(grid,)](*arguments, **constants, num_warps=4)

    call(kernels.probe_kernel, PROBES, (source, places["s"], places["index"], places["probes"], places["count"], *shape, planes, *strides),
         MASKED=masked, ALIGNED=aligned)
    if probes is not None:
        out["probes"].copy_(torch.tensor(probes))
    call(kernels.fold_mixed_kernel, planes * rb * BLOCKS,
         (source, places["s"], places["index"], pointer(out["y"], torch.int32), places["scale"], places["flags"], places["count"],
          places["probes"], places["count"], places["starts"], places["entries"], pointer(out["picked"], torch.int32), *shape, *strides, COLUMN // 4, groups,
          0 if entries is None else entries.shape[1], PITCH // 4),
         MASKED=masked, ALIGNED=aligned, PROBES=PROBES, PICKS=entries is not None, LAYOUT=layout, GROUPS=32, EARLY=early)
    return out | {"y": out["y"].view(torch.float8_e4m3fn)}


def values(out: dict[str, Tensor]) -> Tensor:
    """[planes, M, BLOCKS * 128] in FP64."""
    planes, m, k = out["y"].shape
    scale = out["scale"][..., :m].double().permute(0, 3, 1, 2).reshape(planes, m, k // 32).repeat_interleave(32, -1)
    return out["y"].double() * scale


def test_values_stay_and_flags_say_where_there_are_more_scales(device: str) -> None:
    a = quantize(torch.randn(M, K, generator=torch.Generator().manual_seed(0)), MXFP8)
    assert a.scale is not None
    spoiled = {(0, 1): (3, 4), (2, 2): (149, 10)}               # (64 rows, K block): (row, block of 32)
    a.scale[3, 4:8] = torch.tensor([120, 119, 121, 122], dtype=torch.uint8)
    a.data[3, 160] = 0.001953125        # 2^-9 under half of the largest scale of its 64, and the other half's is larger still
    a.data[149, 256:384] = 1.0
    a.scale[149, 8:11] = torch.tensor([120, 120, 100], dtype=torch.uint8)     # the last 64 of K hold one block
    got = run(device, a)
    want = dequantize(a, torch.float32).double()
    assert torch.equal(values(got).cpu()[0, :, :K], want) and not values(got)[0, :, K:].any()
    flags = got["flags"].cpu()[0]
    for rb, kb in ((r, k) for r in range(3) for k in range(BLOCKS)):
        scale = got["scale"].cpu()[0, kb, :, rb * 64: min(M, rb * 64 + 64)]
        assert all(int(flags[rb, kb]) >> b & 1 or torch.equal(scale[b], scale[b + 1]) for b in range(3))
        assert flags[rb, kb] or (rb, kb) not in spoiled
    assert flags[0, 1] and flags[2, 2] and (flags == 0).any()
    assert got["count"].tolist() == [sum(f.bit_count() for f in flags.flatten().tolist()), 0]


@pytest.mark.parametrize("codes, cuts", [
    ((120, 120, 120, 120), 0), ((120, 121, 122, 120), 7), ((122, 120, 120, 120), 1), ((120, 120, 122, 122), 2), ((120, 120, 120, 122), 4),
    ((121, 120, 122, 122), 3), ((120, 120, 122, 121), 6), ((120, 122, 122, 121), 5), ((120, 255, 120, 120), 3)])
def test_a_block_is_cut_where_its_scales_ask_for_it(device: str, codes: tuple[int, ...], cuts: int) -> None:
    """Elements with a bit that no larger scale keeps."""
    a = ScaledTensor(torch.full((M, K), 0.013671875).to(torch.float8_e4m3fn), torch.full((M, 11), 120, dtype=torch.uint8), MXFP8)
    assert a.scale is not None
    a.scale[70, :4] = torch.tensor(codes, dtype=torch.uint8)
    got = run(device, a)
    flags = got["flags"].cpu()[0]
    assert flags[1, 0] == cuts and flags.sum() == cuts and got["count"][0].item() == cuts.bit_count()
    want = a.data.double() * torch.where(a.scale == 255, torch.nan, torch.exp2(a.scale.double() - 127)).repeat_interleave(32, -1)
    assert torch.equal(values(got).cpu()[0, :, :K].nan_to_num(-1), want.nan_to_num(-1))


@pytest.mark.parametrize("code, flagged, counted", [(255, True, False), (5, False, True), (250, False, True)])
def test_scales_that_are_far_out(device: str, code: int, flagged: bool, counted: bool) -> None:
    a = quantize(torch.ones(M, K), MXFP8)
    assert a.scale is not None
    a.scale[:] = 127
    if code == 255:
        a.scale[7, 0] = 255
    else:
        a.scale[7] = code
    got = run(device, a)
    assert got["flags"].cpu()[0, 0, 0] == int(flagged) and (got["count"][0].item() > 1 << 20) == counted
    assert (got["count"][0].item() >= 1 << 30) == counted
    want = a.data.double() * torch.where(a.scale == 255, torch.nan, torch.exp2(a.scale.double() - 127)).repeat_interleave(32, -1)
    assert torch.equal(values(got).cpu()[0, :, :K].nan_to_num(-1), want.nan_to_num(-1))


@pytest.mark.parametrize("narrow", [False, True])
def test_how_far_out_scales_are_beside_picks(device: str, narrow: bool) -> None:
    """Two windows of scales, each with its ends."""
    low, high = (64, 180) if narrow else (16, 200)
    picks = (0, 1, torch.zeros(1, BLOCKS + 1, dtype=torch.int32), torch.zeros(1, 64, dtype=torch.int32)) if narrow else None
    for code, counted in ((low - 1, True), (low, False), (high, False), (high + 1, True)):
        a = ScaledTensor(torch.ones(M, K).to(torch.float8_e4m3fn), torch.full((M, 11), 127, dtype=torch.uint8), MXFP8)
        assert a.scale is not None
        a.scale[149] = code
        assert (run(device, a, picks=picks)["count"][0].item() >= 1 << 30) == counted, code


def test_rows_that_are_read_byte_by_byte(device: str) -> None:
    """As where they don't lie on 16 bytes: the same."""
    a = quantize(torch.randn(M, K, generator=torch.Generator().manual_seed(4)), MXFP8)
    assert a.scale is not None
    a.scale[70, 1] -= 12
    got, want = run(device, a, aligned=False), run(device, a)
    assert all(torch.equal(got[name].view(torch.uint8), want[name].view(torch.uint8)) for name in ("y", "scale", "flags", "count"))
    assert want["flags"].any()


def test_blocks_of_zeros_fold_whatever_their_scale(device: str) -> None:
    a = quantize(torch.ones(M, K), MXFP8)
    assert a.scale is not None
    a.data.view(torch.uint8)[:, :32] = 0
    a.scale[:, 0] = 254
    got = run(device, a)
    assert not got["flags"].any() and got["count"][0].item() == 0 and (values(got)[0, :, 32:K] == 1).all()


def test_rows_of_a_masked_group_that_are_not_in_use_are_left_alone(device: str) -> None:
    a = quantize(torch.randn(2, M, K, generator=torch.Generator().manual_seed(1)), MXFP8)
    got = run(device, a, [70, 0])
    want = dequantize(a, torch.float32).double()
    assert torch.equal(values(got).cpu()[0, :70, :K], want[0, :70])
    assert (got["y"].view(torch.uint8)[0, 70:] == 7).all() and (got["y"].view(torch.uint8)[1] == 7).all()
    assert (got["flags"].cpu()[1] == 7).all() and (got["flags"].cpu()[0, 2] == 7).all()


def test_where_most_of_a_look_in_front_does_not_fold_nothing_is_done(device: str) -> None:
    a = ScaledTensor(torch.full((M, K), 0.013671875).to(torch.float8_e4m3fn), torch.full((M, 11), 120, dtype=torch.uint8), MXFP8)
    assert a.scale is not None
    a.scale[:, ::2] = 121
    got = run(device, a, early=4)
    own = got["y"].view(torch.uint8) == 7
    assert own[0, 64:, 128:].all() and own[0, 128:].all() and not own[0, :64].all()     # that of programs beside the look is overwritten
    assert (got["flags"] == 7).all()
    got = run(device, a, early=1)
    assert got["count"][0].item() == 1 << 30 and (got["y"].view(torch.uint8)[0, :, 128:] == 7).all() and (got["probes"] == 1).all()
    assert (got["flags"] == 7).all() and (got["scale"][:, 1:] == 7).all()
    a.scale[64:] = 120
    got = run(device, a)
    assert 0 < got["probes"].sum() <= PROBES // 2 and 0 < got["count"][0].item() < 100
    assert not (run(device, a, probes=[1] * (PROBES // 2) + [0] * (PROBES // 2))["flags"] == 7).all()
    assert (run(device, a, probes=[1] * (PROBES // 2 + 1) + [0] * (PROBES // 2 - 1))["flags"] == 7).all()


INDEX = {"dense": None, "contiguous": [0] * 37 + [2] * 53 + [-1] * 10 + [1] * 50, "offsets": [0, 37, 90, 150]}


@pytest.mark.parametrize("layout", INDEX)
def test_columns_that_weights_ask_for(layout: str, device: str) -> None:
    """Each group's columns of its own rows, in BF16. Weights whose blocks are of very different sizes, so that
    there are many."""
    g = torch.Generator().manual_seed(3)
    groups, n = 1 if layout == "dense" else 3, 300
    w = quantize(torch.randn(groups, n, K, generator=g) * torch.randn(groups, n, K // 32, generator=g).exp().repeat_interleave(32, -1), MXFP8)
    assert w.scale is not None
    copy = fold(w.data.view(torch.uint8), w.scale)
    assert copy is not None
    starts, entries = (copy.part(x, groups, n, K) for x in ("starts", "picks"))
    a = quantize(torch.randn(M, K, generator=g), MXFP8)
    index = INDEX[layout]
    got = run(device, a, index, picks=(list(INDEX).index(layout), groups, starts, entries))
    values_of_a = dequantize(a, torch.float32)
    picked = got["picked"].float().cpu()
    for r in range(M):
        group = 0 if index is None else index[r] if layout == "contiguous" else sum(r >= e for e in index[1:])
        column = r + index[group] % 8 // 4 * 4 + 128 * group if layout == "offsets" else r
        if group < 0:
            assert (picked[:, column] == 7).all()
            continue
        want = torch.full((entries.shape[1],), 7.0)
        for block in range(BLOCKS):
            of = entries[group, starts[group, block]: starts[group, block + 1]].long()
            want[of // 128] = values_of_a[r, 128 * block + of % 128]
        assert torch.equal(picked[:, column], want), r
    assert torch.equal(values(got).cpu()[0, :, :K], values_of_a.double())
