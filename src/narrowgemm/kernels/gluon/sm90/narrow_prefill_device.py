"""Device code of the Hopper prefill kernel for narrow weights: many tokens by MXFP4 or MXFP8 weights that were prepacked.

    sum[slot, n] = factor[e, n] * xfactor[row] * sum over k of A[row, k] * W[e, n, k]         row = slot // a_div
    out[slot, n] = routing_weight[slot] * activation(sum[slot, n] + bias[e, n])

Operands are swapped: weights are wgmma's register operand, expanded to BF16 on the way, tokens its columns in shared memory. The
launch in front (`narrow_prefill_prep_device`) brought A to BF16, gathered, in the order of positions, and listed the entries:
(expert, first position, at most BT tokens). FP32 scales of tokens, one for 128 of K, have no place in BF16: the sums are kept in
units of the K block's scale, and are multiplied by scale / next scale before the next one is added. They take no more registers.
FP8 tokens with weights that were packed for them stay FP8: `narrow_fp8_device`, `narrow_columns_device`.

    warps            does, for every tile of its block
    producer (1)     TMA of tokens, weights and scales into a ring of shared memory, 128 of K a slot
    consumers (2x4,  expands 64 rows of weights while the wgmma of the K block before runs, multiplies; stores
      or 3x4)

A tile's width follows its tokens: each width of `cfg.WIDTHS` is a loop of its own. Tiles of an entry lie side by side in the
grid, so that blocks that run at the same time share their tokens through L2.
"""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_wait

from .fp8_block_parts_device import ROW_OF_FLOATS, advance
from .fp8_block_schedule_device import ROW_OF_INTS
from .fold_expand_device import lane_table
from .narrow_columns_device import first_turn, joined, last_turn, opaque, products16, products_of_all, zeros
from .narrow_entries_device import sum_up
from .narrow_fp8_device import products8
from .narrow_prefill_parts_device import PLANES, RATIO_TILE, X8_TILE, X_TILE, boxes_of, finish, load_activations, load_weights, products, rows_vectors
from .narrow_prefill_tiles_device import announce, entries, next_tile, number_after, tile_at, tops_of
from .shim import view_rows


@gluon.jit
def takes(rows, cfg: gl.constexpr, I: gl.constexpr):
    """Whether a tile of `rows` tokens runs at width I."""
    above = rows > 0
    if I > 0:
        above = rows > cfg.WIDTHS[I - 1][0] + cfg.WIDTHS[I - 1][1]
    return above & (rows <= cfg.WIDTHS[I][0] + cfg.WIDTHS[I][1])


@gluon.jit
def producer(descs, rings, bars, table, table_ptr, count_ptr, sizes, cfg: gl.constexpr):
    full, empty = bars
    KC, NT, N, R, cap, G = sizes
    num_n = gl.cdiv(NT, cfg.UNITS)
    sums, count = entries(table, table_ptr, cfg, 1)
    total = count * num_n
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    t = gl.program_id(0)
    e, n, first, rows = tile_at(t, total, num_n, sums, table_ptr, G, cap, cfg, 1)
    boxes = (KC + (cfg.BOX - 1)) // cfg.BOX
    asked = gl.to_tensor(0)
    made = gl.to_tensor(0)
    if cfg.AHEAD:       # the first weights come while the launch in front brings the tokens
        if rows > 0:
            asked = gl.minimum(boxes, cfg.STAGES)
        for kb in range(asked):
            load_weights(descs, rings, full, kb, e * NT + n * cfg.UNITS, kb, cfg)
        gdc_wait()
    while rows > 0:
        t = number_after(t, made, total, count_ptr)
        # the next tile is looked up first, so that its loads are off the path between two tiles
        ahead = tile_at(t, total, num_n, sums, table_ptr, G, cap, cfg, 1)
        unit = e * NT + n * cfg.UNITS
        made += 1
        announce(made, ahead, cfg)
        for kb in range(boxes):
            mbarrier.wait(empty.index(slot), phase)
            if cfg.AHEAD:
                if kb >= asked:
                    load_weights(descs, rings, full, slot, unit, kb, cfg)
            else:
                load_weights(descs, rings, full, slot, unit, kb, cfg)
            for i in gl.static_range(len(cfg.WIDTHS)):
                if takes(rows, cfg, i):
                    load_activations(descs, rings, full, slot, first, kb, cfg, cfg.WIDTHS[i][0], cfg.WIDTHS[i][1])
            slot, phase = advance(slot, phase, cfg.STAGES)
        asked = gl.to_tensor(0)
        e, n, first, rows = ahead


