"""Device code of the Hopper FP8 decode kernel: which tile, which rows, which K range comes next.

Every partition of a CTA walks the same sequence by itself; group sizes are read from the device, and idle groups cost
nothing: a tile number is looked up in the running count of tiles, which each warp holds in registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

DENSE = gl.constexpr(0)
CONTIGUOUS = gl.constexpr(1)
OFFSETS = gl.constexpr(2)
PSUM = gl.constexpr(3)
MASKED = gl.constexpr(4)
STRIP = gl.constexpr(2)          # pieces of a strip


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def larger(a, b):
    return gl.maximum(a, b)


@gluon.jit
def clamp(x, limit):
    return gl.minimum(gl.maximum(x, 0), limit).to(gl.int32)


# ---------------------------------------------------------------- which tile, which rows
@gluon.jit
def group_rows(index_ptr, g, G, M, alignment, LAYOUT: gl.constexpr):
    """(first row, number of rows) of group(s) g, clamped to the tensor; no rows outside [0, G)."""
    live = (g >= 0) & (g < G)
    if LAYOUT == MASKED:
        start = g * 0
        end = clamp(gl.load(index_ptr + g, mask=live, other=0), M)
    elif LAYOUT == OFFSETS:
        start = clamp(gl.load(index_ptr + g, mask=live, other=0), M)
        end = clamp(gl.load(index_ptr + g + 1, mask=live, other=0), M)
    else:
        before = clamp(gl.load(index_ptr + g - 1, mask=live & (g > 0), other=0), M)
        start = gl.minimum((before + alignment - 1) // alignment * alignment, M)
        end = clamp(gl.load(index_ptr + g, mask=live, other=0), M)
    return start, gl.maximum(end - start, 0)


@gluon.jit
def all_groups(shape_args, index_ptr, cfg: gl.constexpr, NW: gl.constexpr):
    """(first row, number of rows) of every group; each warp holds a copy."""
    M, N, G, alignment = shape_args
    per: gl.constexpr = gl.BlockedLayout([cfg.GROUPS // 32], [32], [NW], [0])
    return group_rows(index_ptr, gl.arange(0, cfg.GROUPS, per), G, M, alignment, cfg.LAYOUT)


@gluon.jit
def tile_table(shape_args, index_ptr, table_ptr, cfg: gl.constexpr, NW: gl.constexpr):
    """(tiles of M up to and including each group, tiles in all). Each warp holds a copy: no barrier to look a tile up."""
    M, N, G, alignment = shape_args
    num_n = gl.cdiv(N, cfg.BN)
    if cfg.LAYOUT == DENSE:
        return num_n, gl.cdiv(M, cfg.BT) * num_n
    elif cfg.LAYOUT == CONTIGUOUS:
        return num_n, gl.load(table_ptr) * num_n
    else:
        _, rows = all_groups(shape_args, index_ptr, cfg, NW)
        upto = gl.associative_scan((rows + (cfg.BT - 1)) // cfg.BT, 0, add)
        return upto, gl.max(upto, 0) * num_n


@gluon.jit
def strip_of(tile, num_n, pieces):
    """(piece, n block) in strips of STRIP pieces: the pieces of a long segment read the same weights at the same time."""
    first = tile // (STRIP * num_n) * STRIP
    rest = tile - first * num_n
    height = gl.maximum(gl.minimum(pieces - first, STRIP), 1)
    nb = rest // height
    return first + rest - nb * height, nb


@gluon.jit
def locate(tile, upto, shape_args, index_ptr, table_ptr, cap, cfg: gl.constexpr, ROWS: gl.constexpr):
    """Tile -> (group, first row, rows, n block). ROWS=False where the number of rows is not used: it costs a load."""
    M, N, G, alignment = shape_args
    num_n = gl.cdiv(N, cfg.BN)
    if cfg.LAYOUT == DENSE:
        num_m = gl.cdiv(M, cfg.BT)
        nb = tile // num_m
        row = (tile - nb * num_m) * cfg.BT
        return tile * 0, row, gl.minimum(M - row, cfg.BT), nb
    elif cfg.LAYOUT == CONTIGUOUS:
        pieces = gl.load(table_ptr)
        piece, nb = strip_of(tile, num_n, pieces)
        g = gl.load(table_ptr + 4 + piece)
        row = gl.load(table_ptr + 4 + cap + piece)
        end = gl.load(table_ptr + 4 + 2 * cap + piece)
        return g, row, end - row, nb
    else:
        done = upto * num_n <= tile
        g = gl.sum(done.to(gl.int32), 0)
        before = gl.max(gl.where(done, upto, 0), 0)
        tiles = gl.maximum(gl.min(gl.where(done, 0x7fffffff, upto), 0) - before, 1)
        rest = tile - before * num_n
        nb = rest // tiles
        m = (rest - nb * tiles) * cfg.BT
        start = g * 0
        rows = start
        if ROWS or cfg.LAYOUT != MASKED:
            start, rows = group_rows(index_ptr, g, G, M, alignment, cfg.LAYOUT)
        return g, start + m, gl.minimum(rows - m, cfg.BT), nb


@gluon.jit
def list_pieces(shape_args, index_ptr, table_ptr, cap, cfg: gl.constexpr, NW: gl.constexpr):
    """m_indices -> table of pieces: at most BT neighbouring rows of one group. Word 0 is their number; then the columns
    group, first row, end row, `cap` entries each. Every CTA writes the whole table, all of them the same words: each
    reads what it has written itself, so none waits for another."""
    M, N, G, alignment = shape_args
    CH: gl.constexpr = 256 * NW
    lay: gl.constexpr = gl.BlockedLayout([8], [32], [NW], [0])
    pieces = M * 0
    run = M * 0 - 1                             # first row of the run that the last chunk ended in
    for base in range(0, M, CH):
        i = base + gl.arange(0, CH, lay)
        here = gl.load(index_ptr + i, mask=i < M, other=-1)
        prev = gl.load(index_ptr + i - 1, mask=(i > 0) & (i <= M), other=-1)
        succ = gl.load(index_ptr + i + 1, mask=i + 1 < M, other=-1)
        live = (here >= 0) & (here < G)
        starts = gl.maximum(gl.associative_scan(gl.where(live & (here != prev), i, -1), 0, larger), run)
        at = (i - starts) % cfg.BT
        opens = live & (at == 0)
        closes = live & ((at == cfg.BT - 1) | (succ != here))
        upto = gl.associative_scan(opens.to(gl.int32), 0, add)
        entry = pieces + upto - 1
        gl.store(table_ptr + 4 + entry, here, mask=opens)
        gl.store(table_ptr + 4 + cap + entry, i, mask=opens)
        gl.store(table_ptr + 4 + 2 * cap + entry, i + 1, mask=closes)
        pieces += gl.max(upto, 0)
        run = gl.maximum(run, gl.max(starts, 0))
    gl.store(table_ptr, pieces)


# ---------------------------------------------------------------- which K range
@gluon.jit
def share(tiles, KB, ctas, cfg: gl.constexpr):
    """(units of work, units a tile, K blocks a unit). Tiles are cut along K only where all of them together find room on
    the grid at once, so that a CTA has one unit at most and partial sums take one tile a CTA; or each by one cluster."""
    if cfg.SPLIT == 1:
        return tiles, tiles * 0 + 1, KB
    elif cfg.CLUSTER > 1:
        return tiles * cfg.SPLIT, tiles * 0 + cfg.SPLIT, KB
    else:
        split = gl.maximum(gl.minimum(ctas // gl.maximum(tiles, 1), cfg.SPLIT), 1)
        chunk = gl.cdiv(KB, split)
        split = gl.cdiv(KB, chunk)
        return tiles * split, split, chunk


@gluon.jit
def begin(shape_args, index_ptr, table_ptr, KB, cfg: gl.constexpr, NW: gl.constexpr):
    """How every partition starts: (table of tiles, units of work, units a tile, K blocks a unit, the ring's first slot)."""
    upto, tiles = tile_table(shape_args, index_ptr, table_ptr, cfg, NW)
    units, split, chunk = share(tiles, KB, gl.num_programs(0), cfg)
    return upto, units, split, chunk, gl.to_tensor(0)


@gluon.jit
def k_range(t, split, chunk, KB, cfg: gl.constexpr):
    """Unit t -> (tile, first K block, end)."""
    if cfg.SPLIT == 1:
        return t, t * 0, KB
    elif cfg.CLUSTER > 1:
        tile = t // cfg.SPLIT
        rank = t - tile * cfg.SPLIT
        return tile, rank * KB // cfg.SPLIT, (rank + 1) * KB // cfg.SPLIT
    else:
        tile = t // split
        k0 = (t - tile * split) * chunk
        return tile, k0, gl.minimum(k0 + chunk, KB)


@gluon.jit
def guess(t, shape_args, index_ptr, KB, cfg: gl.constexpr):
    """(group, n block, first K block, K blocks) whose weights are fetched before group sizes are known: of unit t, if every
    group has as many rows as fit one tile, or (contiguous) every 128 rows are of one group; dense, for sure. No K blocks
    where there is no such group."""
    M, N, G, alignment = shape_args
    num_n = gl.cdiv(N, cfg.BN)
    if cfg.LAYOUT == DENSE:
        num_m = gl.cdiv(M, cfg.BT)
        units, split, chunk = share(num_m * num_n, KB, gl.num_programs(0), cfg)
        tile, k0, k1 = k_range(t, split, chunk, KB, cfg)
        return t * 0, tile // num_m, k0, gl.where(t < units, gl.minimum(k1 - k0, cfg.GUESS), 0)
    else:
        if cfg.LAYOUT == CONTIGUOUS:
            piece, nb = strip_of(t, num_n, STRIP)
            g = gl.load(index_ptr + piece * 128, mask=piece * 128 < M, other=-1).to(gl.int32)
        else:
            g = t // num_n
            nb = t - g * num_n
        return g, nb, t * 0, gl.where((g >= 0) & (g < G), gl.minimum(KB, cfg.GUESS), 0)


@gluon.jit
def fetched(t, where, shape_args, index_ptr, KB, cfg: gl.constexpr):
    """K blocks of unit t's weights that were fetched on a guess: (rightly, in vain). Only a CTA's first unit has any."""
    first = t == gl.program_id(0)
    g, nb, k0, count = guess(gl.where(first, t, 0), shape_args, index_ptr, KB, cfg)
    count = gl.where(first, count, 0)
    right = gl.where((where[0] == g) & (where[3] == nb), count, 0)
    return right, count - right


@gluon.jit
def left_over(units, shape_args, index_ptr, KB, cfg: gl.constexpr):
    """K blocks that were fetched for a first unit that there isn't."""
    g, nb, k0, count = guess(gl.program_id(0), shape_args, index_ptr, KB, cfg)
    return gl.where(units <= gl.program_id(0), count, 0)


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    slot += 1
    wrap = slot == STAGES
    return gl.where(wrap, 0, slot), gl.where(wrap, phase ^ 1, phase)
