"""Device code of a gated FP8 product on Hopper: rows of groups by offsets, gate and up, SwiGLU, quantised for the product behind.

    out[m, i], scale[m, i / 128] = quantise(silu(gate) * up)    gate, up = rows i and I + i of B

The kernel on clusters (`fp8_cluster_device.py`) with another store. Gate and up of a result are in one thread: B's rows come to shared
memory as 64 of gate, 64 of up, twice, and a warpgroup multiplies one such pair. Of the 128 results that share a scale each
warpgroup has half, so the two tell each other the largest of each row, through shared memory and one barrier a tile.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from . import cluster_device as cluster
from .fp8_block_parts_device import ROW_OF_FLOATS, advance, of_lane, row_masks, store_part
from .fp8_block_schedule_device import first_tile, fresh, is_live, next_tile, total_tiles
from .fp8_cluster_device import BYTES, start_piece, sum_block
from .fp8_cluster_feed_device import barriers, has_rows, idle, own_tile
from .fp8_cluster_scales_device import load_b_scales
from .fp8_gated_values_device import activated, announce, magnitudes, narrowed, put_rows, scales_of, take_rows
from .ring_device import groups_table
from .shim import view_as, view_rows


# ---------------------------------------------------------------- producer
@gluon.jit
def load_block(descs, full, slot, at, kb, cfg: gl.constexpr):
    """K block kb into a slot."""
    a_desc, sa_desc, b_desc = descs
    a_row, group, result, inter = at
    KERNEL: gl.constexpr = cfg.KERNEL
    start = full - cfg.BARS_AT
    bar = full + slot * 8
    zero = slot * 0
    share = gl.to_tensor(0)
    if cfg.CLUSTER_N > 1:
        share = cluster.rank() * cfg.A_BOX
    cluster.expect(bar, cfg.BLOCK_BYTES)
    for half in gl.static_range(2):
        to = start + (cfg.B_AT + (slot * cfg.B_ROWS + half * 2 * cfg.B_BOX) * 128)
        row = result + half * cfg.B_BOX
        cluster.load(b_desc, KERNEL, cfg.B_PARAMETER, (group, row, kb * 128), bar, to, 1)
        cluster.load(b_desc, KERNEL, cfg.B_PARAMETER, (group, row + inter, kb * 128), bar, to + cfg.B_BOX * 128, 1)
    cluster.load(a_desc, KERNEL, 0, (zero, a_row + share, kb * 128), bar, start + (cfg.A_AT + (slot * cfg.BM + share) * 128),
                 cfg.CLUSTER_N)
    cluster.load_rows(sa_desc, KERNEL, cfg.SA_PARAMETER, (kb, a_row), bar, start + (cfg.SA_AT + slot * (cfg.BM * 4)))


@gluon.jit
def producer(descs, table, problem, cfg: gl.constexpr):
    index_ptr, M, N, KB, G, alignment = problem
    UNIT: gl.constexpr = cfg.UNIT
    full, empty = barriers(cfg)
    cluster.wait_all(cfg.CLUSTER)
    work = (index_ptr, table, M, N, KB, G, alignment, total_tiles(table, M, N, UNIT, 1))
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    cursor, tile = first_tile(work, UNIT, 1)
    n, g, first, end, stop = tile
    while n >= 0:
        own = own_tile((n, g, first, end, stop), cfg)
        at = (own[2], g, own[0] * (cfg.BN // 2), N // 2)
        # one that is alone looks the next tile up once the ring is full, as `fp8_cluster_feed_device.producer` does
        head = KB * 0
        if cfg.CLUSTER == 1:
            head = gl.minimum(KB, cfg.STAGES)
            for kb in range(0, head):
                cluster.wait(empty + slot * 8, phase, 1)
                load_block(descs, full, slot, at, kb, cfg)
                slot, phase = advance(slot, phase, cfg.STAGES)
        cursor, ahead = next_tile(cursor, (n, g, first, end, stop), work, UNIT, 1)
        for kb in range(head, KB):
            cluster.wait(empty + slot * 8, phase, 1)
            load_block(descs, full, slot, at, kb, cfg)
            slot, phase = advance(slot, phase, cfg.STAGES)
        n, g, first, end, stop = ahead
    cluster.wait_all(cfg.CLUSTER)


# ---------------------------------------------------------------- consumers
@gluon.jit
def scale_bases(scales, own, N, cfg: gl.constexpr):
    """Where the scales of gate's block and of up's start, of the tile's 128 results; and which of the two each tensor has."""
    sb_ptr, sbg, sbn, sbk = scales
    n, g, first, end, stop = own
    blocks = N // 256
    block = of_lane(gl.minimum(gl.maximum(n, 0), blocks - 1))
    base = sb_ptr + g.to(gl.int64) * sbg
    return (base + block.to(gl.int64) * sbn, base + (block + blocks).to(gl.int64) * sbn), (gl.to_tensor(0), gl.to_tensor(1))


