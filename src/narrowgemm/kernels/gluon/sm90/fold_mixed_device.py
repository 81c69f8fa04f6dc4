"""Device code of the Hopper FP8 product with folded weights and MXFP8 activations: dense, contiguous, offsets, psum, masked.

    out[m, n] (+)= (sum over K blocks of  (A[m, kb] . B[g, n, kb]) * sa[m, kb]) * s[g, n]

As the FP8 kernel on 128 x 256 tiles (`fp8_block_device.py`): two consumers share A's 128 rows, each with two pieces of 64 x 128, one
partial sum. Of 64 rows whose flag is up, a K block of A has more than one scale a row, each for some times 32 of K: the flag says behind
which of these they change, and the sum is promoted there. That is decided by piece and block, on the device; elsewhere there is one step.

PICKS: of weights that came as MXFP8, some elements are left out of B. For each tile of 256 rows of them there are up to a few hundred
columns of K that hold such elements: those columns of A come in BF16, one behind the other, and the elements likewise. Their products
are what the sums of a tile begin with.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .fp8_block_device import store_tile
from .fp8_block_parts_device import FP8_PLANE, FP8_TILE, ROW_OF_FLOATS, advance, fence, promote, read_a_scale, store_zeros
from .fp8_block_schedule_device import DENSE, MASKED, OFFSETS, first_tile, fresh, has_products, is_live, next_tile, total_tiles
from .fp8_block_sums_device import before
from .ring_device import feed, fill_blocks, groups_table, ring_barriers, store_buffers
from .shim import tma_load, view_as, view_boxes, view_rows

PICK_TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
REST_PLANE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3))
STEP = gl.constexpr(64)     # columns of picks that take a slot of the ring


@gluon.jit
def column_of(r, start, g):
    """Where row r of A has its picks, of a group that starts at row `start`: the group's first row, down to a multiple of four, lies on
    16 bytes, and the 64 rows that any of a group's lie among don't meet another group's."""
    return r + (start & 4) + 128 * g


@gluon.jit
def picks_of(at_ptr, n, g, N, cfg: gl.constexpr):
    """(the first column of picks of a tile of weights, their end)."""
    at_ptr += g * (gl.cdiv(N, cfg.BN) + 1) + n
    return gl.load(at_ptr), gl.load(at_ptr + 1)


@gluon.jit
def load_picks(descs, rings, bar, slot, at, cfg: gl.constexpr):
    """64 columns of picks, and what they are multiplied by. at: first column, the same within the tile, column of A's first row, group and
    first row of weights."""
    p_desc, r_desc = descs
    a_s, sa_s, b_s = rings
    column, k, row, group, n = at
    S: gl.constexpr = cfg.STAGES
    mbarrier.expect(bar, (cfg.BM + cfg.BN) * 128)
    p_v = view_as(a_s, gl.bfloat16, S * 2, 64, STEP, PICK_TILE)
    tma_load(p_desc, [column, row], bar, p_v.index(slot * 2))
    tma_load(p_desc, [column, row + 64], bar, p_v.index(slot * 2 + 1))
    tma_load(r_desc, [group, n, k], bar, view_boxes(b_s, gl.bfloat16, S, 256, STEP, REST_PLANE).index(slot))


@gluon.jit
def fill_with_picks(load: gl.constexpr, operands, tile, at, slot, phase, bars, problem, cfg: gl.constexpr):
    """As `fill_blocks`, behind the tile's picks."""
    descs, rings, picks, at_ptr, outlying = operands
    o_desc, of_weights, removed = outlying
    full, empty = bars
    n, g, first, end, stop = tile
    row = first
    if cfg.LAYOUT == OFFSETS:
        row = column_of(first, stop, g)
    begin, last = picks_of(at_ptr, n, g, problem[2], cfg)
    for column in range(begin, last, STEP):
        mbarrier.wait(empty.index(slot), phase)
        load_picks(picks, rings, full.index(slot), slot, (column, column - begin, row, g, n * cfg.BN), cfg)
        slot, phase = advance(slot, phase, cfg.STAGES)
    for k in range(0, removed, STEP):
        mbarrier.wait(empty.index(slot), phase)
        load_picks((picks[0], o_desc), rings, full.index(slot), slot, (of_weights + k, k, row, g, n * cfg.BN), cfg)
        slot, phase = advance(slot, phase, cfg.STAGES)
    return fill_blocks(load, (descs, rings), tile, at, slot, phase, bars, problem, cfg)


