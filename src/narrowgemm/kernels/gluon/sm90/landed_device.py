"""Loads from shared memory that have come in: needed in front of giving the slot that they were from back to TMA.

A barrier of a consumer's warps, behind which one thread arrives for all of them, doesn't wait for what its warps have asked for: ptxas waits for
a load where its registers are used. Where that was behind the arrival, one warp of some 100 million took a token's scales after TMA
had brought the next tile's into the slot.
"""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl


@constexpr_function
def landed_code(COUNT, EACH):
    """PTX: stores that never run, of every EACH-th of COUNT registers. Stores stay in front of a barrier, and wait for their registers."""
    never = 2 * COUNT
    stores = "".join(f"@never st.shared.f32 [${never}], ${i};\n" for i in range(0, COUNT, EACH))
    return f"{{\n.reg .pred never;\nsetp.lt.s32 never, ${never}, 0;\n{stores}}}"


@constexpr_function
def landed_constraints(COUNT):
    return ",".join(["=f"] * COUNT + [str(i) for i in range(COUNT)] + ["r"] * COUNT)


@gluon.jit
def landed(x, slot, COUNT: gl.constexpr, EACH: gl.constexpr):
    """x, FP32 of COUNT registers a thread, EACH of them one load's, in registers. slot: a number that is never negative, which the compiler doesn't know."""
    return gl.inline_asm_elementwise(landed_code(COUNT, EACH), landed_constraints(COUNT), [x, slot], dtype=gl.float32, is_pure=False,
                                     pack=COUNT)
