"""Device code of the Hopper FP8 kernel with row-wise or tensor-wise scales: dense, contiguous, offsets, psum, masked.

    out[m, n] (+)= (sum over k of A[m, k] . B[g, n, k]) * sa[m] * sb[g, n]

    warps                does, for every tile of its block
    producer (1)         TMA of A and B into a ring of shared memory, as far ahead as the ring is long
    consumer (1 or 2x4)  wgmma of one K block after another, release of the slots; promotion to FP32 every PROMOTE blocks; scales; stores

While one warpgroup promotes or stores, the other one's wgmma keep the tensor cores busy.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from .fp8_block_parts_device import FP8_PLANE, FP8_TILE
from .fp8_block_schedule_device import DENSE, first_tile, fresh, has_products, is_live, next_tile, total_tiles
from .fp8_scaled_parts_device import fetch_scales, load_block, store_padding, store_tile
from .fp8_scaled_sums_device import cut_all, products
from .ring_device import feed, fill_blocks, groups_table, operand_rings, ring_barriers, store_buffers
from .shim import view_as


@gluon.jit
def producer(descs, rings, bars, table, problem, cfg: gl.constexpr):
    feed(fill_blocks, load_block, (descs, rings), bars, table, problem, cfg)


@gluon.jit
def consumer(d_desc, out, scales, rings, d_s, bars, table, problem, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr):
    """Rows [WM * 64, +64) and columns [WN * cfg.WN, +cfg.WN) of every tile."""
    a_s, b0_s, b1_s = rings
    index_ptr, M, N, KB, G, alignment = problem
    S: gl.constexpr = cfg.STAGES
    mma0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.COLS0, 32])
    mma1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.COLS1 if cfg.COLS1 > 0 else cfg.COLS0, 32])
    a_v = view_as(a_s, a_s.dtype, S * cfg.WGM, 64, 128, FP8_TILE)
    b0_v = view_as(b0_s, b0_s.dtype, S * cfg.WGN, cfg.COLS0, 128, FP8_TILE)
    b1_v = b0_v
    if cfg.COLS1 > 0:
        b1_v = view_as(b1_s, b1_s.dtype, S * cfg.WGN, cfg.COLS1, 128, FP8_TILE)
    total = total_tiles(table, M, N, cfg, 4)
    work = (index_ptr, table, M, N, KB, G, alignment, total)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    cursor, tile = first_tile(work, cfg, 4)
    live = is_live(tile)
    while live:
        work = (index_ptr, table, fresh(M), fresh(N), KB, fresh(G), alignment, total)
        if has_products(tile, cfg):
            fetched = fetch_scales(scales, tile, N, cfg, WM, WN)
            acc, slot, phase = products((a_v, b0_v, b1_v), bars, slot, phase, KB, cfg, WM, WN, mma0, mma1)
            store_tile(cut_all(acc, cfg), d_s, d_desc, out, fetched, problem, tile, cfg, WM, WN)
        elif cfg.ZERO and cfg.LAYOUT != DENSE:
            store_padding(out, tile, tile[2] + WM * 64, tile[0] * cfg.BN + WN * cfg.WN, N, cfg)
        cursor, tile = next_tile(cursor, tile, work, cfg, 4)
        live = is_live(tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "KB", "G", "alignment", "sag", "sam", "sbg", "sbn", "out_pitch"])
def fp8_scaled_kernel(a_desc, b0_desc, b1_desc, d_desc, out_ptr, sa_ptr, sb_ptr, index_ptr, M, N, KB, G, alignment, sag, sam,
                      sbg, sbn, og, om, out_pitch, cfg: gl.constexpr):
    """A persistent grid. M: rows of A, or rows a group can hold (masked). a_desc [1 or G, M, K], b0_desc, b1_desc
    [1 or G, N, K], d_desc [M, N]; out_pitch: rows of d_desc from one group to the next (masked). s..: strides of scales;
    og, om: of the output. KB: K blocks of 128, the last of which may be cut short."""
    S: gl.constexpr = cfg.STAGES
    rings = operand_rings(a_desc, b0_desc, b1_desc, 128, FP8_PLANE, cfg)
    d_s = store_buffers(out_ptr, cfg)
    bars = ring_barriers(S, 1, cfg.CONSUMERS)
    table = groups_table(bars[0], index_ptr, M, G, alignment, cfg)

    descs = (a_desc, b0_desc, b1_desc)
    problem = (index_ptr, M, N, KB, G, alignment)
    scales = (sa_ptr, sag, sam, sb_ptr, sbg, sbn)
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
