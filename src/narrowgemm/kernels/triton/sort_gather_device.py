"""Device code of `sort_gather`: few slots sorted, and their tokens quantised into the rows of their experts, in one launch.

    programs of the table     how many slots lie below each of some experts: offsets
    programs of a slot        the slot's row (slots of lower experts + earlier ones of its own), then some blocks of its token
    programs of a token       of more slots: the rows of all of its slots, then some blocks of it to each of them

Nobody waits for anybody: each program reads all ids and works out what it needs. Bit for bit `place_kernel`, then `gather_kernel`.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .gather_device import block_columns, narrowed_blocks
from .sort_device import load_keys

PACKED = tl.constexpr(4)


@triton.jit(do_not_specialize=["n"])
def sort_gather_kernel(ids_ptr, map_ptr, x_ptr, row_map_ptr, inverse_ptr, offsets_ptr, out_ptr, scale_ptr, n, FIRST, E, ALL,
                       K, S, clamp, xr, orow, sr, ss, MAP: tl.constexpr, SLOTS: tl.constexpr, TABLE: tl.constexpr,
                       TOP_K: tl.constexpr, N: tl.constexpr, BG: tl.constexpr, EVEN: tl.constexpr, KIND: tl.constexpr,
                       E2M1: tl.constexpr, SATURATE: tl.constexpr, ROUNDING: tl.constexpr, E8M0: tl.constexpr,
                       TOP: tl.constexpr, EMAX: tl.constexpr, MANTISSA: tl.constexpr, MANTISSA_BITS: tl.constexpr,
                       NATIVE: tl.constexpr, LEADS: tl.constexpr):
    """SLOTS >= n, padded. TABLE experts a program of the table; BG blocks of N columns a program of a slot.

    LEADS: the launch behind may start meanwhile, if it waits for this one by itself."""
    if LEADS:
        gdc_launch_dependents()
    PER_BYTE: tl.constexpr = 2 if E2M1 else 1
    i = tl.arange(0, SLOTS)
    keys = load_keys(ids_ptr, map_ptr, i, n, FIRST, E, ALL, MAP)
    p = tl.program_id(0)
    tables = tl.cdiv(E + 1, TABLE)
    if p < tables:
        e = p * TABLE + tl.arange(0, TABLE)
        below = tl.sum((keys[None, :] < e[:, None]).to(tl.int32), 1)
        tl.store(offsets_ptr + e, below.to(tl.int64), mask=e <= E)
        return
    p -= tables
    across = tl.cdiv(S, BG)
    slot = p // across
    g = p % across * BG + tl.arange(0, BG)
    live = g < S
    k, kh, mask, out_mask = block_columns(live, g, K, N, PER_BYTE, EVEN)
    x = tl.load(x_ptr + (slot // TOP_K).to(tl.int64) * xr + k, mask=mask, other=0.0)     # on the way while ids are looked at
    key = load_keys(ids_ptr, map_ptr, slot, n, FIRST, E, ALL, MAP)
    row = tl.sum(((keys < key) | ((keys == key) & (i < slot))).to(tl.int32), 0)
    if p % across == 0:
        tl.store(row_map_ptr + row, slot)
        tl.store(inverse_ptr + slot, row)
    if key == E:
        return
    at = row.to(tl.int64)
    scale, y = narrowed_blocks(x, g, clamp, out_ptr.dtype.element_ty, KIND, E2M1, SATURATE, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS,
                               NATIVE, BG, N)
    tl.store(out_ptr + at * orow + kh, y, mask=out_mask)
    if KIND != "copy":
        tl.store(scale_ptr + at * sr + g * ss, scale, mask=live)


@triton.jit(do_not_specialize=["n"])
def sort_gather_tokens_kernel(ids_ptr, map_ptr, x_ptr, row_map_ptr, inverse_ptr, offsets_ptr, out_ptr, scale_ptr, n, FIRST, E, ALL,
                              K, S, clamp, xr, orow, sr, ss, MAP: tl.constexpr, SLOTS: tl.constexpr, TABLE: tl.constexpr,
                              TOP_K: tl.constexpr, N: tl.constexpr, BG: tl.constexpr, EVEN: tl.constexpr, KIND: tl.constexpr,
                              E2M1: tl.constexpr, SATURATE: tl.constexpr, ROUNDING: tl.constexpr, E8M0: tl.constexpr,
                              TOP: tl.constexpr, EMAX: tl.constexpr, MANTISSA: tl.constexpr, MANTISSA_BITS: tl.constexpr,
                              NATIVE: tl.constexpr, LEADS: tl.constexpr):
    """As `sort_gather_kernel`, BG blocks of a token a program: ids are looked at once for all of its slots."""
    if LEADS:
        gdc_launch_dependents()
    PER_BYTE: tl.constexpr = 2 if E2M1 else 1
    i = tl.arange(0, SLOTS)
    keys = load_keys(ids_ptr, map_ptr, i, n, FIRST, E, ALL, MAP)
    p = tl.program_id(0)
    tables = tl.cdiv(E + 1, TABLE)
    if p < tables:
        for j in tl.static_range(TABLE):
            e = p * TABLE + j
            below = tl.sum((keys < e).to(tl.int32), 0)
            tl.store(offsets_ptr + e, below.to(tl.int64), mask=e <= E)
        return
    p -= tables
    across = tl.cdiv(S, BG)
    t = p // across
    g = p % across * BG + tl.arange(0, BG)
    live = g < S
    k, kh, mask, out_mask = block_columns(live, g, K, N, PER_BYTE, EVEN)
    x = tl.load(x_ptr + t.to(tl.int64) * xr + k, mask=mask, other=0.0)     # on the way while ids are looked at
    scale, y = narrowed_blocks(x, g, clamp, out_ptr.dtype.element_ty, KIND, E2M1, SATURATE, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS,
                               NATIVE, BG, N)
    for first in tl.static_range(0, TOP_K, PACKED):
        # rows of several slots by one sum: each counts fewer slots than 16 bits hold
        counts = tl.zeros((SLOTS, ), tl.int64)
        for j in tl.static_range(PACKED):
            if first + j < TOP_K:
                slot = t * TOP_K + (first + j)
                key = load_keys(ids_ptr, map_ptr, slot, n, FIRST, E, ALL, MAP)
                counts += ((keys < key) | ((keys == key) & (i < slot))).to(tl.int64) << (16 * j)
        counts = tl.sum(counts, 0)
        for j in tl.static_range(PACKED):
            if first + j < TOP_K:
                slot = t * TOP_K + (first + j)
                key = load_keys(ids_ptr, map_ptr, slot, n, FIRST, E, ALL, MAP)
                row = (counts >> (16 * j)) & 0xFFFF
                if p % across == 0:
                    tl.store(row_map_ptr + row, slot)
                    tl.store(inverse_ptr + slot, row.to(tl.int32))
                here = key != E
                tl.store(out_ptr + row * orow + kh, y, mask=here & out_mask)
                if KIND != "copy":
                    tl.store(scale_ptr + row * sr + g * ss, scale, mask=here & live)
