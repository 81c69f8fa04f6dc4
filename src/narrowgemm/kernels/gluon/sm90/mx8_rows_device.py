"""Device code of the Hopper kernel for MXFP8 weights as a checkpoint has them and 33 to 64 tokens: FP8 wgmma, a sum for each 32 of K.

    out[m, n] = sum over blocks j of 32 of K of  (A[m, j] . B[n, j]) * 2^(sa[m, j] - 127) * 2^(sb[n, j] - 127)

Tokens are wgmma's 64 rows, weight rows its columns: any multiple of 8, as many as give every SM as much to read and to add up.

    loader (1 warp)        TMA of weights and tokens, 128 of K a slot
    scalers (2 warps)      codes of weights, and of tokens, to powers of two, into the slot
    consumers (2 x 4)      take K blocks in turn; the first one adds up and stores
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from . import cluster_device as cluster
from .fp8_decode_cluster_device import idle
from .fp8_decode_schedule_device import advance
from .fp8_decode_sums_device import tile_layout
from .mx8_decode_sums_device import X_PARAMETER
from .mx8_rows_scales_device import token_scaler, touch_codes, weight_scaler
from .mx8_rows_sums_device import EACH, add_block, add_up, empty_at, full_at, put, wild_at, zeros
from .shim import view_as, view_rows

KERNEL = gl.constexpr("mx8_rows_kernel")
EARLY = gl.constexpr(4)             # K blocks that are asked for before the warps part
LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


# ---------------------------------------------------------------- loads
@gluon.jit
def fill(w_desc, x_desc, slot, w_row, x_row, kb, cfg: gl.constexpr, ALONE: gl.constexpr):
    """Ask for K block kb."""
    bar = full_at(slot, cfg)
    start = cluster.start_of_shared()
    cluster.expect(bar, (cfg.BN + 64) * 128, ALONE)
    cluster.load(w_desc, KERNEL, 0, (0, w_row, kb * 128), bar, start + (cfg.W_AT + slot * (cfg.BN * 128)), 1, ALONE, cfg.STREAM)
    cluster.load(x_desc, KERNEL, X_PARAMETER, (0, x_row, kb * 128), bar, start + slot * 8192, 1, ALONE)


@gluon.jit
def loader(w_desc, x_desc, w_row, x_row, k0, blocks, cfg: gl.constexpr):
    """K blocks from EARLY on, of which a ring of as many slots has come round already."""
    slot = gl.to_tensor(EARLY % cfg.STAGES)
    phase = gl.to_tensor(1 - EARLY // cfg.STAGES)
    for kb in range(EARLY, blocks):
        cluster.wait(empty_at(slot, cfg), phase, 1)
        fill(w_desc, x_desc, slot, w_row, x_row, k0 + kb, cfg, True)
        slot, phase = advance(slot, phase, cfg.STAGES)
    idle(cfg)


# ---------------------------------------------------------------- a tile
@gluon.jit
def consumer(powers, s_x, sums, ring, ready, out_ptr, where, N, som, blocks, cfg: gl.constexpr, CID: gl.constexpr):
    """Sums of every CONSUMERS-th K block from the CID-th on; the first consumer adds up the others' and stores."""
    w_row, x_row, live = where
    C: gl.constexpr = cfg.CONSUMERS
    P: gl.constexpr = cfg.PARTS
    start = cluster.start_of_shared()
    empty = cluster.everywhere(empty_at(0, cfg), 1)
    acc = zeros(cfg)
    slot = gl.to_tensor(CID)
    phase = gl.to_tensor(0)
    for kb in range(CID, blocks, C):
        cluster.wait(full_at(slot, cfg), phase, 1)
        at = (start + slot * 8192, start + (cfg.W_AT + slot * (cfg.BN * 128)))
        if cluster.word(wild_at(slot, cfg)) == 0:
            acc = add_block(acc, slot, at, powers, s_x, False, cfg)
        else:
            acc = add_block(acc, slot, at, powers, s_x, True, cfg)
        cluster.arrive(empty + slot * 8, 1)
        slot += C
        wrap = slot >= cfg.STAGES
        slot = gl.where(wrap, slot - cfg.STAGES, slot)
        phase = gl.where(wrap, phase ^ 1, phase)
    if CID > 0:
        for i in gl.static_range(P):
            sums.index((CID - 1) * P + i).store(acc[i])
        mbarrier.arrive(ready.index(CID - 1), count=1)
        idle(cfg)
    else:
        mma: gl.constexpr = tile_layout(8)
        for c in gl.static_range(C - 1):
            mbarrier.wait(ready.index(c), 0)
        tile = ()
        for i in gl.static_range(P):
            y = acc[i]
            for c in gl.static_range(C - 1):
                y += sums.index(c * P + i).load(mma)
            tile = tile + (y, )
        if cfg.CLUSTER > 1:
            add_up(tile, ring, out_ptr, where, N, som, cfg)
        else:
            tok = gl.arange(0, 64, gl.SliceLayout(1, mma))
            n = gl.arange(0, 8, gl.SliceLayout(0, mma))
            for i in gl.static_range(P):
                put(tile[i], out_ptr, tok, gl.expand_dims(n + i * 8, 0), where, N, som, cfg)


