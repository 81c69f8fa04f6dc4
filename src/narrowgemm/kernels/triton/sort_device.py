"""Device code of `sort_by_expert`: a counting sort, stable, without atomics, the same bits in every run.

    few slots    one launch: program e counts the slots below expert e, then places its own in order
    many slots   histogram of each chunk of slots -> prefix over the chunks, key by key -> placement of each chunk

Every slot has a key: its expert on this rank, or E where it is skipped; E is a group like any other, the last.
"""

import triton
import triton.language as tl


@triton.jit
def load_keys(ids_ptr, map_ptr, slot, n, FIRST, E, ALL, MAP: tl.constexpr):
    """Keys of the slots `slot`; E + 1 past the last slot."""
    ids = tl.load(ids_ptr + slot, mask=slot < n, other=-1)
    if MAP:
        known = (ids >= 0) & (ids < ALL) & (slot < n)
        ids = tl.load(map_ptr + tl.where(known, ids, 0), mask=known, other=-1)
    ids -= FIRST
    keys = tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)
    return tl.where(slot < n, keys, E + 1)


@triton.jit(do_not_specialize=["n"])
def place_kernel(ids_ptr, map_ptr, row_map_ptr, inverse_ptr, offsets_ptr, n, FIRST, E, ALL,
                 MAP: tl.constexpr, BLOCK: tl.constexpr):
    """Program e < E + 1: the slots of key e, behind those of every lower key."""
    e = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    below = tl.zeros((BLOCK, ), tl.int32)
    for start in range(0, n, BLOCK):
        below += (load_keys(ids_ptr, map_ptr, start + i, n, FIRST, E, ALL, MAP) < e).to(tl.int32)
    base = tl.sum(below, 0)
    tl.store(offsets_ptr + e, base.to(tl.int64))
    for start in range(0, n, BLOCK):
        hit = (load_keys(ids_ptr, map_ptr, start + i, n, FIRST, E, ALL, MAP) == e).to(tl.int32)
        row = base + tl.cumsum(hit, 0) - hit
        tl.store(row_map_ptr + row, start + i, mask=hit > 0)
        tl.store(inverse_ptr + start + i, row, mask=hit > 0)
        base += tl.sum(hit, 0)


@triton.jit(do_not_specialize=["n"])
def histogram_kernel(ids_ptr, map_ptr, counts_ptr, n, FIRST, E, ALL, MAP: tl.constexpr, CHUNK: tl.constexpr,
                     BINS: tl.constexpr):
    """`counts[chunk, key]`, a chunk a program."""
    p = tl.program_id(0)
    slot = p * CHUNK + tl.arange(0, CHUNK)
    keys = load_keys(ids_ptr, map_ptr, slot, n, FIRST, E, ALL, MAP)
    tl.store(counts_ptr + p * BINS + tl.arange(0, BINS), tl.histogram(keys, BINS, mask=slot < n))


@triton.jit(do_not_specialize=["P"])
def prefix_kernel(counts_ptr, totals_ptr, P, BINS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`counts` of COLUMNS keys as sums over the chunks before, in place, and of all chunks in `totals`."""
    bins = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    before = tl.zeros((COLUMNS, ), tl.int32)
    for first in range(0, P, ROWS):
        q = first + tl.arange(0, ROWS)
        at = counts_ptr + q[:, None] * BINS + bins[None, :]
        counts = tl.load(at, mask=(q < P)[:, None], other=0)
        tl.store(at, tl.cumsum(counts, 0) - counts + before[None, :], mask=(q < P)[:, None])
        before += tl.sum(counts, 0)
    tl.store(totals_ptr + bins, before)


@triton.jit(do_not_specialize=["n"])
def scatter_kernel(ids_ptr, map_ptr, counts_ptr, totals_ptr, row_map_ptr, inverse_ptr, offsets_ptr, n, FIRST, E, ALL,
                   MAP: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr):
    """Places a chunk's slots: first row of the key + its slots in earlier chunks + those before it in this one."""
    p = tl.program_id(0)
    bins = tl.arange(0, BINS)
    totals = tl.load(totals_ptr + bins)
    starts = tl.cumsum(totals, 0) - totals
    tl.store(offsets_ptr + bins, starts.to(tl.int64), mask=(bins <= E) & (p == 0))
    i = tl.arange(0, CHUNK)
    slot = p * CHUNK + i
    keys = load_keys(ids_ptr, map_ptr, slot, n, FIRST, E, ALL, MAP)
    earlier = (keys[:, None] == keys[None, :]) & (i[None, :] < i[:, None])
    before = tl.load(counts_ptr + p * BINS + keys, mask=slot < n, other=0)
    row = tl.gather(starts, tl.minimum(keys, BINS - 1), 0) + before + tl.sum(earlier.to(tl.int32), 1)
    tl.store(row_map_ptr + row, slot, mask=slot < n)
    tl.store(inverse_ptr + slot, row, mask=slot < n)
