"""The launch in front of the Hopper kernels for narrow weights, and the one behind: expert table and activations; combine.

`narrow_prep_kernel`: program 0 lists the experts that have rows, in entries of at most BT rows, zeroes the counters, and marks the
slots that an expert computes; the others bring A to BF16, K in the order that the expanded weights have.
`narrow_combine_kernel`: sums the slots of a token in order.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .narrow_fp8_prep_device import TWO_ORDER, bring_two_of_row
from .narrow_rows_device import CONTIGUOUS, PSUM, contiguous_entries, psum_rows

DENSE = tl.constexpr(0)
OFFSETS = tl.constexpr(1)
MASKED = tl.constexpr(2)
ROUTED = tl.constexpr(3)
E4M3 = tl.constexpr(1)
E2M1 = tl.constexpr(2)
PLAIN_FP8 = tl.constexpr(3)
FP16 = tl.constexpr(4)
HEAD = tl.constexpr(16)
LOW = tl.constexpr(3)        # scale codes of A between which E4M3 values are exact in BF16
HIGH = tl.constexpr(240)


@triton.jit
def list_entries(table_ptr, cap, at, expert, first, rows, BT: tl.constexpr):
    """Write the entries of each expert with rows from position `at` on; how many there were."""
    count = (rows + BT - 1) // BT
    pos = at + tl.cumsum(count, 0) - count
    for j in range(tl.max(count, 0)):
        live = (j < count) & (pos + j < cap)
        p = table_ptr + HEAD + pos + j
        tl.store(p, expert, mask=live)
        tl.store(p + cap, first + j * BT, mask=live)
        tl.store(p + 2 * cap, tl.minimum(rows - j * BT, BT), mask=live)
    return tl.sum(count, 0)


@triton.jit
def mark(live_ptr, slots_ptr, p, inside, R):
    s = tl.load(slots_ptr + p, mask=inside, other=-1)
    tl.store(live_ptr + s, tl.full(s.shape, 1, tl.int8), mask=(s >= 0) & (s < R))


@triton.jit
def clear(ptr, n, value):
    for i in range(0, n, 1024):
        o = i + tl.arange(0, 1024)
        tl.store(ptr + o, tl.zeros([1024], tl.int32).to(ptr.dtype.element_ty) + value, mask=o < n)


@triton.jit
def routed_entries(slots_ptr, experts_ptr, posted_ptr, table_ptr, live_ptr, positions, G, R, cap, block_m, cfg: tl.constexpr):
    posted = tl.minimum(tl.load(posted_ptr), positions)
    at = 0
    for base in range(0, (posted + block_m - 1) // block_m, 16):
        i = base + tl.arange(0, 16)
        inside = i * block_m < posted
        e = tl.load(experts_ptr + i, mask=inside, other=-1)
        inside = inside & (e >= 0) & (e < G)
        r = tl.arange(0, cfg.BLOCK)
        p = i[:, None] * block_m + r[None, :]
        held = inside[:, None] & (r < block_m)[None, :] & (p < posted)
        s = tl.load(slots_ptr + p, mask=held, other=-1)
        held = held & (s >= 0) & (s < R)
        rows = tl.max(tl.where(held, r[None, :] + 1, 0), 1)
        at += list_entries(table_ptr, cap, at, e, i * block_m, rows, cfg.BT)
        if cfg.LIVE:
            tl.store(live_ptr + s, tl.full(s.shape, 1, tl.int8), mask=held)
    return at


@triton.jit
def group_entries(index_ptr, slots_ptr, table_ptr, live_ptr, positions, G, R, cap, alignment, cfg: tl.constexpr):
    g = tl.arange(0, cfg.GROUPS)
    there = g < G
    if cfg.KIND == DENSE:
        first = g * 0
        rows = tl.where(there, positions, 0)
    elif cfg.KIND == MASKED:
        first = g * positions
        rows = tl.minimum(tl.maximum(tl.load(index_ptr + g, mask=there, other=0).to(tl.int32), 0), positions)
    elif cfg.KIND == PSUM:
        first, rows = psum_rows(index_ptr, g, there, positions, alignment)
    else:
        start = tl.load(index_ptr + g, mask=there, other=0)
        stop = tl.load(index_ptr + g + 1, mask=there, other=0)
        first = tl.minimum(tl.maximum(start, 0), positions).to(tl.int32)
        rows = tl.maximum(tl.minimum(tl.maximum(stop, 0), positions).to(tl.int32) - first, 0)
        if cfg.LIVE:
            lo = tl.minimum(tl.maximum(tl.load(index_ptr), 0), positions).to(tl.int32)
            hi = tl.minimum(tl.maximum(tl.load(index_ptr + G), 0), positions).to(tl.int32)
            for i in range(lo, hi, 1024):
                p = i + tl.arange(0, 1024)
                mark(live_ptr, slots_ptr, p, p < hi, R)
    return list_entries(table_ptr, cap, 0, g, first, rows, cfg.BT)


@triton.jit
def list_all(index_ptr, slots_ptr, experts_ptr, posted_ptr, table_ptr, live_ptr, positions, G, R, cap, block_m, cfg: tl.constexpr):
    """The expert table. block_m: entries of a block of the routed layout, rows that a group is aligned to of psum's."""
    if cfg.LIVE:
        clear(live_ptr, R, 0)
        tl.debug_barrier()
    if cfg.KIND == ROUTED:
        found = routed_entries(slots_ptr, experts_ptr, posted_ptr, table_ptr, live_ptr, positions, G, R, cap, block_m, cfg)
    elif cfg.KIND == CONTIGUOUS:
        found = contiguous_entries(index_ptr, table_ptr, positions, G, cap, cfg.BT)
    else:
        found = group_entries(index_ptr, slots_ptr, table_ptr, live_ptr, positions, G, R, cap, block_m, cfg)
    tl.store(table_ptr, tl.minimum(found, cap))


