"""What `expand_device.py` does in front of BF16's product, behind a product that may leave everything to that, where it is wanted.

Mostly it isn't, and then what it costs is how many programs there are and how late they start. So programs stay and take pieces in turn, and
wait on the device for the launch in front.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .expand_device import expand_rows, expand_weights, has_rows
from .expand_rows_device import bring_rows


@triton.jit
def is_idle(count_ptr, limit):
    """Whether what stands in front left nothing to this launch, once that is known."""
    gdc_wait()
    return tl.load(count_ptr) <= limit


@triton.jit(do_not_specialize=["R", "positions", "alignment", "units", "G", "row_programs", "programs", "steps", "limit", "sxg", "ssg", "ssm",
                               "ssk"])
def gated_expand_kernel(x_ptr, xs_ptr, y_ptr, factor_ptr, one_ptr, w_ptr, s_ptr, v_ptr, index_ptr, R, positions, alignment, K, KX, units, G,
                        row_programs, programs, steps, sxg, sxm, ssg, ssm, ssk, count_ptr, limit, cfg: tl.constexpr):
    """Arguments as `expand_kernel` has them, of packed weights. programs: how many pieces there are."""
    if is_idle(count_ptr, limit):
        return
    if tl.program_id(0) == 0:
        tl.store(one_ptr, 1.0)
    for piece in range(tl.program_id(0), programs, tl.num_programs(0)):
        if piece < row_programs:
            parts = (KX + cfg.BK * steps - 1) // (cfg.BK * steps)
            expand_rows(x_ptr, xs_ptr, y_ptr, factor_ptr, index_ptr, piece // parts * cfg.BM, piece % parts, steps, R, positions, K, KX, sxg, sxm,
                        ssg, ssm, ssk, cfg)
        else:
            of_weights = piece - row_programs
            KC = KX // 128
            parts = (KC + cfg.WC - 1) // cfg.WC
            slab = of_weights // parts
            unit = slab // (64 // cfg.WR)
            if has_rows(index_ptr, unit // units, positions, alignment, cfg):
                expand_weights(w_ptr, s_ptr, v_ptr, unit.to(tl.int64), slab % (64 // cfg.WR) * cfg.WR, of_weights % parts * cfg.WC, KC, cfg)


@triton.jit(do_not_specialize=["R", "N", "row_programs", "programs", "ssm", "ssk", "ssn", "ssw", "limit"])
def gated_rows_kernel(x_ptr, xs_ptr, y_ptr, factor_ptr, flag_ptr, one_ptr, w_ptr, s_ptr, v_ptr, columns_ptr, R, K, KX, row_programs, sxm, ssm,
                      ssk, N, swn, ssn, ssw, programs, count_ptr, limit, cfg: tl.constexpr):
    """Arguments as `expand_rows_kernel` has them. programs: how many pieces there are."""
    if is_idle(count_ptr, limit):
        return
    if tl.program_id(0) == 0:
        tl.store(one_ptr, 1.0)
    for piece in range(tl.program_id(0), programs, tl.num_programs(0)):
        if piece < row_programs:
            bring_rows(x_ptr, xs_ptr, y_ptr, factor_ptr, flag_ptr, piece * cfg.BM, R, K, KX, sxm, ssm, ssk, cfg.BM, cfg.PIECES)
        else:
            bring_rows(w_ptr, s_ptr, v_ptr, columns_ptr, flag_ptr, (piece - row_programs) * cfg.BN, N, K, KX, swn, ssn, ssw, cfg.BN, cfg.PIECES)