@gluon.jit
def of_tokens(slots_ptr, xfactor_ptr, weight_ptr, first, rows, cfg: gl.constexpr):
    """(slots, factors, routing weights) of a tile's tokens."""
    lane: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i = gl.arange(0, cfg.TP, lane)
    slots = i
    xfactors = i.to(gl.float32)
    weights = xfactors
    if cfg.SLOTS:
        slots = gl.load(slots_ptr + first + i, mask=i < rows, other=-1)
    if cfg.XFACTOR:
        xfactors = gl.load(xfactor_ptr + first + i, mask=i < rows, other=0.0)
    if cfg.WEIGHT:
        weights = gl.load(weight_ptr + first + i, mask=i < rows, other=0.0)
    return slots, xfactors, weights


@gluon.jit
def keep(found, vectors, cfg: gl.constexpr):
    """Those to shared memory."""
    if cfg.SLOTS:
        vectors[0].store(found[0])
    if cfg.XFACTOR:
        vectors[1].store(found[1])
    if cfg.WEIGHT:
        vectors[2].store(found[2])


@gluon.jit
def run_tile(slot, phase, rings, bars, buf, vectors, pointers, tile, made, tops, sizes, cfg: gl.constexpr, WG: gl.constexpr,
             P0: gl.constexpr, P1: gl.constexpr):
    """Sum and store one tile of up to P0 + P1 tokens: (slot, phase, the next tile, its tops)."""
    KC, NT, N, R, cap, G = sizes
    out_ptr, om, slots_ptr, factor_ptr, xfactor_ptr, bias_ptr, weight_ptr, top_ptr = pointers
    e, n, first, rows = tile
    MP: gl.constexpr = cfg.MP
    # what the epilogue needs is loaded ahead of the sums
    found = of_tokens(slots_ptr, xfactor_ptr, weight_ptr, first, rows, cfg)
    unit = n * cfg.UNITS + WG * MP
    of_rows = ()
    for j in gl.static_range(MP):
        of_rows = of_rows + (rows_vectors(factor_ptr, bias_ptr, top_ptr, e, unit + j, NT, N, cfg), )
    if cfg.FP8:
        sums, slot, phase = products8(slot, phase, KC, tops, rings, bars, cfg, WG, P0, P1)
    else:
        sums, slot, phase = products(slot, phase, KC, rings, bars, cfg, WG, P0, P1)
    ahead, tops = next_tile(made, top_ptr, NT, cfg, WG)
    keep(found, vectors, cfg)
    for j in gl.static_range(MP):
        finish(sums[j], buf, vectors, of_rows[j], (out_ptr, om), tile, unit + j, (N, R), cfg, P0, 0)
        if P1 > 0:
            finish(sums[MP + j], buf, vectors, of_rows[j], (out_ptr, om), tile, unit + j, (N, R), cfg, P1, P0)
    return slot, phase, ahead, tops