@gluon.jit
def multiply_picks(x, y, rings, bars, slot, phase, tile, N, at_ptr, removed, cfg: gl.constexpr, WN: gl.constexpr, mma: gl.constexpr):
    """Sums of both pieces after the tile's picks: (x, y, slot, phase)."""
    a_s, sa_s, b_s = rings
    full, empty = bars
    S: gl.constexpr = cfg.STAGES
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    p_v = view_as(a_s, gl.bfloat16, S * 2, 64, STEP, PICK_TILE)
    r_v = view_as(b_s, gl.bfloat16, S * 2, 128, STEP, PICK_TILE)
    begin, last = picks_of(at_ptr, tile[0], tile[1], N, cfg)
    x = gl.convert_layout(x, narrow, assert_trivial=True)
    y = gl.convert_layout(y, narrow, assert_trivial=True)
    for column in range(begin, last + (removed + (STEP - 1)) // STEP * STEP, STEP):
        mbarrier.wait(full.index(slot), phase)
        slot = fresh(slot)
        rest = r_v.index(slot * 2 + WN).permute((1, 0))
        x = warpgroup_mma(p_v.index(slot * 2).permute((1, 0)), rest, x, use_acc=True, is_async=True)
        y = warpgroup_mma(p_v.index(slot * 2 + 1).permute((1, 0)), rest, y, use_acc=True, is_async=True)
        x, y = warpgroup_mma_wait(0, deps=(x, y))
        mbarrier.arrive(empty.index(slot), count=1)
        slot, phase = advance(slot, phase, S)
    return gl.convert_layout(x, mma, assert_trivial=True), gl.convert_layout(y, mma, assert_trivial=True), slot, phase


@gluon.jit
def load_block(descs, rings, bar, slot, at, kb, cfg: gl.constexpr):
    a_desc, sa_desc, b_desc = descs
    a_s, sa_s, b_s = rings
    plane, row, group, column = at
    mbarrier.expect(bar, cfg.BLOCK_BYTES)
    tma_load(a_desc, [plane, row, kb * 128], bar, a_s.index(slot))
    tma_load(b_desc, [group, column, kb * 128], bar, b_s.index(slot))
    tma_load(sa_desc, [plane, kb * 4, row], bar, sa_s.index(slot))


@gluon.jit
def producer(descs, picks, rings, bars, table, problem, at_ptr, outlying, cfg: gl.constexpr):
    if cfg.PICKS:
        feed(fill_with_picks, load_block, (descs, rings, picks, at_ptr, outlying), bars, table, problem, cfg)
    else:
        feed(fill_blocks, load_block, (descs, rings), bars, table, problem, cfg)


@gluon.jit
def flags_of(flags_ptr, tile, M, KB, RB, i: gl.constexpr, cfg: gl.constexpr):
    """Where the flags of a piece's 64 rows lie, K blocks following each other: those of its first row and of its last."""
    n, g, first, end, stop = tile
    at = gl.minimum(first + i * 64, M - 1)
    last = gl.minimum(first + i * 64 + 63, M - 1)
    if cfg.LAYOUT == MASKED:
        flags_ptr += g * RB * KB
    return flags_ptr + at // 64 * KB, flags_ptr + last // 64 * KB


@gluon.jit
def flag(pointers, kb, cfg: gl.constexpr):
    up = gl.load(pointers[0] + kb)
    if cfg.LAYOUT == OFFSETS or cfg.LAYOUT > OFFSETS:
        if cfg.LAYOUT != MASKED:        # groups start at any row
            up = up | gl.load(pointers[1] + kb)
    return up


@gluon.jit
def multiply(a_v, b_v, slot, p, WN: gl.constexpr, i: gl.constexpr):
    """Start p = A . B^T of one K block; p comes in only to keep its registers."""
    return warpgroup_mma(a_v.index(slot * 2 + i), b_v.index(slot * 2 + WN).permute((1, 0)), p, use_acc=False, is_async=True)


@gluon.jit
def multiply_part(a_v, b_v, slot, p, goes_on, WN: gl.constexpr, i: gl.constexpr, PART: gl.constexpr):
    """The same of 32 of K; p += where it `goes_on`."""
    a = a_v.index(slot * 2 + i).slice(PART * 32, 32, 1)
    b = b_v.index(slot * 2 + WN).slice(PART * 32, 32, 1)
    return warpgroup_mma(a, b.permute((1, 0)), p, use_acc=goes_on, is_async=True)


@gluon.jit
def step(acc, p, up, views, bars, slot, ahead, phase, more, cfg: gl.constexpr, WN: gl.constexpr, i: gl.constexpr, mma: gl.constexpr):
    """acc += one K block of piece i. The slot before is released once a wgmma of this one is on its way, and the next one is waited for
    while the last one runs: between two wgmma are the FMAs and little else.

    Every branch works out its own addresses: the ptxas of Triton 3.6 takes descriptors of piece 1 from piece 0's branch of one step,
    whether that ran or not."""
    a_v, b_v, sa_v = views
    full, empty = bars
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    if up == 0:
        slot = fresh(slot)
        p = multiply(a_v, b_v, slot, p, WN, i)
        if i == 0:
            mbarrier.arrive(empty.index(before(slot, cfg)), count=1, pred=more[0])
        s = read_a_scale(sa_v, slot, cfg, 0, i, rows, 0)
        if i == 1:
            mbarrier.wait(full.index(ahead), phase, pred=more[1])
        p = warpgroup_mma_wait(0, deps=(p, ))
        acc, p = fence(0, promote(acc, p, s), p)
    else:
        acc, p = step_in_parts(acc, p, up, views, bars, fresh(slot), ahead, phase, more, cfg, WN, i, mma)
    return acc, p


@gluon.jit
def step_in_parts(acc, p, up, views, bars, slot, ahead, phase, more, cfg: gl.constexpr, WN: gl.constexpr, i: gl.constexpr,
                  mma: gl.constexpr):
    """The same where scales of A change inside of the block: the sum so far is promoted behind each 32 of K whose bit of `up` is set."""
    a_v, b_v, sa_v = views
    full, empty = bars
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    for part in gl.static_range(4):
        goes_on = False
        if part > 0:
            goes_on = ((up >> (part - 1)) & 1) == 0
        p = multiply_part(a_v, b_v, slot, p, goes_on, WN, i, part)
        if i == 0 and part == 0:
            mbarrier.arrive(empty.index(before(slot, cfg)), count=1, pred=more[0])
        if part == 3:
            s = read_a_scale(sa_v, slot, cfg, 0, i, rows, part)
            if i == 1:
                mbarrier.wait(full.index(ahead), phase, pred=more[1])
            p = warpgroup_mma_wait(0, deps=(p, ))
            acc, p = fence(0, promote(acc, p, s), p)
        else:
            p = warpgroup_mma_wait(0, deps=(p, ))
            if ((up >> part) & 1) == 1:
                s = read_a_scale(sa_v, slot, cfg, 0, i, rows, part)
                acc, p = fence(0, promote(acc, p, s), p)
    return acc, p


@gluon.jit
def consumer(d_desc, out, scales, rings, d_s, bars, table, problem, flags_ptr, RB, at_ptr, removed, cfg: gl.constexpr, WN: gl.constexpr):
    """128 rows and columns [WN * 128, +128) of every tile."""
    a_s, sa_s, b_s = rings
    full, empty = bars
    index_ptr, M, N, KB, G, alignment = problem
    S: gl.constexpr = cfg.STAGES
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    a_v = view_as(a_s, gl.float8e4nv, S * 2, 64, 128, FP8_TILE)
    b_v = view_as(b_s, gl.float8e4nv, S * 2, 128, 128, FP8_TILE)
    sa_v = view_rows(sa_s, gl.float32, S * 8, 64, ROW_OF_FLOATS)
    views = (a_v, b_v, sa_v)
    total = total_tiles(table, M, N, cfg, 4)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    cursor, tile = first_tile((index_ptr, table, M, N, KB, G, alignment, total), cfg, 4)
    p = gl.zeros([64, 128], gl.float32, mma)
    live = is_live(tile)
    while live:
        work = (index_ptr, table, fresh(M), fresh(N), KB, fresh(G), alignment, total)
        if has_products(tile, cfg):
            f0 = flags_of(flags_ptr, tile, M, KB, RB, 0, cfg)
            f1 = flags_of(flags_ptr, tile, M, KB, RB, 1, cfg)
            up0 = flag(f0, slot * 0, cfg)
            up1 = flag(f1, slot * 0, cfg)
            x = gl.zeros([64, 128], gl.float32, mma)
            y = gl.zeros([64, 128], gl.float32, mma)
            if cfg.PICKS:
                x, y, slot, phase = multiply_picks(x, y, rings, bars, slot, phase, tile, N, at_ptr, removed, cfg, WN, mma)
            mbarrier.wait(full.index(slot), phase)
            for kb in range(KB):
                next_kb = gl.minimum(kb + 1, KB - 1)
                ahead0 = flag(f0, next_kb, cfg)
                ahead1 = flag(f1, next_kb, cfg)
                ahead, phase = advance(slot, phase, S)
                more = (kb > 0, kb + 1 < KB)
                x, p = step(x, p, up0, views, bars, slot, ahead, phase, more, cfg, WN, 0, mma)
                y, p = step(y, p, up1, views, bars, slot, ahead, phase, more, cfg, WN, 1, mma)
                slot = ahead
                up0 = ahead0
                up1 = ahead1
            mbarrier.arrive(empty.index(before(slot, cfg)), count=1)
            store_tile((x, y), scales, d_s, d_desc, out, problem, tile, cfg, 0, WN, mma)
        elif cfg.ZERO and cfg.LAYOUT != DENSE:
            store_zeros(out, tile, tile[2], tile[0] * cfg.BN + WN * 128, N, cfg)
        cursor, tile = next_tile(cursor, tile, work, cfg, 4)
        live = is_live(tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "KB", "RB", "G", "alignment", "limit", "rows_of_b", "of_weights", "out_pitch"])
