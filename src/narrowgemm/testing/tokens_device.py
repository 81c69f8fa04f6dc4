"""Device code of the step in front of an end-to-end case: rows gathered from tokens and quantised 1x128, in one pass."""

import triton
import triton.language as tl

from ..kernels.triton.quantize_device import block_fp8


@triton.jit(do_not_specialize=["R", "ss"])
def gather_quantize_kernel(x, rows, out, scale, R, BLOCKS, clamp, xr, orow, ss, BR: tl.constexpr, BG: tl.constexpr,
                           TOP: tl.constexpr, NATIVE: tl.constexpr):
    """BR rows of BG blocks of 128 a program. out[r] = x[rows[r]], zero where that is -1; scales [K / 128, R], R contiguous."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(BLOCKS, BG)
    i = tl.arange(0, BR * BG)
    # neighbouring rows are neighbours in i, so that their scales share a sector
    r = pid // tiles * BR + i % BR
    g = pid % tiles * BG + i // BR
    live = (r < R) & (g < BLOCKS)
    token = tl.load(rows + r, mask=live, other=-1).to(tl.int64)
    k = (g * 128)[:, None] + tl.arange(0, 128)[None, :]
    v = tl.load(x + (token * xr)[:, None] + k, mask=(live & (token >= 0))[:, None], other=0.0, eviction_policy="evict_first")
    s, y = block_fp8(v, clamp, out.dtype.element_ty, False, "", False, TOP, 0, 0, 0, NATIVE)
    tl.store(scale + g.to(tl.int64) * ss + r, s, mask=live)
    tl.store(out + (r.to(tl.int64) * orow)[:, None] + k, y, mask=live[:, None])
