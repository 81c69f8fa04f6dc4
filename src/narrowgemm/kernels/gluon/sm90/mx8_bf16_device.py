"""Device code of the Hopper kernel for MXFP8 weights as a checkpoint has them and 33 to 64 tokens: BF16 wgmma, one sum over K.

    out[m, n] = xfactor[m] * sum over k of X[m, k] * W[n, k] * 2^(sb[n, k / 32] - 127)

Operands are swapped: weight rows are wgmma's register operand, up to 64 to a consumer, brought to BF16 with their scale by shifts, masks
and one multiplication; tokens, which the launch in front brought to BF16 with theirs (`mx8_bf16_prep_device`), are its columns. So no sum
is scaled before the end. A K block with a scale that BF16 does not hold is summed by blocks of 32, each scaled in FP32 (`wild_block`).

A CTA has a tile, or a part of K of one, whose sums the blocks of a cluster add up. A tile has as many rows as give every SM as much to
read: boxes are as high as a consumer's rows, and sums of rows past them are of what lay there before, and not stored.

    before the warps part  first boxes of weights are asked for, and all codes of the tile's weights (cp.async)
    loader (1 warp)        TMA of weights and tokens, 128 of K a slot
    consumers (2 x 4)      expand half a K block of weights while the wgmma of the half before runs
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy as cp
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_wait

from . import cluster_device as cluster
from .fp8_decode_cluster_device import idle
from .fp8_decode_parts_device import store_tile
from .fp8_decode_schedule_device import advance
from .fp8_decode_sums_device import tile_layout
from .mx8_bf16_sums_device import (
    CONSUMERS, sums_layout, tokens_full, trip, weights_full, wild_block, wild_in)
from .mx8_decode_device import codes_of_bytes
from .mx8_decode_sums_device import X_PARAMETER
from .shim import copy_to_shared, view_as

KERNEL = gl.constexpr("mx8_bf16_kernel")
X_TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
W_TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2))
CODES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


# ---------------------------------------------------------------- loads
@gluon.jit
def ask_weights(w_desc, slot, row, kb, cfg: gl.constexpr, ALONE: gl.constexpr):
    """Ask for the weights of K block kb, each consumer's rows on their own."""
    bar = weights_full(slot, cfg)
    cluster.expect(bar, cfg.BN * 128, ALONE)
    to = cluster.start_of_shared() + (cfg.W_AT + slot * (CONSUMERS * 8192))
    for i in gl.static_range(CONSUMERS):
        cluster.load(w_desc, KERNEL, 0, (0, row + i * cfg.ROWS, kb * 128), bar, to + i * 8192, 1, ALONE, cfg.STREAM)


@gluon.jit
def ask_tokens(x_desc, slot, row, kb, cfg: gl.constexpr):
    """Ask for the tokens of K block kb, in BF16: two boxes of 64 columns."""
    bar = tokens_full(slot, cfg)
    cluster.expect(bar, cfg.BT * 256)
    to = cluster.start_of_shared() + slot * (cfg.BT * 256)
    for i in gl.static_range(2):
        cluster.load_rows(x_desc, KERNEL, X_PARAMETER, (row, kb * 128 + i * 64), bar, to + i * (cfg.BT * 128))


@gluon.jit
def loader(w_desc, x_desc, empty, w_row, x_row, k0, k1, cfg: gl.constexpr):
    """All tokens, and weights from the second round of the ring on."""
    gdc_wait()
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    for kb in range(k0, k1):
        mbarrier.wait(empty.index(slot), phase)
        if kb - k0 >= cfg.STAGES:
            ask_weights(w_desc, slot, w_row, kb, cfg, True)
        ask_tokens(x_desc, slot, x_row, kb, cfg)
        slot, phase = advance(slot, phase, cfg.STAGES)
    idle(cfg)


