"""Device code of the streaming read that a floor is measured with."""

import triton
import triton.language as tl


@triton.jit
def stream_kernel(x, out, count, BLOCK: tl.constexpr):
    """One block of int32 read a program, one int32 written, so that no read can be dropped."""
    pid = tl.program_id(0)
    at = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + pid, tl.sum(tl.load(x + at, mask=at < count, other=0), 0))
