"""Device code of the peer that brings MXFP8 operands to BF16 before a BF16 product."""

import triton
import triton.language as tl


@triton.jit
def mx_to_bf16_kernel(data_ptr, scale_ptr, out_ptr, blocks, stride_r, stride_k, PER_ROW, BLOCKS: tl.constexpr):
    """BLOCKS blocks of 32 E4M3 with E8M0 scales a program, in BF16. Rows of PER_ROW blocks; scale strides by row and block."""
    at = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    live = at < blocks
    row = at // PER_ROW
    code = tl.load(scale_ptr + row * stride_r + (at - row * PER_ROW) * stride_k, mask=live, other=127).to(tl.uint32)
    scale = (code << 23).to(tl.float32, bitcast=True)       # a code of 0 or 255 is none of a peer's to get right
    where = at[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = tl.load(data_ptr + where, mask=live[:, None], other=0.0).to(tl.float32) * scale[:, None]
    tl.store(out_ptr + where, x.to(tl.bfloat16), mask=live[:, None])
