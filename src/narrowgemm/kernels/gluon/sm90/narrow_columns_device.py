"""FP8 tokens by MXFP4 weights, as `narrow_fp8_device` has them, on any multiple of 16 columns.

A tensor of Gluon has a power of two of columns, a wgmma any multiple of 8. So a unit's sums are a tuple of [64, 16], and the wgmma is PTX
over the registers of all of them: one of 80 columns takes five eighths of the time of one of 128.

One product a K block: consumers multiply in turn. The next one starts when all but the last wgmma of this one are done, and meanwhile
this one adds up and expands its next weights. Several (PIECE): of so many columns at most, one after the other, so that only one's
sums take registers beside those of the tile, and consumers in no order. Two units a consumer then share what is read of the tokens' scales:
beside wgmma a scheduler brings a register from shared memory in 12 clocks, of 144 columns 36 of scales for every 8 of weights.

CHAIN: the tokens' scales of every other K block are given as ratios to those of the next one. The sums of both are one: the first product's
are multiplied by the ratio, and the second product goes onto them; then they are multiplied by its scale and added up.
"""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from . import cluster_device as cluster
from .fold_expand_device import NIBBLES_ASM, blocks_layout, of_blocks, of_lane, words_layout
from .fp8_block_parts_device import advance
from .fp8_block_schedule_device import fresh
from .landed_device import landed
from .narrow_expand_device import field_layout
from .narrow_fp8_device import CUBE, sixteens_layout, sums8_layout
from .narrow_prefill_parts_device import ROWS_OF_BYTES
from .shim import view_as, view_cube

WORDS = gl.constexpr(words_layout(4))
SIXTEEN = gl.constexpr(sums8_layout(16))
# wgmma's descriptor of rows of 128 bytes, swizzled by as many: the lower word without its address, and the upper one
SWIZZLED, SWIZZLED_HIGH = gl.constexpr(0x00010000), 0x40000040
TURNS = 8                                       # the first of the hardware's barriers for turns: Triton takes them from 0 on
FIRST_TURN = gl.constexpr(f"bar.arrive {TURNS}, 256; mov.b32 $0, 0;")
LAST_TURN = gl.constexpr(f"bar.sync {TURNS}, 256; mov.b32 $0, 0;")


