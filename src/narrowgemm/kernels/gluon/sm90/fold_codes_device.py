"""MXFP8 weights that are held as they came, folded into E4M3 with one power of two a row, once a call: `prepack_folded.py`.

Elements that a row's power does not hold become zero: they are kept beside, in BF16, and a product adds them by columns of A.
"""

import triton
import triton.language as tl

from .narrow_prep_device import power_of_two

BIAS = tl.constexpr(6)      # of a row's code: `prepack_folded.BIAS`


@triton.jit(do_not_specialize=["N", "ssn", "ssw"])
def fold_codes_kernel(w_ptr, s_ptr, top_ptr, y_ptr, N, K, swn, ssn, ssw, BN: tl.constexpr, BK: tl.constexpr):
    """w E4M3 [N, K] (stride swn) with E8M0 codes s (strides ssn, ssw) to y E4M3 [N, K]; top uint8 [N]: the rows' codes."""
    parts = tl.cdiv(K, BK)
    row = tl.program_id(0) // parts * BN + tl.arange(0, BN)
    first = tl.program_id(0) % parts * BK
    k = first + tl.arange(0, BK)
    block = first // 32 + tl.arange(0, BK // 32)
    r64 = row.to(tl.int64)[:, None]
    live = (row < N)[:, None] & (k < K)[None, :]
    w = tl.load(w_ptr + r64 * swn + k[None, :], mask=live, other=0.0)
    code = tl.load(s_ptr + r64 * ssn + block.to(tl.int64)[None, :] * ssw, mask=(row < N)[:, None] & (block * 32 < K)[None, :], other=127)
    top = tl.load(top_ptr + row, mask=row < N, other=127).to(tl.int32)
    x = tl.reshape(w.to(tl.float32), [BN, BK // 32, 32]) * power_of_two(code.to(tl.int32) - top[:, None] + BIAS)[:, :, None]
    y = x.to(tl.float8e4nv)
    y = tl.where((y.to(tl.float32) == x) | (x != x), y, 0.0)
    tl.store(y_ptr + r64 * K + k[None, :], tl.reshape(y, [BN, BK]), mask=live)
