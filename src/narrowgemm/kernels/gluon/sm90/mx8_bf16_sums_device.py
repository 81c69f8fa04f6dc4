"""Device code of the Hopper kernel for plain MXFP8 weights by BF16 wgmma: weights of a K block to BF16 in registers, and their products."""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from . import cluster_device as cluster
from .fp8_decode_schedule_device import advance
from .mx8_decode_sums_device import HIGH, row_codes, rows_of
from .narrow_expand_device import bytes_layout
from .narrow_prefill_parts_device import sums_layout

CONSUMERS = gl.constexpr(2)
PIECE = gl.constexpr(bytes_layout(64))
LOWEST, HIGHEST = gl.constexpr(3), gl.constexpr(134)        # codes with which E4M3 values are exact in BF16, by one factor
# factors of expanded codes, twice in an int32: 2^(code - 7) is code * TWICE + ZERO, as `expand` leaves 2^-120 of the value
TWICE, ZERO = gl.constexpr(0x00800080), gl.constexpr(0x3C003C00)
ONE = gl.constexpr(0x7B807B80)      # 2^120

# 4 codes, K ascending, to 2 registers of two: codes 0 and 2, codes 1 and 3
EXPAND = gl.constexpr("""{
.reg .b32 a, b, c;
shl.b32 a, $2, 4;
and.b32 a, a, 0x07f007f0;
shl.b32 b, $2, 8;
lop3.b32 a, b, 0x80008000, a, 0xea;
mul.rn.bf16x2 $0, a, $3;
shr.b32 c, $2, 4;
and.b32 c, c, 0x07f007f0;
lop3.b32 c, $2, 0x80008000, c, 0xea;
mul.rn.bf16x2 $1, c, $3;
}""")


@constexpr_function
def row_bytes():
    """Of uint8 [64, 128]: a thread has a block of 32 of rows g and g + 8."""
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [8, 0]], [[0, 32], [0, 64], [1, 0], [2, 0], [4, 0]],
                                      [[16, 0], [32, 0]], [], [64, 128])


# ---------------------------------------------------------------- what lies behind the rings
@gluon.jit
def weights_full(slot, cfg: gl.constexpr):
    """The address of a slot's barrier of weights."""
    return cluster.start_of_shared() + (cfg.BARS + slot * 8)


@gluon.jit
def tokens_full(slot, cfg: gl.constexpr):
    return cluster.start_of_shared() + (cfg.BARS + (cfg.STAGES + slot) * 8)


# ---------------------------------------------------------------- sums
@gluon.jit
def halves(w):
    """uint8 [64, 128] as two of [64, 4, 16]: the first and the second half of every block of 32."""
    a, b = gl.split(gl.permute(gl.reshape(w, [64, 4, 2, 16]), (0, 1, 3, 2)))
    return gl.convert_layout(a, PIECE, assert_trivial=True), gl.convert_layout(b, PIECE, assert_trivial=True)


@gluon.jit
def expand(w, s, operand: gl.constexpr):
    """uint8 [64, 4, 16] and factors, twice in an int32, [64, 4, 1] to BF16 [64, 64]."""
    a = gl.inline_asm_elementwise(EXPAND, "=r,=r,r,r,r,r,r", [w, s], dtype=gl.bfloat16, is_pure=False, pack=4)
    a = gl.permute(gl.reshape(a, [64, 4, 4, 2, 2]), (0, 2, 3, 1, 4))       # row, word, odd, block, of the pair
    return gl.convert_layout(gl.reshape(a, [64, 64]), operand, assert_trivial=True)


@gluon.jit
def look_for_nan(bad, slot, views, cfg: gl.constexpr, CID: gl.constexpr):
    """Start adding weights times zero to sums [64, 8]: what is no number stays none. Expansion takes NaN for 480."""
    x_v, w_v, s_v, e_v, z_s = views
    return warpgroup_mma(e_v.index(cfg.W_AT // 8192 + slot * CONSUMERS + CID), z_s.permute((1, 0)), bad, is_async=True)


@gluon.jit
def code_words(views, t, cfg: gl.constexpr, CID: gl.constexpr):
    """The codes of a trip's four K blocks, [64] int32 each."""
    x_v, w_v, s_v, e_v, z_s = views
    return rows_of(s_v.index(t * CONSUMERS + CID).load(row_codes()), gl.SliceLayout(1, gl.SliceLayout(2, PIECE)))


@gluon.jit
def code_of_block(words):
    """[64, 4] codes of the blocks of 32, of which every thread has one, and a row's four in an int32."""
    shift = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, PIECE))) * 8
    return (gl.expand_dims(words, 1) >> gl.expand_dims(shift, 0)) & 255