@gluon.jit
def store_tile(acc, out, d_s, d_desc, problem, own, parity, cfg: gl.constexpr, WN: gl.constexpr, mma: gl.constexpr):
    """SwiGLU of a warpgroup's 128 rows x 64 results, quantised with the other's maxima."""
    index_ptr, M, N, KB, G, alignment = problem
    out_ptr, om, scale_ptr, ss, clamp, alpha, limit = out
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    MP: gl.constexpr = cfg.MP
    start = cluster.start_of_shared()
    r = gl.arange(0, 64, rows)
    at = start + (cfg.MAXIMA_AT + parity * (2 * cfg.BM * 4))
    results = ()
    largest = ()
    for m in gl.static_range(MP):
        y = activated(acc[2 * m], acc[2 * m + 1], alpha, limit, cfg.CLAMPED)
        bits = magnitudes(y)
        put_rows(at + ((WN * cfg.BM + m * 64 + r) * 4), bits)
        results = results + (y, )
        largest = largest + (bits, )
    met = start + cfg.MET_AT
    announce(met)
    cluster.wait(met, parity, 1)
    col0 = own[0] * (cfg.BN // 2) + WN * cfg.WN
    to = (out_ptr, 0, om, 0)
    tma.store_wait(0)
    for m in gl.static_range(MP):
        row0 = own[2] + m * 64
        bits = gl.maximum(largest[m], take_rows(at + (((1 - WN) * cfg.BM + m * 64 + r) * 4)))
        scale, inverse = scales_of(bits, clamp)
        if WN == 0:
            row = row0 + fresh(r)
            mine, written = row_masks(index_ptr, row, G, own, cfg)
            gl.store(scale_ptr + (own[0].to(gl.int64) * ss + row), scale, mask=mine & (col0 < N // 2))
        x = narrowed(results[m], inverse, out_ptr.dtype.element_ty)
        buf = d_s.index(WN * cfg.OUT_BUFFERS + m)
        store_part(x, buf, d_desc, to, index_ptr, own, row0, col0, M, N // 2, G, cfg)


@gluon.jit
def one_tile(p, sb, slot, phase, feed, to, parity, cfg: gl.constexpr, WN: gl.constexpr, mma: gl.constexpr):
    """All K blocks of a tile whose first piece has been started, and its store: (slot, phase) behind them."""
    sa_v, bars, KB, M, base, bases, scales, own = feed
    out, d_s, d_desc, problem, own = to
    acc, p, sa, sb, slot, phase = sum_block((), p, (), sb, slot, phase, KB * 0, sa_v, bars, KB, M, base, bases, scales, own, cfg, 0, WN,
                                            mma, True, 2)
    for kb in range(1, KB):
        acc, p, sa, sb, slot, phase = sum_block(acc, p, sa, sb, slot, phase, kb, sa_v, bars, KB, M, base, bases, scales, own, cfg, 0, WN,
                                                mma, False, 2)
    store_tile(acc, out, d_s, d_desc, problem, own, parity, cfg, WN, mma)
    return slot, phase


@gluon.jit
def consumer(d_desc, out, scales, ring, d_s, table, problem, cfg: gl.constexpr, WN: gl.constexpr):
    """128 rows, and gate and up of 64 results, of its block's part of every tile."""
    index_ptr, M, N, KB, G, alignment = problem
    UNIT: gl.constexpr = cfg.UNIT
    COLS: gl.constexpr = cfg.WN
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.WN, 32])
    full, empty = barriers(cfg)
    empty = cluster.everywhere(empty, cfg.CLUSTER)
    bars = (full, empty)
    cluster.wait_all(cfg.CLUSTER)
    sa_v = view_rows(ring, gl.float32, cfg.BARS_AT // 256, 64, ROW_OF_FLOATS)
    work = (index_ptr, table, M, N, KB, G, alignment, total_tiles(table, M, N, UNIT, 4, G, alignment))
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    parity = gl.to_tensor(0)
    zero = gl.zeros([64, COLS], gl.float32, mma)
    sums = (zero, zero)
    all_scales = (scales[0], 0, 0, 0, scales[0], scales[1], scales[2], scales[3])     # A's come by TMA
    cursor, tile = first_tile(work, UNIT, 4)
    live = is_live(tile)
    while live:
        work = (index_ptr, table, fresh(M), fresh(N), KB, fresh(G), alignment, work[7])
        own = own_tile(tile, cfg)
        bases = scale_bases(scales, own, N, cfg)
        sb = load_b_scales(bases, all_scales, slot * 0, cfg)
        if has_rows(own, M, cfg, 0):
            cluster.wait(full + slot * 8, phase, 1)
            p = start_piece(slot, sums, cfg, 0, WN, mma, 0, 2)
            cursor, ahead = next_tile(cursor, tile, work, UNIT, 4)
            feed = (sa_v, bars, KB, M, scales[0], bases, all_scales, own)
            to = (out, d_s, d_desc, problem, own)
            slot, phase = one_tile(p, sb, slot, phase, feed, to, parity, cfg, WN, mma)
            parity = parity ^ 1
        else:
            cursor, ahead = next_tile(cursor, tile, work, UNIT, 4)
            for kb in range(0, KB):
                cluster.wait(full + slot * 8, phase, 1)
                cluster.arrive(empty + slot * 8, cfg.CLUSTER)
                slot, phase = advance(slot, phase, cfg.STAGES)
        tile = ahead
        live = is_live(tile)
    tma.store_wait(0)
    cluster.wait_all(cfg.CLUSTER)


# ---------------------------------------------------------------- kernel
@gluon.jit
def prepare(out_ptr, index_ptr, M, G, cfg: gl.constexpr):
    """Shared memory (ring, staging of the store, maxima, table of groups), with barriers ready."""
    UNIT: gl.constexpr = cfg.UNIT
    staging: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, cfg.OUT_COLS], out_ptr.dtype.element_ty)
    ring = gl.allocate_shared_memory(gl.int8, [cfg.RING_ROWS, 128], BYTES)
    d_s = view_as(ring, out_ptr.dtype.element_ty, 2 * cfg.OUT_BUFFERS, 64, cfg.OUT_COLS, staging)
    full, empty = barriers(cfg)
    STAGES: gl.constexpr = cfg.STAGES
    for i in gl.static_range(STAGES):
        cluster.init(full + 8 * i, 1)
        cluster.init(empty + 8 * i, cfg.CLUSTER * 8)
    cluster.init(cluster.start_of_shared() + cfg.MET_AT, 8)
    return ring, d_s, groups_table(ring, index_ptr, M, G, 1, UNIT)


@gluon.jit(do_not_specialize=["M", "KB", "G", "alignment", "sbg", "sbn", "ss"])
def fp8_gated_kernel(a_desc, sa_desc, b_desc, d_desc, out_ptr, scale_ptr, sb_ptr, index_ptr, M, N, KB, G, alignment, sbg, sbn, sbk, om, ss,
                     clamp, alpha, limit, cfg: gl.constexpr):
    """A persistent grid of clusters. N: columns of gate and up together; scale_ptr: MN-major scales, ss apart a block."""
    ring, d_s, table = prepare(out_ptr, index_ptr, M, G, cfg)
    problem = (index_ptr, M, N, KB, G, alignment)
    scales = (sb_ptr, sbg, sbn, sbk)
    out = (out_ptr, om, scale_ptr, ss, clamp, alpha, limit)
    gl.warp_specialize([
        (consumer, (d_desc, out, scales, ring, d_s, table, problem, cfg, 0)),
        (consumer, (d_desc, out, scales, ring, d_s, table, problem, cfg, 1)),
        (idle, (cfg, )),
        (producer, ((a_desc, sa_desc, b_desc), table, problem, cfg)),
        (idle, (cfg, )),
    ], [4, 2, 1, 1], [cfg.CONSUMER_REGISTERS, cfg.PRODUCER_REGISTERS, cfg.PRODUCER_REGISTERS, cfg.PRODUCER_REGISTERS])
