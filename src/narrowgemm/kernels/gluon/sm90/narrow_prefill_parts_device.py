"""Parts of the Hopper prefill kernel for narrow weights: the ring of K blocks, products of expanded weights, the store."""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from . import cluster_device as cluster
from .fp8_block_parts_device import advance, vector_layout
from .fp8_block_schedule_device import fresh
from .narrow_epilogue_device import activate, payload_unit
from .narrow_epilogue_device import columns as logical_columns
from .narrow_expand_device import E2M1_ASM, E4M3_ASM, NIBBLES_ASM, block_factors, byte_layout, bytes_layout, field_layout
from .shim import VIEWS_GROW, tma_load, view_as, view_rows

X_TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
X8_TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2))     # of FP8 tokens
PLANES = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3))
RATIO_TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2))
ROWS_OF_BYTES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
BYTES3 = gl.constexpr(bytes_layout(64))

KERNEL = gl.constexpr("narrow_prefill_kernel")
W_PARAMETER = gl.constexpr(25)      # among its PTX parameters, the descriptor of weights: five of two dimensions are in front


@constexpr_function
def sums_layout(tokens):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tokens, 16])


# ---------------------------------------------------------------- ring
@gluon.jit
def load_tokens(descs, ring, bar, slot, row, k, cfg: gl.constexpr, T: gl.constexpr, P: gl.constexpr):
    """One box of P tokens x 128 of K to the start of a slot that holds up to T."""
    desc = descs[0]
    if P == 16:
        desc = descs[1]
    if P == 32:
        desc = descs[2]
    if P == 64:
        desc = descs[3]
    if P == 128:
        desc = descs[4]
    if cfg.TWO:         # the first numbers of all tokens, then the second ones
        boxes = view_as(ring, gl.float8e4nv, cfg.STAGES * cfg.BOX * (2 * T // P), P, 128, X8_TILE)
        for i in gl.static_range(2):
            tma_load(desc, [row, 2 * k + 128 * i], bar, boxes.index(slot * (2 * T // P) + i))
    elif cfg.FP8:
        boxes = view_as(ring, gl.float8e4nv, cfg.STAGES * cfg.BOX * (T // P), P, 128, X8_TILE)
        tma_load(desc, [row, k], bar, boxes.index(slot * (T // P)))
    else:
        tma_load(desc, [row, k], bar, view_as(ring, gl.bfloat16, cfg.STAGES * (T // P), P, 128, X_TILE).index(slot * (T // P)))


@gluon.jit
def load_ratios(desc, ring, bar, slot, row, kb, cfg: gl.constexpr, T: gl.constexpr, P: gl.constexpr):
    """What the sums of P tokens are multiplied by before K block kb is added, or (FP8) the scales of that block; of box kb of several."""
    if cfg.BY_K:
        boxes = view_as(ring, gl.float32, cfg.STAGES * (T // 16), cfg.BOX, 64, RATIO_TILE)
        for i in gl.static_range((P + 15) // 16):
            tma_load(desc, [kb * cfg.BOX, (row + i * 16) * 4], bar, boxes.index(slot * (T // 16) + i))
    else:
        boxes = view_as(ring, gl.float32, cfg.STAGES * (T // 16), 16, 4, RATIO_TILE)
        for i in gl.static_range((P + 15) // 16):
            tma_load(desc, [row + i * 16, kb * 4], bar, boxes.index(slot * (T // 16) + i))


@gluon.jit
def weight_block(kb, cfg: gl.constexpr):
    """The K block of the weights that K block kb of the tokens is multiplied with: FP16 tokens come as two BF16 blocks each."""
    if cfg.DOUBLE:
        return kb // 2
    else:
        return kb


@gluon.jit
def load_weights(descs, rings, full, slot, unit, kb, cfg: gl.constexpr):
    """Box kb of K blocks of the tile's units and their scales into a slot. RING: in PTX, as Gluon's copy takes no policy."""
    x_descs, w_desc, s_desc, f_desc = descs
    x0_s, x1_s, w_s, s_s, f0_s, f1_s = rings
    bar = full[0].index(cfg.F_AT + slot)
    mbarrier.expect(bar, cfg.WEIGHT_BYTES)
    BOXES: gl.constexpr = cfg.UNITS // cfg.BOX_UNITS
    ROWS: gl.constexpr = cfg.BOX * cfg.WEIGHT_ROWS
    for i in gl.static_range(BOXES):
        if cfg.RING:
            start = cluster.start_of_shared()
            cluster.load(w_desc, KERNEL, W_PARAMETER, (unit + i, weight_block(kb, cfg) * ROWS, 0), start + (cfg.F_AT + slot) * 8,
                         start + (slot * BOXES + i) * (cfg.BOX_UNITS * ROWS * 1024), 1, True, cfg.STREAM)
        else:
            tma_load(w_desc, [unit + i, weight_block(kb, cfg) * ROWS, 0], bar, w_s.index(slot * BOXES + i))
        tma_load(s_desc, [unit + i, weight_block(kb, cfg) * cfg.BOX // 2, 0], bar, s_s.index(slot * BOXES + i))


@constexpr_function
def box_number(tokens):
    """Among the descriptors, of 8 to 128 tokens."""
    return (tokens // 8).bit_length() - 1


@constexpr_function
def boxes_of(P, most):
    """(columns, the first one) of P columns, a multiple of 16, in as few powers of two as there can be, up to `most`."""
    found, at, size = [], 0, most
    while at < P:
        if P - at >= size:
            found.append((size, at))
            at += size
        else:
            size //= 2
    return found


@constexpr_function
def token_boxes(P):
    """The boxes of P tokens. A copy costs the producer some eight instructions, which take their turns from the consumers' warps of its
    scheduler."""
    return boxes_of(P, 128 if VIEWS_GROW else 32)


@gluon.jit
def load_box(x_descs, x_s, bar, at, first, k, cfg: gl.constexpr, T: gl.constexpr, FROM: gl.constexpr):
    """128 of K from k on of T tokens from FROM of a tile that begins at `first`, to the ring's tokens from `at` + FROM on."""
    if T <= 32:
        box = view_as(x_s, gl.float8e4nv, cfg.X_BOXES * 16 // T, T, 128, X8_TILE).index(at // T + FROM // T)
    else:
        box = view_rows(view_as(x_s, gl.float8e4nv, cfg.X_BOXES, 16, 128, X8_TILE).index(at // 16 + FROM // 16), gl.float8e4nv, T, 128, X8_TILE)
    tma_load(x_descs[box_number(T)], [first + FROM, k], bar, box)


@gluon.jit
def load_columns(descs, x_s, f_s, bar, slot, first, kb, cfg: gl.constexpr, P: gl.constexpr):
    """K block, or box of them, kb of P tokens, a multiple of 16, into a slot, and their scales."""
    x_descs, w_desc, s_desc, f_desc = descs
    B: gl.constexpr = cfg.BOX
    mbarrier.expect(bar, B * (P * 128 + ((P + 63) // 64 * 1024 if cfg.SCALES else 0)))
    if cfg.SCALES:
        scales = view_as(f_s, gl.float32, cfg.STAGES * (cfg.FT // 64), B, 256, RATIO_TILE)
        for i in gl.static_range((P + 63) // 64):
            tma_load(f_desc, [kb * B, (first + i * 64) * 4], bar, scales.index(slot * (cfg.FT // 64) + i))
    for j in gl.static_range(B):
        for i in gl.static_range(len(token_boxes(P))):
            load_box(x_descs, x_s, bar, (slot * B + j) * cfg.XT, first, (kb * B + j) * 128, cfg, token_boxes(P)[i][0],
                     token_boxes(P)[i][1])


@gluon.jit
def load_activations(descs, rings, full, slot, first, kb, cfg: gl.constexpr, P0: gl.constexpr, P1: gl.constexpr):
    """K block, or box of them, kb of P0 + P1 tokens from position `first` into a slot, and what their sums are multiplied by."""
    x_descs, w_desc, s_desc, f_desc = descs
    x0_s, x1_s, w_s, s_s, f0_s, f1_s = rings
    bar = full[1].index(slot)
    TOKEN: gl.constexpr = 128 if cfg.FP8 and not cfg.TWO else 256
    if cfg.COLUMNS:
        load_columns(descs, x0_s, f0_s, bar, slot, first, kb, cfg, P0)
    else:
        B: gl.constexpr = cfg.BOX
        mbarrier.expect(bar, B * ((P0 + P1) * TOKEN + ((P0 + 15) // 16 + P1 // 16) * (256 if cfg.SCALES else 0)))
        if cfg.SCALES:
            load_ratios(f_desc, f0_s, bar, slot, first, kb, cfg, cfg.T0, P0)
            if P1 > 0:
                load_ratios(f_desc, f1_s, bar, slot, first + P0, kb, cfg, cfg.T1, P1)
        for j in gl.static_range(B):
            load_tokens(x_descs, x0_s, bar, slot * B + j, first, (kb * B + j) * 128, cfg, cfg.T0, P0)
            if P1 > 0:
                load_tokens(x_descs, x1_s, bar, slot * B + j, first + P0, (kb * B + j) * 128, cfg, cfg.T1, P1)


# ---------------------------------------------------------------- products
@gluon.jit
def expand(w, fields, E4M3: gl.constexpr, NIBBLES: gl.constexpr, operand: gl.constexpr):
    """Bytes [64, 64] and the scale fields of their chunk to BF16 [64, 128] (E4M3: [64, 64]) in `operand`'s layout.

    As narrow_expand_device's, but the assembly counts as impure, so it stays in front of a wait for products in flight."""
    s = gl.expand_dims(block_factors(fields, 0, 64, gl.SliceLayout(2, BYTES3)), 2)
    w = gl.convert_layout(gl.reshape(w, [64, 4, 16]), BYTES3, assert_trivial=True)
    if E4M3:
        a = gl.inline_asm_elementwise(E4M3_ASM, "=r,=r,r,r,r,r,r", [w, s], dtype=gl.bfloat16, is_pure=False, pack=4)
        a = gl.permute(gl.reshape(a, [64, 4, 4, 2, 2]), (0, 2, 3, 1, 4))         # row, word, b1, block, b0
        return gl.convert_layout(gl.reshape(a, [64, 64]), operand, assert_trivial=True)
    else:
        ASM: gl.constexpr = NIBBLES_ASM if NIBBLES else E2M1_ASM
        lo, hi = gl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,r,r,r,r,r", [w, s], dtype=(gl.bfloat16, gl.bfloat16),
                                           is_pure=False, pack=4)
        a = gl.reshape(gl.join(lo, hi), [64, 4, 4, 2, 2, 2])                     # row, block, word, b1, b0, pair
        a = gl.permute(a, (0, 2, 5, 3, 1, 4))                                    # row, word, pair, b1, block, b0
        return gl.convert_layout(gl.reshape(a, [64, 128]), operand, assert_trivial=True)


@gluon.jit
def multiply(a, ring, slot, acc, cfg: gl.constexpr, T: gl.constexpr, P: gl.constexpr, FROM: gl.constexpr, K: gl.constexpr):
    """Start acc += a . tokens^T over K columns from FROM of a slot."""
    x = view_as(ring, gl.bfloat16, cfg.STAGES * (T // P), P, 128, X_TILE).index(slot * (T // P))
    if K < 128:
        x = x.slice(FROM, K, 1)
    a = gl.convert_layout(a, gl.DotOperandLayout(0, sums_layout(P), 2), assert_trivial=True)
    return warpgroup_mma(a, x.permute((1, 0)), acc, is_async=True)


@gluon.jit
def settle(sums, COUNT: gl.constexpr, LEFT: gl.constexpr = 0):
    """Wait for the products in flight but the last LEFT."""
    if COUNT == 1:
        return (warpgroup_mma_wait(LEFT, deps=sums), )
    else:
        return warpgroup_mma_wait(LEFT, deps=sums)


@gluon.jit
def ratios(ring, slot, cfg: gl.constexpr, T: gl.constexpr, P: gl.constexpr):
    """[1, P] of a slot."""
    f = view_as(ring, gl.float32, cfg.STAGES * (T // P), P, 4, ROWS_OF_BYTES).index(slot * (T // P))
    return f.slice(0, 1, 1).permute((1, 0)).load(sums_layout(P))


@gluon.jit
def rescaled(sums, rings, slot, cfg: gl.constexpr, UNIT: gl.constexpr, P0: gl.constexpr, P1: gl.constexpr):
    """Sums of one unit in units of the slot's scales: a token's sum is sum * scale of its last K block."""
    x0_s, x1_s, w_s, s_s, f0_s, f1_s = rings
    MP: gl.constexpr = cfg.MP
    f = ratios(f0_s, slot, cfg, cfg.T0, P0)
    new = ()
    for j in gl.static_range(MP):
        if j == UNIT:
            new = new + (sums[j] * f, )
        else:
            new = new + (sums[j], )
    if P1 > 0:
        f = ratios(f1_s, slot, cfg, cfg.T1, P1)
        for j in gl.static_range(MP):
            if j == UNIT:
                new = new + (sums[MP + j] * f, )
            else:
                new = new + (sums[MP + j], )
    return new


@gluon.jit
def blocks(sums, slot, phase, kb, rings, bars, cfg: gl.constexpr, WG: gl.constexpr, P0: gl.constexpr, P1: gl.constexpr,
           COUNT: gl.constexpr):
    """COUNT K blocks from kb. Leaves with nothing in flight: ptxas serialises wgmma that are, across a loop's back edge.

    Weights are expanded while the products before run. The wait for tokens stands between the two for ptxas's sake: it doesn't
    move instructions over a branch, and would otherwise expand after it waited for the products."""
    x0_s, x1_s, w_s, s_s, f0_s, f1_s = rings
    full, empty = bars
    w_full, x_full = full
    MP: gl.constexpr = cfg.MP
    PIECES: gl.constexpr = 2 if P1 > 0 else 1
    SUB: gl.constexpr = 2 if cfg.E4M3 else 1
    KS: gl.constexpr = 128 // SUB
    A: gl.constexpr = gl.DotOperandLayout(0, sums_layout(P0), 2)
    w_v = view_as(w_s, gl.uint8, cfg.STAGES * cfg.UNITS * SUB, 64, 64, ROWS_OF_BYTES)
    s_v = view_as(s_s, gl.int32, cfg.STAGES * cfg.UNITS, 32, 4, ROWS_OF_BYTES)
    old = slot
    for c in gl.static_range(COUNT):
        mbarrier.wait(w_full.index(cfg.F_AT + slot), phase)
        for i in gl.static_range(MP):
            unit = slot * cfg.UNITS + (WG * MP + i)
            fields = s_v.index(unit).load(field_layout(64)) >> (16 * (weight_block(kb + c, cfg) % 2))
            for sub in gl.static_range(SUB):
                a = expand(w_v.index(unit * SUB + sub).load(byte_layout(64)), fields, cfg.E4M3, cfg.NIBBLES, A)
                mbarrier.wait(x_full.index(slot), phase)
                if c + i + sub > 0:
                    sums = settle(sums, MP * PIECES)
                if cfg.CHUNKED:
                    if sub == 0:
                        sums = rescaled(sums, rings, slot, cfg, i, P0, P1)
                new = ()
                for j in gl.static_range(MP):
                    if j == i:
                        new = new + (multiply(a, x0_s, slot, sums[j], cfg, cfg.T0, P0, sub * KS, KS), )
                    else:
                        new = new + (sums[j], )
                if P1 > 0:
                    for j in gl.static_range(MP):
                        if j == i:
                            new = new + (multiply(a, x1_s, slot, sums[MP + j], cfg, cfg.T1, P1, sub * KS, KS), )
                        else:
                            new = new + (sums[MP + j], )
                sums = new
                if c > 0 and i + sub == 0:
                    mbarrier.arrive(empty.index(old), count=1)
        old = slot
        slot, phase = advance(slot, phase, cfg.STAGES)
    sums = settle(sums, MP * PIECES)
    mbarrier.arrive(empty.index(old), count=1)
    return sums, slot, phase


@gluon.jit
def products(slot, phase, KC, rings, bars, cfg: gl.constexpr, WG: gl.constexpr, P0: gl.constexpr, P1: gl.constexpr):
    """All of K of one tile. Returns (sums, slot, phase): MP sums [64, P0], then, where P1, MP of [64, P1]."""
    MP: gl.constexpr = cfg.MP
    L0: gl.constexpr = sums_layout(P0)
    L1: gl.constexpr = sums_layout(P1 if P1 > 0 else 32)
    sums = ()
    for i in gl.static_range(MP):
        sums = sums + (gl.zeros([64, P0], gl.float32, L0), )
    if P1 > 0:
        for i in gl.static_range(MP):
            sums = sums + (gl.zeros([64, P1], gl.float32, L1), )
    for kb in range(0, KC - cfg.REST, cfg.UNROLL):
        slot = fresh(slot)      # where it comes round once a trip, every slot's addresses would be kept in registers
        sums, slot, phase = blocks(sums, slot, phase, kb, rings, bars, cfg, WG, P0, P1, cfg.UNROLL)
    if cfg.REST > 0:
        sums, slot, phase = blocks(sums, slot, phase, KC - cfg.REST, rings, bars, cfg, WG, P0, P1, cfg.REST)
    return sums, slot, phase


# ---------------------------------------------------------------- epilogue
@gluon.jit
def split_tokens(y, R: gl.constexpr, P: gl.constexpr, TO: gl.constexpr):
    """[R, P] as a tuple of [R, TO]: they are different registers of each thread, nothing moves."""
    if P == TO:
        return (y, )
    else:
        HALF: gl.constexpr = P // 2
        left, right = gl.split(gl.permute(gl.reshape(y, [R, 2, HALF]), (0, 2, 1)))
        return split_tokens(left, R, HALF, TO) + split_tokens(right, R, HALF, TO)


@gluon.jit
def finish(acc, buf, vectors, rows_of, pointers, tile, unit, sizes, cfg: gl.constexpr, P: gl.constexpr, FROM: gl.constexpr):
    """Factors, bias, activation, routing weight and the store of a unit's sums [64 weight rows, P tokens from FROM of the tile].

    vectors: (slots, factors, weights) of the tile's tokens in shared memory; rows_of: (factor, bias) of the weight rows."""
    slot_s, xfactor_s, weight_s = vectors
    out_ptr, om = pointers
    e, n, first, rows = tile
    N, R = sizes
    factor, bias = rows_of
    ST: gl.constexpr = P if P < cfg.OUT_TOKENS else cfg.OUT_TOKENS
    F: gl.constexpr = cfg.FEATURES
    mma: gl.constexpr = acc.type.layout
    if cfg.FACTOR or cfg.FP8:
        acc = acc * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, mma)), 1)
    if cfg.XFACTOR:
        acc = acc * gl.expand_dims(xfactor_s.slice(FROM, P, 0).load(gl.SliceLayout(0, mma)), 0)
    if cfg.BIAS:
        acc = acc + gl.expand_dims(gl.convert_layout(bias, gl.SliceLayout(1, mma)), 1)
    if cfg.ACT > 0:
        # rows g and g + 8 of a slab of 16 are gate and up of one feature, in the same thread
        gate, up = gl.split(gl.permute(gl.reshape(acc, [4, 2, 8, P]), (0, 2, 3, 1)))
        acc = gl.reshape(activate(gate, up, cfg), [32, P])
    if cfg.WEIGHT:
        acc = acc * gl.expand_dims(weight_s.slice(FROM, P, 0).load(gl.SliceLayout(0, acc.type.layout)), 0)
    part = split_tokens(acc, F, P, ST)
    if ST < cfg.OUT_TOKENS:
        buf = buf.slice(0, ST, 0)
    lay: gl.constexpr = vector_layout(F, cfg.OUT_BYTES)
    for j in gl.static_range(P // ST):
        buf.store(gl.permute(part[j].to(out_ptr.dtype.element_ty), (1, 0)))
        v = buf.load(lay)
        if cfg.SLOTS:
            row = slot_s.slice(FROM + j * ST, ST, 0).load(gl.SliceLayout(1, lay))
            live = (row >= 0) & (row < R)
        else:
            i = FROM + j * ST + fresh(gl.arange(0, ST, gl.SliceLayout(1, lay)))
            row = first + i
            live = i < rows
        col = unit * F + gl.arange(0, F, gl.SliceLayout(0, lay))
        mask = gl.expand_dims(live, 1) & gl.expand_dims(col < N // (64 // F), 0)
        gl.store(out_ptr + (gl.expand_dims(row.to(gl.int64) * om, 1) + gl.expand_dims(col, 0)), v, mask=mask)


@gluon.jit
def rows_vectors(factor_ptr, bias_ptr, top_ptr, e, unit, NT, N, cfg: gl.constexpr):
    """(factor, bias) of a unit's 64 rows."""
    row = gl.arange(0, 64, gl.SliceLayout(1, sums_layout(32)))
    factor = gl.full([64], 1.0, gl.float32, gl.SliceLayout(1, sums_layout(32)))
    bias = factor
    at = (e * NT + unit) * 64 + row
    there = row < (NT - unit) * 64
    if cfg.FP8:
        factor = payload_unit(gl.load(top_ptr + at, mask=there, other=0))
    if cfg.FACTOR:
        factor = factor * gl.load(factor_ptr + at, mask=there, other=0.0)
    if cfg.BIAS:
        n, there = logical_columns(row, unit, N, cfg.PAIR)
        bias = gl.load(bias_ptr + e * N + n, mask=there, other=0.0).to(gl.float32)
    return factor, bias
