"""Device code of the Hopper kernel for MXFP8 weights as a checkpoint has them and few tokens: FP8 wgmma, a sum for each 32 of K.

    out[m, n] = sum over blocks j of 32 of K of  (A[m, j] . B[n, j]) * 2^(sa[m, j] - 127) * 2^(sb[n, j] - 127)

Operands are swapped, as in `fp8_decode_device`: weight rows are wgmma's 64 rows, 8 to 32 tokens its columns. One wgmma takes
32 of K, so a block's two scales meet its sum in registers: nothing is expanded and no launch is in front. A CTA has one
tile, or a part of K of one, whose sums the blocks of a cluster add up. A tile has BN of 64 rows, as many as give every SM
as much to read: boxes are as high as that, and sums of rows past it are of what lay there before, and not stored.

Boxes are asked for by PTX, for the sake of the policy that Gluon's copies don't take: L2 gives up first what no one reads
again. So the barriers of full slots are addresses, behind the rings (`full_at`).

    before the warps part  first boxes are asked for, and all codes of the tile's weights (cp.async)
    loader (1 warp)        TMA of BN weight rows and BT token rows, 128 of K a slot
    scaler (1 warp)        tokens' codes to powers of two, into the slot
    consumer (4 warps)     wgmma of a step, GROUP blocks, beside the sums of the one before; at the end transpose and store.
                           There may be two, which take K blocks in turn. Products of scales are kept within FP32; with
                           32 columns and more only where a code of a weight is above 127
"""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy as cp
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from . import cluster_device as cluster
from .fp8_decode_cluster_device import add_up, idle
from .fp8_decode_parts_device import store_tile
from .fp8_decode_schedule_device import advance
from .fp8_decode_sums_device import tile_layout
from .mx8_decode_sums_device import HIGH, ROWS, X_PARAMETER, columns_of, full_at, power, row_codes, sums
from .shim import copy_to_shared, touch, view_as

KERNEL = gl.constexpr("mx8_decode_kernel")
EARLY = gl.constexpr(4)             # K blocks that are asked for before the warps part
CODES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@constexpr_function
def token_codes(BT):
    """Of codes int32 [BT, 4] in one warp."""
    lanes = [[1, 0], [2, 0], [4, 0], [8, 0] if BT > 8 else [0, 0], [16, 0] if BT > 16 else [0, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2]], lanes, [], [], [BT, 4])


@gluon.jit
def fill(w_desc, x_desc, slot, w_row, x_row, kb, cfg: gl.constexpr, ALONE: gl.constexpr):
    """Ask for K block kb."""
    bar = full_at(slot, cfg)
    to = cluster.start_of_shared()
    cluster.expect(bar, (cfg.BN + cfg.BT) * 128, ALONE)
    cluster.load(w_desc, KERNEL, 0, (0, w_row, kb * 128), bar, to + slot * (ROWS * 128), 1, ALONE, cfg.STREAM)
    cluster.load(x_desc, KERNEL, X_PARAMETER, (0, x_row, kb * 128), bar, to + (cfg.X_AT + slot) * (cfg.BT * 128), 1, ALONE)


