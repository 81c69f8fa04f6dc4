"""Device code of the Hopper prefill kernel with MXFP4 weights folded into E4M3: dense, contiguous, offsets, psum, masked.

    out[m, n] (+)= (sum over K blocks of  (A[m, kb] . B[g, n, kb]) * sa[m, kb]) * s[g, n]

Schedule, consumers, promotion and store are the FP8 kernel's (`fp8_block_device.py`); A and its scales come as there. In between:

    warps          does, for every tile of its block
    producer (1)   TMA of A and its scales into the ring, and of 4-bit weights and their scales into a ring of their own
    expander (4)   those weights to E4M3 (`fold_expand_device.py`), into the slot of the ring that wgmma reads
    consumer (2x4) wgmma, promotion, release of the slot; the store, which multiplies by the column's power of two

A slot is full when A's bytes have come and the expander has arrived.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from . import fold_quarters_device as quarters
from .fold_expand_device import FIELDS, WORDS, expand, lane_table, row_tops
from .fold_stub_device import has_stub
from .fp8_block_device import consumer
from .fp8_block_parts_device import FP8_PLANE, advance
from .fp8_block_schedule_device import MASKED, ROW_OF_INTS, first_tile, has_products, next_tile, total_tiles
from .ring_device import groups_table, ring_barriers, store_buffers
from .shim import tma_load, view_as

PLANES = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3))
WORDS_TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))
FP8_RING = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=3))
ROWS_OF_INTS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


# ---------------------------------------------------------------- which tile comes next: by the list of QUARTERS, or by the table
@gluon.jit
def begin(table, problem, total, cfg: gl.constexpr, WARPS: gl.constexpr):
    """(cursor, the first tile)."""
    index_ptr, M, N, KB, G, alignment = problem
    if cfg.QUARTERS:
        return KB * 0, quarters.item(table, KB * 0, cfg, WARPS)
    else:
        return first_tile((index_ptr, table, M, N, KB, G, alignment, total), cfg, WARPS)


@gluon.jit
def next_one(cursor, tile, table, problem, total, cfg: gl.constexpr, WARPS: gl.constexpr):
    """(cursor, tile) after `tile`."""
    index_ptr, M, N, KB, G, alignment = problem
    if cfg.QUARTERS:
        return cursor + 1, quarters.item(table, cursor + 1, cfg, WARPS)
    else:
        return next_tile(cursor, tile, (index_ptr, table, M, N, KB, G, alignment, total), cfg, WARPS)


@gluon.jit
def all_tiles(table, problem, cfg: gl.constexpr, WARPS: gl.constexpr):
    index_ptr, M, N, KB, G, alignment = problem
    if cfg.QUARTERS:
        return KB * 0
    else:
        return total_tiles(table, M, N, cfg, WARPS)


@gluon.jit
def runs(tile, cfg: gl.constexpr):
    if cfg.QUARTERS:
        return tile[0] >= 0
    else:
        return has_products(tile, cfg)


@gluon.jit
def is_whole(tile, cfg: gl.constexpr):
    """Whether both halves of the tile's rows are worked on."""
    if cfg.QUARTERS:
        return tile[4] == quarters.WHOLE
    else:
        return tile[2] + cfg.BM // 2 < tile[3]


@gluon.jit
def first_unit(tile, cfg: gl.constexpr):
    """Of its group's weights, tiles of 64 rows."""
    if cfg.QUARTERS:
        return gl.where(tile[4] == quarters.QUARTER, tile[0], tile[0] * cfg.UNITS)
    else:
        return tile[0] * cfg.UNITS


