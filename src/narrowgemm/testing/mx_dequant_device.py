"""Device code of the peer that brings MX operands to BF16 before a BF16 product."""

import triton
import triton.language as tl


@triton.jit
def e2m1_value(code):
    """FP32, whose exponent and mantissa bits E2M1's are, less a factor of 2^126."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def mx_to_bf16_kernel(data_ptr, scale_ptr, out_ptr, blocks, stride_r, stride_k, PER_ROW, BLOCKS: tl.constexpr,
                      E2M1: tl.constexpr = False):
    """BLOCKS blocks of 32 E4M3 or E2M1 with E8M0 scales a program, in BF16. Rows of PER_ROW blocks; scale strides by row and block."""
    at = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    live = at < blocks
    row = at // PER_ROW
    code = tl.load(scale_ptr + row * stride_r + (at - row * PER_ROW) * stride_k, mask=live, other=127).to(tl.uint32)
    scale = (code << 23).to(tl.float32, bitcast=True)       # a code of 0 or 255 is none of a peer's to get right
    where = at[:, None] * 32 + tl.arange(0, 32)[None, :]
    if E2M1:
        byte = tl.load(data_ptr + at[:, None] * 16 + tl.arange(0, 16)[None, :], mask=live[:, None], other=0).to(tl.int32)
        x = tl.reshape(tl.join(e2m1_value(byte), e2m1_value(byte >> 4)), [BLOCKS, 32]) * scale[:, None]
    else:
        x = tl.load(data_ptr + where, mask=live[:, None], other=0.0).to(tl.float32) * scale[:, None]
    tl.store(out_ptr + where, x.to(tl.bfloat16), mask=live[:, None])
