"""Device code of the Hopper FP8 weight gradient: out[g] (+)= A[:, ks] . B[:, ks]^T over the columns ks of group g.

Columns of a group start at a multiple of 128 and end on zeros, so that a K block belongs to one group and TMA and wgmma
see whole ones. `fp8_wgrad_plan_device.py` sorts the groups by length: items, a tile of one group's output each, are dealt
out round robin, the longest first, so that no SM is ever ahead by more than one of them. Long tiles are cut into chunks
along K where they would set the time; each chunk leaves its sum in the workspace, and the last one of a tile to be done
adds them up, always in the same order.

    warps                does, for every item of its block
    producer (1)         TMA of A and B into a ring of shared memory, as far ahead as the ring is long
    consumer (2x4)       wgmma of one K block after another, release of the slots; promotion; scales; stores
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .fp8_block_parts_device import FP8_PLANE, FP8_TILE, ROW_OF_FLOATS, advance
from .fp8_block_schedule_device import ROW_OF_INTS, clip, entries, fresh, strip_order
from .fp8_scaled_parts_device import fetch_scales, load_block, store_tile
from .fp8_scaled_sums_device import cut_all, piece_of, piece_products, products, scaled_products
from .ring_device import operand_rings, ring_barriers, store_buffers
from .shim import block_barrier, tma_load, view_as, view_rows


# An item is (n block or -1 where there is none, group, first row, rows of the output, position in the plan, item of the group,
# first K block, K blocks). A cursor is (t, chunk of the table, items before it).
@gluon.jit
def find_item(t, chunk, before, work, cfg: gl.constexpr, WARPS: gl.constexpr):
    """The item of number t, and the cursor to look up the next one from."""
    plan_ptr, offs_ptr, order, ends, M, N, K, total = work
    lay: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    num_m = gl.cdiv(M, cfg.BM)
    num_n = gl.cdiv(N, cfg.BN)
    live = t < total
    u = gl.minimum(t, gl.maximum(total - 1, 0))
    v = entries(ends, chunk, cfg, WARPS)
    hits = gl.sum((v <= u).to(gl.int32), 0)
    if cfg.GROUPS > 32:
        while (hits == 32) & (chunk < cfg.GROUPS // 32 - 1):
            before = gl.max(v, 0)
            chunk += 1
            v = entries(ends, chunk, cfg, WARPS)
            hits = gl.sum((v <= u).to(gl.int32), 0)
    first = gl.maximum(gl.max(gl.where(v <= u, v, 0), 0), before)
    g = gl.sum(gl.where(gl.arange(0, 32, lay) == hits, entries(order, chunk, cfg, WARPS), 0), 0)
    at = gl.minimum(chunk * 32 + hits, cfg.GROUPS - 1)
    r = u - first
    start = clip(gl.load(offs_ptr + g), K)
    kb0 = start // 128
    count = (gl.maximum(clip(gl.load(offs_ptr + g + 1), K) - start, 0) + 127) // 128
    tile = r
    if cfg.SPLIT:
        # a chunk of every tile before the next chunk of any: blocks that run together share their columns through L2
        chunks = gl.load(plan_ptr + 2 * cfg.GROUPS + at)
        c = r // (num_m * num_n)
        tile = r - c * (num_m * num_n)
        low = (c.to(gl.int64) * count // chunks).to(gl.int32)
        count = ((c + 1).to(gl.int64) * count // chunks).to(gl.int32) - low
        kb0 += low
    m, n = strip_order(tile, num_m, num_n, cfg.STRIP)
    return chunk, before, (gl.where(live, n, -1), g, m * cfg.BM, M, at, r, kb0, count)


# ---------------------------------------------------------------- tiles that were cut along K
@gluon.jit
def partial_pointers(sums_ptr, at, part: gl.constexpr, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr):
    """Where a warpgroup keeps 64 of its columns of item `at`."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    base = sums_ptr + ((at.to(gl.int64) * cfg.CONSUMERS + (WM * cfg.WGN + WN)) * (cfg.MP * cfg.WN // 64) + part) * (64 * 64)
    row = gl.arange(0, 64, gl.SliceLayout(1, mma))
    col = gl.arange(0, 64, gl.SliceLayout(0, mma))
    return base + (gl.expand_dims(row * 64, 1) + gl.expand_dims(col, 0))


@gluon.jit
def keep(parts, sums_ptr, at, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr):
    """Leave a chunk's sums of this warpgroup in memory, as item `at`."""
    PARTS: gl.constexpr = cfg.MP * cfg.WN // 64
    for j in gl.static_range(PARTS):
        gl.store(partial_pointers(sums_ptr, at, j, cfg, WM, WN), parts[j])


