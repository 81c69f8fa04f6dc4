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
    """PTX: stores that never run of every EACH-th of COUNT registers. A store waits for its register, and stays in front of a barrier."""
    never = 2 * COUNT
    stores = "".join(f"@never st.shared.b32 [${never}], ${i};\n" for i in range(0, COUNT, EACH))
    return f"{{\n.reg .pred never;\nsetp.lt.s32 never, ${never}, 0;\n{stores}}}"


@constexpr_function
def landed_constraints(COUNT, dtype):
    kind = "f" if dtype == gl.float32 else "r"
    return ",".join([f"={kind}"] * COUNT + [str(i) for i in range(COUNT)] + ["r"] * COUNT)


@gluon.jit
def landed(x, slot, COUNT: gl.constexpr, EACH: gl.constexpr):
    """x, FP32 or int32 in COUNT registers of a thread or a multiple of that, EACH of them from one load. slot: a number that is never negative, which the
    compiler doesn't know."""
    return gl.inline_asm_elementwise(landed_code(COUNT, EACH), landed_constraints(COUNT, x.dtype), [x, slot], dtype=x.dtype, is_pure=False,
                                     pack=COUNT)
