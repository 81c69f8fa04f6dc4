"""The sums of the Hopper FP8 prefill kernel: wgmma of K blocks and their promotion to FP32, in two arrangements."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from .fp8_block_parts_device import (
    advance, fence, load_a_scales, load_b_scales, multiply, promote, promotion_scale, read_a_scale, scaled)


@gluon.jit
def blocks(acc, p, sa, sb, slot, phase, kb, views, bars, problem, bases, scales, tile, cfg: gl.constexpr, WM: gl.constexpr,
           WN: gl.constexpr, mma: gl.constexpr, COUNT: gl.constexpr, HEAD: gl.constexpr):
    """COUNT K blocks from kb, one piece a warpgroup, two partial sums. HEAD: the first of the tile, whose wgmma is on its way.
    sa, sb: scales of block kb (sa: by plain loads only). Leaves with nothing in flight: (acc, p, sa and sb of the next block,
    slot, phase)."""
    a_v, b_v, sa_v = views
    full, empty = bars
    index_ptr, M, N, KB, G, alignment = problem
    sa_base, sb_base = bases
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    KS: gl.constexpr = cfg.KS
    COLS: gl.constexpr = cfg.WN
    AT: gl.constexpr = cfg.SKIP if HEAD else (cfg.SKIP + cfg.HEAD) % KS     # place of block kb in its slot
    q = gl.zeros([64, COLS], gl.float32, mma)
    for j in gl.static_range(COUNT):
        # ---- start this block, unless it is on its way
        if j == 0 and not HEAD:
            if AT % KS == 0:
                mbarrier.wait(full.index(slot), phase)
            p = multiply(a_v, b_v, slot * KS + AT % KS, p, cfg, WM, WN, 0)
        if cfg.A_SCALE_TMA and j == 0:
            sa = (read_a_scale(sa_v, slot * KS + AT % KS, cfg, WM, 0, rows), )
        sb_next = load_b_scales(sb_base, scales, kb + (j + 1), KB, cfg, j + 1 < COUNT)
        sa_next = sa
        if not cfg.A_SCALE_TMA:
            sa_next = load_a_scales(sa_base, scales, tile, M, kb + (j + 1), KB, cfg, WM, rows)
        old = slot
        if (AT + j) % KS == KS - 1:
            slot, phase = advance(slot, phase, cfg.STAGES)
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
            one = scaled(p, promotion_scale(sa, sb, 0, cfg))
        else:
            one = promote(acc[0], p, promotion_scale(sa, sb, 0, cfg))
        one, p = fence(1 if j + 1 < COUNT else 0, one, p)
        acc = (one, )
        p, q = q, p
        sa = sa_next
        sb = sb_next
    if cfg.A_SCALE_TMA:
        sa = ()
    return acc, p, sa, sb, slot, phase


@gluon.jit
def before(slot, cfg: gl.constexpr):
    return gl.where(slot == 0, cfg.STAGES - 1, slot - 1)


@gluon.jit
def piece_blocks(acc, p, sa, sb, slot, phase, kb, views, bars, problem, bases, scales, tile, cfg: gl.constexpr, WM: gl.constexpr,
                 WN: gl.constexpr, mma: gl.constexpr, COUNT: gl.constexpr, HEAD: gl.constexpr, MP: gl.constexpr):
    """`blocks` for several pieces a warpgroup: 64 rows and WN columns each, along N first, the first MP along M. The next slot is waited for while the last
    piece of this one runs, so the slot of block kb is known to be full.

    One partial sum: between two wgmma are the promotion's FMAs and nothing else, and the slot before is released once a wgmma of
    this one is on its way: the last one of the tile is the caller's to release. DOUBLE: two, the next piece runs meanwhile.
    SUB: a piece is summed and promoted in so many steps, each with scales of its own."""
    a_v, b_v, sa_v = views
    full, empty = bars
    index_ptr, M, N, KB, G, alignment = problem
    sa_base, sb_base = bases
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    NP: gl.constexpr = cfg.NP
    ALL: gl.constexpr = cfg.MP * NP
    PIECES: gl.constexpr = MP * NP
    SUB: gl.constexpr = cfg.SUB
    STEPS: gl.constexpr = PIECES * SUB
    COLS: gl.constexpr = cfg.WN
    q = gl.zeros([64, COLS], gl.float32, mma)
    for j in gl.static_range(COUNT):
        if not (HEAD and j == 0) and (j == 0 or not cfg.DOUBLE):
            p = multiply(a_v, b_v, slot, p, cfg, WM, WN, 0)
        if cfg.A_SCALE_TMA:
            sa = ()
            if SUB == 1:
                for i in gl.static_range(MP):
                    sa = sa + (read_a_scale(sa_v, slot, cfg, WM, i, rows), )
        if not (HEAD and j == 0) and not cfg.DOUBLE:
            mbarrier.arrive(empty.index(before(slot, cfg)), count=1)
        sb_next = load_b_scales(sb_base, scales, kb + (j + 1), KB, cfg, j + 1 < COUNT)
        sa_next = sa
        if not cfg.A_SCALE_TMA:
            sa_next = load_a_scales(sa_base, scales, tile, M, kb + (j + 1), KB, cfg, WM, rows)
        old = slot
        slot, phase = advance(slot, phase, cfg.STAGES)
        sums = ()
        for step in gl.static_range(STEPS):
            if step > 0 and not cfg.DOUBLE:
                p = multiply(a_v, b_v, old, p, cfg, WM, WN, step // SUB, step % SUB)
            if SUB > 1:
                sa = read_a_scale(sa_v, old, cfg, WM, step // SUB // NP, rows, step % SUB)
            if step == STEPS - 1:
                mbarrier.wait(full.index(slot), phase, pred=kb + (j + 1) < KB)
            if cfg.DOUBLE and step + 1 < PIECES:
                q = multiply(a_v, b_v, old, q, cfg, WM, WN, step + 1)
            elif cfg.DOUBLE and j + 1 < COUNT:
                q = multiply(a_v, b_v, slot, q, cfg, WM, WN, 0)
            p = warpgroup_mma_wait(1 if cfg.DOUBLE and step + j + 2 < PIECES + COUNT else 0, deps=(p, ))
            if step % SUB > 0:
                one = promote(one, p, promotion_scale(sa, sb, step // SUB, cfg))
            elif HEAD and j == 0:
                one = scaled(p, promotion_scale(sa, sb, step // SUB, cfg))
            else:
                one = promote(acc[step // SUB], p, promotion_scale(sa, sb, step // SUB, cfg))
            one, p = fence(1 if cfg.DOUBLE and step + j + 2 < PIECES + COUNT else 0, one, p)
            if step % SUB == SUB - 1:
                sums = sums + (one, )
            if cfg.DOUBLE:
                p, q = q, p
        if cfg.DOUBLE:
            mbarrier.arrive(empty.index(old), count=1)
        for i in gl.static_range(PIECES, ALL):
            sums = sums + (acc[i], )
        acc = sums
        sa = sa_next
        sb = sb_next
    if cfg.A_SCALE_TMA:
        sa = ()
    return acc, p, sa, sb, slot, phase


@gluon.jit
def sum_pieces(acc, p, sa, sb, slot, phase, views, bars, problem, bases, scales, tile, cfg: gl.constexpr, WM: gl.constexpr,
               WN: gl.constexpr, mma: gl.constexpr, MP: gl.constexpr):
    """A tile's sums of the first MP pieces along M, by `piece_blocks`; the first one's wgmma is on its way."""
    full, empty = bars
    index_ptr, M, N, KB, G, alignment = problem
    acc, p, sa, sb, slot, phase = piece_blocks(acc, p, sa, sb, slot, phase, KB * 0, views, bars, problem, bases, scales, tile, cfg, WM,
                                               WN, mma, cfg.HEAD, True, MP)
    for kb in range(cfg.HEAD, KB, cfg.UNROLL):
        acc, p, sa, sb, slot, phase = piece_blocks(acc, p, sa, sb, slot, phase, kb, views, bars, problem, bases, scales, tile, cfg, WM,
                                                   WN, mma, cfg.UNROLL, False, MP)
    if not cfg.DOUBLE:
        mbarrier.arrive(empty.index(before(slot, cfg)), count=1)
    return acc, p, sa, sb, slot, phase
