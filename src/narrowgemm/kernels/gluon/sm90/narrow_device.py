"""Device code of the Hopper kernel for narrow weights and few tokens: time is the weights' bytes over the bandwidth.

    sum[slot, n] = factor[e, n] * xfactor[row] * sum over k of A[row, k] * W[e, n, k]         row = slot // a_div
    out[slot, n] = routing_weight[slot] * activation(sum[slot, n] + bias[e, n])

Operands are swapped: W^T is wgmma's A operand, expanded to BF16 in registers from the prepacked bytes (`narrow_expand_device`),
tokens are its 8 to 64 columns, gathered row by row. Weights that were packed for FP8 become E4M3 in half the instructions, BF16 tokens
two E4M3 numbers each, whose sums are columns side by side (`multiply8`). One warpgroup a CTA, or two over 128
weight rows that share the tokens; 2 to 5 CTAs on an SM; a ring of asynchronous copies.

Work is a list of (expert, tile of ROWS weight rows, step of CH * 128 of K), experts from the table that `narrow_prep_kernel` made:
an expert without rows is not in it. Every CTA takes an equal stretch of the list, to one step, so it starts and ends inside a tile. Such a
tile's pieces leave FP32 sums in the workspace; who is last to do so adds them, in the order of K.

    ring   | w, s, x of step u+S-1 (cp.async) ...
    math   |   expand chunk c  ->  wgmma, while chunk c+1 is expanded
    end    |     whole tile: store.   piece: leave the sum; the last one adds the pieces up and stores
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_wait

from .fold_expand_device import lane_table, row_tops
from .narrow_epilogue_device import finish, vectors
from .narrow_expand_device import byte_layout, expand, field_layout
from .narrow_fp8_device import sums8_layout, to_e4m3
from .narrow_prefill_parts_device import X8_TILE
from .narrow_ring_device import commit, first_place, issue_rows, issue_weights, lane_columns, places, wait
from .shim import block_barrier, copy_to_shared, view_as

HEAD = gl.constexpr(16)      # of the table: see narrow_tile.TABLE_HEAD
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
BYTES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))     # of one dimension: any number of rows


@gluon.jit
def lookup(table_ptr, b, blocks, cap, R, cfg: gl.constexpr):
    """(expert, first position, rows) of entry b; zeros past the end."""
    live = b < blocks
    if cfg.DENSE:       # one expert, whose entries nobody has to list
        return 0, b * cfg.BT, gl.where(live, gl.minimum(R - b * cfg.BT, cfg.BT), 0)
    else:
        p = table_ptr + HEAD + b
        return gl.load(p, mask=live, other=0), gl.load(p + cap, mask=live, other=0), gl.load(p + 2 * cap, mask=live, other=0)


@gluon.jit
def load_slots(slots_ptr, first, rows, cfg: gl.constexpr, layout: gl.constexpr):
    """Slots of the positions [first, first + rows), -1 beyond."""
    i = gl.arange(0, cfg.BT, layout)
    if cfg.SLOTS:
        return gl.load(slots_ptr + first + i, mask=i < rows, other=-1)
    else:
        return gl.where(i < rows, first + i, -1)


@gluon.jit
def x_offsets(slots, R, a_div, KX):
    """(offsets of the slots' rows of A, which of them there are)."""
    live = (slots >= 0) & (slots < R)
    return gl.where(live, slots, 0) // a_div * KX, live


@gluon.jit
def issue_tokens(x_ptr, xs_ptr, xo, live, k, slot, place, f_s, cfg: gl.constexpr, layout: gl.constexpr):
    """Ask for one step of a tile's live rows of A, and of what there is beside them. xo, live: `x_offsets`; place: `first_place`."""
    KS: gl.constexpr = cfg.CH * 128
    ROWS: gl.constexpr = cfg.BT * (2 if cfg.DOUBLE else 1)
    to = places(place + slot * (ROWS * KS * 2), cfg.BT, cfg.ROWS // 16, gl.SliceLayout(1, layout))
    at = xo + lane_columns() + k * KS
    issue_rows(x_ptr, at, to, live, ROWS, KS)
    if cfg.DOUBLE:       # what BF16 leaves of a row lies as the row does
        issue_rows(xs_ptr, at, to + cfg.BT * 128, live, ROWS, KS)
    if cfg.XSCALE:      # a row's scales lie as its payload does, one for 128
        cc = gl.arange(0, cfg.CH, gl.SliceLayout(0, layout))
        fp = xs_ptr + (gl.expand_dims(xo // 128, 1) + gl.expand_dims(k * cfg.CH + cc, 0))
        copy_to_shared(f_s.index(slot), fp, mask=gl.expand_dims(live, 1) & gl.expand_dims(cc >= 0, 0))


@gluon.jit
def multiply(acc, rings, slot, cfg: gl.constexpr):
    """Add one ring step's product."""
    w_s, s_s, x_s, f_s = rings
    mma: gl.constexpr = acc.type.layout
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    ROWS: gl.constexpr = cfg.ROWS
    CW: gl.constexpr = cfg.CW
    KT: gl.constexpr = cfg.KT
    PER: gl.constexpr = CW // cfg.CH
    for c in gl.static_range(CW):
        if c % (2 * PER) == 0:
            v = s_s.index(cfg.S_BOX + slot * (cfg.CH // 2) + c // (2 * PER)).load(field_layout(ROWS))
        w = w_s.index(cfg.W_BOX + slot * CW + c).load(byte_layout(ROWS))
        a = expand(w, v, c // PER % 2, ROWS, cfg.E4M3, operand)
        x = x_s.index(slot).slice(c * KT, KT, 1)
        if cfg.DOUBLE:
            rest = x.slice(cfg.BT, cfg.BT, 0).permute((1, 0))
            x = x.slice(0, cfg.BT, 0)
        x = x.permute((1, 0))
        if cfg.XSCALE:
            if c == 0:
                part = acc      # not added to: the first product of a chunk overwrites it
            else:
                part = warpgroup_mma_wait(0, deps=(part, ))
                if c % PER == 0:
                    acc += part * token_scales(f_s.index(slot), c // PER - 1, mma)
            part = warpgroup_mma(a, x, part, use_acc=c % PER > 0, is_async=True)
        else:
            if c > 0:
                acc = warpgroup_mma_wait(0, deps=(acc, ))
            acc = warpgroup_mma(a, x, acc, is_async=True)
            if cfg.DOUBLE:
                acc = warpgroup_mma(a, rest, acc, is_async=True)
    if cfg.XSCALE:
        part = warpgroup_mma_wait(0, deps=(part, ))
        acc += part * token_scales(f_s.index(slot), cfg.CH - 1, mma)
    return acc


@gluon.jit
def multiply8(acc, rings, slot, tops, tables, cfg: gl.constexpr):
    """Add one ring step's product of E4M3: the first numbers of its tokens are BT columns, the second ones, 2^5 times what they stand for,
    another BT."""
    w_s, s_s, x_s, f_s = rings
    mma: gl.constexpr = acc.type.layout
    ROWS: gl.constexpr = cfg.ROWS
    BT: gl.constexpr = cfg.BT
    both: gl.constexpr = sums8_layout(2 * BT, ROWS // 16)
    operand: gl.constexpr = gl.DotOperandLayout(0, both, 4)
    part = gl.zeros([ROWS, 2 * BT], gl.float32, both)
    CH: gl.constexpr = cfg.CH
    for c in gl.static_range(CH):
        if c % 2 == 0:
            fields = s_s.index(cfg.S_BOX + slot * (cfg.CH // 2) + c // 2).load(field_layout(ROWS))
        w = w_s.index(cfg.W_BOX + slot * cfg.CH + c).load(byte_layout(ROWS))
        a = to_e4m3(w, fields >> (16 * (c % 2)), tops, tables, operand, ROWS, True)
        if c > 0:
            part = warpgroup_mma_wait(0, deps=(part, ))
        part = warpgroup_mma(a, x_s.index(slot * cfg.CH + c).permute((1, 0)), part, use_acc=c > 0, is_async=True)
    part = warpgroup_mma_wait(0, deps=(part, ))
    first, second = gl.split(gl.permute(gl.reshape(part, [ROWS, 2, BT]), (0, 2, 1)))
    return acc + gl.convert_layout(gl.fma(second, gl.full_like(second, 0.03125), first), mma, assert_trivial=True)


@gluon.jit
def tile_tops(top_ptr, e, nt, NT, cfg: gl.constexpr):
    """`row_tops` of tile nt of expert e."""
    UNITS: gl.constexpr = cfg.ROWS // 64
    return row_tops(top_ptr, (e * NT + nt * UNITS) * 64, (NT - nt * UNITS) * 64, cfg.ROWS // 16)


@gluon.jit
def token_scales(f_s, chunk: gl.constexpr, mma: gl.constexpr):
    """[1, BT] of a ring slot's scales [BT, CH]."""
    return f_s.slice(chunk, 1, 1).permute((1, 0)).load(mma)


@gluon.jit
def advance(k, nt, b, KB, NT):
    """The step behind step k of tile nt of table entry b."""
    k = gl.where(k == KB - 1, 0, k + 1)
    nt = gl.where(k == 0, nt + 1, nt)
    b = gl.where(nt == NT, b + 1, b)
    return k, gl.where(nt == NT, 0, nt), b


@gluon.jit
def begin_of(cta, each, more):
    """First quantum of a CTA: `each` of them a CTA, one more for the first `more`."""
    return cta * each + gl.minimum(cta, more)


@gluon.jit
def cta_of(x, each, more):
    """The CTA that quantum x belongs to."""
    first = more * (each + 1)
    return gl.where(x < first, x // (each + 1), more + (x - first) // gl.maximum(each, 1))


@gluon.jit
def leave(acc, part_ptr, count_ptr, piece, first_cta, ROWS: gl.constexpr, BT: gl.constexpr):
    """Store a piece's sum; how many of its tile's pieces were there before."""
    mma: gl.constexpr = acc.type.layout
    n = gl.arange(0, ROWS, gl.SliceLayout(1, mma))
    t = gl.arange(0, BT, gl.SliceLayout(0, mma))
    gl.store(part_ptr + piece.to(gl.int64) * (ROWS * BT) + gl.expand_dims(n * BT, 1) + gl.expand_dims(t, 0), acc)
    block_barrier()
    return gl.atomic_add(count_ptr + first_cta, 1, sem="acq_rel", scope="gpu")


@gluon.jit
def gather_pieces(acc, part_ptr, first_cta, pieces, ROWS: gl.constexpr, BT: gl.constexpr, WAYS: gl.constexpr):
    """The sum over a tile's pieces, in the order of K: the first lies in its CTA's second place, the others in the first."""
    mma: gl.constexpr = acc.type.layout
    n = gl.arange(0, ROWS, gl.SliceLayout(1, mma))
    t = gl.arange(0, BT, gl.SliceLayout(0, mma))
    off = gl.expand_dims(n * BT, 1) + gl.expand_dims(t, 0)
    acc = gl.zeros([ROWS, BT], gl.float32, mma)
    for i in range(0, pieces, WAYS):
        parts = ()
        for j in gl.static_range(WAYS):
            p = i + j
            at = 2 * (first_cta + p) + gl.where(p == 0, 1, 0)
            parts = parts + (gl.load(part_ptr + at.to(gl.int64) * (ROWS * BT) + off, mask=(off >= 0) & (p < pieces), other=0.0,
                                     cache_modifier=".cg"), )
        for j in gl.static_range(WAYS):
            acc += parts[j]
    return acc


@gluon.jit(do_not_specialize=["NT", "KB", "KC", "R", "a_div", "cap", "quantum"])
def narrow_kernel(w_ptr, s_ptr, x_ptr, xs_ptr, out_ptr, slots_ptr, factor_ptr, top_ptr, xfactor_ptr, bias_ptr, weight_ptr, table_ptr, count_ptr,
                  part_ptr, NT, KB, KC, R, a_div, cap, quantum, N, KX, som, cfg: gl.constexpr):
    """A persistent grid. NT tiles of 64 rows of a weight, KB ring steps and KC chunks of K, R slots, `cap` entries a column of the
    table, `quantum`: a CTA's stretch is a multiple of so many steps (KB: whole tiles), KX: row stride of A, som: of out.
    xs: FP32 scales of A, row stride KX / 128; DOUBLE: what BF16 leaves of A, as A."""
    BT: gl.constexpr = cfg.BT
    S: gl.constexpr = cfg.STAGES
    ROWS: gl.constexpr = cfg.ROWS
    NW: gl.constexpr = ROWS // 16
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NW, 1], [16, BT, 32 if cfg.FP8 else 16])
    cols: gl.constexpr = gl.SliceLayout(0, mma)
    xl: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [NW, 1], [1, 0])
    xr: gl.constexpr = gl.SliceLayout(1, xl)
    # the largest allocation, which is at the start of shared memory: copies take addresses
    ring = gl.allocate_shared_memory(gl.int8, [cfg.RING_ROWS, 128], BYTES)
    if cfg.FP8:
        x_s = view_as(ring, gl.float8e4nv, S * cfg.CH, 2 * BT, 128, X8_TILE)
        tables = lane_table()
    else:
        x_s = view_as(ring, gl.bfloat16, S, 2 * BT if cfg.DOUBLE else BT, cfg.CH * 128,
                      gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
    w_s = view_as(ring, gl.uint8, cfg.W_BOX + S * cfg.CW, ROWS, 64, FLAT)
    s_s = view_as(ring, gl.int32, cfg.S_BOX + S * (cfg.CH // 2), ROWS // 2, 4, FLAT)
    f_s = x_s
    if cfg.XSCALE:
        f_s = gl.allocate_shared_memory(gl.float32, [S, BT, cfg.CH], FLAT)
    rings = (w_s, s_s, x_s, f_s)
    weights = (w_ptr, s_ptr, NT, KC)
    place = first_place(2 * BT if cfg.DOUBLE else BT)
    if cfg.DENSE:
        blocks = gl.cdiv(R, BT)
    else:
        if cfg.PDL:
            gdc_wait()
        blocks = gl.load(table_ptr)
    NU = (NT + (ROWS // 64 - 1)) // (ROWS // 64)
    total = blocks * NU * KB // quantum
    each = total // gl.num_programs(0)
    more = total - each * gl.num_programs(0)
    u = begin_of(gl.program_id(0), each, more) * quantum
    end = begin_of(gl.program_id(0) + 1, each, more) * quantum
    if u < end:
        tile = u // KB
        k = u - tile * KB
        b = tile // NU
        nt = tile - b * NU
        # table entries are looked up two experts ahead, slots one: nothing waits for a dependent load later on
        e0, r0, c0 = lookup(table_ptr, b, blocks, cap, R, cfg)
        e1, r1, c1 = lookup(table_ptr, b + 1, blocks, cap, R, cfg)
        e2, r2, c2 = lookup(table_ptr, b + 2, blocks, cap, R, cfg)
        if cfg.FP8:
            tops_ahead = tile_tops(top_ptr, e0, nt, NT, cfg)
        # the ring's first steps; they may reach into the next tile, and the next expert
        ik = k
        it = nt
        ib = b
        for i in gl.static_range(S - 1):
            if u + i < end:
                issue_weights(weights, gl.where(ib == b, e0, e1), it, ik, i, cfg)
            ik, it, ib = advance(ik, it, ib, KB, NU)
        if cfg.DENSE and cfg.PDL:       # the first weights come while the launch in front brings the tokens
            gdc_wait()
        xo0, live0 = x_offsets(load_slots(slots_ptr, r0, c0, cfg, xr), R, a_div, KX)
        xo1, live1 = x_offsets(load_slots(slots_ptr, r1, c1, cfg, xr), R, a_div, KX)
        ik = k
        it = nt
        ib = b
        for i in gl.static_range(S - 1):
            if u + i < end:
                same = ib == b
                issue_tokens(x_ptr, xs_ptr, gl.where(same, xo0, xo1), (live0 & same) | (live1 & (same == 0)), ik, i, place, f_s, cfg, xl)
            commit()
            ik, it, ib = advance(ik, it, ib, KB, NU)
        # what is copied next: step `ik` of tile `it` of the expert `ei`, table entry `ib`
        iu = u + (S - 1)
        same = ib == b
        ei = gl.where(same, e0, e1)
        xo = gl.where(same, xo0, xo1)
        live = (live0 & same) | (live1 & (same == 0))
        en = gl.where(same, e1, e2)
        xn = load_slots(slots_ptr, gl.where(same, r1, r2), gl.where(same, c1, c2), cfg, xr)
        ea, ra, ca = lookup(table_ptr, ib + 2, blocks, cap, R, cfg)
        # what is computed: tile `nt` of the expert `ec`, table entry `b`. Looked up anew: Triton 3.6 drops what starts as another
        # variable's alias and is assigned in a branch
        ec, rc, cc = lookup(table_ptr, b, blocks, cap, R, cfg)
        if cfg.SLOTS:
            slots = load_slots(slots_ptr, rc, cc, cfg, cols)
        ed, rd, cd = lookup(table_ptr, b + 1, blocks, cap, R, cfg)
        slot = gl.to_tensor(0)
        islot = gl.to_tensor(S - 1)
        while u < end:
            steps = gl.minimum(KB - k, end - u)
            acc = gl.zeros([ROWS, BT], gl.float32, mma)
            if cfg.FP8:     # the next tile's are asked for
                same = nt + 1 < NU
                tops = tops_ahead
                tops_ahead = tile_tops(top_ptr, gl.where(same, ec, ed), gl.where(same, nt + 1, 0), NT, cfg)
            if cfg.EARLY:       # what the end of the tile needs is asked for ahead of it: every copy of its own waits there
                if cfg.SLOTS == 0:
                    slots = load_slots(slots_ptr, rc, cc, cfg, cols)
                given = vectors(ec, nt * (ROWS // 64), slots, factor_ptr, top_ptr, xfactor_ptr, bias_ptr, weight_ptr, NT, N, R, a_div,
                                mma, cfg)
            for _ in range(steps):
                wait(S - 2)
                fence_async_shared()
                block_barrier()
                if iu < end:
                    issue_weights(weights, ei, it, ik, islot, cfg)
                    issue_tokens(x_ptr, xs_ptr, xo, live, ik, islot, place, f_s, cfg, xl)
                commit()
                iu += 1
                ik += 1
                if ik == KB:
                    ik = gl.to_tensor(0)
                    it += 1
                    if it == NU:
                        it = gl.to_tensor(0)
                        ib += 1
                        ei = en
                        xo, live = x_offsets(xn, R, a_div, KX)
                        en = ea
                        xn = load_slots(slots_ptr, ra, ca, cfg, xr)
                        ea, ra, ca = lookup(table_ptr, ib + 2, blocks, cap, R, cfg)
                if cfg.FP8:
                    acc = multiply8(acc, rings, slot, tops, tables, cfg)
                else:
                    acc = multiply(acc, rings, slot, cfg)
                slot = gl.where(slot == S - 1, 0, slot + 1)
                islot = gl.where(islot == S - 1, 0, islot + 1)
                if cfg.FP8 == 0:
                    acc = warpgroup_mma_wait(0, deps=(acc, ))
            last = gl.to_tensor(1)
            if steps < KB:
                at = (b * NU + nt) * KB
                first_cta = cta_of(at // quantum, each, more)
                pieces = cta_of((at + KB - 1) // quantum, each, more) - first_cta + 1
                before = leave(acc, part_ptr, count_ptr, 2 * gl.program_id(0) + gl.where(k == 0, 1, 0), first_cta,
                               ROWS, BT)
                last = gl.where(before == pieces - 1, 1, 0)
                if last == 1:
                    acc = gather_pieces(acc, part_ptr, first_cta, pieces, ROWS, BT, cfg.WAYS)
            if last == 1:
                if cfg.SLOTS == 0:      # two numbers are kept instead of a thread's columns
                    slots = load_slots(slots_ptr, rc, cc, cfg, cols)
                if cfg.EARLY == 0:
                    given = vectors(ec, nt * (ROWS // 64), slots, factor_ptr, top_ptr, xfactor_ptr, bias_ptr, weight_ptr, NT, N, R,
                                    a_div, mma, cfg)
                finish(acc, nt * (ROWS // 64), slots, given, out_ptr, N, R, som, cfg)
            u += steps
            k = gl.to_tensor(0)
            nt += 1
            if nt == NU:
                nt = gl.to_tensor(0)
                b += 1
                ec = ed
                if cfg.SLOTS:
                    slots = load_slots(slots_ptr, rd, cd, cfg, cols)
                else:
                    rc = rd
                    cc = cd
                ed, rd, cd = lookup(table_ptr, b + 1, blocks, cap, R, cfg)
        wait(0)
