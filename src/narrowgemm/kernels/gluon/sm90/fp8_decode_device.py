"""Device code of the Hopper FP8 decode kernel: few rows a group, so time is the weights' bytes over the bandwidth.

    out[m, n] (+)= sum over K blocks of  (A[m, kb] . B[g, n, kb]) * sa[m, kb] * sb[g, n / 128, kb]

Operands are swapped: D^T = B . A^T, weights on wgmma's 64-row side, tokens on its column side, which may be as narrow as 8.

    warps                 does, for every K block of its CTA's work
    weight_loader (1)     TMA of BN weight rows and BT token rows into a ring slot
    scale_loader (1)      sa * sb of the BT tokens into the slot; loads run 4-8 K blocks ahead in registers
    consumer (4, or 2x4)  wgmma, promotion in FP32, release of the slot; at a tile's end transpose and store

The loaders run across tile boundaries, so the ring never drains between tiles. Work is (tile, K range) *segments*, the same
sequence in every partition. With STREAM the tiles left over after whole waves are cut into equal K ranges over all CTAs;
a CTA that has part of a tile leaves FP32 partial sums in the workspace, and the last to arrive adds them in CTA order.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait)
from triton.language.extra.cuda import gdc_wait

from .fp8_decode_schedule_device import CONTIGUOUS, MASKED, advance, locate, segment, share, step, tile_table
from .shim import block_barrier, tma_load, view_as


# ---------------------------------------------------------------- loaders
@gluon.jit
def weight_loader(descs, rings, bars, shape_args, index_ptr, table_ptr, cap, KB, cfg: gl.constexpr):
    w_desc, x_desc = descs
    w_s, x_s, s_s = rings
    full, empty = bars
    BYTES: gl.constexpr = (cfg.BN + cfg.BT) * 128
    if cfg.PDL and cfg.LAYOUT == CONTIGUOUS:
        gdc_wait()
    upto, tiles = tile_table(shape_args, index_ptr, table_ptr, cfg, 1)
    whole, chunk, begin, end = share(tiles, KB, cfg)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    t = gl.program_id(0)
    live, tile, k0, k1 = segment(begin, end, t, whole, KB, cfg)
    while live:
        g, row, _, nb = locate(tile, upto, shape_args, index_ptr, table_ptr, cap, cfg, False)
        plane = g if cfg.LAYOUT == MASKED else g * 0
        for kb in range(k0, k1):
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(full.index(slot), BYTES)
            tma_load(w_desc, [g, nb * cfg.BN, kb * 128], full.index(slot), w_s.index(slot))
            tma_load(x_desc, [plane, row, kb * 128], full.index(slot), x_s.index(slot))
            slot, phase = advance(slot, phase, cfg.STAGES)
        begin, t = step(begin, end, t, k0, k1, cfg)
        live, tile, k0, k1 = segment(begin, end, t, whole, KB, cfg)


@gluon.jit
def as_float(x):
    """A scale: FP32 as it is, uint8 as E8M0 (0 is 2^-127, 255 is NaN)."""
    if x.dtype == gl.uint8:
        bits = x.to(gl.int32) << 23
        bits = gl.where(x == 0, 0x00400000, bits)
        bits = gl.where(x == 255, 0x7FC00000, bits)
        return bits.to(gl.float32, bitcast=True)
    else:
        return x


@gluon.jit
def scale_block(sa_ptr, sak, live, sb0_ptr, sb1_ptr, sbk, kb, k1):
    """Scales of K block kb: of the tokens, and of one or two blocks of 128 weight rows. Zero past the segment."""
    inside = kb < k1
    k = kb.to(gl.int64)
    sa = as_float(gl.load(sa_ptr + k * sak, mask=live & inside, other=0))
    sb0 = as_float(gl.load(sb0_ptr + k * sbk, mask=inside, other=0))
    sb1 = as_float(gl.load(sb1_ptr + k * sbk, mask=inside, other=0))
    return sa, sb0, sb1


@gluon.jit
def put_scales(s, rings, bars, slot, phase, cfg: gl.constexpr):
    w_s, x_s, s_s = rings
    full, empty = bars
    sa, sb0, sb1 = s
    NS: gl.constexpr = cfg.SCALE_ROWS
    mbarrier.wait(empty.index(slot), phase)
    s_s.index(slot * NS).store(sa * sb0)
    if NS == 2:
        s_s.index(slot * NS + 1).store(sa * sb1)
    mbarrier.arrive(full.index(slot), count=1)
    return advance(slot, phase, cfg.STAGES)


@gluon.jit
def scale_loader(ptrs, strides, rings, bars, shape_args, index_ptr, table_ptr, cap, KB, cfg: gl.constexpr):
    sa_ptr, sb_ptr = ptrs
    sag, sam, sak, sbg, sbn, sbk = strides
    M, N, G, alignment = shape_args
    lay: gl.constexpr = gl.BlockedLayout([(cfg.BT + 31) // 32], [32], [1], [0])
    tok = gl.arange(0, cfg.BT, lay)
    if cfg.PDL and cfg.LAYOUT == CONTIGUOUS:
        gdc_wait()
    upto, tiles = tile_table(shape_args, index_ptr, table_ptr, cfg, 1)
    whole, chunk, begin, end = share(tiles, KB, cfg)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    t = gl.program_id(0)
    last = (N - 1) // 128
    live, tile, k0, k1 = segment(begin, end, t, whole, KB, cfg)
    while live:
        g, row, rows, nb = locate(tile, upto, shape_args, index_ptr, table_ptr, cap, cfg, True)
        a_ptr = sa_ptr + row.to(gl.int64) * sam
        if cfg.LAYOUT == MASKED:
            a_ptr += g.to(gl.int64) * sag
        a_ptrs = a_ptr + tok.to(gl.int64) * sam
        b_ptr = sb_ptr + g.to(gl.int64) * sbg
        nb0 = nb * cfg.BN // 128
        b0_ptr = b_ptr + nb0.to(gl.int64) * sbn
        b1_ptr = b0_ptr
        if cfg.SCALE_ROWS == 2:
            b1_ptr = b_ptr + gl.minimum(nb0 + 1, last).to(gl.int64) * sbn
        mine = tok < rows
        c0 = scale_block(a_ptrs, sak, mine, b0_ptr, b1_ptr, sbk, k0, k1)
        c1 = scale_block(a_ptrs, sak, mine, b0_ptr, b1_ptr, sbk, k0 + 1, k1)
        c2 = scale_block(a_ptrs, sak, mine, b0_ptr, b1_ptr, sbk, k0 + 2, k1)
        c3 = scale_block(a_ptrs, sak, mine, b0_ptr, b1_ptr, sbk, k0 + 3, k1)
        for kb in range(k0, k1, 4):
            n0 = scale_block(a_ptrs, sak, mine, b0_ptr, b1_ptr, sbk, kb + 4, k1)
            n1 = scale_block(a_ptrs, sak, mine, b0_ptr, b1_ptr, sbk, kb + 5, k1)
            n2 = scale_block(a_ptrs, sak, mine, b0_ptr, b1_ptr, sbk, kb + 6, k1)
            n3 = scale_block(a_ptrs, sak, mine, b0_ptr, b1_ptr, sbk, kb + 7, k1)
            slot, phase = put_scales(c0, rings, bars, slot, phase, cfg)
            if kb + 1 < k1:
                slot, phase = put_scales(c1, rings, bars, slot, phase, cfg)
            if kb + 2 < k1:
                slot, phase = put_scales(c2, rings, bars, slot, phase, cfg)
            if kb + 3 < k1:
                slot, phase = put_scales(c3, rings, bars, slot, phase, cfg)
            c0 = n0
            c1 = n1
            c2 = n2
            c3 = n3
        begin, t = step(begin, end, t, k0, k1, cfg)
        live, tile, k0, k1 = segment(begin, end, t, whole, KB, cfg)


# ---------------------------------------------------------------- consumers
@gluon.jit
def store_tile(acc, out_ptr, out_strides, g, row, rows, col, N, cfg: gl.constexpr):
    """Transpose through shared memory and store: 16 bytes a thread along N, rows past the group's never written."""
    sog, som = out_strides
    WR: gl.constexpr = cfg.WR
    V: gl.constexpr = cfg.STORE_VEC
    lay: gl.constexpr = gl.BlockedLayout([V, 1], [64 // V, V // 2], [1, 4], [0, 1])
    base = out_ptr + (row.to(gl.int64) * som + col)
    if cfg.LAYOUT == MASKED:
        base += g.to(gl.int64) * sog
    n = gl.arange(0, WR, gl.SliceLayout(1, lay))
    tok = gl.arange(0, cfg.BT, gl.SliceLayout(0, lay))
    ptrs = base + gl.expand_dims(tok * som, 0) + gl.expand_dims(n, 1)
    live = gl.expand_dims(tok < rows, 0) & gl.expand_dims(n < N - col, 1)
    if cfg.ACCUMULATE:
        y = gl.convert_layout(acc, lay)
        y += gl.load(ptrs, mask=live, other=0).to(gl.float32)
        gl.store(ptrs, y.to(out_ptr.dtype.element_ty), mask=live)
    else:
        y = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), lay)
        gl.store(ptrs, y, mask=live)


