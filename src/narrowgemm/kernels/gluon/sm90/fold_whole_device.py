"""Packed MXFP4 weights to E4M3 in memory, once a call, for products whose groups have so many rows that it pays.

`fold_whole_kernel` does it in front of the product, for all groups that have rows, or for the first of them alone: the others then come
while the product runs, by warps of its blocks that have nothing else to do (`ahead`). These take pieces of work from one counter, in
the order of groups, so only blocks that run have any, and whoever waits for a group waits for blocks that run: it counts pieces.

    sync    int32: [pieces taken, pieces of group 0 done, of group 1, ...]
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents

from .counters_device import finish, take
from .fold_expand_device import expand, fields_layout, lane_table, row_tops, words_layout
from .fp8_block_schedule_device import CONTIGUOUS, OFFSETS, fresh, rows_of_group

# words [64, 32]: as they come out of `expand`, and with 128 bytes of a row next to each other in one store
MADE = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 1], [0, 2], [0, 4], [8, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 32]))
STORED = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 1], [0, 2], [4, 0], [8, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [0, 4]], [[16, 0], [32, 0]], [], [64, 32]))
MADE_16 = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 1], [0, 2], [0, 4], [8, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [], [], [16, 32]))


@gluon.jit
def load_rows(pointers, unit, slab, kb, KB, WARPS: gl.constexpr):
    """(words, scale fields) of 16 * WARPS rows of a unit, from the slab-th 16 on, in K block kb."""
    w_ptr, s_ptr, top_ptr, out_ptr = pointers
    ROWS: gl.constexpr = 16 * WARPS
    words_of: gl.constexpr = words_layout(WARPS)
    fields_of: gl.constexpr = fields_layout(WARPS)
    row = gl.expand_dims(fresh(gl.arange(0, ROWS, gl.SliceLayout(1, words_of))), 1)
    word = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, words_of)), 0)
    words = gl.load(w_ptr + (unit * KB + kb) * 1024 + slab * 256 + (row * 16 + word))
    r = gl.expand_dims(fresh(gl.arange(0, ROWS // 2, gl.SliceLayout(1, fields_of))), 1)
    q = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, fields_of)), 0)
    return words, gl.load(s_ptr + (unit * ((KB + 1) // 2) + kb // 2) * 128 + slab * 32 + (r * 4 + q))


@gluon.jit
def store_rows(y, pointers, unit, slab, kb, KB, WARPS: gl.constexpr, made: gl.constexpr, stored: gl.constexpr):
    """E4M3 words of the same rows [16 * WARPS, 32]."""
    w_ptr, s_ptr, top_ptr, out_ptr = pointers
    y = gl.convert_layout(gl.convert_layout(y, made, assert_trivial=True), stored)
    to = gl.expand_dims(fresh(gl.arange(0, 16 * WARPS, gl.SliceLayout(1, stored))) * (KB * 32), 1)
    column = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, stored)), 0)
    gl.store(out_ptr + (unit * 64 + slab * 16) * KB * 32 + kb * 32 + (to + column), y)


@gluon.jit
def expand_rows(pointers, unit, slab, first, end, KB, tables, NIBBLES: gl.constexpr, WARPS: gl.constexpr, made: gl.constexpr,
                stored: gl.constexpr):
    """16 * WARPS rows of a unit over K blocks [first, end), from memory to memory; the next block is on its way meanwhile."""
    tops = row_tops(pointers[2], unit * 64 + slab * 16, 64, WARPS)
    words, fields = load_rows(pointers, unit, slab, first, KB, WARPS)
    for kb in range(first, end):
        words_next, fields_next = load_rows(pointers, unit, slab, gl.minimum(kb + 1, end - 1), KB, WARPS)
        y = expand(words, fields >> (16 * (kb % 2)), tops, tables, NIBBLES, WARPS)
        store_rows(y, pointers, unit, slab, kb, KB, WARPS, made, stored)
        words = words_next
        fields = fields_next


@gluon.jit
def load_blocks(pointers, unit, first, KB, COUNT: gl.constexpr):
    """(words, scale fields) of a unit's COUNT K blocks from `first`, an even one; past the last, it again."""
    words = ()
    fields = ()
    for i in gl.static_range(COUNT):
        w, f = load_rows(pointers, unit, 0, gl.minimum(first + i, KB - 1), KB, 4)
        words = words + (w, )
        fields = fields + (f, )
    return words, fields


