"""Device code of the Hopper kernel for MXFP8 weights as a checkpoint has them and hundreds of tokens: FP16 wgmma, one sum over K.

    out[m, n] = 2^(xtop[m] - 134) * 2^(top[n] - 134) * sum over k of X[m, k] * W[n, k] * 2^(sb[n, k / 32] - top[n] + 7)

Operands are swapped: weight rows are wgmma's register operand, 64 to a consumer. The chip has an instruction that brings two E4M3 to FP16,
where BF16 takes nine to four of them, and FP16 holds a row whose scales lie within 2^21 exactly, in units of the largest one; what it does
not hold, the launch behind sums again (`mx8_f16_prep_device.py`, where tokens are brought to FP16, too). Tokens are the columns, any multiple of 16.

    warps               does, for every tile of its block
    producer (1)        TMA of weights and tokens, 128 of K a slot
    consumers (2 x 4    expand their weights of a K block while the wgmma of the one before runs; store
      or 3 x 4)
"""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import cluster_device as cluster
from .fp8_block_parts_device import advance, vector_layout
from .fp8_block_schedule_device import fresh, strip_order
from .mx8_decode_sums_device import row_codes, rows_of
from .narrow_columns_device import SIXTEEN, floats, of_words
from .shim import tma_store, view_as

KERNEL = gl.constexpr("mx8_f16_kernel")
X_PARAMETER = gl.constexpr(7)
SWIZZLED = gl.constexpr(0x4000004000010000)     # wgmma's descriptor of rows of 128 bytes, swizzled by as many, without its address
BYTES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))
# int32 [64 rows, 32]: a thread has a block of 32 values of rows g and g + 8; the same as [row, block, word]
_LANES = [[1, 0], [2, 0], [4, 0]]
OF_ROWS = gl.constexpr(gl.DistributedLinearLayout([[0, 1], [0, 2], [0, 4], [8, 0]], [[0, 8], [0, 16], *_LANES], [[16, 0], [32, 0]], [], [64, 32]))
OF_BLOCKS = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 0, 1], [0, 0, 2], [0, 0, 4], [8, 0, 0]], [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
    [[16, 0, 0], [32, 0, 0]], [], [64, 4, 8]))
TRIP = gl.constexpr(4)          # K blocks whose codes a thread has at once
# four E4M3 and FP16's factor, twice, to two of two FP16
EXPAND = gl.constexpr("""{
.reg .b16 a, b;
.reg .b32 x;
mov.b32 {a, b}, $2;
cvt.rn.f16x2.e4m3x2 x, a;
mul.rn.f16x2 $0, x, $3;
cvt.rn.f16x2.e4m3x2 x, b;
mul.rn.f16x2 $1, x, $3;
}""")


# ---------------------------------------------------------------- wgmma
@constexpr_function
def product_code(P):
    """PTX. Operands: sums, the same as they come in; words 0 to 3 of rows g and g + 8, the first two values of each, then the others; the
    descriptor of 64 of K of tokens."""
    d = P // 2
    sums = "{" + ", ".join(f"${i}" for i in range(d)) + "}"
    lo, hi, desc = 2 * d, 2 * d + 8, 2 * d + 16
    text = "{\n.reg .pred add;\n.reg .b64 at;\nsetp.ne.b32 add, 1, 0;\nwgmma.fence.sync.aligned;"
    for i in range(4):
        text += f"""
add.s64 at, ${desc}, {2 * i};
wgmma.mma_async.sync.aligned.m64n{P}k16.f32.f16.f16 {sums}, {{${lo + i}, ${lo + 4 + i}, ${hi + i}, ${hi + 4 + i}}}, at, add, 1, 1, 0;"""
    return text + "\nwgmma.commit_group.sync.aligned;\n}"


@constexpr_function
def tied(P, more):
    """Constraints of P / 2 registers that come in and go out, and of a product's operands."""
    d = P // 2
    return ",".join(["=f"] * d + [str(i) for i in range(d)] + (["r"] * 16 + ["l"] * 8 if more else []))


@gluon.jit
def product(parts, operand, at, P: gl.constexpr):
    """Start parts += a . tokens^T over 64 of K, from address `at` on."""
    desc = gl.full([64, 16], (at >> 4).to(gl.int64) | SWIZZLED, gl.int64, SIXTEEN)
    return gl.inline_asm_elementwise(product_code(P), tied(P, True), parts + operand + (desc, ), dtype=floats(P), is_pure=False, pack=8)


