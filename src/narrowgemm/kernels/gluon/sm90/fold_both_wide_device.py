"""Device code of the Hopper FP8 product of folded MXFP8 by folded MXFP8: slots of 64 of K in BF16, beside those of K blocks, and what its
warps do for a tile where all of a product is in BF16."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import cluster_device as cluster
from .fp8_block_parts_device import advance
from .fp8_block_schedule_device import fresh
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


# ---------------------------------------------------------------- a tile that is all in BF16
@gluon.jit
def feed_wide(descs, slot, phase, bars, tile, own, rows, KB, cfg: gl.constexpr):
    """All of K of A and weights in BF16, 64 a slot: (slot, phase). `rows`: whether this block of a cluster needs any of A."""
    a_desc, b_desc = descs
    full, empty = bars
    n, g, first, end, stop = tile
    KERNEL: gl.constexpr = cfg.KERNEL
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
    return slot, phase


@gluon.jit
def sum_wide(acc, slot, phase, bars, factor_ptr, own, M, KB, cfg: gl.constexpr, WM: gl.constexpr, mma: gl.constexpr):
    """A warpgroup's sums of what `feed_wide` brings, times the factors of their rows: (sums, slot, phase)."""
    NP: gl.constexpr = cfg.NP
    row = own[2] + WM * 64 + gl.arange(0, 64, gl.SliceLayout(1, mma))
    factor = gl.expand_dims(gl.load(factor_ptr + row, mask=row < M, other=0.0), 1)
    acc, slot, phase = multiply_wide(acc, slot, phase, bars, 2 * KB, cfg, WM, mma, False)
    scaled = ()
    for i in gl.static_range(NP):
        scaled = scaled + (acc[i] * factor, )
    return scaled, slot, phase
