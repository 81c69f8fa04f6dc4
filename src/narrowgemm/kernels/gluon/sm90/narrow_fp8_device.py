"""FP8 tokens by MXFP4 weights in the order `narrowgemm.prepack_bits.FP8_PREPACK`: the products of the Hopper kernel for narrow weights
on the FP8 tensor cores. And BF16 tokens (TWO), each the sum of two E4M3 numbers in units of 128 of K: as two products or, of few tokens,
as columns side by side of one.

Weights become E4M3 in registers: their scales are folded in (`fold_expand_device`), a row's own power of two is left for the
epilogue. A thread's 16 bytes are a block of 32 of K of one row, which is what wgmma takes from a thread for 128 of K if tokens have K
in the order that follows: words of 4, of the four blocks in turn. Partial sums of 128 of K times the token's scale are added up.
"""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma

from .fold_expand_device import NIBBLES, lane_table, of_lane
from .fp8_block_parts_device import advance
from .fp8_block_schedule_device import fresh
from .landed_device import landed
from .narrow_expand_device import byte_layout, bytes_layout, field_layout
from .narrow_prefill_parts_device import ROWS_OF_BYTES, X8_TILE, settle
from .shim import view_as, view_cube

# a word of 8 codes and the table of its block's power of two, twice four times, the same
WORD_ASM = gl.constexpr(NIBBLES % {"high": "$7"})
CUBE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))


@constexpr_function
def sums8_layout(tokens, warps=4):
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, tokens, 32])


