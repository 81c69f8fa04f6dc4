"""The launches in front of the product of folded MXFP8 by folded MXFP8 where A has few rows: folded and looked at in one launch.

Each launch costs its microseconds whatever it does, and of few rows those are what the call takes. So blocks are folded before anybody knows
whether columns of A are far larger than others, and looks (`fold_outliers_device.py`) are programs beside. The launch behind, which the
product needs in any case, reads what all of them found: where columns are to be left out it folds A once more without them, where too much
doesn't fold it brings both operands to BF16, and mostly it does nothing.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .fold_both_rest_device import make_wide
from .fold_mixed_prep_device import NEVER, fold_as_one, fold_in_parts
from .fold_mixed_words_device import PAIR
from .fold_outliers_device import _WORDS, LOOKS, THERE, WITH, bits, found_by, look, looked, of_blocks, outlying_rows, pick_removed, rank, said
from .fold_pick_device import DENSE, PLACE, PLACE_LINES, keep, pick_columns
from .fp8_block_schedule_device import fresh
from .shim import block_barrier

FAR = gl.constexpr(1 << 30)     # of a block's flag: scales out of what the product takes
_FLAGS = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))
MOST_BLOCKS = gl.constexpr(512)
_LIST = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def add(x, y):
    return x + y


@gluon.jit
def fold_block(place, given, made, picks, i, mask, before, removed, M, K, KB, ALIGNED: gl.constexpr, REMOVE: gl.constexpr):
    """Block i of A, its flag and its picks; REMOVE: without columns `mask`, which leave as picks, too."""
    x_ptr, s_ptr, sxm, ssm, ssk = given
    y_ptr, ys_ptr, flags_ptr, column = made
    index_ptr, at_ptr, pick_ptr, p_ptr, list_ptr, G, number, pitch = picks
    kb = i % KB
    first = i // KB * 64
    both = fold_as_one(place, x_ptr, s_ptr, y_ptr, ys_ptr, first, M, kb, K, KB, sxm, ssm, ssk, column, mask, ALIGNED, True, REMOVE)
    cuts = both * 0
    if both & 0xFFFF > 0:
        cuts = fold_in_parts(x_ptr, s_ptr, y_ptr, ys_ptr, fresh(first), M, fresh(kb), K, fresh(KB), fresh(sxm), fresh(ssm), ssk, column, mask, ALIGNED,
                             REMOVE)
    far = gl.where(both >> 16 > 0, FAR, 0)
    gl.store(flags_ptr + i, (cuts | far).to(gl.int32))
    block_barrier()
    if REMOVE:
        pick_removed(place, index_ptr, list_ptr, p_ptr, first, kb, M, G, number, pitch, before, removed, mask, DENSE, 32)
    else:
        pick_columns(place, index_ptr, at_ptr, pick_ptr, p_ptr, first, kb, M, KB, G, number, pitch, DENSE, 32)
    keep(place)


@gluon.jit(do_not_specialize=["M", "K", "KB", "RB", "column", "G", "number"])
def fold_beside_kernel(x_ptr, s_ptr, sxm, ssm, ssk, y_ptr, ys_ptr, flags_ptr, looks_ptr, at_ptr, pick_ptr, p_ptr, M, K, KB, RB, column, G, number,
                       pitch, ALIGNED: gl.constexpr):
    """A as `fold_mixed_kernel` takes it, one plane, to what it makes, but that flags say FAR, and nothing is counted; programs behind are
    `look_kernel`'s."""
    i = gl.program_id(0)
    if i < RB * KB:
        place = gl.allocate_shared_memory(gl.int32, [PLACE_LINES, 32], PLACE)
        mask = gl.zeros([1, 4], gl.int32, PAIR)
        fold_block(place, (x_ptr, s_ptr, sxm, ssm, ssk), (y_ptr, ys_ptr, flags_ptr, column),
                   (flags_ptr, at_ptr, pick_ptr, p_ptr, flags_ptr, G, number, pitch), i, mask, i * 0, i * 0, M, K, KB, ALIGNED, False)
    else:
        look(x_ptr, s_ptr, looks_ptr, i - RB * KB, LOOKS * KB, M, K, KB, RB, sxm, ssm, ssk, ALIGNED)


