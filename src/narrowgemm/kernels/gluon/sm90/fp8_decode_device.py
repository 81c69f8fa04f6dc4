"""Device code of the Hopper FP8 decode kernel: few rows a group, so time is the weights' bytes over the bandwidth.

    out[m, n] (+)= sum over K blocks of  (A[m, kb] . B[g, n, kb]) * sa[m, kb] * sb[g, n / 128, kb]

Operands are swapped: D^T = B . A^T, weights on wgmma's 64-row side, tokens on its column side, which may be as narrow as 8.

    warps                 does, for every K block of its CTA's work
    weight_loader (1)     TMA of BN weight rows and BT (or NARROW) token rows into a ring slot
    scale_loader (1)      sa * sb of the tokens into the slot; loads run 4-8 K blocks ahead in registers
    zero_filler (1)       rows of no group, where the layout has such rows and wants them zero
    consumer (4, or 2x4)  wgmma, promotion in FP32, release of the slot; at a tile's end transpose and store

The loaders run across tile boundaries, so the ring never drains between tiles. A tile of few rows (NARROW and fewer) loads
and multiplies NARROW token columns instead of BT: skewed groups cost what they hold, whatever the width compiled for.

With SPLIT, tiles that are too few for the grid are cut along K; every unit leaves FP32 partial sums in the workspace, and the
last unit of a tile to arrive adds them in the order of K. None waits for another. With CLUSTER, the units of a tile are the
blocks of a cluster, one each, and every block adds up a part of the tile from the others' shared memory.

With FRONT, the launch in front may still be at it. It brings tokens, or sizes of groups too, and what is older is used meanwhile:
weights, which fill the ring before the loader waits. Every warp waits by itself before it touches what may be on its way, or
writes; the launch behind may start once every block's loader has waited. With STREAM, L2 gives weights up first: the ring is one
allocation, since the copies that take a policy take addresses.

With BOX, a slot is so many K blocks, whose weights are one box of TMA: rows of memory are read by so many times 128 bytes. What is
counted in K blocks (KB, k0, k1, there) is slots then.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .fp8_decode_cluster_device import add_up, idle
from .fp8_decode_parts_device import (
    fetch_weights, is_last, open_count, scale_loader, sizes_there, store_part, store_tile, sum_parts, tokens_there, weight_loader,
    zero_filler)
from .fp8_decode_schedule_device import (
    CONTIGUOUS, begin, fetched, k_range, left_over, list_pieces, locate)
from .fp8_decode_sums_device import multiply
from .shim import block_barrier, view_boxes, view_rows


@gluon.jit
def finish(acc, t, split, outs, out_strides, where, N, cfg: gl.constexpr, CID: gl.constexpr, NT: gl.constexpr):
    """Store a tile, or its partial sums in the unit's part of the workspace; the last unit of a tile to come here adds them."""
    out_ptr, part_ptr, count_ptr = outs
    g, row, rows, nb = where
    P: gl.constexpr = cfg.PIECES
    TILE: gl.constexpr = cfg.BT * cfg.BN
    if cfg.CLUSTER > 1:
        add_up(acc[0], part_ptr, out_ptr, out_strides, where, N, cfg)
    elif cfg.SPLIT > 1:
        if split > 1:
            for i in gl.static_range(P):
                store_part(acc[i], part_ptr + (t * TILE + (CID * P + i) * 64), cfg, NT)
            tile = t // split
            if is_last(count_ptr + (tile * cfg.CONSUMERS + CID), split):
                for i in gl.static_range(P):
                    n0 = (CID * P + i) * 64
                    one = sum_parts(part_ptr + (tile * split * TILE + n0), split, cfg, NT)
                    store_tile(one, out_ptr, out_strides, g, row, rows, nb * cfg.BN + n0, N, 64, NT, cfg)
        else:
            store_pieces(acc, out_ptr, out_strides, where, N, cfg, CID, NT)
    else:
        store_pieces(acc, out_ptr, out_strides, where, N, cfg, CID, NT)


@gluon.jit
def store_pieces(acc, out_ptr, out_strides, where, N, cfg: gl.constexpr, CID: gl.constexpr, NT: gl.constexpr):
    g, row, rows, nb = where
    P: gl.constexpr = cfg.PIECES
    for i in gl.static_range(P):
        store_tile(acc[i], out_ptr, out_strides, g, row, rows, nb * cfg.BN + (CID * P + i) * 64, N, 64, NT, cfg)


@gluon.jit
def unit(rings, bars, slot, phase, k0, k1, t, split, outs, out_strides, where, N, cfg: gl.constexpr, CID: gl.constexpr,
         NT: gl.constexpr):
    acc, slot, phase = multiply(rings, bars, slot, phase, k0, k1, cfg, CID, NT)
    finish(acc, t, split, outs, out_strides, where, N, cfg, CID, NT)
    return slot, phase


