"""Device code of `quantize_both` on Hopper: a tile is read once, held in registers, and written along its rows and its columns.

A tile is 128 rows of one group by 128 columns; a thread holds 8 x 8 of it, so that the bytes of a store are its own in both
directions, and most of a maximum is found without another thread. Scales are worked out once each, not by every thread that
needs them. Bit for bit what `reference/quantize_both.py` defines; what to do where groups end: `../../triton/quantize_both_device.py`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language import PropagateNan

INF_BITS = gl.constexpr(0x7F800000)
NAN_BITS = gl.constexpr(0x7FC00000)
ABS_BITS = gl.constexpr(0x7FFFFFFF)
WITH_NAN = gl.constexpr(PropagateNan.ALL)
WARPS = gl.constexpr(8)
# [128 rows, 128 columns] as they are loaded: 16 lanes side by side, a warp down 16 rows
TILE = gl.constexpr(gl.BlockedLayout([8, 8], [2, 16], [8, 1], [1, 0]))
# the same registers as [128 columns, 128 rows], those of a column one after another
TURNED = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 1], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0], [32, 0], [64, 0], [0, 8]],
    [[0, 16], [0, 32], [0, 64]], [], [128, 128]))
# and as they are stored: 16 bytes a lane
STORED = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [8, 1], [1, 0]))
ONE_EACH = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))


@gluon.jit
def larger(a, b):
    return gl.maximum(a, b, propagate_nan=WITH_NAN)


@gluon.jit
def largest(x, axis: gl.constexpr):
    """Bits of the largest magnitude; NaN above infinity."""
    return gl.reduce(gl.abs(x), axis, larger).to(gl.int32, bitcast=True) & ABS_BITS


@gluon.jit
def divided(x, TOP: gl.constexpr):
    """x / TOP, correctly rounded (Markstein): a product, its exact remainder, one more product. Tests try every significand."""
    ONE: gl.constexpr = 1.0 / TOP
    q = x * ONE
    return gl.fma(gl.fma(q, gl.full_like(q, -TOP), x), gl.full_like(q, ONE), q)


@gluon.jit
def inverted(s):
    """1 / s, correctly rounded: two steps of Newton from within a few units of the last place. They leave out one significand, all
    ones, of which the inverse is one unit above a power of two."""
    one = gl.full_like(s, 1.0)
    r = 1.0 / s
    r = gl.fma(r, gl.fma(-s, r, one), r)
    r = gl.fma(r, gl.fma(-s, r, one), r)
    bits = s.to(gl.int32, bitcast=True)
    near = (((253 - (bits >> 23)) << 23) + 1).to(gl.float32, bitcast=True)
    return gl.where((bits & 0x7FFFFF) == 0x7FFFFF, near, r)


@gluon.jit
def scale_of(bits, clamp, ROUNDING: gl.constexpr, E8M0: gl.constexpr, TOP: gl.constexpr, EMAX: gl.constexpr, MANTISSA: gl.constexpr,
             MANTISSA_BITS: gl.constexpr):
    """(scale as stored, 1 / scale) of 128 largest magnitudes."""
    finite = bits < INF_BITS
    amax = gl.maximum(bits.to(gl.float32, bitcast=True), clamp)
    if E8M0:
        bits = amax.to(gl.int32, bitcast=True)
        if ROUNDING == "even":
            bits += 1 << (22 - MANTISSA_BITS)
        code = (bits >> 23) - EMAX
        if ROUNDING == "rceil":
            code += ((bits & 0x7FFFFF) > MANTISSA).to(gl.int32)
        code = gl.minimum(gl.maximum(code, 0), 254)
        inverse = gl.where(code == 254, 0x400000, (254 - code) << 23)
        inverse = gl.where(finite, inverse, NAN_BITS).to(gl.float32, bitcast=True)
        scale = gl.where(finite, code, 255).to(gl.uint8)
    else:
        scale = gl.maximum(divided(amax, TOP), 1.1754943508222875e-38)
        inverse = inverted(scale)
        scale = gl.where(finite, scale.to(gl.int32, bitcast=True), NAN_BITS).to(gl.float32, bitcast=True)
        inverse = gl.where(finite, inverse.to(gl.int32, bitcast=True), NAN_BITS).to(gl.float32, bitcast=True)
    return scale, inverse


@gluon.jit
def group_rows(offs_ptr, g, live, T):
    """(first row, end) of a group, clamped to [0, T]."""
    start = gl.minimum(gl.maximum(gl.load(offs_ptr + g, mask=live, other=0).to(gl.int64), 0), T)
    end = gl.minimum(gl.maximum(gl.load(offs_ptr + g + 1, mask=live, other=0).to(gl.int64), 0), T)
    return start, gl.maximum(start, end)


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def find_tile(tile, offs_ptr, seg_ptr, T, G, CHUNK: gl.constexpr):
    """(first row, end of the group's rows) of a tile of 128 columns of the grouped copy; (0, -1) behind the last one."""
    lay: gl.constexpr = gl.BlockedLayout([CHUNK // 32], [32], [WARPS], [0])     # every warp for itself
    pos = tile * 128
    g = tile * 0
    for base in range(0, G, CHUNK):
        i = base + gl.arange(0, CHUNK, lay)
        ends = gl.load(seg_ptr + 1 + i, mask=i < G, other=ABS_BITS)
        g += gl.sum((ends <= pos).to(gl.int32), 0)
    live = g < G
    start, end = group_rows(offs_ptr, g, live, T)
    first = start + (pos - gl.load(seg_ptr + g, mask=live, other=0))
    return gl.where(live, first, 0), gl.where(live, end, -1)


@gluon.jit
def place_tile(tile, offs_ptr, seg_ptr, T, G, capacity, write, CHUNK: gl.constexpr):
    """`find_tile` where nobody has worked out where segments start: every warp does it for itself; `write`: and writes it."""
    lay: gl.constexpr = gl.BlockedLayout([CHUNK // 32], [32], [WARPS], [0])
    pos = tile * 128
    total = tile * 0
    first = tile * 0
    end = tile * 0
    if write:
        gl.store(seg_ptr, total)
    for base in range(0, G, CHUNK):
        i = base + gl.arange(0, CHUNK, lay)
        low, high = group_rows(offs_ptr, i, i < G, T)
        width = gl.where(i < G, (high - low + 127) // 128 * 128, 0).to(gl.int32)
        ends = total + gl.associative_scan(width, 0, add)
        here = (ends > pos) & (ends - width <= pos)
        first += gl.sum(gl.where(here, low.to(gl.int32) + pos - (ends - width), 0), 0)
        end += gl.sum(gl.where(here, high.to(gl.int32) + 1, 0), 0)
        if write:
            gl.store(seg_ptr + 1 + i, gl.minimum(ends, capacity), mask=i < G)
        total += gl.sum(width, 0)
    return first.to(gl.int64), end.to(gl.int64) - 1


@gluon.jit
def load_tile(x_ptr, xr, live, inside, WIDE: gl.constexpr):
    """[128, 128] from x_ptr on, as FP32; zero where nothing is."""
    i = gl.arange(0, 128, gl.SliceLayout(1, TILE))
    j = gl.arange(0, 128, gl.SliceLayout(0, TILE))
    if WIDE:
        i = i.to(gl.int64)
    mask = gl.expand_dims(live, 1) & gl.expand_dims(inside, 0)
    return gl.load(x_ptr + (gl.expand_dims(i * xr, 1) + gl.expand_dims(j, 0)), mask=mask, other=0.0)


@gluon.jit(do_not_specialize=["T", "G", "tiles_t"])
def amax_kernel(x_ptr, offs_ptr, row_ptr, col_ptr, T, C, G, tiles_t, xb, xr, SPAN: gl.constexpr, GROUPED: gl.constexpr,
                WIDE: gl.constexpr):
    """Largest magnitudes of each row and each column, by atomic maxima, whose order does not matter. A program goes along SPAN tiles
    of 128 columns. Grouped: rows in front of the first group and behind the last one don't count."""
    pid = gl.program_id(0)
    strips = gl.cdiv(C, SPAN * 128)
    b = (pid // (tiles_t * strips)).to(gl.int64)
    rest = pid % (tiles_t * strips)
    first = (rest // strips).to(gl.int64) * 128
    start = rest % strips * (SPAN * 128)
    row = first + gl.arange(0, 128, gl.SliceLayout(1, TILE))
    live = row < T
    if GROUPED:
        low, none = group_rows(offs_ptr, 0, G > 0, T)
        none, high = group_rows(offs_ptr, gl.maximum(G - 1, 0), G > 0, T)
        live = (row >= low) & (row < high)
    x_ptr += b * xb + first * xr + start
    many = gl.zeros([128], gl.int32, gl.SliceLayout(1, TILE))
    for s in gl.static_range(SPAN):
        col = start + s * 128 + gl.arange(0, 128, gl.SliceLayout(0, TILE))
        x = load_tile(x_ptr + s * 128, xr, live, col < C, WIDE).to(gl.float32)
        many = gl.maximum(many, largest(x, 1))
        most = gl.convert_layout(largest(x, 0), ONE_EACH)
        c = start + s * 128 + gl.arange(0, 128, ONE_EACH)
        gl.atomic_max(col_ptr + b * C + c, most, mask=c < C, sem="relaxed")
    r = first + gl.arange(0, 128, ONE_EACH)
    gl.atomic_max(row_ptr + b * T + r, gl.convert_layout(many, ONE_EACH), mask=r < T, sem="relaxed")


@gluon.jit(do_not_specialize=["T", "G", "tiles_t", "cr", "cb", "rsk", "csb"])
def both_kernel(x_ptr, row_ptr, col_ptr, rs_ptr, cs_ptr, row_amax_ptr, col_amax_ptr, offs_ptr, seg_ptr, T, C, G, tiles_t, clamp,
                xb, xr, rb, rr, cb, cr, rsb, rsr, rsk, csb, csr, csk, BLOCKS: gl.constexpr, GROUPED: gl.constexpr,
                EVEN: gl.constexpr, WIDE: gl.constexpr, CHUNK: gl.constexpr, ROUNDING: gl.constexpr, E8M0: gl.constexpr,
                TOP: gl.constexpr, EMAX: gl.constexpr, MANTISSA: gl.constexpr, MANTISSA_BITS: gl.constexpr):
    """BLOCKS: 1x128 on both copies, segments known; else a scale a row of each, from the maxima found before, segments written. Other arguments: as the portable
    kernel's; cb, cr are strides of `columns` in units of 16, EVEN: T is whole tiles."""
    pid = gl.program_id(0)
    tiles_c = gl.cdiv(C, 128)
    # maxima: the last tiles that were read for them come first, while L2 still has them
    if not BLOCKS:
        pid = gl.num_programs(0) - 1 - pid
    b = (pid // (tiles_t * tiles_c)).to(gl.int64)
    tile = pid % (tiles_t * tiles_c) // tiles_c
    tc = pid % (tiles_t * tiles_c) % tiles_c
    pos = tile.to(gl.int64) * 128
    first = pos
    end = gl.cast(T, gl.int64)
    if GROUPED:
        if BLOCKS:
            first, end = find_tile(tile, offs_ptr, seg_ptr, T, G, CHUNK)
        else:
            first, end = place_tile(tile, offs_ptr, seg_ptr, T, G, tiles_t * 128, gl.program_id(0) == 0, CHUNK)
    x_ptr += b * xb
    row_ptr += b * rb
    rs_ptr += b * rsb
    cs_ptr += b * csb
    i = gl.arange(0, 128, ONE_EACH)
    c = tc * 128 + i
    rows: gl.constexpr = gl.SliceLayout(1, TILE)
    cols: gl.constexpr = gl.SliceLayout(0, TILE)
    col_bits = i
    if not BLOCKS:
        col_bits = gl.load(col_amax_ptr + b * C + c, mask=c < C, other=0)
        if tile == 0:       # the scale of a whole column: written by its first tile, live or not
            scale, none = scale_of(col_bits, clamp, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS)
            gl.store(cs_ptr + c * csr, scale, mask=c < C)
    if end >= 0:
        live = first + gl.arange(0, 128, rows) < end
        inside = tc * 128 + gl.arange(0, 128, cols) < C
        x = load_tile(x_ptr + (first * xr + tc * 128), xr, live, inside, WIDE)
        row_bits = i
        if BLOCKS:
            row_bits = gl.convert_layout(largest(x.to(gl.float32), 1), ONE_EACH)
            col_bits = gl.convert_layout(largest(x.to(gl.float32), 0), ONE_EACH)
        else:
            row_bits = gl.load(row_amax_ptr + (b * T + first) + i, mask=first + i < end, other=0)
        row_scale, row_inverse = scale_of(row_bits, clamp, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS)
        col_scale, col_inverse = scale_of(col_bits, clamp, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS)
        if BLOCKS:
            gl.store(cs_ptr + c.to(gl.int64) * csr + tile.to(gl.int64) * csk, col_scale, mask=c < C)
            gl.store(rs_ptr + (first * rsr + tc.to(gl.int64) * rsk) + i * rsr, row_scale, mask=first + i < end)
        elif tc == 0:
            gl.store(rs_ptr + (first * rsr) + i * rsr, row_scale, mask=first + i < end)

        # along the rows
        w = gl.arange(0, 128, rows)
        if WIDE:
            w = w.to(gl.int64)
        row_inverse = gl.convert_layout(row_inverse, rows)
        y = (x.to(gl.float32) * gl.expand_dims(row_inverse, 1)).to(row_ptr.dtype.element_ty)
        mask = gl.expand_dims(live, 1) & gl.expand_dims(inside, 0)
        out = row_ptr + (first * rr + tc * 128)
        gl.store(out + (gl.expand_dims(w * rr, 1) + gl.expand_dims(gl.arange(0, 128, cols), 0)), y, mask=mask)

        # along the columns
        turned = gl.convert_layout(gl.permute(x, (1, 0)), TURNED, assert_trivial=True).to(gl.float32)
        col_inverse = gl.convert_layout(col_inverse, gl.SliceLayout(1, TURNED))
        z = (turned * gl.expand_dims(col_inverse, 1)).to(row_ptr.dtype.element_ty)
        z = gl.convert_layout(z, STORED)
        v = gl.arange(0, 128, gl.SliceLayout(1, STORED))
        r = gl.arange(0, 128, gl.SliceLayout(0, STORED))
        fill = (pos + r < T) | EVEN
        if GROUPED:
            fill = r < 128
            if first + 128 > end:       # a NaN scale must not reach the fill
                z = gl.where(gl.expand_dims(first + r < end, 0), z, gl.zeros_like(z))
        mask = gl.expand_dims(tc * 128 + v < C, 1) & gl.expand_dims(fill, 0)
        if WIDE:
            v = v.to(gl.int64)
        out = col_ptr + (b * cb + tc.to(gl.int64) * 128 * cr) * 16 + pos
        gl.store(out + (gl.expand_dims(v * cr * 16, 1) + gl.expand_dims(r, 0)), z, mask=mask)
