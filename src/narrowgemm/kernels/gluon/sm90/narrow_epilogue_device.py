"""What becomes of a tile's FP32 sums: factors, bias, activation, routing weight, store. Shared by the kernels over prepacked weights."""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl

from .scales_device import as_float

HALVES = gl.constexpr(1)
SWIGLU_OAI = gl.constexpr(2)


@gluon.jit
def columns(row, nt, N, PAIR: gl.constexpr):
    """(logical column of N, whether there is one) of rows from packed tile nt of 64 on."""
    if PAIR == 0:
        n = nt * 64 + row
        return n, n < N
    else:
        feature = nt * 32 + row // 16 * 8 + row % 8
        up = row % 16 // 8
        if PAIR == HALVES:
            n = up * (N // 2) + feature
        else:
            n = 2 * feature + up
        return n, feature < N // 2


@gluon.jit
def activate(gate, up, cfg: gl.constexpr):
    if cfg.ACT == SWIGLU_OAI:
        # min and max keep the other operand where one is NaN: a NaN has to come through
        gate = gl.where(gate > cfg.LIMIT, cfg.LIMIT, gate)
        up = gl.where(up > cfg.LIMIT, cfg.LIMIT, gl.where(up < -cfg.LIMIT, -cfg.LIMIT, up))
        return gate / (1.0 + gl.exp(-cfg.ALPHA * gate)) * (up + 1.0)
    else:
        return gate / (1.0 + gl.exp(-gate)) * up


@constexpr_function
def store_layout(rows, bits, warps):
    """Of [rows, tokens]: a thread stores 16 bytes of one token's row."""
    vec = 128 // bits
    return gl.BlockedLayout([vec, 1], [rows // vec, 32 * vec // rows], [1, warps], [0, 1])


@gluon.jit
def store(y, slots, nt, out_ptr, N, R, som, cfg: gl.constexpr):
    """y [weight rows or features, BT]; KEEP: the output stays in L2 while weights stream through, instead of going to memory line by
    line among them."""
    ROWS: gl.constexpr = y.shape[0]
    y = y.to(out_ptr.dtype.element_ty)
    if cfg.WIDE:
        lay: gl.constexpr = store_layout(ROWS, out_ptr.dtype.element_ty.primitive_bitwidth, cfg.ROWS // 16)
        y = gl.convert_layout(y, lay)
    else:
        lay: gl.constexpr = y.type.layout
    s = gl.convert_layout(slots, gl.SliceLayout(0, lay))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, lay))
    if cfg.ACT == 0:
        n, there = columns(row, nt, N, cfg.PAIR)
    else:
        n = nt * 32 + row       # of features
        there = n < N // 2
    ptrs = out_ptr + (gl.expand_dims(s.to(gl.int64) * som, 0) + gl.expand_dims(n, 1))
    mask = gl.expand_dims((s >= 0) & (s < R), 0) & gl.expand_dims(there, 1)
    if cfg.KEEP:
        gl.store(ptrs, y, mask=mask, eviction_policy="evict_last")
    else:
        gl.store(ptrs, y, mask=mask)


@gluon.jit
def payload_unit(top):
    """What rows of weights whose scales are folded into E4M3 are in units of. top: their largest codes."""
    return as_float(top) * 0.015625


@gluon.jit
def vectors(e, nt, slots, factor_ptr, top_ptr, xfactor_ptr, bias_ptr, weight_ptr, NT, N, R, a_div, mma: gl.constexpr, cfg: gl.constexpr):
    """What `finish` needs of a tile's rows and tokens: (factors, biases [ROWS], token factors, routing weights [BT]); 1 where there
    are none."""
    row = gl.arange(0, cfg.ROWS, gl.SliceLayout(1, mma))
    live = (slots >= 0) & (slots < R)
    factor = 1.0
    xfactor = 1.0
    bias = 1.0
    weight = 1.0
    if cfg.FACTOR:
        factor = gl.load(factor_ptr + (e * NT + nt) * 64 + row, mask=row < (NT - nt) * 64, other=1.0)
    if cfg.FP8:
        factor *= payload_unit(gl.load(top_ptr + (e * NT + nt) * 64 + row, mask=row < (NT - nt) * 64, other=0))
    if cfg.XFACTOR:
        xfactor = gl.load(xfactor_ptr + gl.where(live, slots, 0) // a_div, mask=live, other=0.0)
    if cfg.BIAS:
        n, there = columns(row, nt, N, cfg.PAIR)
        bias = gl.load(bias_ptr + e * N + n, mask=there, other=0.0)
    if cfg.WEIGHT:
        weight = gl.load(weight_ptr + slots, mask=live, other=0.0)
    return factor, bias, xfactor, weight


@gluon.jit
def finish(acc, nt, slots, given, out_ptr, N, R, som, cfg: gl.constexpr):
    """Store a tile, packed rows from 64 nt on. acc [ROWS, BT tokens]; slots [BT] in its columns' layout, outside [0, R): nothing is
    stored; given: the tile's `vectors`."""
    ROWS: gl.constexpr = cfg.ROWS
    factor, bias, xfactor, weight = given
    if cfg.FP8:     # powers of two, which sums of payloads might leave FP32 by one after the other
        acc = acc * (gl.expand_dims(factor, 1) * gl.expand_dims(xfactor, 0))
    else:
        if cfg.FACTOR:
            acc = acc * gl.expand_dims(factor, 1)
        if cfg.XFACTOR:
            acc = acc * gl.expand_dims(xfactor, 0)
    if cfg.BIAS:
        acc = acc + gl.expand_dims(bias.to(gl.float32), 1)
    if cfg.ACT > 0:
        # rows g and g + 8 of a slab of 16 are gate and up of one feature, in the same thread
        pairs = gl.permute(gl.reshape(acc, [ROWS // 16, 2, 8, cfg.BT]), (0, 2, 3, 1))
        gate, up = gl.split(pairs)
        y = gl.reshape(activate(gate, up, cfg), [ROWS // 2, cfg.BT])
    else:
        y = acc
    if cfg.WEIGHT:
        y = y * gl.expand_dims(gl.convert_layout(weight, gl.SliceLayout(0, y.type.layout)), 0)
    store(y, slots, nt, out_ptr, N, R, som, cfg)