@triton.jit
def offset_of(row, positions, group_stride, stride, cfg: tl.constexpr):
    """Of a row of A, or of its scales: groups of a masked A lie as they lie."""
    if cfg.KIND == MASKED:
        return row // positions * group_stride + row % positions * stride
    else:
        return row * stride


@triton.jit
def in_use(index_ptr, g, positions):
    """Rows of group g of a masked A that may be asked for, its first ones."""
    return tl.minimum(tl.load(index_ptr + g).to(tl.int32), positions)


@triton.jit
def least_shift(top, bottom):
    """What brings codes between LOW and HIGH, the upper end first: `top` and `bottom` are their ends."""
    return tl.where(top > HIGH, top - HIGH, tl.where(bottom < LOW, tl.maximum(bottom - LOW, top - HIGH), 0))


@triton.jit
def row_shift(xs_ptr, K, ssk, cfg: tl.constexpr):
    """(shift of the scale codes of the row at xs_ptr, whether one is NaN): the least that brings them between LOW and HIGH, the upper
    end first. A large one would let sums overflow on the way to a result that does not."""
    top = tl.full([], 0, tl.int32)
    bottom = tl.full([], 255, tl.int32)
    nan = tl.full([], 0, tl.int32)
    count = (K + cfg.GROUP - 1) // cfg.GROUP
    for i in range(0, count, 256):
        o = i + tl.arange(0, 256)
        code = tl.load(xs_ptr + o * ssk, mask=o < count, other=127).to(tl.int32)
        nan = tl.maximum(nan, tl.max((code == 255).to(tl.int32), 0))
        top = tl.maximum(top, tl.max(tl.where((code == 255) | (o >= count), 0, code), 0))
        bottom = tl.minimum(bottom, tl.min(tl.where(o < count, code, 255), 0))
    return least_shift(top, bottom), nan


