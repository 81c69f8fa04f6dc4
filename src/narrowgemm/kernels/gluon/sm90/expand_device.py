"""The launch in front of the Hopper BF16 product: packed weights and narrow activations to BF16, once a call, K in its order.

Programs that bring rows of A come first; each of the others takes some rows of weights and some K of an expert that has rows. Scales
whose powers of two BF16 can't hold are shifted, a row at a time, and the shift is left for the product to take back: `prepack`,
`narrow_prep_device.row_shift`.
"""

import triton
import triton.language as tl

from .expand_rows_device import SHIFTED
from .narrow_prefill_prep_device import e2m1_value
from .narrow_prep_device import E2M1, MASKED, OFFSETS, least_shift, offset_of, power_of_two
from .narrow_rows_device import PSUM, psum_rows

SIGNS = tl.constexpr(-2147450880)       # 0x80008000
E4M3_PAIR = tl.constexpr(-2014279696)   # 0x87F087F0
E2M1_PAIR = tl.constexpr(-2118090304)   # 0x81C081C0


@triton.jit
def upper(word):
    """int32 holding a BF16 in its upper half, as FP32."""
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def scaled_pair(pair, scale):
    """Two BF16 in an int32 times a power of two, exactly."""
    low = (upper(pair << 16) * scale).to(tl.int32, bitcast=True)
    high = (upper(pair) * scale).to(tl.int32, bitcast=True)
    return ((low >> 16) & 0xFFFF) | (high & -65536)


@triton.jit
def pairs_of_e4m3(w):
    """A word of four packed codes (`narrowgemm.prepack_bits._E4M3`) as two words of two BF16 each, less a factor of 2^120."""
    second = ((w << 1) & SIGNS) | ((w >> 3) & 0x07000700) | ((w << 4) & 0x00F000F0)
    return w & E4M3_PAIR, second


@triton.jit
def pairs_of_e2m1(w):
    """A word of eight packed codes (`narrowgemm.prepack_bits._E2M1`) as four words of two BF16 each, less a factor of 2^126."""
    fourth = ((w << 1) & SIGNS) | ((w >> 3) & 0x01800180) | ((w >> 7) & 0x00400040)
    return w & E2M1_PAIR, (w << 3) & E2M1_PAIR, (w << 6) & E2M1_PAIR, fourth


@triton.jit
def has_rows(index_ptr, g, positions, alignment, cfg: tl.constexpr):
    """Whether an expert has rows; where that takes a look at every row's id, that it may have."""
    if cfg.KIND == OFFSETS:
        return tl.load(index_ptr + g + 1) > tl.load(index_ptr + g)
    elif cfg.KIND == MASKED:
        return tl.load(index_ptr + g) > 0
    elif cfg.KIND == PSUM:
        first, rows = psum_rows(index_ptr, g, g >= 0, positions, alignment)
        return rows > 0
    else:
        return g >= 0


