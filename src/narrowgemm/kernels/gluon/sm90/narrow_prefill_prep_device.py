"""The launch in front of the Hopper prefill kernel for narrow weights: the entry table, and A in BF16 in the order of positions.

Program 0 lists the entries (see `narrow_prep_device`). The others take a row of A each, by the slot of its position, bring it to
BF16 with K in the order that the expanded weights have, zeros up to the next 128, and leave what the epilogue wants of it. Of a
masked group only the device knows how many rows it has of those that it can hold: some programs share them. The last programs, one for
each block of the product, have L2 fetch the weights that it begins with.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .narrow_fp8_prep_device import FP8_ORDER, NIBBLE_ORDER, ROW_ORDER, TWO_ORDER, bring_fp8, bring_row, bring_two, load_fp8, store_fp8
from .narrow_prep_device import E2M1, FP16, MASKED, OFFSETS, PLAIN_FP8, in_use, list_all, offset_of, power_of_two, rest_of, row_shift

TAKEN = tl.constexpr(1)      # in the table: see narrow_tile


@triton.jit
def weight_order(x, BK: tl.constexpr):
    """BK elements of a row, permuted: out[m * 8 + q * 2 + r] = in[q * 32 + m * 2 + r] of every 128."""
    return tl.reshape(tl.permute(tl.reshape(x, [BK // 128, 4, 16, 2]), (0, 2, 1, 3)), [BK])


@triton.jit
def nibble_order(x, BK: tl.constexpr):
    """The same for weights in the order FP8_PREPACK: out[(w * 4 + i) * 8 + q * 2 + r] = in[q * 32 + w * 8 + r * 4 + i]."""
    return tl.reshape(tl.permute(tl.reshape(x, [BK // 128, 4, 4, 2, 4]), (0, 2, 4, 1, 3)), [BK])


@triton.jit
def narrow_weight_order(x_ptr, base, k0, K, BK: tl.constexpr):
    """BK floats of a row from k0, permuted."""
    k = k0 + tl.arange(0, BK)
    return weight_order(tl.load(x_ptr + base + k, mask=k < K, other=0.0), BK)


@triton.jit
def e2m1_value(code):
    """FP32. Exponent and mantissa lie where FP32 has its own, subnormals too, less a factor of 2^126."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def payload(x_ptr, k0, K, cfg: tl.constexpr):
    """FP32 payload of BK columns of a row from k0, a piece of the row at a time rather than a column."""
    if cfg.XKIND == E2M1:
        h = k0 // 2 + tl.arange(0, cfg.BK // 2)
        byte = tl.load(x_ptr + h, mask=2 * h < K, other=0).to(tl.int32)
        return tl.reshape(tl.join(e2m1_value(byte), e2m1_value(byte >> 4)), [cfg.BK])
    else:
        k = k0 + tl.arange(0, cfg.BK)
        return tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def unit_of(xs_ptr, i, count, ssk):
    """The scale of K block i, 1 where that is zero, or there is none: a block of zeros is zeros in every unit."""
    s = tl.load(xs_ptr + i * ssk, mask=(i >= 0) & (i < count), other=1.0)
    return tl.where(s == 0.0, 1.0, s)


