"""E2M1 weights with E8M0 scales to E4M3, bit for bit: shared memory to the shared memory that wgmma reads.

A block of 32 whose scale is 2^d under its row's largest becomes 2^(6 - d) times its elements: exact in E4M3 for d up to 14, its
subnormals included. Eight bytes, the magnitudes at one d, are the table that `prmt` looks four codes up in; lane d of a warp
holds the table of d, so a shuffle brings the one that a block wants.
"""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl

# a word of 8 codes (their bits: `narrowgemm.prepack_bits._E2M1`) and its block's table to two words of 4 E4M3 each, K ascending.
# Magnitudes are brought to nibbles 0-3 of each half (K 4 2 0 6, K 5 3 1 7), looked up, and put in order; signs are those of
# bytes 1 and 3 of the word, shifted by 0, 3, 6 and 1
FOLD_ASM = gl.constexpr("""{
.reg .b32 x1, x2, x3, x6, y, t, u, p, q, r, s;
shl.b32 x1, $2, 1;
shl.b32 x2, $2, 2;
shl.b32 x3, $2, 3;
shl.b32 x6, $2, 6;
shr.u32 y, $2, 1;
and.b32 t, $2, 0x00070007;
lop3.b32 t, x1, 0x00700070, t, 0xea;
lop3.b32 t, x2, 0x07000700, t, 0xea;
lop3.b32 t, x3, 0x60006000, t, 0xea;
lop3.b32 t, y, 0x10001000, t, 0xea;
shr.u32 u, t, 16;
prmt.b32 r, $3, $4, t;
prmt.b32 s, $3, $4, u;
prmt.b32 p, $2, x3, 0xfdb9;
prmt.b32 q, x6, x1, 0xfdb9;
prmt.b32 t, r, s, 0x5162;
prmt.b32 u, r, s, 0x7340;
lop3.b32 $0, p, 0x80808080, t, 0xea;
lop3.b32 $1, q, 0x80808080, u, 0xea;
}""")

# the same of a word in the order FP8_PREPACK, whose magnitudes are in nibbles, K ascending, and signs in two sets of bytes; operand
# `high` has the other half of the table
NIBBLES = """{
.reg .b32 t, u, x;
and.b32 t, $2, 0x77777777;
shr.u32 u, t, 16;
shl.b32 x, $2, 4;
prmt.b32 t, $3, %(high)s, t;
prmt.b32 u, $3, %(high)s, u;
lop3.b32 $0, $2, 0x80808080, t, 0xea;
lop3.b32 $1, x, 0x80808080, u, 0xea;
}"""
NIBBLES_ASM = gl.constexpr(NIBBLES % {"high": "$4"})


@constexpr_function
def words_layout(warps):
    """Of the words of a unit's first `warps` * 16 rows [rows, 16]: 16 bytes, and those 8 rows down, a thread."""
    rows = [[16, 0], [32, 0]][:warps.bit_length() - 1]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], rows, [], [16 * warps, 16])


@constexpr_function
def blocks_layout(warps):
    """The same as [rows, block of 32, word]."""
    rows = [[16, 0, 0], [32, 0, 0]][:warps.bit_length() - 1]
    return gl.DistributedLinearLayout([[0, 0, 1], [0, 0, 2], [8, 0, 0]], [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]], rows, [],
                                      [16 * warps, 4, 4])


@constexpr_function
def fields_layout(warps):
    """Of scale fields int32 [rows / 2, 4]."""
    return gl.BlockedLayout([1, 1], [8, 4], [warps, 1], [1, 0])


WORDS = gl.constexpr(words_layout(4))
FIELDS = gl.constexpr(fields_layout(4))


@gluon.jit
def tables_of(d):
    """(low, high) word of the table for d: E4M3 of 0 .5 1 1.5 2 3 4 6 times 2^(6 - d)."""
    low = 0x0C080000 + (12 - d) * 0x08080800
    low = gl.where(d == 12, 0x0C080400, low)
    low = gl.where(d == 13, 0x06040200, low)
    low = gl.where(d == 14, 0x03020100, low)
    high = 0x1C181410 + (12 - d) * 0x08080808
    high = gl.where(d == 14, 0x0C080604, high)
    return low, high


@gluon.jit
def lane_table():
    """The table for d = lane mod 16."""
    lane = gl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=True, pack=1)
    return tables_of(lane & 15)


@gluon.jit
def of_lane(table, d, PURE: gl.constexpr = False):
    """`table` as lane d has it."""
    return gl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r", [table, d], dtype=gl.int32,
                                     is_pure=PURE, pack=1)


@gluon.jit
def of_blocks(upper, lower, WARPS: gl.constexpr):
    """Two int32 [rows / 2, 4], of rows g and g + 8 of each 16, as [rows, 4, 1] beside a unit's words."""
    x = gl.permute(gl.reshape(gl.join(upper, lower), [WARPS, 8, 4, 2]), (0, 3, 1, 2))
    of_rows: gl.constexpr = gl.SliceLayout(2, blocks_layout(WARPS))
    return gl.expand_dims(gl.convert_layout(gl.reshape(x, [WARPS * 16, 4]), of_rows, assert_trivial=True), 2)


@gluon.jit
def expand(words, fields, tops, table, NIBBLES: gl.constexpr, WARPS: gl.constexpr = 4):
    """Words [rows, 16] of a unit, the scale fields of their chunk, and (their rows' largest code + 14), to E4M3 words [rows, 32].

    fields, tops: int32 [rows / 2, 4], bytes 0 and 1 are rows g and g + 8; 16 rows a warp. NIBBLES: the order is FP8_PREPACK."""
    low, high = table
    d0 = (tops - fields) & 15
    d1 = ((tops >> 8) - (fields >> 8)) & 15
    lows = of_blocks(of_lane(low, d0), of_lane(low, d1), WARPS)
    highs = of_blocks(of_lane(high, d0), of_lane(high, d1), WARPS)
    w = gl.convert_layout(gl.reshape(words, [WARPS * 16, 4, 4]), blocks_layout(WARPS), assert_trivial=True)
    ASM: gl.constexpr = NIBBLES_ASM if NIBBLES else FOLD_ASM
    lo, hi = gl.inline_asm_elementwise(ASM, "=&r,=&r,r,r,r", [w, lows, highs], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)
    return gl.reshape(gl.join(lo, hi), [WARPS * 16, 32])


@gluon.jit
def row_tops(top_ptr, at, rows, WARPS: gl.constexpr = 4):
    """Of a unit's rows g and g + 8 of each 16, in bytes 0 and 1: the largest code + 14, [16 * WARPS / 2, 4]."""
    r = gl.arange(0, 8 * WARPS, gl.SliceLayout(1, fields_layout(WARPS)))
    r = r // 8 * 16 + r % 8
    a = gl.load(top_ptr + at + r, mask=r < rows, other=0).to(gl.int32) + 14
    b = gl.load(top_ptr + at + r + 8, mask=r + 8 < rows, other=0).to(gl.int32) + 14
    return gl.expand_dims((a & 255) | (b << 8), 1)