@gluon.jit
def settle(parts, P: gl.constexpr):
    return gl.inline_asm_elementwise("wgmma.wait_group.sync.aligned 0;", tied(P, False), parts, dtype=floats(P), is_pure=False, pack=8)


# ---------------------------------------------------------------- the ring: [staging of the store][weights][tokens][barriers]
@gluon.jit
def barriers(cfg: gl.constexpr):
    """Addresses of those of weights, of tokens, and of slots that are free."""
    w = cluster.start_of_shared() + cfg.BARS_AT
    return w, w + cfg.STAGES * 8, w + cfg.STAGES * 16


@gluon.jit
def first_token(m, M, cfg: gl.constexpr):
    """Of a tile. The last one begins as early as it has to for no row of its boxes to be past the end: such rows, asked for by tens of blocks,
    took up to half of a product's time. What two tiles have is computed twice, to the same bits."""
    return gl.maximum(gl.minimum(m * cfg.BT, M - cfg.BT), 0)


@gluon.jit
def load_weights(w_desc, slot, n, kb, cfg: gl.constexpr):
    start = cluster.start_of_shared()
    bar = start + (cfg.BARS_AT + slot * 8)
    cluster.expect(bar, cfg.BN * 128)
    cluster.load(w_desc, KERNEL, 0, (slot * 0, n * cfg.BN, kb * 128), bar, start + (cfg.W_AT + slot * (cfg.BN * 128)), 1)


@gluon.jit
def producer(w_desc, x_desc, M, N, blocks, cfg: gl.constexpr):
    """`blocks`: whole trips; past the end of K boxes are zeros. The first weights come while the launch in front brings the tokens."""
    w_full, x_full, empty = barriers(cfg)
    start = cluster.start_of_shared()
    num_m = gl.cdiv(M, cfg.BT)
    num_n = gl.cdiv(N, cfg.BN)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    n, m = strip_order(gl.program_id(0), num_n, num_m, cfg.STRIP)
    asked = gl.minimum(blocks, cfg.STAGES)
    for kb in range(0, asked):
        load_weights(w_desc, kb, n, kb, cfg)
    gdc_wait()
    for t in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        n, m = strip_order(t, num_n, num_m, cfg.STRIP)
        row = first_token(m, M, cfg)
        for kb in range(0, blocks):
            cluster.wait(empty + slot * 8, phase, 1)
            if kb >= asked:
                load_weights(w_desc, slot, n, kb, cfg)
            cluster.expect(x_full + slot * 8, cfg.BT * 256)
            for i in gl.static_range(2):
                cluster.load_rows(x_desc, KERNEL, X_PARAMETER, (row, kb * 128 + i * 64), x_full + slot * 8,
                                  start + (cfg.X_AT + slot * (cfg.BT * 256) + i * (cfg.BT * 128)))
            slot, phase = advance(slot, phase, cfg.STAGES)
        asked = asked * 0
    gdc_launch_dependents()


# ---------------------------------------------------------------- a K block
@gluon.jit
def load_codes(s_ptr, row, N, ssn, kb, KB, cfg: gl.constexpr):
    """Codes of 64 rows and TRIP K blocks, four a word."""
    lay: gl.constexpr = row_codes()
    r = row + gl.arange(0, 64, gl.SliceLayout(1, lay))
    k = kb + gl.arange(0, 4, gl.SliceLayout(0, lay))
    return gl.load(s_ptr + (gl.expand_dims(r * ssn, 1) + gl.expand_dims(k, 0)), mask=gl.expand_dims(r < N, 1) & gl.expand_dims(k < KB, 0), other=0)


@gluon.jit
def factors(words, base):
    """FP16's 2^(code - top + 7), twice in an int32, [64, 4 blocks], from a row's four codes: 0 where FP16 has none. base: top - 22."""
    shift = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, OF_BLOCKS))) * 8
    code = (gl.expand_dims(words, 1) >> gl.expand_dims(shift, 0)) & 255
    return gl.maximum(code - gl.expand_dims(base, 1), 0) * 0x04000400


