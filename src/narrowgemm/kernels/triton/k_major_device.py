"""Device code of K-major copies: one-byte elements, turned where rows lie the other way, each group's columns in a segment of its own.

    x [R, K], whichever axis is contiguous  ->  out [R, P], K contiguous, rows on 16 bytes

GROUPED: group g's columns start at `seg[g]`, a multiple of 128, and are filled up with zeros to the next one. Else P >= K and the
columns stay where they are.
"""

import triton
import triton.language as tl

from .quantize_both_device import find_tile


@triton.jit(do_not_specialize=["G", "tiles_k"])
def k_major_kernel(x_ptr, out_ptr, offs_ptr, seg_ptr, R, K, G, tiles_k, xb, xs, ob, pitch, TURN: tl.constexpr, GROUPED: tl.constexpr,
                   CHUNK: tl.constexpr):
    """One tile of 128 rows by 128 columns of one of a batch. `xs`: stride of the axis that isn't contiguous: K's with TURN, else R's.
    pitch, ob: strides of the output in units of 16."""
    x_ptr = x_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    out_ptr = out_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    pid = tl.program_id(0)
    tiles_r = tl.cdiv(R, 128)
    b = (pid // (tiles_k * tiles_r)).to(tl.int64)
    tile = pid % (tiles_k * tiles_r) // tiles_r
    row = pid % (tiles_k * tiles_r) % tiles_r * 128
    r = tl.arange(0, 128)
    k = tl.arange(0, 128)
    pos = tile.to(tl.int64) * 128
    if GROUPED:
        first, end = find_tile(tile, offs_ptr, seg_ptr, K, G, CHUNK)
        fill = k < 128
        work = end >= 0
    else:
        first = pos
        end = tl.cast(K, tl.int64)
        fill = pos + k < K
        work = end >= 0
    if work:
        live = first + k < end
        inside = row + r < R
        out_ptr += (b * ob + row.to(tl.int64) * pitch) * 16 + pos
        if TURN:
            x = tl.load(x_ptr + (b * xb + first * xs + row) + (k * xs)[:, None] + r[None, :], mask=live[:, None] & inside[None, :], other=0)
            tl.store(out_ptr + (r * pitch * 16)[:, None] + k[None, :], tl.trans(x), mask=inside[:, None] & fill[None, :])
        else:
            x = tl.load(x_ptr + (b * xb + row.to(tl.int64) * xs + first) + (r * xs)[:, None] + k[None, :],
                        mask=inside[:, None] & live[None, :], other=0)
            tl.store(out_ptr + (r * pitch * 16)[:, None] + k[None, :], x, mask=inside[:, None] & fill[None, :])