# ---------------------------------------------------------------- wgmma
@constexpr_function
def product_code(P, BLOCKS, WG, PIECE, FROM, MORE):
    """PTX. Operands: sums, the same as they come in; of each block the lower halves, words 0 to 3 of row g, then of row g + 8, the upper
    halves, and the lower word of the descriptor of its tokens, whose columns from FROM on are multiplied; a number that isn't negative.

    MORE: what comes in is added. PIECE: that it isn't is decided by that number. ptxas would otherwise give each product sums of its own, of which there
    are too many, and so have each wgmma wait for the one before."""
    d, blocks = P // 2, 24 * BLOCKS
    sums = "{" + ", ".join(f"${i}" for i in range(d)) + "}"
    turn = "" if PIECE else f"bar.sync {TURNS + WG}, 256;"
    text = f"""{{
.reg .pred add;
.reg .b64 tokens, at;
{turn}
wgmma.fence.sync.aligned;"""
    for i in range(4 * BLOCKS):
        lo, q = 2 * d + 24 * (i // 4), i % 4
        hi, desc = lo + 8, lo + 16
        commit = "wgmma.commit_group.sync.aligned;" if i == 4 * BLOCKS - 1 and not PIECE else ""
        add = f"setp.lt.s32 add, ${2 * d + blocks}, 0;" if PIECE and i == 0 and not MORE else f"setp.ne.b32 add, {int(i > 0 or MORE)}, 0;"
        start = f"mov.b64 tokens, {{${desc}, {SWIZZLED_HIGH}}};\n" if q == 0 else ""
        text += f"""
{commit}
{start}add.s64 at, tokens, {2 * q + 8 * FROM};
{add}
wgmma.mma_async.sync.aligned.m64n{P}k32.f32.e4m3.e4m3 {sums}, {{${lo + q}, ${lo + 4 + q}, ${hi + q}, ${hi + 4 + q}}}, at, add, 1, 1;"""
    return text + "\nwgmma.commit_group.sync.aligned;\n}"


@constexpr_function
def settle_code(WG, CONSUMERS, PIECE, PENDING):
    if PIECE:
        return f"wgmma.wait_group.sync.aligned {PENDING};"
    return f"""wgmma.wait_group.sync.aligned 1;
bar.arrive {TURNS + (WG + 1) % CONSUMERS}, 256;
wgmma.wait_group.sync.aligned 0;"""


@constexpr_function
def tied(P, BLOCKS=0, SCALES=0):
    """Constraints of P / 2 registers that come in and go out, of the other operands of a product, and of scales."""
    d = P // 2
    product = ["r"] * 24 * BLOCKS + ["r"] * 8 if BLOCKS else []
    return ",".join(["=f"] * d + [str(i) for i in range(d)] + product + ["f"] * SCALES)


@constexpr_function
def floats(P):
    return (gl.float32, ) * (P // 16)


@gluon.jit
def product(parts, operands, slot, P: gl.constexpr, BLOCKS: gl.constexpr, cfg: gl.constexpr, WG: gl.constexpr, FROM: gl.constexpr,
            MORE: gl.constexpr):
    """When it is this consumer's turn, if it has one, start parts = a . tokens^T over BLOCKS blocks of 128 of K and P columns; MORE: parts +=."""
    return gl.inline_asm_elementwise(product_code(P, BLOCKS, WG, cfg.PIECE, FROM, MORE), tied(P, BLOCKS), parts + operands + (slot, ),
                                     dtype=floats(P), is_pure=False, pack=8)


@gluon.jit
def settle(parts, scales, P: gl.constexpr, cfg: gl.constexpr, WG: gl.constexpr, PENDING: gl.constexpr):
    """Wait for the product; give the turn away shortly before. The scales are there by then: they aren't asked for behind the wait."""
    return gl.inline_asm_elementwise(settle_code(WG, cfg.CONSUMERS, cfg.PIECE, PENDING), tied(P, 0, 8 * len(scales)), parts + scales,
                                     dtype=floats(P), is_pure=False, pack=8)


@gluon.jit
def first_turn(cfg: gl.constexpr, WG: gl.constexpr):
    """The last consumer gives the first one its first turn."""
    if WG == cfg.CONSUMERS - 1 and cfg.PIECE == 0:
        gl.inline_asm_elementwise(FIRST_TURN, "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def last_turn(cfg: gl.constexpr, WG: gl.constexpr):
    """The first consumer takes the turn that is left, so that a block ends with no barrier half arrived at."""
    if WG == 0 and cfg.PIECE == 0:
        gl.inline_asm_elementwise(LAST_TURN, "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)


# ---------------------------------------------------------------- operands
@gluon.jit
def of_words(x):
    """Words [64, 4 blocks, 4], a thread's registers as they are, as a [64, 16] beside sums: word w of row g is w, of row g + 8 is 4 + w."""
    x = gl.permute(gl.reshape(x, [4, 2, 8, 4, 2, 2]), (0, 4, 2, 1, 3, 5))
    return gl.convert_layout(gl.reshape(x, [64, 16]), SIXTEEN, assert_trivial=True)


@gluon.jit
def fields_of(s_s, unit, cfg: gl.constexpr):
    """Of a unit's chunk."""
    return view_as(s_s, gl.int32, cfg.STAGES * cfg.UNITS, 32, 4, ROWS_OF_BYTES).index(unit).load(field_layout(64))


@gluon.jit
def expanded(w_s, block, fields, tops, tables, cfg: gl.constexpr):
    """(lower, upper halves) of a unit's K block in E4M3. The assembly counts as impure, so it stays in front of the wait for tokens.

    A shuffle takes five bits of a lane's number, and lanes 16 apart have the same table: what is above them may stay."""
    low, high = tables
    w = view_as(w_s, gl.int32, cfg.STAGES * cfg.UNITS * cfg.BOX, 64, 16, ROWS_OF_BYTES).index(block).load(WORDS)
    d0 = tops - fields
    d1 = (tops >> 8) - (fields >> 8)
    lows = of_blocks(of_lane(low, d0), of_lane(low, d1), 4)
    highs = of_blocks(of_lane(high, d0), of_lane(high, d1), 4)
    w = gl.convert_layout(gl.reshape(w, [64, 4, 4]), blocks_layout(4), assert_trivial=True)
    lo, hi = gl.inline_asm_elementwise(NIBBLES_ASM, "=&r,=&r,r,r,r", [w, lows, highs], dtype=(gl.int32, gl.int32), is_pure=False, pack=1)
    return of_words(lo), of_words(hi)


@gluon.jit
def tokens_at(block, cfg: gl.constexpr):
    """The lower word of the descriptor of a K block's tokens: their ring is the largest allocation, which is at the start of shared memory."""
    return (cluster.start_of_shared() >> 4) + SWIZZLED + block * (cfg.XT * 8)


@gluon.jit
def scale_of_slot(ring, slot, i: gl.constexpr, AT: gl.constexpr, cfg: gl.constexpr):
    """[1, 16]: of a slot's tokens from 16 i on in its K block AT. They come in boxes of 64 tokens."""
    f = view_cube(ring, gl.float32, cfg.STAGES * (cfg.FT // 64), 1, 32 * cfg.BOX, 8, CUBE).index(slot * (cfg.FT // 64) + i // 4)
    s = f.slice(32 * AT + i % 4 * 8, 4, 1).slice(0, 4, 2).load(sixteens_layout(16))
    one, own = gl.split(gl.reshape(s, [1, 4, 2, 2]))
    s = gl.reshape(gl.permute(gl.join(own, one), (0, 2, 1, 3)), [16])
    return gl.expand_dims(gl.convert_layout(s, gl.SliceLayout(0, SIXTEEN), assert_trivial=True), 0)


# ---------------------------------------------------------------- K
@constexpr_function
def cuts(P, PIECE):
    """Where the products of P columns begin, in 16 columns, and where the last one ends."""
    count = -(-P // PIECE) if PIECE else 1
    return [-(-P // 16 * j // count) for j in range(count + 1)]


@constexpr_function
def widest(P, PIECE):
    """Columns of the widest product, in 16."""
    count = -(-P // PIECE) if PIECE else 1
    return -(-P // 16 // count)


@constexpr_function
def sets(P, cfg):
    """Of sums of products: one for each unit, so that its product runs while another one's is added up, or one in turn."""
    return cfg.MP if cfg.CHAIN or P <= cfg.BOTH else 1


@constexpr_function
def place(P, PIECE, MP, unit, i):
    """Of the sums of a unit's columns 16 i among those of all products, one after the other, of all units each."""
    count = -(-P // PIECE) if PIECE else 1
    at = [-(-P // 16 * j // count) for j in range(count + 1)]
    j = max(k for k in range(count) if at[k] <= i)
    return at[j] * MP + unit * (at[j + 1] - at[j]) + i - at[j]


@gluon.jit
def several(x, FROM: gl.constexpr, TO: gl.constexpr):
    some = ()
    for i in gl.static_range(FROM, TO):
        some = some + (x[i], )
    return some


@gluon.jit
def some_columns(sums, parts, operands, slot, done, f_s, empty, cfg: gl.constexpr, WG: gl.constexpr, COUNT: gl.constexpr, AT: gl.constexpr,
                 FROM: gl.constexpr, TO: gl.constexpr, ALL: gl.constexpr, MORE: gl.constexpr, LAST: gl.constexpr):
    """(sums with the products of columns FROM to TO of ALL, in 16, unit by unit, parts). The tokens' scales are those of K block AT of a
    slot; slots of `done` are free behind the last product. MORE: the product goes onto parts that are in units of its scale. Not LAST: the
    parts are brought to units of the next product's instead of added up."""
    MP: gl.constexpr = cfg.MP
    P: gl.constexpr = (TO - FROM) * 16
    # of each unit's own, where they go on
    EACH: gl.constexpr = len(parts) // MP if sets(ALL * 16, cfg) > 1 else 0
    new = ()
    scales = ()
    if EACH > 0:       # all units' products one behind the other, as each has sums of its own
        for u in gl.static_range(MP):
            some = product(several(parts, u * EACH, u * EACH + TO - FROM), operands[u], slot, P, COUNT, cfg, WG, FROM * 16, MORE)
            parts = several(parts, 0, u * EACH) + some + several(parts, u * EACH + TO - FROM, len(parts))
    for u in gl.static_range(MP):
        some = several(parts, u * EACH, u * EACH + TO - FROM)
        if EACH == 0:
            some = product(some, operands[u], slot, P, COUNT, cfg, WG, FROM * 16, MORE)
        if u == 0 and not cfg.ROW:
            for i in gl.static_range(TO - FROM):
                s, p = gl.broadcast(scale_of_slot(f_s, slot, FROM + i, AT, cfg), some[i])
                scales = scales + (s, )
        some = settle(some, scales, P, cfg, WG, MP - 1 - u if EACH > 0 else 0)
        if TO == ALL and u == MP - 1:
            if MP == 1 and not cfg.ROW:     # several units': those of the first one have been added up by then
                there = scales
                scales = ()
                for i in gl.static_range(TO - FROM):
                    scales = scales + (landed(there[i], slot, 8, 4), )
            for i in gl.static_range(len(done)):
                mbarrier.arrive(empty.index(done[i]), count=1)
        if not LAST:
            new = sums
            there = some
            some = ()
            for i in gl.static_range(TO - FROM):
                some = some + (there[i] * scales[i], )
        for i in gl.static_range(TO - FROM if LAST else 0):
            if cfg.ROW:
                new = new + (sums[u * ALL + FROM + i] + some[i], )
            else:
                new = new + (gl.fma(some[i], scales[i], sums[u * ALL + FROM + i]), )
        parts = several(parts, 0, u * EACH) + some + several(parts, u * EACH + TO - FROM, len(parts))
    return new, parts


@gluon.jit
def blocks16(sums, parts, slot, phase, kb, tops, tables, rings, bars, cfg: gl.constexpr, WG: gl.constexpr, P: gl.constexpr,
             COUNT: gl.constexpr):
    """COUNT K blocks from kb, a product of each unit and piece: of tokens with one scale a row, the tensor cores add up all of them."""
    x_s, x1_s, w_s, s_s, f_s, f1_s = rings
    full, empty = bars
    w_full, x_full = full
    MP: gl.constexpr = cfg.MP
    BOX: gl.constexpr = cfg.BOX
    EACH: gl.constexpr = COUNT if cfg.ROW else 1        # K blocks of a product
    for first in gl.static_range(0, COUNT, EACH):
        operands = ()
        for u in gl.static_range(MP):
            operands = operands + ((), )
        done = ()
        for c in gl.static_range(first, first + EACH):
            # of 160 columns, sums leave no registers to expand weights beside them: a wait keeps the two apart
            if c % BOX == 0 or (c == first and P >= 160):
                mbarrier.wait(w_full.index(cfg.F_AT + slot), phase)
            if c % BOX == 0:
                fields = ()
                for u in gl.static_range(MP):
                    fields = fields + (fields_of(s_s, slot * cfg.UNITS + (WG * MP + u), cfg), )
            more = ()
            for u in gl.static_range(MP):
                if BOX == 1:
                    f = fields[u] >> (16 * ((kb + c) % 2))
                else:       # slots begin at even K blocks
                    f = fields[u] >> (16 * (c % 2))
                a = expanded(w_s, (slot * cfg.UNITS + (WG * MP + u)) * BOX + c % BOX, f, tops[u], tables, cfg)
                more = more + (operands[u] + a + (tokens_at(slot * BOX + c % BOX, cfg), ), )
            operands = more
            if c % BOX == 0:
                mbarrier.wait(x_full.index(slot), phase)
            if c == first:
                old = slot
            if c % BOX == BOX - 1:
                done = done + (slot, )
                slot, phase = advance(slot, phase, cfg.STAGES)
        found = ()
        for j in gl.static_range(len(cuts(P, cfg.PIECE)) - 1):
            more, parts = some_columns(sums, parts, operands, old, done, f_s, empty, cfg, WG, EACH, first % BOX, cuts(P, cfg.PIECE)[j],
                                       cuts(P, cfg.PIECE)[j + 1], P // 16, cfg.CHAIN and first % 2 == 1, not cfg.CHAIN or first % 2 == 1)
            found = found + more
        new = ()
        for u in gl.static_range(MP):
            for i in gl.static_range(P // 16):
                new = new + (found[place(P, cfg.PIECE, MP, u, i)], )
        sums = new
    return sums, parts, slot, phase


@gluon.jit
def zeros(COUNT: gl.constexpr):
    """So many [64, 16]."""
    new = ()
    for i in gl.static_range(COUNT):
        new = new + (gl.zeros([64, 16], gl.float32, SIXTEEN), )
    return new


@gluon.jit
def opaque(x):
    """x, which the compiler takes for values that it doesn't know: it would have zeros in front of each width's loop."""
    new = ()
    for i in gl.static_range(len(x)):
        new = new + (gl.inline_asm_elementwise("", "=f,=f,=f,=f,=f,=f,=f,=f,0,1,2,3,4,5,6,7", [x[i]], dtype=gl.float32, is_pure=False, pack=8), )
    return new


@gluon.jit
def products16(sums, slot, phase, KC, tops, tables, rings, bars, cfg: gl.constexpr, WG: gl.constexpr, P: gl.constexpr):
    """All of K of one consumer's units by P columns, added to P / 16 sums [64, 16] of each: (sums, slot, phase). tops: `tops_of`."""
    parts = zeros(widest(P, cfg.PIECE) * sets(P, cfg))
    for kb in range(0, KC - cfg.REST, cfg.UNROLL):
        slot = fresh(slot)      # where it comes round once a trip, every slot's addresses would be kept in registers
        sums, parts, slot, phase = blocks16(sums, parts, slot, phase, kb, tops, tables, rings, bars, cfg, WG, P, cfg.UNROLL)
    if cfg.REST > 0:
        sums, parts, slot, phase = blocks16(sums, parts, slot, phase, KC - cfg.REST, tops, tables, rings, bars, cfg, WG, P, cfg.REST)
    return sums, slot, phase


@gluon.jit
def products_of_all(sums, slot, phase, KC, tops, tables, rings, bars, cfg: gl.constexpr, WG: gl.constexpr, P: gl.constexpr):
    """The same of sums of all columns that a tile may have, the first of which are those of this width; zeros behind those."""
    ALL: gl.constexpr = cfg.BT // 16
    A: gl.constexpr = P // 16
    MP: gl.constexpr = cfg.MP
    mine = ()
    for u in gl.static_range(MP):
        mine = mine + several(sums, u * ALL, u * ALL + A)
    mine, slot, phase = products16(mine, slot, phase, KC, tops, tables, rings, bars, cfg, WG, P)
    every = ()
    for u in gl.static_range(MP):
        every = every + several(mine, u * A, (u + 1) * A) + zeros(ALL - A)
    return every, slot, phase


@gluon.jit
def side_by_side(left, right):
    """The sums of two pieces as one."""
    N: gl.constexpr = 2 * left.shape[1]
    x = gl.reshape(gl.permute(gl.join(left, right), (0, 2, 1)), [64, N])
    return gl.convert_layout(x, sums8_layout(N), assert_trivial=True)


@gluon.jit
def joined(sums, FROM: gl.constexpr, COUNT: gl.constexpr):
    """COUNT of the sums [64, 16], a power of two, as one."""
    if COUNT == 1:
        return sums[FROM]
    else:
        return side_by_side(joined(sums, FROM, COUNT // 2), joined(sums, FROM + COUNT // 2, COUNT // 2))