@gluon.jit
def sized(rings, bars, slot, phase, k0, k1, t, split, outs, out_strides, where, N, cfg: gl.constexpr, CID: gl.constexpr):
    """A unit with as many token columns as its tile's rows need, of the widths compiled for."""
    if cfg.NARROW == 0:
        return unit(rings, bars, slot, phase, k0, k1, t, split, outs, out_strides, where, N, cfg, CID, cfg.BT)
    else:
        if where[2] <= cfg.NARROW:
            slot, phase = unit(rings, bars, slot, phase, k0, k1, t, split, outs, out_strides, where, N, cfg, CID, cfg.NARROW)
        else:
            if cfg.MIDDLE > 0:
                if where[2] <= cfg.MIDDLE:
                    slot, phase = unit(rings, bars, slot, phase, k0, k1, t, split, outs, out_strides, where, N, cfg, CID, cfg.MIDDLE)
                else:
                    slot, phase = unit(rings, bars, slot, phase, k0, k1, t, split, outs, out_strides, where, N, cfg, CID, cfg.BT)
            else:
                slot, phase = unit(rings, bars, slot, phase, k0, k1, t, split, outs, out_strides, where, N, cfg, CID, cfg.BT)
        return slot, phase


@gluon.jit
def consumer(rings, bars, outs, out_strides, shape_args, index_ptr, table_ptr, cap, KB, cfg: gl.constexpr,
             CID: gl.constexpr):
    """Weight rows [CID * BN / CONSUMERS, + BN / CONSUMERS) of every tile."""
    M, N, G, alignment = shape_args
    sizes_there(cfg)
    upto, units, split, chunk, slot = begin(shape_args, index_ptr, table_ptr, KB, cfg, 4)
    tokens_there(cfg)
    phase = gl.to_tensor(0)
    for t in range(gl.program_id(0), units, gl.num_programs(0)):
        tile, k0, k1 = k_range(t, split, chunk, KB, cfg)
        where = locate(tile, upto, shape_args, index_ptr, table_ptr, cap, cfg, True)
        if cfg.GUESS > 0:
            there, vain = fetched(t, where, shape_args, index_ptr, KB, cfg)
            slot += pass_over(vain, bars, cfg)
        if cfg.SPLIT > cfg.CLUSTER:
            if split > 1:
                open_count(outs[2] + (tile * cfg.CONSUMERS + CID), split)
        slot, phase = sized(rings, bars, slot, phase, k0, k1, t, split, outs, out_strides, where, N, cfg, CID)
    if cfg.GUESS > 0:
        pass_over(left_over(units, shape_args, index_ptr, KB, cfg), bars, cfg)


@gluon.jit
def pass_over(count, bars, cfg: gl.constexpr):
    """Release slots [0, count) as they come; how many they are."""
    full, empty = bars
    for i in range(0, count):
        mbarrier.wait(full.index(cfg.F_AT + i), 0)
        mbarrier.arrive(empty.index(i), count=1)
    return count