@gluon.jit
def producer(descs, rings, bars, table, problem, NT, cfg: gl.constexpr):
    a_desc, sa_desc, w_desc, s_desc, stub_desc, stub_sa_desc = descs
    a_s, sa_s, w_s, s_s, stub_s, stub_sa_s = rings
    full, empty, w_full, w_empty = bars
    index_ptr, M, N, KB, G, alignment = problem
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    w_slot = gl.to_tensor(0)
    w_phase = gl.to_tensor(1)
    total = all_tiles(table, problem, cfg, 1)
    cursor, tile = begin(table, problem, total, cfg, 1)
    n, g, first, end, stop = tile
    while n >= 0:
        plane = g * 0
        if cfg.LAYOUT == MASKED:
            plane = g
        unit = g * NT + first_unit((n, g, first, end, stop), cfg)
        row = first
        # the next tile is looked up first, so that its loads are off the path between two tiles
        run = runs((n, g, first, end, stop), cfg)
        whole = is_whole((n, g, first, end, stop), cfg)
        if cfg.STUB > 0:
            stub = has_stub((n, g, first, end, stop), cfg)
        cursor, ahead = next_one(cursor, (n, g, first, end, stop), table, problem, total, cfg, 1)
        if run:
            for kb in range(KB):
                mbarrier.wait(w_empty.index(w_slot), w_phase)
                bar = w_full.index(w_slot)
                mbarrier.expect(bar, cfg.W_BYTES)
                tma_load(w_desc, [unit, kb * 4, 0], bar, w_s.index(w_slot))
                tma_load(s_desc, [unit, kb // 2, 0], bar, s_s.index(w_slot))
                w_slot, w_phase = advance(w_slot, w_phase, cfg.W_STAGES)
                mbarrier.wait(empty.index(slot), phase)
                bar = full.index(slot)
                if cfg.TAIL:
                    if cfg.STUB > 0:
                        mbarrier.expect(bar, cfg.BLOCK_BYTES + cfg.STUB * (128 + 4), pred=stub)
                        mbarrier.expect(bar, cfg.BLOCK_BYTES, pred=whole & (stub == 0))
                        tma_load(stub_desc, [plane, row + cfg.BM, kb * 128], bar, stub_s.index(slot), pred=stub)
                        tma_load(stub_sa_desc, [plane, kb * cfg.SUB, row + cfg.BM], bar, stub_sa_s.index(slot), pred=stub)
                    else:
                        mbarrier.expect(bar, cfg.BLOCK_BYTES, pred=whole)
                    mbarrier.expect(bar, cfg.BLOCK_BYTES - cfg.A_BOX * 128, pred=whole == 0)
                    tma_load(a_desc, [plane, row, kb * 128], bar, a_s.index(slot * 2))
                    tma_load(a_desc, [plane, row + cfg.A_BOX, kb * 128], bar, a_s.index(slot * 2 + 1), pred=whole)
                else:
                    mbarrier.expect(bar, cfg.BLOCK_BYTES)
                    tma_load(a_desc, [plane, row, kb * 128], bar, a_s.index(slot))
                tma_load(sa_desc, [plane, kb * cfg.SUB, row], bar, sa_s.index(slot))
                slot, phase = advance(slot, phase, cfg.STAGES)
        n, g, first, end, stop = ahead


@gluon.jit
def expand_tile(slot, phase, w_slot, w_phase, views, bars, tops, tables, KB, cfg: gl.constexpr, COUNT: gl.constexpr):
    """The first COUNT units of a tile over all of K."""
    b_v, w_v, s_v = views
    full, empty, w_full, w_empty = bars
    UNITS: gl.constexpr = cfg.UNITS
    for kb in range(KB):
        mbarrier.wait(w_full.index(w_slot), w_phase)
        words = ()
        fields = ()
        for u in gl.static_range(COUNT):
            words = words + (w_v.index(w_slot * UNITS + u).load(WORDS), )
            fields = fields + (s_v.index(w_slot * UNITS + u).load(FIELDS) >> (16 * (kb % 2)), )
        mbarrier.wait(empty.index(slot), phase)
        for u in gl.static_range(COUNT):
            b_v.index(slot * UNITS + u).store(expand(words[u], fields[u], tops[u], tables, cfg.NIBBLES))
        fence_async_shared()
        mbarrier.arrive(full.index(slot), count=1)
        mbarrier.arrive(w_empty.index(w_slot), count=1)
        slot, phase = advance(slot, phase, cfg.STAGES)
        w_slot, w_phase = advance(w_slot, w_phase, cfg.W_STAGES)
    return slot, phase, w_slot, w_phase


@gluon.jit
def expander(rings, bars, table, problem, top_ptr, NT, cfg: gl.constexpr):
    b_s, w_s, s_s = rings
    full, empty, w_full, w_empty = bars
    index_ptr, M, N, KB, G, alignment = problem
    UNITS: gl.constexpr = cfg.UNITS
    b_v = view_as(b_s, gl.int32, cfg.STAGES * UNITS, 64, 32, WORDS_TILE)
    w_v = view_as(w_s, gl.int32, cfg.W_STAGES * UNITS, 64, 16, ROWS_OF_INTS)
    s_v = view_as(s_s, gl.int32, cfg.W_STAGES * UNITS, 32, 4, ROWS_OF_INTS)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    w_slot = gl.to_tensor(0)
    w_phase = gl.to_tensor(0)
    tables = lane_table()
    total = all_tiles(table, problem, cfg, 4)
    cursor, tile = begin(table, problem, total, cfg, 4)
    n, g, first, end, stop = tile
    while n >= 0:
        unit = first_unit((n, g, first, end, stop), cfg)
        group = g
        kind = stop
        run = runs((n, g, first, end, stop), cfg)
        cursor, ahead = next_one(cursor, (n, g, first, end, stop), table, problem, total, cfg, 4)
        if run:
            tops = ()
            for u in gl.static_range(UNITS):
                tops = tops + (row_tops(top_ptr, (group * NT + unit + u).to(gl.int64) * 64, (NT - unit - u) * 64), )
            if cfg.QUARTERS:
                if kind == quarters.QUARTER:
                    slot, phase, w_slot, w_phase = expand_tile(slot, phase, w_slot, w_phase, (b_v, w_v, s_v), bars, tops, tables, KB, cfg, 1)
                else:
                    slot, phase, w_slot, w_phase = expand_tile(slot, phase, w_slot, w_phase, (b_v, w_v, s_v), bars, tops, tables, KB, cfg, UNITS)
            else:
                slot, phase, w_slot, w_phase = expand_tile(slot, phase, w_slot, w_phase, (b_v, w_v, s_v), bars, tops, tables, KB, cfg, UNITS)
        n, g, first, end, stop = ahead


@gluon.jit
def gated(M, flags_ptr, flags, cfg: gl.constexpr):
    """M, or 0 where another product does the work: a product without rows is nothing to do."""
    if cfg.GATE > 0:
        at = gl.arange(0, cfg.FLAGS, gl.BlockedLayout([cfg.FLAGS // 128 if cfg.FLAGS > 128 else 1], [32], [4], [0]))
        up = gl.max(gl.load(flags_ptr + at, mask=at < flags, other=0), 0) > 0
        M = gl.where(up == (cfg.GATE == 2), M, 0)
    return M


@gluon.jit(do_not_specialize=["M", "KB", "G", "alignment", "flags", "NT", "out_pitch"])
def fold_kernel(a_desc, sa_desc, w_desc, s_desc, stub_desc, stub_sa_desc, d_desc, out_ptr, top_ptr, factor_ptr, index_ptr, flags_ptr, M, N, KB, G, alignment,
                flags, NT, og, om, out_pitch, cfg: gl.constexpr):
    """A persistent grid. M: rows of A, or rows a group can hold (masked). a_desc [1 or G, M, K] E4M3, sa_desc [1 or G, KB * SUB, M],
    w_desc int32 [G * NT, KB * 4, 256] and s_desc int32 [G * NT, ceil(KB / 2), 128]: tiles of 64 weight rows, NT a group; d_desc
    [M, N]; stub_desc, stub_sa_desc: as a_desc and sa_desc, of STUB rows; top, factor [G, NT * 64]; flags: their number; out_pitch: rows of d_desc from one group to the next (masked)."""
    M = gated(M, flags_ptr, flags, cfg)
    STAGES: gl.constexpr = cfg.STAGES
    a_s = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * (cfg.BM // cfg.A_BOX), 1, cfg.A_BOX, 128], FP8_PLANE)
    b_s = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * cfg.UNITS, 64, 128], FP8_RING)
    W_STAGES: gl.constexpr = cfg.W_STAGES
    w_s = gl.allocate_shared_memory(gl.int32, [W_STAGES, cfg.UNITS, 4, 256], PLANES)
    s_s = gl.allocate_shared_memory(gl.int32, [W_STAGES, cfg.UNITS, 1, 128], PLANES)
    d_s = store_buffers(out_ptr, cfg)
    sa_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, cfg.SUB, cfg.BM], sa_desc.layout)
    rings = (a_s, sa_s, b_s)
    loaded = (a_s, sa_s, w_s, s_s, a_s, sa_s)
    if cfg.STUB > 0:
        stub_s = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 1, cfg.STUB, 128], FP8_PLANE)
        stub_sa_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, cfg.SUB, cfg.STUB], sa_desc.layout)
        rings = (a_s, sa_s, b_s, stub_s, stub_sa_s)
        loaded = (a_s, sa_s, w_s, s_s, stub_s, stub_sa_s)
    ring = ring_barriers(STAGES, 2, cfg.CONSUMERS)
    bars = ring + ring_barriers(W_STAGES, 1, 1)
    if cfg.QUARTERS:
        table = gl.allocate_shared_memory(gl.int32, [quarters.ITEM_FIELDS, cfg.ITEMS], ROW_OF_INTS)
        quarters.make_items(table, index_ptr, M, N, G, cfg)
        fence_async_shared()
    else:
        table = groups_table(bars[0], index_ptr, M, G, alignment, cfg)

    problem = (index_ptr, M, N, KB, G, alignment)
    scales = (top_ptr, 0, 0, 0, top_ptr, NT * 64, factor_ptr, 0)
    out = (out_ptr, og, om, out_pitch)
    descs = (a_desc, sa_desc, w_desc, s_desc, stub_desc, stub_sa_desc)
    if cfg.QUARTERS:
        gl.warp_specialize([
            (quarters.consumer, (d_desc, out, scales, rings, d_s, ring, table, problem, cfg, 0)),
            (quarters.consumer, (d_desc, out, scales, rings, d_s, ring, table, problem, cfg, 1)),
            (expander, ((b_s, w_s, s_s), bars, table, problem, top_ptr, NT, cfg)),
            (producer, (descs, loaded, bars, table, problem, NT, cfg)),
        ], [4, 4, 1], [cfg.CONSUMER_REGISTERS, cfg.EXPANDER_REGISTERS, cfg.PRODUCER_REGISTERS])
    else:
        gl.warp_specialize([
            (consumer, (d_desc, out, scales, rings, d_s, ring, table, problem, cfg, 0, 0)),
            (consumer, (d_desc, out, scales, rings, d_s, ring, table, problem, cfg, cfg.WGM - 1, cfg.WGN - 1)),
            (expander, ((b_s, w_s, s_s), bars, table, problem, top_ptr, NT, cfg)),
            (producer, (descs, loaded, bars, table, problem, NT, cfg)),
        ], [4, 4, 1], [cfg.CONSUMER_REGISTERS, cfg.EXPANDER_REGISTERS, cfg.PRODUCER_REGISTERS])
