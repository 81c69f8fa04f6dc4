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


# ---------------------------------------------------------------- which tile, which rows
@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def clamp(x, limit):
    return gl.minimum(gl.maximum(x, 0), limit).to(gl.int32)


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
def tile_table(shape_args, index_ptr, table_ptr, cfg: gl.constexpr, NW: gl.constexpr):
    """(tiles of M up to and including each group, tiles in all). Each warp holds a copy: no barrier to look a tile up."""
    M, N, G, alignment = shape_args
    num_n = gl.cdiv(N, cfg.BN)
    if cfg.LAYOUT == DENSE:
        return num_n, gl.cdiv(M, cfg.BT) * num_n
    elif cfg.LAYOUT == CONTIGUOUS:
        return num_n, gl.load(table_ptr) * num_n
    else:
        per: gl.constexpr = gl.BlockedLayout([cfg.GROUPS // 32], [32], [NW], [0])
        _, rows = group_rows(index_ptr, gl.arange(0, cfg.GROUPS, per), G, M, alignment, cfg.LAYOUT)
        upto = gl.associative_scan((rows + (cfg.BT - 1)) // cfg.BT, 0, add)
        return upto, gl.max(upto, 0) * num_n


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
        # strips of STRIP pieces: the pieces of a long segment read the same weights at the same time
        STRIP: gl.constexpr = 2
        pieces = gl.load(table_ptr)
        first = tile // (STRIP * num_n) * STRIP
        rest = tile - first * num_n
        height = gl.maximum(gl.minimum(pieces - first, STRIP), 1)
        nb = rest // height
        piece = first + rest - nb * height
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


# ---------------------------------------------------------------- which segments: (tile, K range)
@gluon.jit
def share(tiles, KB, cfg: gl.constexpr):
    """(tiles done whole, K blocks a CTA takes of the rest, this CTA's range of them)."""
    whole = tiles
    chunk = KB
    begin = tiles * 0
    end = begin
    if cfg.STREAM > 0:
        P = gl.num_programs(0)
        whole = tiles // P * P
        rest = (tiles - whole) * KB
        chunk = gl.minimum(gl.maximum(gl.cdiv(rest, P), cfg.STREAM), KB)
        begin = gl.minimum(gl.program_id(0) * chunk, rest)
        end = gl.minimum(begin + chunk, rest)
    return whole, chunk, begin, end


@gluon.jit
def segment(begin, end, t, whole, KB, cfg: gl.constexpr):
    """The next segment: (is there one, tile, first K block, end). Shared tiles come first, so that a wait for their sum
    is hidden behind whole ones."""
    live = t < whole
    tile = t
    k0 = t * 0
    k1 = k0 + KB
    if cfg.STREAM > 0:
        part = begin < end
        j = begin // KB
        live = live | part
        tile = gl.where(part, whole + j, t)
        k0 = gl.where(part, begin - j * KB, 0)
        k1 = gl.where(part, gl.minimum(KB, k0 + end - begin), KB)
    return live, tile, k0, k1


@gluon.jit
def step(begin, end, t, k0, k1, cfg: gl.constexpr):
    P = gl.num_programs(0)
    if cfg.STREAM > 0:
        part = begin < end
        return gl.where(part, begin + k1 - k0, begin), gl.where(part, t, t + P)
    else:
        return begin, t + P


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    slot += 1
    wrap = slot == STAGES
    return gl.where(wrap, 0, slot), gl.where(wrap, phase ^ 1, phase)
