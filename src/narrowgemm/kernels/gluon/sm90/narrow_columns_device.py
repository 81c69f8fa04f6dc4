"""FP8 tokens by MXFP4 weights, as `narrow_fp8_device` has them, on any multiple of 16 columns.

A tensor of Gluon has a power of two of columns, a wgmma any multiple of 8. So a unit's sums are a tuple of [64, 16], and the wgmma is PTX
over the registers of all of them: one of 80 columns takes five eighths of the time of one of 128. Consumers multiply in turn: the
next one starts when all but the last wgmma of this one are done, and meanwhile this one adds up and expands its next weights.
"""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from . import cluster_device as cluster
from .fold_expand_device import NIBBLES_ASM, blocks_layout, lane_table, of_blocks, of_lane, row_tops, words_layout
from .fp8_block_parts_device import advance
from .fp8_block_schedule_device import fresh
from .narrow_expand_device import field_layout
from .narrow_fp8_device import CUBE, sixteens_layout, sums8_layout
from .narrow_prefill_parts_device import ROWS_OF_BYTES
from .shim import view_as, view_cube

WORDS = gl.constexpr(words_layout(4))
PIECE = gl.constexpr(sums8_layout(16))
SWIZZLED = gl.constexpr(0x4000004000010000)     # wgmma's descriptor of rows of 128 bytes, swizzled by as many, without its address
TURNS = 8                                       # the first of the hardware's barriers for turns: Triton takes them from 0 on
FIRST_TURN = gl.constexpr(f"bar.arrive {TURNS}, 256; mov.b32 $0, 0;")
LAST_TURN = gl.constexpr(f"bar.sync {TURNS}, 256; mov.b32 $0, 0;")


