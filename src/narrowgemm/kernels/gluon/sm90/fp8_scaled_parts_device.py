"""Parts of the Hopper FP8 kernels with row-wise, tensor-wise or 1x128 x 1x128 scales: the ring of K blocks, scales, the store."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .fp8_block_parts_device import output_pointers, row_masks, store_masked, store_part, vector_layout
from .fp8_block_schedule_device import CONTIGUOUS, DENSE, MASKED, OFFSETS, fresh
from .shim import tma_add, tma_load


# ---------------------------------------------------------------- producer
@gluon.jit
def load_block(descs, rings, bar, slot, at, kb, cfg: gl.constexpr):
    """Fill a slot with K block kb; it arrives on `bar`. The tails of K, and of a tensor's last rows, are zeros."""
    a_desc, b0_desc, b1_desc = descs
    a_s, b0_s, b1_s = rings
    a_plane, a_row, b_plane, b_row = at
    mbarrier.expect(bar, cfg.BLOCK_BYTES)
    tma_load(a_desc, [a_plane, a_row, kb * cfg.BLOCK_K], bar, a_s.index(slot))
    tma_load(b0_desc, [b_plane, b_row, kb * cfg.BLOCK_K], bar, b0_s.index(slot))
    if cfg.COLS1 > 0:
        tma_load(b1_desc, [b_plane, b_row + cfg.COLS0, kb * cfg.BLOCK_K], bar, b1_s.index(slot))


# ---------------------------------------------------------------- scales and the store
LANES = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def fetch_scales(scales, tile, N, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr):
    """Scales of a warpgroup's rows and of its columns, 64 at a time: asked for in front of the sums, a register each until they are
    wanted behind: (rows, (64 columns, ...)). Scales of rows that aren't the tile's are not read."""
    sa_ptr, sag, sam, sb_ptr, sbg, sbn = scales
    n, g, first, end, stop = tile
    PARTS: gl.constexpr = cfg.WN // 64 if cfg.B_ROWS else 1
    sb_ptr += g.to(gl.int64) * sbg
    if cfg.LAYOUT == MASKED:
        sa_ptr += g.to(gl.int64) * sag
    i = gl.arange(0, 64, LANES)
    if cfg.A_ROWS:
        row = first + WM * 64 + i
        sa = gl.load(sa_ptr + row.to(gl.int64) * sam, mask=row < end, other=0)
    else:
        sa = gl.load(sa_ptr)
    sb = ()
    for j in gl.static_range(PARTS):
        if cfg.B_ROWS:
            col = n * cfg.BN + (WN * cfg.WN + j * 64) + i
            sb = sb + (gl.load(sb_ptr + col.to(gl.int64) * sbn, mask=(n >= 0) & (col < N), other=0), )
        else:
            sb = sb + (gl.load(sb_ptr), )
    return sa, sb


@gluon.jit
def apply_scales(x, fetched, cfg: gl.constexpr, mma: gl.constexpr, PART: gl.constexpr):
    """x [64, 64], part PART of the columns, times the scales of its rows and columns."""
    sa, sb = fetched
    if cfg.A_ROWS:
        sa, x = gl.broadcast(gl.expand_dims(gl.convert_layout(sa, gl.SliceLayout(1, mma)), 1), x)
        x = x * sa
    if cfg.B_ROWS:
        sb, x = gl.broadcast(gl.expand_dims(gl.convert_layout(sb[PART], gl.SliceLayout(0, mma)), 0), x)
        x = x * sb
    if not cfg.A_ROWS and not cfg.B_ROWS:
        x = x * (sa * sb[0])
    elif not cfg.A_ROWS:
        x = x * sa
    elif not cfg.B_ROWS:
        x = x * sb[0]
    return x


@gluon.jit
def held(out, index_ptr, tile, row0, col0, M, N, G, cfg: gl.constexpr, mma: gl.constexpr):
    """What 64 x 64 of the output hold, where the row is this product's."""
    row = row0 + fresh(gl.arange(0, 64, gl.SliceLayout(1, mma)))
    col = col0 + gl.arange(0, 64, gl.SliceLayout(0, mma))
    mine, written = row_masks(index_ptr, row, G, tile, cfg)
    mask = gl.expand_dims(mine, 1) & gl.expand_dims(col < N, 0)
    return gl.load(output_pointers(out, tile, row, col, cfg), mask=mask, other=0)


