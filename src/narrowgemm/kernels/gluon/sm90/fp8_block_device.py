"""Device code of the Hopper FP8 prefill kernel: dense, contiguous, offsets, psum, masked.

    out[m, n] (+)= sum over K blocks of  (A[m, kb] . B[g, n, kb]) * sa[m, kb] * sb[g, n / 128, kb]

    warps                does, for every tile of its block
    producer (1)         TMA of A, B and A's scales into a ring of shared memory, as far ahead as the ring is long
    consumer (1 or 2x4)  wgmma of a K block, promotion of its sum to FP32, release of the slot; stores

One tile of a consumer, MP = 1 (two partial sums p, q in registers; wgmma k + 1 runs while k is promoted):

    issue 0 | store the tile before, look up the next | issue 1, promote 0 | issue 2, promote 1 | ... | promote last

ptxas serialises wgmma whose sums are in flight across the back edge of a loop, so each trip of UNROLL blocks drains;
K blocks left over are in front of the first trip. With MP = 2 there are registers for one partial sum only, and it is the
other warpgroup that keeps the tensor cores busy during a promotion.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from .fp8_block_parts_device import (
    FP8_PLANE, FP8_TILE, ROW_OF_FLOATS, add_output, advance, fence, load_a_scales, load_b_scale, load_blocks, multiply, parts, promote, read_a_scale,
    scale_bases, scaled, store_part, store_zeros)
from .fp8_block_schedule_device import (
    DENSE, MASKED, OFFSETS, ROW_OF_INTS, fill_table, first_tile, fresh, has_products, is_live, next_tile,
    total_tiles)
from .shim import block_barrier, view_as, view_rows


@gluon.jit
def producer(descs, rings, bars, table, problem, sa_pitch, cfg: gl.constexpr):
    full, empty = bars
    index_ptr, M, N, KB, G, alignment = problem
    work = (index_ptr, table, M, N, KB, G, alignment, total_tiles(table, M, N, cfg, 1))
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    cursor, tile = first_tile(work, cfg, 1)
    n, g, first, end, stop = tile
    while n >= 0:
        a_plane = g * 0
        if cfg.LAYOUT == MASKED:
            a_plane = g
        at = (a_plane, first, g, n * cfg.BN, a_plane * sa_pitch, first)
        # the next tile is looked up first, so that its loads are off the path between two tiles
        run = has_products((n, g, first, end, stop), cfg)
        cursor, ahead = next_tile(cursor, (n, g, first, end, stop), work, cfg, 1)
        if run:
            kb = gl.to_tensor(0)
            if cfg.SKIP > 0:
                mbarrier.wait(empty.index(slot), phase)
                load_blocks(descs, rings, full.index(slot), slot, at, kb, cfg, cfg.SKIP)
                slot, phase = advance(slot, phase, cfg.STAGES)
                kb += cfg.KS - cfg.SKIP
            while kb < KB:
                mbarrier.wait(empty.index(slot), phase)
                load_blocks(descs, rings, full.index(slot), slot, at, kb, cfg, 0)
                slot, phase = advance(slot, phase, cfg.STAGES)
                kb += cfg.KS
        n, g, first, end, stop = ahead


@gluon.jit
def blocks(acc, p, sa, sb, slot, phase, kb, views, bars, problem, bases, scales, tile, cfg: gl.constexpr, WM: gl.constexpr,
           WN: gl.constexpr, mma: gl.constexpr, COUNT: gl.constexpr, HEAD: gl.constexpr):
    """COUNT K blocks from kb. HEAD: the first of the tile, whose wgmma is on its way. sa, sb: scales of block kb (sa: by plain
    loads only). Leaves with nothing in flight: (acc, p, sa and sb of the next block, slot, phase)."""
    a_v, b_v, sa_v = views
    full, empty = bars
    index_ptr, M, N, KB, G, alignment = problem
    sa_base, sb_base = bases
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    KS: gl.constexpr = cfg.KS
    MP: gl.constexpr = cfg.MP
    COLS: gl.constexpr = cfg.WN
    AT: gl.constexpr = cfg.SKIP if HEAD else (cfg.SKIP + cfg.HEAD) % KS     # place of block kb in its slot
    q = gl.zeros([64, COLS], gl.float32, mma)
    for j in gl.static_range(COUNT):
        # ---- start this block, unless it is on its way
        if not (j == 0 and HEAD) and not (j > 0 and MP == 1):
            if (AT + j) % KS == 0:
                mbarrier.wait(full.index(slot), phase)
            p = multiply(a_v, b_v, slot * KS + (AT + j) % KS, p, cfg, WM, WN, 0)
        if cfg.A_SCALE_TMA and (j == 0 or MP > 1):
            sa = ()
            for i in gl.static_range(MP):
                sa = sa + (read_a_scale(sa_v, slot * KS + (AT + j) % KS, cfg, WM, i, rows), )
        sb_next = load_b_scale(sb_base, scales, kb + (j + 1), KB, j + 1 < COUNT)
        sa_next = sa
        if not cfg.A_SCALE_TMA:
            sa_next = load_a_scales(sa_base, scales, tile, M, kb + (j + 1), KB, cfg, WM, rows)
        old = slot
        if (AT + j) % KS == KS - 1:
            slot, phase = advance(slot, phase, cfg.STAGES)
        if MP == 1:
            # ---- start the next one, then promote this one
            if j + 1 < COUNT:
                if (AT + j + 1) % KS == 0:
                    mbarrier.wait(full.index(slot), phase)
                if cfg.A_SCALE_TMA:
                    sa_next = (read_a_scale(sa_v, slot * KS + (AT + j + 1) % KS, cfg, WM, 0, rows), )
                q = multiply(a_v, b_v, slot * KS + (AT + j + 1) % KS, q, cfg, WM, WN, 0)
                p = warpgroup_mma_wait(1, deps=(p, ))
            else:
                p = warpgroup_mma_wait(0, deps=(p, ))
            if (AT + j) % KS == KS - 1:
                mbarrier.arrive(empty.index(old), count=1)
            if HEAD and j == 0:
                one = scaled(p, sa[0] * sb)
            else:
                one = promote(acc[0], p, sa[0] * sb)
            one, p = fence(1 if j + 1 < COUNT else 0, one, p)
            acc = (one, )
            p, q = q, p
        else:
            sums = ()
            for i in gl.static_range(MP):
                if i > 0:
                    p = multiply(a_v, b_v, old * KS + (AT + j) % KS, p, cfg, WM, WN, i)
                p = warpgroup_mma_wait(0, deps=(p, ))
                if i == MP - 1 and (AT + j) % KS == KS - 1:
                    mbarrier.arrive(empty.index(old), count=1)
                if HEAD and j == 0:
                    one = scaled(p, sa[i] * sb)
                else:
                    one = promote(acc[i], p, sa[i] * sb)
                one, p = fence(0, one, p)
                sums = sums + (one, )
            acc = sums
        sa = sa_next
        sb = sb_next
    if cfg.A_SCALE_TMA:
        sa = ()
    return acc, p, sa, sb, slot, phase


@gluon.jit
def store_tile(acc, d_s, d_desc, out, problem, tile, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr, mma: gl.constexpr):
    index_ptr, M, N, KB, G, alignment = problem
    n, g, first, end, stop = tile
    col0 = n * cfg.BN + WN * cfg.WN
    MP: gl.constexpr = cfg.MP
    SPLIT: gl.constexpr = cfg.OUT_SPLIT
    for i in gl.static_range(MP):
        row0 = first + (WM * MP + i) * 64
        x = acc[i]
        if cfg.ACCUMULATE:
            x = add_output(x, out, index_ptr, tile, row0, col0, M, N, G, cfg, mma)
        part = parts(x, cfg)
        for j in gl.static_range(SPLIT):
            # the buffers take turns, and what was stored from one must have been read before it is written again. Only
            # TMA stores count, so where some parts leave otherwise, nothing less than all of them can be waited for
            if cfg.LAYOUT == DENSE and cfg.STORE_TMA:
                tma.store_wait(cfg.OUT_BUFFERS - 1)
            elif (i * SPLIT + j) % cfg.OUT_BUFFERS == 0:
                tma.store_wait(0)
            buf = d_s.index((WM * cfg.WGN + WN) * cfg.OUT_BUFFERS + (i * SPLIT + j) % cfg.OUT_BUFFERS)
            store_part(part[j], buf, d_desc, out, index_ptr, tile, row0, col0 + j * cfg.OUT_COLS, M, N, G, cfg)


@gluon.jit
def consumer(d_desc, out, scales, rings, d_s, bars, table, problem, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr):
    """Rows [WM * MP * 64, +MP * 64) and columns [WN * cfg.WN, +cfg.WN) of every tile."""
    a_s, sa_s, b_s = rings
    full, empty = bars
    index_ptr, M, N, KB, G, alignment = problem
    S: gl.constexpr = cfg.STAGES * cfg.KS
    MP: gl.constexpr = cfg.MP
    COLS: gl.constexpr = cfg.WN
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.WN, 32])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    a_v = view_as(a_s, gl.float8e4nv, S * cfg.WGM * MP, 64, 128, FP8_TILE)
    b_v = view_as(b_s, gl.float8e4nv, S * cfg.WGN, cfg.WN, 128, FP8_TILE)
    sa_v = a_v
    if cfg.A_SCALE_TMA:
        sa_v = view_rows(sa_s, gl.float32, S * cfg.WGM * MP, 64, ROW_OF_FLOATS)
    views = (a_v, b_v, sa_v)
    total = total_tiles(table, M, N, cfg, 4)
    work = (index_ptr, table, M, N, KB, G, alignment, total)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    zero = gl.zeros([64, COLS], gl.float32, mma)
    acc = ()
    for i in gl.static_range(MP):
        acc = acc + (zero, )
    cursor, tile = first_tile(work, cfg, 4)
    # the tile whose sums are in acc, where `pending`. Values of its own: Triton 3.6 doesn't carry a variable through the loop
    # that starts as another's alias and is assigned in a branch
    done = (fresh(tile[0]), fresh(tile[1]), fresh(tile[2]), fresh(tile[3]), fresh(tile[4]))
    pending = gl.program_id(0) < 0
    bases = scale_bases(scales, tile, N, cfg, WM, WN)
    sb = load_b_scale(bases[1], scales, slot, KB, True)
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
                    store_tile(acc, d_s, d_desc, out, problem, done, cfg, WM, WN, mma)
            cursor, ahead = next_tile(cursor, tile, work, cfg, 4)
            acc, p, sa, sb, slot, phase = blocks(acc, p, sa, sb, slot, phase, KB * 0, views, bars, problem, bases, scales, tile,
                                                 cfg, WM, WN, mma, cfg.HEAD, True)
            for kb in range(cfg.HEAD, KB, cfg.UNROLL):
                acc, p, sa, sb, slot, phase = blocks(acc, p, sa, sb, slot, phase, kb, views, bars, problem, bases, scales, tile,
                                                     cfg, WM, WN, mma, cfg.UNROLL, False)
            if cfg.LATE_STORE:
                done = tile
                pending = is_live(tile)
            else:
                store_tile(acc, d_s, d_desc, out, problem, tile, cfg, WM, WN, mma)
        else:
            cursor, ahead = next_tile(cursor, tile, work, cfg, 4)
            if cfg.ZERO and cfg.LAYOUT != DENSE:
                store_zeros(out, index_ptr, tile, tile[2] + WM * (cfg.MP * 64), tile[0] * cfg.BN + WN * cfg.WN, M, N, G, cfg)
        tile = ahead
        bases = scale_bases(scales, tile, N, cfg, WM, WN)
        sb = load_b_scale(bases[1], scales, slot * 0, KB, True)
        if not cfg.A_SCALE_TMA:
            sa = load_a_scales(bases[0], scales, tile, M, slot * 0, KB, cfg, WM, rows)
        live = is_live(tile)
    if cfg.LATE_STORE:
        if pending:
            store_tile(acc, d_s, d_desc, out, problem, done, cfg, WM, WN, mma)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "KB", "G", "alignment", "sa_pitch", "sag", "sam", "sak", "sbg", "sbn",
                              "out_pitch"])
def fp8_block_kernel(a_desc, sa_desc, b_desc, d_desc, out_ptr, sa_ptr, sb_ptr, index_ptr, M, N, KB, G, alignment,
                     sa_pitch, sag, sam, sak, sbg, sbn, sbk, og, om, out_pitch, cfg: gl.constexpr):
    """A persistent grid. M: rows of A, or rows a group can hold (masked). a_desc [1 or G, M, K], b_desc [1 or G, N, K],
    sa_desc [K blocks, M], d_desc [M, N]; sa_pitch, out_pitch: rows of the last two from one group to the next (masked).
    s..: strides of scales; og, om: of the output."""
    STAGES: gl.constexpr = cfg.STAGES
    S: gl.constexpr = STAGES * cfg.KS
    a_s = gl.allocate_shared_memory(gl.float8e4nv, [S, 1, cfg.BM, 128], FP8_PLANE)
    b_s = gl.allocate_shared_memory(gl.float8e4nv, [S, 1, cfg.BN, 128], FP8_PLANE)
    staging: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, cfg.OUT_COLS], out_ptr.dtype.element_ty)
    d_s = gl.allocate_shared_memory(out_ptr.dtype.element_ty, [cfg.CONSUMERS * cfg.OUT_BUFFERS, 64, cfg.OUT_COLS], staging)
    sa_s = a_s
    if cfg.A_SCALE_TMA:
        sa_s = gl.allocate_shared_memory(gl.float32, [S, 1, cfg.BM], sa_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [cfg.STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [cfg.STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=cfg.CONSUMERS)
    table = full
    if cfg.LAYOUT >= OFFSETS:
        table = gl.allocate_shared_memory(gl.int32, [cfg.GROUPS], ROW_OF_INTS)
        fill_table(table, index_ptr, M, G, alignment, cfg, 4)
        block_barrier()
    fence_async_shared()

    descs = (a_desc, sa_desc, b_desc)
    rings = (a_s, sa_s, b_s)
    bars = (full, empty)
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
