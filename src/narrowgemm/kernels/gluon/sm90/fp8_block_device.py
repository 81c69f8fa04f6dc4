"""Device code of the Hopper FP8 prefill kernel: dense, contiguous, offsets, psum, masked.

    out[m, n] (+)= sum over K blocks of  (A[m, kb] . B[g, n, kb]) * sa[m, kb] * sb[g, n / 128, kb]

    warps                does, for every tile of its block
    producer (1)         TMA of A, B and A's scales into a ring of shared memory, as far ahead as the ring is long
    consumer (1 or 2x4)  wgmma of a K block, promotion of its sum to FP32, release of the slot; stores

One tile of a consumer with one piece of 64 rows (two partial sums p, q in registers; wgmma k + 1 runs while k is promoted):

    issue 0 | store the tile before, look up the next | issue 1, promote 0 | issue 2, promote 1 | ... | promote last

ptxas serialises wgmma whose sums are in flight across the back edge of a loop, so each trip of UNROLL blocks drains;
K blocks left over are in front of the first trip. With two pieces there are registers for one partial sum only, and it is the
other warpgroup that keeps the tensor cores busy during a promotion; what would hold up the next wgmma is kept out of the way:

    issue 0.0 | release the slot before, scales | promote 0.0, issue 0.1 | wait for the next slot | promote 0.1, issue 1.0 | ...
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .fold_stub_device import sum_tile
from .fp8_block_parts_device import (
    FP8_PLANE, FP8_TILE, ROW_OF_FLOATS, advance, block_of, column_scales, load_a_scales, load_b_scales, load_blocks, multiply, scale_bases,
    second_piece, store_piece, store_zeros)
from .fp8_block_schedule_device import DENSE, first_tile, fresh, has_products, is_live, next_tile, stub_rows, total_tiles
from .fp8_block_sums_device import blocks, sum_pieces
from .ring_device import feed, groups_table, ring_barriers, store_buffers
from .shim import view_as, view_rows


@gluon.jit
def fill_slots(load: gl.constexpr, operands, tile, at, slot, phase, bars, problem, cfg: gl.constexpr):
    """All K blocks of a tile, KS to a slot; the first slot has SKIP fewer."""
    descs, rings, sa_pitch = operands
    full, empty = bars
    index_ptr, M, N, KB, G, alignment = problem
    at = at + (at[0] * sa_pitch, at[1])
    whole = tile[2] + cfg.BM // 2 < tile[3]
    kb = gl.to_tensor(0)
    if cfg.SKIP > 0:
        mbarrier.wait(empty.index(slot), phase)
        load(descs, rings, full.index(slot), slot, at, kb, whole, cfg, cfg.SKIP)
        slot, phase = advance(slot, phase, cfg.STAGES)
        kb += cfg.KS - cfg.SKIP
    while kb < KB:
        mbarrier.wait(empty.index(slot), phase)
        load(descs, rings, full.index(slot), slot, at, kb, whole, cfg, 0)
        slot, phase = advance(slot, phase, cfg.STAGES)
        kb += cfg.KS
    return slot, phase


@gluon.jit
def producer(descs, rings, bars, table, problem, sa_pitch, cfg: gl.constexpr):
    feed(fill_slots, load_blocks, (descs, rings, sa_pitch), bars, table, problem, cfg)


@gluon.jit
def store_tile(acc, scales, d_s, d_desc, out, problem, tile, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr,
               mma: gl.constexpr):
    n, g, first, end, stop = tile
    MP: gl.constexpr = cfg.MP
    NP: gl.constexpr = cfg.NP
    PIECES: gl.constexpr = MP * NP
    of_columns = ()
    if cfg.FOLD:
        for j in gl.static_range(NP):
            of_columns = of_columns + (column_scales(scales, tile, n * cfg.BN + (WN * NP + j) * cfg.WN, cfg, mma), )
    for i in gl.static_range(PIECES):
        row0 = first + block_of(cfg, WM, i // NP) * 64
        if cfg.TAIL and i // NP > 0:
            if row0 < end:
                store_piece(acc[i], i, of_columns, d_s, d_desc, out, problem, tile, row0, cfg, WM, WN, mma, NP, cfg.BN)
        else:
            store_piece(acc[i], i, of_columns, d_s, d_desc, out, problem, tile, row0, cfg, WM, WN, mma, NP, cfg.BN)


@gluon.jit
def consumer(d_desc, out, scales, rings, d_s, bars, table, problem, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr):
    """Rows [WM * MP * 64, +MP * 64) and columns [WN * NP * cfg.WN, +NP * cfg.WN) of every tile."""
    a_s = rings[0]
    sa_s = rings[1]
    b_s = rings[2]
    full, empty = bars
    index_ptr, M, N, KB, G, alignment = problem
    S: gl.constexpr = cfg.STAGES * cfg.KS
    MP: gl.constexpr = cfg.MP
    PIECES: gl.constexpr = MP * cfg.NP
    COLS: gl.constexpr = cfg.WN
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.WN, 32])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    a_v = view_as(a_s, gl.float8e4nv, S * cfg.WGM * MP, 64, 128, FP8_TILE)
    b_v = view_as(b_s, gl.float8e4nv, S * cfg.WGN * cfg.NP, cfg.WN, 128, FP8_TILE)
    sa_v = a_v
    if cfg.A_SCALE_TMA:
        sa_v = view_rows(sa_s, gl.float32, S * cfg.SUB * cfg.WGM * MP, 64, ROW_OF_FLOATS)
    views = (a_v, b_v, sa_v)
    total = total_tiles(table, M, N, cfg, 4)
    work = (index_ptr, table, M, N, KB, G, alignment, total)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    zero = gl.zeros([64, COLS], gl.float32, mma)
    acc = ()
    for i in gl.static_range(PIECES):
        acc = acc + (zero, )
    cursor, tile = first_tile(work, cfg, 4)
    # the tile whose sums are in acc, where `pending`. Values of its own: Triton 3.6 doesn't carry a variable through the loop
    # that starts as another's alias and is assigned in a branch
    done = (fresh(tile[0]), fresh(tile[1]), fresh(tile[2]), fresh(tile[3]), fresh(tile[4]))
    pending = gl.program_id(0) < 0
    bases = scale_bases(scales, tile, N, cfg, WM, WN)
    sb = load_b_scales(bases[1], scales, slot, KB, cfg, True)
    sa = ()
    if not cfg.A_SCALE_TMA:
        sa = load_a_scales(bases[0], scales, tile, M, slot, KB, cfg, WM, rows)
    live = is_live(tile)
    while live:
        work = (index_ptr, table, fresh(M), fresh(N), KB, fresh(G), alignment, total)
        if cfg.LAYOUT != DENSE:
            slot = fresh(slot)      # where it comes round once a trip, every slot's addresses would be kept too
        if has_products(tile, cfg):
            mbarrier.wait(full.index(slot), phase)
            p = multiply(a_v, b_v, slot * cfg.KS + cfg.SKIP, zero, cfg, WM, WN, 0)
            if cfg.LATE_STORE:
                if pending:
                    store_tile(acc, scales, d_s, d_desc, out, problem, done, cfg, WM, WN, mma)
            cursor, ahead = next_tile(cursor, tile, work, cfg, 4)
            if PIECES == 1 and not cfg.SINGLE:
                acc, p, sa, sb, slot, phase = blocks(acc, p, sa, sb, slot, phase, KB * 0, views, bars, problem, bases, scales, tile,
                                                     cfg, WM, WN, mma, cfg.HEAD, True)
                for kb in range(cfg.HEAD, KB, cfg.UNROLL):
                    acc, p, sa, sb, slot, phase = blocks(acc, p, sa, sb, slot, phase, kb, views, bars, problem, bases, scales, tile,
                                                         cfg, WM, WN, mma, cfg.UNROLL, False)
            elif not cfg.TAIL:
                acc, last, sa, sb, slot, phase = sum_pieces(acc, p, sa, sb, slot, phase, views, bars, problem, bases, scales, tile, cfg, WM,
                                                         WN, mma, MP)
            elif stub_rows(cfg) > 0:
                acc, slot, phase = sum_tile(acc, p, slot, phase, rings, views, bars, problem, bases, scales, out, tile, cfg, WM, mma)
            elif tile[2] + second_piece(cfg, WM) < tile[3]:
                acc, last, sa, sb, slot, phase = sum_pieces(acc, p, sa, sb, slot, phase, views, bars, problem, bases, scales, tile, cfg, WM,
                                                         WN, mma, MP)
            else:
                acc, last, sa, sb, slot, phase = sum_pieces(acc, p, sa, sb, slot, phase, views, bars, problem, bases, scales, tile, cfg, WM,
                                                         WN, mma, 1)
            if cfg.LATE_STORE:
                done = tile
                pending = is_live(tile)
            else:
                store_tile(acc, scales, d_s, d_desc, out, problem, tile, cfg, WM, WN, mma)
        else:
            cursor, ahead = next_tile(cursor, tile, work, cfg, 4)
            if cfg.ZERO and cfg.LAYOUT != DENSE:
                store_zeros(out, tile, tile[2] + WM * (cfg.MP * 64), tile[0] * cfg.BN + WN * cfg.NP * cfg.WN, N, cfg)
        tile = ahead
        bases = scale_bases(scales, tile, N, cfg, WM, WN)
        sb = load_b_scales(bases[1], scales, slot * 0, KB, cfg, True)
        if not cfg.A_SCALE_TMA:
            sa = load_a_scales(bases[0], scales, tile, M, slot * 0, KB, cfg, WM, rows)
        live = is_live(tile)
    if cfg.LATE_STORE:
        if pending:
            store_tile(acc, scales, d_s, d_desc, out, problem, done, cfg, WM, WN, mma)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "KB", "G", "alignment", "sa_pitch", "sag", "sam", "sak", "sbg", "sbn",
                              "out_pitch"])
def fp8_block_kernel(a_desc, sa_desc, b_desc, d_desc, out_ptr, sa_ptr, sb_ptr, index_ptr, M, N, KB, G, alignment,
                     sa_pitch, sag, sam, sak, sbg, sbn, sbk, og, om, out_pitch, cfg: gl.constexpr):
    """A persistent grid. M: rows of A, or rows a group can hold (masked). a_desc [1 or G, M, K], b_desc [1 or G, N, K],
    sa_desc [K blocks, M], d_desc [M, N]; sa_pitch, out_pitch: rows of the last two from one group to the next (masked).
    s..: strides of scales; og, om: of the output."""
    S: gl.constexpr = cfg.STAGES * cfg.KS
    a_s = gl.allocate_shared_memory(gl.float8e4nv, [S * (cfg.BM // cfg.A_BOX), 1, cfg.A_BOX, 128], FP8_PLANE)
    b_s = gl.allocate_shared_memory(gl.float8e4nv, [S * (cfg.BN // cfg.B_BOX), 1, cfg.B_BOX, 128], FP8_PLANE)
    d_s = store_buffers(out_ptr, cfg)
    sa_s = a_s
    if cfg.A_SCALE_TMA:
        sa_s = gl.allocate_shared_memory(gl.float32, [S, 1, cfg.BM], sa_desc.layout)
    bars = ring_barriers(cfg.STAGES, 1, cfg.CONSUMERS)
    table = groups_table(bars[0], index_ptr, M, G, alignment, cfg)

    descs = (a_desc, sa_desc, b_desc)
    rings = (a_s, sa_s, b_s)
    problem = (index_ptr, M, N, KB, G, alignment)
    scales = (sa_ptr, sag, sam, sak, sb_ptr, sbg, sbn, sbk)
    out = (out_ptr, og, om, out_pitch)
    if cfg.CONSUMERS == 1:
        gl.warp_specialize([
            (consumer, (d_desc, out, scales, rings, d_s, bars, table, problem, cfg, 0, 0)),
            (producer, (descs, rings, bars, table, problem, sa_pitch, cfg)),
        ], [1], [cfg.PRODUCER_REGISTERS])
    else:
        gl.warp_specialize([
            (consumer, (d_desc, out, scales, rings, d_s, bars, table, problem, cfg, 0, 0)),
            (consumer, (d_desc, out, scales, rings, d_s, bars, table, problem, cfg, cfg.WGM - 1, cfg.WGN - 1)),
            (producer, (descs, rings, bars, table, problem, sa_pitch, cfg)),
        ], [4, 1], [cfg.CONSUMER_REGISTERS, cfg.PRODUCER_REGISTERS])