@gluon.jit
def loader(w_desc, x_desc, bars, w_row, x_row, k0, blocks, cfg: gl.constexpr):
    """K blocks from EARLY on, of which a ring of as many slots has come round already."""
    empty, ready = bars
    slot = gl.to_tensor(EARLY % cfg.STAGES)
    phase = gl.to_tensor(1 - EARLY // cfg.STAGES)
    for kb in range(EARLY, blocks):
        mbarrier.wait(empty.index(slot), phase)
        fill(w_desc, x_desc, slot, w_row, x_row, k0 + kb, cfg, True)
        slot, phase = advance(slot, phase, cfg.STAGES)
    idle(cfg)


@gluon.jit
def ask_codes(ptr, row, stride, k0, trips, limit, shared, KB, cfg: gl.constexpr):
    """All codes of a tile's weight rows from `row` on, `limit` of which there are, on their way to `shared`."""
    R: gl.constexpr = ROWS
    V: gl.constexpr = cfg.VEC
    W: gl.constexpr = 4 if V == 4 else 1
    lay: gl.constexpr = gl.BlockedLayout([1, W], [8 * W, 4 // W], [4, 1], [1, 0])
    r = gl.arange(0, R, gl.SliceLayout(1, lay))
    c = gl.arange(0, 4, gl.SliceLayout(0, lay))
    live = gl.expand_dims(r < limit, 1) & gl.expand_dims(c >= 0, 0)
    at = (row + gl.expand_dims(r, 1)).to(gl.int64) * stride
    for t in range(0, trips):
        kb = k0 + t * 4 + gl.expand_dims(c, 0)
        if V == 4:
            copy_to_shared(shared.index(t), ptr + gl.multiple_of(at + kb, [1, 4]), mask=live & (k0 + t * 4 < KB))
        elif V == 1:
            copy_to_shared(shared.index(t), ptr + (at + kb), mask=live & (kb < KB))
        else:
            shared.index(t).store(codes_of_bytes(ptr + at, kb, 1, live & (kb < KB)))
    cp.commit_group()


@gluon.jit
def codes_of_bytes(ptrs, kb, stride, live):
    """The four codes of K blocks kb in an int32 each, `stride` apart; zero where not `live`."""
    codes = live.to(gl.int32) * 0
    for j in gl.static_range(4):
        codes |= gl.load(ptrs + (kb * 4 + j).to(gl.int64) * stride, mask=live, other=0).to(gl.int32) << (8 * j)
    return codes


@gluon.jit
def token_trip(ptr, strides, row, limit, kb, KB, cfg: gl.constexpr):
    """Codes [BT, 4] of the tokens from `row` on, `limit` of which there are, and of four K blocks from kb on."""
    BT: gl.constexpr = cfg.BT
    sxm, sxk = strides
    lay: gl.constexpr = token_codes(BT)
    r = gl.arange(0, BT, gl.SliceLayout(1, lay))
    k = kb + gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, lay)), 0)
    live = gl.expand_dims(r < limit, 1) & (k < KB)
    at = (row + gl.expand_dims(r, 1)).to(gl.int64) * sxm
    if cfg.FOURS:
        return gl.load(ptr + (at + k), mask=live, other=0)
    else:
        return codes_of_bytes(ptr + at, k, sxk, live)


@gluon.jit
def touch_codes(ptr, strides, row, limit, k0, trips, KB, cfg: gl.constexpr):
    """Have L2 fetch all codes of the tokens: trips are not far enough ahead of their use for memory."""
    sxm, sxk = strides
    last = gl.minimum(k0 + trips * 4, KB)
    if cfg.FOURS:       # a row's are next to each other, in int32
        lay: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, 1], [1, 0])
        r = gl.minimum(gl.arange(0, cfg.BT, gl.SliceLayout(1, lay)), limit - 1)
        k = gl.minimum(k0 + gl.arange(0, 32, gl.SliceLayout(0, lay)) * 32, last - 1)
        touch(ptr + ((row + gl.expand_dims(r, 1)).to(gl.int64) * sxm + gl.expand_dims(k, 0)))
    else:               # those of the first row are enough where rows are next to each other
        lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
        first = ptr + row.to(gl.int64) * sxm
        for i in range(k0 * 4, last * 4, 32):
            touch(first + gl.minimum(i + lane, last * 4 - 1).to(gl.int64) * sxk)


