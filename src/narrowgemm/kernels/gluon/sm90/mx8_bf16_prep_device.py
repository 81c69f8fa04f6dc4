"""The launch in front of the Hopper kernel for plain MXFP8 weights by BF16 wgmma: tokens in BF16, in the order of its registers."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .narrow_prep_device import power_of_two, row_shift


@triton.jit
def row_order(x, BK: tl.constexpr):
    """BK elements of a row, permuted: out[w * 16 + h * 8 + q * 2 + r] = in[q * 32 + w * 4 + r * 2 + h] of every 128."""
    return tl.reshape(tl.permute(tl.reshape(x, [BK // 128, 4, 8, 2, 2]), (0, 2, 4, 1, 3)), [BK])


@triton.jit
def bring_row(x_ptr, xs_ptr, xp_ptr, xfactor_ptr, row, part, K, ssk, cfg: tl.constexpr):
    """BK columns of a row at x_ptr to xp_ptr."""
    o = part * cfg.BK + tl.arange(0, cfg.BK)
    x = tl.load(x_ptr + o, mask=o < K, other=0.0)
    block = part * (cfg.BK // 32) + tl.arange(0, cfg.BK // 32)
    code = tl.load(xs_ptr + block * ssk, mask=block * 32 < K, other=127).to(tl.int32)
    shift, nan = row_shift(xs_ptr, K, ssk, cfg)
    y = tl.reshape(x.to(tl.float32), [cfg.BK // 32, 32]) * power_of_two(code - shift - 127)[:, None]
    tl.store(xp_ptr + o, row_order(tl.reshape(y.to(tl.bfloat16), [cfg.BK]), cfg.BK), mask=o < K)
    if part == 0:
        tl.store(xfactor_ptr + row, tl.where(nan > 0, float("nan"), power_of_two(shift)))


@triton.jit(do_not_specialize=["K", "sxm", "ssm", "ssk"])
def mx8_bf16_prep_kernel(x_ptr, xs_ptr, xp_ptr, xfactor_ptr, K, sxm, ssm, ssk, cfg: tl.constexpr):
    """A program BK columns of a token."""
    if cfg.PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    bring_row(x_ptr + row * sxm, xs_ptr + row * ssm, xp_ptr + row * K, xfactor_ptr, row, tl.program_id(1), K, ssk, cfg)
