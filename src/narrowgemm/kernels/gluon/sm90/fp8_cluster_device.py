"""Device code of the Hopper FP8 prefill kernel on clusters: dense, contiguous, offsets, psum, masked.

    out[m, n] (+)= sum over K blocks of  (A[m, kb] . B[g, n, kb]) * sa[m, kb] * sb[g, n / 128, kb]

What `fp8_block_device.py` computes, by other means: two blocks may go from tile to tile together, and what both need of A or B comes
from L2 once and to both by multicast; a wgmma may have 192 columns, so that A is read from shared memory less often; and every warp
arrives at a barrier by itself. All of that is PTX (`cluster_device.py`, `wgmma_device.py`).

    warps                does, for every tile of its cluster
    producer (1)         TMA of A, B and A's scales into a ring of shared memory; of the shared operand, its part for both blocks
    consumer (2 x 4)     wgmma of a piece, 64 rows, over a K block; promotion of its sum to FP32; release of the slot; stores
    idle (3)             are at the waits for the cluster, which is for every warp there is

Where only the device knows the sizes of groups, a kernel may have two widths of tiles: every block counts the tiles of both by the
table of groups, and takes that of the shorter rounds.

There are registers for one partial sum, and it is the other warpgroup that keeps the tensor cores busy during a promotion:

    issue 0.0 | scales | promote 0.0, issue 0.1 | wait for the next slot | release this one, promote 0.1, issue 1.0 | ...
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from . import cluster_device as cluster
from .fp8_block_parts_device import (
    ROW_OF_FLOATS, advance, column_scales, load_a_scales, promote, scaled, store_piece, store_zeros)
from .fp8_block_schedule_device import (
    DENSE, PSUM, first_tile, fresh, has_products, is_live, next_tile, total_tiles)
from .fp8_cluster_feed_device import barriers, has_rows, idle, own_tile, producer
from .fp8_cluster_scales_device import a_scale_base, b_scale, b_scale_bases, load_b_scales
from .ring_device import groups_table
from .shim import view_as, view_rows
from .wgmma_device import keep, multiply, wait

BYTES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


# ---------------------------------------------------------------- sums
@gluon.jit
def start_piece(slot, p, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr, mma: gl.constexpr, PIECE: gl.constexpr,
                COUNT: gl.constexpr):
    """Start a warpgroup's product of 64 rows over the K block in `slot`: COUNT sums of WN columns."""
    start = cluster.start_of_shared()
    a = start + (slot * (cfg.BM * 128) + (cfg.A_AT + (WM * cfg.MP + PIECE) * 64 * 128))
    b = start + (slot * (cfg.B_ROWS * 128) + (cfg.B_AT + WN * cfg.NP * cfg.WN * 128))
    return multiply(a, b, p, COUNT, cfg.WN, mma)


