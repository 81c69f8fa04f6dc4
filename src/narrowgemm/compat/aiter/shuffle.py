"""aiter's A16W4 weight orders, `shuffle_weight_a16w4` and `shuffle_scale_a16w4`, and their inverses. Permutations of bytes.

Definition: ROCm/aiter `ops/shuffle.py`. gate_up: rows `[gate; up]` come out with 16 of gate and 16 of up in turn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import Unsupported, expect

LANES, PACK = 16, 16            # rows that lie together; bytes of a row that do
CHUNK = 64                      # bytes of a row in one piece of the order, 128 of K
PADDING = 0x7F                  # of scales behind K: a factor of one


def shuffle_weight_a16w4(src: Tensor, NLane: int, gate_up: bool) -> Tensor:
    """MXFP4 payload `[E, N, K/2]` in the order `[E, N/16, K/128, 4, 16 rows, 16 bytes]`, shape and dtype kept, a copy.

    gate_up: `[E, N/32, 2 (gate, up), K/128, 4, 16, 16]` of rows `[gate; up]`. ValueError where N or K is no multiple (16 rows, 32
    with gate_up; 128 of K); Unsupported for NLane other than 16.
    """
    e, n, c = _weight(src, NLane, gate_up)
    x = src.contiguous().view(torch.uint8)
    if gate_up:
        return _as(x.view(e, 2, n // 32, LANES, c // CHUNK, 4, PACK).permute(0, 2, 1, 4, 5, 3, 6), src)
    return _as(x.view(e, n // 16, LANES, c // CHUNK, 4, PACK).permute(0, 1, 3, 4, 2, 5), src)


def unshuffle_weight_a16w4(src: Tensor, NLane: int, gate_up: bool) -> Tensor:
    """The inverse of `shuffle_weight_a16w4`."""
    e, n, c = _weight(src, NLane, gate_up)
    x = src.contiguous().view(torch.uint8)
    if gate_up:
        return _as(x.view(e, n // 32, 2, c // CHUNK, 4, LANES, PACK).permute(0, 2, 1, 5, 3, 4, 6), src)
    return _as(x.view(e, n // 16, c // CHUNK, 4, LANES, PACK).permute(0, 1, 4, 2, 3, 5), src)


def shuffle_scale_a16w4(src: Tensor, experts_cnt: int, gate_up: bool) -> Tensor:
    """E8M0 scales `[E * N, K/32]` in the order `[E, N/32, K/256, 4, 16 rows, 2 (K), 2 (N)]`, a copy.

    K/32 is filled up to a multiple of 8 with codes of one, so the result may be wider. gate_up: the last 2 is gate and up.
    ValueError where rows are not E times a multiple of 32.
    """
    e, n, s = _scale(src, experts_cnt, gate_up)
    x = torch.nn.functional.pad(src.contiguous().view(torch.uint8), (0, -s % 8), value=PADDING)
    s = x.shape[1]
    if gate_up:
        x = x.view(e, 2, n // 32, LANES, s // 8, 2, 4).permute(0, 2, 4, 6, 3, 5, 1)
    else:
        x = x.view(e, n // 32, 2, LANES, s // 8, 2, 4).permute(0, 1, 4, 6, 3, 5, 2)
    return x.contiguous().view(e * n, s).view(src.dtype)


def unshuffle_scale_a16w4(src: Tensor, experts_cnt: int, gate_up: bool) -> Tensor:
    """The inverse of `shuffle_scale_a16w4`, with what it was filled up with."""
    e, n, s = _scale(src, experts_cnt, gate_up)
    expect(s % 8 == 0, "shuffled scales, columns", s, "a multiple of 8, as shuffle_scale_a16w4 gives")
    x = src.contiguous().view(torch.uint8).view(e, n // 32, s // 8, 4, LANES, 2, 2)
    x = x.permute(0, 6, 1, 4, 2, 5, 3) if gate_up else x.permute(0, 1, 6, 4, 2, 5, 3)
    return x.contiguous().view(e * n, s).view(src.dtype)


def _as(x: Tensor, like: Tensor) -> Tensor:
    return x.contiguous().view(like.shape).view(like.dtype)


def _weight(src: Tensor, lanes: int, gate_up: bool) -> tuple[int, int, int]:
    expect(isinstance(src, Tensor), "weight to shuffle", type(src).__name__, "a torch.Tensor", error=TypeError)
    if lanes != LANES or src.element_size() != 1:
        raise Unsupported(f"an A16W4 order of {lanes} lanes over {src.dtype}", "16 lanes of one-byte elements, two FP4 each")
    rows = 32 if gate_up else 16
    fits = src.dim() == 3 and src.shape[1] % rows == 0 and src.shape[2] % CHUNK == 0
    expect(fits, "weight to shuffle, shape", tuple(src.shape), f"[E, N, K/2], N a multiple of {rows}, K of 128")
    return src.shape[0], src.shape[1], src.shape[2]


def _scale(src: Tensor, experts: int, gate_up: bool) -> tuple[int, int, int]:
    expect(isinstance(src, Tensor), "scales to shuffle", type(src).__name__, "a torch.Tensor", error=TypeError)
    expect(src.element_size() == 1, "scales to shuffle, dtype", src.dtype, "E8M0 codes, one byte each", error=TypeError)
    expect(isinstance(experts, int) and experts >= 1, "experts_cnt", experts, "at least 1")
    rows = 64 if gate_up else 32
    fits = src.dim() == 2 and src.shape[0] % (experts * rows) == 0 and src.shape[1] >= 1
    expect(fits, "scales to shuffle, shape", tuple(src.shape), f"[E * N, K/32], N a multiple of {rows}, E = {experts}")
    return experts, src.shape[0] // experts, src.shape[1]
