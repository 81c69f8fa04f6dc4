"""Device code of `gather_quantize`: a token is read and quantised once, and written to each of its rows.

Skipped slots have rows from `offsets[E]` on; those are not written, and a token that has no others is not read. A routing with wrong rows or
slots loses them, and nothing outside is touched. Arithmetic: `quantize_device.py`.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .quantize_device import block_e2m1, block_fp8


@triton.jit
def wanted(inverse_ptr, t, live, rows, TOP_K: tl.constexpr):
    """Whether some row of each token is written."""
    found = live & (t < 0)
    for j in range(TOP_K):
        row = tl.load(inverse_ptr + t * TOP_K + j, mask=live, other=-1).to(tl.int64)
        found |= live & (row >= 0) & (row < rows)
    return found


@triton.jit
def block_columns(live, g, K, N: tl.constexpr, PER_BYTE: tl.constexpr, EVEN: tl.constexpr):
    """Of blocks g of N columns, where `live`: (columns, bytes of a row, masks of both). EVEN: every block lies within K."""
    k = (g * N)[:, None] + tl.arange(0, N)[None, :]
    kh = (g * (N // PER_BYTE))[:, None] + tl.arange(0, N // PER_BYTE)[None, :]
    mask = live[:, None]
    out_mask = live[:, None]
    if not EVEN:
        mask = mask & (k < K)
        out_mask = out_mask & (kh < K // PER_BYTE)
    return k, kh, mask, out_mask


@triton.jit
def narrowed_blocks(x, g, clamp, DTYPE: tl.constexpr, KIND: tl.constexpr, E2M1: tl.constexpr, SATURATE: tl.constexpr, ROUNDING: tl.constexpr,
                    E8M0: tl.constexpr, TOP: tl.constexpr, EMAX: tl.constexpr, MANTISSA: tl.constexpr, MANTISSA_BITS: tl.constexpr,
                    NATIVE: tl.constexpr, BG: tl.constexpr, N: tl.constexpr):
    """(scales, values) of BG blocks of N of a token; KIND 'copy': the bits as they are, and for scales something that nobody stores."""
    if KIND == "copy":
        y = x
        scale = g
    elif E2M1:
        scale, y = block_e2m1(x, clamp, E2M1, SATURATE, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS, BG, N)
    else:
        scale, y = block_fp8(x, clamp, DTYPE, SATURATE, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS, NATIVE)
    return scale, y


@triton.jit(do_not_specialize=["T"])
def gather_kernel(x_ptr, inverse_ptr, offsets_ptr, out_ptr, scale_ptr, T, K, S, E, clamp, xr, orow, sr, ss,
                  TOP_K: tl.constexpr, N: tl.constexpr, BG: tl.constexpr, EVEN: tl.constexpr,
                  KIND: tl.constexpr, E2M1: tl.constexpr, SATURATE: tl.constexpr, ROUNDING: tl.constexpr,
                  E8M0: tl.constexpr, TOP: tl.constexpr, EMAX: tl.constexpr, MANTISSA: tl.constexpr,
                  MANTISSA_BITS: tl.constexpr, NATIVE: tl.constexpr, LEADS: tl.constexpr, EAGER: tl.constexpr):
    """BG blocks of N columns of a token: where its rows are is then known to all lanes, with no exchange between them. KIND 'copy': no
    scales, the bits as they are; 'blocks': a scale a block.

    EAGER: the token is on its way while it is looked up whether it has rows here, for nothing where it has none.
    LEADS: the launch behind may start meanwhile, if it waits for this one by itself."""
    if LEADS:
        gdc_launch_dependents()
    PER_BYTE: tl.constexpr = 2 if E2M1 else 1
    across = tl.cdiv(S, BG)
    t = tl.program_id(0) // across
    g = tl.program_id(0) % across * BG + tl.arange(0, BG)
    inside = g < S
    k, kh, mask, out_mask = block_columns(inside, g, K, N, PER_BYTE, EVEN)
    x_ptr += t.to(tl.int64) * xr
    if EAGER:
        x = tl.load(x_ptr + k, mask=mask, other=0.0, eviction_policy="evict_first")
    rows = tl.minimum(tl.load(offsets_ptr + E), T * TOP_K)
    if not wanted(inverse_ptr, t, True, rows, TOP_K):
        return
    if not EAGER:
        x = tl.load(x_ptr + k, mask=mask, other=0.0, eviction_policy="evict_first")
    scale, y = narrowed_blocks(x, g, clamp, out_ptr.dtype.element_ty, KIND, E2M1, SATURATE, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS,
                               NATIVE, BG, N)
    for j in range(TOP_K):
        row = tl.load(inverse_ptr + t * TOP_K + j).to(tl.int64)
        there = (row >= 0) & (row < rows)
        tl.store(out_ptr + row * orow + kh, y, mask=there & out_mask)
        if KIND == "blocks":
            # MN-major scales of rows next to each other come from tokens that are not: L2 keeps them until their sectors are full
            tl.store(scale_ptr + row * sr + g * ss, scale, mask=there & inside, eviction_policy="evict_last")


@triton.jit(do_not_specialize=["R"])
def gather_by_row_kernel(x_ptr, row_map_ptr, offsets_ptr, out_ptr, scale_ptr, R, K, S, E, clamp, xr, orow, sr, ss,
                         TOP_K: tl.constexpr, N: tl.constexpr, BR: tl.constexpr, BG: tl.constexpr, EVEN: tl.constexpr,
                         KIND: tl.constexpr, E2M1: tl.constexpr, SATURATE: tl.constexpr, ROUNDING: tl.constexpr,
                         E8M0: tl.constexpr, TOP: tl.constexpr, EMAX: tl.constexpr, MANTISSA: tl.constexpr,
                         MANTISSA_BITS: tl.constexpr, NATIVE: tl.constexpr, LEADS: tl.constexpr):
    """Tiles of BR rows x BG blocks of N columns, of R rows at most: each reads its token. Else as `gather_kernel`."""
    if LEADS:
        gdc_launch_dependents()
    PER_BYTE: tl.constexpr = 2 if E2M1 else 1
    i = tl.arange(0, BR * BG)
    rows = tl.minimum(tl.load(offsets_ptr + E), R).to(tl.int32)
    across = tl.cdiv(S, BG)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BR) * across, tl.num_programs(0)):
        r = tile // across * BR + i // BG
        g = tile % across * BG + i % BG
        slot = tl.load(row_map_ptr + r, mask=r < rows, other=-1)
        live = (g < S) & (slot >= 0) & (slot < R)
        t = slot // TOP_K
        k, kh, mask, out_mask = block_columns(live, g, K, N, PER_BYTE, EVEN)
        x = tl.load(x_ptr + (t.to(tl.int64) * xr)[:, None] + k, mask=mask, other=0.0)
        at = out_ptr + (r.to(tl.int64) * orow)[:, None] + kh
        if KIND == "copy":
            tl.store(at, x, mask=out_mask)
        else:
            if E2M1:
                scale, y = block_e2m1(x, clamp, E2M1, SATURATE, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS, BR * BG, N)
            else:
                scale, y = block_fp8(x, clamp, out_ptr.dtype.element_ty, SATURATE, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS,
                                     NATIVE)
            tl.store(scale_ptr + r.to(tl.int64) * sr + g * ss, scale, mask=live)
            tl.store(at, y, mask=out_mask)


@triton.jit(do_not_specialize=["T"])
def gather_rows_kernel(x_ptr, inverse_ptr, offsets_ptr, out_ptr, scale_ptr, T, K, E, clamp, xr, orow, sr,
                       TOP_K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, TOP: tl.constexpr, NATIVE: tl.constexpr):
    """One FP32 scale a row: BT tokens a program, BK holds a row."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    k = tl.arange(0, BK)
    rows = tl.minimum(tl.load(offsets_ptr + E), T * TOP_K)
    live = wanted(inverse_ptr, t, t < T, rows, TOP_K)
    mask = live[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + (t.to(tl.int64) * xr)[:, None] + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
    scale, y = block_fp8(x, clamp, out_ptr.dtype.element_ty, False, "", False, TOP, 0, 0, 0, NATIVE)
    for j in range(TOP_K):
        row = tl.load(inverse_ptr + t * TOP_K + j, mask=live, other=0).to(tl.int64)
        there = live & (row >= 0) & (row < rows)
        tl.store(out_ptr + (row * orow)[:, None] + k[None, :], y, mask=there[:, None] & mask)
        tl.store(scale_ptr + row * sr, scale, mask=there)
