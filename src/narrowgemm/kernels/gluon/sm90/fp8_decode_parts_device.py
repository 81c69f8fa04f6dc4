"""Device code of the Hopper FP8 decode kernel: what its loading and filling warps do, and how a tile is stored."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .fp8_decode_schedule_device import (
    CONTIGUOUS, MASKED, PSUM, advance, all_groups, begin, fetched, guess, k_range, left_over, locate)
from .fp8_decode_sums_device import tile_layout
from .fp8_decode_cluster_device import idle
from .scales_device import as_float
from . import cluster_device as cluster
from .shim import block_barrier, tma_load, view_boxes

KERNEL = gl.constexpr("fp8_decode_kernel")
OPEN = gl.constexpr(0x7FA5C3D17FB00000)      # as two floats: NaNs that no arithmetic makes


@gluon.jit
def tokens_of(x_s, cfg: gl.constexpr, NT: gl.constexpr):
    """The ring of tokens as boxes of NT rows; as it is for NT = 0, which no tile takes."""
    if NT > 0:
        return view_boxes(x_s, gl.float8e4nv, (cfg.X_AT + cfg.STAGES * cfg.BOX) * (cfg.BT // NT), NT, 128,
                          gl.NVMMASharedLayout.get_default_for([1, NT, 128], gl.float8e4nv))
    else:
        return x_s


@gluon.jit
def load_weights(w_desc, w_s, full, slot, g, w_row, kb, cfg: gl.constexpr):
    bar = full.index(cfg.F_AT + slot)
    mbarrier.expect(bar, cfg.BOX * cfg.BN * 128)
    copy_weights(w_desc, w_s, bar, slot, g, w_row, kb, cfg)


@gluon.jit
def copy_weights(w_desc, w_s, bar, slot, g, w_row, kb, cfg: gl.constexpr):
    """By one warp, a partition of its own. STREAM: in PTX, as Gluon's copy takes no policy."""
    if cfg.STREAM and cfg.BOX > 1:
        start = cluster.start_of_shared()
        cluster.load_box(w_desc, KERNEL, 0, (g, w_row // 8, kb * cfg.BOX), start + cfg.F_AT * 8 + slot * 8,
                         start + slot * (cfg.BOX * cfg.BN * 128))
    elif cfg.STREAM:
        start = cluster.start_of_shared()
        cluster.load(w_desc, KERNEL, 0, (g, w_row, kb * 128), start + cfg.F_AT * 8 + slot * 8, start + (cfg.W_AT + slot) * (cfg.BN * 128), 1,
                     True, True)
    else:
        ask(w_desc, w_s, bar, slot, g, w_row, kb, cfg)


@gluon.jit
def ask(w_desc, w_s, bar, slot, g, w_row, kb, cfg: gl.constexpr):
    if cfg.BOX > 1:
        tma_load(w_desc, [g, w_row // 8, kb * cfg.BOX, 0, 0], bar, w_s.index(slot))
    else:
        tma_load(w_desc, [g, w_row, kb * 128], bar, w_s.index(cfg.W_AT + slot))


@gluon.jit
def sizes_there(cfg: gl.constexpr):
    """Wait for the launch in front, where it brings the sizes of groups."""
    if cfg.FRONT == 2:
        gdc_wait()


@gluon.jit
def tokens_there(cfg: gl.constexpr):
    """Wait for the launch in front, where it brings tokens alone."""
    if cfg.FRONT == 1:
        gdc_wait()


@gluon.jit
def fetch_weights(w_desc, w_s, full, shape_args, index_ptr, KB, cfg: gl.constexpr):
    """Start a CTA's first loads on a guess, before its warps part and before any group's size is read."""
    g, nb, k0, count = guess(gl.program_id(0), shape_args, index_ptr, KB, cfg)
    for i in range(0, count):
        mbarrier.expect(full.index(cfg.F_AT + i), cfg.BOX * cfg.BN * 128)
        ask(w_desc, w_s, full.index(cfg.F_AT + i), i, g, nb * cfg.BN, k0 + i, cfg)


@gluon.jit
def fetch_first(w_desc, w_s, full, upto, units, split, chunk, shape_args, index_ptr, table_ptr, cap, KB, cfg: gl.constexpr):
    """Start loading the weights of a CTA's first unit, as many K blocks as the ring has slots; how many."""
    t = gl.program_id(0)
    tile, k0, k1 = k_range(t, split, chunk, KB, cfg)
    g, row, rows, nb = locate(tile, upto, shape_args, index_ptr, table_ptr, cap, cfg, False)
    count = gl.where(t < units, gl.minimum(k1 - k0, cfg.STAGES), 0)
    for i in range(0, count):
        load_weights(w_desc, w_s, full, i, g, nb * cfg.BN, k0 + i, cfg)
    return count


@gluon.jit
def load_block(descs, rings, full, slot, at, there, cfg: gl.constexpr, NT: gl.constexpr):
    """One K block into a slot: BN weight rows, unless it is one of those that are there, and NT token rows."""
    w_desc, x_desc = descs
    w_s, x_s = rings
    g, w_row, plane, x_row, kb = at
    bar = full.index(cfg.F_AT + slot)
    if cfg.ARRIVALS == 3:
        if kb >= there:
            load_weights(w_desc, w_s, full, slot, g, w_row, kb, cfg)
        mbarrier.expect(bar, cfg.BOX * NT * 128)
    else:
        mbarrier.expect(bar, cfg.BOX * (cfg.BN + NT) * 128)
        copy_weights(w_desc, w_s, bar, slot, g, w_row, kb, cfg)
    B: gl.constexpr = cfg.BOX       # tokens come a K block a box
    for i in gl.static_range(B):
        tma_load(x_desc, [plane, x_row, (kb * B + i) * 128], bar, x_s.index((cfg.X_AT + slot * B + i) * (cfg.BT // NT)))


@gluon.jit
def weight_loader(descs, rings, bars, shape_args, index_ptr, table_ptr, cap, KB, cfg: gl.constexpr):
    w_desc, x_desc, middle_desc, narrow_desc = descs
    w_s, x_s, s_s = rings
    full, empty = bars
    wide = ((w_desc, x_desc), (w_s, x_s))
    middle = ((w_desc, middle_desc), (w_s, tokens_of(x_s, cfg, cfg.MIDDLE)))
    narrow = ((w_desc, narrow_desc), (w_s, tokens_of(x_s, cfg, cfg.NARROW)))
    sizes_there(cfg)
    upto, units, split, chunk, slot = begin(shape_args, index_ptr, table_ptr, KB, cfg, 1)
    phase = gl.to_tensor(1)
    ahead = gl.to_tensor(0)
    if cfg.FRONT == 1:      # a ring of weights while the launch in front brings the tokens
        ahead = fetch_first(w_desc, w_s, full, upto, units, split, chunk, shape_args, index_ptr, table_ptr, cap, KB, cfg)
    tokens_there(cfg)
    if cfg.FRONT > 0:       # whoever is behind may get ready, now that the launch in front is over
        gdc_launch_dependents()
    for t in range(gl.program_id(0), units, gl.num_programs(0)):
        tile, k0, k1 = k_range(t, split, chunk, KB, cfg)
        g, row, rows, nb = locate(tile, upto, shape_args, index_ptr, table_ptr, cap, cfg, cfg.NARROW > 0)
        plane = g if cfg.LAYOUT == MASKED else g * 0
        there = k0
        if cfg.GUESS > 0:
            there, vain = fetched(t, (g, row, rows, nb), shape_args, index_ptr, KB, cfg)
            there += k0
            slot += give_up(vain, full, cfg)
        if cfg.FRONT == 1:
            there = k0 + ahead
            ahead = ahead * 0
        for kb in range(k0, k1):
            mbarrier.wait(empty.index(slot), phase)
            at = (g, nb * cfg.BN, plane, row, kb)
            if cfg.NARROW == 0:
                load_block(wide[0], wide[1], full, slot, at, there, cfg, cfg.BT)
            else:
                if rows <= cfg.NARROW:
                    load_block(narrow[0], narrow[1], full, slot, at, there, cfg, cfg.NARROW)
                else:
                    if cfg.MIDDLE > 0:
                        if rows <= cfg.MIDDLE:
                            load_block(middle[0], middle[1], full, slot, at, there, cfg, cfg.MIDDLE)
                        else:
                            load_block(wide[0], wide[1], full, slot, at, there, cfg, cfg.BT)
                    else:
                        load_block(wide[0], wide[1], full, slot, at, there, cfg, cfg.BT)
            slot, phase = advance(slot, phase, cfg.STAGES)
    if cfg.GUESS > 0:
        give_up(left_over(units, shape_args, index_ptr, KB, cfg), full, cfg)
    idle(cfg)


@gluon.jit
def give_up(count, full, cfg: gl.constexpr):
    """Complete slots [0, count), whose weights nobody wants, with nothing; how many they are."""
    for i in range(0, count):
        mbarrier.arrive(full.index(cfg.F_AT + i), count=1)
    return count


# ---------------------------------------------------------------- scales
@gluon.jit
def scale_blocks(a_ptrs, sak, live, b_ptr, sbk, count, cfg: gl.constexpr):
    """Scales of AHEAD K blocks, of which `count` are in the unit: of the tokens, and of the 128 weight rows. Zero past the unit."""
    AHEAD: gl.constexpr = cfg.AHEAD
    out = ()
    for i in gl.static_range(AHEAD):
        inside = i < count
        sa = as_float(gl.load(a_ptrs + i * sak, mask=live & inside, other=0))
        sb = as_float(gl.load(b_ptr + i * sbk, mask=inside, other=0))
        out = out + ((sa, sb), )
    return out


@gluon.jit
def scale_block(sa_ptr, sak, live, sb_ptr, sbk, kb, k1):
    """Scales of K block kb. Zero past the unit."""
    inside = kb < k1
    k = kb.to(gl.int64)
    sa = as_float(gl.load(sa_ptr + k * sak, mask=live & inside, other=0))
    sb = as_float(gl.load(sb_ptr + k * sbk, mask=inside, other=0))
    return sa, sb


@gluon.jit
def put_scales(s, rings, bars, slot, phase, cfg: gl.constexpr, FIRST: gl.constexpr = 0):
    """The scales of a slot's K blocks, which are s[FIRST] and on."""
    w_s, x_s, s_s = rings
    full, empty = bars
    mbarrier.wait(empty.index(slot), phase)
    B: gl.constexpr = cfg.BOX
    for i in gl.static_range(B):
        sa, sb = s[FIRST + i]
        s_s.index(slot * B + i).store(sa * sb)
    mbarrier.arrive(full.index(cfg.F_AT + slot), count=1)
    return advance(slot, phase, cfg.STAGES)


@gluon.jit
def scale_loader(ptrs, strides, rings, bars, shape_args, index_ptr, table_ptr, cap, KB, cfg: gl.constexpr):
    sa_ptr, sb_ptr = ptrs
    sag, sam, sak, sbg, sbn, sbk = strides
    # pointers that go along are registers, which a table of groups takes
    BATCHES: gl.constexpr = cfg.CLUSTER > 1 or cfg.AHEAD > 4
    BOXES: gl.constexpr = cfg.AHEAD // cfg.BOX
    B: gl.constexpr = cfg.BOX
    if BATCHES:
        sak = sak.to(gl.int64)
        sbk = sbk.to(gl.int64)
    lay: gl.constexpr = gl.BlockedLayout([(cfg.BT + 31) // 32], [32], [1], [0])
    tok = gl.arange(0, cfg.BT, lay)
    full, empty = bars
    AHEAD: gl.constexpr = cfg.AHEAD
    sizes_there(cfg)
    upto, units, split, chunk, slot = begin(shape_args, index_ptr, table_ptr, KB, cfg, 1)
    tokens_there(cfg)
    phase = gl.to_tensor(1)
    for t in range(gl.program_id(0), units, gl.num_programs(0)):
        tile, k0, k1 = k_range(t, split, chunk, KB, cfg)
        g, row, rows, nb = locate(tile, upto, shape_args, index_ptr, table_ptr, cap, cfg, True)
        if cfg.GUESS > 0:
            there, vain = fetched(t, (g, row, rows, nb), shape_args, index_ptr, KB, cfg)
            slot += give_up(vain, full, cfg)
        a_ptr = sa_ptr + row.to(gl.int64) * sam
        if cfg.LAYOUT == MASKED:
            a_ptr += g.to(gl.int64) * sag
        a_ptrs = a_ptr + tok.to(gl.int64) * sam
        b_ptr = sb_ptr + g.to(gl.int64) * sbg + (nb * cfg.BN // 128).to(gl.int64) * sbn
        mine = tok < rows
        if BATCHES:
            a_ptrs += (k0 * B).to(gl.int64) * sak
            b_ptr += (k0 * B).to(gl.int64) * sbk
            here = scale_blocks(a_ptrs, sak, mine, b_ptr, sbk, (k1 - k0) * B, cfg)
            for kb in range(k0, k1, BOXES):
                # pointers go along, as a product in 64 bits for every block is most of this warp's work
                a_ptrs += AHEAD * sak
                b_ptr += AHEAD * sbk
                ahead = scale_blocks(a_ptrs, sak, mine, b_ptr, sbk, (k1 - kb) * B - AHEAD, cfg)
                for i in gl.static_range(BOXES):
                    if kb + i < k1:
                        slot, phase = put_scales(here, rings, bars, slot, phase, cfg, i * B)
                here = ahead
        else:
            k0 *= B
            k1 *= B
            c0 = scale_block(a_ptrs, sak, mine, b_ptr, sbk, k0, k1)
            c1 = scale_block(a_ptrs, sak, mine, b_ptr, sbk, k0 + 1, k1)
            c2 = scale_block(a_ptrs, sak, mine, b_ptr, sbk, k0 + 2, k1)
            c3 = scale_block(a_ptrs, sak, mine, b_ptr, sbk, k0 + 3, k1)
            for kb in range(k0, k1, 4):
                n0 = scale_block(a_ptrs, sak, mine, b_ptr, sbk, kb + 4, k1)
                n1 = scale_block(a_ptrs, sak, mine, b_ptr, sbk, kb + 5, k1)
                n2 = scale_block(a_ptrs, sak, mine, b_ptr, sbk, kb + 6, k1)
                n3 = scale_block(a_ptrs, sak, mine, b_ptr, sbk, kb + 7, k1)
                slot, phase = put_scales((c0, c1, c2, c3), rings, bars, slot, phase, cfg)
                for i in gl.static_range(B, 4, B):
                    if kb + i < k1:
                        slot, phase = put_scales((c0, c1, c2, c3), rings, bars, slot, phase, cfg, i)
                c0 = n0
                c1 = n1
                c2 = n2
                c3 = n3
    if cfg.GUESS > 0:
        give_up(left_over(units, shape_args, index_ptr, KB, cfg), full, cfg)
    idle(cfg)


# ---------------------------------------------------------------- output
@gluon.jit
def put(ptrs, y, live, cfg: gl.constexpr):
    """KEEP: the output stays in L2 while weights stream through, instead of going to memory line by line among them."""
    if cfg.KEEP:
        gl.store(ptrs, y, mask=live, eviction_policy="evict_last")
    else:
        gl.store(ptrs, y, mask=live)


@gluon.jit
def store_tile(acc, out_ptr, out_strides, g, row, rows, col, N, WR: gl.constexpr, NT: gl.constexpr, cfg: gl.constexpr):
    """[WR weight rows, NT tokens] of sums: 16 bytes a thread along N, rows past the group's never written."""
    sog, som = out_strides
    V: gl.constexpr = cfg.STORE_VEC
    LANES: gl.constexpr = min(WR // V, 32)
    lay: gl.constexpr = gl.BlockedLayout([V, 1], [LANES, 32 // LANES], [1, 4], [0, 1])
    base = out_ptr + (row.to(gl.int64) * som + col)
    if cfg.LAYOUT == MASKED:
        base += g.to(gl.int64) * sog
    n = gl.arange(0, WR, gl.SliceLayout(1, lay))
    tok = gl.arange(0, NT, gl.SliceLayout(0, lay))
    ptrs = base + gl.expand_dims(tok * som, 0) + gl.expand_dims(n, 1)
    live = gl.expand_dims(tok < rows, 0) & gl.expand_dims(n < N - col, 1)
    if cfg.ACCUMULATE:
        y = gl.convert_layout(acc, lay)
        y += gl.load(ptrs, mask=live, other=0).to(gl.float32)
        put(ptrs, y.to(out_ptr.dtype.element_ty), live, cfg)
    else:
        put(ptrs, gl.convert_layout(acc.to(out_ptr.dtype.element_ty), lay), live, cfg)


@gluon.jit
def part_pointers(base, cfg: gl.constexpr, NT: gl.constexpr):
    """One piece of a tile's partial sums, which are [token][weight row]."""
    n = gl.arange(0, 64, gl.SliceLayout(1, tile_layout(NT)))
    tok = gl.arange(0, NT, gl.SliceLayout(0, tile_layout(NT)))
    return base + gl.expand_dims(tok * cfg.BN, 0) + gl.expand_dims(n, 1)


@gluon.jit
def store_part(acc, base, cfg: gl.constexpr, NT: gl.constexpr):
    gl.store(part_pointers(base, cfg, NT), acc)


@gluon.jit
def sum_parts(base, split, cfg: gl.constexpr, NT: gl.constexpr):
    """Partial sums of one piece, added in the order of K. They come from other SMs: past the first cache."""
    AT_ONCE: gl.constexpr = 8 if NT <= 32 else 256 // NT      # loads of one wait: as many as the registers hold
    ptrs = part_pointers(base, cfg, NT)
    acc = gl.zeros([64, NT], gl.float32, tile_layout(NT))
    for s in range(0, split, AT_ONCE):
        parts = ()
        for j in gl.static_range(AT_ONCE):
            parts = parts + (gl.load(ptrs + (s + j) * (cfg.BT * cfg.BN), mask=s + j < split, other=0.0, cache_modifier=".cg"), )
        for j in gl.static_range(AT_ONCE):
            acc += parts[j]
    return acc


@gluon.jit
def open_count(count_ptr, split):
    """Have a counter hold OPEN and the arrivals so far, whatever it holds: nobody has to clear it ahead. Each unit of a tile
    does so at its start, in the shadow of its first loads. An atomic's answer is one thread's, handed to all of them."""
    opened = gl.to_tensor(OPEN)
    expected = opened * 0
    again = gl.to_tensor(1)
    while again != 0:
        have = gl.atomic_cas(count_ptr, expected, opened, sem="relaxed", scope="gpu")
        there = (have == expected) | ((have >= opened) & (have < opened + split))
        again = gl.where(there, 0, 1)
        expected = have


@gluon.jit
def is_last(count_ptr, split):
    """Whether this is the last of `split` arrivals at a counter, which then is as if never used. Whoever is the last sees what
    the others stored."""
    block_barrier()
    opened = gl.to_tensor(OPEN)
    before = gl.atomic_add(count_ptr, opened * 0 + 1, sem="acq_rel", scope="gpu")
    last = before - opened == split - 1
    if last:
        gl.store(count_ptr, opened * 0)
    return last


@gluon.jit
def zero_filler(out_ptr, som, shape_args, index_ptr, cfg: gl.constexpr):
    """Rows of no group come back zero: 8 rows of 8 stores' columns at a time, spread over the grid."""
    M, N, G, alignment = shape_args
    R: gl.constexpr = 8
    W: gl.constexpr = 32 * cfg.STORE_VEC
    lay: gl.constexpr = gl.BlockedLayout([cfg.STORE_VEC], [32], [1], [0])
    zero = gl.zeros([W], gl.float32, lay).to(out_ptr.dtype.element_ty)
    if cfg.LAYOUT == PSUM:
        starts, sizes = all_groups(shape_args, index_ptr, cfg, 1)
        ends = starts + sizes
    strips = gl.cdiv(N, 8 * W)
    for u in range(gl.program_id(0), gl.cdiv(M, R) * strips, gl.num_programs(0)):
        r0 = u // strips
        c0 = (u - r0 * strips) * (8 * W)
        c1 = gl.minimum(c0 + 8 * W, N)
        r0 = r0 * R
        dead = u * 0            # a bit a row
        for i in gl.static_range(R):
            r = r0 + i
            if cfg.LAYOUT == CONTIGUOUS:
                g = gl.load(index_ptr + r, mask=r < M, other=0).to(gl.int32)
                dead |= gl.where((g < 0) | (g >= G), 1 << i, 0)
            else:
                inside = (starts <= r) & (r < ends)
                dead |= gl.where((r < M) & (gl.max(inside.to(gl.int32), 0) == 0), 1 << i, 0)
        for i in range(0, gl.minimum(M - r0, R)):
            if (dead >> i) & 1 == 1:
                # columns count from c0: fewer values that live from the kernel's start, where registers are fewest
                base = out_ptr + ((r0 + i).to(gl.int64) * som + c0)
                for c in range(0, c1 - c0, W):
                    n = c + gl.arange(0, W, lay)
                    put(base + n, zero, n < N - c0, cfg)
