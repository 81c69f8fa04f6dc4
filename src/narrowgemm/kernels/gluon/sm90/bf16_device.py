"""Device code of the Hopper BF16 product: dense, contiguous, offsets, psum, masked.

    out[m, n] (+)= (sum over k of A[m, k] . B[g, n, k]) * sa[m] * sb[g, n]      (without FACTORS: the sum)

Ring, schedule, sums and store are those of the kernel for row-wise scales (`fp8_scaled_device.py`); a K block is 64 elements, 128
bytes as there, and the tensor core's sum is FP32's, so nothing is promoted.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .fp8_block_parts_device import advance
from .fp8_block_schedule_device import DENSE, MASKED, first_tile, fresh, has_products, is_live, next_tile, total_tiles
from .fp8_scaled_device import producer
from .fp8_scaled_parts_device import store_padding, store_tile
from .fp8_scaled_sums_device import cut_all, products
from .ring_device import groups_table, operand_rings, ring_barriers, store_buffers
from .shim import view_as

BLOCK = gl.constexpr(64)
PLANES = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3))
TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))


@gluon.jit
def stored_as(acc, cfg: gl.constexpr):
    """The sums in the layout that the store takes: the same registers."""
    lay0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.COLS0, 32])
    out = (gl.convert_layout(acc[0], lay0, assert_trivial=True), )
    if cfg.COLS1 > 0:
        lay1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.COLS1, 32])
        out = out + (gl.convert_layout(acc[1], lay1, assert_trivial=True), )
    return out


@gluon.jit
def row_factors(scales, tile, cfg: gl.constexpr, WM: gl.constexpr):
    """Of a warpgroup's 64 rows; those that aren't the tile's are not read. They are on their way while products are summed."""
    sa_ptr, sag, sb_ptr, sbg = scales
    n, g, first, end, stop = tile
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    if cfg.LAYOUT == MASKED:
        sa_ptr += g.to(gl.int64) * sag
    row = first + WM * 64 + gl.arange(0, 64, gl.SliceLayout(1, mma))
    return gl.load(sa_ptr + row, mask=row < end, other=0)


@gluon.jit
def scaled(parts, rows, scales, tile, N, cfg: gl.constexpr, WN: gl.constexpr):
    """64 columns each, times the factors of rows and columns."""
    sa_ptr, sag, sb_ptr, sbg = scales
    n, g, first, end, stop = tile
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    PARTS: gl.constexpr = cfg.WN // 64
    out = ()
    for j in gl.static_range(PARTS):
        sa, x = gl.broadcast(gl.expand_dims(rows, 1), parts[j])
        x = x * sa
        if cfg.B_ROWS:
            col = n * cfg.BN + WN * cfg.WN + j * 64 + gl.arange(0, 64, gl.SliceLayout(0, mma))
            sb = gl.load(sb_ptr + g.to(gl.int64) * sbg + col, mask=col < N, other=0)
            sb, x = gl.broadcast(gl.expand_dims(sb, 0), x)
            x = x * sb
        out = out + (x, )
    return out


@gluon.jit
def multiply_tile(views, bars, slot, phase, d_s, d_desc, out, scales, problem, tile, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr):
    """A warpgroup's part of a tile, from the slots that come next: (slot, phase) behind them."""
    index_ptr, M, N, KB, G, alignment = problem
    mma0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.COLS0, 16])
    mma1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.COLS1 if cfg.COLS1 > 0 else cfg.COLS0, 16])
    factors = slot      # stands in
    if cfg.FACTORS:
        factors = row_factors(scales, tile, cfg, WM)
    acc, slot, phase = products(views, bars, slot, phase, KB, cfg, WM, WN, mma0, mma1)
    parts = cut_all(stored_as(acc, cfg), cfg)
    if cfg.FACTORS:
        parts = scaled(parts, factors, scales, tile, N, cfg, WN)
    store_tile(parts, d_s, d_desc, out, scales, problem, tile, cfg, WM, WN)
    return slot, phase


@gluon.jit
def pass_on(bars, slot, phase, KB, cfg: gl.constexpr):
    """As `multiply_tile`, where none of the warpgroup's rows is the group's: the tensor cores are left to the other one."""
    full, empty = bars
    for kb in range(KB):
        mbarrier.wait(full.index(slot), phase)
        mbarrier.arrive(empty.index(slot), count=1)
        slot, phase = advance(slot, phase, cfg.STAGES)
    return slot, phase


