"""wgmma of E4M3 with a number of columns that is no power of two, in PTX: a sum is several tensors of 64 rows, side by side.

Gluon's tensors have powers of two as sizes, so 192 columns would be three wgmma of 64, each of which reads A from shared memory
again. One of 192 reads it once.
"""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl


@constexpr_function
def multiply_code(PARTS, COLS):
    """PTX: the products of one K block of 128. The parts' registers, out and in; then one address, in 16 bytes, of A and of B."""
    each = COLS // 2
    count = PARTS * each
    sums = ", ".join(f"${i}" for i in range(count))
    steps = "".join(f"""
        wgmma.mma_async.sync.aligned.m64n{PARTS * COLS}k32.f32.e4m3.e4m3 {{{sums}}}, a{k}, b{k}, {"more" if k else "first"}, 1, 1;"""
                    for k in range(4))
    # all of them in front of the first wgmma: written into the same registers in between, they wait for it to have read them
    adds = "".join(f"""
        add.s64 a{k}, a0, {2 * k};
        add.s64 b{k}, b0, {2 * k};""" for k in range(1, 4))
    # 0x40000040: rows of 128 bytes swizzled, 8 of them in 1024 bytes
    return f"""{{
        .reg .b64 a<4>, b<4>;
        .reg .b32 hi;
        .reg .pred first, more;
        mov.b32 hi, 0x40000040;
        mov.b64 a0, {{${2 * count}, hi}};
        mov.b64 b0, {{${2 * count + each}, hi}};{adds}
        setp.ne.b32 first, 0, 0;
        setp.ne.b32 more, 1, 0;
        wgmma.fence.sync.aligned;{steps}
        wgmma.commit_group.sync.aligned;
    }}"""