@gluon.jit
def has_rows(index_ptr, g, M, G, alignment, cfg: gl.constexpr):
    """Whether group g may have any. Contiguous: only a look at all ids would tell, so yes."""
    if cfg.LAYOUT < OFFSETS:
        return M > 0
    else:
        start, end, stop = rows_of_group(index_ptr, g, g < G, M, G, alignment, cfg)
        return end > start


@gluon.jit
def first_group(index_ptr, M, G, alignment, cfg: gl.constexpr):
    """The group that the product begins with."""
    g = G * 0
    if cfg.LAYOUT == CONTIGUOUS:
        g = gl.load(index_ptr, mask=M > 0, other=0)
        g = gl.where((g < 0) | (g >= G), 0, g)
    elif cfg.LAYOUT >= OFFSETS:
        while (g < G - 1) & (has_rows(index_ptr, g, M, G, alignment, cfg) == 0):
            g += 1
    return g


@gluon.jit(do_not_specialize=["M", "G", "alignment", "NT", "KB"])
def fold_whole_kernel(w_ptr, s_ptr, top_ptr, out_ptr, sync_ptr, index_ptr, M, G, alignment, NT, KB, cfg: gl.constexpr, COUNT: gl.constexpr,
                      PIECE: gl.constexpr):
    """w int32 [G * NT, KB, 1024], s int32 [G * NT, ceil(KB / 2), 128], top [G * NT * 64] to out int32 [G * NT * 64, KB * 32]; a
    program takes COUNT K blocks of a unit. PIECE > 0: of the first group alone, and `sync` is made, for pieces of so many blocks.
    All that a program reads is asked for at once, before it is known whether its group has rows."""
    gdc_launch_dependents()
    parts = (KB + COUNT - 1) // COUNT
    item = gl.program_id(0)
    g = item // (parts * NT)
    if PIECE > 0:
        g = first_group(index_ptr, M, G, alignment, cfg)
    unit = (g * NT + item // parts % NT).to(gl.int64)
    first = item % parts * COUNT
    pointers = (w_ptr, s_ptr, top_ptr, out_ptr)
    words, fields = load_blocks(pointers, unit, first, KB, COUNT)
    tops = row_tops(top_ptr, unit * 64, 64)
    if has_rows(index_ptr, g, M, G, alignment, cfg):
        tables = lane_table()
        for i in gl.static_range(COUNT):
            if first + i < KB:
                y = expand(words[i], fields[i] >> (16 * ((first + i) % 2)), tops, tables, cfg.NIBBLES)
                store_rows(y, pointers, unit, 0, first + i, KB, 4, MADE, STORED)
    if PIECE > 0:
        pieces = NT * 4 * ((KB + PIECE - 1) // PIECE)
        for at in range(item, G + 1, gl.num_programs(0)):
            gl.store(sync_ptr + at, gl.where(at == g + 1, pieces, 0))


# ---------------------------------------------------------------- while the product runs
@gluon.jit
def ahead(pointers, sync_ptr, problem, NT, cfg: gl.constexpr):
    """One warp: piece after piece, 16 rows over cfg.PIECE K blocks, of groups that have rows and are not done."""
    index_ptr, M, N, KB, G, alignment = problem
    parts = (KB + cfg.PIECE - 1) // cfg.PIECE
    pieces = NT * 4 * parts
    tables = lane_table()
    t = take(sync_ptr)
    while t < G * pieces:
        g = t // pieces
        done = sync_ptr + 1 + g
        todo = has_rows(index_ptr, g, M, G, alignment, cfg)
        if todo & (gl.load(done) < pieces):
            slab = t % pieces // parts
            unit = (g * NT + slab // 4).to(gl.int64)
            first = t % parts * cfg.PIECE
            expand_rows(pointers, unit, slab % 4, first, gl.minimum(first + cfg.PIECE, KB), KB, tables, cfg.NIBBLES, 1, MADE_16,
                        MADE_16)
        finish(done)
        t = take(sync_ptr)
