"""A block of A in words of four E4M3, as four warps hold it: 64 rows by 128 of K, 16 bytes of a row in a lane, four rows one after the
other. What folding does with them takes no shared memory but where warps agree.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

WORDS = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0]], [[0, 0, 4], [0, 1, 0], [0, 2, 0], [4, 0, 0], [8, 0, 0]], [[16, 0, 0], [32, 0, 0]], [],
    [64, 4, 8]))
PAIR = gl.constexpr(gl.SliceLayout(2, gl.DistributedLinearLayout(
    [[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0]], [[0, 0, 4], [0, 1, 0], [0, 2, 0], [4, 0, 0], [8, 0, 0]], [[16, 0, 0], [32, 0, 0]], [],
    [64, 4, 8])))
LOWEST = gl.constexpr(64)   # that a scale is lowered to
MOST = gl.constexpr(14)     # powers of two that a block's scale may lie under the largest
# four elements over a scale, FP16 twice: E4M3, and bits where they are not what they were. What is compared comes out of the word, not
# out of its halves: the ptxas of Triton 3.6 takes a half from the word that it is put into, where that may be made later
FOLD_ASM = gl.constexpr("""{
.reg .b16 l, h;
.reg .b32 a, b, c, d;
mov.b32 {l, h}, $2;
cvt.rn.f16x2.e4m3x2 a, l;
cvt.rn.f16x2.e4m3x2 b, h;
mul.f16x2 a, a, $3;
mul.f16x2 b, b, $3;
cvt.rn.satfinite.e4m3x2.f16x2 l, a;
cvt.rn.satfinite.e4m3x2.f16x2 h, b;
mov.b32 $0, {l, h};
mov.b32 {l, h}, $0;
cvt.rn.f16x2.e4m3x2 c, l;
cvt.rn.f16x2.e4m3x2 d, h;
xor.b32 c, c, a;
xor.b32 d, d, b;
or.b32 $1, c, d;
}""")
# the least of a word's elements: powers of two that a scale may rise by before an element's lowest bit is lost, 128 for zeros. That is
# its exponent and the zeros behind its mantissa, the latter looked up by its three bits
ROOM_ASM = gl.constexpr("""{
.reg .b32 t, m, e, n, r;
and.b32 t, $1, 0x7f7f7f7f;
and.b32 m, t, 0x07070707;
shr.u32 e, m, 4;
or.b32 m, m, e;
prmt.b32 m, m, 0, 0x4420;
prmt.b32 r, 0x00010003, 0x00010002, m;
shr.u32 e, t, 3;
and.b32 e, e, 0x0f0f0f0f;
add.u32 n, e, 0x0f0f0f0f;
shr.u32 n, n, 4;
and.b32 n, n, 0x01010101;
add.u32 r, r, e;
sub.u32 r, r, n;
add.u32 n, t, 0x7f7f7f7f;
and.b32 n, n, 0x80808080;
xor.b32 n, n, 0x80808080;
or.b32 r, r, n;
and.b32 m, r, 0x00ff00ff;
shr.u32 r, r, 8;
and.b32 r, r, 0x00ff00ff;
min.u16x2 r, r, m;
shr.u32 m, r, 16;
and.b32 r, r, 0xffff;
min.u32 $0, r, m;
}""")


@gluon.jit
def over(x, s):
    """Words over scales, see `FOLD_ASM`: (words, what they lose, never negative)."""
    return gl.inline_asm_elementwise(FOLD_ASM, "=&r,=&r,r,r", [x, s], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)


@gluon.jit
def room_of(x):
    return gl.inline_asm_elementwise(ROOM_ASM, "=&r,r", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def places():
    """(row [64, 1], part [1, 4], word [1, 1, 8])."""
    row = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, PAIR)), 1)
    part = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, PAIR)), 0)
    word = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))
    return row, part, gl.expand_dims(gl.expand_dims(word, 0), 1)


@gluon.jit
def load_block(x_ptr, s_ptr, first, end, kb, K, sxm, ssm, ssk, ALIGNED: gl.constexpr):
    """Of 64 rows from `first` on, zeros where there is nothing: (words [64, 4, 8], scale codes, which of these there are, [64, 4]). x_ptr:
    int32, and sxm in 16 bytes, where ALIGNED, bytes elsewhere."""
    row, part, word = places()
    block = kb * 4 + part
    there = (first + row < end) & (block * 32 < K)
    code = gl.load(s_ptr + first.to(gl.int64) * ssm + (row.to(gl.int64) * ssm + block.to(gl.int64) * ssk), mask=there, other=0)
    mask = gl.expand_dims(there, 2)
    if ALIGNED:
        x_ptr += first.to(gl.int64) * sxm * 4
        x = gl.load(x_ptr + (gl.expand_dims(row * sxm * 4 + block * 8, 2) + word), mask=mask, other=0)
    else:
        x_ptr += first.to(gl.int64) * sxm
        x_ptr += gl.expand_dims(row.to(gl.int64) * sxm + block * 32, 2) + word * 4
        x = gl.load(x_ptr, mask=mask, other=0).to(gl.int32)
        for i in gl.static_range(1, 4):
            x = x | (gl.load(x_ptr + i, mask=mask, other=0).to(gl.int32) << (8 * i))
    return x, code.to(gl.int32), there


@gluon.jit
def store_block(y_ptr, ys_ptr, y, scale, first, end, kb, KB, column):
    """Words to 64 rows from `first` on of KB * 32, and scale codes [64, 4] as FP32 to [KB, 4, 4 * column], by fours of rows."""
    row, part, word = places()
    y_ptr += first.to(gl.int64) * (KB * 32)
    at = gl.expand_dims(row * (KB * 32) + (kb * 32 + part * 8), 2) + word
    gl.store(y_ptr + at, y, mask=gl.expand_dims(first + row < end, 2))
    ys_ptr += kb.to(gl.int64) * 16 * column + first
    gl.store(ys_ptr + (part * column * 4 + row), e8m0(scale), mask=(first + row // 4 * 4 < end) & (part >= 0))


@gluon.jit
def holding(x):
    """Which 32 of K of a row hold anything, [64, 4]."""
    return gl.max(x & 0x7F7F7F7F, 2) > 0


@gluon.jit
def over_code(x, code, scale, holds, REMOVE: gl.constexpr = False):
    """Words of scales `code` over `scale`; what they lose. REMOVE: a scale may be smaller, too."""
    down = gl.where(holds, gl.minimum(gl.maximum(scale - code, -15 if REMOVE else 0), MOST), 0)
    return over(x, gl.expand_dims((15 - down) * 0x04000400, 2))


@gluon.jit
def any_part(x):
    """Of bool [64, 4] which a lane has, whether any is true, [16, 4]."""
    return gl.max(gl.reshape(x.to(gl.int32), [16, 4, 4]), 1) > 0


@gluon.jit
def counting(x, code):
    """(which 32 of K of a row hold anything, which of those have a number for a scale), [64, 4]."""
    holds = holding(x)
    return holds, holds & (code < 255)


@gluon.jit
def without(x, mask, REMOVE: gl.constexpr):
    """Words without the columns of a block whose bits of `mask` [1, 4] are set."""
    if REMOVE:
        row, part, word = places()
        four = (gl.expand_dims(mask, 2) >> (word * 4)) & 15
        x = x & ((((four * 0x00204081) & 0x01010101) * 255) ^ -1)
    return x


@gluon.jit
def least_of(x, code, mask, REMOVE: gl.constexpr):
    """The least that scales can be for what is left of them [64, 4]: where columns are removed, the largest element may be far below what
    its scale is for."""
    if REMOVE:
        t = x & 0x7F7F7F7F
        t = gl.maximum(gl.maximum(t & 0x7F, (t >> 8) & 0x7F), gl.maximum((t >> 16) & 0x7F, t >> 24))
        up = gl.maximum(0x7E - gl.max(t, 2), 0) >> 3
        code = gl.where(mask != 0, gl.maximum(code - up, gl.minimum(code, LOWEST)), code)
    return code


@gluon.jit
def bounds(x, code, there, mask, REMOVE: gl.constexpr):
    """(the least that a scale can be, the largest), [64, 4]."""
    holds, counts = counting(x, code)
    room = gl.minimum(gl.min(room_of(x), 2), MOST)
    return gl.where(counts, least_of(x, code, mask, REMOVE), 0), gl.where(there & (code == 255), -1, gl.where(counts, code + room, 1000))


@gluon.jit
def apart(least, limit, part, FROM: gl.constexpr, TO: gl.constexpr):
    """1 in rows [64] where parts FROM to TO have no scale together."""
    inside = (part >= FROM) & (part <= TO)
    return (gl.max(gl.where(inside, least, 0), 1) > gl.min(gl.where(inside, limit, 1000), 1)).to(gl.int32)


@gluon.jit
def rows_apart(x, code, there, mask, REMOVE: gl.constexpr):
    """By row, what of a block's parts have no scale together: bits 0 to 4 for 01, 12, 23, 012 and 123."""
    row, part, word = places()
    least, limit = bounds(x, code, there, mask, REMOVE)
    pairs = apart(least, limit, part, 0, 1) | (apart(least, limit, part, 1, 2) << 1) | (apart(least, limit, part, 2, 3) << 2)
    return pairs | (apart(least, limit, part, 0, 2) << 3) | (apart(least, limit, part, 1, 3) << 4)


