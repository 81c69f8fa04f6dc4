"""Rows of the contiguous and psum layouts, for the Hopper kernels over prepacked weights: entries of the expert table, and padding."""

import triton
import triton.language as tl

CONTIGUOUS = tl.constexpr(4)
PSUM = tl.constexpr(5)
HEAD = tl.constexpr(16)      # of the table: see narrow_tile.TABLE_HEAD
IDS = tl.constexpr(2048)     # rows whose ids are looked at together


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def contiguous_entries(index_ptr, table_ptr, positions, G, cap, BT: tl.constexpr):
    """An entry for each run of rows of one group, cut into at most BT rows; how many there are. Segments may have any length."""
    at = 0
    start = 0               # first row of the run that is open
    i = tl.arange(0, IDS)
    for base in range(0, positions, IDS):
        row = base + i
        inside = row < positions
        g = tl.load(index_ptr + row, mask=inside, other=-1)
        before = tl.load(index_ptr + row - 1, mask=inside & (row > 0), other=-1)
        after = tl.load(index_ptr + row + 1, mask=row + 1 < positions, other=-1)
        first = (g != before) | (row == 0)
        run = tl.maximum(tl.associative_scan(tl.where(first, row, 0), 0, larger), start)
        place = (row - run) % BT
        last = inside & (g >= 0) & (g < G) & ((g != after) | (row + 1 == positions) | (place == BT - 1))
        pos = at + tl.cumsum(last.to(tl.int32), 0) - 1
        p = table_ptr + HEAD + pos
        fits = last & (pos < cap)
        tl.store(p, g, mask=fits)
        tl.store(p + cap, row - place, mask=fits)
        tl.store(p + 2 * cap, place + 1, mask=fits)
        at += tl.sum(last.to(tl.int32), 0)
        start = tl.max(run, 0)
    return at


@triton.jit
def psum_rows(index_ptr, g, there, positions, alignment):
    """(first row, rows) of groups g of the psum layout."""
    end = tl.load(index_ptr + g, mask=there, other=0)
    before = tl.load(index_ptr + g - 1, mask=there & (g > 0), other=0)
    first = (before + alignment - 1) // alignment * alignment
    first = tl.minimum(tl.maximum(first, 0), positions)
    return first, tl.maximum(tl.minimum(tl.maximum(end, 0), positions) - first, 0)


@triton.jit(do_not_specialize=["M", "G", "alignment"])
def zero_rows_kernel(out_ptr, index_ptr, M, N, G, alignment, som, KIND: tl.constexpr, GROUPS: tl.constexpr, BN: tl.constexpr):
    """One program a row: zeros, where it belongs to no group."""
    row = tl.program_id(0)
    if KIND == CONTIGUOUS:
        g = tl.load(index_ptr + row)
        live = (g >= 0) & (g < G)
    else:
        g = tl.arange(0, GROUPS)
        first, rows = psum_rows(index_ptr, g, g < G, M, alignment)
        live = tl.max(((row >= first) & (row < first + rows)).to(tl.int32), 0) > 0
    if live == 0:
        p = out_ptr + row.to(tl.int64) * som
        for n in range(0, N, BN):
            o = n + tl.arange(0, BN)
            tl.store(p + o, tl.zeros([BN], out_ptr.dtype.element_ty), mask=o < N)
