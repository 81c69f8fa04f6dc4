"""Between the launch that folds A and the product of folded MXFP8 by folded MXFP8: what that still needs.

Mostly nothing. Where columns are left out of A, their weights in BF16; where too much doesn't fold, A and all weights in BF16, as
`expand_device.py` brings them there for the product of `expand.py`. What mostly happens stands in
front, and no shared memory is used: a launch that does nothing took 1 to 2 us so on an H100, one by `expand_device.py` 6 on an H200.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .expand_device import pairs_of_e4m3, scaled_pair
from .fold_outliers_device import outlying_rows
from .fp8_block_schedule_device import OFFSETS
from .narrow_prep_device import least_shift, power_of_two

ROWS = gl.constexpr(4)          # of A, a piece
BLOCKS = gl.constexpr(64)       # of 32 of K, at a time,
SCALES = gl.constexpr(256)      # and those whose scales are looked at
WEIGHTS = gl.constexpr(16)      # rows of weights, a piece,
CHUNKS = gl.constexpr(8)        # by so many times 128 of K
CODES = gl.constexpr(1024)      # factors of weights' rows
ONE = gl.constexpr(133)         # a weight row's code for a factor of one: sums are taken for 2^6 times what they are
# [4 rows, 64 times, 32 of K]; [16 rows, 8 chunks, 4 times 32 of K, 8 words]
OF_A = gl.constexpr(gl.BlockedLayout([1, 1, 16], [1, 16, 2], [4, 1, 1], [2, 1, 0]))
OF_W = gl.constexpr(gl.BlockedLayout([1, 1, 1, 4], [8, 1, 4, 1], [2, 2, 1, 1], [3, 2, 1, 0]))
ONE_EACH = gl.constexpr(gl.BlockedLayout([8], [32], [4], [0]))


@gluon.jit
def wide_rows(x_ptr, s_ptr, y_ptr, factor_ptr, first, M, K, KX, sxm, ssm, ssk):
    """ROWS rows of A in BF16, and what their sums are multiplied by: `expand_rows`."""
    flat: gl.constexpr = gl.SliceLayout(2, OF_A)
    r = first + gl.arange(0, ROWS, gl.SliceLayout(1, flat))
    block = gl.arange(0, BLOCKS, gl.SliceLayout(0, flat))
    column = gl.expand_dims(gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(0, OF_A))), 0), 0)
    there = gl.expand_dims(r < M, 1)
    s_ptr += gl.expand_dims(r.to(gl.int64) * ssm, 1)
    top = r * 0
    bottom = top + 255
    nan = top
    every = gl.arange(0, SCALES, gl.SliceLayout(0, flat))
    for b in range(0, gl.cdiv(K, 32), SCALES):
        live = there & gl.expand_dims((b + every) * 32 < K, 0)
        code = gl.load(s_ptr + gl.expand_dims((b + every).to(gl.int64) * ssk, 0), mask=live, other=127).to(gl.int32)
        nan = gl.maximum(nan, gl.max((code == 255).to(gl.int32), 1))
        top = gl.maximum(top, gl.max(gl.where((code == 255) | (live == 0), 0, code), 1))
        bottom = gl.minimum(bottom, gl.min(gl.where(live, code, 255), 1))
    shift = least_shift(top, bottom)
    x_ptr += gl.expand_dims(gl.expand_dims(r.to(gl.int64) * sxm, 1), 2)
    y_ptr += gl.expand_dims(gl.expand_dims(r.to(gl.int64) * KX, 1), 2)
    for b in range(0, KX // 32, BLOCKS):
        live = there & gl.expand_dims((b + block) * 32 < K, 0)
        code = gl.load(s_ptr + gl.expand_dims((b + block).to(gl.int64) * ssk, 0), mask=live, other=127).to(gl.int32)
        k = gl.expand_dims(gl.expand_dims((b + block) * 32, 0), 2) + column
        x = gl.load(x_ptr + k, mask=gl.expand_dims(live, 2), other=0.0).to(gl.float32)
        y = x * gl.expand_dims(power_of_two(code - gl.expand_dims(shift, 1) - 127), 2)
        inside = there & gl.expand_dims((b + block) * 32 < KX, 0)
        gl.store(y_ptr + k, y.to(gl.bfloat16), mask=gl.expand_dims(inside, 2))
    gl.store(factor_ptr + r, gl.where(nan > 0, float("nan"), power_of_two(shift)), mask=r < M)


@gluon.jit
def wide_weights(w_ptr, f_ptr, factors_ptr, v_ptr, piece, KC, FACTOR: gl.constexpr):
    """WEIGHTS rows of packed weights by CHUNKS of 128 of K in BF16, as words of four: `expand_weights`; NaN in rows whose factor is, which a
    code of the store doesn't hold."""
    parts = gl.cdiv(KC, CHUNKS)
    slab = piece // parts
    unit = (slab // 4).to(gl.int64)
    three: gl.constexpr = gl.SliceLayout(3, OF_W)
    two: gl.constexpr = gl.SliceLayout(2, three)
    r = gl.expand_dims(gl.expand_dims(slab % 4 * WEIGHTS + gl.arange(0, WEIGHTS, gl.SliceLayout(1, two)), 1), 2)
    c = gl.expand_dims(gl.expand_dims(piece % parts * CHUNKS + gl.arange(0, CHUNKS, gl.SliceLayout(0, two)), 0), 2)
    q = gl.expand_dims(gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(0, three))), 0), 0)
    o = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, OF_W))))
    o = gl.expand_dims(gl.expand_dims(gl.expand_dims(o, 0), 0), 0)
    live = (c < KC) & (r >= 0) & (q >= 0)
    of_row = (r // 16 * 8 + r % 8) * 16 + r % 16 // 8
    field = gl.load(f_ptr + unit * ((KC + 1) // 2) * 512 + (of_row + (c // 2 * 512 + c % 2 * 2) + q * 4), mask=live, other=0).to(gl.int32)
    scale = (field << 23).to(gl.float32, bitcast=True)
    if FACTOR:
        factor = gl.load(factors_ptr + unit * 64 + r)
        scale += gl.where(factor == factor, 0.0, float("nan"))
    scale = gl.expand_dims(scale, 3)
    live = gl.expand_dims(live, 3) & (o >= 0)
    at = gl.expand_dims(c * 2048 + (r * 4 + q) * 4, 3) + (o // 4 * 1024 + o % 4)
    low, high = pairs_of_e4m3(gl.load(w_ptr + unit * KC * 2048 + at, mask=live, other=0))
    both = (scaled_pair(low, scale).to(gl.int64) & 0xFFFFFFFF) | (scaled_pair(high, scale).to(gl.int64) << 32)
    gl.store(v_ptr + unit * 64 * KC * 32 + (gl.expand_dims(r * (KC * 32) + c * 32 + q * 8, 3) + o), both, mask=live)


@gluon.jit
def codes_of_factors(factors_ptr, codes_ptr, first, N, FACTOR: gl.constexpr):
    """Factors of weights' rows, powers of two, as the product's store takes them."""
    n = first + gl.arange(0, CODES, ONE_EACH)
    code = n * 0 + ONE
    if FACTOR:
        power = (gl.load(factors_ptr + n, mask=n < N, other=1.0).to(gl.int32, bitcast=True) >> 23) & 255
        code = gl.minimum(power + (ONE - 127), 254)
    gl.store(codes_ptr + n, code.to(gl.uint8), mask=n < N)


@gluon.jit
def make_wide(index_ptr, given, made, M, K, KB, G, N, LAYOUT: gl.constexpr, FACTOR: gl.constexpr):
    """All of A, and of the weights of groups with rows."""
    x_ptr, s_ptr, sxm, ssm, ssk, w_ptr, f_ptr, factors_ptr = given
    y_ptr, factor_ptr, v_ptr, codes_ptr = made
    of_rows = gl.cdiv(M, ROWS)
    of_group = N // WEIGHTS * gl.cdiv(KB, CHUNKS)
    of_weights = of_rows + G * of_group
    for piece in range(gl.program_id(0), of_weights + gl.cdiv(G * N, CODES), gl.num_programs(0)):
        if piece < of_rows:
            wide_rows(x_ptr, s_ptr, y_ptr, factor_ptr, piece * ROWS, M, K, KB * 128, sxm, ssm, ssk)
        elif piece < of_weights:
            wanted = piece >= 0
            if LAYOUT == OFFSETS:
                g = (piece - of_rows) // of_group
                wanted = gl.load(index_ptr + g + 1) > gl.load(index_ptr + g)
            if wanted:
                wide_weights(w_ptr, f_ptr, factors_ptr, v_ptr, piece - of_rows, KB, FACTOR)
        else:
            codes_of_factors(factors_ptr, codes_ptr, (piece - of_weights) * CODES, G * N, FACTOR)


@gluon.jit(do_not_specialize=["M", "KB", "G", "ssm", "ssk", "limit"])
def rest_kernel(count_ptr, index_ptr, x_ptr, s_ptr, sxm, ssm, ssk, w_ptr, f_ptr, factors_ptr, y_ptr, factor_ptr, v_ptr, codes_ptr, folded_ptr, list_ptr,
                r_ptr, M, N, K, KB, G, limit, LAYOUT: gl.constexpr, FACTOR: gl.constexpr, OUTLYING: gl.constexpr, WHOLE: gl.constexpr):
    """count_ptr: flags that are up; columns that are left out of A, listed, whose weights r_ptr takes from folded_ptr [G * N, K]. Where more than
    `limit` flags are up nothing or, WHOLE, A as it came and packed weights [G, N, K] to y_ptr and v_ptr, with factors FP32 [M] and codes
    [G, N]."""
    gdc_wait()
    gdc_launch_dependents()
    whole = gl.load(count_ptr) > limit
    removed = gl.load(count_ptr + 1)
    if whole | (removed > 0):
        if whole:
            if WHOLE:
                make_wide(index_ptr, (x_ptr, s_ptr, sxm, ssm, ssk, w_ptr, f_ptr, factors_ptr), (y_ptr, factor_ptr, v_ptr, codes_ptr), M, K, KB, G,
                          N, LAYOUT, FACTOR)
        else:
            for item in range(gl.program_id(0), gl.cdiv(G * N, OUTLYING), gl.num_programs(0)):
                outlying_rows(folded_ptr, list_ptr, r_ptr, item * OUTLYING, removed, G * N, K, OUTLYING)