@gluon.jit
def consumer(rings, bars, buf, vectors, pointers, table, table_ptr, sizes, cfg: gl.constexpr, WG: gl.constexpr):
    """Units [WG * MP, +MP) of every tile."""
    KC, NT, N, R, cap, G = sizes
    num_n = gl.cdiv(NT, cfg.UNITS)
    sums, count = entries(table, table_ptr, cfg, 4)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    made = gl.to_tensor(0)
    e, n, first, rows = tile_at(gl.program_id(0), count * num_n, num_n, sums, table_ptr, G, cap, cfg, 4)
    tops = ()
    if cfg.FP8:
        tops = tops_of(pointers[7], e, n, NT, cfg, WG)
    if cfg.AHEAD and (cfg.WEIGHT or cfg.XFACTOR):
        gdc_wait()
    while rows > 0:
        tile = (e, n, first, rows)
        ahead = tile
        made += 1
        for i in gl.static_range(len(cfg.WIDTHS)):
            if takes(rows, cfg, i):
                slot, phase, ahead, tops = run_tile(slot, phase, rings, bars, buf, vectors, pointers, tile, made, tops, sizes, cfg, WG,
                                                    cfg.WIDTHS[i][0], cfg.WIDTHS[i][1])
        e, n, first, rows = ahead


@constexpr_function
def store_boxes(P, cfg):
    """(columns, the first one) of what is stored at once."""
    return boxes_of(P, cfg.OUT_TOKENS)


