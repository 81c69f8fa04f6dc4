"""Tiles of the Hopper prefill kernel for narrow weights: which ones a block has, in which order, and who tells whom.

A block's first two are those of its own number, the others it takes by number from a counter that the launch in front sets to nothing: not
all SMs are equally near to the memory, and not all tiles equally wide, so blocks that take what is next end within one tile's time of each
other. The producer looks a tile up, and tells the consumers through shared memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import cluster_device as cluster
from .counters_device import take
from .fold_expand_device import row_tops
from .narrow_entries_device import entry_at, entry_sums

HEAD = gl.constexpr(16)      # of the table: see narrow_tile.TABLE_HEAD
TILES = gl.constexpr(16)     # that are announced: more than slots of a ring and two


@gluon.jit
def tile_at(t, total, num_n, sums, table_ptr, groups, cap, cfg: gl.constexpr, WARPS: gl.constexpr):
    """(expert, n tile, first position, tokens) of tile t; no tokens past the end. AHEAD: table_ptr is the layout's index, cap the
    rows of a masked group."""
    live = t < total
    b = t // num_n
    if cfg.AHEAD:
        e, first, rows = entry_at(b, live, sums, table_ptr, groups, cap, cfg, WARPS)
        return e, t - b * num_n, first, rows
    else:
        p = table_ptr + HEAD + b
        rows = gl.load(p + 2 * cap, mask=live, other=0)
        return gl.load(p, mask=live, other=0), t - b * num_n, gl.load(p + cap, mask=live, other=0), rows


@gluon.jit
def entries(table, table_ptr, cfg: gl.constexpr, WARPS: gl.constexpr):
    """(running sums of entries a group, how many there are)."""
    if cfg.AHEAD:
        sums = entry_sums(table, cfg, WARPS)
        return sums, gl.max(sums, 0)
    else:
        return table, gl.load(table_ptr)


@gluon.jit
def number_after(t, made, total, count_ptr):
    """Of the tile that a block has behind tile t, its `made`-th from 0 on; past the end if there is none. Where no block has more than two,
    none waits for the counter."""
    step = gl.num_programs(0)
    n = t + step
    if (made > 0) & (total > 2 * step):
        n = take(count_ptr) + 2 * step
    return n


@gluon.jit
def tile_word(i, cfg: gl.constexpr):
    """Address of what is known of a block's i-th tile."""
    return cluster.start_of_shared() + cfg.TOLD_AT + i % TILES * 16


@gluon.jit
def announce(i, tile, cfg: gl.constexpr):
    """By the producer, before it asks for a K block of tile i - 1: whoever has found that block finds this."""
    at = tile_word(i, cfg)
    for j in gl.static_range(4):
        cluster.put_word(at + 4 * j, tile[j])


@gluon.jit
def announced(i, cfg: gl.constexpr):
    """(expert, n tile, first position, tokens) of tile i, behind a K block of tile i - 1."""
    at = tile_word(i, cfg)
    return cluster.word(at), cluster.word(at + 4), cluster.word(at + 8), cluster.word(at + 12)


@gluon.jit
def tops_of(top_ptr, e, n, NT, cfg: gl.constexpr, WG: gl.constexpr):
    """Of one consumer's units of n tile `n` of expert `e`, what expanding them takes. top_ptr: rows' largest scale codes; NT: tiles of 64 rows
    of an expert."""
    MP: gl.constexpr = cfg.MP
    unit = n * cfg.UNITS + WG * MP
    tops = ()
    for u in gl.static_range(MP):
        tops = tops + (row_tops(top_ptr, (e * NT + unit + u).to(gl.int64) * 64, (NT - unit) * 64 - u * 64), )
    return tops


@gluon.jit
def next_tile(i, top_ptr, NT, cfg: gl.constexpr, WG: gl.constexpr):
    """(tile i, what expanding its weights takes, FP8): asked for in front of the store of the one before."""
    tile = announced(i, cfg)
    tops = ()
    if cfg.FP8:
        tops = tops_of(top_ptr, tile[0], tile[1], NT, cfg, WG)
    return tile, tops
