"""Device code of the Hopper FP8 product of folded MXFP8 by folded MXFP8, on tiles of 128 rows by any multiple of 16 columns up to 192.

    out[m, n] = (sum over picks of (A[m, pick] * rest[n, pick]) + sum over K blocks of (A[m, kb] . B[g, n, kb]) * sa[m, kb]) * s[g, n]

What `fold_mixed_device.py` computes on 128 x 256, for problems whose tiles of another width fill the SMs' last round. Two consumers have 64
rows each, and all columns of a tile as one wgmma, so what a flag of 64 rows says concerns one of them only; the other keeps the tensor
cores busy during a promotion. Weights are packed for tiles of 256 rows, of which a tile here meets two: boxes that reach beyond one bring
zeros for the other's rows.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import cluster_device as cluster
from .fold_mixed_device import STEP, column_of, flag, flags_of
from .fold_both_wide_device import feed_wide, load_weights, multiply_wide, pass_on, sum_wide
from .fp8_block_parts_device import ROW_OF_FLOATS, advance, promote, store_zeros
from .fp8_block_schedule_device import DENSE, OFFSETS, first_tile, fresh, has_products, is_live, next_tile, total_tiles
from .fp8_cluster_device import prepare, start_piece, store_tile
from .fp8_cluster_feed_device import barriers, has_rows, idle, own_tile
from .shim import view_rows
from .wgmma_device import keep, multiply_part, wait

PACKED = gl.constexpr(256)      # rows of weights that share picks


# ---------------------------------------------------------------- picks
@gluon.jit
def picks_of(at_ptr, n, g, N, cfg: gl.constexpr):
    """(the first column of picks of a tile, where those of the next 256 rows of weights start, their end, the first 256 rows)."""
    tiles = gl.cdiv(N, PACKED)
    low = n * cfg.BN // PACKED
    high = gl.minimum(n * cfg.BN + (cfg.BN - 1), N - 1) // PACKED
    at_ptr += g * (tiles + 1)
    return gl.load(at_ptr + low), gl.load(at_ptr + low + 1), gl.load(at_ptr + high + 1), low


@gluon.jit
def load_picks(p_desc, of_b: gl.constexpr, b_desc, full, slot, column, row, at, rows, cfg: gl.constexpr):
    """64 columns of picks, from `column` and `row` on, and what they are multiplied by, from `at` on: of_b: which parameter its descriptor
    is."""
    KERNEL: gl.constexpr = cfg.KERNEL
    bar = full + slot * 8
    if rows:
        cluster.expect(bar, (cfg.BM + cfg.BN) * 128)
        to = full - cfg.BARS_AT + (cfg.A_AT + slot * (cfg.BM * 128))
        cluster.load_rows(p_desc, KERNEL, 28, (column, row), bar, to)
        cluster.load_rows(p_desc, KERNEL, 28, (column, row + 64), bar, to + 64 * 128)
    else:
        cluster.expect(bar, cfg.BN * 128)
    load_weights(b_desc, of_b, full, slot, at, cfg)


# ---------------------------------------------------------------- the ring
@gluon.jit
def load_block(descs, full, slot, at, kb, rows, cfg: gl.constexpr):
    """`rows`: whether this block of a cluster needs any of A."""
    a_desc, sa_desc, b_desc = descs
    row, group, column = at
    KERNEL: gl.constexpr = cfg.KERNEL
    start = full - cfg.BARS_AT
    bar = full + slot * 8
    if rows:
        cluster.expect(bar, cfg.BLOCK_BYTES)
    else:
        cluster.expect(bar, cfg.BN * 128)
    load_weights(b_desc, 14, full, slot, (group, column, kb * 128), cfg)
    if rows:
        cluster.load(a_desc, KERNEL, 0, (group * 0, row, kb * 128), bar, start + (cfg.A_AT + slot * (cfg.BM * 128)), 1)
        cluster.load(sa_desc, KERNEL, 7, (group * 0, kb * 4, row), bar, start + (cfg.SA_AT + slot * (cfg.SUB * cfg.BM * 4)), 1)


@gluon.jit
def feed(descs, picks, slot, phase, bars, tile, own, rows, problem, at_ptr, of_weights, removed, cfg: gl.constexpr):
    """A tile's picks, columns that are left out of A, and K blocks: (slot, phase)."""
    index_ptr, M, N, KB, G, alignment = problem
    p_desc, r_desc, o_desc = picks
    full, empty = bars
    n, g, first, end, stop = tile
    row = own[2]
    if cfg.LAYOUT == OFFSETS:
        row = column_of(row, stop, g)
    begin, middle, last, low = picks_of(at_ptr, n, g, N, cfg)
    plane = g * gl.cdiv(N, PACKED) + low
    n0 = n * cfg.BN - low * PACKED
    for column in range(begin, last, STEP):
        cluster.wait(empty + slot * 8, phase, 1)
        beyond = (column >= middle).to(gl.int32)
        at = (plane + beyond, n0 - beyond * PACKED, column - gl.where(beyond == 1, middle, begin))
        load_picks(p_desc, 21, r_desc, full, slot, column, row, at, rows, cfg)
        slot, phase = advance(slot, phase, cfg.STAGES)
    for k in range(0, removed, STEP):
        cluster.wait(empty + slot * 8, phase, 1)
        load_picks(p_desc, 33, o_desc, full, slot, of_weights + k, row, (g, n * cfg.BN, k), rows, cfg)
        slot, phase = advance(slot, phase, cfg.STAGES)
    for kb in range(0, KB):
        cluster.wait(empty + slot * 8, phase, 1)
        load_block(descs, full, slot, (own[2], g, n * cfg.BN), kb, rows, cfg)
        slot, phase = advance(slot, phase, cfg.STAGES)
    return slot, phase