@gluon.jit
def part_slot(c, chunk, first):
    """A CTA's partial sums: its first segment's in slot 2c, its second's in 2c + 1 (a range touches two tiles at most)."""
    return 2 * c + gl.where(c * chunk < first, 1, 0)


@gluon.jit
def consumer(rings, bars, ptrs, out_strides, shape_args, index_ptr, table_ptr, cap, KB, cfg: gl.constexpr,
             CID: gl.constexpr):
    """Weight rows [CID * WR, +WR) of every tile."""
    w_s, x_s, s_s = rings
    full, empty = bars
    out_ptr, part_ptr, count_ptr = ptrs
    M, N, G, alignment = shape_args
    WR: gl.constexpr = cfg.WR
    BT: gl.constexpr = cfg.BT
    NC: gl.constexpr = cfg.CONSUMERS
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 32])
    cols: gl.constexpr = gl.SliceLayout(0, mma)
    w_v = view_as(w_s, gl.float8e4nv, cfg.STAGES * NC, WR, 128,
                  gl.NVMMASharedLayout.get_default_for([WR, 128], gl.float8e4nv))
    x_v = view_as(x_s, gl.float8e4nv, cfg.STAGES, BT, 128,
                  gl.NVMMASharedLayout.get_default_for([BT, 128], gl.float8e4nv))
    if cfg.PDL and cfg.LAYOUT == CONTIGUOUS:
        gdc_wait()
    upto, tiles = tile_table(shape_args, index_ptr, table_ptr, cfg, 4)
    whole, chunk, begin, end = share(tiles, KB, cfg)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    t = gl.program_id(0)
    p = gl.zeros([WR, BT], gl.float32, mma)
    live, tile, k0, k1 = segment(begin, end, t, whole, KB, cfg)
    while live:
        g, row, rows, nb = locate(tile, upto, shape_args, index_ptr, table_ptr, cap, cfg, True)
        col = nb * cfg.BN + CID * WR
        acc = gl.zeros([WR, BT], gl.float32, mma)
        for kb in range(k0, k1):
            mbarrier.wait(full.index(slot), phase)
            s = s_s.index(slot * cfg.SCALE_ROWS + (CID if cfg.SCALE_ROWS == 2 else 0)).load(cols)
            p = warpgroup_mma(w_v.index(slot * NC + CID), x_v.index(slot).permute((1, 0)), p, use_acc=False, is_async=True)
            p = warpgroup_mma_wait(0, deps=(p, ))
            mbarrier.arrive(empty.index(slot), count=1)
            sb, _ = gl.broadcast(gl.expand_dims(s, 0), p)
            acc = gl.fma(p, sb, acc)
            slot, phase = advance(slot, phase, cfg.STAGES)
        if cfg.STREAM > 0:
            if k1 - k0 == KB:
                store_tile(acc, out_ptr, out_strides, g, row, rows, col, N, cfg)
            else:
                j = tile - whole
                lo = j * KB
                c0 = lo // chunk
                c1 = (lo + KB - 1) // chunk
                n = gl.arange(0, WR, gl.SliceLayout(1, mma))
                tok = gl.arange(0, BT, cols)
                mine = part_ptr + CID * (WR * BT) + gl.expand_dims(n * BT, 1) + gl.expand_dims(tok, 0)
                gl.store(mine + part_slot(gl.program_id(0), chunk, lo) * (NC * WR * BT), acc)
                if cfg.PDL:
                    gdc_wait()
                block_barrier()
                arrived = gl.atomic_add(count_ptr + j * NC + CID, 1, sem="acq_rel", scope="gpu")
                if arrived == c1 - c0:
                    AHEAD: gl.constexpr = cfg.PARTS_AHEAD
                    acc = gl.zeros([WR, BT], gl.float32, mma)
                    for c in range(c0, c1 + 1, AHEAD):
                        parts = ()
                        for i in gl.static_range(AHEAD):
                            q = gl.load(mine + part_slot(c + i, chunk, lo) * (NC * WR * BT),
                                        mask=c + i <= c1, other=0.0, cache_modifier=".cg")
                            parts = parts + (q, )
                        for i in gl.static_range(AHEAD):
                            acc += parts[i]
                    store_tile(acc, out_ptr, out_strides, g, row, rows, col, N, cfg)
        else:
            store_tile(acc, out_ptr, out_strides, g, row, rows, col, N, cfg)
        begin, t = step(begin, end, t, k0, k1, cfg)
        live, tile, k0, k1 = segment(begin, end, t, whole, KB, cfg)
    if cfg.PDL and CID == 0:
        gdc_wait()          # whoever waits for this grid has waited for the one before it too


