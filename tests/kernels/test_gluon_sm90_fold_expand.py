"""The expansion of E2M1 to E4M3 in the Hopper prefill kernel, every code at every scale, bit for bit, without a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from narrowgemm.formats import MXFP4
from narrowgemm.prepack import FOLD
from narrowgemm.prepack_bits import FP8_PREPACK, PREPACK, spread

from .. import _gluon as emu
from . import _ptx

VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


@pytest.fixture(scope="module")
def device():
    return emu.load_device_module("fold_expand_device")


def tables(device) -> tuple[np.ndarray, np.ndarray]:
    """[16] words, low and high, as the lanes make them."""
    found = [device.tables_of(emu.wrap(np.int32(lane))) for lane in range(16)]
    return tuple(np.array([int(emu.raw(t[i])) & 0xFFFFFFFF for t in found], np.uint32) for i in (0, 1))


def test_tables(device) -> None:
    low, high = tables(device)
    for d in range(FOLD + 1):
        bytes_ = torch.from_numpy(np.array([low[d], high[d]], np.uint32).view(np.uint8))
        got = bytes_.view(torch.float8_e4m3fn).float()
        assert torch.equal(got, VALUES[:8] * 2.0 ** (6 - d)), d


@pytest.mark.parametrize("order", ["bf16", "fp8", "registers"])
def test_every_code_at_every_scale(device, order: str) -> None:
    """All 16 codes in all 8 places of a word, beside random ones, in both orders; 'registers': as the product itself does it."""
    low, high = tables(device)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (15 * 16 * 8 * 4, 8))
    shift = np.repeat(np.arange(15), 16 * 8 * 4)
    at = np.arange(len(codes)) // 4
    codes[np.arange(len(codes)), at % 8] = at // 8 % 16
    plain = (codes.astype(np.uint32) << (4 * np.arange(8, dtype=np.uint32))).sum(1).astype(np.uint32)
    words = spread(torch.from_numpy(plain.view(np.int32)), MXFP4, PREPACK if order == "bf16" else FP8_PREPACK).numpy().view(np.uint32)
    asm = device.FOLD_ASM if order == "bf16" else device.NIBBLES_ASM
    if order == "registers":        # each half of the table comes four times, as $3 to $6 and $7 to $10
        asm = emu.load_device_module("narrow_fp8_device").WORD_ASM.replace("$7", "$4")
    lo, hi = _ptx.run(asm, words, low[shift], high[shift])
    got = torch.from_numpy(np.stack([lo, hi], 1).view(np.uint8)).view(torch.float8_e4m3fn)
    want = (VALUES[torch.from_numpy(codes)] * torch.from_numpy(2.0 ** (6 - shift))[:, None]).to(torch.float8_e4m3fn)
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