@gluon.jit(do_not_specialize=["M", "KB", "G", "alignment", "cap", "sag", "sam", "sak", "sbg", "sbn", "sbk"])
def fp8_decode_kernel(w_desc, x_desc, middle_desc, narrow_desc, out_ptr, sa_ptr, sb_ptr, index_ptr, part_ptr, count_ptr, table_ptr,
                      M, N, KB, G, alignment, cap, sag, sam, sak, sbg, sbn, sbk, sog, som, cfg: gl.constexpr):
    """A persistent grid. M: rows of A, or rows a group can hold (masked). `cap`: entries of each column of the table."""
    S: gl.constexpr = cfg.STAGES
    sums = part_ptr
    if cfg.CLUSTER > 1 or cfg.STREAM:
        ring = gl.allocate_shared_memory(gl.int8, [cfg.RING_ROWS, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        W: gl.constexpr = w_desc.layout
        X: gl.constexpr = x_desc.layout
        w_s = ring if cfg.BOX > 1 else view_boxes(ring, gl.float8e4nv, cfg.W_AT + S, cfg.BN, 128, W)
        x_s = view_boxes(ring, gl.float8e4nv, cfg.X_AT + S * cfg.BOX, cfg.BT, 128, X)
    elif cfg.BOX > 1:
        w_s = gl.allocate_shared_memory(gl.float8e4nv, [S, 1, cfg.BN // 8, cfg.BOX, 8, 128], w_desc.layout)
        x_s = gl.allocate_shared_memory(gl.float8e4nv, [S * cfg.BOX, 1, cfg.BT, 128], x_desc.layout)
    else:
        w_s = gl.allocate_shared_memory(gl.float8e4nv, [S, 1, cfg.BN, 128], w_desc.layout)
        x_s = gl.allocate_shared_memory(gl.float8e4nv, [S, 1, cfg.BT, 128], x_desc.layout)
    s_s = gl.allocate_shared_memory(gl.float32, [S * cfg.BOX, cfg.BT], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    if cfg.CLUSTER > 1:
        sums = ring
    if cfg.STREAM:      # where their addresses are known
        full = view_rows(ring, gl.int64, cfg.RING_ROWS * 16, 1, mbarrier.MBarrierLayout())
    else:
        full = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    ARRIVALS: gl.constexpr = cfg.ARRIVALS
    EARLY: gl.constexpr = cfg.GUESS
    for i in gl.static_range(EARLY):
        mbarrier.init(full.index(cfg.F_AT + i), count=ARRIVALS)
    sh = (M, N, G, alignment)
    if cfg.GUESS > 0:
        fence_async_shared()
        fetch_weights(w_desc, w_s, full, sh, index_ptr, KB, cfg)
    for i in gl.static_range(S):
        if i >= EARLY:
            mbarrier.init(full.index(cfg.F_AT + i), count=ARRIVALS)
        mbarrier.init(empty.index(i), count=cfg.CONSUMERS)
    fence_async_shared()

    descs = (w_desc, x_desc, middle_desc, narrow_desc)
    rings = (w_s, x_s, s_s)
    bars = (full, empty)
    sa_sb = (sa_ptr, sb_ptr)
    strides = (sag, sam, sak, sbg, sbn, sbk)
    outs = (out_ptr, sums, count_ptr)
    out_strides = (sog, som)
    if cfg.LAYOUT == CONTIGUOUS:
        list_pieces(sh, index_ptr, table_ptr, cap, cfg, 4)
        block_barrier()
    R: gl.constexpr = cfg.LOADER_REGS
    C: gl.constexpr = cfg.CONSUMER_REGS
    if cfg.CLUSTER > 1:
        gl.warp_specialize([
            (consumer, (rings, bars, outs, out_strides, sh, index_ptr, table_ptr, cap, KB, cfg, 0)),
            (idle, (cfg, )),
            (weight_loader, (descs, rings, bars, sh, index_ptr, table_ptr, cap, KB, cfg)),
            (scale_loader, (sa_sb, strides, rings, bars, sh, index_ptr, table_ptr, cap, KB, cfg)),
        ], [2, 1, 1], [R, R, R])
    elif cfg.CONSUMERS == 1 and cfg.ZERO:
        gl.warp_specialize([
            (consumer, (rings, bars, outs, out_strides, sh, index_ptr, table_ptr, cap, KB, cfg, 0)),
            (weight_loader, (descs, rings, bars, sh, index_ptr, table_ptr, cap, KB, cfg)),
            (scale_loader, (sa_sb, strides, rings, bars, sh, index_ptr, table_ptr, cap, KB, cfg)),
            (zero_filler, (out_ptr, som, sh, index_ptr, cfg)),
        ], [1, 1, 1], [R, R, R])
    elif cfg.CONSUMERS == 1:
        gl.warp_specialize([
            (consumer, (rings, bars, outs, out_strides, sh, index_ptr, table_ptr, cap, KB, cfg, 0)),
            (weight_loader, (descs, rings, bars, sh, index_ptr, table_ptr, cap, KB, cfg)),
            (scale_loader, (sa_sb, strides, rings, bars, sh, index_ptr, table_ptr, cap, KB, cfg)),
        ], [1, 1], [R, R])
    elif cfg.ZERO:
        gl.warp_specialize([
            (consumer, (rings, bars, outs, out_strides, sh, index_ptr, table_ptr, cap, KB, cfg, 0)),
            (consumer, (rings, bars, outs, out_strides, sh, index_ptr, table_ptr, cap, KB, cfg, 1)),
            (weight_loader, (descs, rings, bars, sh, index_ptr, table_ptr, cap, KB, cfg)),
            (scale_loader, (sa_sb, strides, rings, bars, sh, index_ptr, table_ptr, cap, KB, cfg)),
            (zero_filler, (out_ptr, som, sh, index_ptr, cfg)),
        ], [4, 1, 1, 1], [C, R, R, R])
    else:
        gl.warp_specialize([
            (consumer, (rings, bars, outs, out_strides, sh, index_ptr, table_ptr, cap, KB, cfg, 0)),
            (consumer, (rings, bars, outs, out_strides, sh, index_ptr, table_ptr, cap, KB, cfg, 1)),
            (weight_loader, (descs, rings, bars, sh, index_ptr, table_ptr, cap, KB, cfg)),
            (scale_loader, (sa_sb, strides, rings, bars, sh, index_ptr, table_ptr, cap, KB, cfg)),
        ], [4, 1, 1], [C, R, R])
