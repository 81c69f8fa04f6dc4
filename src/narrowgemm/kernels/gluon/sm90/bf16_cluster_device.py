"""Device code of Hopper's dense BF16 product on clusters.

    out[m, n] = (sum over k of A[m, k] . B[n, k]) * sa[m] * sb[n]

What `bf16_device.py` computes. Blocks of a cluster have tiles one below the other, and what all of them need of B comes from L2 once and
to all by multicast: a long product is held by power, and bytes through L2 are what it can save.

    warps                does, for every tile of its cluster
    producer (1)         TMA of A and of its share of B into the rings of shared memory of all blocks
    consumer (2 x 4)     wgmma of 64 rows by all columns over a K block, one beside the next; release of the slot before; stores
    idle (3)             are at the waits for the cluster, which is for every warp there is

Tiles of the last round, where there are so few that each may be cut in two, are: half the columns, half the time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from . import cluster_device as cluster
from .expand_rows_device import SHIFTED
from .fp8_block_parts_device import advance, store_piece
from .fp8_block_schedule_device import fresh, strip_order
from .fp8_cluster_device import prepare
from .fp8_cluster_feed_device import barriers, idle
from .wgmma_device import multiply_bf16, wait, wait_for

BLOCK = gl.constexpr(64)


# ---------------------------------------------------------------- tiles
@gluon.jit
def tiles(M, N, cfg: gl.constexpr):
    """(tiles of all columns, tiles at all): behind the former, those that are cut in two."""
    every = gl.cdiv(M, cfg.BM * cfg.CLUSTER) * gl.cdiv(N, cfg.BN)
    clusters = gl.num_programs(0) // cfg.CLUSTER
    left = every % clusters
    cut = gl.where(2 * left <= clusters, left, 0)
    return every - cut, every + cut


@gluon.jit
def place_of(t, whole, M, N, cfg: gl.constexpr):
    """(first row of this block's part, first column, 1 where it is half as wide) of tile t."""
    beyond = gl.maximum(t - whole, 0)
    m, n = strip_order(gl.minimum(t, whole) + beyond // 2, gl.cdiv(M, cfg.BM * cfg.CLUSTER), gl.cdiv(N, cfg.BN), cfg.STRIP)
    return (m * cfg.CLUSTER + cluster.rank()) * cfg.BM, n * cfg.BN + beyond % 2 * (cfg.BN // 2), (t >= whole).to(gl.int32)


# ---------------------------------------------------------------- the ring
@gluon.jit
def load_block(a_desc, b_desc, B: gl.constexpr, full, slot, row, column, kb, cfg: gl.constexpr, COLS: gl.constexpr):
    """K block kb into a slot: rows of A, and COLS of B, whose descriptor is parameter B, of which the cluster's blocks bring a share each."""
    KERNEL: gl.constexpr = cfg.KERNEL
    start = full - cfg.BARS_AT
    bar = full + slot * 8
    plane = kb * 0
    share = cluster.rank() * (COLS // cfg.CLUSTER)
    cluster.expect(bar, (cfg.BM + COLS) * 128)
    cluster.load(b_desc, KERNEL, B, (plane, column + share, kb * BLOCK), bar, start + (cfg.B_AT + (slot * cfg.BN + share) * 128), cfg.CLUSTER)
    cluster.load(a_desc, KERNEL, 0, (plane, row, kb * BLOCK), bar, start + (cfg.A_AT + slot * (cfg.BM * 128)), 1)


@gluon.jit
def producer(descs, M, N, KB, cfg: gl.constexpr):
    a_desc, b_desc, half_desc = descs
    full, empty = barriers(cfg)
    cluster.wait_all(cfg.CLUSTER)
    whole, total = tiles(M, N, cfg)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    for t in range(gl.program_id(0) // cfg.CLUSTER, total, gl.num_programs(0) // cfg.CLUSTER):
        row, column, narrow = place_of(t, whole, M, N, cfg)
        for kb in range(0, KB):
            cluster.wait(empty + slot * 8, phase, 1)
            if narrow == 0:
                load_block(a_desc, b_desc, 7, full, slot, row, column, kb, cfg, cfg.BN)
            else:
                load_block(a_desc, half_desc, 14, full, slot, row, column, kb, cfg, cfg.BN // 2)
            slot, phase = advance(slot, phase, cfg.STAGES)
    cluster.wait_all(cfg.CLUSTER)      # what the other blocks still send, they send to one that is there


# ---------------------------------------------------------------- sums
@gluon.jit
def sums(acc, slot, phase, bars, KB, cfg: gl.constexpr, WM: gl.constexpr, mma: gl.constexpr, NP: gl.constexpr):
    """A warpgroup's sums over all of K: (sums, slot, phase). A slot is released once the product of the next is on its way."""
    full, empty = bars
    COLS: gl.constexpr = cfg.WN
    old = fresh(slot)       # of its own: what is another's value, Triton doesn't carry through a loop
    for kb in range(0, KB):
        cluster.wait(full + slot * 8, phase, 1)
        at = cluster.start_of_shared()
        a = at + (slot * (cfg.BM * 128) + (cfg.A_AT + WM * 64 * 128))
        b = at + (slot * (cfg.BN * 128) + cfg.B_AT)
        acc = wait_for(multiply_bf16(a, b, acc, NP, COLS, mma), 1, NP, COLS)
        cluster.arrive(gl.where(kb > 0, empty + old * 8, -1), cfg.CLUSTER)
        old = fresh(slot)
        slot, phase = advance(slot, phase, cfg.STAGES)
    acc = wait(acc, NP, COLS)
    cluster.arrive(gl.where(KB > 0, empty + old * 8, -1), cfg.CLUSTER)
    return acc, slot, phase


@gluon.jit
def scaled(acc, scales, row, column, M, N, cfg: gl.constexpr, mma: gl.constexpr, NP: gl.constexpr):
    """64 rows of sums from `row` times the factors of rows and columns; factors that aren't the tensors' are not read."""
    sa_ptr, sb_ptr, flag_ptr = scales
    COLS: gl.constexpr = cfg.WN
    rows = row + gl.arange(0, 64, gl.SliceLayout(1, mma))
    sa = gl.expand_dims(gl.load(sa_ptr + rows, mask=rows < M, other=0), 1)
    out = ()
    for i in gl.static_range(NP):
        x = acc[i] * sa
        if cfg.B_FACTORS:
            columns = column + i * COLS + gl.arange(0, COLS, gl.SliceLayout(0, mma))
            x = x * gl.expand_dims(gl.load(sb_ptr + columns, mask=columns < N, other=0), 0)
        out = out + (x, )
    return out


@gluon.jit
def multiply_tile(zero, slot, phase, bars, place, d_s, d_desc, out, scales, M, N, KB, cfg: gl.constexpr, WM: gl.constexpr, mma: gl.constexpr,
                  NP: gl.constexpr):
    """A warpgroup's rows of a tile, summed and stored: (slot, phase)."""
    sa_ptr, sb_ptr, flag_ptr = scales
    row, column = place
    row += WM * 64
    acc = ()
    for i in gl.static_range(NP):
        acc = acc + (zero, )
    shifted = slot * 0 + SHIFTED
    if cfg.FLAG:
        shifted = gl.load(flag_ptr)
    acc, slot, phase = sums(acc, slot, phase, bars, KB, cfg, WM, mma, NP)
    if shifted == SHIFTED:
        acc = scaled(acc, scales, row, column, M, N, cfg, mma, NP)
    none = slot * 0
    for i in gl.static_range(NP):
        store_piece(acc[i], i, (), d_s, d_desc, out, (sa_ptr, M, N, KB, none, none), (column // cfg.WN, none, row, M, none), row, cfg, WM, 0,
                    mma, NP, cfg.WN)
    return slot, phase


@gluon.jit
def consumer(d_desc, out, scales, d_s, M, N, KB, cfg: gl.constexpr, WM: gl.constexpr):
    """Rows [WM * 64, +64) of its block's part of every tile."""
    NP: gl.constexpr = cfg.NP
    COLS: gl.constexpr = cfg.WN
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.WN, 32])
    full, empty = barriers(cfg)
    bars = (full, cluster.everywhere(empty, cfg.CLUSTER))
    cluster.wait_all(cfg.CLUSTER)
    whole, total = tiles(M, N, cfg)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    zero = gl.zeros([64, COLS], gl.float32, mma)
    for t in range(gl.program_id(0) // cfg.CLUSTER, total, gl.num_programs(0) // cfg.CLUSTER):
        row, column, narrow = place_of(t, whole, fresh(M), fresh(N), cfg)
        if narrow == 0:
            slot, phase = multiply_tile(zero, slot, phase, bars, (row, column), d_s, d_desc, out, scales, M, N, KB, cfg, WM, mma, NP)
        else:
            slot, phase = multiply_tile(zero, slot, phase, bars, (row, column), d_s, d_desc, out, scales, M, N, KB, cfg, WM, mma, NP // 2)
    tma.store_wait(0)
    cluster.wait_all(cfg.CLUSTER)


@gluon.jit(do_not_specialize=["M", "KB"])
def bf16_cluster_kernel(a_desc, b_desc, half_desc, d_desc, out_ptr, sa_ptr, sb_ptr, flag_ptr, M, N, KB, om, cfg: gl.constexpr):
    """A persistent grid of clusters. a_desc [1, M, K], b_desc and, in boxes of half as many rows, half_desc [1, rows, K], d_desc [M, N]; sa,
    sb: factors of rows and of columns, all of which are one, FLAG, where flag_ptr doesn't hold SHIFTED; om: stride of the output's rows. KB:
    K blocks of 64, the last of which may be cut short."""
    one = KB * 0
    ring, d_s, table = prepare(out_ptr, out_ptr, M, one, one, cfg)
    scales = (sa_ptr, sb_ptr, flag_ptr)
    out = (out_ptr, 0, om, 0)
    descs = (a_desc, b_desc, half_desc)
    gl.warp_specialize([
        (consumer, (d_desc, out, scales, d_s, M, N, KB, cfg, 0)),
        (consumer, (d_desc, out, scales, d_s, M, N, KB, cfg, 1)),
        (idle, (cfg, )),
        (producer, (descs, M, N, KB, cfg)),
        (idle, (cfg, )),
    ], [4, 2, 1, 1], [cfg.CONSUMER_REGISTERS, cfg.PRODUCER_REGISTERS, cfg.PRODUCER_REGISTERS, cfg.PRODUCER_REGISTERS])