@gluon.jit(do_not_specialize=["M", "KB", "chunk", "swn", "sxm", "sxk"])
def mx8_rows_kernel(w_desc, x_desc, out_ptr, sw_ptr, sx_ptr, M, N, KB, chunk, swn, sxm, sxk, som, cfg: gl.constexpr):
    """A CTA a tile of 64 tokens by BN weight rows. KB: K blocks of 128; sw, sx: codes, whose rows are swn and sxm apart."""
    S: gl.constexpr = cfg.STAGES
    ring = gl.allocate_shared_memory(gl.int8, [cfg.BARS // 128 + 4, 128], LINE)
    sums = gl.allocate_shared_memory(gl.float32, [(cfg.CONSUMERS - 1) * cfg.PARTS, 64, 8], EACH)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    pid = gl.program_id(0)
    tile = pid // cfg.CLUSTER
    k0 = (pid - tile * cfg.CLUSTER) * chunk
    num_m = gl.cdiv(M, 64)
    nb = tile // num_m
    x_row = (tile - nb * num_m) * 64
    w_row = nb * cfg.BN
    trips = gl.maximum(gl.cdiv(gl.minimum(chunk, KB - k0), 4), 0)
    blocks = trips * 4          # past the end of K boxes are zeros
    limit = gl.minimum(N - w_row, cfg.BN)
    touch_codes(sw_ptr, swn, w_row, limit, sx_ptr, (sxm, sxk), x_row, M, k0, chunk, KB, cfg)
    cluster.init_many(full_at(0, cfg), 3, S)
    cluster.init_many(empty_at(0, cfg), 4, S)
    fence_async_shared()
    for i in range(0, gl.minimum(blocks, EARLY)):
        fill(w_desc, x_desc, i, w_row, x_row, k0 + i, cfg, False)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    where = (w_row, x_row, gl.minimum(M - x_row, 64))
    main = view_rows(ring, gl.float32, cfg.MAIN_AT // (cfg.MAIN * 4) + S * 4, cfg.MAIN, LINE)
    rest = main
    if cfg.REST > 0:
        rest = view_rows(ring, gl.float32, cfg.REST_AT // (cfg.REST * 4) + S * 4, cfg.REST, LINE)
    s_x = view_rows(ring, gl.float32, cfg.SX_AT // 256 + S * 4, 64, LINE)
    s_x4 = s_x
    if cfg.TOKEN_CODES == 2:
        s_x4 = view_as(ring, gl.float32, cfg.SX_AT // 1024 + S, 4, 64, EACH)
    own = (main, rest)
    pieces = view_rows(ring, gl.float32, cfg.BARS // 32, 8, LINE)
    R: gl.constexpr = cfg.CONSUMER_REGS
    L: gl.constexpr = cfg.LOADER_REGS
    gl.warp_specialize([
        (consumer, (pieces, s_x, sums, ring, ready, out_ptr, where, N, som, blocks, cfg, 0)),
        (consumer, (pieces, s_x, sums, ring, ready, out_ptr, where, N, som, blocks, cfg, 1)),
        (loader, (w_desc, x_desc, w_row, x_row, k0, blocks, cfg)),
        (weight_scaler, (sw_ptr, swn, w_row, limit, k0, trips, own, KB, cfg)),
        (token_scaler, (sx_ptr, (sxm, sxk), x_row, M, k0, trips, s_x, s_x4, KB, cfg)),
        (idle, (cfg, )),        # warps come in fours, and a wait for the cluster is for all of them
    ], [4, 1, 1, 1, 1], [R, L, L, L, L])