@gluon.jit
def weights_of(ring, cfg: gl.constexpr):
    """Boxes of 64 rows of weights, as words, from the start of shared memory on."""
    return view_as(ring, gl.int32, cfg.W_AT // 8192 + cfg.STAGES * cfg.BN // 64, 64, 32, WORDS)


@gluon.jit
def words_of(box):
    """A K block's words [64, 4 blocks, 4]: those of the first half of each block, of the second one."""
    w = gl.convert_layout(gl.reshape(box.load(OF_ROWS), [64, 4, 8]), OF_BLOCKS, assert_trivial=True)
    return gl.split(gl.permute(gl.reshape(w, [64, 4, 2, 4]), (0, 1, 3, 2)))


@gluon.jit
def expanded(w, f):
    """The operand of a product over half a K block, times factors [64, 4]: words of the first two of four values, of the others."""
    f, w = gl.broadcast(gl.expand_dims(gl.convert_layout(f, gl.SliceLayout(2, w.type.layout), assert_trivial=True), 2), w)
    lo, hi = gl.inline_asm_elementwise(EXPAND, "=&r,=&r,r,r", [w, f], dtype=(gl.int32, gl.int32), is_pure=False, pack=1)
    return of_words(lo), of_words(hi)


@gluon.jit
def trip(acc, slot, phase, words, base, w_v, bars, cfg: gl.constexpr, WG: gl.constexpr):
    """TRIP K blocks. Leaves with nothing in flight: ptxas serialises wgmma that are, across a loop's back edge. HALF: half a K block is
    expanded while the half before is multiplied, not a whole one, for which wide tiles have no registers."""
    w_full, x_full, empty = bars
    P: gl.constexpr = cfg.BT
    old = slot
    for c in gl.static_range(4):
        f = factors(words[c], base)
        cluster.wait(w_full + slot * 8, phase, 1)
        first, second = words_of(w_v.index(cfg.W_AT // 8192 + slot * (cfg.BN // 64) + WG))
        first = expanded(first, f)
        if not cfg.HALF:
            second = expanded(second, f)
        cluster.wait(x_full + slot * 8, phase, 1)
        if c > 0:
            acc = settle(acc, P)
        at = cluster.start_of_shared() + (cfg.X_AT + slot * (P * 256))
        acc = product(acc, first, at, P)
        if c > 0:
            cluster.arrive(empty + old * 8, 1)
        if cfg.HALF:
            second = expanded(second, f)
            acc = settle(acc, P)
        acc = product(acc, second, at + P * 128, P)
        old = slot
        slot, phase = advance(slot, phase, cfg.STAGES)
    acc = settle(acc, P)
    cluster.arrive(empty + old * 8, 1)
    return acc, slot, phase


# ---------------------------------------------------------------- tiles
@gluon.jit
def power_of(top):
    """2^(top - 134), of codes that FP32 has it of."""
    return ((top - 7) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def store_tokens(x, buf, d_desc, out_ptr, om, row, col, M, N, cfg: gl.constexpr):
    """64 columns of 16 tokens, [64, 16]."""
    if cfg.STORE_TMA:
        tma.store_wait(cfg.OUT_BUFFERS - 1)
        buf.store(gl.permute(x, (1, 0)))
        fence_async_shared()
        tma_store(d_desc, [row, col], buf)
    else:
        buf.store(gl.permute(x, (1, 0)))
        lay: gl.constexpr = vector_layout(64, cfg.OUT_BYTES)
        r = row + fresh(gl.arange(0, 16, gl.SliceLayout(1, lay)))
        c = col + gl.arange(0, 64, gl.SliceLayout(0, lay))
        gl.store(out_ptr + (gl.expand_dims(r.to(gl.int64) * om, 1) + gl.expand_dims(c, 0)), buf.load(lay),
                 mask=gl.expand_dims(r < M, 1) & gl.expand_dims(c < N, 0))


@gluon.jit
def store_tile(acc, d_s, d_desc, out_ptr, om, tops, row, col, M, N, cfg: gl.constexpr, WG: gl.constexpr):
    """Tokens from `row` on, 16 at a time, and 64 columns."""
    top_ptr, xtop_ptr = tops
    PARTS: gl.constexpr = cfg.BT // 16
    n = col + gl.arange(0, 64, gl.SliceLayout(1, SIXTEEN))
    of_row = power_of(gl.load(top_ptr + n, mask=n < N, other=134))
    tma.store_wait(0)
    for i in gl.static_range(PARTS):
        m = row + i * 16 + gl.arange(0, 16, gl.SliceLayout(0, SIXTEEN))
        of_token = power_of(gl.load(xtop_ptr + m, mask=m < M, other=134))
        x = (acc[i] * gl.expand_dims(of_row, 1) * gl.expand_dims(of_token, 0)).to(out_ptr.dtype.element_ty)
        buf = d_s.index(WG * cfg.OUT_BUFFERS + i % cfg.OUT_BUFFERS)
        store_tokens(x, buf, d_desc, out_ptr, om, row + i * 16, col, M, N, cfg)


@gluon.jit
def consumer(d_desc, out_ptr, om, s_ptr, tops, ring, d_s, M, N, KB, ssn, cfg: gl.constexpr, WG: gl.constexpr):
    """64 weight rows of every tile."""
    bars = barriers(cfg)
    bars = (bars[0], bars[1], cluster.everywhere(bars[2], 1))
    PARTS: gl.constexpr = cfg.BT // 16
    ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, OF_BLOCKS))
    w_v = weights_of(ring, cfg)
    num_m = gl.cdiv(M, cfg.BT)
    num_n = gl.cdiv(N, cfg.BN)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    zeros = ()
    for i in gl.static_range(PARTS):
        zeros = zeros + (gl.zeros([64, 16], gl.float32, SIXTEEN), )
    gdc_wait()
    for t in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        n, m = strip_order(t, num_n, num_m, cfg.STRIP)
        row = n * cfg.BN + WG * 64
        r = row + gl.arange(0, 64, ROWS)
        base = gl.load(tops[0] + r, mask=r < N, other=0) - 22
        codes = load_codes(s_ptr, row, N, ssn, KB * 0, KB, cfg)
        acc = zeros
        for kb in range(0, KB, TRIP):
            words = rows_of(codes, ROWS)
            codes = load_codes(s_ptr, row, N, ssn, kb + TRIP, KB, cfg)
            acc, slot, phase = trip(acc, slot, phase, words, base, w_v, bars, cfg, WG)
        store_tile(acc, d_s, d_desc, out_ptr, om, tops, first_token(m, M, cfg), row, M, N, cfg, WG)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "KB"])
