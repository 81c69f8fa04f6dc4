"""Device code of the Hopper FP8 prefill kernel on clusters: a block's part of a tile, and its K blocks into the ring."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import cluster_device as cluster
from .counters_device import await_count
from .fp8_block_parts_device import advance
from .fp8_block_schedule_device import CONTIGUOUS, DENSE, MASKED, first_tile, has_products, next_tile, total_tiles


# ---------------------------------------------------------------- one block of a cluster
@gluon.jit
def own_tile(tile, cfg: gl.constexpr):
    """This block's part of its cluster's tile. Past the last tile: n = -1 in both."""
    n, g, first, end, stop = tile
    if cfg.CLUSTER_M > 1:
        first += cluster.rank() * cfg.BM
    if cfg.CLUSTER_N > 1:
        n = gl.where(n < 0, -1, n * cfg.CLUSTER_N + cluster.rank())
    return n, g, first, end, stop


@gluon.jit
def has_rows(own, M, cfg: gl.constexpr, FROM: gl.constexpr):
    """Whether any row of this block's part from row FROM of it on may be the group's. A block without any only passes on what the
    other needs, a warpgroup without any leaves the tensor cores to the other."""
    if cfg.LAYOUT == DENSE or cfg.LAYOUT == CONTIGUOUS:
        return own[2] + FROM < M
    else:
        return own[2] + FROM < own[3]


# ---------------------------------------------------------------- the ring: [staging of the store][A][B][A's scales][barriers]
@gluon.jit
def barriers(cfg: gl.constexpr):
    """Addresses of (full, empty), a barrier a slot each."""
    full = cluster.start_of_shared() + cfg.BARS_AT
    return full, full + cfg.STAGES * 8


@gluon.jit
def load_block(descs, full, slot, at, kb, rows, cfg: gl.constexpr):
    """K block kb into a slot; `rows`: whether this block needs any of A."""
    a_desc, sa_desc, b_desc = descs
    a_plane, a_row, b_plane, b_row, sa_row, sa_col = at
    SKIPS: gl.constexpr = cfg.CLUSTER_M > 1
    KERNEL: gl.constexpr = cfg.KERNEL
    start = full - cfg.BARS_AT
    bar = full + slot * 8
    a_share = gl.to_tensor(0)
    b_share = gl.to_tensor(0)
    if cfg.CLUSTER_N > 1:
        a_share = cluster.rank() * cfg.A_BOX
    if cfg.CLUSTER_M > 1:
        b_share = cluster.rank() * cfg.B_BOX
    if SKIPS:
        cluster.expect(bar, gl.where(rows, cfg.BLOCK_BYTES, cfg.BN * 128))
    else:
        cluster.expect(bar, cfg.BLOCK_BYTES)
    cluster.load(b_desc, KERNEL, cfg.B_PARAMETER, (b_plane, b_row + b_share, kb * 128), bar,
                 start + (cfg.B_AT + (slot * cfg.B_ROWS + b_share) * 128), cfg.CLUSTER_M)
    if not SKIPS or rows:
        cluster.load(a_desc, KERNEL, 0, (a_plane, a_row + a_share, kb * 128), bar, start + (cfg.A_AT + (slot * cfg.BM + a_share) * 128),
                     cfg.CLUSTER_N)
        if cfg.A_SCALE_TMA:
            cluster.load_rows(sa_desc, KERNEL, cfg.SA_PARAMETER, (sa_row + kb, sa_col), bar,
                              start + (cfg.SA_AT + slot * (cfg.BM * 4)))


@gluon.jit
def producer(descs, table, problem, sa_pitch, cfg: gl.constexpr, sync_ptr=None, NT=0):
    """sync_ptr, NT: where the weights of groups to come are expanded meanwhile, see `fold_whole_device.py`."""
    index_ptr, M, N, KB, G, alignment = problem
    UNIT: gl.constexpr = cfg.UNIT
    full, empty = barriers(cfg)
    cluster.wait_all(cfg.CLUSTER)
    work = (index_ptr, table, M, N, KB, G, alignment, total_tiles(table, M, N, UNIT, 1, G, alignment))
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    made = gl.to_tensor(-1)     # the group whose weights are known to be there
    cursor, tile = first_tile(work, UNIT, 1)
    n, g, first, end, stop = tile
    while n >= 0:
        own = own_tile((n, g, first, end, stop), cfg)
        a_plane = g * 0
        if cfg.LAYOUT == MASKED:
            a_plane = g
        at = (a_plane, own[2], g, own[0] * cfg.STEP, a_plane * sa_pitch, own[2])
        rows = has_rows(own, M, cfg, 0)
        run = has_products((n, g, first, end, stop), cfg)
        head = KB * 0
        if cfg.CLUSTER == 1 and cfg.LAYOUT != DENSE:
            if run:
                head = gl.minimum(KB, cfg.STAGES)
                for kb in range(0, head):
                    cluster.wait(empty + slot * 8, phase, 1)
                    load_block(descs, full, slot, at, kb, rows, cfg)
                    slot, phase = advance(slot, phase, cfg.STAGES)
        # the next tile is looked up before this one's last loads, so that its own are off the path between two tiles; of groups, and by
        # a block that is alone, once the ring is full, not in front of its first tile
        cursor, ahead = next_tile(cursor, (n, g, first, end, stop), work, UNIT, 1)
        if run:
            if cfg.PIECE > 0:
                if g != made:
                    await_count(sync_ptr + 1 + g, NT * 4 * ((KB + cfg.PIECE - 1) // cfg.PIECE))
                    made = g
            for kb in range(head, KB):
                cluster.wait(empty + slot * 8, phase, 1)
                load_block(descs, full, slot, at, kb, rows, cfg)
                slot, phase = advance(slot, phase, cfg.STAGES)
        n, g, first, end, stop = ahead
    cluster.wait_all(cfg.CLUSTER)      # what the other block still sends, it sends to one that is there


@gluon.jit
def idle(cfg: gl.constexpr):
    cluster.wait_all(cfg.CLUSTER)
    cluster.wait_all(cfg.CLUSTER)
