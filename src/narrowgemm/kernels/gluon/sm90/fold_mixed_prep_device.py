"""The launches in front of the FP8 product with MXFP8 activations: each K block of 128 with one scale a row, where that is exact.

64 rows by 128 of K whose elements all stay what they are when the largest of a row's four scales is factored out leave folded, with
that scale four times. Others are cut into as few parts, each some times 32 of K, as leave every element what it is, with a scale for
each. Bit b of the flag that the product reads says that there is a cut behind 32 * (b + 1) of K.

Where the weights came as MXFP8, columns of A that meet an element which is not among the folded ones leave in BF16 beside.

A look at some blocks in front spares all where most would not fold.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .fp8_block_schedule_device import fresh
from .fold_mixed_words_device import (
    MOST,
    PAIR,
    any_part,
    counting,
    cuts_of,
    least_of,
    load_block,
    over_code,
    rows_apart,
    scales_between,
    store_block,
    without,
)
from .fold_outliers_device import looked, pick_removed
from .fold_pick_device import PLACE, PLACE_LINES, keep, pick_columns, place_block
from .shim import block_barrier

LOW = gl.constexpr(16)      # scale codes between which products and sums stay inside FP32, whatever the weights' scales
HIGH = gl.constexpr(200)
PICK_LOW = gl.constexpr(64)     # the same beside picks, whose weights may be 2^40 smaller than the largest of their row
PICK_HIGH = gl.constexpr(180)
NEVER = gl.constexpr(1 << 30)   # a count above every limit, however much is added


@gluon.jit
def end_of(index_ptr, plane, M, MASKED: gl.constexpr):
    """Rows of a plane that are in use."""
    if MASKED:
        return gl.minimum(gl.maximum(gl.load(index_ptr + plane), 0), M).to(gl.int32)
    else:
        return M


@gluon.jit
def as_one(x, code, there, mask, REMOVE: gl.constexpr):
    """(words over one scale a row, that scale's code [64, 1], which 32 of K count for it [64, 4], where something does not fold so
    [16, 4])."""
    holds, counts = counting(x, code)
    top = gl.expand_dims(gl.max(gl.where(counts, least_of(x, code, mask, REMOVE), 0), 1), 1)
    y, lost = over_code(x, code, top, holds, REMOVE)
    return y, top, counts, any_part((gl.max(lost, 2) > 0) | (holds & (top - code > MOST)) | (there & (code == 255)))


@gluon.jit(do_not_specialize=["M", "K", "KB", "RB", "planes"])
def probe_kernel(x_ptr, s_ptr, index_ptr, probes_ptr, count_ptr, M, K, KB, RB, planes, sxg, sxm, ssg, ssm, ssk, MASKED: gl.constexpr,
                 ALIGNED: gl.constexpr):
    """A as `fold_mixed_kernel` takes it. probes int32 [programs]: whether one of so many blocks, spread over all, does not fold as one.
    Clears the count, and that of columns that are left out."""
    gdc_launch_dependents()
    i = gl.program_id(0)
    t = (i.to(gl.int64) * (planes * RB) // gl.num_programs(0)).to(gl.int32)
    plane = t // RB
    end = end_of(index_ptr, plane, M, MASKED)
    first = t % RB % gl.maximum((end + 63) // 64, 1) * 64
    unit: gl.constexpr = 4 if ALIGNED else 1
    x, code, there = load_block(x_ptr + plane.to(gl.int64) * sxg * unit, s_ptr + plane.to(gl.int64) * ssg, first, end, i * 5 % KB, K, sxm, ssm,
                                ssk, ALIGNED)
    y, top, counts, lost = as_one(x, code, there, 0, False)
    lost = gl.max(gl.max(lost.to(gl.int32), 1), 0)
    gl.store(probes_ptr + i, lost)
    if i == 0:
        gl.store(count_ptr, lost * 0)
        gl.store(count_ptr + 1, lost * 0)


@gluon.jit
def mostly_lost(probes_ptr, PROBES: gl.constexpr):
    probes = gl.load(probes_ptr + gl.arange(0, PROBES, gl.BlockedLayout([1], [32], [4], [0])))
    return gl.sum(probes, 0) * 2 > PROBES


@gluon.jit
def fold_in_parts(x_ptr, s_ptr, y_ptr, ys_ptr, first, end, kb, K, KB, sxm, ssm, ssk, column, mask, ALIGNED: gl.constexpr, REMOVE: gl.constexpr):
    """A block over as few scales as leave all what it is: their cuts. It is read once more: what few blocks need would take registers
    from all."""
    x, code, there = load_block(x_ptr, s_ptr, first, end, kb, K, sxm, ssm, ssk, ALIGNED)
    x = without(x, mask, REMOVE)
    cuts = cuts_of(rows_apart(x, code, there, mask, REMOVE))
    own, holds = scales_between(cuts, x, code, mask, REMOVE)
    y, lost = over_code(x, code, own, holds, REMOVE)
    store_block(y_ptr, ys_ptr, y, own, first, end, kb, KB, column)
    return cuts


@gluon.jit
def fold_as_one(place, x_ptr, s_ptr, y_ptr, ys_ptr, first, end, kb, K, KB, sxm, ssm, ssk, column, mask, ALIGNED: gl.constexpr,
                PICKS: gl.constexpr, REMOVE: gl.constexpr):
    """A block over one scale a row: how many of its parts don't fold so, and 2^16 times how many have scales that are far out."""
    low: gl.constexpr = PICK_LOW if PICKS else LOW
    high: gl.constexpr = PICK_HIGH if PICKS else HIGH
    x, code, there = load_block(x_ptr, s_ptr, first, end, kb, K, sxm, ssm, ssk, ALIGNED)
    if PICKS:
        place_block(place, x, code)
    x = without(x, mask, REMOVE)
    y, top, counts, lost = as_one(x, code, there, mask, REMOVE)
    # stored before it is known to be right: what is wrong is overwritten, by the threads that wrote it
    store_block(y_ptr, ys_ptr, y, top + code * 0, first, end, kb, KB, column)
    far = any_part(counts & ((code < low) | (code > high)))
    return gl.sum(gl.sum(lost.to(gl.int32) + (far.to(gl.int32) << 16), 1), 0)