@gluon.jit
def producer(wide, descs, picks, table, problem, at_ptr, of_weights, removed, cfg: gl.constexpr, WIDE: gl.constexpr):
    """WIDE: `wide`, A and weights in BF16, instead of all else."""
    index_ptr, M, N, KB, G, alignment = problem
    UNIT: gl.constexpr = cfg.UNIT
    bars = barriers(cfg)
    cluster.wait_all(cfg.CLUSTER)
    work = (index_ptr, table, M, N, KB, G, alignment, total_tiles(table, M, N, UNIT, 1, G, alignment))
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    cursor, tile = first_tile(work, UNIT, 1)
    n, g, first, end, stop = tile
    while n >= 0:
        here = (n, g, first, end, stop)
        cursor, ahead = next_tile(cursor, here, work, UNIT, 1)
        if has_products(here, cfg):
            own = own_tile(here, cfg)
            rows = has_rows(own, M, cfg, 0)
            if WIDE:
                slot, phase = feed_wide(wide, slot, phase, bars, here, own, rows, KB, cfg)
            else:
                slot, phase = feed(descs, picks, slot, phase, bars, here, own, rows, problem, at_ptr, of_weights, removed, cfg)
        n, g, first, end, stop = ahead
    cluster.wait_all(cfg.CLUSTER)      # what the other block still sends, it sends to one that is there


