"""Device code of the Hopper kernel for plain MXFP8 weights and 33 to 64 tokens: sums of blocks of 32 of K, each times its two scales.

    start 0, 1 | add 0, start 2 | add 1, start 3 | add 2 | add 3

A sum is PARTS tensors of 64 tokens by 8 weight rows: Gluon's tensors have powers of two as sizes, wgmma any multiple of 8 columns.
A K block ends with nothing in flight: ptxas serialises wgmma that are, across a loop's back edge. The other consumer fills the gap.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import cluster_device as cluster
from .fp8_decode_sums_device import tile_layout
from .mx8_decode_sums_device import ALL, LARGEST
from .shim import view_as
from .wgmma_device import keep, multiply_step, wait_for

COLS = gl.constexpr(8)      # weight rows of a part
EACH = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


# ---------------------------------------------------------------- addresses of what lies behind the rings
@gluon.jit
def full_at(slot, cfg: gl.constexpr):
    return cluster.start_of_shared() + (cfg.BARS + slot * 8)


@gluon.jit
def empty_at(slot, cfg: gl.constexpr):
    return cluster.start_of_shared() + (cfg.BARS + cfg.STAGES * 8 + slot * 8)


@gluon.jit
def wild_at(slot, cfg: gl.constexpr):
    """Where it stands whether a slot's codes of weights are wild: products of scales may be beyond FP32."""
    return cluster.start_of_shared() + (cfg.BARS + cfg.STAGES * 16 + slot * 4)


# ---------------------------------------------------------------- sums of a K block
@gluon.jit
def zeros(cfg: gl.constexpr):
    """A sum of zeros."""
    P: gl.constexpr = cfg.PARTS
    out = ()
    for i in gl.static_range(P):
        out = out + (gl.zeros([64, 8], gl.float32, tile_layout(8)), )
    return out


@gluon.jit
def weight_powers(powers, slot, J: gl.constexpr, cfg: gl.constexpr):
    """[8] of each part's weight rows."""
    lay: gl.constexpr = gl.SliceLayout(0, tile_layout(8))
    P: gl.constexpr = cfg.PARTS
    out = ()
    for i in gl.static_range(P):
        if i * 8 < cfg.MAIN:
            out = out + (powers.index(cfg.MAIN_AT // 32 + (slot * 4 + J) * (cfg.MAIN // 8) + i).load(lay), )
        else:
            out = out + (powers.index(cfg.REST_AT // 32 + (slot * 4 + J) * (cfg.REST // 8) + (i - cfg.MAIN // 8)).load(lay), )
    return out


@gluon.jit
def add(acc, p, fx, fw, WILD: gl.constexpr, cfg: gl.constexpr):
    """acc += sums of one block of 32, each by its scales. WILD: products of these may be beyond FP32."""
    P: gl.constexpr = cfg.PARTS
    out = ()
    for i in gl.static_range(P):
        x, w = gl.broadcast(gl.expand_dims(fx, 1), gl.expand_dims(fw[i], 0))
        if WILD:
            out = out + (gl.fma(p[i], gl.minimum(x * w, LARGEST, propagate_nan=ALL), acc[i]), )
        else:
            w, s = gl.broadcast(w, p[i])
            out = out + (gl.fma(s * w, x, acc[i]), )
    return out


@gluon.jit
def parts_from(both, FIRST: gl.constexpr, cfg: gl.constexpr):
    """The PARTS tensors of one sum, from the FIRST on, of two that `keep` has kept together."""
    P: gl.constexpr = cfg.PARTS
    out = ()
    for i in gl.static_range(P):
        out = out + (both[FIRST + i], )
    return out


@gluon.jit
def add_block(acc, slot, at, powers, s_x, WILD: gl.constexpr, cfg: gl.constexpr):
    """acc += one K block, which lies in a slot; at: where its tokens and weights are."""
    a, b = at
    P: gl.constexpr = cfg.PARTS
    mma: gl.constexpr = tile_layout(8)
    none = zeros(cfg)
    p = multiply_step(a, b, none, P, COLS, mma)
    q = multiply_step(a + 32, b + 32, none, P, COLS, mma)
    for j in gl.static_range(4):
        fx = s_x.index(cfg.SX_AT // 256 + slot * 4 + j).load(gl.SliceLayout(1, mma))
        fw = weight_powers(powers, slot, j, cfg)
        p = wait_for(p, 1 if j < 3 else 0, P, COLS)
        acc = add(acc, p, fx, fw, WILD, cfg)
        if j < 2:
            both = keep(acc + p, 2 * P, COLS)
            acc = parts_from(both, 0, cfg)
            p = multiply_step(a + 32 * (j + 2), b + 32 * (j + 2), parts_from(both, P, cfg), P, COLS, mma)
        p, q = q, p
    return acc


# ---------------------------------------------------------------- output
@gluon.jit
def put(y, out_ptr, tok, n, where, N, som, cfg: gl.constexpr):
    """Sums of tokens and weight rows `tok`, `n` of the tile."""
    w_row, x_row, live = where
    ptrs = out_ptr + (x_row.to(gl.int64) * som + w_row) + gl.expand_dims(tok * som, 1) + n
    mask = gl.expand_dims(tok < live, 1) & (n < gl.minimum(N - w_row, cfg.BN))
    if cfg.KEEP:
        gl.store(ptrs, y.to(out_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_last")
    else:
        gl.store(ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def add_up(tile, ring, out_ptr, where, N, som, cfg: gl.constexpr):
    """Sums of all blocks of the cluster, in the order of K, each block its share of the tokens: as many parts at once as there are
    shares."""
    P: gl.constexpr = cfg.PARTS
    BLOCKS: gl.constexpr = cfg.CLUSTER
    SHARE: gl.constexpr = 64 // BLOCKS
    ROUNDS: gl.constexpr = (P + BLOCKS - 1) // BLOCKS
    lay: gl.constexpr = gl.BlockedLayout([1, 4], [16, 2], [4, 1], [1, 0])
    staged = view_as(ring, gl.float32, P, 64, 8, EACH)
    for i in gl.static_range(P):
        staged.index(i).store(tile[i])
    cluster.wait_all(BLOCKS)
    start = cluster.start_of_shared()
    r = gl.arange(0, 64, gl.SliceLayout(1, lay))
    n = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, lay)), 0)
    tok = cluster.rank() * SHARE + r % SHARE
    out = ()
    for i in gl.static_range(ROUNDS):
        part = i * BLOCKS + gl.expand_dims(r // SHARE, 1)
        at = gl.minimum(part, P - 1) * 2048 + gl.expand_dims(tok * 32, 1) + n * 4
        y = cluster.load_four(at + cluster.of_block(start, gl.to_tensor(0)))
        for b in gl.static_range(BLOCKS - 1):
            y += cluster.load_four(at + cluster.of_block(start, gl.to_tensor(b + 1)))
        out = out + (y, )
    cluster.arrive_all()
    for i in gl.static_range(ROUNDS):
        put(out[i], out_ptr, tok, (i * BLOCKS + gl.expand_dims(r // SHARE, 1)) * 8 + n, where, N, som, cfg)
    cluster.join_all()      # nobody leaves while another reads its sums