@gluon.jit(do_not_specialize=["M", "K", "KB", "RB", "column", "G", "picks"])
def fold_mixed_kernel(x_ptr, s_ptr, index_ptr, y_ptr, ys_ptr, flags_ptr, count_ptr, probes_ptr, list_ptr, at_ptr, pick_ptr, p_ptr, M, K, KB, RB,
                      sxg, sxm, ssg, ssm, ssk, column, G, picks, pitch, MASKED: gl.constexpr, ALIGNED: gl.constexpr, PROBES: gl.constexpr,
                      PICKS: gl.constexpr, LAYOUT: gl.constexpr, GROUPS: gl.constexpr, EARLY: gl.constexpr, REMOVE: gl.constexpr = 0):
    """x [planes, M, K] E4M3, as words, their strides in 16 bytes (ALIGNED) or as bytes; s [planes, M, ceil(K / 32)] E8M0. To y words
    [planes, M, KB * 32] and ys FP32 [planes, KB, 4, 4 * column]; flags int32 [planes, RB, KB], one for 64 rows of a K block. count_ptr:
    += cuts, and at least NEVER where a scale is out of what the product takes, or where more than half of `probes` don't fold, and then
    nothing else is written but by the first EARLY programs. MASKED: rows from index[plane] on are left out.

    PICKS: scales of A have to lie in the window that products with picks take; see `pick_columns` for at, pick and p.
    REMOVE: columns of A that are far larger than others are left out, and leave as picks behind the weights': `fold_outliers_device.py`,
    whose looks are the probes then. REMOVE is a power of two, at least KB."""
    kb = gl.program_id(0) % KB
    rb = gl.program_id(0) // KB
    plane = rb * 0
    if MASKED:
        plane = rb // RB
        rb = rb % RB
    first = rb * 64
    end = end_of(index_ptr, plane, M, MASKED)
    gdc_launch_dependents()
    # programs that start beside the look in front wait for it behind the first half of their work, which nobody else has done
    early = gl.program_id(0) < EARLY
    wanted = first < end
    mask = gl.zeros([1, 4], gl.int32, PAIR)
    before = gl.to_tensor(0)
    removed = gl.to_tensor(0)
    if early == 0:
        gdc_wait()
        if REMOVE > 0:
            given_up, before, removed, mask = looked(probes_ptr, kb, KB, REMOVE)
        else:
            given_up = mostly_lost(probes_ptr, PROBES)
        wanted = wanted & (given_up == 0)
    p64 = plane.to(gl.int64)
    unit: gl.constexpr = 4 if ALIGNED else 1
    x_ptr += p64 * sxg * unit
    s_ptr += p64 * ssg
    y_ptr += p64 * M * (KB * 32)
    ys_ptr += p64 * KB * 16 * column
    place = 0
    if PICKS:
        place = gl.allocate_shared_memory(gl.int32, [PLACE_LINES, 32], PLACE)
    both = kb * 0
    if wanted:
        both = fold_as_one(place, x_ptr, s_ptr, y_ptr, ys_ptr, first, end, kb, K, KB, sxm, ssm, ssk, column, mask, ALIGNED, PICKS, REMOVE > 0)
    if early:
        gdc_wait()
        if REMOVE > 0:
            given_up, before, removed, mask = looked(probes_ptr, kb, KB, REMOVE)
        else:
            given_up = mostly_lost(probes_ptr, PROBES)
        if gl.program_id(0) == 0:
            if given_up:
                gl.atomic_max(count_ptr, NEVER, sem="relaxed")
            if REMOVE > 0:
                gl.store(count_ptr + 1, removed)
        wanted = wanted & (given_up == 0)
        if REMOVE > 0:
            if wanted & (gl.max(gl.max((mask != 0).to(gl.int32), 1), 0) > 0):
                both = fold_as_one(place, x_ptr, s_ptr, y_ptr, ys_ptr, first, end, fresh(kb), K, fresh(KB), fresh(sxm), fresh(ssm), ssk, column, mask,
                                   ALIGNED, PICKS, True)
    if wanted:
        if both >> 16 > 0:      # not added up: however many there are, it stays above every limit
            gl.atomic_max(count_ptr, NEVER, sem="relaxed")
        cuts = both * 0
        if both & 0xFFFF > 0:
            # from addresses made anew: `fresh`
            cuts = fold_in_parts(x_ptr, s_ptr, y_ptr, ys_ptr, fresh(first), end, fresh(kb), K, fresh(KB), fresh(sxm), fresh(ssm), ssk, column,
                                 mask, ALIGNED, REMOVE > 0)
            gl.atomic_add(count_ptr, (cuts & 1) + ((cuts >> 1) & 1) + (cuts >> 2), sem="relaxed")
        gl.store(flags_ptr + (plane * RB + rb) * KB + kb, cuts.to(gl.int32))
        if PICKS:
            block_barrier()
            pick_columns(place, index_ptr, at_ptr, pick_ptr, p_ptr, first, kb, M, KB, G, picks, pitch, LAYOUT, GROUPS)
            if REMOVE > 0:
                if removed > 0:
                    pick_removed(place, index_ptr, list_ptr, p_ptr, first, kb, M, G, picks, pitch, before, removed, mask, LAYOUT, GROUPS)
            keep(place)
