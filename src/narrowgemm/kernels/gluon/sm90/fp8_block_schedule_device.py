"""Which tile comes next in the Hopper FP8 prefill kernel. Every warp of a block finds the same answer by itself.

Dense: tiles in strips. Contiguous: the same tiles, each in as many passes as it holds group ids (one, where segments are
aligned). Offsets, psum, masked: tiles are counted per group; a table of their running sum is made in shared memory once a
block, and a tile's group is found by looking at 32 of its entries at a time, going on from the last one.

TAIL: a group's last tile that has rows in its first half only takes little more than half the time of others. Were both kinds dealt
out in one sequence, some blocks would have few short ones, so each kind is dealt out by itself, and a block takes what it has of
both group by group. An entry of the table holds two sums: whole tiles, and groups with a tail.
"""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl

from .shim import view_rows

DENSE = gl.constexpr(0)
CONTIGUOUS = gl.constexpr(1)
OFFSETS = gl.constexpr(2)
PSUM = gl.constexpr(3)
MASKED = gl.constexpr(4)
NO_GROUP = gl.constexpr(0x7fffffff)
TAIL_BITS = gl.constexpr(22)    # of an entry, below the number of groups with a tail; rows that fit into memory don't fill them
ROW_OF_INTS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@constexpr_function
def cluster_size(cfg):
    """Blocks that go from tile to tile together."""
    return getattr(cfg, "CLUSTER", 1)


@constexpr_function
def has_tails(cfg):
    """Whether whole tiles and tails are dealt out each by itself."""
    return getattr(cfg, "TAIL", False)


@constexpr_function
def stub_rows(cfg):
    """Rows beyond a group's last whole tile that are worked on with it."""
    return getattr(cfg, "STUB", 0)


@gluon.jit
def add(x, y):
    return x + y


@gluon.jit
def fresh(x):
    """x, as a value that the compiler doesn't know: what follows from it is worked out where it is used, not kept in
    registers from before the loop over tiles. The sums leave none over."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def clip(x, limit):
    """Into [0, limit], int32: a wrong size may lose rows, never leave the tensor."""
    return gl.minimum(gl.maximum(x, 0), limit).to(gl.int32)


@gluon.jit
def align_up(x, alignment):
    return (x + alignment - 1) // alignment * alignment


@gluon.jit
def rows_of_group(index_ptr, g, live, M, G, alignment, cfg: gl.constexpr):
    """(first row, end, end of what is written) of group(s) g where `live`; rows from `end` on are padding, written as zero.

    Offsets: the last is the first row once more, and the first is rounded down to where a box of A's scales may start: on 16
    bytes. The rows between belong to the group before and are not written.
    """
    if cfg.LAYOUT == MASKED:
        end = clip(gl.load(index_ptr + g, mask=live, other=0), M)
        return end * 0, end, end
    elif cfg.LAYOUT == OFFSETS:
        start = clip(gl.load(index_ptr + g, mask=live, other=0), M)
        end = gl.maximum(clip(gl.load(index_ptr + g + 1, mask=live, other=0), M), start)
        if cfg.A_SCALE_TMA:
            return gl.where(end > start, start & -4, start), end, start
        else:
            return start, end, start
    else:
        before = gl.load(index_ptr + g - 1, mask=live & (g > 0), other=0)
        last = gl.load(index_ptr + g, mask=live, other=0)
        start = clip(align_up(gl.maximum(before, 0), alignment), M)
        end = gl.maximum(clip(last, M), start)
        if cfg.ZERO:
            stop = gl.maximum(clip(align_up(gl.maximum(last, 0), alignment), M), end)
            # what comes after the last group is padding too
            return start, end, gl.where(g == G - 1, M, stop)
        else:
            return start, end, end


@gluon.jit
def fill_table(table, index_ptr, M, G, alignment, cfg: gl.constexpr, WARPS: gl.constexpr):
    """table[g] = tiles of M up to and including group g."""
    GP: gl.constexpr = cfg.GROUPS
    lay: gl.constexpr = gl.BlockedLayout([GP // (32 * WARPS) if GP > 32 * WARPS else 1], [32], [WARPS], [0])
    g = gl.arange(0, GP, lay)
    start, end, stop = rows_of_group(index_ptr, g, g < G, M, G, alignment, cfg)
    if cfg.LAYOUT == OFFSETS:
        stop = end
    if has_tails(cfg):
        left = (end - start) % cfg.BM
        if stub_rows(cfg) > 0:
            left = gl.where((left <= stub_rows(cfg)) & (end - start >= cfg.BM), 0, left)
        tiles = (end - start) // cfg.BM + gl.where(left > cfg.BM // 2, 1, gl.where(left > 0, 1 << TAIL_BITS, 0))
        tiles = gl.where(g < G, tiles, 0).to(gl.int32)
    else:
        tiles = gl.where(g < G, (stop - start + (cfg.BM - 1)) // cfg.BM, 0)
    table.store(gl.associative_scan(tiles, 0, add))


@gluon.jit
def entries(table, chunk, cfg: gl.constexpr, WARPS: gl.constexpr):
    """32 entries of the table, one a lane, the same in every warp: no barrier between warps to reduce them."""
    lay: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return view_rows(table, gl.int32, cfg.GROUPS // 32, 32, ROW_OF_INTS).index(chunk).load(lay)


@gluon.jit
def strip_order(t, num_m, num_n, STRIP: gl.constexpr):
    """Tile t of num_m x num_n -> (m, n): strips of STRIP tiles of M, M fastest, so that a strip shares B and A through L2."""
    per = STRIP * num_n
    s = t // per
    first = s * STRIP
    r = t - s * per
    height = gl.maximum(gl.minimum(num_m - first, STRIP), 1)
    n = r // height
    return first + r - n * height, n


# A tile is (n block or -1 where there is none, group, first row, end, stop). Rows are of A, for masked inside the group. Rows
# [first, end) are the group's, [end, stop) are written as zero. Offsets: rows before `stop` are not the group's. Contiguous: group NO_GROUP is a tile of padding, and stop is
# 1 where no row of the tile belongs to another group, else 0. It is five numbers because it is kept in registers through
# the sums of the tile before. A cursor is (t, id, chunk, before): tile index; contiguous: the last id of tile t that was
# done, or -1; others: where to go on in the table, and the tiles before there.
@gluon.jit
def is_live(tile):
    return tile[0] >= 0


@gluon.jit
def has_products(tile, cfg: gl.constexpr):
    """Of a live tile: whether there is anything to sum, or only padding."""
    if cfg.LAYOUT == CONTIGUOUS:
        return tile[1] != NO_GROUP
    elif cfg.LAYOUT == PSUM and cfg.ZERO:
        return tile[2] < tile[3]
    else:
        return tile[0] >= 0


@constexpr_function
def mixes(cfg):
    """Whether a dense product's tiles are of two widths."""
    return getattr(cfg, "MIX", False)


