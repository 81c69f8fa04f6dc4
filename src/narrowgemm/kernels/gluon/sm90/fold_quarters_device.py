"""Masked groups by tiles of 256x128, and by parts of such: halves of 128 rows, or quarters of 128 rows and 64 columns, in the Hopper kernel
with folded weights.

A group's last rows, where they fill half of a tile or less, are parts, and so are whole tiles of a last round that leaves blocks idle,
where that takes less time; which parts, is a matter of rounds, too. The device knows the sizes of groups, so every block finds the best of
these by itself. What it works on is known before it starts: a list in shared memory, so that no registers are held, and nothing is divided,
between tiles.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .fp8_block_device import store_tile
from .fp8_block_parts_device import FP8_TILE, ROW_OF_FLOATS, advance, column_scales, multiply, promote, read_a_scale, scale_bases, store_piece
from .fp8_block_schedule_device import ROW_OF_INTS, clip, fresh, strip_order
from .fp8_block_sums_device import sum_pieces
from .landed_device import landed
from .shim import block_barrier, view_as, view_rows

ITEM_FIELDS = gl.constexpr(4)        # of an item: (n << 2 | kind) or -1, group, first row, end of the group's rows
WHOLE = gl.constexpr(0)
HALF = gl.constexpr(1)
QUARTER = gl.constexpr(2)
# times of a whole tile, a half, a quarter: `fold.py` has the same
WHOLE_TIME = gl.constexpr(50)
HALF_TIME = gl.constexpr(38)
QUARTER_TIME = gl.constexpr(26)


@gluon.jit
def last_round(parts, more, left, blocks, TIME: gl.constexpr, BESIDE: gl.constexpr):
    """(time of the parts of tails and of `left` whole tiles, whether these are in parts, too, `more` of them); BESIDE: parts in the time of a
    whole tile."""
    apart = (parts + more + blocks - 1) // blocks * TIME
    beside = (gl.maximum(parts - BESIDE * (blocks - left), 0) + blocks - 1) // blocks * TIME + WHOLE_TIME
    return gl.where((left > 0) & (beside <= apart), beside, apart), (left > 0) & (apart < beside)


@gluon.jit
def make_items(items, index_ptr, M, N, G, cfg: gl.constexpr):
    """This block's items, in order: its whole tiles, then its parts of such. Blocks that have a whole tile less than others begin with parts
    for its time. By the block's first four warps, a thread an item, which meet afterwards."""
    COUNT: gl.constexpr = cfg.ITEMS
    ROWS: gl.constexpr = cfg.BM // 2
    GROUPS: gl.constexpr = cfg.LISTED
    # of each group: its rows, and of whole tiles and tails those before it and with it
    rows = ()
    wholes = (G * 0, )
    tails = (G * 0, )
    for g in gl.static_range(GROUPS):
        size = clip(gl.load(index_ptr + g, mask=g < G, other=0), M)
        rest = size % cfg.BM
        rows = rows + (size, )
        wholes = wholes + (wholes[g] + size // cfg.BM + (rest > ROWS).to(gl.int32), )
        tails = tails + (tails[g] + ((rest > 0) & (rest <= ROWS)).to(gl.int32), )
    num_n = gl.cdiv(N, cfg.BN)
    num_q = gl.cdiv(N, cfg.BN // 2)
    total = wholes[GROUPS] * num_n
    blocks = gl.num_programs(0)
    pid = gl.program_id(0)
    left = total % blocks
    halves, half_cut = last_round(tails[GROUPS] * num_n, 2 * left, left, blocks, HALF_TIME, 1)
    quarters, quarter_cut = last_round(tails[GROUPS] * num_q, 4 * left, left, blocks, QUARTER_TIME, 2)
    small = quarters < halves       # whether parts are quarters
    kept = gl.where(gl.where(small, quarter_cut, half_cut), total - left, total)
    busy = kept % blocks            # blocks that have a whole tile more than the others
    free = blocks - busy
    shift = small.to(gl.int32)
    shares = shift + 1              # parts in its time
    num_p = gl.where(small, num_q, num_n)
    parts = tails[GROUPS] * num_p

    i = gl.arange(0, COUNT, gl.BlockedLayout([1], [32], [4], [0]))
    mine = gl.maximum(kept - pid + blocks - 1, 0) // blocks
    j = i - mine + shares * (pid < busy).to(gl.int32)
    s = gl.where(j < shares, pid - busy + j * free, shares * free + pid + (j - shares) * blocks)
    is_whole = i < mine
    is_tail = (i >= mine) & (s < parts)
    cut = s - parts                 # number of the part, of those of whole tiles
    live = is_whole | (s < parts + 2 * shares * (total - kept))
    t = gl.where(is_whole, pid + i * blocks, kept + (cut >> (shift + 1)))
    u = gl.where(is_tail, s // num_p, t // num_n)
    group = i * 0
    first = group
    beyond = group
    end = group
    for g in gl.static_range(GROUPS):
        before = gl.where(is_tail, tails[g], wholes[g])
        after = gl.where(is_tail, tails[g + 1], wholes[g + 1])
        hit = (u >= before) & (u < after)
        group = gl.where(hit, g, group)
        first = gl.where(hit, before, first)
        beyond = gl.where(hit, after, beyond)
        end = gl.where(hit, rows[g], end)
    m, n = strip_order(t - first * num_n, beyond - first, num_n, cfg.STRIP)
    m = gl.where(is_tail, end // cfg.BM, m)
    lower = gl.where(is_whole | is_tail, 0, (cut >> shift) & 1)
    n = gl.where(is_tail, s - u * num_p, gl.where(is_whole, n, shares * n + (cut & (shares - 1))))
    kind = gl.where(is_whole, WHOLE, gl.where(small, QUARTER, HALF))
    items.index(0).store(gl.where(live, 4 * n + kind, -1).to(gl.int32))
    items.index(1).store(group.to(gl.int32))
    items.index(2).store((m * cfg.BM + lower * ROWS).to(gl.int32))
    items.index(3).store(end.to(gl.int32))
    block_barrier()


@gluon.jit
def item(items, i, cfg: gl.constexpr, WARPS: gl.constexpr):
    """(n block or -1 where there is none, group, first row, end, kind); n counts 64 columns of a quarter."""
    lay: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    v = view_rows(items, gl.int32, ITEM_FIELDS * cfg.ITEMS, 1, ROW_OF_INTS)
    n = gl.max(v.index(i).load(lay), 0)
    g = gl.max(v.index(cfg.ITEMS + i).load(lay), 0)
    first = gl.max(v.index(2 * cfg.ITEMS + i).load(lay), 0)
    return n >> 2, g, first, gl.max(v.index(3 * cfg.ITEMS + i).load(lay), 0), n & 3


@gluon.jit
def all_of_k(slot, phase, views, bars, problem, scales, tile, cfg: gl.constexpr, WM: gl.constexpr, mma: gl.constexpr, PIECES: gl.constexpr):
    """The first PIECES pieces of a tile: (sums, slot, phase)."""
    full, empty = bars
    COLS: gl.constexpr = cfg.WN
    COUNT: gl.constexpr = cfg.MP
    zero = gl.zeros([64, COLS], gl.float32, mma)
    acc = ()
    for i in gl.static_range(COUNT):
        acc = acc + (zero, )
    bases = scale_bases(scales, tile, problem[2], cfg, WM, 0)
    mbarrier.wait(full.index(slot), phase)
    p = multiply(views[0], views[1], slot, zero, cfg, WM, 0, 0)
    acc, last, sa, sb, slot, phase = sum_pieces(acc, p, (), (), slot, phase, views, bars, problem, bases, scales, tile, cfg, WM, 0, mma, PIECES)
    return acc, slot, phase


@gluon.jit
def quarter_sums(slot, phase, KB, views, bars, cfg: gl.constexpr, WM: gl.constexpr, mma: gl.constexpr):
    """64 rows x 64 columns over all of K."""
    a_v, b_v, sa_v = views
    full, empty = bars
    acc = gl.zeros([64, 64], gl.float32, mma)
    p = acc
    for kb in range(KB):
        mbarrier.wait(full.index(slot), phase)
        a = a_v.index(slot * (cfg.WGM * cfg.MP) + WM)
        p = warpgroup_mma(a, b_v.index(slot * cfg.UNITS).permute((1, 0)), p, use_acc=False, is_async=True)
        sa = read_a_scale(sa_v, slot, cfg, WM, 0, gl.SliceLayout(1, mma))
        sa = landed(sa, slot, 2, 1)     # here, what waits for it waits for the product, too
        p = warpgroup_mma_wait(0, deps=(p, ))
        mbarrier.arrive(empty.index(slot), count=1)
        acc = promote(acc, p, sa)
        slot, phase = advance(slot, phase, cfg.STAGES)
    return acc, slot, phase


@gluon.jit
def store_part(x, scales, d_s, d_desc, out, problem, tile, cfg: gl.constexpr, WM: gl.constexpr, mma: gl.constexpr):
    """A warpgroup's 64 rows of a half or a quarter."""
    of_columns = (column_scales(scales, tile, tile[0] * cfg.BN, cfg, mma), )
    store_piece(x, 0, of_columns, d_s, d_desc, out, problem, tile, tile[2] + WM * 64, cfg, WM, 0, mma, 1, cfg.BN)


@gluon.jit
def consumer(d_desc, out, scales, rings, d_s, bars, items, problem, cfg: gl.constexpr, WM: gl.constexpr):
    """Rows [WM * 64, +64) of both halves of every tile, and of every quarter."""
    a_s, sa_s, b_s = rings
    full, empty = bars
    index_ptr, M, N, KB, G, alignment = problem
    NARROW: gl.constexpr = cfg.QUARTER
    MP: gl.constexpr = cfg.MP
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.WN, 32])
    small: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    a_v = view_as(a_s, gl.float8e4nv, cfg.STAGES * cfg.WGM * MP, 64, 128, FP8_TILE)
    b_v = view_as(b_s, gl.float8e4nv, cfg.STAGES, cfg.WN, 128, FP8_TILE)
    units_v = view_as(b_s, gl.float8e4nv, cfg.STAGES * cfg.UNITS, 64, 128, FP8_TILE)
    sa_v = view_rows(sa_s, gl.float32, cfg.STAGES * cfg.WGM * MP, 64, ROW_OF_FLOATS)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    views = (a_v, b_v, sa_v)
    i = gl.to_tensor(0)
    tile = item(items, i, cfg, 4)
    while tile[0] >= 0:
        slot = fresh(slot)
        whole = (tile[0], tile[1], tile[2], tile[3], tile[4] * 0)
        problem = (index_ptr, fresh(M), fresh(N), KB, fresh(G), alignment)
        if tile[4] == WHOLE:
            acc, slot, phase = all_of_k(slot, phase, views, bars, problem, scales, whole, cfg, WM, mma, MP)
            store_tile(acc, scales, d_s, d_desc, out, problem, whole, cfg, WM, 0, mma)
        elif tile[4] == HALF:
            acc, slot, phase = all_of_k(slot, phase, views, bars, problem, scales, whole, cfg, WM, mma, 1)
            store_part(acc[0], scales, d_s, d_desc, out, problem, whole, cfg, WM, mma)
        else:
            one, slot, phase = quarter_sums(slot, phase, KB, (a_v, units_v, sa_v), bars, cfg, WM, small)
            store_part(one, scales, d_s, d_desc, out, problem, whole, NARROW, WM, small)
        i += 1
        tile = item(items, i, cfg, 4)
    tma.store_wait(0)
