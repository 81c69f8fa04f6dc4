"""What the Hopper kernels that keep a ring of K blocks have in common: buffers of the store, barriers, the table of groups, the producer."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .fp8_block_parts_device import advance
from .fp8_block_schedule_device import MASKED, OFFSETS, ROW_OF_INTS, fill_table, first_tile, has_products, next_tile, total_tiles
from .shim import block_barrier


@gluon.jit
def store_buffers(out_ptr, cfg: gl.constexpr):
    """64 rows each, OUT_BUFFERS a consumer."""
    out: gl.constexpr = out_ptr.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, cfg.OUT_COLS], out)
    return gl.allocate_shared_memory(out, [cfg.CONSUMERS * cfg.OUT_BUFFERS, 64, cfg.OUT_COLS], layout)


@gluon.jit
def operand_rings(a_desc, b0_desc, b1_desc, BLOCK: gl.constexpr, layout: gl.constexpr, cfg: gl.constexpr):
    """(A's, B's, the rest of B's) boxes of STAGES K blocks. A tile whose columns are no power of two has its B in two parts;
    of one part only, the rest is the first again."""
    a_s = gl.allocate_shared_memory(a_desc.dtype, [cfg.STAGES, 1, cfg.BM, BLOCK], layout)
    b0_s = gl.allocate_shared_memory(b0_desc.dtype, [cfg.STAGES, 1, cfg.WGN * cfg.COLS0, BLOCK], layout)
    b1_s = b0_s
    if cfg.COLS1 > 0:
        b1_s = gl.allocate_shared_memory(b1_desc.dtype, [cfg.STAGES, 1, cfg.WGN * cfg.COLS1, BLOCK], layout)
    return a_s, b0_s, b1_s


@gluon.jit
def ring_barriers(STAGES: gl.constexpr, FILLED: gl.constexpr, FREED: gl.constexpr):
    """(full, empty), a barrier a slot: FILLED arrivals beside TMA's bytes make it full, FREED make it empty."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=FILLED)
        mbarrier.init(empty.index(i), count=FREED)
    return full, empty


@gluon.jit
def groups_table(stand_in, index_ptr, M, G, alignment, cfg: gl.constexpr):
    """Where groups end, in layouts that say it by group; `stand_in` in the others. Barriers are ready for TMA afterwards."""
    table = stand_in
    if cfg.LAYOUT >= OFFSETS:
        table = gl.allocate_shared_memory(gl.int32, [cfg.GROUPS], ROW_OF_INTS)
        fill_table(table, index_ptr, M, G, alignment, cfg, 4)
        block_barrier()
    fence_async_shared()
    return table


@gluon.jit
def place_of(tile, cfg: gl.constexpr):
    """Where a tile's operands lie: (plane and row of A, group and row of B)."""
    n, g, first, end, stop = tile
    plane = g * 0
    if cfg.LAYOUT == MASKED:
        plane = g
    return plane, first, g, n * cfg.BN


@gluon.jit
def feed(fill: gl.constexpr, load: gl.constexpr, operands, bars, table, problem, cfg: gl.constexpr):
    """A producer's work: `fill` starts the loads of a tile, by `load`, as far ahead as the ring is long, and returns the (slot, phase)
    behind them. `operands`: what is loaded, and to where."""
    index_ptr, M, N, KB, G, alignment = problem
    work = (index_ptr, table, M, N, KB, G, alignment, total_tiles(table, M, N, cfg, 1))
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    cursor, tile = first_tile(work, cfg, 1)
    n, g, first, end, stop = tile
    while n >= 0:
        here = (n, g, first, end, stop)
        at = place_of(here, cfg)
        # the next tile is looked up first, so that its loads are off the path between two tiles
        run = has_products(here, cfg)
        cursor, ahead = next_tile(cursor, here, work, cfg, 1)
        if run:
            slot, phase = fill(load, operands, here, at, slot, phase, bars, problem, cfg)
        n, g, first, end, stop = ahead


@gluon.jit
def fill_blocks(load: gl.constexpr, operands, tile, at, slot, phase, bars, problem, cfg: gl.constexpr):
    """All K blocks of a tile, a slot each."""
    descs, rings = operands
    full, empty = bars
    index_ptr, M, N, KB, G, alignment = problem
    for kb in range(KB):
        mbarrier.wait(empty.index(slot), phase)
        load(descs, rings, full.index(slot), slot, at, kb, cfg)
        slot, phase = advance(slot, phase, cfg.STAGES)
    return slot, phase
