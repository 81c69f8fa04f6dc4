"""What was loaded from shared memory has come in: needed in front of giving a ring's slot that it is from back to TMA.

A barrier of a consumer's warps, behind which one thread arrives for all of them, doesn't wait for what the warps have asked for: ptxas waits
for a load where its registers are used. Where that was behind the arrival, single warps found what TMA had brought for the next tile: in
399 of 121040 replays with few blocks, two an SM (docs/measured.md).
"""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl


@constexpr_function
def landed_code(COUNT, EACH):
    """PTX: a store that never runs, whose predicate takes every EACH-th of COUNT registers. They are read for it, and it stays in front of a
    barrier. (Around stores of the registers themselves ptxas makes a branch, which waits for none, where there are several.)"""
    never = 2 * COUNT
    some = [f"${i}" for i in range(0, COUNT, EACH)]
    text = f"{{\n.reg .pred never;\n.reg .b32 any;\nsetp.lt.s32 never, ${never}, 0;\n"
    for i in range(0, len(some), 3):
        a, b, c = (some[i:i + 3] * 3)[:3]
        text += f"lop3.and.b32 any|never, {a}, {b}, {c}, 0x80, never;\n"
    return text + f"@never st.shared.b32 [${never}], any;\n}}"


@constexpr_function
def landed_constraints(COUNT):
    return ",".join(["=f"] * COUNT + [str(i) for i in range(COUNT)] + ["r"] * COUNT)


@gluon.jit
def landed(x, slot, COUNT: gl.constexpr, EACH: gl.constexpr):
    """x, FP32 in COUNT registers of a thread or a multiple of that, EACH of them from one load. slot: a number that is never negative,
    which the compiler doesn't know."""
    return gl.inline_asm_elementwise(landed_code(COUNT, EACH), landed_constraints(COUNT), [x, slot], dtype=gl.float32, is_pure=False, pack=COUNT)