@triton.jit
def expand_weights(w_ptr, s_ptr, y_ptr, unit, first, c0, KC, cfg: tl.constexpr):
    """Rows [first, first + WR) of a unit of 64, WC chunks of 128 of K from chunk c0 on: a row's piece is written as one. w int32, s bytes;
    y int32 [units * 64, KC * 64]."""
    WR: tl.constexpr = cfg.WR
    WC: tl.constexpr = cfg.WC
    r = first + tl.arange(0, WR)
    c = c0 + tl.arange(0, WC)
    q = tl.arange(0, 4)
    of_row = ((r // 16 * 8 + r % 8) * 16 + r % 16 // 8)[:, None, None]
    of_chunk = (c // 2 * 512 + c % 2 * 2)[None, :, None]
    field = tl.load(s_ptr + unit * ((KC + 1) // 2) * 512 + of_row + of_chunk + q[None, None, :] * 4, mask=(c < KC)[None, :, None],
                    other=0).to(tl.int32)
    scale = (field << 23).to(tl.float32, bitcast=True)[:, :, :, None]       # [rows, chunks, 4 blocks, 1]
    inside = (c < KC)[None, :, None, None]
    of_block = (r * 4)[:, None, None, None] + q[None, None, :, None]
    if cfg.E4M3:
        # halves of 16 of a block lie 1024 words apart
        o = tl.arange(0, 8)[None, None, None, :]
        at = c[None, :, None, None] * 2048 + o // 4 * 1024 + of_block * 4 + o % 4
        x, y = pairs_of_e4m3(tl.load(w_ptr + unit * KC * 2048 + at, mask=inside, other=0))
        v = tl.join(scaled_pair(x, scale), scaled_pair(y, scale))
    else:
        at = c[None, :, None, None] * 1024 + of_block * 4 + tl.arange(0, 4)[None, None, None, :]
        x, y, u, z = pairs_of_e2m1(tl.load(w_ptr + unit * KC * 1024 + at, mask=inside, other=0))
        v = tl.join(tl.join(scaled_pair(x, scale), scaled_pair(u, scale)), tl.join(scaled_pair(y, scale), scaled_pair(z, scale)))
    k = c0 * 64 + tl.arange(0, WC * 64)
    tl.store(y_ptr + (unit * 64 + r)[:, None] * (KC * 64) + k[None, :], tl.reshape(v, [WR, WC * 64]), mask=(k < KC * 64)[None, :])


@triton.jit
def shifts_of_rows(xs, rows, K, ssk, cfg: tl.constexpr):
    """`row_shift` of several rows: xs pointers [BM], rows: which of them there are. (shifts, whether one of its codes is NaN)."""
    BM: tl.constexpr = cfg.BM
    SCALES: tl.constexpr = cfg.SCALES
    count = (K + cfg.GROUP - 1) // cfg.GROUP
    top = tl.zeros([BM], tl.int32)
    bottom = tl.full([BM], 255, tl.int32)
    nan = tl.zeros([BM], tl.int32)
    for i in range(0, count, SCALES):
        o = i + tl.arange(0, SCALES)
        there = rows[:, None] & (o < count)[None, :]
        code = tl.load(xs[:, None] + o.to(tl.int64)[None, :] * ssk, mask=there, other=127).to(tl.int32)
        nan = tl.maximum(nan, tl.max((code == 255).to(tl.int32), 1))
        top = tl.maximum(top, tl.max(tl.where((code == 255) | (there == 0), 0, code), 1))
        bottom = tl.minimum(bottom, tl.min(tl.where(there, code, 255), 1))
    return least_shift(top, bottom), nan


@triton.jit
def expand_rows(x_ptr, xs_ptr, y_ptr, factor_ptr, index_ptr, first, part, steps, R, positions, K, KX, sxg, sxm, ssg, ssm, ssk,
                cfg: tl.constexpr):
    """BM rows of A from `first`, `steps` times BK columns of part `part`; part 0 leaves what the rows are multiplied by."""
    BM: tl.constexpr = cfg.BM
    BK: tl.constexpr = cfg.BK
    GROUP: tl.constexpr = cfg.GROUP
    BLOCKS: tl.constexpr = BK // GROUP
    row = first + tl.arange(0, BM).to(tl.int64)
    rows = row < R
    if cfg.KIND == MASKED:
        rows = rows & (row % positions < tl.load(index_ptr + row // positions, mask=rows, other=0))
    xs = xs_ptr + offset_of(row, positions, ssg, ssm, cfg)
    shift, nan = shifts_of_rows(xs, rows, K, ssk, cfg)
    base = x_ptr + offset_of(row, positions, sxg, sxm, cfg)
    for k0 in tl.range(part * steps * BK, tl.minimum((part + 1) * steps * BK, KX), BK, num_stages=cfg.STAGES):
        b = k0 // GROUP + tl.arange(0, BLOCKS)
        there = rows[:, None] & (b * GROUP < K)[None, :]
        code = tl.load(xs[:, None] + b.to(tl.int64)[None, :] * ssk, mask=there, other=127).to(tl.int32)
        scale = power_of_two(code - shift[:, None] - 127)[:, :, None]
        k = k0 + tl.arange(0, BK)
        if cfg.XKIND == E2M1:
            h = k0 // 2 + tl.arange(0, BK // 2)
            byte = tl.load(base[:, None] + h[None, :], mask=rows[:, None] & (2 * h < K)[None, :], other=0).to(tl.int32)
            x = tl.reshape(tl.join(e2m1_value(byte), e2m1_value(byte >> 4)), [BM, BLOCKS, GROUP])
        else:
            x = tl.load(base[:, None] + k[None, :], mask=rows[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
            x = tl.reshape(x, [BM, BLOCKS, GROUP])
        y = tl.reshape(x * scale, [BM, BK]).to(tl.bfloat16)
        tl.store(y_ptr + row[:, None] * KX + k[None, :], y, mask=rows[:, None] & (k < KX)[None, :])
    if part == 0:
        tl.store(factor_ptr + row, tl.where(nan > 0, float("nan"), power_of_two(shift)), mask=rows)


@triton.jit(do_not_specialize=["R", "positions", "alignment", "units", "G", "row_programs", "steps", "limit", "sxg", "ssg", "ssm", "ssk",
                               "N", "w_steps", "ssn", "ssw"])
def expand_kernel(x_ptr, xs_ptr, y_ptr, factor_ptr, one_ptr, w_ptr, s_ptr, v_ptr, columns_ptr, index_ptr, R, positions, alignment, K, KX,
                  units, G, row_programs, steps, sxg, sxm, ssg, ssm, ssk, N, w_steps, swn, ssn, ssw, count_ptr, limit, cfg: tl.constexpr):
    """R: rows of A, of all groups where masked; positions: of the layout (masked: rows a group can hold); units: tiles of 64 weight
    rows of a group; y [R, KX], v int32 [G * units * 64, KX / 2]; one_ptr: where 1.0 goes. sxg, sxm, ssg, ssm, ssk: strides of A.
    PLAIN: N rows of weights as A's are, strides swn, ssn, ssw, to v [N, KX], and what they are multiplied by to columns_ptr.
    GATE: nothing is done where what count_ptr holds is no more than `limit`."""
    pid = tl.program_id(0)
    if cfg.GATE:
        if tl.load(count_ptr) <= limit:
            return
    if pid == 0:
        tl.store(one_ptr, 1.0)
    if pid < row_programs:
        parts = (KX + cfg.BK * steps - 1) // (cfg.BK * steps)
        expand_rows(x_ptr, xs_ptr, y_ptr, factor_ptr, index_ptr, pid // parts * cfg.BM, pid % parts, steps, R, positions, K, KX, sxg,
                    sxm, ssg, ssm, ssk, cfg)
    elif cfg.PLAIN:
        pid -= row_programs
        parts = (KX + cfg.BK * w_steps - 1) // (cfg.BK * w_steps)
        expand_rows(w_ptr, s_ptr, v_ptr, columns_ptr, index_ptr, pid // parts * cfg.BM, pid % parts, w_steps, N, N, K, KX, 0, swn, 0, ssn,
                    ssw, cfg)
    else:
        pid -= row_programs
        KC = KX // 128
        parts = (KC + cfg.WC - 1) // cfg.WC
        slab = pid // parts
        unit = slab // (64 // cfg.WR)
        if has_rows(index_ptr, unit // units, positions, alignment, cfg):
            expand_weights(w_ptr, s_ptr, v_ptr, unit.to(tl.int64), slab % (64 // cfg.WR) * cfg.WR, pid % parts * cfg.WC, KC, cfg)


@triton.jit(do_not_specialize=["M"])
def rescale_kernel(y_ptr, factor_ptr, columns_ptr, flag_ptr, M, N, som, BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr,
                   COLS: tl.constexpr, FLAG: tl.constexpr):
    """What a product left times the factors of its rows and, COLS, of its columns. A program takes BM rows of BN columns, and does
    nothing where none of its factors is other than one, else STEP columns at a time. FLAG: `flag` says where all factors are one."""
    if FLAG:
        if tl.load(flag_ptr) != SHIFTED:
            return
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * BN
    factor = tl.load(factor_ptr + row, mask=row < M, other=1.0)
    shifted = tl.max((factor != 1.0).to(tl.int32), 0)
    if COLS:
        mine = first + tl.arange(0, BN)
        factors = tl.load(columns_ptr + mine, mask=mine < N, other=1.0)
        shifted = tl.maximum(shifted, tl.max((factors != 1.0).to(tl.int32), 0))
    if shifted > 0:
        for n in range(first, tl.minimum(first + BN, N), STEP):
            o = n + tl.arange(0, STEP)
            at = y_ptr + row.to(tl.int64)[:, None] * som + o[None, :]
            inside = (row < M)[:, None] & (o < N)[None, :]
            if COLS:
                column = tl.load(columns_ptr + o, mask=o < N, other=1.0)
                x = tl.load(at, mask=inside, other=0.0).to(tl.float32) * column[None, :]
            else:
                inside = inside & (factor != 1.0)[:, None]
                x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            tl.store(at, (x * factor[:, None]).to(y_ptr.dtype.element_ty), mask=inside)