# ---------------------------------------------------------------- sums
@gluon.jit
def scale_of(sa_v, slot, part: gl.constexpr, cfg: gl.constexpr, WM: gl.constexpr, mma: gl.constexpr):
    return sa_v.index(slot * (cfg.SUB * 2) + (cfg.SA_AT // 256 + part * 2 + WM)).load(gl.SliceLayout(1, mma))


@gluon.jit
def promoted(acc, p, s, cfg: gl.constexpr):
    NP: gl.constexpr = cfg.NP
    sums = ()
    for i in gl.static_range(NP):
        sums = sums + (promote(acc[i], p[i], s), )
    return keep(sums, NP, cfg.WN)


@gluon.jit
def last_of_block(acc, p, slot, ahead, phase, more, sa_v, bars, part: gl.constexpr, cfg: gl.constexpr, WM: gl.constexpr, mma: gl.constexpr):
    """What is behind a block's last wgmma: the slot is released in front of the promotion, and the next one waited for behind it."""
    full, empty = bars
    s = scale_of(sa_v, slot, part, cfg, WM, mma)
    missing = more & (1 - cluster.ready(full + ahead * 8, phase))
    p = wait(p, cfg.NP, cfg.WN)
    # loads of s may be on their way: each warp arrives behind its own, in order (`landed_device`); waiting for them first takes 3-4%
    cluster.arrive(empty + slot * 8, cfg.CLUSTER)
    acc = promoted(acc, p, s, cfg)
    cluster.wait(full + ahead * 8, phase, missing)
    return acc, p


@gluon.jit
def step(acc, p, up, slot, ahead, phase, more, sa_v, bars, cfg: gl.constexpr, WM: gl.constexpr, mma: gl.constexpr):
    """acc += one K block, whose slot is full. Every branch works out its own addresses: `fold_mixed_device.step`."""
    NP: gl.constexpr = cfg.NP
    if up == 0:
        slot = fresh(slot)
        p = start_piece(slot, p, cfg, WM, 0, mma, 0, NP)
        acc, p = last_of_block(acc, p, slot, ahead, phase, more, sa_v, bars, 0, cfg, WM, mma)
    else:
        slot = fresh(slot)
        at = cluster.start_of_shared()
        a = at + (slot * (cfg.BM * 128) + (cfg.A_AT + WM * 64 * 128))
        b = at + (slot * (cfg.B_ROWS * 128) + cfg.B_AT)
        for part in gl.static_range(4):
            goes_on = up * 0
            if part > 0:
                goes_on = 1 - ((up >> (part - 1)) & 1)
            p = multiply_part(a + part * 32, b + part * 32, goes_on, p, NP, cfg.WN, mma)
            if part == 3:
                acc, p = last_of_block(acc, p, slot, ahead, phase, more, sa_v, bars, part, cfg, WM, mma)
            else:
                p = wait(p, NP, cfg.WN)
                if ((up >> part) & 1) == 1:
                    acc = promoted(acc, p, scale_of(sa_v, slot, part, cfg, WM, mma), cfg)
    return acc, p


@gluon.jit
def sum_blocks(acc, p, slot, phase, bars, steps, sa_v, flags_ptr, own, M, KB, RB, cfg: gl.constexpr, WM: gl.constexpr, mma: gl.constexpr):
    """Sums after `steps` slots of columns in BF16 and all K blocks: (sums, what wgmma left, slot, phase)."""
    full, empty = bars
    f = flags_of(flags_ptr, own, M, KB, RB, WM, cfg)
    up = flag(f, slot * 0, cfg)
    acc, slot, phase = multiply_wide(acc, slot, phase, bars, steps, cfg, WM, mma, True)
    cluster.wait(full + slot * 8, phase, 1)
    for kb in range(0, KB):
        up_ahead = flag(f, gl.minimum(kb + 1, KB - 1), cfg)
        ahead, phase = advance(slot, phase, cfg.STAGES)
        acc, p = step(acc, p, up, slot, ahead, phase, (kb + 1 < KB).to(gl.int32), sa_v, bars, cfg, WM, mma)
        slot = ahead
        up = up_ahead
    return acc, p, slot, phase


@gluon.jit
def consumer(d_desc, out, scales, factor_ptr, ring, d_s, table, problem, flags_ptr, RB, at_ptr, removed, cfg: gl.constexpr, WM: gl.constexpr,
             WIDE: gl.constexpr):
    """Rows [WM * 64, +64) of every tile. WIDE: sums of what is in BF16, whose rows have factors."""
    index_ptr, M, N, KB, G, alignment = problem
    UNIT: gl.constexpr = cfg.UNIT
    NP: gl.constexpr = cfg.NP
    COLS: gl.constexpr = cfg.WN
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.WN, 32])
    full, empty = barriers(cfg)
    empty = cluster.everywhere(empty, cfg.CLUSTER)
    bars = (full, empty)
    cluster.wait_all(cfg.CLUSTER)
    sa_v = view_rows(ring, gl.float32, cfg.BARS_AT // 256, 64, ROW_OF_FLOATS)
    total = total_tiles(table, M, N, UNIT, 4, G, alignment)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    zero = gl.zeros([64, COLS], gl.float32, mma)
    zeros = ()
    for i in gl.static_range(NP):
        zeros = zeros + (zero, )
    p = zeros
    cursor, tile = first_tile((index_ptr, table, M, N, KB, G, alignment, total), UNIT, 4)
    live = is_live(tile)
    while live:
        work = (index_ptr, table, fresh(M), fresh(N), KB, fresh(G), alignment, total)
        own = own_tile(tile, cfg)
        if has_products(tile, cfg):
            steps = KB      # slots beside those of K blocks, or as many in BF16
            if not WIDE:
                begin, middle, last, low = picks_of(at_ptr, tile[0], tile[1], N, cfg)
                steps = (last - begin) // STEP + (removed + (STEP - 1)) // STEP
            if has_rows(own, M, cfg, WM * 64):
                if WIDE:
                    acc, slot, phase = sum_wide(zeros, slot, phase, bars, factor_ptr, own, M, KB, cfg, WM, mma)
                else:
                    acc, p, slot, phase = sum_blocks(zeros, p, slot, phase, bars, steps, sa_v, flags_ptr, own, M, KB, RB, cfg, WM, mma)
                store_tile(acc, scales, d_s, d_desc, out, problem, own, cfg, WM, 0, mma, NP)
            else:
                slot, phase = pass_on(slot, phase, bars, steps + KB, cfg)
        elif cfg.ZERO and cfg.LAYOUT != DENSE:
            store_zeros(out, own, own[2] + WM * 64, own[0] * cfg.BN, N, cfg)
        cursor, tile = next_tile(cursor, tile, work, UNIT, 4)
        live = is_live(tile)
    tma.store_wait(0)
    cluster.wait_all(cfg.CLUSTER)


# ---------------------------------------------------------------- the kernel
@gluon.jit
def producer_of(whole, wide, descs, picks, table, problem, at_ptr, of_weights, removed, cfg: gl.constexpr):
    if cfg.WHOLE:
        if whole == 0:      # what is mostly done stands first
            producer(wide, descs, picks, table, problem, at_ptr, of_weights, removed, cfg, False)
        else:
            producer(wide, descs, picks, table, problem, at_ptr, of_weights, removed, cfg, True)
    else:
        producer(wide, descs, picks, table, problem, at_ptr, of_weights, removed, cfg, False)


@gluon.jit
def consumer_of(whole, wide, d_desc, out, scales, ring, d_s, table, problem, flags_ptr, RB, at_ptr, removed, cfg: gl.constexpr, WM: gl.constexpr):
    factor_ptr, of_columns = wide
    if cfg.WHOLE:
        if whole == 0:
            consumer(d_desc, out, scales, factor_ptr, ring, d_s, table, problem, flags_ptr, RB, at_ptr, removed, cfg, WM, False)
        else:
            consumer(d_desc, out, of_columns, factor_ptr, ring, d_s, table, problem, flags_ptr, RB, at_ptr, removed, cfg, WM, True)
    else:
        consumer(d_desc, out, scales, factor_ptr, ring, d_s, table, problem, flags_ptr, RB, at_ptr, removed, cfg, WM, False)


@gluon.jit(do_not_specialize=["M", "KB", "RB", "G", "alignment", "limit", "of_weights"])
def fold_both_product_kernel(a_desc, sa_desc, b_desc, r_desc, p_desc, o_desc, aw_desc, bw_desc, d_desc, out_ptr, top_ptr, own_ptr, factor_ptr,
                             index_ptr, flags_ptr, count_ptr, at_ptr, M, N, KB, RB, G, alignment, limit, of_weights, om, cfg: gl.constexpr):
    """A persistent grid, of clusters. a_desc [1, M, K], sa_desc [1, KB * 4, M], b_desc [G, N, K] E4M3, r_desc BF16 [G * tiles of 256, 256, columns], p_desc
    BF16 [columns of picks, rows of A as `column_of` places them], d_desc [M, N]; flags int32 [RB, KB]; top [G, N]; at int32 [G, tiles of
    256 + 1], the first column of the picks of 256 rows of weights, a multiple of 64 each. N is a multiple of 256. Where more than `limit` flags
    are up, as count_ptr says, nothing is done or, WHOLE, all in BF16: aw_desc [1, M, K], bw_desc [G, N, K], factors FP32 [M], and own [G, N]
    instead of top."""
    gdc_wait()
    gdc_launch_dependents()
    whole = (gl.load(count_ptr) > limit).to(gl.int32)
    if not cfg.WHOLE:
        M = gl.where(whole == 0, M, 0)
    removed = gl.load(count_ptr + 1)
    ring, d_s, table = prepare(out_ptr, index_ptr, M, G, alignment, cfg)
    problem = (index_ptr, M, N, KB, G, alignment)
    scales = (top_ptr, 0, 0, 0, top_ptr, N, top_ptr, 0)
    out = (out_ptr, 0, om, 0)
    descs = (a_desc, sa_desc, b_desc)
    picks = (p_desc, r_desc, o_desc)
    wide = (aw_desc, bw_desc)
    factors = (factor_ptr, (own_ptr, 0, 0, 0, own_ptr, N, own_ptr, 0))
    if cfg.CLUSTER == 1:
        gl.warp_specialize([
            (consumer_of, (whole, factors, d_desc, out, scales, ring, d_s, table, problem, flags_ptr, RB, at_ptr, removed, cfg, 0)),
            (consumer_of, (whole, factors, d_desc, out, scales, ring, d_s, table, problem, flags_ptr, RB, at_ptr, removed, cfg, 1)),
            (producer_of, (whole, wide, descs, picks, table, problem, at_ptr, of_weights, removed, cfg)),
        ], [4, 1], [cfg.CONSUMER_REGISTERS, cfg.PRODUCER_REGISTERS])
    else:       # the wait for a cluster is for every warp there is
        gl.warp_specialize([
            (consumer_of, (whole, factors, d_desc, out, scales, ring, d_s, table, problem, flags_ptr, RB, at_ptr, removed, cfg, 0)),
            (consumer_of, (whole, factors, d_desc, out, scales, ring, d_s, table, problem, flags_ptr, RB, at_ptr, removed, cfg, 1)),
            (idle, (cfg, )),
            (producer_of, (whole, wide, descs, picks, table, problem, at_ptr, of_weights, removed, cfg)),
            (idle, (cfg, )),
        ], [4, 2, 1, 1], [cfg.CONSUMER_REGISTERS, cfg.PRODUCER_REGISTERS, cfg.PRODUCER_REGISTERS, cfg.PRODUCER_REGISTERS])
