"""Parts of the Hopper FP8 prefill kernel: the ring of K blocks, scales, promotion, the store."""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait)

from .fp8_block_schedule_device import CONTIGUOUS, DENSE, MASKED, NO_GROUP, OFFSETS, PSUM, fresh
from .scales_device import as_float
from .shim import tma_load, tma_store

FP8_TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2))
FP8_PLANE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=3))
ROW_OF_FLOATS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    slot += 1
    wrap = slot == STAGES
    return gl.where(wrap, 0, slot), gl.where(wrap, phase ^ 1, phase)


@constexpr_function
def block_of(cfg, WM, piece):
    """Which 64 rows of a tile are a warpgroup's piece along M. TAIL: the first pieces of all warpgroups are the tile's first half."""
    return piece * cfg.WGM + WM if getattr(cfg, "TAIL", False) else WM * cfg.MP + piece


@constexpr_function
def second_piece(cfg, WM):
    """TAIL: with rows beyond so many does a warpgroup work on its second piece along M. THREE: each warpgroup by itself, else both."""
    return (cfg.WGM + (WM if getattr(cfg, "THREE", False) else 0)) * 64


# ---------------------------------------------------------------- producer
@gluon.jit
def load_blocks(descs, rings, bar, slot, at, kb, whole, cfg: gl.constexpr, FROM: gl.constexpr):
    """Fill places [FROM, KS) of a slot with K blocks kb, kb + 1, ...; they arrive on `bar`. `whole`: of TAIL, whether A's second piece
    is needed."""
    a_desc, sa_desc, b_desc = descs
    a_s, sa_s, b_s = rings
    a_plane, a_row, b_plane, b_row, sa_row, sa_col = at
    KS: gl.constexpr = cfg.KS
    BOXES: gl.constexpr = cfg.BN // cfg.B_BOX
    if cfg.TAIL:
        mbarrier.expect(bar, cfg.BLOCK_BYTES, pred=whole)
        mbarrier.expect(bar, cfg.BLOCK_BYTES - cfg.A_BOX * 128, pred=whole == 0)
    else:
        mbarrier.expect(bar, (KS - FROM) * cfg.BLOCK_BYTES)
    for i in gl.static_range(FROM, KS):
        k = kb + (i - FROM)
        place = slot * cfg.KS + i
        if cfg.TAIL:
            tma_load(a_desc, [a_plane, a_row, k * 128], bar, a_s.index(place * 2))
            tma_load(a_desc, [a_plane, a_row + cfg.A_BOX, k * 128], bar, a_s.index(place * 2 + 1), pred=whole)
        else:
            tma_load(a_desc, [a_plane, a_row, k * 128], bar, a_s.index(place))
        for j in gl.static_range(BOXES):
            tma_load(b_desc, [b_plane, b_row + j * cfg.B_BOX, k * 128], bar, b_s.index(place * BOXES + j))
        if cfg.A_SCALE_TMA:
            tma_load(sa_desc, [sa_row + k, sa_col], bar, sa_s.index(place))