@gluon.jit
def store_columns(sums, buf, vectors, of_rows, pointers, tile, unit, sizes, cfg: gl.constexpr, P: gl.constexpr):
    """Finish P columns of a consumer's units."""
    MP: gl.constexpr = cfg.MP
    for u in gl.static_range(MP):
        for j in gl.static_range(len(store_boxes(P, cfg))):
            finish(joined(sums, (u * P + store_boxes(P, cfg)[j][1]) // 16, store_boxes(P, cfg)[j][0] // 16), buf, vectors, of_rows[u], pointers,
                   tile, unit + u, sizes, cfg, store_boxes(P, cfg)[j][0], store_boxes(P, cfg)[j][1])


@gluon.jit
def columns_consumer(rings, bars, buf, vectors, pointers, table, table_ptr, sizes, cfg: gl.constexpr, WG: gl.constexpr):
    """The same where tiles are multiplied in COLUMNS: the producer tells of tiles. A width has a loop of its own over K and, where
    registers allow, nothing else: what comes behind it is longer than the loop, and tiles of many widths would take turns in the caches of
    instructions."""
    KC, NT, N, R, cap, G = sizes
    out_ptr, om, slots_ptr, factor_ptr, xfactor_ptr, bias_ptr, weight_ptr, top_ptr = pointers
    MP: gl.constexpr = cfg.MP
    num_n = gl.cdiv(NT, cfg.UNITS)
    entry_ends, count = entries(table, table_ptr, cfg, 4)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    made = gl.to_tensor(0)
    e, n, first, rows = tile_at(gl.program_id(0), count * num_n, num_n, entry_ends, table_ptr, G, cap, cfg, 4)
    unit = n * cfg.UNITS + WG * MP
    tops = tops_of(top_ptr, e, n, NT, cfg, WG)
    tables = lane_table()
    first_turn(cfg, WG)
    if cfg.AHEAD and (cfg.WEIGHT or cfg.XFACTOR):
        gdc_wait()
    while rows > 0:
        # what the epilogue needs is loaded ahead of the sums
        found = of_tokens(slots_ptr, xfactor_ptr, weight_ptr, first, rows, cfg)
        of_rows = ()
        for j in gl.static_range(MP):
            of_rows = of_rows + (rows_vectors(factor_ptr, bias_ptr, top_ptr, e, unit + j, NT, N, cfg), )
        made += 1
        tile = (e, n, first, rows)
        ahead = tile
        if cfg.PIECE == 0:
            sums = opaque(zeros(MP * cfg.BT // 16))
            for i in gl.static_range(len(cfg.WIDTHS)):
                if takes(rows, cfg, i):
                    sums, slot, phase = products_of_all(sums, slot, phase, KC, tops, tables, rings, bars, cfg, WG, cfg.WIDTHS[i][0])
            ahead, tops = next_tile(made, top_ptr, NT, cfg, WG)
            keep(found, vectors, cfg)
            store_columns(sums, buf, vectors, of_rows, (out_ptr, om), tile, unit, (N, R), cfg, cfg.BT)
        else:
            for i in gl.static_range(len(cfg.WIDTHS)):
                if takes(rows, cfg, i):
                    sums, slot, phase = products16(zeros(MP * cfg.WIDTHS[i][0] // 16), slot, phase, KC, tops, tables, rings, bars, cfg, WG,
                                                   cfg.WIDTHS[i][0])
                    ahead, tops = next_tile(made, top_ptr, NT, cfg, WG)
                    keep(found, vectors, cfg)
                    store_columns(sums, buf, vectors, of_rows, (out_ptr, om), tile, unit, (N, R), cfg, cfg.WIDTHS[i][0])
        e, n, first, rows = ahead
        unit = n * cfg.UNITS + WG * MP
    last_turn(cfg, WG)


@gluon.jit
def consumer_of(rings, bars, buf, vectors, pointers, table, table_ptr, sizes, cfg: gl.constexpr, WG: gl.constexpr):
    if cfg.COLUMNS:
        columns_consumer(rings, bars, buf, vectors, pointers, table, table_ptr, sizes, cfg, WG)
    else:
        consumer(rings, bars, buf, vectors, pointers, table, table_ptr, sizes, cfg, WG)


@gluon.jit(do_not_specialize=["KC", "NT", "R", "cap", "G"])
def narrow_prefill_kernel(x8_desc, x16_desc, x32_desc, x64_desc, x128_desc, w_desc, s_desc, f_desc, out_ptr, slots_ptr, factor_ptr,
                          xfactor_ptr, bias_ptr, weight_ptr, top_ptr, table_ptr, count_ptr, KC, NT, R, cap, G, N, om,
                          cfg: gl.constexpr):
    """A persistent grid. x.._desc: tokens [positions, K] in boxes of so many tokens x 128; w_desc int32 [G * NT, KC * rows, 256];
    s_desc int32 [G * NT, ceil(KC / 2), 128]; f_desc: tokens' ratios of scales, or scales, [positions, 4 KC] in boxes of 16 x 4; top:
    rows' largest scale codes (FP8). NT tiles of 64 weight rows, KC chunks of 128 of K, R rows of the output, om: their stride, N:
    logical weight rows, cap: entries a column of the table holds. count_ptr: of tiles that were taken. AHEAD: table_ptr is
    the layout's index of G groups, cap the rows that a masked group can hold (dense: that there are)."""
    STAGES: gl.constexpr = cfg.STAGES
    ELEMENT: gl.constexpr = gl.float8e4nv if cfg.FP8 else gl.bfloat16
    NUMBERS: gl.constexpr = 2 if cfg.TWO else 1
    TILE: gl.constexpr = X8_TILE if cfg.FP8 else X_TILE
    if cfg.COLUMNS:
        x0_s = gl.allocate_shared_memory(ELEMENT, [cfg.X_BOXES, 16, 128], TILE)
    elif not cfg.RING:      # the largest allocation, with room for what is told of tiles behind the tokens
        x0_s = gl.allocate_shared_memory(ELEMENT, [STAGES * cfg.BOX * NUMBERS * cfg.T0 // 8 + 1, 8, 128], TILE)
    else:
        x0_s = gl.allocate_shared_memory(ELEMENT, [STAGES * cfg.BOX, NUMBERS * cfg.T0, 128], TILE)
    x1_s = x0_s
    if cfg.T1 > 0:
        x1_s = gl.allocate_shared_memory(ELEMENT, [STAGES * cfg.BOX, NUMBERS * cfg.T1, 128], TILE)
    BOXES: gl.constexpr = STAGES * cfg.UNITS // cfg.BOX_UNITS
    if cfg.RING:        # the largest allocation is at the start of shared memory, so its addresses are known
        ring = gl.allocate_shared_memory(gl.int8, [cfg.F_AT // 16 + 3, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        w_s = ring
        w_full = view_rows(ring, gl.int64, cfg.F_AT + 16, 1, mbarrier.MBarrierLayout())
    else:
        w_s = gl.allocate_shared_memory(gl.int32, [BOXES, cfg.BOX_UNITS, cfg.BOX * cfg.WEIGHT_ROWS, 256], PLANES)
        w_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    s_s = gl.allocate_shared_memory(gl.int32, [BOXES, cfg.BOX_UNITS, 1, 128], PLANES)
    f0_s = x0_s
    f1_s = x0_s
    if cfg.SCALES:
        if cfg.COLUMNS:
            f0_s = gl.allocate_shared_memory(gl.float32, [STAGES * cfg.BOX * cfg.FT // 16, 16, 4], RATIO_TILE)
        else:
            f0_s = gl.allocate_shared_memory(gl.float32, [STAGES * cfg.BOX, cfg.T0, 4], RATIO_TILE)
        if cfg.T1 > 0:
            f1_s = gl.allocate_shared_memory(gl.float32, [STAGES * cfg.BOX, cfg.T1, 4], RATIO_TILE)
    staging: gl.constexpr = gl.NVMMASharedLayout.get_default_for([cfg.OUT_TOKENS, cfg.FEATURES], out_ptr.dtype.element_ty)
    d_s = gl.allocate_shared_memory(out_ptr.dtype.element_ty, [cfg.CONSUMERS, cfg.OUT_TOKENS, cfg.FEATURES], staging)
    slot_s = gl.allocate_shared_memory(gl.int32, [cfg.CONSUMERS, cfg.TP if cfg.SLOTS else 1], ROW_OF_INTS)
    xfactor_s = gl.allocate_shared_memory(gl.float32, [cfg.CONSUMERS, cfg.TP if cfg.XFACTOR else 1], ROW_OF_FLOATS)
    weight_s = gl.allocate_shared_memory(gl.float32, [cfg.CONSUMERS, cfg.TP if cfg.WEIGHT else 1], ROW_OF_FLOATS)
    x_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(w_full.index(cfg.F_AT + i), count=1)
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=cfg.CONSUMERS)
    table = empty
    if cfg.AHEAD:
        table = gl.allocate_shared_memory(gl.int32, [cfg.GROUPS], ROW_OF_INTS)
        sum_up(table, table_ptr, G, cap, cfg)
    fence_async_shared()

    descs = ((x8_desc, x16_desc, x32_desc, x64_desc, x128_desc), w_desc, s_desc, f_desc)
    rings = (x0_s, x1_s, w_s, s_s, f0_s, f1_s)
    bars = ((w_full, x_full), empty)
    sizes = (KC, NT, N, R, cap, G)
    pointers = (out_ptr, om, slots_ptr, factor_ptr, xfactor_ptr, bias_ptr, weight_ptr, top_ptr)
    v0 = (slot_s.index(0), xfactor_s.index(0), weight_s.index(0))
    v1 = (slot_s.index(1), xfactor_s.index(1), weight_s.index(1))
    if cfg.CONSUMERS == 2:
        gl.warp_specialize([
            (consumer_of, (rings, bars, d_s.index(0), v0, pointers, table, table_ptr, sizes, cfg, 0)),
            (consumer_of, (rings, bars, d_s.index(1), v1, pointers, table, table_ptr, sizes, cfg, 1)),
            (producer, (descs, rings, bars, table, table_ptr, count_ptr, sizes, cfg)),
        ], [4, 1], [cfg.CONSUMER_REGISTERS, cfg.PRODUCER_REGISTERS])
    else:
        v2 = (slot_s.index(2), xfactor_s.index(2), weight_s.index(2))
        gl.warp_specialize([
            (consumer_of, (rings, bars, d_s.index(0), v0, pointers, table, table_ptr, sizes, cfg, 0)),
            (consumer_of, (rings, bars, d_s.index(1), v1, pointers, table, table_ptr, sizes, cfg, 1)),
            (consumer_of, (rings, bars, d_s.index(2), v2, pointers, table, table_ptr, sizes, cfg, 2)),
            (producer, (descs, rings, bars, table, table_ptr, count_ptr, sizes, cfg)),
        ], [4, 4, 1], [cfg.CONSUMER_REGISTERS, cfg.CONSUMER_REGISTERS, cfg.PRODUCER_REGISTERS])
