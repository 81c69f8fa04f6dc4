"""Columns of A that are far larger than others: what makes blocks not fold, where activations look like a model's.

A look in front takes four blocks of 64 rows of each 128 of K, and finds columns whose largest element lies some powers of two above the mean of
all columns'. Up to `LIMIT` of them are left out of what is folded; without them, the elements beside fold as others do. They leave in BF16, as
columns that weights ask for do, and so do their elements of the weights: a few more columns that every tile's sums begin with.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents

from .fold_mixed_words_device import MOST, PAIR, WORDS, any_part, counting, least_of, load_block, over_code, places, without
from .fold_pick_device import CHUNK, COLUMNS, OFFSETS, groups_among, shift_of, store_fours, take
from .fp8_block_schedule_device import fresh

LOOKS = gl.constexpr(4)         # of a K block
WITH = gl.constexpr(1 << 10)    # parts of what a look says: blocks that don't fold as they are,
THERE = gl.constexpr(1 << 20)   # and such with columns that are far larger
APART = gl.constexpr(3)
LIMIT = gl.constexpr(128)       # columns
_WORDS = gl.constexpr(gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0]))


@gluon.jit
def bits(x):
    """How many are set."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24) & 63


@gluon.jit
def rank(mask, j):
    """How many bits of a mask lie below bit j."""
    return bits(mask & (((j * 0 + 1) << j) - 1))


@gluon.jit
def far_larger(x, code):
    """Columns of a block that are, as bits [1, 4]."""
    row, part, word = places()
    t = x & 0x7F7F7F7F
    mask = gl.zeros([1, 4], gl.int32, PAIR)
    total = gl.to_tensor(0)
    count = gl.to_tensor(0)
    for i in gl.static_range(4):
        v = (t >> (8 * i)) & 0x7F
        most = gl.max(gl.where(v > 0, (v >> 3) + gl.expand_dims(code, 2), 0), 0)
        total += gl.sum(gl.sum(most, 1), 0)
        count += gl.sum(gl.sum((most > 0).to(gl.int32), 1), 0)
    for i in gl.static_range(4):
        v = (t >> (8 * i)) & 0x7F
        most = gl.max(gl.where(v > 0, (v >> 3) + gl.expand_dims(code, 2), 0), 0)
        above = (2 * most * count > 2 * total + 5 * count).to(gl.int32)      # two powers of two and a half above the mean
        w = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(0, WORDS)))
        found = gl.sum(above << (gl.expand_dims(w, 0) * 4 + i), 1)
        mask = mask | gl.expand_dims(gl.convert_layout(found, gl.SliceLayout(0, PAIR)), 0)
    return mask


@gluon.jit
def does_not_fold(x, code, there, mask, REMOVE: gl.constexpr):
    """1 where a block doesn't fold as one, and 2 added where scales of a row lie APART powers of two and more apart, so that some columns may
    be far larger than others."""
    holds, counts = counting(x, code)
    top = gl.expand_dims(gl.max(gl.where(counts, least_of(x, code, mask, REMOVE), 0), 1), 1)
    y, lost = over_code(x, code, top, holds, REMOVE)
    lost = any_part((gl.max(lost, 2) > 0) | (holds & (top - code > MOST)) | (there & (code == 255)))
    apart = any_part(counts & (top - code >= APART))
    return gl.max(gl.max(lost.to(gl.int32) + 2 * (apart & lost).to(gl.int32), 1), 0)