@triton.jit
def bring_ratios(xs_ptr, ratio_ptr, last_ptr, K, KX, ssk):
    """Of each K block, four times: the unit of the block before over its own; and the unit of the last one. Finite where units are."""
    count = (K + 127) // 128
    for first in range(0, KX // 32, 256):
        o = first + tl.arange(0, 256)
        ratio = unit_of(xs_ptr, o // 4 - 1, count, ssk) / unit_of(xs_ptr, o // 4, count, ssk)
        tl.store(ratio_ptr + o, tl.minimum(ratio, 3.0e38, propagate_nan=tl.PropagateNan.ALL), mask=o < KX // 32)
    tl.store(last_ptr, unit_of(xs_ptr, count - 1, count, ssk))


@triton.jit
def bring(x_ptr, xs_ptr, xp_ptr, xfactor_ptr, ratio_ptr, weight_ptr, of_position_ptr, slot, at, row, part, K, KX, sxg, sxm, ssg, ssm, ssk,
          positions, rows, cfg: tl.constexpr):
    """BK columns of a row of A to position `at` of `rows`."""
    base = offset_of(row, positions, sxg, sxm, cfg)
    xs_ptr += offset_of(row, positions, ssg, ssm, cfg)
    to = xp_ptr + at.to(tl.int64) * (2 * KX if (cfg.XKIND == FP16) | (cfg.XKIND == TWO_ORDER) else KX)
    if cfg.WEIGHT:
        if part == 0:
            tl.store(of_position_ptr + at, tl.load(weight_ptr + slot))
    if cfg.XKIND == FP8_ORDER:
        bring_fp8(x_ptr + base, xs_ptr, to, ratio_ptr, at.to(tl.int64), part, K, KX, ssk, rows, cfg)
    elif cfg.XKIND == ROW_ORDER:
        bring_row(x_ptr + base, xs_ptr, to, xfactor_ptr + at, part, K, KX, cfg)
    elif cfg.XKIND == TWO_ORDER:
        bring_two(x_ptr + base, to, ratio_ptr, at.to(tl.int64), part, K, KX, rows, cfg)
    elif cfg.XKIND == PLAIN_FP8:
        o = part * cfg.BK + tl.arange(0, cfg.BK)
        y = narrow_weight_order(x_ptr, base, part * cfg.BK, K, cfg.BK).to(tl.bfloat16)
        scale = tl.load(xs_ptr + o // 128 * ssk, mask=o // 128 * 128 < K, other=0.0)
        tl.store(to + o, tl.where(scale == 0.0, 0.0, y), mask=o < KX)
        if part == 0:
            bring_ratios(xs_ptr, ratio_ptr + at.to(tl.int64) * (KX // 32), xfactor_ptr + at, K, KX, ssk)
    elif cfg.XKIND == NIBBLE_ORDER:
        o = part * cfg.BK + tl.arange(0, cfg.BK)
        tl.store(to + o, nibble_order(tl.load(x_ptr + base + o, mask=o < K, other=0.0), cfg.BK), mask=o < KX)
    elif cfg.XKIND == 0:
        o = part * cfg.BK + tl.arange(0, cfg.BK)
        tl.store(to + o, narrow_weight_order(x_ptr, base, part * cfg.BK, K, cfg.BK).to(tl.bfloat16), mask=o < KX)
    elif cfg.XKIND == FP16:
        o = part * cfg.BK + tl.arange(0, cfg.BK)
        x = narrow_weight_order(x_ptr, base, part * cfg.BK, K, cfg.BK).to(tl.float32)
        two = to + o // 128 * 256 + o % 128       # every 128 columns in BF16, behind them what that leaves
        tl.store(two, x.to(tl.bfloat16), mask=o < KX)
        tl.store(two + 128, rest_of(x).to(tl.bfloat16), mask=o < KX)
    else:
        shift, nan = row_shift(xs_ptr, K, ssk, cfg)
        block = part * (cfg.BK // cfg.GROUP) + tl.arange(0, cfg.BK // cfg.GROUP)
        code = tl.load(xs_ptr + block * ssk, mask=block * cfg.GROUP < K, other=127).to(tl.int32)
        x = tl.reshape(payload(x_ptr + base, part * cfg.BK, K, cfg), [cfg.BK // cfg.GROUP, cfg.GROUP])
        x = tl.reshape(x * power_of_two(code - shift - 127)[:, None], [cfg.BK])
        o = part * cfg.BK + tl.arange(0, cfg.BK)
        tl.store(to + o, weight_order(x.to(tl.bfloat16), cfg.BK), mask=o < KX)
        if part == 0:
            tl.store(xfactor_ptr + at, tl.where(nan > 0, float("nan"), power_of_two(shift)))


@triton.jit
def touch(ptr, bytes, MOST: tl.constexpr):
    """Have L2 fetch so many bytes, up to MOST, a power of two."""
    at = ptr + tl.minimum(tl.arange(0, MOST // 128) * 128, bytes - 128)
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def touch_first(w_ptr, s_ptr, t, G, NT, KC, cfg: tl.constexpr):
    """The first TOUCHED K blocks of tile t, UNITS units of weights and their scales, if each group before it has one entry: where that is
    wrong, another block's are fetched."""
    UNITS: tl.constexpr = cfg.UNITS
    num_n = (NT + UNITS - 1) // UNITS
    e = t // num_n
    blocks = tl.minimum(KC, cfg.TOUCHED)
    for i in tl.static_range(UNITS):
        n = t % num_n * UNITS + i
        if (e < G) & (n < NT):
            unit = (e * NT + n).to(tl.int64)
            touch(w_ptr + unit * KC * 4096, blocks * 4096, cfg.TOUCHED * 4096)
            touch(s_ptr + unit * ((KC + 1) // 2) * 512, (blocks + 1) // 2 * 512, cfg.TOUCHED * 256)


@triton.jit(do_not_specialize=["G", "R", "positions", "block_m", "cap", "a_div", "each", "NT", "sxg", "ssg", "ssm", "ssk"])
def narrow_prefill_prep_kernel(x_ptr, xs_ptr, xp_ptr, xfactor_ptr, ratio_ptr, weight_ptr, of_position_ptr, index_ptr, slots_ptr,
                               experts_ptr, posted_ptr, table_ptr, live_ptr, w_ptr, s_ptr, K, KX, sxg, sxm, ssg, ssm, ssk, G, R, positions,
                               block_m, cap, a_div, each, NT, cfg: tl.constexpr):
    """positions: of the layout (masked: rows a group can hold); R: slots; weight_ptr: a slot's, of_position_ptr: where a position's
    goes; each: programs of a group's rows (masked); w_ptr, s_ptr: bytes of weights and scales, NT units a group (TOUCHED). The rest as
    narrow_prep_kernel's."""
    if cfg.PDL:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    pieces = (KX + cfg.BK - 1) // cfg.BK
    at = (pid - 1) // pieces
    part = (pid - 1) % pieces
    rows = positions
    if cfg.KIND == MASKED:
        rows = positions * G
    if pid == 0:
        tl.store(table_ptr + TAKEN, 0)
        if cfg.LIST:
            list_all(index_ptr, slots_ptr, experts_ptr, posted_ptr, table_ptr, live_ptr, positions, G, R, cap, block_m, cfg)
    elif cfg.KIND == MASKED:
        g = at // each
        if g < G:
            first = at % each
            if cfg.XKIND == FP8_ORDER:      # the first row is on its way before it is known whether the group has it
                row = g.to(tl.int64) * positions + first
                x, scale = load_fp8(x_ptr + offset_of(row, positions, sxg, sxm, cfg), xs_ptr + offset_of(row, positions, ssg, ssm, cfg),
                                    part, K, ssk, cfg)
                if first < in_use(index_ptr, g, positions):
                    store_fp8(x, scale, xp_ptr + row * KX, ratio_ptr, row, part, KX, rows, cfg)
                first += each
            for r in range(first, in_use(index_ptr, g, positions), each):
                row = g.to(tl.int64) * positions + r
                bring(x_ptr, xs_ptr, xp_ptr, xfactor_ptr, ratio_ptr, weight_ptr, of_position_ptr, row, row, row, part, K, KX, sxg, sxm, ssg,
                      ssm, ssk, positions, rows, cfg)
        elif cfg.TOUCHED > 0:
            touch_first(w_ptr, s_ptr, pid - 1 - G * each * pieces, G, NT, KX // 128, cfg)
    else:
        slot = at
        if cfg.SLOTS:
            slot = tl.load(slots_ptr + at)
        row = (tl.maximum(slot, 0) // a_div).to(tl.int64)
        used = (slot >= 0) & (slot < R)
        if cfg.KIND == OFFSETS:     # behind the last group are slots that nobody here computes: under expert parallelism, most
            used = used & (at < tl.load(index_ptr + G))
        if used:
            bring(x_ptr, xs_ptr, xp_ptr, xfactor_ptr, ratio_ptr, weight_ptr, of_position_ptr, slot, at, row, part, K, KX, sxg, sxm, ssg,
                  ssm, ssk, positions, rows, cfg)
