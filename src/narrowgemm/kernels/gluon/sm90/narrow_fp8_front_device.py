"""The launch in front of products of FP8 tokens in widths of COLUMNS, where a position is a row of A: tokens in the order of the weights'
K, and their scales as `store_scales` has them.

Several rows a program, so that programs are few and have more bytes on their way; scales by programs of their own, which read each of them
four times and write 16 bytes a position side by side, instead of four numbers that lie far apart.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .narrow_fp8_prep_device import token_scale

SCALE_POSITIONS, SCALE_BLOCKS = tl.constexpr(32), tl.constexpr(16)


@triton.jit
def bring_rows(x_ptr, xs_ptr, to_ptr, factor_ptr, first, part, end, K, KX, sxm, ssm, cfg: tl.constexpr):
    """BK columns of ROWS rows from `first` on, those in front of `end`; out[w * 16 + q * 4 + b] = in[q * 32 + w * 4 + b] of every 128."""
    r = first + tl.arange(0, cfg.ROWS)
    o = part * cfg.BK + tl.arange(0, cfg.BK)
    live = (r < end)[:, None]
    row = r.to(tl.int64)
    x = tl.load(x_ptr + (row[:, None] * sxm + o[None, :]), mask=live & (o < K)[None, :], other=0.0)
    x = tl.permute(tl.reshape(x, [cfg.ROWS, cfg.BK // 128, 4, 8, 4]), (0, 1, 3, 2, 4))
    tl.store(to_ptr + (row[:, None] * KX + o[None, :]), tl.reshape(x, [cfg.ROWS, cfg.BK]), mask=live & (o < KX)[None, :])
    if cfg.ROW:
        if part == 0:
            tl.store(factor_ptr + r, tl.load(xs_ptr + row * ssm, mask=r < end, other=0.0), mask=r < end)


@triton.jit
def ratio(first, second):
    """(first / second, second), as factors that sums of the two blocks take one after the other: finite and normal, as long as the scales
    are. A second one that is nothing beside the first, or nothing at all, is taken for a larger one that is as good as nothing."""
    second = tl.where((second < first * 2.0**-100) | (second < 2.0**-126), tl.maximum(first * 2.0**-64, 2.0**-126), second)
    return first / second, second


@triton.jit
def scales_from(xs_ptr, r, rows, i, count, ssm, ssk, cfg: tl.constexpr):
    """Of K blocks i [.., 1] and rows r [1, ..], the last row's behind it. CHAIN: those of even blocks as ratios to the next one's."""
    at = xs_ptr + tl.minimum(r, rows - 1).to(tl.int64) * ssm
    if cfg.CHAIN:
        first, second = ratio(token_scale(at, i & -2, count, ssk), token_scale(at, i | 1, count, ssk))
        return tl.where(i % 2 == 0, first, second)
    else:
        return token_scale(at, i, count, ssk)


@triton.jit
def bring_scales(xs_ptr, scale_ptr, p0, i0, K, KX, ssm, ssk, rows, cfg: tl.constexpr):
    """[K block, position, 4]: the scales of positions 1, 0, 9 and 8 further on."""
    i = (i0 + tl.arange(0, SCALE_BLOCKS))[:, None]
    p = (p0 + tl.arange(0, SCALE_POSITIONS))[None, :]
    count = (K + 127) // 128
    s0 = scales_from(xs_ptr, p, rows, i, count, ssm, ssk, cfg)
    s1 = scales_from(xs_ptr, p + 1, rows, i, count, ssm, ssk, cfg)
    s8 = scales_from(xs_ptr, p + 8, rows, i, count, ssm, ssk, cfg)
    s9 = scales_from(xs_ptr, p + 9, rows, i, count, ssm, ssk, cfg)
    four = tl.reshape(tl.join(tl.join(s1, s9), tl.join(s0, s8)), [SCALE_BLOCKS, SCALE_POSITIONS, 4])
    to = scale_ptr + ((i.to(tl.int64) * rows + p) * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
    kept = KX // 128
    if cfg.CHAIN:
        kept += kept % 2
    tl.store(to, four, mask=((i < kept) & (p < rows))[:, :, None])


@triton.jit(do_not_specialize=["G", "rows", "ssm", "ssk"])
def narrow_fp8_front_kernel(x_ptr, xs_ptr, to_ptr, factor_ptr, scale_ptr, index_ptr, taken_ptr, K, KX, sxm, ssm, ssk, G, rows, cfg: tl.constexpr):
    """rows: of A; index_ptr: where groups begin and, at G, the last one ends (OFFSETS): what lies behind is nobody's; taken_ptr: of tiles
    that the product's blocks took."""
    if cfg.PDL:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    if pid == 0:
        tl.store(taken_ptr, 0)
    pieces = (KX + cfg.BK - 1) // cfg.BK
    copies = (rows + cfg.ROWS - 1) // cfg.ROWS * pieces
    if pid < copies:
        end = rows
        if cfg.OFFSETS:
            end = tl.minimum(tl.load(index_ptr + G), rows).to(tl.int32)
        bring_rows(x_ptr, xs_ptr, to_ptr, factor_ptr, pid // pieces * cfg.ROWS, pid % pieces, end, K, KX, sxm, ssm, cfg)
    elif not cfg.ROW:
        across = (KX // 128 + SCALE_BLOCKS - 1) // SCALE_BLOCKS
        bring_scales(xs_ptr, scale_ptr, (pid - copies) // across * SCALE_POSITIONS, (pid - copies) % across * SCALE_BLOCKS, K, KX, ssm, ssk, rows,
                     cfg)
