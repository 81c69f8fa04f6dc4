"""Narrow weights to BF16 in registers: what the Hopper kernels over prepacked weights (`narrowgemm.prepack`) share.

A thread's 16 bytes are one row and one block of 32 of K (E4M3: half of it). Sign, exponent and mantissa bits are put where
BF16 has them, by shifts and masks alone, and one BF16 multiplication by a power of two gives the value, subnormals included.
What comes out lies as wgmma takes its A operand from registers: there is no data movement between the load and the product.
"""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl

# 8 codes to 4 registers of two; see `narrowgemm.prepack_bits._E2M1` for where their bits are
E2M1_ASM = gl.constexpr("""{
.reg .b32 a, b, c, d, e;
and.b32 a, $4, 0x81c081c0;
mul.rn.bf16x2 $0, a, $5;
shl.b32 b, $4, 3;
and.b32 b, b, 0x81c081c0;
mul.rn.bf16x2 $1, b, $5;
shl.b32 c, $4, 6;
and.b32 c, c, 0x81c081c0;
mul.rn.bf16x2 $2, c, $5;
shl.b32 d, $4, 1;
and.b32 d, d, 0x80008000;
shr.b32 e, $4, 3;
lop3.b32 d, e, 0x01800180, d, 0xea;
shr.b32 e, $4, 7;
lop3.b32 d, e, 0x00400040, d, 0xea;
mul.rn.bf16x2 $3, d, $5;
}""")

# 8 codes in the order FP8_PREPACK to 4 registers of two, code i beside i + 4; see `narrowgemm.prepack_bits._SIGNS`
NIBBLES_ASM = gl.constexpr("""{
.reg .b32 x, s, e;
shl.b32 x, $4, 4;
shl.b32 e, $4, 6;
and.b32 e, e, 0x01c001c0;
prmt.b32 s, $4, x, 0x4000;
lop3.b32 e, s, 0x80008000, e, 0xea;
mul.rn.bf16x2 $0, e, $5;
shl.b32 e, $4, 2;
and.b32 e, e, 0x01c001c0;
prmt.b32 s, $4, x, 0x5010;
lop3.b32 e, s, 0x80008000, e, 0xea;
mul.rn.bf16x2 $1, e, $5;
shr.b32 e, $4, 2;
and.b32 e, e, 0x01c001c0;
prmt.b32 s, $4, x, 0x6020;
lop3.b32 e, s, 0x80008000, e, 0xea;
mul.rn.bf16x2 $2, e, $5;
shr.b32 e, $4, 6;
and.b32 e, e, 0x01c001c0;
prmt.b32 s, $4, x, 0x7030;
lop3.b32 e, s, 0x80008000, e, 0xea;
mul.rn.bf16x2 $3, e, $5;
}""")

# 4 codes to 2 registers of two; see `narrowgemm.prepack_bits._E4M3`
E4M3_ASM = gl.constexpr("""{
.reg .b32 a, b, c;
and.b32 a, $2, 0x87f087f0;
mul.rn.bf16x2 $0, a, $3;
shl.b32 b, $2, 1;
and.b32 b, b, 0x80008000;
shr.b32 c, $2, 3;
lop3.b32 b, c, 0x07000700, b, 0xea;
shl.b32 c, $2, 4;
lop3.b32 b, c, 0x00f000f0, b, 0xea;
mul.rn.bf16x2 $1, b, $3;
}""")


@gluon.jit
def expand_e2m1(w, s, ROWS: gl.constexpr, operand: gl.constexpr):
    """Bytes [ROWS, 4, 16] and factors, twice in an int32, [ROWS, 4, 1] to BF16 [ROWS, 128] in `operand`'s layout."""
    lo, hi = gl.inline_asm_elementwise(E2M1_ASM, "=r,=r,=r,=r,r,r,r,r,r", [w, s], dtype=(gl.bfloat16, gl.bfloat16),
                                       is_pure=True, pack=4)
    a = gl.join(lo, hi)                                   # [ROWS, 4, 16, 2]
    a = gl.reshape(a, [ROWS, 4, 4, 2, 2, 2])              # row, block, word, b1, b0, pair
    a = gl.permute(a, (0, 2, 5, 3, 1, 4))                 # row, word, pair, b1, block, b0
    return gl.convert_layout(gl.reshape(a, [ROWS, 128]), operand, assert_trivial=True)


@gluon.jit
def expand_e4m3(w, s, ROWS: gl.constexpr, operand: gl.constexpr):
    """Bytes [ROWS, 4, 16] and factors [ROWS, 4, 1] to BF16 [ROWS, 64]: half of each block of 32."""
    a = gl.inline_asm_elementwise(E4M3_ASM, "=r,=r,r,r,r,r,r", [w, s], dtype=gl.bfloat16, is_pure=True, pack=4)
    a = gl.reshape(a, [ROWS, 4, 4, 2, 2])                 # row, block, word, b1, b0
    a = gl.reshape(gl.permute(a, (0, 2, 3, 1, 4)), [ROWS, 64])
    return gl.convert_layout(a, operand, assert_trivial=True)


@gluon.jit
def block_factors(v, chunk: gl.constexpr, ROWS: gl.constexpr, layout: gl.constexpr):
    """The factors of one chunk of 128, twice in an int32 each, [ROWS, 4] in `layout`, from the int32 [ROWS / 2, 4] that hold two
    chunks' fields of rows g and g + 8."""
    lower = ((v >> (16 * chunk)) & 255) * 0x00800080
    upper = ((v >> (16 * chunk + 8)) & 255) * 0x00800080
    s = gl.permute(gl.reshape(gl.join(lower, upper), [ROWS // 16, 8, 4, 2]), (0, 3, 1, 2))
    return gl.convert_layout(gl.reshape(s, [ROWS, 4]), layout, assert_trivial=True)


@gluon.jit
def expand(w, v, chunk: gl.constexpr, ROWS: gl.constexpr, E4M3: gl.constexpr, operand: gl.constexpr):
    """One ring tile, bytes [ROWS, 64] in `byte_layout(ROWS)`, to BF16 [ROWS, 128] (E4M3: [ROWS, 64]) in `operand`'s layout.

    v: int32 [ROWS / 2, 4] in `field_layout(ROWS)`, the scale fields of two chunks; chunk: which of them."""
    lay: gl.constexpr = bytes_layout(ROWS)
    s = gl.expand_dims(block_factors(v, chunk, ROWS, gl.SliceLayout(2, lay)), 2)
    w3 = gl.convert_layout(gl.reshape(w, [ROWS, 4, 16]), lay, assert_trivial=True)
    if E4M3:
        return expand_e4m3(w3, s, ROWS, operand)
    else:
        return expand_e2m1(w3, s, ROWS, operand)


@constexpr_function
def byte_layout(rows):
    """Of a ring tile's bytes [rows, 64]: a thread holds 16 bytes of rows g and g + 8."""
    warps = [[16, 0], [32, 0]] if rows == 64 else [[16, 0], [32, 0], [64, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]],
                                      [[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]], warps, [], [rows, 64])


@constexpr_function
def bytes_layout(rows):
    """The same as [rows, block of 32, 16]."""
    warps = [[16, 0, 0], [32, 0, 0]] if rows == 64 else [[16, 0, 0], [32, 0, 0], [64, 0, 0]]
    return gl.DistributedLinearLayout([[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [8, 0, 0]],
                                      [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]], warps, [], [rows, 4, 16])


@constexpr_function
def field_layout(rows):
    """Of the scale fields int32 [rows / 2, 4]."""
    return gl.BlockedLayout([1, 1], [8, 4], [rows // 16, 1], [1, 0])
