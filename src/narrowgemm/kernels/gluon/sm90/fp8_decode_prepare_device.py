"""What runs in front of the Hopper FP8 decode kernel where it is needed: counters, table of pieces, padding rows."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def list_pieces(ids_ptr, table_ptr, M, G, cap, BT: tl.constexpr, CH: tl.constexpr):
    """m_indices -> table of pieces: at most BT neighbouring rows of one group. Word 0 is their number; then the columns
    group, first row, end row, `cap` entries each."""
    pieces = 0
    run = -1                                    # first row of the run that the last chunk ended in
    for base in range(0, M, CH):
        i = base + tl.arange(0, CH)
        here = tl.load(ids_ptr + i, mask=i < M, other=-1)
        prev = tl.load(ids_ptr + i - 1, mask=(i > 0) & (i <= M), other=-1)
        succ = tl.load(ids_ptr + i + 1, mask=i + 1 < M, other=-1)
        live = (here >= 0) & (here < G)
        starts = tl.maximum(tl.associative_scan(tl.where(live & (here != prev), i, -1), 0, larger), run)
        at = (i - starts) % BT
        opens = live & (at == 0)
        closes = live & ((at == BT - 1) | (succ != here))
        entry = pieces + tl.cumsum(opens.to(tl.int32), 0) - 1
        tl.store(table_ptr + 4 + entry, here, mask=opens)
        tl.store(table_ptr + 4 + cap + entry, i, mask=opens)
        tl.store(table_ptr + 4 + 2 * cap + entry, i + 1, mask=closes)
        pieces += tl.sum(opens.to(tl.int32), 0)
        run = tl.maximum(run, tl.max(starts, 0))
    tl.store(table_ptr, pieces)


@triton.jit
def zero_rows(index_ptr, out_ptr, first, M, N, G, alignment, som, PSUM_LAYOUT: tl.constexpr, ROWS: tl.constexpr,
              COLS: tl.constexpr):
    """Rows [first, first + ROWS) of the output that belong to no group come back zero."""
    r = first + tl.arange(0, ROWS)
    if PSUM_LAYOUT:
        dead = r < M
        for base in range(0, G, 128):
            g = base + tl.arange(0, 128)
            before = tl.load(index_ptr + g - 1, mask=(g > 0) & (g < G), other=0)
            end = tl.load(index_ptr + g, mask=g < G, other=0)
            start = (tl.maximum(before, 0).to(tl.int64) + alignment - 1) // alignment * alignment
            inside = (r[:, None] >= start[None, :]) & (r[:, None] < end[None, :])
            dead = dead & (tl.max(inside.to(tl.int32), 1) == 0)
    else:
        ids = tl.load(index_ptr + r, mask=r < M, other=0)
        dead = (r < M) & ((ids < 0) | (ids >= G))
    if tl.max(dead.to(tl.int32), 0) > 0:
        rows = out_ptr + first.to(tl.int64) * som + tl.arange(0, ROWS)[:, None].to(tl.int64) * som
        for n0 in range(0, N, COLS):
            n = n0 + tl.arange(0, COLS)
            tl.store(rows + n[None, :], tl.zeros([ROWS, COLS], tl.float32).to(out_ptr.dtype.element_ty),
                     mask=dead[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["M", "N", "G", "alignment", "cap"])
def prepare_kernel(index_ptr, out_ptr, count_ptr, table_ptr, counters, M, N, G, alignment, cap, som,
                   TABLE: tl.constexpr, ZERO: tl.constexpr, PSUM_LAYOUT: tl.constexpr, BT: tl.constexpr,
                   ROWS: tl.constexpr, PDL: tl.constexpr):
    """Program 0: zero counters, table of pieces. The programs after it: padding rows, ROWS each."""
    if PDL:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    if pid == 0:
        i = tl.arange(0, 1024)
        tl.store(count_ptr + i, tl.zeros([1024], tl.int32), mask=i < counters)
        if TABLE:
            list_pieces(index_ptr, table_ptr, M, G, cap, BT, 1024)
    elif ZERO:
        zero_rows(index_ptr, out_ptr, (pid - 1) * ROWS, M, N, G, alignment, som, PSUM_LAYOUT, ROWS, 1024)