@gluon.jit(do_not_specialize=["M", "KB", "G", "alignment", "cap", "sag", "sam", "sak", "sbg", "sbn", "sbk"])
def fp8_decode_kernel(w_desc, x_desc, out_ptr, sa_ptr, sb_ptr, index_ptr, part_ptr, count_ptr, table_ptr,
                      M, N, KB, G, alignment, cap, sag, sam, sak, sbg, sbn, sbk, sog, som, cfg: gl.constexpr):
    """A persistent grid. M: rows of A, or rows a group can hold (masked). `cap`: entries of each column of the table."""
    S: gl.constexpr = cfg.STAGES
    w_s = gl.allocate_shared_memory(gl.float8e4nv, [S, 1, cfg.BN, 128], w_desc.layout)
    x_s = gl.allocate_shared_memory(gl.float8e4nv, [S, 1, cfg.BT, 128], x_desc.layout)
    s_s = gl.allocate_shared_memory(gl.float32, [S * cfg.SCALE_ROWS, cfg.BT], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(S):
        mbarrier.init(full.index(i), count=2)       # both loaders
        mbarrier.init(empty.index(i), count=cfg.CONSUMERS)
    fence_async_shared()

    descs = (w_desc, x_desc)
    rings = (w_s, x_s, s_s)
    bars = (full, empty)
    sa_sb = (sa_ptr, sb_ptr)
    strides = (sag, sam, sak, sbg, sbn, sbk)
    outs = (out_ptr, part_ptr, count_ptr)
    out_strides = (sog, som)
    sh = (M, N, G, alignment)
    if cfg.CONSUMERS == 1:
        gl.warp_specialize([
            (consumer, (rings, bars, outs, out_strides, sh, index_ptr, table_ptr, cap, KB, cfg, 0)),
            (weight_loader, (descs, rings, bars, sh, index_ptr, table_ptr, cap, KB, cfg)),
            (scale_loader, (sa_sb, strides, rings, bars, sh, index_ptr, table_ptr, cap, KB, cfg)),
        ], [1, 1], [cfg.LOADER_REGS, cfg.LOADER_REGS])
    else:
        gl.warp_specialize([
            (consumer, (rings, bars, outs, out_strides, sh, index_ptr, table_ptr, cap, KB, cfg, 0)),
            (consumer, (rings, bars, outs, out_strides, sh, index_ptr, table_ptr, cap, KB, cfg, 1)),
            (weight_loader, (descs, rings, bars, sh, index_ptr, table_ptr, cap, KB, cfg)),
            (scale_loader, (sa_sb, strides, rings, bars, sh, index_ptr, table_ptr, cap, KB, cfg)),
        ], [4, 1, 1], [cfg.CONSUMER_REGS, cfg.LOADER_REGS, cfg.LOADER_REGS])


def layouts(cfg):
    """Shared-memory layouts of the weights' and the tokens' TMA boxes."""
    return [gl.NVMMASharedLayout.get_default_for([1, rows, 128], gl.float8e4nv) for rows in (cfg.BN, cfg.BT)]