@gluon.jit
def scaler(ptr, strides, row, k0, trips, limit, s_s, bars, KB, cfg: gl.constexpr):
    """2^(c - 127) of the tokens' codes into every slot, NaN for 255. Loads run two trips ahead, single ones one: registers."""
    empty, ready = bars
    if cfg.TRIPS > 4:       # of shorter K, trips' own loads are soon enough
        touch_codes(ptr, strides, row, limit, k0, trips, KB, cfg)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    here = token_trip(ptr, strides, row, limit, k0, KB, cfg)
    ahead = here
    if cfg.FOURS:
        ahead = token_trip(ptr, strides, row, limit, k0 + 4, KB, cfg)
    for t in range(0, trips):
        later = token_trip(ptr, strides, row, limit, k0 + t * 4 + (8 if cfg.FOURS else 4), KB, cfg)
        u = columns_of(here)
        for i in gl.static_range(4):
            mbarrier.wait(empty.index(slot), phase)
            for j in gl.static_range(4):
                x = power(u[i], j)
                s_s.index(slot * 4 + j).store(gl.where(x == float("inf"), float("nan"), x))
            cluster.arrive_once(full_at(slot, cfg))
            slot, phase = advance(slot, phase, cfg.STAGES)
        if cfg.FOURS:
            here = ahead
            ahead = later
        else:
            here = later
    idle(cfg)


@gluon.jit
def consumer(s_s, w_codes, other, bars, out_ptr, ring, where, end, som, trips, cfg: gl.constexpr, CID: gl.constexpr):
    """Sums of the tile's K blocks, of every second one where there are two consumers; the first stores."""
    empty, ready = bars
    BT: gl.constexpr = cfg.BT
    w_v = view_as(ring, gl.float8e4nv, cfg.STAGES, ROWS, 128, gl.NVMMASharedLayout.get_default_for([64, 128], gl.float8e4nv))
    x_v = view_as(ring, gl.float8e4nv, cfg.X_AT + cfg.STAGES, BT, 128,
                  gl.NVMMASharedLayout.get_default_for([BT, 128], gl.float8e4nv))
    views = (w_v, x_v)
    if CID == 0:
        cp.wait_group(0)
        if cfg.CONSUMERS > 1:
            mbarrier.arrive(ready.index(0), count=1)
    else:
        mbarrier.wait(ready.index(0), 0)
    if BT >= 32:
        codes = gl.zeros([64, 4], gl.int32, row_codes())
        for t in range(0, trips):
            codes |= w_codes.index(t).load(row_codes())
        wild = gl.max(gl.max(((codes & HIGH) != 0).to(gl.int32), 1), 0)
        if wild == 0:
            acc = sums(views, s_s, w_codes, bars, trips, 1, cfg, CID)
        else:
            acc = sums(views, s_s, w_codes, bars, trips, 0, cfg, CID)
    else:
        acc = sums(views, s_s, w_codes, bars, trips, 0, cfg, CID)
    if CID > 0:
        other.store(acc)
        mbarrier.arrive(ready.index(1), count=1)
        idle(cfg)
    else:
        if cfg.CONSUMERS > 1:
            mbarrier.wait(ready.index(1), 0)
            acc += other.load(tile_layout(BT))
        if cfg.CLUSTER > 1:
            add_up(acc, ring, out_ptr, (0, som), where, end, cfg)
        else:
            g, row, live, nb = where
            store_tile(acc, out_ptr, (0, som), g, row, live, nb * cfg.BN, end, ROWS, BT, cfg)


