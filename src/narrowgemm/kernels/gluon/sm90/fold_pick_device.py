"""Columns of a block of A that leave in BF16 beside, where elements of weights that don't fold meet them.

The warps that fold a block put it into shared memory once more, by columns: four rows of one in a word, 16 words a column. Entries of the
weights' list then take a column each, two at a time a warp, and write it along.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .cluster_device import start_of_shared
from .fold_mixed_words_device import e8m0, places
from .fp8_block_schedule_device import fresh

DENSE = gl.constexpr(0)     # `LAYOUT`, as the product's
CONTIGUOUS = gl.constexpr(1)
OFFSETS = gl.constexpr(2)
CHUNK = gl.constexpr(32)    # entries at a time
# [CHUNK, 16, 2] words of BF16: a warp's columns side by side in twos, four rows of one in a lane
BOTH = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 0, 1], [8, 0, 0], [16, 0, 0]], [[0, 1, 0], [0, 2, 0], [0, 4, 0], [0, 8, 0], [1, 0, 0]], [[2, 0, 0], [4, 0, 0]], [], [32, 16, 2]))
COLUMNS = gl.constexpr(gl.SliceLayout(2, gl.DistributedLinearLayout(
    [[0, 0, 1], [8, 0, 0], [16, 0, 0]], [[0, 1, 0], [0, 2, 0], [0, 4, 0], [0, 8, 0], [1, 0, 0]], [[2, 0, 0], [4, 0, 0]], [], [32, 16, 2])))
PLACE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
PLACE_LINES = gl.constexpr(72)    # of 32 words: 32 times 16 of columns 0, 1, 2 and 3 of each four; scales of 64 rows, by 32 of K
TURN_ASM = gl.constexpr("""{
.reg .b32 a, b, c, d;
prmt.b32 a, $4, $5, 0x5140;
prmt.b32 b, $6, $7, 0x5140;
prmt.b32 c, $4, $5, 0x7362;
prmt.b32 d, $6, $7, 0x7362;
prmt.b32 $0, a, b, 0x5410;
prmt.b32 $1, a, b, 0x7632;
prmt.b32 $2, c, d, 0x5410;
prmt.b32 $3, c, d, 0x7632;
}""")
# the word at $2, its four rows' scales at $3: two words of BF16
TAKE_ASM = gl.constexpr("""{
.reg .b16 l, h;
.reg .b32 w, a, b;
.reg .f32 s0, s1, s2, s3, x0, x1, x2, x3;
ld.shared.b32 w, [$2];
ld.shared.v4.f32 {s0, s1, s2, s3}, [$3];
mov.b32 {l, h}, w;
cvt.rn.f16x2.e4m3x2 a, l;
cvt.rn.f16x2.e4m3x2 b, h;
mov.b32 {l, h}, a;
cvt.f32.f16 x0, l;
cvt.f32.f16 x1, h;
mov.b32 {l, h}, b;
cvt.f32.f16 x2, l;
cvt.f32.f16 x3, h;
mul.f32 x0, x0, s0;
mul.f32 x1, x1, s1;
mul.f32 x2, x2, s2;
mul.f32 x3, x3, s3;
cvt.rn.bf16x2.f32 $0, x1, x0;
cvt.rn.bf16x2.f32 $1, x3, x2;
}""")


@gluon.jit
def turned(r0, r1, r2, r3):
    """Words of four rows to words of four columns."""
    return gl.inline_asm_elementwise(TURN_ASM, "=&r,=&r,=&r,=&r,r,r,r,r", [r0, r1, r2, r3], dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
                                     is_pure=True, pack=1)


@gluon.jit
def word_at(k, quad):
    """Of shared memory, in bytes: where four rows of column k lie. Lanes that put or take words at once meet in no bank."""
    four = k >> 2
    return 4 * ((k & 3) * 512 + (four ^ (four >> 4)) * 16 + (quad ^ (((four >> 2) & 3) << 2)))


@gluon.jit
def scale_at(part, row):
    return 4 * (2048 + part * 64 + row)


@gluon.jit
def put(place, at, value):
    """A word into shared memory, at bytes `at`."""
    gl.inline_asm_elementwise("st.shared.b32 [$1], $2; mov.b32 $0, 0;", "=r,r,r", [start_of_shared() + at, value], dtype=gl.int32,
                              is_pure=False, pack=1)


@gluon.jit
def keep(place):
    """The compiler sees shared memory in use up to here, where all that uses it is PTX."""
    gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [place.index(0).load(gl.BlockedLayout([1], [32], [4], [0]))], dtype=gl.int32,
                              is_pure=False, pack=1)


@gluon.jit
def take(place, k, quad):
    """Four rows of column k, times their scales: two words of BF16."""
    return gl.inline_asm_elementwise(TAKE_ASM, "=&r,=&r,r,r", [start_of_shared() + word_at(k, quad),
                                                               start_of_shared() + scale_at(k >> 5, quad * 4)],
                                     dtype=(gl.int32, gl.int32), is_pure=False, pack=1)


@gluon.jit
def fours(x):
    """[64, 4, 8] to four of [16, 4, 8], a row of each four."""
    even, odd = gl.split(gl.permute(gl.reshape(x, [16, 2, 2, 4, 8]), [0, 3, 4, 1, 2]))
    x0, x2 = gl.split(even)
    x1, x3 = gl.split(odd)
    return x0, x1, x2, x3


@gluon.jit
def place_block(place, x, code):
    """A block's words by columns, and its scales, into shared memory."""
    row, part, word = places()
    at = fours(word_at(gl.expand_dims(part * 32, 2) + word * 4, gl.expand_dims(row // 4, 2)) + (x & 0))[0]
    r0, r1, r2, r3 = fours(x)
    columns = turned(r0, r1, r2, r3)
    for i in gl.static_range(4):
        put(place, at + 2048 * i, columns[i])
    put(place, scale_at(part, row), e8m0(code).to(gl.int32, bitcast=True))


@gluon.jit
def groups_among(index_ptr, first, M, G, LAYOUT: gl.constexpr, GROUPS: gl.constexpr):
    """(the least group of rows [first, first + 64), the largest), where there is none a largest below the least."""
    if LAYOUT == DENSE:
        return gl.to_tensor(0), gl.to_tensor(0)
    elif LAYOUT == CONTIGUOUS:
        r = first + gl.arange(0, 64, gl.BlockedLayout([1], [32], [4], [0]))
        group = gl.load(index_ptr + r, mask=r < M, other=-1).to(gl.int32)
        group = gl.where(group < G, group, -1)
        return gl.min(gl.where(group < 0, 1 << 30, group), 0), gl.max(group, 0)
    else:
        g = fresh(gl.arange(0, GROUPS, gl.BlockedLayout([1], [32], [4], [0])))
        end = gl.load(index_ptr + 1 + g, mask=g < G, other=1 << 30)
        last = gl.minimum(first + 63, M - 1)
        return gl.sum((end <= first).to(gl.int32), 0), gl.minimum(gl.sum((end <= last).to(gl.int32), 0), G - 1)


@gluon.jit
def shift_of(index_ptr, g, M, LAYOUT: gl.constexpr):
    """What is added to a row of group g to find its picks: see `column_of` in `fold_mixed_device.py`."""
    if LAYOUT == OFFSETS:
        start = gl.minimum(gl.maximum(gl.load(index_ptr + g), 0), M).to(gl.int32)
        return 4 * (start // 4 % 2 + 32 * g)
    else:
        return 0


@gluon.jit
def pick_columns(place, index_ptr, at_ptr, pick_ptr, p_ptr, first, kb, M, KB, G, picks, pitch, LAYOUT: gl.constexpr, GROUPS: gl.constexpr):
    """Columns of the block in `place`, rows [first, first + 64) of A, to p BF16 [columns of picks, 4 * pitch], as words. pick int32
    [G, picks]: 128 * column + k, where k is one of the K block's; at int32 [G, KB + 1]: where a K block's entries start."""
    j = fresh(gl.arange(0, CHUNK, gl.SliceLayout(1, COLUMNS)))
    quad = gl.expand_dims(fresh(gl.arange(0, 16, gl.SliceLayout(0, COLUMNS))), 0)
    least, largest = groups_among(index_ptr, first, M, G, LAYOUT, GROUPS)
    for g in range(least, largest + 1):
        to = (first + shift_of(index_ptr, g, M, LAYOUT)) // 4
        start = gl.load(at_ptr + g * (KB + 1) + kb)
        end = gl.load(at_ptr + g * (KB + 1) + kb + 1)
        pick_ptr_g = pick_ptr + g * picks
        ahead = gl.load(pick_ptr_g + start + j, mask=start + j < end, other=0)
        for c in range(start, end, CHUNK):
            entry = gl.expand_dims(ahead, 1)
            mask = gl.expand_dims(c + j < end, 1)
            ahead = gl.load(pick_ptr_g + c + CHUNK + j, mask=c + CHUNK + j < end, other=0)
            low, high = take(place, entry & 127, quad)
            at = (entry >> 7) * pitch + (to + quad)
            if LAYOUT == CONTIGUOUS:
                if least == largest:
                    store_fours(p_ptr, at, low, high, mask)
                else:
                    store_own(p_ptr, at, low, high, mask, index_ptr + first, M - first, quad, g)
            else:       # others of these rows are nobody's, in the group's columns
                store_fours(p_ptr, at, low, high, mask)


@gluon.jit
def store_fours(p_ptr, at, low, high, mask):
    """Four rows of a column, at 8 bytes times `at`."""
    half = gl.expand_dims(gl.expand_dims(gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, BOTH))), 0), 1)
    both = gl.convert_layout(gl.join(low, high), BOTH, assert_trivial=True)
    gl.store(p_ptr + (gl.expand_dims(at * 2, 2) + half), both, mask=gl.expand_dims(mask, 2))


@gluon.jit
def store_own(p_ptr, at, low, high, mask, index_ptr, M, quad, g):
    """The same of those rows only that are group g's."""
    short_ptr = p_ptr.to(gl.pointer_type(gl.int16), bitcast=True)
    for i in gl.static_range(4):
        word = low if i < 2 else high
        own = gl.load(index_ptr + (quad * 4 + i), mask=quad * 4 + i < M, other=-1) == g
        gl.store(short_ptr + (at * 4 + i), (word >> (16 * (i % 2))).to(gl.int16), mask=mask & own)