def mx8_f16_kernel(w_desc, x_desc, d_desc, out_ptr, s_ptr, top_ptr, xtop_ptr, M, N, KB, ssn, om, cfg: gl.constexpr):
    """A persistent grid. w_desc [1, N, K], x_desc FP16 [M, K], d_desc [M, N]; s: codes of weights, four an int32, rows ssn apart; KB: K blocks
    of 128."""
    STAGES: gl.constexpr = cfg.STAGES
    staging: gl.constexpr = gl.NVMMASharedLayout.get_default_for([16, 64], out_ptr.dtype.element_ty)
    ring = gl.allocate_shared_memory(gl.int8, [cfg.BARS_AT // 128 + 2, 128], BYTES)
    d_s = view_as(ring, out_ptr.dtype.element_ty, cfg.CONSUMERS * cfg.OUT_BUFFERS, 16, 64, staging)
    w_full, x_full, empty = barriers(cfg)
    for i in gl.static_range(STAGES):
        cluster.init(w_full + 8 * i, 1)
        cluster.init(x_full + 8 * i, 1)
        cluster.init(empty + 8 * i, 4 * cfg.CONSUMERS)
    fence_async_shared()
    blocks = gl.cdiv(KB, 4) * 4
    tops = (top_ptr, xtop_ptr)
    if cfg.CONSUMERS == 2:
        gl.warp_specialize([
            (consumer, (d_desc, out_ptr, om, s_ptr, tops, ring, d_s, M, N, KB, ssn, cfg, 0)),
            (consumer, (d_desc, out_ptr, om, s_ptr, tops, ring, d_s, M, N, KB, ssn, cfg, 1)),
            (producer, (w_desc, x_desc, M, N, blocks, cfg)),
        ], [4, 1], [cfg.CONSUMER_REGISTERS, cfg.PRODUCER_REGISTERS])
    else:
        gl.warp_specialize([
            (consumer, (d_desc, out_ptr, om, s_ptr, tops, ring, d_s, M, N, KB, ssn, cfg, 0)),
            (consumer, (d_desc, out_ptr, om, s_ptr, tops, ring, d_s, M, N, KB, ssn, cfg, 1)),
            (consumer, (d_desc, out_ptr, om, s_ptr, tops, ring, d_s, M, N, KB, ssn, cfg, 2)),
            (producer, (w_desc, x_desc, M, N, blocks, cfg)),
        ], [4, 4, 1], [cfg.CONSUMER_REGISTERS, cfg.CONSUMER_REGISTERS, cfg.PRODUCER_REGISTERS])
