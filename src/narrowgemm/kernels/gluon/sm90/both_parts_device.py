"""Parts of Hopper's kernels that write FP8 twice, along rows and columns: `quantize_both` and `activate_both`.

    TMA -> shared memory -> registers -> scales -> FP8 -> rows
                                      -> FP8 -> shared memory, turned -> columns

A tile is 128 rows of one group by 128 columns (8 warps) or 64 (4 warps). A thread holds 8 x 8 of it, so that the bytes of a store
are its own in both directions, and most of a maximum is found without another thread. Blocks stay and walk the tiles; the next
ones are on their way meanwhile. Most tiles are whole: their stores have no masks.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language import div_rn

from ...triton.quantize_device import block_scale

ABS_BITS = gl.constexpr(0x7FFFFFFF)
FEW = gl.constexpr(1)       # groups, up to 32: every warp knows them
MANY = gl.constexpr(2)      # a launch in front has looked up the tiles
# by columns of a tile: as it is loaded (16 or 8 lanes side by side); the same registers as [columns, 128 rows], those of a column one
# after another; and as they are stored, 16 bytes a lane
_WIDE = gl.BlockedLayout([8, 8], [2, 16], [8, 1], [1, 0])
_NARROW = gl.BlockedLayout([8, 8], [4, 8], [4, 1], [1, 0])
_REGISTERS = [[0, 1], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
_WIDE_TURNED = gl.DistributedLinearLayout(
    _REGISTERS, [[8, 0], [16, 0], [32, 0], [64, 0], [0, 8]], [[0, 16], [0, 32], [0, 64]], [], [128, 128])
_NARROW_TURNED = gl.DistributedLinearLayout(
    _REGISTERS, [[8, 0], [16, 0], [32, 0], [0, 8], [0, 16]], [[0, 32], [0, 64]], [], [64, 128])


@gluon.constexpr_function
def tile_layout(columns):
    return _WIDE if columns == 128 else _NARROW


@gluon.constexpr_function
def turned_layout(columns):
    return _WIDE_TURNED if columns == 128 else _NARROW_TURNED


@gluon.constexpr_function
def stored_layout(columns):
    return gl.BlockedLayout([1, 16], [4, 8], [columns // 16, 1], [1, 0])


@gluon.constexpr_function
def piece_layout(columns, rows):
    wide = tile_layout(columns)
    return gl.BlockedLayout([rows // 16, 8], wide.threads_per_warp, wide.warps_per_cta, [1, 0])


@gluon.constexpr_function
def word_layout(columns, bits):
    wide = tile_layout(columns)
    return gl.BlockedLayout([8, 8 * bits // 32], wide.threads_per_warp, wide.warps_per_cta, [1, 0])


@gluon.constexpr_function
def one_each(columns):
    return gl.BlockedLayout([1], [32], [columns // 16], [0])


@gluon.constexpr_function
def shared_layout(bits):
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2)


# ---------------------------------------------------------------- tiles
@gluon.jit
def tile_at(id, tiles_t, tiles_c, BAND: gl.constexpr):
    """(tile of rows, tile of columns): bands of BAND tiles of rows, down their columns first, so that neighbours write one line of
    the columns' copy after another."""
    if BAND == 1:
        return id // tiles_c, id % tiles_c
    else:
        band = id // (BAND * tiles_c)
        rest = id - band * (BAND * tiles_c)
        rows = gl.minimum(tiles_t - band * BAND, BAND)
        return band * BAND + rest % rows, rest // rows


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def few_groups(offs_ptr, seg_ptr, T, G, capacity, write, WARPS: gl.constexpr):
    """(where columns of up to 32 groups begin and end, what to add for their rows, where those end; tiles), found by every warp for
    itself, a group a lane; a wrong offset may lose rows, never leave the tensor. `write`: segments, too."""
    i = gl.arange(0, 32, gl.BlockedLayout([1], [32], [WARPS], [0]))
    low = gl.minimum(gl.maximum(gl.load(offs_ptr + i, mask=i < G, other=0).to(gl.int64), 0), T)
    high = gl.minimum(gl.maximum(gl.load(offs_ptr + 1 + i, mask=i < G, other=0).to(gl.int64), low), T)
    width = ((high - low + 127) // 128 * 128).to(gl.int32)
    ends = gl.associative_scan(width, 0, add)
    begins = gl.minimum(ends - width, capacity)
    ends = gl.minimum(ends, capacity)
    if write:
        gl.store(seg_ptr + i, begins, mask=i < G)
        gl.store(seg_ptr + i, gl.max(ends, 0), mask=i == G)
        if G == 32:
            gl.store(seg_ptr + 32, gl.max(ends, 0))
    return (begins, ends, low.to(gl.int32) - begins, high.to(gl.int32)), gl.max(ends, 0) // 128


@gluon.jit
def rows_at(tile, groups, table_ptr, T, GROUPED: gl.constexpr):
    """(first row, end of the rows that count) of a tile."""
    if GROUPED == FEW:
        begins, ends, rows, stop = groups
        here = (begins <= tile * 128) & (tile * 128 < ends)
        return tile * 128 + gl.sum(gl.where(here, rows, 0), 0), gl.sum(gl.where(here, stop, 0), 0)
    elif GROUPED == MANY:
        return gl.load(table_ptr + 2 * tile), gl.load(table_ptr + 2 * tile + 1)
    else:
        return tile * 128, T


@gluon.jit
def given_inverse(ptr):
    """Bits of 1 / scale, NaN where it is not finite."""
    scale = gl.load(ptr)
    return gl.where(gl.abs(scale) < float("inf"), div_rn(1.0, scale), float("nan")).to(gl.int32, bitcast=True)


# ---------------------------------------------------------------- stores
@gluon.jit
def put_rows(x, inverse, out_ptr, pitch, live, inside, BC: gl.constexpr, ONE: gl.constexpr, MASKED: gl.constexpr, WIDE: gl.constexpr):
    """Along the rows, to out_ptr on; inverse: 1 / scale of the rows; ONE: x is scaled already."""
    TILE: gl.constexpr = tile_layout(BC)
    i = gl.arange(0, 128, gl.SliceLayout(1, TILE))
    j = gl.arange(0, BC, gl.SliceLayout(0, TILE))
    if WIDE:
        i = i.to(gl.int64)
    y = x.to(gl.float32)
    if not ONE:
        y = y * gl.expand_dims(inverse, 1)
    y = y.to(out_ptr.dtype.element_ty)
    at = out_ptr + (gl.expand_dims(i * pitch, 1) + gl.expand_dims(j, 0))
    if MASKED:
        gl.store(at, y, mask=gl.expand_dims(live, 1) & gl.expand_dims(inside, 0))
    else:
        gl.store(at, y)


@gluon.jit
def put_columns(x, inverse, out_ptr, pitch, columns, rows, fill, BC: gl.constexpr, ONE: gl.constexpr, MASKED: gl.constexpr,
                WIDE: gl.constexpr):
    """Along the columns, to out_ptr on; `pitch` in units of 16, so that stores stay wide. `columns` of them are there, `rows` of the
    tile count; behind them zeros are written, up to `fill`, a multiple of 16. inverse: as in `put_rows`, of columns."""
    TURNED: gl.constexpr = turned_layout(BC)
    STORED: gl.constexpr = stored_layout(BC)
    z = gl.convert_layout(gl.permute(x, (1, 0)), TURNED, assert_trivial=True).to(gl.float32)
    if not ONE:
        z = z * gl.expand_dims(inverse, 1)
    z = gl.convert_layout(z.to(out_ptr.dtype.element_ty), STORED)
    v = gl.arange(0, BC, gl.SliceLayout(1, STORED))
    r = gl.arange(0, 128, gl.SliceLayout(0, STORED))
    w = v
    if WIDE:
        w = v.to(gl.int64)
    at = out_ptr + (gl.expand_dims(w * pitch * 16, 1) + gl.expand_dims(r, 0))
    if MASKED:
        z = gl.where(gl.expand_dims(r < rows, 0), z, gl.zeros_like(z))      # a NaN scale must not reach the fill
        gl.store(at, z, mask=gl.expand_dims(v < columns, 1) & gl.expand_dims(r // 16 * 16 < fill, 0))
    else:
        gl.store(at, z)


@gluon.jit
def put_both(view, row_inverse, column_inverse, row_ptr, row_pitch, column_ptr, column_pitch, rows, columns, fill, BC: gl.constexpr,
             ONE: gl.constexpr, MASKED: gl.constexpr, WIDE: gl.constexpr):
    """Both copies of a tile in shared memory. ONE scale: its values are made once. Else it is read once for each: held, it would take
    the registers that conversions want."""
    TILE: gl.constexpr = tile_layout(BC)
    live = gl.arange(0, 128, gl.SliceLayout(1, TILE)) < rows
    inside = gl.arange(0, BC, gl.SliceLayout(0, TILE)) < columns
    x = view.load(TILE)
    if ONE:
        x = x.to(gl.float32) * row_inverse
    put_rows(x, row_inverse, row_ptr, row_pitch, live, inside, BC, ONE, MASKED, WIDE)
    if not ONE:
        x = view.load(TILE)
    put_columns(x, column_inverse, column_ptr, column_pitch, columns, rows, fill, BC, ONE, MASKED, WIDE)


# ---------------------------------------------------------------- maxima
# Of magnitudes as integers, in which order a NaN is above infinity; of 16-bit floats two a register, so that one instruction does two.
@gluon.jit
def larger_word(a, b):
    return gl.maximum(a, b)


@gluon.jit
def larger_pair(a, b):
    return gl.inline_asm_elementwise("max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def larger(a, b, BITS: gl.constexpr):
    return larger_pair(a, b) if BITS == 16 else larger_word(a, b)


@gluon.jit
def reduce_words(x, axis: gl.constexpr, BITS: gl.constexpr):
    return gl.reduce(x, axis, larger_pair if BITS == 16 else larger_word)


@gluon.jit
def words(view, rows, BC: gl.constexpr, BITS: gl.constexpr):
    """Magnitudes of a tile in shared memory as 32-bit words; zero behind its rows. Behind its columns TMA has put zeros."""
    LAYOUT: gl.constexpr = word_layout(BC, BITS)
    x = view.load(LAYOUT) & (0x7FFF7FFF if BITS == 16 else ABS_BITS)
    if rows < 128:
        x = gl.where(gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(1, LAYOUT)) < rows, 1), x, 0)
    return x


@gluon.jit
def halves(x):
    return x & 0xFFFF, (x >> 16) & 0xFFFF


@gluon.jit
def widened(bits, DTYPE: gl.constexpr):
    """Bits of magnitudes as FP32's."""
    if DTYPE == gl.float32:
        return bits
    else:
        return bits.to(gl.int16).to(DTYPE, bitcast=True).to(gl.float32).to(gl.int32, bitcast=True)


@gluon.jit
def row_maxima(x, DTYPE: gl.constexpr):
    """FP32 bits of the largest magnitude of each row of `words`, one a thread."""
    BITS: gl.constexpr = DTYPE.primitive_bitwidth
    most = reduce_words(x, 1, BITS)
    if BITS == 16:
        low, high = halves(most)
        most = gl.maximum(low, high)
    return gl.convert_layout(widened(most, DTYPE), one_each(128))


@gluon.jit
def column_maxima(x, DTYPE: gl.constexpr):
    """The same of each of 128 columns."""
    BITS: gl.constexpr = DTYPE.primitive_bitwidth
    most = reduce_words(x, 0, BITS)
    if BITS == 16:
        low, high = halves(most)
        most = gl.reshape(gl.join(low, high), [128])
    return widened(gl.convert_layout(most, one_each(128)), DTYPE)


@gluon.jit
def thread_maxima(x, BC: gl.constexpr, BITS: gl.constexpr):
    """Largest of the words of each thread [16, BC / 8]."""
    x = gl.reshape(x, [16, 8, BC // 8, BITS // 4])
    return reduce_words(reduce_words(x, 3, BITS), 1, BITS)


@gluon.jit
def no_maxima(BC: gl.constexpr, BITS: gl.constexpr):
    return thread_maxima(gl.zeros([128, BC * BITS // 32], gl.int32, word_layout(BC, BITS)), BC, BITS)


@gluon.jit
def raise_to(ptr, most, DTYPE: gl.constexpr):
    """Raise a largest magnitude in memory to that of `thread_maxima`; most blocks find it large enough."""
    BITS: gl.constexpr = DTYPE.primitive_bitwidth
    bits = reduce_words(reduce_words(most, 1, BITS), 0, BITS)
    if BITS == 16:
        low, high = halves(bits)
        bits = gl.maximum(low, high)
    bits = widened(bits, DTYPE)
    gl.atomic_max(ptr, bits, mask=bits > gl.load(ptr, volatile=True), sem="relaxed")


@gluon.jit
def raise_both(x, row_ptr, column_ptr, rows, columns, DTYPE: gl.constexpr):
    """Raise the largest magnitudes of rows and of columns in memory to those of `words`; the order of maxima does not matter."""
    i = gl.arange(0, 128, one_each(128))
    gl.atomic_max(row_ptr + i, row_maxima(x, DTYPE), mask=i < rows, sem="relaxed")
    gl.atomic_max(column_ptr + i, column_maxima(x, DTYPE), mask=i < columns, sem="relaxed")


# ---------------------------------------------------------------- scales of 1x128 and 128x1
@gluon.jit
def block_scales(view, rs_ptr, rsr, cs_ptr, csr, rows, columns, clamp, DTYPE: gl.constexpr, ROUNDING: gl.constexpr, E8M0: gl.constexpr,
                 TOP: gl.constexpr, EMAX: gl.constexpr, MANTISSA: gl.constexpr, MANTISSA_BITS: gl.constexpr):
    """Store the scales of rows and columns of a tile in shared memory, seen as words; 1 / them, as `put_both` takes them. Each is
    worked out once, by one thread."""
    i = gl.arange(0, 128, one_each(128))
    x = words(view, rows, 128, DTYPE.primitive_bitwidth)
    scale, row_inverse, sign = block_scale(row_maxima(x, DTYPE), clamp, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS, True)
    gl.store(rs_ptr + i * rsr, scale, mask=i < rows)
    scale, column_inverse, sign = block_scale(column_maxima(x, DTYPE), clamp, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS, True)
    gl.store(cs_ptr + i * csr, scale, mask=i < columns)
    return (gl.convert_layout(row_inverse, gl.SliceLayout(1, tile_layout(128))),
            gl.convert_layout(column_inverse, gl.SliceLayout(1, turned_layout(128))))


@gluon.jit
def stored_inverses(row_ptr, column_ptr, rows, columns, BC: gl.constexpr):
    """1 / scale of a tile's rows and columns, found before."""
    i = gl.arange(0, 128, gl.SliceLayout(1, tile_layout(BC)))
    j = gl.arange(0, BC, gl.SliceLayout(1, turned_layout(BC)))
    return (gl.load(row_ptr + i, mask=i < rows, other=0).to(gl.float32, bitcast=True),
            gl.load(column_ptr + j, mask=j < columns, other=0).to(gl.float32, bitcast=True))