@gluon.jit
def list_columns(looks_ptr, list_ptr, KB, BLOCKS: gl.constexpr):
    """Columns that are left out, in their order: by every program, which all write the same."""
    b, w = of_blocks(BLOCKS)
    masks_ptr = looks_ptr + LOOKS * KB
    all = gl.zeros([BLOCKS, 4], gl.int32, _WORDS)
    for i in gl.static_range(LOOKS):
        all = all | found_by(looks_ptr, masks_ptr, i, b, w, KB)
    words = gl.convert_layout(gl.reshape(all, [BLOCKS * 4]), _LIST)
    number = bits(words)
    start = gl.associative_scan(number, 0, add) - number
    first = gl.arange(0, BLOCKS * 4, _LIST) * 32
    for j in range(0, 32):
        gl.store(list_ptr + (start + rank(words, j)), first + j, mask=((words >> j) & 1) == 1)
    block_barrier()


@gluon.jit
def decide(looks_ptr, flags_ptr, KB, RB, limit, BLOCKS: gl.constexpr):
    """(whether all is to be in BF16, columns that are left out of A)."""
    i = gl.arange(0, MOST_BLOCKS, _FLAGS)
    up = gl.load(flags_ptr + i, mask=i < KB * RB, other=0)
    sums = said(looks_ptr, KB, BLOCKS)
    # cuts of a block are its flag's bits; 2^16 for each that is far out
    found = gl.sum((up & 1) + ((up >> 1) & 1) + ((up >> 2) & 1) + ((up >> 30) << 16), 0)
    whole = (found > limit) | (((sums // WITH) & (WITH - 1)) * 2 > KB * LOOKS)
    removed = sums * 0
    if sums >= THERE:
        given_up, before, removed, mask = looked(looks_ptr, sums * 0, KB, BLOCKS)
        whole = (found >= 1 << 16) | given_up | ((removed == 0) & (found > limit))
        removed = gl.where(whole, 0, removed)
    return whole, removed


@gluon.jit(do_not_specialize=["M", "K", "KB", "RB", "column", "G", "number", "limit"])
def rest_beside_kernel(x_ptr, s_ptr, sxm, ssm, ssk, y_ptr, ys_ptr, flags_ptr, looks_ptr, count_ptr, list_ptr, p_ptr, w_ptr, f_ptr, factors_ptr, wide_ptr,
                       factor_ptr, v_ptr, codes_ptr, folded_ptr, r_ptr, bytes_ptr, sxm_bytes, M, N, K, KB, RB, column, G, number, pitch, limit,
                       ALIGNED: gl.constexpr, BLOCKS: gl.constexpr, FACTOR: gl.constexpr, OUTLYING: gl.constexpr):
    """What the product needs beside, see `rest_kernel`; says in count_ptr which it takes, and how many columns are left out. bytes_ptr: x as
    elements."""
    whole, removed = decide(looks_ptr, flags_ptr, KB, RB, limit, BLOCKS)
    if gl.program_id(0) == 0:
        gl.store(count_ptr, gl.where(whole, NEVER, 0).to(gl.int32))
        gl.store(count_ptr + 1, removed.to(gl.int32))
    if whole | (removed > 0):
        if whole:
            make_wide(count_ptr, (bytes_ptr, s_ptr, sxm_bytes, ssm, ssk, w_ptr, f_ptr, factors_ptr), (wide_ptr, factor_ptr, v_ptr, codes_ptr), M, K,
                      KB, G, N, DENSE, FACTOR)
        else:
            place = gl.allocate_shared_memory(gl.int32, [PLACE_LINES, 32], PLACE)
            list_columns(looks_ptr, list_ptr, KB, BLOCKS)
            items = RB * KB
            for item in range(gl.program_id(0), items + gl.cdiv(G * N, OUTLYING), gl.num_programs(0)):
                if item < items:
                    given_up, before, all, mask = looked(looks_ptr, item % KB, KB, BLOCKS)
                    block_barrier()
                    if (item % KB == 0) | (gl.max(gl.max((mask != 0).to(gl.int32), 1), 0) > 0):
                        fold_block(place, (x_ptr, s_ptr, sxm, ssm, ssk), (y_ptr, ys_ptr, flags_ptr, column),
                                   (count_ptr, count_ptr, count_ptr, p_ptr, list_ptr, G, number, pitch), item, mask, before, removed, M, K, KB,
                                   ALIGNED, True)
                else:
                    outlying_rows(folded_ptr, list_ptr, r_ptr, (item - items) * OUTLYING, removed, G * N, K, OUTLYING)