@gluon.jit(do_not_specialize=["M", "KB", "swn", "sxm", "sxk"])
def mx8_decode_kernel(w_desc, x_desc, out_ptr, sw_ptr, sx_ptr, M, N, KB, chunk, swn, sxm, sxk, som, cfg: gl.constexpr):
    """A cluster a tile of BN weight rows by BT tokens. KB: K blocks of 128, `chunk` of them a block, whole trips; sw, sx: codes,
    whose rows are swn and sxm apart; four in an int32, or (VEC = 0, not FOURS) single ones, A's with sxk from one to the next."""
    S: gl.constexpr = cfg.STAGES
    ring = gl.allocate_shared_memory(gl.int8, [S * (ROWS + cfg.BT) + 1, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    s_s = gl.allocate_shared_memory(gl.float32, [S * 4, cfg.BT], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    w_codes = gl.allocate_shared_memory(gl.int32, [cfg.TRIPS, ROWS, 4], CODES)
    other = s_s
    if cfg.CONSUMERS > 1:       # sums of the second consumer
        other = gl.allocate_shared_memory(gl.float32, [ROWS, cfg.BT], CODES)
    empty = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())      # codes of weights; the second's sums
    for i in gl.static_range(EARLY):
        cluster.init(full_at(i, cfg), 2)
    fence_async_shared()
    pid = gl.program_id(0)
    tile = pid // cfg.CLUSTER
    part = pid - tile * cfg.CLUSTER
    num_m = gl.cdiv(M, cfg.BT)
    nb = tile // num_m
    row = (tile - nb * num_m) * cfg.BT
    k0 = part * chunk
    trips = gl.maximum(gl.cdiv(gl.minimum(chunk, KB - k0), 4 * cfg.CONSUMERS) * cfg.CONSUMERS, 0)
    blocks = trips * 4          # past the end of K boxes are zeros
    for i in range(0, gl.minimum(blocks, EARLY)):
        fill(w_desc, x_desc, i, nb * cfg.BN, row, k0 + i, cfg, False)
    end = gl.minimum(N, nb * cfg.BN + cfg.BN)
    ask_codes(sw_ptr, nb * cfg.BN, swn, k0, trips, end - nb * cfg.BN, w_codes, KB, cfg)
    for i in gl.static_range(S):
        if i >= EARLY:
            cluster.init(full_at(i, cfg), 2)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    bars = (empty, ready)
    where = (tile * 0, row, gl.minimum(M - row, cfg.BT), nb)
    R: gl.constexpr = cfg.LOADER_REGS
    C: gl.constexpr = cfg.CONSUMER_REGS
    if cfg.CONSUMERS > 1:
        if cfg.CLUSTER > 1:
            gl.warp_specialize([
                (consumer, (s_s, w_codes, other, bars, out_ptr, ring, where, end, som, trips, cfg, 0)),
                (consumer, (s_s, w_codes, other, bars, out_ptr, ring, where, end, som, trips, cfg, 1)),
                (idle, (cfg, )),
                (loader, (w_desc, x_desc, bars, nb * cfg.BN, row, k0, blocks, cfg)),
                (scaler, (sx_ptr, (sxm, sxk), row, k0, trips, M - row, s_s, bars, KB, cfg)),
            ], [4, 2, 1, 1], [C, R, R, R])
        else:
            gl.warp_specialize([
                (consumer, (s_s, w_codes, other, bars, out_ptr, ring, where, end, som, trips, cfg, 0)),
                (consumer, (s_s, w_codes, other, bars, out_ptr, ring, where, end, som, trips, cfg, 1)),
                (loader, (w_desc, x_desc, bars, nb * cfg.BN, row, k0, blocks, cfg)),
                (scaler, (sx_ptr, (sxm, sxk), row, k0, trips, M - row, s_s, bars, KB, cfg)),
            ], [4, 1, 1], [C, R, R])
    elif cfg.CLUSTER > 1:
        gl.warp_specialize([
            (consumer, (s_s, w_codes, other, bars, out_ptr, ring, where, end, som, trips, cfg, 0)),
            (idle, (cfg, )),
            (loader, (w_desc, x_desc, bars, nb * cfg.BN, row, k0, blocks, cfg)),
            (scaler, (sx_ptr, (sxm, sxk), row, k0, trips, M - row, s_s, bars, KB, cfg)),
        ], [2, 1, 1], [R, R, R])
    else:
        gl.warp_specialize([
            (consumer, (s_s, w_codes, other, bars, out_ptr, ring, where, end, som, trips, cfg, 0)),
            (loader, (w_desc, x_desc, bars, nb * cfg.BN, row, k0, blocks, cfg)),
            (scaler, (sx_ptr, (sxm, sxk), row, k0, trips, M - row, s_s, bars, KB, cfg)),
        ], [1, 1], [R, R])