def fold_mixed_product_kernel(a_desc, sa_desc, b_desc, d_desc, p_desc, r_desc, o_desc, out_ptr, top_ptr, factor_ptr, index_ptr, flags_ptr,
                              count_ptr, at_ptr, M, N, KB, RB, G, alignment, limit, rows_of_b, of_weights, og, om, out_pitch,
                              cfg: gl.constexpr):
    """A persistent grid. M: rows of A, or rows a group can hold (masked). a_desc [1 or G, M, K], sa_desc [1 or G, KB * 4, M], b_desc
    [1 or G, rows_of_b, K] E4M3, d_desc [M, N]; flags int32 [1 or G, RB, KB]; top, factor [G, rows_of_b]. Nothing is done where
    more than `limit` flags are up, as count_ptr says. out_pitch: rows of d_desc from one group to the next (masked).

    PICKS: p_desc BF16 [columns of picks, rows of A as `column_of` places them], r_desc BF16 [1 or G, rows_of_b, columns of a tile], at
    int32 [1 or G, tiles of weights + 1], the first column of a tile's picks, a multiple of 64 each; None elsewhere. Columns that
    are left out of A, as many as count_ptr's second number says, lie in p_desc from of_weights on, o_desc BF16 [1 or G, rows_of_b, columns]."""
    gdc_wait()
    gdc_launch_dependents()
    removed = gl.to_tensor(0)
    if cfg.PICKS:
        removed = gl.load(count_ptr + 1)
    M = gl.where(gl.load(count_ptr) <= limit, M, 0)
    S: gl.constexpr = cfg.STAGES
    a_s = gl.allocate_shared_memory(gl.float8e4nv, [S, 1, 128, 128], FP8_PLANE)
    b_s = gl.allocate_shared_memory(gl.float8e4nv, [S, 1, 256, 128], FP8_PLANE)
    d_s = store_buffers(out_ptr, cfg)
    sa_s = gl.allocate_shared_memory(gl.float32, [S, 1, 4, 128], sa_desc.layout)
    bars = ring_barriers(S, 1, 2)
    table = groups_table(bars[0], index_ptr, M, G, alignment, cfg)

    problem = (index_ptr, M, N, KB, G, alignment)
    scales = (top_ptr, 0, 0, 0, top_ptr, rows_of_b, factor_ptr, 0)
    out = (out_ptr, og, om, out_pitch)
    rings = (a_s, sa_s, b_s)
    gl.warp_specialize([
        (consumer, (d_desc, out, scales, rings, d_s, bars, table, problem, flags_ptr, RB, at_ptr, removed, cfg, 0)),
        (consumer, (d_desc, out, scales, rings, d_s, bars, table, problem, flags_ptr, RB, at_ptr, removed, cfg, 1)),
        (producer, ((a_desc, sa_desc, b_desc), (p_desc, r_desc), rings, bars, table, problem, at_ptr, (o_desc, of_weights, removed), cfg)),
    ], [4, 1], [cfg.CONSUMER_REGISTERS, cfg.PRODUCER_REGISTERS])