@gluon.jit
def collect(sums_ptr, at, tiles, chunks, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr):
    """The sums of a tile's chunks, always in the same order. They are other SMs': read past L1."""
    PARTS: gl.constexpr = cfg.MP * cfg.WN // 64
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    out = ()
    for j in gl.static_range(PARTS):
        x = gl.zeros([64, 64], gl.float32, mma)
        for i in range(chunks):
            x += gl.load(partial_pointers(sums_ptr, at + i * tiles, j, cfg, WM, WN), cache_modifier=".cg")
        out = out + (x, )
    return out


@gluon.jit
def producer(descs, rings, bars, work, cfg: gl.constexpr):
    """TMA of every item's K blocks, as far ahead as the ring is long."""
    full, empty = bars
    a_desc, b0_desc, b1_desc, sa_desc, sb_desc = descs
    a_s, b0_s, b1_s, sa_s, sb_s = rings
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    t = gl.program_id(0)
    chunk, before, item = find_item(t, t * 0, t * 0, work, cfg, 1)
    n, g, first, end, at, r, kb0, count = item
    while n >= 0:
        place = (g * 0, first, g * 0, n * cfg.BN)
        low = kb0
        many = count
        # the next item is looked up first, so that its loads are off the path between two
        t += gl.num_programs(0)
        chunk, before, item = find_item(t, chunk, before, work, cfg, 1)
        for kb in range(low, low + many):
            mbarrier.wait(empty.index(slot), phase)
            load_block((a_desc, b0_desc, b1_desc), (a_s, b0_s, b1_s), full.index(slot), slot, place, kb, cfg)
            if cfg.BLOCKS:
                tma_load(sa_desc, [kb, place[1]], full.index(slot), sa_s.index(slot))
                tma_load(sb_desc, [kb, place[3]], full.index(slot), sb_s.index(slot))
            slot, phase = advance(slot, phase, cfg.STAGES)
        n, g, first, end, at, r, kb0, count = item


