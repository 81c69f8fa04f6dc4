"""Device code of a gated product's results: SwiGLU of sums as `activate` has it of a product's output, and its FP8.

    gate, up in FP32 -> BF16 -> silu(gate) * up -> BF16 -> largest magnitude of 128 results of a row -> scale -> FP8
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ...triton.activate_device import PAIRED, rounded, swiglu, swiglu_pairs, wide
from ...triton.quantize_device import ABS_BITS, block_scale, larger


@gluon.jit
def activated(gate, up, alpha, limit, CLAMPED: gl.constexpr):
    """BF16, from sums."""
    gate = rounded(gate, gl.bfloat16, True)
    up = rounded(up, gl.bfloat16, True)
    if CLAMPED == PAIRED:
        y = swiglu_pairs(gate, up, alpha, limit)
    else:
        y = swiglu(wide(gate, True), wide(up, True), alpha, limit, CLAMPED, True)
    return rounded(y, gl.bfloat16, True)


@gluon.jit
def magnitudes(y):
    """Bits of each row's largest."""
    return gl.reduce(gl.abs(wide(y, True)), 1, larger).to(gl.int32, bitcast=True) & ABS_BITS


@gluon.jit
def scales_of(bits, clamp):
    """(scales as stored, what results are multiplied by)."""
    scale, inverse, sign = block_scale(bits, clamp, "", False, 448.0, 8, 0, 3, True)
    return scale, inverse


@gluon.jit
def narrowed(y, inverse, DTYPE: gl.constexpr):
    return (wide(y, True) * gl.expand_dims(inverse, 1)).to(DTYPE)


@gluon.jit
def put_rows(at, values):
    """One int32 a row, to addresses in shared memory, which the compiler knows nothing of: no barrier comes with it."""
    gl.inline_asm_elementwise("st.shared.b32 [$1], $2; mov.b32 $0, 0;", "=r,r,r", [at, values], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def take_rows(at):
    return gl.inline_asm_elementwise("ld.shared.b32 $0, [$1];", "=r,r", [at], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def announce(bar):
    """Every warp arrives, behind what its lanes have put."""
    gl.inline_asm_elementwise("""{
        .reg .pred p;
        bar.warp.sync 0xffffffff;
        elect.sync _|p, 0xffffffff;
        @p mbarrier.arrive.shared::cta.b64 _, [$1];
        mov.b32 $0, 0;
    }""", "=r,r", [bar], dtype=gl.int32, is_pure=False, pack=1)
