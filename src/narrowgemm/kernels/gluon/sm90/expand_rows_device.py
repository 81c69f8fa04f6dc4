"""The launch in front of the Hopper BF16 product where both sides are MXFP8 as they are: rows to BF16, once a call.

A program has whole rows, so it asks for everything that it moves first and finds in the same codes whether a row has to be shifted:
see `expand_device.py`. Codes that BF16 does not hold are rare: only then rows are shifted, and `flag` says so to the launch behind.
"""

import triton
import triton.language as tl

from .narrow_prep_device import HIGH, LOW, least_shift, power_of_two

PIECE = tl.constexpr(2048)          # columns that are moved together
SHIFTED = tl.constexpr(0x5D1F7ED1)  # what `flag` holds where a row may have been shifted; anything else where none was


@triton.jit
def bring_rows(x_ptr, xs_ptr, y_ptr, factor_ptr, flag_ptr, first, R, K, KX, sxm, ssm, ssk, BM: tl.constexpr, PIECES: tl.constexpr):
    """Rows [first, first + BM) of R, and what they are multiplied by."""
    row = first + tl.arange(0, BM).to(tl.int64)
    o = tl.arange(0, PIECE)
    b = tl.arange(0, PIECE // 32)
    x = x_ptr + (row * sxm)[:, None]
    xs = xs_ptr + (row * ssm)[:, None]
    here = (row < R)[:, None]
    v = ()
    c = ()
    far = tl.zeros([BM, PIECE // 32], tl.int32)
    for i in tl.static_range(PIECES):
        k = i * PIECE + o
        v = v + (tl.load(x + k[None, :], mask=here & (k < K)[None, :], other=0.0, eviction_policy="evict_first"), )
        block = i * (PIECE // 32) + b
        code = tl.load(xs + block.to(tl.int64)[None, :] * ssk, mask=here & (block * 32 < K)[None, :], other=127).to(tl.int32)
        far |= ((code < LOW) | (code > HIGH)).to(tl.int32)
        c = c + (code, )
    shift = tl.zeros([BM], tl.int32)
    factor = tl.full([BM], 1.0, tl.float32)
    if tl.max(tl.max(far, 1), 0) > 0:
        top = tl.zeros([BM], tl.int32)
        bottom = tl.full([BM], 255, tl.int32)
        nan = tl.zeros([BM], tl.int32)
        for i in tl.static_range(PIECES):
            nan = tl.maximum(nan, tl.max((c[i] == 255).to(tl.int32), 1))
            top = tl.maximum(top, tl.max(tl.where(c[i] == 255, 0, c[i]), 1))
            bottom = tl.minimum(bottom, tl.min(c[i], 1))
        shift = least_shift(top, bottom)
        factor = tl.where(nan > 0, float("nan"), power_of_two(shift))
        tl.store(flag_ptr, SHIFTED)
    for i in tl.static_range(PIECES):
        k = i * PIECE + o
        scale = power_of_two(c[i] - shift[:, None] - 127)[:, :, None]
        y = tl.reshape(tl.reshape(v[i].to(tl.float32), [BM, PIECE // 32, 32]) * scale, [BM, PIECE]).to(tl.bfloat16)
        tl.store(y_ptr + (row * KX)[:, None] + k[None, :], y, mask=here & (k < KX)[None, :])
    tl.store(factor_ptr + row, factor, mask=row < R)


@triton.jit(do_not_specialize=["R", "N", "row_programs", "ssm", "ssk", "ssn", "ssw"])
def expand_rows_kernel(x_ptr, xs_ptr, y_ptr, factor_ptr, flag_ptr, one_ptr, w_ptr, s_ptr, v_ptr, columns_ptr, R, K, KX, row_programs, sxm, ssm,
                       ssk, N, swn, ssn, ssw, cfg: tl.constexpr):
    """R rows of A (strides sxm; ssm, ssk) to y [R, KX], N of weights (swn; ssn, ssw) to v [N, KX]; what these are multiplied by to factor and
    columns; one_ptr: where 1.0 goes."""
    pid = tl.program_id(0)
    if pid == 0:
        tl.store(one_ptr, 1.0)
    if pid < row_programs:
        bring_rows(x_ptr, xs_ptr, y_ptr, factor_ptr, flag_ptr, pid * cfg.BM, R, K, KX, sxm, ssm, ssk, cfg.BM, cfg.PIECES)
    else:
        bring_rows(w_ptr, s_ptr, v_ptr, columns_ptr, flag_ptr, (pid - row_programs) * cfg.BN, N, K, KX, swn, ssn, ssw, cfg.BN, cfg.PIECES)
