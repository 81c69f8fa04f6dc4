"""Device code of the Hopper FP8 decode kernel: a tile cut along K, whose partial sums the blocks of a cluster add up.

    every block   its sums of all tokens -> its shared memory, where the ring was | all are there | of its share of the tokens the sums
                  of every block, in the order of K -> the output

No workspace, no counters; each block adds up a part, so the more blocks, the fewer sums each of them reads.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import cluster_device as cluster
from .shim import view_as


@gluon.jit
def idle(cfg: gl.constexpr):
    """What a partition without sums does in the end: waits for the cluster are for every warp there is."""
    if cfg.CLUSTER > 1:
        cluster.wait_all(cfg.CLUSTER)
        cluster.wait_all(cfg.CLUSTER)


@gluon.jit
def add_up(acc, ring, out_ptr, out_strides, where, N, cfg: gl.constexpr):
    """[64 weight rows, BT tokens] of partial sums of each block -> the tile."""
    g, row, rows, nb = where
    sog, som = out_strides
    BLOCKS: gl.constexpr = cfg.CLUSTER
    ROWS: gl.constexpr = cfg.BT // cfg.CLUSTER
    lay: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    view_as(ring, gl.float32, 1, 64, cfg.BT, cluster.STAGED).index(0).store(acc)
    cluster.wait_all(cfg.CLUSTER)
    start = cluster.start_of_shared()
    tok = cluster.rank() * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, lay))
    n = gl.arange(0, 64, gl.SliceLayout(0, lay))
    places = cluster.staged_at(gl.expand_dims(n, 0), gl.expand_dims(tok, 1), cfg.BT)
    parts = ()
    for i in gl.static_range(BLOCKS):
        parts = parts + (cluster.load_four(places + cluster.of_block(start, gl.to_tensor(i))), )
    cluster.arrive_all()
    y = parts[0]
    for i in gl.static_range(BLOCKS - 1):
        y += parts[i + 1]
    col = nb * cfg.BN
    ptrs = out_ptr + (row.to(gl.int64) * som + col) + gl.expand_dims(tok * som, 1) + gl.expand_dims(n, 0)
    live = gl.expand_dims(tok < rows, 1) & gl.expand_dims(n < N - col, 0)
    if cfg.ACCUMULATE:
        y += gl.load(ptrs, mask=live, other=0).to(gl.float32)
    if cfg.KEEP:
        gl.store(ptrs, y.to(out_ptr.dtype.element_ty), mask=live, eviction_policy="evict_last")
    else:
        gl.store(ptrs, y.to(out_ptr.dtype.element_ty), mask=live)
    cluster.join_all()      # nobody leaves while another reads its sums
