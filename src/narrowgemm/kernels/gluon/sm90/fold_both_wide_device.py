"""Device code of the Hopper FP8 product of folded MXFP8 by folded MXFP8: slots of 64 of K in BF16, beside those of K blocks, and what its
warps do where all of a product is in BF16."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from . import cluster_device as cluster
from .fp8_block_parts_device import advance, store_zeros
from .fp8_block_schedule_device import DENSE, first_tile, fresh, has_products, is_live, next_tile, total_tiles
from .fp8_cluster_device import store_tile
from .fp8_cluster_feed_device import barriers, has_rows, own_tile
from .wgmma_device import multiply_bf16, multiply_turned, wait


@gluon.jit
def load_weights(desc, PARAMETER: gl.constexpr, full, slot, at, cfg: gl.constexpr):
    """This block's share of BN rows, to all of the cluster."""
    KERNEL: gl.constexpr = cfg.KERNEL
    share = gl.to_tensor(0)
    if cfg.CLUSTER_M > 1:
        share = cluster.rank() * cfg.B_BOX
    plane, row, k = at
    cluster.load(desc, KERNEL, PARAMETER, (plane, row + share, k), full + slot * 8,
                 full - cfg.BARS_AT + (cfg.B_AT + (slot * cfg.B_ROWS + share) * 128), cfg.CLUSTER_M)


@gluon.jit
def multiply_wide(acc, slot, phase, bars, steps, cfg: gl.constexpr, WM: gl.constexpr, mma: gl.constexpr, TURNED: gl.constexpr):
    """Sums after so many slots of 64 of K in BF16, A by columns where TURNED: (sums, slot, phase)."""
    full, empty = bars
    NP: gl.constexpr = cfg.NP
    for i in range(0, steps):
        cluster.wait(full + slot * 8, phase, 1)
        slot = fresh(slot)
        at = cluster.start_of_shared()
        a = at + (slot * (cfg.BM * 128) + (cfg.A_AT + WM * 64 * 128))
        b = at + (slot * (cfg.B_ROWS * 128) + cfg.B_AT)
        if TURNED:
            acc = wait(multiply_turned(a, b, acc, NP, cfg.WN, mma), NP, cfg.WN)
        else:
            acc = wait(multiply_bf16(a, b, acc, NP, cfg.WN, mma), NP, cfg.WN)
        cluster.arrive(empty + slot * 8, cfg.CLUSTER)
        slot, phase = advance(slot, phase, cfg.STAGES)
    return acc, slot, phase


@gluon.jit
def pass_on(slot, phase, bars, blocks, cfg: gl.constexpr):
    """So many slots, of which a warpgroup without rows needs nothing: (slot, phase)."""
    full, empty = bars
    for block in range(0, blocks):
        cluster.wait(full + slot * 8, phase, 1)
        cluster.arrive(empty + slot * 8, cfg.CLUSTER)
        slot, phase = advance(slot, phase, cfg.STAGES)
    return slot, phase


# ---------------------------------------------------------------- all of it in BF16
@gluon.jit
def wide_producer(descs, table, problem, cfg: gl.constexpr):
    """As `producer`, of A and weights in BF16, 64 of K a slot."""
    a_desc, b_desc = descs
    index_ptr, M, N, KB, G, alignment = problem
    UNIT: gl.constexpr = cfg.UNIT
    KERNEL: gl.constexpr = cfg.KERNEL
    full, empty = barriers(cfg)
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
            for block in range(0, 2 * KB):
                bar = full + slot * 8
                cluster.wait(empty + slot * 8, phase, 1)
                if rows:
                    cluster.expect(bar, (cfg.BM + cfg.BN) * 128)
                else:
                    cluster.expect(bar, cfg.BN * 128)
                load_weights(b_desc, 47, full, slot, (g, n * cfg.BN, block * 64), cfg)
                if rows:
                    cluster.load(a_desc, KERNEL, 40, (g * 0, own[2], block * 64), bar, full - cfg.BARS_AT + (cfg.A_AT + slot * (cfg.BM * 128)), 1)
                slot, phase = advance(slot, phase, cfg.STAGES)
        n, g, first, end, stop = ahead
    cluster.wait_all(cfg.CLUSTER)


@gluon.jit
def wide_consumer(d_desc, out, scales, factor_ptr, d_s, table, problem, cfg: gl.constexpr, WM: gl.constexpr):
    """As `consumer`, of what `wide_producer` brings; rows of sums have factors, too."""
    index_ptr, M, N, KB, G, alignment = problem
    UNIT: gl.constexpr = cfg.UNIT
    NP: gl.constexpr = cfg.NP
    COLS: gl.constexpr = cfg.WN
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.WN, 32])
    full, empty = barriers(cfg)
    empty = cluster.everywhere(empty, cfg.CLUSTER)
    cluster.wait_all(cfg.CLUSTER)
    total = total_tiles(table, M, N, UNIT, 4, G, alignment)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    zero = gl.zeros([64, COLS], gl.float32, mma)
    zeros = ()
    for i in gl.static_range(NP):
        zeros = zeros + (zero, )
    cursor, tile = first_tile((index_ptr, table, M, N, KB, G, alignment, total), UNIT, 4)
    live = is_live(tile)
    while live:
        work = (index_ptr, table, fresh(M), fresh(N), KB, fresh(G), alignment, total)
        own = own_tile(tile, cfg)
        if has_products(tile, cfg):
            if has_rows(own, M, cfg, WM * 64):
                row = own[2] + WM * 64 + gl.arange(0, 64, gl.SliceLayout(1, mma))
                factor = gl.expand_dims(gl.load(factor_ptr + row, mask=row < M, other=0.0), 1)
                acc, slot, phase = multiply_wide(zeros, slot, phase, (full, empty), 2 * KB, cfg, WM, mma, False)
                scaled = ()
                for i in gl.static_range(NP):
                    scaled = scaled + (acc[i] * factor, )
                store_tile(scaled, scales, d_s, d_desc, out, problem, own, cfg, WM, 0, mma, NP)
            else:
                slot, phase = pass_on(slot, phase, (full, empty), 2 * KB, cfg)
        elif cfg.ZERO and cfg.LAYOUT != DENSE:
            store_zeros(out, own, own[2] + WM * 64, own[0] * cfg.BN, N, cfg)
        cursor, tile = next_tile(cursor, tile, work, UNIT, 4)
        live = is_live(tile)
    tma.store_wait(0)
    cluster.wait_all(cfg.CLUSTER)