# ---------------------------------------------------------------- wgmma
@constexpr_function
def product_code(P, BLOCKS, WG):
    """PTX. Operands: sums, the same as they come in; of each block the lower halves, words 0 to 3 of row g, then of row g + 8, the upper
    halves, and the descriptor of its tokens."""
    d = P // 2
    sums = "{" + ", ".join(f"${i}" for i in range(d)) + "}"
    text = f"""{{
.reg .pred add;
.reg .b64 at;
bar.sync {TURNS + WG}, 256;
wgmma.fence.sync.aligned;"""
    for i in range(4 * BLOCKS):
        lo, q = 2 * d + 24 * (i // 4), i % 4
        hi, desc = lo + 8, lo + 16
        commit = "wgmma.commit_group.sync.aligned;" if i == 4 * BLOCKS - 1 else ""
        text += f"""
{commit}
add.s64 at, ${desc}, {2 * q};
setp.ne.b32 add, {int(i > 0)}, 0;
wgmma.mma_async.sync.aligned.m64n{P}k32.f32.e4m3.e4m3 {sums}, {{${lo + q}, ${lo + 4 + q}, ${hi + q}, ${hi + 4 + q}}}, at, add, 1, 1;"""
    return text + "\nwgmma.commit_group.sync.aligned;\n}"


@constexpr_function
def settle_code(WG, CONSUMERS):
    return f"""wgmma.wait_group.sync.aligned 1;
bar.arrive {TURNS + (WG + 1) % CONSUMERS}, 256;
wgmma.wait_group.sync.aligned 0;"""


@constexpr_function
def tied(P, BLOCKS=0):
    """Constraints of P / 2 registers that come in and go out, and of the other operands of a product."""
    d = P // 2
    return ",".join(["=f"] * d + [str(i) for i in range(d)] + (["r"] * 16 + ["l"] * 8) * BLOCKS)


@constexpr_function
def floats(P):
    return (gl.float32, ) * (P // 16)


@gluon.jit
def product(parts, operands, P: gl.constexpr, BLOCKS: gl.constexpr, WG: gl.constexpr):
    """When it is this consumer's turn, start parts = a . tokens^T over BLOCKS blocks of 128 of K."""
    return gl.inline_asm_elementwise(product_code(P, BLOCKS, WG), tied(P, BLOCKS), parts + operands, dtype=floats(P), is_pure=False, pack=8)


@gluon.jit
def settle(parts, P: gl.constexpr, cfg: gl.constexpr, WG: gl.constexpr):
    """Wait for the product; give the turn away shortly before."""
    return gl.inline_asm_elementwise(settle_code(WG, cfg.CONSUMERS), tied(P), parts, dtype=floats(P), is_pure=False, pack=8)


@gluon.jit
def first_turn(cfg: gl.constexpr, WG: gl.constexpr):
    """The last consumer gives the first one its first turn."""
    if WG == cfg.CONSUMERS - 1:
        gl.inline_asm_elementwise(FIRST_TURN, "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def last_turn(WG: gl.constexpr):
    """The first consumer takes the turn that is left, so that a block ends with no barrier half arrived at."""
    if WG == 0:
        gl.inline_asm_elementwise(LAST_TURN, "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)


# ---------------------------------------------------------------- operands
@gluon.jit
def of_words(x):
    """Words [64, 4 blocks, 4], a thread's registers as they are, as a [64, 16] beside sums: word w of row g is w, of row g + 8 is 4 + w."""
    x = gl.permute(gl.reshape(x, [4, 2, 8, 4, 2, 2]), (0, 4, 2, 1, 3, 5))
    return gl.convert_layout(gl.reshape(x, [64, 16]), PIECE, assert_trivial=True)


@gluon.jit
def expanded(w_s, s_s, unit, kb, tops, tables, cfg: gl.constexpr):
    """(lower, upper halves) of a unit's K block in E4M3. The assembly counts as impure, so it stays in front of the wait for tokens."""
    low, high = tables
    fields = view_as(s_s, gl.int32, cfg.STAGES * cfg.UNITS, 32, 4, ROWS_OF_BYTES).index(unit).load(field_layout(64)) >> (16 * (kb % 2))
    w = view_as(w_s, gl.int32, cfg.STAGES * cfg.UNITS, 64, 16, ROWS_OF_BYTES).index(unit).load(WORDS)
    d0 = (tops - fields) & 15
    d1 = ((tops >> 8) - (fields >> 8)) & 15
    lows = of_blocks(of_lane(low, d0), of_lane(low, d1), 4)
    highs = of_blocks(of_lane(high, d0), of_lane(high, d1), 4)
    w = gl.convert_layout(gl.reshape(w, [64, 4, 4]), blocks_layout(4), assert_trivial=True)
    lo, hi = gl.inline_asm_elementwise(NIBBLES_ASM, "=&r,=&r,r,r,r", [w, lows, highs], dtype=(gl.int32, gl.int32), is_pure=False, pack=1)
    return of_words(lo), of_words(hi)


@gluon.jit
def tokens_at(slot, cfg: gl.constexpr):
    """The descriptor of a slot's tokens: their ring is the largest allocation, which is at the start of shared memory."""
    return ((cluster.start_of_shared() + slot * (cfg.BT * 128)) >> 4).to(gl.int64) | SWIZZLED


@gluon.jit
def scales_of_slot(ring, slot, P: gl.constexpr, cfg: gl.constexpr):
    """P / 16 tensors [1, 16]."""
    BOXES: gl.constexpr = cfg.BT // 16
    out = ()
    for i in gl.static_range(P // 16):
        f = view_cube(ring, gl.float32, cfg.STAGES * BOXES, 1, 8, 8, CUBE).index(slot * BOXES + i)
        s = f.slice(0, 4, 1).slice(0, 4, 2).load(sixteens_layout(16))
        s = gl.reshape(gl.permute(gl.reshape(s, [1, 4, 2, 2]), (0, 2, 1, 3)), [16])
        out = out + (gl.expand_dims(gl.convert_layout(s, gl.SliceLayout(0, PIECE), assert_trivial=True), 0), )
    return out


# ---------------------------------------------------------------- K
@gluon.jit
def blocks16(sums, parts, slot, phase, kb, tops, tables, rings, bars, cfg: gl.constexpr, WG: gl.constexpr, P: gl.constexpr,
             COUNT: gl.constexpr):
    """COUNT K blocks from kb, one product: the tensor cores add them up. More than one are for tokens with one scale a row."""
    x_s, x1_s, w_s, s_s, f_s, f1_s = rings
    full, empty = bars
    w_full, x_full = full
    operands = ()
    at = ()
    for c in gl.static_range(COUNT):
        mbarrier.wait(w_full.index(slot), phase)
        operands = operands + expanded(w_s, s_s, slot * cfg.UNITS + WG, kb + c, tops, tables, cfg) + (tokens_at(slot, cfg), )
        mbarrier.wait(x_full.index(slot), phase)
        at = at + (slot, )
        slot, phase = advance(slot, phase, cfg.STAGES)
    parts = product(parts, operands, P, COUNT, WG)
    if not cfg.ROW:
        scales = scales_of_slot(f_s, at[0], P, cfg)
    parts = settle(parts, P, cfg, WG)
    for c in gl.static_range(COUNT):
        mbarrier.arrive(empty.index(at[c]), count=1)
    new = ()
    for i in gl.static_range(P // 16):
        if cfg.ROW:
            new = new + (sums[i] + parts[i], )
        else:
            s, p = gl.broadcast(scales[i], parts[i])
            new = new + (gl.fma(p, s, sums[i]), )
    return new, parts, slot, phase


@gluon.jit
def products16(slot, phase, KC, top_ptr, unit, rows, rings, bars, cfg: gl.constexpr, WG: gl.constexpr, P: gl.constexpr):
    """All of K of one unit's tile: (P / 16 sums [64, 16], slot, phase). Arguments as those of `narrow_fp8_device.products8`."""
    tables = lane_table()
    tops = row_tops(top_ptr, unit.to(gl.int64) * 64, rows)
    sums = ()
    for i in gl.static_range(P // 16):
        sums = sums + (gl.zeros([64, 16], gl.float32, PIECE), )
    parts = sums
    for kb in range(0, KC - cfg.REST, cfg.UNROLL):
        slot = fresh(slot)      # where it comes round once a trip, every slot's addresses would be kept in registers
        sums, parts, slot, phase = blocks16(sums, parts, slot, phase, kb, tops, tables, rings, bars, cfg, WG, P, cfg.UNROLL)
    if cfg.REST > 0:
        sums, parts, slot, phase = blocks16(sums, parts, slot, phase, KC - cfg.REST, tops, tables, rings, bars, cfg, WG, P, cfg.REST)
    return sums, slot, phase


@gluon.jit
def side_by_side(left, right):
    """Sums [64, 32] of two pieces."""
    x = gl.reshape(gl.permute(gl.join(left, right), (0, 2, 1)), [64, 32])
    return gl.convert_layout(x, sums8_layout(32), assert_trivial=True)