@gluon.jit
def together(apart_rows, BIT: gl.constexpr):
    return gl.max((apart_rows >> BIT) & 1, 0) == 0


@gluon.jit
def cuts_of(rows):
    """The fewest cuts that leave no parts together which have no scale together, as bits."""
    three = gl.where(together(rows, 2), 3, gl.where(together(rows, 0), 6, gl.where(together(rows, 1), 5, 7)))
    two = gl.where(together(rows, 0) & together(rows, 2), 2, gl.where(together(rows, 3), 4, three))
    return gl.where(together(rows, 4), 1, two).to(gl.int32)


@gluon.jit
def scales_between(cuts, x, code, mask, REMOVE: gl.constexpr):
    """Scale codes [64, 4] of parts with these cuts between them. Alone, 32 of K keep the scale that they had."""
    row, part, word = places()
    holds, counts = counting(x, code)
    least = gl.where(counts, least_of(x, code, mask, REMOVE), 0)
    piece = gl.where(part > 0, cuts & 1, 0) + gl.where(part > 1, (cuts >> 1) & 1, 0) + gl.where(part > 2, cuts >> 2, 0)
    own = code
    for i in gl.static_range(4):
        top = gl.expand_dims(gl.max(gl.where(piece == i, least, 0), 1), 1)
        own = gl.where(piece == i, top, own)
    alone = (((cuts * 2 + 1) >> part) & ((cuts | 8) >> part) & 1) == 1
    return gl.where(alone, code, own), holds


@gluon.jit
def e8m0(code):
    """int32 codes as FP32: 0 is 2^-127, 255 is NaN."""
    bits = gl.where(code == 0, 0x00400000, code << 23)
    return gl.where(code == 255, 0x7FC00000, bits).to(gl.float32, bitcast=True)
