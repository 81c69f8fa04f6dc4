"""Scale factors in registers, for every Hopper kernel."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def as_float(x):
    """A scale: FP32 as it is, uint8 as E8M0 (0 is 2^-127, 255 is NaN)."""
    if x.dtype == gl.uint8:
        bits = x.to(gl.int32) << 23
        bits = gl.where(x == 0, 0x00400000, bits)
        bits = gl.where(x == 255, 0x7FC00000, bits)
        return bits.to(gl.float32, bitcast=True)
    else:
        return x