@triton.jit
def power_of_two(e):
    """FP32 2^e for e in [-149, 127]."""
    e = tl.minimum(tl.maximum(e, -149), 127)
    bits = tl.where(e >= -126, (e + 127) << 23, 1 << tl.minimum(tl.maximum(e + 149, 0), 22))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def element(x_ptr, base, k, K, cfg: tl.constexpr):
    """FP32 payload of columns k of a row at `base`."""
    if cfg.XKIND == E2M1:
        byte = tl.load(x_ptr + base + k // 2, mask=k < K, other=0).to(tl.int32)
        code = (byte >> (k % 2 * 4)) & 15
        m = code & 7
        # E2M1 magnitudes: 0, 0.5, 1, 1.5, 2, 3, 4, 6
        low = m.to(tl.float32) * 0.5
        high = ((m & 1) + 2).to(tl.float32) * tl.where(m >= 6, 2.0, 1.0)
        v = tl.where(m < 4, low, high)
        return tl.where(code >= 8, -v, v)
    else:
        return tl.load(x_ptr + base + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def rest_of(x):
    """What BF16 leaves of FP16 values, held in FP32: exact in BF16, since it has three bits at most; 0 of infinities and NaN."""
    rest = x - x.to(tl.bfloat16).to(tl.float32)
    return tl.where((x == x) & (x < float("inf")) & (x > float("-inf")), rest, 0.0)


@triton.jit
def bring_row(x_ptr, xs_ptr, xp_ptr, xfactor_ptr, row, part, K, KX, ssk, cfg: tl.constexpr):
    """BK columns of a row of A to BF16, K in the order of the expanded weights; part 0 leaves what the row is multiplied by.

    xfactor_ptr: a factor a row; PLAIN_FP8: the scales as they are, [rows, KX / 128]; FP16: what BF16 leaves, as xp_ptr."""
    pair = part * (cfg.BK // 2) + tl.arange(0, cfg.BK // 2)
    # out[m * 8 + q * 2 + r] = in[q * 32 + m * 2 + r] of every 128
    k = pair // 64 * 128 + pair % 4 * 32 + pair % 64 // 4 * 2
    lo = element(x_ptr, 0, k, K, cfg)
    hi = element(x_ptr, 0, k + 1, K, cfg)
    if cfg.XKIND == PLAIN_FP8:
        if part == 0:
            for i in range(0, KX // 128, 64):
                o = i + tl.arange(0, 64)
                scale = tl.load(xs_ptr + o * ssk, mask=o < (K + 127) // 128, other=0.0)
                tl.store(xfactor_ptr + row * (KX // 128) + o, scale, mask=o < KX // 128)
    elif cfg.XKIND == FP16:
        at = 2 * pair[:, None] + tl.arange(0, 2)[None, :]
        tl.store(xfactor_ptr + row * KX + at, tl.join(rest_of(lo).to(tl.bfloat16), rest_of(hi).to(tl.bfloat16)), mask=at < KX)
    elif cfg.XKIND > 0:
        shift, nan = row_shift(xs_ptr, K, ssk, cfg)
        code = tl.load(xs_ptr + k // cfg.GROUP * ssk, mask=k < K, other=127).to(tl.int32)
        scale = power_of_two(code - shift - 127)
        lo *= scale
        hi *= scale
        if part == 0:
            tl.store(xfactor_ptr + row, tl.where(nan > 0, float("nan"), power_of_two(shift)))
    both = tl.join(lo.to(tl.bfloat16), hi.to(tl.bfloat16))
    at = 2 * pair[:, None] + tl.arange(0, 2)[None, :]
    tl.store(xp_ptr + at, both, mask=at < KX)


@triton.jit
def bring_any(x_ptr, xs_ptr, xp_ptr, xfactor_ptr, row, part, K, KX, ssk, cfg: tl.constexpr):
    """A piece of row `row`, which is at x_ptr, to where it goes."""
    if cfg.XKIND == TWO_ORDER:
        bring_two_of_row(x_ptr, xp_ptr + row * 2 * KX, xfactor_ptr + row, part, K, KX, cfg)
    else:
        bring_row(x_ptr, xs_ptr, xp_ptr + row * KX, xfactor_ptr, row, part, K, KX, ssk, cfg)


@triton.jit(do_not_specialize=["each", "K", "sxg", "ssg", "ssm", "ssk", "G", "R", "positions", "block_m", "cap", "counters"])
def narrow_prep_kernel(x_ptr, xs_ptr, xp_ptr, xfactor_ptr, index_ptr, slots_ptr, experts_ptr, posted_ptr, table_ptr, count_ptr,
                       live_ptr, each, K, KX, sxg, sxm, ssg, ssm, ssk, G, R, positions, block_m, cap, counters, cfg: tl.constexpr):
    """positions: of the layout (masked: rows a group can hold); R: slots; each: programs that share a group's rows (masked; others: one
    a row); counters: int32 to be zeroed; sxg, sxm: strides of A's groups (masked) and rows, ssg, ssm, ssk: of its scales."""
    if cfg.PDL:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    if pid == 0:
        clear(count_ptr, counters, 0)
        list_all(index_ptr, slots_ptr, experts_ptr, posted_ptr, table_ptr, live_ptr, positions, G, R, cap, block_m, cfg)
    else:
        pieces = (KX + cfg.BK - 1) // cfg.BK
        at = ((pid - 1) // pieces).to(tl.int64)
        part = (pid - 1) % pieces
        if cfg.KIND == MASKED:
            g = at // each
            for r in range((at % each).to(tl.int32), in_use(index_ptr, g, positions), each):
                row = g * positions + r
                bring_any(x_ptr + offset_of(row, positions, sxg, sxm, cfg), xs_ptr + offset_of(row, positions, ssg, ssm, cfg),
                          xp_ptr, xfactor_ptr, row, part, K, KX, ssk, cfg)
        else:
            bring_any(x_ptr + at * sxm, xs_ptr + at * ssm, xp_ptr, xfactor_ptr, at, part, K, KX, ssk, cfg)


@triton.jit(do_not_specialize=["TOP_K"])
def narrow_combine_kernel(y_ptr, live_ptr, add_ptr, out_ptr, N, TOP_K, sam, som, BN: tl.constexpr, ADD: tl.constexpr,
                          PDL: tl.constexpr):
    """out[t] = sum over j in order of y[t * TOP_K + j], slots that no expert computed left out, + add[t]. y FP32 [slots, N]."""
    pieces = (N + BN - 1) // BN
    t = (tl.program_id(0) // pieces).to(tl.int64)
    n = tl.program_id(0) % pieces * BN + tl.arange(0, BN)
    if PDL:
        gdc_wait()
    acc = tl.zeros([BN], tl.float32)
    for j in range(TOP_K):
        live = tl.load(live_ptr + t * TOP_K + j) > 0
        acc += tl.load(y_ptr + (t * TOP_K + j) * N + n, mask=(n < N) & live, other=0.0)
    if ADD:
        acc += tl.load(add_ptr + t * sam + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * som + n, acc.to(out_ptr.dtype.element_ty), mask=n < N)