@gluon.jit
def ask_codes(ptr, row, stride, k0, trips, limit, shared, KB, cfg: gl.constexpr):
    """All codes of a tile's weight rows from `row` on, `limit` of which there are, on their way to `shared`, a consumer's of a trip together."""
    V: gl.constexpr = cfg.VEC
    W: gl.constexpr = 4 if V == 4 else 1
    lay: gl.constexpr = gl.BlockedLayout([1, W], [8 * W, 4 // W], [4, 1], [1, 0])
    r = gl.arange(0, 64, gl.SliceLayout(1, lay))
    c = gl.arange(0, 4, gl.SliceLayout(0, lay))
    for t in range(0, trips):
        kb = k0 + t * 4 + gl.expand_dims(c, 0)
        for i in gl.static_range(CONSUMERS):
            mine = r + i * cfg.ROWS
            live = gl.expand_dims((r < cfg.ROWS) & (mine < limit), 1) & (gl.expand_dims(c, 0) >= 0)
            at = (row + gl.expand_dims(mine, 1)).to(gl.int64) * stride
            to = shared.index(t * CONSUMERS + i)
            if V == 4:
                copy_to_shared(to, ptr + gl.multiple_of(at + kb, [1, 4]), mask=live & (k0 + t * 4 < KB))
            elif V == 1:
                copy_to_shared(to, ptr + (at + kb), mask=live & (kb < KB))
            else:
                to.store(codes_of_bytes(ptr + at, kb, 1, live & (kb < KB)))
    cp.commit_group()


# ---------------------------------------------------------------- a tile
@gluon.jit
def consumer(views, bars, ring, out_ptr, xfactor_ptr, where, N, som, blocks_here, cfg: gl.constexpr, CID: gl.constexpr):
    """blocks_here: K blocks that there are; whole trips of four are summed, zeros past them."""
    empty, ready = bars
    BT: gl.constexpr = cfg.BT
    mma: gl.constexpr = sums_layout(BT)
    w_row, x_row, live = where
    if CID == 0:
        cp.wait_group(0)
        mbarrier.arrive(ready.index(0), count=1)
    else:
        mbarrier.wait(ready.index(0), 0)
    trips = (blocks_here + 3) // 4
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    acc = gl.zeros([64, BT], gl.float32, mma)
    bad = gl.zeros([64, 8], gl.float32, tile_layout(8))
    col = w_row + CID * cfg.ROWS
    end = gl.minimum(N, col + cfg.ROWS)
    if wild_in(views, trips, blocks_here, end - col, cfg, CID) != 0:
        for t in range(0, trips):
            for i in range(0, 4):
                acc, bad, slot, phase = wild_block(acc, bad, slot, phase, t, i, views, empty, cfg, CID)
    else:
        for t in range(0, trips):
            acc, bad, slot, phase = trip(acc, bad, slot, phase, t, views, empty, cfg, CID)
    acc += gl.expand_dims(gl.convert_layout(gl.sum(bad, 1), gl.SliceLayout(1, mma)), 1)
    gdc_wait()
    if cfg.CLUSTER > 1:
        add_up(acc, ring, out_ptr, xfactor_ptr, (col, x_row, live), end, som, cfg, CID)
    else:
        tok = gl.arange(0, BT, gl.SliceLayout(0, mma))
        acc = acc * gl.expand_dims(gl.load(xfactor_ptr + x_row + tok, mask=tok < live, other=0.0), 0)
        store_tile(acc, out_ptr, (0, som), x_row * 0, x_row, live, col, end, 64, BT, cfg)


@gluon.jit
def columns_of(acc, BT: gl.constexpr):
    """[64, BT] as a tuple of [64, 32]: they are different registers of each thread, nothing moves."""
    if BT == 32:
        return (acc, )
    else:
        HALF: gl.constexpr = BT // 2
        a, b = gl.split(gl.permute(gl.reshape(acc, [64, 2, HALF]), (0, 2, 1)))
        return columns_of(a, HALF) + columns_of(b, HALF)


@gluon.jit
def add_up(acc, ring, out_ptr, xfactor_ptr, where, end, som, cfg: gl.constexpr, CID: gl.constexpr):
    """Sums of all blocks of the cluster, in the order of K, each block its share of the tokens. They are left where the consumer's own
    weights were, 32 tokens to a slot."""
    col, x_row, live = where
    BT: gl.constexpr = cfg.BT
    BLOCKS: gl.constexpr = cfg.CLUSTER
    SHARE: gl.constexpr = BT // cfg.CLUSTER
    FIRST: gl.constexpr = cfg.W_AT // 8192 + CID
    lay: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    staged = view_as(ring, gl.float32, cfg.W_AT // 8192 + cfg.STAGES * CONSUMERS, 64, 32, cluster.STAGED)
    part = columns_of(acc, BT)
    for i in gl.static_range(BT // 32):
        staged.index(FIRST + i * CONSUMERS).store(part[i])
    cluster.wait_all(BLOCKS)
    tok = cluster.rank() * SHARE + gl.arange(0, SHARE, gl.SliceLayout(1, lay))
    n = gl.arange(0, 64, gl.SliceLayout(0, lay))
    at = gl.expand_dims((FIRST + tok // 32 * CONSUMERS) * 8192, 1) + cluster.staged_at(gl.expand_dims(n, 0), gl.expand_dims(tok % 32, 1), 32)
    factor = gl.load(xfactor_ptr + x_row + tok, mask=tok < live, other=0.0)
    start = cluster.start_of_shared()
    parts = ()
    for i in gl.static_range(BLOCKS):
        parts = parts + (cluster.load_four(at + cluster.of_block(start, gl.to_tensor(i))), )
    cluster.arrive_all()
    y = parts[0]
    for i in gl.static_range(BLOCKS - 1):
        y += parts[i + 1]
    y = y * gl.expand_dims(factor, 1)
    ptrs = out_ptr + (x_row.to(gl.int64) * som + col) + gl.expand_dims(tok * som, 1) + gl.expand_dims(n, 0)
    mask = gl.expand_dims(tok < live, 1) & gl.expand_dims(n < end - col, 0)
    if cfg.KEEP:
        gl.store(ptrs, y.to(out_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_last")
    else:
        gl.store(ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)
    cluster.join_all()      # nobody leaves while another reads its sums


@gluon.jit(do_not_specialize=["M", "KB", "chunk", "swn"])
def mx8_bf16_kernel(w_desc, x_desc, sw_ptr, out_ptr, xfactor_ptr, M, N, KB, chunk, swn, som, cfg: gl.constexpr):
    """A cluster a tile of BN weight rows by BT tokens. KB: K blocks of 128, `chunk` of them a CTA, whole trips; sw: codes, whose rows are swn
    apart, four in an int32 or (VEC = 0) single ones."""
    S: gl.constexpr = cfg.STAGES
    ring = gl.allocate_shared_memory(gl.int8, [cfg.BARS // 128 + 2, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    s_s = gl.allocate_shared_memory(gl.int32, [cfg.TRIPS * CONSUMERS, 64, 4], CODES)
    z_s = gl.allocate_shared_memory(gl.float8e4nv, [8, 128], W_TILE)
    empty = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(S):
        cluster.init(weights_full(i, cfg), 1)
    fence_async_shared()
    pid = gl.program_id(0)
    tile = pid // cfg.CLUSTER
    k0 = (pid - tile * cfg.CLUSTER) * chunk
    blocks_here = gl.minimum(chunk, KB - k0)
    trips = gl.cdiv(blocks_here, 4)
    k1 = k0 + trips * 4         # past the end of K boxes are zeros
    num_m = gl.cdiv(M, cfg.BT)
    nb = tile // num_m
    x_row = (tile - nb * num_m) * cfg.BT
    w_row = nb * cfg.BN
    for i in range(0, gl.minimum(k1 - k0, S)):      # the first weights come while the launch in front brings the tokens
        ask_weights(w_desc, i, w_row, k0 + i, cfg, False)
    ask_codes(sw_ptr, w_row, swn, k0, trips, N - w_row, s_s, KB, cfg)
    for i in gl.static_range(S):
        cluster.init(tokens_full(i, cfg), 1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    mbarrier.init(ready.index(0), count=1)
    z_s.store(gl.zeros([8, 128], gl.float32, gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])).to(gl.float8e4nv))
    fence_async_shared()
    views = (view_as(ring, gl.bfloat16, 2 * S, cfg.BT, 64, X_TILE), view_as(ring, gl.uint8, cfg.W_AT // 8192 + S * CONSUMERS, 64, 128, W_TILE), s_s,
             view_as(ring, gl.float8e4nv, cfg.W_AT // 8192 + S * CONSUMERS, 64, 128, W_TILE), z_s)
    bars = (empty, ready)
    where = (w_row, x_row, gl.minimum(M - x_row, cfg.BT))
    R: gl.constexpr = cfg.CONSUMER_REGS
    L: gl.constexpr = cfg.LOADER_REGS
    # the first one is the default partition, whose warps are there; the others come in fours, and a wait for the cluster is for all of them
    if cfg.CLUSTER > 1:
        gl.warp_specialize([
            (consumer, (views, bars, ring, out_ptr, xfactor_ptr, where, N, som, blocks_here, cfg, 0)),
            (consumer, (views, bars, ring, out_ptr, xfactor_ptr, where, N, som, blocks_here, cfg, 1)),
            (loader, (w_desc, x_desc, empty, w_row, x_row, k0, k1, cfg)),
            (idle, (cfg, )),
            (idle, (cfg, )),
        ], [4, 1, 1, 2], [R, L, L, L])
    else:
        gl.warp_specialize([
            (consumer, (views, bars, ring, out_ptr, xfactor_ptr, where, N, som, blocks_here, cfg, 0)),
            (consumer, (views, bars, ring, out_ptr, xfactor_ptr, where, N, som, blocks_here, cfg, 1)),
            (loader, (w_desc, x_desc, empty, w_row, x_row, k0, k1, cfg)),
        ], [4, 1], [R, L])