@gluon.jit
def consumer(d_desc, out, scales, cut, rings, d_s, bars, work, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr):
    """Rows [WM * MP * 64, +MP * 64) and columns [WN * cfg.WN, +cfg.WN) of every tile."""
    a_s, b0_s, b1_s, sa_s, sb_s = rings
    plan_ptr, offs_ptr, order, ends, M, N, K, total = work
    S: gl.constexpr = cfg.STAGES
    MP: gl.constexpr = cfg.MP
    mma0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.COLS0, 32])
    mma1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.COLS1 if cfg.COLS1 > 0 else cfg.COLS0, 32])
    a_v = view_as(a_s, a_s.dtype, S * cfg.WGM * MP, 64, 128, FP8_TILE)
    b0_v = view_as(b0_s, b0_s.dtype, S * cfg.WGN, cfg.COLS0, 128, FP8_TILE)
    b1_v = b0_v
    if cfg.COLS1 > 0:
        b1_v = view_as(b1_s, b1_s.dtype, S * cfg.WGN, cfg.COLS1, 128, FP8_TILE)
    scale_views = (a_v, b0_v)
    if cfg.BLOCKS:
        COLS: gl.constexpr = cfg.COLS0 if MP == 1 else 64      # that scales are read of at a time
        scale_views = (view_rows(sa_s, gl.float32, S * cfg.WGM * MP, 64, ROW_OF_FLOATS),
                       view_rows(sb_s, gl.float32, S * cfg.WGN * cfg.COLS0 // COLS, COLS, ROW_OF_FLOATS))
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    t = gl.program_id(0)
    chunk, before, item = find_item(t, t * 0, t * 0, work, cfg, 4)
    live = item[0] >= 0
    while live:
        n, g, first, end, at, r, kb0, count = item
        fetched = scales     # stands in, where scales are summed up with
        if not cfg.BLOCKS:
            fetched = fetch_scales(scales, (n, g, first, end, end), N, cfg, WM, WN)
        chunks = 1
        if cfg.SPLIT:
            chunks = gl.load(plan_ptr + 2 * cfg.GROUPS + at)
        if MP > 1:
            parts, slot, phase = piece_products((a_v, b0_v, b1_v), scale_views, bars, slot, phase, count, cfg, WM, WN, mma0)
        elif cfg.BLOCKS:
            acc, slot, phase = scaled_products((a_v, b0_v, b1_v), scale_views, bars, slot, phase, count, cfg, WM, WN, mma0)
            parts = cut_all(acc, cfg)
        else:
            acc, slot, phase = products((a_v, b0_v, b1_v), bars, slot, phase, count, cfg, WM, WN, mma0, mma1)
            parts = cut_all(acc, cfg)
        # the next item is looked up in front of the store, which what it loads is on its way beside
        t += gl.num_programs(0)
        chunk, before, ahead = find_item(t, chunk, before, (plan_ptr, offs_ptr, order, ends, fresh(M), fresh(N), K, total), cfg, 4)
        done = n >= 0
        if cfg.ACCUMULATE:
            done = count > 0
        if cfg.SPLIT:
            if chunks > 1:
                tiles = gl.cdiv(M, cfg.BM) * gl.cdiv(N, cfg.BN)
                base = gl.load(plan_ptr + 3 * cfg.GROUPS + at)
                tile = r % tiles
                keep(parts, cut[1], base + r, cfg, WM, WN)
                block_barrier()     # every thread's sums before the arrival, which the others' come after
                count_ptr = cut[0] + ((base + tile) * cfg.CONSUMERS + (WM * cfg.WGN + WN))
                done = gl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu") == chunks - 1
                if done:
                    parts = collect(cut[1], base + tile, tiles, chunks, cfg, WM, WN)
        if done:
            for i in gl.static_range(MP):
                store_tile(piece_of(parts, cfg, i), d_s, d_desc, out, fetched, (plan_ptr, M, N, count, g, g), (n, g, first, end, end), cfg,
                           WM, WN, i)
        item = ahead
        live = item[0] >= 0
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "K", "sag", "sam", "sbg", "sbn", "out_pitch"])
def fp8_wgrad_kernel(a_desc, b0_desc, b1_desc, sa_desc, sb_desc, d_desc, out_ptr, sa_ptr, sb_ptr, offs_ptr, plan_ptr, count_ptr,
                     sums_ptr, M, N, K, sag, sam, sbg, sbn, og, om, out_pitch, cfg: gl.constexpr):
    """A persistent grid. a_desc [1, M, K], b0_desc, b1_desc [1, N, K], sa_desc [K blocks, M] and sb_desc [K blocks, N] (BLOCKS),
    d_desc [rows, N]; out_pitch: rows of d_desc from one group to the next. s..: strides of scales; og, om: of the output.
    plan_ptr, count_ptr, sums_ptr: see the plan. `cfg.LAYOUT` is masked: the output is stored as such."""
    S: gl.constexpr = cfg.STAGES
    a_s, b0_s, b1_s = operand_rings(a_desc, b0_desc, b1_desc, 128, FP8_PLANE, cfg)
    sa_s = a_s
    sb_s = b0_s
    if cfg.BLOCKS:
        sa_s = gl.allocate_shared_memory(gl.float32, [S, 1, cfg.BM], sa_desc.layout)
        sb_s = gl.allocate_shared_memory(gl.float32, [S, 1, cfg.BN], sb_desc.layout)
    d_s = store_buffers(out_ptr, cfg)
    bars = ring_barriers(S, 1, cfg.CONSUMERS)
    order = gl.allocate_shared_memory(gl.int32, [cfg.GROUPS], ROW_OF_INTS)
    ends = gl.allocate_shared_memory(gl.int32, [cfg.GROUPS], ROW_OF_INTS)
    lay: gl.constexpr = gl.BlockedLayout([cfg.GROUPS // 128 if cfg.GROUPS > 128 else 1], [32], [4], [0])
    i = gl.arange(0, cfg.GROUPS, lay)
    order.store(gl.load(plan_ptr + i))
    ends.store(gl.load(plan_ptr + cfg.GROUPS + i))
    total = gl.load(plan_ptr + 2 * cfg.GROUPS - 1)
    block_barrier()
    fence_async_shared()

    descs = (a_desc, b0_desc, b1_desc, sa_desc, sb_desc)
    rings = (a_s, b0_s, b1_s, sa_s, sb_s)
    cut = (count_ptr, sums_ptr)
    work = (plan_ptr, offs_ptr, order, ends, M, N, K, total)
    scales = (sa_ptr, sag, sam, sb_ptr, sbg, sbn)
    out = (out_ptr, og, om, out_pitch)
    gl.warp_specialize([
        (consumer, (d_desc, out, scales, cut, rings, d_s, bars, work, cfg, 0, 0)),
        (consumer, (d_desc, out, scales, cut, rings, d_s, bars, work, cfg, cfg.WGM - 1, cfg.WGN - 1)),
        (producer, (descs, rings, bars, work, cfg)),
    ], [4, 1], [cfg.CONSUMER_REGISTERS, cfg.PRODUCER_REGISTERS])