@constexpr_function
def outputs(PARTS, COLS):
    return ",".join(["=f"] * (PARTS * COLS // 2))


@constexpr_function
def same_registers(PARTS, COLS):
    """Every input in the register of the output of its number."""
    return ",".join(str(i) for i in range(PARTS * COLS // 2))


@constexpr_function
def floats(PARTS):
    return (gl.float32, ) * PARTS


@gluon.jit
def start(code: gl.constexpr, a, b, p, PARTS: gl.constexpr, COLS: gl.constexpr, mma: gl.constexpr):
    """Start products; a, b: addresses in shared memory."""
    EACH: gl.constexpr = COLS // 2
    a = gl.full([64, COLS], (a >> 4) & 0x3fff, gl.int32, mma)
    b = gl.full([64, COLS], (b >> 4) & 0x3fff, gl.int32, mma)
    return gl.inline_asm_elementwise(code, outputs(PARTS, COLS) + "," + same_registers(PARTS, COLS) + ",r" * (2 * EACH), p + (a, b),
                                     dtype=floats(PARTS), is_pure=False, pack=EACH)


@gluon.jit
def passed(code: gl.constexpr, sums, PARTS: gl.constexpr, COLS: gl.constexpr):
    """The sums, which stay in their registers, behind `code`."""
    return gl.inline_asm_elementwise(code, outputs(PARTS, COLS) + "," + same_registers(PARTS, COLS), sums, dtype=floats(PARTS),
                                     is_pure=False, pack=COLS // 2)


@gluon.jit
def multiply(a, b, p, PARTS: gl.constexpr, COLS: gl.constexpr, mma: gl.constexpr):
    """Start the products of 64 rows of A and PARTS * COLS of B over one K block; a, b: addresses in shared memory; p: sums that come in
    only to keep their registers, else two of them lie apart and others spill.

    Returns PARTS sums [64, COLS], which are in flight: `wait` has them."""
    return start(multiply_code(PARTS, COLS), a, b, p, PARTS, COLS, mma)


@gluon.jit
def wait(sums, PARTS: gl.constexpr, COLS: gl.constexpr):
    """The sums, once nothing is in flight."""
    return wait_for(sums, 0, PARTS, COLS)


@gluon.jit
def keep(sums, PARTS: gl.constexpr, COLS: gl.constexpr):
    """The sums; what they are made of is worked out in front of what comes behind."""
    return passed("// sums", sums, PARTS, COLS)


# ---------------------------------------------------------------- one step of 32 of K, several of which are in flight
@constexpr_function
def step_code(PARTS, COLS, ONTO=False):
    """PTX: as `multiply_code`, of 32 of K; ONTO: onto the sums where one more operand, the last, is not 0."""
    each = COLS // 2
    count = PARTS * each
    goes_on = f"${2 * count + 2 * each}" if ONTO else "0"
    sums = ", ".join(f"${i}" for i in range(count))
    return f"""{{
        .reg .b64 a, b;
        .reg .b32 hi;
        .reg .pred more;
        mov.b32 hi, 0x40000040;
        mov.b64 a, {{${2 * count}, hi}};
        mov.b64 b, {{${2 * count + each}, hi}};
        setp.ne.b32 more, {goes_on}, 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{PARTS * COLS}k32.f32.e4m3.e4m3 {{{sums}}}, a, b, more, 1, 1;
        wgmma.commit_group.sync.aligned;
    }}"""


@gluon.jit
def multiply_step(a, b, p, PARTS: gl.constexpr, COLS: gl.constexpr, mma: gl.constexpr):
    """`multiply` of 32 of K: `wait_for` has the sums."""
    return start(step_code(PARTS, COLS), a, b, p, PARTS, COLS, mma)


@constexpr_function
def wait_code(PENDING):
    return f"wgmma.wait_group.sync.aligned {PENDING};"


@gluon.jit
def wait_for(sums, PENDING: gl.constexpr, PARTS: gl.constexpr, COLS: gl.constexpr):
    """The sums, once no more than PENDING steps that were started behind them are in flight."""
    return passed(wait_code(PENDING), sums, PARTS, COLS)


# ---------------------------------------------------------------- onto sums that there are
@gluon.jit
def multiply_part(a, b, goes_on, p, PARTS: gl.constexpr, COLS: gl.constexpr, mma: gl.constexpr):
    """`multiply` of 32 of K, p += where it `goes_on`."""
    EACH: gl.constexpr = COLS // 2
    a = gl.full([64, COLS], (a >> 4) & 0x3fff, gl.int32, mma)
    b = gl.full([64, COLS], (b >> 4) & 0x3fff, gl.int32, mma)
    goes_on = gl.full([64, COLS], goes_on, gl.int32, mma)
    code: gl.constexpr = step_code(PARTS, COLS, True)
    return gl.inline_asm_elementwise(code, outputs(PARTS, COLS) + "," + same_registers(PARTS, COLS) + ",r" * (3 * EACH), p + (a, b, goes_on),
                                     dtype=floats(PARTS), is_pure=False, pack=EACH)


@constexpr_function
def bf16_code(PARTS, COLS, TURNED):
    """PTX: as `multiply_code`, of 64 of K in BF16, onto the sums. TURNED: columns of A lie one behind the other, 64 rows of one in 128 bytes,
    so that 16 of K are 2048 bytes of it."""
    each = COLS // 2
    count = PARTS * each
    sums = ", ".join(f"${i}" for i in range(count))
    steps = "".join(f"""
        wgmma.mma_async.sync.aligned.m64n{PARTS * COLS}k16.f32.bf16.bf16 {{{sums}}}, a{k}, b{k}, more, 1, 1, {int(TURNED)}, 0;"""
                    for k in range(4))
    adds = "".join(f"""
        add.s64 a{k}, a0, {(128 if TURNED else 2) * k};
        add.s64 b{k}, b0, {2 * k};""" for k in range(1, 4))
    return f"""{{
        .reg .b64 a<4>, b<4>;
        .reg .b32 hi;
        .reg .pred more;
        mov.b32 hi, 0x40000040;
        mov.b64 a0, {{${2 * count}, hi}};
        mov.b64 b0, {{${2 * count + each}, hi}};{adds}
        setp.ne.b32 more, 1, 0;
        wgmma.fence.sync.aligned;{steps}
        wgmma.commit_group.sync.aligned;
    }}"""


@gluon.jit
def multiply_turned(a, b, sums, PARTS: gl.constexpr, COLS: gl.constexpr, mma: gl.constexpr):
    """Start sums += products of 64 columns of A, 64 rows each, by PARTS * COLS rows of B, in BF16."""
    return start(bf16_code(PARTS, COLS, True), a, b, sums, PARTS, COLS, mma)


@gluon.jit
def multiply_bf16(a, b, sums, PARTS: gl.constexpr, COLS: gl.constexpr, mma: gl.constexpr):
    """The same of A's rows as they are."""
    return start(bf16_code(PARTS, COLS, False), a, b, sums, PARTS, COLS, mma)