@gluon.jit
def store_tile(part, d_s, d_desc, out, fetched, problem, tile, cfg: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr,
               PIECE: gl.constexpr = 0):
    """`part`: the warpgroup's sums of a piece, 64 columns each; `fetched`: their scales."""
    index_ptr, M, N, KB, G, alignment = problem
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    n, g, first, end, stop = tile
    row0 = first + (WM * cfg.MP + PIECE) * 64
    col0 = n * cfg.BN + WN * cfg.WN
    PARTS: gl.constexpr = cfg.WN // 64
    before = part[0]
    if cfg.ACCUMULATE and not cfg.ADD_TMA:
        before = held(out, index_ptr, tile, row0, col0, M, N, G, cfg, mma)
    for j in gl.static_range(PARTS):
        col = col0 + j * 64
        x = part[j]
        if not cfg.BLOCKS:
            x = apply_scales(x, fetched, cfg, mma, j)
        if cfg.ACCUMULATE and not cfg.ADD_TMA:
            x += before.to(gl.float32)
            if j + 1 < PARTS:       # on its way while this part is stored
                before = held(out, index_ptr, tile, row0, col + 64, M, N, G, cfg, mma)
        # the buffers take turns, and what was stored from one must have been read before it is written again. Only TMA
        # stores count, so where some parts leave otherwise, nothing less than all of them can be waited for
        if cfg.LAYOUT == DENSE and cfg.STORE_TMA:
            tma.store_wait(cfg.OUT_BUFFERS - 1)
        elif j % cfg.OUT_BUFFERS == 0:
            tma.store_wait(0)
        buf = d_s.index((WM * cfg.WGN + WN) * cfg.OUT_BUFFERS + j % cfg.OUT_BUFFERS)
        if cfg.ADD_TMA:
            add_part(x, buf, d_desc, out, index_ptr, tile, row0, col, M, N, G, cfg, mma)
        else:
            store_part(x, buf, d_desc, out, index_ptr, tile, row0, col, M, N, G, cfg)


@gluon.jit
def add_part(x, buf, d_desc, out, index_ptr, tile, row0, col0, M, N, G, cfg: gl.constexpr, mma: gl.constexpr):
    """64 rows from row0 added to the FP32 output: in L2, by TMA, where all of them are the product's, so that nobody waits for what
    the output held."""
    out_ptr, og, om, pitch = out
    n, g, first, end, stop = tile
    whole = row0 + 64 <= end
    shift = row0
    if cfg.LAYOUT == DENSE:
        whole = row0 >= 0       # what lies outside of the tensor TMA leaves out
    if cfg.LAYOUT == CONTIGUOUS:
        whole = stop == 1
    if cfg.LAYOUT == OFFSETS:
        whole = whole & (row0 >= stop)
    if cfg.LAYOUT == MASKED:
        shift += g * pitch
    if whole:
        buf.store(x)
        fence_async_shared()
        tma_add(d_desc, [shift, col0], buf)
    else:
        buf.store(x + held(out, index_ptr, tile, row0, col0, M, N, G, cfg, mma))
        store_masked(buf, out, index_ptr, tile, row0, col0, M, N, G, cfg)


@gluon.jit
def store_padding(out, tile, row0, col0, N, cfg: gl.constexpr):
    """Zeros to a warpgroup's share of a tile that is padding only."""
    out_ptr, og, om, pitch = out
    n, g, first, end, stop = tile
    lay: gl.constexpr = vector_layout(cfg.OUT_COLS, cfg.OUT_BYTES)
    PARTS: gl.constexpr = cfg.WN // 64
    row = row0 + fresh(gl.arange(0, 64, gl.SliceLayout(1, lay)))
    for j in gl.static_range(PARTS):
        col = col0 + j * 64 + gl.arange(0, 64, gl.SliceLayout(0, lay))
        mask = gl.expand_dims(row < (end if cfg.LAYOUT == CONTIGUOUS else stop), 1) & gl.expand_dims(col < N, 0)
        gl.store(output_pointers(out, tile, row, col, cfg), gl.zeros([64, 64], out_ptr.dtype.element_ty, lay), mask=mask)