@gluon.jit
def sum_block(acc, p, sa, sb, slot, phase, kb, sa_v, bars, KB, M, sa_base, bases, scales, own, cfg: gl.constexpr, WM: gl.constexpr,
              WN: gl.constexpr, mma: gl.constexpr, HEAD: gl.constexpr, COUNT: gl.constexpr):
    """One K block of COUNT tensors a piece; that its slot is full is known. HEAD: the first of the tile, whose first piece is on its way. sa, sb: scales of
    block kb (sa: by plain loads only). The slot is released before its last promotion. The next one is waited for in front of that;
    of one piece, only looked at there and waited for behind, so that nothing of this block hangs on loads of the next."""
    full, empty = bars
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    MP: gl.constexpr = cfg.MP
    NP: gl.constexpr = COUNT
    if not HEAD:
        p = start_piece(slot, p, cfg, WM, WN, mma, 0, COUNT)
    if cfg.A_SCALE_TMA:
        sa = ()
        for i in gl.static_range(MP):
            sa = sa + (sa_v.index(slot * (cfg.WGM * MP) + (cfg.SA_AT // 256 + WM * MP + i)).load(rows), )
    sb_next = load_b_scales(bases, scales, gl.minimum(kb + 1, KB - 1), cfg)
    sa_next = sa
    if not cfg.A_SCALE_TMA:
        sa_next = load_a_scales(sa_base, scales, own, M, kb + 1, KB, cfg, WM, rows)
    old = slot
    slot, phase = advance(slot, phase, cfg.STAGES)
    sums = ()
    for m in gl.static_range(MP):
        if m > 0:
            p = start_piece(old, p, cfg, WM, WN, mma, m, COUNT)
        if m == MP - 1:
            missing = (kb + 1 < KB).to(gl.int32)
            if MP == 1:
                missing = missing & (1 - cluster.ready(full + slot * 8, phase))
            else:
                cluster.wait(full + slot * 8, phase, missing)
        p = wait(p, NP, cfg.WN)
        if m == MP - 1:     # scales may not have come yet: a warp arrives behind its own loads (see `landed_device.py`, and docs/measured.md)
            cluster.arrive(empty + old * 8, cfg.CLUSTER)
        piece = ()
        for i in gl.static_range(NP):
            s = sa[m]
            if not cfg.FOLD:
                s = s * b_scale(sb, bases, cfg, i)
            if HEAD:
                piece = piece + (scaled(p[i], s), )
            else:
                piece = piece + (promote(acc[m * NP + i], p[i], s), )
        piece = keep(piece, NP, cfg.WN)
        if MP == 1:
            cluster.wait(full + slot * 8, phase, missing)
        for i in gl.static_range(NP):
            sums = sums + (piece[i], )
    if cfg.A_SCALE_TMA:
        sa_next = ()
    return sums, p, sa_next, sb_next, slot, phase


@gluon.jit
def store_tile(acc, scales, d_s, d_desc, out, problem, own, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr, mma: gl.constexpr,
               COUNT: gl.constexpr):
    MP: gl.constexpr = cfg.MP
    NP: gl.constexpr = COUNT
    PIECES: gl.constexpr = MP * NP
    of_columns = ()
    if cfg.FOLD:
        for j in gl.static_range(NP):
            of_columns = of_columns + (column_scales(scales, own, own[0] * cfg.STEP + (WN * NP + j) * cfg.WN, cfg, mma), )
    for i in gl.static_range(PIECES):
        row0 = own[2] + (WM * MP + i // NP) * 64
        store_piece(acc[i], i, of_columns, d_s, d_desc, out, problem, own, row0, cfg, WM, WN, mma, NP, cfg.STEP)


@gluon.jit
def mixed_sums(zero, sa, sb, slot, phase, cursor, tile, work, sa_v, bars, sa_base, bases, scales, own, d_s, d_desc, out, problem,
               cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr, mma: gl.constexpr, COUNT: gl.constexpr):
    """A tile of COUNT tensors, summed and stored: (cursor, the tile after it, slot, phase)."""
    index_ptr, M, N, KB, G, alignment = problem
    UNIT: gl.constexpr = cfg.UNIT
    full, empty = bars
    p = ()
    for i in gl.static_range(COUNT):
        p = p + (zero, )
    acc = p
    cluster.wait(full + slot * 8, phase, 1)
    p = start_piece(slot, p, cfg, WM, WN, mma, 0, COUNT)
    cursor, ahead = next_tile(cursor, tile, work, UNIT, 4)
    acc, p, sa, sb, slot, phase = sum_block(acc, p, sa, sb, slot, phase, KB * 0, sa_v, bars, KB, M, sa_base, bases, scales, own, cfg, WM, WN,
                                            mma, True, COUNT)
    for kb in range(1, KB):
        acc, p, sa, sb, slot, phase = sum_block(acc, p, sa, sb, slot, phase, kb, sa_v, bars, KB, M, sa_base, bases, scales, own, cfg, WM, WN,
                                                mma, False, COUNT)
    store_tile(acc, scales, d_s, d_desc, out, problem, own, cfg, WM, WN, mma, COUNT)
    return cursor, ahead, slot, phase


@gluon.jit
def consumer(d_desc, out, scales, ring, d_s, table, problem, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr):
    """Rows [WM * MP * 64, +MP * 64) and columns [WN * NP * cfg.WN, +NP * cfg.WN) of its block's part of every tile."""
    index_ptr, M, N, KB, G, alignment = problem
    UNIT: gl.constexpr = cfg.UNIT
    COLS: gl.constexpr = cfg.WN
    PIECES: gl.constexpr = cfg.MP * cfg.NP
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.WN, 32])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    full, empty = barriers(cfg)
    empty = cluster.everywhere(empty, cfg.CLUSTER)
    bars = (full, empty)
    cluster.wait_all(cfg.CLUSTER)
    sa_v = ring
    if cfg.A_SCALE_TMA:
        sa_v = view_rows(ring, gl.float32, cfg.BARS_AT // 256, 64, ROW_OF_FLOATS)
    total = total_tiles(table, M, N, UNIT, 4, G, alignment)
    work = (index_ptr, table, M, N, KB, G, alignment, total)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    zero = gl.zeros([64, COLS], gl.float32, mma)
    acc = ()
    for i in gl.static_range(PIECES):
        acc = acc + (zero, )
    fresh_sums = ()
    NP: gl.constexpr = cfg.NP
    for i in gl.static_range(NP):
        fresh_sums = fresh_sums + (zero, )
    cursor, tile = first_tile(work, UNIT, 4)
    own = own_tile(tile, cfg)
    # the tile whose sums are in acc, where `pending`: see fp8_block_device
    done = (fresh(own[0]), fresh(own[1]), fresh(own[2]), fresh(own[3]), fresh(own[4]))
    pending = gl.program_id(0) < 0
    live = is_live(tile)
    while live:
        work = (index_ptr, table, fresh(M), fresh(N), KB, fresh(G), alignment, total)
        own = own_tile(tile, cfg)
        bases = ()
        if not cfg.FOLD:
            bases = b_scale_bases(scales, own, N, cfg, WN)
        sb = load_b_scales(bases, scales, slot * 0, cfg)
        sa = ()
        sa_base = scales[4]     # stands in, where TMA brings A's
        if not cfg.A_SCALE_TMA:
            sa_base = a_scale_base(scales, own, cfg, WM)
            sa = load_a_scales(sa_base, scales, own, M, slot * 0, KB, cfg, WM, rows)
        if not has_products(tile, cfg):
            cursor, ahead = next_tile(cursor, tile, work, UNIT, 4)
            if cfg.ZERO and cfg.LAYOUT != DENSE:
                store_zeros(out, own, own[2] + WM * (cfg.MP * 64), own[0] * cfg.STEP + WN * cfg.NP * cfg.WN, N, cfg)
        elif cfg.MIX:
            if own[4] == 0:
                cursor, ahead, slot, phase = mixed_sums(zero, sa, sb, slot, phase, cursor, tile, work, sa_v, bars, sa_base, bases, scales,
                                                        own, d_s, d_desc, out, problem, cfg, WM, WN, mma, NP)
            else:
                cursor, ahead, slot, phase = mixed_sums(zero, sa, sb, slot, phase, cursor, tile, work, sa_v, bars, sa_base, bases, scales,
                                                        own, d_s, d_desc, out, problem, cfg, WM, WN, mma, NP - 1)
        elif has_rows(own, M, cfg, WM * cfg.MP * 64):
            cluster.wait(full + slot * 8, phase, 1)
            p = start_piece(slot, fresh_sums, cfg, WM, WN, mma, 0, NP)
            if cfg.LATE_STORE:
                if pending:
                    store_tile(acc, scales, d_s, d_desc, out, problem, done, cfg, WM, WN, mma, NP)
            cursor, ahead = next_tile(cursor, tile, work, UNIT, 4)
            acc, p, sa, sb, slot, phase = sum_block(acc, p, sa, sb, slot, phase, KB * 0, sa_v, bars, KB, M, sa_base, bases, scales, own,
                                                    cfg, WM, WN, mma, True, NP)
            for kb in range(1, KB):
                acc, p, sa, sb, slot, phase = sum_block(acc, p, sa, sb, slot, phase, kb, sa_v, bars, KB, M, sa_base, bases, scales,
                                                        own, cfg, WM, WN, mma, False, NP)
            if cfg.LATE_STORE:
                done = own
                pending = is_live(tile)
            else:
                store_tile(acc, scales, d_s, d_desc, out, problem, own, cfg, WM, WN, mma, NP)
        else:
            cursor, ahead = next_tile(cursor, tile, work, UNIT, 4)
            if cfg.ZERO and cfg.LAYOUT == PSUM:
                store_zeros(out, own, own[2] + WM * (cfg.MP * 64), own[0] * cfg.STEP + WN * cfg.NP * cfg.WN, N, cfg)
            for kb in range(0, KB):
                cluster.wait(full + slot * 8, phase, 1)
                cluster.arrive(empty + slot * 8, cfg.CLUSTER)
                slot, phase = advance(slot, phase, cfg.STAGES)
        tile = ahead
        live = is_live(tile)
    if cfg.LATE_STORE:
        if pending:
            store_tile(acc, scales, d_s, d_desc, out, problem, done, cfg, WM, WN, mma, NP)
    tma.store_wait(0)
    cluster.wait_all(cfg.CLUSTER)


@gluon.jit
def prepare(out_ptr, index_ptr, M, G, alignment, cfg: gl.constexpr):
    """Shared memory (ring, staging of the store, table of groups), with barriers ready."""
    UNIT: gl.constexpr = cfg.UNIT
    STAGES: gl.constexpr = cfg.STAGES
    staging: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, cfg.OUT_COLS], out_ptr.dtype.element_ty)
    ring = gl.allocate_shared_memory(gl.int8, [cfg.BARS_AT // 128 + 1, 128], BYTES)
    d_s = view_as(ring, out_ptr.dtype.element_ty, 2 * cfg.OUT_BUFFERS, 64, cfg.OUT_COLS, staging)
    full, empty = barriers(cfg)
    for i in gl.static_range(STAGES):
        cluster.init(full + 8 * i, 1)
        cluster.init(empty + 8 * i, cfg.CLUSTER * 8)
    return ring, d_s, groups_table(ring, index_ptr, M, G, alignment, UNIT)


@gluon.jit
def is_wider(table, M, N, cfg: gl.constexpr):
    """Whether all tiles take less time WIDER. Rounds of tiles hang on the sizes of groups; a round's time, on its columns."""
    OWN: gl.constexpr = cfg.UNIT
    WIDER: gl.constexpr = cfg.WIDER.UNIT
    blocks = gl.num_programs(0)
    return gl.cdiv(total_tiles(table, M, N, WIDER, 4), blocks) * WIDER.BN <= gl.cdiv(total_tiles(table, M, N, OWN, 4), blocks) * OWN.BN


@gluon.jit
def consumer_of(wider, d_desc, out, scales, ring, d_s, table, problem, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr):
    WIDER: gl.constexpr = cfg.WIDER
    if wider:
        consumer(d_desc, out, scales, ring, d_s, table, problem, WIDER, WM, WN)
    else:
        consumer(d_desc, out, scales, ring, d_s, table, problem, cfg, WM, WN)


@gluon.jit
def producer_of(wider, descs, wider_desc, table, problem, sa_pitch, cfg: gl.constexpr):
    WIDER: gl.constexpr = cfg.WIDER
    if wider:
        producer((descs[0], descs[1], wider_desc), table, problem, sa_pitch, WIDER)
    else:
        producer(descs, table, problem, sa_pitch, cfg)


@gluon.jit(do_not_specialize=["M", "KB", "G", "alignment", "sa_pitch", "sag", "sam", "sak", "sbg", "sbn",
                              "out_pitch"])
def fp8_cluster_kernel(a_desc, sa_desc, b_desc, wider_desc, d_desc, out_ptr, sa_ptr, sb_ptr, index_ptr, M, N, KB, G, alignment,
                    sa_pitch, sag, sam, sak, sbg, sbn, sbk, og, om, out_pitch, cfg: gl.constexpr):
    """A persistent grid of clusters; arguments as `fp8_block_kernel` has them. wider_desc: B in boxes of WIDER."""
    ring, d_s, table = prepare(out_ptr, index_ptr, M, G, alignment, cfg)

    problem = (index_ptr, M, N, KB, G, alignment)
    scales = (sa_ptr, sag, sam, sak, sb_ptr, sbg, sbn, sbk)
    out = (out_ptr, og, om, out_pitch)
    descs = (a_desc, sa_desc, b_desc)
    if cfg.WIDER is None:
        gl.warp_specialize([
            (consumer, (d_desc, out, scales, ring, d_s, table, problem, cfg, 0, 0)),
            (consumer, (d_desc, out, scales, ring, d_s, table, problem, cfg, cfg.WGM - 1, cfg.WGN - 1)),
            (idle, (cfg, )),
            (producer, (descs, table, problem, sa_pitch, cfg)),
            (idle, (cfg, )),
        ], [4, 2, 1, 1], [cfg.CONSUMER_REGISTERS, cfg.PRODUCER_REGISTERS, cfg.PRODUCER_REGISTERS, cfg.PRODUCER_REGISTERS])
    else:
        wider = is_wider(table, M, N, cfg)
        gl.warp_specialize([
            (consumer_of, (wider, d_desc, out, scales, ring, d_s, table, problem, cfg, 0, 0)),
            (consumer_of, (wider, d_desc, out, scales, ring, d_s, table, problem, cfg, cfg.WGM - 1, cfg.WGN - 1)),
            (idle, (cfg, )),
            (producer_of, (wider, descs, wider_desc, table, problem, sa_pitch, cfg)),
            (idle, (cfg, )),
        ], [4, 2, 1, 1], [cfg.CONSUMER_REGISTERS, cfg.PRODUCER_REGISTERS, cfg.PRODUCER_REGISTERS, cfg.PRODUCER_REGISTERS])