@gluon.jit
def look(x_ptr, s_ptr, looks_ptr, i, number, M, K, KB, RB, sxm, ssm, ssk, ALIGNED: gl.constexpr):
    """Look i of so many, spread over all blocks."""
    kb = i % KB
    first = (i.to(gl.int64) * RB // number).to(gl.int32) * 64
    x, code, there = load_block(x_ptr, s_ptr, first, M, kb, K, sxm, ssm, ssk, ALIGNED)
    row, part, word = places()
    at = kb * LOOKS + i // KB
    found = does_not_fold(x, code, there, 0, False)
    say = (found & 1) * (1 + WITH)
    if found > 1:
        mask = far_larger(x, code)
        gl.store(looks_ptr + LOOKS * KB + at * 4 + part, mask)
        if gl.max(gl.max((mask != 0).to(gl.int32), 1), 0) > 0:
            say = (does_not_fold(without(x, mask, True), code, there, mask, True) & 1) + (WITH + THERE)
    gl.store(looks_ptr + at, say.to(gl.int32))


@gluon.jit(do_not_specialize=["M", "K", "KB", "RB"])
def look_kernel(x_ptr, s_ptr, looks_ptr, count_ptr, M, K, KB, RB, sxm, ssm, ssk, ALIGNED: gl.constexpr):
    """A as `fold_mixed_kernel` takes it, one plane. looks int32 [LOOKS * KB], and [LOOKS * KB, 4] behind them: of a block, 1 where it does not
    fold without its columns that are far larger, 2^10 where not with them, 2^20 where there are such columns; those columns, as bits.
    Clears the count."""
    gdc_launch_dependents()
    i = gl.program_id(0)
    look(x_ptr, s_ptr, looks_ptr, i, gl.num_programs(0), M, K, KB, RB, sxm, ssm, ssk, ALIGNED)
    if i == 0:
        gl.store(count_ptr, (i * 0).to(gl.int32))


@gluon.jit
def said(looks_ptr, KB, BLOCKS: gl.constexpr):
    """What all looks say, added up."""
    i = gl.arange(0, BLOCKS * LOOKS, gl.BlockedLayout([BLOCKS * LOOKS // 128 if BLOCKS > 32 else 1], [32], [4], [0]))
    return gl.sum(gl.load(looks_ptr + i, mask=i < KB * LOOKS, other=0), 0)


@gluon.jit
def of_blocks(BLOCKS: gl.constexpr):
    """K blocks [BLOCKS, 1], and words [1, 4] of their columns."""
    return (gl.expand_dims(gl.arange(0, BLOCKS, gl.SliceLayout(1, _WORDS)), 1),
            gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, _WORDS)), 0))


@gluon.jit
def found_by(looks_ptr, masks_ptr, i, b, w, KB):
    """Columns that look i of each K block says are far larger, as bits [BLOCKS, 4]."""
    there = gl.load(looks_ptr + (b * LOOKS + i), mask=b < KB, other=0) >= THERE
    return gl.load(masks_ptr + ((b * LOOKS + i) * 4 + w), mask=there & (w >= 0), other=0)


@gluon.jit
def looked(looks_ptr, kb, KB, BLOCKS: gl.constexpr):
    """(whether nothing is to be tried, columns that are left out in front of K block kb, in all, and in it as bits [1, 4])."""
    sums = said(looks_ptr, KB, BLOCKS)
    mask = gl.zeros([1, 4], gl.int32, PAIR)
    before = sums * 0
    removed = sums * 0
    lost = (sums // WITH) & (WITH - 1)
    if sums >= THERE:
        b, w = of_blocks(BLOCKS)
        part = places()[1]
        masks_ptr = looks_ptr + LOOKS * KB
        all = gl.zeros([BLOCKS, 4], gl.int32, _WORDS)
        for i in gl.static_range(LOOKS):
            all = all | found_by(looks_ptr, masks_ptr, i, b, w, KB)
            here = gl.load(looks_ptr + (kb * LOOKS + i)) >= THERE
            mask = mask | gl.load(masks_ptr + ((kb * LOOKS + i) * 4 + part), mask=here & (part >= 0), other=0)
        number = gl.sum(bits(all), 1)
        inside = gl.arange(0, BLOCKS, gl.SliceLayout(1, _WORDS)) < kb
        counted = gl.sum(number + (gl.where(inside, number, 0) << 16), 0)
        if (counted & 0xFFFF) <= LIMIT:
            lost = sums & (WITH - 1)
            before = counted >> 16
            removed = counted & 0xFFFF
        else:
            mask = mask * 0
    return lost * 2 > KB * LOOKS, before, removed, mask


@gluon.jit
def mask_of_part(mask, part):
    """One of four masks [1, 4], for every thread."""
    return gl.sum(gl.sum(gl.where(places()[1] == part, mask, 0), 1), 0)


@gluon.jit
def pick_removed(place, index_ptr, list_ptr, p_ptr, first, kb, M, G, picks, pitch, before, removed, mask, LAYOUT: gl.constexpr,
                 GROUPS: gl.constexpr):
    """What is left out of the block in `place`, to columns of p behind the weights' picks; zeros up to whole steps of them. The blocks of
    the first rows make the list of those columns."""
    j = fresh(gl.arange(0, CHUNK, gl.SliceLayout(1, COLUMNS)))
    quad = gl.expand_dims(fresh(gl.arange(0, 16, gl.SliceLayout(0, COLUMNS))), 0)
    least, largest = groups_among(index_ptr, first, M, G, LAYOUT, GROUPS)
    if LAYOUT != OFFSETS:       # rows lie where they are in A, whosever they are
        least = first * 0
        largest = first * 0
    column = before
    for part in range(0, 4):
        m = mask_of_part(mask, part)
        if m != 0:
            live = ((m >> j) & 1) == 1
            low, high = take(place, gl.expand_dims(part * 32 + j, 1), quad)
            for g in range(least, largest + 1):
                to = (first + shift_of(index_ptr, g, M, LAYOUT)) // 4
                store_fours(p_ptr, gl.expand_dims(picks + column + rank(m, j), 1) * pitch + (to + quad), low, high, gl.expand_dims(live, 1))
            if first == 0:
                gl.store(list_ptr + (column + rank(m, j)), (kb * 128 + part * 32 + j).to(gl.int32), mask=live)
            column += bits(m)
    if kb == 0:
        end = (removed + 63) // 64 * 64
        for g in range(least, largest + 1):
            to = (first + shift_of(index_ptr, g, M, LAYOUT)) // 4
            for c in range(removed, end, CHUNK):
                low, high = take(place, gl.expand_dims(j, 1), quad)
                store_fours(p_ptr, gl.expand_dims(picks + c + j, 1) * pitch + (to + quad), low * 0, high * 0, gl.expand_dims(c + j < end, 1))


@gluon.jit
def outlying_rows(w_ptr, list_ptr, r_ptr, first, removed, N, K, ROWS: gl.constexpr):
    """ROWS rows of w [N, K] E4M3 to r BF16 [N, LIMIT]: the columns that are left out of A, zeros up to whole steps."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = (first + gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, layout)), 1)).to(gl.int64)
    j = gl.arange(0, 64, gl.SliceLayout(0, layout))
    for c in range(0, removed, 64):
        column = gl.load(list_ptr + (c + j), mask=c + j < removed, other=0)
        live = (row < N) & gl.expand_dims(c + j < removed, 0)
        w = gl.load(w_ptr + (row * K + gl.expand_dims(column, 0)), mask=live, other=0.0).to(gl.bfloat16)
        gl.store(r_ptr + (row * LIMIT + gl.expand_dims(c + j, 0)), w, mask=(row < N) & (gl.expand_dims(j, 0) >= 0))
