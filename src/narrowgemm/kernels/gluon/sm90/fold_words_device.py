"""MXFP4 activations to E4M3 with one scale every 128 of K, as `fold_prep_device.fold_rows_kernel` does it and to the same bits, for rows
on 16 bytes: a thread takes a block of 32 of K as four words, four threads the 128, and nothing goes through shared memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .fold_expand_device import tables_of
from .fp8_block_schedule_device import clip

WORDS = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 0, 1], [0, 0, 2]], [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]], [[8, 0, 0], [16, 0, 0]], [], [32, 4, 4]))
# words [32, 32] of E4M3: as they are made, and with 128 bytes of a row next to each other in one store
MADE = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 1], [0, 2], [0, 4]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0]], [], [32, 32]))
STORED = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 1], [0, 2], [4, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [0, 4]], [[8, 0], [16, 0]], [], [32, 32]))
# a word of 8 codes, K ascending, and the table of their block's power of two to two words of 4 E4M3 each: magnitudes are looked up
# by the low three bits of each nibble; signs are those of the word's nibbles, spread to bytes
WORD_ASM = gl.constexpr("""{
.reg .b32 x, t, u, p, q;
shl.b32 x, $2, 4;
and.b32 t, $2, 0x77777777;
shr.u32 u, t, 16;
prmt.b32 p, x, $2, 0x5140;
prmt.b32 q, x, $2, 0x7362;
prmt.b32 t, $3, $4, t;
prmt.b32 u, $3, $4, u;
lop3.b32 $0, p, 0x80808080, t, 0xea;
lop3.b32 $1, q, 0x80808080, u, 0xea;
}""")


@gluon.jit
def look_up(x, low, high):
    """Words [32, 4, 4] and their blocks' tables [32, 4, 1] to E4M3 words [32, 32]."""
    lo, hi = gl.inline_asm_elementwise(WORD_ASM, "=&r,=&r,r,r,r", [x, low, high], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)
    return gl.reshape(gl.join(lo, hi), [32, 32])


@gluon.jit(do_not_specialize=["M", "blocks", "KB", "column", "rows"])
def fold_words_kernel(x_ptr, s_ptr, index_ptr, y_ptr, ys_ptr, flags_ptr, M, blocks, KB, rows, sxg, sxm, ssg, ssm, ssk, column,
                      MASKED: gl.constexpr):
    """x int32 [planes, M, 4 * blocks], s [planes, M, blocks] E8M0 to y int32 [planes, M, KB * 32] and ys FP32 [planes, KB, 4, column].

    Program p takes every p-th tile of 32 rows and 128 of K, `rows` of them in all planes; flags[p] = 1 where some block of 32 has a
    scale of its own. MASKED: rows from index[plane] on are left out."""
    pair: gl.constexpr = gl.SliceLayout(2, WORDS)
    r0 = gl.arange(0, 32, gl.SliceLayout(1, pair))
    sub = gl.arange(0, 4, gl.SliceLayout(0, pair))
    word = gl.expand_dims(gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, WORDS))), 0), 1)
    out_row = gl.arange(0, 32, gl.SliceLayout(1, STORED))
    out_word = gl.arange(0, 32, gl.SliceLayout(0, STORED))
    inexact = gl.expand_dims(r0 * 0, 1)
    per_plane = (M + 31) // 32
    for tile in range(gl.program_id(0), rows * KB, gl.num_programs(0)):
        kb = tile % KB
        plane = tile // KB // per_plane
        first = tile // KB % per_plane * 32
        end = M
        if MASKED:
            end = clip(gl.load(index_ptr + plane), M)
        p64 = plane.to(gl.int64)
        r = gl.expand_dims(first + r0, 1)
        block = gl.expand_dims(kb * 4 + sub, 0)
        live = r < end
        # the blocks of rows and columns that aren't there are zeros
        there = live & (block < blocks)
        at = r.to(gl.int64) * sxm + block * 4
        x = gl.load(x_ptr + p64 * sxg + (gl.expand_dims(at, 2) + word), mask=gl.expand_dims(there, 2), other=0)
        code = gl.load(s_ptr + p64 * ssg + (r.to(gl.int64) * ssm + block.to(gl.int64) * ssk), mask=there, other=0).to(gl.int32)
        holds = gl.max(x & 0x77777777, 2) > 0
        number = gl.where(code < 255, code, 0)
        top = gl.expand_dims(gl.max(gl.where(holds, number, 0), 1), 1)
        nan = gl.expand_dims(gl.max((code == 255).to(gl.int32), 1), 1) > 0
        down = top - code
        fits = (down <= 14) | (holds == 0) | nan
        inexact = gl.maximum(inexact, gl.expand_dims(gl.max(1 - fits.to(gl.int32), 1), 1))
        fits = fits | (down < 0)
        down = gl.where(fits, gl.minimum(gl.maximum(down, 0), 14), 0)
        own = gl.where(fits, top, code)
        low, high = tables_of(down)
        y = gl.convert_layout(look_up(x, gl.expand_dims(low, 2), gl.expand_dims(high, 2)), MADE, assert_trivial=True)
        y = gl.convert_layout(y, STORED)
        to = gl.expand_dims((p64 * M + (first + out_row)) * (KB * 32), 1) + gl.expand_dims(kb * 32 + out_word, 0)
        gl.store(y_ptr + to, y, mask=gl.expand_dims(first + out_row < end, 1))
        # 2^(own - 133), where the smallest are subnormal
        bits = gl.where(own == 0, 0x00400000, own << 23)
        s = bits.to(gl.float32, bitcast=True) * 0.015625
        s = gl.where(nan, (bits * 0 + 0x7FC00000).to(gl.float32, bitcast=True), s)
        gl.store(ys_ptr + (p64 * KB + kb) * 4 * column + (gl.expand_dims(sub.to(gl.int64) * column, 0) + r), s, mask=live & (block >= 0))
    gl.store(flags_ptr + gl.program_id(0), gl.max(gl.max(inexact, 1), 0))
