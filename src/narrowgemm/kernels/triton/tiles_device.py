"""What the portable GEMMs have in common: which tile a program takes, its group and rows, its operands, its store.

Tiles of M are counted in slots, from the groups' sizes on the device. A wrong index may lose rows, never leave the tensors.
"""

import triton
import triton.language as tl

DENSE = tl.constexpr(0)
CONTIGUOUS = tl.constexpr(1)
OFFSETS = tl.constexpr(2)
PSUM = tl.constexpr(3)
MASKED = tl.constexpr(4)
CHUNK = tl.constexpr(256)  # group sizes looked at in one vector; any number of groups by a loop over chunks


@triton.jit
def swizzle(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Strips of GROUP_M tiles of M, M fastest inside a strip: neighbours share B, a strip shares A through L2."""
    per_strip = GROUP_M * num_n
    first = tile // per_strip * GROUP_M
    height = tl.maximum(tl.minimum(num_m - first, GROUP_M), 1)
    rest = tile % per_strip
    return first + rest % height, rest // height


# ---------------------------------------------------------------- which rows, which group
@triton.jit
def segment_start(index_ptr, g, G, M, alignment, LAYOUT: tl.constexpr):
    """First row of group(s) g, clamped to [0, M]: a wrong offset may lose rows, never leave the tensor."""
    if LAYOUT == PSUM:
        end = tl.load(index_ptr + g - 1, mask=(g > 0) & (g <= G), other=0).to(tl.int64)
        start = (end + alignment - 1) // alignment * alignment
    else:
        start = tl.load(index_ptr + g, mask=g <= G, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(start, 0), M)


@triton.jit
def find_segment(slot, index_ptr, G, M, alignment, BM: tl.constexpr, LAYOUT: tl.constexpr):
    """Group of `slot` and its first row. Group g owns slots from start(g) // BM + g on: as many as it can need, found
    without a prefix over tiles. Returns g = -1 for a slot in front of the first group."""
    count = 0
    for base in range(0, G, CHUNK):
        g = base + tl.arange(0, CHUNK)
        start = segment_start(index_ptr, g, G, M, alignment, LAYOUT)
        count += tl.sum(tl.where((g < G) & (start // BM + g <= slot), 1, 0))
    g = count - 1
    start = segment_start(index_ptr, tl.maximum(g, 0), G, M, alignment, LAYOUT)
    return g, start + (slot - (start // BM + g)).to(tl.int64) * BM


@triton.jit
def group_rows(index_ptr, g, G, M, LAYOUT: tl.constexpr):
    """(first row, rows) of group(s) g, inside [0, M] whatever the index holds; no rows from g = G on."""
    if LAYOUT == MASKED:
        rows = tl.load(index_ptr + g, mask=g < G, other=0).to(tl.int64)
        start = tl.zeros_like(rows)
        rows = tl.minimum(rows, M)
    else:
        start = segment_start(index_ptr, g, G, M, 1, OFFSETS)
        rows = segment_start(index_ptr, g + 1, G, M, 1, OFFSETS) - start
    return start, tl.maximum(rows, 0)


@triton.jit
def tiles_of(index_ptr, g, G, M, BM: tl.constexpr, LAYOUT: tl.constexpr):
    """Tiles of M of group(s) g: offsets or masked."""
    if LAYOUT == MASKED:
        rows = tl.load(index_ptr + g, mask=g < G, other=0).to(tl.int32)
        return (tl.minimum(tl.maximum(rows, 0), M) + BM - 1) // BM
    else:
        start, rows = group_rows(index_ptr, g, G, M, LAYOUT)
        return ((rows + BM - 1) // BM).to(tl.int32)


@triton.jit
def live_slots(index_ptr, G, M, BM: tl.constexpr, LAYOUT: tl.constexpr):
    """Tiles of M that have rows, over all groups."""
    total = 0
    for base in range(0, G, CHUNK):
        total += tl.sum(tiles_of(index_ptr, base + tl.arange(0, CHUNK), G, M, BM, LAYOUT))
    return total


@triton.jit
def find_slot(slot, index_ptr, G, M, BM: tl.constexpr, LAYOUT: tl.constexpr):
    """(group, row inside the group) of the slot-th tile of M that has rows."""
    count = 0
    before = 0
    carry = 0
    for base in range(0, G, CHUNK):
        tiles = tiles_of(index_ptr, base + tl.arange(0, CHUNK), G, M, BM, LAYOUT)
        done = carry + tl.cumsum(tiles, 0) <= slot
        count += tl.sum(tl.where(done, 1, 0))
        before += tl.sum(tl.where(done, tiles, 0))
        carry += tl.sum(tiles)
    return tl.minimum(count, G - 1), (slot - before) * BM


@triton.jit
def tile_rows(slot, index_ptr, G, M, alignment, BM: tl.constexpr, LAYOUT: tl.constexpr):
    """(group, first row, rows that are the group's to write, rows of them that are its own) of tile `slot` of M, all layouts. Nothing to
    write: the slot holds no tile. In a contiguous layout every row says its group itself."""
    g = 0
    if LAYOUT == MASKED:
        g, row = find_slot(slot, index_ptr, G, M, BM, LAYOUT)
        row0 = row.to(tl.int64)
        extent = tl.minimum(tl.load(index_ptr + g).to(tl.int32), M) - row
        valid = extent
    elif LAYOUT == OFFSETS or LAYOUT == PSUM:
        g, row0 = find_segment(slot, index_ptr, G, M, alignment, BM, LAYOUT)
        if LAYOUT == OFFSETS:
            end = segment_start(index_ptr, g + 1, G, M, alignment, LAYOUT)
            extent = (end - row0).to(tl.int32)
            valid = extent
        else:
            # a segment reaches to the next one's start, so that its gap rows are zeroed by its own tiles
            last = tl.where(g == G - 1, M, segment_start(index_ptr, g + 1, G, M, alignment, LAYOUT))
            end = tl.load(index_ptr + tl.maximum(g, 0)).to(tl.int64)
            extent = (last - row0).to(tl.int32)
            valid = (tl.minimum(end, M) - row0).to(tl.int32)
        extent = tl.where(g < 0, 0, extent)
        valid = tl.where(g < 0, 0, tl.minimum(valid, extent))
        g = tl.maximum(g, 0)
    else:
        row0 = slot.to(tl.int64) * BM
        extent = (M - row0).to(tl.int32)
        valid = extent
    return g, row0, extent, valid


# ---------------------------------------------------------------- operands and result
@triton.jit
def k_block_pointers(a_ptr, b_ptr, m_off, n_off, offs_k, stride_am, stride_ak, stride_bn, stride_bk, SWAP: tl.constexpr):
    """Of a tile's first K block: A [BM, BK] and B [BK, BN]; SWAP, with B on the MMA's M side: A [BK, BM] and B [BN, BK]."""
    if SWAP:
        return (a_ptr + (offs_k[:, None] * stride_ak + m_off[None, :] * stride_am),
                b_ptr + (n_off[:, None] * stride_bn + offs_k[None, :] * stride_bk))
    else:
        return (a_ptr + (m_off[:, None] * stride_am + offs_k[None, :] * stride_ak),
                b_ptr + (offs_k[:, None] * stride_bk + n_off[None, :] * stride_bn))


@triton.jit
def load_k_block(a_ptrs, b_ptrs, offs_k, left, EVEN_K: tl.constexpr, SWAP: tl.constexpr):
    """A and B of a K block of which `left` of K are there; zeros behind them."""
    if EVEN_K:
        return tl.load(a_ptrs), tl.load(b_ptrs)
    elif SWAP:
        return (tl.load(a_ptrs, mask=(offs_k < left)[:, None], other=0.0),
                tl.load(b_ptrs, mask=(offs_k < left)[None, :], other=0.0))
    else:
        return (tl.load(a_ptrs, mask=(offs_k < left)[None, :], other=0.0),
                tl.load(b_ptrs, mask=(offs_k < left)[:, None], other=0.0))


@triton.jit
def store_tile(out_ptr, acc, m_off, n_off, row_live, col_live, stride_om, ACCUMULATE: tl.constexpr, SWAP: tl.constexpr,
               WIDE: tl.constexpr):
    """Store the sums of live rows and columns, added to what is there where ACCUMULATE; sums are [BN, BM] where SWAP."""
    if WIDE:
        m_off = m_off.to(tl.int64)
    if SWAP:
        ptrs = out_ptr + (m_off[None, :] * stride_om + n_off[:, None])
        live = row_live[None, :] & col_live[:, None]
    else:
        ptrs = out_ptr + (m_off[:, None] * stride_om + n_off[None, :])
        live = row_live[:, None] & col_live[None, :]
    if ACCUMULATE:
        acc += tl.load(ptrs, mask=live, other=0.0).to(tl.float32)
    tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=live)