@gluon.jit
def mixed(M, N, strips, wide, cfg: gl.constexpr):
    """(rows of tiles, wide tiles, narrow tiles of one of the first `strips` rows): `wide` of them have three times 64 columns there, two fewer
    in the others, and what is left of N goes into tiles of two times 64."""
    num_m = gl.cdiv(M, cfg.BM)
    return num_m, num_m * wide - 2 * (num_m - strips), (gl.cdiv(N, 64) - 3 * wide + 1) // 2


@gluon.jit
def mixed_tile(t, work, cfg: gl.constexpr):
    """A dense product's: n counts 64 columns, stop is 1 where a tile is narrow. Wide ones come first, rows fastest, and lie behind a row's
    narrow ones, so that boxes of as many rows of B reach past N in no tile where the widths add up to it."""
    index_ptr, table, M, N, KB, strips, wide, total = work
    num_m, wides, narrow = mixed(M, N, strips, wide, cfg)
    small = (t >= wides).to(gl.int32)
    t_ = t - small * wides
    every = gl.where(small == 1, narrow, wide - 2)      # of each row; those of some come behind
    some = gl.maximum(gl.where(small == 1, num_m - strips, strips), 1)
    rest = t_ - every * num_m
    i = gl.where(rest < 0, t_ // num_m, every + rest // some)
    m = gl.where(rest < 0, t_ % num_m, small * strips + rest % some)
    before = narrow + gl.where(m < strips, 0, 3)
    return gl.where(t < total, gl.where(small == 1, 2 * i, 2 * before + 3 * i), -1), t * 0, m * cfg.BM, t * 0 + M, small


@gluon.jit
def dense_tile(t, work, cfg: gl.constexpr):
    index_ptr, table, M, N, KB, G, alignment, total = work
    if mixes(cfg):
        return mixed_tile(t, work, cfg)
    else:
        m, n = strip_order(t, gl.cdiv(M, cfg.BM), gl.cdiv(N, cfg.BN), cfg.STRIP)
        zero = t * 0
        return gl.where(t < total, n, -1), zero, m * cfg.BM, zero + M, zero


@gluon.jit
def contiguous_tile(t, done, work, cfg: gl.constexpr, WARPS: gl.constexpr):
    """The next (tile, id) pass at or after id `done` + 1 of tile t. Ids of a tile ascend; a tile of nothing but padding has
    one pass without products. Returns (t, tile)."""
    index_ptr, table, M, N, KB, G, alignment, total = work
    lay: gl.constexpr = gl.BlockedLayout([cfg.BM // 32], [32], [WARPS], [0])
    r = gl.arange(0, cfg.BM, lay)
    num_m = gl.cdiv(M, cfg.BM)
    num_n = gl.cdiv(N, cfg.BN)
    m = t * 0
    n = t * 0
    least = t * 0
    most = t * 0
    seek = t < total
    while seek:
        m, n = strip_order(t, num_m, num_n, cfg.STRIP)
        row = m * cfg.BM + r
        ids = gl.load(index_ptr + row, mask=row < M, other=-1)
        bad = (ids < 0) | (ids >= G)
        least = gl.min(gl.where(bad | (ids <= done), NO_GROUP, ids), 0)
        # rows past M are nobody's: they don't make a tile mixed
        most = gl.max(gl.where(row >= M, -1, gl.where(bad, NO_GROUP, ids)), 0)
        seek = (least == NO_GROUP) & (done >= 0)
        if seek:
            t += (gl.num_programs(0) // cluster_size(cfg))
            done = done * 0 - 1
            seek = t < total
    whole = (least == most) & (done < 0)
    return t, (gl.where(t < total, n, -1), least, m * cfg.BM, t * 0 + M, whole.to(gl.int32))


@gluon.jit
def counted(v, TAILS: gl.constexpr):
    """One of the sums in entries of the table."""
    if TAILS:
        return (v >> TAIL_BITS) & ((1 << (32 - TAIL_BITS)) - 1)
    else:
        return v & ((1 << TAIL_BITS) - 1)


@gluon.jit
def find(table, u, chunk, before, cfg: gl.constexpr, WARPS: gl.constexpr, TAILS: gl.constexpr):
    """The group that the u-th whole tile (or tail) is of: (where to go on, group, whole tiles before it, and with it)."""
    v = counted(entries(table, chunk, cfg, WARPS), TAILS)
    hits = gl.sum((v <= u).to(gl.int32), 0)
    if cfg.GROUPS > 32:
        while (hits == 32) & (chunk < cfg.GROUPS // 32 - 1):
            before = gl.max(v, 0)
            chunk += 1
            v = counted(entries(table, chunk, cfg, WARPS), TAILS)
            hits = gl.sum((v <= u).to(gl.int32), 0)
    return chunk, before, chunk * 32 + hits, gl.maximum(gl.max(gl.where(v <= u, v, 0), 0), before), gl.min(gl.where(v <= u, NO_GROUP, v), 0)


@gluon.jit
def next_of_both(cursor, work, cfg: gl.constexpr, WARPS: gl.constexpr):
    """(cursor, tile): the next whole tile or the next tail of this block, of which the earlier group is; of one group, whole tiles first.
    A cursor here is (whole tile, where to go on: chunk, before; tail, chunk, before)."""
    t, chunk, before, s, tail_chunk, tail_before = cursor
    index_ptr, table, M, N, KB, G, alignment, total = work
    step = gl.num_programs(0) // cluster_size(cfg)
    num_n = gl.cdiv(N, cfg.BN)
    u = t // num_n
    v = s // num_n
    live = u < counted(total, False)
    tail_live = v < counted(total, True)
    chunk, before, g, first, beyond = find(table, u, chunk, before, cfg, WARPS, False)
    tail_chunk, tail_before, tail_g, tail_first, tail_beyond = find(table, v, tail_chunk, tail_before, cfg, WARPS, True)
    whole = live & ((g <= tail_g) | (tail_live == 0))
    m, n = strip_order(t - first * num_n, beyond - first, num_n, cfg.STRIP)
    g = gl.minimum(gl.where(whole, g, tail_g), gl.maximum(G - 1, 0))
    start, end, stop = rows_of_group(index_ptr, g, live | tail_live, M, G, alignment, cfg)
    m = gl.where(whole, m, (end - start) // cfg.BM)
    n = gl.where(whole, n, gl.where(tail_live, s - v * num_n, -1))
    t = gl.where(whole, t + step, t)
    s = gl.where(whole, s, s + step)
    return (t, chunk, before, s, tail_chunk, tail_before), (n, g, start + m * cfg.BM, end, stop)


@gluon.jit
def counted_tile(t, chunk, before, work, cfg: gl.constexpr, WARPS: gl.constexpr):
    """Tile t of layouts whose tiles are counted per group. Returns (chunk, before, tile)."""
    index_ptr, table, M, N, KB, G, alignment, total = work
    num_n = gl.cdiv(N, cfg.BN)
    live = t < total
    u = gl.minimum(t, gl.maximum(total - 1, 0)) // num_n
    v = entries(table, chunk, cfg, WARPS)
    hits = gl.sum((v <= u).to(gl.int32), 0)
    if cfg.GROUPS > 32:
        while (hits == 32) & (chunk < cfg.GROUPS // 32 - 1):
            before = gl.max(v, 0)
            chunk += 1
            v = entries(table, chunk, cfg, WARPS)
            hits = gl.sum((v <= u).to(gl.int32), 0)
    first_tile = gl.maximum(gl.max(gl.where(v <= u, v, 0), 0), before)
    next_tile = gl.min(gl.where(v <= u, NO_GROUP, v), 0)
    g = gl.minimum(chunk * 32 + hits, gl.maximum(G - 1, 0))
    m, n = strip_order(t - first_tile * num_n, next_tile - first_tile, num_n, cfg.STRIP)
    start, end, stop = rows_of_group(index_ptr, g, live, M, G, alignment, cfg)
    return chunk, before, (gl.where(live, n, -1), g, start + m * cfg.BM, end, stop)


@gluon.jit
def first_tile(work, cfg: gl.constexpr, WARPS: gl.constexpr):
    """(cursor, tile) of this block's first tile."""
    t = gl.program_id(0) // cluster_size(cfg)
    zero = t * 0
    if has_tails(cfg):
        # tails are dealt out from the block on that whole tiles have come to
        step = gl.num_programs(0) // cluster_size(cfg)
        dealt = counted(work[7], False) * gl.cdiv(work[3], cfg.BN) % step
        return next_of_both((t, zero, zero, (t - dealt + step) % step, zero, zero), work, cfg, WARPS)
    elif cfg.LAYOUT == DENSE:
        return (t, zero, zero, zero), dense_tile(t, work, cfg)
    elif cfg.LAYOUT == CONTIGUOUS:
        t, tile = contiguous_tile(t, zero - 1, work, cfg, WARPS)
        return (t, zero - 1, zero, zero), tile
    else:
        chunk, before, tile = counted_tile(t, zero, zero, work, cfg, WARPS)
        return (t, zero, chunk, before), tile


@gluon.jit
def next_tile(cursor, tile, work, cfg: gl.constexpr, WARPS: gl.constexpr):
    """(cursor, tile) after `tile`."""
    if has_tails(cfg):
        return next_of_both(cursor, work, cfg, WARPS)
    else:
        return next_of_one(cursor, tile, work, cfg, WARPS)


@gluon.jit
def next_of_one(cursor, tile, work, cfg: gl.constexpr, WARPS: gl.constexpr):
    t, done, chunk, before = cursor
    n, g, first, end, stop = tile
    if cfg.LAYOUT == DENSE:
        t += (gl.num_programs(0) // cluster_size(cfg))
        return (t, done, chunk, before), dense_tile(t, work, cfg)
    elif cfg.LAYOUT == CONTIGUOUS:
        leave = (stop == 1) | (g == NO_GROUP)
        t = gl.where(leave, t + (gl.num_programs(0) // cluster_size(cfg)), t)
        done = gl.where(leave, -1, g)
        t_next, tile = contiguous_tile(t, done, work, cfg, WARPS)
        # a tile that was left has no id done
        done = gl.where(t_next == t, done, -1)
        return (t_next, done, chunk, before), tile
    else:
        t += (gl.num_programs(0) // cluster_size(cfg))
        chunk, before, tile = counted_tile(t, chunk, before, work, cfg, WARPS)
        return (t, done, chunk, before), tile


@gluon.jit
def total_tiles(table, M, N, cfg: gl.constexpr, WARPS: gl.constexpr, strips=0, wide=0):
    num_n = gl.cdiv(N, cfg.BN)
    if mixes(cfg):
        num_m, wides, narrow = mixed(M, N, strips, wide, cfg)
        return wides + narrow * num_m + 3 * (num_m - strips)
    elif cfg.LAYOUT < OFFSETS:
        return gl.cdiv(M, cfg.BM) * num_n
    elif has_tails(cfg):      # both sums
        v = entries(table, cfg.GROUPS // 32 - 1, cfg, WARPS)
        return gl.max(counted(v, False), 0) | (gl.max(counted(v, True), 0) << TAIL_BITS)
    else:
        return gl.max(entries(table, cfg.GROUPS // 32 - 1, cfg, WARPS), 0) * num_n