@gluon.jit
def of_rows(upper, lower, ROWS: gl.constexpr):
    """Two int32 [ROWS / 2, 4], of rows g and g + 8 of each 16, as [ROWS, 4, 1] beside a unit's bytes."""
    x = gl.permute(gl.reshape(gl.join(upper, lower), [ROWS // 16, 8, 4, 2]), (0, 3, 1, 2))
    return gl.expand_dims(gl.convert_layout(gl.reshape(x, [ROWS, 4]), gl.SliceLayout(2, bytes_layout(ROWS)), assert_trivial=True), 2)


@gluon.jit
def to_e4m3(w, fields, tops, tables, operand: gl.constexpr, ROWS: gl.constexpr = 64, PURE: gl.constexpr = False):
    """Bytes [ROWS, 64] of a unit, the scale fields of their chunk and their rows' largest (`row_tops`), to E4M3 [ROWS, 128] in `operand`'s
    layout. The assembly counts as impure, so it stays in front of a wait for products in flight."""
    low, high = tables
    d0 = (tops - fields) & 15
    d1 = ((tops >> 8) - (fields >> 8)) & 15
    lows = of_rows(of_lane(low, d0, PURE), of_lane(low, d1, PURE), ROWS)
    highs = of_rows(of_lane(high, d0, PURE), of_lane(high, d1, PURE), ROWS)
    w = gl.convert_layout(gl.reshape(w, [ROWS, 4, 16]), bytes_layout(ROWS), assert_trivial=True)
    lo, hi = gl.inline_asm_elementwise(WORD_ASM, "=&r,=&r,r,r,r,r,r,r,r,r,r", [w, lows, highs], dtype=(gl.float8e4nv, gl.float8e4nv),
                                       is_pure=PURE, pack=4)
    a = gl.reshape(gl.join(lo, hi), [ROWS, 4, 4, 4, 2])                      # row, block, word, byte, half
    a = gl.reshape(gl.permute(a, (0, 2, 4, 1, 3)), [ROWS, 128])              # row, word, half, block, byte
    return gl.convert_layout(a, operand, assert_trivial=True)


@constexpr_function
def sixteens_layout(tokens):
    """Of scales [tokens / 16, 4, 4]: of each 16 a thread has those of the columns 1, 0, 9 and 8 beyond one first column."""
    rows = [[1 << i, 0, 0] for i in range((tokens // 16).bit_length() - 1)]
    return gl.DistributedLinearLayout([[0, 0, 1], [0, 0, 2], *rows], [[0, 1, 0], [0, 2, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
                                      [[0, 0, 0], [0, 0, 0]], [], [tokens // 16, 4, 4])


@gluon.jit
def scales_of(ring, slot, cfg: gl.constexpr, T: gl.constexpr, P: gl.constexpr, AT: gl.constexpr):
    """[1, P] of a slot's tokens in its K block AT."""
    if P == 8:
        f = view_as(ring, gl.float32, cfg.STAGES * (T // 16), 16 * cfg.BOX, 4, ROWS_OF_BYTES).index(slot * (T // 16))
        return f.slice(16 * AT, P, 0).slice(1, 1, 1).permute((1, 0)).load(sums8_layout(P))
    else:
        f = view_cube(ring, gl.float32, cfg.STAGES * (T // P), P // 16, 8 * cfg.BOX, 8, CUBE).index(slot * (T // P))
        s = f.slice(8 * AT, 4, 1).slice(0, 4, 2).load(sixteens_layout(P))        # sixteen, first column, further on
        one, own = gl.split(gl.reshape(s, [P // 16, 4, 2, 2]))
        s = gl.reshape(gl.permute(gl.join(own, one), (0, 2, 1, 3)), [P])
        return gl.expand_dims(gl.convert_layout(s, gl.SliceLayout(0, sums8_layout(P)), assert_trivial=True), 0)


@constexpr_function
def side_by_side(tokens, cfg, alone):
    """Whether the two numbers of BF16 tokens are columns of one product; else two products of the same columns, whose sums take half
    the registers: beside another piece, of one unit, ptxas would have every wgmma of the kernel wait for the one before (C7511)."""
    return cfg.TWO and tokens <= 16 and (alone or cfg.MP > 1)


@constexpr_function
def columns8(tokens, cfg, alone):
    """Of the products of so many tokens; alone: there is no second piece."""
    return 2 * tokens if side_by_side(tokens, cfg, alone) else tokens


@gluon.jit
def multiply8(a, ring, slot, p, MORE: gl.constexpr, cfg: gl.constexpr, T: gl.constexpr, P: gl.constexpr, ALONE: gl.constexpr):
    """Start p = a . tokens^T over a K block's 128 of K; `slot` counts K blocks. MORE: p += that, else p comes in only to keep its registers."""
    N: gl.constexpr = columns8(P, cfg, ALONE)
    BOXES: gl.constexpr = T // P * (2 if cfg.TWO else 1) * P // N
    xs = view_as(ring, gl.float8e4nv, cfg.STAGES * cfg.BOX * BOXES, N, 128, X8_TILE)
    a = gl.convert_layout(a, gl.DotOperandLayout(0, sums8_layout(N), 4), assert_trivial=True)
    p = warpgroup_mma(a, xs.index(slot * BOXES).permute((1, 0)), p, use_acc=MORE, is_async=True)
    if cfg.TWO and N == P:
        p = warpgroup_mma(a, xs.index(slot * BOXES + 1).permute((1, 0)), p, is_async=True)
    return p


@gluon.jit
def multiply_all(a, rings, slot, parts, MORE: gl.constexpr, cfg: gl.constexpr, P0: gl.constexpr, P1: gl.constexpr):
    """`multiply8` of both pieces of the tokens, where there are two."""
    new = (multiply8(a, rings[0], slot, parts[0], MORE, cfg, cfg.T0, P0, P1 == 0), )
    if P1 > 0:
        new = new + (multiply8(a, rings[1], slot, parts[1], MORE, cfg, cfg.T1, P1, False), )
    return new


@gluon.jit
def weight_views(rings, cfg: gl.constexpr):
    """Bytes and scale fields of all slots' units."""
    return (view_as(rings[2], gl.uint8, cfg.STAGES * cfg.UNITS * cfg.BOX, 64, 64, ROWS_OF_BYTES),
            view_as(rings[3], gl.int32, cfg.STAGES * cfg.UNITS, 32, 4, ROWS_OF_BYTES))


@gluon.jit
def expand_unit(views, slot, kb, tops, tables, UNIT: gl.constexpr, MORE: gl.constexpr, cfg: gl.constexpr, WG: gl.constexpr,
                P0: gl.constexpr):
    """A warpgroup's UNIT of a slot, K block kb + MORE, to E4M3."""
    w_v, s_v = views
    unit = slot * cfg.UNITS + (WG * cfg.MP + UNIT)
    if cfg.BOX > 1:     # slots begin at even K blocks
        fields = s_v.index(unit).load(field_layout(64)) >> (16 * (MORE % 2))
    else:
        fields = s_v.index(unit).load(field_layout(64)) >> (16 * ((kb + MORE) % 2))
    return to_e4m3(w_v.index(unit * cfg.BOX + MORE % cfg.BOX).load(byte_layout(64)), fields, tops[UNIT], tables, gl.DotOperandLayout(0, sums8_layout(P0), 4))


@gluon.jit
def whole(p, P: gl.constexpr):
    """Sums [64, P] of a product."""
    if p.shape[1] > P:
        first, second = gl.split(gl.permute(gl.reshape(p, [64, 2, P]), (0, 2, 1)))
        p = gl.convert_layout(first + second, sums8_layout(P), assert_trivial=True)
    return p


@gluon.jit
def add_up(sums, parts, scales, cfg: gl.constexpr, UNIT: gl.constexpr, PIECES: gl.constexpr):
    """sums of one unit += parts * scales, one FMA an element; of ROW, += parts."""
    MP: gl.constexpr = cfg.MP
    new = ()
    for i in gl.static_range(MP * PIECES):
        if i % MP != UNIT:
            new = new + (sums[i], )
        elif cfg.ROW:
            new = new + (sums[i] + parts[i // MP], )
        else:
            s, p = gl.broadcast(scales[i // MP], whole(parts[i // MP], sums[i].shape[1]))
            new = new + (gl.fma(p, s, sums[i]), )
    return new


@gluon.jit
def freed(scales, empty, slot, MP: gl.constexpr):
    """The scales; the slot that they are from, whose products are done, is the producer's again. Of several units, what the second one's
    expansion took was loaded behind the scales, which have come, too."""
    there = ()
    for i in gl.static_range(len(scales)):
        if MP == 1:
            there = there + (landed(scales[i], slot, scales[i].shape[1] // 4, 4 if scales[i].shape[1] > 8 else 1), )
        else:
            there = there + (scales[i], )
    mbarrier.arrive(empty.index(slot), count=1)
    return there


@gluon.jit
def blocks8(sums, parts, slot, phase, kb, tops, tables, rings, bars, cfg: gl.constexpr, WG: gl.constexpr, P0: gl.constexpr,
            P1: gl.constexpr, COUNT: gl.constexpr):
    """COUNT K blocks from kb, whole slots, each unit's product a step. Leaves with nothing in flight: ptxas serialises wgmma that are, across a loop's
    back edge. Weights are expanded while the step before runs; the wait for tokens between the two keeps ptxas from moving either."""
    full, empty = bars
    w_full, x_full = full
    MP: gl.constexpr = cfg.MP
    PIECES: gl.constexpr = 2 if P1 > 0 else 1
    views = weight_views(rings, cfg)
    old = slot
    for c in gl.static_range(COUNT):
        if c % cfg.BOX == 0:
            mbarrier.wait(w_full.index(cfg.F_AT + slot), phase)
        for i in gl.static_range(MP):
            a = expand_unit(views, slot, kb, tops, tables, i, c, cfg, WG, P0)
            mbarrier.wait(x_full.index(slot), phase)
            if c + i > 0:
                parts = settle(parts, PIECES)
                if i == 0 and c % cfg.BOX == 0:
                    scales = freed(scales, empty, old, MP)
                sums = add_up(sums, parts, scales, cfg, (i + MP - 1) % MP, PIECES)
            if i == 0:
                scales = (scales_of(rings[4], slot, cfg, cfg.T0, P0, c % cfg.BOX), )
                if P1 > 0:
                    scales = scales + (scales_of(rings[5], slot, cfg, cfg.T1, P1, c % cfg.BOX), )
            parts = multiply_all(a, rings, slot * cfg.BOX + c % cfg.BOX, parts, False, cfg, P0, P1)
        old = slot
        if c % cfg.BOX == cfg.BOX - 1:
            slot, phase = advance(slot, phase, cfg.STAGES)
    parts = settle(parts, PIECES)
    scales = freed(scales, empty, old, MP)
    sums = add_up(sums, parts, scales, cfg, MP - 1, PIECES)
    return sums, parts, slot, phase


@gluon.jit
def blocks_of_rows(sums, slot, phase, kb, tops, tables, rings, bars, cfg: gl.constexpr, WG: gl.constexpr, P0: gl.constexpr,
                   P1: gl.constexpr, COUNT: gl.constexpr):
    """COUNT K blocks from kb of tokens whose scale comes at the end, unit by unit; the tensor cores add them up, and weights are expanded
    while they do."""
    full, empty = bars
    w_full, x_full = full
    MP: gl.constexpr = cfg.MP
    PIECES: gl.constexpr = 2 if P1 > 0 else 1
    views = weight_views(rings, cfg)
    BOX: gl.constexpr = cfg.BOX
    parts = (gl.zeros([64, P0], gl.float32, sums8_layout(P0)), )
    if P1 > 0:
        parts = parts + (gl.zeros([64, P1], gl.float32, sums8_layout(P1)), )
    at = ()
    for c in gl.static_range(COUNT):
        at = at + ((slot, phase), )
        if c % cfg.BOX == cfg.BOX - 1:
            slot, phase = advance(slot, phase, cfg.STAGES)
    for n in gl.static_range(MP * COUNT):
        if n < COUNT:
            mbarrier.wait(w_full.index(cfg.F_AT + at[n][0]), at[n][1])
        a = expand_unit(views, at[n % COUNT][0], kb, tops, tables, n // COUNT, n % COUNT, cfg, WG, P0)
        mbarrier.wait(x_full.index(at[n % COUNT][0]), at[n % COUNT][1])
        if n > 0 and n % COUNT == 0:
            parts = settle(parts, PIECES)
            sums = add_up(sums, parts, (), cfg, n // COUNT - 1, PIECES)
        parts = multiply_all(a, rings, at[n % COUNT][0] * cfg.BOX + n % cfg.BOX, parts, n % COUNT > 0, cfg, P0, P1)
    parts = settle(parts, PIECES)
    for c in gl.static_range(0, COUNT, BOX):
        mbarrier.arrive(empty.index(at[c][0]), count=1)
    return add_up(sums, parts, (), cfg, MP - 1, PIECES), slot, phase


@gluon.jit
def some_blocks(sums, parts, slot, phase, kb, tops, tables, rings, bars, cfg: gl.constexpr, WG: gl.constexpr, P0: gl.constexpr,
                P1: gl.constexpr, COUNT: gl.constexpr):
    """COUNT K blocks from kb, by the way of the tile."""
    if cfg.ROW:
        sums, slot, phase = blocks_of_rows(sums, slot, phase, kb, tops, tables, rings, bars, cfg, WG, P0, P1, COUNT)
        return sums, parts, slot, phase
    else:
        return blocks8(sums, parts, slot, phase, kb, tops, tables, rings, bars, cfg, WG, P0, P1, COUNT)


@gluon.jit
def products8(slot, phase, KC, tops, rings, bars, cfg: gl.constexpr, WG: gl.constexpr, P0: gl.constexpr, P1: gl.constexpr):
    """All of K of one tile: (sums, slot, phase), MP sums [64, P0] and, where P1, MP of [64, P1]. tops: `tops_of`."""
    MP: gl.constexpr = cfg.MP
    L0: gl.constexpr = sums8_layout(P0)
    L1: gl.constexpr = sums8_layout(P1 if P1 > 0 else 32)
    tables = lane_table()
    sums = ()
    for i in gl.static_range(MP):
        sums = sums + (gl.zeros([64, P0], gl.float32, L0), )
    N0: gl.constexpr = columns8(P0, cfg, P1 == 0)
    parts = (gl.zeros([64, N0], gl.float32, sums8_layout(N0)), )
    if P1 > 0:
        for i in gl.static_range(MP):
            sums = sums + (gl.zeros([64, P1], gl.float32, L1), )
        N1: gl.constexpr = columns8(P1, cfg, False)
        parts = parts + (gl.zeros([64, N1], gl.float32, sums8_layout(N1)), )
    for kb in range(0, KC - cfg.REST, cfg.UNROLL):
        slot = fresh(slot)      # where it comes round once a trip, every slot's addresses would be kept in registers
        sums, parts, slot, phase = some_blocks(sums, parts, slot, phase, kb, tops, tables, rings, bars, cfg, WG, P0, P1, cfg.UNROLL)
    if cfg.REST > 0:
        sums, parts, slot, phase = some_blocks(sums, parts, slot, phase, KC - cfg.REST, tops, tables, rings, bars, cfg, WG, P0, P1, cfg.REST)
    return sums, slot, phase