# ---------------------------------------------------------------- scales
@gluon.jit
def of_lane(x):
    """x, as a value that could differ between lanes. What is loaded from an address that can't is wanted in a uniform register,
    and getting it there is to wait for it on the spot, in front of the sums."""
    return gl.inline_asm_elementwise("{ .reg .b32 m; mov.u32 m, %lanemask_lt; shr.u32 m, m, 31; add.u32 $0, $1, m; }", "=r,r",
                                     [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def scale_bases(scales, tile, N, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr):
    """Where this warpgroup's scales of a tile start: (A's, per row of piece 0, B's, one a piece along N). A tile may lie past N:
    clamped."""
    sa_ptr, sag, sam, sak, sb_ptr, sbg, sbn, sbk = scales
    n, g, first, end, stop = tile
    if cfg.LAYOUT == CONTIGUOUS:
        g = gl.where(g == NO_GROUP, 0, g)
    sb = ()
    NP: gl.constexpr = cfg.NP
    COUNT: gl.constexpr = 0 if cfg.FOLD else NP
    for i in gl.static_range(COUNT):
        block = gl.minimum((gl.maximum(n, 0) * cfg.BN + (WN * NP + i) * cfg.WN) // 128, (N - 1) // 128)
        if cfg.MP * NP > 1:
            block = of_lane(block)
        sb = sb + (sb_ptr + (g.to(gl.int64) * sbg + block.to(gl.int64) * sbn), )
    sa = sb_ptr             # stands in, where TMA brings A's
    if not cfg.A_SCALE_TMA:
        sa = sa_ptr + (first + WM * (cfg.MP * 64)).to(gl.int64) * sam
        if cfg.LAYOUT == MASKED:
            sa += g.to(gl.int64) * sag
    return sa, sb


@gluon.jit
def load_b_scales(bases, scales, kb, KB, cfg: gl.constexpr, INSIDE: gl.constexpr):
    """B's scales of K block kb, one a piece along N. Past the last block, unless it is known to be INSIDE: its scales again."""
    sa_ptr, sag, sam, sak, sb_ptr, sbg, sbn, sbk = scales
    out = ()
    NP: gl.constexpr = 0 if cfg.FOLD else cfg.NP
    for i in gl.static_range(NP):
        k = kb
        if not INSIDE:
            k = gl.minimum(kb, KB - 1)
        out = out + (as_float(gl.load(bases[i] + k * sbk)), )
    return out


@gluon.jit
def load_a_scales(base, scales, tile, M, kb, KB, cfg: gl.constexpr, WM: gl.constexpr, rows: gl.constexpr):
    """A's scales of one K block by plain loads, one vector a piece; rows past M are not read."""
    sa_ptr, sag, sam, sak, sb_ptr, sbg, sbn, sbk = scales
    n, g, first, end, stop = tile
    r = gl.arange(0, 64, rows)
    k = kb.to(gl.int64) * sak
    out = ()
    MP: gl.constexpr = cfg.MP
    for i in gl.static_range(MP):
        at = r + i * 64
        inside = (first + WM * (cfg.MP * 64) + at < M) & (n >= 0) & (kb < KB)
        out = out + (as_float(gl.load(base + (k + at.to(gl.int64) * sam), mask=inside, other=0)), )
    return out


@gluon.jit
def column_scales(scales, tile, col0, cfg: gl.constexpr, mma: gl.constexpr):
    """What the sums of WN columns from col0 are multiplied by, where B's scales are folded into its payload."""
    COLS: gl.constexpr = cfg.WN
    return folded_scales(scales, tile, col0 + fresh(gl.arange(0, COLS, gl.SliceLayout(0, mma))), cfg)


@gluon.jit
def folded_scales(scales, tile, col, cfg: gl.constexpr):
    """Those of columns `col`: sb_ptr holds E8M0 codes, sbg a group, for a payload of 2^6 times the value; sbn is a pointer to factors."""
    sa_ptr, sag, sam, sak, sb_ptr, sbg, sbn, sbk = scales
    n, g, first, end, stop = tile
    at = g.to(gl.int64) * sbg + col
    # a thread does this for 32 columns of a tile; the codes of rows are never that of NaN
    bits = gl.maximum(gl.load(sb_ptr + at, mask=col < sbg, other=0).to(gl.int32) << 23, 0x00400000)
    s = bits.to(gl.float32, bitcast=True) * 0.015625
    if cfg.FACTOR:
        s = s * gl.load(sbn + at, mask=col < sbg, other=0.0)
    return s


# ---------------------------------------------------------------- sums
@gluon.jit
def promotion_scale(sa, sb, i: gl.constexpr, cfg: gl.constexpr):
    """Of piece i's rows."""
    if cfg.SUB > 1:
        return sa
    elif cfg.FOLD:
        return sa[i // cfg.NP]
    else:
        return sa[i // cfg.NP] * sb[i % cfg.NP]


@gluon.jit
def promote(acc, p, s):
    """acc += p * s, a scale a row: one FMA an element."""
    s, p = gl.broadcast(gl.expand_dims(s, 1), p)
    return gl.fma(p, s, acc)


@gluon.jit
def scaled(p, s):
    s, p = gl.broadcast(gl.expand_dims(s, 1), p)
    return p * s


@gluon.jit
def fence(pending: gl.constexpr, acc, p):
    """Keeps a promotion in front of the wgmma that reuses p's registers; else its FMAs sink below and p is copied."""
    return warpgroup_mma_wait(pending, deps=(acc, p))


@gluon.jit
def multiply(a_v, b_v, place, p, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr, PIECE: gl.constexpr, PART: gl.constexpr = 0):
    """Start p = A . B^T over one K block, or one of its SUB parts; p comes in only to keep its registers. Pieces: along N first."""
    a = a_v.index(place * (cfg.WGM * cfg.MP) + block_of(cfg, WM, PIECE // cfg.NP))
    b = b_v.index(place * (cfg.WGN * cfg.NP) + WN * cfg.NP + PIECE % cfg.NP)
    if cfg.SUB > 1:
        a = a.slice(PART * (128 // cfg.SUB), 128 // cfg.SUB, 1)
        b = b.slice(PART * (128 // cfg.SUB), 128 // cfg.SUB, 1)
    b = b.permute((1, 0))
    return warpgroup_mma(a, b, p, use_acc=False, is_async=True)


@gluon.jit
def read_a_scale(sa_v, place, cfg: gl.constexpr, WM: gl.constexpr, PIECE: gl.constexpr, rows: gl.constexpr, PART: gl.constexpr = 0):
    return sa_v.index((place * cfg.SUB + PART) * (cfg.WGM * cfg.MP) + block_of(cfg, WM, PIECE)).load(rows)


# ---------------------------------------------------------------- store
@gluon.jit
def row_masks(index_ptr, row, G, tile, cfg: gl.constexpr):
    """(rows whose product is stored, rows that are written at all) of the vector `row`."""
    n, g, first, end, stop = tile
    mine = row < end
    if cfg.LAYOUT == OFFSETS:
        mine = mine & (row >= stop)
    written = mine
    if cfg.LAYOUT == CONTIGUOUS:
        ids = gl.load(index_ptr + row, mask=mine, other=0)
        mine = (ids == g) & mine
        written = mine
        if cfg.ZERO:
            written = mine | ((row < end) & ((ids < 0) | (ids >= G)))
    elif cfg.LAYOUT == PSUM:
        written = row < stop
    return mine, written


@gluon.jit
def output_pointers(out, tile, row, col, cfg: gl.constexpr):
    """Pointers of rows x columns; the row product in 64 bits."""
    out_ptr, og, om, pitch = out
    n, g, first, end, stop = tile
    base = out_ptr
    if cfg.LAYOUT == MASKED:
        base += g.to(gl.int64) * og
    return base + gl.expand_dims(row.to(gl.int64) * om, 1) + gl.expand_dims(col, 0)


@constexpr_function
def vector_layout(columns, element_bytes):
    """16 bytes a lane along the columns, 4 warps down the rows."""
    v = 16 // element_bytes
    lanes = min(32, columns // v)
    return gl.BlockedLayout([1, v], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.jit
def add_output(acc, out, index_ptr, tile, row0, col0, M, N, G, cfg: gl.constexpr, mma: gl.constexpr):
    """acc + what the output holds, where the row is this product's."""
    COLS: gl.constexpr = cfg.WN
    row = row0 + fresh(gl.arange(0, 64, gl.SliceLayout(1, mma)))
    col = col0 + gl.arange(0, COLS, gl.SliceLayout(0, mma))
    mine, written = row_masks(index_ptr, row, G, tile, cfg)
    ptrs = output_pointers(out, tile, row, col, cfg)
    mask = gl.expand_dims(mine, 1) & gl.expand_dims(col < N, 0)
    return acc + gl.load(ptrs, mask=mask, other=0).to(gl.float32)


@gluon.jit
def parts(acc, cfg: gl.constexpr):
    """acc in OUT_SPLIT parts along N. They are different registers of each thread: nothing moves."""
    if cfg.OUT_SPLIT == 1:
        return (acc, )
    else:
        gl.static_assert(cfg.OUT_SPLIT == 2)
        HALF: gl.constexpr = cfg.OUT_COLS
        lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
        left, right = gl.split(gl.permute(gl.reshape(acc, [64, 2, HALF]), (0, 2, 1)))
        return gl.convert_layout(left, lay, assert_trivial=True), gl.convert_layout(right, lay, assert_trivial=True)


@gluon.jit
def store_masked(buf, out, index_ptr, tile, row0, col0, M, N, G, cfg: gl.constexpr):
    """The rows of a staging buffer that are this product's, 16 bytes a lane, and zeros to padding."""
    COLS: gl.constexpr = cfg.OUT_COLS
    lay: gl.constexpr = vector_layout(cfg.OUT_COLS, cfg.OUT_BYTES)
    row = row0 + fresh(gl.arange(0, 64, gl.SliceLayout(1, lay)))
    col = col0 + gl.arange(0, COLS, gl.SliceLayout(0, lay))
    mine, written = row_masks(index_ptr, row, G, tile, cfg)
    v = buf.load(lay)
    if cfg.ZERO and (cfg.LAYOUT == CONTIGUOUS or cfg.LAYOUT == PSUM):
        keep, v = gl.broadcast(gl.expand_dims(mine, 1), v)
        v = gl.where(keep, v, gl.zeros_like(v))
    mask = gl.expand_dims(written, 1) & gl.expand_dims(col < N, 0)
    gl.store(output_pointers(out, tile, row, col, cfg), v, mask=mask)


@gluon.jit
def store_part(x, buf, d_desc, out, index_ptr, tile, row0, col0, M, N, G, cfg: gl.constexpr):
    """64 rows from row0: by TMA where all of them are the product's, else masked."""
    out_ptr, og, om, pitch = out
    n, g, first, end, stop = tile
    buf.store(x.to(out_ptr.dtype.element_ty))
    if not cfg.STORE_TMA:
        store_masked(buf, out, index_ptr, tile, row0, col0, M, N, G, cfg)
    elif cfg.LAYOUT == DENSE:
        fence_async_shared()
        tma_store(d_desc, [row0, col0], buf)
    else:
        whole = stop == 1
        shift = row0
        if cfg.LAYOUT != CONTIGUOUS:
            whole = row0 + 64 <= end
        if cfg.LAYOUT == OFFSETS:
            whole = whole & (row0 >= stop)
        if cfg.LAYOUT == MASKED:
            shift += g * pitch
        if whole:
            fence_async_shared()
            tma_store(d_desc, [shift, col0], buf)
        else:
            store_masked(buf, out, index_ptr, tile, row0, col0, M, N, G, cfg)


@gluon.jit
def store_zeros(out, tile, row0, col0, N, cfg: gl.constexpr):
    """A tile that is padding only."""
    out_ptr, og, om, pitch = out
    n, g, first, end, stop = tile
    lay: gl.constexpr = vector_layout(cfg.WN, cfg.OUT_BYTES)
    COLS: gl.constexpr = cfg.WN
    NP: gl.constexpr = cfg.NP
    PIECES: gl.constexpr = cfg.MP * NP
    for i in gl.static_range(PIECES):
        row = row0 + i // NP * 64 + fresh(gl.arange(0, 64, gl.SliceLayout(1, lay)))
        col = col0 + i % NP * COLS + gl.arange(0, COLS, gl.SliceLayout(0, lay))
        mask = gl.expand_dims(row < (end if cfg.LAYOUT == CONTIGUOUS else stop), 1) & gl.expand_dims(col < N, 0)
        gl.store(output_pointers(out, tile, row, col, cfg), gl.zeros([64, COLS], out_ptr.dtype.element_ty, lay), mask=mask)


@gluon.jit
def store_piece(x, i: gl.constexpr, of_columns, d_s, d_desc, out, problem, tile, row0, cfg: gl.constexpr, WM: gl.constexpr,
                WN: gl.constexpr, mma: gl.constexpr, NP: gl.constexpr, STEP: gl.constexpr):
    """Tensor i of a warpgroup's, NP to a piece, whose first row is row0; tiles start at multiples of STEP columns."""
    index_ptr, M, N, KB, G, alignment = problem
    SPLIT: gl.constexpr = cfg.OUT_SPLIT
    col0 = tile[0] * STEP + (WN * NP + i % NP) * cfg.WN
    if cfg.FOLD:
        x = x * gl.expand_dims(of_columns[i % NP], 0)
    if cfg.ACCUMULATE:
        x = add_output(x, out, index_ptr, tile, row0, col0, M, N, G, cfg, mma)
    part = parts(x, cfg)
    for j in gl.static_range(SPLIT):
        # the buffers take turns, and what was stored from one must have been read before it is written again. Only
        # TMA stores count, so where some parts leave otherwise, nothing less than all of them can be waited for
        if cfg.LAYOUT == DENSE and cfg.STORE_TMA:
            tma.store_wait(cfg.OUT_BUFFERS - 1)
        elif (i * SPLIT + j) % cfg.OUT_BUFFERS == 0:
            tma.store_wait(0)
        buf = d_s.index((WM * cfg.WGN + WN) * cfg.OUT_BUFFERS + (i * SPLIT + j) % cfg.OUT_BUFFERS)
        store_part(part[j], buf, d_desc, out, index_ptr, tile, row0, col0 + j * cfg.OUT_COLS, M, N, G, cfg)