@gluon.jit
def consumer(d_desc, out, scales, rings, d_s, bars, table, problem, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr):
    """Rows [WM * 64, +64) and columns [WN * cfg.WN, +cfg.WN) of every tile."""
    a_s, b0_s, b1_s = rings
    index_ptr, M, N, KB, G, alignment = problem
    S: gl.constexpr = cfg.STAGES
    a_v = view_as(a_s, gl.bfloat16, S * cfg.WGM, 64, BLOCK, TILE)
    b0_v = view_as(b0_s, gl.bfloat16, S * cfg.WGN, cfg.COLS0, BLOCK, TILE)
    b1_v = b0_v
    if cfg.COLS1 > 0:
        b1_v = view_as(b1_s, gl.bfloat16, S * cfg.WGN, cfg.COLS1, BLOCK, TILE)
    total = total_tiles(table, M, N, cfg, 4)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    cursor, tile = first_tile((index_ptr, table, M, N, KB, G, alignment, total), cfg, 4)
    live = is_live(tile)
    while live:
        work = (index_ptr, table, fresh(M), fresh(N), KB, fresh(G), alignment, total)
        if has_products(tile, cfg):
            if cfg.TAIL and WM > 0:
                if tile[2] + WM * 64 < tile[3]:
                    slot, phase = multiply_tile((a_v, b0_v, b1_v), bars, slot, phase, d_s, d_desc, out, scales, problem, tile, cfg, WM, WN)
                else:
                    slot, phase = pass_on(bars, slot, phase, KB, cfg)
            else:
                slot, phase = multiply_tile((a_v, b0_v, b1_v), bars, slot, phase, d_s, d_desc, out, scales, problem, tile, cfg, WM, WN)
        elif cfg.ZERO and cfg.LAYOUT != DENSE:
            store_padding(out, tile, tile[2] + WM * 64, tile[0] * cfg.BN + WN * cfg.WN, N, cfg)
        cursor, tile = next_tile(cursor, tile, work, cfg, 4)
        live = is_live(tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "KB", "G", "alignment", "limit", "sag", "sbg", "out_pitch"])
def bf16_kernel(a_desc, b0_desc, b1_desc, d_desc, out_ptr, sa_ptr, sb_ptr, index_ptr, count_ptr, M, N, KB, G, alignment, limit, sag,
                sbg, og, om, out_pitch, cfg: gl.constexpr):
    """A persistent grid. M: rows of A, or rows a group can hold (masked). a_desc [1 or G, M, K], b0_desc, b1_desc [1 or G, rows, K],
    d_desc [M, N]; out_pitch: rows of d_desc from one group to the next (masked). sag, sbg: from the factors of one group to
    those of the next; og, om: strides of the output. KB: K blocks of 64, the last of which may be cut short. GATE: nothing is done
    where what count_ptr holds is no more than `limit`."""
    if cfg.GATE:
        M = gl.where(gl.load(count_ptr) > limit, M, 0)
    S: gl.constexpr = cfg.STAGES
    rings = operand_rings(a_desc, b0_desc, b1_desc, BLOCK, PLANES, cfg)
    d_s = store_buffers(out_ptr, cfg)
    bars = ring_barriers(S, 1, cfg.CONSUMERS)
    table = groups_table(bars[0], index_ptr, M, G, alignment, cfg)

    descs = (a_desc, b0_desc, b1_desc)
    problem = (index_ptr, M, N, KB, G, alignment)
    scales = (sa_ptr, sag, sb_ptr, sbg)
    out = (out_ptr, og, om, out_pitch)
    if cfg.CONSUMERS == 1:
        gl.warp_specialize([
            (consumer, (d_desc, out, scales, rings, d_s, bars, table, problem, cfg, 0, 0)),
            (producer, (descs, rings, bars, table, problem, cfg)),
        ], [1], [cfg.PRODUCER_REGISTERS])
    else:
        gl.warp_specialize([
            (consumer, (d_desc, out, scales, rings, d_s, bars, table, problem, cfg, 0, 0)),
            (consumer, (d_desc, out, scales, rings, d_s, bars, table, problem, cfg, cfg.WGM - 1, cfg.WGN - 1)),
            (producer, (descs, rings, bars, table, problem, cfg)),
        ], [4, 1], [cfg.CONSUMER_REGISTERS, cfg.PRODUCER_REGISTERS])