@gluon.jit
def wild_in(views, trips, blocks, limit, cfg: gl.constexpr, CID: gl.constexpr):
    """Whether one of the codes of a consumer's rows, `limit` of which there are, and of `blocks` K blocks is beyond BF16."""
    x_v, w_v, s_v, e_v, z_s = views
    lay: gl.constexpr = row_codes()
    live = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, lay)) < limit, 1)
    k = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, lay)), 0)
    maybe = gl.zeros([64, 4], gl.int32, lay)
    for t in range(0, trips):
        v = s_v.index(t * CONSUMERS + CID).load(lay)
        maybe |= gl.where(live & (t * 4 + k < blocks), (v | (v - 0x03030303)) & HIGH, 0)
    found = gl.max(gl.max((maybe != 0).to(gl.int32), 1), 0)
    if found != 0:      # so far one may be above 127
        maybe = gl.zeros([64, 4], gl.int32, lay)
        for t in range(0, trips):
            v = s_v.index(t * CONSUMERS + CID).load(lay)
            for j in gl.static_range(4):
                c = (v >> 8 * j) & 255
                maybe |= gl.where(live & (t * 4 + k < blocks), ((c < LOWEST) | (c > HIGHEST)).to(gl.int32), 0)
        found = gl.max(gl.max(maybe, 1), 0)
    return found


@gluon.jit
def wild_block(acc, bad, slot, phase, t, i, views, empty, cfg: gl.constexpr, CID: gl.constexpr):
    """K block i of a trip, some of whose scales BF16 does not hold: sums of one block of 32 at a time, scaled in FP32."""
    x_v, w_v, s_v, e_v, z_s = views
    BT: gl.constexpr = cfg.BT
    mma: gl.constexpr = sums_layout(BT)
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    cluster.wait(weights_full(slot, cfg), phase, 1)
    cluster.wait(tokens_full(slot, cfg), phase, 1)
    block = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, PIECE))), 0)
    part = gl.zeros([64, BT], gl.float32, mma)
    for q in range(0, 4):
        mine, _ = gl.broadcast(block == q, gl.zeros([64, 4], gl.int32, gl.SliceLayout(2, PIECE)))
        s = gl.expand_dims(gl.where(mine, ONE, 0), 2)
        h = halves(w_v.index(cfg.W_AT // 8192 + slot * CONSUMERS + CID).load(row_bytes()))
        for j in gl.static_range(2):
            a = expand(h[j], s, operand)
            part = warpgroup_mma(a, x_v.index(2 * slot + j).permute((1, 0)), part, use_acc=j > 0, is_async=True)
            part = warpgroup_mma_wait(0, deps=(part, ))
        v = code_words(views, t, cfg, CID)
        words = gl.where(i == 0, v[0], gl.where(i == 1, v[1], gl.where(i == 2, v[2], v[3])))
        code = gl.convert_layout((words >> (8 * q)) & 255, gl.SliceLayout(1, mma))
        f, _ = gl.broadcast(gl.expand_dims(power_of(code), 1), part)
        acc = gl.fma(part, f, acc)
    bad = look_for_nan(bad, slot, views, cfg, CID)
    bad = warpgroup_mma_wait(0, deps=(bad, ))
    mbarrier.arrive(empty.index(slot), count=1)
    slot, phase = advance(slot, phase, cfg.STAGES)
    return acc, bad, slot, phase


@gluon.jit
def power_of(code):
    """2^(code - 127) in FP32, NaN for 255."""
    bits = gl.maximum(code << 23, 0x00400000)
    return gl.where(code == 255, float("nan"), bits.to(gl.float32, bitcast=True))


@gluon.jit
def trip(acc, bad, slot, phase, t, views, empty, cfg: gl.constexpr, CID: gl.constexpr):
    """Four K blocks. Leaves with nothing in flight: ptxas serialises wgmma that are, across a loop's back edge."""
    x_v, w_v, s_v, e_v, z_s = views
    operand: gl.constexpr = gl.DotOperandLayout(0, sums_layout(cfg.BT), 2)
    words = code_words(views, t, cfg, CID)
    old = slot
    for c in gl.static_range(4):
        s = gl.expand_dims(code_of_block(words[c]) * TWICE + ZERO, 2)
        cluster.wait(weights_full(slot, cfg), phase, 1)
        h = halves(w_v.index(cfg.W_AT // 8192 + slot * CONSUMERS + CID).load(row_bytes()))
        first = expand(h[0], s, operand)
        second = expand(h[1], s, operand)
        cluster.wait(tokens_full(slot, cfg), phase, 1)
        if c > 0:
            acc, bad = warpgroup_mma_wait(0, deps=(acc, bad))
        acc = warpgroup_mma(first, x_v.index(2 * slot).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma(second, x_v.index(2 * slot + 1).permute((1, 0)), acc, is_async=True)
        bad = look_for_nan(bad, slot, views, cfg, CID)
        if c > 0:
            mbarrier.arrive(empty.index(old), count=1)
        old = slot
        slot, phase = advance(slot, phase, cfg.STAGES)
    acc, bad = warpgroup_mma_wait(0, deps=(acc, bad))
    mbarrier.arrive(empty.index(old), count=1)
    return acc, bad, slot, phase
